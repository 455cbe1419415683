"""The dual engine: launches `kernels/dual.py`, in which no task has weights of its own.

The plan's engine says how: "dual" runs all inner steps of a pack of tasks in one launch and its query pass in another;
"layered" takes a launch a layer, and spreads the layer's features over the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache

import torch
from torch import Tensor

from ..batch import Query, Support, cast_targets
from ..inner import PARTS
from ..kernels import dual, outer
from ..kernels.activations import keeps_output
from ..kernels.configuration import DualConfig
from ..kernels.spec import DualSpec, features, outer_tiles, padded
from ..problem import Loss, Problem
from . import FlatParameters, Gradients, Outcome, Planned, fold_step
from .coefficients import coefficients
from .launching import compiled_for, inner_numbers, multiprocessors, new, on_device, options, pointers, reduce, split
from .launching import tensors as contiguous
from .losses import TaskLoss, task_loss

Layers = list[Tensor | None]  # something of each layer


def pending_steps(problem: Problem, forms: tuple[str, ...]) -> int:
    """Steps that the longest history lasts: until a layer folds; that of the first layer that moves is another one."""
    behind = forms[problem.inner.first_adapted + 1 :]
    return max((fold_step(form) or problem.inner.steps for form in behind if form != "shared"), default=0)


@lru_cache(maxsize=1024)
def spec_of(problem: Problem, shots: int, precision: str, config: DualConfig, forms: tuple[str, ...]) -> DualSpec:
    """What the kernels of the inner loop are compiled for; those of the query pass have other `samples`."""
    support = padded(max(2, config.tasks * shots))
    return DualSpec(
        **compiled_for(problem, precision),
        samples=support,
        tasks=config.tasks,
        support=support,
        history=padded(max(2, config.tasks * pending_steps(problem, forms) * shots)),
        features=config.features,
        contracted=config.contracted,
    )


@dataclass
class Own:
    """A folded layer: each task's weight [T, out, in] and bias [T, out], and with momentum their velocities."""

    weight: Tensor
    bias: Tensor | None
    weight_velocity: Tensor | None = None
    bias_velocity: Tensor | None = None


@dataclass
class Adapted:
    """A chunk of tasks after its inner steps.

    Attributes:
        weights, biases: of each layer, [out, in] and [out], or None; shared by all tasks.
        inputs, gradients: the history. Of the first layer that moves, its input on the support set [T, S, in], and H
            [T, S, out]; of those behind it, X_j [T, K, S, in] and D_j [T, K, S, out].
        shots, steps: at least 1, for kernels divide by them.
        own: by layer, the weights and velocities of each task, once the layer is folded.
    """

    plan: Planned
    spec: DualSpec
    weights: tuple[Tensor | None, ...]
    biases: tuple[Tensor | None, ...]
    inputs: Layers
    gradients: Layers
    shots: int
    steps: int
    own: dict[int, Own] = field(default_factory=dict)

    @property
    def depth(self) -> int:
        return len(self.weights)

    @property
    def first(self) -> int:
        """The lowest layer that moves; the number of layers where none does."""
        return self.plan.problem.inner.first_adapted


@dataclass
class Samples:
    """A set of each task's samples on its way through the layers, and back.

    Attributes:
        inputs: of each layer [T, N, in], the outputs last.
        kept: pre-activations [T, N, out] where an activation's derivative is taken from them.
        gradients: of pre-activations [T, N, out], where they are wanted.  dx: of the features, where it is.
        base: pre-activations of the first layer that moves, as the shared weights give them.
        unit: what gradients lack as a factor, so that 16 bits hold them.
    """

    spec: DualSpec
    inputs: Layers
    kept: Layers
    gradients: Layers
    base: Tensor | None = None
    dx: Tensor | None = None
    unit: float = 1.0

    @property
    def outputs(self) -> Tensor:
        assert self.inputs[-1] is not None
        return self.inputs[-1]


def step(
    plan: Planned,
    needed: Sequence[bool],
    parameters: FlatParameters,
    support: Support,
    query: Query,
    share: float | Tensor,
) -> Outcome:
    """The meta-step of a chunk of tasks; arguments and results as of `batched.step`."""
    x, y, weight = contiguous(query)
    adapted = adapt(plan, parameters, support)
    if plan.problem.outer_loss.name == "callable":
        samples = query_pass(adapted, x)
        loss = _task_loss(plan.problem, plan.problem.outer_loss, y, weight)
        d = loss.gradient(samples.outputs, share if isinstance(share, float) else share[:, None, None])
        value = (loss.values(samples.outputs) * share).sum()
        return Outcome(value, *query_backward(adapted, samples, d, needed[1:], needed[0]))
    with on_device(x.device):
        samples = _query_samples(adapted, x)
        lowest = _want(adapted, samples, needed[1:], needed[0])
        counts, samples.unit = _counts(weight, share, *x.shape[:2])
        losses = new(x.device, *x.shape[:2])
        _query(adapted, samples, lowest, y=y, counts=counts, losses=losses)
        partials = _outer(adapted, samples, needed[1:])
        gradient, total = reduce(partials, losses.flatten(), share=samples.unit)
    assert total is not None
    # The mean over no sample is nan, as torch has it.
    return Outcome(total if x.shape[1] else total + math.nan, samples.dx, split(adapted.spec, gradient, needed[1:]))


def adapt(plan: Planned, parameters: FlatParameters, support: Support) -> Adapted:
    """Run the inner steps of a chunk of tasks."""
    assert plan.precision is not None
    assert isinstance(plan.config, DualConfig)
    problem, device, (tasks, shots, _) = plan.problem, support.x.device, support.x.shape
    steps, depth, widths = problem.inner.steps, problem.network.depth, problem.network.widths
    spec = spec_of(problem, shots, plan.precision, plan.config, plan.forms)
    inputs: Layers = [None] * depth
    gradients: Layers = [None] * depth
    adapted = Adapted(plan, spec, *pointers(parameters), inputs, gradients, max(shots, 1), max(steps, 1))
    first = adapted.first
    if first == depth:
        return adapted
    x, y, weight = contiguous(support)
    with on_device(device):
        samples = _samples(adapted, x, spec, query=False)
        _shared_forward(adapted, samples)
        inputs[first], gradients[first] = samples.inputs[first], new(device, tasks, shots, widths[first + 1])
        for i in range(first + 1, depth):
            inputs[i] = new(device, tasks, steps, shots, widths[i])
            gradients[i] = new(device, tasks, steps, shots, widths[i + 1])
        samples.inputs[:depth], samples.gradients = inputs, gradients
        counts = None if weight is None else _share(weight)
        velocity = new(device, tasks, shots, widths[first + 1]) if spec.momentum else None
        if plan.engine == "dual":
            dual.inner_kernel[_programs(spec, tasks, shots),](
                adapted.weights, adapted.biases, *_numbers(problem, device)[:3], samples.base, y, counts, 1 / shots,
                tuple(samples.inputs), tuple(gradients), velocity, tuple(samples.kept), tasks, shots, steps, spec,
                **_options(plan),
            )  # fmt: skip
        else:
            _steps(adapted, samples, y, weight, counts, velocity)
    return adapted


def query_pass(adapted: Adapted, x: Tensor) -> Samples:
    """The adapted networks on query features [t, Q, in]."""
    with on_device(x.device):
        samples = _query_samples(adapted, x.contiguous())
        _query(adapted, samples)
    return samples


def query_backward(
    adapted: Adapted, samples: Samples, d: Tensor, needed: Sequence[bool], features: bool
) -> tuple[Tensor | None, Gradients]:
    """The query pass in reverse; arguments and results as of `batched.query_backward`."""
    with on_device(d.device):
        lowest = _want(adapted, samples, needed, features)
        _query(adapted, samples, lowest, cotangent=d.contiguous())
        gradient, _ = reduce(_outer(adapted, samples, needed))
    return samples.dx, split(adapted.spec, gradient, needed)


def fast_weights(adapted: Adapted, tasks: slice) -> list[tuple[Tensor, Tensor | None]]:
    """Weights [t, out, in] and biases [t, out] of each layer after the last step."""
    count, inner = tasks.stop - tasks.start, adapted.plan.problem.inner
    layers: list[tuple[Tensor, Tensor | None]] = []
    for i, (weight, bias) in enumerate(zip(adapted.weights, adapted.biases, strict=True)):
        assert weight is not None
        x, d = adapted.inputs[i], adapted.gradients[i]
        if (own := adapted.own.get(i)) is not None:
            layers.append((own.weight[tasks], None if own.bias is None else own.bias[tasks]))
        elif x is None or d is None or not inner.adapt[i]:
            fast = weight.float().expand(count, -1, -1)
            layers.append((fast, None if bias is None else bias.float().expand(count, -1)))
        else:
            numbers = coefficients(inner.layer_rates(i), inner.momentum, inner.weight_decay)
            _, _, past, _ = _numbers(adapted.plan.problem, d.device)
            by_step = None if i == adapted.first else past[inner.steps, i]
            layers.append(_sum(adapted, i, tasks, numbers.shared[-1], by_step, -1.0))
    return layers


def _sum(
    adapted: Adapted, i: int, tasks: slice, shared: float, past: Tensor | None, sign: float
) -> tuple[Tensor, Tensor | None]:
    """Shared * W_0 + sign * sum_j past[j] D_j.T @ X_j of layer i, [t, out, in], and the same of its bias, [t, out].

    past: of each step that counts, [k]; None for 1, where the history is summed already.
    """
    weight, bias, x, d = adapted.weights[i], adapted.biases[i], adapted.inputs[i], adapted.gradients[i]
    assert weight is not None
    assert x is not None
    assert d is not None
    x, d = x[tasks].float(), d[tasks]
    if past is not None:
        x, d = x[:, : len(past)], d[:, : len(past)] * past[:, None, None]
    x, d = x.flatten(1, -2), d.flatten(1, -2)
    found = torch.baddbmm(weight.float(), d.mT, x, beta=shared, alpha=sign)
    return found, None if bias is None else torch.add(shared * bias.float(), d.sum(1), alpha=sign)


def _fold(adapted: Adapted, k: int) -> None:
    """Give each task weights of its own in the layers that fold at step k."""
    problem, every = adapted.plan.problem, slice(None)
    inner = problem.inner
    for i, form in enumerate(adapted.plan.forms):
        x = adapted.inputs[i]
        if fold_step(form) == k and x is not None:
            numbers = coefficients(inner.layer_rates(i), inner.momentum, inner.weight_decay)
            _, _, past, velocity = _numbers(problem, x.device)
            own = adapted.own[i] = Own(*_sum(adapted, i, every, numbers.shared[k], past[k, i, :k], -1.0))
            if adapted.spec.momentum and k < inner.steps:
                found = _sum(adapted, i, every, numbers.velocity_shared[k], velocity[k, i, :k], 1.0)
                own.weight_velocity, own.bias_velocity = found


def _samples(adapted: Adapted, x: Tensor, spec: DualSpec, *, query: bool) -> Samples:
    """Samples x [T, N, in], and room for what becomes of them; of a support set, beside its history."""
    outputs: Layers = []
    kept: Layers = []
    for i, (width, activation) in enumerate(zip(spec.widths[1:], spec.activations, strict=True)):
        own = query or i < adapted.first or i == adapted.depth - 1
        outputs.append(new(x.device, *x.shape[:2], width) if own else None)
        kept.append(None if keeps_output(activation) else new(x.device, *x.shape[:2], width))
    moving = adapted.first < adapted.depth
    base = new(x.device, *x.shape[:2], spec.widths[adapted.first + 1]) if moving else None
    return Samples(spec, [x, *outputs], kept, [None] * adapted.depth, base)


def _query_samples(adapted: Adapted, x: Tensor) -> Samples:
    assert isinstance(adapted.plan.config, DualConfig)
    spec = replace(adapted.spec, samples=adapted.plan.config.samples)
    samples = _samples(adapted, x, spec, query=True)
    _shared_forward(adapted, samples)
    return samples


def _want(adapted: Adapted, samples: Samples, needed: Sequence[bool], features: bool) -> int:
    """Make room for gradients; returns the lowest layer whose pre-activations' are wanted, -1 for the features'."""
    x = samples.inputs[0]
    assert x is not None
    wanted = [w or b for w, b in zip(needed[0 :: len(PARTS)], needed[1 :: len(PARTS)], strict=True)]
    lowest = -1 if features else wanted.index(True) if True in wanted else adapted.depth
    if lowest < adapted.depth:
        # The kernels stop at the first layer that moves at the earliest.
        for i in range(max(min(lowest, adapted.first), 0), adapted.depth):
            samples.gradients[i] = new(x.device, *x.shape[:2], adapted.spec.widths[i + 1])
    samples.dx = new(x.device, *x.shape) if features else None
    return lowest


def _shared_forward(adapted: Adapted, samples: Samples) -> None:
    """Run the layers below the first that moves, and that one's base."""
    for i in range(adapted.first):
        _forward_shared_layer(adapted, samples, i, samples.inputs, samples.kept)
    if samples.base is not None:
        base: Layers = [None] * adapted.depth
        base[adapted.first] = samples.base
        below = [*samples.inputs[: adapted.first + 1], *[None] * (adapted.depth - adapted.first)]
        _forward_shared_layer(adapted, samples, adapted.first, below, base)


def _forward_shared_layer(adapted: Adapted, samples: Samples, i: int, inputs: Layers, kept: Layers) -> None:
    rows, tiles, spec = _shared(samples, i, adapted.spec.widths[i + 1])
    dual.forward_kernel[_programs(spec, 1, rows), tiles](
        adapted.weights[i], adapted.biases[i], None, None, None, None, None, tuple(inputs), tuple(kept),
        1, rows, 1, 1, 0, True, False, i, spec, **_options(adapted.plan),
    )  # fmt: skip


def _steps(
    adapted: Adapted, samples: Samples, y: Tensor, weight: Tensor | None, counts: Tensor | None, velocity: Tensor | None
) -> None:
    """All inner steps, layer by layer."""
    problem = adapted.plan.problem
    loss = _task_loss(problem, problem.loss, y, weight) if problem.loss.name == "callable" else None
    for k in range(problem.inner.steps):
        _fold(adapted, k)
        for i in range(adapted.first, adapted.depth):
            _forward_layer(adapted, samples, i, k, query=False)
        cotangent = None if loss is None else loss.gradient(samples.outputs, 1.0).contiguous()
        _loss(adapted, samples, k, y=y, counts=counts, cotangent=cotangent, velocity=velocity, query=False)
        for i in range(adapted.depth - 1, adapted.first, -1):
            _backward_layer(adapted, samples, i, k, velocity=velocity, query=False)
        for i, own in adapted.own.items():
            _step_layer(adapted, i, own, k)
    _fold(adapted, problem.inner.steps)


def _query(
    adapted: Adapted,
    samples: Samples,
    lowest: int | None = None,
    *,
    y: Tensor | None = None,
    counts: Tensor | None = None,
    losses: Tensor | None = None,
    cotangent: Tensor | None = None,
) -> None:
    """The query pass from the first layer that moves: forward, unless a cotangent is given, and back to `lowest`."""
    plan, first, depth, k = adapted.plan, adapted.first, adapted.depth, adapted.plan.problem.inner.steps
    lowest = depth if lowest is None else lowest
    x = samples.inputs[0]
    assert x is not None
    tasks, queries, _ = x.shape
    if plan.engine == "dual" and first < depth:
        _, *past, _ = _numbers(plan.problem, x.device)
        dual.query_kernel[_programs(samples.spec, tasks, queries),](
            adapted.weights, adapted.biases, *past, samples.base, tuple(adapted.inputs), tuple(adapted.gradients),
            y, counts, 1.0, cotangent, tuple(samples.inputs), tuple(samples.gradients), tuple(samples.kept), losses,
            samples.dx, samples.unit, tasks, queries, adapted.shots, adapted.steps, lowest < first, samples.spec,
            **_options(plan),
        )  # fmt: skip
    else:
        if cotangent is None:
            for i in range(first, depth):
                _forward_layer(adapted, samples, i, k, query=True)
        if y is not None or cotangent is not None:
            _loss(adapted, samples, k, y=y, counts=counts, losses=losses, cotangent=cotangent, query=True)
        for i in range(depth - 1, max(first - (lowest < first), lowest), -1):
            _backward_layer(adapted, samples, i, k, query=True)
    for i in range(first - 1, lowest, -1):
        rows, tiles, spec = _shared(samples, i, adapted.spec.widths[i])
        dual.backward_kernel[_programs(spec, 1, rows), tiles](
            adapted.weights[i], None, None, None, None, tuple(samples.inputs), tuple(samples.gradients),
            tuple(samples.kept), samples.dx, samples.unit, None, None, 1, rows, 1, 1, 0, True, False, i, spec,
            **_options(plan),
        )  # fmt: skip


def _forward_layer(adapted: Adapted, samples: Samples, i: int, k: int, *, query: bool) -> None:
    outputs = samples.outputs
    tasks, rows, _ = outputs.shape
    _, *past, _ = _numbers(adapted.plan.problem, outputs.device)
    weight, bias, own, spec = _layer(adapted, samples, i)
    dual.forward_kernel[_programs(spec, tasks, rows), _tiles(spec, adapted.spec.widths[i + 1])](
        weight, bias, samples.base if i == adapted.first else None, *past,
        tuple(adapted.inputs), tuple(adapted.gradients), tuple(samples.inputs), tuple(samples.kept),
        tasks, rows, adapted.shots, adapted.steps, k, query, own, i, spec, **_options(adapted.plan),
    )  # fmt: skip


def _loss(
    adapted: Adapted,
    samples: Samples,
    k: int,
    *,
    y: Tensor | None,
    counts: Tensor | None = None,
    losses: Tensor | None = None,
    cotangent: Tensor | None = None,
    velocity: Tensor | None = None,
    query: bool,
) -> None:
    tasks, rows, _ = samples.outputs.shape
    inner, *_ = _numbers(adapted.plan.problem, samples.outputs.device)
    dual.loss_kernel[_programs(samples.spec, tasks, rows),](
        y, counts, 1.0 if query else 1 / rows, cotangent, losses, tuple(samples.inputs),
        tuple(samples.gradients), tuple(samples.kept), None if query else inner, velocity,
        tasks, rows, adapted.shots, adapted.steps, k, query, samples.spec, **_options(adapted.plan),
    )  # fmt: skip


def _backward_layer(
    adapted: Adapted, samples: Samples, i: int, k: int, *, velocity: Tensor | None = None, query: bool
) -> None:
    tasks, rows, _ = samples.outputs.shape
    inner, *past, _ = _numbers(adapted.plan.problem, samples.outputs.device)
    weight, _, own, spec = _layer(adapted, samples, i)
    dual.backward_kernel[_programs(spec, tasks, rows), _tiles(spec, adapted.spec.widths[i])](
        weight, *past, tuple(adapted.inputs), tuple(adapted.gradients), tuple(samples.inputs),
        tuple(samples.gradients), tuple(samples.kept), samples.dx, samples.unit, None if query else inner, velocity,
        tasks, rows, adapted.shots, adapted.steps, k, query, own, i, spec, **_options(adapted.plan),
    )  # fmt: skip


def _layer(adapted: Adapted, samples: Samples, i: int) -> tuple[Tensor | None, Tensor | None, bool, DualSpec]:
    """Weight and bias of a layer as they are now, whether each task has its own, and what its kernels are made for."""
    own = adapted.own.get(i)
    if own is None:
        return adapted.weights[i], adapted.biases[i], False, samples.spec
    adapts = tuple(moves and j != i for j, moves in enumerate(samples.spec.adapts))
    return own.weight, own.bias, True, replace(samples.spec, adapts=adapts)


def _step_layer(adapted: Adapted, i: int, own: Own, k: int) -> None:
    tasks, out, before = own.weight.shape
    inner, *_ = _numbers(adapted.plan.problem, own.weight.device)
    dual.step_kernel[tasks, _tiles(adapted.spec, before) * _tiles(adapted.spec, out)](
        own.weight, own.bias, own.weight_velocity, own.bias_velocity, inner, adapted.inputs[i], adapted.gradients[i],
        adapted.shots, adapted.steps, k, i, adapted.spec, **_options(adapted.plan),
    )  # fmt: skip


def _outer(adapted: Adapted, samples: Samples, needed: Sequence[bool]) -> Tensor | None:
    """Partial outer gradients of all parameters, [splits, parameters]; None where none is wanted."""
    if not any(needed):
        return None
    outputs, spec = samples.outputs, adapted.spec
    wanted = [w or b for w, b in zip(needed[0 :: len(PARTS)], needed[1 :: len(PARTS)], strict=True)]
    gradients = tuple(d if want else None for d, want in zip(samples.gradients, wanted, strict=True))
    rows, tiles = outputs.shape[0] * outputs.shape[1], outer_tiles(spec, adapted.depth)
    # Enough programs that no multiprocessor idles, each with enough samples to be worth its partial sum.
    splits = max(1, min(2 * multiprocessors(outputs.device) // tiles, rows // (4 * spec.contracted)))
    length = -(-rows // splits // spec.contracted) * spec.contracted if rows else spec.contracted
    splits = max(1, -(-rows // length))
    partials = new(outputs.device, splits, spec.parameters)
    outer.outer_kernel[tiles, splits](
        tuple(samples.inputs), gradients, partials, samples.unit, rows, length, spec, **_options(adapted.plan)
    )
    return partials


def _counts(weight: Tensor | None, share: float | Tensor, tasks: int, queries: int) -> tuple[Tensor | None, float]:
    """What each sample counts in the meta-loss, [T, Q] or None where all are alike, and the unit it is counted in.

    In that unit gradients are of the size of a sample's own, which 16 bits hold.
    """
    per_task = max(queries, 1)
    counts = None if weight is None else _share(weight) * per_task
    if not isinstance(share, Tensor):
        return counts, share / per_task
    # Shares of a mean over tasks are near 1 / T, of a sum near 1, and which they are only the device knows.
    middle = math.sqrt(tasks)
    shares = share.float()[:, None] * middle
    return (shares.expand(tasks, queries).contiguous() if counts is None else counts * shares), 1 / (per_task * middle)


@cache  # for good: a captured graph reads them wherever they lie
def _numbers(problem: Problem, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Momentum, weight decay and rates, as `inner_numbers`; then s [K + 1, layers], and c and vc [K + 1, layers, K]."""
    inner, depth = problem.inner, problem.network.depth
    layers = [coefficients(inner.layer_rates(i), inner.momentum, inner.weight_decay) for i in range(depth)]
    shrink = torch.zeros(inner.steps + 1, depth)
    past, velocity = torch.zeros(2, inner.steps + 1, depth, inner.steps)
    for i, numbers in enumerate(layers):
        shrink[:, i] = torch.tensor(numbers.shared)
        for k in range(1, inner.steps + 1):
            past[k, i, :k] = torch.tensor(numbers.history[k])
            velocity[k, i, :k] = torch.tensor(numbers.velocity_history[k])
    return inner_numbers(problem, device), shrink.to(device), past.to(device), velocity.to(device)


def _share(weight: Tensor) -> Tensor:
    """What each sample counts in the loss of its task."""
    weight = weight.float()
    return weight / weight.sum(1, keepdim=True)


def _task_loss(problem: Problem, loss: Loss, y: Tensor, weight: Tensor | None) -> TaskLoss:
    weight = None if weight is None else weight.float()
    return task_loss(loss, cast_targets(y, torch.float32), weight, problem.network.out_features, torch.float32)


def _shared(samples: Samples, i: int, width: int) -> tuple[int, int, DualSpec]:
    """Rows, tiles of features, and the spec of a layer that does not move: to it all samples are of one task."""
    x = samples.inputs[0]
    assert x is not None
    rows, tiles = x.shape[0] * x.shape[1], _tiles(samples.spec, width)
    # Blocks as large as leave no multiprocessor idle.
    large = [block for block in (64, 32) if -(-rows // block) * tiles >= multiprocessors(x.device)]
    block = large[0] if large else 16
    return rows, tiles, replace(samples.spec, adapts=(False,) * len(samples.kept), tasks=1, samples=block)


def _programs(spec: DualSpec, tasks: int, rows: int) -> int:
    """Packs of tasks times blocks of a pack's samples."""
    packs, blocks = -(-tasks // spec.tasks), -(-spec.tasks * rows // spec.samples)
    programs: int = packs * blocks
    return programs


def _tiles(spec: DualSpec, width: int) -> int:
    block: int = features(spec, width)
    return -(-width // block)


def _options(plan: Planned) -> dict[str, int | bool]:
    assert isinstance(plan.config, DualConfig)
    return options(plan.config.warps, plan.config.stages)
