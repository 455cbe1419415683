"""What `adapt` returns: the networks of a batch of tasks after their inner steps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import reference
from .autograd import AdaptedTasks, FlatParameters, predict


class AdaptedMLP:
    """The adapted networks of T tasks; a snapshot, which later changes of the model do not touch.

    Calling it is differentiable to first order with respect to the meta-parameters and the query features.
    """

    def __init__(
        self,
        model: nn.Module,
        names: tuple[tuple[str, str | None], ...],
        tasks: AdaptedTasks,
        parameters: FlatParameters,
        check_query: Callable[[int, Tensor], None],
    ) -> None:
        """names: of each layer's weight and bias among the model's parameters."""
        self._model, self._names, self._tasks, self._parameters = model, names, tasks, parameters
        self._check_query = check_query

    def __len__(self) -> int:
        return self._tasks.plan.sizes.tasks

    def __call__(self, query_x: Tensor) -> Tensor:
        """Outputs [T, Q, out] for query features [T, Q, in]."""
        self._check_query(len(self), query_x)
        return predict(self._tasks, query_x, self._parameters)

    def weights(self) -> dict[str, Tensor]:
        """Every task's parameters by name, [T, *shape], detached. This holds T networks in memory."""
        return self._weights(range(len(self)))

    def task(self, i: int) -> nn.Module:
        """The network of task `i`, -T <= i < T: a copy of the model with the adapted parameters.

        Raises:
            IndexError: there is no such task.
        """
        if not -len(self) <= i < len(self):
            raise IndexError(f"task {i} of {len(self)} tasks")
        i %= len(self)
        model = copy.deepcopy(self._model)
        model.load_state_dict({name: value[0] for name, value in self._weights(range(i, i + 1)).items()})
        return model

    @torch.no_grad()
    def _weights(self, tasks: range) -> dict[str, Tensor]:
        dtype = next(p.dtype for p in self._parameters if p is not None)
        collected: dict[str, list[Tensor]] = {name: [] for pair in self._names for name in pair if name is not None}
        for chunk in self._tasks:
            start, stop = max(tasks.start, chunk.start), min(tasks.stop, chunk.start + chunk.length)
            if start >= stop:
                continue
            for layer, pair in zip(chunk.adapted.layers, self._names, strict=True):
                values = layer.adapted(slice(start - chunk.start, stop - chunk.start))
                for name, value in zip(pair, values, strict=True):
                    if name is not None and value is not None:
                        collected[name].append(value.to(dtype))
        shapes = {name: parameter.shape for name, parameter in self._model.named_parameters()}
        return {
            name: torch.cat(values) if values else torch.empty(0, *shapes[name], dtype=dtype)
            for name, values in collected.items()
        }


class ReferenceAdapted:
    """As `AdaptedMLP`, from the fast weights that the oracle gave for each task."""

    def __init__(
        self, model: nn.Module, fast: list[dict[str, Tensor]], check_query: Callable[[int, Tensor], Any]
    ) -> None:
        self._model, self._fast, self._check_query = model, fast, check_query

    def __len__(self) -> int:
        return len(self._fast)

    def __call__(self, query_x: Tensor) -> Tensor:
        """Outputs [T, Q, out] for query features [T, Q, in]."""
        self._check_query(len(self), query_x)
        return reference.run_tasks(self._model, self._fast, query_x)

    def weights(self) -> dict[str, Tensor]:
        """Every task's parameters by name, [T, *shape], detached."""
        return {
            name: torch.stack([f[name].detach() for f in self._fast]) for name in dict(self._model.named_parameters())
        }

    def task(self, i: int) -> nn.Module:
        """The network of task `i`: a copy of the model with the adapted parameters."""
        model = copy.deepcopy(self._model)
        model.load_state_dict({name: value.detach() for name, value in self._fast[i].items()})
        return model
