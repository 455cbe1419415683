"""The resident kernel against the oracle: interpreted, on Triton's active driver, or on a GPU (`--kernels`)."""

from __future__ import annotations

import pytest
import torch

import fomaml_fused as ff

from .cases import Case, assert_close, flat, relative_error
from .kernel_contract import KernelContract, watched
from .on_kernels import by_kernels, kernel_device, on_device

pytest.importorskip("triton")

pytestmark = pytest.mark.kernels

__all__ = ["watched"]


@pytest.mark.parametrize("engine", ["resident"])
class TestResident(KernelContract):
    pass


def test_the_query_outputs_come_with_the_meta_step() -> None:
    from fomaml_fused.batch import Query, Support
    from fomaml_fused.engines import resident

    case = Case(widths=(3, 17, 5), queries=20, tasks=5)
    model, batch = case.model(torch.float32).to(kernel_device()), on_device(case)
    meta = ff.FOMAML(model, **case.options(), backend="triton")
    outputs = torch.empty(case.tasks, case.queries, 5, device=kernel_device())
    support, query = Support(batch["support_x"], batch["support_y"]), Query(batch["query_x"], batch["query_y"])
    plan = meta.plan(case.tasks, case.shots, case.queries)
    _, dx, gradients, _ = resident.step(plan, [False] * 9, flat(model), support, query, 1.0, outputs)
    assert dx is None
    assert gradients == [None] * 8
    own = ff.FOMAML(case.model(torch.float64), **case.options()).predict(
        *(case.batch(torch.float64)[name] for name in ("support_x", "support_y", "query_x"))
    )
    assert relative_error(outputs, own) < 1e-6


def test_samples_of_a_tile_change_nothing_but_rounding() -> None:
    from fomaml_fused.kernels.configuration import Config

    case = Case(widths=(3, 17, 5), shots=30, queries=20, steps=2)
    with ff.override(config=Config(warps=4, samples=32)):
        one = by_kernels(case)
    assert_close(by_kernels(case), one, 1e-6)


def test_a_class_that_does_not_exist_makes_its_tasks_loss_nan() -> None:
    """Where reading the classes to raise an error would wait for the device."""
    from fomaml_fused.batch import Query, Support
    from fomaml_fused.engines import resident

    case = Case(loss="cross_entropy", tasks=2)
    model, batch = case.model(torch.float32).to(kernel_device()), on_device(case)
    plan = ff.FOMAML(model, **case.options(), backend="triton").plan(case.tasks, case.shots, case.queries)
    for bad in (-100, case.widths[-1]):
        batch["query_y"][1, 0] = bad
        support, query = Support(batch["support_x"], batch["support_y"]), Query(batch["query_x"], batch["query_y"])
        value, *_ = resident.step(plan, [False] * 9, flat(model), support, query, 1.0)
        assert value.isnan()


def test_tuning_takes_the_fastest_layout_from_then_on() -> None:
    from fomaml_fused.kernels import configuration

    case = Case(widths=(3, 4), tasks=2, shots=2)
    meta = ff.FOMAML(case.model(torch.float32).to(kernel_device()), backend="triton")
    try:
        found = ff.tune(meta, 2, 2, rounds=1)
        assert list(found.values()) == sorted(found.values())
        assert meta.plan(2, 2).config == next(iter(found))
    finally:
        configuration._tuned.clear()
        ff.planner.forget_plans()
    float64 = ff.FOMAML(case.model(torch.float64).to(kernel_device()), backend="triton")
    with (
        pytest.warns(UserWarning, match="float64"),
        pytest.raises(ValueError, match=r"no fused kernel takes this problem: .*float64"),
    ):
        ff.tune(float64, 2, 2)
