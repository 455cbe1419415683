"""How a problem is computed: which engine, which form for each layer, how many tasks at a time, and why."""

from __future__ import annotations

import math
import warnings
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from .batch import Sizes
from .costs import CPU, GPU, Device, Operation, Shape, layer_bytes, layer_operations, resident_seconds, state_bytes
from .engines import fold_step
from .problem import Problem
from .text import scaled, table

if TYPE_CHECKING:
    from .kernels.configuration import Config

BACKENDS = ("auto", "triton", "torch", "reference")
# How a kernel multiplies: torch's names for float32 products, or the operands themselves.
PRECISIONS = ("highest", "high", "medium", "ieee", "tf32x3", "tf32", "bf16", "fp16")
FORMS = ("primal", "dual")
# Scratch a chunk of tasks may take. Small enough for any machine that trains, far above what a chunk needs to be fast.
MEMORY_BOUND = 1 << 30


@dataclass(frozen=True)
class Estimate:
    """What the cost model says of an alternative: seconds, flops and bytes of one meta-step."""

    seconds: float
    flops: float
    bytes: float


@dataclass(frozen=True)
class LayerPlan:
    """The form of one layer, with the estimate of each form it could take; of the folds, the cheapest one's."""

    form: str
    estimates: tuple[tuple[str, Estimate], ...]

    @property
    def estimate(self) -> Estimate:
        return dict(self.estimates)[self.form]


@dataclass(frozen=True)
class Plan:
    """A decision of the planner, and what it was made from. `print(plan)` explains it.

    Attributes:
        engine: "resident", "batched" or "reference".
        layers: the form of each layer.
        chunk: tasks that run at a time.
        keeps_state: whether `predict` keeps all tasks' adapted layers for its backward; else it adapts again.
        memory: bytes that a chunk holds at its peak, by the model.
        naive_memory: bytes of fast weights and gradients of every task, which the per-task formula would hold.
        reason: why this engine runs.
        memory_bound: bytes that the chunk was chosen to stay under.
        precision: of the operands of a kernel's products, "ieee", "tf32x3", "tf32", "bf16" or "fp16".
        config: a kernel's warps and tiles.
    """

    problem: Problem
    sizes: Sizes
    engine: str
    layers: tuple[LayerPlan, ...]
    chunk: int
    keeps_state: bool
    memory: float
    naive_memory: float
    reason: str
    memory_bound: int = MEMORY_BOUND
    precision: str | None = None
    config: Config | None = None

    @property
    def forms(self) -> tuple[str, ...]:
        return tuple(layer.form for layer in self.layers)

    @property
    def estimate(self) -> Estimate:
        parts = [layer.estimate for layer in self.layers]
        return Estimate(*(sum(getattr(p, name) for p in parts) for name in ("seconds", "flops", "bytes")))

    def explain(self) -> str:
        """A table of the plan: chosen forms, the alternatives, memory."""
        sizes, problem = self.sizes, self.problem
        lines = [
            f"{problem}",
            f"T={sizes.tasks} tasks, S={sizes.shots} shots, Q={sizes.queries} queries, "
            f"{str(sizes.dtype).removeprefix('torch.')} on {sizes.device}",
            f"engine {self.engine}: {self.reason}",
        ]
        if self.engine == "reference":
            return "\n".join(lines)
        if self.engine == "resident":
            return "\n".join([*lines, "", *self._alternatives()])
        rows = [("layer", "form", "flops", "bytes", "time", "instead")]
        for i, (layer, plan) in enumerate(zip(problem.network.layers, self.layers, strict=True)):
            times = {_words(form, problem.inner.steps): scaled(e.seconds, "s") for form, e in plan.estimates}
            form = _words(plan.form, problem.inner.steps)
            others = "; ".join(f"{other} {time}" for other, time in times.items() if other != form)
            name = f"{i}: {layer.in_features} -> {layer.out_features}"
            rows.append((name, form, *_row(plan.estimate), others or "- (does not move)"))
        rows.append(("all", "", *_row(self.estimate), ""))
        return "\n".join([*lines, "", *table(rows), "", *self._alternatives()])

    def _alternatives(self) -> list[str]:
        """A table of this plan beside others."""
        plans = [("chosen", self)]
        for form in FORMS:
            told = Override((form,) * self.problem.network.depth, None, self.memory_bound)
            other = _batched(self.problem, self.sizes, told, "")
            if other.forms != self.forms:
                plans.append((f"all {form}", other))
        rows = [("plan", "tasks at a time", "flops", "bytes", "time", "held")]
        rows += [(name, str(p.chunk), *_row(p.estimate), scaled(p.memory, "B")) for name, p in plans]
        rows.append(("per task, by the formula", "1", "", "", "", scaled(self.naive_memory, "B")))
        return [*table(rows), "", "times are the cost model's, for comparison; they are not measurements"]

    __str__ = explain


@dataclass(frozen=True)
class Override:
    """What the planner is told instead of choosing it.

    Attributes:
        forms: the form of each layer, "primal", "dual" or "dual:k"; layers that do not move stay shared.
        chunk: tasks at a time.
        memory_bound: bytes of scratch that a chunk may take.
        config: a kernel's warps and tiles.
    """

    forms: tuple[str, ...] | None = None
    chunk: int | None = None
    memory_bound: int = MEMORY_BOUND
    config: Config | None = None

    def __post_init__(self) -> None:
        if self.forms is not None and not all(form in FORMS or fold_step(form) for form in self.forms):
            raise ValueError(f"forms is {self.forms}; it takes 'primal', 'dual' or 'dual:k', k >= 1, for each layer")
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(f"chunk is {self.chunk}; it takes at least one task")


_override: ContextVar[Override] = ContextVar("override", default=Override())  # noqa: B039 (it is frozen)


@contextmanager
def override(
    *,
    forms: Sequence[str] | None = None,
    chunk: int | None = None,
    memory_bound: int = MEMORY_BOUND,
    config: Config | None = None,
) -> Iterator[None]:
    """Within the block, plans follow these choices (see `Override`) instead of the cost model's.

    Raises:
        ValueError: an unknown form or a chunk of no task; when planning, not one form a layer, or a layer that is
            to fold at a step past the last.
    """
    token = _override.set(Override(None if forms is None else tuple(forms), chunk, memory_bound, config))
    try:
        yield
    finally:
        _override.reset(token)


def make_plan(problem: Problem, sizes: Sizes, backend: str = "auto", precision: str = "highest") -> Plan:
    """Plan a batch of tasks. Deterministic: the same arguments and overrides give the same plan.

    Args:
        backend: one of `BACKENDS`.  precision: one of `PRECISIONS`, of a kernel's products.

    Raises:
        ValueError: an unknown backend or precision, or overriding forms that the problem does not take.
        RuntimeError: backend "triton" where Triton cannot run on the device.

    Warns:
        UserWarning: backend "triton" where no kernel takes the problem; the plan says why, and what runs instead.
    """
    plan = _make_plan(problem, sizes, backend, precision, _override.get())
    if backend == "triton" and plan.engine != "resident":
        warnings.warn(f"backend 'triton' runs the batched engine instead: {plan.reason}", stacklevel=2)
    return plan


@lru_cache(maxsize=256)
def _make_plan(problem: Problem, sizes: Sizes, backend: str, precision: str, told: Override) -> Plan:
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; it takes one of {', '.join(BACKENDS)}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; it takes one of {', '.join(PRECISIONS)}")
    depth = problem.network.depth
    if told.forms is not None:
        _check_forms(told.forms, problem)
    if backend == "reference":
        layers = tuple(LayerPlan("reference", ()) for _ in range(depth))
        naive = float(2 * sizes.tasks * problem.network.parameters * sizes.dtype.itemsize)
        return Plan(
            problem, sizes, "reference", layers, 1, True, naive, naive, "autograd, one task at a time, as asked for"
        )
    if backend == "torch":
        return _batched(problem, sizes, told, "batched torch ops, as asked for")
    if backend == "auto" and sizes.device.type == "cpu":
        return _batched(problem, sizes, told, "batched torch ops, the fastest on a CPU")
    obstacle = _triton_obstacle(sizes.device)
    if obstacle is not None and backend == "triton":
        raise RuntimeError(
            f"backend 'triton' cannot run on {sizes.device} tensors: {obstacle}. Move model and data to a GPU that "
            "Triton supports, set TRITON_INTERPRET=1 in the environment to interpret the kernels (slow, for tests), "
            "or take backend 'torch' or 'auto'"
        )
    obstacle = obstacle or _kernel_obstacle(problem, sizes, told)
    resident = obstacle or _resident(problem, sizes, told, precision)
    if isinstance(resident, str):
        return _batched(problem, sizes, told, f"batched torch ops, for the resident kernel cannot run: {resident}")
    batched = _batched(problem, sizes, told, "batched torch ops, by the cost model ahead of the resident kernel")
    if backend == "auto" and batched.estimate.seconds < resident.estimate.seconds:
        return batched
    return resident


def forget_plans() -> None:
    """Plan anew from now on, where something that plans depend on has changed."""
    _make_plan.cache_clear()


def tuned_for(problem: Problem, sizes: Sizes, precision: str | None) -> Hashable:
    """What a kernel's configuration is remembered by."""
    return problem.network.widths, precision, sizes.shots, sizes.queries


def _triton_obstacle(device: torch.device) -> str | None:
    """Why Triton cannot run on tensors of a device; None where it can."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    from .engines import fused

    return fused.obstacle(device)


def _kernel_obstacle(problem: Problem, sizes: Sizes, told: Override) -> str | None:
    """Why no kernel takes a problem, whatever its size."""
    if told.forms is not None:
        return "the overriding forms are those of batched torch ops"
    if sizes.dtype == torch.float64:
        return "kernels compute in float32, the model is float64"
    if max(sizes.shots, sizes.queries) * max(problem.network.widths) >= 2**31:
        return "a task has 2^31 numbers or more, and offsets within a task are 32 bits"
    for name, loss in (("loss", problem.loss), ("outer_loss", problem.outer_loss)):
        if loss.name == "callable":
            return f"{name} is a callable, which a kernel cannot call"
    return None


def _resident(problem: Problem, sizes: Sizes, told: Override, precision: str) -> Plan | str:
    """The plan of the resident kernel, or why the problem does not fit it."""
    from .engines import fused
    from .kernels.configuration import configuration
    from .kernels.resources import REGISTERS, resident_need, weight_tiles

    device = fused.device_name(sizes.device)
    backend, _, architecture = device.partition("-")
    operands = {"highest": "tf32x3", "high": "tf32", "medium": "bf16"}
    if backend == "hip":
        operands |= {"highest": "ieee", "high": "tf32" if architecture == "gfx942" else "ieee"}
        if precision == "tf32x3" or (precision == "tf32" and architecture != "gfx942"):
            return f"precision {precision!r} is not one of this device's matrix units; 'ieee' is"
    precision = operands.get(precision, precision)
    layers, network = problem.network.layers, problem.network
    largest = max(weight_tiles(network.widths), default=0)
    config = told.config or configuration(device, "resident", largest, tuned_for(problem, sizes, precision))
    if config is None:
        return f"its largest weight, {largest:,} numbers when padded, is more than a program holds on chip"
    spec = fused.spec_of(problem, sizes.shots, sizes.queries, precision, config)
    need, shared = resident_need(spec, config), fused.shared_memory(sizes.device)
    if need.registers > REGISTERS:
        return f"it needs about {need.registers} registers a thread for this network, and a thread has {REGISTERS}"
    if need.shared > shared:
        return f"it needs about {need.shared:,} bytes of shared memory, and a program has {shared:,}"
    itemsize = torch.float32.itemsize
    chunk = max(1, min(sizes.tasks, told.memory_bound // (itemsize * spec.parameters)))
    if told.chunk is not None:
        chunk = told.chunk
    rows = sizes.tasks * (problem.inner.steps * sizes.shots + sizes.queries)
    flops = 6.0 * rows * network.parameters
    traffic = itemsize * (sizes.tasks * (sizes.shots + sizes.queries) * (network.in_features + network.out_features))
    tiles = problem.inner.steps * -(-sizes.shots // config.samples) + -(-sizes.queries // config.samples)
    seconds = resident_seconds(sizes.tasks, tiles * network.depth, flops, GPU)
    whole = Estimate(seconds, flops, float(traffic + 2 * itemsize * network.parameters))
    share = Estimate(*(getattr(whole, name) / network.depth for name in ("seconds", "flops", "bytes")))
    state = float(chunk * spec.parameters * itemsize)
    return Plan(
        problem=problem,
        sizes=sizes,
        engine="resident",
        layers=tuple(LayerPlan("resident", (("resident", share),)) for _ in layers),
        chunk=chunk,
        keeps_state=chunk >= sizes.tasks,
        memory=state,
        naive_memory=float(2 * sizes.tasks * network.parameters * itemsize),
        reason=f"one program a task, {config.warps} warps, tiles of {config.samples} samples, products in {precision}; "
        f"about {need.registers} registers a thread, {need.shared:,} bytes of shared memory",
        memory_bound=told.memory_bound,
        precision=precision,
        config=config,
    )


def _batched(problem: Problem, sizes: Sizes, told: Override, reason: str) -> Plan:
    """The fastest plan of batched torch ops, by the cost model, that stays within the bound on memory."""
    device = CPU if sizes.device.type == "cpu" else GPU
    candidates = [told.chunk] if told.chunk is not None else _chunks(sizes.tasks)
    plans = [_plan_chunk(problem, sizes, device, told, chunk, reason) for chunk in candidates]
    within = [plan for plan in plans if plan.memory <= told.memory_bound] or plans[-1:]
    return min(within, key=lambda plan: plan.estimate.seconds)


def _plan_chunk(problem: Problem, sizes: Sizes, device: Device, told: Override, chunk: int, reason: str) -> Plan:
    """The cheapest forms for a given number of tasks at a time."""
    inner, layers = problem.inner, problem.network.layers
    itemsize = max(sizes.dtype.itemsize, torch.float32.itemsize)
    shape = Shape(
        chunk, sizes.shots, sizes.queries, inner.steps, itemsize, inner.momentum > 0.0, inner.weight_decay > 0.0
    )
    times = math.ceil(sizes.tasks / chunk)
    chosen, held, state = [], 0.0, 0.0
    for i, layer in enumerate(layers):
        chosen.append(_plan_layer(problem, i, shape, device, told, times))
        form, first = chosen[-1].form, i == inner.first_adapted
        held += layer_bytes(layer, form, first, shape)
        state += state_bytes(layer, form, first, shape)
    return Plan(
        problem=problem,
        sizes=sizes,
        engine="batched",
        layers=tuple(chosen),
        chunk=chunk,
        keeps_state=(state + held) * times <= told.memory_bound,
        memory=held,
        naive_memory=float(2 * sizes.tasks * problem.network.parameters * itemsize),
        reason=reason,
        memory_bound=told.memory_bound,
    )


def _plan_layer(problem: Problem, i: int, shape: Shape, device: Device, told: Override, times: int) -> LayerPlan:
    """The cheapest form of a layer, or the one that is told, over `times` chunks."""
    inner, layer = problem.inner, problem.network.layers[i]
    first = i <= inner.first_adapted
    if i < inner.first_adapted:  # its support features stay the same at every step
        shape = replace(shape, steps=min(shape.steps, 1))

    def estimate(form: str) -> Estimate:
        working_set = layer_bytes(layer, form, first, shape) + layer.parameters * shape.itemsize
        return _estimate(layer_operations(layer, form, first, i == 0, shape), device, working_set, times)

    if i < inner.first_adapted or not inner.adapt[i]:
        return LayerPlan("shared", (("shared", estimate("shared")),))
    if told.forms is not None:
        estimates = {form: estimate(form) for form in (*FORMS, told.forms[i])}
        return LayerPlan(told.forms[i], tuple(estimates.items()))
    folds = {form: estimate(form) for form in _folds(inner.steps)}
    fold = min(folds, key=lambda form: folds[form].seconds)
    estimates = {form: estimate(form) for form in FORMS} | {fold: folds[fold]}
    return LayerPlan(min(estimates, key=lambda form: estimates[form].seconds), tuple(estimates.items()))


def _estimate(operations: Iterable[Operation], device: Device, working_set: float, times: int) -> Estimate:
    whole = Operation(*map(sum, zip(*operations, strict=True)))
    return Estimate(times * whole.seconds(device, working_set), times * whole.flops, times * whole.bytes)


def _check_forms(forms: tuple[str, ...], problem: Problem) -> None:
    depth, steps = problem.network.depth, problem.inner.steps
    if len(forms) != depth:
        raise ValueError(f"forms is {forms}; it takes one of 'primal', 'dual', 'dual:k' for each of the {depth} layers")
    for form in forms:
        if (fold_step(form) or 0) > steps:
            raise ValueError(f"forms has {form!r}; 'dual:k' takes 1 <= k <= {steps}, the number of inner steps")


def _folds(steps: int) -> Iterator[str]:
    """Forms that fold: at every step of a few, else at ever longer distances, and in any case after the last one."""
    k = 1
    while k < steps:
        yield f"dual:{k}"
        k += max(1, k // 2)
    if steps:
        yield f"dual:{steps}"


def _words(form: str, steps: int) -> str:
    """A form as one says it."""
    step = fold_step(form)
    if step is None:
        return form
    return "dual, primal " + ("for queries" if step == steps else f"from step {step}")


def _chunks(tasks: int) -> list[int]:
    """All tasks at once, then half of them, a quarter, ..., one."""
    chunks = [max(tasks, 1)]
    while chunks[-1] > 1:
        chunks.append(math.ceil(chunks[-1] / 2))
    return chunks


def _row(estimate: Estimate) -> tuple[str, str, str]:
    return scaled(estimate.flops, "F"), scaled(estimate.bytes, "B"), scaled(estimate.seconds, "s")
