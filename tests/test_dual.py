"""The dual kernels against the oracle, in two launches and layer by layer; as `test_resident.py` runs its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fomaml_fused as ff

from .cases import Case, assert_close, by_engine, cases
from .kernel_contract import INTERPRETED, KernelContract, check, check_tuning, watched
from .on_kernels import by_kernels, kernel_device, on_device

pytest.importorskip("triton")

from fomaml_fused.kernels.configuration import DualConfig

pytestmark = pytest.mark.kernels

__all__ = ["watched"]
ENGINES = pytest.mark.parametrize("engine", ["dual", "layered"])


# Compiled, a case takes ten seconds or more: there `test_everything_at_once` stands for these.
@pytest.mark.skipif(not INTERPRETED, reason="compiles hundreds of kernels")
@ENGINES
class TestDual(KernelContract):
    pass


@ENGINES
@pytest.mark.parametrize(
    ("options", "config"),
    [
        ({}, DualConfig(4, 16)),
        ({"tasks": 7, "loss": "cross_entropy"}, DualConfig(4, 16, tasks=3)),
        ({"tasks": 5, "shots": 3, "queries": 7}, DualConfig(4, 32, tasks=5, features=16, contracted=16, stages=3)),
        ({"widths": (40, 70, 33, 5), "queries": 20, "adapt": [1, 2]}, DualConfig(8, 16, features=32, contracted=16)),
    ],
    ids=str,
)
def test_everything_at_once(engine: str, options: dict[str, Any], config: DualConfig) -> None:
    """Several tasks a program, tiles smaller than layers and sets, every option of the inner loop."""
    if not (INTERPRETED or config.tasks == 3 or config.warps == 8):
        pytest.skip("the others are compiled")
    whole = {"steps": 3, "activation": "gelu", "momentum": 0.9, "weight_decay": 0.1, "weighted": True}
    case = Case(**{"widths": (3, 17, 5, 3), **whole, **options})
    with ff.override(engine=engine, config=config):
        check(case, per_task=INTERPRETED)


@pytest.mark.skipif(not INTERPRETED, reason="compiles hundreds of kernels")
@ENGINES
@given(case=cases(), tasks=st.integers(1, 4), samples=st.sampled_from([16, 32]), tile=st.sampled_from([16, 32]))
@settings(max_examples=8)
def test_random_problems_in_packs_and_tiles(engine: str, case: Case, tasks: int, samples: int, tile: int) -> None:
    fits = tasks * case.shots <= 64 and tasks * case.shots * case.steps <= 64
    if fits and (engine == "layered" or "callable" not in (case.loss, case.outer_loss)):
        with ff.override(engine=engine, config=DualConfig(4, samples, tile, 16, tasks=tasks)):
            check(case, per_task=False)


@pytest.mark.parametrize(
    "options",
    [
        {"forms": ("dual", "dual:2", "dual:1")},
        {"forms": ("dual", "dual:3", "dual")},
        {"forms": ("dual", "dual:1", "dual:2"), "weight_decay": 0.1, "bias": False},
        {"forms": ("dual", "dual:2", "dual:1"), "momentum": 0.9, "weight_decay": 0.1, "weighted": True},
        {"forms": ("dual", "dual", "dual:2"), "adapt": [1, 2], "widths": (3, 33, 40, 3), "momentum": 0.9},
    ],
    ids=str,
)
def test_layers_fold(options: dict[str, Any]) -> None:
    if not INTERPRETED and "weighted" not in options:
        pytest.skip("one of them is compiled")
    case = Case(**{"widths": (3, 17, 5, 3), "steps": 3, "activation": "gelu", **options})
    with ff.override(engine="layered", forms=case.forms):
        check(case, per_task=False)
        assert_close(by_kernels(case), by_engine(case, torch.float32, case.forms), 2e-6)


def test_histories_that_outgrow_their_layer_fold() -> None:
    case = Case(widths=(3, 17, 20, 3), tasks=1, shots=20, steps=9)
    with ff.override(engine="layered"):
        meta = ff.FOMAML(case.model(torch.float32).to(kernel_device()), **case.options(), backend="triton")
        assert meta.plan(case.tasks, case.shots, case.queries).forms == ("dual", "dual:4", "dual:4")
        if INTERPRETED:
            check(case, per_task=False)


@ENGINES
def test_a_diverged_task_spoils_no_other_of_its_pack(engine: str) -> None:
    if not INTERPRETED and engine == "layered":
        pytest.skip("the parts are those of the other engine")
    case = Case(widths=(3, 17, 9, 5), tasks=6, activation="relu", steps=4, lr=1.0)
    model, batch = case.model(torch.float32).to(kernel_device()), on_device(case)
    sound = batch["support_y"].clone()
    batch["support_y"][1] = 1e30
    meta = ff.FOMAML(model, **case.options(), backend="triton")
    with ff.override(engine=engine, config=DualConfig(4, 16, tasks=3)):
        losses = meta(**batch, reduction="none")
        expected = meta(**batch | {"support_y": sound}, reduction="none")
    assert losses.isfinite().tolist() == [True, False, True, True, True, True]
    others = [0, 2, 3, 4, 5]
    assert torch.equal(losses[others], expected[others])


@pytest.mark.skipif(not INTERPRETED, reason="each is compiled in other tests, and compared with the oracle")
def test_all_engines_agree() -> None:
    case = Case(widths=(3, 17, 5, 4), loss="cross_entropy", steps=3, momentum=0.5, tasks=2)
    expected = by_engine(case, torch.float32)
    for engine in ("resident", "dual", "layered"):
        with ff.override(engine=engine):
            assert_close(by_kernels(case), expected, 2e-6)


@pytest.mark.skipif(not INTERPRETED, reason="compiles dozens of kernels")
@ENGINES
def test_tuning_takes_the_fastest_layout_from_then_on(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_tuning(engine, monkeypatch)
