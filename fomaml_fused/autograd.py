"""The boundary between autograd and the engines: two functions with closed-form first-order gradients.

`meta_loss` knows each task's share of the loss, so it takes the outer gradient on the way, chunk by chunk, and keeps
nothing per task. `predict` does not: whatever loss comes behind it, its backward runs the query pass in reverse.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .batch import Query, Support
from .engines import batched
from .engines.losses import task_loss
from .planner import Plan

FlatParameters = tuple[Tensor | None, ...]  # weight, bias, weight, bias, ...


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype an engine works in: float32 for 16-bit parameters, else their own."""
    return torch.float32 if dtype.itemsize < torch.float32.itemsize else dtype


def meta_loss(plan: Plan, support: Support, query: Query, reduction: str, parameters: FlatParameters) -> Tensor:
    """The mean or sum over tasks of the adapted networks' query losses, differentiable to first order."""
    wanted = torch.is_grad_enabled()
    return _MetaLoss.apply(plan, support, query, reduction, wanted, query.x, *parameters)


def predict(tasks: AdaptedTasks, query_x: Tensor, parameters: FlatParameters) -> Tensor:
    """Outputs of the adapted networks [T, Q, out], differentiable to first order."""
    return _Predict.apply(tasks, query_x, *parameters)


@dataclass(frozen=True)
class Chunk:
    """The adapted layers of `length` tasks from `start` on."""

    start: int
    length: int
    adapted: batched.Adapted


class AdaptedTasks:
    """A batch of adapted tasks, kept, or adapted anew every time they are walked over.

    Args:
        parameters: what the tasks are adapted from; read again whenever they are adapted.
        keep: hold every task's adapted layers.
    """

    def __init__(self, plan: Plan, support: Support, parameters: FlatParameters, *, keep: bool) -> None:
        self.plan, self.support, self.parameters = plan, support, parameters
        self.kept: list[Chunk] | None = list(self._adapt()) if keep else None

    def __iter__(self) -> Iterator[Chunk]:
        return self._adapt() if self.kept is None else iter(self.kept)

    @torch.no_grad()
    def _adapt(self) -> Iterator[Chunk]:
        pairs = _pairs(self.parameters)
        for start, length in _chunks(self.plan):
            yield Chunk(start, length, _adapt_chunk(self.plan, pairs, self.support.tasks(start, length)))


class _MetaLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        plan: Plan,
        support: Support,
        query: Query,
        reduction: str,
        wanted: bool,
        query_x: Tensor,
        *parameters: Tensor | None,
    ) -> Tensor:
        pairs = _pairs(parameters)
        dtype = compute_dtype(query_x.dtype)
        needs_features, *needs_parameters = (wanted and needed for needed in ctx.needs_input_grad[5:])
        outer = batched.OuterGradient(needs_parameters)
        features = torch.empty_like(query_x, dtype=dtype) if needs_features else None
        shares = _task_shares(query, reduction, dtype)
        losses = []
        for start, length in _chunks(plan):
            adapted = _adapt_chunk(plan, pairs, support.tasks(start, length))
            trace = batched.query(adapted, query_x.narrow(0, start, length).to(dtype))
            y = _cast(query.y.narrow(0, start, length), dtype)
            weight = None if query.weight is None else query.weight.narrow(0, start, length).to(dtype)
            loss = task_loss(plan.problem.outer_loss, y, weight, plan.problem.network.out_features, dtype)
            losses.append(loss.values(trace.outputs))
            if needs_features or any(needs_parameters):
                share = shares if isinstance(shares, float) else shares[start : start + length, None, None]
                d = loss.gradient(trace.outputs).mul_(share)
                dx = batched.query_backward(adapted, trace, d, outer, needs_features)
                if features is not None and dx is not None:
                    features[start : start + length] = dx
        ctx.dtype, ctx.inputs = query_x.dtype, (query_x, *parameters)
        ctx.save_for_backward(features, *outer.gradients(parameters))
        per_task = torch.cat(losses) if losses else query_x.new_empty(0, dtype=dtype)
        return _reduce(per_task, query, reduction).to(query_x.dtype)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Any, ...]:
        return _differentiable_once(_MetaLoss._backward, ctx, cotangent)

    @staticmethod
    def _backward(ctx: Any, cotangent: Tensor) -> tuple[Any, ...]:
        gradients = [None if g is None else (g * cotangent).to(ctx.dtype) for g in ctx.saved_tensors]
        return (None, None, None, None, None, *gradients)


class _Predict(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tasks: AdaptedTasks, query_x: Tensor, *parameters: Tensor | None) -> Tensor:
        x = query_x.to(compute_dtype(query_x.dtype))
        traces, outputs = [], []
        for chunk in tasks:
            trace = batched.query(chunk.adapted, x.narrow(0, chunk.start, chunk.length))
            traces.append(trace)
            outputs.append(trace.outputs)
            if tasks.kept is None:
                traces.clear()
        ctx.tasks, ctx.traces, ctx.inputs = tasks, traces, (query_x, *parameters)
        # Saved so that autograd notices when an optimiser changed them between forward and backward.
        ctx.save_for_backward(query_x, *parameters)
        if not outputs:
            return query_x.new_empty(*query_x.shape[:2], tasks.plan.problem.network.out_features)
        return torch.cat(outputs).to(query_x.dtype)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Any, ...]:
        return _differentiable_once(_Predict._backward, ctx, cotangent)

    @staticmethod
    def _backward(ctx: Any, cotangent: Tensor) -> tuple[Any, ...]:
        query_x, *parameters = ctx.saved_tensors
        dtype = compute_dtype(query_x.dtype)
        needs_features, *needs_parameters = ctx.needs_input_grad[1:]
        outer = batched.OuterGradient(needs_parameters)
        features = torch.empty_like(query_x, dtype=dtype) if needs_features else None
        for i, chunk in enumerate(ctx.tasks):
            tasks = slice(chunk.start, chunk.start + chunk.length)
            trace = ctx.traces[i] if ctx.traces else batched.query(chunk.adapted, query_x[tasks].to(dtype))
            d = torch.empty_like(trace.outputs).copy_(cotangent[tasks])
            dx = batched.query_backward(chunk.adapted, trace, d, outer, needs_features)
            if features is not None and dx is not None:
                features[tasks] = dx
        gradients = [None if g is None else g.to(query_x.dtype) for g in (features, *outer.gradients(parameters))]
        return (None, *gradients)


class _NoSecondDerivative(torch.autograd.Function):
    """The identity on a gradient that came from `inputs`; its derivative is an error."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *inputs: Tensor | None) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Any, ...]:
        raise RuntimeError(
            "the first-order meta-gradient has no second derivative; "
            "fomaml_fused.reference.meta_loss(..., first_order=False) gives losses that can be differentiated twice"
        )


def _differentiable_once(
    backward: Callable[[Any, Tensor], tuple[Any, ...]], ctx: Any, cotangent: Tensor
) -> tuple[Any, ...]:
    """Run a backward; where its results are to be differentiated again, make that an error.

    `torch.autograd.function.once_differentiable` does so only if the cotangent asks for a gradient. Parameters ask for
    one too, and without an error a gradient penalty would silently count as a constant.
    """
    again = torch.is_grad_enabled()  # autograd enables gradients in a backward exactly under create_graph
    with torch.no_grad():
        gradients = backward(ctx, cotangent)
    if not again:
        return gradients
    return tuple(None if g is None else _NoSecondDerivative.apply(g, *ctx.inputs) for g in gradients)


def _adapt_chunk(plan: Plan, pairs: batched.Parameters, support: Support) -> batched.Adapted:
    dtype = compute_dtype(support.x.dtype)
    weight = None if support.weight is None else support.weight.to(dtype)
    return batched.adapt(plan.problem, plan.forms, pairs, support.x.to(dtype), _cast(support.y, dtype), weight)


def _chunks(plan: Plan) -> Iterator[tuple[int, int]]:
    tasks = plan.sizes.tasks
    for start in range(0, tasks, plan.chunk):
        yield start, min(plan.chunk, tasks - start)


def _pairs(parameters: FlatParameters) -> list[tuple[Tensor, Tensor | None]]:
    """Weight and bias of each layer in the dtype of the engine."""
    computed = [
        p if p is None or p.dtype == compute_dtype(p.dtype) else p.to(compute_dtype(p.dtype)) for p in parameters
    ]
    return list(zip(computed[0::2], computed[1::2], strict=True))  # type: ignore[arg-type]


def _task_shares(query: Query, reduction: str, dtype: torch.dtype) -> float | Tensor:
    """The cotangent of each task's loss: a number, or [T]."""
    if query.task_weight is None:
        return 1.0 if reduction == "sum" else 1.0 / max(query.x.shape[0], 1)
    weight = query.task_weight.to(dtype)
    return weight if reduction == "sum" else weight / weight.sum()


def _reduce(per_task: Tensor, query: Query, reduction: str) -> Tensor:
    if query.task_weight is None:
        return per_task.sum() if reduction == "sum" else per_task.mean()
    total = (query.task_weight * per_task).sum()
    return total if reduction == "sum" else total / query.task_weight.sum()


def _cast(y: Tensor, dtype: torch.dtype) -> Tensor:
    return y.to(dtype) if y.is_floating_point() else y
