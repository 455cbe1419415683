"""What the dual engine launches, a function each of `kernels/dual.py` and one of `kernels/outer.py`; their tensors."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels import dual
from ..kernels.activations import keeps_output
from ..kernels.configuration import DualConfig
from ..kernels.spec import DualSpec, features, padded
from ..problem import Problem
from . import FlatParameters, Planned, fold_step, rates_of
from .coefficients import TensorCoefficients, tensor_coefficients
from .launching import compiled_for, inner_numbers, multiprocessors, new, options, products

Layers = list[Tensor | None]  # something of each layer


def pending_steps(problem: Problem, forms: tuple[str, ...], each_step: bool = False) -> int:
    """Steps that the longest history lasts: until a layer folds; that of a layer with one input for all is another."""
    layers = forms[problem.inner.first_adapted + (not each_step) :]
    return max((fold_step(form) or problem.inner.steps for form in layers if form != "shared"), default=0)


@lru_cache(maxsize=1024)
def spec_of(
    problem: Problem,
    shots: int,
    precision: str,
    config: DualConfig,
    forms: tuple[str, ...],
    each_step: bool = False,
    packed: bool = False,
) -> DualSpec:
    """What the kernels of the inner loop are compiled for; those of the query pass have other `samples`."""
    support = padded(max(2, config.tasks * shots))
    return DualSpec(
        **compiled_for(problem, precision),
        each_step=each_step,
        samples=support,
        tasks=config.tasks,
        support=support,
        history=padded(max(2, config.tasks * pending_steps(problem, forms, each_step) * shots)),
        features=config.features,
        contracted=config.contracted,
        ragged=packed,
    )


class Numbers(NamedTuple):
    """What all tasks share of the inner loop, in float32 on their device.

    Attributes:
        inner: momentum, weight decay, and the rate of each step and layer [K, layers], as kernels read them.
        of: the coefficients of weights, velocities and directions.
    """

    inner: Tensor
    of: TensorCoefficients


def numbers(problem: Problem, parameters: FlatParameters, device: torch.device) -> Numbers:
    """The numbers of a problem's own rates, or of those that are learned."""
    learned = rates_of(problem, parameters)
    if not learned:
        return _fixed_numbers(problem, device)
    rates = learned[0]
    assert rates is not None
    rates = rates.float().expand(problem.inner.steps, -1)
    start = inner_numbers(problem, device)[:2]
    return Numbers(torch.cat([start, rates.flatten()]), _coefficients(problem, rates))


@cache  # for good: a captured graph reads them wherever they lie
def _fixed_numbers(problem: Problem, device: torch.device) -> Numbers:
    rates = torch.tensor(problem.inner.rates, dtype=torch.float64).view(-1, problem.network.depth)
    found = TensorCoefficients(*(t.to(device) for t in _coefficients(problem, rates)))
    return Numbers(inner_numbers(problem, device), found)


def _coefficients(problem: Problem, rates: Tensor) -> TensorCoefficients:
    inner = problem.inner
    found = tensor_coefficients(rates.double(), inner.momentum, inner.weight_decay, inner.nesterov, inner.decoupled)
    return TensorCoefficients(*(t.float() for t in found))


@dataclass
class Own:
    """A folded layer: each task's weight [T, out, in] and bias [T, out], and with momentum their velocities."""

    weight: Tensor
    bias: Tensor | None
    weight_velocity: Tensor | None = None
    bias_velocity: Tensor | None = None


@dataclass
class Adapted:
    """A chunk of tasks after some inner steps, and in the end after all.

    Attributes:
        numbers: the coefficients of its inner loop.
        weights, biases: of each layer, [out, in] and [out], or None; shared by all tasks.
        inputs, gradients: the history. Of the first layer that moves, its input on the support set [T, S, in], and H
            [T, S, out]; of those behind it, X_j [T, K, S, in] and D_j [T, K, S, out]. Where every step has support
            samples of its own, that layer's are like the others'.
        shots, steps: at least 1, for kernels divide by them.
        taken: inner steps behind it.
        first_gradients: D_j [T, K, S, out] of the first layer that moves, where H alone is not enough.
        own: by layer, the weights and velocities of each task, once the layer is folded.
        owner: the task of each support sample [T, S], where what counts as a task here is a pack of them; else None.
    """

    plan: Planned
    spec: DualSpec
    numbers: Numbers
    weights: tuple[Tensor | None, ...]
    biases: tuple[Tensor | None, ...]
    inputs: Layers
    gradients: Layers
    shots: int
    steps: int
    taken: int = 0
    first_gradients: Tensor | None = None
    own: dict[int, Own] = field(default_factory=dict)
    owner: Tensor | None = None

    @property
    def depth(self) -> int:
        return len(self.weights)

    @property
    def first(self) -> int:
        """The lowest layer that moves; the number of layers where none does."""
        return self.plan.problem.inner.first_adapted

    def collapses(self, i: int) -> bool:
        """Whether layer i has one input for all steps, so that its history is H."""
        return i == self.first and not self.spec.each_step

    @property
    def moving(self) -> list[int]:
        """The layers that move."""
        return [i for i, moves in enumerate(self.spec.adapts) if moves]


@dataclass
class Samples:
    """A set of each task's samples on its way through the layers, and back.

    Attributes:
        inputs: of each layer [T, N, in], the outputs last.
        kept: pre-activations [T, N, out] where an activation's derivative is taken from them.
        gradients: of pre-activations [T, N, out], where they are wanted.  dx: of the features, where it is.
        base: pre-activations of the first layer that moves, as the shared weights give them.
        losses: of samples, or of tasks, times what they count, [T, N or 1].
        unit: what gradients, and losses, lack as a factor, so that 16 bits hold them.
        taken: inner steps behind the weights.
        sound: the tasks that count, [T], where what is of others is 0, but for their history; else None.
        owner: the task of each, [T, N], as of `Adapted`.
    """

    spec: DualSpec
    inputs: Layers
    kept: Layers
    gradients: Layers
    base: Tensor | None = None
    dx: Tensor | None = None
    losses: Tensor | None = None
    unit: float = 1.0
    taken: int = 0
    sound: Tensor | None = None
    owner: Tensor | None = None

    @property
    def outputs(self) -> Tensor:
        assert self.inputs[-1] is not None
        return self.inputs[-1]


def support_samples(adapted: Adapted, x: Tensor) -> Samples:
    """Samples x [T, S, in] of a support set, or [T, K, S, in], through the layers below the first that moves.

    With room for what becomes of them in a step, beside the history. That of the first layer is its input here.
    """
    below = _samples(adapted, x.flatten(1, -2), adapted.spec, query=False)
    below.owner = adapted.owner
    shared_forward(adapted, below)
    if x.dim() == 3:
        return below
    samples = _samples(adapted, x[:, 0], adapted.spec, query=False)
    first_input = below.inputs[adapted.first]
    assert first_input is not None
    samples.inputs[adapted.first], samples.base = first_input.unflatten(1, x.shape[1:3]), below.base
    return samples


def query_samples(adapted: Adapted, x: Tensor, before: Samples | None = None, owner: Tensor | None = None) -> Samples:
    """Samples x [T, Q, in] of a query set, through the layers below the first that moves.

    before: the same at an earlier step, from which those layers are taken.  owner: as of `Samples`.
    """
    assert isinstance(adapted.plan.config, DualConfig)
    samples = _samples(adapted, x, replace(adapted.spec, samples=adapted.plan.config.samples), query=True)
    if before is None:
        shared_forward(adapted, samples)
    else:
        below = adapted.first
        samples.inputs[: below + 1], samples.kept[:below] = before.inputs[: below + 1], before.kept[:below]
        samples.base = before.base
    samples.taken, samples.owner = adapted.taken, owner
    return samples


def _samples(adapted: Adapted, x: Tensor, spec: DualSpec, *, query: bool) -> Samples:
    outputs: Layers = []
    kept: Layers = []
    for i, (width, activation) in enumerate(zip(spec.widths[1:], spec.activations, strict=True)):
        own = query or i < adapted.first or i == adapted.depth - 1
        outputs.append(new(x.device, *x.shape[:2], width) if own else None)
        kept.append(None if keeps_output(activation) else new(x.device, *x.shape[:2], width))
    moving = adapted.first < adapted.depth
    base = new(x.device, *x.shape[:2], spec.widths[adapted.first + 1]) if moving else None
    return Samples(spec, [x, *outputs], kept, [None] * adapted.depth, base)


def shared_forward(adapted: Adapted, samples: Samples) -> None:
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
        adapted.weights[i], adapted.biases[i], None, None, None, None, None, None, None, tuple(inputs), tuple(kept),
        1, rows, 1, 1, 0, True, False, i, spec, **_options(adapted.plan),
    )  # fmt: skip


def backward_shared_layer(adapted: Adapted, samples: Samples, i: int) -> None:
    rows, tiles, spec = _shared(samples, i, adapted.spec.widths[i])
    dual.backward_kernel[_programs(spec, 1, rows), tiles](
        adapted.weights[i], None, None, None, None, None, None, tuple(samples.inputs), tuple(samples.gradients),
        tuple(samples.kept), samples.dx, samples.unit, None, None, 1, rows, 1, 1, 0, True, False, i, spec,
        **_options(adapted.plan),
    )  # fmt: skip


def inner_steps(adapted: Adapted, samples: Samples, y: Tensor, counts: Tensor | None, velocity: Tensor | None) -> None:
    """All inner steps of all layers."""
    tasks, shots, _ = samples.outputs.shape
    dual.inner_kernel[_programs(adapted.spec, tasks, shots),](
        adapted.weights, adapted.biases, adapted.numbers.inner, *adapted.numbers.of[:2], samples.base, y, counts,
        1 / shots, adapted.owner, tuple(samples.inputs), tuple(adapted.gradients), velocity, adapted.first_gradients,
        tuple(samples.kept), tasks, shots, adapted.steps, adapted.spec, **_options(adapted.plan),
    )  # fmt: skip


def query_layers(
    adapted: Adapted,
    samples: Samples,
    *,
    y: Tensor | None,
    counts: Tensor | None,
    cotangent: Tensor | None,
    below: bool,
) -> None:
    """The query pass of all layers from the first that moves; below: reverse that one, too."""
    tasks, queries, _ = samples.outputs.shape
    # Where all steps are behind the weights, the kernel need not be told.
    taken = samples.taken if samples.taken < adapted.steps else None
    dual.query_kernel[_programs(samples.spec, tasks, queries),](
        adapted.weights, adapted.biases, *adapted.numbers.of[:2], samples.base, tuple(adapted.inputs),
        tuple(adapted.gradients), y, counts, 1.0, cotangent, samples.owner, adapted.owner, tuple(samples.inputs),
        tuple(samples.gradients), tuple(samples.kept), samples.losses, samples.dx, samples.unit,
        tasks, queries, adapted.shots, adapted.steps, taken, below, samples.spec, **_options(adapted.plan),
    )  # fmt: skip


def forward_layer(adapted: Adapted, samples: Samples, i: int, k: int, *, query: bool) -> None:
    outputs = samples.outputs
    tasks, rows, _ = outputs.shape
    weight, bias, own, spec = _layer(adapted, samples, i)
    dual.forward_kernel[_programs(spec, tasks, rows), _tiles(spec, adapted.spec.widths[i + 1])](
        weight, bias, samples.base if i == adapted.first else None, *adapted.numbers.of[:2],
        tuple(adapted.inputs), tuple(adapted.gradients), samples.owner, adapted.owner,
        tuple(samples.inputs), tuple(samples.kept), tasks, rows, adapted.shots, adapted.steps, k, query, own, i, spec,
        **_options(adapted.plan),
    )  # fmt: skip


def sample_losses(
    adapted: Adapted,
    samples: Samples,
    k: int,
    *,
    y: Tensor | None,
    counts: Tensor | None = None,
    cotangent: Tensor | None = None,
    velocity: Tensor | None = None,
    query: bool,
) -> None:
    tasks, rows, _ = samples.outputs.shape
    dual.loss_kernel[_programs(samples.spec, tasks, rows),](
        y, counts, 1.0 if query else 1 / rows, cotangent, samples.losses, tuple(samples.inputs),
        tuple(samples.gradients), tuple(samples.kept), _inner(adapted, query), velocity,
        tasks, rows, adapted.shots, adapted.steps, k, query, samples.spec, **_options(adapted.plan),
    )  # fmt: skip


def backward_layer(
    adapted: Adapted, samples: Samples, i: int, k: int, *, velocity: Tensor | None = None, query: bool
) -> None:
    tasks, rows, _ = samples.outputs.shape
    weight, _, own, spec = _layer(adapted, samples, i)
    dual.backward_kernel[_programs(spec, tasks, rows), _tiles(spec, adapted.spec.widths[i])](
        weight, *adapted.numbers.of[:2], tuple(adapted.inputs), tuple(adapted.gradients), samples.owner, adapted.owner,
        tuple(samples.inputs), tuple(samples.gradients), tuple(samples.kept), samples.dx, samples.unit,
        _inner(adapted, query), velocity,
        tasks, rows, adapted.shots, adapted.steps, k, query, own, i, spec, **_options(adapted.plan),
    )  # fmt: skip


def _inner(adapted: Adapted, query: bool) -> Tensor | None:
    """What moves H; None where nothing does, or only what comes behind the launch."""
    return None if query or adapted.first_gradients is not None else adapted.numbers.inner


def step_layer(adapted: Adapted, i: int, own: Own, k: int) -> None:
    tasks, out, before = own.weight.shape
    dual.step_kernel[tasks, _tiles(adapted.spec, before) * _tiles(adapted.spec, out)](
        own.weight, own.bias, own.weight_velocity, own.bias_velocity, adapted.numbers.inner,
        adapted.inputs[i], adapted.gradients[i],
        adapted.shots, adapted.steps, k, i, adapted.spec, **_options(adapted.plan),
    )  # fmt: skip


def contract(adapted: Adapted, inputs: Layers, gradients: Layers, unit: float) -> Tensor:
    """As `products` of launching."""
    return products(adapted.spec, _options(adapted.plan), inputs, gradients, unit)


def _layer(adapted: Adapted, samples: Samples, i: int) -> tuple[Tensor | None, Tensor | None, bool, DualSpec]:
    """Weight and bias of a layer as they are now, whether each task has its own, and what its kernels are made for."""
    own = adapted.own.get(i)
    if own is None:
        return adapted.weights[i], adapted.biases[i], False, samples.spec
    adapts = tuple(moves and j != i for j, moves in enumerate(samples.spec.adapts))
    return own.weight, own.bias, True, replace(samples.spec, adapts=adapts)


def _shared(samples: Samples, i: int, width: int) -> tuple[int, int, DualSpec]:
    """Rows, tiles of features, and the spec of a layer that does not move: to it all samples are of one task."""
    x = samples.inputs[0]
    assert x is not None
    rows, tiles = x.shape[0] * x.shape[1], _tiles(samples.spec, width)
    # Blocks as large as leave no multiprocessor idle.
    large = [block for block in (64, 32) if -(-rows // block) * tiles >= multiprocessors(x.device)]
    block = large[0] if large else 16
    spec = replace(samples.spec, adapts=(False,) * len(samples.kept), tasks=1, samples=block, ragged=False)
    return rows, tiles, spec


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
