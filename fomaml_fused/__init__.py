"""First-order MAML for multi-layer perceptrons at the speed of the hardware."""

from pathlib import Path

# A checkout that is not installed has its kernels beside this folder.
if not Path(__file__).with_name("kernels").is_dir():
    __path__.append(str(Path(__file__).parents[1]))

from . import compat, diagnostics, reference, tasks
from .adapted import AdaptedMLP
from .module import FOMAML
from .network import Sine
from .plans import Plan, override
from .presets import ANIL, MetaSGD, Reptile
from .problem import Loss
from .sirens import siren
from .tuning import tune
from .version import __version__

__all__ = [
    "ANIL",
    "FOMAML",
    "AdaptedMLP",
    "Loss",
    "MetaSGD",
    "Plan",
    "Reptile",
    "Sine",
    "__version__",
    "compat",
    "diagnostics",
    "override",
    "reference",
    "siren",
    "tasks",
    "tune",
]
