"""A training run in several processes, as torchrun starts them: each computes its share of every batch of tasks.

All of them draw the same batch from the same generator, so that a run is the same however many share it, and its
checkpoint is one for all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """Which process this is, of how many."""

    rank: int = 0
    world: int = 1

    @classmethod
    def current(cls) -> Ranks:
        """Of the group that `launched` made, or this one alone."""
        if not dist.is_available() or not dist.is_initialized():
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def share(self, tasks: int) -> slice:
        """The tasks of a batch that this process computes; none where there are more processes than tasks."""
        return slice(tasks * self.rank // self.world, tasks * (self.rank + 1) // self.world)

    def agree(self, stop: bool) -> bool:
        """Whether any process asks to stop, on which all then agree."""
        if self.world == 1:
            return stop
        asked = torch.tensor(float(stop))
        dist.all_reduce(asked)
        return bool(asked)

    def average(
        self, parameters: Iterable[Tensor], loss: Tensor, weight: float, skipped: float
    ) -> tuple[Tensor, float]:
        """Average gradients in place, and the loss, over all processes.

        Args:
            weight: what the loss of this one is a mean over; a mean over nothing is nan, and adds nothing.
            skipped: counted by this one.

        Returns:
            The loss, nan where all are means over nothing; and what was counted by all.
        """
        gradients = [p.grad for p in parameters if p.grad is not None]
        own = torch.cat([*(g.flatten() for g in gradients), loss.detach().view(1)])
        own = own * weight if weight else torch.zeros_like(own)
        total = torch.cat([own, own.new_tensor([weight, skipped])])
        dist.all_reduce(total)
        *sums, value, weights, counted = total.split([*(g.numel() for g in gradients), 1, 1, 1])
        for gradient, found in zip(gradients, sums, strict=True):
            gradient.copy_((found / torch.where(weights > 0, weights, 1.0)).view_as(gradient))
        return (value / weights).view(()), counted.item()


@contextmanager
def launched() -> Iterator[Ranks]:
    """The processes that torchrun started, as a group for the block; this one alone where it did not."""
    if not dist.is_available() or not dist.is_torchelastic_launched():
        yield Ranks()
        return
    dist.init_process_group("gloo")
    try:
        yield Ranks.current()
    finally:
        dist.destroy_process_group()
