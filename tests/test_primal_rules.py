"""The rules of inner and outer loop on the primal engines, against the oracle: value, features and every gradient."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings

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
)

pytest.importorskip("triton")

from fomaml_fused.kernels.configuration import PrimalConfig

__all__ = ["watched"]
pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(not INTERPRETED, reason="compiles hundreds of kernels"),
]

NAMES = ("chained", "primal")
ENGINES = pytest.mark.parametrize("engine", NAMES)
WHOLE = {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}
DECOUPLED = {"weight_decay": 0.3, "decoupled_weight_decay": True}
ADAM = {"optimizer": "adam", "weight_decay": 0.1, "lr": 0.05}
RULES: list[dict[str, Any]] = [
    {**WHOLE, "lr": [[0.1], [0.05], [0.2]]},
    {**WHOLE, **DECOUPLED, "adapt": [0, 2]},
    {**DECOUPLED, "bias": False},
    {"momentum": 0.9, "nesterov": True, "steps": 1},
    ADAM,
    {**ADAM, **DECOUPLED, "adapt": [1], "weighted": True, "bias": False},
    {**ADAM, "outer": "reptile"},
    {**ADAM, "step_weights": (0.5, 0.2, 0.3), "max_grad_norm": 0.3, "max_grad_value": 0.1},
    {"max_grad_value": 0.04},
    {"max_grad_value": 0.04, **WHOLE, "weighted": True, "loss": "cross_entropy"},
    {"max_grad_norm": 0.3, "bias": False},
    {"max_grad_norm": 0.3, "max_grad_value": 0.1, "momentum": 0.9, "loss": "callable", "adapt": [1, 2]},
    {"outer": "reptile", **WHOLE, "weighted": True, "reduction": "sum"},
    {"outer": "reptile", "adapt": []},
    {"outer": "reptile", "steps": 0},
    {"outer": "reptile", "nonfinite": "skip", "bias": False},
    {"step_weights": (0.25, 0.0, 0.75)},
    {"step_weights": (0.5, 1.0, 1.0), "adapt": [1], "nonfinite": "skip", "weighted": True},
    {"step_weights": (0.5, 0.2, 0.3), "adapt": []},
    {"nonfinite": "skip", "weighted": True, "reduction": "sum", "steps": 0},
    {"nonfinite": "skip", "outer_loss": "callable"},
    {"learn_lr": "global", **WHOLE, "weighted": True},
    {"learn_lr": "step", "steps": 1, "adapt": [0, 2]},
    {"learn_lr": "layer", "momentum": 0.5, **DECOUPLED, "step_weights": (0.5, 0.2, 0.3), "adapt": [1, 2]},
    {"learn_lr": "element"},
    {"learn_lr": "element", **WHOLE, "adapt": [0, 2], "step_weights": (0.5, 0.2, 0.3)},
    {"learn_lr": "element", **ADAM, "bias": False, "nonfinite": "skip", "loss": "cross_entropy"},
    {"each_step": True, **WHOLE, "weighted": True, "loss": "cross_entropy"},
    {"each_step": True, "learn_lr": "element", "step_weights": (0.5, 0.2, 0.3), "max_grad_value": 0.1},
    {"each_step": True, "max_grad_norm": 0.3, "loss": "callable", "weighted": True},
    {"each_step": True, "outer": "reptile", "steps": 1, "adapt": [2]},
]


@pytest.mark.parametrize(("engine", "rule"), in_turn(NAMES, RULES), ids=str)
def test_every_rule(engine: str, rule: dict[str, Any]) -> None:
    """In tiles smaller than layers and sets, with samples under way in two parts."""
    sizes = {"widths": (9, 20, 5, 3), "tasks": 2, "shots": 17, "queries": 5, "steps": 3}
    case = Case(**{"activation": "gelu", **sizes, **rule})
    with ff.override(engine=engine, config=PrimalConfig(4, 16, features=16, contracted=16), rows=16):
        check(case)


@ENGINES
@given(case=ruled())
@settings(max_examples=8)
def test_rules_drawn_together(engine: str, case: Case) -> None:
    if case.learn_lr in ("step", "layer_step") and case.steps > 1:
        case = replace(case, learn_lr="element")
    with ff.override(engine=engine):
        check(case)


@ENGINES
@pytest.mark.parametrize("rule", [ADAM, {"learn_lr": "element", "momentum": 0.9}, {"max_grad_norm": 0.3}], ids=str)
def test_every_rule_in_sixteen_bits(engine: str, rule: dict[str, Any]) -> None:
    case = Case(**{"widths": (3, 17, 20), "shots": 40, "tasks": 5, **rule})
    exact = solution(case, "reference", torch.float64).vectors()
    with ff.override(engine=engine):
        for precision in ("bf16", "fp16"):
            for name, value in solution(case, "triton", precision=precision).vectors().items():
                assert relative_error(value, exact[name]) < 3e-2


@pytest.mark.parametrize(("engine", "rule"), in_turn(NAMES, diverging("element")), ids=str)
def test_diverged_tasks_are_left_out(engine: str, rule: dict[str, Any]) -> None:
    with ff.override(engine=engine):
        check_diverged_tasks_are_left_out(rule)


@pytest.mark.parametrize(
    ("engine", "rule"),
    in_turn(
        NAMES,
        [
            WHOLE,
            {**ADAM, "adapt": [0, 2], "bias": False},
            {"outer": "reptile", "momentum": 0.9},
            {"step_weights": (0.5, 0.2, 0.3), "learn_lr": "element"},
            {"max_grad_norm": 0.3, "weight_decay": 0.1, "learn_lr": "layer"},
            {"each_step": True, "learn_lr": "layer", "momentum": 0.9, "adapt": [1, 2]},
        ],
    ),
    ids=str,
)
def test_adapted_tasks(engine: str, rule: dict[str, Any]) -> None:
    case = Case(**{"widths": (3, 17, 5, 3), "steps": 3, "activation": "gelu", **rule})
    with ff.override(engine=engine):
        check_adapted_tasks(case)


@ENGINES
@pytest.mark.parametrize("rule", [{"outer": "reptile"}, {"step_weights": (0.5, 0.5)}, {"nonfinite": "skip"}], ids=str)
@pytest.mark.parametrize("nothing", ["tasks", "queries"])
def test_no_task_and_no_query(engine: str, rule: dict[str, Any], nothing: str) -> None:
    with ff.override(engine=engine):
        check_without_tasks_or_queries(Case(**{nothing: 0, **rule}))


@pytest.mark.parametrize("rule", [{"outer": "reptile"}, {"max_grad_norm": 0.3, "learn_lr": "element"}], ids=str)
def test_rules_repeat_bit_by_bit(rule: dict[str, Any]) -> None:
    case = Case(widths=(9, 20, 17, 5), loss="cross_entropy", tasks=6, **rule)
    with ff.override(engine="primal"):
        first, second = (solution(case, "triton").values for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
