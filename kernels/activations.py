"""Each activation and its derivative, element by element in float32.

An activation is a compile-time pair: its name, and the values of its parameters, as torch's module takes them (of a
sine, its frequency).
"""

import triton
import triton.language as tl

KEEPS_OUTPUT = ("identity", "relu", "tanh", "sigmoid")
NOT_ZERO_AT_ZERO = ("sigmoid", "softplus")


@triton.constexpr_function
def keeps_output(ACTIVATION):
    """Whether the derivative is taken from the output h; from the pre-activation z otherwise."""
    return ACTIVATION[0] in KEEPS_OUTPUT


@triton.constexpr_function
def leaves_zero(ACTIVATION):
    """Whether the activation of 0 is 0, so that padding stays 0 through it."""
    return ACTIVATION[0] not in NOT_ZERO_AT_ZERO


@triton.jit
def _expm1(x):
    # exp(x) - 1 cancels near 0; five terms of its series are exact to float32 there.
    b_series = x * (1.0 + x * (0.5 + x * (1.0 / 6 + x * (1.0 / 24 + x * (1.0 / 120)))))
    return tl.where(tl.abs(x) < 0.1, b_series, tl.exp(x) - 1.0)


@triton.jit
def log1p(x):
    # Kahan: what 1 + x loses of x, the quotient gives back.
    b_u = 1.0 + x
    return tl.where(b_u == 1.0, x, tl.log(b_u) * (x / tl.where(b_u == 1.0, 1.0, b_u - 1.0)))


@triton.jit
def _tanh(x):
    # 2 sigmoid(2x) - 1 cancels near 0, where the series has the digits.
    b_x2 = x * x
    b_series = x * (1.0 + b_x2 * (-1.0 / 3 + b_x2 * (2.0 / 15 + b_x2 * (-17.0 / 315))))
    return tl.where(tl.abs(x) < 0.15, b_series, 2.0 * tl.sigmoid(2.0 * x) - 1.0)


@triton.jit
def _sine(x, QUARTER: tl.constexpr):
    """sin(x), or with QUARTER 0.5 cos(x); to some 1e-7 of what is exact, up to |x| of some thousands, or with fma 1e7.

    The multiple of pi that is nearest, or of pi plus a half, is taken off in three parts, whose products with a few
    thousand are exact (Cody and Waite 1980); of what is left, in [-pi/2, pi/2], a polynomial is the sine to 6e-9. The
    libraries' own goes on to larger arguments, with a branch and local memory that every program would carry along.
    """
    b_k = tl.floor(x * 0.3183098861837907 + (0.5 - QUARTER)) + QUARTER
    b_r = tl.fma(b_k, -3.140625, x)
    b_r = tl.fma(b_k, -9.67502593994140625e-4, b_r)
    b_r = tl.fma(b_k, -1.509957990978376432e-7, b_r)
    b_r2 = b_r * b_r
    b_series = -0.16666659550388593 + b_r2 * (
        8.333066245278211e-3 + b_r2 * (-1.9809602851865332e-4 + b_r2 * 2.6057805405205964e-6)
    )
    # Every other multiple of pi turns the sign; half a one more makes it minus the cosine.
    b_odd = b_k - QUARTER - 2.0 * tl.floor((b_k - QUARTER) * 0.5)
    b_sign = 1.0 - 2.0 * b_odd
    if QUARTER > 0.0:
        b_sign = -b_sign
    return b_sign * (b_r + b_r * b_r2 * b_series)


@triton.jit
def activate(b_z, ACTIVATION: tl.constexpr):
    """The activation's output h for pre-activations of any shape."""
    if ACTIVATION[0] == "relu":
        # Without NaN propagation a diverged task would look sound.
        b_h = tl.maximum(b_z, 0.0, tl.PropagateNan.ALL)
    elif ACTIVATION[0] == "leaky_relu":
        b_h = tl.where(b_z > 0.0, b_z, b_z * ACTIVATION[1][0])
    elif ACTIVATION[0] == "elu":
        b_h = tl.where(b_z > 0.0, b_z, ACTIVATION[1][0] * _expm1(tl.minimum(b_z, 0.0, tl.PropagateNan.ALL)))
    elif ACTIVATION[0] == "gelu":
        b_h = b_z * (0.5 + 0.5 * tl.erf(b_z * 0.7071067811865476))
    elif ACTIVATION[0] == "gelu_tanh":
        b_h = b_z * tl.sigmoid(1.5957691216057308 * (b_z + 0.044715 * b_z * b_z * b_z))
    elif ACTIVATION[0] == "silu":
        b_h = b_z * tl.sigmoid(b_z)
    elif ACTIVATION[0] == "tanh":
        b_h = _tanh(b_z)
    elif ACTIVATION[0] == "sigmoid":
        b_h = tl.sigmoid(b_z)
    elif ACTIVATION[0] == "softplus":
        b_bz = b_z * ACTIVATION[1][0]
        # exp is taken of what is not positive only, so it cannot overflow.
        b_soft = tl.maximum(b_bz, 0.0, tl.PropagateNan.ALL) + log1p(tl.exp(-tl.abs(b_bz)))
        b_h = tl.where(b_bz > ACTIVATION[1][1], b_z, b_soft / ACTIVATION[1][0])
    elif ACTIVATION[0] == "sine":
        b_h = _sine(b_z * ACTIVATION[1][0], 0.0)
    else:
        tl.static_assert(ACTIVATION[0] == "identity")
        b_h = b_z
    return b_h


@triton.jit
def pull_back(b_d, b_kept, ACTIVATION: tl.constexpr):
    """The gradient with respect to z from that with respect to h; b_kept is z or h, as `keeps_output` says."""
    if ACTIVATION[0] == "identity":
        b_d = b_d
    elif ACTIVATION[0] == "relu":
        # As torch has it: where the output is nan, so is the gradient.
        b_d = tl.where(b_kept <= 0.0, 0.0, b_d)
    elif ACTIVATION[0] == "leaky_relu":
        b_d = tl.where(b_kept > 0.0, b_d, b_d * ACTIVATION[1][0])
    elif ACTIVATION[0] == "elu":
        b_d = tl.where(b_kept > 0.0, b_d, b_d * (ACTIVATION[1][0] * tl.exp(tl.minimum(b_kept, 0.0))))
    elif ACTIVATION[0] == "gelu":
        b_density = 0.3989422804014327 * tl.exp(-0.5 * b_kept * b_kept)
        b_d *= 0.5 + 0.5 * tl.erf(b_kept * 0.7071067811865476) + b_kept * b_density
    elif ACTIVATION[0] == "gelu_tanh":
        b_s = tl.sigmoid(1.5957691216057308 * (b_kept + 0.044715 * b_kept * b_kept * b_kept))
        b_inner = 1.5957691216057308 * (1.0 + 0.134145 * b_kept * b_kept)
        b_d *= b_s + b_kept * b_s * (1.0 - b_s) * b_inner
    elif ACTIVATION[0] == "silu":
        b_s = tl.sigmoid(b_kept)
        b_d *= b_s * (1.0 + b_kept * (1.0 - b_s))
    elif ACTIVATION[0] == "tanh":
        b_d *= 1.0 - b_kept * b_kept
    elif ACTIVATION[0] == "sigmoid":
        b_d *= b_kept * (1.0 - b_kept)
    elif ACTIVATION[0] == "softplus":
        b_bz = b_kept * ACTIVATION[1][0]
        b_d = tl.where(b_bz > ACTIVATION[1][1], b_d, b_d * tl.sigmoid(b_bz))
    else:
        tl.static_assert(ACTIVATION[0] == "sine")
        b_d *= ACTIVATION[1][0] * _sine(b_kept * ACTIVATION[1][0], 0.5)
    return b_d
