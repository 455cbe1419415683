"""The part of the planner that is for kernels: which of them take a problem, how they are laid out, what they cost.

Asks Triton of the device, so it is imported only where Triton is.
"""

from __future__ import annotations

from collections.abc import Hashable
from itertools import pairwise

import torch

from .batch import Sizes
from .engines import dual, fold_step, launching, primal, resident
from .kernel_costs import CHIP, Work, dual_work, primal_work, resident_work
from .kernels.configuration import (
    Config,
    DualConfig,
    PrimalConfig,
    configuration,
    dual_configuration,
    primal_configuration,
    remembered,
)
from .kernels.resources import REGISTERS, Need, dual_need, primal_need, resident_need, weight_tiles
from .kernels.spec import padded
from .plans import KERNEL_ENGINES, Estimate, LayerPlan, Override, Plan
from .problem import Problem

SUPPORT = 64  # samples of a pack's support set: one tile, and more would be better off with weights of their own
# Samples of a pack's history, one tile too; all layers in one kernel leave less room for it.
HISTORY = {"dual": 64, "layered": 128}
LARGEST_FOLD = 65_535 * 16 * 16  # numbers in a weight: its tiles are on the short axis of a grid
FOLD = 64  # samples of history that are always cheaper than weights of a task's own


def kernel_plans(problem: Problem, sizes: Sizes, told: Override, precision: str) -> dict[str, Plan | str]:
    """The plan of each engine that launches kernels, or why it does not take the problem."""
    obstacle = _obstacle(problem, sizes)
    device = launching.device_name(sizes.device)
    operands = _operands(device, precision)
    if obstacle is not None or operands is None:
        why = obstacle or f"precision {precision!r} is not one of this device's matrix units; 'ieee' is"
        return dict.fromkeys(KERNEL_ENGINES, why)
    loss = _callable(problem)
    own = "in packs no task has weights of its own" if sizes.packed else None
    return {
        "resident": own or loss or _resident_obstacle(problem) or _resident(problem, sizes, told, device, operands),
        "dual": loss or _dual("dual", problem, sizes, told, device, operands),
        "layered": _dual("layered", problem, sizes, told, device, operands),
        "chained": own or _primal("chained", problem, sizes, told, device, operands),
        "primal": own or _primal("primal", problem, sizes, told, device, operands),
    }


def tuned_for(problem: Problem, sizes: Sizes, precision: str | None) -> Hashable:
    """What a kernel's configuration is remembered by."""
    inner, rules = problem.inner, tuple(resident.rules_of(problem).values())
    return (
        problem.network.widths,
        precision,
        sizes.shots,
        sizes.queries,
        sizes.each_step,
        inner.steps,
        inner.adapt,
        rules,
    )


def _obstacle(problem: Problem, sizes: Sizes) -> str | None:
    """Why no kernel takes a problem, whatever its size."""
    inner, network = problem.inner, problem.network
    if sizes.dtype == torch.float64:
        return "kernels compute in float32, the model is float64"
    if max(sizes.shots, sizes.queries) * max(problem.network.widths) >= 2**31:
        return "a task has 2^31 numbers or more, and offsets within a task are 32 bits"
    if any(layer.norm is not None for layer in network.layers):
        return "layers are normalized, which kernels do not do"
    for layer, parts in zip(network.layers, inner.adapt, strict=True):
        if parts and parts != layer.parts:
            return "a layer moves in part, and in kernels it moves whole or not at all"
    return None


def _resident_obstacle(problem: Problem) -> str | None:
    """The rule that the resident kernel does not have."""
    inner = problem.inner
    if inner.learn_lr == "element":
        return "rates of elements are not in the kernel"
    if (why := _rates_obstacle(problem)) is not None:
        return why
    if inner.optimizer == "adam" and inner.eps < torch.finfo(torch.float32).tiny:
        return f"eps is {inner.eps:g}, and the padding of tiles would be 0 / 0"
    return None


def _rates_obstacle(problem: Problem) -> str | None:
    """Why kernels in which tasks have weights of their own do not take learned rates; None where they do."""
    if problem.inner.learns_each_step and problem.inner.steps > 1:
        return "rates of each step take what each has multiplied, of which the kernel keeps the sum"
    return None


def _dual_obstacle(engine: str, problem: Problem, sizes: Sizes) -> str | None:
    """The rule that the dual kernels do not have."""
    if problem.inner.needs_gradient is not None:
        return problem.inner.needs_gradient
    if sizes.packed and (why := _pack_obstacle(problem, sizes)) is not None:
        return why
    if engine == "dual" and problem.inner.max_grad_norm is not None:
        return "max_grad_norm takes the gradients of all layers before one of them moves, and all steps are one launch"
    return None


def _pack_obstacle(problem: Problem, sizes: Sizes) -> str | None:
    """The rule that takes something of a task as a whole, of which a pack has several."""
    inner = problem.inner
    if inner.max_grad_norm is not None or inner.learn_lr is not None or problem.outer == "reptile":
        return "norms of gradients, gradients of rates and distances are of tasks, not of packs of them"
    if problem.nonfinite == "skip":
        return "a task that diverged is left out by itself, not with its pack"
    return "each step has samples of its own, and packs have one set of rows" if sizes.each_step else _callable(problem)


def _callable(problem: Problem) -> str | None:
    for name, loss in (("loss", problem.loss), ("outer_loss", problem.outer_loss)):
        if loss.name == "callable":
            return f"{name} is a callable, which a kernel cannot call"
    return None


def _operands(device: str, precision: str) -> str | None:
    """The operands of products that a precision stands for on a device; None where its matrix units lack them."""
    backend, _, architecture = device.partition("-")
    names = {"highest": "tf32x3", "high": "tf32", "medium": "bf16"}
    if backend == "hip":
        names |= {"highest": "ieee", "high": "tf32" if architecture == "gfx942" else "ieee"}
        if precision == "tf32x3" or (precision == "tf32" and architecture != "gfx942"):
            return None
    return names.get(precision, precision)


def _resident(problem: Problem, sizes: Sizes, told: Override, device: str, precision: str) -> Plan | str:
    if told.forms is not None:
        return "the overriding forms are not its own"
    network = problem.network
    largest = max(weight_tiles(network.widths), default=0)
    usual = configuration(device, "resident", largest)
    tuned = remembered(device, "resident", tuned_for(problem, sizes, precision))
    config = told.config if type(told.config) is Config else tuned or usual
    if config is None:
        return f"its largest weight, {largest:,} numbers when padded, is more than a program holds on chip"
    spec = resident.spec_of(problem, sizes.shots, sizes.queries, precision, config, sizes.each_step)
    need = resident_need(spec, config)
    obstacle = _unfit(need, sizes)
    if obstacle is not None:
        return obstacle
    return _plan(
        "resident",
        ("resident",) * network.depth,
        problem,
        sizes,
        told,
        precision,
        config,
        # What is tuned is compared with other engines by what it was before.
        resident_work(problem, sizes, usual or config, precision),
        held=4.0 * spec.parameters * (2 if spec.learns else 1),
        reason=f"one program a task, {_layout(config, precision)}; about {need.registers} registers a thread, "
        f"{need.shared:,} bytes of shared memory",
    )


def _dual(engine: str, problem: Problem, sizes: Sizes, told: Override, device: str, precision: str) -> Plan | str:
    rule = _dual_obstacle(engine, problem, sizes)
    if rule is not None:
        return rule
    inner, widths = problem.inner, problem.network.widths
    first, depth = inner.first_adapted, problem.network.depth
    forms = _forms(engine, problem, sizes, told)
    folds = any(fold_step(form) for form in forms)
    whole = first == depth or sizes.each_step or not fold_step(forms[first])
    if "primal" in forms or (folds and engine == "dual") or not whole:
        return f"the forms {', '.join(forms)} are not its own"
    pending = dual.pending_steps(problem, forms, sizes.each_step)
    tuned = remembered(device, engine, tuned_for(problem, sizes, precision))
    config = next((c for c in (told.config, tuned) if isinstance(c, DualConfig)), None)
    tasks, samples = (config.tasks, config.samples) if config else _tiles(problem, sizes, pending, folds)
    if folds and sizes.packed:
        return "where layers fold each task has its own, and packs have several tasks"
    if folds and tasks > 1:
        return f"{tasks} tasks a program share weights, and where layers fold each has its own"
    if first < depth and tasks * sizes.shots > SUPPORT:
        return f"the {tasks * sizes.shots} shots of a program's tasks are more than a tile of {SUPPORT} samples"
    history = tasks * sizes.shots * pending
    if history > HISTORY[engine]:
        return f"the {history} samples of a program's history are more than a tile of {HISTORY[engine]}"
    if folds and max(before * after for before, after in pairwise(widths)) > LARGEST_FOLD:
        return "a layer that folds has more tiles than a launch takes"
    usual = dual_configuration(device, tasks, samples, padded(max(2, history)))
    assert usual is not None, f"no rule takes a history of {history}"
    config = config or usual
    spec = dual.spec_of(problem, sizes.shots, precision, config, forms, sizes.each_step, sizes.packed)
    need = dual_need(spec, config, engine == "layered")
    obstacle = _unfit(need, sizes)
    if obstacle is not None:
        return obstacle
    # Numbers of a task: its history; inputs, pre-activations and gradients of a step and of the query pass.
    numbers = sizes.shots * (widths[first] + widths[first + 1]) if first < depth else 0
    numbers *= inner.steps if sizes.each_step else 1
    numbers += inner.steps * sizes.shots * sum(before + after for before, after in list(pairwise(widths))[first + 1 :])
    numbers += sum(
        (1 + spec.momentum) * layer.parameters
        for layer, form in zip(problem.network.layers, forms, strict=True)
        if fold_step(form)
    )
    if first < depth and (inner.max_grad_norm is not None or inner.learn_lr is not None or problem.multi_step):
        numbers += inner.steps * sizes.shots * widths[first + 1]  # the first layer's gradients of every step
    # Which tasks are left out is known only after the last of several query passes.
    passes = max(inner.steps, 1) if problem.multi_step and problem.nonfinite == "skip" else 1
    passing = (sizes.shots + 4 * passes * sizes.queries) * sum(widths)
    pack = f"{config.tasks} tasks a program" if config.tasks > 1 else "one task a program"
    how = "all steps in one launch" if engine == "dual" else "a launch a layer, its features spread over programs"
    return _plan(
        engine,
        forms,
        problem,
        sizes,
        told,
        precision,
        config,
        dual_work(problem, sizes, usual, precision, layered=engine == "layered"),
        held=4.0 * (numbers + passing),
        reason=f"shared weights and each task's history, {how}, {pack}, {_layout(config, precision)}",
    )


def _primal(engine: str, problem: Problem, sizes: Sizes, told: Override, device: str, precision: str) -> Plan | str:
    inner, network = problem.inner, problem.network
    if (why := _rates_obstacle(problem)) is not None:
        return why
    forms = tuple("primal" if parts else "shared" for parts in inner.adapt)
    if told.forms is not None and any(form != "primal" for form in told.forms):
        return f"the forms {', '.join(told.forms)} are not its own"
    widest = max(padded(width) for width in network.widths)
    tuned = remembered(device, engine, tuned_for(problem, sizes, precision))
    usual = primal_configuration(device, engine, precision, widest)
    config = next((c for c in (told.config, tuned, usual) if isinstance(c, PrimalConfig)), None)
    if config is None:
        return f"a layer is {widest} wide when padded, which is more than a program takes through all layers on chip"
    spec = primal.spec_of(problem, precision, config)
    need = primal_need(spec, config, engine == "chained")
    obstacle = _unfit(need, sizes)
    if obstacle is not None:
        return obstacle
    # Bytes of a task: what it has of its own; and what each sample under way leaves.
    copies = 1 + (spec.momentum or spec.adam) + spec.adam + spec.learns
    own = 4.0 * spec.parameters * (copies + (inner.max_grad_norm is not None or problem.nonfinite == "skip"))
    row = (2 if precision in ("bf16", "fp16") else 4) * sum(a + b for a, b in pairwise(network.widths))
    row += 4 * (sum(network.widths[1:]) if engine == "primal" else network.widths[-1])
    # No more samples under way than half of the bound has room for, in whole blocks.
    most = max(int(told.memory_bound // (2 * row)) // config.samples * config.samples, config.samples)
    rows, samples = told.rows or most, max(sizes.shots, sizes.queries, 1)
    how = "a launch a layer, its features spread over programs"
    if engine == "chained":
        how = "a program takes its samples through all layers"
    return _plan(
        engine,
        forms,
        problem,
        sizes,
        told,
        precision,
        config,
        primal_work(problem, sizes, usual or config, precision, chained=engine == "chained"),
        held=own + row * min(rows, samples),
        reason=f"weights of each task, {how}, {_layout(config, precision)}",
        rows=rows if rows < samples else None,
    )


def _forms(engine: str, problem: Problem, sizes: Sizes, told: Override) -> tuple[str, ...]:
    """The form of each layer; layer by layer, one whose history outgrows it or its tile folds before it does."""
    inner = problem.inner
    forms = []
    for i, layer in enumerate(problem.network.layers):
        form = "dual" if told.forms is None else told.forms[i]
        if i < inner.first_adapted or not inner.adapt[i]:
            form = "shared"
        elif engine == "layered" and told.forms is None and (i > inner.first_adapted or sizes.each_step):
            # Correcting a sample costs more than a product with weights does from this rank on.
            width = 2 * layer.in_features * layer.out_features // (layer.in_features + layer.out_features)
            step = min(max(width, FOLD) // max(sizes.shots, 1) + 1, HISTORY["layered"] // max(sizes.shots, 1))
            form = f"dual:{step}" if 1 <= step < inner.steps else "dual"
        forms.append(form)
    return tuple(forms)


def _tiles(problem: Problem, sizes: Sizes, pending: int, folds: bool) -> tuple[int, int]:
    """Tasks of a pack, and samples of a tile of its query set.

    pending: the steps that a history lasts.  folds: whether layers fold.
    """
    shots = max(sizes.shots, 1)
    # Packs fill the smallest tile of samples and twice that of history, where there are enough tasks for all programs.
    tasks = max(1, min(16 // shots, 32 // (max(pending, 1) * shots)))
    if folds or sizes.tasks < 4 * CHIP.multiprocessors * tasks:
        tasks = 1
    history = padded(max(2, tasks * pending * shots))
    # Blocks of query samples are large, unless that leaves multiprocessors idle or history has no room beside them.
    samples = 16
    for larger in (32, 64):
        blocks = -(-sizes.tasks // tasks) * -(-tasks * sizes.queries // larger)
        fills = larger <= padded(max(2, tasks * sizes.queries)) and blocks >= CHIP.multiprocessors
        if fills and larger * history <= 2048:
            samples = larger
    return tasks, samples


def _unfit(need: Need, sizes: Sizes) -> str | None:
    shared = launching.shared_memory(sizes.device)
    if need.registers > REGISTERS:
        return f"it needs about {need.registers} registers a thread for this problem, and a thread has {REGISTERS}"
    if need.shared > shared:
        return f"it needs about {need.shared:,} bytes of shared memory, and a program has {shared:,}"
    return None


def _layout(config: Config, precision: str) -> str:
    return f"{config.warps} warps, tiles of {config.samples} samples, products in {precision}"


def _plan(
    engine: str,
    forms: tuple[str, ...],
    problem: Problem,
    sizes: Sizes,
    told: Override,
    precision: str,
    config: Config,
    work: Work,
    *,
    held: float,
    reason: str,
    rows: int | None = None,
) -> Plan:
    """held: bytes of a task that a meta-step holds at its peak, and that `predict` keeps.  rows: as in the plan."""
    depth = problem.network.depth
    chunk = told.chunk or max(1, min(sizes.tasks, int(told.memory_bound // max(held, 1.0))))
    share = Estimate(work.seconds / depth, work.flops / depth, work.bytes / depth)
    return Plan(
        problem=problem,
        sizes=sizes,
        engine=engine,
        layers=tuple(LayerPlan(form, ((form, share),)) for form in forms),
        chunk=chunk,
        rows=rows,
        keeps_state=sizes.tasks * held <= told.memory_bound,
        memory=chunk * held,
        naive_memory=8.0 * sizes.tasks * problem.network.parameters,
        reason=reason,
        memory_bound=told.memory_bound,
        precision=precision,
        config=config,
    )
