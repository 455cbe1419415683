"""A launch of a kernel: its arguments in memory, and its programs through the blocks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import blocks
from .counts import Counts
from .faults import KernelError
from .matrix import MatrixUnits
from .memory import Buffer, Memory, Threads, address
from .parse import Program, parse
from .registers import FLOAT, UNSIGNED, Array
from .translate import Translation
from .warps import Warps

SIDE_BY_SIDE = 4096  # threads of the programs that run at once

# What a register holds that nothing was written to.
NOTHING: dict[int, Any] = {1: False, 8: 0xCC, 16: 0xCCCC, 32: 0xFFFFCCCC, 64: 0xFFFFCCCCCCCCCCCC}


@dataclass(frozen=True)
class Options:
    """How a launch is emulated.

    Attributes:
        races: whether warps and programs are watched for races; several times slower.
        traffic: whether shared wavefronts and global sectors are counted.
        hardware_sums: whether matrix products are summed as tensor cores are described to; else they are exact.
    """

    races: bool = False
    traffic: bool = False
    hardware_sums: bool = False


@cache
def translation(ptx: str) -> Translation:
    """The translation of a module's kernel."""
    return Translation(parse(ptx))


class Machine:
    """What translated blocks read and write.

    Attributes:
        R: registers that outlive a block.
        K: constants.
        special: special registers (PTX ISA, chapter 10).
        parameters: of the kernel.
        memory, warps, units: what instructions call.
    """

    def __init__(
        self,
        translated: Translation,
        threads: Threads,
        grid: tuple[int, int, int],
        values: dict[str, Any],
        memory: Memory,
        hardware_sums: bool,
    ):
        self.translated, self.threads = translated, threads
        count = threads.count

        def every(bits: Any) -> Array:
            return np.full(count, bits, np.uint32)

        registers = translated.program.registers.values()
        kinds: dict[int, Any] = {1: np.bool_, **UNSIGNED}
        empty = {bits: np.full(count, NOTHING[bits], kinds[bits]) for bits in set(registers)}
        self.R = [empty[bits] for bits in registers]
        self.K: list[Array] = []
        self.parameters = {name: np.full(count, value) for name, value in values.items()}
        program = np.array(threads.numbers)[threads.program]
        width, height = grid[0], grid[1]
        self.special = {
            "%tid.x": (threads.index % threads.per_program).astype(np.uint32),
            "%laneid": threads.lane.astype(np.uint32),
            "%warpid": (threads.index % threads.per_program // 32).astype(np.uint32),
            "%ctaid.x": (program % width).astype(np.uint32),
            "%ctaid.y": (program // width % height).astype(np.uint32),
            "%ctaid.z": (program // (width * height)).astype(np.uint32),
            "%ntid.x": every(threads.per_program),
            **{f"%nctaid.{axis}": every(size) for axis, size in zip("xyz", grid, strict=True)},
            **{f"%{name}.{axis}": every(name == "ntid") for name in ("tid", "ntid") for axis in "yz"},
        }
        memory.start(threads)
        self.memory, self.warps = memory, Warps(threads)
        self.units = MatrixUnits(threads, memory, hardware_sums)

    def block(self, number: int, masked: bool) -> blocks.Translated:
        function = self.translated.function(number, masked)
        new = self.translated.constants[len(self.K) :]
        self.K += [np.full(self.threads.count, value) for value in new]
        return lambda mask: function(self, mask)


def launch(
    ptx: str,
    grid: tuple[int, int, int],
    threads: int,
    shared_size: int,
    arguments: list[tuple[str, Any]],
    options: Options,
) -> Counts:
    """Run a kernel; tensors are updated in place.

    Args:
        ptx: a module with one kernel.
        grid: programs.
        threads: of a program.
        shared_size: bytes of shared memory that are sized at launch.
        arguments: names, and tensors on the CPU, numbers or booleans.

    Raises:
        KernelError: a fault of the kernel, or an instruction that is not modelled; tensors keep what was written.
    """
    translated = translation(ptx)
    program = translated.program
    buffers, values = _arguments(program, arguments)
    counts = Counts()
    memory = Memory(buffers, program.static_shared + shared_size, options.races, options.traffic, counts)
    executed = np.zeros(len(translated.blocks.bounds), np.int64)
    together = 1 if options.races else max(1, SIDE_BY_SIDE // threads)
    programs = range(grid[0] * grid[1] * grid[2])

    def arrived(number: int) -> None:
        counts.barriers += number
        memory.barrier()

    def execute(block: int, mask: Array | None) -> None:
        warp = memory.threads.warp
        executed[block] += warp[-1] + 1 if mask is None else len(np.unique(warp[mask]))

    try:
        with np.errstate(all="ignore"):
            for first in range(0, len(programs), together):
                side_by_side = Threads(threads, list(programs[first : first + together]))
                machine = Machine(translated, side_by_side, grid, values, memory, options.hardware_sums)
                blocks.run(translated.blocks, machine.block, side_by_side.program, arrived, execute)
    finally:
        memory.finish()
    counts.programs = len(programs)
    for (lo, hi), times in zip(translated.blocks.bounds, executed, strict=True):
        for instruction in program.instructions[lo:hi]:
            counts.opcodes[instruction.opcode] += int(times)
    return counts


def _arguments(program: Program, arguments: list[tuple[str, Any]]) -> tuple[list[Buffer], dict[str, Any]]:
    """Buffers of the tensors, and the bits of each parameter.

    Parameters that Triton adds for scratch memory are 0, for no kernel of ours has any.
    """
    hidden = len(program.parameters) - len(arguments)
    if not 0 <= hidden <= 2:
        raise KernelError(f"{program.name} has {len(program.parameters)} parameters, {len(arguments)} were given")
    numbers: dict[int, int] = {}
    buffers: list[Buffer] = []
    values: dict[str, Any] = {parameter.name: np.uint64(0) for parameter in program.parameters}
    for parameter, (name, value) in zip(program.parameters, arguments, strict=False):
        if parameter.kind == "struct":
            raise KernelError(f"{name}: structures are not modelled")
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            if storage.data_ptr() not in numbers:
                numbers[storage.data_ptr()] = len(buffers)
                data = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
                buffers.append(Buffer(data, name))
            offset = value.storage_offset() * value.element_size()
            values[parameter.name] = np.uint64(address(numbers[storage.data_ptr()]) + offset)
        elif isinstance(value, float) or parameter.kind == "f":
            values[parameter.name] = np.array(value, FLOAT[parameter.bits]).view(UNSIGNED[parameter.bits])[()]
        else:
            values[parameter.name] = UNSIGNED[parameter.bits](int(value) & (2**parameter.bits - 1))
    _refuse_overlaps(buffers)
    return buffers, values


def _refuse_overlaps(buffers: Iterable[Buffer]) -> None:
    """Each storage is copied there and back, so two of them cannot share memory."""
    spans = sorted((buffer.data.ctypes.data, len(buffer.data)) for buffer in buffers if len(buffer.data))
    for (start, size), (following, _) in pairwise(spans):
        if start + size > following:
            raise ValueError("tensors of different storages share memory; make them views of one tensor")
