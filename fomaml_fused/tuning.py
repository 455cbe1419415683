"""Measures how a kernel is best laid out for given sizes; nothing else in the package ever does."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .module import FOMAML
from .planner import forget_plans
from .plans import Plan, override

if TYPE_CHECKING:
    from .kernels.configuration import Config

WARPS = (1, 2, 4, 8)
SAMPLES = (16, 32, 64)
# Of kernels of tiles, which take longer to compile, fewer.
TILED = {"warps": (4, 8), "samples": SAMPLES, "features": (32, 64), "stages": (2, 3)}


def tune(meta: FOMAML, tasks: int, shots: int, queries: int | None = None, *, rounds: int = 20) -> dict[Config, float]:
    """Time every layout of the kernels that the planner chooses for these sizes, and plan with the fastest from now on.

    Each round runs a meta-step, backward included, of every layout in turn, on random tasks. What is found holds in
    this process, for networks of these widths, tasks of these sizes and this precision.

    Args:
        meta: on the device to tune for, with backend "triton" or "auto".
        queries: None for as many as shots.

    Returns:
        The median seconds of each layout, the fastest first.

    Raises:
        ValueError: no fused kernel takes the problem, and the message is the plan's reason; or no round.
    """
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}; it takes at least 1")
    queries = shots if queries is None else queries
    batch = _random_tasks(meta, tasks, shots, queries)
    usable = {}
    plan = meta.plan(tasks, shots, queries)
    if plan.engine == "batched":
        raise ValueError(f"no fused kernel takes this problem: {plan.reason}")
    from triton.runtime.errors import OutOfResources

    for config in _layouts(plan):
        with override(engine=plan.engine, config=config):
            try:
                layout = meta.plan(tasks, shots, queries)
                _seconds(meta, batch)  # compiles
                usable[config] = layout
            except (ValueError, OutOfResources):  # it does not fit
                continue
    times: dict[Config, list[float]] = {config: [] for config in usable}
    for _ in range(rounds):
        for config, measured in times.items():
            with override(engine=plan.engine, config=config):
                measured.append(_seconds(meta, batch))
    medians = sorted((statistics.median(measured), config) for config, measured in times.items())
    best = medians[0][1]
    _remember(usable[best], best)
    forget_plans()
    return {config: median for median, config in medians}


def _layouts(plan: Plan) -> Iterator[Config]:
    """What there is to try for the engine of a plan."""
    from .kernels.configuration import Config, TiledConfig

    if isinstance(plan.config, TiledConfig):
        for choice in product(*TILED.values()):
            yield replace(plan.config, **dict(zip(TILED, choice, strict=True)))
    else:
        for warps, samples in product(WARPS, SAMPLES):
            yield Config(warps, samples)


def _seconds(meta: FOMAML, batch: tuple[Tensor, ...]) -> float:
    device = batch[0].device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    with torch.enable_grad():
        torch.autograd.grad(meta(*batch), [p for p in meta.parameters() if p.requires_grad])
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _remember(plan: Plan, config: Config) -> None:
    from .engines import launching
    from .kernel_plans import tuned_for
    from .kernels.configuration import remember

    key = tuned_for(plan.problem, plan.sizes, plan.precision)
    remember(launching.device_name(plan.sizes.device), plan.engine, key, config)


def _random_tasks(meta: FOMAML, tasks: int, shots: int, queries: int) -> tuple[Tensor, ...]:
    network, like = meta.problem.network, next(meta.parameters())
    generator = torch.Generator(like.device).manual_seed(0)
    parts = []
    for samples, loss in ((shots, meta.problem.loss), (queries, meta.problem.outer_loss)):
        x = torch.randn(tasks, samples, network.in_features, generator=generator, dtype=like.dtype, device=like.device)
        if loss.takes_classes:
            y = torch.randint(network.out_features, (tasks, samples), generator=generator, device=like.device)
        else:
            y = torch.rand(
                tasks, samples, network.out_features, generator=generator, dtype=like.dtype, device=like.device
            )
        parts += [x, y]
    return tuple(parts)
