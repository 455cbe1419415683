"""Problems with the rules of inner and outer loops on engines of kernels, beside the oracle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import fomaml_fused as ff

from .cases import Case, Solution, assert_no_worse_than_twice, cases, relative_error
from .on_kernels import allowance, kernel_device


def in_turn(engines: Sequence[str], rules: Sequence[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """Each rule with one of the engines: they share what rules change, and rules drawn together run on all."""
    return [(engines[i % len(engines)], rule) for i, rule in enumerate(rules)]


def rated_apart(solution: Solution) -> Solution:
    """With the gradients of rates, which are few among many, as vectors of their own."""
    return Solution({name.replace(" d/d inner_lr", " of rates"): value for name, value in solution.values.items()})


def solution(case: Case, backend: str, dtype: torch.dtype = torch.float32, precision: str | None = None) -> Solution:
    """The meta-loss and its gradients, by the engine that plans are to name if kernels are asked for."""
    meta = case.meta(case.model(dtype), backend, precision=precision)
    return rated_apart(Solution.of(meta, case, meta, dtype, per_task=False))


def check(case: Case) -> None:
    own = [solution(replace(case, jitter=jitter), "reference") for jitter in range(4)]
    assert_no_worse_than_twice(solution(case, "triton"), own, solution(case, "reference", torch.float64))


@st.composite
def ruled(draw: st.DrawFn) -> Case:
    """Random problems with rules drawn together."""
    case = draw(cases())
    outer = draw(st.sampled_from(["fomaml", "fomaml", "reptile"]))
    weights = draw(st.lists(st.sampled_from([0.0, 0.3, 1.0]), min_size=case.steps, max_size=case.steps))
    counts = outer == "fomaml" and case.steps > 0
    learns = counts and case.adapt != [] and (case.adapt != "body" or len(case.widths) > 2)
    learn_lr = draw(st.sampled_from([None, "global", "step", "layer", "layer_step"])) if learns else None
    momentum = draw(st.sampled_from([0.0, 0.9]))
    return replace(
        case,
        lr=0.1 if learn_lr else case.lr,
        learn_lr=learn_lr,
        momentum=momentum,
        nesterov=momentum > 0.0 and draw(st.booleans()),
        decoupled_weight_decay=draw(st.booleans()),
        max_grad_norm=draw(st.sampled_from([None, None, 0.3])),
        outer=outer,
        step_weights=tuple(weights) if counts and any(weights) else None,
        nonfinite=draw(st.sampled_from(["propagate", "skip"])),
        each_step=draw(st.booleans()),
    )


def solved(meta: ff.FOMAML, batch: dict[str, Tensor], reduction: str) -> dict[str, Tensor]:
    """The loss and every gradient by name."""
    batch = dict(batch)
    inputs: dict[str, Tensor] = dict(meta.named_parameters())
    if "query_x" in batch:
        inputs["query_x"] = batch["query_x"] = batch["query_x"].clone().requires_grad_()
    value = meta(**batch, reduction=reduction)
    return {"value": value} | dict(zip(inputs, torch.autograd.grad(value, list(inputs.values())), strict=True))


def predicted(case: Case, backend: str, dtype: torch.dtype) -> Solution:
    device = kernel_device() if backend == "triton" else torch.device("cpu")
    meta = case.meta(case.model(dtype).to(device), backend)
    batch = replace(case, outer="fomaml").batch(dtype)  # whose batches have query sets
    support = {name: values.to(device) for name, values in batch.items() if name.startswith("support_")}
    query_x = batch["query_x"].detach().to(device).requires_grad_()
    outputs = meta.predict(**support, query_x=query_x)
    inputs = {"query_x": query_x, **dict(meta.named_parameters())}
    found = torch.autograd.grad(outputs, list(inputs.values()), directions(outputs))
    gradients = {f"outputs d/d {name}": g for name, g in zip(inputs, found, strict=True)}
    fast = meta.adapt(**support).weights()
    return rated_apart(Solution({"outputs": outputs.detach()} | gradients | {f"fast {n}": w for n, w in fast.items()}))


def directions(outputs: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(outputs.shape, generator=generator, dtype=torch.float64).to(outputs)


def check_adapted_tasks(case: Case) -> None:
    """Outputs with their gradients, rates included, and fast weights: those of the last step."""
    own = [predicted(replace(case, jitter=jitter), "reference", torch.float32) for jitter in range(4)]
    found = predicted(case, "triton", torch.float32)
    assert_no_worse_than_twice(found, own, predicted(case, "reference", torch.float64), allowance(case, "highest"))


def diverging(learn_lr: str) -> list[dict[str, Any]]:
    """Rules for `check_diverged_tasks_are_left_out`; learn_lr: rates that the engines learn."""
    return [
        {},
        {"weighted": True, "reduction": "sum"},
        {"step_weights": (0.5, 0.25, 0.25, 0.0), "learn_lr": learn_lr},
        {"outer": "reptile", "weight_decay": 0.1},
    ]


def check_diverged_tasks_are_left_out(rule: dict[str, Any]) -> None:
    """Of six tasks two diverge; what is left is what a batch without them gives."""
    case = Case(**{"tasks": 6, "activation": "relu", "steps": 4, "lr": 1.0, "nonfinite": "skip", **rule})
    meta = case.meta(case.model(torch.float32), "triton")
    batch = {name: t.detach() for name, t in case.batch(torch.float32).items()}
    batch["support_y"][[1, 4]] = 1e30
    keep = [0, 2, 3, 5]
    found = solved(meta, batch, case.reduction)
    assert meta.skipped is not None
    weight = batch.get("task_weight")
    assert float(meta.skipped) == pytest.approx(2.0 if weight is None else float(weight[[1, 4]].sum()))
    expected = solved(meta, {name: t[keep] for name, t in batch.items()}, case.reduction)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        if name == "query_x":
            assert not value[[1, 4]].any()
            value = value[keep]
        assert relative_error(value, expected[name]) < 1e-6, name


def check_without_tasks_or_queries(case: Case) -> None:
    """The mean over nothing is nan, and no gradient."""
    meta = case.meta(case.model(torch.float32), "triton")
    batch = {name: t.detach() for name, t in case.batch(torch.float32).items()}
    found = solved(meta, batch, "mean")
    lacking = case.outer == "fomaml" or case.tasks == 0
    assert found.pop("value").isnan() == lacking
    assert not (lacking and any(gradient.any() for gradient in found.values()))
