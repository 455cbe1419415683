"""Triton's interpreter, mended where it computes something else than a device does, and where it is slow.

It stays what it is, one program after another in numpy; and until `mend` is called, as upstream has it.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import triton.language as tl
from numpy.typing import NDArray
from triton._C.libtriton import ir
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle

_upstream_patch_lang = interpreter._patch_lang


def mend() -> None:
    """Mend the interpreter of this process, for good; doing so again changes nothing.

    Besides what `MendedBuilder` and `MendedReduction` say, `tl.device_assert` fires.
    """
    builder = interpreter.interpreter_builder
    builder.__class__ = MendedBuilder
    # Upstream drops every device_assert, for it leaves debug off. With debug on, it would also compute every sum and
    # product of integers twice, to see whether it overflows.
    builder.options = replace(builder.options, debug=True, sanitize_overflow=False)
    interpreter.ReduceOps = MendedReduction
    interpreter._patch_lang = _patch_whole_language
    interpreter.InterpretedFunction.__call__ = _call_within_launch


class MendedBuilder(interpreter.InterpreterBuilder):  # type: ignore[misc] # Triton has no types
    """Operations as a device has them.

    Upstream keeps a bfloat16 as the uint16 of its bits, and computes with these integers. Here an operation takes the
    values, in float32, and rounds what comes out to the nearest bfloat16, ties to even.
    """

    def create_dot(self, a: TensorHandle, b: TensorHandle, *rest: Any) -> TensorHandle:
        """Upstream multiplies float32 in full, whatever the input precision."""
        input_precision = rest[1]
        if _is_bfloat16(a):
            a, b = _widened(a), _widened(b)
        elif a.dtype.scalar == tl.float32 and input_precision == ir.INPUT_PRECISION.TF32:
            a, b = _as_tf32(a), _as_tf32(b)
        return super().create_dot(a, b, *rest)

    def unary_op(self, x: TensorHandle, op: Any) -> TensorHandle:
        if _is_bfloat16(x):
            return _narrowed(super().unary_op(_widened(x), op))
        return super().unary_op(x, op)

    def binary_op(self, x: TensorHandle, y: TensorHandle, op: Any) -> TensorHandle:
        if _is_bfloat16(x):
            return _narrowed(super().binary_op(_widened(x), _widened(y), op))
        return super().binary_op(x, y, op)

    def create_fma(self, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
        if _is_bfloat16(x):
            return _narrowed(super().create_fma(_widened(x), _widened(y), _widened(z)))
        return super().create_fma(x, y, z)

    def cast_impl(self, x: TensorHandle, dtype: tl.dtype) -> TensorHandle:
        """Upstream casts bfloat16 as the integer that it is kept in; to and from float32 only, it truncates and spoils
        subnormal values instead.
        """
        if _is_bfloat16(x):
            x = _widened(x)
        if dtype.scalar == tl.bfloat16:
            return _narrowed(super().cast_impl(x, tl.float32))
        return super().cast_impl(x, dtype)

    def get_bf16(self, value: float) -> TensorHandle:
        """A constant; before Triton 3.9 upstream has none."""
        return _narrowed(self.get_fp32(value))


class MendedReduction(interpreter.ReduceOps):  # type: ignore[misc] # Triton has no types
    """Upstream promotes bfloat16 in maxima and in scans, but sums its bits."""

    def sum(self, x: tl.tensor) -> tl.tensor:
        if x.dtype == tl.bfloat16:
            return super().sum(x.to(tl.float32)).to(tl.bfloat16)
        return super().sum(x)


def _is_bfloat16(x: TensorHandle) -> bool:
    return bool(x.dtype.scalar == tl.bfloat16)


def _widened(x: TensorHandle) -> TensorHandle:
    """The float32 of each bfloat16."""
    return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _narrowed(x: TensorHandle) -> TensorHandle:
    """The bfloat16 nearest to each float32, the even one of two; the truth values of a comparison as they are."""
    if x.data.dtype == np.bool_:
        return TensorHandle(x.data, tl.int1)
    bits = _bits(x)
    nearest = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    # A NaN would round to infinity if only its low bits are set, and to zero if all are.
    return TensorHandle(np.where(np.isnan(x.data), 0x7FC0, nearest).astype(np.uint16), tl.bfloat16)


def _as_tf32(x: TensorHandle) -> TensorHandle:
    """What a matrix unit reads of each float32: all but its low 13 bits, for the compiler does not round to them."""
    return TensorHandle((_bits(x) & 0xFFFFE000).view(np.float32), tl.float32)


def _bits(x: TensorHandle) -> NDArray[np.uint32]:
    bits: NDArray[np.uint32] = x.data.astype(np.float32).view(np.uint32)
    return bits


def _patch_whole_language(_function: Any) -> Any:
    """Replace the language for a launch: in all modules, for its kernel may call what sees others."""
    return _upstream_patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))


def _call_within_launch(self: Any, *arguments: Any, **options: Any) -> Any:
    """Call a jitted function from a kernel.

    Upstream replaces the language in every such call, though the launch has done so, which takes longer than most
    functions do; and wraps an error once more for each call that it passes.
    """
    return self.rewrite()(*arguments, **options)
