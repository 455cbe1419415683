"""The batched engine's part of the planner: the form of each layer, and how many tasks and samples at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch

from .batch import Sizes
from .costs import (
    COMPILED,
    CPU,
    GPU,
    Device,
    Operation,
    Shape,
    WorkingSet,
    layer_bytes,
    layer_operations,
    pass_bytes,
    state_bytes,
)
from .engines import fold_step
from .inner import InnerLoop
from .plans import FORMS, Estimate, LayerPlan, Override, Plan
from .problem import Problem

WRITTEN = ("primal", "shared")  # forms whose gradients can be summed over blocks of samples
# How much longer threads take that share a matrix than threads that have one each, as measured on learnit.
SHARED_MATRIX = 1.06
# Samples of a task that are too few to take fewer at a time: launches would take longer than what they compute.
LEAST_ROWS = 64


def batched_plans(
    problem: Problem, sizes: Sizes, told: Override, reason: str, compiled: bool, explained: bool
) -> dict[str, Plan | str]:
    """The plan of batched torch ops, and what it would be with every layer in one form.

    compiled: whether they run through `torch.compile`.  explained: whether the others are wanted.

    Raises:
        ValueError: it is told to take the samples of a task in blocks, and cannot.
    """
    if told.rows is not None and told.rows < max(sizes.shots, sizes.queries):
        forms = told.forms or ("primal",) * problem.network.depth
        why = block_obstacle(problem, forms)
        if why is not None and told.engine in (None, "batched"):
            raise ValueError(f"rows is {told.rows}, but the samples of a task cannot run in blocks: {why}")
        told = replace(told, forms=forms, rows=told.rows if why is None else None)
    device = GPU if sizes.device.type != "cpu" else COMPILED if compiled else CPU
    found: dict[str, Plan | str] = {"batched": _fastest(problem, sizes, device, told, reason)}
    for form in FORMS if explained else ():
        forms = (form,) * problem.network.depth
        moving = range(problem.inner.first_adapted, problem.network.depth)
        why = next((w for i in moving if (w := form_obstacle(problem, i, form)) and problem.inner.adapt[i]), None)
        if why is not None:
            found[f"all {form}"] = why
            continue
        alike = replace(told, forms=forms, chunk=None, rows=None)
        found[f"all {form}"] = _fastest(problem, sizes, device, alike, reason)
    return found


def _fastest(problem: Problem, sizes: Sizes, device: Device, told: Override, reason: str) -> Plan:
    """The fastest plan of batched torch ops, by the cost model, that stays within the bound on memory."""
    candidates = [told.chunk] if told.chunk is not None else _chunks(sizes.tasks)
    plans = [_plan_chunk(problem, sizes, device, told, chunk, reason) for chunk in candidates]
    # Blocks do not bound what `predict` holds, so they make no chunk possible that is not possible without them.
    within = [plan for plan in plans if plan.memory <= told.memory_bound] or plans[-1:]
    in_blocks = [_in_blocks(plan, device, rows) for plan in within for rows in _blocks(plan, told)]
    if told.rows is not None and in_blocks:
        within = in_blocks

    def cost(plan: Plan) -> tuple[float, float]:
        shared = SHARED_MATRIX if plan.chunk < min(device.threads, sizes.tasks) else 1.0
        return max(plan.memory - told.memory_bound, 0), plan.estimate.seconds * shared

    return min(within + in_blocks, key=cost)


def _plan_chunk(problem: Problem, sizes: Sizes, device: Device, told: Override, chunk: int, reason: str) -> Plan:
    """The cheapest forms for a given number of tasks at a time."""
    shape, times = shape_of(problem, sizes, device, chunk), math.ceil(sizes.tasks / chunk)
    layers = problem.network.layers
    of_pass = sum(pass_bytes(layer, shape) for layer in layers)
    chosen, held, state = [], 0.0, 0.0
    for i, layer in enumerate(layers):
        chosen.append(_plan_layer(problem, i, shape, device, told, times, sizes.each_step, of_pass))
        form, first = chosen[-1].form, i == problem.inner.first_adapted and not sizes.each_step
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
        naive_memory=float(2 * sizes.tasks * problem.network.parameters * shape.itemsize),
        reason=reason,
        memory_bound=told.memory_bound,
    )


def shape_of(problem: Problem, sizes: Sizes, device: Device, chunk: int) -> Shape:
    """The sizes of a chunk of tasks on a device."""
    inner = problem.inner
    return Shape(
        tasks=chunk,
        shots=sizes.shots,
        queries=0 if problem.outer == "reptile" else sizes.queries,
        steps=inner.steps,
        itemsize=max(sizes.dtype.itemsize, torch.float32.itemsize),
        momentum=inner.momentum > 0.0,
        decay=inner.weight_decay > 0.0,
        passes=max(inner.steps, 1) if problem.multi_step else 1,
        updates=_updates(inner),
        copies=2 * (inner.optimizer == "adam")
        + (0 if inner.learn_lr is None else inner.steps if inner.learns_each_step else 1),
        fuses=device.fuses,
    )


def _in_blocks(plan: Plan, device: Device, rows: int) -> Plan:
    """The plan with `rows` samples of a task at a time: as many steps and query passes of fewer samples each."""
    problem, shape = plan.problem, shape_of(plan.problem, plan.sizes, device, plan.chunk)
    times = math.ceil(plan.sizes.tasks / plan.chunk)
    block = replace(
        shape,
        shots=min(shape.shots, rows),
        queries=min(shape.queries, rows),
        steps=shape.steps * math.ceil(shape.shots / rows),
        passes=shape.passes * math.ceil(shape.queries / rows),
    )
    first = problem.inner.first_adapted
    # Below the first layer that moves, the support set runs through once and whole.
    shapes = [replace(shape, steps=min(shape.steps, 1)) if i < first else block for i in range(len(plan.layers))]
    cells = list(zip(problem.network.layers, plan.forms, shapes, strict=True))
    of_pass = sum(pass_bytes(layer, own) for layer, _, own in cells)
    layers, held = [], 0.0
    for i, (layer, form, own) in enumerate(cells):
        bytes_ = layer_bytes(layer, form, False, own)
        working_set = WorkingSet(bytes_ + layer.parameters * shape.itemsize, of_pass)
        found = estimated(layer_operations(layer, form, i <= first, i == 0, own), device, working_set, times)
        whole = plan.layers[i]
        layers.append(replace(whole, estimates=tuple((dict(whole.estimates) | {form: found}).items())))
        held += bytes_
    return replace(plan, layers=tuple(layers), memory=held, rows=rows)


def _blocks(plan: Plan, told: Override) -> list[int]:
    """Numbers of samples that a plan may take at a time."""
    samples = max(plan.sizes.shots, plan.sizes.queries)
    if block_obstacle(plan.problem, plan.forms) is not None:
        return []
    if told.rows is not None:
        return [told.rows] if told.rows < samples else []
    halves = (samples >> k for k in range(1, samples.bit_length()))
    return [rows for rows in halves if rows >= LEAST_ROWS]


def block_obstacle(problem: Problem, forms: tuple[str, ...]) -> str | None:
    """Why samples of a task cannot run in blocks; None where they can."""
    if problem.network.mixes_samples:
        return "a BatchNorm takes all samples of a set at once"
    if problem.nonfinite == "skip":
        return "which tasks are skipped is known when all their samples are through"
    dual = [i for i in range(problem.inner.first_adapted, problem.network.depth) if forms[i] not in WRITTEN]
    return f"layer {dual[0]} is {forms[dual[0]]}, and a history is of all samples of a set" if dual else None


def _plan_layer(
    problem: Problem, i: int, shape: Shape, device: Device, told: Override, times: int, each_step: bool, of_pass: float
) -> LayerPlan:
    """The cheapest form of a layer, or the one that is told, over `times` chunks.

    of_pass: bytes that a pass through all layers leaves.
    """
    inner, layer = problem.inner, problem.network.layers[i]
    first = i < inner.first_adapted or (i == inner.first_adapted and not each_step)
    if i < inner.first_adapted:  # its support features stay the same at every step
        shape = replace(shape, steps=min(shape.steps, 1))

    def estimate(form: str) -> Estimate:
        own = layer_bytes(layer, form, first, shape) + layer.parameters * shape.itemsize
        operations = layer_operations(layer, form, first, i == 0, shape)
        return estimated(operations, device, WorkingSet(own, of_pass), times)

    forms = [form for form in FORMS if form_obstacle(problem, i, form) is None]
    if not forms:
        return LayerPlan("shared", (("shared", estimate("shared")),))
    if told.forms is not None:
        estimates = {form: estimate(form) for form in (*forms, told.forms[i])}
        return LayerPlan(told.forms[i], tuple(estimates.items()))
    estimates = {form: estimate(form) for form in forms}
    folds = {form: estimate(form) for form in _folds(inner.steps) if form_obstacle(problem, i, form) is None}
    if folds:
        fold = min(folds, key=lambda form: folds[form].seconds)
        estimates[fold] = folds[fold]
    return LayerPlan(min(estimates, key=lambda form: estimates[form].seconds), tuple(estimates.items()))


def form_obstacle(problem: Problem, i: int, form: str) -> str | None:
    """Why a layer cannot take a form, "primal", "dual" or "dual:k"; None where it can."""
    inner, moves = problem.inner, problem.inner.adapt[i]
    if i < inner.first_adapted or not ("weight" in moves or "bias" in moves):
        return "the layer does not move"
    if form == "primal":
        return None
    if "weight" not in moves:
        return "the layer's bias moves alone"
    if inner.needs_gradient is not None:
        return inner.needs_gradient
    if fold_step(form) and inner.learn_lr is not None:
        return "the gradient of learned rates comes from a whole history, or from sums of weights"
    return None


def _updates(inner: InnerLoop) -> int:
    """As of `Shape`: what `engines.rules` does to numbers as many as a weight's, once a gradient is written."""
    if inner.update != "general" and inner.needs_gradient is None:
        return 0
    adam = 9 * (inner.optimizer == "adam")
    clips = (inner.max_grad_value is not None) + 2 * (inner.max_grad_norm is not None)
    return (
        2
        + adam
        + clips
        + (inner.weight_decay > 0.0)
        + (inner.momentum > 0.0)
        + inner.nesterov
        + (inner.learn_lr is not None)
    )


def estimated(operations: Iterable[Operation], device: Device, working_set: WorkingSet, times: int) -> Estimate:
    """What operations take together, `times` times."""
    whole = Operation(*map(sum, zip(*operations, strict=True)))
    return Estimate(times * whole.seconds(device, working_set), times * whole.flops, times * whole.bytes)


def _folds(steps: int) -> Iterator[str]:
    """Forms that fold: at every step of a few, else at ever longer distances, and in any case after the last one."""
    k = 1
    while k < steps:
        yield f"dual:{k}"
        k += max(1, k // 2)
    if steps:
        yield f"dual:{steps}"


def _chunks(tasks: int) -> list[int]:
    """All tasks at once, then half of them, a quarter, ..., one."""
    chunks = [max(tasks, 1)]
    while chunks[-1] > 1:
        chunks.append(math.ceil(chunks[-1] / 2))
    return chunks


def check_forms(forms: tuple[str, ...], problem: Problem) -> None:
    """Raises a ValueError where overriding forms are not one a layer, or a layer is to fold past the last step."""
    depth, steps = problem.network.depth, problem.inner.steps
    if len(forms) != depth:
        raise ValueError(f"forms is {forms}; it takes one of 'primal', 'dual', 'dual:k' for each of the {depth} layers")
    for i, form in enumerate(forms):
        if (fold_step(form) or 0) > steps:
            raise ValueError(f"forms has {form!r}; 'dual:k' takes 1 <= k <= {steps}, the number of inner steps")
        if form_obstacle(problem, i, "primal") is None and (why := form_obstacle(problem, i, form)) is not None:
            raise ValueError(f"forms has {form!r} for layer {i}, which cannot take it: {why}")
