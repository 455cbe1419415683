"""The native engine's part of the planner: what it takes, and in which form and blocks of tasks and samples."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from .batch import Sizes
from .batched_plans import estimated, form_obstacle, shape_of
from .costs import NATIVE, Shape, WorkingSet, layer_bytes, layer_operations
from .plans import FORMS, Estimate, LayerPlan, Override, Plan
from .problem import Problem

DEEPEST = 64  # layers that the library has room for
ROWS = 48  # a block of tasks should have as many, for their products to be ahead of the memory they read
ROWS_IN_TURN = 12  # where threads take the next block whenever they are through: short ones, for all to end together
MOST_ROWS = 256  # of a pass; what more of them leave does not stay in a core's cache
LEAST_ROWS = 16  # of a task's query set at a time


def native_plan(problem: Problem, sizes: Sizes, told: Override) -> Plan | str:
    """The plan of compiled C++ on a CPU, or why there is none. The first call on a machine compiles, for seconds."""
    why = native_obstacle(problem, sizes, told)
    if why is not None:
        return why
    from .engines import native_library

    if (why := native_library.obstacle()) is not None:
        return why
    shape = shape_of(problem, sizes, NATIVE, sizes.tasks)
    layers = tuple(_plan_layer(problem, i, shape, told) for i in range(problem.network.depth))
    dual = any(layer.form == "dual" for layer in layers)
    rows = told.rows or (max(sizes.shots, LEAST_ROWS) if dual else MOST_ROWS)
    rows = min(rows, max(sizes.shots, sizes.queries))
    if dual and rows < sizes.shots:
        return f"rows is {rows}, and a history is of all {sizes.shots} shots of a task"
    if told.chunk is not None and told.chunk < sizes.tasks:
        return f"chunk is {told.chunk}, and it takes all {sizes.tasks} tasks in one call"
    block = _block(sizes, rows, ROWS)
    parameters, left = problem.network.parameters, _query_pass(problem, sizes)
    # An outer gradient of all tasks at once is worth it where every block would read and write a sum of more.
    gathers = sizes.queries <= rows and left < math.ceil(sizes.tasks / block) * parameters
    if gathers:
        block = _block(sizes, rows, ROWS_IN_TURN)
    at_once = replace(shape, tasks=min(block * NATIVE.threads, sizes.tasks), queries=min(rows, sizes.queries))
    moving = enumerate(zip(problem.network.layers, layers, strict=True))
    held = sum(layer_bytes(layer, own.form, i == problem.inner.first_adapted, at_once) for i, (layer, own) in moving)
    # Packed weights; and the gradients of every thread, or what these are taken of in the end.
    held += (2 * parameters + (left if gathers else NATIVE.threads * parameters)) * shape.itemsize
    if held > told.memory_bound:
        return f"it would hold {held:.3g} bytes, over the bound of {told.memory_bound}"
    return Plan(
        problem=problem,
        sizes=sizes,
        engine="native",
        layers=layers,
        chunk=sizes.tasks,
        keeps_state=False,
        memory=held,
        naive_memory=float(2 * sizes.tasks * parameters * shape.itemsize),
        reason="compiled C++, by the cost model the fastest on a CPU" if told.engine is None else "as asked for",
        memory_bound=told.memory_bound,
        rows=rows,
        block=block,
        gathers=gathers,
    )


def native_obstacle(problem: Problem, sizes: Sizes, told: Override) -> str | None:
    """What of a problem the native engine does not take; None where it takes all."""
    inner = problem.inner
    rules = {
        f"optimizer {inner.optimizer!r}": inner.optimizer != "sgd",
        "momentum": inner.momentum > 0.0,
        "weight_decay": inner.weight_decay > 0.0,
        "max_grad_norm": inner.max_grad_norm is not None,
        "max_grad_value": inner.max_grad_value is not None,
        "learn_lr": inner.learn_lr is not None,
        f"outer {problem.outer!r}": problem.outer != "fomaml",
        "step_weights": problem.multi_step,
        "nonfinite 'skip'": problem.nonfinite == "skip",
        "support samples of each step": sizes.each_step,
        "a normalisation": any(layer.norm is not None for layer in problem.network.layers),
        "a callable loss": "callable" in (problem.loss.name, problem.outer_loss.name),
        "forms that fold": any(form not in FORMS for form in told.forms or ()),
        f"more than {DEEPEST} layers": problem.network.depth > DEEPEST,
        "a set without samples": not (sizes.tasks and sizes.queries and (sizes.shots or not inner.steps)),
    }
    if sizes.device.type != "cpu":
        return f"it runs on a CPU, and this is on {sizes.device}"
    if sizes.dtype != torch.float32:
        return f"it computes in float32, and this is {str(sizes.dtype).removeprefix('torch.')}"
    return next((f"it does not take {rule}" for rule, there in rules.items() if there), None)


def _plan_layer(problem: Problem, i: int, shape: Shape, told: Override) -> LayerPlan:
    """The cheaper form of a layer, or the one that is told."""
    inner, layer = problem.inner, problem.network.layers[i]
    first = i <= inner.first_adapted

    def estimate(form: str) -> Estimate:
        operations = layer_operations(layer, form, first, i == 0, shape)
        return estimated(operations, NATIVE, WorkingSet(layer.parameters * shape.itemsize, 0), 1)

    forms = [form for form in FORMS if form_obstacle(problem, i, form) is None] or ["shared"]
    estimates = {form: estimate(form) for form in forms}
    if told.forms is not None and told.forms[i] in forms:
        return LayerPlan(told.forms[i], tuple(estimates.items()))
    return LayerPlan(min(forms, key=lambda form: estimates[form].seconds), tuple(estimates.items()))


def _block(sizes: Sizes, rows: int, at_once: int) -> int:
    """Tasks that a thread takes at a time: enough for good products, in blocks that all threads have as many of."""
    wanted = max(1, min(at_once // max(sizes.shots, 1), MOST_ROWS // rows))
    rounds = math.ceil(sizes.tasks / (wanted * NATIVE.threads))
    return math.ceil(sizes.tasks / (rounds * NATIVE.threads))


def _query_pass(problem: Problem, sizes: Sizes) -> int:
    """Numbers that the query pass of all tasks leaves: inputs of layers, and gradients of what these give."""
    return sizes.tasks * sizes.queries * sum(layer.in_features + layer.out_features for layer in problem.network.layers)
