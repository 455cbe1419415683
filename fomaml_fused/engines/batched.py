"""The batched engine: all tasks of a chunk at once as torch ops, each layer in the form its plan names.

Any device, any float dtype, no autograd graph inside. `adapt` runs the inner loop, `query_pass` and `query_backward`
the query pass, and the outer gradient of a layer is one product contracted over tasks and queries. Where the plan says
so, a pass takes a block of samples at a time forward and back, and gradients are summed over the blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from ..batch import Query, Support, cast_targets, compute_dtype
from ..inner import PARTS, InnerLoop
from ..problem import Problem
from . import FlatParameters, Gradients, Outcome, Planned
from .cells import Backward, Builder, Cell, Parts, Reversed, Saved
from .losses import TaskLoss, block_losses
from .outer import Outer, contract, rate_gradients, reptile_outcome
from .rules import kept, norm_factor


@dataclass
class Adapted:
    """The layers of a chunk of tasks after their inner steps."""

    problem: Problem
    cells: list[Cell]
    tasks: int


@dataclass
class Trace:
    """What the query pass leaves for its backward."""

    outputs: Tensor  # [T, Q, out]
    saved: list[Saved]


@dataclass
class Record:
    """What happens inside, in the order of the steps, of each task: [T] each.

    Attributes:
        losses: on the support set before each step.
        outputs: on the support set before each step, [T, S, out].
        squared_norms: of the gradient of each step, before it is clipped.
    """

    losses: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    squared_norms: list[Tensor] = field(default_factory=list)

    def add(self, losses: Tensor, outputs: Tensor, squared_norms: Tensor) -> None:
        """What one step was."""
        self.losses.append(losses)
        self.outputs.append(outputs)
        self.squared_norms.append(squared_norms)


def step(
    plan: Planned,
    needed: Sequence[bool],
    parameters: FlatParameters,
    support: Support,
    query: Query | None,
    share: float | Tensor,
) -> Outcome:
    """The meta-step of a chunk of tasks.

    Args:
        needed: whether a gradient is asked for: of the query features, then of each parameter.
        query: None where the outer rule asks for none.
        share: the cotangent of each task's loss, a number or [t].
    """
    problem = plan.problem
    if query is None:
        return reptile(adapt(plan, parameters, support), needed, share)
    dtype = compute_dtype(query.x.dtype)
    x = query.x.to(dtype)
    rows = blocks(x.shape[1], plan.rows)
    losses = query_losses(problem, query, dtype, rows)
    outer = Outer(problem, needed, parameters, share)

    def measure_block(adapted: Adapted, weight: float | Tensor, x: Tensor, loss: TaskLoss) -> Tensor | None:
        trace = query_pass(adapted, x)
        values, dx = loss.values(trace.outputs), None
        found: Backward = {}
        if any(needed):
            cotangent = share * weight if isinstance(share, float) else (share * weight)[:, None, None]
            d = loss.gradient(trace.outputs, cotangent)
            found, dx = reverse(adapted, trace, d, needed[1:], needed[0])
        outer.add(adapted.cells, values if isinstance(weight, float) and weight == 1.0 else values * weight, found)
        return dx

    def measure(adapted: Adapted, weight: float | Tensor) -> None:
        """Add the query loss of the tasks as they are."""
        found = [measure_block(adapted, weight, _samples(x, own), loss) for own, loss in zip(rows, losses, strict=True)]
        outer.add_features([dx for dx in found if dx is not None])

    if query.step_weights is None or not problem.inner.steps:
        measure(adapt(plan, parameters, support), 1.0)
        return outer.outcome()
    after = (0.0, *query.step_weights)  # what the query loss counts before the first step and after each

    def visit(adapted: Adapted, k: int) -> None:
        if not isinstance(after[k], float) or after[k]:  # a tensor is not 0
            measure(adapted, after[k])

    trajectory(plan, parameters, support, visit)
    return outer.outcome()


def reptile(adapted: Adapted, needed: Sequence[bool], share: float | Tensor) -> Outcome:
    """Reptile's meta-step: half the squared distances that tasks move, and how far they move, times their shares."""
    values = half_squared_distances(adapted)
    return reptile_outcome(
        adapted.problem, values, share, lambda shares, keep: displacements(adapted, shares, needed[1:], keep)
    )


def half_squared_distances(adapted: Adapted) -> Tensor:
    """Of each task, [T]."""
    squared = [term for cell in adapted.cells for term in cell.squared_displacement()]
    if not squared:
        return adapted.cells[0].form.weight.new_zeros(adapted.tasks)
    return torch.stack(squared).sum(0) / 2


def displacements(adapted: Adapted, shares: Tensor, needed: Sequence[bool], keep: Tensor | None = None) -> Gradients:
    """`theta_0 - theta_K` of each parameter asked for, times shares [T], summed over tasks, those to keep."""
    if not any(needed):
        return [None] * len(needed)
    found = [part for cell in adapted.cells for part in cell.displacement(shares, keep)]
    found += [None] * (len(needed) - len(found))
    return [value if need else None for value, need in zip(found, needed, strict=True)]


@cache
def keep_freed_memory() -> None:
    """Let the C library keep what a pass over samples frees for the next one, once in a process.

    Glibc hands free memory back above twice the largest block that it has mapped and freed, up to 64 MB, and every page
    that comes again is a fault. A block that is never written costs nothing and raises the bound; elsewhere it is idle.
    """
    torch.UntypedStorage(31 << 20)


def adapt(plan: Planned, parameters: FlatParameters, support: Support) -> Adapted:
    """The layers of a chunk of tasks after the inner steps."""
    return trajectory(plan, parameters, support)


def trajectory(
    plan: Planned,
    parameters: FlatParameters,
    support: Support,
    visit: Callable[[Adapted, int], None] | None = None,
    record: Record | None = None,
) -> Adapted:
    """As `adapt`; visit: called with the tasks as they are before the first and after each step, and its number."""
    problem, inner = plan.problem, plan.problem.inner
    first, depth = inner.first_adapted, problem.network.depth
    dtype = compute_dtype(support.x.dtype)
    own = [p if p is None or p.dtype == dtype else p.to(dtype) for p in parameters]
    builder = Builder(problem, plan.forms, own)
    tasks, shots = support.x.shape[0], support.x.shape[-2]
    adapted = Adapted(problem, [builder.cell(i, None, tasks, shots) for i in range(first)], tasks)
    x = support.x.to(dtype)
    # Below the first layer that moves, support features stay the same at every step.
    if first < depth and first > 0:
        sets = x.flatten(0, 1) if support.each_step else x
        for cell in adapted.cells:
            sets, _ = cell.forward(sets)
        x = sets.unflatten(0, x.shape[:2]) if support.each_step else sets
    same = None if support.each_step else x
    adapted.cells += [builder.cell(i, same if i == first else None, tasks, shots) for i in range(first, depth)]
    if visit is not None:
        visit(adapted, 0)
    moving = adapted.cells[first:]
    rows = blocks(shots, plan.rows)
    losses = _support_losses(problem, support, dtype, rows) if moving else []
    for k in range(inner.steps):
        if moving:
            samples, of_blocks = (x[:, k], losses[k]) if support.each_step else (x, losses[0])
            _step(moving, [_samples(samples, block) for block in rows], of_blocks, inner, record)
        if visit is not None:
            visit(adapted, k + 1)
    for cell in adapted.cells:
        cell.finish()
    return adapted


def _step(
    moving: list[Cell], samples: list[Tensor], losses: list[TaskLoss], inner: InnerLoop, record: Record | None
) -> None:
    """One inner step of the layers from the first that moves, from blocks of samples and the loss of each."""
    if len(samples) > 1 or inner.max_grad_value is not None:
        _step_along_gradients(moving, samples, losses, inner, record)
        return
    if record is None and inner.max_grad_norm is None:
        _pass(moving, samples[0], losses[0], lambda cell, own: cell.step(own, None))
        return
    found: list[tuple[Cell, Reversed]] = []
    h = _pass(moving, samples[0], losses[0], lambda cell, own: found.append((cell, own)))
    squared = torch.stack([cell.squared_norm(own) for cell, own in found if cell.moves]).sum(0)
    if record is not None:
        record.add(losses[0].values(h), h, squared)
    factor = None if inner.max_grad_norm is None else norm_factor(squared, inner.max_grad_norm)
    for cell, own in found:
        cell.step(own, factor)


def _pass(moving: list[Cell], x: Tensor, loss: TaskLoss, visit: Callable[[Cell, Reversed], None]) -> Tensor:
    """Support samples x [T, N, in] forward and back, and their outputs [T, N, out].

    visit: called with every cell and its part of the backward pass, from the last one down, when nothing below needs
        the cell as it is any more.
    """
    saved, h = [], x
    for cell in moving:
        h, left = cell.forward(h)
        saved.append(left)
    d = loss.gradient(h, 1.0)
    for i in range(len(moving) - 1, -1, -1):
        own = moving[i].reverse(d, saved.pop())
        if i:
            d = moving[i].form.backward(own.d)
        visit(moving[i], own)
    return h


def _step_along_gradients(
    moving: list[Cell], samples: list[Tensor], losses: list[TaskLoss], inner: InnerLoop, record: Record | None
) -> None:
    """As `_step`, along gradients that are written: summed over blocks, clipped by element and then by norm."""
    gradients: dict[int, Parts] = {id(cell): {} for cell in moving}
    values, outputs = [], []
    for x, loss in zip(samples, losses, strict=True):
        h = _pass(moving, x, loss, lambda cell, own: cell.add_gradients(own, gradients[id(cell)]))
        if record is not None:
            values.append(loss.values(h))
            outputs.append(h)
    steps = [(own, g) for cell in moving for part, g in gradients[id(cell)].items() if (own := cell.own(part))]

    def squared_norm() -> Tensor:
        return torch.stack([g.flatten(1).square().sum(1) for _, g in steps]).sum(0)

    if record is not None:
        record.add(torch.stack(values).sum(0), torch.cat(outputs, 1), squared_norm())
    if inner.max_grad_value is not None:
        steps = [(own, g.clamp_(-inner.max_grad_value, inner.max_grad_value)) for own, g in steps]
    if inner.max_grad_norm is not None:
        factor = norm_factor(squared_norm(), inner.max_grad_norm)
        steps = [(own, g * factor.view(-1, *[1] * (g.dim() - 1))) for own, g in steps]
    for own, gradient in steps:
        own.step(gradient)


def blocks(samples: int, rows: int | None) -> list[slice]:
    """Samples of a task, `rows` at a time; None for all at once."""
    if rows is None or rows >= samples:
        return [slice(None)]
    return [slice(start, start + rows) for start in range(0, samples, rows)]


def _samples(x: Tensor, own: slice) -> Tensor:
    return x if own == slice(None) else x[:, own]


def _support_losses(problem: Problem, support: Support, dtype: torch.dtype, rows: list[slice]) -> list[list[TaskLoss]]:
    """Of each step, or of all alike, the loss by block."""
    y, weight = cast_targets(support.y, dtype), None if support.weight is None else support.weight.to(dtype)
    out = problem.network.out_features
    if not support.each_step:
        return [block_losses(problem.loss, y, weight, out, dtype, rows)]
    return [
        block_losses(problem.loss, y[:, k], None if weight is None else weight[:, k], out, dtype, rows)
        for k in range(problem.inner.steps)
    ]


def query_losses(problem: Problem, query: Query, dtype: torch.dtype, rows: list[slice]) -> list[TaskLoss]:
    """The loss of each task on its query set, by block."""
    weight = None if query.weight is None else query.weight.to(dtype)
    y = cast_targets(query.y, dtype)
    return block_losses(problem.outer_loss, y, weight, problem.network.out_features, dtype, rows)


def query_pass(adapted: Adapted, x: Tensor) -> Trace:
    """The adapted network on query features [T, Q, in]."""
    x = x.to(compute_dtype(x.dtype))
    saved = []
    for cell in adapted.cells:
        x, left = cell.forward(x, query=True)
        saved.append(left)
    return Trace(x, saved)


def query_backward(
    adapted: Adapted, trace: Trace, d: Tensor, needed: Sequence[bool], features: bool, keep: Tensor | None = None
) -> tuple[Tensor | None, Gradients]:
    """Run the query pass of a chunk of tasks in reverse.

    Args:
        d: the gradient with respect to the outputs, [T, Q, out], times the cotangent of each task; overwritten.
        needed: whether each parameter's gradient is asked for.
        features: whether that of the query features is.
        keep: the tasks that count, [T], where others may hold what is not finite; None for all.

    Returns:
        The gradient of the query features [T, Q, in], and the outer gradient of each parameter, summed over tasks.
    """
    found, dx = reverse(adapted, trace, d, needed, features)
    gradients: Gradients = [None] * len(needed)
    contract(found, rate_gradients(adapted.problem, adapted.cells, found, needed), gradients, needed, keep)
    return None if dx is None else kept(dx, keep), gradients


def reverse(
    adapted: Adapted, trace: Trace, d: Tensor, needed: Sequence[bool], features: bool
) -> tuple[Backward, Tensor | None]:
    """The backward pass of the query samples down to the lowest layer that is asked for something, by layer."""
    depth = len(adapted.cells)
    wanted = [i for i, need in enumerate(needed) if need]
    lowest = 0 if features or not wanted else min(min(wanted) // len(PARTS), depth)
    if any(needed[len(PARTS) * depth :]):
        lowest = min(lowest, adapted.problem.inner.first_adapted)
    found: Backward = {}
    for i in range(depth - 1, lowest - 1, -1):
        found[i] = adapted.cells[i].reverse(d, trace.saved[i])
        if i > lowest or features:
            d = adapted.cells[i].form.backward(found[i].d)
    return found, d if features else None


def fast_weights(adapted: Adapted, tasks: slice) -> Gradients:
    """The parameters of each layer after the last step, [t, *shape], as engines list them."""
    return [value for cell in adapted.cells for value in cell.adapted(tasks)]
