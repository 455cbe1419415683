"""The kernels' part of the planner: which of them take a problem, how they are laid out, what they would cost.

Asks Triton about its driver, so it is imported only where Triton is.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from .batch import Sizes
from .costs import GPU, KERNELS, dual_seconds, layered_seconds, resident_seconds
from .engines import dual, launching, resident
from .kernels.configuration import Config, DualConfig, configuration
from .kernels.resources import REGISTERS, Need, dual_need, resident_need, weight_tiles
from .kernels.spec import Spec
from .planner import Estimate, LayerPlan, Override, Plan, tuned_for
from .problem import Problem

ENGINES = ("resident", "dual", "layered")


def obstacle(problem: Problem, sizes: Sizes, told: Override) -> str | None:
    """Why no kernel takes a problem, whatever its size."""
    if told.forms is not None:
        return "the overriding forms are those of batched torch ops"
    if sizes.dtype == torch.float64:
        return "kernels compute in float32, the model is float64"
    if max(sizes.shots, sizes.queries) * max(problem.network.widths) >= 2**31:
        return "a task has 2^31 numbers or more, and offsets within a task are 32 bits"
    return None
