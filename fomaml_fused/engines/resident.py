"""The resident engine: a program a task, in `kernels/resident.py`, on whatever device Triton's active driver serves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..batch import Query, Support
from ..inner import PARTS
from ..kernels import resident
from ..kernels.configuration import Config
from ..kernels.spec import Spec, gradients_length
from ..problem import Problem
from . import FlatParameters, Gradients, Outcome, Planned, listed, rates_of
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
def spec_of(
    problem: Problem, shots: int, queries: int, precision: str, config: Config, each_step: bool = False
) -> Spec:
    """What the kernels are compiled for; each_step: whether every step has support samples of its own."""
    described = compiled_for(problem, precision) | rules_of(problem) | {"each_step": each_step}
    return Spec(
        **described,
        samples=config.samples,
        one_support_tile=shots <= config.samples,
        one_query_tile=queries <= config.samples,
    )


def rules_of(problem: Problem) -> dict[str, Any]:
    """The rules that the kernels are compiled for."""
    inner = problem.inner
    # The first step has no velocity yet, but Nesterov's adds it to the gradient that it comes from.
    momentum = inner.momentum > 0.0 and (inner.steps > 1 or inner.nesterov)
    adam = inner.optimizer == "adam"
    return {
        "momentum": momentum,
        "nesterov": momentum and inner.nesterov,
        "adam": adam,
        "clips_value": inner.max_grad_value is not None,
        "clips_norm": inner.max_grad_norm is not None,
        # Where nothing is remembered of a gradient, there is nothing to keep decay out of.
        "decoupled": inner.weight_decay > 0.0 and inner.decoupled and (momentum or adam),
        "reptile": problem.outer == "reptile",
        # Without a step, it is the query loss of the parameters themselves that counts.
        "multi_step": problem.multi_step and inner.steps > 0,
        "skips": problem.nonfinite == "skip",
        "learns": inner.learn_lr is not None,
    }


@dataclass
class Adapted:
    """The fast weights of a chunk of tasks, as the kernels lay them out: [t, parameters], each at its offset.

    Attributes:
        directions: the sum of what learned rates have multiplied, alike.
    """

    plan: Planned
    spec: Spec
    weights: Tensor
    directions: Tensor | None


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
    query: Query | None,
    share: float | Tensor,
    outputs: Tensor | None = None,
) -> Outcome:
    """The meta-step of a chunk of tasks in two launches; arguments and results as of `batched.step`.

    A task that is skipped has a loss, or a gradient where one of parameters is asked for, that is not finite.

    Args:
        outputs: where the query outputs go, [t, Q, out] float32.
    """
    tasks, queries = support.x.shape[0], 0 if query is None else query.x.shape[1]
    if query is not None and queries == 0:  # weights of nothing would make the gradient 0 / 0, where torch has 0
        query = Query(query.x, query.y, step_weights=query.step_weights)
    spec, device = _spec(plan, support, queries), support.x.device
    programs, length = _programs(plan, tasks, device), gradients_length(spec)
    losses = new(device, tasks)
    kept = new(device, tasks) if spec.skips else None
    dx = None
    if needed[0] and query is not None:
        dx = torch.zeros(query.x.shape, device=device) if spec.multi_step else new(device, *query.x.shape)
    partials = new(device, programs, length) if any(needed[1:]) else None
    shares, share_of_all = (share.contiguous(), 0.0) if isinstance(share, Tensor) else (None, share)
    samples = (None, None, None) if query is None else tensors(query)
    step_weights = None
    if spec.multi_step and query is not None and query.step_weights is not None:
        step_weights = _numbers(query.step_weights, device)
    with on_device(device):
        resident.meta_kernel[programs,](
            *_parameters(plan, parameters, device), *tensors(support), *samples,
            step_weights, shares, share_of_all, losses, kept, outputs, dx, partials,
            tasks, support.x.shape[-2], queries, plan.problem.inner.steps, spec, **_options(plan),
        )  # fmt: skip
        gradient, value = reduce(partials, losses, shares, share_of_all)
    assert value is not None
    total = None if kept is None else (kept * share).sum()
    return Outcome(value, dx, _split(spec, gradient, needed[1:]), total)


def adapt(plan: Planned, parameters: FlatParameters, support: Support) -> Adapted:
    """Run the inner steps of a chunk of tasks."""
    tasks, shots = support.x.shape[0], support.x.shape[-2]
    spec, device = _spec(plan, support, shots), support.x.device
    weights = new(device, tasks, spec.parameters)
    directions = new(device, tasks, spec.parameters) if spec.learns else None
    with on_device(device):
        resident.adapt_kernel[_programs(plan, tasks, device),](
            *_parameters(plan, parameters, device), *tensors(support), weights, directions,
            tasks, shots, plan.problem.inner.steps, spec, **_options(plan),
        )  # fmt: skip
    return Adapted(plan, spec, weights, directions)


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
    programs, length = _programs(adapted.plan, tasks, device), gradients_length(spec)
    dx = new(device, *trace.x.shape) if features else None
    partials = new(device, programs, length) if any(needed) else None
    with on_device(device):
        resident.query_backward_kernel[programs,](
            adapted.weights, adapted.directions, trace.x, d.contiguous(), dx, partials, tasks, queries, spec,
            **_options(adapted.plan),
        )  # fmt: skip
        gradient, _ = reduce(partials)
    return dx, _split(spec, gradient, needed)


def fast_weights(adapted: Adapted, tasks: slice) -> Gradients:
    """The parameters of each layer after the last step, as of `batched.fast_weights`."""
    return listed(layers(adapted.spec, adapted.weights[tasks]))


def _spec(plan: Planned, support: Support, queries: int) -> Spec:
    assert plan.precision is not None
    assert plan.config is not None
    return spec_of(plan.problem, support.x.shape[-2], queries, plan.precision, plan.config, support.each_step)


def _parameters(plan: Planned, parameters: FlatParameters, device: torch.device) -> tuple[Any, ...]:
    """Parameters, numbers of the inner loop, and learned rates, as the kernels take them."""
    rates = [rate for rate in rates_of(plan.problem, parameters) if rate is not None]
    learned = rates[0].contiguous().to(torch.float32) if rates else None
    own = parameters[: len(PARTS) * plan.problem.network.depth]
    return *pointers(own), inner_numbers(plan.problem, device), learned


def _split(spec: Spec, flat: Tensor | None, needed: Sequence[bool]) -> Gradients:
    """The gradients asked for; that of learned rates comes last, [1, layers]."""
    depth = len(spec.activations)
    found = split(spec, flat, needed[: len(PARTS) * depth])
    for need in needed[len(PARTS) * depth :]:
        found.append(flat[None, spec.parameters :][:, :depth] if need and flat is not None else None)
    return found


@lru_cache(maxsize=1024)  # annealed weights are others in every step
def _numbers(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float32, device=device)


def _options(plan: Planned) -> dict[str, int | bool]:
    assert plan.config is not None
    return options(plan.config.warps, stages=1)


def _programs(plan: Planned, tasks: int, device: torch.device) -> int:
    """As many programs as the device holds at a time, or fewer: each of them with as many tasks, give or take one."""
    assert plan.config is not None
    most = multiprocessors(device) * max(1, WARPS_PER_MULTIPROCESSOR // plan.config.warps)
    return -(-tasks // -(-tasks // most)) if tasks else 0
