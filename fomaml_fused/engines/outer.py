"""The outer gradient of the batched engine: what query passes give, contracted over tasks and samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..inner import PARTS
from ..problem import Problem
from . import FlatParameters, Gradients, Outcome
from .cells import Backward, Cell
from .rules import kept


class Outer:
    """Sums what the query passes of a chunk give; one pass, or one after every step."""

    def __init__(
        self, problem: Problem, needed: Sequence[bool], parameters: FlatParameters, share: float | Tensor
    ) -> None:
        self.problem, self.needed, self.share = problem, needed[1:], share
        self.skips = problem.nonfinite == "skip"
        self.values: Tensor | None = None  # of each task, [T]
        self.dx: Tensor | None = None
        self.gradients: Gradients = [None] * len(parameters)
        self.passes: list[tuple[Backward, dict[int, Tensor]]] = []

    def add_features(self, blocks: list[Tensor]) -> None:
        """The gradient of the query features from one pass, block by block."""
        if blocks:
            dx = blocks[0] if len(blocks) == 1 else torch.cat(blocks, 1)
            self.dx = dx if self.dx is None else self.dx.add_(dx)

    def add(self, cells: list[Cell], values: Tensor, found: Backward) -> None:
        """One pass, or a block of its samples: what it adds to the losses [T], and what its backward left."""
        self.values = values if self.values is None else self.values + values
        rates = rate_gradients(self.problem, cells, found, self.needed)
        if self.skips:  # which tasks count is known after the last pass
            self.passes.append((found, rates))
        else:
            contract(found, rates, self.gradients, self.needed)

    def outcome(self) -> Outcome:
        values = self.values
        assert values is not None
        if not self.skips:
            return Outcome((values * self.share).sum(), self.dx, self.gradients)
        keep = values.isfinite()
        for found, _ in self.passes:
            for own in found.values():
                keep = keep & own.d.isfinite().flatten(1).all(1) & own.x.isfinite().flatten(1).all(1)
        for found, rates in self.passes:
            contract(found, rates, self.gradients, self.needed, keep)
        share = self.share if isinstance(self.share, Tensor) else torch.full_like(values, self.share)
        share = kept(share, keep)
        dx = None if self.dx is None else kept(self.dx, keep)
        return Outcome((kept(values, keep) * share).sum(), dx, self.gradients, share.sum())


def contract(
    found: Backward,
    rates: dict[int, Tensor],
    gradients: Gradients,
    needed: Sequence[bool],
    keep: Tensor | None = None,
) -> None:
    """Add what a query pass gives to the gradients asked for, summed over the tasks to keep, [T], or over all.

    rates: as of `rate_gradients`.
    """
    for i, own in found.items():
        start, end = len(PARTS) * i, len(PARTS) * (i + 1)
        for p, gradient in enumerate(own.outer_gradients(needed[start:end], keep), start):
            if gradient is not None:
                _add(gradients, p, gradient)
    for p, of_tasks in rates.items():
        _add(gradients, p, kept(of_tasks, keep).sum(0))


def rate_gradients(problem: Problem, cells: list[Cell], found: Backward, needed: Sequence[bool]) -> dict[int, Tensor]:
    """The gradients of learned rates, of each task, [T, *shape], by where they are listed; of those asked for."""
    inner, start = problem.inner, len(PARTS) * len(cells)
    if inner.learn_lr is None or not found or not any(needed[start:]):
        return {}
    moving = {i: own for i, own in found.items() if cells[i].moves}
    if inner.learn_lr == "element":
        return {
            start + len(PARTS) * i + PARTS.index(part): cells[i].element_rate_gradient(part, own)
            for i, own in moving.items()
            for part in cells[i].moves
        }
    like = next(iter(found.values())).d
    whole = like.new_zeros(like.shape[0], inner.steps if inner.learns_each_step else 1, len(cells))
    for i, own in moving.items():
        of_layer = cells[i].rate_gradient(own)
        if of_layer is not None:
            whole[:, : of_layer.shape[1], i] = of_layer
    return {start: whole}


def reptile_outcome(
    problem: Problem,
    values: Tensor,
    share: float | Tensor,
    displacements: Callable[[Tensor, Tensor | None], Gradients],
) -> Outcome:
    """Reptile's meta-step from half the squared distance that each task moves, [T].

    displacements: how far they move, summed times the shares [T], of the tasks to keep, [T] or None for all.
    """
    shares = share if isinstance(share, Tensor) else torch.full_like(values, share)
    keep, total = None, None
    if problem.nonfinite == "skip":
        keep = values.isfinite()
        shares = kept(shares, keep)
        total = shares.sum()
    gradients = displacements(shares, keep)
    return Outcome((kept(values, keep) * shares).sum(), None, gradients, total)


def total(outcomes: Sequence[Outcome]) -> Outcome:
    """The sum of the outcomes of several query passes."""
    values, features, gradients, _ = zip(*outcomes, strict=True)
    summed = [_sum(parts) for parts in zip(*gradients, strict=True)]
    return Outcome(torch.stack(values).sum(), _sum(features), summed)


def _sum(parts: Sequence[Tensor | None]) -> Tensor | None:
    present = [part for part in parts if part is not None]
    return torch.stack(present).sum(0) if present else None


def _add(gradients: Gradients, i: int, gradient: Tensor) -> None:
    before = gradients[i]
    gradients[i] = gradient if before is None else before.add_(gradient)
