"""How a step of the inner loop moves a task's parameters: what its gradient is summed into, and what is made of that.

A rule reads its numbers from p_inner: momentum, weight decay, the rate of each step and layer [K, layers]; then the
bounds of a gradient's norm and of its elements; of Adam beta1, 1 - beta1, beta2, 1 - beta2, eps, and for each step
1 / (1 - beta1^k), 1 / (1 - beta2^k), k from 1 on.
"""

import triton
import triton.language as tl

from .spec import depth, gathers, moves
from .tiles import plus, scaled, zeros


@triton.jit
def start(weights, biases, SPEC: tl.constexpr):
    """What a task remembers of earlier steps, before the first: a velocity, or both moments of Adam.

    Tiles of weights and of biases. Where gradients are gathered, of both in one tuple: the velocity or the first
    moment, the second moment if there is one, and the sum of what rates that are learned have multiplied.
    """
    if gathers(SPEC):
        second = ()
        directions = ()
        if SPEC.adam:
            second = zeros(weights + biases)
        if SPEC.learns:
            directions = zeros(weights + biases)
        state = zeros(weights + biases), second, directions
    else:
        state = zeros(weights), zeros(biases)
    return state


@triton.jit
def before_gradient(weights, biases, state, p_inner, p_rates, SPEC: tl.constexpr):
    """What the gradient of a step is added to: the weights themselves, or their velocity, or nothing yet."""
    if gathers(SPEC):
        sums = zeros(weights), zeros(biases)
    elif SPEC.momentum:
        sums = scaled(state[0], tl.load(p_inner)), scaled(state[1], tl.load(p_inner))
        if SPEC.decay and not SPEC.decoupled:
            sums = plus(sums[0], weights, tl.load(p_inner + 1)), plus(sums[1], biases, tl.load(p_inner + 1))
    elif SPEC.decay:
        decay = tl.load(p_inner + 1)
        sums = (
            _moved(weights, scaled(weights, decay), p_rates, SPEC),
            _moved(biases, scaled(biases, decay), p_rates, SPEC),
        )
    else:
        sums = weights, biases
    return sums


@triton.jit
def after_gradient(weights, biases, state, sums, p_inner, p_rates, k, K, SPEC: tl.constexpr):
    """The weights and biases after step k, and what is remembered of it."""
    if gathers(SPEC):
        points, state = _followed(weights + biases, state, sums[0] + sums[1], p_inner, p_rates, k, K, SPEC)
        weights, biases = halves(points)
    elif SPEC.momentum:
        state = sums
        if SPEC.decay and SPEC.decoupled:
            sums = plus(sums[0], weights, tl.load(p_inner + 1)), plus(sums[1], biases, tl.load(p_inner + 1))
        weights, biases = _moved(weights, sums[0], p_rates, SPEC), _moved(biases, sums[1], p_rates, SPEC)
    else:
        weights, biases = sums
    return weights, biases, state


@triton.jit
def no_rates(SPEC: tl.constexpr):
    """The gradient of each layer's rate before anything is known of it, where they are learned."""
    found = ()
    if SPEC.learns:
        for _ in tl.static_range(depth(SPEC)):
            found = found + (tl.full((), 0.0, tl.float32),)
    return found


@triton.jit
def add_to_rates(gradients, directions, sums, SPEC: tl.constexpr):
    """Gradients of rates, and what a query gradient adds to them: its product with what they multiplied, negative.

    directions: as `start` has them.
    """
    found = ()
    for i in tl.static_range(depth(SPEC)):
        gradient = gradients[i]
        if SPEC.adapts[i]:
            gradient -= tl.sum(directions[i] * sums[0][i])
            if SPEC.biases[i]:
                gradient -= tl.sum(directions[depth(SPEC) + i] * sums[1][i])
        found = found + (gradient,)
    return found


@triton.jit
def _followed(points, state, gradients, p_inner, p_rates, k, K, SPEC: tl.constexpr):
    """Tiles after a step along what the rule makes of their gradients, and what is remembered of it."""
    p_bounds = p_inner + 2 + K * depth(SPEC)
    gradients = _clipped(gradients, p_bounds, SPEC)
    found = ()
    first = ()
    second = ()
    directions = ()
    for i in tl.static_range(len(points)):
        b_p = points[i]
        b_first = state[0][i]
        b_second = b_first
        if SPEC.adam:
            b_second = state[1][i]
        if moves(SPEC, i):
            b_g, b_first, b_second = direction(b_p, gradients[i], b_first, b_second, p_inner, p_bounds, k, SPEC)
            b_p -= tl.load(p_rates + i % depth(SPEC)) * b_g
        if SPEC.learns:
            b_sum = state[2][i]
            if moves(SPEC, i):
                b_sum += b_g
            directions = directions + (b_sum,)
        found = found + (b_p,)
        first = first + (b_first,)
        if SPEC.adam:
            second = second + (b_second,)
    return found, (first, second, directions)


@triton.jit
def direction(b_p, b_g, b_first, b_second, p_inner, p_bounds, k, SPEC: tl.constexpr):
    """What a rate multiplies at step k, for parameters b_p with a gradient b_g, and what is remembered of it.

    b_first, b_second: the velocity or the first moment, and the second moment, before the step.
    """
    if SPEC.decay and not SPEC.decoupled:
        b_g += tl.load(p_inner + 1) * b_p
    if SPEC.adam:
        b_g, b_first, b_second = _adam(b_g, b_first, b_second, p_bounds + 2, k)
    elif SPEC.momentum:
        b_first = tl.load(p_inner) * b_first + b_g
        if SPEC.nesterov:
            b_g += tl.load(p_inner) * b_first
        else:
            b_g = b_first
    if SPEC.decay and SPEC.decoupled:
        b_g += tl.load(p_inner + 1) * b_p
    return b_g, b_first, b_second


@triton.jit
def _adam(b_g, b_first, b_second, p_adam, k):
    """The direction of Adam, and both moments."""
    b_first = tl.load(p_adam) * b_first + tl.load(p_adam + 1) * b_g
    b_second = tl.load(p_adam + 2) * b_second + tl.load(p_adam + 3) * b_g * b_g
    p_start = p_adam + 5 + 2 * k
    b_size = tl.sqrt(b_second * tl.load(p_start + 1)) + tl.load(p_adam + 4)
    return b_first * tl.load(p_start) / b_size, b_first, b_second


@triton.jit
def _clipped(gradients, p_bounds, SPEC: tl.constexpr):
    """Gradients with elements, and then the norm of all that moves, no larger than the bounds."""
    if SPEC.clips_value:
        found = ()
        for i in tl.static_range(len(gradients)):
            found = found + (clipped_value(gradients[i], p_bounds),)
        gradients = found
    if SPEC.clips_norm:
        square = tl.full((), 0.0, tl.float32)
        for i in tl.static_range(len(gradients)):
            if moves(SPEC, i):
                square += tl.sum(gradients[i] * gradients[i])
        factor = tl.load(p_bounds) / (tl.sqrt(square) + 1e-6)
        gradients = scaled(gradients, tl.minimum(factor, 1.0, tl.PropagateNan.ALL))
    return gradients


@triton.jit
def clipped_value(b_g, p_bounds):
    """A gradient with elements no larger than the bound."""
    bound = tl.load(p_bounds + 1)
    return tl.maximum(tl.minimum(b_g, bound, tl.PropagateNan.ALL), -bound, tl.PropagateNan.ALL)


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
def halves(blocks):
    """A tuple's first half and its second."""
    first = ()
    second = ()
    for i in tl.static_range(len(blocks) // 2):
        first = first + (blocks[i],)
        second = second + (blocks[len(blocks) // 2 + i],)
    return first, second
