"""Adapted networks: their weights, their outputs, one of them as an ordinary model."""

import pickle

import pytest
import torch

import fomaml_fused as ff

from .cases import Case, forms_within, relative_error

CASES = {
    "plain": Case(widths=(3, 17, 5, 3), steps=3, tasks=5),
    "momentum and decay": Case(widths=(3, 17, 5, 3), steps=3, tasks=5, momentum=0.9, weight_decay=0.1),
    "no bias": Case(widths=(3, 17, 3), bias=False, tasks=5),
    "body": Case(widths=(3, 17, 5, 3), adapt="body", tasks=5),
    "no step": Case(steps=0, tasks=5),
    "one layer": Case(widths=(3, 2), tasks=5, weight_decay=0.2),
}


@pytest.mark.parametrize("form", ["primal", "dual", "dual:1", "dual:2", "reference"])
@pytest.mark.parametrize("name", CASES)
def test_weights_outputs_and_single_tasks_are_the_oracles(name: str, form: str) -> None:
    case = CASES[name]
    model, batch = case.model(torch.float64), case.batch(torch.float64)
    meta = ff.FOMAML(model, **case.options(), backend="reference" if form == "reference" else "torch")
    forms = None if form == "reference" else forms_within((form,) * (len(case.widths) - 1), case.steps)
    options = case.inner_options()
    with ff.override(forms=forms, chunk=2):
        fast = meta.adapt(batch["support_x"], batch["support_y"])
    assert len(fast) == 5
    weights, outputs = fast.weights(), fast(batch["query_x"])
    assert list(weights) == [name for name, _ in model.named_parameters()]
    for t in (0, 3, -1):
        expected = ff.reference.adapt_task(model, batch["support_x"][t], batch["support_y"][t], **options)
        one = fast.task(t)
        for key, value in expected.items():
            assert relative_error(weights[key][t], value) < 1e-12
            assert relative_error(dict(one.named_parameters())[key], value) < 1e-12
        torch.testing.assert_close(one(batch["query_x"][t]), outputs[t])
    inputs = [*model.parameters(), batch["query_x"]]
    cotangent = torch.randn_like(outputs)
    actual = torch.autograd.grad(outputs, inputs, cotangent)
    oracle = ff.reference.predict(model, batch["support_x"], batch["support_y"], batch["query_x"], **options)
    for a, b in zip(actual, torch.autograd.grad(oracle, inputs, cotangent), strict=True):
        assert relative_error(a, b) < 1e-10


def test_there_is_no_task_past_the_last() -> None:
    case = CASES["plain"]
    batch = case.batch(torch.float64)
    fast = ff.FOMAML(case.model(torch.float64), **case.options()).adapt(batch["support_x"], batch["support_y"])
    for i in (5, -6):
        with pytest.raises(IndexError, match=f"task {i} of 5"):
            fast.task(i)
    with pytest.raises(ValueError, match="query_x has 2 tasks, support_x has 5"):
        fast(batch["query_x"][:2])


@pytest.mark.parametrize("form", ["primal", "dual", "dual:2", "reference"])
def test_an_adapted_network_is_a_snapshot(form: str) -> None:
    case = CASES["body"]
    model, batch = case.model(torch.float64), case.batch(torch.float64)
    meta = ff.FOMAML(model, **case.options(), backend="reference" if form == "reference" else "auto")
    with ff.override(forms=None if form == "reference" else (form,) * 3):
        fast = meta.adapt(batch["support_x"], batch["support_y"])
    before, weights = fast(batch["query_x"]).detach(), fast.weights()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2.0)
    batch["support_x"].zero_()
    assert torch.equal(fast(batch["query_x"]), before)
    assert all(torch.equal(fast.weights()[name], w) for name, w in weights.items())


def test_any_number_of_query_samples() -> None:
    case = CASES["plain"]
    batch = case.batch(torch.float64)
    fast = ff.FOMAML(case.model(torch.float64), **case.options()).adapt(batch["support_x"], batch["support_y"])
    x = torch.randn(5, 9, 3, dtype=torch.float64)
    torch.testing.assert_close(torch.cat([fast(x[:, :2]), fast(x[:, 2:])], 1), fast(x))


@pytest.mark.parametrize("form", ["primal", "dual", "dual:2"])
def test_adapted_networks_can_be_pickled_and_outlive_a_change_of_dtype(form: str) -> None:
    case = CASES["plain"]
    batch = case.batch(torch.float32)
    meta = ff.FOMAML(case.model(torch.float32), **case.options())
    with ff.override(forms=(form,) * 3):
        fast = meta.adapt(batch["support_x"], batch["support_y"])
    expected = fast(batch["query_x"])
    assert torch.equal(pickle.loads(pickle.dumps(fast))(batch["query_x"]), expected)
    meta.double()
    assert torch.equal(fast(batch["query_x"]), expected)
    with pytest.raises(TypeError, match=r"query_x is torch\.float64"):
        fast(batch["query_x"].double())


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_no_task_adapts_to_no_network(backend: str) -> None:
    case = CASES["plain"]
    batch = case.batch(torch.float64)
    meta = ff.FOMAML(case.model(torch.float64), **case.options(), backend=backend)
    fast = meta.adapt(batch["support_x"][:0], batch["support_y"][:0])
    assert fast.weights()["0.weight"].shape == (0, 17, 3)
    assert fast(batch["query_x"][:0]).shape == (0, 4, 3)
