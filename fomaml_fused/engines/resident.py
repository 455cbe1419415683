"""The resident engine: a program a task, in `kernels/resident.py`, on whatever device Triton's active driver serves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..batch import Query, Support
from ..kernels import resident
from ..kernels.configuration import Config
from ..kernels.spec import Spec
from ..problem import Problem
from . import FlatParameters, Gradients, Outcome, Planned
from .launching import (
    compiled_for,
    inner_numbers,
    layers,
    multiprocessors,
    new,
    on_device,
    options,
    pointers,
    reduce,
    split,
    tensors,
)

# The kernels use up to 255 registers a thread, and a multiprocessor has 65,536: room for eight warps of theirs.
WARPS_PER_MULTIPROCESSOR = 8


@lru_cache(maxsize=1024)
def spec_of(problem: Problem, shots: int, queries: int, precision: str, config: Config) -> Spec:
    """What the kernels are compiled for."""
    return Spec(
        **compiled_for(problem, precision),
        samples=config.samples,
        one_support_tile=shots <= config.samples,
        one_query_tile=queries <= config.samples,
    )


@dataclass
class Adapted:
    """The fast weights of a chunk of tasks, as the kernels lay them out: [t, parameters], each at its offset."""

    plan: Planned
    spec: Spec
    weights: Tensor


@dataclass
class Trace:
    """The query pass of a chunk: its outputs [t, Q, out], and the features it ran on."""

    outputs: Tensor
    x: Tensor


def step(
    plan: Planned,
    needed: Sequence[bool],
    parameters: FlatParameters,
    support: Support,
    query: Query,
    share: float | Tensor,
    outputs: Tensor | None = None,
) -> Outcome:
    """The meta-step of a chunk of tasks in two launches; arguments and results as of `batched.step`.

    Args:
        outputs: where the query outputs go, [t, Q, out] float32.
    """
    (tasks, shots, _), queries = support.x.shape, query.x.shape[1]
    if queries == 0:  # weights of nothing would make the gradient 0 / 0, where torch has 0
        query = Query(query.x, query.y)
    spec = _spec(plan, shots, queries)
    device = support.x.device
    programs, length = _programs(plan, tasks, device), spec.parameters
    losses = new(device, tasks)
    dx = new(device, *query.x.shape) if needed[0] else None
    partials = new(device, programs, length) if any(needed[1:]) else None
    shares, share_of_all = (share.contiguous(), 0.0) if isinstance(share, Tensor) else (None, share)
    with on_device(device):
        resident.meta_kernel[programs,](
            *pointers(parameters), inner_numbers(plan.problem, device), *tensors(support), *tensors(query),
            shares, share_of_all, losses, outputs, dx, partials, tasks, shots, queries, plan.problem.inner.steps, spec,
            **_options(plan),
        )  # fmt: skip
        gradient, value = reduce(partials, losses, shares, share_of_all)
    assert value is not None
    return Outcome(value, dx, split(spec, gradient, needed[1:]))


def adapt(plan: Planned, parameters: FlatParameters, support: Support) -> Adapted:
    """Run the inner steps of a chunk of tasks."""
    tasks, shots, _ = support.x.shape
    spec, device = _spec(plan, shots, shots), support.x.device
    weights = new(device, tasks, spec.parameters)
    with on_device(device):
        resident.adapt_kernel[_programs(plan, tasks, device),](
            *pointers(parameters), inner_numbers(plan.problem, device), *tensors(support), weights,
            tasks, shots, plan.problem.inner.steps, spec, **_options(plan),
        )  # fmt: skip
    return Adapted(plan, spec, weights)


def query_pass(adapted: Adapted, x: Tensor) -> Trace:
    """The adapted networks on query features [t, Q, in]."""
    tasks, queries, _ = x.shape
    x = x.contiguous()
    outputs = new(x.device, tasks, queries, adapted.spec.widths[-1])
    with on_device(x.device):
        resident.query_kernel[_programs(adapted.plan, tasks, x.device),](
            adapted.weights, x, outputs, tasks, queries, adapted.spec, **_options(adapted.plan)
        )
    return Trace(outputs, x)


def query_backward(
    adapted: Adapted, trace: Trace, d: Tensor, needed: Sequence[bool], features: bool
) -> tuple[Tensor | None, Gradients]:
    """The query pass in reverse; arguments and results as of `batched.query_backward`."""
    tasks, queries, _ = trace.x.shape
    spec, device = adapted.spec, d.device
    programs, length = _programs(adapted.plan, tasks, device), spec.parameters
    dx = new(device, *trace.x.shape) if features else None
    partials = new(device, programs, length) if any(needed) else None
    with on_device(device):
        resident.query_backward_kernel[programs,](
            adapted.weights, trace.x, d.contiguous(), dx, partials, tasks, queries, spec, **_options(adapted.plan)
        )
        gradient, _ = reduce(partials)
    return dx, split(spec, gradient, needed)


def fast_weights(adapted: Adapted, tasks: slice) -> list[tuple[Tensor, Tensor | None]]:
    """Weights [t, out, in] and biases [t, out] of each layer after the last step."""
    return layers(adapted.spec, adapted.weights[tasks])


def _spec(plan: Planned, shots: int, queries: int) -> Spec:
    assert plan.precision is not None
    assert plan.config is not None
    return spec_of(plan.problem, shots, queries, plan.precision, plan.config)


def _options(plan: Planned) -> dict[str, int | bool]:
    assert plan.config is not None
    return options(plan.config.warps, stages=1)


def _programs(plan: Planned, tasks: int, device: torch.device) -> int:
    """As many programs as the device holds at a time, or fewer: each of them with as many tasks, give or take one."""
    assert plan.config is not None
    most = multiprocessors(device) * max(1, WARPS_PER_MULTIPROCESSOR // plan.config.warps)
    return -(-tasks // -(-tasks // most)) if tasks else 0
