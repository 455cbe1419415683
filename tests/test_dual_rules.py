"""The rules of inner and outer loop on the dual engines, against the oracle: value, features and every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fomaml_fused as ff

from .cases import Case, relative_error
from .kernel_contract import INTERPRETED, watched
from .with_rules import (
    check,
    check_adapted_tasks,
    check_diverged_tasks_are_left_out,
    check_without_tasks_or_queries,
    diverging,
    in_turn,
    ruled,
    solution,
    solved,
)

pytest.importorskip("triton")

from fomaml_fused.kernels.configuration import DualConfig

__all__ = ["watched"]
pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(not INTERPRETED, reason="compiles hundreds of kernels"),
]

NAMES = ("dual", "layered")
ENGINES = pytest.mark.parametrize("engine", NAMES)
WHOLE = {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}
DECOUPLED = {"weight_decay": 0.1, "decoupled_weight_decay": True}
RULES: list[dict[str, Any]] = [
    {"momentum": 0.9, "nesterov": True},
    {"momentum": 0.9, "nesterov": True, "steps": 1},
    {**WHOLE, "lr": [[0.1], [0.05], [0.2]]},
    {**WHOLE, **DECOUPLED, "adapt": [0, 2]},
    {**DECOUPLED, "bias": False},
    {**DECOUPLED, "momentum": 0.5},
    {"outer": "reptile"},
    {"outer": "reptile", **WHOLE, "weighted": True},
    {"outer": "reptile", **DECOUPLED, "bias": False, "lr": [0.1, 0.0, 0.2]},
    {"outer": "reptile", "adapt": [1, 2], "weighted": True, "reduction": "sum"},
    {"outer": "reptile", "adapt": []},
    {"outer": "reptile", "steps": 0},
    {"outer": "reptile", "nonfinite": "skip", "weighted": True},
    {"step_weights": (0.25, 0.0, 0.75)},
    {"step_weights": (0.5, 0.5, 0.0), **WHOLE, "weighted": True, "loss": "cross_entropy"},
    {"step_weights": (0.5, 1.0, 1.0), "adapt": [1], "weight_decay": 0.1, "nonfinite": "skip"},
    {"step_weights": (0.5, 0.2, 0.3), "adapt": []},
    {"max_grad_norm": 0.3},
    {"max_grad_norm": 0.3, **WHOLE, "weighted": True, "bias": False},
    {"max_grad_norm": 0.3, "momentum": 0.9, "adapt": [1, 2], "outer": "reptile"},
    {"max_grad_norm": 0.3, "step_weights": (0.5, 0.2, 0.3), "loss": "callable"},
    {"nonfinite": "skip"},
    {"nonfinite": "skip", "weighted": True, "reduction": "sum", "steps": 0},
    {"learn_lr": "global", **WHOLE, "weighted": True},
    {"learn_lr": "step", **WHOLE, **DECOUPLED, "bias": False, "adapt": [0, 2]},
    {"learn_lr": "layer", "momentum": 0.5, "weight_decay": 0.1, "step_weights": (0.5, 0.2, 0.3), "adapt": [1, 2]},
    {"learn_lr": "layer_step", "step_weights": (0.5, 0.0, 0.3), "nonfinite": "skip", "loss": "cross_entropy"},
    {"learn_lr": "layer_step", "max_grad_norm": 0.3, "weight_decay": 0.1},
    {"each_step": True, **WHOLE, "weighted": True, "loss": "cross_entropy"},
    {"each_step": True, **DECOUPLED, "adapt": [1, 2], "step_weights": (0.5, 0.2, 0.3), "learn_lr": "layer_step"},
    {"each_step": True, "outer": "reptile", "weight_decay": 0.1, "nonfinite": "skip"},
    {"each_step": True, "max_grad_norm": 0.3, "momentum": 0.9, "loss": "callable", "weighted": True},
    {"each_step": True, "adapt": [2], "steps": 1},
    {"each_step": True, "steps": 0},
]
FOLDS: list[dict[str, Any]] = [
    {**WHOLE, "forms": ("dual", "dual:2", "dual:1")},
    {**WHOLE, **DECOUPLED, "bias": False, "forms": ("dual", "dual:1", "dual:2")},
    {**DECOUPLED, "forms": ("dual", "dual:1", "dual:2")},
    {"outer": "reptile", **WHOLE, "weighted": True, "forms": ("dual", "dual:3", "dual:1")},
    {"outer": "reptile", "nonfinite": "skip", "bias": False, "forms": ("dual", "dual", "dual:2")},
    {"step_weights": (0.5, 0.2, 0.3), "momentum": 0.9, "forms": ("dual", "dual:2", "dual:1")},
    {"step_weights": (0.5, 0.2, 0.3), "nonfinite": "skip", "forms": ("dual", "dual:3", "dual")},
    {"max_grad_norm": 0.3, **WHOLE, "forms": ("dual", "dual:2", "dual:1")},
    {"max_grad_norm": 0.3, "adapt": [1, 2], "forms": ("dual", "dual", "dual:2")},
    {"each_step": True, **WHOLE, "forms": ("dual:2", "dual:1", "dual")},
    {"each_step": True, "outer": "reptile", "adapt": [1, 2], "forms": ("dual", "dual:1", "dual:3")},
]


def takes(engine: str, case: Case) -> bool:
    """Whether an engine is to take a case; where not, the planner says so."""
    return engine == "layered" or (case.max_grad_norm is None and "callable" not in (case.loss, case.outer_loss))


@pytest.mark.parametrize(("engine", "rule"), in_turn(NAMES, RULES), ids=str)
def test_every_rule(engine: str, rule: dict[str, Any]) -> None:
    """In packs of tasks, and tiles smaller than layers and sets."""
    sizes = {"widths": (9, 20, 5, 3), "tasks": 4, "queries": 7, "steps": 3}
    case = Case(**{"activation": "gelu", **sizes, **rule})
    with ff.override(engine=engine, config=DualConfig(4, 16, tasks=3, features=16, contracted=16)):
        if not takes(engine, case):
            with pytest.raises(ValueError, match=r"'dual'.*(max_grad_norm takes|loss is a callable)"):
                solution(case, "triton")
            engine = "layered"
        with ff.override(engine=engine):
            check(case)


@pytest.mark.parametrize("rule", FOLDS, ids=str)
def test_every_rule_where_layers_fold(rule: dict[str, Any]) -> None:
    case = Case(**{"widths": (3, 17, 5, 3), "steps": 3, "activation": "gelu", **rule})
    with ff.override(engine="layered", forms=case.forms):
        check(case)


@pytest.mark.parametrize(
    "rule",
    [
        {**WHOLE, "learn_lr": "layer_step"},
        {**DECOUPLED, "learn_lr": "layer", "step_weights": (0.0, 0.2, 0.0, 0.3, 0.5), "max_grad_norm": 0.3},
    ],
    ids=str,
)
def test_rates_are_learned_where_layers_fold(rule: dict[str, Any]) -> None:
    case = Case(widths=(3, 17, 20, 3), tasks=2, shots=20, steps=5, **rule)
    with ff.override(engine="layered"):
        meta = case.meta(case.model(torch.float32), "triton")
        assert meta.plan(case.tasks, case.shots, case.queries).forms == ("dual", "dual:4", "dual:4")
        check(case)


@ENGINES
def test_rates_are_learned_where_nothing_else_is(engine: str) -> None:
    case = Case(widths=(3, 17, 5, 3), steps=3, weight_decay=0.1, learn_lr="layer_step", adapt=[0, 2])
    meta = case.meta(case.model(torch.float32), "triton")
    batch = {name: t.detach() for name, t in case.batch(torch.float32).items()}
    with ff.override(engine=engine):
        (expected,) = torch.autograd.grad(meta(**batch), list(meta.inner_lr.parameters()))
        meta.model.requires_grad_(False)
        (found,) = torch.autograd.grad(meta(**batch), list(meta.inner_lr.parameters()))
    assert expected.any()
    assert torch.equal(found, expected)


@ENGINES
@given(case=ruled(), tasks=st.integers(1, 3))
@settings(max_examples=8)
def test_rules_drawn_together(engine: str, case: Case, tasks: int) -> None:
    fits = tasks * case.shots <= 64 and tasks * case.shots * case.steps <= 64
    if fits and takes(engine, case):
        with ff.override(engine=engine, config=DualConfig(4, 16, 16, 16, tasks=tasks)):
            check(case)


@ENGINES
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_sixteen_bits_hold_what_rules_add(engine: str, precision: str) -> None:
    """Reptile's parts of many tasks, small rates in them, are less than fp16 holds; what is summed is not."""
    case = Case(widths=(3, 17, 20), outer="reptile", tasks=40, shots=2, lr=1e-4, weighted=True)
    with ff.override(engine=engine):
        found = solution(case, "triton", precision=precision).vectors()
    exact = solution(case, "reference", torch.float64).vectors()
    for name, value in found.items():
        assert relative_error(value, exact[name]) < 2e-2


@pytest.mark.parametrize(("engine", "rule"), in_turn(NAMES, diverging("step")), ids=str)
def test_diverged_tasks_are_left_out(engine: str, rule: dict[str, Any]) -> None:
    with ff.override(engine=engine, config=DualConfig(4, 16, tasks=3)):
        check_diverged_tasks_are_left_out(rule)


@ENGINES
@pytest.mark.parametrize("rule", [{}, {"step_weights": (0.5, 0.5)}, {"outer": "reptile"}], ids=str)
def test_with_every_task_diverged_nothing_is_left(engine: str, rule: dict[str, Any]) -> None:
    case = Case(tasks=2, activation="relu", lr=1.0, nonfinite="skip", **rule)
    meta = case.meta(case.model(torch.float32), "triton")
    batch = {name: t.detach() for name, t in case.batch(torch.float32).items()}
    batch["support_y"][:] = 1e30
    with ff.override(engine=engine):
        found = solved(meta, batch, "sum")
    assert not any(value.any() for value in found.values())


@pytest.mark.parametrize(
    ("engine", "rule"),
    in_turn(
        NAMES,
        [
            WHOLE,
            {**WHOLE, **DECOUPLED, "adapt": [0, 2], "bias": False, "learn_lr": "layer"},
            {"outer": "reptile", "momentum": 0.9},
            {"step_weights": (0.5, 0.2, 0.3), "learn_lr": "layer_step"},
            {"max_grad_norm": 0.3, "weight_decay": 0.1, "learn_lr": "step"},
            {"each_step": True, "learn_lr": "layer", "momentum": 0.9, "adapt": [1, 2]},
        ],
    ),
    ids=str,
)
def test_adapted_tasks(engine: str, rule: dict[str, Any]) -> None:
    case = Case(**{"widths": (3, 17, 5, 3), "steps": 3, "activation": "gelu", **rule})
    with ff.override(engine=engine if takes(engine, case) else "layered"):
        check_adapted_tasks(case)


@ENGINES
@pytest.mark.parametrize("rule", [{"outer": "reptile"}, {"step_weights": (0.5, 0.5)}, {"nonfinite": "skip"}], ids=str)
@pytest.mark.parametrize("nothing", ["tasks", "queries"])
def test_no_task_and_no_query(engine: str, rule: dict[str, Any], nothing: str) -> None:
    with ff.override(engine=engine):
        check_without_tasks_or_queries(Case(**{nothing: 0, **rule}))


@pytest.mark.parametrize("rule", [{"outer": "reptile"}, {"max_grad_norm": 0.3, "learn_lr": "step"}, WHOLE], ids=str)
def test_rules_repeat_bit_by_bit(rule: dict[str, Any]) -> None:
    case = Case(widths=(9, 20, 17, 5), loss="cross_entropy", tasks=6, **rule)
    with ff.override(engine="layered"):
        first, second = (solution(case, "triton").values for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@ENGINES
@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        ({"optimizer": "adam"}, "Adam takes"),
        ({"max_grad_value": 0.1}, "max_grad_value takes"),
        ({"learn_lr": "element"}, "rates of elements take"),
    ],
    ids=str,
)
def test_what_is_not_taken_is_named(engine: str, rule: dict[str, Any], reason: str) -> None:
    with ff.override(engine=engine), pytest.raises(ValueError, match=f"engine is '{engine}'.*{reason}"):
        solution(Case(**rule), "triton")
