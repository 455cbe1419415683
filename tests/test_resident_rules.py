"""The rules of inner and outer loops in the resident kernel, against the oracle; run where its other tests are."""

from __future__ import annotations

from collections.abc import Iterator
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

from .cases import Case, flat, relative_error
from .kernel_contract import INTERPRETED, check, watched
from .on_kernels import by_kernels, kernel_device, on_device
from .with_rules import check_adapted_tasks

pytest.importorskip("triton")

from fomaml_fused.engines import Outcome, resident

pytestmark = pytest.mark.kernels

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
    "learned rate": {"learn_lr": "global", "momentum": 0.9},
    "learned rates of layers": {"learn_lr": "layer"},
}
BASE = Case(widths=(3, 17, 5), tasks=5, shots=7, queries=6, steps=3)


@pytest.fixture(autouse=True)
def planned() -> Iterator[None]:
    with ff.override(engine="resident"):
        yield


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"shots": 20, "queries": 33},
        {"weighted": True, "loss": "cross_entropy", "widths": (4, 17, 3, 5), "activation": "gelu"},
        {"weighted": True, "reduction": "sum", "shots": 18, "adapt": [1], "lr": [[0.1], [0.3], [0.05]]},
        {"bias": False, "widths": (1, 33, 1), "adapt": "head", "queries": 17, "steps": 1},
        {"widths": (2, 1, 17, 1), "adapt": [0, 2], "tasks": 9, "activation": "softplus", "last_activation": "sigmoid"},
    ],
    ids=lambda options: " ".join(options),
)
def test_every_rule(rule: str, options: dict[str, Any]) -> None:
    case = replace(BASE, **options | RULES[rule])
    if case.learn_lr is not None:  # the same rate for all steps
        case = replace(case, lr=BASE.lr)
    if case.step_weights is not None:
        case = replace(case, step_weights=case.step_weights[-case.steps :])
    check(case, per_task=False)


@pytest.mark.parametrize("rule", ["Reptile", "samples of each step", "skipping"])
def test_rules_without_a_step(rule: str) -> None:
    check(replace(BASE, steps=0, **RULES[rule]), per_task=False)


@pytest.mark.parametrize("rule", ["clipped norm", "Adam", "multi-step"])
def test_rules_where_nothing_moves(rule: str) -> None:
    check(replace(BASE, adapt=[], **RULES[rule]), per_task=False)


APART = [{"Reptile", rule} for rule in ("multi-step", "learned rate", "learned rates of layers")]
APART += [{"Adam", "learned rate"}, {"AdamW", "learned rate"}]  # which has momentum
PAIRS = [pair for pair in combinations(RULES, 2) if not set(RULES[pair[0]]) & set(RULES[pair[1]])]
PAIRS = [pair for pair in PAIRS if set(pair) not in APART]
DRAWN = dict.fromkeys([("multi-step", "learned rate"), *Random(0).sample(PAIRS, 20 if INTERPRETED else 8)])


@pytest.mark.parametrize("pair", DRAWN, ids=" and ".join)
def test_pairs_of_rules(pair: tuple[str, str]) -> None:
    shots = 20 if len(pair[0]) % 2 else 7
    check(replace(BASE, tasks=2, widths=(3, 5), shots=shots, **RULES[pair[0]] | RULES[pair[1]]), per_task=False)


@pytest.mark.parametrize("precision", ["tf32", "fp16"])
@pytest.mark.parametrize("rule", ["Reptile", "multi-step", "clipped twice with momentum", "learned rate"])
def test_every_precision(rule: str, precision: str) -> None:
    check(replace(BASE, **RULES[rule], activation="relu", shots=10), precision, per_task=False)


@pytest.mark.parametrize("rule", RULES)
def test_adapted_tasks(rule: str) -> None:
    check_adapted_tasks(replace(BASE, **RULES[rule], shots=20 if len(rule) % 2 else 7, queries=20, weighted=True))


def stepped(case: Case, model: nn.Module, batch: dict[str, Tensor], needed: bool = True) -> Outcome:
    """The engine's meta-step of tasks that count as much as they weigh."""
    queries = 0 if case.outer == "reptile" else case.queries
    sizes = Sizes(case.tasks, case.shots, queries, torch.float32, kernel_device(), case.each_step)
    plan = make_plan(ff.FOMAML(model, **case.options()).problem, sizes, "triton")
    support = Support(batch["support_x"], batch["support_y"], batch["support_weight"])
    query = None
    if case.outer != "reptile":
        query = Query(batch["query_x"], batch["query_y"], batch["query_weight"], None, case.step_weights)
    rates = torch.full((1, len(case.widths) - 1), 0.1, device=kernel_device())
    parameters = [*flat(model), *([rates] if case.learn_lr else [])]
    wanted = [needed and query is not None, *[needed and p is not None for p in parameters]]
    return resident.step(plan, wanted, parameters, support, query, batch["task_weight"])


@pytest.mark.parametrize("rule", ["skipping", "Reptile", "multi-step", "learned rate"])
@pytest.mark.parametrize("samples", [7, 20])
@pytest.mark.parametrize("needed", [True, False], ids=["gradients", "value"])
def test_tasks_that_diverge_are_left_out(rule: str, samples: int, needed: bool) -> None:
    options = RULES[rule] | {"nonfinite": "skip", "weighted": True, "reduction": "sum"}
    case = replace(BASE, shots=samples, queries=samples, activation="relu", **options)
    model, batch = case.model(torch.float32).to(kernel_device()), on_device(case)
    others = torch.tensor([0, 2, 4], device=kernel_device())
    fewer = {name: values[others] for name, values in batch.items()}
    batch["support_y"][1, 0] = torch.nan
    batch["support_x"][3] = 1e30
    found, own = stepped(case, model, batch, needed), stepped(replace(case, tasks=3), model, fewer, needed)
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
    case = replace(BASE, widths=(3, 4, 2), steps=0, loss="l1", activation="identity", nonfinite="skip", weighted=True)
    model, batch = case.model(torch.float32).to(kernel_device()), on_device(case)
    last = model[2]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        last.get_parameter("weight").fill_(1e30)
    batch["query_x"][1] = 1e10
    outcome = stepped(case, model, batch)
    assert outcome.kept == batch["task_weight"][[0, 2, 3, 4]].sum()
    assert outcome.value.isfinite()
    assert all(g.isfinite().all() for g in outcome.gradients if g is not None)


def test_the_outputs_of_a_multi_step_loss_are_those_after_the_last_step() -> None:
    outputs = []
    for weights in ((1.0, 1.0, 0.0), None):
        case = replace(BASE, step_weights=weights, queries=20)
        model, batch = case.model(torch.float32).to(kernel_device()), on_device(case)
        plan = ff.FOMAML(model, **case.options(), backend="triton").plan(case.tasks, case.shots, case.queries)
        support = Support(batch["support_x"], batch["support_y"])
        query = Query(batch["query_x"], batch["query_y"], step_weights=weights)
        outputs.append(torch.empty(case.tasks, case.queries, 5, device=kernel_device()))
        resident.step(plan, [False] * 9, flat(model), support, query, 1.0, outputs[-1])
    assert relative_error(*outputs) < 1e-6


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"learn_lr": "layer_step", "steps": 2}, "rates of each step take what each has multiplied"),
        ({"learn_lr": "element"}, "rates of elements are not in the kernel"),
        ({"optimizer": "adam", "eps": 0.0}, "eps is 0, and the padding of tiles would be 0 / 0"),
        ({"optimizer": "adam", "precision": "tf32x3"}, r"about \d+ registers a thread"),
    ],
)
def test_what_the_kernel_does_not_take_is_named(options: dict[str, Any], reason: str) -> None:
    model = nn.Sequential(nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 3)).to(kernel_device())
    with pytest.raises(ValueError, match=f"engine is 'resident', which cannot run: .*{reason}"):
        ff.FOMAML(model, backend="triton", **options).plan(5, 5)


def test_a_layout_is_tuned_for_the_rules_it_was_tuned_with(monkeypatch: pytest.MonkeyPatch) -> None:
    from fomaml_fused.kernels import configuration

    from fomaml_fused.engines import launching
    from fomaml_fused.kernel_plans import tuned_for

    monkeypatch.setattr(configuration, "_tuned", {})
    model, tuned = nn.Sequential(nn.Linear(3, 4)).to(kernel_device()), configuration.Config(8, 32)
    plain = ff.FOMAML(model, backend="triton")
    found = plain.plan(5, 5)
    device = launching.device_name(kernel_device())
    configuration.remember(device, "resident", tuned_for(found.problem, found.sizes, found.precision), tuned)
    ff.planner.forget_plans()
    assert plain.plan(5, 5).config == tuned
    assert ff.FOMAML(model, backend="triton", optimizer="adam").plan(5, 5).config != tuned
    ff.planner.forget_plans()


@pytest.mark.parametrize("rule", ["multi-step", "clipped norm", "Reptile"])
def test_results_repeat_bit_by_bit(rule: str) -> None:
    case = replace(BASE, tasks=6, queries=20, **RULES[rule])
    first, second = (by_kernels(case, per_task=False).values for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
