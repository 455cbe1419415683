"""A Triton driver whose device is the emulator: launches on CPU tensors compile for a CUDA architecture, and run.

All but the driver is Triton's own, so a launch that needs too much shared memory fails as on a GPU.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.nvidia.driver import ty_to_cpp

from bench.compile_only import Driver, forget_device

from .counts import Counts
from .faults import KernelError
from .launch import Options, launch

ARCHITECTURES = (80, 86, 89, 90)  # that are modelled
LARGEST_GRID = (2**31 - 1, 65_535, 65_535)


@dataclass(frozen=True)
class Launch:
    """A launch that `record` saw."""

    name: str
    grid: tuple[int, int, int]
    num_warps: int
    counts: Counts


_options = Options()
_recorders: list[list[Launch]] = []
_files: dict[str, Path] = {}  # of the kernel that is loaded, by suffix


def activate(architecture: int, **options: bool) -> None:
    """Make the emulator Triton's device: one of `ARCHITECTURES`, with `Options`.

    Raises:
        RuntimeError: TRITON_INTERPRET is set, so that kernels would not be compiled.
        ValueError: the architecture is not modelled.
    """
    global _options
    if architecture not in ARCHITECTURES:
        raise ValueError(f"the architecture is {architecture}; the emulator takes {', '.join(map(str, ARCHITECTURES))}")
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set, so kernels are interpreted; unset it to emulate compiled ones")
    triton.runtime.driver.set_active(VirtualDriver(architecture))
    forget_device()
    triton.knobs.runtime.kernel_load_start_hook.add(_note_files)
    _options = Options(**options)


@contextmanager
def changed(**options: bool) -> Iterator[None]:
    """Other options for a while."""
    global _options
    before, _options = _options, replace(_options, **options)
    try:
        yield
    finally:
        _options = before


@contextmanager
def record() -> Iterator[list[Launch]]:
    """A list that launches are added to."""
    launches: list[Launch] = []
    _recorders.append(launches)
    try:
        yield launches
    finally:
        _recorders.remove(launches)


def _note_files(module: Any, function: Any, name: str, metadata_group: dict[str, str], hash: str) -> None:
    """Triton gives `load_binary` the machine code alone, but the PTX lies in a file beside it."""
    _files.update({Path(file).suffix: Path(path) for file, path in metadata_group.items()})


def _leaves(kind: Any, value: Any, name: str) -> Iterator[tuple[str, str, Any]]:
    """Name, type and value of each run-time argument that an argument of the kernel stands for."""
    if isinstance(kind, tuple):
        for each, part in zip(kind, value, strict=True):
            yield from _leaves(each, part, name)
    elif kind.startswith("tensordesc"):
        raise KernelError(f"{name}: tensor descriptors are not modelled")
    elif kind != "constexpr":
        yield name, kind, value


def _checked(name: str, kind: str, value: Any) -> Any:
    """An argument as `launch` takes it."""
    if not kind.startswith("*"):
        if kind in ("fp16", "bf16"):
            half = torch.tensor(value, dtype=torch.float16 if kind == "fp16" else torch.bfloat16)
            return half.view(torch.int16).item()
        return float(value) if "f" in kind else int(value)
    if not isinstance(value, Tensor) or value.device.type != "cpu":
        raise TypeError(f"{name} is {type(value).__name__}, but the emulator takes tensors on the CPU")
    # A tensor keeps its place in its storage, so the storage must begin where a GPU's would.
    if value.data_ptr() % 16 == 0 != value.storage_offset() * value.element_size() % 16:
        raise ValueError(f"{name}: the tensor's storage is not aligned to 16 bytes; clone it")
    return value


class _Launcher:
    def __init__(self, src: Any, metadata: Any):
        self.metadata, self.kinds, self.names = metadata, tuple(src.signature.values()), src.fn.arg_names

    def __call__(
        self,
        x: int,
        y: int,
        z: int,
        stream: int,
        ptx: str,
        packed_metadata: Any,
        launch_metadata: Any,
        enter_hook: Callable[[Any], None] | None,
        exit_hook: Callable[[Any], None] | None,
        *arguments: Any,
    ) -> None:
        metadata, grid = self.metadata, (int(x), int(y), int(z))
        if getattr(metadata, "num_ctas", 1) != 1 or getattr(metadata, "launch_cooperative_grid", False):
            raise KernelError(f"{metadata.name}: clusters and cooperative grids are not modelled")
        if any(not 0 <= size <= largest for size, largest in zip(grid, LARGEST_GRID, strict=True)):
            raise RuntimeError(f"Triton Error [CUDA]: invalid argument (the grid is {grid}, at most {LARGEST_GRID})")
        if enter_hook is not None:
            enter_hook(launch_metadata)
        if all(grid):
            triples = zip(self.kinds, arguments, self.names, strict=True)
            leaves = [leaf for triple in triples for leaf in _leaves(*triple)]
            values = [(name, _checked(name, kind, value)) for name, kind, value in leaves]
            try:
                counts = launch(ptx, grid, 32 * metadata.num_warps, metadata.shared, values, _options)
            except KernelError as error:
                raise KernelError(f"{metadata.name}, grid {grid}: {error}") from None
            for recorder in _recorders:
                recorder.append(Launch(metadata.name, grid, metadata.num_warps, counts))
        if exit_hook is not None:
            exit_hook(launch_metadata)


class VirtualDriver(Driver):
    """The driver that compiles without a GPU, and launches on the emulator."""

    launcher_cls = _Launcher
    map_python_to_cpp_type = staticmethod(ty_to_cpp)

    def __init__(self, architecture: int):
        super().__init__(f"sm_{architecture}")
        self.architecture = architecture

    @property
    def hardware_sums(self) -> bool:
        return _options.hardware_sums

    def set_current_device(self, device: str) -> None:
        pass

    def get_device_interface(self) -> ModuleType:
        return torch.cpu

    def get_benchmarker(self) -> Callable[..., list[float]]:
        def benchmark(call: Callable[[], Any], **_: Any) -> list[float]:
            call()
            return [1.0, 1.0, 1.0]  # there is no time here: all calls take as long

        return benchmark

    def get_device_capability(self, device: str | None = None) -> tuple[int, int]:
        return divmod(self.architecture, 10)

    def unload_module(self, module: Any) -> None:
        pass

    def __deepcopy__(self, memo: Any) -> VirtualDriver:
        return self

    def load_binary(self, name: str, code: bytes, shared: int, device: str) -> tuple[object, str, int, int, int]:
        """Module, function (here its PTX), registers, spilled words and the most threads of a block, as from CUDA."""
        if ".ptx" not in _files:
            raise RuntimeError(f"{name}: there is no PTX beside the machine code (TRITON_STORE_BINARY_ONLY is set?)")
        ptx = _files[".ptx"].read_text()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", _files[".cubin"]]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        registers, stack = (int(re.findall(rf"{what}:(\d+)", usage)[0]) for what in ("REG", "STACK"))
        _files.clear()
        warps = 65_536 // (-(-registers * 32 // 256) * 256)  # registers are given to a warp by 256
        return object(), ptx, registers, stack // 4, min(1024, 32 * (warps // 4 * 4))
