"""Conflicting accesses of a byte without a barrier between them (PTX ISA, chapter 8).

Two warps of a program conflict where neither waited at a barrier that the other had come to since. Two programs
conflict always, for nothing orders them. Two writes of the same value are let pass: replicated layouts do that.
"""

from __future__ import annotations

import numpy as np

from .faults import KernelError
from .registers import Array

SEVERAL = -1  # programs


class _Accesses:
    """Of each byte: in which epoch it was last accessed, by which warps in that epoch, where, and by which program."""

    def __init__(self, size: int):
        self.epoch = np.zeros(size, np.int32)
        self.warps = np.zeros(size, np.uint64)
        self.place = np.zeros(size, np.int32)
        self.program = np.zeros(size, np.int32)

    def by_others(self, at: Array, warp: Array, epoch: int, program: int) -> Array:
        same_epoch = (self.epoch[at] == epoch) & (self.warps[at] & ~warp != 0)
        return same_epoch | ((self.program[at] != 0) & (self.program[at] != program))

    def add(self, at: Array, warp: Array, epoch: int, place: int) -> None:
        self.warps[at[self.epoch[at] != epoch]] = 0
        self.epoch[at] = epoch
        self.place[at] = place
        np.bitwise_or.at(self.warps, at, warp)


class Shadow:
    """The accesses of a memory.

    Args:
        name: of the memory, for messages.
        size: in bytes.
        shared_by_programs: whether programs see each other's writes.
    """

    def __init__(self, name: str, size: int, shared_by_programs: bool):
        self.name, self.shared_by_programs = name, shared_by_programs
        self.writes, self.reads = _Accesses(size), _Accesses(size)
        self.epoch, self.program = 0, 1
        self.places: dict[str, int] = {}

    def start(self, program: int) -> None:
        """A program, by its number from 0, begins; the one before it has ended."""
        self.program = program + 1 if self.shared_by_programs else 1
        self.barrier()

    def barrier(self) -> None:
        """All warps of the program have waited for each other."""
        self.epoch += 1

    def read(self, at: Array, warp: Array, where: str) -> None:
        """Bytes are read, each by a warp; `warp` has the bit of it.

        Raises:
            KernelError: another warp or program wrote one.
        """
        conflicts = self.writes.by_others(at, warp, self.epoch, self.program)
        self._complain("read after write", where, at[conflicts], self.writes)
        self.reads.add(at, warp, self.epoch, self._place(where))
        readers = self.reads.program[at]
        self.reads.program[at] = np.where((readers == 0) | (readers == self.program), self.program, SEVERAL)

    def write(self, at: Array, warp: Array, where: str, changed: Array, lost: Array) -> None:
        """Bytes are written.

        Args:
            changed: whether the value of a byte changes.
            lost: whether another thread of this very instruction wrote another value, which remains.

        Raises:
            KernelError: another warp or program read one, or wrote it another value.
        """
        over_write = self.writes.by_others(at, warp, self.epoch, self.program) & changed
        self._complain("write after write", where, at[over_write], self.writes)
        over_read = self.reads.by_others(at, warp, self.epoch, self.program) & changed
        self._complain("write after read", where, at[over_read], self.reads)
        self.writes.add(at, warp, self.epoch, self._place(where))
        self.writes.program[at] = self.program
        together = lost & (self.writes.warps[at] & ~warp != 0)
        self._complain("write after write", where, at[together], self.writes)

    def _place(self, where: str) -> int:
        return self.places.setdefault(where, len(self.places))

    def _complain(self, kind: str, where: str, conflicts: Array, before: _Accesses) -> None:
        if len(conflicts):
            place = list(self.places)[before.place[conflicts[0]]]
            raise KernelError(
                f"{where}: a race, {kind} of {len(conflicts)} bytes of {self.name} memory in program "
                f"{self.program - 1}, no barrier since {place}"
            )
