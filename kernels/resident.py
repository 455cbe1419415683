"""One program a task: its weights stay on chip through all inner steps and the query pass, in one launch.

A network is a tuple of tiles, one a layer, carried through a run-time loop over inner steps. Programs walk over tasks
where there are more than the device holds, each adding into a partial gradient of its own, so memory does not grow with
tasks.
"""

import triton
import triton.language as tl

from .losses import sample_losses
from .mlp import backward, forward
from .rules import add_to_rates, after_gradient, before_gradient, halves, no_rates, start
from .spec import (
    adapted,
    depth,
    every_layer,
    full,
    gathers,
    padded,
    query_loss,
    samples,
    sixteen_bits,
    support_loss,
    tight,
    weight_offset,
    width,
)
from .tiles import (
    add_samples,
    add_to_partials,
    kept_if,
    load_batch,
    load_fast,
    load_parameters,
    load_samples,
    not_finite,
    plus,
    store_parameters,
    store_samples,
    total_weight,
    weighted,
    zeros,
)


@triton.jit(do_not_specialize=["T", "S", "Q", "K"])
def meta_kernel(
    p_weights, p_biases, p_inner, p_rates, p_x, p_y, p_r, p_query_x, p_query_y, p_query_r, p_step_weight, p_share,
    share, p_loss, p_kept, p_out, p_dx, p_partials, T, S, Q, K, SPEC: tl.constexpr,
):  # fmt: skip
    """Adapt to each task's support set, then take its query loss and the gradients of that.

    p_weights, p_biases: of each layer [out, in] and [out], or None.  p_inner: what `rules` reads.  p_rates: the rate of
    each layer where it is learned [layers], or None.  p_x, p_query_x: [T, S, in], [T, Q, in].  p_y, p_query_y: class
    indices [T, S], [T, Q] or values [T, S, out], [T, Q, out].  p_r, p_query_r: weights of samples, [T, S], [T, Q], or
    None.  Where each step has samples of its own, support sets are [T, K, S, ...].  p_step_weight: what the query loss
    after each step counts [K], where not the last one's alone does.  p_share: the cotangent of each task's loss [T], or
    None where all have `share`.

    p_loss: [T].  p_kept: whether each task is finite, 1 or 0, [T], where others are left out.  p_out: outputs [T, Q,
    out].  p_dx: gradient of the query features [T, Q, in]; where every step counts, 0 to start from.  p_partials:
    gradient of all parameters, and behind them of rates that are learned, summed over each program's tasks, [programs,
    parameters].  The last three may be None: not wanted.

    For Reptile there is no query set, and the loss is half the squared distance that a task goes.
    """
    i_p = tl.program_id(0)
    # What the compiler moves out of a loop occupies registers all through it; where they run short, it stays inside.
    for i in tl.range(i_p, T, tl.num_programs(0), disable_licm=full(SPEC)):
        i_t = tl.cast(i, tl.int64)
        weights, biases = load_parameters(p_weights, p_biases, SPEC)
        if not SPEC.multi_step:
            weights, biases, state = _adapt(weights, biases, p_inner, p_rates, p_x, p_y, p_r, i_t, S, K, SPEC)
        if p_share is not None:
            share = tl.load(p_share + i_t)
        rates = no_rates(SPEC)
        if SPEC.reptile:
            loss, sums = _way(p_weights, p_biases, weights, biases, SPEC)
            part_of_sums = share
        else:
            scale = 1.0 / total_weight(p_query_r, i_t, Q, SPEC)
            # A sample's part in the means over samples and tasks; where 16 bits might not hold it, it is taken of sums.
            part = scale * share
            part_of_sums = 1.0
            if sixteen_bits(SPEC):
                part_of_sums = tl.where(Q > 0, part, 0.0)
                part = 1.0
            b_loss = tl.zeros([1, samples(SPEC)], tl.float32)
            sums = zeros(weights), zeros(biases)
            batch = _one_tile(p_query_x, p_query_y, p_query_r, i_t, Q, query_loss(SPEC), SPEC.one_query_tile, SPEC)
            if SPEC.multi_step:
                support = _support(p_x, p_y, p_r, i_t, S, SPEC)
                state = start(weights, biases, SPEC)
                for k in tl.range(0, K, disable_licm=tight(SPEC)):
                    weights, biases, state = _step(
                        weights, biases, state, support, p_inner, p_rates, p_x, p_y, p_r, i_t, S, k, K, SPEC
                    )
                    weight = tl.load(p_step_weight + k)
                    if weight != 0.0:
                        # A rate has part in the steps before a query pass alone, so that pass is summed by itself.
                        own = sums
                        if SPEC.learns:
                            own = zeros(weights), zeros(biases)
                        b_loss, own = _query_pass(
                            weights, biases, batch, p_query_x, p_query_y, p_query_r, part * weight, part_of_sums,
                            weight, None, p_dx, p_partials is not None, b_loss, own, i_t, Q, SPEC,
                        )  # fmt: skip
                        if SPEC.learns:
                            rates = add_to_rates(rates, state[2], own, SPEC)
                            own = plus(sums[0], own[0], 1.0), plus(sums[1], own[1], 1.0)
                        sums = own
                if p_out is not None:
                    _outputs(weights, biases, p_query_x, p_out, i_t, Q, SPEC)
            else:
                b_loss, sums = _query_pass(
                    weights, biases, batch, p_query_x, p_query_y, p_query_r, part, part_of_sums,
                    1.0, p_out, p_dx, p_partials is not None, b_loss, sums, i_t, Q, SPEC,
                )  # fmt: skip
                if SPEC.learns:
                    rates = add_to_rates(rates, state[2], sums, SPEC)
            # The mean over no query, 0 * inf, is nan, as torch has it.
            loss = tl.sum(b_loss) * scale
        if SPEC.skips:
            strange = not_finite(sums[0]) + not_finite(sums[1]) + tl.where(tl.abs(loss) < float("inf"), 0, 1)
            for layer in tl.static_range(len(rates)):
                strange += tl.where(tl.abs(rates[layer]) < float("inf"), 0, 1)
            kept = strange == 0
            loss = tl.where(kept, loss, 0.0)
            sums = kept_if(kept, sums[0]), kept_if(kept, sums[1])
            rates = kept_if(kept, rates)
            tl.store(p_kept + i_t, tl.where(kept, 1.0, 0.0))
            if p_dx is not None:
                _clear(p_dx, i_t, tl.where(kept, 0, Q), Q, SPEC)
        tl.store(p_loss + i_t, loss)
        if p_partials is not None:
            add_to_partials(p_partials, sums, rates, part_of_sums, i_p, i > i_p, SPEC)


@triton.jit(do_not_specialize=["T", "S", "K"])
def adapt_kernel(
    p_weights, p_biases, p_inner, p_rates, p_x, p_y, p_r, p_fast, p_directions, T, S, K, SPEC: tl.constexpr
):
    """Adapt to each task's support set.  Others as in `meta_kernel`.

    p_fast: its parameters, [T, parameters].  p_directions: the sum of what rates that are learned multiplied, alike, or
    None.
    """
    for i in tl.range(tl.program_id(0), T, tl.num_programs(0), disable_licm=tight(SPEC)):
        i_t = tl.cast(i, tl.int64)
        weights, biases = load_parameters(p_weights, p_biases, SPEC)
        weights, biases, state = _adapt(weights, biases, p_inner, p_rates, p_x, p_y, p_r, i_t, S, K, SPEC)
        store_parameters(p_fast + i_t * weight_offset(SPEC, depth(SPEC)), weights, biases, SPEC)
        if p_directions is not None:
            weights, biases = halves(state[2])
            store_parameters(p_directions + i_t * weight_offset(SPEC, depth(SPEC)), weights, biases, SPEC)


@triton.jit(do_not_specialize=["T", "Q"])
def query_kernel(p_fast, p_query_x, p_out, T, Q, SPEC: tl.constexpr):
    """The outputs of adapted networks, p_out [T, Q, out], from p_fast [T, parameters] and p_query_x [T, Q, in]."""
    for i in tl.range(tl.program_id(0), T, tl.num_programs(0)):
        i_t = tl.cast(i, tl.int64)
        weights, biases = load_fast(p_fast, i_t, SPEC)
        _outputs(weights, biases, p_query_x, p_out, i_t, Q, SPEC)


@triton.jit(do_not_specialize=["T", "Q"])
def query_backward_kernel(p_fast, p_directions, p_query_x, p_d, p_dx, p_partials, T, Q, SPEC: tl.constexpr):
    """The gradients of adapted networks, from those of their outputs, p_d [T, Q, out].  Others as above."""
    i_p = tl.program_id(0)
    for i in tl.range(i_p, T, tl.num_programs(0), disable_licm=tight(SPEC)):
        i_t = tl.cast(i, tl.int64)
        weights, biases = load_fast(p_fast, i_t, SPEC)
        sums = zeros(weights), zeros(biases)
        for o in tl.range(0, Q, samples(SPEC)):
            b_x = load_samples(p_query_x, i_t, o, Q, width(SPEC, 0), SPEC)
            b_d = load_samples(p_d, i_t, o, Q, width(SPEC, depth(SPEC)), SPEC)
            _out, inputs, kept = forward(b_x, weights, biases, SPEC)
            sums = _query_backward(
                b_d, weights, inputs, kept, sums, p_dx, 1.0, p_partials is not None, False, i_t, o, Q, SPEC
            )
        if p_partials is not None:
            rates = no_rates(SPEC)
            if p_directions is not None:
                directions = load_fast(p_directions, i_t, SPEC)
                rates = add_to_rates(rates, directions[0] + directions[1], sums, SPEC)
            add_to_partials(p_partials, sums, rates, 1.0, i_p, i > i_p, SPEC)


@triton.jit
def _adapt(weights, biases, p_inner, p_rates, p_x, p_y, p_r, i_t, S, K, SPEC: tl.constexpr):
    """K steps of gradient descent on the support set of task i_t."""
    support = _support(p_x, p_y, p_r, i_t, S, SPEC)
    state = start(weights, biases, SPEC)
    for k in tl.range(0, K, disable_licm=tight(SPEC)):
        weights, biases, state = _step(
            weights, biases, state, support, p_inner, p_rates, p_x, p_y, p_r, i_t, S, k, K, SPEC
        )
    return weights, biases, state


@triton.jit
def _support(p_x, p_y, p_r, i_set, S, SPEC: tl.constexpr):
    """Of a support set that all steps share: 1 over its weight, and its samples if they are one tile."""
    scale = 0.0
    batch = ()
    if not SPEC.each_step:
        scale = 1.0 / total_weight(p_r, i_set, S, SPEC)
        batch = _one_tile(p_x, p_y, p_r, i_set, S, support_loss(SPEC), SPEC.one_support_tile, SPEC)
    return scale, batch


@triton.jit
def _one_tile(p_x, p_y, p_r, i_set, N, LOSS: tl.constexpr, ONE: tl.constexpr, SPEC: tl.constexpr):
    """A set of samples that is one tile; nothing where it is walked over."""
    batch = ()
    if ONE:
        batch = load_batch(p_x, p_y, p_r, i_set, 0, N, LOSS, SPEC)
    return batch


@triton.jit
def _step(weights, biases, state, support, p_inner, p_rates, p_x, p_y, p_r, i_t, S, k, K, SPEC: tl.constexpr):
    """Step k of task i_t: the weights and biases after it, and what is remembered of it."""
    scale, batch = support
    i_set = i_t
    if SPEC.each_step:
        i_set = i_t * K + k
        scale = 1.0 / total_weight(p_r, i_set, S, SPEC)
        batch = _one_tile(p_x, p_y, p_r, i_set, S, support_loss(SPEC), SPEC.one_support_tile, SPEC)
    if not SPEC.learns:
        p_rates = p_inner + 2 + k * depth(SPEC)
    sums = before_gradient(weights, biases, state, p_inner, p_rates, SPEC)
    if SPEC.one_support_tile:
        sums = _add_gradient(sums, weights, biases, batch, scale, p_rates, SPEC)
    else:
        for o in tl.range(0, S, samples(SPEC)):
            tile = load_batch(p_x, p_y, p_r, i_set, o, S, support_loss(SPEC), SPEC)
            sums = _add_gradient(sums, weights, biases, tile, scale, p_rates, SPEC)
    return after_gradient(weights, biases, state, sums, p_inner, p_rates, k, K, SPEC)


@triton.jit
def _add_gradient(sums, weights, biases, batch, scale, p_rates, SPEC: tl.constexpr):
    """Step against the support loss's gradient over a tile of samples, or where it is kept add it to `sums`."""
    b_x, b_y, b_r = batch
    b_out, inputs, kept = forward(b_x, weights, biases, SPEC)
    _value, b_d = sample_losses(b_out, b_y, scale, width(SPEC, depth(SPEC)), support_loss(SPEC))
    b_d = weighted(b_d, b_r, 1.0)
    if SPEC.momentum or gathers(SPEC):
        _dx, sums = backward(b_d, weights, inputs, kept, sums, None, adapted(SPEC), False, SPEC)
    else:
        _dx, sums = backward(b_d, weights, inputs, kept, sums, p_rates, adapted(SPEC), False, SPEC)
    return sums


@triton.jit
def _query_pass(
    weights, biases, batch, p_x, p_y, p_r, part, part_of_sums, unit, p_out, p_dx, WANTED: tl.constexpr, b_loss, sums,
    i_t, Q, SPEC: tl.constexpr,
):  # fmt: skip
    """Add `unit` times the losses of a task's query samples, and the gradient of that; store what is asked for.

    batch: all of them, where they are one tile.
    """
    if SPEC.one_query_tile:
        b_loss, sums = _query_tile(
            weights, biases, batch, part, part_of_sums, unit, p_out, p_dx, WANTED, b_loss, sums, i_t, 0, Q, SPEC
        )
    else:
        for o in tl.range(0, Q, samples(SPEC)):
            tile = load_batch(p_x, p_y, p_r, i_t, o, Q, query_loss(SPEC), SPEC)
            b_loss, sums = _query_tile(
                weights, biases, tile, part, part_of_sums, unit, p_out, p_dx, WANTED, b_loss, sums, i_t, o, Q, SPEC
            )
    return b_loss, sums


@triton.jit
def _query_tile(
    weights, biases, batch, part, part_of_sums, unit, p_out, p_dx, WANTED: tl.constexpr, b_loss, sums, i_t, o, Q,
    SPEC: tl.constexpr,
):  # fmt: skip
    """Add a tile of query samples to the loss of its task and to the outer gradient; store what is asked for."""
    b_x, b_y, b_r = batch
    b_out, inputs, kept = forward(b_x, weights, biases, SPEC)
    b_value, b_d = sample_losses(b_out, b_y, part, width(SPEC, depth(SPEC)), query_loss(SPEC))
    if p_out is not None:
        store_samples(p_out, b_out, i_t, o, Q, width(SPEC, depth(SPEC)), SPEC)
    b_d = weighted(b_d, b_r, 1.0)
    sums = _query_backward(
        b_d, weights, inputs, kept, sums, p_dx, part_of_sums, WANTED, SPEC.multi_step, i_t, o, Q, SPEC
    )
    return b_loss + weighted(b_value, b_r, unit), sums


@triton.jit
def _query_backward(
    b_d, weights, inputs, kept, sums, p_dx, scale, WANTED: tl.constexpr, ADDS: tl.constexpr, i_t, o, Q,
    SPEC: tl.constexpr,
):  # fmt: skip
    """Add to the outer gradient, where WANTED; store that of the features, or add it to what is there."""
    b_d, sums = backward(b_d, weights, inputs, kept, sums, None, every_layer(SPEC, WANTED), p_dx is not None, SPEC)
    if p_dx is not None:
        if ADDS:
            add_samples(p_dx, b_d * scale, i_t, o, Q, width(SPEC, 0), SPEC)
        else:
            store_samples(p_dx, b_d * scale, i_t, o, Q, width(SPEC, 0), SPEC)
    return sums


@triton.jit
def _way(p_weights, p_biases, weights, biases, SPEC: tl.constexpr):
    """Half the squared distance from the parameters in memory to those of a task, and the former minus the latter."""
    first = load_parameters(p_weights, p_biases, SPEC)
    way = plus(first[0], weights, -1.0), plus(first[1], biases, -1.0)
    square = tl.full((), 0.0, tl.float32)
    for i in tl.static_range(depth(SPEC)):
        square += tl.sum(way[0][i] * way[0][i])
        square += tl.sum(way[1][i] * way[1][i])
    return 0.5 * square, way


@triton.jit
def _outputs(weights, biases, p_x, p_out, i_t, N, SPEC: tl.constexpr):
    """Store the network's outputs on the N samples of task i_t."""
    for o in tl.range(0, N, samples(SPEC)):
        b_x = load_samples(p_x, i_t, o, N, width(SPEC, 0), SPEC)
        b_out, _inputs, _kept = forward(b_x, weights, biases, SPEC)
        store_samples(p_out, b_out, i_t, o, N, width(SPEC, depth(SPEC)), SPEC)


@triton.jit
def _clear(p_dx, i_t, end, Q, SPEC: tl.constexpr):
    """Store 0 over the gradients of the features of task i_t's samples up to `end`, none of them or all."""
    # Other threads of this program may have stored what is there, and this is to come last.
    tl.debug_barrier()
    b_zero = tl.zeros([padded(width(SPEC, 0)), samples(SPEC)], tl.float32)
    for o in tl.range(0, end, samples(SPEC)):
        store_samples(p_dx, b_zero, i_t, o, Q, width(SPEC, 0), SPEC)
