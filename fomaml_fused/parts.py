"""A batch in parts, each of tasks that are computed together: the meta-loss of all from those of the parts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .autograd import AdaptedTasks, half_squared_distances, meta_loss, predict, predict_steps
from .batch import Query, Support, cast_targets, compute_dtype
from .engines import FlatParameters
from .engines.losses import task_loss
from .packs import counted as counted_by_task
from .planner import make_plan
from .plans import Plan
from .problem import Problem


class Part(NamedTuple):
    """Tasks that are computed together.

    Attributes:
        tasks: which of the batch they are; None for all.
        query: None where the outer rule asks for none.
        factor: what their losses count.
    """

    tasks: tuple[int, ...] | None
    plan: Plan
    support: Support
    query: Query | None
    factor: float = 1.0


Parameters = Callable[[Problem], FlatParameters]  # as engines list them, for a problem with some of the inner steps


def fused_loss(
    parts: Sequence[Part],
    parameters: Parameters,
    task_weight: Tensor | None,
    tasks: int,
    reduction: str,
    *,
    compiled: bool,
) -> tuple[Tensor, Tensor | None]:
    """The sum or mean over tasks, whose gradient is taken on the way.

    Returns:
        The loss; and where diverged tasks are skipped, their weight, which without weights is their number.
    """
    skips = parts[0].plan.problem.nonfinite == "skip"
    dtype = compute_dtype(parts[0].support.x.dtype)
    weight = None if task_weight is None else task_weight.to(dtype)
    # Where tasks may be skipped, what the mean is over is known when all are through.
    divisor = 1.0 if skips else _divisor(weight, tasks, reduction)
    total, kept = [], []
    for part in parts:
        query, share = part.query, part.factor / divisor
        if query is not None and query.owner is not None:
            query, share = counted_by_task(query, weight, share)
        elif weight is not None:
            share = share * (weight if part.tasks is None else weight[list(part.tasks)])
        found, counted = meta_loss(
            part.plan, part.support, query, share, parameters(part.plan.problem), compiled=compiled
        )
        total.append(found)
        kept += [] if counted is None else [counted / part.factor]
    like = parts[0].support.x.dtype
    value = total[0] if len(total) == 1 else torch.stack(total).sum()
    if tasks == 0 and reduction == "mean":  # torch's own convention for no task
        return (value + math.nan).to(like), value.new_zeros(()) if skips else None
    if not skips:
        return value.to(like), None
    counted = torch.stack(kept).sum() if kept else value.new_zeros(())
    skipped = (tasks if weight is None else weight.sum()) - counted
    return (mean_of_left(value, counted) if reduction == "mean" else value).to(like), skipped.detach()


def share_of_tasks(task_weight: Tensor | None, tasks: int, reduction: str, dtype: torch.dtype) -> float | Tensor:
    """What each task's loss counts in the sum or mean, where none is skipped: a number, or [T]."""
    weight = None if task_weight is None else task_weight.to(dtype)
    share = 1.0 / _divisor(weight, tasks, reduction)
    return share if weight is None else share * weight


def _divisor(weight: Tensor | None, tasks: int, reduction: str) -> float | Tensor:
    """What a sum over tasks is divided by."""
    if reduction == "sum":
        return 1.0
    return float(max(tasks, 1)) if weight is None else weight.sum()


def mean_of_left(total: Tensor, weight: Tensor) -> Tensor:
    """A sum over the tasks that are left over their weight; nan, with a gradient of 0, where none is."""
    return total / torch.where(weight != 0, weight, 1.0) + torch.where(weight != 0, 0.0, math.nan)


def task_losses(
    parts: Sequence[Part], parameters: Parameters, tasks: int, like: Tensor, *, skips: bool = False
) -> Tensor:
    """The loss of each task [T], differentiable by whatever comes behind it.

    Args:
        skips: let no gradient through tasks that diverged, whose loss is nan then.
    """
    losses = [part.factor * _task_losses(part, parameters(part.plan.problem), skips) for part in parts]
    if len(parts) == 1 and parts[0].tasks is None:
        return losses[0]
    return torch.cat(losses)[places(parts, like.device)] if losses else like.new_empty(tasks)


def places(parts: Sequence[Part], device: torch.device) -> Tensor:
    """Where each task of the batch is among those of all parts, [T]."""
    order = [t for part in parts if part.tasks is not None for t in part.tasks]
    return torch.tensor(order, device=device, dtype=torch.long).argsort()


def in_torch(plan: Plan) -> Plan:
    """The same batch in the engine of torch ops, for what it alone gives."""
    return plan if plan.engine == "batched" else make_plan(plan.problem, plan.sizes, "torch")


def in_steps(plan: Plan) -> Plan:
    """The same batch in an engine whose adapted tasks can be had; the native one has whole meta-steps alone."""
    return in_torch(plan) if plan.engine == "native" else plan


def _task_losses(part: Part, parameters: FlatParameters, skips: bool) -> Tensor:
    plan, support, query = part.plan, part.support, part.query
    if query is None:
        return half_squared_distances(in_torch(plan), support, parameters)
    dtype = compute_dtype(query.x.dtype)
    if query.step_weights is None:
        # In the engine of torch ops alone a task without a cotangent is left out, whatever it holds.
        plan = in_torch(plan) if skips else in_steps(plan)
        tasks = AdaptedTasks(plan, support, parameters, keep=plan.keeps_state)
        return losses_of_outputs(plan.problem, query, predict(tasks, query.x, parameters).to(dtype), skips)
    counted = {k: w for k, w in enumerate(query.step_weights, 1) if w}
    outputs = predict_steps(in_torch(plan), support, query.x, list(counted), parameters).to(dtype)
    loss = task_loss(plan.problem.outer_loss, cast_targets(query.y, dtype), query.weight, outputs.shape[3], dtype)

    def values(outputs: Tensor) -> Tensor:
        return torch.stack([w * loss.values(own) for w, own in zip(counted.values(), outputs, strict=True)]).sum(0)

    return _sound(values, outputs) if skips else values(outputs)


def losses_of_outputs(problem: Problem, query: Query, outputs: Tensor, skips: bool) -> Tensor:
    """The loss of each task [T] of outputs [T, Q, out], as differentiable as these; skips: as of `task_losses`."""
    y = cast_targets(query.y, outputs.dtype)
    loss = task_loss(problem.outer_loss, y, query.weight, outputs.shape[2], outputs.dtype)
    return _sound(loss.values, outputs) if skips else loss.values(outputs)


def _sound(values: Callable[[Tensor], Tensor], outputs: Tensor) -> Tensor:
    """The losses of outputs [..., T, Q, out], nan and without a gradient for tasks where they are not finite."""
    with torch.no_grad():
        keep = values(outputs).isfinite()
    sound = torch.where(keep[:, None, None], outputs, 0.0)
    return torch.where(keep, values(sound), math.nan)
