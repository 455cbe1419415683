"""Matrix instructions: fragments in registers, tiles in shared memory, and sums (PTX ISA 9.7.14 and 9.7.15).

tf32 operands lose the 13 last bits that a float32 has more, as PTX leaves their rounding to the hardware. Products of
tf32, bfloat16 and float16 numbers are exact in float64. How they are summed is one of two models:

* "exact": in float64, and rounded to float32 once.
* "hardware": all addends are aligned to the largest, bits more than two below float32's last are cut off, and the sum
  is rounded towards zero. That is how tensor cores are described to add (Fasi, Higham, Mikaitis and Pranesh, "Numerical
  behavior of NVIDIA tensor cores", 2021). It is a model, not a measurement.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from .faults import KernelError
from .memory import Access, Memory, Threads
from .registers import TF32_BITS, UNSIGNED, Array, from_bf16, joined, split

EXTRA_BITS = 2  # of an addend, below the last one of a float32


def summed(a: Array, b: Array, c: Array, hardware: bool) -> Array:
    """Return a [..., M, K] @ b [..., K, N] + c [..., M, N] of one instruction, in float32."""
    if not hardware:
        return (np.matmul(a, b) + c).astype(np.float32)
    addends = np.concatenate([a[..., :, :, None] * b[..., None, :, :], c[..., :, None, :]], -2)
    largest = np.abs(addends).max(-2, keepdims=True)
    exponent = np.floor(np.log2(np.where((largest > 0) & np.isfinite(largest), largest, 1.0)))
    unit = np.exp2(exponent - 23 - EXTRA_BITS)
    total = np.where(np.isfinite(addends), np.trunc(addends / unit) * unit, addends).sum(-2)
    nearest = total.astype(np.float32)
    too_far = (np.abs(nearest.astype(np.float64)) > np.abs(total)) & np.isfinite(nearest)
    return np.where(too_far, np.nextafter(nearest, np.float32(0)), nearest)


def numbers(bits: Array, kind: str) -> Array:
    """Operands as float64: of 32 bits a tf32, of 16 bits a bf16 or f16."""
    if kind == "tf32":
        return (bits & TF32_BITS).view(np.float32).astype(np.float64)
    return (from_bf16(bits) if kind == "bf16" else bits.view(np.float16)).astype(np.float64)


class MatrixUnits:
    """The matrix units of the programs that run side by side.

    Args:
        hardware: whether sums are those of the model "hardware", else they are exact.
    """

    def __init__(self, threads: Threads, memory: Memory, hardware: bool):
        self.threads, self.memory, self.hardware = threads, memory, hardware
        # What multiplications read of shared memory that are not yet in a group, and in each group.
        self.open: list[Callable[[], None]] = []
        self.groups: list[list[Callable[[], None]]] = []

    # Matrices of 8 rows of 16 bytes in shared memory (PTX ISA 9.7.14.5.15 and 9.7.14.5.16)

    def load(self, addresses: Array, count: int, transposed: bool, mask: Array | None, where: str) -> list[Array]:
        """A register for each matrix; lane 8 i + r of a warp has the address of row r of matrix i."""
        if mask is not None and not mask.any():
            return [np.zeros(self.threads.count, np.uint32)] * count
        self._check_rows(addresses, count, mask, where)
        found = []
        for i in range(count):
            parts = [
                self.memory.load("shared", at, 2 if transposed else 4, 1, mask, where)[0]
                for at in self._elements(addresses, i, transposed)
            ]
            found.append(joined(parts) if transposed else parts[0])
        return found

    def store(self, addresses: Array, values: list[Array], transposed: bool, mask: Array | None, where: str) -> None:
        """The opposite of `load`."""
        self._check_rows(addresses, len(values), mask, where)
        for i, value in enumerate(values):
            parts = split(value, 2) if transposed else [value]
            for at, part in zip(self._elements(addresses, i, transposed), parts, strict=True):
                self.memory.store("shared", at, [part], mask, where)

    def _elements(self, addresses: Array, matrix: int, transposed: bool) -> list[Array]:
        """Where the elements of each thread are: two in a row, or, transposed, two in a column."""
        lane = self.threads.lane
        row, column = lane // 4, 2 * (lane % 4)
        start = self.threads.first_lane + 8 * matrix
        if not transposed:
            return [addresses[start + row].astype(np.int64) + 2 * column]
        return [addresses[start + column + i].astype(np.int64) + 2 * row for i in (0, 1)]

    def _check_rows(self, addresses: Array, count: int, mask: Array | None, where: str) -> None:
        used = self.threads.lane < 8 * count
        used = used if mask is None else used & mask
        if (addresses[used] & addresses.dtype.type(15)).any():
            raise KernelError(f"{where}: the address of a matrix row is not a multiple of 16")

    # Products of a warp (PTX ISA 9.7.14.5): row g of eight is that of lanes 4 g to 4 g + 3

    def mma(self, shape: str, kind: str, a: list[Array], b: list[Array], c: list[Array]) -> list[Array]:
        """Registers of A @ B + C."""
        rows, columns, depth = _sizes(shape)
        side = _side(kind)
        if (rows, columns) != (16, 8) or len(a) != 2 * depth // side or len(b) != depth // side:
            raise KernelError(f"a product of the shape {shape} is not modelled")
        right = np.concatenate([_tile(register, kind) for register in b], 2).transpose(0, 2, 1)
        sums = _gathered([register.view(np.float32) for register in c], columns)
        return _registers(summed(_left(a, kind), right, sums, self.hardware))

    # Products of four warps (PTX ISA 9.7.15)

    def wgmma(
        self,
        shape: str,
        kind: str,
        a: Array | list[Array],
        b: Array,
        c: list[Array],
        adds: Array,
        flags: list[int],
        mask: Array | None,
        where: str,
    ) -> list[Array]:
        """Registers of A @ B, plus C where `adds`.

        It executes at once; that its operands in shared memory are read as late as `wait` is what races are told by.

        Args:
            a: registers, or a descriptor of a tile in shared memory, as `b` is.
            flags: signs of A and B; then, of 16-bit tiles, whether A and B are stored with K as rows.
        """
        active = np.ones(self.threads.count // 128, bool) if mask is None else mask[::128]
        if mask is not None and (mask.reshape(-1, 128) != active[:, None]).any():
            raise KernelError(f"{where}: some threads of a warp group are not active")
        if not active.any():
            return c
        _, columns, depth = _sizes(shape)
        size, groups = 32 // depth, len(active)
        transposed = [False, False]
        if len(flags) > 2:
            transposed = [len(flags) == 4 and bool(flags[2]), bool(flags[-1])]
        if isinstance(a, list):
            left = _left(a, kind).reshape(groups, 64, depth)
        else:
            left = numbers(self._tile(a, 64, depth, size, transposed[0], True, active, where), kind)
        right = numbers(self._tile(b, columns, depth, size, transposed[1], False, active, where), kind)
        sums = _gathered([np.where(adds, register.view(np.float32), np.float32(0)) for register in c], columns)
        signs = flags[0] * flags[1]
        product = summed(left * signs, right.transpose(0, 2, 1), sums.reshape(groups, 64, columns), self.hardware)
        return _registers(product.reshape(-1, 16, columns))

    def commit(self) -> None:
        """End a group of multiplications."""
        self.groups.append(self.open)
        self.open = []

    def wait(self, newest: int) -> None:
        """All groups but the newest have read what they multiply."""
        while len(self.groups) > newest:
            for read in self.groups.pop(0):
                read()

    def _tile(
        self,
        descriptor: Array,
        rows: int,
        depth: int,
        size: int,
        transposed: bool,
        is_left: bool,
        active: Array,
        where: str,
    ) -> Array:
        """The bits of a tile [groups, rows, depth] in shared memory, of elements of `size` bytes.

        A descriptor has the start of the tile, two strides and a swizzle, under which the 16-byte parts of a row of
        128, 64 or 32 bytes change places (PTX ISA 9.7.15.5.1).
        """
        of_group = np.where(active, descriptor[::128], descriptor[::128][active.argmax()]).astype(np.int64)
        of_group = of_group[:, None, None]
        start, leading, stride = (((of_group >> bit) & 0x3FFF) << 4 for bit in (0, 16, 32))
        modes = np.unique(of_group >> 62 & 3)
        if len(modes) > 1 or (of_group >> 49 & 7).any():
            raise KernelError(f"{where}: the descriptor is not modelled")
        span = {0: 16, 1: 128, 2: 64, 3: 32}[int(modes[0])]
        row, column = np.arange(rows)[:, None], np.arange(depth)
        if transposed:
            along = row * size
            blocks = (
                along // span * stride + column // 8 * leading
                if span == 16
                else along // span * leading + column // 8 * stride
            )
            offset = blocks + column % 8 * span + along % span
        else:
            along = column * size
            offset = row // 8 * stride + row % 8 * span
            offset = offset + (along // 16 * leading + along % 16 if span == 16 else along)
        at = start + offset
        at = at ^ (((at >> 7) & (span // 16 - 1)) << 4)
        limit = self.memory.shared_size
        if int(at.max()) + size > limit:
            raise KernelError(f"{where}: out-of-bounds shared read by wgmma, at byte {int(at.max()):,} of {limit:,}")
        at = at + self.memory.shared_base[::128][:, None, None]
        self.memory.check_written(Access(at[active].reshape(-1), None), size, where)
        if "shared" in self.memory.shadows:
            for group in active.nonzero()[0]:
                for warp in range(4):  # each takes 16 rows of A, and all of B
                    own = at[group, 16 * warp : 16 * warp + 16] if is_left else at[group]
                    self._watch(own, size, self.threads.warp_bit[128 * group + 32 * warp], where)
        return self.memory.data["shared"].view(UNSIGNED[8 * size])[at // size]

    def _watch(self, offsets: Array, size: int, warp: np.uint64, where: str) -> None:
        """Read now, and, as that is possible too, when the group is waited for."""
        at = (offsets[..., None] + np.arange(size)).reshape(-1)

        def read() -> None:
            self.memory.shadows["shared"].read(at, np.full(len(at), warp), where)

        read()
        self.open.append(read)


def _sizes(shape: str) -> tuple[int, int, int]:
    rows, columns, depth = (int(size) for size in re.findall(r"\d+", shape))
    return rows, columns, depth


def _side(kind: str) -> int:
    """Columns of eight rows that a register of a warp holds, four lanes a row."""
    return 4 if kind == "tf32" else 8


def _tile(register: Array, kind: str) -> Array:
    """Eight rows of a warp's register, [warps, 8, side]."""
    bits = register if kind == "tf32" else register.view(np.uint16)
    return numbers(bits, kind).reshape(-1, 8, _side(kind))


def _left(registers: list[Array], kind: str) -> Array:
    """The operand A of warps in registers, [warps, 16, depth]: upper and lower eight rows in turn."""
    halves = [np.concatenate([_tile(register, kind) for register in registers[i::2]], 2) for i in (0, 1)]
    return np.concatenate(halves, 1)


def _places(columns: int) -> list[tuple[slice, slice, slice]]:
    """Where each register of sums lies in [warps, 16, columns]: every other column of eight rows and columns."""
    return [
        (slice(None), slice(row, row + 8), slice(start + odd, start + 8, 2))
        for start in range(0, columns, 8)
        for row in (0, 8)
        for odd in (0, 1)
    ]


def _gathered(registers: list[Array], columns: int) -> Array:
    """Sums in registers, as float64 [warps, 16, columns]."""
    sums = np.empty((len(registers[0]) // 32, 16, columns))
    for place, register in zip(_places(columns), registers, strict=True):
        sums[place] = register.reshape(-1, 8, 4)
    return sums


def _registers(sums: Array) -> list[Array]:
    """The opposite of `_gathered`, of float32 numbers."""
    return [np.ascontiguousarray(sums[place]).reshape(-1).view(np.uint32) for place in _places(sums.shape[2])]
