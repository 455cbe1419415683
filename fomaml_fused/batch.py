"""A batch of tasks: what a user passes in, checked once against the problem and the network's parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .problem import Loss, Network, Problem


@dataclass(frozen=True)
class Sizes:
    """The sizes of a batch: what a plan depends on beside the problem.

    Attributes:
        shots, queries: support and query samples of a task.
        each_step: whether every inner step has support samples of its own.
        packed: whether tasks are packs, of samples of several tasks of unequal sizes.
    """

    tasks: int
    shots: int
    queries: int
    dtype: torch.dtype
    device: torch.device
    each_step: bool = False
    packed: bool = False

    def __post_init__(self) -> None:
        for name in ("tasks", "shots", "queries"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it takes a whole number, 0 or more")


@dataclass(frozen=True)
class Support:
    """Support sets: `x` [T, S, in], `y` [T, S] class indices or [T, S, out], `weight` [T, S] or None.

    Or one of each at every inner step: [T, K, S, in], [T, K, S] or [T, K, S, out], [T, K, S].

    Attributes:
        owner: in packs of tasks, each of which counts as a task above, the task that a sample is of [T, S], int32. Then
            weights are parts: those of a task's samples add up to what the task counts.
    """

    x: Tensor
    y: Tensor
    weight: Tensor | None = None
    owner: Tensor | None = None

    @property
    def each_step(self) -> bool:
        """Whether every inner step has samples of its own."""
        return self.x.dim() == 4

    def tasks(self, which: slice) -> Support:
        """Some of the tasks, as views."""
        if which == slice(0, self.x.shape[0]):
            return self
        weight, owner = (None if w is None else w[which] for w in (self.weight, self.owner))
        return Support(self.x[which], self.y[which], weight, owner)

    def clone(self) -> Support:
        """A copy that later changes of the tensors do not touch."""
        weight, owner = (None if w is None else w.clone() for w in (self.weight, self.owner))
        return Support(self.x.clone(), self.y.clone(), weight, owner)


@dataclass(frozen=True)
class Query:
    """Query sets with their targets, as `Support`.

    Attributes:
        task_weight: [T] or None.
        step_weights: what the query loss after each inner step counts, [K]; None for the last one alone.
        owner: [T, Q], as of `Support`.
    """

    x: Tensor
    y: Tensor
    weight: Tensor | None = None
    task_weight: Tensor | None = None
    step_weights: tuple[float, ...] | None = None
    owner: Tensor | None = None

    def tasks(self, which: slice) -> Query:
        """Some of the tasks, as views."""
        if which == slice(0, self.x.shape[0]):
            return self
        weight, task_weight, owner = (
            None if w is None else w[which] for w in (self.weight, self.task_weight, self.owner)
        )
        return Query(self.x[which], self.y[which], weight, task_weight, self.step_weights, owner)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype an engine works in: float32 for 16-bit parameters, else their own."""
    return torch.float32 if dtype.itemsize < torch.float32.itemsize else dtype


def cast_targets(y: Tensor, dtype: torch.dtype) -> Tensor:
    """Targets in the dtype of the outputs they are compared with; class indices stay what they are."""
    return y.to(dtype) if y.is_floating_point() else y


def present(counts: Sequence[int], most: int, like: Tensor) -> Tensor | None:
    """Which samples there are, [t, most]; None for all."""
    if all(n == most for n in counts):
        return None
    return torch.arange(most, device=like.device) < torch.tensor(counts, device=like.device)[:, None]


def cleared(values: Tensor, there: Tensor | None) -> Tensor:
    """Samples, 0 where there are none: a weight of 0 would not keep out what is not finite."""
    if there is None:
        return values
    return torch.where(there.view(*there.shape, *[1] * (values.dim() - there.dim())), values, 0)


def masked(weight: Tensor | None, there: Tensor | None, like: Tensor) -> Tensor | None:
    """Weights of samples, 0 where there are none."""
    if there is None:
        return weight
    return there.to(like.dtype) if weight is None else torch.where(there, weight, 0.0)


def check_support(problem: Problem, like: Tensor, x: Tensor, y: Tensor, weight: Tensor | None = None) -> Support:
    """The support sets of a batch, or the error that says what is wrong with them.

    Args:
        like: one of the network's parameters; the data share its dtype and device.
        x: [T, S, in], or [T, K, S, in] for samples of their own at every inner step.
        y: [T, S] int64 class indices for cross-entropy, else [T, S, out]; or with the axis of steps.
        weight: a weight per sample [T, S], bool or the dtype of `like`; or with the axis of steps.

    Raises:
        TypeError: an argument is not a tensor, or has the wrong dtype.
        ValueError: wrong rank, sizes that differ, another device, no sample to adapt on, a class out of range.
    """
    each_step = isinstance(x, Tensor) and x.dim() == 4
    _check_features("support_x", x, problem.network, like, 4 if each_step else 3)
    _check_targets("support_y", y, "support_x", x, problem.loss, problem.network, like)
    shape_name = "[tasks, steps, shots]" if each_step else "[tasks, shots]"
    weight = _check_weight("support_weight", weight, x.shape[:-1], like, shape_name)
    steps = problem.inner.steps
    if each_step and x.shape[1] != steps:
        raise ValueError(f"support_x has samples of {x.shape[1]} steps, {list(x.shape)}; there are {steps} steps")
    if x.shape[-2] == 0 and steps > 0:
        raise ValueError(f"support_x has no sample: {list(x.shape)}; each of the {steps} steps takes one")
    _check_statistics("support_x", x, problem.network)
    return Support(_ordinary(x.detach()), _ordinary(y.detach()), weight)


def check_query(
    problem: Problem,
    like: Tensor,
    tasks: int,
    x: Tensor,
    y: Tensor,
    weight: Tensor | None = None,
    task_weight: Tensor | None = None,
) -> Query:
    """The query sets of a batch of `tasks` tasks; arguments and errors as for `check_support`.

    Args:
        x: [T, Q, in].  y: [T, Q] or [T, Q, out].  weight: [T, Q].  task_weight: [T].
    """
    x = check_query_features(problem, like, tasks, x)
    _check_targets("query_y", y, "query_x", x, problem.outer_loss, problem.network, like)
    weight = _check_weight("query_weight", weight, x.shape[:2], like, "[tasks, queries]")
    return Query(x, _ordinary(y), weight, check_task_weight(task_weight, tasks, like))


def check_task_weight(weight: Tensor | None, tasks: int, like: Tensor) -> Tensor | None:
    """A weight per task [T], or the error that says what is wrong with it."""
    return _check_weight("task_weight", weight, torch.Size([tasks]), like, "[tasks]")


def check_query_features(problem: Problem, like: Tensor, tasks: int, x: Tensor) -> Tensor:
    """The features of query sets alone; raises what `check_query` raises for them."""
    _check_features("query_x", x, problem.network, like)
    if x.shape[0] != tasks:
        raise ValueError(
            f"query_x has {x.shape[0]} tasks, support_x has {tasks}; both hold one row of samples per task: "
            "[tasks, samples, features]"
        )
    _check_statistics("query_x", x, problem.network)
    return _ordinary(x)


def check_parameters(parameters: Sequence[Tensor | None]) -> None:
    """Raises a ValueError where parameters of a model, as engines list them, differ in dtype or device."""
    like = parameters[0]
    assert like is not None
    for p in parameters:
        if p is not None and (p.dtype != like.dtype or p.device != like.device):
            raise ValueError(
                f"model has parameters of {like.dtype} on {like.device} and of {p.dtype} on {p.device}; "
                "all take the same dtype and device"
            )


def _ordinary(value: Tensor) -> Tensor:
    """The tensor; or where it was made in inference mode, and there is autograd now, a copy that autograd takes."""
    return value.clone() if value.is_inference() and not torch.is_inference_mode_enabled() else value


def _check_tensor(name: str, value: object, like: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is {type(value).__name__}; it takes a torch.Tensor")
    if value.device != like.device:
        raise ValueError(f"{name} is on {value.device}, the model is on {like.device}; both take the same device")


def _check_dtype(name: str, value: Tensor, dtype: torch.dtype, reason: str) -> None:
    if value.dtype != dtype:
        raise TypeError(f"{name} is {value.dtype}; it takes {dtype}, {reason}")


def _check_features(name: str, x: Tensor, network: Network, like: Tensor, dims: int = 3) -> None:
    _check_tensor(name, x, like)
    if x.dim() != dims:
        raise ValueError(f"{name} has shape {list(x.shape)}; it takes [tasks, samples, features]")
    if x.shape[-1] != network.in_features:
        raise ValueError(f"{name} has {x.shape[-1]} features; the network takes {network.in_features}")
    _check_dtype(name, x, like.dtype, "as the model")


def _check_statistics(name: str, x: Tensor, network: Network) -> None:
    """A BatchNorm takes the statistics of a task's samples, as torch's own does in training."""
    if network.mixes_samples and x.shape[-2] == 1:
        raise ValueError(f"{name} has one sample a task, {list(x.shape)}; a BatchNorm takes more than one")


def _check_targets(name: str, y: Tensor, x_name: str, x: Tensor, loss: Loss, network: Network, like: Tensor) -> None:
    _check_tensor(name, y, like)
    samples = x.dim() - 1  # dimensions of tasks and samples
    if y.shape[:samples] != x.shape[:samples]:
        raise ValueError(
            f"{name} has shape {list(y.shape)}, {x_name} has {list(x.shape)}; both take the same [tasks, samples, ...]"
        )
    if loss.name == "callable":  # what its targets are, the callable knows
        return
    if loss.takes_classes:
        if y.dim() != samples:
            raise ValueError(f"{name} has shape {list(y.shape)}; {loss.name} takes class indices [tasks, samples]")
        _check_dtype(name, y, torch.int64, "as class indices")
        # Reading the values would stall a device, so there it is done only in torch's own debugging mode.
        if y.numel() and (y.device.type == "cpu" or torch.is_anomaly_enabled()):
            low, high = (int(bound) for bound in torch.aminmax(y))
            if low < 0 or high >= network.out_features:
                raise ValueError(
                    f"{name} holds classes {low} to {high}; the network has {network.out_features} outputs, "
                    f"so it takes 0 to {network.out_features - 1}"
                )
    else:
        if y.dim() != samples + 1 or y.shape[-1] != network.out_features:
            raise ValueError(
                f"{name} has shape {list(y.shape)}; {loss.name} takes [tasks, samples, outputs], "
                f"{[*x.shape[:-1], network.out_features]}"
            )
        _check_dtype(name, y, like.dtype, "as the model")


def _check_weight(name: str, weight: Tensor | None, shape: torch.Size, like: Tensor, shape_name: str) -> Tensor | None:
    if weight is None:
        return None
    _check_tensor(name, weight, like)
    if weight.shape != shape:
        raise ValueError(f"{name} has shape {list(weight.shape)}; it takes {shape_name}, {list(shape)}")
    if weight.dtype == torch.bool:
        return weight.to(like.dtype)
    _check_dtype(name, weight, like.dtype, "as the model, or torch.bool")
    return _ordinary(weight)
