"""What a launch executes: facts about a compiled kernel, not times."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from .registers import Array


@dataclass
class Counts:
    """Counts of a launch, summed over its programs.

    Attributes:
        opcodes: instructions that warps executed, by opcode; those of which no thread fulfils the predicate too.
        barriers: that a program's threads waited at.
        shared_wavefronts: cycles that shared memory needs for its banks; where traffic is measured.
        global_sectors: of 32 bytes, that are moved; where traffic is measured.
    """

    programs: int = 0
    opcodes: Counter[str] = field(default_factory=Counter)
    barriers: int = 0
    shared_wavefronts: int = 0
    global_sectors: int = 0

    @property
    def instructions(self) -> int:
        return self.opcodes.total()

    @property
    def matrix(self) -> int:
        """Matrix instructions."""
        return sum(count for opcode, count in self.opcodes.items() if opcode.startswith(("mma.", "wgmma.mma")))


def sectors(warp: Array, addresses: Array, size: int) -> int:
    """Aligned groups of 32 bytes that warps touch, counted for each warp. Both arrays are of active threads."""
    touched = (addresses[:, None] + np.arange(0, size, min(size, 32))) >> 5
    return len(np.unique((warp[:, None] << 48) + touched))


def wavefronts(thread: Array, addresses: Array, size: int) -> int:
    """Cycles of shared memory for a request: the most words of one of its 32 banks.

    Eight bytes a thread are taken by half a warp at a time, 16 by a quarter.

    Args:
        thread: numbers of the active threads.
    """
    words = max(1, size // 4)
    group = thread // (32 // min(4, words))
    word = np.unique((group[:, None] << 40) + (addresses[:, None] >> 2) + np.arange(words))
    bank, times = np.unique((word >> 40 << 5) + (word & 31), return_counts=True)
    most = np.zeros(int(group.max()) + 1, np.int64)
    np.maximum.at(most, bank >> 5, times)
    return int(most.sum())
