"""Each loss of a sample, its value and its gradient with respect to the outputs, in float32.

A loss is a compile-time pair: its name, and its parameters (delta of a Huber loss, label smoothing of cross-entropy).
Tiles hold outputs in rows and samples in columns, [C, B]; rows past `OUT` are padding, in which targets are 0.
"""

import triton
import triton.language as tl

from .activations import log1p


@triton.constexpr_function
def takes_classes(LOSS):
    """Whether targets are class indices; values otherwise."""
    return LOSS[0] == "cross_entropy"


@triton.constexpr_function
def slope_unit(LOSS):
    """What of a loss's derivative is the same for all samples, and so goes into what scales them all."""
    return 2.0 if LOSS[0] == "mse" else 1.0


@triton.jit
def expected_classes(b_class, OUT: tl.constexpr, C: tl.constexpr, LOSS: tl.constexpr):
    """The distribution that cross-entropy aims at, [C, B], from classes [1, B]; nan for one that does not exist."""
    o_c = tl.arange(0, C)[:, None]
    b_hit = tl.where(o_c == b_class, 1.0 - LOSS[1][0], 0.0)
    b_hit = tl.where((b_class >= 0) & (b_class < OUT), b_hit, float("nan"))
    return tl.where(o_c < OUT, b_hit + LOSS[1][0] / OUT, 0.0)


@triton.jit
def sample_losses(b_z, b_y, share, OUT: tl.constexpr, LOSS: tl.constexpr):
    """The loss of each sample, [1, B], and `share` times its gradient with respect to the outputs, [C, B].

    In padding the gradient is 0 where `share` is finite.  b_z: outputs [C, B].  b_y: targets [C, B]; for cross-entropy,
    what `expected_classes` gives.
    """
    m = tl.arange(0, b_z.shape[0])[:, None] < OUT
    if LOSS[0] == "cross_entropy":
        b_z = b_z - tl.max(tl.where(m, b_z, float("-inf")), 0)[None, :]
        b_e = tl.where(m, tl.exp(b_z), 0.0)
        b_sum = tl.sum(b_e, 0)[None, :]
        b_value = tl.log(b_sum) - tl.sum(b_y * tl.where(m, b_z, 0.0), 0)[None, :]
        b_gradient = (b_e / b_sum - b_y) * share
    else:
        b_each, b_slope = _output_losses(b_z, b_y, LOSS)
        b_value = tl.sum(tl.where(m, b_each, 0.0), 0)[None, :] * (1.0 / OUT)
        b_gradient = tl.where(m, b_slope * (share * (slope_unit(LOSS) / OUT)), 0.0)
    return b_value, b_gradient


@triton.jit
def _output_losses(b_z, b_y, LOSS: tl.constexpr):
    """The loss of each output, for losses that are a mean over outputs, and its derivative in `slope_unit`."""
    b_e = b_z - b_y
    if LOSS[0] == "mse":
        b_each = b_e * b_e
        b_slope = b_e
    elif LOSS[0] == "l1":
        b_each = tl.abs(b_e)
        b_slope = tl.where(b_e > 0.0, 1.0, tl.where(b_e < 0.0, -1.0, b_e))
    elif LOSS[0] == "huber":
        b_size = tl.abs(b_e)
        b_each = tl.where(b_size > LOSS[1][0], LOSS[1][0] * (b_size - 0.5 * LOSS[1][0]), 0.5 * b_e * b_e)
        b_slope = tl.where(b_e > LOSS[1][0], LOSS[1][0], tl.where(b_e < -LOSS[1][0], -LOSS[1][0], b_e))
    else:
        tl.static_assert(LOSS[0] == "bce_with_logits")
        # max(z, 0) - z y + log(1 + exp(-|z|)): no term overflows.
        b_each = tl.maximum(b_z, 0.0, tl.PropagateNan.ALL) - b_z * b_y + log1p(tl.exp(-tl.abs(b_z)))
        b_slope = tl.sigmoid(b_z) - b_y
    return b_each, b_slope
