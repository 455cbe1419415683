"""Every engine, kernel and public name once: the part of the slow tests that `make test` does not leave out."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

import fomaml_fused as ff
from fomaml_fused.plans import ENGINES, KERNEL_ENGINES

from .cases import Case, Solution, assert_no_worse_than_twice, by_oracle, relative_error, yardsticks
from .conftest import LEFT_OUT

pytest.importorskip("triton")

from .kernel_contract import watched
from .on_kernels import kernel_device, on_device

__all__ = ["watched"]

TESTS = Path(__file__).parent
CASE = Case(widths=(3, 17, 5, 4), tasks=2, shots=3, queries=4, steps=2, loss="cross_entropy")


def meta_by(engine: str, case: Case, dtype: torch.dtype = torch.float32, **options: Any) -> ff.FOMAML:
    """The case's module where the engine runs; a kernel's engine also wants `ff.override(engine=...)`."""
    backends = {"batched": "torch", "native": "auto", "reference": "reference"}
    device = kernel_device() if engine in KERNEL_ENGINES else torch.device("cpu")
    return case.meta(case.model(dtype).to(device), backends.get(engine, "triton"), **options)


def results(meta: ff.FOMAML, batch: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors that each public method of the module gives."""
    support = batch["support_x"], batch["support_y"]
    gradients, loss = meta.grad_and_value(**batch)
    outputs = meta.predict(*support, batch["query_x"])
    inside = meta.losses(**batch)
    adapted = meta.adapt(*support)
    found = {f"gradient of {name}": g for name, g in gradients.items()} | {"loss": loss, "outputs": outputs}
    found |= {f"adapted {name}": w for name, w in adapted.weights().items()}
    return found | {"support losses": inside.support, "task 1": adapted.task(1)(batch["query_x"][1])}


@pytest.mark.parametrize("engine", [*ENGINES, "reference"])
def test_every_engine_gives_the_oracles_results(engine: str) -> None:
    exact = meta_by("reference", CASE, torch.float64)
    expected = results(exact, {name: t.detach() for name, t in CASE.batch(torch.float64).items()})
    with ff.override(engine=None if engine in ("batched", "reference") else engine):
        meta = meta_by(engine, CASE)
        assert meta.plan(CASE.tasks, CASE.shots, CASE.queries).engine == engine
        solution = Solution.of(meta, CASE, meta, torch.float32)
        found = results(meta, {name: t.to(next(meta.parameters()).device) for name, t in on_device(CASE).items()})
    assert_no_worse_than_twice(solution, yardsticks(CASE, torch.float32), by_oracle(CASE, torch.float64))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert relative_error(found[name], value) < 1e-5, name


@contextmanager
def launched() -> Iterator[set[str]]:
    """The kernels that the interpreter runs within the block, as "file.function"."""
    from triton.runtime.interpreter import GridExecutor

    names: set[str] = set()
    run = GridExecutor.__call__

    def recorded(self: Any, *arguments: Any, **options: Any) -> None:
        names.add(f"{self.fn.__module__.rpartition('.')[2]}.{self.fn.__name__}")
        run(self, *arguments, **options)

    with patch.object(GridExecutor, "__call__", recorded):
        yield names


# Of each engine, what launches all of its kernels.
LAUNCHES: dict[str, list[dict[str, Any]]] = {
    "resident": [{}],
    "dual": [{}],
    "layered": [{"forms": ("dual", "dual", "dual:1"), "momentum": 0.9}],
    "chained": [{}, {"max_grad_norm": 1.0}],
    "primal": [{}],
}


@pytest.mark.skipif("config.getoption('--kernels') != 'interpreted'")
def test_every_kernel_is_launched_and_right() -> None:
    with launched() as names:
        for engine, variants in LAUNCHES.items():
            for options in variants:
                case = replace(CASE, **{name: value for name, value in options.items() if name != "forms"})
                with ff.override(engine=engine, forms=options.get("forms")):
                    meta, batch = meta_by(engine, case), on_device(case)
                    solution = Solution.of(meta, case, meta, torch.float32, per_task=False)
                    meta.adapt(batch["support_x"], batch["support_y"])(batch["query_x"])
                    query_x = batch["query_x"].requires_grad_()
                    meta.predict(batch["support_x"], batch["support_y"], query_x).sum().backward()
                exact = by_oracle(case, torch.float64)
                assert_no_worse_than_twice(solution, yardsticks(case, torch.float32), exact)
    kernels = {
        f"{file.stem}.{name}"
        for file in (TESTS.parent / "kernels").glob("*.py")
        for name in re.findall(r"^def (\w+_kernel)\(", file.read_text(), re.MULTILINE)
    }
    assert names == kernels


def test_tuning_times_every_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    from fomaml_fused.kernels import configuration

    from fomaml_fused import tuning

    monkeypatch.setattr(tuning, "WARPS", (1, 2))
    monkeypatch.setattr(tuning, "SAMPLES", (16,))
    monkeypatch.setattr(configuration, "_tuned", {})
    meta = meta_by("resident", Case(widths=(3, 4)))
    seconds = ff.tune(meta, 2, 2, rounds=1)
    assert sorted(config.warps for config in seconds) == [1, 2]
    assert meta.plan(2, 2).config == next(iter(seconds))
    ff.planner.forget_plans()


@pytest.mark.parametrize(
    "name", sorted({*ff.__all__} - {"__version__", "AdaptedMLP", "Plan"})
)  # these two are returned
def test_every_public_name_is_in_a_test_that_is_not_left_out(name: str) -> None:
    marked = re.compile(rf"^pytestmark = \[?\s*pytest\.mark\.({'|'.join(LEFT_OUT)})", re.MULTILINE)
    texts = [file.read_text() for file in TESTS.glob("test_*.py") if file != Path(__file__)]
    kept = [text for text in texts if not marked.search(text)] + [Path(__file__).read_text()]
    used = re.compile(rf"\bff\.{name}\b|fomaml_fused(\.{name}\b| import .*\b{name}\b)")
    assert any(used.search(text) for text in kept)
