"""Tasks with different numbers of samples or inner steps, as groups of tasks that are alike, or as packs.

A group is a batch like any other, so every engine and form takes it, and none of them computes padding: tasks of few
shots do not pay for those of many. Within a group, counts may differ by a little, which weights of 0 make up for; how
much a little is, the cost model decides. Where the dual kernels run, tasks of any counts can share packs instead.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from .batch import Query, Sizes, Support, cleared, masked, present
from .costs import CPU
from .packs import Packs, fill
from .planner import make_packed_plan, make_plan
from .plans import Plan, overriding
from .problem import Problem

Counts = Sequence[int] | Tensor
# By how much counts of a group may differ: the largest over the smallest. The last puts all into one group.
RATIOS = (1.0, 1.25, 2.0, math.inf)
_OPS = 12  # torch ops of a layer in a step and back
_ROWS, _HISTORY = 16, 32  # the smallest tiles that packs fill


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

    def support(self, support: Support, shots: Sequence[int]) -> Support:
        """The group's support sets, with weights of 0 where a task has fewer samples than others; shots: of all."""
        index = self._index(support.x)
        rows = (slice(None), slice(self.steps)) if support.each_step else (slice(None),)
        own = (support.x, support.y, support.weight)
        x, y, weight = (None if t is None else t[index][(*rows, slice(self.shots))] for t in own)
        assert x is not None
        assert y is not None
        there = present([shots[t] for t in self.tasks], self.shots, x)
        if there is not None and support.each_step:
            there = there[:, None].expand(-1, self.steps, -1)
        return Support(cleared(x, there), cleared(y, there), masked(weight, there, x))

    def query(self, query: Query, queries: Sequence[int], step_weights: tuple[float, ...] | None) -> Query:
        """The group's query sets, alike."""
        index = self._index(query.x)
        weight = None if query.weight is None else query.weight[index, : self.queries]
        there = present([queries[t] for t in self.tasks], self.queries, query.x)
        x, y = query.x[index, : self.queries], query.y[index, : self.queries]
        return Query(cleared(x, there), cleared(y, there), masked(weight, there, x), None, step_weights)

    def _index(self, x: Tensor) -> Any:
        """What takes the tasks out of those of x [T, ...]; views where they are all."""
        return slice(None) if len(self.tasks) == len(x) else torch.tensor(self.tasks, device=x.device)


PlannedGroups = list[tuple[Group | Packs, Plan]]


@dataclass(frozen=True)
class TaskCounts:
    """What each task has, [T] each; queries are 0 where there is no query set."""

    shots: tuple[int, ...]
    queries: tuple[int, ...]
    steps: tuple[int, ...]

    def groups(self, ratio: float) -> list[Group]:
        """Groups in which the largest count is at most `ratio` times the smallest; steps are always the same."""
        found: dict[tuple[int, int, int], list[int]] = {}
        for t, (shots, count, steps) in enumerate(zip(self.shots, self.queries, self.steps, strict=True)):
            found.setdefault((steps, _bucket(shots, ratio), _bucket(count, ratio)), []).append(t)
        return [
            Group(tuple(tasks), max(self.shots[t] for t in tasks), max(self.queries[t] for t in tasks), steps)
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
    try:
        values = [operator.index(n) for n in (counts.tolist() if isinstance(counts, Tensor) else counts)]
    except TypeError as error:
        raise TypeError(f"{name} is {counts!r}; it takes a whole number for each task") from error
    if len(values) != tasks:
        raise ValueError(f"{name} has {len(values)} counts; there are {tasks} tasks")
    for n in values:
        if not least <= n <= most:
            raise ValueError(f"{name} holds {n}; it takes {least} to {most}")
    return tuple(values)


def plan_groups(
    problem: Problem, sizes: Sizes, counts: TaskCounts, backend: str, precision: str, compiled: bool = False
) -> PlannedGroups:
    """The groups that the cost model finds the fastest, each with its plan."""

    def planned(ratio: float) -> PlannedGroups:
        return [(group, _plan(problem, sizes, group, backend, precision, compiled)) for group in counts.groups(ratio)]

    # What a sample gives under a BatchNorm depends on all samples of its set, so padding would show.
    if backend == "reference" or problem.network.mixes_samples:
        return planned(1.0)
    whole = planned(RATIOS[-1])
    # Plans of all groups of every ratio would take longer than the step: a first look is at launches and samples.
    samples = sum(_samples(group) for group, _ in whole)
    seconds = sum(plan.estimate.seconds for _, plan in whole)
    launches = _OPS * problem.network.depth * (1 + max(counts.steps)) * CPU.launch
    a_sample = max(seconds - launches * len(whole), 0.1 * seconds) / max(samples, 1)

    def cost(ratio: float) -> float:
        groups = counts.groups(ratio)
        return len(groups) * launches + a_sample * sum(_samples(group) for group in groups)

    best = min(RATIOS, key=cost)
    return whole if best == RATIOS[-1] else planned(best)


def plan_packs(
    groups: PlannedGroups, problem: Problem, sizes: Sizes, counts: TaskCounts, backend: str, precision: str
) -> PlannedGroups:
    """Planned groups, or in place of those of as many steps the packs of their tasks, where that is faster.

    Raises:
        ValueError: packs are what the planner is told to take, and there is an obstacle.
    """
    told = overriding().packs
    if told is False:
        return groups
    found: PlannedGroups = []
    for steps, of_steps in groupby(groups, key=lambda pair: pair[0].steps):
        alike = list(of_steps)
        packed = _plan_packs(with_steps(problem, steps), alike, sizes, counts, backend, precision)
        if isinstance(packed, str):
            if told:
                raise ValueError(f"packs is True, and tasks of {steps} steps cannot share any: {packed}")
            found += alike
        else:
            faster = packed[1].estimate.seconds < sum(plan.estimate.seconds for _, plan in alike)
            found += [packed] if told or faster else alike
    return found


def _plan_packs(
    problem: Problem, groups: PlannedGroups, sizes: Sizes, counts: TaskCounts, backend: str, precision: str
) -> tuple[Packs, Plan] | str:
    """The packs of all tasks of some groups, with their plan; or why there are none."""
    tasks, steps = [t for group, _ in groups for t in group.tasks], problem.inner.steps
    shots, queries = [counts.shots[t] for t in tasks], [counts.queries[t] for t in tasks]
    if not steps or not min(queries):
        return "without a step there is no history, and without a query no mean"
    largest = max(shots)
    # As many rows as cost no larger tile, of samples or of history, than the largest task has, or the smallest tiles.
    rows = max(largest, min(_tile(largest, _ROWS), _tile(largest * steps, _HISTORY) // steps))
    most = max(max(queries), -(-sum(queries) * rows // sum(shots)))

    def planned(count: int) -> Plan | str:
        rounder = replace(sizes, tasks=_round_up(count), shots=rows, queries=_round_up(most), packed=True)
        return make_packed_plan(problem, rounder, backend, precision)

    if isinstance(why := planned(-(-sum(shots) // rows)), str):  # before the work of filling them
        return why
    order, places = fill(tasks, counts.shots, counts.queries, rows, most)
    packs = Packs(order, places, rows, most, steps)
    plan = planned(packs.count)
    assert isinstance(plan, Plan)
    own = replace(sizes, tasks=packs.count, shots=rows, queries=most, packed=True)
    reason = f"{len(tasks)} tasks in {packs.count} packs; {plan.reason}"
    return packs, replace(plan, sizes=own, chunk=min(plan.chunk, packs.count), reason=reason)


def _tile(count: int, least: int) -> int:
    """The side of a tile for so many samples."""
    return max(least, 1 << (count - 1).bit_length())


def _samples(group: Group | Packs) -> int:
    """That a group's tasks run through the network."""
    return len(group.tasks) * (max(group.steps, 1) * group.shots + group.queries)


def _plan(problem: Problem, sizes: Sizes, group: Group, backend: str, precision: str, compiled: bool) -> Plan:
    """The plan of a group; made for rounder numbers, so that it is found again however tasks fall into groups."""
    tasks = len(group.tasks)
    rounder = replace(
        sizes,
        tasks=_round_up(tasks),
        shots=min(_round_up(group.shots), sizes.shots),
        queries=_round_up(group.queries),
    )
    plan = make_plan(with_steps(problem, group.steps), rounder, backend, precision, compiled=compiled)
    own = replace(sizes, tasks=tasks, shots=group.shots, queries=group.queries)
    return replace(plan, sizes=own, chunk=min(plan.chunk, tasks))


def _round_up(count: int) -> int:
    """The count, with its three highest bits alone."""
    step = 1 << max(count.bit_length() - 3, 0)
    return -(-count // step) * step


def with_steps(problem: Problem, steps: int) -> Problem:
    """The problem with its first inner steps alone."""
    if steps == problem.inner.steps:
        return problem
    inner = replace(problem.inner, rates=problem.inner.rates[:steps])
    return replace(problem, inner=inner, multi_step=problem.multi_step and steps > 0)


def step_weights_of(
    group: Group | Packs, step_weights: tuple[float, ...] | None, steps: int
) -> tuple[float, ...] | None:
    """What the query loss after each step of a group counts; steps: of the tasks that take the most."""
    if step_weights is None or group.steps == steps:
        return step_weights
    # A task that stops early stays where it is for the steps that remain.
    return (*step_weights[: group.steps - 1], sum(step_weights[group.steps - 1 :])) if group.steps else None


def factor_of(group: Group | Packs, step_weights: tuple[float, ...] | None) -> float:
    """What the loss of tasks that take no step counts, where that of each step has a weight."""
    return 1.0 if group.steps or step_weights is None else sum(step_weights)


def _bucket(count: int, ratio: float) -> int:
    """Which counts go together: equal ones, or those between two powers of the ratio."""
    if ratio == 1.0 or count == 0:  # of no sample there is no mean, and weights of 0 are none
        return count
    if math.isinf(ratio):
        return -1
    return -math.floor(math.log(count) / math.log(ratio) + 1e-9) - 1
