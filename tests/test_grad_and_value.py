"""`FOMAML.grad_and_value` is a call and its backward, bit by bit, by whatever engine and rule."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import fomaml_fused as ff

from .cases import Case, log_cosh

CLASSES = Case(widths=(3, 17, 5), loss="cross_entropy", steps=3)
VALUES = Case(widths=(3, 17, 5), loss="mse", steps=3)
T, S, Q = CLASSES.tasks, CLASSES.shots, CLASSES.queries
GENERATOR = torch.Generator().manual_seed(0)


def weights(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=GENERATOR)


# Of the module, of the call, and of the planner.
WAYS: dict[str, tuple[Case, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "as it comes": (CLASSES, {}, {}, {}),
    "in chunks": (CLASSES, {}, {"task_weight": weights(T)}, {"chunk": 2}),
    "compiled": (CLASSES, {"compile": True}, {}, {}),
    "compiled values": (VALUES, {"compile": True}, {"reduction": "sum"}, {}),
    "kernels": (CLASSES, {"backend": "triton", "precision": "ieee"}, {}, {}),
    "oracle": (CLASSES, {"backend": "reference"}, {}, {}),
    "weights": (
        CLASSES,
        {},
        {"support_weight": weights(T, S), "query_weight": weights(T, Q), "task_weight": weights(T)},
        {},
    ),
    "sum": (CLASSES, {}, {"reduction": "sum", "task_weight": weights(T)}, {}),
    "counts": (CLASSES, {}, {"support_counts": [1, S, 2][:T], "step_counts": [3, 0, 1][:T]}, {}),
    "skip": (VALUES, {"nonfinite": "skip"}, {}, {}),
    "callable": (VALUES, {"outer_loss": log_cosh}, {}, {}),
    "multi-step": (CLASSES, {"step_weights": [0.2, 0.0, 0.8]}, {}, {}),
    "Reptile": (replace(VALUES, outer="reptile"), {}, {}, {}),
    "Adam": (CLASSES, {"optimizer": "adam"}, {}, {}),
    "learned rates": (CLASSES, {"learn_lr": "layer_step", "positive_lr": "softplus"}, {}, {}),
}


def both(
    way: str, dtype: torch.dtype = torch.float32
) -> tuple[ff.FOMAML, tuple[dict[str, Tensor], Tensor], dict[str, Tensor | None], Tensor]:
    """The module; what the function gives; and gradients by the names of the state dict, and the loss, by autograd."""
    case, options, call, told = WAYS[way]
    if options.get("backend") == "triton":
        pytest.importorskip("triton")
        if os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip("on a CPU, kernels are interpreted")
    meta = ff.FOMAML(case.model(dtype), **case.options() | options)
    batch = case.batch(dtype)
    call = {name: v.to(dtype) if isinstance(v, Tensor) else v for name, v in call.items()}
    with ff.override(**told):
        found = meta.grad_and_value(**batch, **call)
        assert all(p.grad is None for p in meta.parameters())
        loss = meta(**batch, **call)
    loss.backward()
    return meta, found, {name.removeprefix("model."): p.grad for name, p in meta.named_parameters()}, loss


@pytest.mark.parametrize("way", WAYS)
def test_it_is_a_call_and_its_backward(way: str) -> None:
    meta, (gradients, value), expected, loss = both(way)
    assert list(gradients) == list(expected)
    assert set(gradients) == set(meta.state_dict())
    # Of a callable autograd takes the gradient of all outputs at once, the function on the way.
    same = partial(torch.allclose, rtol=1e-6, atol=1e-7) if way == "callable" else torch.equal
    assert same(value, loss)
    for name, gradient in gradients.items():
        assert same(gradient, expected[name]), name  # type: ignore[arg-type]
        assert gradient.abs().sum() > 0
    assert not any(t.requires_grad for t in (value, *gradients.values()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_gradients_have_the_dtype_of_their_parameters(dtype: torch.dtype) -> None:
    _, (gradients, value), expected, loss = both("as it comes", dtype)
    assert value.dtype == loss.dtype == dtype
    assert all(gradients[name].dtype == dtype for name in expected)
    assert all(torch.equal(gradients[name], g) for name, g in expected.items() if g is not None)


@pytest.mark.parametrize("compiled", [False, True])
def test_what_asks_for_no_gradient_has_none(compiled: bool) -> None:
    meta = ff.FOMAML(CLASSES.model(torch.float32), **CLASSES.options(), compile=compiled)
    batch = CLASSES.batch(torch.float32)
    whole, _ = meta.grad_and_value(**batch)
    meta.model[0].weight.requires_grad_(requires_grad=False)  # type: ignore[index]
    part, _ = meta.grad_and_value(**batch)
    assert set(whole) - set(part) == {"0.weight"}
    assert all(torch.equal(whole[name], g) for name, g in part.items())
    meta.requires_grad_(requires_grad=False)
    for backend in ("auto", "reference"):
        meta.backend = backend
        gradients, value = meta.grad_and_value(**batch)
        assert gradients == {}
        assert value.isfinite()


@pytest.mark.parametrize("way", ["as it comes", "compiled", "skip", "callable", "learned rates"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes_without_gradients_do_not_matter(way: str, mode: Any) -> None:
    case, options, _, _ = WAYS[way]
    meta = ff.FOMAML(case.model(torch.float32), **case.options() | options)
    batch = case.batch(torch.float32)
    expected, _ = meta.grad_and_value(**batch)
    with mode():
        found, _ = meta.grad_and_value(**batch)
        of_mode, _ = meta.grad_and_value(**{name: t.clone() for name, t in batch.items()})
    assert list(found) == list(expected)
    assert all(torch.equal(found[n], g) and torch.equal(of_mode[n], g) for n, g in expected.items())
    for gradient in (*found.values(), *of_mode.values()):
        gradient.mul_(2.0)  # as one that clips would, outside of the mode


def test_autocast_does_not_matter() -> None:
    meta, batch = ff.FOMAML(VALUES.model(torch.float32), **VALUES.options()), VALUES.batch(torch.float32)
    expected, _ = meta.grad_and_value(**batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _ = meta.grad_and_value(**batch)
    assert all(torch.equal(found[name], g) for name, g in expected.items())


def test_a_parameter_that_layers_have_come_to_share_has_the_sum() -> None:
    case = Case(widths=(4, 4, 4))
    meta, batch = ff.FOMAML(case.model(torch.float32), **case.options()), case.batch(torch.float32)
    meta.model[2].weight = meta.model[0].weight  # type: ignore[index]
    gradients, _ = meta.grad_and_value(**batch)
    meta(**batch).backward()
    assert all(torch.equal(gradients[name], p.grad) for name, p in meta.model.named_parameters())  # type: ignore[arg-type]


def test_diverged_tasks_are_counted_and_left_out() -> None:
    meta = ff.FOMAML(VALUES.model(torch.float32), **VALUES.options() | {"nonfinite": "skip"})
    batch = {name: t.detach() for name, t in VALUES.batch(torch.float32).items()}
    batch["query_y"][1] = torch.inf
    gradients, value = meta.grad_and_value(**batch)
    assert value.isfinite()
    assert all(g.isfinite().all() for g in gradients.values())
    assert meta.skipped == 1
    keeps_all = ff.FOMAML(VALUES.model(torch.float32), **VALUES.options())
    assert not keeps_all.grad_and_value(**batch)[1].isfinite()


def test_no_task_is_as_in_torch() -> None:
    meta = ff.FOMAML(VALUES.model(torch.float32), **VALUES.options())
    batch = {name: t[:0] for name, t in VALUES.batch(torch.float32).items()}
    gradients, value = meta.grad_and_value(**batch)
    assert value.isnan()
    assert all(not g.any() for g in gradients.values())


def test_errors_name_the_argument() -> None:
    meta = ff.FOMAML(CLASSES.model(torch.float32), **CLASSES.options())
    batch = CLASSES.batch(torch.float32)
    with pytest.raises(ValueError, match="reduction is 'none'; gradients are of a scalar"):
        meta.grad_and_value(**batch, reduction="none")
    with pytest.raises(TypeError, match=r"support_x is torch\.float64"):
        meta.grad_and_value(**batch | {"support_x": batch["support_x"].double()})
