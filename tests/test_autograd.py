"""The boundary to autograd: cotangents, what is asked for, and what is an error rather than a wrong number."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import fomaml_fused as ff

from .cases import Case, relative_error

CASE = Case(widths=(3, 17, 3), tasks=4, steps=2)


def setup(case: Case = CASE, dtype: torch.dtype = torch.float64) -> tuple[ff.FOMAML, dict[str, Any]]:
    return ff.FOMAML(case.model(dtype), **case.options()), case.batch(dtype)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_second_derivative_is_an_error(reduction: str) -> None:
    meta, batch = setup()
    loss = meta(**batch, reduction=reduction).sum()
    gradients = torch.autograd.grad(loss, [*meta.parameters(), batch["query_x"]], create_graph=True)
    for gradient in gradients:  # a penalty on any of them would otherwise count as a constant
        penalized = loss + gradient.square().sum()
        with pytest.raises(RuntimeError, match="has no second derivative"):
            torch.autograd.grad(penalized, list(meta.parameters()), retain_graph=True)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_upstream_cotangent_scales_the_gradient(reduction: str) -> None:
    meta, batch = setup()
    inputs = [*meta.parameters(), batch["query_x"]]
    plain = torch.autograd.grad(meta(**batch, reduction=reduction), inputs)
    scaled = torch.autograd.grad(-3.0 * meta(**batch, reduction=reduction), inputs)
    for a, b in zip(scaled, plain, strict=True):
        torch.testing.assert_close(a, -3.0 * b)


@pytest.mark.parametrize("bound", [1 << 30, 1])
def test_predict_takes_any_outer_loss(bound: int) -> None:
    meta, batch = setup(replace(CASE, weighted=True, momentum=0.9))
    inputs = [*meta.parameters(), batch["query_x"]]
    support = {name: batch[name] for name in ("support_x", "support_y", "support_weight")}
    options = CASE.inner_options() | {"momentum": 0.9}

    def outer(outputs: Tensor) -> Tensor:
        target: Tensor = batch["query_y"]
        return (outputs - target).abs().sqrt().logsumexp((0, 1, 2))

    expected = ff.reference.predict(meta.model, **support, query_x=batch["query_x"], **options)
    with ff.override(memory_bound=bound, chunk=3):  # the second bound makes the backward adapt again
        actual = meta.predict(**support, query_x=batch["query_x"])
        gradients = torch.autograd.grad(outer(actual), inputs)
    assert relative_error(actual, expected) < 1e-12
    for a, b in zip(gradients, torch.autograd.grad(outer(expected), inputs), strict=True):
        assert relative_error(a, b) < 1e-10


def test_gradcheck_of_predict_with_respect_to_query_features() -> None:
    meta, batch = setup()
    torch.use_deterministic_algorithms(False)

    def predict(query_x: Tensor) -> Tensor:
        return meta.predict(batch["support_x"], batch["support_y"], query_x)

    assert torch.autograd.gradcheck(predict, batch["query_x"])


def test_weights_and_soft_targets_that_ask_for_gradients_get_them() -> None:
    meta, batch = setup(replace(CASE, weighted=True))
    asking = {name: batch[name].clone().requires_grad_() for name in ("query_y", "query_weight", "task_weight")}
    actual = torch.autograd.grad(meta(**(batch | asking)), list(asking.values()))
    reference = ff.reference.meta_loss(meta.model, **(batch | asking), **CASE.oracle_options())
    for a, b in zip(actual, torch.autograd.grad(reference, list(asking.values())), strict=True):
        assert relative_error(a, b) < 1e-10


def test_support_features_get_no_gradient() -> None:
    meta, batch = setup()
    batch["support_x"].requires_grad_()
    (gradient,) = torch.autograd.grad(meta(**batch), batch["support_x"], allow_unused=True)
    assert gradient is None


def test_frozen_parameters_get_no_gradient_and_change_no_other() -> None:
    meta, batch = setup()
    expected = torch.autograd.grad(meta(**batch), meta.model[2].weight)[0]  # type: ignore[index]
    for name, parameter in meta.model.named_parameters():
        parameter.requires_grad_(name == "2.weight")
    meta(**batch).backward()
    for name, parameter in meta.model.named_parameters():
        assert (parameter.grad is not None) == (name == "2.weight")
    torch.testing.assert_close(meta.model[2].weight.grad, expected)  # type: ignore[index]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: Any) -> None:
    meta, batch = setup()
    expected = meta(**batch).detach()
    with mode():
        assert not meta(**batch).requires_grad
        torch.testing.assert_close(meta(**batch), expected)
        assert not meta.predict(batch["support_x"], batch["support_y"], batch["query_x"]).requires_grad


def test_gradients_accumulate_over_calls() -> None:
    meta, batch = setup()
    meta(**batch).backward()
    once = [p.grad.clone() for p in meta.parameters() if p.grad is not None]
    meta(**batch).backward()
    for parameter, gradient in zip(meta.parameters(), once, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * gradient)


@pytest.mark.parametrize("engine", ["batched", "native"])
def test_a_graph_can_be_walked_twice(engine: str) -> None:
    meta, batch = setup(dtype=torch.float32)
    for reduction in ("mean", "none"):
        with ff.override(engine=engine):
            loss = meta(**batch, reduction=reduction).sum()
        handed_out = torch.autograd.grad(loss, list(meta.parameters()), retain_graph=True)
        first = [g.clone() for g in handed_out]
        for g in handed_out:
            g.zero_()  # it is the caller's own
        second = torch.autograd.grad(loss, list(meta.parameters()))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("engine", ["batched", "native"])
def test_gradients_are_times_the_cotangent(engine: str) -> None:
    meta, batch = setup(dtype=torch.float32)
    with ff.override(engine=engine):
        once = torch.autograd.grad(meta(**batch), list(meta.parameters()))
        scaled = torch.autograd.grad(-3.0 * meta(**batch), list(meta.parameters()))
    for g, threefold in zip(once, scaled, strict=True):
        torch.testing.assert_close(threefold, -3.0 * g)


def test_changing_parameters_before_a_backward_that_needs_them_is_an_error() -> None:
    meta, batch = setup()
    outputs = meta.predict(batch["support_x"], batch["support_y"], batch["query_x"])
    with torch.no_grad():
        meta.model[0].weight.mul_(2.0)  # type: ignore[index]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        outputs.sum().backward()


@pytest.mark.parametrize("bound", [1 << 30, 1])
def test_changing_the_support_set_before_that_backward_is_an_error_too(bound: int) -> None:
    meta, batch = setup()
    with ff.override(memory_bound=bound, forms=("dual", "dual")):
        outputs = meta.predict(batch["support_x"], batch["support_y"], batch["query_x"])
    batch["support_x"].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        outputs.sum().backward()


def test_a_second_derivative_through_the_cotangent_is_an_error() -> None:
    meta, batch = setup()
    temperature = torch.ones((), dtype=torch.float64, requires_grad=True)
    loss = meta(**batch) * temperature
    gradients = torch.autograd.grad(loss, list(meta.parameters()), create_graph=True)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        torch.autograd.grad(gradients[0].square().sum(), temperature)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_parameters_of_a_callable_outer_loss_get_their_gradient(reduction: str) -> None:
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return (scale * outputs - targets).square().mean(-1)

    batch, options = CASE.batch(torch.float64), CASE.oracle_options() | {"outer_loss": loss}
    meta = ff.FOMAML(CASE.model(torch.float64), **options)
    reference = ff.reference.meta_loss(meta.model, **batch, **options, reduction=reduction)
    (actual,) = torch.autograd.grad(meta(**batch, reduction=reduction).sum(), scale)
    (expected,) = torch.autograd.grad(reference.sum(), scale)
    assert relative_error(actual, expected) < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", ["primal", "dual", "dual:1"])
def test_autocast_changes_nothing(form: str, dtype: torch.dtype) -> None:
    meta, batch = setup(replace(CASE, steps=3, momentum=0.5), torch.float32)
    inputs = [*meta.parameters(), batch["query_x"]]
    for reduction in ("mean", "none"):
        found = []
        for enabled in (False, True):
            with ff.override(forms=(form, form)), torch.autocast("cpu", dtype=dtype, enabled=enabled):
                loss = meta(**batch, reduction=reduction).sum()
            found.append([loss, *torch.autograd.grad(loss, inputs)])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_sixteen_bit_losses_are_taken_in_float32() -> None:
    meta, batch = setup(CASE, torch.float16)
    batch["query_y"][0, 0, 0] = 400.0
    per_task = meta(**batch, reduction="none")
    assert per_task.isfinite().all()
    torch.testing.assert_close(per_task.mean(), meta(**batch))


def test_changing_outputs_in_place_changes_no_gradient() -> None:
    meta, batch = setup(replace(CASE, last_activation="tanh"))
    inputs = list(meta.parameters())

    def outputs() -> Tensor:
        return meta.predict(batch["support_x"], batch["support_y"], batch["query_x"])

    expected = torch.autograd.grad((outputs() * 2).square().sum(), inputs)
    for a, b in zip(torch.autograd.grad(outputs().mul_(2).square().sum(), inputs), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_a_backward_leaves_its_cotangent_as_it_was() -> None:
    meta, batch = setup(replace(CASE, last_activation="tanh"))
    outputs = meta.predict(batch["support_x"], batch["support_y"], batch["query_x"])
    cotangent = torch.randn_like(outputs)
    before = cotangent.clone()
    torch.autograd.grad(outputs, list(meta.parameters()), cotangent)
    assert torch.equal(cotangent, before)
