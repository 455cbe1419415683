"""What happens inside of the inner loop: losses, accuracies and gradient norms of every task and step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .autograd import slices, without_autocast
from .batch import Query, Support, compute_dtype
from .engines import FlatParameters, batched
from .plans import Plan
from .problem import Loss


@dataclass(frozen=True)
class InnerLosses:
    """Of each task what the inner loop did, on the device where it ran; nothing has waited for it.

    Attributes:
        support: the loss on the support set before each step, [T, K].
        gradient_norm: of the gradient of each step, of all that moves, before clipping, [T, K].
        query: the loss on the query set before the first and after each step, [T, K + 1]; None without one.
        support_accuracy: the share of samples whose class is the likeliest, alike; None where targets are no classes.
        query_accuracy: the same on the query set.
    """

    support: Tensor
    gradient_norm: Tensor
    query: Tensor | None = None
    support_accuracy: Tensor | None = None
    query_accuracy: Tensor | None = None

    def scalars(self) -> dict[str, float]:
        """Means over tasks by name, "query/2" for that after two steps; and how many tasks diverged.

        A mean is over the tasks for which there is a finite number. Reading them waits for the device, once.
        """
        named: dict[str, Tensor] = {}
        for field in fields(self):
            values = getattr(self, field.name)
            if values is not None:
                finite = values.isfinite()
                means = torch.where(finite, values, 0.0).sum(0) / finite.sum(0)
                named |= {f"{field.name}/{k}": mean for k, mean in enumerate(means)}
        last = self.query if self.query is not None else self.support
        if last.shape[1]:
            named["diverged"] = (~last[:, -1].isfinite()).sum()
        if not named:
            return {}
        read: list[float] = torch.stack([value.double() for value in named.values()]).tolist()
        return dict(zip(named, read, strict=True))


@torch.no_grad()
def inner_losses(plan: Plan, support: Support, query: Query | None, parameters: FlatParameters) -> InnerLosses:
    """Run the inner loop of a plan of the batched engine, and look at every point on the way."""
    with without_autocast(support.x):
        chunks = [
            _chunk(plan, support.tasks(tasks), None if query is None else query.tasks(tasks), parameters)
            for tasks in slices(plan)
        ]
    return joined(chunks) if chunks else _chunk(plan, support, query, parameters)


def joined(parts: Sequence[InnerLosses], order: Tensor | None = None, steps: int | None = None) -> InnerLosses:
    """All tasks from parts of them.

    Args:
        order: where each task is among those of all parts; None for as they come.
        steps: that the longest loop takes. Of a shorter one, what a step would tell is nan, and the query loss stays.
    """
    found: dict[str, Tensor | None] = {}
    for field in fields(InnerLosses):
        values = [getattr(part, field.name) for part in parts]
        if any(value is None for value in values):
            found[field.name] = None
            continue
        if steps is not None:
            points = field.name.startswith("query")
            values = [_lengthened(value, steps + points, points) for value in values]
        whole = torch.cat(values)
        found[field.name] = whole if order is None else whole[order]
    return InnerLosses(**found)  # type: ignore[arg-type]


def _lengthened(values: Tensor, length: int, stays: bool) -> Tensor:
    rest = length - values.shape[1]
    last = values[:, -1:] if stays else values.new_full((len(values), 1), math.nan)
    return torch.cat([values, last.expand(-1, rest)], 1) if rest else values


def _chunk(plan: Plan, support: Support, query: Query | None, parameters: FlatParameters) -> InnerLosses:
    problem, dtype, record = plan.problem, compute_dtype(support.x.dtype), batched.Record()
    measure = None if query is None else batched.query_losses(problem, query, dtype, [slice(None)])[0]
    losses: list[Tensor] = []
    hits: list[Tensor] = []

    def visit(adapted: batched.Adapted, k: int) -> None:
        if query is not None and measure is not None:
            outputs = batched.query_pass(adapted, query.x).outputs
            losses.append(measure.values(outputs))
            hits.extend(_accuracy(problem.outer_loss, outputs, query.y, query.weight))

    batched.trajectory(plan, parameters, support, visit, record)
    none = support.x.new_zeros(support.x.shape[0], problem.inner.steps, dtype=dtype)  # where no layer moves
    right = [
        hit
        for k, outputs in enumerate(record.outputs)
        for hit in _accuracy(problem.loss, outputs, *_targets(support, k))
    ]
    return InnerLosses(
        support=torch.stack(record.losses, 1) if record.losses else none + math.nan,
        gradient_norm=torch.stack(record.squared_norms, 1).sqrt() if record.squared_norms else none,
        query=torch.stack(losses, 1) if losses else None,
        support_accuracy=torch.stack(right, 1) if right else none + math.nan if problem.loss.takes_classes else None,
        query_accuracy=torch.stack(hits, 1) if hits else None,
    )


def _targets(support: Support, k: int) -> tuple[Tensor, Tensor | None]:
    if not support.each_step:
        return support.y, support.weight
    return support.y[:, k], None if support.weight is None else support.weight[:, k]


def _accuracy(loss: Loss, outputs: Tensor, y: Tensor, weight: Tensor | None) -> list[Tensor]:
    """The weighted share of samples whose class is the likeliest, [T]; nothing where targets are no classes."""
    if not loss.takes_classes:
        return []
    right = (outputs.argmax(-1) == y).to(outputs.dtype)
    return [right.mean(1) if weight is None else (right * weight).sum(1) / weight.sum(1)]
