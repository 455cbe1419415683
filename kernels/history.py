"""What the dual form is made of: where samples and their history lie, products with history, corrections by it.

Samples are rows in memory, in one of two layouts: [T, N, ...], or [T, K, S, ...] of all inner steps; `rows` are as in
`layers`. A layer's history is its rows, and -c_j where a row and a sample are of one task, 0 elsewhere. Where tasks are
of unequal sizes, T counts packs of them, N and S are the rows of a pack, and each row has an owner, the task it is of.
"""

import triton
import triton.language as tl

from .layers import load
from .products import dot
from .spec import collapses, depth, samples, shares_tiles


@triton.constexpr_function
def largest(SPEC):
    """What an operand of a product may hold."""
    return 65504.0 if SPEC.precision == "fp16" else 3e38


@triton.jit
def places(p_owner, p_past_owner, i_p, i_b, T, N, S, K, SPEC: tl.constexpr):
    """Where block i_b of the samples of pack i_p lies, [T, N, ...], and their tasks' history.

    p_owner, p_past_owner: of the samples [T, N], and of the support set [T, S]; None where tasks are of one size.

    Returns the rows of the samples; their rows in step 0 of [T, K, S, ...]; and of two histories, of the pack in [T, S,
    ...] and in [T, K, S, ...], the rows, which are of a sample's task [history, B], and the step that writes each.
    """
    here, i_task, i_sample = _rows(i_p, i_b * samples(SPEC), T, N, samples(SPEC), SPEC)
    support, i_support, _ = _rows(i_p, 0, T, S, SPEC.support, SPEC)
    past, i_past, i_row = _rows(i_p, 0, T, K * S, SPEC.history, SPEC)
    begin = past[0], i_task * (K * S) + i_sample, here[2]
    if p_owner is not None:
        i_past = _owners(p_past_owner, support[0], i_past * S + i_row % S, past[2])
        i_support = _owners(p_past_owner, support[0], support[1], support[2])
        i_task = _owners(p_owner, here[0], here[1], here[2])
    first = support, _of_one_task(support[2], i_support, here[2], i_task, SPEC), i_support * 0
    later = past, _of_one_task(past[2], i_past, here[2], i_task, SPEC), i_row // S
    return here, begin, first, later


@triton.jit
def _rows(i_p, o, T, N, LENGTH: tl.constexpr, SPEC: tl.constexpr):
    """Rows o ... of pack i_p in [T, N, ...], the task of each within the pack, and its place within the task."""
    o_r = tl.arange(0, LENGTH)
    i_task = (o + o_r) // N
    m = (i_task < SPEC.tasks) & (i_p * SPEC.tasks + i_task < T)
    # Where no task matters a pack is all of them, and its blocks are far apart: that part of a row is in 64 bits.
    return (tl.cast(i_p, tl.int64) * SPEC.tasks * N + o, o_r, m), i_task, (o + o_r) % N


@triton.jit
def _owners(p_owner, begin, o_r, m):
    return tl.load(p_owner + begin + o_r, mask=m, other=-1)


@triton.jit
def _of_one_task(m_h, i_h, m_s, i_s, SPEC: tl.constexpr):
    m = m_h[:, None] & m_s[None, :]
    if shares_tiles(SPEC):
        m = m & (i_h[:, None] == i_s[None, :])
    return m


@triton.jit
def step_rows(begin, k, S):
    """Rows of step k in [T, K, S, ...]."""
    return begin[0], begin[1] + k * S, begin[2]


@triton.jit
def history(p_past, first, later, k, K, L: tl.constexpr, SPEC: tl.constexpr):
    """Layer L's history before step k: its rows, and -c_j where of a sample's task, [history, B].

    p_past: c [K + 1, layers, K].  first, later: as `places` gives them.
    """
    if collapses(SPEC, L):
        rows, m_pairs, i_step = first
        b_step = i_step * 0.0 + 1.0
    else:
        rows, m_pairs, i_step = later
        b_step = tl.load(p_past + (k * depth(SPEC) + L) * K + i_step, mask=rows[2] & (i_step < k), other=0.0)
    b_c = tl.where(m_pairs, -b_step[:, None], 0.0)
    rows = rows[0], rows[1], rows[2] & (i_step < k)
    return rows, b_c


@triton.jit
def weigh(p_h, past, b_c, p_v, rows, one, WIDTH: tl.constexpr, BLOCK: tl.constexpr, SPEC: tl.constexpr):
    """c_j (H V.T + one) of history with samples, of WIDTH features, BLOCK at a time; [history, B]."""
    b_products = tl.zeros(b_c.shape, tl.float32)
    for o in tl.range(0, WIDTH, BLOCK):
        o_f = o + tl.arange(0, BLOCK)
        b_h = tl.trans(load(p_h, past, o_f, WIDTH))
        b_products = dot(b_h, load(p_v, rows, o_f, WIDTH), b_products, SPEC)
    # Of other tasks a product may be nan, which times 0 is not 0.
    return tl.where(b_c == 0.0, 0.0, (b_products + one) * b_c)


@triton.jit
def correct(b_v, p_h, past, b_weights, o_f, WIDTH: tl.constexpr, SPEC: tl.constexpr):
    """Features o_f of samples, [F, B], plus those of their history by what `weigh` gives."""
    b_h = load(p_h, past, o_f, WIDTH)  # [F, history]
    if shares_tiles(SPEC):
        # 0 times what a diverged task left is nan for every task of its pack: for the others it is taken out, and the
        # task's own samples, which it might look sound without, are nan.
        m_sound = tl.abs(b_h) < largest(SPEC)
        b_h = tl.where(m_sound, b_h, 0.0)
        b_spoilt = tl.max(tl.where(m_sound, 0.0, 1.0), 0)[:, None]
        b_spoilt = tl.max(tl.where(b_weights == 0.0, 0.0, b_spoilt), 0)[None, :]
        b_v = tl.where(b_spoilt > 0.0, float("nan"), b_v)
    return dot(b_h, b_weights, b_v, SPEC)
