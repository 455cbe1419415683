"""What every engine of kernels owes: the oracle's numbers, in every option and precision, and torch's own manners.

`test_resident.py`, `test_dual.py` and `test_primal.py` run it for their engines, interpreted, on Triton's active
driver, or on a GPU (`--kernels`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings

import fomaml_fused as ff

from .cases import (
    ACTIVATIONS,
    LOSSES,
    Case,
    assert_close,
    assert_no_worse_than_twice,
    by_oracle,
    cases,
    relative_error,
    yardsticks,
)
from .on_kernels import allowance, by_kernels, in_precision, kernel_device, on_device

# Elsewhere each case compiles its kernels; then single options go through all of them, the rest through one.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
KERNEL_LOSSES = [name for name in LOSSES if name != "callable"]


@pytest.fixture(autouse=True)
def watched(request: pytest.FixtureRequest) -> Iterator[None]:
    """Interpreted, with the interpreter's faults mended and every access watched; or on the device asked for."""
    where = request.config.getoption("--kernels")
    if where == "interpreted":
        from .interpreter import mend
        from .memory_watch import watch

        mend()
        # Outside of a GPU, numpy tells of every overflow of a diverging task.
        with watch(), numpy.errstate(all="ignore"):
            yield
        return
    if where == "gpu":
        assert kernel_device().type == "cuda", f"--kernels=gpu, but Triton's driver serves {kernel_device()}"
    yield


def check(case: Case, precision: str = "highest", per_task: bool = True) -> None:
    own = (
        yardsticks(case, torch.float32) if precision in ("highest", "ieee", "tf32x3") else in_precision(case, precision)
    )
    actual = by_kernels(case, precision, per_task=per_task)
    assert_no_worse_than_twice(actual, own, by_oracle(case, torch.float64), allowance(case, precision))


def check_tuning(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """That an engine of tiles runs in the fastest layout that `ff.tune` found."""
    from fomaml_fused.kernels import configuration

    from fomaml_fused import tuning

    monkeypatch.setattr(tuning, "TILED", {"features": (16, 32), "stages": (2, 3)})
    monkeypatch.setattr(configuration, "_tuned", {})
    meta = ff.FOMAML(Case(widths=(3, 17, 4)).model(torch.float32), backend="triton")
    with ff.override(engine=engine):
        found = ff.tune(meta, 2, 2, rounds=1)
        assert len(found) == 4
        assert list(found.values()) == sorted(found.values())
        assert meta.plan(2, 2).config == next(iter(found))
    ff.planner.forget_plans()


class KernelContract:
    """Tests of an engine; a subclass is parametrized with the names of its own."""

    @pytest.fixture(autouse=True)
    def planned(self, engine: str) -> Iterator[None]:
        with ff.override(engine=engine):
            yield

    @pytest.mark.parametrize(
        ("activation", "loss"),
        list(zip_longest(ACTIVATIONS, KERNEL_LOSSES, fillvalue="mse")),
        ids=str,
    )
    def test_every_activation_and_loss(self, activation: str, loss: str) -> None:
        check(Case(widths=(3, 17, 5), tasks=2, activation=activation, loss=loss), per_task=False)

    @pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
    def test_every_activation_behind_the_last_layer(self, loss: str) -> None:
        for activation in ("sigmoid", "softplus", "tanh"):
            check(Case(widths=(3, 4), last_activation=activation, loss=loss), per_task=False)

    @pytest.mark.parametrize(
        "options",
        [
            {"momentum": 0.9},
            {"weight_decay": 0.1, "lr": [0.1, 0.2, 0.05]},
            {"momentum": 0.9, "weight_decay": 0.1, "lr": [[0.1], [0.05], [0.2]], "adapt": [0, 2]},
            {"momentum": 0.5, "steps": 1},
            {"bias": False},
            {"bias": False, "momentum": 0.9, "weight_decay": 0.1},
            {"weighted": True, "loss": "cross_entropy"},
            {"weighted": True, "reduction": "sum", "shots": 17, "queries": 20},
            {"outer_loss": "cross_entropy"},
            {"loss": "smooth_cross_entropy", "outer_loss": "huber"},
            {"steps": 0},
            {"adapt": []},
            {"adapt": "head", "weight_decay": 0.1},
            {"adapt": "body", "momentum": 0.9},
            {"tasks": 1, "shots": 1, "queries": 1},
            {"tasks": 9},
            {"shots": 20, "queries": 33},
            {"shots": 17, "queries": 3, "momentum": 0.9, "tasks": 6},
        ],
        ids=str,
    )
    def test_every_option(self, options: dict[str, Any]) -> None:
        # What a task's own loss and outputs add is the same for all, but for what says which tasks and steps there are.
        apart = {"weighted", "adapt", "bias"} & options.keys() or options.get("steps") == 0
        check(replace(Case(widths=(3, 17, 5, 3), steps=3), **options), per_task=bool(apart) and INTERPRETED)

    @pytest.mark.parametrize("widths", [(1, 1), (1, 40, 40, 1), (63, 3), (2, 1, 17, 1), (1, 33, 1), (5, 16, 16, 16, 2)])
    def test_odd_sizes_and_depths(self, widths: tuple[int, ...]) -> None:
        check(Case(widths=widths, tasks=2, shots=7, queries=10, activation="gelu"), per_task=False)

    @pytest.mark.parametrize("precision", ["ieee", "tf32x3", "tf32", "bf16", "fp16"])
    @pytest.mark.parametrize("widths", [(3, 17, 5), (1, 20, 20, 1)])
    def test_every_precision(self, widths: tuple[int, ...], precision: str) -> None:
        check(Case(widths=widths, steps=3, shots=10, activation="relu", momentum=0.5), precision, per_task=False)

    @given(case=cases())
    @settings(max_examples=8)
    def test_random_problems(self, engine: str, case: Case) -> None:
        if engine not in ("resident", "dual") or "callable" not in (case.loss, case.outer_loss):
            check(case, per_task=False)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_sixteen_bit_parameters_are_computed_in_float32(self, dtype: torch.dtype) -> None:
        case = Case(widths=(3, 17, 5), loss="cross_entropy", steps=3)
        actual = by_kernels(case, dtype=dtype)
        model = case.model(dtype).double()
        batch = {n: t.double() if t.is_floating_point() else t for n, t in case.batch(dtype).items()}
        loss = ff.reference.meta_loss(model, **batch, **case.oracle_options())
        exact = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
        assert actual.values["reduced"].dtype == dtype
        assert relative_error(actual.vectors()["reduced d/d parameters"], exact.to(dtype)) < torch.finfo(dtype).eps

    def test_adapted_weights_are_the_oracles(self) -> None:
        case = Case(widths=(1, 17, 5, 3), tasks=5, momentum=0.9, steps=3, bias=True)
        model, batch = case.model(torch.float32).to(kernel_device()), on_device(case)
        adapted = ff.FOMAML(model, **case.options(), backend="triton").adapt(batch["support_x"], batch["support_y"])
        exact_model, exact = case.model(torch.float64), case.batch(torch.float64)
        expected = ff.FOMAML(exact_model, **case.options(), backend="reference").adapt(
            exact["support_x"], exact["support_y"]
        )
        for name, weights in expected.weights().items():
            assert relative_error(adapted.weights()[name], weights) < 1e-6
        task = adapted.task(3)
        assert relative_error(task(batch["query_x"][3]), expected(exact["query_x"])[3]) < 1e-6

    def test_predict_is_the_same_when_tasks_are_adapted_anew_in_chunks(self) -> None:
        case = Case(widths=(3, 17, 5), tasks=5, queries=20)
        whole = by_kernels(case)
        with ff.override(chunk=2, memory_bound=1):
            assert_close(by_kernels(case), whole, 1e-6)

    def test_a_diverged_task_spoils_its_own_loss_and_nothing_else(self) -> None:
        case = Case(tasks=6, activation="relu", steps=5, lr=1.0)
        model, batch = case.model(torch.float32).to(kernel_device()), on_device(case)
        batch["support_y"][2] = 1e30
        losses = ff.FOMAML(model, **case.options(), backend="triton")(**batch, reduction="none")
        assert losses.isfinite().tolist() == [True, True, False, True, True, True]
        loss = ff.FOMAML(model, **case.options(), backend="triton")(**batch)
        assert all(g.isnan().all() for g in torch.autograd.grad(loss, list(model.parameters())))

    def test_sixteen_bits_hold_the_parts_of_many_tasks_and_samples(self) -> None:
        """A sample's part in the mean over tasks and samples is less than fp16 holds, its gradient is not."""
        case = Case(widths=(3, 17, 20), loss="l1", activation="identity", tasks=75, queries=16, shots=2, steps=0)
        small = replace(case, reduction="sum")
        mean, total = (by_kernels(c, "fp16", per_task=False).values for c in (case, small))
        for name in mean:
            assert relative_error(mean[name] * case.tasks, total[name]) < 1e-5

    def test_results_repeat_bit_by_bit(self) -> None:
        case = Case(widths=(9, 20, 17, 5), loss="cross_entropy", tasks=6, steps=2)
        first, second = (by_kernels(case, per_task=False).values for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)

    def test_no_task_and_no_query_follow_torch(self) -> None:
        for case in (Case(tasks=0), Case(queries=0), Case(queries=0, weighted=True)):
            for precision in ("highest", "medium"):
                model, batch = case.model(torch.float32).to(kernel_device()), on_device(case)
                loss = ff.FOMAML(model, **case.options(), backend="triton", precision=precision)(**batch)
                assert loss.isnan()
                assert not any(g.any() for g in torch.autograd.grad(loss, list(model.parameters())))

    def test_inputs_and_parameters_are_left_as_they_were(self) -> None:
        case = Case(widths=(3, 17, 3), weighted=True, momentum=0.9, weight_decay=0.1, steps=3)
        model, batch = case.model(torch.float32).to(kernel_device()), on_device(case)
        before = [t.clone() for t in [*model.parameters(), *batch.values()]]
        ff.FOMAML(model, **case.options(), backend="triton")(**batch).backward()
        assert all(torch.equal(a, b) for a, b in zip(before, [*model.parameters(), *batch.values()], strict=True))

    def test_strided_inputs(self) -> None:
        case = Case(widths=(3, 17, 5))
        model, batch = case.model(torch.float32).to(kernel_device()), on_device(case)
        meta = ff.FOMAML(model, **case.options(), backend="triton")
        strided = {name: t.detach().transpose(0, 1).contiguous().transpose(0, 1) for name, t in batch.items()}
        assert torch.equal(meta(**strided), meta(**batch))
        weight = torch.rand(case.tasks, 2, device=kernel_device())
        for strange in (weight[:, 0], torch.tensor(2.0, device=kernel_device()).expand(case.tasks)):
            sums = [meta(**batch, task_weight=w, reduction="sum") for w in (strange, strange.clone())]
            assert torch.equal(*sums)
