"""SIREN: its modules and its initialisation are the paper's, and it meta-trains like any other network."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fomaml_fused as ff
from bench.workloads import WORKLOADS
from fomaml_fused import reference


def linears(model: nn.Sequential) -> list[nn.Linear]:
    return [layer for layer in model if isinstance(layer, nn.Linear)]


def test_it_is_a_plain_sequential_of_linear_layers_and_sines() -> None:
    model = ff.siren(2, 16, 3, hidden_layers=2, w0=20.0, w0_first=50.0)
    assert type(model) is nn.Sequential
    assert [type(layer) for layer in model] == [nn.Linear, ff.Sine] * 3 + [nn.Linear]
    assert [tuple(layer.weight.shape) for layer in linears(model)] == [(16, 2), (16, 16), (16, 16), (3, 16)]
    assert [layer.w0 for layer in model if isinstance(layer, ff.Sine)] == [50.0, 20.0, 20.0]
    assert all(p.requires_grad and p.is_leaf for p in model.parameters())
    assert len(linears(ff.siren(2, 16, 3, hidden_layers=0))) == 2
    assert [layer.w0 for layer in ff.siren(2, 16, 3) if isinstance(layer, ff.Sine)] == [30.0] * 4


@pytest.mark.parametrize(("w0", "w0_first"), [(30.0, None), (10.0, 60.0)])
def test_weights_are_uniform_within_the_bounds_of_the_paper(w0: float, w0_first: float | None) -> None:
    model = ff.siren(3, 300, 40, hidden_layers=1, w0=w0, w0_first=w0_first)
    bounds = [1 / 3, math.sqrt(6 / 300) / w0, math.sqrt(6 / 300) / w0]
    for layer, bound in zip(linears(model), bounds, strict=True):
        weights, n = layer.weight.flatten().double() / bound, layer.weight.numel()
        assert weights.abs().max() <= 1 + 1e-6
        # Kolmogorov's distance to the uniform distribution; larger than this by chance once in 10^6 draws
        place = torch.arange(1, n + 1).double() / n
        assert (place - (weights.sort().values + 1) / 2).abs().max() < 2.7 / math.sqrt(n)


def arguments(model: nn.Sequential, x: Tensor) -> list[float]:
    """The standard deviation of what each sine after the first takes the sine of."""
    found = []
    for layer in model:
        if isinstance(layer, ff.Sine):
            found.append(float((layer.w0 * x).std()))
        x = layer(x)
    return found[1:]


@torch.no_grad()
@pytest.mark.parametrize("w0", [5.0, 30.0])
def test_arguments_of_sines_keep_their_scale_through_the_depth(w0: float) -> None:
    """Section 3.2: standard normal, whatever the depth. Without biases, which are not in the paper's argument."""
    model, x = ff.siren(2, 256, 3, hidden_layers=9, w0=w0, w0_first=30.0), torch.rand(2000, 2) * 2 - 1
    for layer in linears(model):
        assert layer.bias.any()
        layer.bias.zero_()
    assert all(0.85 < std < 1.15 for std in arguments(model, x))


@pytest.mark.parametrize("outer", ["fomaml", "reptile"])
def test_it_meta_trains_with_rates_by_layer_as_the_oracle_says(outer: str) -> None:
    model = ff.siren(2, 12, 3, hidden_layers=1).double()
    options: dict[str, Any] = {"lr": [0.01, 0.002, 0.05], "steps": 3, "loss": "mse", "outer": outer}
    x, y = torch.rand(4, 50, 2, dtype=torch.float64) * 2 - 1, torch.rand(4, 50, 3, dtype=torch.float64)
    batch = (x, y) if outer == "reptile" else (x, y, x, y)
    loss = ff.FOMAML(model, **options)(*batch)
    expected = reference.meta_loss(model, *batch, **options)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    found, known = (torch.autograd.grad(value, list(model.parameters())) for value in (loss, expected))
    for gradient, other in zip(found, known, strict=True):
        assert (gradient - other).norm() <= 1e-10 * other.norm()


@pytest.mark.parametrize("name", ["meta_siren", "learnit"])
def test_workloads_of_fields_have_the_widths_they_say(name: str) -> None:
    workload = WORKLOADS[name]
    model = workload.model()
    assert [(layer.in_features, layer.out_features) for layer in linears(model)] == list(pairwise(workload.widths))
    assert linears(model)[1].weight.abs().max() < 0.01  # torch's own would reach 1 / sqrt(256) at least


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"hidden_features": 0}, ValueError, "hidden_features is 0; it takes a whole number, 1 or more"),
        ({"out_features": 2.5}, TypeError, "out_features is 2.5; it takes a whole number, 1 or more"),
        ({"in_features": True}, TypeError, "in_features is True; it takes a whole number, 1 or more"),
        ({"hidden_layers": -1}, ValueError, "hidden_layers is -1; it takes a whole number, 0 or more"),
        ({"w0": 0.0}, ValueError, "w0 is 0; it takes a positive number"),
        ({"w0": math.inf}, ValueError, "w0 is inf; it takes a finite number, not negative"),
        ({"w0_first": -30.0}, ValueError, "w0_first is -30.0; it takes a finite number, not negative"),
        ({"w0_first": "30"}, TypeError, "w0_first is '30'; it takes a number"),
    ],
)
def test_what_makes_no_network_is_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ff.siren(**{"in_features": 2, "hidden_features": 8, "out_features": 3} | options)
