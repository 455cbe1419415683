"""The primal engine: launches `kernels/primal.py`, in which each task has weights of its own in memory.

The plan's engine says how a pass goes through the network: "chained" takes all layers in one launch, activations on
chip; "primal" a launch a layer and direction, its features spread over the device. Samples are under way some rows of
each task at a time, so that what they leave for the gradients is bounded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..batch import Query, Support
from ..inner import PARTS
from . import FlatParameters, Gradients, Outcome, Planned, listed
from .launching import (
    counts,
    layers,
    loss_of_task,
    new,
    of_sound,
    on_device,
    part_of_task,
    passes_that_count,
    products,
    reduce,
    split,
    tensors,
    wanted_layers,
)
from .outer import reptile_outcome, total
from .primal_launches import (
    Adapted,
    Targets,
    blocks,
    launch_options,
    move,
    move_along,
    products_of_tasks,
    run,
    spec_of,
    splits,
    unadapted,
)
from .rules import norm_factor

__all__ = ["adapt", "fast_weights", "query_backward", "query_pass", "spec_of", "step"]


@dataclass
class Trace:
    """The query pass of a chunk: its outputs [t, Q, out], and the features it ran on."""

    outputs: Tensor
    x: Tensor


@dataclass
class Measured:
    """What a query pass gives.

    Attributes:
        dx: the gradient of the query features [T, Q, in].
        losses: of samples, times what they count, [T, Q].
        unit: what losses lack as a factor.
        partials: the outer gradient in parts, [N, parameters]; those of the tasks, where they are needed.
        along: each task's part times the sum of what learned rates have multiplied, [T, parameters].
    """

    dx: Tensor | None
    losses: Tensor | None
    unit: float
    partials: Tensor | None
    along: Tensor | None


def step(
    plan: Planned,
    needed: Sequence[bool],
    parameters: FlatParameters,
    support: Support,
    query: Query | None,
    share: float | Tensor,
) -> Outcome:
    """The meta-step of a chunk of tasks; arguments and results as of `batched.step`."""
    problem = plan.problem
    with on_device(support.x.device):
        if query is None:
            return _reptile(adapt(plan, parameters, support), needed[1:], share)
        counted = passes_that_count(problem, query)
        passes = []
        for adapted in _trajectory(plan, parameters, support):
            if adapted.taken in counted:
                passes.append(_measure(adapted, query, needed, share * counted[adapted.taken]))
        sound, kept = None, None
        if problem.nonfinite == "skip":
            sound = _sound_tasks(adapted, passes, needed[1:])
            kept = (sound * share).sum()
        outcomes = [_outcome(adapted, found, needed[1:], sound) for found in passes]
    value, dx, gradients, _ = outcomes[0] if len(outcomes) == 1 else total(outcomes)
    # The mean over no sample is nan, as torch has it.
    return Outcome(value if query.x.shape[1] or kept is not None else value + math.nan, dx, gradients, kept)


def adapt(plan: Planned, parameters: FlatParameters, support: Support) -> Adapted:
    """Run the inner steps of a chunk of tasks."""
    with on_device(support.x.device):
        *_, adapted = _trajectory(plan, parameters, support)
    return adapted


def query_pass(adapted: Adapted, x: Tensor) -> Trace:
    """The adapted networks on query features [t, Q, in]."""
    x = x.contiguous()
    with on_device(x.device):
        return Trace(_forward(adapted, x), x)


def query_backward(
    adapted: Adapted, trace: Trace, d: Tensor, needed: Sequence[bool], features: bool
) -> tuple[Tensor | None, Gradients]:
    """The query pass in reverse; arguments and results as of `batched.query_backward`. It runs forward anew."""
    with on_device(d.device):
        found = _reverse(adapted, trace.x, Targets(cotangent=d.contiguous()), 1.0, needed, features)
        gradients, _ = _reduced(adapted, found, needed, None)
    return found.dx, gradients


def fast_weights(adapted: Adapted, tasks: slice) -> Gradients:
    """The parameters of each layer after the last step, as of `batched.fast_weights`."""
    count = tasks.stop - tasks.start
    found: list[tuple[Tensor, Tensor | None]] = []
    for (own, own_bias), (weight, bias) in zip(_own(adapted, tasks), _shared(adapted), strict=True):
        same = weight.expand(count, -1, -1), None if bias is None else bias.expand(count, -1)
        found.append(same if own is None else (own, own_bias))
    return listed(found)


def _trajectory(plan: Planned, parameters: FlatParameters, support: Support) -> Iterator[Adapted]:
    """The tasks before the first inner step and after each: one object, which goes on."""
    x, y, weight = tensors(support)
    adapted = unadapted(plan, parameters, x.shape[0], x.device)
    yield adapted
    for k in range(plan.problem.inner.steps):
        if not adapted.moving:
            adapted.taken += 1
        elif support.each_step:
            _step(adapted, *(None if t is None else t[:, k].contiguous() for t in (x, y, weight)))
        else:
            _step(adapted, x, y, weight)
        yield adapted


def _step(adapted: Adapted, x: Tensor | None, y: Tensor | None, weight: Tensor | None) -> None:
    """One inner step on the support samples x [T, S, in]."""
    assert x is not None
    inner, samples = adapted.plan.problem.inner, x.shape[1]
    targets, unit = _support_targets(adapted, x, y, weight)
    rows = list(blocks(adapted, samples))
    parts, length = splits(adapted, samples)
    wanted = adapted.spec.adapts
    if len(rows) == parts == 1 and inner.max_grad_norm is None:
        move(adapted, run(adapted, x, targets, query=False, wanted=wanted), unit)
        return
    partials = new(x.device, adapted.tasks, len(rows) * parts, adapted.spec.parameters)
    for i, block in enumerate(rows):
        passed = run(adapted, x[:, block].contiguous(), targets.at(block), query=False, wanted=wanted)
        products_of_tasks(adapted, passed, unit, partials, i * parts, length, parts)
    if inner.max_grad_norm is not None:
        partials = _clipped(adapted, partials.sum(1), inner.max_grad_norm, inner.max_grad_value)[:, None]
    move_along(adapted, partials)


def _support_targets(adapted: Adapted, x: Tensor, y: Tensor | None, weight: Tensor | None) -> tuple[Targets, float]:
    """What support samples are measured by, and the unit of their gradients."""
    assert y is not None
    problem, samples = adapted.plan.problem, x.shape[1]
    if problem.loss.name == "callable":
        d = loss_of_task(problem, problem.loss, y, weight).gradient(_forward(adapted, x), float(samples))
        return Targets(cotangent=d.contiguous()), 1 / samples
    part = part_of_task(weight)
    return Targets(y, None if part is None else part * samples), 1 / samples


def _clipped(adapted: Adapted, flat: Tensor, norm: float, value: float | None) -> Tensor:
    """Gradients of tasks [T, parameters], no longer than a norm, over all that moves, and their elements."""
    found = [part for i in adapted.moving for part in layers(adapted.spec, flat)[i] if part is not None]
    if value is not None:
        found = [part.clamp_(-value, value) for part in found]
    squares = [part.flatten(1).square().sum(1) for part in found]
    return flat.mul_(norm_factor(torch.stack(squares).sum(0), norm)[:, None])


def _forward(adapted: Adapted, x: Tensor) -> Tensor:
    """The outputs of samples x, [T, N, out]."""
    nothing = [False] * adapted.depth
    rows = blocks(adapted, x.shape[1])
    found = [run(adapted, x[:, block].contiguous(), None, query=True, wanted=nothing).outputs for block in rows]
    return found[0] if len(found) == 1 else torch.cat(found, 1)


def _measure(adapted: Adapted, query: Query, needed: Sequence[bool], share: float | Tensor) -> Measured:
    """The query pass with its losses and as much of their gradients as is needed."""
    problem = adapted.plan.problem
    x, y, weight = tensors(query)
    if problem.outer_loss.name != "callable":
        of_samples, unit = counts(part_of_task(weight), share, *x.shape[:2])
        return _reverse(adapted, x, Targets(y, of_samples), unit, needed[1:], needed[0])
    outputs = _forward(adapted, x)
    loss = loss_of_task(problem, problem.outer_loss, y, weight)
    unit = 1 / max(x.shape[0] * x.shape[1], 1)
    counted = share / unit
    d = loss.gradient(outputs, counted if isinstance(counted, float) else counted[:, None, None])
    found = _reverse(adapted, x, Targets(cotangent=d.contiguous()), unit, needed[1:], needed[0])
    return replace(found, losses=(loss.values(outputs) * counted)[:, None])


def _reverse(
    adapted: Adapted, x: Tensor, targets: Targets, unit: float, needed: Sequence[bool], features: bool
) -> Measured:
    """A query pass, and back as far as is needed."""
    spec, samples = adapted.spec, x.shape[1]
    wanted = wanted_layers(spec, needed)
    rates = any(needed[len(PARTS) * adapted.depth :]) and adapted.directions is not None
    each = any(wanted) and (rates or adapted.plan.problem.nonfinite == "skip")
    rows = list(blocks(adapted, samples))
    parts, length = splits(adapted, samples)
    tasks = new(x.device, adapted.tasks, len(rows) * parts, spec.parameters) if each else None
    partials: list[Tensor] = []
    losses: list[Tensor | None] = []
    dx: list[Tensor | None] = []
    for i, block in enumerate(rows):
        passed = run(
            adapted, x[:, block].contiguous(), targets.at(block), query=True, wanted=wanted, unit=unit,
            features=features,
        )  # fmt: skip
        if tasks is not None:
            products_of_tasks(adapted, passed, unit, tasks, i * parts, length, parts)
        elif any(wanted):
            partials.append(products(spec, launch_options(adapted), passed.inputs, passed.gradients, unit))
        losses.append(passed.losses)
        dx.append(passed.dx)
    if tasks is not None:
        partials = [tasks.sum(1)]
    return Measured(
        dx=_joined(dx, 1),
        losses=_joined(losses, 1),
        unit=unit,
        partials=_joined(partials, 0),
        along=partials[0] * adapted.directions if rates and adapted.directions is not None else None,
    )


def _joined(parts: Sequence[Tensor | None], dim: int) -> Tensor | None:
    present = [part for part in parts if part is not None]
    return None if not present else present[0] if len(present) == 1 else torch.cat(present, dim)


def _outcome(adapted: Adapted, found: Measured, needed: Sequence[bool], sound: Tensor | None) -> Outcome:
    """What a query pass gives of the tasks that count; sound: which do, or None for all."""
    gradients, value = _reduced(adapted, found, needed, sound)
    assert value is not None
    return Outcome(value, None if found.dx is None else of_sound(found.dx, sound), gradients)


def _reduced(
    adapted: Adapted, found: Measured, needed: Sequence[bool], sound: Tensor | None
) -> tuple[Gradients, Tensor | None]:
    """The outer gradients of a query pass, and its losses, if it has any, summed over the tasks that count."""
    partials = None if found.partials is None else of_sound(found.partials, sound)
    losses = None if found.losses is None else of_sound(found.losses, sound).flatten()
    flat, value = reduce(partials, losses, share=found.unit)
    gradients = split(adapted.spec, flat, needed)
    of = len(PARTS) * adapted.depth
    if any(needed[of:]):
        rates = _rate_gradients(adapted, None if found.along is None else of_sound(found.along, sound))
        gradients[of:] = [rate if need else None for rate, need in zip(rates, needed[of:], strict=True)]
    return gradients, value


def _rate_gradients(adapted: Adapted, along: Tensor | None) -> Gradients:
    """The gradient of learned rates, as they are listed, from `along` of all tasks that count."""
    if along is None:
        return [None if rate is None else torch.zeros_like(rate) for rate in adapted.learned]
    found = layers(adapted.spec, -along.sum(0))
    if adapted.spec.rates == "element":  # a layer that stays has none
        pairs = zip(listed(found), adapted.learned, strict=True)
        return [None if rate is None else gradient for gradient, rate in pairs]
    sums = along.new_zeros(1, adapted.depth)
    for i in adapted.moving:
        sums[0, i] = torch.stack([part.sum() for part in found[i] if part is not None]).sum()
    return [sums]


def _sound_tasks(adapted: Adapted, passes: Sequence[Measured], needed: Sequence[bool]) -> Tensor:
    """The tasks whose losses and query gradients are finite in all of some passes, [T]."""
    wanted = wanted_layers(adapted.spec, needed)
    sound = []
    for found in passes:
        assert found.losses is not None
        values = [found.losses, *([] if found.dx is None else [found.dx])]
        if found.partials is not None:
            parts = [layers(adapted.spec, found.partials)[i] for i, want in enumerate(wanted) if want]
            values += [part for pair in parts for part in pair if part is not None]
        sound += [value.flatten(1).isfinite().all(1) for value in values]
        # The mean over no sample is nan.
        sound += [torch.zeros_like(sound[0])] if not found.losses.shape[1] else []
    return torch.stack(sound).all(0)


def _reptile(adapted: Adapted, needed: Sequence[bool], share: float | Tensor) -> Outcome:
    """The meta-step of Reptile: how far the tasks moved."""
    ways: dict[int, Tensor] = {}  # theta_0 - theta_K of each task, by where the parameter is listed
    for i, pairs in enumerate(zip(_shared(adapted), _own(adapted, slice(None)), strict=True)):
        for p, (start, own) in enumerate(zip(*pairs, strict=True), len(PARTS) * i):
            if start is not None and own is not None:
                ways[p] = start - own
    squares = [way.flatten(1).square().sum(1) for way in ways.values()]
    values = torch.stack([new(adapted.inner.device, adapted.tasks).zero_(), *squares]).sum(0) / 2

    def displacements(shares: Tensor, sound: Tensor | None) -> Gradients:
        found: Gradients = [None] * len(needed)
        for p, way in ways.items():
            if needed[p]:
                found[p] = torch.tensordot(shares, of_sound(way, sound), 1)
        return found

    return reptile_outcome(adapted.plan.problem, values, share, displacements)


def _shared(adapted: Adapted) -> list[tuple[Tensor, Tensor | None]]:
    """Weights and biases that tasks start from, in float32."""
    pairs = zip(adapted.weights, adapted.biases, strict=True)
    return [(weight.float(), None if bias is None else bias.float()) for weight, bias in pairs if weight is not None]


def _own(adapted: Adapted, tasks: slice) -> list[tuple[Tensor | None, Tensor | None]]:
    """Weights [t, out, in] and biases [t, out] of tasks; of layers that do not move there are none."""
    if adapted.fast is None:
        return [(None, None)] * adapted.depth
    found = layers(adapted.spec, adapted.fast[tasks])
    return [pair if moves else (None, None) for pair, moves in zip(found, adapted.spec.adapts, strict=True)]
