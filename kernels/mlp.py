"""A network on a tile of samples, forward and in reverse.

Samples lie in columns: a layer is `W @ H` with W in torch's own [out, in], so that the large operand is the one that
stays in registers. Loops over layers unroll, so one kernel serves any depth.
"""

import triton
import triton.language as tl

from .activations import activate, keeps_output, leaves_zero, pull_back
from .products import running_dot
from .spec import activation, depth, in_parts, in_tf32, lowest, padded, samples, width


@triton.jit
def forward(b_h, weights, biases, SPEC: tl.constexpr):
    """The network on samples [IN, B]: its outputs [OUT, B], each layer's input, what each derivative is taken from."""
    inputs = ()
    kept = ()
    for i in tl.static_range(depth(SPEC)):
        inputs = inputs + (b_h,)
        b_h, b_kept = _layer(b_h, weights[i], biases[i], width(SPEC, i), width(SPEC, i + 1), activation(SPEC, i), SPEC)
        kept = kept + (b_kept,)
    return b_h, inputs, kept


@triton.jit
def backward(
    b_d, weights, inputs, kept, sums, p_rates, MOVING: tl.constexpr, FEATURES: tl.constexpr, SPEC: tl.constexpr
):
    """Step against the gradients of the layers in MOVING, from that of the outputs, b_d [OUT, B].

    sums: what the steps are added to.  p_rates: the rate of each layer; None for -1, which adds the gradients as they
    are. Returns the gradient of the network's input [IN, B], where FEATURES asks for it, and the sums.
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
                # Minus one times a gradient is subtracted, rather than a gradient added: plain sums that a loop carries
                # Triton 3.7 optimizes, and its compiler fails on those that are used twice behind the loop.
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
        b_z = tl.broadcast_to(b_b[:, None], [padded(OUT), samples(SPEC)])
        if in_parts(SPEC):
            b_z = _sum_product(b_w, tl.trans(b_h), b_z, SPEC)
        else:
            # Whole, the weights are what a step sums into, and to be an operand as well they would be moved about.
            b_z = running_dot(b_w, b_h, b_z, SPEC)
    return b_z


@triton.jit
def _linear_backward(b_d, b_w, IN: tl.constexpr, OUT: tl.constexpr, SPEC: tl.constexpr):
    """W.T @ D, [IN, B]."""
    if IN == 1:
        b_dx = tl.sum(b_w[:, None] * b_d, 0)[None, :]
    elif OUT == 1:
        b_dx = b_w[:, None] * b_d
    else:
        b_dx = running_dot(tl.trans(b_w), b_d, tl.zeros([padded(IN), samples(SPEC)], tl.float32), SPEC)
    return b_dx


@triton.jit
def _step(b_w, b_d, b_h, rate, IN: tl.constexpr, OUT: tl.constexpr, SPEC: tl.constexpr):
    """b_w - rate * D @ H.T, in the shape of the weight's tile."""
    if IN == 1 or OUT == 1:
        b_w -= rate * tl.sum(b_d * b_h, 1)
    else:
        # The input is scaled, not the gradient, which 16 bits may hardly hold as it is.
        b_w = _sum_product(b_d, b_h * -rate, b_w, SPEC)
    return b_w


@triton.jit
def _sum_product(b_a, b_b, b_sum, SPEC: tl.constexpr):
    """b_sum + b_a @ b_b.T, for b_a that is a sum of products itself."""
    if in_tf32(SPEC):
        b_a = _even_first(b_a)
        b_b = _even_first(b_b)
    return running_dot(b_a, tl.trans(b_b), b_sum, SPEC)


@triton.jit
def _even_first(b_v):
    """The columns of each eight in the order 0 2 4 6 1 3 5 7.

    Thread t of four has columns 2t and 2t + 1 of a sum in its registers, and takes t and t + 4 of an operand in tf32.
    In this order they are the same, so a sum becomes an operand without a way through other threads; and a product is
    the same in whatever order both operands have their columns. (In 16 bits an operand is laid out as a sum is.)
    """
    b_v = tl.reshape(b_v, [b_v.shape[0], b_v.shape[1] // 8, 4, 2])
    return tl.reshape(tl.permute(b_v, [0, 1, 3, 2]), [b_v.shape[0], b_v.shape[1] * 8])
