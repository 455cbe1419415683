"""Packs of unequal tasks: how they are filled and laid out, when the planner takes them, and what they give."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fomaml_fused as ff
from fomaml_fused.batch import Support
from fomaml_fused.packs import NOBODY, Packs, fill
from fomaml_fused.ragged import PlannedGroups, TaskCounts, plan_groups, plan_packs

from .cases import Case, assert_no_worse_than_twice, by_oracle, relative_error, yardsticks
from .kernel_contract import INTERPRETED, watched
from .on_kernels import by_kernels, in_precision, kernel_device, on_device

pytest.importorskip("triton")

from fomaml_fused.kernels.configuration import DualConfig

pytestmark = pytest.mark.kernels

__all__ = ["watched"]
ENGINES = pytest.mark.parametrize("engine", ["dual", "layered"])
COUNTS: dict[str, Any] = {"support_counts": (6, 2, 3, 1, 1, 4, 5), "query_counts": (1, 7, 2, 3, 4, 5, 3)}
CASE = Case(widths=(9, 20, 5, 3), activation="gelu", tasks=7, shots=6, queries=7, steps=3, **COUNTS)


def planned(case: Case, engine: str | None = None, *, packs: bool | None = None) -> PlannedGroups:
    """The parts that a case is planned in, on the device where kernels run."""
    meta = case.meta(case.model(torch.float32).to(kernel_device()), "triton")
    sizes = meta.plan(case.tasks, case.shots, case.queries).sizes
    every = (case.steps,) * case.tasks
    counts = TaskCounts(
        case.support_counts or (case.shots,) * case.tasks,
        case.query_counts or (case.queries,) * case.tasks,
        case.step_counts or every,
    )
    with ff.override(engine=engine, packs=packs):
        groups = plan_groups(meta.problem, sizes, counts, "triton", "highest")
        return plan_packs(groups, meta.problem, sizes, counts, "triton", "highest")


def check(case: Case, engine: str, precision: str = "highest") -> None:
    parts = planned(case, engine, packs=True)
    assert all(isinstance(packs, Packs) and plan.engine == engine for packs, plan in parts)
    own = yardsticks(case, torch.float32) if precision == "highest" else in_precision(case, precision)
    with ff.override(engine=engine, packs=True):
        found = by_kernels(case, precision, per_task=False)
    assert_no_worse_than_twice(found, own, by_oracle(case, torch.float64))


@ENGINES
@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 0.9, "weight_decay": 0.1, "weighted": True, "loss": "cross_entropy"},
        {},
        {"momentum": 0.9, "nesterov": True, "weighted": True, "reduction": "sum"},
        {"weight_decay": 0.1, "decoupled_weight_decay": True, "bias": False},
        {"step_weights": (0.2, 0.0, 0.5), "weighted": True},
        {"step_counts": (3, 1, 3, 2, 3, 3, 1), "step_weights": (0.2, 0.1, 0.5)},
        {"adapt": [1, 2], "activation": "relu"},
        {"support_counts": None},
        {"query_counts": None, "lr": [0.1, 0.2, 0.05]},
        {"queries": 40, "query_counts": (1, 40, 2, 3, 4, 5, 3)},
        {"widths": (9, 70, 5), "adapt": [1], "loss": "bce_with_logits"},
    ],
    ids=str,
)
def test_unequal_tasks_share_packs(engine: str, options: dict[str, Any]) -> None:
    if not INTERPRETED and "reduction" not in options:
        pytest.skip("one of them is compiled")
    check(replace(CASE, **options), engine)


@pytest.mark.skipif(not INTERPRETED, reason="compiles hundreds of kernels")
@ENGINES
@pytest.mark.parametrize("precision", ["tf32", "bf16", "fp16"])
def test_every_precision(engine: str, precision: str) -> None:
    check(replace(CASE, activation="relu", weighted=True), engine, precision)


@pytest.mark.skipif(not INTERPRETED, reason="compiles hundreds of kernels")
@ENGINES
@given(data=st.data())
@settings(max_examples=8)
def test_random_counts(engine: str, data: st.DataObject) -> None:
    tasks = data.draw(st.integers(1, 9))
    shots, queries = (tuple(data.draw(st.lists(st.integers(1, 8), min_size=tasks, max_size=tasks))) for _ in range(2))
    case = replace(
        CASE,
        widths=tuple(data.draw(st.lists(st.sampled_from([1, 3, 17]), min_size=2, max_size=4))),
        tasks=tasks,
        shots=max(shots),
        queries=max(queries),
        steps=data.draw(st.integers(1, 3)),
        support_counts=shots,
        query_counts=queries,
        weighted=data.draw(st.booleans()),
        loss=data.draw(st.sampled_from(["mse", "smooth_cross_entropy", "huber"])),
        momentum=data.draw(st.sampled_from([0.0, 0.9])),
    )
    check(case, engine)


@pytest.mark.skipif(not INTERPRETED, reason="the arithmetic is that of other tests")
@ENGINES
def test_a_diverged_task_spoils_no_other_of_its_pack(engine: str) -> None:
    case = replace(CASE, activation="relu", steps=4, lr=1.0, shots=3, support_counts=(2, 1, 3, 1, 1, 2, 3))
    model, batch = case.model(torch.float32).to(kernel_device()), on_device(case)
    meta = ff.FOMAML(model, **case.options(), backend="triton")
    found = []
    for target in (1.0, 1e30):
        batch["support_y"][1] = target
        batch["query_x"].requires_grad_()
        with ff.override(engine=engine, packs=True):
            found += torch.autograd.grad(meta(**batch), batch["query_x"])
    sound, spoilt = found
    assert [bool(dx.isfinite().all()) for dx in spoilt] == [task != 1 for task in range(case.tasks)]
    others = [0, 2, 3, 4, 5, 6]
    assert relative_error(spoilt[others], sound[others]) < 1e-6
    assert spoilt[1].isnan().any()


@pytest.mark.skipif(not INTERPRETED, reason="the arithmetic is that of other tests")
def test_chunks_of_packs_add_up() -> None:
    case = replace(CASE, tasks=21, support_counts=COUNTS["support_counts"] * 3, query_counts=COUNTS["query_counts"] * 3)
    with ff.override(chunk=2):
        assert [plan.chunk for _, plan in planned(case, "dual", packs=True)] == [2]
        check(case, "dual")


@pytest.mark.skipif(not INTERPRETED, reason="the arithmetic is that of other tests")
@ENGINES
def test_programs_may_take_several_packs(engine: str) -> None:
    with ff.override(config=DualConfig(4, 16, tasks=2)):
        check(CASE, engine)


@ENGINES
def test_results_repeat_bit_by_bit(engine: str) -> None:
    if not INTERPRETED and engine == "layered":
        pytest.skip("the parts are those of the other engine")
    model, batch = CASE.model(torch.float32).to(kernel_device()), on_device(CASE)
    meta = ff.FOMAML(model, **CASE.options(), backend="triton")
    runs = []
    for _ in range(2):
        with ff.override(engine=engine, packs=True):
            runs.append(torch.autograd.grad(meta(**batch), list(model.parameters())))
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"max_grad_norm": 1.0}, "norms of gradients"),
        ({"learn_lr": "layer"}, "gradients of rates"),
        ({"nonfinite": "skip"}, "left out by itself"),
        ({"loss": "callable"}, "loss is a callable"),
        ({"steps": 0}, "without a step"),
        ({"query_counts": (1, 7, 0, 3, 4, 5, 3)}, "without a query"),
        ({"support_counts": None, "shots": 65}, "where layers fold each task has its own"),
        ({"optimizer": "adam", "lr": 0.01}, "gradient element by element"),
    ],
    ids=str,
)
def test_what_packs_do_not_take(options: dict[str, Any], why: str) -> None:
    """Told to take them, the planner says why it cannot; left to itself, it takes groups."""
    case = replace(CASE, **options)
    with pytest.raises(ValueError, match=f"packs is True, and tasks of {case.steps} steps cannot share any: .*{why}"):
        planned(case, packs=True)
    assert not any(isinstance(group, Packs) for group, _ in planned(case))


def test_the_planner_packs_what_would_be_padded() -> None:
    shots = tuple(1 + t % 5 for t in range(3000))
    many = Case(widths=(64, 128, 64, 10), tasks=3000, shots=5, queries=5, steps=3, support_counts=shots)
    ((packs, plan),) = planned(many)
    assert isinstance(packs, Packs)
    assert plan.engine in ("dual", "layered")
    assert plan.reason.startswith(f"3000 tasks in {packs.count} packs; ")
    assert packs.count <= 1.2 * sum(shots) / packs.shots
    groups = planned(many, packs=False)
    assert not any(isinstance(group, Packs) for group, _ in groups)
    assert plan.estimate.seconds < sum(plan.estimate.seconds for _, plan in groups)


def test_packs_are_for_kernels() -> None:
    meta = ff.FOMAML(CASE.model(torch.float32), **CASE.options(), backend="torch")
    batch = CASE.batch(torch.float32)
    with ff.override(packs=True), pytest.raises(ValueError, match="packs are for kernels, and torch runs this"):
        meta(**batch)


@given(
    counts=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=40),
    more=st.integers(0, 20),
)
def test_packs_hold_every_task_once_and_no_more_than_they_may(counts: list[tuple[int, int]], more: int) -> None:
    shots, queries = [s for s, _ in counts], [q for _, q in counts]
    rows, most = max(shots) + more, max(queries) + more // 2
    tasks, packs = fill(range(len(counts)), shots, queries, rows, most)
    assert sorted(tasks) == list(range(len(counts)))
    assert list(packs) == sorted(packs)
    assert set(packs) == set(range(packs[-1] + 1))
    for pack in set(packs):
        own = [t for t, p in zip(tasks, packs, strict=True) if p == pack]
        assert sum(shots[t] for t in own) <= rows
        assert sum(queries[t] for t in own) <= most


def test_rows_are_the_samples_of_their_owner_and_weights_add_up_to_1() -> None:
    shots = (2, 1, 3, 2)
    tasks, places = fill(range(4), shots, shots, 4, 9)
    packs = Packs(tasks, places, 4, 9, 1)
    x = torch.arange(12.0).view(4, 3, 1) + 1
    found = packs.support(Support(x, x[..., 0].long(), torch.rand(4, 3)), shots)
    assert found.owner is not None
    assert found.weight is not None
    assert packs.tasks == (2, 1, 3, 0)
    assert found.owner.tolist() == [[2, 2, 2, 1], [3, 3, 0, 0]]
    assert found.x[..., 0].tolist() == [[7, 8, 9, 4], [10, 11, 1, 2]]
    assert found.y.tolist() == [[7, 8, 9, 4], [10, 11, 1, 2]]
    for task in range(4):
        assert float(found.weight[found.owner == task].sum()) == pytest.approx(1.0)
    fewer = Packs((0, 1), (0, 1), 3, 3, 1).support(Support(x, x), shots)
    assert fewer.owner is not None
    assert fewer.weight is not None
    assert fewer.owner.tolist() == [[0, 0, NOBODY], [1, NOBODY, NOBODY]]
    assert fewer.x[..., 0].tolist() == [[1, 2, 0], [4, 0, 0]]
    assert fewer.weight.tolist() == [[0.5, 0.5, 0], [1, 0, 0]]


@pytest.mark.skipif(not INTERPRETED, reason="the arithmetic is that of other tests")
def test_sixteen_bit_parameters_are_computed_in_float32() -> None:
    """A third is no number of 16 bits: what samples count is in float32, and so is all that is made of it."""
    case = replace(CASE, weighted=True)
    model, batch = case.model(torch.bfloat16), on_device(case)
    exact = ff.FOMAML(case.model(torch.bfloat16).float(), **case.options(), backend="reference")
    meta = ff.FOMAML(model.to(kernel_device()), **case.options(), backend="triton")
    rounded = {name: v.bfloat16() if isinstance(v, torch.Tensor) else v for name, v in batch.items()}
    whole = {name: v.float().cpu() if isinstance(v, torch.Tensor) else v for name, v in rounded.items()}
    with ff.override(engine="dual", packs=True):
        found = torch.autograd.grad(meta(**rounded), list(meta.model.parameters()))
    expected = torch.autograd.grad(exact(**whole), list(exact.model.parameters()))
    for actual, value in zip(found, expected, strict=True):
        assert relative_error(actual, value) < 2.0**-8
