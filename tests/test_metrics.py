"""What `FOMAML.losses` tells of the inside, against the oracle's own trajectory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.func import functional_call

import fomaml_fused as ff
from fomaml_fused.reference import mean_loss, trajectory

from .cases import LOSSES, Case, relative_error

CASE = Case(widths=(3, 17, 9, 5), tasks=4, steps=3, loss="cross_entropy", momentum=0.5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weighted": True, "max_grad_norm": 0.1},
        {"each_step": True, "weighted": True},
        {"outer_loss": "mse", "adapt": ["0.bias", "4"]},
        {"loss": "huber", "norm": "layer", "momentum": 0.0, "optimizer": "adam", "lr": 0.01},
        {"loss": "huber", "outer": "reptile"},
        {"steps": 0},
    ],
    ids=str,
)
@pytest.mark.parametrize(("chunk", "rows"), [(1, None), (4, None), (4, 2)])
def test_losses_accuracies_and_norms_are_the_oracles(options: dict[str, Any], chunk: int, rows: int | None) -> None:
    case = Case(**{**{f: getattr(CASE, f) for f in ("widths", "tasks", "steps", "loss", "momentum")}, **options})
    meta, batch = case.meta(case.model(torch.float64), "torch"), case.batch(torch.float64)
    batch.pop("task_weight", None)
    with ff.override(chunk=chunk, rows=rows):
        found = meta.losses(**batch)
    for t in range(case.tasks):
        own = {name: value[t].detach() for name, value in batch.items()}
        weight, asked = own.get("support_weight"), own.get("query_weight")
        x, y = own["support_x"], own["support_y"]
        points = trajectory(meta.model, x, y, **meta.reference_options(), weight=weight)
        for k in range(case.steps):
            sample = (x[k], y[k], None if weight is None else weight[k]) if case.each_step else (x, y, weight)
            moving = {name: points[k][name].detach().requires_grad_() for name in meta.adapted_names()}
            outputs = functional_call(meta.model, points[k] | moving, (sample[0],))
            loss = mean_loss(LOSSES[case.loss], outputs, sample[1], sample[2])
            norm = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(moving.values()))]).norm()
            assert relative_error(found.support[t, k], loss) < 1e-12
            assert relative_error(found.gradient_norm[t, k], norm) < 1e-10
            assert_accuracy(found.support_accuracy, case.loss, (t, k), outputs, sample[1], sample[2])
        for k, point in enumerate(points if "query_x" in own else []):
            outputs = functional_call(meta.model, point, (own["query_x"],))
            rule = case.outer_loss or case.loss
            assert found.query is not None
            assert relative_error(found.query[t, k], mean_loss(LOSSES[rule], outputs, own["query_y"], asked)) < 1e-12
            assert_accuracy(found.query_accuracy, rule, (t, k), outputs, own["query_y"], asked)
    assert (found.query is None) == (case.outer == "reptile")


def assert_accuracy(
    found: torch.Tensor | None,
    loss: str,
    where: tuple[int, int],
    outputs: torch.Tensor,
    y: torch.Tensor,
    weight: torch.Tensor | None,
) -> None:
    if "cross_entropy" not in loss:
        assert found is None
        return
    right = (outputs.argmax(-1) == y).double()
    expected = right.mean() if weight is None else (right * weight).sum() / weight.sum()
    assert found is not None
    assert relative_error(found[where], expected) < 1e-12


def test_tasks_of_different_sizes_come_back_in_order() -> None:
    meta, batch = CASE.meta(CASE.model(torch.float64), "torch"), CASE.batch(torch.float64)
    counts: dict[str, Any] = {"support_counts": [5, 2, 1, 5], "query_counts": [4, 4, 2, 1], "step_counts": [3, 1, 0, 2]}
    found = meta.losses(**batch, **counts)
    for t, (shots, queries, steps) in enumerate(zip(*counts.values(), strict=True)):
        alone = ff.FOMAML(meta.model, lr=0.1, steps=steps, momentum=0.5, loss="cross_entropy").losses(
            batch["support_x"][t : t + 1, :shots],
            batch["support_y"][t : t + 1, :shots],
            batch["query_x"][t : t + 1, :queries],
            batch["query_y"][t : t + 1, :queries],
        )
        for name in ("support", "gradient_norm", "support_accuracy"):
            torch.testing.assert_close(getattr(found, name)[t, :steps], getattr(alone, name)[0])
            assert getattr(found, name)[t, steps:].isnan().all()
        for name in ("query", "query_accuracy"):
            values, own = getattr(found, name)[t], getattr(alone, name)[0]
            torch.testing.assert_close(values[: steps + 1], own)
            torch.testing.assert_close(values[steps:], own[-1].expand(3 - steps + 1))


def test_scalars_are_means_over_the_tasks_that_did_not_diverge() -> None:
    case = Case(tasks=4, activation="relu", steps=5, lr=1.0)
    meta, batch = case.meta(case.model(torch.float32), "torch"), case.batch(torch.float32)
    batch["support_y"][2] = 1e30
    found = meta.losses(**batch)
    named = found.scalars()
    assert named["diverged"] == 1.0
    assert found.query is not None
    assert named["query/5"] == pytest.approx(float(found.query[[0, 1, 3], 5].mean()))
    assert named["query/0"] == pytest.approx(float(found.query[:, 0].mean()))
    assert list(named)[:2] == ["support/0", "support/1"]


def test_no_task_has_no_losses() -> None:
    meta = ff.FOMAML(CASE.model(torch.float32), steps=2, loss="cross_entropy")
    empty = meta.losses(torch.empty(0, 3, 3), torch.empty(0, 3, dtype=torch.long))
    assert empty.support.shape == (0, 2)
    assert empty.query is None
