"""The batched engine: all tasks of a chunk at once as torch ops, each layer in the form its plan names.

Any device, any float dtype, no autograd graph inside. `adapt` runs the inner loop, `query` and `query_backward` the
query pass, and the outer gradient of a layer is one product contracted over tasks and queries.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from ..batch import Query, Support, cast_targets, compute_dtype
from ..inner import PARTS
from ..problem import Activation, Problem
from . import FlatParameters, Outcome, Planned, fold_step
from .activations import activation_ops
from .forms import DualFirstLayer, DualLayer, FoldingLayer, PrimalLayer, SharedLayer
from .losses import task_loss


@dataclass
class Adapted:
    """The layers of a chunk of tasks after their inner steps, and the activation behind each."""

    layers: list[SharedLayer]
    activations: list[Activation]


@dataclass
class Trace:
    """What the query pass leaves for its backward: per layer the input, and what the activation's derivative needs."""

    outputs: Tensor  # [T, Q, out]
    inputs: list[Tensor]
    saved: list[Tensor]


def step(
    plan: Planned,
    needed: Sequence[bool],
    parameters: FlatParameters,
    support: Support,
    query: Query,
    share: float | Tensor,
) -> Outcome:
    """The meta-step of a chunk of tasks.

    Args:
        needed: whether a gradient is asked for: of the query features, then of each parameter.
        share: the cotangent of each task's loss, a number or [t].

    Returns:
        Value, gradient of the query features, and outer gradients.
    """
    adapted = adapt(plan, parameters, support)
    dtype = compute_dtype(query.x.dtype)
    trace = query_pass(adapted, query.x.to(dtype))
    weight = None if query.weight is None else query.weight.to(dtype)
    out_features = plan.problem.network.out_features
    loss = task_loss(plan.problem.outer_loss, cast_targets(query.y, dtype), weight, out_features, dtype)
    value = (loss.values(trace.outputs) * share).sum()
    if not any(needed):
        return Outcome(value, None, [None] * len(parameters))
    d = loss.gradient(trace.outputs, share if isinstance(share, float) else share[:, None, None])
    dx, gradients = query_backward(adapted, trace, d, needed[1:], needed[0])
    return Outcome(value, dx, gradients)


@lru_cache(maxsize=64)
def compiled_step(plan: Planned, needed: tuple[bool, ...]) -> Callable[..., Any]:
    """`step` of a plan through `torch.compile`: one graph, static shapes."""
    # Dynamo tells that it traces through functions with a cache, which is what they are there for.
    warnings.filterwarnings("ignore", message=r"(?s).*functools\.lru_cache", module="torch")
    return torch.compile(partial(step, plan, needed), fullgraph=True, dynamic=False)


def adapt(plan: Planned, parameters: FlatParameters, support: Support) -> Adapted:
    """The layers of a chunk of tasks after the inner steps."""
    dtype = compute_dtype(support.x.dtype)
    own = [p if p is None or p.dtype == dtype else p.to(dtype) for p in parameters]
    pairs = [(w, b) for w, b in zip(own[0 :: len(PARTS)], own[1 :: len(PARTS)], strict=True) if w is not None]
    weight = None if support.weight is None else support.weight.to(dtype)
    return _inner_loop(plan.problem, plan.forms, pairs, support.x.to(dtype), cast_targets(support.y, dtype), weight)


def _inner_loop(
    problem: Problem,
    forms: Sequence[str],
    parameters: Sequence[tuple[Tensor, Tensor | None]],
    x: Tensor,
    y: Tensor,
    weight: Tensor | None,
) -> Adapted:
    inner = problem.inner
    kinds = [layer.activation for layer in problem.network.layers]
    activations = [activation_ops(kind) for kind in kinds]
    first = inner.first_adapted
    layers = [SharedLayer(*p) for p in parameters[:first]]
    # Below the first layer that moves, support features stay the same at every step.
    for layer, activation in zip(layers, activations, strict=False):
        if first < problem.network.depth:
            x = activation.forward(layer.forward(x, 0))
    layers += [_build(problem, i, forms[i], parameters[i], x) for i in range(first, problem.network.depth)]
    if first == problem.network.depth:
        return Adapted(layers, kinds)

    moving, active = layers[first:], activations[first:]
    loss = task_loss(problem.loss, y, weight, problem.network.out_features, x.dtype)
    for k in range(inner.steps):
        inputs, saved = [], []
        h = x
        for layer, activation in zip(moving, active, strict=True):
            inputs.append(h)
            h, kept = activation.run(layer.forward(h, k))
            saved.append(kept)
        d = loss.gradient(h, 1.0)
        for i in range(len(moving) - 1, -1, -1):
            d = active[i].backward(d, saved[i])
            dx = moving[i].backward(d, k) if i > 0 else None
            if inner.adapt[first + i]:
                moving[i].step(inputs[i], d, k)
            if dx is not None:
                d = dx
    for layer in layers:
        layer.finish()
    return Adapted(layers, kinds)


def query_pass(adapted: Adapted, x: Tensor) -> Trace:
    """The adapted network on query features [T, Q, in]."""
    x = x.to(compute_dtype(x.dtype))
    inputs, saved = [], []
    for layer, activation in zip(adapted.layers, adapted.activations, strict=True):
        inputs.append(x)
        x, kept = activation_ops(activation).run(layer.query(x))
        saved.append(kept)
    return Trace(x, inputs, saved)


def query_backward(
    adapted: Adapted, trace: Trace, d: Tensor, needed: Sequence[bool], features: bool
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Run the query pass of a chunk of tasks in reverse.

    Args:
        d: the gradient with respect to the outputs, [T, Q, out], times the cotangent of each task; overwritten.
        needed: whether each parameter's gradient is asked for: weight, bias, weight, bias, ...
        features: whether that of the query features is.

    Returns:
        The gradient of the query features [T, Q, in], and the outer gradient of each parameter, summed over tasks.
    """
    gradients: list[Tensor | None] = [None] * len(needed)
    lowest = 0 if features or True not in needed else list(needed).index(True) // len(PARTS)
    for i in range(len(adapted.layers) - 1, lowest - 1, -1):
        d = activation_ops(adapted.activations[i]).backward(d, trace.saved[i])
        rows = d.flatten(0, 1)  # [T * Q, out]
        if needed[len(PARTS) * i]:
            gradients[len(PARTS) * i] = rows.t() @ trace.inputs[i].flatten(0, 1)
        if needed[len(PARTS) * i + 1]:
            gradients[len(PARTS) * i + 1] = rows.sum(0)
        if i > lowest or features:
            d = adapted.layers[i].query_backward(d)
    return (d if features else None), gradients


def fast_weights(adapted: Adapted, tasks: slice) -> list[tuple[Tensor, Tensor | None]]:
    """Weights [t, out, in] and biases [t, out] of each layer after the last step."""
    return [layer.adapted(tasks) for layer in adapted.layers]


def _build(
    problem: Problem, i: int, form: str, parameters: tuple[Tensor, Tensor | None], support: Tensor
) -> SharedLayer:
    """A layer in its form; support: the input of the network's moving part on the support set, [T, S, in]."""
    inner = problem.inner
    rates = inner.layer_rates(i)

    def primal() -> PrimalLayer:
        return PrimalLayer(*parameters, rates, inner.momentum, inner.weight_decay)

    def dual(steps: int) -> DualFirstLayer | DualLayer:
        options = (*parameters, rates[:steps], inner.momentum, inner.weight_decay)
        if i == inner.first_adapted:
            return DualFirstLayer(*options, support)
        return DualLayer(*options, *support.shape[:2])

    match form, fold_step(form):
        case "shared", _:
            return SharedLayer(*parameters)
        case "primal", _:
            return primal()
        case "dual", _:
            return dual(inner.steps)
        case _, int(step):
            return FoldingLayer(dual(step), primal(), step)
    raise AssertionError(f"no form {form!r}")
