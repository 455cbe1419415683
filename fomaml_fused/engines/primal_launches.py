"""What the primal engine launches: a pass of samples through the network and back, and what moves a task's weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..inner import PARTS
from ..kernels import primal
from ..kernels.activations import keeps_output
from ..kernels.configuration import PrimalConfig
from ..kernels.spec import PrimalSpec, features, outer_tiles
from ..problem import Problem
from . import FlatParameters, Planned, rates_of
from .launching import compiled_for, inner_numbers, new, options, pointers, split_samples

Layers = list[Tensor | None]  # something of each layer
OPERANDS = {"bf16": torch.bfloat16, "fp16": torch.float16}


@lru_cache(maxsize=1024)
def spec_of(problem: Problem, precision: str, config: PrimalConfig) -> PrimalSpec:
    """What the kernels are compiled for."""
    inner = problem.inner
    learned = "layer" if inner.learn_lr is not None else "fixed"
    return PrimalSpec(
        **compiled_for(problem, precision),
        adam=inner.optimizer == "adam",
        clips_value=inner.max_grad_value is not None,
        learns=inner.learn_lr is not None,
        rates="element" if inner.learn_lr == "element" else learned,
        samples=config.samples,
        features=config.features,
        contracted=config.contracted,
    )


@dataclass
class Adapted:
    """A chunk of tasks after some inner steps, and in the end after all.

    Attributes:
        weights, biases: of each layer, [out, in] and [out], or None; shared by all tasks.
        inner: the numbers of the inner loop, as kernels read them.
        learned: rates that are, as engines list them.
        tasks: how many.
        taken: inner steps behind them.
        fast: the parameters of each task [T, parameters], those of layers that move; None before the first step.
        first, second: the velocity or the first moment, and the second moment, alike.
        directions: the sum of what learned rates multiplied, alike.
    """

    plan: Planned
    spec: PrimalSpec
    weights: tuple[Tensor | None, ...]
    biases: tuple[Tensor | None, ...]
    inner: Tensor
    learned: list[Tensor | None]
    tasks: int
    taken: int = 0
    fast: Tensor | None = None
    first: Tensor | None = None
    second: Tensor | None = None
    directions: Tensor | None = None

    @property
    def depth(self) -> int:
        return len(self.weights)

    @property
    def moving(self) -> list[int]:
        """The layers that move."""
        return [i for i, moves in enumerate(self.spec.adapts) if moves]

    @property
    def config(self) -> PrimalConfig:
        assert isinstance(self.plan.config, PrimalConfig)
        return self.plan.config


def unadapted(plan: Planned, parameters: FlatParameters, tasks: int, device: torch.device) -> Adapted:
    """Tasks before their first step."""
    problem, config = plan.problem, plan.config
    assert plan.precision is not None
    assert isinstance(config, PrimalConfig)
    spec = spec_of(problem, plan.precision, config)
    weights, biases = pointers(parameters[: len(PARTS) * problem.network.depth])
    learned = [None if rate is None else rate.float().contiguous() for rate in rates_of(problem, parameters)]
    return Adapted(plan, spec, weights, biases, inner_numbers(problem, device), learned, tasks)


@dataclass
class Targets:
    """What samples are measured by: targets [T, N, ...] and what each sample counts, or the gradient of the outputs."""

    y: Tensor | None = None
    counts: Tensor | None = None
    cotangent: Tensor | None = None

    def at(self, rows: slice) -> Targets:
        """Of some of each task's samples."""
        return Targets(*(None if t is None else t[:, rows].contiguous() for t in (self.y, self.counts, self.cotangent)))


@dataclass
class Pass:
    """What a pass of samples leaves.

    Attributes:
        outputs: [T, N, out].
        inputs, gradients: X [T, N, in] and D [T, N, out] of each layer, None where not wanted.
        losses: of samples, times what they count, [T, N].
        dx: the gradient of the features, [T, N, in].
    """

    outputs: Tensor
    inputs: Layers
    gradients: Layers
    losses: Tensor | None
    dx: Tensor | None


def blocks(adapted: Adapted, samples: int) -> Iterator[slice]:
    """The samples of each task that are under way at a time; none of none."""
    rows = rows_at_a_time(adapted, samples)
    return (slice(begin, min(begin + rows, samples)) for begin in range(0, max(samples, 1), rows))


def rows_at_a_time(adapted: Adapted, samples: int) -> int:
    return max(min(samples, adapted.plan.rows or samples), 1)


def run(
    adapted: Adapted,
    x: Tensor,
    targets: Targets | None,
    *,
    query: bool,
    wanted: Sequence[bool],
    unit: float = 1.0,
    features: bool = False,
) -> Pass:
    """Samples x [T, N, in] through the network, and back where they have targets.

    Args:
        query: whose loss it is.
        wanted: of which layers X and D are.
        unit: what the gradient of the features, if it is wanted, is multiplied by.
    """
    spec, device = adapted.spec, x.device
    targets = targets or Targets()
    backward = targets.y is not None or targets.cotangent is not None
    lowest = -1 if features else next((i for i, want in enumerate(wanted) if want), adapted.depth)
    outputs = new(device, *x.shape[:2], spec.widths[-1])
    losses = None if targets.y is None or targets.cotangent is not None else new(device, *x.shape[:2])
    dx = new(device, *x.shape) if features and backward else None
    found = Pass(outputs, [None] * adapted.depth, [None] * adapted.depth, losses, dx)
    if adapted.plan.engine == "chained":
        for i, want in enumerate(wanted):
            if want and backward:
                found.inputs[i] = x if i == 0 else operands(spec, *x.shape[:2], spec.widths[i], device=device)
                found.gradients[i] = operands(spec, *x.shape[:2], spec.widths[i + 1], device=device)
        inputs = (None, *found.inputs[1:])
        primal.pass_kernel[_programs(spec, x),](
            adapted.weights, adapted.biases, adapted.fast, x, targets.y, targets.counts, 1.0, targets.cotangent,
            inputs, tuple(found.gradients), outputs, losses, dx, unit, x.shape[1], lowest, query,
            adapted.fast is not None, spec, **launch_options(adapted),
        )  # fmt: skip
        return found
    _layer_by_layer(adapted, x, targets, found, query, lowest, unit)
    found.inputs = [x if want else None for x, want in zip(found.inputs, wanted, strict=True)]
    found.gradients = [d if want else None for d, want in zip(found.gradients, wanted, strict=True)]
    return found


def _layer_by_layer(
    adapted: Adapted, x: Tensor, targets: Targets, found: Pass, query: bool, lowest: int, unit: float
) -> None:
    spec, launch, depth, device = adapted.spec, launch_options(adapted), adapted.depth, x.device
    sizes, programs = x.shape[:2], _programs(adapted.spec, x)
    own = adapted.fast is not None
    kept: Layers = [None] * depth
    found.inputs[0] = h = x
    for i, after in enumerate(spec.widths[1:]):
        z = None
        if i < depth - 1:
            out = found.inputs[i + 1] = operands(spec, *sizes, after, device=device)
        else:
            out = found.outputs
        if keeps_output(spec.activations[i]):
            kept[i] = out
        elif found.losses is not None or targets.cotangent is not None:
            z = kept[i] = new(device, *sizes, after)
        primal.forward_kernel[programs, _tiles(spec, after)](
            adapted.weights[i], adapted.biases[i], adapted.fast, h, out, z, sizes[1], own, i, spec, **launch
        )
        h = out
    if found.losses is None and targets.cotangent is None:
        return
    d = None if lowest == depth else operands(spec, *sizes, spec.widths[-1], device=device)
    primal.loss_kernel[programs,](
        found.outputs, kept[-1], targets.y, targets.counts, 1.0, targets.cotangent, found.losses, d, sizes[1], query,
        spec, **launch,
    )  # fmt: skip
    for i in range(depth - 1, lowest, -1):
        found.gradients[i] = d
        below = found.dx if i == 0 else operands(spec, *sizes, spec.widths[i], device=device)
        primal.backward_kernel[programs, _tiles(spec, spec.widths[i])](
            adapted.weights[i], adapted.fast, d, kept[i - 1] if i else None, below, unit, sizes[1], own, i, spec,
            **launch,
        )  # fmt: skip
        d = below
    if 0 <= lowest < depth:
        found.gradients[lowest] = d


def move(adapted: Adapted, passed: Pass, unit: float) -> None:
    """Step along the gradients that a pass left, times `unit`."""
    own = _grow(adapted)
    primal.step_kernel[adapted.tasks * _all_tiles(adapted.spec),](
        adapted.weights, adapted.biases, adapted.fast, adapted.first, adapted.second, adapted.directions,
        adapted.inner, _rates(adapted), tuple(passed.inputs), tuple(passed.gradients), unit, passed.outputs.shape[1],
        adapted.plan.problem.inner.steps, adapted.taken, own, adapted.spec, **launch_options(adapted),
    )  # fmt: skip
    adapted.taken += 1


def move_along(adapted: Adapted, gradients: Tensor) -> None:
    """Step along gradients in parts, [T, splits, parameters]."""
    own = _grow(adapted)
    primal.update_kernel[adapted.tasks * _all_tiles(adapted.spec),](
        adapted.weights, adapted.biases, adapted.fast, adapted.first, adapted.second, adapted.directions,
        adapted.inner, _rates(adapted), gradients, gradients.shape[1], adapted.plan.problem.inner.steps, adapted.taken,
        own, adapted.spec, **launch_options(adapted),
    )  # fmt: skip
    adapted.taken += 1


def _grow(adapted: Adapted) -> bool:
    """Make room for what tasks have of their own from the first step on; whether they had it before."""
    if adapted.fast is not None:
        return True
    spec, device = adapted.spec, adapted.inner.device
    adapted.fast = new(device, adapted.tasks, spec.parameters)
    adapted.first = torch.empty_like(adapted.fast) if spec.momentum or spec.adam else None
    adapted.second = torch.empty_like(adapted.fast) if spec.adam else None
    adapted.directions = torch.empty_like(adapted.fast) if spec.learns else None
    return False


def _rates(adapted: Adapted) -> Tensor | tuple[Tensor | None, ...] | None:
    """Learned rates as the kernels take them."""
    if adapted.spec.rates == "element":
        return (*adapted.learned[0 :: len(PARTS)], *adapted.learned[1 :: len(PARTS)])
    return adapted.learned[0] if adapted.learned else None


def splits(adapted: Adapted, samples: int) -> tuple[int, int]:
    """How many parts the gradient of samples under way is summed in, and how many samples of a task a part has."""
    spec, rows = adapted.spec, rows_at_a_time(adapted, samples)
    return split_samples(spec, rows, adapted.tasks * _all_tiles(spec), adapted.inner.device)


def products_of_tasks(
    adapted: Adapted, passed: Pass, unit: float, partials: Tensor, first: int, length: int, parts: int
) -> None:
    """Products DᵀX of each task, and sums of D, times `unit`: `parts` of them, of `length` samples each.

    partials: where they go, [T, N, parameters], from part `first` on.
    """
    samples = passed.outputs.shape[1]
    primal.products_kernel[adapted.tasks * _all_tiles(adapted.spec), parts](
        tuple(passed.inputs), tuple(passed.gradients), partials, unit, samples, length, partials.shape[1], first,
        adapted.spec, **launch_options(adapted),
    )  # fmt: skip


def operands(spec: PrimalSpec, *shape: int, device: torch.device) -> Tensor:
    """Room for what products take: in 16 bits where they take it so, for they would round it anyway."""
    return new(device, *shape, dtype=OPERANDS.get(spec.precision, torch.float32))


def launch_options(adapted: Adapted) -> dict[str, int | bool]:
    return options(adapted.config.warps, adapted.config.stages)


def _programs(spec: PrimalSpec, x: Tensor) -> int:
    """Tasks times blocks of a task's samples."""
    programs: int = x.shape[0] * -(-x.shape[1] // spec.samples)
    return programs


def _tiles(spec: PrimalSpec, width: int) -> int:
    tiles: int = -(-width // features(spec, width))
    return tiles


def _all_tiles(spec: PrimalSpec) -> int:
    tiles: int = outer_tiles(spec, len(spec.activations))
    return tiles
