"""Products of tiles, with operands in the precision that a kernel is compiled for and sums in float32."""

import triton
import triton.language as tl


@triton.jit
def dot(b_a, b_b, b_sum, SPEC: tl.constexpr):
    """Return b_sum + b_a @ b_b, with operands in the precision of SPEC and a float32 sum.

    In tf32x3, tensor cores sum b_a @ b_b alone, and a float32 addition adds it to b_sum. Tensor cores round a sum
    towards zero, so an accumulator that runs over many blocks loses accuracy with their number.
    """
    if SPEC.precision == "tf32x3":
        b_sum += product_of_block(b_a, b_b, SPEC)
    else:
        b_sum = running_dot(b_a, b_b, b_sum, SPEC)
    return b_sum


@triton.jit
def product_of_block(b_a, b_b, SPEC: tl.constexpr):
    """Return b_a @ b_b, with operands in the precision of SPEC and a float32 sum."""
    if SPEC.precision == "tf32x3":
        b_ah, b_bh = _high(b_a), _high(b_b)
        b_product = tl.dot(b_a - b_ah, b_bh, input_precision="tf32")
        b_product = tl.dot(b_ah, b_b - b_bh, b_product, input_precision="tf32")
        b_product = tl.dot(b_ah, b_bh, b_product, input_precision="tf32")
    else:
        b_product = running_dot(b_a, b_b, tl.zeros([b_a.shape[0], b_b.shape[1]], tl.float32), SPEC)
    return b_product


@triton.jit
def running_dot(b_a, b_b, b_sum, SPEC: tl.constexpr):
    """Return b_sum + b_a @ b_b, with b_sum as the accumulator of the tensor cores.

    In tf32x3 it needs fewer registers than `dot`, and is less accurate where one sum takes many of these products.
    """
    if SPEC.precision == "bf16":
        b_sum = tl.dot(b_a.to(tl.bfloat16), b_b.to(tl.bfloat16), b_sum)
    elif SPEC.precision == "fp16":
        b_sum = tl.dot(b_a.to(tl.float16), b_b.to(tl.float16), b_sum)
    elif SPEC.precision == "tf32x3":
        # Triton's own tf32x3 needs a tenth more instructions, and registers that a program of 64 x 64 weights lacks.
        b_ah, b_bh = _high(b_a), _high(b_b)
        b_sum = tl.dot(b_ah, b_bh, b_sum, input_precision="tf32")
        b_sum = tl.dot(b_a - b_ah, b_bh, b_sum, input_precision="tf32")
        b_sum = tl.dot(b_ah, b_b - b_bh, b_sum, input_precision="tf32")
    else:
        b_sum = tl.dot(b_a, b_b, b_sum, input_precision=SPEC.precision)
    return b_sum


@triton.jit
def _high(b_v):
    """The part of a float32 that tf32 holds, rounded; what is left is held as well, but for three bits."""
    return ((b_v.to(tl.int32, bitcast=True) + 4096) & -8192).to(tl.float32, bitcast=True)
