"""What the 32 threads of a warp do together (PTX ISA 9.7.9.6 and 9.7.13)."""

from __future__ import annotations

import numpy as np

from .faults import KernelError
from .memory import Threads
from .registers import Array

REDUCTIONS = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


class Warps:
    def __init__(self, threads: Threads):
        self.threads = threads

    def shuffled(self, mode: str, amount: Array, bounds: Array) -> tuple[Array, Array]:
        """The thread that each one reads of, and whether that is within bounds; else it reads of itself.

        Args:
            mode: "up", "down", "bfly" or "idx".
            bounds: the last lane of a segment, and in bits 8 to 12 the bits of a lane that number its segment.
        """
        lane = self.threads.lane
        by = amount.astype(np.int64) & 31
        clamp, segment = bounds.astype(np.int64) & 31, (bounds.astype(np.int64) >> 8) & 31
        first = lane & segment
        last = first | (clamp & ~segment)
        source = {"up": lane - by, "down": lane + by, "bfly": lane ^ by, "idx": first | (by & ~segment)}[mode]
        within = source >= last if mode == "up" else source <= last
        return self.threads.first_lane + np.where(within, source, lane), within

    def reduced(self, operation: str, values: Array, mask: Array | None) -> Array:
        """The sum, or another reduction, of a warp's values, for each of its threads."""
        if mask is not None and not mask.all():
            raise KernelError("a reduction of some threads of a warp is not modelled")
        result = REDUCTIONS[operation].reduce(values.reshape(-1, 32), 1, dtype=values.dtype)
        return np.repeat(result, 32).view(np.uint32)

    def voted(self, mode: str, predicate: Array, mask: Array | None) -> Array:
        """Whether "any" or "all" of a warp's threads have a predicate, or a bit of each that has ("ballot")."""
        active = np.ones((len(predicate) // 32, 32), bool) if mask is None else mask.reshape(-1, 32)
        votes = predicate.reshape(-1, 32)
        if mode == "ballot":
            bits = (votes & active).astype(np.uint64) << np.arange(32, dtype=np.uint64)
            return np.repeat(bits.sum(1).astype(np.uint32), 32)
        return np.repeat({"any": (votes & active).any(1), "all": (votes | ~active).all(1)}[mode], 32)
