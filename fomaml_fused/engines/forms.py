"""The forms of a layer during adaptation, as batched torch ops: shared, primal, folding; dual ones in `dual_forms.py`.

A form answers the same questions for a chunk of T tasks; support samples are [T, S, ...], query samples [T, Q, ...]:

    forward(x, scale)        scale * Z of the support samples with the weights as they are, after the steps so far
    query(x, scale)          the same of other samples
    backward(d)              the gradient with respect to that layer's input
    step(x, d)               take the next inner step from its input X and the gradient D of its pre-activation
    squared_norm(x, d)       of each task's gradient from these, [T]
    finish()                 let go of what only the inner steps need
    displacement(shares)     how far tasks have moved, summed over tasks
    rate_gradient(x, d)      the gradient of learned rates from query samples

Every form writes to tensors of its own only: parameters and inputs stay as they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .products import add_product_, plus_product, product
from .rules import OwnParameter, Rate

if TYPE_CHECKING:
    from .dual_forms import DualFirstLayer, DualLayer


class SharedLayer:
    """A layer that never moves: all tasks' rows go through the shared weights in one product."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """weight: [out, in].  bias: [out] or None."""
        self.weight = weight
        self.bias = bias

    def forward(self, x: Tensor, scale: float) -> Tensor:
        return self._shared(x, scale)

    def query(self, x: Tensor, scale: float) -> Tensor:
        return self.forward(x, scale)

    def backward(self, d: Tensor) -> Tensor:
        return self._shared_backward(d)

    def step(self, x: Tensor, d: Tensor) -> None:
        raise AssertionError("a shared layer takes no step")

    def squared_norm(self, x: Tensor, d: Tensor) -> Tensor:
        raise AssertionError("a shared layer has no gradient")

    def finish(self) -> None:
        pass

    def adapted(self, task: slice) -> tuple[Tensor, Tensor | None]:
        """The weights [t, out, in] and biases [t, out] after the last step, of a slice of t tasks."""
        tasks = task.stop - task.start
        bias = None if self.bias is None else self.bias.expand(tasks, -1)
        return self.weight.expand(tasks, -1, -1), bias

    def displacement(self, shares: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The sum over tasks of shares [T] times `theta_0 - theta_K`, of weight and bias; of the tasks to keep."""
        return torch.zeros_like(self.weight), None if self.bias is None else torch.zeros_like(self.bias)

    def squared_displacement(self) -> Tensor | None:
        """The square of how far each task has moved, [T]; None where none does."""
        return None

    def rate_gradient(self, x: Tensor, d: Tensor) -> Tensor | None:
        """Minus the products of each task's query gradient with what its rates multiplied, [T, steps taken or 1].

        x: the layer's input on the query set, [T, Q, in].  d: the gradient of its pre-activations, [T, Q, out].
        """
        return None

    def _shared(self, x: Tensor, scale: Rate = 1.0) -> Tensor:
        """Scale * (x @ W_0.T + b_0), [T, S, out]."""
        rows = x.reshape(-1, x.shape[-1])
        if isinstance(scale, Tensor):
            return self._shared(x).mul_(scale)
        if self.bias is not None:
            z = plus_product(self.bias, rows, self.weight.t(), beta=scale, alpha=scale)
        else:
            z = _scaled_mm(rows, self.weight.t(), scale)
        return z.view(*x.shape[:-1], self.weight.shape[0])

    def _shared_backward(self, d: Tensor, scale: Rate = 1.0) -> Tensor:
        """Scale * d @ W_0, [T, S, in]."""
        return _scaled_mm(d.reshape(-1, d.shape[-1]), self.weight, scale).view(*d.shape[:-1], self.weight.shape[1])


class PrimalLayer(SharedLayer):
    """Every task has weight, bias or both in memory."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None, own_weight: OwnParameter | None, own_bias: OwnParameter | None
    ) -> None:
        """own_weight, own_bias: None for what does not move; biases are [T, 1, out]."""
        super().__init__(weight, bias)
        self.own_weight, self.own_bias = own_weight, own_bias

    def forward(self, x: Tensor, scale: float) -> Tensor:
        weight = None if self.own_weight is None else self.own_weight.value
        bias = self.bias if self.own_bias is None or self.own_bias.value is None else self.own_bias.value
        if weight is not None:
            if bias is not None:
                return plus_product(bias, x, weight.mT, beta=scale, alpha=scale)
            return times(product(x, weight.mT), scale)
        if bias is self.bias or bias is None:
            return self._shared(x, scale)
        z = product(x.reshape(-1, x.shape[-1]), self.weight.t())
        return times(z.view(*x.shape[:-1], self.weight.shape[0]).add_(bias), scale)

    def backward(self, d: Tensor) -> Tensor:
        weight = None if self.own_weight is None else self.own_weight.value
        return self._shared_backward(d) if weight is None else product(d, weight)

    def step(self, x: Tensor, d: Tensor) -> None:
        if self.own_weight is not None:
            self.own_weight.step_product(d, x)
        if self.own_bias is not None:
            self.own_bias.step(d.sum(1, keepdim=True))

    def gradients(self, x: Tensor, d: Tensor) -> dict[str, Tensor]:
        """Of each part that moves, [T, out, in] and [T, 1, out]."""
        found: dict[str, Tensor] = {}
        self.add_gradients(x, d, found)
        return found

    def add_gradients(self, x: Tensor, d: Tensor, total: dict[str, Tensor]) -> None:
        """Add to those of other samples; `total` may be empty."""
        if self.own_weight is not None:
            before = total.get("weight")
            total["weight"] = product(d.mT, x) if before is None else add_product_(before, d.mT, x)
        if self.own_bias is not None:
            summed = d.sum(1, keepdim=True)
            total["bias"] = summed if "bias" not in total else total["bias"].add_(summed)

    def squared_norm(self, x: Tensor, d: Tensor) -> Tensor:
        return squared_gradient_norm(x, d, self.own_weight is not None, self.own_bias is not None)

    def finish(self) -> None:
        for own in (self.own_weight, self.own_bias):
            if own is not None:
                own.finish()

    def adapted(self, task: slice) -> tuple[Tensor, Tensor | None]:
        weight, bias = super().adapted(task)
        if self.own_weight is not None and self.own_weight.value is not None:
            weight = self.own_weight.value[task]
        if self.own_bias is not None and self.own_bias.value is not None:
            bias = self.own_bias.value[task].squeeze(1)
        return weight, bias

    def displacement(self, shares: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor | None]:
        weight, bias = super().displacement(shares, keep)
        if self.own_weight is not None:
            weight = self.own_weight.displacement(shares, keep)
        if self.own_bias is not None:
            bias = self.own_bias.displacement(shares, keep).view(-1)
        return weight, bias

    def squared_displacement(self) -> Tensor | None:
        found = [own.squared_displacement() for own in (self.own_weight, self.own_bias) if own is not None]
        return torch.stack(found).sum(0) if found else None

    def rate_gradient(self, x: Tensor, d: Tensor) -> Tensor | None:
        products = []
        if self.own_weight is not None:
            products.append([(torch.bmm(x, moved.mT) * d).sum((1, 2)) for moved in self.own_weight.moved])
        if self.own_bias is not None:
            summed = d.sum(1, keepdim=True)
            products.append([(moved * summed).sum((1, 2)) for moved in self.own_bias.moved])
        return -torch.stack([torch.stack(p, 1) for p in products]).sum(0) if products and products[0] else None


class FoldingLayer(SharedLayer):
    """Dual up to a step, primal from there on: the history folds into weights of each task and is let go."""

    def __init__(self, dual: DualLayer | DualFirstLayer, primal: PrimalLayer, fold: int, momentum: bool) -> None:
        """dual: of the steps before `fold` alone.  primal: of all steps.  momentum: whether later steps have a past."""
        super().__init__(dual.weight, dual.bias)
        self.layer: DualLayer | DualFirstLayer | PrimalLayer = dual
        self.primal, self.fold, self.momentum = primal, fold, momentum

    def forward(self, x: Tensor, scale: float) -> Tensor:
        return self.layer.forward(x, scale)

    def query(self, x: Tensor, scale: float) -> Tensor:
        return self.layer.query(x, scale)

    def backward(self, d: Tensor) -> Tensor:
        return self.layer.backward(d)

    def step(self, x: Tensor, d: Tensor) -> None:
        self.layer.step(x, d)
        if not isinstance(self.layer, PrimalLayer) and self.layer.taken == self.fold:
            self._fold(self.layer)

    def squared_norm(self, x: Tensor, d: Tensor) -> Tensor:
        return self.layer.squared_norm(x, d)

    def finish(self) -> None:
        self.layer.finish()

    def adapted(self, task: slice) -> tuple[Tensor, Tensor | None]:
        return self.layer.adapted(task)

    def displacement(self, shares: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.layer.displacement(shares, keep)

    def squared_displacement(self) -> Tensor | None:
        return self.layer.squared_displacement()

    def _fold(self, dual: DualLayer | DualFirstLayer) -> None:
        values = dual.adapted(slice(None))
        velocities = dual.velocity() if self.momentum else (None, None)
        for own, value, velocity in zip(
            (self.primal.own_weight, self.primal.own_bias), values, velocities, strict=True
        ):
            if own is not None and value is not None:
                shape = value.shape if value.dim() == 3 else (value.shape[0], 1, -1)
                own.take_over(value.view(shape), None if velocity is None else velocity.view(shape), self.fold)
        self.layer = self.primal


def squared_gradient_norm(x: Tensor, d: Tensor, weight: bool, bias: bool) -> Tensor:
    """The square of the norm of each task's gradient `d.mT @ x`, and of its bias's, [T].

    x: [T, S, in].  d: [T, S, out].  weight, bias: which of them count.

    Gram matrices are taken in double precision: their terms may cancel where samples are much alike.
    """
    samples, before, after = x.shape[1], x.shape[2], d.shape[2]
    if weight and samples * (before + after) < before * after:
        dtype, x, d = x.dtype, x.double(), d.double()
        gram = torch.bmm(x, x.mT)  # [T, S, S]
        squared = torch.bmm(d, d.mT).mul_(gram.add_(1.0) if bias else gram).sum((1, 2)).clamp_min_(0.0)
        return squared.to(dtype)
    total = d.sum(1).square().sum(1) if bias else x.new_zeros(x.shape[0])
    return total + torch.bmm(d.mT, x).square().sum((1, 2)) if weight else total


def times(z: Tensor, scale: float) -> Tensor:
    """Z times a number, in place."""
    return z if scale == 1.0 else z.mul_(scale)


def _scaled_mm(a: Tensor, b: Tensor, scale: Rate) -> Tensor:
    if isinstance(scale, Tensor):
        return product(a, b).mul_(scale)
    return product(a, b) if scale == 1.0 else plus_product(a.new_zeros(()), a, b, beta=0.0, alpha=scale)
