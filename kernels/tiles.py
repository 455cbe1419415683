"""Parameters and samples between memory and chip, as tiles; tuples of tiles.

Sides are padded to powers of two, and padding is 0 everywhere: in weights because it is loaded as 0 and has a gradient
of 0, in samples because it is loaded as 0. A side of 1 is not padded, and the tile of a weight with such a side is a
vector.
"""

import triton
import triton.language as tl

from .losses import expected_classes, takes_classes
from .spec import bias_offset, depth, gradients_length, padded, samples, weight_offset, width


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
def load_parameters(p_weights, p_biases, SPEC: tl.constexpr):
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
def load_fast(p_fast, i_t, SPEC: tl.constexpr):
    """The parameters of task i_t from [T, parameters]."""
    p_task = p_fast + i_t * weight_offset(SPEC, depth(SPEC))
    p_weights = ()
    p_biases = ()
    for i in tl.static_range(depth(SPEC)):
        p_weights = p_weights + (p_task + weight_offset(SPEC, i),)
        p_biases = p_biases + (p_task + bias_offset(SPEC, i),)
    return load_parameters(p_weights, p_biases, SPEC)


@triton.jit
def store_parameters(p_flat, weights, biases, SPEC: tl.constexpr):
    """Lay tiles of all parameters end to end at p_flat."""
    for i in tl.static_range(depth(SPEC)):
        o, m = _weight_tile(SPEC, i)
        tl.store(p_flat + weight_offset(SPEC, i) + o, weights[i], mask=m)
        if SPEC.biases[i]:
            o, m = _vector(width(SPEC, i + 1))
            tl.store(p_flat + bias_offset(SPEC, i) + o, biases[i], mask=m)


@triton.jit
def add_to_partials(p_partials, sums, rates, scale, i_p, later, SPEC: tl.constexpr):
    """Store a task's gradient, scale * sums, as program i_p's partial sum; `later`: on top of its earlier tasks'.

    rates: the gradient of each layer's rate, where they are learned.
    """
    p_flat = p_partials + i_p.to(tl.int64) * gradients_length(SPEC)
    p_rates = p_flat + weight_offset(SPEC, depth(SPEC))
    if later:
        # Other threads of this program may have stored what this one is about to load.
        tl.debug_barrier()
        weights, biases = load_fast(p_flat, 0, SPEC)
        store_parameters(p_flat, plus(weights, sums[0], scale), plus(biases, sums[1], scale), SPEC)
        for i in tl.static_range(len(rates)):
            tl.store(p_rates + i, tl.load(p_rates + i) + rates[i] * scale)
    else:
        store_parameters(p_flat, scaled(sums[0], scale), scaled(sums[1], scale), SPEC)
        for i in tl.static_range(len(rates)):
            tl.store(p_rates + i, rates[i] * scale)


@triton.jit
def load_samples(p_x, i_t, o, N, WIDTH: tl.constexpr, SPEC: tl.constexpr):
    """Samples o ... of task i_t from [T, N, WIDTH] as columns [WIDTH, B]; 0 past the end."""
    o_s = o + tl.arange(0, samples(SPEC))
    o_c = tl.arange(0, padded(WIDTH))[:, None]
    p_task = p_x + i_t * N * WIDTH
    if WIDTH == 1:
        # As a tile of one row, a thread would load it again for every row that it has of the tiles it meets.
        b_x = tl.load(p_task + o_s, mask=o_s < N, other=0.0)[None, :]
    else:
        m = (o_s < N)[None, :] & (o_c < WIDTH)
        b_x = tl.load(p_task + o_s[None, :] * WIDTH + o_c, mask=m, other=0.0)
    return b_x.to(tl.float32)


@triton.jit
def store_samples(p_x, b_x, i_t, o, N, WIDTH: tl.constexpr, SPEC: tl.constexpr):
    """Store columns [WIDTH, B] as samples o ... of task i_t in [T, N, WIDTH]."""
    o_s = o + tl.arange(0, samples(SPEC))[None, :]
    o_c = tl.arange(0, padded(WIDTH))[:, None]
    tl.store(p_x + i_t * N * WIDTH + o_s * WIDTH + o_c, b_x, mask=(o_s < N) & (o_c < WIDTH))


@triton.jit
def add_samples(p_x, b_x, i_t, o, N, WIDTH: tl.constexpr, SPEC: tl.constexpr):
    """Add columns [WIDTH, B] to samples o ... of task i_t in [T, N, WIDTH], which is this program's own."""
    # Other threads of this program may have stored what this one is about to load.
    tl.debug_barrier()
    store_samples(p_x, load_samples(p_x, i_t, o, N, WIDTH, SPEC) + b_x, i_t, o, N, WIDTH, SPEC)


@triton.jit
def load_batch(p_x, p_y, p_r, i_t, o, N, LOSS: tl.constexpr, SPEC: tl.constexpr):
    """Samples o ... of task i_t: features [IN, B], targets [OUT, B], weights [1, B]."""
    OUT: tl.constexpr = width(SPEC, depth(SPEC))
    b_x = load_samples(p_x, i_t, o, N, width(SPEC, 0), SPEC)
    if takes_classes(LOSS):
        o_s = o + tl.arange(0, samples(SPEC))[None, :]
        b_class = tl.load(p_y + i_t * N + o_s, mask=o_s < N, other=0).to(tl.int32)
        b_y = expected_classes(b_class, OUT, padded(OUT), LOSS)
    else:
        b_y = load_samples(p_y, i_t, o, N, OUT, SPEC)
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
def weighted(b_v, b_r, scale):
    """Values of samples in columns, times scale and what `_load_weights` gives."""
    if b_r.dtype == tl.int1:
        b_v = tl.where(b_r, b_v * scale, 0.0)
    else:
        b_v = b_v * (b_r * scale)
    return b_v


@triton.jit
def total_weight(p_r, i_t, N, SPEC: tl.constexpr):
    """The sum of the weights of task i_t's samples."""
    if p_r is None:
        b_total = N.to(tl.float32)
    else:
        b_sum = tl.zeros([1, samples(SPEC)], tl.float32)
        for o in tl.range(0, N, samples(SPEC)):
            b_sum += _load_weights(p_r, i_t, o, N, SPEC)
        b_total = tl.sum(b_sum)
    return b_total


@triton.jit
def zeros(blocks):
    """Tiles of 0 in the shapes of others."""
    found = ()
    for i in tl.static_range(len(blocks)):
        found = found + (tl.zeros(blocks[i].shape, tl.float32),)
    return found


@triton.jit
def scaled(blocks, scale):
    """Tiles, times a number."""
    found = ()
    for i in tl.static_range(len(blocks)):
        found = found + (blocks[i] * scale,)
    return found


@triton.jit
def kept_if(condition, blocks):
    """Tiles where a condition holds, else tiles of 0."""
    found = ()
    for i in tl.static_range(len(blocks)):
        found = found + (tl.where(condition, blocks[i], 0.0),)
    return found


@triton.jit
def not_finite(blocks):
    """How many elements of tiles are infinite or not a number."""
    count = tl.full((), 0, tl.int32)
    for i in tl.static_range(len(blocks)):
        count += tl.sum((~(tl.abs(blocks[i]) < float("inf"))).to(tl.int32))
    return count


@triton.jit
def plus(blocks, others, scale):
    """Tiles, plus a number times others."""
    total = ()
    for i in tl.static_range(len(blocks)):
        total = total + (blocks[i] + scale * others[i],)
    return total
