"""The oracle itself, against what defines it: MAML's chain rule, finite differences, torch.optim and hand-made sums."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev

from fomaml_fused import reference

from .cases import Case

STEPS, RATE = 3, 0.15


@pytest.fixture
def network() -> tuple[nn.Module, Tensor, dict[str, Tensor]]:
    """A small network, its parameters as one vector, one task in float64."""
    case = Case(widths=(2, 4, 3), activation="tanh", loss="cross_entropy", tasks=1, seed=5)
    model, batch = case.model(torch.float64), case.batch(torch.float64)
    theta = torch.cat([p.detach().flatten() for p in model.parameters()])
    return model, theta, {name: t[0].detach() for name, t in batch.items()}


def loss_at(model: nn.Module, theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The loss as a function of all parameters as one vector."""
    named = dict(model.named_parameters())
    pieces: tuple[Tensor, ...] = theta.split([p.numel() for p in named.values()])
    weights = {n: piece.view(p.shape) for piece, (n, p) in zip(pieces, named.items(), strict=True)}
    return F.cross_entropy(functional_call(model, weights, (x,)), y)


def meta_gradient(model: nn.Module, task: dict[str, Tensor], *, first_order: bool) -> Tensor:
    batch: dict[str, Any] = {name: t.unsqueeze(0) for name, t in task.items()}
    loss = reference.meta_loss(
        model, **batch, lr=RATE, steps=STEPS, loss="cross_entropy", reduction="mean", first_order=first_order
    )
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def test_fomaml_is_maml_with_the_hessians_dropped(network: tuple[nn.Module, Tensor, dict[str, Tensor]]) -> None:
    model, theta_0, task = network

    def support_loss(theta: Tensor) -> Tensor:
        return loss_at(model, theta, task["support_x"], task["support_y"])

    def query_loss(theta: Tensor) -> Tensor:
        return loss_at(model, theta, task["query_x"], task["query_y"])

    def step(theta: Tensor) -> Tensor:
        gradient: Tensor = jacrev(support_loss)(theta)
        return theta - RATE * gradient

    identity = torch.eye(theta_0.numel(), dtype=torch.float64)
    # The derivative of a vector with respect to itself, where the chain rule starts: why theta_0 disappears from it.
    torch.testing.assert_close(jacrev(lambda theta: theta)(theta_0), identity)

    theta, factors = theta_0, []
    for _ in range(STEPS):
        factor = identity - RATE * hessian(support_loss)(theta)
        torch.testing.assert_close(jacrev(step)(theta), factor)  # one step's Jacobian
        factors.append(factor)
        theta = step(theta)
    q = jacrev(query_loss)(theta)

    exact = q
    for factor in reversed(factors):  # the last step's factor acts first
        exact = factor.T @ exact
    torch.testing.assert_close(meta_gradient(model, task, first_order=False), exact, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(meta_gradient(model, task, first_order=True), q, rtol=1e-10, atol=1e-12)
    assert (exact - q).norm() > 0.05 * q.norm()  # the two differ, so the test above can tell them apart


def test_the_exact_meta_gradient_is_the_derivative_of_the_meta_loss(
    network: tuple[nn.Module, Tensor, dict[str, Tensor]],
) -> None:
    model, theta_0, task = network
    gradient, direction = meta_gradient(model, task, first_order=False), torch.randn_like(theta_0)

    def meta_loss(theta: Tensor) -> float:
        for _ in range(STEPS):
            theta = theta - RATE * jacrev(lambda t: loss_at(model, t, task["support_x"], task["support_y"]))(theta)
        return float(loss_at(model, theta, task["query_x"], task["query_y"]))

    h = 1e-6
    finite = (meta_loss(theta_0 + h * direction) - meta_loss(theta_0 - h * direction)) / (2 * h)
    assert finite == pytest.approx(float(gradient @ direction), rel=1e-7)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_inner_steps_are_those_of_torch_sgd(momentum: float, weight_decay: float) -> None:
    case = Case(steps=4, tasks=1)
    model, twin, batch = case.model(torch.float64), case.model(torch.float64), case.batch(torch.float64)
    x, y = batch["support_x"][0], batch["support_y"][0]
    sgd = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=momentum, weight_decay=weight_decay)
    for _ in range(4):
        sgd.zero_grad()
        F.mse_loss(twin(x), y).backward()
        sgd.step()
    fast = reference.adapt_task(model, x, y, lr=0.1, steps=4, loss="mse", momentum=momentum, weight_decay=weight_decay)
    for name, expected in twin.named_parameters():
        torch.testing.assert_close(fast[name], expected, rtol=1e-12, atol=1e-12)


def test_a_weight_is_a_count() -> None:
    outputs, targets = torch.randn(4, 3), torch.randint(3, (4,))
    weight = torch.tensor([1.0, 0.0, 2.0, 1.0])
    repeated = F.cross_entropy(outputs[[0, 2, 2, 3]], targets[[0, 2, 2, 3]])
    torch.testing.assert_close(reference.mean_loss("cross_entropy", outputs, targets, weight), repeated)


def test_tasks_are_averaged_and_samples_too() -> None:
    """The two classic mistakes: a loss averaged over the batch of tasks divides the inner rate by T, one summed over
    samples multiplies it by S.
    """
    case = Case(tasks=3, steps=1)
    model, batch = case.model(torch.float64), case.batch(torch.float64)
    values = []
    for t in range(3):
        fast = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
        loss = (functional_call(model, fast, (batch["support_x"][t],)) - batch["support_y"][t]).square().sum() / 25
        gradients = torch.autograd.grad(loss, list(fast.values()))
        fast = {name: p - 0.1 * g for (name, p), g in zip(fast.items(), gradients, strict=True)}
        values.append(F.mse_loss(functional_call(model, fast, (batch["query_x"][t],)), batch["query_y"][t]))
    batch.pop("query_x")
    actual = reference.meta_loss(model, **batch, query_x=case.batch(torch.float64)["query_x"], lr=0.1, steps=1)
    torch.testing.assert_close(actual, torch.stack(values).mean())
