"""How a parameter that each task has for itself moves: every rule of the inner loop, as torch ops on all tasks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..inner import InnerLoop
from .products import add_product_, plus_product, product

Rate = float | Tensor  # a tensor of no dimension, or for rates of elements one of the parameter's shape


class OwnParameter:
    """A parameter of which every task has its own, born with the first step: step 0 reads the shared one.

    Attributes:
        shared: what tasks start from.
        value: [T, *shape]; None before the first step.
        moved: where rates are learned, what they multiplied: of each step, or summed over steps that share a rate.
    """

    def __init__(self, shared: Tensor, inner: InnerLoop, rates: Sequence[Rate]) -> None:
        """rates: of each step, [K]."""
        self.shared, self.inner, self.rates = shared, inner, rates
        self.value: Tensor | None = None
        self.moved: list[Tensor] = []
        self.moments: list[Tensor] = []  # the velocity, or Adam's two
        self.taken = 0

    def step(self, gradient: Tensor) -> None:
        """Take the next step from the gradient [T, *shape], which may be overwritten."""
        inner, rate = self.inner, self.rates[self.taken]
        old = self.shared if self.value is None else self.value
        if inner.update == "plain":
            self._plain_step(gradient, float(rate))
            return
        if inner.weight_decay and not inner.decoupled:
            gradient = torch.add(gradient, old, alpha=inner.weight_decay)
        self.taken += 1
        direction = self._adam(gradient) if inner.optimizer == "adam" else self._velocity(gradient)
        if inner.weight_decay and inner.decoupled:
            direction = torch.add(direction, old, alpha=inner.weight_decay)
        if inner.learn_lr is not None:
            self._keep(direction)
        self.value = old - direction * rate

    def step_product(self, d: Tensor, x: Tensor) -> None:
        """Take the next step of a weight from its gradient `d.mT @ x`; d: [T, S, out].  x: [T, S, in]."""
        inner, rate = self.inner, self.rates[self.taken]
        if inner.update == "plain":
            rate = float(rate)
            keep = 1.0 - rate * self.inner.weight_decay
            if self.value is None:
                self.value = plus_product(self.shared, d.mT, x, beta=keep, alpha=-rate)
            else:
                add_product_(self.value, d.mT, x, beta=keep, alpha=-rate)
            self.taken += 1
        elif inner.update == "heavy ball":
            self._heavy_ball_step(d, x, float(rate))
        else:
            self.step(product(d.mT, x))

    def finish(self) -> None:
        """Let go of what only further steps would need."""
        self.moments.clear()

    def take_over(self, value: Tensor, velocity: Tensor | None, taken: int) -> None:
        """Go on from what another form has come to after some steps."""
        self.value, self.moments, self.taken = value, [] if velocity is None else [velocity], taken

    def displacement(self, shares: Tensor, keep: Tensor | None) -> Tensor:
        """The sum over tasks of shares [T] times how far each has moved, `theta_0 - theta_K`; of those to keep."""
        if self.value is None:
            return torch.zeros_like(self.shared)
        away = kept(self.shared - self.value, keep)
        total: Tensor = torch.tensordot(shares, away, 1)
        return total

    def squared_displacement(self) -> Tensor:
        """The square of how far each task has moved, [T]."""
        assert self.value is not None
        return (self.shared - self.value).flatten(1).square().sum(1)

    def rate_gradient(self, gradient: Tensor) -> Tensor:
        """Of rates of elements: minus what they multiplied times the query gradient, [T, *shape] both."""
        return torch.zeros_like(gradient) if not self.moved else -(self.moved[0] * gradient)

    def _plain_step(self, gradient: Tensor, rate: float) -> None:
        keep = 1.0 - rate * self.inner.weight_decay
        self.taken += 1
        if self.value is None:
            self.value = torch.sub(scaled(self.shared, keep), gradient, alpha=rate)
            return
        if keep != 1.0:
            self.value.mul_(keep)
        self.value.sub_(gradient, alpha=rate)

    def _heavy_ball_step(self, d: Tensor, x: Tensor, rate: float) -> None:
        inner = self.inner
        self.taken += 1
        if self.value is None:
            velocity = plus_product(self.shared, d.mT, x, beta=inner.weight_decay)
            self.moments.append(velocity)
            self.value = torch.sub(self.shared, velocity, alpha=rate)
            return
        velocity = self.moments[0]
        add_product_(velocity, d.mT, x, beta=inner.momentum)
        if inner.weight_decay:
            velocity.add_(self.value, alpha=inner.weight_decay)
        self.value.sub_(velocity, alpha=rate)

    def _velocity(self, gradient: Tensor) -> Tensor:
        """The direction of `torch.optim.SGD`."""
        inner = self.inner
        if not inner.momentum:
            return gradient
        velocity = torch.add(gradient, self.moments[0], alpha=inner.momentum) if self.moments else gradient
        self.moments = [velocity]
        return torch.add(gradient, velocity, alpha=inner.momentum) if inner.nesterov else velocity

    def _adam(self, gradient: Tensor) -> Tensor:
        """The direction of `torch.optim.Adam` (Kingma and Ba 2015, algorithm 1)."""
        betas, powers = self.inner.betas, (gradient, gradient.square())
        before = self.moments or [torch.zeros_like(gradient)] * 2
        self.moments = [
            torch.add(beta * moment, power, alpha=1.0 - beta)
            for moment, power, beta in zip(before, powers, betas, strict=True)
        ]
        first, second = (moment / (1.0 - beta**self.taken) for moment, beta in zip(self.moments, betas, strict=True))
        return first / second.sqrt().add(self.inner.eps)

    def _keep(self, direction: Tensor) -> None:
        if self.moved and not self.inner.learns_each_step:
            self.moved = [self.moved[0] + direction]
        else:
            self.moved = [*self.moved, direction]


def kept(values: Tensor, keep: Tensor | None) -> Tensor:
    """Values [T, ...], 0 for tasks that are not kept; keep: [T] or None for all."""
    if keep is None:
        return values
    return torch.where(keep.view(-1, *[1] * (values.dim() - 1)), values, 0.0)


def scaled(x: Tensor, factor: Rate) -> Tensor:
    """X times a factor; x itself where that is the number 1."""
    return x if isinstance(factor, float) and factor == 1.0 else x * factor


def norm_factor(squared: Tensor, bound: float) -> Tensor:
    """What `torch.nn.utils.clip_grad_norm_` multiplies gradients by, [T]."""
    return (bound / (squared.sqrt() + 1e-6)).clamp_(max=1.0)
