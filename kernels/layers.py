"""A layer on a block of samples that lie in memory, a tile of its features at a time; the losses of such a block.

Samples are rows in memory, and columns on chip. `rows` are those of a block: where they begin, which they are from
there, and which of them exist.
"""

import triton
import triton.language as tl

from .losses import expected_classes, sample_losses, takes_classes
from .products import dot
from .spec import contracted, depth, samples, width


@triton.jit
def load(p, rows, o_f, WIDTH: tl.constexpr):
    """Features o_f of rows as columns, [F, rows]; 0 past their end and in rows that do not exist."""
    i, o, m = rows
    m = m[None, :] & (o_f < WIDTH)[:, None]
    return tl.load(p + i * WIDTH + o[None, :] * WIDTH + o_f[:, None], mask=m, other=0.0).to(tl.float32)


@triton.jit
def store(p, rows, o_f, b_v, WIDTH: tl.constexpr):
    """Store columns [F, rows] as features o_f of rows."""
    i, o, m = rows
    tl.store(p + i * WIDTH + o[None, :] * WIDTH + o_f[:, None], b_v, mask=m[None, :] & (o_f < WIDTH)[:, None])


@triton.jit
def linear(p_weight, p_bias, p_x, rows, o_f, IN: tl.constexpr, OUT: tl.constexpr, SPEC: tl.constexpr):
    """Features o_f of W Xᵀ + b, [F, B]."""
    BLOCK: tl.constexpr = contracted(SPEC, IN)
    b_z = tl.zeros([o_f.shape[0], samples(SPEC)], tl.float32)
    if p_bias is not None:
        b_z += tl.load(p_bias + o_f, mask=o_f < OUT, other=0.0).to(tl.float32)[:, None]
    for o in tl.range(0, IN, BLOCK):
        o_in = o + tl.arange(0, BLOCK)
        m = (o_f < OUT)[:, None] & (o_in < IN)[None, :]
        b_w = tl.load(p_weight + o_f[:, None] * IN + o_in[None, :], mask=m, other=0.0).to(tl.float32)
        b_z = dot(b_w, load(p_x, rows, o_in, IN), b_z, SPEC)
    return b_z


@triton.jit
def linear_backward(p_weight, p_d, rows, o_f, IN: tl.constexpr, OUT: tl.constexpr, SPEC: tl.constexpr):
    """Features o_f of Wᵀ Dᵀ, [F, B]."""
    BLOCK: tl.constexpr = contracted(SPEC, OUT)
    b_d = tl.zeros([o_f.shape[0], samples(SPEC)], tl.float32)
    for o in tl.range(0, OUT, BLOCK):
        o_out = o + tl.arange(0, BLOCK)
        m = (o_f < IN)[:, None] & (o_out < OUT)[None, :]
        b_w = tl.load(p_weight + o_out[None, :] * IN + o_f[:, None], mask=m, other=0.0).to(tl.float32)
        b_d = dot(b_w, load(p_d, rows, o_out, OUT), b_d, SPEC)
    return b_d


@triton.jit
def output_gradient(b_out, p_y, p_r, share, p_cotangent, p_loss, here, rows, LOSS: tl.constexpr, SPEC: tl.constexpr):
    """The gradient of outputs b_out [C, B]: a cotangent [N, out] at `here`; or that of their losses, which are stored.

    p_y, p_r, p_loss: targets of all `rows`, what each counts, or None where all count `share`, and its loss times that,
    or None where that is not wanted.
    """
    OUT: tl.constexpr = width(SPEC, depth(SPEC))
    o_c = tl.arange(0, b_out.shape[0])
    if p_cotangent is not None:
        b_d = load(p_cotangent, here, o_c, OUT)
    else:
        i, o, m = rows
        if takes_classes(LOSS):
            b_class = tl.load(p_y + i + o, mask=m, other=0).to(tl.int32)[None, :]
            b_y = expected_classes(b_class, OUT, b_out.shape[0], LOSS)
        else:
            b_y = load(p_y, rows, o_c, OUT)
        if p_r is None:
            b_r = tl.where(m, share, 0.0)
        else:
            b_r = tl.load(p_r + i + o, mask=m, other=0.0)
        b_value, b_d = sample_losses(b_out, b_y, 1.0, OUT, LOSS)
        b_d = tl.where(m[None, :], b_d * b_r[None, :], 0.0)
        if p_loss is not None:
            tl.store(p_loss + i + o, tl.sum(b_value, 0) * b_r, mask=m)
    return b_d
