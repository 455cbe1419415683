"""Shared and global memory: bounds, alignment, initialisation, and copies that land late (PTX ISA 5.1 and 9.7.9).

Each tensor of a launch has a stretch of addresses of its own, so an address outside of it belongs to no tensor. What
no thread has written to shared memory cannot be read. A copy of `cp.async` is in shared memory only when the program
has waited for it; until then its destination counts as not written.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .counts import Counts, sectors, wavefronts
from .faults import KernelError
from .races import Shadow
from .registers import UNSIGNED, Array

STRETCH = 36  # bits of an address within a tensor
FIRST = 0x1000  # number of the first tensor in an address


def address(buffer: int) -> int:
    """Where a buffer's storage begins, by its number."""
    return (FIRST + buffer) << STRETCH


@dataclass
class Threads:
    """The threads of the programs that run side by side.

    Attributes:
        per_program: threads, a multiple of 32.
        numbers: of the programs in the grid.
    """

    per_program: int
    numbers: list[int]

    def __post_init__(self) -> None:
        self.count = self.per_program * len(self.numbers)
        self.index = np.arange(self.count)
        self.program = self.index // self.per_program
        self.lane = self.index % 32
        self.warp = self.index // 32
        self.first_lane = self.warp * 32
        # The bit of a warp among those of its program.
        self.warp_bit = np.uint64(1) << (self.index % self.per_program // 32).astype(np.uint64)


@dataclass
class Buffer:
    """A tensor's storage in global memory.

    Attributes:
        data: its bytes; all of them may be accessed.
        name: of the kernel's argument.
    """

    data: Array
    name: str


@dataclass
class Access:
    """Byte offsets in a memory's array, for each thread; those outside of the mask are of some thread inside."""

    offsets: Array
    mask: Array | None

    def active(self, values: Array) -> Array:
        return values if self.mask is None else values[self.mask]


@dataclass
class _Copy:
    """A copy of `cp.async` that has not landed: of whom, to where, and in which group of each."""

    pending: Array
    offsets: Array
    values: Array
    group: Array
    where: str


class Memory:
    """The memories of a launch.

    Args:
        buffers: tensors.
        shared_size: bytes of shared memory of a program.
        races: whether to watch for races; then programs run one by one.
        traffic: whether to count wavefronts and sectors.
    """

    def __init__(self, buffers: list[Buffer], shared_size: int, races: bool, traffic: bool, counts: Counts):
        self.buffers, self.shared_size, self.traffic, self.counts = buffers, shared_size, traffic, counts
        sizes = [-(-len(buffer.data) // 256) * 256 for buffer in buffers]
        self.places = np.cumsum([0, *sizes])[:-1]
        self.data = {"global": np.zeros(max(256, sum(sizes)), np.uint8)}
        for place, buffer in zip(self.places, buffers, strict=True):
            self.data["global"][place : place + len(buffer.data)] = buffer.data
        self.sizes = np.array([len(buffer.data) for buffer in buffers], np.int64)
        self.shared_stride = max(16, -(-shared_size // 16) * 16)
        self.shadows: dict[str, Shadow] = {}
        if races:
            self.shadows["global"] = Shadow("global", len(self.data["global"]), shared_by_programs=True)

    def start(self, threads: Threads) -> None:
        """Programs begin, with nothing in their shared memory."""
        self.threads = threads
        size = self.shared_stride * len(threads.numbers)
        self.data["shared"] = np.full(size, 0xFF, np.uint8)
        self.written = np.zeros(size, np.uint8)  # 255 of a byte that is
        self.shared_base = threads.program * self.shared_stride
        self.copies: list[_Copy] = []
        self.groups = np.zeros(threads.count, np.int64)  # of copies that each thread has committed
        if "global" in self.shadows:
            self.shadows["shared"] = Shadow("shared", size, shared_by_programs=False)
        for shadow in self.shadows.values():
            shadow.start(threads.numbers[0])

    def finish(self) -> None:
        """Give the tensors what the launch wrote."""
        for place, buffer in zip(self.places, self.buffers, strict=True):
            buffer.data[:] = self.data["global"][place : place + len(buffer.data)]

    def barrier(self) -> None:
        for shadow in self.shadows.values():
            shadow.barrier()

    # Accesses

    def load(self, space: str, addresses: Array, size: int, count: int, mask: Array | None, where: str) -> list[Array]:
        """Bits of `count` values of `size` bytes that lie one behind the other, for each thread."""
        access = self._access(space, addresses, size * count, mask, where, "load")
        if access is None:
            return [np.zeros(self.threads.count, UNSIGNED[8 * size])] * count
        if space == "shared":
            self.check_written(access, size * count, where)
        self._watch_read(space, access, size * count, where)
        values: Array = self.data[space].view(UNSIGNED[8 * size])
        if count == 1:
            return [values[access.offsets // size]]
        rows = values.reshape(-1, count)[access.offsets // (size * count)]
        return [np.ascontiguousarray(rows[:, i]) for i in range(count)]

    def store(self, space: str, addresses: Array, values: list[Array], mask: Array | None, where: str) -> None:
        """Store the values of each thread one behind the other."""
        size = values[0].dtype.itemsize * len(values)
        access = self._access(space, addresses, size, mask, where, "store")
        if access is not None:
            rows = np.stack(values, 1).view(np.uint8).reshape(-1, size)
            self._put(space, access, access.active(rows), where)

    def _access(
        self, space: str, addresses: Array, size: int, mask: Array | None, where: str, what: str
    ) -> Access | None:
        """Check the accesses of threads; None where no thread is active.

        Raises:
            KernelError: one is out of bounds or not aligned.
        """
        if mask is not None:
            if not mask.any():
                return None
            if mask.all():
                mask = None
        at = addresses.astype(np.int64)
        if mask is not None:
            at = np.where(mask, at, at[mask.argmax()])
        if int(np.bitwise_or.reduce(at)) & (size - 1):
            raise KernelError(f"{where}: misaligned {space} {what} of {size} bytes")
        offsets = self._global(at, size, where, what) if space == "global" else self._shared(at, size, where, what)
        if self.traffic:
            active = slice(None) if mask is None else mask
            if space == "global":
                self.counts.global_sectors += sectors(self.threads.warp[active], at[active], size)
            else:
                self.counts.shared_wavefronts += wavefronts(self.threads.index[active], at[active], size)
        return Access(offsets, mask)

    def _global(self, at: Array, size: int, where: str, what: str) -> Array:
        number = (at >> STRETCH) - FIRST
        offset = at & ((1 << STRETCH) - 1)
        known = np.clip(number, 0, len(self.buffers) - 1)
        outside = (number != known) | (offset + size > self.sizes[known])
        if outside.any():
            first = int(outside.argmax())
            # Before the start of a tensor is nearer to it than to the one before.
            nearest = ((int(at[first]) + (1 << STRETCH - 1)) >> STRETCH) - FIRST
            nearest = min(max(nearest, 0), len(self.buffers) - 1)
            buffer = self.buffers[nearest]
            near = int(at[first]) - address(nearest)
            raise KernelError(
                f"{where}: out-of-bounds global {what} of {size} bytes, at byte {near:,} of {buffer.name}, which has "
                f"{len(buffer.data):,}; program {self.threads.numbers[self.threads.program[first]]}"
            )
        return self.places[known] + offset

    def _shared(self, at: Array, size: int, where: str, what: str) -> Array:
        if int(at.min()) < 0 or int(at.max()) + size > self.shared_size:
            raise KernelError(
                f"{where}: out-of-bounds shared {what} of {size} bytes, at byte {int(at.max()):,} of "
                f"{self.shared_size:,}"
            )
        return at + self.shared_base

    def check_written(self, access: Access, size: int, where: str) -> None:
        """Raise where a thread reads shared memory that nothing was written to."""
        word = min(size, 8)
        words: Array = self.written.view(UNSIGNED[8 * word])
        every = UNSIGNED[8 * word](2 ** (8 * word) - 1)
        offsets = access.active(access.offsets)
        if any((words[(offsets + i) // word] != every).any() for i in range(0, size, word)):
            raise KernelError(f"{where}: reads shared memory that is not initialised, or whose copy is still under way")

    def _watch_read(self, space: str, access: Access, size: int, where: str) -> None:
        if space in self.shadows:
            at = access.active(access.offsets)[:, None] + np.arange(size)
            warp = np.repeat(access.active(self.threads.warp_bit), size)
            self.shadows[space].read(at.reshape(-1), warp, where)

    def _put(self, space: str, access: Access, rows: Array, where: str, lands: bool = True) -> None:
        """Write rows of bytes of the active threads; where they do not land yet, mark their place as not written."""
        size = rows.shape[1]
        word = min(size, 8)
        # As words, which NumPy moves several times as fast as bytes.
        view = lambda data: data.view(UNSIGNED[8 * word]).reshape(-1, size // word)  # noqa: E731
        at, data, values = access.active(access.offsets) // size, self.data[space], view(np.ascontiguousarray(rows))
        if space in self.shadows:
            before = view(data)[at]
            view(data)[at] = values
            after, each = view(data)[at].view(np.uint8), values.view(np.uint8)
            lost = after != each
            changed = (before.view(np.uint8) != each) | lost
            if space == "shared":
                changed |= view(self.written)[at].view(np.uint8) != 255
            bytes_at = (at * size)[:, None] + np.arange(size)
            warp = np.repeat(access.active(self.threads.warp_bit), size)
            self.shadows[space].write(bytes_at.reshape(-1), warp, where, changed.reshape(-1), lost.reshape(-1))
        else:
            view(data)[at] = values
        if space == "shared":
            view(self.written)[at] = UNSIGNED[8 * word](2 ** (8 * word) - 1 if lands else 0)

    # Copies that land late (PTX ISA 9.7.9.25)

    def copy(self, to: Array, source: Array, size: int, taken: Array | None, mask: Array | None, where: str) -> None:
        """Begin to copy bytes from global to shared memory; of `size`, all or, where `taken` is 0, zeros."""
        access = self._access("shared", to, size, mask, where, "cp.async")
        if access is None:
            return
        active = np.ones(self.threads.count, bool) if access.mask is None else access.mask
        given = active
        if taken is not None:
            if not np.isin(taken[active], (0, size)).all():
                raise KernelError(f"{where}: a copy of a part of {size} bytes is not modelled")
            given = active & (taken == size)
        word = min(size, 8)
        values = self.load("global", source, word, size // word, given, where)
        rows = np.where(given[:, None], np.stack(values, 1).view(np.uint8).reshape(-1, size), np.uint8(0))
        self._put("shared", access, np.full_like(rows[active], 0xFF), where, lands=False)
        self.copies.append(_Copy(active, access.offsets, rows, self.groups, where))

    def commit(self, mask: Array | None) -> None:
        """End a group of copies."""
        self.groups = self.groups + (1 if mask is None else mask)

    def wait(self, newest: int, mask: Array | None) -> None:
        """Land the copies of all groups but the newest."""
        for copy in self.copies:
            landed = copy.pending & (copy.group < self.groups - newest) & (True if mask is None else mask)
            if landed.any():
                self._put("shared", Access(copy.offsets, landed), copy.values[landed], copy.where)
                copy.pending = copy.pending & ~landed
        self.copies = [copy for copy in self.copies if copy.pending.any()]
