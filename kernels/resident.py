"""One program a task: its weights stay on chip through all inner steps and the query pass, in one launch.

A network is a tuple of tiles, one a layer, carried through a run-time loop over inner steps; loops over layers unroll, so
one kernel serves any depth. Samples lie in columns: a layer is `W @ H` with W in torch's own [out, in], so that the large
operand is the one that stays in registers. Sides are padded to powers of two, and padding is 0 everywhere: in weights
because it is loaded as 0 and has a gradient of 0, in activations because they are 0 at 0 or masked. A side of 1 is not
padded, and the tile of a weight with such a side is a vector.
"""

import triton
import triton.language as tl

from .activations import activate, keeps_output, leaves_zero, pull_back
from .losses import expected_classes, sample_losses, takes_classes
from .spec import activation, adapted, bias_offset, depth, every_layer, lowest, padded, samples, weight_offset, width


@triton.jit(do_not_specialize=["T", "S", "Q", "K"])
def meta_kernel(
    p_weights, p_biases, p_inner, p_x, p_y, p_r, p_query_x, p_query_y, p_query_r, p_share, share,
    p_loss, p_out, p_dx, p_partials, T, S, Q, K, SPEC: tl.constexpr,
):  # fmt: skip
    """Adapt to each task's support set, then take its query loss and the gradients of that.

    p_weights, p_biases: of each layer [out, in] and [out], or None.  p_inner: momentum, weight decay, and the rate of each
    step and layer [K, layers].  p_x, p_query_x: [T, S, in], [T, Q, in].  p_y, p_query_y: class indices [T, S], [T, Q] or
    values [T, S, out], [T, Q, out].  p_r, p_query_r: weights of samples, [T, S], [T, Q], or None.  p_share: the cotangent
    of each task's loss [T], or None where all have `share`.

    p_loss: [T].  p_out: outputs [T, Q, out].  p_dx: gradient of the query features [T, Q, in].  p_partials: gradient of
    all parameters, summed over each program's tasks, [programs, parameters].  The last three may be None: not wanted.
    """
    i_p = tl.program_id(0)
    OUT: tl.constexpr = width(SPEC, depth(SPEC))
    for i in tl.range(i_p, T, tl.num_programs(0)):
        i_t = tl.cast(i, tl.int64)
        weights, biases = _load_parameters(p_weights, p_biases, SPEC)
        weights, biases = _adapt(weights, biases, p_inner, p_x, p_y, p_r, i_t, S, K, SPEC)
        if p_share is not None:
            share = tl.load(p_share + i_t)
        scale = 1.0 / _total_weight(p_query_r, i_t, Q, SPEC)
        b_loss = tl.zeros([1, samples(SPEC)], tl.float32)
        sums = _zeros(weights), _zeros(biases)
        if SPEC.one_query_tile:
            b_loss, sums = _query_tile(
                weights, biases, p_query_x, p_query_y, p_query_r, scale, share, p_out, p_dx, p_partials is not None,
                b_loss, sums, i_t, 0, Q, SPEC,
            )  # fmt: skip
        else:
            for o in tl.range(0, Q, samples(SPEC)):
                b_loss, sums = _query_tile(
                    weights, biases, p_query_x, p_query_y, p_query_r, scale, share, p_out, p_dx, p_partials is not None,
                    b_loss, sums, i_t, o, Q, SPEC,
                )  # fmt: skip
        # The mean over no query, 0 * inf, is nan, as torch has it.
        tl.store(p_loss + i_t, tl.sum(tl.sum(b_loss, 1), 0) * scale)
        if p_partials is not None:
            _add_to_partials(p_partials, sums, i_p, i > i_p, SPEC)


@triton.jit(do_not_specialize=["T", "S", "K"])
def adapt_kernel(p_weights, p_biases, p_inner, p_x, p_y, p_r, p_fast, T, S, K, SPEC: tl.constexpr):
    """Adapt to each task's support set; p_fast: all parameters of each task, [T, parameters].  Others as `meta_kernel`."""
    for i in tl.range(tl.program_id(0), T, tl.num_programs(0)):
        i_t = tl.cast(i, tl.int64)
        weights, biases = _load_parameters(p_weights, p_biases, SPEC)
        weights, biases = _adapt(weights, biases, p_inner, p_x, p_y, p_r, i_t, S, K, SPEC)
        _store_parameters(p_fast + i_t * weight_offset(SPEC, depth(SPEC)), weights, biases, SPEC)


@triton.jit(do_not_specialize=["T", "Q"])
def query_kernel(p_fast, p_query_x, p_out, T, Q, SPEC: tl.constexpr):
    """The outputs of adapted networks, p_out [T, Q, out], from p_fast [T, parameters] and p_query_x [T, Q, in]."""
    for i in tl.range(tl.program_id(0), T, tl.num_programs(0)):
        i_t = tl.cast(i, tl.int64)
        weights, biases = _load_fast(p_fast, i_t, SPEC)
        for o in tl.range(0, Q, samples(SPEC)):
            b_x = _load_samples(p_query_x, i_t, o, Q, width(SPEC, 0), SPEC)
            b_out, _inputs, _kept = _forward(b_x, weights, biases, SPEC)
            _store_samples(p_out, b_out, i_t, o, Q, width(SPEC, depth(SPEC)), SPEC)


@triton.jit(do_not_specialize=["T", "Q"])
def query_backward_kernel(p_fast, p_query_x, p_d, p_dx, p_partials, T, Q, SPEC: tl.constexpr):
    """The gradients of adapted networks for those of their outputs, p_d [T, Q, out].  Others as in the kernels above."""
    i_p = tl.program_id(0)
    for i in tl.range(i_p, T, tl.num_programs(0)):
        i_t = tl.cast(i, tl.int64)
        weights, biases = _load_fast(p_fast, i_t, SPEC)
        sums = _zeros(weights), _zeros(biases)
        for o in tl.range(0, Q, samples(SPEC)):
            b_x = _load_samples(p_query_x, i_t, o, Q, width(SPEC, 0), SPEC)
            b_d = _load_samples(p_d, i_t, o, Q, width(SPEC, depth(SPEC)), SPEC)
            _out, inputs, kept = _forward(b_x, weights, biases, SPEC)
            sums = _query_backward(b_d, weights, inputs, kept, sums, p_dx, p_partials is not None, i_t, o, Q, SPEC)
        if p_partials is not None:
            _add_to_partials(p_partials, sums, i_p, i > i_p, SPEC)


@triton.jit
def _adapt(weights, biases, p_inner, p_x, p_y, p_r, i_t, S, K, SPEC: tl.constexpr):
    """K steps of gradient descent on the support set of task i_t."""
    scale = 1.0 / _total_weight(p_r, i_t, S, SPEC)
    if SPEC.one_support_tile:
        batch = _load_batch(p_x, p_y, p_r, i_t, 0, S, SPEC.loss, SPEC)
    velocity = _zeros(weights), _zeros(biases)
    for k in range(K):
        p_rates = p_inner + 2 + k * depth(SPEC)
        # The gradient is summed right into what it changes: the weights themselves, or their velocity if they have one.
        if SPEC.momentum:
            sums = _scaled(velocity[0], tl.load(p_inner)), _scaled(velocity[1], tl.load(p_inner))
            if SPEC.decay:
                sums = _plus(sums[0], weights, tl.load(p_inner + 1)), _plus(sums[1], biases, tl.load(p_inner + 1))
        elif SPEC.decay:
            sums = _decayed(weights, p_inner + 1, p_rates, SPEC), _decayed(biases, p_inner + 1, p_rates, SPEC)
        else:
            sums = weights, biases
        if SPEC.one_support_tile:
            sums = _add_gradient(sums, weights, biases, batch, scale, p_rates, SPEC)
        else:
            for o in tl.range(0, S, samples(SPEC)):
                tile = _load_batch(p_x, p_y, p_r, i_t, o, S, SPEC.loss, SPEC)
                sums = _add_gradient(sums, weights, biases, tile, scale, p_rates, SPEC)
        if SPEC.momentum:
            velocity = sums
            weights, biases = _moved(weights, sums[0], p_rates, SPEC), _moved(biases, sums[1], p_rates, SPEC)
        else:
            weights, biases = sums
    return weights, biases


@triton.jit
def _add_gradient(sums, weights, biases, batch, scale, p_rates, SPEC: tl.constexpr):
    """Add the support loss's gradient over a tile of samples to `sums`: times minus the rate, or as it is for momentum."""
    b_x, b_y, b_r = batch
    b_out, inputs, kept = _forward(b_x, weights, biases, SPEC)
    _value, b_d = sample_losses(b_out, b_y, width(SPEC, depth(SPEC)), SPEC.loss)
    b_d = _weighted(b_d, b_r, scale)
    if SPEC.momentum:
        _dx, sums = _backward(b_d, weights, inputs, kept, sums, None, adapted(SPEC), False, SPEC)
    else:
        _dx, sums = _backward(b_d, weights, inputs, kept, sums, p_rates, adapted(SPEC), False, SPEC)
    return sums


@triton.jit
def _query_tile(
    weights, biases, p_x, p_y, p_r, scale, share, p_out, p_dx, WANTED: tl.constexpr, b_loss, sums, i_t, o, Q,
    SPEC: tl.constexpr,
):  # fmt: skip
    """Add a tile of query samples to the loss of its task and to the outer gradient; store what is asked for."""
    b_x, b_y, b_r = _load_batch(p_x, p_y, p_r, i_t, o, Q, SPEC.outer_loss, SPEC)
    b_out, inputs, kept = _forward(b_x, weights, biases, SPEC)
    b_value, b_d = sample_losses(b_out, b_y, width(SPEC, depth(SPEC)), SPEC.outer_loss)
    if p_out is not None:
        _store_samples(p_out, b_out, i_t, o, Q, width(SPEC, depth(SPEC)), SPEC)
    b_d = _weighted(b_d, b_r, scale * share)
    sums = _query_backward(b_d, weights, inputs, kept, sums, p_dx, WANTED, i_t, o, Q, SPEC)
    return b_loss + _weighted(b_value, b_r, 1.0), sums


@triton.jit
def _query_backward(b_d, weights, inputs, kept, sums, p_dx, WANTED: tl.constexpr, i_t, o, Q, SPEC: tl.constexpr):
    b_d, sums = _backward(b_d, weights, inputs, kept, sums, None, every_layer(SPEC, WANTED), p_dx is not None, SPEC)
    if p_dx is not None:
        _store_samples(p_dx, b_d, i_t, o, Q, width(SPEC, 0), SPEC)
    return sums


@triton.jit
def _forward(b_h, weights, biases, SPEC: tl.constexpr):
    """The network on samples [IN, B]: its outputs [OUT, B], each layer's input, what each derivative is taken from."""
    inputs = ()
    kept = ()
    for i in tl.static_range(depth(SPEC)):
        inputs = inputs + (b_h,)
        b_h, b_kept = _layer(b_h, weights[i], biases[i], width(SPEC, i), width(SPEC, i + 1), activation(SPEC, i), SPEC)
        kept = kept + (b_kept,)
    return b_h, inputs, kept


@triton.jit
def _backward(
    b_d, weights, inputs, kept, sums, p_rates, MOVING: tl.constexpr, FEATURES: tl.constexpr, SPEC: tl.constexpr
):
    """Step against the gradients of the layers in MOVING, from that of the outputs, b_d [OUT, B].

    sums: what the steps are added to.  p_rates: the rate of each layer; None for -1, which adds the gradients as they are.
    Returns the gradient of the network's input [IN, B], where FEATURES asks for it, and the sums.
    """
    sums_w = ()
    sums_b = ()
    for i in tl.static_range(depth(SPEC) - 1, -1, -1):
        b_w = sums[0][i]
        b_b = sums[1][i]
        if i >= lowest(MOVING, FEATURES):
            b_d = pull_back(b_d, kept[i], activation(SPEC, i))
            b_g = b_d
            if i > lowest(MOVING, FEATURES) or FEATURES:
                b_d = _linear_backward(b_g, weights[i], width(SPEC, i), width(SPEC, i + 1), SPEC)
            if MOVING[i]:
                rate = -1.0
                if p_rates is not None:
                    rate = tl.load(p_rates + i)
                b_w = _step(b_w, b_g, inputs[i], rate, width(SPEC, i), width(SPEC, i + 1), SPEC)
                if SPEC.biases[i]:
                    b_b -= rate * tl.sum(b_g, 1)
        sums_w = (b_w,) + sums_w
        sums_b = (b_b,) + sums_b
    return b_d, (sums_w, sums_b)


@triton.jit
def _layer(b_h, b_w, b_b, IN: tl.constexpr, OUT: tl.constexpr, ACTIVATION: tl.constexpr, SPEC: tl.constexpr):
    """A layer on [IN, B]: its output and what its derivative is taken from, both [OUT, B]."""
    b_z = _linear(b_h, b_w, b_b, IN, OUT, SPEC)
    b_h = activate(b_z, ACTIVATION)
    if not leaves_zero(ACTIVATION):
        b_h = tl.where(tl.arange(0, padded(OUT))[:, None] < OUT, b_h, 0.0)
    if keeps_output(ACTIVATION):
        b_z = b_h
    return b_h, b_z


@triton.jit
def _linear(b_h, b_w, b_b, IN: tl.constexpr, OUT: tl.constexpr, SPEC: tl.constexpr):
    """W @ H + b, [OUT, B]."""
    if IN == 1:
        b_z = b_w[:, None] * b_h + b_b[:, None]
    elif OUT == 1:
        b_z = tl.sum(b_w[:, None] * b_h, 0)[None, :] + b_b[:, None]
    else:
        b_z = _dot(b_w, b_h, tl.zeros([padded(OUT), samples(SPEC)], tl.float32) + b_b[:, None], SPEC)
    return b_z


@triton.jit
def _linear_backward(b_d, b_w, IN: tl.constexpr, OUT: tl.constexpr, SPEC: tl.constexpr):
    """W.T @ D, [IN, B]."""
    if IN == 1:
        b_dx = tl.sum(b_w[:, None] * b_d, 0)[None, :]
    elif OUT == 1:
        b_dx = b_w[:, None] * b_d
    else:
        b_dx = _dot(tl.trans(b_w), b_d, tl.zeros([padded(IN), samples(SPEC)], tl.float32), SPEC)
    return b_dx


@triton.jit
def _step(b_w, b_d, b_h, rate, IN: tl.constexpr, OUT: tl.constexpr, SPEC: tl.constexpr):
    """b_w - rate * D @ H.T, in the shape of the weight's tile."""
    if IN == 1 or OUT == 1:
        b_w -= rate * tl.sum(b_d * b_h, 1)
    else:
        # The input is scaled, not the gradient, which 16 bits may hardly hold as it is.
        b_w = _dot(b_d, tl.trans(b_h * -rate), b_w, SPEC)
    return b_w


@triton.jit
def _dot(b_a, b_b, b_sum, SPEC: tl.constexpr):
    """b_sum + b_a @ b_b, with operands in the precision of SPEC and a sum in float32."""
    if SPEC.precision == "bf16":
        b_sum = tl.dot(b_a.to(tl.bfloat16), b_b.to(tl.bfloat16), b_sum)
    elif SPEC.precision == "fp16":
        b_sum = tl.dot(b_a.to(tl.float16), b_b.to(tl.float16), b_sum)
    elif SPEC.precision == "tf32x3":
        b_ah, b_bh = _high(b_a), _high(b_b)
        b_sum = tl.dot(b_ah, b_bh, b_sum, input_precision="tf32")
        b_sum = tl.dot(b_a - b_ah, b_bh, b_sum, input_precision="tf32")
        b_sum = tl.dot(b_ah, b_b - b_bh, b_sum, input_precision="tf32")
    else:
        b_sum = tl.dot(b_a, b_b, b_sum, input_precision=SPEC.precision)
    return b_sum


@triton.jit
def _high(b):
    return ((b.to(tl.int32, bitcast=True) + 4096) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def _zeros(blocks):
    zeros = ()
    for i in tl.static_range(len(blocks)):
        zeros = zeros + (tl.zeros(blocks[i].shape, tl.float32),)
    return zeros


@triton.jit
def _scaled(blocks, scale):
    scaled = ()
    for i in tl.static_range(len(blocks)):
        scaled = scaled + (blocks[i] * scale,)
    return scaled


@triton.jit
def _plus(blocks, others, scale):
    """Blocks + scale * others."""
    total = ()
    for i in tl.static_range(len(blocks)):
        total = total + (blocks[i] + scale * others[i],)
    return total


@triton.jit
def _decayed(blocks, p_decay, p_rates, SPEC: tl.constexpr):
    """The blocks after weight decay alone; those of layers that do not move stay what they are."""
    decayed = ()
    for i in tl.static_range(len(blocks)):
        if SPEC.adapts[i]:
            decayed = decayed + (blocks[i] * (1.0 - tl.load(p_rates + i) * tl.load(p_decay)),)
        else:
            decayed = decayed + (blocks[i],)
    return decayed


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


@triton.jit
def _weight_tile(SPEC: tl.constexpr, i: tl.constexpr):
    """Offsets into the weight of layer i, [out, in] in memory, and which of them exist; a vector where a side is 1."""
    IN: tl.constexpr = width(SPEC, i)
    OUT: tl.constexpr = width(SPEC, i + 1)
    if IN == 1 or OUT == 1:
        o, m = _vector(IN * OUT)
    else:
        o_out, o_in = tl.arange(0, padded(OUT))[:, None], tl.arange(0, padded(IN))[None, :]
        o = o_out * IN + o_in
        m = (o_out < OUT) & (o_in < IN)
    return o, m


@triton.jit
def _vector(LENGTH: tl.constexpr):
    o = tl.arange(0, padded(LENGTH))
    return o, o < LENGTH


@triton.jit
def _load_parameters(p_weights, p_biases, SPEC: tl.constexpr):
    """The parameters at each layer's pointers as tiles: weights [OUT, IN] and biases [OUT]."""
    weights = ()
    biases = ()
    for i in tl.static_range(depth(SPEC)):
        o, m = _weight_tile(SPEC, i)
        weights = weights + (tl.load(p_weights[i] + o, mask=m, other=0.0).to(tl.float32),)
        o, m = _vector(width(SPEC, i + 1))
        if SPEC.biases[i]:
            biases = biases + (tl.load(p_biases[i] + o, mask=m, other=0.0).to(tl.float32),)
        else:
            biases = biases + (tl.zeros(o.shape, tl.float32),)
    return weights, biases


@triton.jit
def _load_fast(p_fast, i_t, SPEC: tl.constexpr):
    """The parameters of task i_t from [T, parameters]."""
    p_task = p_fast + i_t * weight_offset(SPEC, depth(SPEC))
    p_weights = ()
    p_biases = ()
    for i in tl.static_range(depth(SPEC)):
        p_weights = p_weights + (p_task + weight_offset(SPEC, i),)
        p_biases = p_biases + (p_task + bias_offset(SPEC, i),)
    return _load_parameters(p_weights, p_biases, SPEC)


@triton.jit
def _store_parameters(p_flat, weights, biases, SPEC: tl.constexpr):
    """Lay tiles of all parameters end to end at p_flat."""
    for i in tl.static_range(depth(SPEC)):
        o, m = _weight_tile(SPEC, i)
        tl.store(p_flat + weight_offset(SPEC, i) + o, weights[i], mask=m)
        if SPEC.biases[i]:
            o, m = _vector(width(SPEC, i + 1))
            tl.store(p_flat + bias_offset(SPEC, i) + o, biases[i], mask=m)


@triton.jit
def _add_to_partials(p_partials, sums, i_p, later, SPEC: tl.constexpr):
    """Store a task's gradient as program i_p's partial sum; `later`: on top of what earlier tasks of it stored."""
    p_flat = p_partials + i_p.to(tl.int64) * weight_offset(SPEC, depth(SPEC))
    if later:
        # Other threads of this program may have stored what this one is about to load.
        tl.debug_barrier()
        weights, biases = _load_fast(p_flat, 0, SPEC)
        _store_parameters(p_flat, _plus(weights, sums[0], 1.0), _plus(biases, sums[1], 1.0), SPEC)
    else:
        _store_parameters(p_flat, sums[0], sums[1], SPEC)


@triton.jit
def _load_samples(p_x, i_t, o, N, WIDTH: tl.constexpr, SPEC: tl.constexpr):
    """Samples o ... of task i_t from [T, N, WIDTH] as columns [WIDTH, B]; 0 past the end."""
    o_s = o + tl.arange(0, samples(SPEC))[None, :]
    o_c = tl.arange(0, padded(WIDTH))[:, None]
    p_task = p_x + i_t * N * WIDTH
    return tl.load(p_task + o_s * WIDTH + o_c, mask=(o_s < N) & (o_c < WIDTH), other=0.0).to(tl.float32)


@triton.jit
def _store_samples(p_x, b_x, i_t, o, N, WIDTH: tl.constexpr, SPEC: tl.constexpr):
    """Store columns [WIDTH, B] as samples o ... of task i_t in [T, N, WIDTH]."""
    o_s = o + tl.arange(0, samples(SPEC))[None, :]
    o_c = tl.arange(0, padded(WIDTH))[:, None]
    tl.store(p_x + i_t * N * WIDTH + o_s * WIDTH + o_c, b_x, mask=(o_s < N) & (o_c < WIDTH))


@triton.jit
def _load_batch(p_x, p_y, p_r, i_t, o, N, LOSS: tl.constexpr, SPEC: tl.constexpr):
    """Samples o ... of task i_t: features [IN, B], targets [OUT, B], weights [1, B]."""
    OUT: tl.constexpr = width(SPEC, depth(SPEC))
    b_x = _load_samples(p_x, i_t, o, N, width(SPEC, 0), SPEC)
    if takes_classes(LOSS):
        o_s = o + tl.arange(0, samples(SPEC))[None, :]
        b_class = tl.load(p_y + i_t * N + o_s, mask=o_s < N, other=0).to(tl.int32)
        b_y = expected_classes(b_class, OUT, padded(OUT), LOSS)
    else:
        b_y = _load_samples(p_y, i_t, o, N, OUT, SPEC)
    return b_x, b_y, _load_weights(p_r, i_t, o, N, SPEC)


@triton.jit
def _load_weights(p_r, i_t, o, N, SPEC: tl.constexpr):
    """The weights of samples o ... of task i_t, [1, B], 0 past the end; without weights, which of the samples exist."""
    o_s = o + tl.arange(0, samples(SPEC))[None, :]
    if p_r is None:
        b_r = o_s < N
    else:
        b_r = tl.load(p_r + i_t * N + o_s, mask=o_s < N, other=0.0).to(tl.float32)
    return b_r


@triton.jit
def _weighted(b_v, b_r, scale):
    """Values of samples in columns, times scale and what `_load_weights` gives."""
    if b_r.dtype == tl.int1:
        b_v = tl.where(b_r, b_v * scale, 0.0)
    else:
        b_v = b_v * (b_r * scale)
    return b_v


@triton.jit
def _total_weight(p_r, i_t, N, SPEC: tl.constexpr):
    """The sum of the weights of task i_t's samples."""
    if p_r is None:
        b_total = N.to(tl.float32)
    else:
        b_sum = tl.zeros([1, samples(SPEC)], tl.float32)
        for o in tl.range(0, N, samples(SPEC)):
            b_sum += _load_weights(p_r, i_t, o, N, SPEC)
        b_total = tl.sum(tl.sum(b_sum, 1), 0)
    return b_total
