"""The dual engine: launches `kernels/dual.py`, in which no task has weights of its own.

The plan's engine says how: "dual" runs all inner steps of a pack of tasks in one launch and its query pass in another;
"layered" takes a launch a layer, and spreads the layer's features over the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..batch import Query, Support
from ..inner import PARTS
from ..kernels.configuration import DualConfig
from . import FlatParameters, Gradients, Outcome, Planned, listed
from .dual_history import clip, collapse, displacement, distances, fold, rate_gradients, weights_after
from .dual_launches import (
    Adapted,
    Layers,
    Samples,
    backward_layer,
    backward_shared_layer,
    contract,
    forward_layer,
    inner_steps,
    numbers,
    pending_steps,
    query_layers,
    query_samples,
    sample_losses,
    spec_of,
    step_layer,
    support_samples,
)
from .launching import counts as counts_of
from .launching import (
    loss_of_task,
    new,
    of_sound,
    on_device,
    part_of_task,
    passes_that_count,
    pointers,
    reduce,
    split,
    wanted_layers,
)
from .launching import tensors as contiguous
from .outer import reptile_outcome, total

__all__ = ["adapt", "fast_weights", "pending_steps", "query_backward", "query_pass", "spec_of", "step"]


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
            return _reptile(adapt(plan, parameters, support), support.x.shape[0], needed, share)
        counted = passes_that_count(problem, query)
        skips = problem.nonfinite == "skip"
        samples: Samples | None = None
        passes: list[Samples] = []
        outcomes: list[Outcome] = []
        for adapted in _trajectory(plan, parameters, support, every=problem.multi_step):
            if adapted.taken in counted:
                samples = query_samples(adapted, query.x.contiguous(), samples, query.owner)
                _measure(adapted, samples, query, needed, share * counted[adapted.taken])
                if skips:
                    passes.append(samples)
                else:
                    outcomes.append(_outcome(adapted, samples, needed))
        kept = None
        if skips:
            sound = _sound_tasks(passes)
            kept = (sound * share).sum()
            outcomes = [_outcome(adapted, _without(samples, sound), needed) for samples in passes]
    value, dx, gradients, _ = outcomes[0] if len(outcomes) == 1 else total(outcomes)
    # The mean over no sample is nan, as torch has it.
    return Outcome(value if query.x.shape[1] or skips else value + math.nan, dx, gradients, kept)


def adapt(plan: Planned, parameters: FlatParameters, support: Support) -> Adapted:
    """Run the inner steps of a chunk of tasks."""
    with on_device(support.x.device):
        *_, adapted = _trajectory(plan, parameters, support, every=False)
    return adapted


def query_pass(adapted: Adapted, x: Tensor) -> Samples:
    """The adapted networks on query features [t, Q, in]."""
    with on_device(x.device):
        samples = query_samples(adapted, x.contiguous())
        _query(adapted, samples)
    return samples


def query_backward(
    adapted: Adapted, samples: Samples, d: Tensor, needed: Sequence[bool], features: bool
) -> tuple[Tensor | None, Gradients]:
    """The query pass in reverse; arguments and results as of `batched.query_backward`."""
    with on_device(d.device):
        lowest = _want(adapted, samples, needed, features)
        _query(adapted, samples, lowest, cotangent=d.contiguous())
        _, gradients = _gradients(adapted, samples, needed)
    return samples.dx, gradients


def fast_weights(adapted: Adapted, tasks: slice) -> Gradients:
    """The parameters of each layer after the last step, as of `batched.fast_weights`."""
    count = tasks.stop - tasks.start
    layers: list[tuple[Tensor, Tensor | None]] = []
    for i, (weight, bias) in enumerate(zip(adapted.weights, adapted.biases, strict=True)):
        assert weight is not None
        if (own := adapted.own.get(i)) is not None:
            layers.append((own.weight[tasks], None if own.bias is None else own.bias[tasks]))
        elif adapted.spec.adapts[i]:
            layers.append(weights_after(adapted, i, adapted.taken, tasks))
        else:
            fast = weight.float().expand(count, -1, -1)
            layers.append((fast, None if bias is None else bias.float().expand(count, -1)))
    return listed(layers)


def _trajectory(plan: Planned, parameters: FlatParameters, support: Support, *, every: bool) -> Iterator[Adapted]:
    """The tasks after the last inner step, and if `every` one is asked for, after each: one object, which goes on."""
    assert plan.precision is not None
    assert isinstance(plan.config, DualConfig)
    problem, device, tasks, shots = plan.problem, support.x.device, support.x.shape[0], support.x.shape[-2]
    inner, depth, widths = problem.inner, problem.network.depth, problem.network.widths
    steps, first = inner.steps, inner.first_adapted
    packed = support.owner is not None
    spec = spec_of(problem, shots, plan.precision, plan.config, plan.forms, support.each_step, packed)
    inputs: Layers = [None] * depth
    gradients: Layers = [None] * depth
    shared = pointers(parameters[: len(PARTS) * depth])
    of_all = numbers(problem, parameters, device)
    at_least = max(shots, 1), max(steps, 1)
    adapted = Adapted(plan, spec, of_all, *shared, inputs, gradients, *at_least, owner=support.owner)
    points = range(1 if every and steps else steps, steps + 1)
    if first == depth:
        for k in points:
            adapted.taken = k
            yield adapted
        return
    x, y, weight = contiguous(support)
    samples = support_samples(adapted, x)
    inputs[first] = samples.inputs[first]
    for i in range(first, depth):
        if i > first:
            inputs[i] = new(device, tasks, steps, shots, widths[i])
        rows = (shots,) if adapted.collapses(i) else (steps, shots)
        gradients[i] = new(device, tasks, *rows, widths[i + 1])
    samples.inputs[:depth], samples.gradients = inputs, gradients
    counts = _parts(support, weight)
    one_matrix, velocity = adapted.collapses(first), None
    each = inner.max_grad_norm is not None or inner.learn_lr is not None or (every and plan.engine == "dual")
    if one_matrix and each:
        adapted.first_gradients = new(device, tasks, steps, shots, widths[first + 1])
    if one_matrix and spec.momentum and (plan.engine == "dual" or not each):
        velocity = new(device, tasks, shots, widths[first + 1])
    if plan.engine == "layered":
        yield from _layer_by_layer(adapted, samples, y, weight, counts, velocity)
        return
    inner_steps(adapted, samples, y, counts, velocity)
    for k in points:
        adapted.taken = k
        if one_matrix and every:
            collapse(adapted, k)
        yield adapted


def _layer_by_layer(
    adapted: Adapted,
    samples: Samples,
    y: Tensor,
    weight: Tensor | None,
    counts: Tensor | None,
    velocity: Tensor | None,
) -> Iterator[Adapted]:
    """All inner steps, layer by layer; the tasks after each."""
    problem, inner, first = adapted.plan.problem, adapted.plan.problem.inner, adapted.first
    if adapted.first_gradients is not None:
        samples.gradients = [*samples.gradients[:first], adapted.first_gradients, *samples.gradients[first + 1 :]]
    for k in range(inner.steps):
        for i in range(first, adapted.depth):
            forward_layer(adapted, samples, i, k, query=False)
        cotangent = None
        if problem.loss.name == "callable":
            own = (y[:, k], None if weight is None else weight[:, k]) if adapted.spec.each_step else (y, weight)
            cotangent = loss_of_task(problem, problem.loss, *own).gradient(samples.outputs, 1.0).contiguous()
        sample_losses(adapted, samples, k, y=y, counts=counts, cotangent=cotangent, velocity=velocity, query=False)
        for i in range(adapted.depth - 1, first, -1):
            backward_layer(adapted, samples, i, k, velocity=velocity, query=False)
        if inner.max_grad_norm is not None:
            clip(adapted, k)
        if adapted.first_gradients is not None:
            collapse(adapted, k + 1)
        for i, layer in adapted.own.items():
            step_layer(adapted, i, layer, k)
        fold(adapted, k + 1)
        adapted.taken = k + 1
        yield adapted


def _reptile(adapted: Adapted, tasks: int, needed: Sequence[bool], share: float | Tensor) -> Outcome:
    """The meta-step of Reptile: how far the tasks moved."""
    return reptile_outcome(
        adapted.plan.problem,
        distances(adapted, tasks),
        share,
        lambda shares, sound: displacement(adapted, shares, needed[1:], sound),
    )


def _measure(adapted: Adapted, samples: Samples, query: Query, needed: Sequence[bool], share: float | Tensor) -> None:
    """The query pass with its losses and as much of their gradients as is needed."""
    x, y, weight = contiguous(query)
    lowest = _want(adapted, samples, needed[1:], needed[0])
    problem = adapted.plan.problem
    if problem.outer_loss.name != "callable":
        counts, samples.unit = counts_of(_parts(query, weight), share, *x.shape[:2])
        samples.losses = new(x.device, *x.shape[:2])
        _query(adapted, samples, lowest, y=y, counts=counts)
        return
    _query(adapted, samples)
    loss = loss_of_task(problem, problem.outer_loss, y, weight)
    samples.losses = (loss.values(samples.outputs) * share)[:, None]
    if lowest < adapted.depth:
        d = loss.gradient(samples.outputs, share if isinstance(share, float) else share[:, None, None])
        _query(adapted, samples, lowest, cotangent=d.contiguous())


def _parts(batch: Support | Query, weight: Tensor | None) -> Tensor | None:
    """What each sample counts in the loss of its task, from its weight."""
    return weight if batch.owner is not None else part_of_task(weight)


def _outcome(adapted: Adapted, samples: Samples, needed: Sequence[bool]) -> Outcome:
    """What a query pass gives."""
    value, gradients = _gradients(adapted, samples, needed[1:])
    assert value is not None
    return Outcome(value, samples.dx, gradients)


def _gradients(adapted: Adapted, samples: Samples, needed: Sequence[bool]) -> tuple[Tensor | None, Gradients]:
    """The losses of a query pass, summed, if it has any, and its outer gradients."""
    wanted = wanted_layers(adapted.spec, needed)
    partials = None
    if any(wanted):
        of_wanted = [d if want else None for d, want in zip(samples.gradients, wanted, strict=True)]
        partials = contract(adapted, samples.inputs, of_wanted, samples.unit)
    losses = None if samples.losses is None else samples.losses.flatten()
    flat, value = reduce(partials, losses, share=samples.unit)
    if not any(needed[len(PARTS) * adapted.depth :]):
        return value, split(adapted.spec, flat, needed)
    gradients = split(adapted.spec, flat, [True] * len(needed))
    gradients[-1] = rate_gradients(adapted, samples, gradients)
    return value, [gradient if need else None for gradient, need in zip(gradients, needed, strict=True)]


def _sound_tasks(passes: Sequence[Samples]) -> Tensor:
    """The tasks whose losses and query gradients are finite in all of some passes, [T]."""
    sound = []
    for samples in passes:
        assert samples.losses is not None
        sizes = [samples.losses, *([] if samples.dx is None else [samples.dx.flatten(1)])]
        for x, d in zip(samples.inputs, samples.gradients, strict=False):
            if x is not None and d is not None:
                # No smaller than an element of the gradient of a weight or a bias can be.
                sizes.append(d.abs().amax(2) * x.float().abs().amax(2).clamp_min(1.0))
        sound += [size.sum(1).isfinite() for size in sizes]
        # The mean over no sample is nan.
        sound += [torch.zeros_like(sound[0])] if not samples.outputs.shape[1] else []
    return torch.stack(sound).all(0)


def _without(samples: Samples, sound: Tensor) -> Samples:
    """A query pass in which all but the sound tasks are 0."""

    def of(values: Tensor | None) -> Tensor | None:
        return None if values is None else of_sound(values, sound)

    inputs, gradients = ([of(values) for values in layers] for layers in (samples.inputs, samples.gradients))
    dx, losses = of(samples.dx), of(samples.losses)
    return replace(samples, inputs=inputs, gradients=gradients, dx=dx, losses=losses, sound=sound)


def _want(adapted: Adapted, samples: Samples, needed: Sequence[bool], features: bool) -> int:
    """Make room for gradients; returns the lowest layer whose pre-activations' are wanted, -1 for the features'."""
    x = _present(samples.inputs[0])
    wanted = wanted_layers(adapted.spec, needed)
    lowest = -1 if features else wanted.index(True) if True in wanted else adapted.depth
    if lowest < adapted.depth:
        # The kernels stop at the first layer that moves at the earliest.
        for i in range(max(min(lowest, adapted.first), 0), adapted.depth):
            samples.gradients[i] = new(x.device, *x.shape[:2], adapted.spec.widths[i + 1])
    samples.dx = new(x.device, *x.shape) if features else None
    return lowest


def _query(
    adapted: Adapted,
    samples: Samples,
    lowest: int | None = None,
    *,
    y: Tensor | None = None,
    counts: Tensor | None = None,
    cotangent: Tensor | None = None,
) -> None:
    """The query pass from the first layer that moves: forward, unless a cotangent is given, and back to `lowest`."""
    first, depth, k = adapted.first, adapted.depth, samples.taken
    lowest = depth if lowest is None else lowest
    if adapted.plan.engine == "dual" and first < depth:
        query_layers(adapted, samples, y=y, counts=counts, cotangent=cotangent, below=lowest < first)
    else:
        if cotangent is None:
            for i in range(first, depth):
                forward_layer(adapted, samples, i, k, query=True)
        if y is not None or cotangent is not None:
            sample_losses(adapted, samples, k, y=y, counts=counts, cotangent=cotangent, query=True)
        for i in range(depth - 1, max(first - (lowest < first), lowest), -1):
            backward_layer(adapted, samples, i, k, query=True)
    for i in range(first - 1, lowest, -1):
        backward_shared_layer(adapted, samples, i)


def _present(value: Tensor | None) -> Tensor:
    assert value is not None
    return value
