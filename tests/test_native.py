"""The native engine against the oracle, for several instruction sets; and what it leaves to others."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import cycle, product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fomaml_fused as ff
from fomaml_fused.calls import Given
from fomaml_fused.engines import Outcome, native, native_library
from fomaml_fused.plans import Plan

from .cases import ACTIVATIONS, LOSSES, Case, Solution, assert_no_worse_than_twice, by_oracle, cases, yardsticks

FORMS = {"primal": ("primal",) * 3, "dual": ("dual",) * 3, "mixed": ("dual", "primal", "dual")}
TAKEN = sorted(set(LOSSES) - {"callable"})


def by_native(case: Case, forms: Sequence[str] | None = None, rows: int | None = None) -> Solution:
    meta = case.meta(case.model(torch.float32), "auto")
    with ff.override(engine="native", forms=forms, rows=rows):
        assert meta.plan(case.tasks, case.shots, case.queries).engine == "native"
        return Solution.of(meta, case, meta, torch.float32, per_task=False)


def check(case: Case, forms: Sequence[str] | None = None, rows: int | None = None) -> None:
    exact = by_oracle(case, torch.float64)
    assert_no_worse_than_twice(by_native(case, forms, rows), yardsticks(case, torch.float32), exact)


@pytest.mark.parametrize(
    ("loss", "activation", "forms"),
    # All forms have the same code for them, so each pair is with one, in turn.
    [(*pair, form) for pair, form in zip(product(TAKEN, ACTIVATIONS), cycle(FORMS), strict=False)],
)
@pytest.mark.sampled(3)
def test_every_loss_and_activation(loss: str, activation: str, forms: str) -> None:
    check(Case(widths=(3, 17, 5, 3), activation=activation, loss=loss, steps=3), FORMS[forms])


@pytest.mark.parametrize("forms", FORMS)
@pytest.mark.parametrize(
    "options",
    [
        {"lr": [0.1, 0.2, 0.05]},
        {"lr": [[0.1], [0.05], [0.2], [0.0]], "steps": 4},
        {"bias": False},
        {"weighted": True},
        {"weighted": True, "reduction": "sum", "loss": "cross_entropy"},
        {"outer_loss": "cross_entropy"},
        {"loss": "cross_entropy", "outer_loss": "huber"},
        {"steps": 0},
        {"adapt": []},
        {"adapt": "head"},
        {"adapt": "body"},
        {"adapt": [1]},
        {"adapt": [0, 2]},
        {"tasks": 1, "shots": 1, "queries": 1},
        {"tasks": 23, "shots": 3, "queries": 20},
        {"shots": 17, "queries": 40, "steps": 5},
        {"last_activation": "sigmoid"},
        {"support_counts": (5, 2, 5), "query_counts": (4, 4, 1), "step_counts": (3, 1, 3)},
    ],
    ids=str,
)
@pytest.mark.sampled(4)
def test_every_option(options: dict[str, Any], forms: str) -> None:
    check(replace(Case(widths=(3, 17, 5, 3), steps=3), **options), FORMS[forms])


def test_parts_of_layers() -> None:
    case = Case(widths=(3, 17, 5, 3), steps=3, adapt=("0.weight", "2.bias", "4.weight"))
    for forms in (("primal",) * 3, ("dual", "primal", "dual"), None):
        check(case, forms)


@pytest.mark.parametrize("size", [1, 3, 16, 17, 40, 64, 65, 130])
@pytest.mark.parametrize("form", ["primal", "dual"])
@pytest.mark.sampled(4)
def test_odd_sizes_and_depths(size: int, form: str) -> None:
    for widths in [(size, 3), (3, size, 2), (2, size, size, 3), (1, size, 2, size, 1)]:
        case = Case(widths=widths, tasks=2, shots=size % 19 + 1, queries=size % 7 + 1, activation="gelu")
        check(case, (form,) * (len(widths) - 1))


def taken(case: Case, data: st.DataObject) -> Case:
    """A random problem without what the engine does not take."""
    loss, outer_loss = (data.draw(st.sampled_from(TAKEN)) for _ in range(2))
    return replace(case, momentum=0.0, weight_decay=0.0, loss=loss, outer_loss=outer_loss)


@given(case=cases(), data=st.data())
def test_random_problems(case: Case, data: st.DataObject) -> None:
    forms = [data.draw(st.sampled_from(["primal", "dual"])) for _ in case.widths[1:]]
    check(taken(case, data), forms)


@given(case=cases(), rows=st.integers(1, 20), data=st.data())
def test_random_problems_in_blocks_of_samples(case: Case, rows: int, data: st.DataObject) -> None:
    check(taken(case, data), ["primal"] * (len(case.widths) - 1), rows)


def planned(case: Case, forms: Sequence[str] | None = None) -> tuple[Plan, Callable[[Plan], Outcome]]:
    """A plan of a case, and its meta-step by such a plan."""
    meta = case.meta(case.model(torch.float32), "auto")
    call = meta._call()
    batch = call.check(Given(**{name: t.detach() for name, t in case.batch(torch.float32).items()}))
    with ff.override(engine="native", forms=forms):
        plan = call.plan(batch.support, batch.queries)
    needed = (True, *(p is not None for p in call.flat))

    def step(plan: Plan) -> Outcome:
        with torch.no_grad():
            return native.step(plan, needed, call.flat, batch.support, batch.query, 0.5)

    return plan, step


def numbers(outcome: Outcome) -> list[Tensor]:
    assert outcome.dx is not None
    return [outcome.value, outcome.dx, *(g for g in outcome.gradients if g is not None)]


@pytest.mark.parametrize("threads", [1, 2, 3, 9])
@pytest.mark.parametrize("block", [1, 2, 5, 7])
@pytest.mark.parametrize("forms", FORMS)
def test_blocks_and_threads_change_nothing_but_rounding(forms: str, block: int, threads: int) -> None:
    case = Case(widths=(3, 17, 5, 3), tasks=7, shots=5, queries=9, steps=3, activation="silu")
    plan, step = planned(case, FORMS[forms])
    expected = numbers(step(replace(plan, block=7)))
    torch.set_num_threads(threads)
    for actual, value in zip(numbers(step(replace(plan, block=block))), expected, strict=True):
        torch.testing.assert_close(actual, value, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("widths", [(3, 17, 5, 3), (70, 130, 3), (64, 65, 128, 2)], ids=str)
def test_the_gradient_of_all_tasks_at_once_is_the_same_whoever_takes_which(
    widths: tuple[int, ...], threads: int
) -> None:
    case = Case(widths=widths, tasks=13, shots=2, queries=15, steps=2, activation="tanh")
    plan, step = planned(case)
    together = replace(plan, gathers=True, block=13)
    expected = numbers(step(together))
    for actual, value in zip(numbers(step(replace(together, gathers=False))), expected, strict=True):
        torch.testing.assert_close(actual, value, rtol=2e-5, atol=2e-6)
    torch.set_num_threads(threads)
    for block in (1, 2, 5):
        assert all(map(torch.equal, numbers(step(replace(together, block=block))), expected))


def test_gradients_are_taken_at_once_where_sums_of_them_are_larger_than_what_they_are_taken_of() -> None:
    large = Case(widths=(784, 256, 128, 64, 64, 5), tasks=32, shots=5, queries=5)
    assert planned(large)[0].gathers
    assert not planned(replace(large, queries=40, tasks=128))[0].gathers
    assert not planned(replace(large, widths=(3, 17, 5, 3)))[0].gathers
    check(replace(large, tasks=9))


@pytest.mark.parametrize("forms", FORMS)
def test_results_repeat_bit_by_bit(forms: str) -> None:
    torch.set_num_threads(3)
    plan, step = planned(Case(widths=(9, 33, 17, 5), loss="cross_entropy", tasks=40, steps=4), FORMS[forms])
    first, second = numbers(step(plan)), numbers(step(plan))
    assert all(map(torch.equal, first, second))


def test_inputs_are_left_as_they_were_and_may_be_strided() -> None:
    case = Case(widths=(3, 17, 3), shots=4, queries=4, steps=3)
    model, batch = case.model(torch.float32), case.batch(torch.float32)
    with torch.no_grad():
        next(model.parameters()).data = next(model.parameters()).t().contiguous().t()
    meta = ff.FOMAML(model, **case.options())
    strided = {name: t.detach().transpose(0, 1).contiguous().transpose(0, 1) for name, t in batch.items()}
    strided["support_x"] = strided["support_x"][:, :1].expand(-1, 4, -1)  # zero stride
    dense = {name: t.contiguous() for name, t in strided.items()}
    before = [t.clone() for t in [*model.parameters(), *strided.values()]]
    with ff.override(engine="native"):
        gradients = [torch.autograd.grad(meta(**b), list(model.parameters())) for b in (strided, dense)]
    assert all(map(torch.equal, *gradients))
    assert all(map(torch.equal, before, [*model.parameters(), *strided.values()]))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_compiled_module_takes_it_for_meta_steps_alone(reduction: str) -> None:
    case = Case(widths=(3, 17, 3), steps=2)
    meta, batch = case.meta(case.model(torch.float32), "auto", compile=True), case.batch(torch.float32)
    plan = meta.plan(case.tasks, case.shots, case.queries)
    assert plan.engine == "native"
    assert "compiled C++" in plan.explain()
    losses = meta(**batch, reduction="none")
    torch.testing.assert_close(meta(**batch, reduction=reduction), getattr(losses, reduction)())
    support = batch["support_x"], batch["support_y"]
    with ff.override(engine="native"):
        outputs = meta.predict(*support, batch["query_x"])
        torch.testing.assert_close(meta.adapt(*support)(batch["query_x"]), outputs)
        torch.testing.assert_close(meta(**batch, reduction="none"), losses)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"optimizer": "adam"}, "optimizer 'adam'"),
        ({"momentum": 0.9}, "momentum"),
        ({"weight_decay": 0.1}, "weight_decay"),
        ({"max_grad_norm": 1.0}, "max_grad_norm"),
        ({"max_grad_value": 1.0}, "max_grad_value"),
        ({"learn_lr": "layer"}, "learn_lr"),
        ({"outer": "reptile"}, "outer 'reptile'"),
        ({"step_weights": (0.5, 0.5)}, "step_weights"),
        ({"nonfinite": "skip"}, "nonfinite 'skip'"),
        ({"norm": "layer"}, "a normalisation"),
        ({"loss": "callable"}, "a callable loss"),
        ({"queries": 0}, "a set without samples"),
        ({"widths": (2,) * 66}, "more than 64 layers"),
    ],
)
def test_what_it_does_not_take_runs_as_torch_ops_and_the_plan_says_why(options: dict[str, Any], reason: str) -> None:
    case = replace(Case(), **options)
    meta = case.meta(case.model(torch.float32), "auto", compile=True)
    sizes = case.tasks, case.shots, case.queries
    plan = meta.plan(*sizes)
    assert plan.engine == "batched"
    assert reason in str(dict(plan.others)["native"])
    with (
        ff.override(engine="native"),
        pytest.raises(ValueError, match="engine is 'native', which cannot run: .*" + reason),
    ):
        meta.plan(*sizes)


def test_what_else_it_does_not_take() -> None:
    case = Case()
    meta = case.meta(case.model(torch.float32), "auto", compile=True)
    assert "float32" in str(dict(meta.plan(3, 5, dtype=torch.float64).others)["native"])
    for told, reason in (
        ({"forms": ("dual:1", "primal")}, "forms that fold"),
        ({"forms": ("dual", "primal"), "rows": 4}, "rows is 4"),
        ({"chunk": 2}, "chunk is 2"),
        ({"memory_bound": 1000}, "over the bound of 1000"),
    ):
        with ff.override(engine="native", **told), pytest.raises(ValueError, match=reason):
            meta.plan(3, 5)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="instruction sets of x86")
@pytest.mark.parametrize("flags", [("-mno-avx512f",), ("-mno-avx",)], ids=str)
@pytest.mark.compiles
def test_narrower_registers(flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native_library, "FLAGS", (*native_library.FLAGS, *flags))
    monkeypatch.setenv(native_library.CACHE, str(tmp_path))
    narrow = native_library.library.__wrapped__()
    monkeypatch.setattr(native, "library", lambda: narrow)
    native._prepared.cache_clear()  # scratch has another size
    for forms in FORMS.values():
        for activation in ("gelu", "sine", "softplus"):
            case = Case(widths=(3, 70, 5, 3), loss="cross_entropy", activation=activation, steps=2, shots=7)
            check(case, forms)
    native._prepared.cache_clear()


@pytest.mark.compiles
def test_what_is_compiled_is_kept_and_nothing_beside_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(native_library.CACHE, str(tmp_path))
    native_library.library.__wrapped__()
    (kept,) = tmp_path.iterdir()
    written = kept.stat().st_mtime_ns
    native_library.library.__wrapped__()
    assert kept.stat().st_mtime_ns == written


def test_without_a_compiler_the_plan_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(native_library.CACHE, str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"no C\+\+ compiler"):
        native_library.library.__wrapped__()
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(OSError, match="no-such-compiler"):
        native_library.library.__wrapped__()


@pytest.mark.compiles
def test_a_compiler_that_fails_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(native_library.CACHE, str(tmp_path))
    monkeypatch.setattr(native_library, "FLAGS", (*native_library.FLAGS, "-DLANES=0"))
    with pytest.raises(RuntimeError, match="error"):
        native_library.library.__wrapped__()
    assert not list(tmp_path.iterdir())
