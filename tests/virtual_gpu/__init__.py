"""An emulator of NVIDIA GPUs: it executes the PTX that Triton compiles, on the CPU.

    from tests import virtual_gpu

    virtual_gpu.activate(90, races=True)
    kernel[grid](cpu_tensor, ...)

`pytest --kernels=sm_90` runs kernel tests on it. docs/emulator.md says what it checks and what it does not model.
"""

from .counts import Counts
from .driver import ARCHITECTURES, Launch, activate, changed, record
from .faults import KernelError
from .launch import Options, launch

__all__ = ["ARCHITECTURES", "Counts", "KernelError", "Launch", "Options", "activate", "changed", "launch", "record"]
