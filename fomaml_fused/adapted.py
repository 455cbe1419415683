"""What `adapt` returns: the networks of a batch of tasks after their inner steps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from . import reference
from .autograd import AdaptedTasks, predict
from .batch import check_query_features
from .engines import FlatParameters
from .problem import Problem


class AdaptedMLP:
    """The adapted networks of T tasks; a snapshot, which later changes of the model do not touch.

    Calling it is differentiable to first order with respect to the meta-parameters and the query features.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str | None],
        tasks: AdaptedTasks,
        parameters: Callable[[], FlatParameters],
    ) -> None:
        """Of a model whose parameters, as they are now, a call gives; names: what the model calls them."""
        self._model, self._names, self._tasks, self._parameters = model, names, tasks, parameters
        self._like = next(p for p in tasks.parameters if p is not None)

    def __len__(self) -> int:
        """How many tasks there are."""
        return self._tasks.plan.sizes.tasks

    def __call__(self, query_x: Tensor) -> Tensor:
        """Outputs [T, Q, out] for query features [T, Q, in]."""
        if torch.compiler.is_compiling():
            from .outside import OUTSIDE  # which imports torch's compiler

            outputs: Tensor = OUTSIDE["objects"](self, query_x)
            return outputs
        query_x = check_query_features(self._tasks.plan.problem, self._like, len(self), query_x)
        return predict(self._tasks, query_x, self._parameters())

    def weights(self) -> dict[str, Tensor]:
        """Every task's parameters by name, [T, ...], detached. This holds T networks in memory."""
        return self._weights(range(len(self)))

    def task(self, i: int) -> nn.Module:
        """The network of task `i`, -T <= i < T: a copy of the model with the adapted parameters.

        Raises:
            IndexError: there is no such task.
        """
        i = _task_index(i, len(self))
        return _with_weights(self._model, {n: value[0] for n, value in self._weights(range(i, i + 1)).items()})

    @torch.no_grad()
    def _weights(self, tasks: range) -> dict[str, Tensor]:
        dtype = self._like.dtype
        collected: dict[str, list[Tensor]] = {name: [] for name in self._names if name is not None}
        for i, chunk in enumerate(self._tasks.slices):
            start, stop = max(tasks.start, chunk.start), min(tasks.stop, chunk.stop)
            if start >= stop:
                continue
            found = self._tasks.fast_weights(i, slice(start - chunk.start, stop - chunk.start))
            for name, value in zip(self._names, found, strict=True):
                if name is not None and value is not None:
                    collected[name].append(value.to(dtype))
        shapes = {name: parameter.shape for name, parameter in self._model.named_parameters()}
        return {
            name: torch.cat(values) if values else self._like.new_empty(0, *shapes[name])
            for name, values in collected.items()
        }


class ReferenceAdapted:
    """As `AdaptedMLP`, from the fast weights that the oracle gave for each task."""

    def __init__(self, model: nn.Module, problem: Problem, fast: list[dict[str, Tensor]]) -> None:
        # A layer that does not move still is the model's own, and a snapshot has its own.
        self._fast = [{name: value.clone() for name, value in weights.items()} for weights in fast]
        self._model, self._problem = model, problem

    def __len__(self) -> int:
        """How many tasks there are."""
        return len(self._fast)

    def __call__(self, query_x: Tensor) -> Tensor:
        """Outputs [T, Q, out] for query features [T, Q, in]."""
        like = next(iter(self._fast[0].values() if self._fast else self._model.parameters()))
        query_x = check_query_features(self._problem, like, len(self), query_x)
        return reference.run_tasks(self._model, self._fast, query_x)

    def weights(self) -> dict[str, Tensor]:
        """Every task's parameters by name, [T, ...], detached."""
        if not self._fast:
            return {name: p.detach().new_empty(0, *p.shape) for name, p in self._model.named_parameters()}
        return {name: torch.stack([weights[name].detach() for weights in self._fast]) for name in self._fast[0]}

    def task(self, i: int) -> nn.Module:
        """The network of task `i`: a copy of the model with the adapted parameters."""
        return _with_weights(self._model, self._fast[_task_index(i, len(self))])


def _task_index(i: int, tasks: int) -> int:
    if not -tasks <= i < tasks:
        raise IndexError(f"task {i} of {tasks} tasks")
    return i % tasks


@torch.no_grad()
def _with_weights(model: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    """A copy of the model with other parameters."""
    model = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        parameter.data = weights[name].clone()
    return model
