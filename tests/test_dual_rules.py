"""The rules of inner and outer loop on the dual engines, against the oracle: value, features and every gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fomaml_fused as ff
from fomaml_fused.batch import Query, Sizes, Support
from fomaml_fused.engines import Outcome
from fomaml_fused.planner import make_plan
from fomaml_fused.plans import Plan

from .cases import Case, Solution, assert_no_worse_than_twice, cases, flat, relative_error
from .kernel_contract import INTERPRETED, watched
from .on_kernels import kernel_device

pytest.importorskip("triton")

from fomaml_fused.kernels.configuration import DualConfig

from fomaml_fused.engines import dual

__all__ = ["watched"]
pytestmark = pytest.mark.skipif(not INTERPRETED, reason="compiles hundreds of kernels")

ENGINES = pytest.mark.parametrize("engine", ["dual", "layered"])
WHOLE = {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}
RULES: list[dict[str, Any]] = [
    {"momentum": 0.9, "nesterov": True},
    {"momentum": 0.9, "nesterov": True, "steps": 1},
    {**WHOLE, "lr": [[0.1], [0.05], [0.2]]},
    {**WHOLE, "decoupled_weight_decay": True, "adapt": [0, 2]},
    {"weight_decay": 0.1, "decoupled_weight_decay": True, "bias": False},
    {"momentum": 0.5, "weight_decay": 0.1, "decoupled_weight_decay": True},
    {"outer": "reptile"},
    {"outer": "reptile", **WHOLE, "weighted": True},
    {"outer": "reptile", "weight_decay": 0.1, "decoupled_weight_decay": True, "bias": False, "lr": [0.1, 0.0, 0.2]},
    {"outer": "reptile", "adapt": [1, 2], "weighted": True, "reduction": "sum"},
    {"outer": "reptile", "adapt": []},
    {"outer": "reptile", "lr": 0.0},
    {"outer": "reptile", "nonfinite": "skip", "weighted": True},
    {"step_weights": (0.25, 0.0, 0.75)},
    {"step_weights": (0.5, 0.5, 0.0), **WHOLE, "weighted": True, "loss": "cross_entropy"},
    {"step_weights": (-0.5, 1.0, 1.0), "adapt": [1], "weight_decay": 0.1, "nonfinite": "skip"},
    {"step_weights": (0.5, 0.2, 0.3), "adapt": []},
    {"step_weights": (), "steps": 0},
    {"max_grad_norm": 0.3},
    {"max_grad_norm": 0.3, **WHOLE, "weighted": True, "bias": False},
    {"max_grad_norm": 0.3, "momentum": 0.9, "adapt": [1, 2], "outer": "reptile"},
    {"max_grad_norm": 0.3, "step_weights": (0.5, 0.2, 0.3), "loss": "callable", "outer_loss": "callable"},
    {"nonfinite": "skip"},
    {"nonfinite": "skip", "weighted": True, "reduction": "sum", "steps": 0},
]
LAYOUTS: list[tuple[dict[str, Any], DualConfig | None]] = [
    ({}, None),
    ({"widths": (9, 33, 20, 5), "tasks": 5, "queries": 11}, DualConfig(4, 16, tasks=3, features=16, contracted=16)),
]
LEARNED = ("global", "step", "layer", "layer_step")


def takes(engine: str, case: Case) -> bool:
    """Whether an engine is to take a case; where not, the planner says so."""
    return engine == "layered" or (case.max_grad_norm is None and "callable" not in (case.loss, case.outer_loss))


def planned(case: Case, learn_lr: str | None = None, precision: str = "highest") -> Plan:
    problem = ff.FOMAML(case.model(torch.float32), **case.options(), learn_lr=learn_lr).problem
    sizes = Sizes(case.tasks, case.shots, case.queries, torch.float32, kernel_device(), case.each_step)
    return make_plan(problem, sizes, "triton", precision)


def started(case: Case, learn_lr: str, dtype: torch.dtype) -> Tensor:
    """Rates that are learned: [K, layers], or [1, layers] where all steps share them."""
    rows = case.steps if learn_lr in ("step", "layer_step") else 1
    generator = torch.Generator().manual_seed(case.seed + 3)
    rates = 0.05 + 0.1 * torch.rand(rows, len(case.widths) - 1, generator=generator, dtype=torch.float64)
    return rates.to(dtype)


def parts(case: Case, dtype: torch.dtype = torch.float32) -> tuple[Support, Query]:
    batch = {name: t.detach() for name, t in case.batch(dtype).items()}
    support = Support(batch["support_x"], batch["support_y"], batch.get("support_weight"))
    weights = (batch.get("query_weight"), batch.get("task_weight"), case.step_weights)
    return support, Query(batch["query_x"], batch["query_y"], *weights)


def outcome(
    case: Case,
    learn_lr: str | None = None,
    precision: str = "highest",
    *,
    spoilt: Sequence[int] = (),
    only: Sequence[int] | None = None,
) -> tuple[Outcome, list[Tensor | None]]:
    """What the engine gives for a case, and the parameters that it was given.

    spoilt: tasks that diverge.  only: the tasks of the batch, each of which then counts what it does in the whole one.
    """
    parameters = flat(case.model(torch.float32))
    support, query = parts(case)
    if spoilt:
        support.y[list(spoilt)] = 1e30
    if learn_lr is not None:
        parameters.append(started(case, learn_lr, torch.float32))
    if only is not None:
        support, query = some(support, only), some(query, only)
        case = replace(case, tasks=len(only), reduction="sum")
    share: float | Tensor = 1.0 if query.task_weight is None else query.task_weight
    if case.reduction == "mean" and case.nonfinite == "propagate":
        share = share / case.tasks if isinstance(share, float) else share / share.sum()
    needed = [case.outer != "reptile", *(p is not None for p in parameters)]
    plan = planned(case, learn_lr, precision)
    found = dual.step(plan, needed, parameters, support, None if case.outer == "reptile" else query, share)
    return found, parameters


def some(samples: Any, tasks: Sequence[int]) -> Any:
    """The samples of some tasks."""
    tensors = {name: value for name, value in vars(samples).items() if isinstance(value, Tensor)}
    return replace(samples, **{name: value[list(tasks)] for name, value in tensors.items()})


def by_step(case: Case, learn_lr: str | None = None, precision: str = "highest") -> Solution:
    (value, dx, gradients, kept), parameters = outcome(case, learn_lr, precision)
    divisor = 1.0
    if case.nonfinite == "skip":
        assert kept is not None
        divisor = float(kept) if case.reduction == "mean" else 1.0
    values = {"value": value / divisor}
    if dx is not None:
        values["value d/d query_x"] = dx / divisor
    if learn_lr is not None:
        rates = gradients[-1]
        assert rates is not None
        values["rates"] = rates / divisor
    for i, (parameter, gradient) in enumerate(zip(parameters, gradients, strict=True)):
        if parameter is not None and parameter.shape != (values["rates"].shape if "rates" in values else None):
            values[f"value d/d {i}"] = torch.zeros_like(parameter) if gradient is None else gradient / divisor
    return Solution(values)


def by_reference(case: Case, dtype: torch.dtype, learn_lr: str | None = None) -> Solution:
    model = case.model(dtype)
    batch, options = case.batch(dtype), case.options()
    inputs = {f"value d/d {i}": p for i, p in enumerate(flat(model)) if p is not None}
    if case.outer == "reptile":
        batch |= {"query_x": None, "query_y": None, "query_weight": None}
    else:
        inputs["value d/d query_x"] = batch["query_x"]
    if learn_lr is not None:
        options["lr"] = inputs["rates"] = started(case, learn_lr, dtype).requires_grad_()
    value = ff.reference.meta_loss(model, **batch, **options, reduction=case.reduction)
    found = torch.autograd.grad(value, list(inputs.values()), allow_unused=True, materialize_grads=True)
    return Solution({"value": value.detach()} | dict(zip(inputs, found, strict=True)))


def check(case: Case, learn_lr: str | None = None) -> None:
    own = [by_reference(replace(case, jitter=jitter), torch.float32, learn_lr) for jitter in range(4)]
    assert_no_worse_than_twice(by_step(case, learn_lr), own, by_reference(case, torch.float64, learn_lr))


@ENGINES
@pytest.mark.parametrize(("layout", "config"), LAYOUTS, ids=["as planned", "packs in small tiles"])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_every_rule(engine: str, rule: dict[str, Any], layout: dict[str, Any], config: DualConfig | None) -> None:
    case = Case(**{"widths": (3, 17, 5, 3), "steps": 3, "activation": "gelu", **layout, **rule})
    with ff.override(engine=engine, config=config):
        if takes(engine, case):
            check(case)
        else:
            with pytest.raises(ValueError, match=r"max_grad_norm takes|callable"):
                planned(case)


@ENGINES
@pytest.mark.parametrize("learn_lr", LEARNED)
@pytest.mark.parametrize(
    ("rule", "config"),
    [
        ({}, None),
        ({**WHOLE, "weighted": True, "tasks": 5}, DualConfig(4, 16, tasks=2, features=16, contracted=16)),
        ({**WHOLE, "decoupled_weight_decay": True, "bias": False, "adapt": [0, 2]}, None),
        ({"momentum": 0.5, "weight_decay": 0.1, "step_weights": (0.5, 0.2, 0.3), "adapt": [1, 2]}, None),
        ({"step_weights": (0.5, 0.0, 0.3), "nonfinite": "skip", "loss": "cross_entropy", "queries": 20}, None),
        ({"steps": 0}, None),
        ({"adapt": []}, None),
    ],
    ids=str,
)
def test_learned_rates(engine: str, learn_lr: str, rule: dict[str, Any], config: DualConfig | None) -> None:
    case = Case(**{"widths": (3, 17, 5, 3), "steps": 3, "activation": "gelu", **rule})
    with ff.override(engine=engine, config=config):
        check(case, learn_lr)


@pytest.mark.parametrize("learn_lr", [None, "layer_step"])
@pytest.mark.parametrize(
    "rule",
    [
        {**WHOLE, "forms": ("dual", "dual:2", "dual:1")},
        {**WHOLE, "decoupled_weight_decay": True, "bias": False, "forms": ("dual", "dual:1", "dual:2")},
        {"outer": "reptile", **WHOLE, "weighted": True, "forms": ("dual", "dual:3", "dual:1")},
        {"outer": "reptile", "nonfinite": "skip", "bias": False, "forms": ("dual", "dual", "dual:2")},
        {"step_weights": (0.5, 0.2, 0.3), "momentum": 0.9, "forms": ("dual", "dual:2", "dual:1")},
        {"step_weights": (0.5, 0.2, 0.3), "forms": ("dual", "dual:3", "dual"), "nonfinite": "skip"},
        {"max_grad_norm": 0.3, **WHOLE, "forms": ("dual", "dual:2", "dual:1")},
        {"max_grad_norm": 0.3, "adapt": [1, 2], "forms": ("dual", "dual", "dual:2")},
    ],
    ids=str,
)
def test_rules_where_layers_fold(rule: dict[str, Any], learn_lr: str | None) -> None:
    if learn_lr is not None and "outer" in rule:
        pytest.skip("there is no query loss to learn rates from")
    case = Case(**{"widths": (3, 17, 5, 3), "steps": 3, "activation": "gelu", **rule})
    with ff.override(engine="layered", forms=case.forms):
        check(case, learn_lr)


@st.composite
def ruled(draw: st.DrawFn) -> tuple[Case, str | None]:
    """Random problems with rules drawn together, and the granularity at which their rates are learned."""
    case = draw(cases())
    outer = draw(st.sampled_from(["fomaml", "fomaml", "reptile"]))
    weights = st.lists(st.sampled_from([0.0, 0.3, 1.0]), min_size=case.steps, max_size=case.steps)
    step_weights = None if outer == "reptile" or draw(st.booleans()) else tuple(draw(weights))
    momentum = draw(st.sampled_from([0.0, 0.9]))
    case = replace(
        case,
        momentum=momentum,
        nesterov=momentum > 0.0 and draw(st.booleans()),
        weight_decay=draw(st.sampled_from([0.0, 0.1])),
        decoupled_weight_decay=draw(st.booleans()),
        max_grad_norm=draw(st.sampled_from([None, None, 0.3])),
        outer=outer,
        step_weights=step_weights if step_weights is None or any(step_weights) or not case.steps else None,
        nonfinite=draw(st.sampled_from(["propagate", "skip"])),
    )
    return case, None if outer == "reptile" else draw(st.sampled_from([None, *LEARNED]))


@ENGINES
@given(drawn=ruled(), tasks=st.integers(1, 3))
@settings(max_examples=25)
def test_rules_drawn_together(engine: str, drawn: tuple[Case, str | None], tasks: int) -> None:
    case, learn_lr = drawn
    fits = tasks * case.shots <= 64 and tasks * case.shots * case.steps <= 64
    if fits and takes(engine, case):
        with ff.override(engine=engine, config=DualConfig(4, 16, tasks, 16, 16)):
            check(case, learn_lr)


@ENGINES
@pytest.mark.parametrize(
    "rule",
    [
        {},
        {"weighted": True, "reduction": "sum"},
        {"step_weights": (0.5, 0.25, 0.25, 0.0)},
        {"outer": "reptile", "weight_decay": 0.1},
    ],
    ids=str,
)
def test_diverged_tasks_are_left_out(engine: str, rule: dict[str, Any]) -> None:
    """What is left is what a batch without them gives."""
    case = Case(**{"tasks": 6, "activation": "relu", "steps": 4, "lr": 1.0, "nonfinite": "skip", **rule})
    keep = [0, 2, 3, 5]
    with ff.override(engine=engine, config=DualConfig(4, 16, tasks=3)):
        found, _ = outcome(case, spoilt=[1, 4])
        expected, _ = outcome(replace(case, nonfinite="propagate"), only=keep)
    assert found.kept is not None
    weight = parts(case)[1].task_weight
    assert float(found.kept) == pytest.approx(4.0 if weight is None else float(weight[keep].sum()))
    assert relative_error(found.value, expected.value) < 1e-6
    for gradient, other in zip(found.gradients, expected.gradients, strict=True):
        assert gradient is None or relative_error(gradient, present(other)) < 1e-6
    if found.dx is not None:
        assert relative_error(found.dx[keep], present(expected.dx)) < 1e-6
        assert not found.dx[[1, 4]].any()


@ENGINES
@pytest.mark.parametrize("rule", [{}, {"step_weights": (0.5, 0.5)}, {"outer": "reptile"}], ids=str)
def test_with_every_task_diverged_nothing_is_left(engine: str, rule: dict[str, Any]) -> None:
    case = Case(tasks=2, activation="relu", lr=1.0, nonfinite="skip", **rule)
    with ff.override(engine=engine):
        found, _ = outcome(case, spoilt=[0, 1])
    left = [found.kept, found.value, found.dx, *found.gradients]
    assert not any(t.any() for t in left if t is not None)


@ENGINES
@pytest.mark.parametrize(
    "rule",
    [
        WHOLE,
        {**WHOLE, "decoupled_weight_decay": True, "adapt": [0, 2], "bias": False},
        {"outer": "reptile", "momentum": 0.9},
        {"step_weights": (0.5, 0.2, 0.3)},
        {"max_grad_norm": 0.3, "weight_decay": 0.1},
    ],
    ids=str,
)
@pytest.mark.parametrize("learn_lr", [None, "layer", "layer_step"])
def test_adapted_tasks(engine: str, rule: dict[str, Any], learn_lr: str | None) -> None:
    """Outputs with their gradients, rates included, and fast weights."""
    case = Case(**{"widths": (3, 17, 5, 3), "steps": 3, "activation": "gelu", **rule})
    if not takes(engine, case) or (case.outer == "reptile" and learn_lr is not None):
        pytest.skip("refused")
    own = [predicted(replace(case, jitter=jitter), torch.float32, learn_lr) for jitter in range(4)]
    with ff.override(engine=engine):
        found = predicted_by_kernels(case, learn_lr)
    assert_no_worse_than_twice(found, own, predicted(case, torch.float64, learn_lr))


def predicted(case: Case, dtype: torch.dtype, learn_lr: str | None) -> Solution:
    model, batch, options = case.model(dtype), case.batch(dtype), case.options()
    inputs = {f"outputs d/d {i}": p for i, p in enumerate(flat(model)) if p is not None}
    inputs["outputs d/d query_x"] = batch["query_x"]
    if learn_lr is not None:
        options["lr"] = inputs["rates"] = started(case, learn_lr, dtype).requires_grad_()
    for name in ("outer", "outer_loss", "step_weights", "nonfinite"):
        del options[name]
    outputs = ff.reference.predict(model, batch["support_x"], batch["support_y"], batch["query_x"], **options)
    found = torch.autograd.grad(outputs, list(inputs.values()), cotangent(outputs), allow_unused=True)
    fast = [
        ff.reference.adapt_task(model, batch["support_x"][t], batch["support_y"][t], **options)
        for t in range(case.tasks)
    ]
    weights = {f"fast {name}": torch.stack([task[name].detach() for task in fast]) for name in fast[0]}
    return Solution({"outputs": outputs.detach()} | dict(zip(inputs, found, strict=True)) | weights)


def predicted_by_kernels(case: Case, learn_lr: str | None) -> Solution:
    model = case.model(torch.float32)
    parameters = flat(model)
    if learn_lr is not None:
        parameters.append(started(case, learn_lr, torch.float32))
    support, query = parts(case)
    adapted = dual.adapt(planned(case, learn_lr), parameters, support)
    samples = dual.query_pass(adapted, query.x)
    outputs = samples.outputs.clone()
    needed = [p is not None for p in parameters]
    dx, gradients = dual.query_backward(adapted, samples, cotangent(outputs), needed, True)
    assert dx is not None
    values = {"outputs": outputs, "outputs d/d query_x": dx}
    if learn_lr is not None:
        values["rates"] = present(gradients.pop())
    values |= {f"outputs d/d {i}": g for i, g in enumerate(gradients) if g is not None}
    names = iter(dict(model.named_parameters()))
    for weight, bias in dual.fast_weights(adapted, slice(0, case.tasks)):
        values[f"fast {next(names)}"] = weight
        if bias is not None:
            values[f"fast {next(names)}"] = bias
    return Solution(values)


def cotangent(outputs: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(outputs.shape, generator=generator, dtype=torch.float64).to(outputs.dtype)


def present(value: Tensor | None) -> Tensor:
    assert value is not None
    return value


@pytest.mark.parametrize("rule", [{"outer": "reptile"}, {"step_weights": (0.5, 0.5)}, {"nonfinite": "skip"}], ids=str)
@pytest.mark.parametrize("sizes", [{"tasks": 0}, {"queries": 0}], ids=str)
@ENGINES
def test_no_task_and_no_query(engine: str, rule: dict[str, Any], sizes: dict[str, Any]) -> None:
    case = replace(Case(**rule), **sizes)
    with ff.override(engine=engine):
        found, _ = outcome(replace(case, reduction="sum"))
    if case.queries == 0 and case.outer != "reptile":
        assert found.value.isnan() if case.nonfinite == "propagate" else not found.kept
    elif case.tasks == 0:
        assert found.value == 0
    assert case.outer == "reptile" or not any(g.any() for g in found.gradients if g is not None)


@pytest.mark.parametrize("rule", [{"outer": "reptile"}, {"max_grad_norm": 0.3}, WHOLE], ids=str)
def test_rules_repeat_bit_by_bit(rule: dict[str, Any]) -> None:
    case = Case(widths=(9, 20, 17, 5), loss="cross_entropy", tasks=11, **rule)
    with ff.override(engine="layered"):
        first, second = (by_step(case).values for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@ENGINES
@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        ({"optimizer": "adam"}, "Adam takes"),
        ({"max_grad_value": 0.1}, "max_grad_value takes"),
        ({"each_step": True}, "support samples of each step"),
    ],
    ids=str,
)
def test_what_is_not_taken_is_named(engine: str, rule: dict[str, Any], reason: str) -> None:
    with ff.override(engine=engine), pytest.raises(ValueError, match=f"engine is '{engine}'.*{reason}"):
        planned(Case(**rule))
