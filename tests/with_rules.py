"""Problems with the rules of inner and outer loops on engines of kernels, beside the oracle."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import strategies as st
from torch import Tensor

import fomaml_fused as ff

from .cases import Case, Solution, assert_no_worse_than_twice, cases


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
    meta = case.meta(case.model(dtype), backend)
    batch = replace(case, outer="fomaml").batch(dtype)
    outputs = meta.predict(batch["support_x"], batch["support_y"], batch["query_x"])
    inputs = {"query_x": batch["query_x"], **dict(meta.named_parameters())}
    found = torch.autograd.grad(outputs, list(inputs.values()), directions(outputs))
    gradients = {f"outputs d/d {name}": g for name, g in zip(inputs, found, strict=True)}
    fast = meta.adapt(batch["support_x"], batch["support_y"]).weights()
    return rated_apart(Solution({"outputs": outputs.detach()} | gradients | {f"fast {n}": w for n, w in fast.items()}))


def directions(outputs: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(outputs.shape, generator=generator, dtype=torch.float64).to(outputs.dtype)
