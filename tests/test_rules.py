"""Every rule of the inner and outer loop against the oracle: alone in every form, and in pairs drawn at random."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fomaml_fused.batched_plans import form_obstacle

from .cases import Case, assert_close, assert_no_worse_than_twice, by_engine, by_oracle, yardsticks

BASE = Case(widths=(3, 17, 5, 3), activation="gelu", steps=3, tasks=4)

# What each rule is by itself, and what it may be joined with.
RULES: dict[str, dict[str, Any]] = {
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "momentum": {"momentum": 0.9},
    "decay": {"weight_decay": 0.1},
    "decoupled decay": {"weight_decay": 0.1, "decoupled_weight_decay": True},
    "adam": {"optimizer": "adam", "lr": 0.01},
    "clipped norm": {"max_grad_norm": 0.3},
    "clipped values": {"max_grad_value": 0.05},
    "reptile": {"outer": "reptile"},
    "multi-step loss": {"step_weights": (0.2, 0.0, 0.5)},
    "global rate": {"learn_lr": "global"},
    "rates by step": {"learn_lr": "step"},
    "rates by layer": {"learn_lr": "layer", "positive_lr": "softplus"},
    "rates by layer and step": {"learn_lr": "layer_step"},
    "rates of elements": {"learn_lr": "element", "positive_lr": "clamp"},
    "support of each step": {"each_step": True},
    "layer norm": {"norm": "layer"},
    # A bias in front of it would have no gradient but rounding.
    "batch norm": {"norm": "batch", "bias": False},
    "weights alone": {"adapt": lambda name, _: "weight" in name},
    "biases alone": {"adapt": lambda name, _: "bias" in name},
    "head and one bias": {"adapt": ["0.bias", "4"]},
    "skips": {"nonfinite": "skip"},
    "ragged shots": {"support_counts": (5, 2, 3, 2)},
    "ragged queries": {"query_counts": (4, 2, 3, 4)},
    "ragged steps": {"step_counts": (3, 0, 1, 3)},
    "weights of samples": {"weighted": True},
}
# Rules that set the same option, or that have nothing to do with each other.
APART = [
    {"nesterov", "momentum", "adam"},
    {"decay", "decoupled decay"},
    {name for name in RULES if "rate" in name} | {"reptile"},
    {"multi-step loss", "reptile"},
    {"ragged queries", "reptile"},
    {"layer norm", "batch norm"},
    {"weights alone", "biases alone", "head and one bias"},
    {"batch norm", "biases alone"},
    {"batch norm", "head and one bias"},
]
PAIRS = [pair for pair in combinations(RULES, 2) if not any(set(pair) <= group for group in APART)]
FORMS = ("primal", "dual", "dual:1", "dual:2", "mixed")


def joined(*rules: str) -> Case:
    case = BASE
    for rule in rules:
        case = replace(case, **RULES[rule])
    return case


def forms_of(case: Case, form: str) -> tuple[str, ...] | None:
    """A form for each layer, as near to the one asked for as the planner lets it take; None where that is nowhere."""
    last = "dual" if case.step_counts else "dual:1"  # a task of no step folds nothing
    names = ("dual", "primal", last) if form == "mixed" else (form,) * 3
    problem = case.meta(case.model(torch.float64), "torch").problem
    taken = [form_obstacle(problem, i, name) is None for i, name in enumerate(names)]
    if not any(taken) or (case.step_counts and form.startswith("dual:")):
        return None
    return tuple(name if took else "primal" for name, took in zip(names, taken, strict=True))


def check(case: Case, forms: tuple[str, ...] | None, chunk: int | None = None) -> None:
    exact = by_oracle(case, torch.float64)
    assert_close(by_engine(case, torch.float64, forms, chunk), exact, 1e-10)
    assert_no_worse_than_twice(by_engine(case, torch.float32, forms, chunk), yardsticks(case, torch.float32), exact)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.sampled(4)
def test_every_rule(rule: str, form: str) -> None:
    case = joined(rule)
    forms = forms_of(case, form)
    if forms is not None:
        check(case, forms, chunk=3)


@pytest.mark.parametrize("form", ["primal", "dual", "mixed"])
@pytest.mark.parametrize(
    "rules",
    [
        ("reptile", "decay"),
        ("reptile", "decoupled decay", "nesterov", "support of each step"),
        ("reptile", "weights alone", "decay", "weights of samples"),
        ("weights alone", "decay", "momentum", "support of each step"),
        ("rates by layer and step", "nesterov", "decoupled decay", "multi-step loss"),
        ("rates by layer", "weights alone", "decay", "momentum", "multi-step loss"),
        ("global rate", "weights alone", "decay", "support of each step"),
        ("clipped norm", "clipped values", "layer norm"),
        ("clipped norm", "weights alone", "decoupled decay", "layer norm"),
        ("rates of elements", "adam", "layer norm", "multi-step loss"),
        ("rates by step", "multi-step loss", "skips", "ragged steps"),
        ("rates by layer and step", "adam", "batch norm", "ragged shots", "ragged steps"),
    ],
    ids=" + ".join,
)
@pytest.mark.sampled(4)
def test_rules_that_meet(rules: tuple[str, ...], form: str) -> None:
    case = joined(*rules)
    forms = forms_of(case, form)
    if forms is not None:
        check(case, forms)


@given(pair=st.sampled_from(PAIRS), form=st.sampled_from(FORMS), seed=st.integers(0, 1 << 20), bias=st.booleans())
def test_pairs_of_rules(pair: tuple[str, str], form: str, seed: int, bias: bool) -> None:
    case = replace(joined(*pair), seed=seed)
    if not set(pair) & {"biases alone", "head and one bias"}:
        case = replace(case, bias=case.bias and bias)
    check(case, forms_of(case, form))
