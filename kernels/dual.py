"""The dual form: adapted weights never exist. Those that tasks share serve all, and a task's own history corrects them:

    Z  = s (X W_0ᵀ + b_0) - sum_j c_j (X X_jᵀ + 1) D_j        dX = s D W_0 - sum_j c_j (D D_jᵀ) X_j

X_j, D_j: a layer's inputs on the support set at step j, and the gradients of its pre-activations; s, c_j: numbers that
all tasks share. The first layer that moves has the same X at every step, so for it X W_0ᵀ + b_0 is the same too, its
`base`, and the sum over steps is one matrix, H = sum_j c_j D_j, kept up to date. Where every step has support samples
of its own, that layer has a base for each of them and a history like the others'.

A program takes a block of samples of one task, or of a pack of tasks, whose products across tasks are masked. Either
two launches do all, `inner_kernel` and `query_kernel`; or each does a layer, its features spread over programs:
`forward_kernel`, `loss_kernel` and `backward_kernel`. Both are made of the same parts. Layer by layer, a history that
outgrows its layer can be folded into weights that each task has for itself; `step_kernel` moves those.
"""

import triton
import triton.language as tl

from .activations import activate, keeps_output, pull_back
from .history import correct, history, places, step_rows, weigh
from .layers import linear, linear_backward, load, output_gradient, store
from .products import dot
from .spec import (
    activation,
    collapses,
    contracted,
    depth,
    features,
    first_adapted,
    padded,
    query_loss,
    samples,
    support_loss,
    width,
)


@triton.jit(do_not_specialize=["T", "S", "K"])
def inner_kernel(
    p_weights, p_biases, p_inner, p_shrink, p_past, p_base, p_y, p_r, share, p_owner,
    p_inputs, p_gradients, p_velocity, p_first, p_kept, T, S, K, SPEC: tl.constexpr,
):  # fmt: skip
    """All inner steps of a pack of tasks, which write its history.

    p_weights, p_biases: of each layer [out, in] and [out], or None.  p_inner: momentum, weight decay, and the rate of
    each step and layer [K, layers].  p_shrink: s [K + 1, layers].  p_past: c [K + 1, layers, K].  p_base: of the first
    layer that moves [T, S, out].  p_y: class indices [T, S] or values [T, S, out].  p_r: what each sample counts in its
    task's loss [T, S], or None where all count `share`. With samples of its own at each step, these are [T, K, S, ...].
    p_owner: as in `history.places`, of the support set.

    p_inputs, p_gradients: the history of each layer from the first that moves. Of that one, its input [T, S, in], which
    is given, and H [T, S, out]; of those behind it X_j [T, K, S, in] and D_j [T, K, S, out]. p_first: D_j of that first
    one, or None where they are not wanted. With samples of its own at each step, that layer's are like the others'.
    Scratch: the last of p_inputs, outputs [T, S, out]; p_velocity, of H, or None; p_kept, pre-activations [T, S, out]
    of layers whose activation's derivative is taken from them.
    """
    i_p = tl.program_id(0)
    LOWEST: tl.constexpr = first_adapted(SPEC)
    here, _begin, first, later = places(p_owner, p_owner, i_p, 0, T, S, S, K, SPEC)
    b_first = None
    if collapses(SPEC, LOWEST):
        past, b_c = history(p_past, first, later, K, K, LOWEST, SPEC)
        b_first = _forward_weights(p_inputs[LOWEST], past, b_c, p_inputs[LOWEST], here, LOWEST, SPEC)
    # Steps are counted over all packs, so that where a pack lies is found anew in each: known to be the same in all of
    # them, the addresses of every layer would be kept in registers, of which there are not enough. And nothing of a
    # step may be fetched before the one before it is stored.
    for j in tl.range(i_p * K, i_p * K + K, num_stages=1, disable_licm=True):
        k = j % K
        here, begin, first, later = places(p_owner, p_owner, j // K, 0, T, S, S, K, SPEC)
        now = step_rows(begin, k, S)
        for i in tl.static_range(first_adapted(SPEC), depth(SPEC)):
            _forward(
                p_weights[i], p_biases[i], p_base, p_shrink, p_past, p_inputs, p_gradients, p_inputs, p_kept,
                here, now, first, later, b_first, 0, 1, k, K, i, SPEC,
            )  # fmt: skip
            tl.debug_barrier()
        _loss(
            p_y, p_r, share, None, None, p_inputs, p_gradients, p_kept, p_inner, p_velocity, p_first, here, now, k,
            support_loss(SPEC), SPEC,
        )  # fmt: skip
        tl.debug_barrier()
        for i in tl.static_range(depth(SPEC) - 1, first_adapted(SPEC), -1):
            _backward(
                p_weights[i], p_shrink, p_past, p_inputs, p_gradients, p_inputs, p_gradients, p_kept, None, 1.0,
                p_inner, p_velocity, p_first, here, now, first, later, 0, 1, k, K, i, SPEC,
            )  # fmt: skip
            tl.debug_barrier()


@triton.jit(do_not_specialize=["T", "N", "S", "K", "taken"])
def query_kernel(
    p_weights, p_biases, p_shrink, p_past, p_base, p_inputs, p_gradients, p_y, p_r, share, p_cotangent,
    p_owner, p_past_owner, p_now, p_now_gradients, p_kept, p_loss, p_dx, unit, T, N, S, K, taken,
    BELOW: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """The query pass of a block of samples from the first layer that moves: outputs, losses, gradients.

    p_base: of the query samples [T, N, out].  p_inputs, p_gradients: the history, as `inner_kernel` leaves it.  p_y:
    targets [T, N] or [T, N, out], or None.  p_r, share: as above.  p_cotangent: gradient of the outputs [T, N, out], or
    None; where it is given, what an earlier launch left in p_now and p_kept is reversed and nothing run forward.
    p_owner, p_past_owner: as in `history.places`.

    p_now: of each layer from the first that moves, its input [T, N, in], of which the first is given; last, the outputs
    [T, N, out].  p_now_gradients: of each layer's pre-activations [T, N, out], or None of each.  p_kept:
    pre-activations, as above.  p_loss: of each sample, times what it counts, [T, N].  taken: inner
    steps behind the weights, or None for all K.  BELOW: whether gradients go on
    below the first layer that moves: to the layer there, or if there is none to p_dx, times `unit`.
    """
    k = K if taken is None else taken
    i_p, i_b = _block(N, SPEC)
    here, _begin, first, later = places(p_owner, p_past_owner, i_p, i_b, T, N, S, K, SPEC)
    if p_cotangent is None:
        for i in tl.static_range(first_adapted(SPEC), depth(SPEC)):
            _forward(
                p_weights[i], p_biases[i], p_base, p_shrink, p_past, p_inputs, p_gradients, p_now, p_kept,
                here, here, first, later, None, 0, 1, k, K, i, SPEC,
            )  # fmt: skip
            tl.debug_barrier()
    if p_y is not None or p_cotangent is not None:
        _loss(
            p_y, p_r, share, p_cotangent, p_loss, p_now, p_now_gradients, p_kept, None, None, None, here, here, k,
            query_loss(SPEC), SPEC,
        )  # fmt: skip
    if p_now_gradients[depth(SPEC) - 1] is not None:
        for i in tl.static_range(depth(SPEC) - 1, first_adapted(SPEC) - BELOW, -1):
            tl.debug_barrier()
            _backward(
                p_weights[i], p_shrink, p_past, p_inputs, p_gradients, p_now, p_now_gradients, p_kept, p_dx, unit,
                None, None, None, here, here, first, later, 0, 1, k, K, i, SPEC,
            )  # fmt: skip


@triton.jit(do_not_specialize=["T", "N", "S", "K", "k"])
def forward_kernel(
    p_weight, p_bias, p_base, p_shrink, p_past, p_inputs, p_gradients, p_owner, p_past_owner, p_now, p_kept,
    T, N, S, K, k, QUERY: tl.constexpr, OWN: tl.constexpr, L: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """Layer L of a block of samples with the weights after k steps; a part of its features.

    QUERY: whether the samples are a set's, [T, N, ...] in p_now; else they are the support set at step k, and p_now is
    the history. OWN: whether each task has weights of its own, [T, out, in]; then packs are of one. Where p_now has no
    place behind the layer, its pre-activations go to p_kept, and no further.
    """
    i_p, i_b = _block(N, SPEC)
    if OWN:
        p_weight += tl.cast(i_p, tl.int64) * width(SPEC, L) * width(SPEC, L + 1)
        if p_bias is not None:
            p_bias += tl.cast(i_p, tl.int64) * width(SPEC, L + 1)
    here, begin, first, later = places(p_owner, p_past_owner, i_p, i_b, T, N, S, K, SPEC)
    now = here if QUERY else step_rows(begin, k, S)
    _forward(
        p_weight, p_bias, p_base, p_shrink, p_past, p_inputs, p_gradients, p_now, p_kept,
        here, now, first, later, None, tl.program_id(1), tl.num_programs(1), k, K, L, SPEC,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T", "N", "S", "K", "k"])
def loss_kernel(
    p_y, p_r, share, p_cotangent, p_loss, p_now, p_now_gradients, p_kept, p_inner, p_velocity, T, N, S, K, k,
    QUERY: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """The losses of a block of samples and the gradient of the last layer's pre-activations."""
    i_p, i_b = _block(N, SPEC)
    here, begin, _first, _later = places(None, None, i_p, i_b, T, N, S, K, SPEC)
    now = here if QUERY else step_rows(begin, k, S)
    _loss(
        p_y, p_r, share, p_cotangent, p_loss, p_now, p_now_gradients, p_kept, p_inner, p_velocity, None, here, now, k,
        query_loss(SPEC) if QUERY else support_loss(SPEC), SPEC,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T", "N", "S", "K", "k"])
def backward_kernel(
    p_weight, p_shrink, p_past, p_inputs, p_gradients, p_owner, p_past_owner, p_now, p_now_gradients, p_kept, p_dx,
    unit, p_inner, p_velocity, T, N, S, K, k, QUERY: tl.constexpr, OWN: tl.constexpr, L: tl.constexpr,
    SPEC: tl.constexpr,
):  # fmt: skip
    """Layer L of a block of samples in reverse; a part of its input's features."""
    i_p, i_b = _block(N, SPEC)
    if OWN:
        p_weight += tl.cast(i_p, tl.int64) * width(SPEC, L) * width(SPEC, L + 1)
    here, begin, first, later = places(p_owner, p_past_owner, i_p, i_b, T, N, S, K, SPEC)
    now = here if QUERY else step_rows(begin, k, S)
    _backward(
        p_weight, p_shrink, p_past, p_inputs, p_gradients, p_now, p_now_gradients, p_kept, p_dx, unit,
        p_inner, p_velocity, None, here, now, first, later, tl.program_id(1), tl.num_programs(1), k, K, L, SPEC,
    )  # fmt: skip


@triton.jit(do_not_specialize=["S", "K", "k"])
def step_kernel(
    p_weight, p_bias, p_weight_velocity, p_bias_velocity, p_inner, p_x, p_d, S, K, k,
    L: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """Step k of a layer of which each task has its own weights [T, out, in] and bias [T, out], in place.

    p_x, p_d: its X_j and D_j, [T, K, S, in] and [T, K, S, out].  The velocities are those of momentum, or None.
    """
    IN: tl.constexpr = width(SPEC, L)
    OUT: tl.constexpr = width(SPEC, L + 1)
    WIDE: tl.constexpr = features(SPEC, IN)
    F: tl.constexpr = features(SPEC, OUT)
    i_t = tl.program_id(0).to(tl.int64)
    i_w = tl.program_id(1) % tl.cdiv(IN, WIDE)
    o_in = i_w * WIDE + tl.arange(0, WIDE)
    o_out = tl.program_id(1) // tl.cdiv(IN, WIDE) * F + tl.arange(0, F)
    o_s = tl.arange(0, SPEC.support)
    rows = (i_t * K + k) * S, o_s, o_s < S
    b_d = load(p_d, rows, o_out, OUT)  # [F, S]
    b_x = tl.trans(load(p_x, rows, o_in, IN))  # [S, WIDE]
    rate = tl.load(p_inner + 2 + k * depth(SPEC) + L)
    o_w = i_t * OUT * IN + o_out[:, None] * IN + o_in[None, :]
    m_w = (o_out < OUT)[:, None] & (o_in < IN)[None, :]
    b_w = tl.load(p_weight + o_w, mask=m_w, other=0.0)
    b_g = tl.zeros([F, WIDE], tl.float32)
    if SPEC.momentum:
        momentum = tl.load(p_inner)
        b_v = tl.load(p_weight_velocity + o_w, mask=m_w, other=0.0)
        b_g = momentum * b_v
    if SPEC.decay and not SPEC.decoupled:
        b_g += tl.load(p_inner + 1) * b_w
    b_g = dot(b_d, b_x, b_g, SPEC)
    if SPEC.momentum:
        tl.store(p_weight_velocity + o_w, b_g, mask=m_w)
    if SPEC.nesterov:
        b_g += momentum * (b_g - b_v)
    if SPEC.decay and SPEC.decoupled:
        b_g += tl.load(p_inner + 1) * b_w
    tl.store(p_weight + o_w, b_w - rate * b_g, mask=m_w)
    if p_bias is not None:
        if i_w == 0:
            o_b = i_t * OUT + o_out
            b_b = tl.load(p_bias + o_b, mask=o_out < OUT, other=0.0)
            b_gb = tl.sum(b_d, 1)
            if SPEC.momentum:
                momentum = tl.load(p_inner)
                b_vb = tl.load(p_bias_velocity + o_b, mask=o_out < OUT, other=0.0)
                b_gb += momentum * b_vb
            if SPEC.decay and not SPEC.decoupled:
                b_gb += tl.load(p_inner + 1) * b_b
            # Threads that hold copies of an element all read it before one of them writes it.
            tl.debug_barrier()
            if SPEC.momentum:
                tl.store(p_bias_velocity + o_b, b_gb, mask=o_out < OUT)
            if SPEC.nesterov:
                b_gb += momentum * (b_gb - b_vb)
            if SPEC.decay and SPEC.decoupled:
                b_gb += tl.load(p_inner + 1) * b_b
            tl.store(p_bias + o_b, b_b - rate * b_gb, mask=o_out < OUT)


@triton.jit
def _block(N, SPEC: tl.constexpr):
    """The pack of a program, and the block of its samples: on one axis, for no other of a grid is long."""
    blocks = tl.cdiv(SPEC.tasks * N, samples(SPEC))
    return tl.program_id(0) // blocks, tl.program_id(0) % blocks


@triton.jit
def _forward(
    p_weight, p_bias, p_base, p_shrink, p_past, p_inputs, p_gradients, p_now, p_kept,
    here, now, first, later, b_first, start, step, k, K, L: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """Layer L of samples with the weights after k steps: tiles `start`, `start + step`, ... of its output.

    here, now: the samples' rows in [T, N, ...] and in p_now.  b_first: what `_forward_weights` gives for the first
    layer that moves, or None.
    """
    IN: tl.constexpr = width(SPEC, L)
    OUT: tl.constexpr = width(SPEC, L + 1)
    F: tl.constexpr = features(SPEC, OUT)
    rows = here if collapses(SPEC, L) else now
    if SPEC.adapts[L]:
        past, b_c = history(p_past, first, later, k, K, L, SPEC)
        if b_first is not None and first_adapted(SPEC) == L:
            b_c = b_first
        else:
            b_c = _forward_weights(p_inputs[L], past, b_c, p_now[L], rows, L, SPEC)
    for o in tl.range(start * F, OUT, step * F, disable_licm=True):
        o_f = o + tl.arange(0, F)
        if p_base is not None and first_adapted(SPEC) == L:
            b_z = load(p_base, rows, o_f, OUT)
        else:
            b_z = linear(p_weight, p_bias, p_now[L], rows, o_f, IN, OUT, SPEC)
        if SPEC.adapts[L]:
            if SPEC.decay:
                b_z *= tl.load(p_shrink + k * depth(SPEC) + L)
            b_z = correct(b_z, p_gradients[L], past, b_c, o_f, OUT, SPEC)
        if p_kept[L] is not None:
            store(p_kept[L], here, o_f, b_z, OUT)
        if p_now[L + 1] is not None:
            b_h = activate(b_z, activation(SPEC, L))
            # Outputs of the last layer are nobody's history.
            store(p_now[L + 1], here if depth(SPEC) == L + 1 else now, o_f, b_h, OUT)


@triton.jit
def _forward_weights(p_h, past, b_c, p_x, rows, L: tl.constexpr, SPEC: tl.constexpr):
    """-c_j (X_j Xᵀ + 1) of layer L, [history, B]."""
    IN: tl.constexpr = width(SPEC, L)
    return weigh(p_h, past, b_c, p_x, rows, 1.0 if SPEC.biases[L] else 0.0, IN, contracted(SPEC, IN), SPEC)


@triton.jit
def _loss(
    p_y, p_r, share, p_cotangent, p_loss, p_now, p_now_gradients, p_kept, p_inner, p_velocity, p_first, here, now, k,
    LOSS: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """Store the samples' losses, and the gradient of the last layer's pre-activations, of a loss or a cotangent."""
    L: tl.constexpr = depth(SPEC) - 1
    OUT: tl.constexpr = width(SPEC, L + 1)
    o_c = tl.arange(0, padded(OUT))
    b_out = load(p_now[L + 1], here, o_c, OUT)
    rows = now if SPEC.each_step else here
    b_d = output_gradient(b_out, p_y, p_r, share, p_cotangent, p_loss, here, rows, LOSS, SPEC)
    if p_now_gradients[L] is not None:
        b_kept = b_out if keeps_output(activation(SPEC, L)) else load(p_kept[L], here, o_c, OUT)
        b_d = pull_back(b_d, b_kept, activation(SPEC, L))
        _keep(p_now_gradients, b_d, p_inner, p_velocity, p_first, here, now, o_c, k, L, SPEC)


@triton.jit
def _backward(
    p_weight, p_shrink, p_past, p_inputs, p_gradients, p_now, p_now_gradients, p_kept, p_dx, unit, p_inner, p_velocity,
    p_first, here, now, first, later, start, step, k, K, L: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """Layer L of samples in reverse: tiles of the gradient of the pre-activations below it; of layer 0, of p_dx."""
    IN: tl.constexpr = width(SPEC, L)
    OUT: tl.constexpr = width(SPEC, L + 1)
    F: tl.constexpr = features(SPEC, IN)
    if SPEC.adapts[L]:
        past, b_c = history(p_past, first, later, k, K, L, SPEC)
        b_c = weigh(p_gradients[L], past, b_c, p_now_gradients[L], now, 0.0, OUT, contracted(SPEC, OUT), SPEC)
    for o in tl.range(start * F, IN, step * F, disable_licm=True):
        o_f = o + tl.arange(0, F)
        b_d = linear_backward(p_weight, p_now_gradients[L], now, o_f, IN, OUT, SPEC)
        if SPEC.adapts[L]:
            if SPEC.decay:
                b_d *= tl.load(p_shrink + k * depth(SPEC) + L)
            b_d = correct(b_d, p_inputs[L], past, b_c, o_f, IN, SPEC)
        if L == 0:
            store(p_dx, here, o_f, b_d * unit, IN)
        else:
            if keeps_output(activation(SPEC, L - 1)):
                b_kept = load(p_now[L], now, o_f, IN)
            else:
                b_kept = load(p_kept[L - 1], here, o_f, IN)
            b_d = pull_back(b_d, b_kept, activation(SPEC, L - 1))
            _keep(p_now_gradients, b_d, p_inner, p_velocity, p_first, here, now, o_f, k, L - 1, SPEC)


@triton.jit
def _keep(p_gradients, b_d, p_inner, p_velocity, p_first, here, now, o_f, k, L: tl.constexpr, SPEC: tl.constexpr):
    """Store features o_f of layer L's D; of the first layer that moves in an inner step, move H by it.

    p_inner: None in the query pass, and where what H moves by is yet to come.  p_first: where that layer's D is stored
    as well, or None.
    """
    OUT: tl.constexpr = width(SPEC, L + 1)
    if p_inner is not None and collapses(SPEC, L):
        if p_first is not None:
            store(p_first, now, o_f, b_d, OUT)
        rate = tl.load(p_inner + 2 + k * depth(SPEC) + L)
        before = here[0], here[1], here[2] & (here[1] * 0 < k)
        b_h = load(p_gradients[L], before, o_f, OUT)
        if SPEC.momentum:
            momentum = tl.load(p_inner)
            b_v = load(p_velocity, before, o_f, OUT)
            b_d += momentum * b_v
        if SPEC.decay and not SPEC.decoupled:
            b_d -= tl.load(p_inner + 1) * b_h
        if SPEC.momentum:
            store(p_velocity, here, o_f, b_d, OUT)
        if SPEC.nesterov:
            # g + momentum * v, where g is what the velocity v has more than momentum times the one before it.
            b_d += momentum * (b_d - b_v)
        if SPEC.decay and SPEC.decoupled:
            b_d -= tl.load(p_inner + 1) * b_h
        store(p_gradients[L], here, o_f, b_h + rate * b_d, OUT)
    else:
        store(p_gradients[L], now, o_f, b_d, OUT)
