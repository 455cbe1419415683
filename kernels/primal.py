"""The primal form: each task has weights of its own, in memory, for networks and sample sets that no program holds.

An inner step is a pass of the support set through the network and back, which leaves each layer's inputs X and the
gradients D of its pre-activations, and then, in one launch for all layers, the product DᵀX, which moves the weights as
soon as it is summed: no gradient is written. Before the first step tasks read the weights that they share, so those are
never copied; the first step writes each task its own. The query pass is the same pass, and its X and D are contracted
over tasks and samples by `outer`.

Where a layer's width fits a tile, `pass_kernel` takes a block of samples through the whole network and back, and
activations stay on chip on the way. Else a launch takes a layer in a direction, its features spread over programs:
`forward_kernel`, `loss_kernel`, `backward_kernel`.

A task's parameters lie end to end, [T, parameters], as `spec` lays them out. Samples are rows [T, N, features].
"""

import triton
import triton.language as tl

from .activations import activate, keeps_output, pull_back
from .layers import linear, linear_backward, load, output_gradient, store
from .outer import product
from .products import dot
from .rules import clipped_value, direction
from .spec import (
    activation,
    bias_offset,
    depth,
    features,
    outer_tiles,
    padded,
    query_loss,
    samples,
    support_loss,
    weight_offset,
    width,
)


@triton.jit(do_not_specialize=["N"])
def pass_kernel(
    p_weights, p_biases, p_fast, p_x, p_y, p_r, share, p_cotangent, p_inputs, p_gradients, p_out, p_loss, p_dx, unit,
    N, LOWEST: tl.constexpr, QUERY: tl.constexpr, OWN: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """A block of a task's samples through the network, and back.

    p_weights, p_biases: of each layer [out, in] and [out], or None.  p_fast: those of each task [T, parameters], or
    None; OWN: whether layers that move are read from there.  p_x: [T, N, in].  p_y: class indices [T, N] or values [T,
    N, out], or None.  p_r: what each sample counts, [T, N], or None where all count `share`.  p_cotangent: gradient of
    the outputs [T, N, out], in place of targets.  LOWEST: the lowest layer whose D is wanted, -1 where p_dx is.  QUERY:
    whose loss it is.

    p_inputs: X of each layer [T, N, in]; None of the first, whose is p_x, and where it is not wanted.  p_gradients: D
    [T, N, out], or None where not wanted.  p_out: outputs [T, N, out].  p_loss: of each sample, times what it counts,
    [T, N].  p_dx: gradient of p_x, times `unit`.  The last three may be None.
    """
    i_t, rows = _block(N, SPEC)
    h = ()
    for f in tl.static_range(_chunks(SPEC, 0)):
        h = h + (load(p_x, rows, _features(f, 0, SPEC), width(SPEC, 0)),)
    kept = ()
    for i in tl.static_range(depth(SPEC)):
        if p_inputs[i] is not None:
            _store(p_inputs[i], rows, h, i, SPEC)
        p_weight = _weight_pointer(p_weights[i], p_fast, i_t, OWN, i, SPEC)
        p_bias = p_biases[i]
        if p_bias is not None:
            p_bias = _bias_pointer(p_bias, p_fast, i_t, OWN, i, SPEC)
        h, left = _layer(h, p_weight, p_bias, i, SPEC)
        kept = kept + (left,)
    if p_out is not None:
        _store(p_out, rows, h, depth(SPEC), SPEC)
    if p_y is not None or p_cotangent is not None:
        LOSS: tl.constexpr = query_loss(SPEC) if QUERY else support_loss(SPEC)
        # The outputs are one tile.
        d = (output_gradient(h[0], p_y, p_r, share, p_cotangent, p_loss, rows, rows, LOSS, SPEC),)
        for i in tl.static_range(depth(SPEC) - 1, -1, -1):
            if i >= LOWEST:
                d = _pulled_back(d, kept[i], i, SPEC)
                if p_gradients[i] is not None:
                    _store(p_gradients[i], rows, d, i + 1, SPEC)
                if i > LOWEST:
                    p_weight = _weight_pointer(p_weights[i], p_fast, i_t, OWN, i, SPEC)
                    d = _layer_backward(d, p_weight, i, SPEC)
        if p_dx is not None:
            _store(p_dx, rows, _scaled(d, unit), 0, SPEC)


@triton.jit(do_not_specialize=["N"])
def forward_kernel(
    p_weight, p_bias, p_fast, p_x, p_h, p_kept, N, OWN: tl.constexpr, L: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """Layer L of a block of samples; a tile of its features.

    p_x: its input [T, N, in].  p_h: its output [T, N, out].  p_kept: its pre-activations, or None where the derivative
    of its activation is not taken from them, or not at all.
    """
    IN: tl.constexpr = width(SPEC, L)
    OUT: tl.constexpr = width(SPEC, L + 1)
    i_t, rows = _block(N, SPEC)
    o_f = tl.program_id(1) * features(SPEC, OUT) + tl.arange(0, features(SPEC, OUT))
    p_weight = _weight_pointer(p_weight, p_fast, i_t, OWN, L, SPEC)
    if p_bias is not None:
        p_bias = _bias_pointer(p_bias, p_fast, i_t, OWN, L, SPEC)
    b_z = linear(p_weight, p_bias, p_x, rows, o_f, IN, OUT, SPEC)
    if p_kept is not None:
        store(p_kept, rows, o_f, b_z, OUT)
    store(p_h, rows, o_f, activate(b_z, activation(SPEC, L)), OUT)


@triton.jit(do_not_specialize=["N"])
def loss_kernel(
    p_out, p_kept, p_y, p_r, share, p_cotangent, p_loss, p_d, N, QUERY: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """The losses of a block of samples, and the gradient p_d of the last layer's pre-activations; or None of it."""
    LAST: tl.constexpr = depth(SPEC) - 1
    OUT: tl.constexpr = width(SPEC, LAST + 1)
    LOSS: tl.constexpr = query_loss(SPEC) if QUERY else support_loss(SPEC)
    _t, rows = _block(N, SPEC)
    o_c = tl.arange(0, padded(OUT))
    b_out = load(p_out, rows, o_c, OUT)
    b_d = output_gradient(b_out, p_y, p_r, share, p_cotangent, p_loss, rows, rows, LOSS, SPEC)
    if p_d is not None:
        b_kept = b_out if keeps_output(activation(SPEC, LAST)) else load(p_kept, rows, o_c, OUT)
        store(p_d, rows, o_c, pull_back(b_d, b_kept, activation(SPEC, LAST)), OUT)


@triton.jit(do_not_specialize=["N"])
def backward_kernel(
    p_weight, p_fast, p_d, p_kept, p_below, unit, N, OWN: tl.constexpr, L: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """Layer L of a block of samples in reverse; a tile of its input's features.

    p_d: D of the layer [T, N, out].  p_kept: what the derivative of the activation below it is taken from, [T, N, in].
    p_below: D of the layer below it; of layer 0, the gradient of its input, times `unit`.
    """
    IN: tl.constexpr = width(SPEC, L)
    i_t, rows = _block(N, SPEC)
    o_f = tl.program_id(1) * features(SPEC, IN) + tl.arange(0, features(SPEC, IN))
    p_weight = _weight_pointer(p_weight, p_fast, i_t, OWN, L, SPEC)
    b_d = linear_backward(p_weight, p_d, rows, o_f, IN, width(SPEC, L + 1), SPEC)
    if L > 0:
        b_d = pull_back(b_d, load(p_kept, rows, o_f, IN), activation(SPEC, L - 1))
    else:
        b_d *= unit
    store(p_below, rows, o_f, b_d, IN)


@triton.jit(do_not_specialize=["N", "K", "k"])
def step_kernel(
    p_weights, p_biases, p_fast, p_first, p_second, p_directions, p_inner, p_rates, p_inputs, p_gradients, unit,
    N, K, k, OWN: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """Step k of all layers that move; a tile of a weight, and beside its first column the bias.

    p_fast: the parameters of each task [T, parameters], written; read where OWN, else those that tasks share.  p_first,
    p_second: the velocity or the first moment, and the second moment, alike, where the rule has them.  p_directions:
    the sum of what rates have multiplied, alike, where they are learned; else None.  p_inner: what `rules` reads.
    p_rates: the rate of each layer where it is learned, [layers]; or of elements, all weights' and then all biases';
    else None.  p_inputs, p_gradients: X [T, N, in] and D [T, N, out] of each layer that moves.
    """
    i_t, i_tile = _task_and_tile(SPEC)
    for i in tl.static_range(depth(SPEC)):
        if SPEC.adapts[i]:
            i_o = i_tile - outer_tiles(SPEC, i)
            if (i_o >= 0) & (i_tile < outer_tiles(SPEC, i + 1)):
                IN: tl.constexpr = width(SPEC, i)
                OUT: tl.constexpr = width(SPEC, i + 1)
                i_in, o_in, o_out = _tile(i_o, i, SPEC)
                b_w, b_b = product(
                    p_inputs[i], p_gradients[i], unit, i_t * N, (i_t + 1) * N, o_in, o_out, IN, OUT, SPEC
                )
                _move(
                    p_weights[i], p_biases[i], p_fast, p_first, p_second, p_directions, p_inner, p_rates, b_w, b_b,
                    i_t, i_in, o_in, o_out, K, k, OWN, i, SPEC,
                )  # fmt: skip


@triton.jit(do_not_specialize=["N", "LENGTH", "SPLITS", "FIRST"])
def products_kernel(p_inputs, p_gradients, p_partials, unit, N, LENGTH, SPLITS, FIRST, SPEC: tl.constexpr):
    """DᵀX and the sum of D of a task over LENGTH of its N samples, times `unit`; a tile of them.

    p_inputs, p_gradients: X [T, N, in] and D [T, N, out] of each layer; None where they are not wanted.  p_partials:
    [T, SPLITS, parameters], of which part FIRST + i is over samples i * LENGTH ...; what is not wanted is not written.
    """
    i_t, i_tile = _task_and_tile(SPEC)
    i_s = tl.program_id(1)
    p_partial = p_partials + (i_t * SPLITS + FIRST + i_s) * weight_offset(SPEC, depth(SPEC))
    begin = i_t * N + i_s * LENGTH
    end = tl.minimum(begin + LENGTH, (i_t + 1) * N)
    for i in tl.static_range(depth(SPEC)):
        if p_gradients[i] is not None:
            i_o = i_tile - outer_tiles(SPEC, i)
            if (i_o >= 0) & (i_tile < outer_tiles(SPEC, i + 1)):
                IN: tl.constexpr = width(SPEC, i)
                OUT: tl.constexpr = width(SPEC, i + 1)
                i_in, o_in, o_out = _tile(i_o, i, SPEC)
                b_w, b_b = product(p_inputs[i], p_gradients[i], unit, begin, end, o_in, o_out, IN, OUT, SPEC)
                o_w, m_w = _weight(o_in, o_out, i, SPEC)
                tl.store(p_partial + o_w, b_w, mask=m_w)
                if SPEC.biases[i]:
                    if i_in == 0:
                        tl.store(p_partial + bias_offset(SPEC, i) + o_out, b_b, mask=o_out < OUT)


@triton.jit(do_not_specialize=["SPLITS", "K", "k"])
def update_kernel(
    p_weights, p_biases, p_fast, p_first, p_second, p_directions, p_inner, p_rates, p_partials, SPLITS, K, k,
    OWN: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """Step k along gradients that are written, in parts [T, SPLITS, parameters]; else as `step_kernel`."""
    i_t, i_tile = _task_and_tile(SPEC)
    P: tl.constexpr = weight_offset(SPEC, depth(SPEC))
    for i in tl.static_range(depth(SPEC)):
        if SPEC.adapts[i]:
            i_o = i_tile - outer_tiles(SPEC, i)
            if (i_o >= 0) & (i_tile < outer_tiles(SPEC, i + 1)):
                i_in, o_in, o_out = _tile(i_o, i, SPEC)
                o_w, m_w = _weight(o_in, o_out, i, SPEC)
                b_w = tl.zeros(o_w.shape, tl.float32)
                b_b = tl.zeros(o_out.shape, tl.float32)
                for i_s in tl.range(0, SPLITS):
                    p_partial = p_partials + (i_t * SPLITS + i_s) * P
                    b_w += tl.load(p_partial + o_w, mask=m_w, other=0.0)
                    if SPEC.biases[i]:
                        m_b = o_out < width(SPEC, i + 1)
                        b_b += tl.load(p_partial + bias_offset(SPEC, i) + o_out, mask=m_b, other=0.0)
                _move(
                    p_weights[i], p_biases[i], p_fast, p_first, p_second, p_directions, p_inner, p_rates, b_w, b_b,
                    i_t, i_in, o_in, o_out, K, k, OWN, i, SPEC,
                )  # fmt: skip


@triton.constexpr_function
def _chunk(SPEC, i):
    """Features of a tile where a program holds all that enter layer i: no more than sm_90's matrix unit has rows.

    Of the outputs, which a loss takes together, all.
    """
    whole = max(16, padded(width(SPEC, i)))
    return whole if i == depth(SPEC) else min(64, whole)


@triton.constexpr_function
def _chunks(SPEC, i):
    return -(-width(SPEC, i) // _chunk(SPEC, i))


@triton.jit
def _features(f, i: tl.constexpr, SPEC: tl.constexpr):
    return f * _chunk(SPEC, i) + tl.arange(0, _chunk(SPEC, i))


@triton.jit
def _layer(h, p_weight, p_bias, L: tl.constexpr, SPEC: tl.constexpr):
    """Layer L of samples whose features are tiles [chunk, B]: its output and what its derivative is taken from."""
    IN: tl.constexpr = width(SPEC, L)
    OUT: tl.constexpr = width(SPEC, L + 1)
    found = ()
    kept = ()
    for f in tl.static_range(_chunks(SPEC, L + 1)):
        o_out = _features(f, L + 1, SPEC)
        b_z = tl.zeros([_chunk(SPEC, L + 1), samples(SPEC)], tl.float32)
        if p_bias is not None:
            b_z += tl.load(p_bias + o_out, mask=o_out < OUT, other=0.0).to(tl.float32)[:, None]
        for c in tl.static_range(_chunks(SPEC, L)):
            o_in = _features(c, L, SPEC)
            m = (o_out < OUT)[:, None] & (o_in < IN)[None, :]
            b_w = tl.load(p_weight + o_out[:, None] * IN + o_in[None, :], mask=m, other=0.0).to(tl.float32)
            b_z = dot(b_w, h[c], b_z, SPEC)
        # Whatever padding becomes, it meets weights of 0, and is never stored.
        b_h = activate(b_z, activation(SPEC, L))
        found = found + (b_h,)
        if keeps_output(activation(SPEC, L)):
            b_z = b_h
        kept = kept + (b_z,)
    return found, kept


@triton.jit
def _layer_backward(d, p_weight, L: tl.constexpr, SPEC: tl.constexpr):
    """Layer L in reverse: the gradient of its input, from that of its pre-activations."""
    IN: tl.constexpr = width(SPEC, L)
    OUT: tl.constexpr = width(SPEC, L + 1)
    found = ()
    for c in tl.static_range(_chunks(SPEC, L)):
        o_in = _features(c, L, SPEC)
        b_d = tl.zeros([_chunk(SPEC, L), samples(SPEC)], tl.float32)
        for f in tl.static_range(_chunks(SPEC, L + 1)):
            o_out = _features(f, L + 1, SPEC)
            m = (o_in < IN)[:, None] & (o_out < OUT)[None, :]
            b_w = tl.load(p_weight + o_out[None, :] * IN + o_in[:, None], mask=m, other=0.0).to(tl.float32)
            b_d = dot(b_w, d[f], b_d, SPEC)
        found = found + (b_d,)
    return found


@triton.jit
def _pulled_back(d, kept, L: tl.constexpr, SPEC: tl.constexpr):
    """The gradient of layer L's pre-activations, from that of its output."""
    found = ()
    for f in tl.static_range(len(d)):
        found = found + (pull_back(d[f], kept[f], activation(SPEC, L)),)
    return found


@triton.jit
def _scaled(d, scale):
    found = ()
    for f in tl.static_range(len(d)):
        found = found + (d[f] * scale,)
    return found


@triton.jit
def _store(p, rows, h, i: tl.constexpr, SPEC: tl.constexpr):
    """Store tiles of what enters layer i."""
    for f in tl.static_range(_chunks(SPEC, i)):
        store(p, rows, _features(f, i, SPEC), h[f], width(SPEC, i))


@triton.jit
def _block(N, SPEC: tl.constexpr):
    """The task of a program, and the rows of its block of samples: on one axis, for no other of a grid is long."""
    blocks = tl.cdiv(N, samples(SPEC))
    i_t = (tl.program_id(0) // blocks).to(tl.int64)
    begin = tl.program_id(0) % blocks * samples(SPEC)
    o = tl.arange(0, samples(SPEC))
    return i_t, (i_t * N + begin, o, begin + o < N)


@triton.jit
def _task_and_tile(SPEC: tl.constexpr):
    """The task of a program, and the tile of its weights; a task's are neighbours, for they share its samples."""
    tiles = outer_tiles(SPEC, depth(SPEC))
    return (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles


# Triton 3.6 compiles no function that returns a tuple with None in it, so a weight and its bias have one each.
@triton.jit
def _weight_pointer(p_weight, p_fast, i_t, OWN: tl.constexpr, L: tl.constexpr, SPEC: tl.constexpr):
    """Return the pointer of layer L's weight: of task i_t, or of what tasks share."""
    if OWN and SPEC.adapts[L]:
        p_weight = p_fast + i_t * weight_offset(SPEC, depth(SPEC)) + weight_offset(SPEC, L)
    return p_weight


@triton.jit
def _bias_pointer(p_bias, p_fast, i_t, OWN: tl.constexpr, L: tl.constexpr, SPEC: tl.constexpr):
    """Return the pointer of layer L's bias, which it has: of task i_t, or of what tasks share."""
    if OWN and SPEC.adapts[L]:
        p_bias = p_fast + i_t * weight_offset(SPEC, depth(SPEC)) + bias_offset(SPEC, L)
    return p_bias


@triton.jit
def _tile(i_o, L: tl.constexpr, SPEC: tl.constexpr):
    """Of tile i_o of layer L's weight: its column, and its features of input and output."""
    WIDE: tl.constexpr = features(SPEC, width(SPEC, L))
    F: tl.constexpr = features(SPEC, width(SPEC, L + 1))
    columns = tl.cdiv(width(SPEC, L), WIDE)
    return i_o % columns, i_o % columns * WIDE + tl.arange(0, WIDE), i_o // columns * F + tl.arange(0, F)


@triton.jit
def _weight(o_in, o_out, L: tl.constexpr, SPEC: tl.constexpr):
    """Where a tile of layer L's weight lies among a task's parameters, and which of it exists."""
    IN: tl.constexpr = width(SPEC, L)
    m = (o_out < width(SPEC, L + 1))[:, None] & (o_in < IN)[None, :]
    return weight_offset(SPEC, L) + o_out[:, None] * IN + o_in[None, :], m


@triton.jit
def _move(
    p_weight, p_bias, p_fast, p_first, p_second, p_directions, p_inner, p_rates, b_w, b_b, i_t, i_in, o_in, o_out,
    K, k, OWN: tl.constexpr, L: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """Move a tile of layer L's weight, and beside its first column the bias, along their gradients b_w and b_b."""
    p_weight = _weight_pointer(p_weight, p_fast, i_t, OWN, L, SPEC)
    o_w, m_w = _weight(o_in, o_out, L, SPEC)
    o_here = o_w - weight_offset(SPEC, L)
    b_rate = _rate(p_inner, p_rates, o_here, m_w, k, L, L, SPEC)
    _follow(
        p_weight + o_here, p_fast, p_first, p_second, p_directions, p_inner, b_w, b_rate, i_t, o_w, m_w, K, k, OWN,
        SPEC,
    )  # fmt: skip
    if SPEC.biases[L]:
        if i_in == 0:
            m_b = o_out < width(SPEC, L + 1)
            p_bias = _bias_pointer(p_bias, p_fast, i_t, OWN, L, SPEC)
            b_bias_rate = _rate(p_inner, p_rates, o_out, m_b, k, L, depth(SPEC) + L, SPEC)
            _follow(
                p_bias + o_out, p_fast, p_first, p_second, p_directions, p_inner, b_b, b_bias_rate, i_t,
                bias_offset(SPEC, L) + o_out, m_b, K, k, OWN, SPEC,
            )  # fmt: skip


@triton.jit
def _rate(p_inner, p_rates, o, m, k, L: tl.constexpr, PART: tl.constexpr, SPEC: tl.constexpr):
    """The rate of step k for layer L; of elements o of a parameter, PART, where each has its own."""
    if SPEC.rates == "element":
        b_rate = tl.load(p_rates[PART] + o, mask=m, other=0.0)
    elif SPEC.rates == "layer":
        b_rate = tl.load(p_rates + L)
    else:
        b_rate = tl.load(p_inner + 2 + k * depth(SPEC) + L)
    return b_rate


@triton.jit
def _follow(
    p_from, p_fast, p_first, p_second, p_directions, p_inner, b_g, b_rate, i_t, o, m, K, k, OWN: tl.constexpr,
    SPEC: tl.constexpr,
):  # fmt: skip
    """Move parameters, read at p_from, along their gradient b_g; theirs is place o among those of task i_t."""
    o = i_t * weight_offset(SPEC, depth(SPEC)) + o
    p_bounds = p_inner + 2 + K * depth(SPEC)
    if SPEC.clips_value:
        b_g = clipped_value(b_g, p_bounds)
    b_p = tl.load(p_from, mask=m, other=0.0).to(tl.float32)
    b_first = tl.zeros(b_g.shape, tl.float32)
    b_second = b_first
    b_sum = b_first
    if OWN:
        if SPEC.momentum or SPEC.adam:
            b_first = tl.load(p_first + o, mask=m, other=0.0)
        if SPEC.adam:
            b_second = tl.load(p_second + o, mask=m, other=0.0)
        if SPEC.learns:
            b_sum = tl.load(p_directions + o, mask=m, other=0.0)
        # Threads that hold copies of an element all read it before one of them writes it.
        tl.debug_barrier()
    b_g, b_first, b_second = direction(b_p, b_g, b_first, b_second, p_inner, p_bounds, k, SPEC)
    tl.store(p_fast + o, b_p - b_rate * b_g, mask=m)
    if SPEC.momentum or SPEC.adam:
        tl.store(p_first + o, b_first, mask=m)
    if SPEC.adam:
        tl.store(p_second + o, b_second, mask=m)
    if SPEC.learns:
        tl.store(p_directions + o, b_sum + b_g, mask=m)
