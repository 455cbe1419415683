"""What a plan is and says of itself, and what a planner may be told; the planner that makes plans is not here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .batch import Sizes
from .engines import fold_step
from .hashing import hashed_once
from .problem import Problem
from .text import scaled, table

if TYPE_CHECKING:
    from .kernels.configuration import Config

KERNEL_ENGINES = ("resident", "dual", "layered", "chained", "primal")
ENGINES = ("batched", "native", *KERNEL_ENGINES)
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


@hashed_once
@dataclass(frozen=True)
class Plan:
    """A decision of the planner, and what it was made from. `print(plan)` explains it.

    Attributes:
        engine: one of `ENGINES`, or "reference".
        layers: the form of each layer.
        chunk: tasks that run at a time.
        rows: samples of each of them that an engine takes at a time, in which tasks have weights of their own; None for
            all.
        keeps_state: whether `predict` keeps all tasks' adapted layers for its backward; else it adapts again.
        memory: bytes that a chunk holds at its peak, by the model.
        naive_memory: bytes of fast weights and gradients of every task, which the per-task formula would hold.
        reason: why this engine runs.
        memory_bound: bytes that the chunk was chosen to stay under.
        precision: of the operands of a kernel's products, "ieee", "tf32x3", "tf32", "bf16" or "fp16".
        config: a kernel's warps and tiles.
        others: by name, plans that it was chosen over, or why there is none.
        block: tasks that a thread of the native engine takes at a time.
        gathers: whether it takes the outer gradient of all tasks' query samples at once, behind the last one.
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
    others: tuple[tuple[str, Plan | str], ...] = ()
    rows: int | None = None
    block: int | None = None
    gathers: bool = False

    @property
    def forms(self) -> tuple[str, ...]:
        return tuple(layer.form for layer in self.layers)

    @property
    def at_a_time(self) -> str:
        """Tasks, and of each of them samples."""
        tasks = str(self.chunk) if self.block is None else f"{self.block} a thread"
        return tasks if self.rows is None else f"{tasks}, of each {self.rows} samples"

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
        if self.engine not in ("batched", "native"):
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
        """A table of this plan beside those that it was chosen over."""
        plans = [("chosen", self), *((name, other) for name, other in self.others if isinstance(other, Plan))]
        rows = [("plan", "tasks at a time", "flops", "bytes", "time", "held")]
        rows += [(name, p.at_a_time, *_row(p.estimate), scaled(p.memory, "B")) for name, p in plans]
        rows.append(("per task, by the formula", "1", "", "", "", scaled(self.naive_memory, "B")))
        cannot = [f"{name} cannot run: {why}" for name, why in self.others if isinstance(why, str)]
        return [*table(rows), "", *cannot, "times are the cost model's, for comparison; they are not measurements"]

    __str__ = explain


@dataclass(frozen=True)
class Override:
    """What the planner is told instead of choosing it.

    Attributes:
        forms: the form of each layer, "primal", "dual" or "dual:k"; layers that do not move stay shared.
        chunk: tasks at a time.
        rows: samples of a task at a time, where tasks have weights of their own.
        memory_bound: bytes of scratch that a chunk may take.
        config: a kernel's warps and tiles.
        engine: one of `ENGINES`.
        packs: whether tasks of unequal sizes share packs, where a kernel takes them so; else they go by groups.
    """

    forms: tuple[str, ...] | None = None
    chunk: int | None = None
    rows: int | None = None
    memory_bound: int = MEMORY_BOUND
    config: Config | None = None
    engine: str | None = None
    packs: bool | None = None

    def __post_init__(self) -> None:
        if self.forms is not None and not all(form in FORMS or fold_step(form) for form in self.forms):
            raise ValueError(f"forms is {self.forms}; it takes 'primal', 'dual' or 'dual:k', k >= 1, for each layer")
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(f"chunk is {self.chunk}; it takes at least one task")
        if self.rows is not None and self.rows < 1:
            raise ValueError(f"rows is {self.rows}; it takes at least one sample")
        if self.engine is not None and self.engine not in ENGINES:
            raise ValueError(f"engine is {self.engine!r}; it takes one of {', '.join(ENGINES)}")


_override: ContextVar[Override] = ContextVar("override", default=Override())  # noqa: B039 (it is frozen)


@contextmanager
def override(
    *,
    forms: Sequence[str] | None = None,
    chunk: int | None = None,
    rows: int | None = None,
    memory_bound: int | None = None,
    config: Config | None = None,
    engine: str | None = None,
    packs: bool | None = None,
) -> Iterator[None]:
    """Within the block, plans follow these choices (see `Override`) instead of the cost model's.

    What is not given stays as it is outside of the block.

    Raises:
        ValueError: an unknown form or engine, or a chunk of no task; when planning, not one form a layer, a layer that
            is to fold at a step past the last, or an engine that does not take the problem, or packs that none takes.
    """
    told: dict[str, Any] = {
        "forms": None if forms is None else tuple(forms),
        "chunk": chunk,
        "rows": rows,
        "memory_bound": memory_bound,
        "config": config,
        "engine": engine,
        "packs": packs,
    }
    given = {name: choice for name, choice in told.items() if choice is not None}
    token = _override.set(replace(_override.get(), **given))
    try:
        yield
    finally:
        _override.reset(token)


def overriding() -> Override:
    """What the planner is told here and now."""
    return _override.get()


def _words(form: str, steps: int) -> str:
    """A form as one says it."""
    step = fold_step(form)
    if step is None:
        return form
    return "dual, primal " + ("for queries" if step == steps else f"from step {step}")


def _row(estimate: Estimate) -> tuple[str, str, str]:
    return scaled(estimate.flops, "F"), scaled(estimate.bytes, "B"), scaled(estimate.seconds, "s")
