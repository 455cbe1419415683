"""Triton drivers for GPUs that need not be there: what is launched is recorded, can be compiled, and does not run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

import fomaml_fused as ff
from fomaml_fused.engines import launching


@dataclass(frozen=True)
class Device:
    """What launch code asks of a GPU.

    Attributes:
        target: what the compiler is told.
        shared_memory: bytes that a program may have; no compiler checks it, only a launch would.
        multiprocessors: how many there are.
    """

    target: GPUTarget
    shared_memory: int
    multiprocessors: int


# An A100, an H100, a B200 and an MI300X: the devices that every kernel is compiled for.
MAIN_DEVICES = {
    "sm_80": Device(GPUTarget("cuda", 80, 32), 166_912, 108),
    "sm_90": Device(GPUTarget("cuda", 90, 32), 232_448, 132),
    "sm_100": Device(GPUTarget("cuda", 100, 32), 232_448, 148),
    "gfx942": Device(GPUTarget("hip", "gfx942", 64), 65_536, 304),
}
# With an RTX 3090, an RTX 4090, an RTX 5090, an MI250X, an MI355X and an RX 7900 XTX: some kernels of each engine.
DEVICES = MAIN_DEVICES | {
    "sm_86": Device(GPUTarget("cuda", 86, 32), 101_376, 82),
    "sm_89": Device(GPUTarget("cuda", 89, 32), 101_376, 128),
    "sm_120": Device(GPUTarget("cuda", 120, 32), 101_376, 170),
    "gfx90a": Device(GPUTarget("hip", "gfx90a", 64), 65_536, 110),
    "gfx950": Device(GPUTarget("hip", "gfx950", 64), 163_840, 256),
    "gfx1100": Device(GPUTarget("hip", "gfx1100", 32), 65_536, 48),
}


@dataclass(frozen=True)
class Launch:
    """What a launch hands to the compiler: a kernel and, of each argument, its type or its value; options."""

    source: ASTSource
    options: dict[str, Any]
    target: GPUTarget

    @property
    def kernel(self) -> str:
        name: str = self.source.fn.__name__
        return name

    @property
    def key(self) -> tuple[GPUTarget, str, str]:
        """What the compiled kernel depends on."""
        return self.target, self.source.hash(), str(self.options)

    def constant(self, name: str) -> Any:
        """The value of a compile-time argument; None where the kernel has none of that name."""
        return {self.source.fn.arg_names[path[0]]: value for path, value in self.source.constants.items()}.get(name)

    def leaves_out(self, name: str) -> bool:
        """Whether a pointer is None; not where the kernel has none of that name."""
        left_out: bool = self.source.signature.get(name) == "constexpr"
        return left_out

    def compile(self) -> Any:
        """Triton's compiled kernel."""
        return triton.compile(self.source, target=self.target, options=self.options)


@contextmanager
def recorded(device: str) -> Iterator[list[Launch]]:
    """Within the block, kernels launched on CPU tensors do not run: the list has what each launch would compile.

    The device stays Triton's after it, for without a GPU Triton has none to go back to.
    """
    driver = Driver(device)
    launches: list[Launch] = []

    def keep(kernel: Any, *described: Any) -> None:
        _key, signature, _device, constants, options, attributes, _warm_up = described
        launches.append(Launch(ASTSource(kernel, signature, constants, attributes), vars(options), driver.target))

    triton.runtime.driver.set_active(driver)
    forget_device()
    with mock.patch.object(JITFunction, "_do_compile", keep):
        yield launches


def forget_device() -> None:
    """Have what is known of Triton's device asked anew: it is remembered by torch's, and to torch all are the CPU."""
    ff.planner.forget_plans()
    launching.properties.cache_clear()


class Driver(DriverBase):  # type: ignore[misc]
    """Serves CPU tensors; it is its own `utils`, of which launch code needs the properties of the device alone."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.name, self.device, self.target, self.utils = device, DEVICES[device], DEVICES[device].target, self

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return self.name  # by which Triton keeps what it made of a kernel's signature

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_properties(self, device: str) -> dict[str, int]:
        return {"multiprocessor_count": self.device.multiprocessors, "max_shared_mem": self.device.shared_memory}

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError("only a launcher that is built asks for it")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("nothing runs, so nothing can be timed")
