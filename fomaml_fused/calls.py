"""A call of the module without the module: a batch checked, planned and computed with the parameters that are given."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from . import reference
from .autograd import AdaptedTasks, as_dtypes, meta_step, predict
from .batch import (
    Query,
    Sizes,
    Support,
    check_query,
    check_query_features,
    check_support,
    check_task_weight,
    compute_dtype,
)
from .engines import FlatParameters, Gradients
from .parts import Part, fused_loss, in_steps, mean_of_left, share_of_tasks, task_losses
from .planner import make_plan
from .plans import Plan
from .problem import Problem
from .ragged import Counts, TaskCounts, factor_of, plan_groups, plan_packs, read_counts, step_weights_of


class Given(NamedTuple):
    """The arguments of a call as they came; `FOMAML.forward` says what they are."""

    support_x: Tensor
    support_y: Tensor
    query_x: Tensor | None = None
    query_y: Tensor | None = None
    support_weight: Tensor | None = None
    query_weight: Tensor | None = None
    task_weight: Tensor | None = None
    support_counts: Counts | None = None
    query_counts: Counts | None = None
    step_counts: Counts | None = None


class Batch(NamedTuple):
    """The arguments of a call, checked; `counts` is None where all tasks have as much."""

    support: Support
    query: Query | None
    task_weight: Tensor | None
    counts: TaskCounts | None

    @property
    def queries(self) -> int:
        return 0 if self.query is None else self.query.x.shape[1]


@dataclass(frozen=True, eq=False)
class Call:
    """What a call computes with.

    Attributes:
        flat: the parameters, as engines list them, with rates that are learned.
        precision: one of `PRECISIONS`.
        step_weights: what the query loss after each step counts; None for the last one's alone.
        compiled: run batched torch ops through `torch.compile`.
    """

    problem: Problem
    flat: FlatParameters
    backend: str
    precision: str
    step_weights: tuple[float, ...] | None = None
    compiled: bool = False

    @property
    def like(self) -> Tensor:
        """A parameter, whose dtype and device the batch shares."""
        assert self.flat[0] is not None
        return self.flat[0]

    def parameters(self, problem: Problem) -> FlatParameters:
        """As engines list them for a problem with some of the inner steps."""
        if not self.problem.inner.learns_each_step:
            return self.flat
        *flat, rates = self.flat
        assert rates is not None
        return [*flat, rates[: problem.inner.steps]]

    def check(self, given: Given, *, measured: bool = False) -> Batch:
        """The batch of a call, or the error that says what is wrong with it.

        measured: query sets may be left out whatever the outer rule is.
        """
        support = self.support(given)
        tasks, shots = support.x.shape[0], support.x.shape[-2]
        query = self._query(given, tasks, measured)
        queries = 0 if query is None else query.x.shape[1]
        task_weight = check_task_weight(given.task_weight, tasks, self.like)
        return Batch(support, query, task_weight, self._counts(given, tasks, shots, queries))

    def support(self, given: Given) -> Support:
        """The support sets alone, checked."""
        return check_support(self.problem, self.like, given.support_x, given.support_y, given.support_weight)

    def loss(self, batch: Batch, reduction: str) -> tuple[Tensor, Tensor | None]:
        """The loss, and where diverged tasks are skipped, their weight."""
        tasks, fused = batch.support.x.shape[0], reduction != "none" and not self._asks(batch)
        parts = self.parts(batch, packs=fused)
        if fused:
            return fused_loss(parts, self.parameters, batch.task_weight, tasks, reduction, compiled=self.compiled)
        skips = self.problem.nonfinite == "skip" and reduction != "none"
        losses = task_losses(parts, self.parameters, tasks, self.like, skips=skips)
        return reduced(self.problem, losses, batch.task_weight, reduction, self.like.dtype)

    def needs_autograd(self, given: Given) -> bool:
        """Whether it takes autograd to put the gradients together; else one meta-step has them with the loss."""
        parameters = [id(p) for p in self.flat if p is not None]
        return (
            self.backend == "reference"
            or self.problem.nonfinite == "skip"
            or self.problem.inner.learn_lr is not None
            or any(counts is not None for counts in given[-3:])
            or len({*parameters}) < len(parameters)  # layers share some
        )

    def gradients(self, batch: Batch, reduction: str) -> tuple[Tensor, Gradients]:
        """The loss, and as listed the gradients of the parameters that ask for one; not where autograd is needed."""
        tasks = batch.support.x.shape[0]
        needed = (False, *(p is not None and p.requires_grad for p in self.flat))
        plan = self.plan(batch.support, batch.queries, compiled=self.compiled)
        share = share_of_tasks(batch.task_weight, tasks, reduction, compute_dtype(self.like.dtype))
        found = meta_step(plan, batch.support, batch.query, share, self.flat, needed, compiled=self.compiled)
        value = found.value if tasks or reduction == "sum" else found.value + math.nan  # as in `fused_loss`
        return value.to(self.like.dtype), as_dtypes(found.gradients, self.flat)

    def predict(self, given: Given) -> Tensor:
        """Outputs [T, Q, out] of the adapted networks."""
        support = self.support(given)
        assert given.query_x is not None
        query_x = check_query_features(self.problem, self.like, support.x.shape[0], given.query_x)
        plan = in_steps(self.plan(support, query_x.shape[1]))
        return predict(AdaptedTasks(plan, support, self.flat, keep=plan.keeps_state), query_x, self.flat)

    def parts(self, batch: Batch, *, packs: bool = False) -> list[Part]:
        """The batch as it is computed: whole, or by groups of tasks that are alike, or by packs of those that are not.

        packs: whether they may be, for no task of a pack can be had by itself.
        """
        support, query, counts = batch.support, batch.query, batch.counts
        if counts is None or not support.x.shape[0]:
            return [Part(None, self.plan(support, batch.queries, compiled=self.compiled), support, query)]
        sizes, steps = self._sizes(support, 0), self.problem.inner.steps
        planned = plan_groups(self.problem, sizes, counts, self.backend, self.precision, self.compiled)
        together = plan_packs(planned, self.problem, sizes, counts, self.backend, self.precision) if packs else planned
        parts = []
        for group, plan in together:
            queries = query
            if query is not None:
                weights = step_weights_of(group, query.step_weights, steps)
                queries = group.query(query, counts.queries, weights)
            factor = factor_of(group, self.step_weights)
            parts.append(Part(group.tasks, plan, group.support(support, counts.shots), queries, factor))
        return parts

    def plan(self, support: Support, queries: int, *, compiled: bool = False) -> Plan:
        """How a batch with these support sets is computed; compiled: as of `make_plan`."""
        sizes = self._sizes(support, queries)
        return make_plan(self.problem, sizes, self.backend, self.precision, compiled=compiled)

    def _sizes(self, support: Support, queries: int) -> Sizes:
        shape, each_step = support.x.shape, support.each_step
        return Sizes(shape[0], shape[-2], queries, support.x.dtype, support.x.device, each_step)

    def _query(self, given: Given, tasks: int, measured: bool) -> Query | None:
        x, y, weight = given.query_x, given.query_y, given.query_weight
        if self.problem.outer == "reptile" and not measured:
            for name in ("query_x", "query_y", "query_weight"):
                if getattr(given, name) is not None:
                    raise ValueError(f"{name} is given; outer 'reptile' takes no query set")
            return None
        if x is None or y is None:
            if measured and x is y:
                return None
            takes = "it takes both of them or none" if measured else "outer 'fomaml' takes query sets"
            raise TypeError(f"query_{'x' if x is None else 'y'} is NoneType; {takes}")
        query = check_query(self.problem, self.like, tasks, x, y, weight)
        return query if measured or self.step_weights is None else replace(query, step_weights=self.step_weights)

    def _counts(self, given: Given, tasks: int, shots: int, queries: int) -> TaskCounts | None:
        support_counts, query_counts, step_counts = given[-3:]
        if support_counts is None and query_counts is None and step_counts is None:
            return None
        if query_counts is not None and not queries:
            raise ValueError("query_counts is given; there is no query set")
        mixes = self.problem.network.mixes_samples  # a BatchNorm takes more than one sample
        least = 0 if not self.problem.inner.steps else 2 if mixes else 1
        return TaskCounts(
            read_counts("support_counts", support_counts, tasks, shots, least),
            read_counts("query_counts", query_counts, tasks, queries, 2 if mixes else 0),
            read_counts("step_counts", step_counts, tasks, self.problem.inner.steps, 0),
        )

    def _asks(self, batch: Batch) -> bool:
        """Whether more may ask for a gradient than the parameters and query features, for which the fused loss has it.

        A callable's own parameters may, for one.
        """
        query = batch.query
        asked = (batch.task_weight, *(() if query is None else (query.y, query.weight)))
        if any(t is not None and t.requires_grad for t in asked):
            return True
        return callable_may_ask(self.problem, query is not None)


def callable_may_ask(problem: Problem, queried: bool) -> bool:
    """Whether what an outer loss closes over may ask for a gradient; queried: whether there are query targets."""
    return queried and problem.outer_loss.name == "callable" and torch.is_grad_enabled()


def reduced(
    problem: Problem, losses: Tensor, task_weight: Tensor | None, reduction: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """The loss in a dtype from those of the tasks [T]; and where diverged tasks are skipped, their weight."""
    if problem.nonfinite != "skip" or reduction == "none":
        return reference.reduce_tasks(losses, task_weight, reduction).to(dtype), None
    keep = losses.isfinite()
    weight = torch.ones_like(losses) if task_weight is None else task_weight.to(losses.dtype)
    skipped = torch.where(keep, 0.0, weight).sum().detach()
    total = (torch.where(keep, losses, 0.0) * weight).sum()
    left = torch.where(keep, weight, 0.0).sum()
    return (total if reduction == "sum" else mean_of_left(total, left)).to(dtype), skipped
