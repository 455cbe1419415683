"""Outer gradients and losses, reduced over tasks in a fixed order, so that results repeat bit by bit."""

import triton
import triton.language as tl

from .products import product_of_block
from .spec import bias_offset, depth, features, outer_tiles, weight_offset, width


@triton.jit(do_not_specialize=["N", "LENGTH"])
def outer_kernel(p_inputs, p_gradients, p_partials, unit, N, LENGTH, SPEC: tl.constexpr):
    """The outer gradient of all parameters over LENGTH of N samples: DᵀX and the sum of D, times `unit`.

    p_inputs, p_gradients: of each layer X [N, in] and D [N, out]; None where the gradient is not wanted.  p_partials:
    [splits, parameters], split i over samples i * LENGTH ...; what is not wanted is not written.
    """
    i_tile = tl.program_id(0)
    i_s = tl.program_id(1)
    p_partial = p_partials + i_s.to(tl.int64) * weight_offset(SPEC, depth(SPEC))
    end = tl.minimum((i_s + 1) * LENGTH, N)
    for i in tl.static_range(depth(SPEC)):
        if p_gradients[i] is not None:
            i_o = i_tile - outer_tiles(SPEC, i)
            if (i_o >= 0) & (i_tile < outer_tiles(SPEC, i + 1)):
                _outer_tile(p_inputs[i], p_gradients[i], p_partial, unit, i_o, i_s * LENGTH, end, i, SPEC)


@triton.jit
def _outer_tile(p_x, p_d, p_partial, unit, i_o, begin, end, L: tl.constexpr, SPEC: tl.constexpr):
    IN: tl.constexpr = width(SPEC, L)
    OUT: tl.constexpr = width(SPEC, L + 1)
    WIDE: tl.constexpr = features(SPEC, IN)
    F: tl.constexpr = features(SPEC, OUT)
    o_in = i_o % tl.cdiv(IN, WIDE) * WIDE + tl.arange(0, WIDE)
    o_out = i_o // tl.cdiv(IN, WIDE) * F + tl.arange(0, F)
    b_w, b_b = product(p_x, p_d, unit, begin, end, o_in, o_out, IN, OUT, SPEC)
    m = (o_out < OUT)[:, None] & (o_in < IN)[None, :]
    tl.store(p_partial + weight_offset(SPEC, L) + o_out[:, None] * IN + o_in[None, :], b_w, mask=m)
    if SPEC.biases[L]:
        if i_o % tl.cdiv(IN, WIDE) == 0:
            tl.store(p_partial + bias_offset(SPEC, L) + o_out, b_b, mask=o_out < OUT)


@triton.jit
def product(p_x, p_d, unit, begin, end, o_in, o_out, IN: tl.constexpr, OUT: tl.constexpr, SPEC: tl.constexpr):
    """Features o_out and o_in of DᵀX over samples from `begin` to `end`, and of the sum of D, times `unit`."""
    b_w = tl.zeros([o_out.shape[0], o_in.shape[0]], tl.float32)
    b_b = tl.zeros([o_out.shape[0]], tl.float32)
    for o in tl.range(begin, end, SPEC.contracted):
        o_r = o + tl.arange(0, SPEC.contracted)
        m_d = (o_out < OUT)[:, None] & (o_r < end)[None, :]
        m_x = (o_r < end)[:, None] & (o_in < IN)[None, :]
        b_d = tl.load(p_d + o_r.to(tl.int64)[None, :] * OUT + o_out[:, None], mask=m_d, other=0.0).to(tl.float32)
        b_x = tl.load(p_x + o_r.to(tl.int64)[:, None] * IN + o_in[None, :], mask=m_x, other=0.0).to(tl.float32)
        # Not into one accumulator: on sm_90, Triton would then copy the next tile over b_d while it is multiplied, for
        # it gives tiles that `tl.sum` takes too no second place.
        b_w += unit * product_of_block(b_d, b_x, SPEC)
        b_b += unit * tl.sum(b_d, 1)
    return b_w, b_b


@triton.jit(do_not_specialize=["N", "P", "T"])
def reduce_kernel(
    p_partials,
    p_gradient,
    p_loss,
    p_share,
    share,
    p_value,
    N,
    P,
    T,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    LOSSES: tl.constexpr,
):
    """Sum N partial gradients [N, P] to p_gradient [P], and the tasks' losses, times their shares, to p_value.

    Either pair may be None: not wanted.  p_loss: [T].  p_share: [T], or None where all have `share`.
    Each program sums BLOCK columns, ROWS at a time; one more, the last, the losses, LOSSES at a time.
    """
    if p_value is not None:
        if tl.program_id(0) == tl.num_programs(0) - 1:
            _reduce_losses(p_loss, p_share, share, p_value, T, LOSSES)
    if p_partials is not None:
        o_c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        b_sum = tl.zeros([ROWS, BLOCK], tl.float32)
        for o in tl.range(0, N, ROWS):
            o_r = o + tl.arange(0, ROWS)[:, None]
            m = (o_r < N) & (o_c < P)[None, :]
            b_sum += tl.load(p_partials + o_r.to(tl.int64) * P + o_c[None, :], mask=m, other=0.0)
        tl.store(p_gradient + o_c, tl.sum(b_sum, 0), mask=o_c < P)


@triton.jit
def _reduce_losses(p_loss, p_share, share, p_value, T, BLOCK: tl.constexpr):
    b_sum = tl.zeros([BLOCK], tl.float32)
    for o in tl.range(0, T, BLOCK):
        o_t = o + tl.arange(0, BLOCK)
        b_loss = tl.load(p_loss + o_t, mask=o_t < T, other=0.0)
        if p_share is None:
            b_sum += b_loss * share
        else:
            b_sum += b_loss * tl.load(p_share + o_t, mask=o_t < T, other=0.0)
    tl.store(p_value, tl.sum(b_sum, 0))
