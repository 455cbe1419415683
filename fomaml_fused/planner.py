"""How a problem is computed: which engine, which form for each layer, how many tasks at a time, and why."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace
from functools import lru_cache
from importlib.util import find_spec

import torch

from .batch import Sizes
from .batched_plans import batched_plans, check_forms
from .native_plans import native_plan
from .plans import LayerPlan, Override, Plan, overriding
from .problem import Problem

OLDEST_TRITON = (3, 6)
BACKENDS = ("auto", "triton", "torch", "reference")
# How a kernel multiplies: torch's names for float32 products, or the operands themselves.
PRECISIONS = ("highest", "high", "medium", "ieee", "tf32x3", "tf32", "bf16", "fp16")


def make_plan(
    problem: Problem,
    sizes: Sizes,
    backend: str = "auto",
    precision: str = "highest",
    *,
    compiled: bool = False,
    explained: bool = False,
) -> Plan:
    """Plan a batch of tasks. Deterministic: the same arguments and overrides give the same plan.

    Args:
        backend: one of `BACKENDS`.  precision: one of `PRECISIONS`, of a kernel's products.
        compiled: whether batched torch ops run through `torch.compile`, and the native engine may be compiled.
        explained: whether to plan every layer in one form as well, for comparison alone; a call can do without.

    Raises:
        ValueError: an unknown backend or precision, or overriding forms that the problem does not take.
        RuntimeError: backend "triton" where Triton cannot run on the device.

    Warns:
        UserWarning: backend "triton" where no kernel takes the problem; the plan says why, and what runs instead.
    """
    plan = _make_plan(problem, sizes, backend, precision, compiled, explained, overriding())
    if backend == "triton" and plan.engine == "batched" and overriding().engine is None:
        warnings.warn(f"backend 'triton' runs the batched engine instead: {plan.reason}", stacklevel=2)
    return plan


@lru_cache(maxsize=1024)
def _make_plan(
    problem: Problem, sizes: Sizes, backend: str, precision: str, compiled: bool, explained: bool, told: Override
) -> Plan:
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; it takes one of {', '.join(BACKENDS)}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; it takes one of {', '.join(PRECISIONS)}")
    if told.forms is not None:
        check_forms(told.forms, problem)
    if backend == "reference":
        layers = tuple(LayerPlan("reference", ()) for _ in range(problem.network.depth))
        naive = float(2 * sizes.tasks * problem.network.parameters * sizes.dtype.itemsize)
        return Plan(
            problem, sizes, "reference", layers, 1, True, naive, naive, "autograd, one task at a time, as asked for"
        )
    plans: dict[str, Plan | str] = {}
    if backend == "torch":
        reason = "as asked for"
    elif not _asks_for_kernels(sizes.device, backend, told):
        reason = "the fastest on a CPU"
        if compiled or told.engine == "native":
            plans["native"] = native_plan(problem, sizes, told)
    elif (obstacle := _triton_obstacle(sizes.device)) is not None:
        if backend == "triton":
            raise RuntimeError(
                f"backend 'triton' cannot run on {sizes.device} tensors: {obstacle}. Move model and data to a GPU that "
                "Triton supports, set TRITON_INTERPRET=1 in the environment to interpret the kernels (slow, for "
                "tests), or take backend 'torch' or 'auto'"
            )
        reason = f"for kernels cannot run: {obstacle}"
    else:
        from .kernel_plans import kernel_plans  # imports Triton

        plans |= kernel_plans(problem, sizes, told, precision)
        whys = [f"{name}: {why}" for name, why in plans.items() if isinstance(why, str)]
        taken = len(whys) < len(plans)
        reason = "by the cost model the fastest" if taken else f"for no kernel takes this ({'; '.join(whys)})"
    plans |= batched_plans(problem, sizes, told, f"batched torch ops, {reason}", compiled, explained)
    chosen = _choose(plans, backend, told)
    others = [(name, other) for name, other in plans.items() if other is not chosen]
    # A plan in which every layer has the same form is not one that it was chosen over.
    return replace(chosen, others=tuple((n, o) for n, o in others if isinstance(o, str) or o.layers != chosen.layers))


def make_packed_plan(problem: Problem, sizes: Sizes, backend: str = "auto", precision: str = "highest") -> Plan | str:
    """Plan a batch whose tasks are packs of several, which dual kernels alone take; or why none does.

    Arguments as of `make_plan`.
    """
    return _make_packed_plan(problem, sizes, backend, precision, overriding())


@lru_cache(maxsize=1024)
def _make_packed_plan(problem: Problem, sizes: Sizes, backend: str, precision: str, told: Override) -> Plan | str:
    if not _asks_for_kernels(sizes.device, backend, told):
        return "packs are for kernels, and torch runs this"
    if (obstacle := _triton_obstacle(sizes.device)) is not None:
        return obstacle
    from .kernel_plans import kernel_plans  # imports Triton

    plans = kernel_plans(problem, sizes, told, precision)
    if told.engine is not None:
        return plans.get(told.engine, f"the {told.engine} engine takes none")
    found = [plan for plan in plans.values() if isinstance(plan, Plan)]
    return min(found, key=lambda plan: plan.estimate.seconds) if found else str(plans["layered"])


def _asks_for_kernels(device: torch.device, backend: str, told: Override) -> bool:
    """Whether kernels run if they can."""
    if backend == "auto":
        return device.type != "cpu" or told.engine not in (None, "batched", "native")
    return backend == "triton"


def _choose(plans: dict[str, Plan | str], backend: str, told: Override) -> Plan:
    """The fastest of the engines that take a problem, by the cost model, or the one that is asked for."""
    engines = {name: plan for name, plan in plans.items() if isinstance(plan, Plan) and name == plan.engine}
    if told.engine is not None and backend != "torch":
        if told.engine not in engines:
            why = plans.get(told.engine, "Triton does not serve the device")
            raise ValueError(f"engine is {told.engine!r}, which cannot run: {why}")
        return engines[told.engine]
    if backend == "triton" and len(engines) > 1:
        del engines["batched"]
    return min(engines.values(), key=lambda plan: plan.estimate.seconds)


def forget_plans() -> None:
    """Plan anew from now on, where something that plans depend on has changed."""
    _make_plan.cache_clear()
    _make_packed_plan.cache_clear()


def _triton_obstacle(device: torch.device) -> str | None:
    """Why Triton cannot run on tensors of a device; None where it can."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    import triton

    # Asked before anything imports a kernel, which an older Triton may fail to read.
    if tuple(int(number) for number in re.findall(r"\d+", triton.__version__)[:2]) < OLDEST_TRITON:
        oldest = ".".join(map(str, OLDEST_TRITON))
        return f"Triton is {triton.__version__}, and the kernels need {oldest} or newer"
    from .engines import launching

    return launching.obstacle(device)
