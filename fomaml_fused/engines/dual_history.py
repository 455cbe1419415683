"""What the dual engine takes from a history in torch, between launches: weights, Gram matrices and what comes of them.

A layer's gradient is a product DᵀX, and of two such products Gram matrices give the inner product, biases and all,
without either of them: the sum of (X Yᵀ + 1) ∘ (D Eᵀ) is <DᵀX, EᵀY>.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..inner import PARTS
from . import Gradients, fold_step
from .coefficients import coefficients
from .dual_launches import Adapted, Layers, Own, Samples, contract
from .launching import layers, of_sound, reduce, wanted_layers
from .rules import norm_factor


def weights_after(adapted: Adapted, i: int, k: int, tasks: slice = slice(None)) -> tuple[Tensor, Tensor | None]:
    """Weights [t, out, in] and biases [t, out] of layer i after k steps, from its history."""
    of = adapted.numbers.of
    by_step = None if adapted.collapses(i) else of.history[k, i, :k]
    return _sum(adapted, i, tasks, of.shared[k, i] if adapted.spec.decay else 1.0, by_step, -1.0)


def fold(adapted: Adapted, k: int) -> None:
    """Give each task weights of its own in the layers that fold at step k."""
    of, steps = adapted.numbers.of, adapted.plan.problem.inner.steps
    for i, form in enumerate(adapted.plan.forms):
        if fold_step(form) == k and adapted.inputs[i] is not None:
            own = adapted.own[i] = Own(*weights_after(adapted, i, k))
            if adapted.spec.momentum and k < steps:
                shared = of.velocity_shared[k, i] if adapted.spec.decay else 0.0
                found = _sum(adapted, i, slice(None), shared, of.velocity_history[k, i, :k], 1.0)
                own.weight_velocity, own.bias_velocity = found


def _sum(
    adapted: Adapted, i: int, tasks: slice, shared: Tensor | float, past: Tensor | None, sign: float
) -> tuple[Tensor, Tensor | None]:
    """Shared * W_0 + sign * sum_j past[j] D_j.T @ X_j of layer i, [t, out, in], and the same of its bias, [t, out].

    past: of each step that counts, [k]; None for 1, where the history is summed already.
    """
    weight, bias = _float(adapted.weights[i]), adapted.biases[i]
    x, d = _float(adapted.inputs[i])[tasks], _float(adapted.gradients[i])[tasks]
    if past is not None:
        x, d = x[:, : len(past)], d[:, : len(past)] * past[:, None, None]
    x, d = x.flatten(1, -2), d.flatten(1, -2)
    weight, beta = (weight * shared, 1.0) if isinstance(shared, Tensor) else (weight, shared)
    found = torch.baddbmm(weight, d.mT, x, beta=beta, alpha=sign)
    return found, None if bias is None else torch.add(shared * bias.float(), d.sum(1), alpha=sign)


def collapse(adapted: Adapted, k: int) -> None:
    """H of the first layer that moves after k steps, from its gradients at each of them."""
    first = adapted.first
    assert adapted.first_gradients is not None
    past = adapted.numbers.of.history[k, first, :k, None, None]
    adapted.gradients[first] = (adapted.first_gradients[:, :k] * past).sum(1)


def clip(adapted: Adapted, k: int) -> None:
    """Shorten the gradients of step k to the norm that a task's may have, over all that moves."""
    bound = adapted.plan.problem.inner.max_grad_norm
    assert bound is not None
    squares, found = [], []
    for i in adapted.moving:
        x, d = _float(adapted.inputs[i]), _each_step(adapted, i)
        assert d is not None
        found.append(d[:, k])
        squares.append(_squared_norm(x if adapted.collapses(i) else x[:, k], d[:, k], adapted.spec.biases[i]))
    factor = norm_factor(torch.stack(squares).sum(0).clamp_min(0.0), bound)
    for d in found:
        d.mul_(factor[:, None, None])


def distances(adapted: Adapted, tasks: int) -> Tensor:
    """Half the squared distance that each task's parameters moved, [T]."""
    squares = [_moved_square(adapted, i) for i in adapted.moving]
    return torch.stack([adapted.numbers.inner.new_zeros(tasks), *squares]).sum(0) / 2


def displacement(adapted: Adapted, shares: Tensor, needed: Sequence[bool], sound: Tensor | None) -> Gradients:
    """How far each parameter moved, theta_0 - theta_K, times the tasks' shares, summed; None where none does.

    shares: [T].  needed: of which parameters.  sound: the tasks that count, [T], where others may hold what is not
    finite; else None.
    """
    wanted = wanted_layers(adapted.spec, needed)
    moving = [i for i in adapted.moving if wanted[i]]
    pairs = _displaced_by_history(adapted, [i for i in moving if i not in adapted.own], shares, sound)
    found: Gradients = [None] * len(needed)
    for i in moving:
        start = (_float(adapted.weights[i]), None if (bias := adapted.biases[i]) is None else bias.float())
        if (own := adapted.own.get(i)) is not None:
            ends = zip(start, (own.weight, own.bias), strict=True)
            pair = [None if a is None or b is None else _shared(a - b, shares, sound) for a, b in ends]
        else:
            pair = list(pairs[i])
            if lost := _lost(adapted, i):
                total, sums = lost * shares.sum(), zip(start, pair, strict=True)
                pair = [None if a is None or b is None else total * a + b for a, b in sums]
        found[len(PARTS) * i : len(PARTS) * i + 2] = pair
    return [gradient if need else None for gradient, need in zip(found, needed, strict=True)]


def _displaced_by_history(
    adapted: Adapted, which: Sequence[int], shares: Tensor, sound: Tensor | None
) -> dict[int, tuple[Tensor, Tensor | None]]:
    """The tasks' shares times sum_j c_{K,j} D_jᵀX_j, summed, and the same of the bias; by layer."""
    # In units in which shares and rates are near 1, gradients are of the size of a sample's own, which 16 bits hold.
    rates = [abs(rate) for row in adapted.plan.problem.inner.rates for rate in row]
    middle, largest = math.sqrt(max(len(shares), 1)), max(rates, default=0.0) or 1.0
    shares = shares * (middle / largest)
    inputs: Layers = [None] * (adapted.depth + 1)
    gradients: Layers = [None] * adapted.depth
    for i in which:
        inputs[i], d = (of_sound(_float(t), sound) for t in (adapted.inputs[i], adapted.gradients[i]))
        past = 1.0 if adapted.collapses(i) else adapted.numbers.of.history[adapted.taken, i, :, None, None]
        gradients[i] = d * (past * shares.view(-1, *[1] * (d.dim() - 1)))
    found: dict[int, tuple[Tensor, Tensor | None]] = {}
    # A history that collapses has one row for all steps, so that its samples are fewer.
    for group in ([i for i in which if adapted.collapses(i)], [i for i in which if not adapted.collapses(i)]):
        if group:
            of_group = [d if i in group else None for i, d in enumerate(gradients)]
            flat, _ = reduce(contract(adapted, inputs, of_group, largest / middle))
            assert flat is not None
            laid_out = layers(adapted.spec, flat)
            found |= {i: laid_out[i] for i in group}
    return found


def rate_gradients(adapted: Adapted, samples: Samples, gradients: Gradients) -> Tensor:
    """The gradient of learned rates, [K, layers] or [1, layers], from a query pass.

    A rate's is the inner product of what it multiplies and the query gradient, negative, for the steps that are behind
    the weights.  gradients: the outer ones of the pass, which decay asks for.
    """
    of, k, inner = adapted.numbers.of, samples.taken, adapted.plan.problem.inner
    found = adapted.numbers.inner.new_zeros(inner.steps, adapted.depth)
    for i in adapted.moving:
        past = samples.unit * _products_with_steps(adapted, samples, i)  # [k]
        along = (of.direction_history[1 : k + 1, i, :k] * past).sum(1)
        if adapted.spec.decay:
            along += of.direction_shared[1 : k + 1, i] * _product_with_start(adapted, gradients, i)
        found[:k, i] = -along
    return found if inner.learns_each_step else found.sum(0, keepdim=True)


def _products_with_steps(adapted: Adapted, samples: Samples, i: int) -> Tensor:
    """Of layer i, the inner products of the query gradient with D_jᵀX_j of each step before, over all tasks; [k]."""
    k = samples.taken
    x, d = _float(adapted.inputs[i]), _float(_each_step(adapted, i))[:, :k]
    x_query, d_query = _float(samples.inputs[i]), _float(samples.gradients[i])
    of_gradients = torch.bmm(d_query, d.flatten(1, 2).mT).unflatten(2, d.shape[1:3])  # [T, Q, k, S]
    if adapted.collapses(i):
        of_inputs = torch.bmm(x_query, x.mT).unsqueeze(2)  # [T, Q, 1, S]
    else:
        of_inputs = torch.bmm(x_query, x[:, :k].flatten(1, 2).mT).view_as(of_gradients)
    if adapted.spec.biases[i]:
        of_inputs += 1.0
    return of_sound((of_inputs * of_gradients).sum((1, 3)), samples.sound).sum(0)


def _product_with_start(adapted: Adapted, gradients: Gradients, i: int) -> Tensor:
    """The inner product of layer i's outer gradient with its shared parameters."""
    pairs = zip((adapted.weights[i], adapted.biases[i]), gradients[len(PARTS) * i :], strict=False)
    parts = [(parameter.float() * g).sum() for parameter, g in pairs if parameter is not None and g is not None]
    return torch.stack(parts).sum()


def _moved_square(adapted: Adapted, i: int) -> Tensor:
    """The squared distance that layer i's parameters moved, by task, [T]."""
    weight, bias, own = _float(adapted.weights[i]), adapted.biases[i], adapted.own.get(i)
    if own is not None:
        square = (weight - own.weight).square().sum((1, 2))
        return square if bias is None or own.bias is None else square + (bias.float() - own.bias).square().sum(1)
    x, d = _float(adapted.inputs[i]), _float(adapted.gradients[i])
    if not adapted.collapses(i):
        d = d * adapted.numbers.of.history[adapted.taken, i, :, None, None]
        x, d = x.flatten(1, 2), d.flatten(1, 2)
    square = _squared_norm(x, d, adapted.spec.biases[i])
    if lost := _lost(adapted, i):
        # The distance is that of lost * W_0 + DᵀX from 0, and the same of the bias.
        length, z = weight.square().sum(), x @ weight.t()
        if bias is not None:
            length, z = length + bias.float().square().sum(), z + bias.float()
        square = square + lost**2 * length + 2.0 * lost * (z * d).sum((1, 2))
    return square


def _lost(adapted: Adapted, i: int) -> float:
    """What decay takes of layer i's W_0 in all steps, 1 - s_K."""
    inner = adapted.plan.problem.inner
    options = (inner.momentum, inner.weight_decay, inner.nesterov, inner.decoupled)
    return 1.0 - coefficients(inner.layer_rates(i), *options).shared[-1]


def _squared_norm(x: Tensor, d: Tensor, bias: bool) -> Tensor:
    """The sum of (X Xᵀ + 1) ∘ (D Dᵀ) of each task, the 1 for a bias, [T]; in double precision, for it may cancel."""
    dtype, x, d = d.dtype, x.double(), d.double()
    gram = torch.bmm(x, x.mT)
    return ((gram + 1.0 if bias else gram) * torch.bmm(d, d.mT)).sum((1, 2)).to(dtype)


def _each_step(adapted: Adapted, i: int) -> Tensor | None:
    """D_j of layer i at every step, [T, K, S, out]."""
    return adapted.first_gradients if adapted.collapses(i) else adapted.gradients[i]


def _shared(values: Tensor, shares: Tensor, sound: Tensor | None) -> Tensor:
    """Values of tasks [T, ...] times their shares, summed."""
    weighted: Tensor = of_sound(values, sound) * shares.view(-1, *[1] * (values.dim() - 1))
    return weighted.sum(0)


def _float(values: Tensor | None) -> Tensor:
    assert values is not None
    return values.float()
