"""The rules of inner and outer loops in the resident kernel, against the oracle; where kernels run, as its other tests.

The engine is called as `autograd.py` calls it, with a plan, and gives a value and its gradients by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fomaml_fused as ff
from fomaml_fused.batch import Query, Sizes, Support
from fomaml_fused.planner import make_plan

from .cases import Case, Solution, assert_no_worse_than_twice, flat, relative_error
from .kernel_contract import INTERPRETED, watched
from .on_kernels import in_precision, kernel_device, on_device

pytest.importorskip("triton")

from fomaml_fused.engines import Outcome, resident

__all__ = ["watched"]

# Every rule, with numbers at which it matters in some steps of some tasks and not in others.
RULES: dict[str, dict[str, Any]] = {
    "Nesterov": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    "decoupled decay": {"momentum": 0.9, "weight_decay": 0.3, "decoupled_weight_decay": True},
    "decoupled decay alone": {"weight_decay": 0.3, "decoupled_weight_decay": True},
    "Nesterov with decoupled decay": {
        "momentum": 0.9,
        "nesterov": True,
        "weight_decay": 0.3,
        "decoupled_weight_decay": True,
    },
    "samples of each step": {"each_step": True},
    "Reptile": {"outer": "reptile"},
    "multi-step": {"step_weights": (0.5, 0.0, 2.0)},
    "clipped elements": {"max_grad_value": 0.04},
    "clipped norm": {"max_grad_norm": 0.6},
    "clipped twice with momentum": {"max_grad_value": 0.1, "max_grad_norm": 0.5, "momentum": 0.9, "weight_decay": 0.1},
    "Adam": {"optimizer": "adam", "weight_decay": 0.1},
    "AdamW": {"optimizer": "adam", "weight_decay": 0.3, "decoupled_weight_decay": True},
    "skipping": {"nonfinite": "skip"},
}
BASE = Case(widths=(3, 17, 5), tasks=5, shots=7, queries=6, steps=3)


def meta(case: Case, model: nn.Module) -> ff.FOMAML:
    return ff.FOMAML(model, **case.options(), backend="triton")


def planned(case: Case, model: nn.Module, precision: str = "highest") -> ff.Plan:
    queries = 0 if case.outer == "reptile" else case.queries
    sizes = Sizes(case.tasks, case.shots, queries, torch.float32, kernel_device(), case.each_step)
    with ff.override(engine="resident"):
        return make_plan(meta(case, model).problem, sizes, "triton", precision)


def sets(case: Case, batch: dict[str, Tensor]) -> tuple[Support, Query | None]:
    support = Support(batch["support_x"], batch["support_y"], batch.get("support_weight"))
    if case.outer == "reptile":
        return support, None
    weights = batch.get("query_weight"), batch.get("task_weight")
    return support, Query(batch["query_x"], batch["query_y"], *weights, case.step_weights)


def shares(case: Case, batch: dict[str, Tensor]) -> float | Tensor:
    """The cotangent of each task's loss, for the mean over tasks or their sum."""
    weight = batch.get("task_weight")
    mean = case.reduction == "mean" and case.nonfinite == "propagate"
    if weight is None:
        return 1.0 / case.tasks if mean else 1.0
    return weight / weight.sum() if mean else weight


def stepped(case: Case, batch: dict[str, Tensor], precision: str = "highest", needed: bool = True) -> Outcome:
    model = case.model(torch.float32).to(kernel_device())
    parameters = flat(model)
    support, query = sets(case, batch)
    plan = planned(case, model, precision)
    wanted = [needed and query is not None, *[needed and p is not None for p in parameters]]
    return resident.step(plan, wanted, parameters, support, query, shares(case, batch))


def by_resident(case: Case, precision: str = "highest") -> Solution:
    outcome = stepped(case, on_device(case), precision)
    unit: Tensor | float = 1.0
    if case.nonfinite == "skip":
        assert outcome.kept is not None
        unit = 1.0 / outcome.kept if case.reduction == "mean" else 1.0
    found = [outcome.dx, *[g for g in outcome.gradients if g is not None]]
    return named(case, outcome.value * unit, [g * unit for g in found if g is not None])


def by_autograd(case: Case, dtype: torch.dtype) -> Solution:
    model, batch = case.model(dtype), case.batch(dtype)
    if case.outer == "reptile":
        del batch["query_x"], batch["query_y"]
        batch.pop("query_weight", None)
    value = ff.reference.meta_loss(model, **batch, **case.options(), reduction=case.reduction)
    inputs = [batch["query_x"]] if "query_x" in batch else []
    return named(case, value, torch.autograd.grad(value, [*inputs, *model.parameters()]))


def named(case: Case, value: Tensor, gradients: Sequence[Tensor]) -> Solution:
    names = [name for name, _ in case.model(torch.float32).named_parameters()]
    names = names if case.outer == "reptile" else ["query_x", *names]
    found = {f"reduced d/d {name}": g for name, g in zip(names, gradients, strict=True)}
    return Solution({"reduced": value.detach(), **found})


def check(case: Case) -> None:
    own = [by_autograd(replace(case, jitter=jitter), torch.float32) for jitter in range(4)]
    assert_no_worse_than_twice(by_resident(case), own, by_autograd(case, torch.float64))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"shots": 20, "queries": 33},
        {"weighted": True, "loss": "cross_entropy", "widths": (4, 17, 3, 5), "activation": "gelu"},
        {"weighted": True, "reduction": "sum", "shots": 18, "adapt": [1], "lr": [[0.1], [0.3], [0.05]]},
        {"bias": False, "widths": (1, 33, 1), "adapt": "head", "queries": 17},
        {"widths": (2, 1, 17, 1), "adapt": [0, 2], "tasks": 9, "activation": "softplus", "last_activation": "sigmoid"},
        {"steps": 1},
        {"steps": 0, "tasks": 2},
        {"adapt": [], "tasks": 2},
    ],
    ids=lambda options: " ".join(options),
)
def test_every_rule(rule: str, options: dict[str, Any]) -> None:
    case = replace(BASE, **options | RULES[rule])
    if case.step_weights is not None:
        case = replace(case, step_weights=case.step_weights[len(case.step_weights) - case.steps :])
    check(case)


COMPATIBLE = [
    (first, second)
    for first, second in combinations(RULES, 2)
    if {first, second} != {"Reptile", "multi-step"} and not set(RULES[first]) & set(RULES[second])
]


@pytest.mark.parametrize("pair", Random(0).sample(COMPATIBLE, 20 if INTERPRETED else 8), ids=" and ".join)
def test_pairs_of_rules(pair: tuple[str, str]) -> None:
    shots = 20 if len(pair[0]) % 2 else 7
    check(replace(BASE, tasks=2, widths=(3, 5), shots=shots, **RULES[pair[0]] | RULES[pair[1]]))


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "Reptile"])
@pytest.mark.parametrize("precision", ["tf32", "bf16", "fp16"])
def test_every_precision(rule: str, precision: str) -> None:
    case = replace(BASE, **RULES[rule], activation="relu", shots=10)
    assert_no_worse_than_twice(
        by_resident(case, precision), in_precision(case, precision), by_autograd(case, torch.float64)
    )


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shots", [7, 20])
def test_tasks_adapt_by_every_rule(rule: str, shots: int) -> None:
    case = replace(BASE, **RULES[rule], shots=shots, queries=20, weighted=True)
    model, batch = case.model(torch.float32).to(kernel_device()), on_device(case)
    support = Support(batch["support_x"], batch["support_y"], batch["support_weight"])
    plan = planned(case, model)
    outputs = resident.query_pass(resident.adapt(plan, flat(model), support), batch["query_x"]).outputs
    exact, own = (predicted(case, dtype) for dtype in (torch.float64, torch.float32))
    assert relative_error(outputs, exact) <= 2.0 * relative_error(own, exact) + 1e-6


def predicted(case: Case, dtype: torch.dtype) -> Tensor:
    batch, outer = case.batch(dtype), ("outer", "outer_loss", "step_weights", "nonfinite")
    inner = {name: value for name, value in case.options().items() if name not in outer}
    names = ("support_x", "support_y", "query_x", "support_weight")
    return ff.reference.predict(case.model(dtype), **{name: batch[name] for name in names}, **inner).detach()


@pytest.mark.parametrize("rule", ["skipping", "Reptile", "multi-step"])
@pytest.mark.parametrize("samples", [7, 20])
@pytest.mark.parametrize("needed", [True, False], ids=["gradients", "value"])
def test_tasks_that_diverge_are_left_out(rule: str, samples: int, needed: bool) -> None:
    options = RULES[rule] | {"nonfinite": "skip", "weighted": True, "reduction": "sum"}
    case = replace(BASE, shots=samples, queries=samples, activation="relu", **options)
    batch = on_device(case)
    others = torch.tensor([0, 2, 4], device=kernel_device())
    fewer = {name: values[others] for name, values in batch.items()}
    batch["support_y"][1, 0] = torch.nan
    batch["support_x"][3] = 1e30
    found, own = stepped(case, batch, needed=needed), stepped(replace(case, tasks=3), fewer, needed=needed)
    assert found.kept is not None
    weight = fewer["task_weight"]
    torch.testing.assert_close(found.kept, weight.sum())
    torch.testing.assert_close(found.value, own.value)
    for a, b in zip(found.gradients, own.gradients, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)
    if found.dx is not None:
        assert own.dx is not None
        torch.testing.assert_close(found.dx[others], own.dx)
        assert not found.dx[[1, 3]].any()


def test_a_task_of_finite_loss_and_infinite_gradient_is_left_out() -> None:
    case = replace(BASE, widths=(3, 4, 2), steps=0, loss="l1", activation="identity", nonfinite="skip", tasks=3)
    model, batch = case.model(torch.float32).to(kernel_device()), on_device(case)
    last = model[2]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        last.get_parameter("weight").fill_(1e30)
    batch["query_x"][1] = 1e10
    parameters = flat(model)
    needed = [True, *[p is not None for p in parameters]]
    outcome = resident.step(planned(case, model), needed, parameters, *sets(case, batch), 1.0)
    assert outcome.kept == 2
    assert outcome.value.isfinite()
    assert all(g.isfinite().all() for g in outcome.gradients if g is not None)


def test_the_outputs_of_a_multi_step_loss_are_those_after_the_last_step() -> None:
    case = replace(BASE, step_weights=(1.0, 1.0, 0.0), queries=20)
    model, batch = case.model(torch.float32).to(kernel_device()), on_device(case)
    outputs = torch.empty(case.tasks, case.queries, 5, device=kernel_device())
    resident.step(planned(case, model), [False] * 9, flat(model), *sets(case, batch), 1.0, outputs)
    single = replace(case, step_weights=None)
    last = torch.empty_like(outputs)
    resident.step(planned(single, model), [False] * 9, flat(model), *sets(single, batch), 1.0, last)
    assert relative_error(outputs, last) < 1e-6


@pytest.mark.parametrize("rule", ["multi-step", "clipped norm", "Reptile"])
def test_results_repeat_bit_by_bit(rule: str) -> None:
    case = replace(BASE, tasks=6, queries=20, **RULES[rule])
    first, second = (by_resident(case).values for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
