"""Basic blocks, and the order in which the threads of programs go through them.

A block runs from a branch target, or from behind a branch or barrier, to the next. Each thread has its own block to go
to. While all agree, a block runs for all threads at once. Where they do not, the lowest block runs first, under a mask
of its threads; structured code meets again behind a branch that way, and any other order that a GPU may take is legal.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from .faults import KernelError
from .parse import Instruction, Program
from .registers import Array

EXIT = 1 << 30  # where a thread goes that has ended
AT_BARRIER = -1  # where a thread goes that waits for the others of its program

LONGEST = 2000  # instructions of a block; Python's compiler slows down with more
MOST_BLOCKS = 1_000_000  # executed by a program; more is an endless loop

# A block, translated: given a mask of threads, or None for all of them, it executes and returns a condition, or None
# for true; where threads go that fulfil it; and where the others go.
Translated = Callable[[Array | None], tuple[Array | None, int, int]]


def ends_block(instruction: Instruction) -> bool:
    return instruction.base in ("bra", "ret", "exit", "trap") or is_barrier(instruction)


def is_barrier(instruction: Instruction) -> bool:
    """Whether a program's threads wait for each other here (PTX ISA 9.7.13.1); those of a warp always do."""
    return instruction.base in ("bar", "barrier") and not instruction.opcode.startswith("bar.warp")


@dataclass(frozen=True)
class Blocks:
    """The basic blocks of a program.

    Attributes:
        bounds: first instruction of each block, and the one behind its last.
        at: the block that begins at an instruction.
        kept: registers that a block reads before it writes them, so that they outlive a block.
    """

    bounds: list[tuple[int, int]]
    at: dict[int, int]
    kept: set[str]


def cut(program: Program) -> Blocks:
    """Find the basic blocks of a program."""
    instructions = program.instructions
    leaders = {0}
    for at, instruction in enumerate(instructions):
        if ends_block(instruction):
            leaders.add(at + 1)
        if instruction.base == "bra":
            leaders.add(program.labels[instruction.operands[-1]])
    edges = [*sorted(leader for leader in leaders if leader < len(instructions)), len(instructions)]
    starts = [at for lo, hi in pairwise(edges) for at in range(lo, hi, LONGEST)]
    bounds = list(zip(starts, [*starts[1:], len(instructions)], strict=True))
    kept: set[str] = set()
    for lo, hi in bounds:
        written: set[str] = set()
        for instruction in instructions[lo:hi]:
            reads, writes = _uses(program, instruction)
            kept |= reads - written
            written |= writes
    return Blocks(bounds, {lo: block for block, (lo, _) in enumerate(bounds)}, kept)


def _uses(program: Program, instruction: Instruction) -> tuple[set[str], set[str]]:
    """Registers that an instruction reads, and those that it writes; under a predicate it reads the latter too."""
    named = [set(re.findall(r"[%\w$.]+", operand)) & program.registers.keys() for operand in instruction.operands]
    stores = instruction.base in ("st", "red", "bra", "cp", "stmatrix", "bar", "call")
    writes = set() if stores or not named else named[0]
    reads: set[str] = set().union(*(named if stores or instruction.opcode.startswith("wgmma.mma") else named[1:]))
    if instruction.predicate:
        reads |= writes | {instruction.predicate}
    return reads, writes


def run(
    blocks: Blocks,
    translated: Callable[[int, bool], Translated],
    program_of: Array,
    arrived: Callable[[int], None],
    executed: Callable[[int, Array | None], None],
) -> None:
    """Run all threads to their end.

    Args:
        translated: gives a block, for all threads or for those under a mask.
        program_of: number of each thread's program, from 0.
        arrived: called with the number of programs whose threads have all come to a barrier.
        executed: called with each block that was executed, and its mask.

    Raises:
        KernelError: an endless loop.
    """
    threads, programs = len(program_of), 1 + int(program_of[-1])
    at = 0  # the block of all threads, where they agree
    each: Array | None = None  # else the block of each
    waits = np.zeros(threads, bool)
    for _ in range(MOST_BLOCKS):
        if each is None:
            if at >= len(blocks.bounds):
                return
            condition, target, following = translated(at, False)(None)
            executed(at, None)
            if target == AT_BARRIER:
                arrived(programs)
                at = following
            elif condition is None or condition.all():
                at = target
            elif not condition.any():
                at = following
            else:
                each = np.where(condition, target, following)
            continue
        live = each < len(blocks.bounds)
        if not live.any():
            return
        if waits.any():
            busy = np.bincount(program_of[live & ~waits], minlength=programs) > 0
            released = waits & ~busy[program_of]
            if released.any():
                arrived(len(np.unique(program_of[released])))
                waits &= ~released
        ready = live & ~waits
        block = int(each[ready].min())
        mask = ready & (each == block)
        if mask.all():
            at, each = block, None
            continue
        condition, target, following = translated(block, True)(mask)
        executed(block, mask)
        if target == AT_BARRIER:
            each[mask] = following
            waits |= mask
        else:
            each = np.where(mask, target if condition is None else np.where(condition, target, following), each)
    raise KernelError(
        f"{MOST_BLOCKS:,} blocks were executed: an endless loop, or threads that wait for each other in it"
    )
