"""Values of registers, and arithmetic that NumPy does not have.

A register is an array of unsigned integers, its bits, with an element for each thread. Instructions view it as signed
or floating-point numbers. A predicate is an array of booleans (PTX ISA 5.2 and 9.7).
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .faults import KernelError

Array = NDArray[Any]

UNSIGNED: dict[int, type] = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED: dict[int, type] = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOAT: dict[int, type] = {16: np.float16, 32: np.float32, 64: np.float64}

SPECIAL_BITS = {"pred": 1, "bf16": 16, "tf32": 32, "f16x2": 32, "bf16x2": 32}
TF32_BITS = np.uint32(0xFFFFE000)  # a float32 without the 13 last bits of its fraction


# To integers: to the nearest, down, up, towards zero.
ROUNDINGS = {"rni": np.rint, "rmi": np.floor, "rpi": np.ceil, "rzi": np.trunc}


def is_type(word: str) -> bool:
    """Whether a word of an opcode is the type of a value."""
    return word in SPECIAL_BITS or re.fullmatch(r"[busf](8|16|32|64)", word) is not None


def bits_of(kind: str) -> int:
    """Bits of a value of a PTX type, such as "s32" or "bf16x2" (PTX ISA 5.2.1)."""
    if kind in SPECIAL_BITS:
        return SPECIAL_BITS[kind]
    if not is_type(kind):
        raise KernelError(f"the type {kind} is not modelled")
    return int(kind[1:])


def unsigned(values: Array) -> Array:
    """The bits of values."""
    return values.view(UNSIGNED[8 * values.dtype.itemsize])


def from_bf16(bits: Array) -> Array:
    """float32 numbers of bfloat16 bits."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bf16(values: Array) -> Array:
    """Bits of the bfloat16 numbers nearest to float32 numbers; to even where two are."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FFF), rounded).astype(np.uint16)


def from_half(bits: Array, kind: str) -> Array:
    """float32 numbers of 16 bits, a "bf16" or an "f16"."""
    return from_bf16(bits) if kind.startswith("bf16") else bits.view(np.float16).astype(np.float32)


def to_half(values: Array, kind: str) -> Array:
    """16 bits of float32 numbers, as a "bf16" or an "f16"."""
    return to_bf16(values) if kind.startswith("bf16") else values.astype(np.float16).view(np.uint16)


def to_tf32(bits: Array, ties_away: bool) -> Array:
    """Bits of float32 numbers rounded to tf32; where two are as near, away from zero or to even."""
    half = np.uint32(0x1000) if ties_away else np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1))
    return (bits + half) & TF32_BITS


def half_operation(operation: Any, kind: str, *operands: Array) -> Array:
    """An operation on float32 numbers, applied to 16-bit numbers or to both halves of 32 bits (PTX ISA 9.7.4)."""
    halves = [from_half(bits.view(np.uint16), kind).astype(np.float64) for bits in operands]
    result = to_half(operation(*halves).astype(np.float32), kind)
    return result.view(np.uint32) if kind.endswith("x2") else result


def multiply_add(a: Array, b: Array, c: Array) -> Array:
    """Return a * b + c."""
    return a * b + c


def reciprocal_root(values: Array) -> Array:
    """One over the square root, correctly rounded."""
    return (1.0 / np.sqrt(values.astype(np.float64))).astype(values.dtype)


def split(bits: Array, parts: int) -> list[Array]:
    """A register as its parts, the least significant first."""
    narrow: Array = bits.view(UNSIGNED[8 * bits.dtype.itemsize // parts]).reshape(-1, parts)
    return [np.ascontiguousarray(part) for part in narrow.T]


def joined(parts: list[Array]) -> Array:
    """A register of its parts, the least significant first."""
    return np.stack(parts, 1).reshape(-1).view(UNSIGNED[8 * parts[0].dtype.itemsize * len(parts)])


def resized(bits: Array, width: int, signed: bool) -> Array:
    """Bits cut or extended to a width, by the sign where they are signed."""
    if signed:
        return bits.view(SIGNED[8 * bits.dtype.itemsize]).astype(SIGNED[width]).view(UNSIGNED[width])
    return bits.astype(UNSIGNED[width])


def to_integer(values: Array, width: int, signed: bool, rounding: str) -> Array:
    """Bits of floating-point numbers as integers, at the limits where they do not fit; 0 of NaN (PTX ISA 9.7.9.22)."""
    whole = ROUNDINGS[rounding](values.astype(np.float64))
    kind = SIGNED[width] if signed else UNSIGNED[width]
    limits = np.iinfo(kind)
    whole = np.clip(np.nan_to_num(whole, nan=0.0, posinf=np.inf, neginf=-np.inf), float(limits.min), float(limits.max))
    too_large = whole >= float(limits.max)
    return unsigned(np.where(too_large, kind(limits.max), np.where(too_large, 0.0, whole).astype(kind)))


def high_product(a: Array, b: Array) -> Array:
    """The upper half of the bits of integer products."""
    width = 8 * a.dtype.itemsize
    if width == 64:
        product = [(int(x) * int(y) >> 64) & (2**64 - 1) for x, y in zip(a, b, strict=True)]
        return np.array(product, np.uint64)
    wide = (SIGNED if a.dtype.kind == "i" else UNSIGNED)[2 * width]
    return unsigned(((a.astype(wide) * b.astype(wide)) >> wide(width)).astype(a.dtype))


def quotient(a: Array, b: Array) -> Array:
    """Bits of integer quotients towards zero; all ones where the divisor is 0."""
    width = 8 * a.dtype.itemsize
    divisor = np.where(b == 0, b.dtype.type(1), b)
    if a.dtype.kind == "u":
        found = a // divisor
    else:
        found = np.abs(a).view(UNSIGNED[width]) // np.abs(divisor).view(UNSIGNED[width])
        found = np.where((a < 0) ^ (b < 0), ~found + UNSIGNED[width](1), found)
    return np.where(b == 0, ~UNSIGNED[width](0), found)


def remainder(a: Array, b: Array) -> Array:
    """Bits of the remainders of `quotient`."""
    return unsigned(a) - quotient(a, b) * unsigned(b)


def shifted(values: Array, amounts: Array, left: bool) -> Array:
    """Values shifted by 32-bit amounts; those above the width are the width (PTX ISA 9.7.8.8)."""
    amount = np.minimum(amounts, np.uint32(8 * values.dtype.itemsize)).astype(values.dtype)
    return values << amount if left else values >> amount


def extracted(values: Array, position: Array, length: Array) -> Array:
    """A field of 32 or 64 bits, moved to the end (PTX ISA 9.7.1.20); its sign is extended where values are signed."""
    width = 8 * values.dtype.itemsize
    kind = UNSIGNED[width]
    position = np.minimum(position & np.uint32(255), np.uint32(width))
    length = np.minimum(length & np.uint32(255), np.uint32(width))
    mask = ~shifted(np.full(len(values), ~kind(0)), length, left=True)
    field = shifted(unsigned(values), position, left=False) & mask
    if values.dtype.kind == "u":
        return field
    last = np.minimum(position + length - np.uint32(1), np.uint32(width - 1))
    negative = (shifted(unsigned(values), last, left=False) & kind(1) != 0) & (length > 0)
    # Bits behind the end of the value are its sign too.
    there = np.minimum(length, np.uint32(width) - position)
    return np.where(negative, field | shifted(np.full(len(values), ~kind(0)), there, left=True), field)


def permuted(a: Array, b: Array, selector: Array) -> Array:
    """Four of the eight bytes of two registers (PTX ISA 9.7.9.7, default mode)."""
    choices = np.concatenate([a.view(np.uint8).reshape(-1, 4), b.view(np.uint8).reshape(-1, 4)], 1)
    found = np.empty((len(a), 4), np.uint8)
    for byte in range(4):
        chosen = (selector >> np.uint32(4 * byte)) & np.uint32(15)
        value = np.take_along_axis(choices, (chosen & np.uint32(7)).astype(np.int64)[:, None], 1)[:, 0]
        sign = np.where(value & np.uint8(128), np.uint8(255), np.uint8(0))
        found[:, byte] = np.where(chosen & np.uint32(8), sign, value)
    return found.reshape(-1).view(np.uint32)


def funnel(low: Array, high: Array, amount: Array, left: bool, wraps: bool) -> Array:
    """32 bits of a shift over two registers (PTX ISA 9.7.8.7)."""
    amount = (amount & np.uint32(31) if wraps else np.minimum(amount, np.uint32(32))).astype(np.uint64)
    both = (high.astype(np.uint64) << np.uint64(32)) | low
    return ((both << amount) >> np.uint64(32) if left else both >> amount).astype(np.uint32)


def logic3(a: Array, b: Array, c: Array, table: int) -> Array:
    """Any logical operation on three registers, given by its table of truth (PTX ISA 9.7.8.6)."""
    found = np.zeros_like(a)
    for row in range(8):
        if table >> row & 1:
            found |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
    return found


def leading_zeros(bits: Array) -> Array:
    """Zeros above the highest bit that is set."""
    width = 8 * bits.dtype.itemsize
    found = np.full(len(bits), width, np.uint32)
    for position in range(width):
        is_set = (bits >> bits.dtype.type(position)) & bits.dtype.type(1)
        found = np.where(is_set, np.uint32(width - 1 - position), found)
    return found
