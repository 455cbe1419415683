"""The reduction over tasks, in a fixed order, so that results repeat bit by bit."""

import triton
import triton.language as tl


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
