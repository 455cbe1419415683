"""The primal kernels against the oracle, all layers in a launch and layer by layer; as `test_resident.py` its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fomaml_fused as ff

from .cases import Case, assert_close, by_engine, cases
from .kernel_contract import INTERPRETED, KernelContract, check, check_tuning, watched
from .on_kernels import by_kernels, kernel_device

pytest.importorskip("triton")

from fomaml_fused.kernels.configuration import PrimalConfig

pytestmark = pytest.mark.kernels

__all__ = ["watched"]
ENGINES = pytest.mark.parametrize("engine", ["chained", "primal"])


# Compiled, a case takes ten seconds or more: there `test_everything_at_once` stands for these.
@pytest.mark.skipif(not INTERPRETED, reason="compiles hundreds of kernels")
@ENGINES
class TestPrimal(KernelContract):
    pass


@ENGINES
@pytest.mark.parametrize(
    ("options", "config"),
    [
        ({"tasks": 5, "loss": "cross_entropy"}, PrimalConfig(4, 16)),
        ({"shots": 40, "queries": 21}, PrimalConfig(4, 16, features=16, contracted=16, stages=3)),
        ({"widths": (20, 40, 33, 5), "shots": 40, "adapt": [1, 2]}, PrimalConfig(8, 32, 32, 16)),
    ],
    ids=str,
)
def test_everything_at_once(engine: str, options: dict[str, Any], config: PrimalConfig) -> None:
    """Tiles smaller than layers and sets, samples under way in parts, every option of the inner loop."""
    if not (INTERPRETED or config.stages == 3 or config.warps == 8):
        pytest.skip("the others are compiled")
    whole = {"steps": 3, "activation": "gelu", "momentum": 0.9, "weight_decay": 0.1, "weighted": True}
    case = Case(**{"widths": (3, 17, 5, 3), **whole, **options})
    with ff.override(engine=engine, config=config, rows=32):
        check(case, per_task=False)


@pytest.mark.skipif(not INTERPRETED, reason="compiles hundreds of kernels")
@ENGINES
@given(case=cases(), samples=st.sampled_from([16, 32]), tile=st.sampled_from([16, 32]), rows=st.integers(1, 40))
@settings(max_examples=8)
def test_random_problems_in_tiles_and_rows(engine: str, case: Case, samples: int, tile: int, rows: int) -> None:
    with ff.override(engine=engine, config=PrimalConfig(4, samples, tile, 16), rows=rows):
        check(case, per_task=False)


@pytest.mark.skipif(not INTERPRETED, reason="takes minutes on an emulator")
def test_four_tiles_of_features_stay_on_chip() -> None:
    """The widest layers that any table of configurations lets through, in 16 bits."""
    case = Case(widths=(2, 130, 256, 3), shots=20, queries=3, steps=1, tasks=1)
    with ff.override(engine="chained", config=PrimalConfig(4, 16, features=64, contracted=64)):
        check(case, "bf16", per_task=False)


@ENGINES
@pytest.mark.parametrize(
    "rule",
    [
        {"optimizer": "adam", "learn_lr": "element", "lr": 0.05, "weight_decay": 0.1},
        {"max_grad_norm": 0.3, "nonfinite": "skip", "step_weights": (0.3, 0.7)},
        {"outer": "reptile", "each_step": True, "max_grad_value": 0.1, "momentum": 0.9, "nesterov": True},
    ],
    ids=str,
)
def test_rules_that_change_what_is_compiled(engine: str, rule: dict[str, Any]) -> None:
    """`test_primal_rules.py` has them all, interpreted."""
    with ff.override(engine=engine, rows=16):
        check(Case(widths=(3, 17, 5), shots=20, steps=2, tasks=2, **rule), per_task=False)


@ENGINES
def test_a_sum_over_samples_is_split_where_programs_are_few(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a task alone, with more samples than a part has; repeated bit by bit."""
    from fomaml_fused.engines import launching, primal_launches

    case = Case(widths=(3, 17, 5), tasks=1, shots=200, queries=130, steps=2, momentum=0.9)
    if INTERPRETED:
        monkeypatch.setattr(launching, "INTERPRETED_MULTIPROCESSORS", 8)
    parts: list[int] = []
    split_samples = launching.split_samples

    def noted(*arguments: Any) -> tuple[int, int]:
        found = split_samples(*arguments)
        parts.append(found[0])
        return found

    monkeypatch.setattr(primal_launches, "split_samples", noted)
    with ff.override(engine=engine, config=PrimalConfig(4, 32, 16, 16)):
        if INTERPRETED:
            check(case, per_task=False)
        first, second = (by_kernels(case, per_task=False).values for _ in range(2))
    assert max(parts) > 1
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.skipif(not INTERPRETED, reason="each is compiled in other tests, and compared with the oracle")
def test_both_agree_with_every_other_engine() -> None:
    case = Case(widths=(3, 17, 5, 4), loss="cross_entropy", steps=3, momentum=0.5, tasks=2, activation="sine")
    expected = by_engine(case, torch.float32)
    for engine in ("resident", "dual", "chained", "primal"):
        with ff.override(engine=engine):
            assert_close(by_kernels(case), expected, 2e-6)


@ENGINES
def test_samples_under_way_bound_what_is_held(engine: str) -> None:
    """Thousands of samples a task are taken in parts when memory is short."""
    meta = ff.FOMAML(Case(widths=(2, 64, 64, 3)).model(torch.float32).to(kernel_device()), backend="triton")
    with ff.override(engine=engine):
        free = meta.plan(4, 100_000)
        with ff.override(memory_bound=16 << 20):
            bound = meta.plan(4, 100_000)
    assert isinstance(bound.config, PrimalConfig)
    assert free.rows is None
    assert bound.rows is not None
    assert bound.rows < 10_000
    assert bound.rows % bound.config.samples == 0
    assert bound.memory <= 16 << 20


@ENGINES
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"learn_lr": "layer_step", "steps": 2}, "rates of each step take what each has multiplied"),
        ({"widths": (3, 300, 3)}, "a layer is 512 wide when padded"),
    ],
    ids=str,
)
def test_what_is_not_taken_is_named(engine: str, options: dict[str, Any], reason: str) -> None:
    if engine == "primal" and "widths" in options:
        pytest.skip("layers of any width, one at a time")
    case = Case(**options)
    meta = case.meta(case.model(torch.float32).to(kernel_device()), "triton")
    with ff.override(engine=engine), pytest.raises(ValueError, match=f"engine is '{engine}'.*{reason}"):
        meta.plan(2, 2)


@pytest.mark.skipif(not INTERPRETED, reason="compiles dozens of kernels")
@ENGINES
def test_tuning_takes_the_fastest_layout_from_then_on(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_tuning(engine, monkeypatch)
