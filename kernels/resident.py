"""One program a task: its weights stay on chip through all inner steps and the query pass, in one launch.

A network is a tuple of tiles, one a layer, carried through a run-time loop over inner steps. Programs walk over tasks
where there are more than the device holds, each adding into a partial gradient of its own, so memory does not grow with
tasks.
"""

import triton
import triton.language as tl

from .losses import sample_losses
from .mlp import backward, forward
from .spec import (
    adapted,
    depth,
    every_layer,
    query_loss,
    samples,
    sixteen_bits,
    support_loss,
    tight,
    walked,
    weight_offset,
    width,
)
from .tiles import (
    add_to_partials,
    load_batch,
    load_fast,
    load_parameters,
    load_samples,
    plus,
    scaled,
    store_parameters,
    store_samples,
    total_weight,
    weighted,
    zeros,
)


@triton.jit(do_not_specialize=["T", "S", "Q", "K"])
def meta_kernel(
    p_weights, p_biases, p_inner, p_x, p_y, p_r, p_query_x, p_query_y, p_query_r, p_share, share,
    p_loss, p_out, p_dx, p_partials, T, S, Q, K, SPEC: tl.constexpr,
):  # fmt: skip
    """Adapt to each task's support set, then take its query loss and the gradients of that.

    p_weights, p_biases: of each layer [out, in] and [out], or None.  p_inner: momentum, weight decay, and the rate of
    each step and layer [K, layers].  p_x, p_query_x: [T, S, in], [T, Q, in].  p_y, p_query_y: class indices [T, S], [T,
    Q] or values [T, S, out], [T, Q, out].  p_r, p_query_r: weights of samples, [T, S], [T, Q], or None.  p_share: the
    cotangent of each task's loss [T], or None where all have `share`.

    p_loss: [T].  p_out: outputs [T, Q, out].  p_dx: gradient of the query features [T, Q, in].  p_partials: gradient of
    all parameters, summed over each program's tasks, [programs, parameters].  The last three may be None: not wanted.
    """
    i_p = tl.program_id(0)
    # What the compiler moves out of a loop occupies registers all through it; where they run short, it stays inside.
    for i in tl.range(i_p, T, tl.num_programs(0), disable_licm=walked(SPEC)):
        i_t = tl.cast(i, tl.int64)
        weights, biases = load_parameters(p_weights, p_biases, SPEC)
        weights, biases = _adapt(weights, biases, p_inner, p_x, p_y, p_r, i_t, S, K, SPEC)
        if p_share is not None:
            share = tl.load(p_share + i_t)
        scale = 1.0 / total_weight(p_query_r, i_t, Q, SPEC)
        # A sample's part in the means over samples and tasks; 16 bits might not hold it, so there it is taken of sums.
        part = scale * share
        part_of_sums = 1.0
        if sixteen_bits(SPEC):
            part_of_sums = tl.where(Q > 0, part, 0.0)
            part = 1.0
        b_loss = tl.zeros([1, samples(SPEC)], tl.float32)
        sums = zeros(weights), zeros(biases)
        if SPEC.one_query_tile:
            b_loss, sums = _query_tile(
                weights, biases, p_query_x, p_query_y, p_query_r, part, part_of_sums,
                p_out, p_dx, p_partials is not None, b_loss, sums, i_t, 0, Q, SPEC,
            )  # fmt: skip
        else:
            for o in tl.range(0, Q, samples(SPEC)):
                b_loss, sums = _query_tile(
                    weights, biases, p_query_x, p_query_y, p_query_r, part, part_of_sums,
                    p_out, p_dx, p_partials is not None, b_loss, sums, i_t, o, Q, SPEC,
                )  # fmt: skip
        # The mean over no query, 0 * inf, is nan, as torch has it.
        tl.store(p_loss + i_t, tl.sum(b_loss) * scale)
        if p_partials is not None:
            add_to_partials(p_partials, sums, part_of_sums, i_p, i > i_p, SPEC)


@triton.jit(do_not_specialize=["T", "S", "K"])
def adapt_kernel(p_weights, p_biases, p_inner, p_x, p_y, p_r, p_fast, T, S, K, SPEC: tl.constexpr):
    """Adapt to each task's support set; p_fast: its parameters, [T, parameters].  Others as in `meta_kernel`."""
    for i in tl.range(tl.program_id(0), T, tl.num_programs(0), disable_licm=tight(SPEC)):
        i_t = tl.cast(i, tl.int64)
        weights, biases = load_parameters(p_weights, p_biases, SPEC)
        weights, biases = _adapt(weights, biases, p_inner, p_x, p_y, p_r, i_t, S, K, SPEC)
        store_parameters(p_fast + i_t * weight_offset(SPEC, depth(SPEC)), weights, biases, SPEC)


@triton.jit(do_not_specialize=["T", "Q"])
def query_kernel(p_fast, p_query_x, p_out, T, Q, SPEC: tl.constexpr):
    """The outputs of adapted networks, p_out [T, Q, out], from p_fast [T, parameters] and p_query_x [T, Q, in]."""
    for i in tl.range(tl.program_id(0), T, tl.num_programs(0)):
        i_t = tl.cast(i, tl.int64)
        weights, biases = load_fast(p_fast, i_t, SPEC)
        for o in tl.range(0, Q, samples(SPEC)):
            b_x = load_samples(p_query_x, i_t, o, Q, width(SPEC, 0), SPEC)
            b_out, _inputs, _kept = forward(b_x, weights, biases, SPEC)
            store_samples(p_out, b_out, i_t, o, Q, width(SPEC, depth(SPEC)), SPEC)


@triton.jit(do_not_specialize=["T", "Q"])
def query_backward_kernel(p_fast, p_query_x, p_d, p_dx, p_partials, T, Q, SPEC: tl.constexpr):
    """The gradients of adapted networks, from those of their outputs, p_d [T, Q, out].  Others as above."""
    i_p = tl.program_id(0)
    for i in tl.range(i_p, T, tl.num_programs(0)):
        i_t = tl.cast(i, tl.int64)
        weights, biases = load_fast(p_fast, i_t, SPEC)
        sums = zeros(weights), zeros(biases)
        for o in tl.range(0, Q, samples(SPEC)):
            b_x = load_samples(p_query_x, i_t, o, Q, width(SPEC, 0), SPEC)
            b_d = load_samples(p_d, i_t, o, Q, width(SPEC, depth(SPEC)), SPEC)
            _out, inputs, kept = forward(b_x, weights, biases, SPEC)
            sums = _query_backward(b_d, weights, inputs, kept, sums, p_dx, 1.0, p_partials is not None, i_t, o, Q, SPEC)
        if p_partials is not None:
            add_to_partials(p_partials, sums, 1.0, i_p, i > i_p, SPEC)


@triton.jit
def _adapt(weights, biases, p_inner, p_x, p_y, p_r, i_t, S, K, SPEC: tl.constexpr):
    """K steps of gradient descent on the support set of task i_t."""
    scale = 1.0 / total_weight(p_r, i_t, S, SPEC)
    if SPEC.one_support_tile:
        batch = load_batch(p_x, p_y, p_r, i_t, 0, S, support_loss(SPEC), SPEC)
    velocity = zeros(weights), zeros(biases)
    for k in tl.range(0, K, disable_licm=tight(SPEC)):
        p_rates = p_inner + 2 + k * depth(SPEC)
        # The gradient is summed right into what it changes: the weights themselves, or their velocity if they have one.
        if SPEC.momentum:
            sums = scaled(velocity[0], tl.load(p_inner)), scaled(velocity[1], tl.load(p_inner))
            if SPEC.decay:
                sums = plus(sums[0], weights, tl.load(p_inner + 1)), plus(sums[1], biases, tl.load(p_inner + 1))
        elif SPEC.decay:
            decay = tl.load(p_inner + 1)
            sums = (
                _moved(weights, scaled(weights, decay), p_rates, SPEC),
                _moved(biases, scaled(biases, decay), p_rates, SPEC),
            )
        else:
            sums = weights, biases
        if SPEC.one_support_tile:
            sums = _add_gradient(sums, weights, biases, batch, scale, p_rates, SPEC)
        else:
            for o in tl.range(0, S, samples(SPEC)):
                tile = load_batch(p_x, p_y, p_r, i_t, o, S, support_loss(SPEC), SPEC)
                sums = _add_gradient(sums, weights, biases, tile, scale, p_rates, SPEC)
        if SPEC.momentum:
            velocity = sums
            weights, biases = _moved(weights, sums[0], p_rates, SPEC), _moved(biases, sums[1], p_rates, SPEC)
        else:
            weights, biases = sums
    return weights, biases


@triton.jit
def _add_gradient(sums, weights, biases, batch, scale, p_rates, SPEC: tl.constexpr):
    """Step against the support loss's gradient over a tile of samples, or with momentum add it to `sums` as it is."""
    b_x, b_y, b_r = batch
    b_out, inputs, kept = forward(b_x, weights, biases, SPEC)
    _value, b_d = sample_losses(b_out, b_y, width(SPEC, depth(SPEC)), support_loss(SPEC))
    b_d = weighted(b_d, b_r, scale)
    if SPEC.momentum:
        _dx, sums = backward(b_d, weights, inputs, kept, sums, None, adapted(SPEC), False, SPEC)
    else:
        _dx, sums = backward(b_d, weights, inputs, kept, sums, p_rates, adapted(SPEC), False, SPEC)
    return sums


@triton.jit
def _query_tile(
    weights, biases, p_x, p_y, p_r, part, part_of_sums, p_out, p_dx, WANTED: tl.constexpr, b_loss, sums, i_t, o, Q,
    SPEC: tl.constexpr,
):  # fmt: skip
    """Add a tile of query samples to the loss of its task and to the outer gradient; store what is asked for."""
    b_x, b_y, b_r = load_batch(p_x, p_y, p_r, i_t, o, Q, query_loss(SPEC), SPEC)
    b_out, inputs, kept = forward(b_x, weights, biases, SPEC)
    b_value, b_d = sample_losses(b_out, b_y, width(SPEC, depth(SPEC)), query_loss(SPEC))
    if p_out is not None:
        store_samples(p_out, b_out, i_t, o, Q, width(SPEC, depth(SPEC)), SPEC)
    b_d = weighted(b_d, b_r, part)
    sums = _query_backward(b_d, weights, inputs, kept, sums, p_dx, part_of_sums, WANTED, i_t, o, Q, SPEC)
    return b_loss + weighted(b_value, b_r, 1.0), sums


@triton.jit
def _query_backward(b_d, weights, inputs, kept, sums, p_dx, scale, WANTED: tl.constexpr, i_t, o, Q, SPEC: tl.constexpr):
    b_d, sums = backward(b_d, weights, inputs, kept, sums, None, every_layer(SPEC, WANTED), p_dx is not None, SPEC)
    if p_dx is not None:
        store_samples(p_dx, b_d * scale, i_t, o, Q, width(SPEC, 0), SPEC)
    return sums


@triton.jit
def _moved(blocks, velocity, p_rates, SPEC: tl.constexpr):
    """The blocks after a step; those of layers that do not move stay what they are."""
    moved = ()
    for i in tl.static_range(len(blocks)):
        if SPEC.adapts[i]:
            moved = moved + (blocks[i] - tl.load(p_rates + i) * velocity[i],)
        else:
            moved = moved + (blocks[i],)
    return moved
