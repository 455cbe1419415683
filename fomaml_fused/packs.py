"""Tasks of unequal sizes in packs: the rows of a pack are samples of several tasks, and each has an owner.

To the dual kernels a pack is what a task is elsewhere, with products masked where two rows are not of one owner. What
is left of a pack's rows belongs to nobody and counts nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .batch import Query, Support, cleared, compute_dtype, masked, present

NOBODY = -1


@dataclass(frozen=True)
class Packs:
    """Tasks of equal numbers of steps, several to a pack.

    Attributes:
        tasks: their indices, pack by pack.
        packs: the pack that each of them is in, alike.
        shots, queries: rows of a pack.
        steps: inner steps that each takes.
    """

    tasks: tuple[int, ...]
    packs: tuple[int, ...]
    shots: int
    queries: int
    steps: int

    @property
    def count(self) -> int:
        """The number of packs."""
        return self.packs[-1] + 1

    def support(self, support: Support, shots: Sequence[int]) -> Support:
        """The support sets in packs, [packs, rows, ...], from those of the batch; shots: of each of its tasks."""
        rows = self._rows(shots, self.shots, support.x)
        return Support(
            rows.of(support.x), rows.of(support.y), rows.of(_parts(support.weight, shots, support.x)), rows.owner
        )

    def query(self, query: Query, queries: Sequence[int], step_weights: tuple[float, ...] | None) -> Query:
        """The query sets in packs, alike."""
        rows = self._rows(queries, self.queries, query.x)
        weight = rows.of(_parts(query.weight, queries, query.x))
        return Query(rows.of(query.x), rows.of(query.y), weight, None, step_weights, rows.owner)

    def _rows(self, counts: Sequence[int], length: int, like: Tensor) -> _Rows:
        count = torch.tensor([counts[t] for t in self.tasks])
        task, pack = torch.tensor(self.tasks), torch.tensor(self.packs)
        begin = count.cumsum(0) - count
        # The tasks of a pack follow one another, so a task's first row is what those before it in its pack have.
        first = torch.searchsorted(pack, torch.arange(self.count))
        begin_of_task = begin - begin[first][pack]
        within = torch.arange(int(count.sum())) - begin.repeat_interleave(count)
        row = (pack * length + begin_of_task).repeat_interleave(count) + within
        owner = torch.full((self.count * length,), NOBODY, dtype=torch.int32)
        owner[row] = task.int().repeat_interleave(count)
        index = torch.zeros(self.count * length, dtype=torch.long)
        index[row] = task.repeat_interleave(count) * like.shape[1] + within
        shape = self.count, length
        return _Rows(index.view(shape).to(like.device), owner.view(shape).to(like.device))


@dataclass(frozen=True, eq=False)
class _Rows:
    """The rows of packs: which sample of the batch each is, counted over all tasks, and whose; [packs, rows] both."""

    index: Tensor
    owner: Tensor

    def of(self, values: Tensor) -> Tensor:
        """Values of samples [T, N, ...] as rows [packs, rows, ...]; 0 in those that are nobody's."""
        return cleared(values.flatten(0, 1)[self.index], self.owner != NOBODY)


def fill(
    tasks: Sequence[int], shots: Sequence[int], queries: Sequence[int], rows: int, most: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Put tasks into packs of so many shots, and at most `most` queries: the tasks pack by pack, and the pack of each.

    Largest first, then whatever fits and brings both sides of a pack nearer to each other: a pack of many small tasks
    would run out of room for queries first. No task may be larger than a pack.
    """
    waiting: dict[int, deque[int]] = {}
    for t in sorted(tasks, key=lambda t: (shots[t], queries[t])):
        waiting.setdefault(shots[t], deque()).append(t)
    order: list[int] = []
    packs: list[int] = []
    pack, room, queue = 0, rows, most
    while waiting:
        sizes = [size for size, alike in waiting.items() if size <= room and queries[alike[0]] <= queue]
        if not sizes:
            pack, room, queue = pack + 1, rows, most
            continue
        # Full of queries before it is full of shots, it wants those that bring more shots, and the other way round.
        size = sizes[-1] if room * most >= queue * rows else sizes[0]
        alike = waiting[size]
        t = alike.pop() if queries[alike[-1]] <= queue else alike.popleft()
        room, queue = room - size, queue - queries[t]
        order.append(t)
        packs.append(pack)
        if not alike:
            del waiting[size]
    return tuple(order), tuple(packs)


def counted(query: Query, task_weight: Tensor | None, share: float | Tensor) -> tuple[Query, float]:
    """Packed query samples that count what the losses of their tasks do, and the share of each of those in that.

    task_weight: of all tasks of the batch [T], or None for 1.  share: what such a loss counts in the sum.
    """
    if task_weight is None:
        assert isinstance(share, float)
        return query, share
    assert query.weight is not None
    assert query.owner is not None
    # Near 1, as 16 bits like it.
    shares = task_weight * share * len(task_weight)
    return replace(query, weight=query.weight * shares[query.owner.clamp_min(0)]), 1.0 / len(task_weight)


def _parts(weight: Tensor | None, counts: Sequence[int], x: Tensor) -> Tensor:
    """What each sample counts in the mean over its task, [T, N], in the dtype that engines work in."""
    weight = masked(weight, present(counts, x.shape[1], x), x)
    part = (x.new_ones(x.shape[:2]) if weight is None else weight).to(compute_dtype(x.dtype))
    return part / part.sum(1, keepdim=True)
