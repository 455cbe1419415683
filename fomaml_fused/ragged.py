"""Tasks with different numbers of samples or inner steps, as groups of tasks that are alike.

A group is a batch like any other, so every engine and form takes it, and none of them computes padding: tasks of few
shots do not pay for those of many. Within a group, counts may differ by a little, which weights of 0 make up for; how
much a little is, the cost model decides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .batch import Query, Sizes, Support
from .planner import make_plan
from .plans import Plan
from .problem import Problem

Counts = Sequence[int] | Tensor
# By how much counts of a group may differ: the largest over the smallest. The last puts all into one group.
RATIOS = (1.0, 1.25, 2.0, math.inf)


@dataclass(frozen=True)
class Group:
    """Tasks that are computed together.

    Attributes:
        tasks: their indices.
        shots, queries: samples that the one with the most has.
        steps: inner steps that each takes.
    """

    tasks: tuple[int, ...]
    shots: int
    queries: int
    steps: int


@dataclass(frozen=True)
class TaskCounts:
    """What each task has, [T] each; queries is empty where there is no query set."""

    shots: tuple[int, ...]
    queries: tuple[int, ...]
    steps: tuple[int, ...]

    def groups(self, ratio: float) -> list[Group]:
        """Groups in which the largest count is at most `ratio` times the smallest; steps are always the same."""
        queries = self.queries or (0,) * len(self.shots)
        found: dict[tuple[int, int, int], list[int]] = {}
        for t, (shots, count, steps) in enumerate(zip(self.shots, queries, self.steps, strict=True)):
            found.setdefault((steps, _bucket(shots, ratio), _bucket(count, ratio)), []).append(t)
        return [
            Group(tuple(tasks), max(self.shots[t] for t in tasks), max(queries[t] for t in tasks), steps)
            for (steps, _, _), tasks in sorted(found.items())
        ]


def read_counts(name: str, counts: Counts | None, tasks: int, most: int, least: int) -> tuple[int, ...]:
    """Counts of each task as numbers; `most` for each where none are given.

    Reading a tensor waits for its device.

    Raises:
        TypeError: they are no whole numbers.
        ValueError: not one a task, or one outside least..most.
    """
    if counts is None:
        return (most,) * tasks
    values: Any = counts.tolist() if isinstance(counts, Tensor) else list(counts)
    if not isinstance(values, list) or not all(isinstance(n, int) and not isinstance(n, bool) for n in values):
        raise TypeError(f"{name} is {counts!r}; it takes a whole number for each task")
    if len(values) != tasks:
        raise ValueError(f"{name} has {len(values)} counts; there are {tasks} tasks")
    for n in values:
        if not least <= n <= most:
            raise ValueError(f"{name} holds {n}; it takes {least} to {most}")
    return tuple(values)


def plan_groups(
    problem: Problem, sizes: Sizes, counts: TaskCounts, backend: str, precision: str
) -> list[tuple[Group, Plan]]:
    """The groups that the cost model finds the fastest, each with its plan."""
    # What a sample gives under a BatchNorm depends on all samples of its set, so padding would show.
    ratios = RATIOS[:1] if problem.network.mixes_samples else RATIOS

    def planned(ratio: float) -> list[tuple[Group, Plan]]:
        return [(group, _plan(problem, sizes, group, backend, precision)) for group in counts.groups(ratio)]

    if backend == "reference":
        return planned(1.0)
    return min((planned(r) for r in ratios), key=lambda plans: sum(plan.estimate.seconds for _, plan in plans))


def _plan(problem: Problem, sizes: Sizes, group: Group, backend: str, precision: str) -> Plan:
    tasks = len(group.tasks)
    # Planned for the next power of two tasks, so that plans are found again however tasks fall into groups.
    planned = replace(sizes, tasks=1 << (tasks - 1).bit_length(), shots=group.shots, queries=group.queries)
    plan = make_plan(with_steps(problem, group.steps), planned, backend, precision)
    return replace(plan, sizes=replace(planned, tasks=tasks), chunk=min(plan.chunk, tasks))


def with_steps(problem: Problem, steps: int) -> Problem:
    """The problem with its first inner steps alone."""
    if steps == problem.inner.steps:
        return problem
    inner = replace(problem.inner, rates=problem.inner.rates[:steps])
    return replace(problem, inner=inner, multi_step=problem.multi_step and steps > 0)


def support_of(group: Group, support: Support, counts: TaskCounts) -> Support:
    """The support sets of a group; weights of 0 where a task has fewer samples than others."""
    if group.tasks == tuple(range(support.x.shape[0])):
        index: Any = slice(None)
    else:
        index = torch.tensor(group.tasks, device=support.x.device)
    rows = (slice(None), slice(group.steps)) if support.each_step else (slice(None),)
    own = [None if t is None else t[index][(*rows, slice(group.shots))] for t in (support.x, support.y, support.weight)]
    x, y, weight = own
    assert x is not None
    assert y is not None
    mask = _mask([counts.shots[t] for t in group.tasks], group.shots, x)
    if mask is not None and support.each_step:
        mask = mask[:, None].expand(-1, group.steps, -1)
    return Support(x, y, _masked(weight, mask))


def query_of(group: Group, query: Query, counts: TaskCounts, steps: int) -> Query:
    """The query sets of a group; steps: of the tasks that take the most."""
    if group.tasks == tuple(range(query.x.shape[0])):
        index: Any = slice(None)
    else:
        index = torch.tensor(group.tasks, device=query.x.device)
    weight = None if query.weight is None else query.weight[index, : group.queries]
    mask = _mask([counts.queries[t] for t in group.tasks], group.queries, query.x)
    x, y = query.x[index, : group.queries], query.y[index, : group.queries]
    step_weights = query.step_weights
    if step_weights is not None and group.steps < steps:
        # A task that stops early stays where it is for the steps that remain.
        step_weights = (*step_weights[: group.steps - 1], sum(step_weights[group.steps - 1 :])) if group.steps else None
    return Query(x, y, _masked(weight, mask), None, step_weights)


def factor_of(group: Group, step_weights: tuple[float, ...] | None) -> float:
    """What the loss of tasks that take no step counts, where that of each step has a weight."""
    return 1.0 if group.steps or step_weights is None else sum(step_weights)


def _bucket(count: int, ratio: float) -> int:
    """Which counts go together: equal ones, or those between two powers of the ratio."""
    if math.isinf(ratio):
        return 0
    if ratio == 1.0 or count <= 1:
        return count
    return -math.floor(math.log(count) / math.log(ratio) + 1e-9) - 1


def _mask(counts: list[int], most: int, like: Tensor) -> Tensor | None:
    """Which samples there are, [t, most], 0 or 1; None for all."""
    if all(n == most for n in counts):
        return None
    there = torch.arange(most, device=like.device) < torch.tensor(counts, device=like.device)[:, None]
    return there.to(like.dtype)


def _masked(weight: Tensor | None, mask: Tensor | None) -> Tensor | None:
    return mask if weight is None else weight if mask is None else weight * mask
