"""The closed forms of docs/math.md, each on its own, against plain SGD in float64."""

import pytest
import torch
from torch import Tensor

from fomaml_fused.engines.coefficients import coefficients, tensor_coefficients

S, Q, IN, OUT = 4, 3, 6, 5


def history(steps: int) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """W_0 [OUT, IN], b_0 [OUT], and inputs X_j [S, IN] and gradients D_j [S, OUT] of every step."""
    torch.set_default_dtype(torch.float64)
    try:
        xs, ds = [torch.randn(S, IN) for _ in range(steps)], [torch.randn(S, OUT) for _ in range(steps)]
        return torch.randn(OUT, IN), torch.randn(OUT), xs, ds
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
@pytest.mark.parametrize(("weight_decay", "decoupled"), [(0.0, False), (0.1, False), (0.1, True)])
@pytest.mark.parametrize("rates", [(), (0.1,), (0.1, 0.2, 0.0, 0.3)])
def test_coefficients_give_the_weights_that_torch_sgd_gives(
    rates: tuple[float, ...], momentum: float, nesterov: bool, weight_decay: float, decoupled: bool
) -> None:
    w0, b0, xs, ds = history(len(rates))
    weight, bias = w0.clone().requires_grad_(), b0.clone().requires_grad_()
    decay = 0.0 if decoupled else weight_decay
    sgd = torch.optim.SGD([weight, bias], lr=1.0, momentum=momentum, weight_decay=decay, nesterov=nesterov)
    found = coefficients(rates, momentum, weight_decay, nesterov, decoupled)
    for k in range(len(rates) + 1):
        s, c = found.shared[k], found.history[k]
        dual = s * w0 - sum(c[j] * ds[j].T @ xs[j] for j in range(k))
        torch.testing.assert_close(dual, weight.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(s * b0 - sum(c[j] * ds[j].sum(0) for j in range(k)), bias.detach())
        if k < len(rates):
            before = weight.detach().clone(), bias.detach().clone()
            sgd.param_groups[0]["lr"] = rates[k]
            weight.grad, bias.grad = ds[k].T @ xs[k], ds[k].sum(0)
            sgd.step()
            if decoupled:  # torch has it for AdamW alone: the weights before the step shrink by themselves
                with torch.no_grad():
                    for parameter, old in zip((weight, bias), before, strict=True):
                        parameter -= rates[k] * weight_decay * old
            us, uc = found.direction_shared[k + 1], found.direction_history[k + 1]
            moved = rates[k] * (us * w0 + sum(uc[j] * ds[j].T @ xs[j] for j in range(k + 1)))
            torch.testing.assert_close(before[0] - weight.detach(), moved, rtol=1e-12, atol=1e-12)
            if momentum:
                vs, vc = found.velocity_shared[k + 1], found.velocity_history[k + 1]
                velocity = vs * w0 + sum(vc[j] * ds[j].T @ xs[j] for j in range(k + 1))
                torch.testing.assert_close(velocity, sgd.state[weight]["momentum_buffer"], rtol=1e-12, atol=1e-12)


def test_the_direction_is_the_velocity_of_plain_momentum() -> None:
    found = coefficients((0.1, 0.2, 0.3), 0.9, 0.1)
    assert found.direction_shared == found.velocity_shared
    assert found.direction_history == found.velocity_history


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
@pytest.mark.parametrize(("weight_decay", "decoupled"), [(0.0, False), (0.1, False), (0.1, True)])
@pytest.mark.parametrize("layers", [((0.1, 0.2, 0.0, 0.3), (0.3, 0.0, 0.1, 0.1)), ((0.5,),), ((), ())])
def test_coefficients_of_rates_in_a_tensor_are_those_of_numbers(
    layers: tuple[tuple[float, ...], ...], momentum: float, nesterov: bool, weight_decay: float, decoupled: bool
) -> None:
    rates = torch.tensor(layers, dtype=torch.float64).T
    found = tensor_coefficients(rates, momentum, weight_decay, nesterov, decoupled)
    for i, layer in enumerate(layers):
        expected = coefficients(layer, momentum, weight_decay, nesterov, decoupled)
        for name in ("shared", "velocity_shared", "direction_shared"):
            torch.testing.assert_close(getattr(found, name)[:, i].tolist(), list(getattr(expected, name)))
        for name in ("history", "velocity_history", "direction_history"):
            rows = [list(row) + [0.0] * (len(layer) - len(row)) for row in getattr(expected, name)]
            torch.testing.assert_close(getattr(found, name)[:, i].tolist(), rows)


def test_plain_sgd_settles() -> None:
    assert coefficients((0.1, 0.2, 0.3), 0.0, 0.0).settled
    assert coefficients((0.1,), 0.9, 0.0).settled
    assert not coefficients((0.1, 0.2), 0.9, 0.0).settled
    assert not coefficients((0.1,), 0.0, 0.1).settled


def test_the_dual_form_of_forward_and_backward() -> None:
    w0, b0, xs, ds = history(3)
    found = coefficients((0.1, 0.2, 0.3), 0.9, 0.1)
    s, c = found.shared[3], found.history[3]
    weight = s * w0 - sum(c[j] * ds[j].T @ xs[j] for j in range(3))
    bias = s * b0 - sum(c[j] * ds[j].sum(0) for j in range(3))
    x, d = torch.randn(Q, IN, dtype=torch.float64), torch.randn(Q, OUT, dtype=torch.float64)
    z = s * (x @ w0.T + b0) - sum(c[j] * (x @ xs[j].T + 1) @ ds[j] for j in range(3))
    dx = s * d @ w0 - sum(c[j] * (d @ ds[j].T) @ xs[j] for j in range(3))
    torch.testing.assert_close(z, x @ weight.T + bias)
    torch.testing.assert_close(dx, d @ weight)


def test_the_history_of_the_first_layer_collapses() -> None:
    _, _, (x, *_), ds = history(3)
    c = coefficients((0.1, 0.2, 0.3), 0.9, 0.1).history[3]
    collapsed = sum(c[j] * ds[j] for j in range(3))
    torch.testing.assert_close(sum(c[j] * (x @ x.T + 1) @ ds[j] for j in range(3)), (x @ x.T + 1) @ collapsed)


def test_products_with_a_gradient_come_from_gram_matrices() -> None:
    _, _, (x, xq, *_), (d, dq, *_) = history(2)
    inner = (dq.T @ xq * (d.T @ x)).sum() + dq.sum(0) @ d.sum(0)
    torch.testing.assert_close(((xq @ x.T + 1) * (dq @ d.T)).sum(), inner)
    norm = (d.T @ x).square().sum() + d.sum(0).square().sum()
    torch.testing.assert_close(((x @ x.T + 1) * (d @ d.T)).sum(), norm)


def test_the_gradient_of_a_rate_and_of_reptile_come_from_the_history() -> None:
    w0, _, xs, ds = history(3)
    rates = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64, requires_grad=True)
    weight, velocity, velocities = w0, torch.zeros_like(w0), []
    for k in range(3):  # first order: what the rate multiplies is a constant
        velocity = (0.9 * velocity + ds[k].T @ xs[k] + 0.1 * weight.detach()).detach()
        velocities.append(velocity)
        weight = weight - rates[k] * velocity
    q = torch.randn(OUT, IN, dtype=torch.float64)
    (expected,) = torch.autograd.grad((weight * q).sum(), rates)
    torch.testing.assert_close(torch.stack([-(q * v).sum() for v in velocities]), expected)
    found = coefficients((0.1, 0.2, 0.3), 0.9, 0.1)
    s, c = found.shared[3], found.history[3]
    reptile = (1 - s) * w0 + sum(c[j] * ds[j].T @ xs[j] for j in range(3))
    torch.testing.assert_close(reptile, (w0 - weight).detach())
