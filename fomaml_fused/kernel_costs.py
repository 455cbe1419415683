"""The cost model of the kernels: how long a GPU takes for a meta-step, from constants that are stated here.

It orders alternatives; it does not predict seconds. The constants of a chip are its data sheet's; those of a program's
chain are assumptions until a GPU has measured them.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from .batch import Sizes
from .kernels.configuration import Config, DualConfig, PrimalConfig, TiledConfig
from .kernels.spec import padded
from .problem import Problem


@dataclass(frozen=True)
class Chip:
    """What the model knows of a GPU.

    Attributes:
        launch: seconds to start a kernel.
        multiprocessors: how many programs of four warps or more run at a time, two to each.
        matrix: operations a second of dense products, by precision.
        cached: bytes a second from the cache that all multiprocessors share.
        streamed: bytes a second from memory.
        phase: seconds of a layer's pass in one program, beside its products: a barrier, a trip to the cache and back.
        tile: seconds to fetch a tile of weights and multiply it, where nothing else hides the latency.
    """

    launch: float
    multiprocessors: int
    matrix: dict[str, float]
    cached: float
    streamed: float
    phase: float
    tile: float


# An H100's data sheet (SXM): multiprocessors, matrix rates, memory. Its cache's rate and what follows are assumptions.
CHIP = Chip(
    launch=6e-6,
    multiprocessors=132,
    matrix={"ieee": 66.9e12, "tf32x3": 494.7e12 / 3, "tf32": 494.7e12, "bf16": 989e12, "fp16": 989e12},
    cached=5.5e12,
    streamed=3.35e12,
    phase=0.5e-6,
    tile=0.15e-6,
)


@dataclass(frozen=True)
class Work:
    """Seconds of the longest chain of dependent tiles, launches before it; operations; bytes from the cache."""

    seconds: float
    flops: float
    bytes: float

    def __add__(self, other: Work) -> Work:
        return Work(self.seconds + other.seconds, self.flops + other.flops, self.bytes + other.bytes)


def resident_work(problem: Problem, sizes: Sizes, config: Config, precision: str) -> Work:
    """A meta-step of the resident kernel: two launches, and the chain of each program's tasks."""
    network, steps = problem.network, problem.inner.steps
    passes = 0 if problem.outer == "reptile" else steps if problem.multi_step else 1  # over the query set
    tiles = steps * -(-sizes.shots // config.samples) + passes * -(-sizes.queries // config.samples)
    rows = sizes.tasks * (steps * sizes.shots + passes * sizes.queries)
    flops = 6.0 * rows * network.parameters
    seconds = 2 * CHIP.launch + _waves(sizes.tasks) * 2 * tiles * network.depth * CHIP.phase
    samples = sizes.shots * (steps if sizes.each_step else 1) + min(passes, 1) * sizes.queries
    traffic = 4.0 * sizes.tasks * samples * (network.in_features + network.out_features)
    return Work(seconds + flops / CHIP.matrix[precision], flops, traffic + 8.0 * network.parameters)


def dual_work(problem: Problem, sizes: Sizes, config: DualConfig, precision: str, *, layered: bool) -> Work:
    """A meta-step in the dual form: in two launches and those around them, or layer by layer."""
    inner, widths = problem.inner, problem.network.widths
    first = inner.first_adapted
    packs = -(-sizes.tasks // config.tasks)
    support = padded(max(2, config.tasks * sizes.shots))
    history = padded(max(2, config.tasks * inner.steps * sizes.shots))
    blocks = packs * -(-config.tasks * sizes.queries // config.samples)
    total = Work(2 * CHIP.launch, 0.0, 0.0)  # outer gradient and reduction
    for i, (before, after) in enumerate(pairwise(widths)):
        rank = 0 if i < first or not inner.adapt[i] else support if i == first and not sizes.each_step else history
        shots = sizes.shots * (inner.steps if sizes.each_step else 1)
        shared = _pass(before, after, 0, 64, -(-sizes.tasks * (shots + sizes.queries) // 64), config, True)
        if i <= first:  # of both sets, forward; and back below the first layer that moves
            total += shared + (shared if i < first else Work(CHIP.launch, 0.0, 0.0))
        if i >= first:
            inner_pass = _pass(before if i > first else 0, after, rank, support, packs, config, layered)
            query_pass = _pass(before if i > first else 0, after, rank, config.samples, blocks, config, layered)
            backward = i > first
            for _ in range(inner.steps * (1 + backward)):
                total += inner_pass
            for _ in range((1 + backward) * (max(inner.steps, 1) if problem.multi_step else 1)):
                total += query_pass
            if inner.max_grad_norm is not None and inner.adapt[i]:  # two Gram matrices, and what is done with them
                total += Work(inner.steps * 6 * CHIP.launch, 0.0, 0.0)
        rows = sizes.tasks * sizes.queries
        total += Work(0.0, 2.0 * rows * before * after, 4.0 * (rows * (before + after) + 2 * before * after))
    phases = inner.steps + 1  # the losses
    total += Work(phases * (CHIP.launch if layered else CHIP.phase), 0.0, 0.0)
    if not layered:
        total += Work(2 * CHIP.launch, 0.0, 0.0)
    seconds = total.seconds + total.flops / CHIP.matrix[precision] + total.bytes / CHIP.cached
    return Work(seconds, total.flops, total.bytes)


def primal_work(problem: Problem, sizes: Sizes, config: PrimalConfig, precision: str, *, chained: bool) -> Work:
    """A meta-step with weights of each task: passes of both sets through all layers, or layer by layer."""
    network, steps = problem.network, problem.inner.steps
    size = 2 if precision in ("bf16", "fp16") else 4
    passes = 0 if problem.outer == "reptile" else max(steps, 1) if problem.multi_step else 1
    total = Work(2 * CHIP.launch, 0.0, 0.0)  # outer gradient and reduction
    for samples, times in ((sizes.shots, steps), (sizes.queries, passes)):
        rows, blocks = sizes.tasks * samples, sizes.tasks * -(-samples // config.samples)
        left = size * rows * sum(before + after for before, after in pairwise(network.widths))
        # Products that contract samples; weights are read and written.
        one = Work(CHIP.launch, 2.0 * rows * network.parameters, left + 8.0 * sizes.tasks * network.parameters)
        if chained:
            chain = _waves(blocks) * 2 * network.depth * (CHIP.phase + CHIP.tile)
            one += Work(CHIP.launch + chain, 4.0 * rows * network.parameters, left + 8.0 * blocks * network.parameters)
        else:
            for before, after in pairwise(network.widths):
                one += _pass(before, after, 0, config.samples, blocks, config, True)
                one += _pass(after, before, 0, config.samples, blocks, config, True)
        total += Work(times * one.seconds, times * one.flops, times * one.bytes)
    seconds = total.seconds + total.flops / CHIP.matrix[precision] + total.bytes / CHIP.cached
    return Work(seconds, total.flops, total.bytes)


def _pass(before: int, after: int, rank: int, samples: int, programs: int, config: TiledConfig, spread: bool) -> Work:
    """A layer's pass over every block of samples: a launch whose features are spread over programs, or a phase of one.

    before: features contracted, 0 where the product with the weights is known already.
    """
    tiles = -(-after // config.features)
    contracted = -(-before // config.contracted)
    gram = contracted if rank else 0
    flops = 2.0 * programs * samples * (before * after + rank * (before + after))
    # Each block reads the layer's weights and its history.
    traffic = 4.0 * programs * (before * after + rank * (before + after) + samples * (before + after))
    if spread:
        chain = _waves(programs * tiles) * (gram + max(contracted, 1)) * CHIP.tile
        return Work(CHIP.launch + CHIP.phase + chain, flops, traffic)
    chain = _waves(programs) * (CHIP.phase + (gram + tiles * max(contracted, 1)) * CHIP.tile)
    return Work(chain, flops, traffic)


def _waves(programs: int) -> int:
    return -(-programs // (2 * CHIP.multiprocessors))
