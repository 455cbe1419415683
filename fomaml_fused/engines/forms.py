"""The forms of a layer during adaptation, as batched torch ops: shared, primal, dual (a first layer's apart), folding.

A form answers the same questions for a chunk of T tasks; support samples are [T, S, ...], query samples [T, Q, ...]:

    forward(x, k)     Z of the support samples with the weights after k steps
    backward(d, k)    the gradient with respect to that layer's input
    step(x, d, k)     take inner step k from its input X and the gradient D of its pre-activation
    finish()          let go of what only the inner steps need
    query(x)          Z with the weights after the last step
    query_backward(d) the gradient with respect to that input

Every form writes to tensors of its own only: parameters and inputs stay as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .coefficients import coefficients


class SharedLayer:
    """A layer that never moves: all tasks' rows go through the shared weights in one product."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """weight: [out, in].  bias: [out] or None."""
        self.weight = weight
        self.bias = bias

    def forward(self, x: Tensor, k: int) -> Tensor:
        return self._shared(x)

    def backward(self, d: Tensor, k: int) -> Tensor:
        return self._shared_backward(d)

    def step(self, x: Tensor, d: Tensor, k: int) -> None:
        raise AssertionError("a shared layer takes no step")

    def finish(self) -> None:
        pass

    def query(self, x: Tensor) -> Tensor:
        return self._shared(x)

    def query_backward(self, d: Tensor) -> Tensor:
        return self._shared_backward(d)

    def adapted(self, task: slice) -> tuple[Tensor, Tensor | None]:
        """The weights [t, out, in] and biases [t, out] after the last step, of a slice of t tasks."""
        tasks = task.stop - task.start
        bias = None if self.bias is None else self.bias.expand(tasks, -1)
        return self.weight.expand(tasks, -1, -1), bias

    def _shared(self, x: Tensor, scale: float = 1.0) -> Tensor:
        """Scale * (x @ W_0.T + b_0), [T, S, out]."""
        rows = x.reshape(-1, x.shape[-1])
        if self.bias is not None:
            z = torch.addmm(self.bias, rows, self.weight.t(), beta=scale, alpha=scale)
        else:
            z = _scaled_mm(rows, self.weight.t(), scale)
        return z.view(*x.shape[:-1], -1)

    def _shared_backward(self, d: Tensor, scale: float = 1.0) -> Tensor:
        """Scale * d @ W_0, [T, S, in]."""
        return _scaled_mm(d.reshape(-1, d.shape[-1]), self.weight, scale).view(*d.shape[:-1], -1)

    def _sum(self, scale: float, inputs: Tensor, gradients: Tensor, sign: float) -> tuple[Tensor, Tensor | None]:
        """Scale * W_0 + sign * gradients.T @ inputs, [t, out, in], and the bias alike, [t, out].

        inputs: [t, N, in].  gradients: [t, N, out].
        """
        weight = torch.baddbmm(self.weight, gradients.mT, inputs, beta=scale, alpha=sign)
        return weight, None if self.bias is None else torch.add(scale * self.bias, gradients.sum(1), alpha=sign)


class PrimalLayer(SharedLayer):
    """Every task has its own weights in memory, born with the first step: step 0 reads the shared ones."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None, rates: tuple[float, ...], momentum: float, weight_decay: float
    ) -> None:
        super().__init__(weight, bias)
        self.rates, self.momentum, self.weight_decay = rates, momentum, weight_decay
        self.fast_weight: Tensor | None = None  # [T, out, in]
        self.fast_bias: Tensor | None = None  # [T, 1, out]
        self.weight_velocity: Tensor | None = None
        self.bias_velocity: Tensor | None = None

    def forward(self, x: Tensor, k: int) -> Tensor:
        return self.query(x)

    def backward(self, d: Tensor, k: int) -> Tensor:
        return self.query_backward(d)

    def step(self, x: Tensor, d: Tensor, k: int) -> None:
        if self.momentum and len(self.rates) > 1:
            self._momentum_step(x, d, self.rates[k])
            return
        rate = self.rates[k]
        keep = 1.0 - rate * self.weight_decay
        if self.fast_weight is None:
            self.fast_weight = torch.baddbmm(self.weight, d.mT, x, beta=keep, alpha=-rate)
            if self.bias is not None:
                self.fast_bias = torch.sub(_scaled(self.bias, keep), d.sum(1, keepdim=True), alpha=rate)
            return
        self.fast_weight.baddbmm_(d.mT, x, beta=keep, alpha=-rate)
        if self.fast_bias is not None:
            _scale_(self.fast_bias, keep).sub_(d.sum(1, keepdim=True), alpha=rate)

    def _momentum_step(self, x: Tensor, d: Tensor, rate: float) -> None:
        if self.fast_weight is None:
            self.weight_velocity = torch.baddbmm(self.weight, d.mT, x, beta=self.weight_decay)
            self.fast_weight = torch.sub(self.weight, self.weight_velocity, alpha=rate)
            if self.bias is not None:
                self.bias_velocity = torch.add(d.sum(1, keepdim=True), self.bias, alpha=self.weight_decay)
                self.fast_bias = torch.sub(self.bias, self.bias_velocity, alpha=rate)
            return
        assert self.weight_velocity is not None
        self.weight_velocity.baddbmm_(d.mT, x, beta=self.momentum)
        if self.weight_decay:
            self.weight_velocity.add_(self.fast_weight, alpha=self.weight_decay)
        self.fast_weight.sub_(self.weight_velocity, alpha=rate)
        if self.fast_bias is not None:
            assert self.bias_velocity is not None
            self.bias_velocity.mul_(self.momentum).add_(d.sum(1, keepdim=True))
            if self.weight_decay:
                self.bias_velocity.add_(self.fast_bias, alpha=self.weight_decay)
            self.fast_bias.sub_(self.bias_velocity, alpha=rate)

    def take_over(self, dual: DualLayer | DualFirstLayer, k: int) -> None:
        """Go on from what a dual layer has come to after k steps."""
        self.fast_weight, bias = dual.adapted(slice(None))
        self.fast_bias = None if bias is None else bias.unsqueeze(1)
        if self.momentum and k < len(self.rates):
            self.weight_velocity, bias = dual.velocity()
            self.bias_velocity = None if bias is None else bias.unsqueeze(1)

    def finish(self) -> None:
        self.weight_velocity = self.bias_velocity = None

    def query(self, x: Tensor) -> Tensor:
        if self.fast_weight is None:
            return self._shared(x)
        if self.fast_bias is None:
            return torch.bmm(x, self.fast_weight.mT)
        return torch.baddbmm(self.fast_bias, x, self.fast_weight.mT)

    def query_backward(self, d: Tensor) -> Tensor:
        return self._shared_backward(d) if self.fast_weight is None else torch.bmm(d, self.fast_weight)

    def adapted(self, task: slice) -> tuple[Tensor, Tensor | None]:
        if self.fast_weight is None:
            return super().adapted(task)
        return self.fast_weight[task], None if self.fast_bias is None else self.fast_bias[task].squeeze(1)


class DualLayer(SharedLayer):
    """No task has weights: the shared ones serve all, and each task's own history of (X_j, D_j) corrects them.

        Z  = s_k (X W_0ᵀ + b_0) - sum_j c_{k,j} (X X_jᵀ + 1) D_j
        dX = s_k  D W_0         - sum_j c_{k,j} (D D_jᵀ) X_j

    The history is [T, K * S, ...], the steps one after the other, so that a sum over j is one batched product.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        rates: tuple[float, ...],
        momentum: float,
        weight_decay: float,
        tasks: int,
        shots: int,
    ) -> None:
        super().__init__(weight, bias)
        self.steps, self.shots = len(rates), shots
        self.coefficients = coefficients(rates, momentum, weight_decay)
        self.inputs = weight.new_empty(tasks, self.steps * shots, weight.shape[1])  # X_j: [T, K * S, in]
        self.gradients = weight.new_empty(tasks, self.steps * shots, weight.shape[0])  # D_j: [T, K * S, out]
        self.history_weights: Tensor | None = None  # c_{k,j} for every sample of step j: [K + 1, K * S]
        if momentum or not self.coefficients.settled:  # a velocity needs the gradients as they came
            rows = [row + (0.0,) * (self.steps - len(row)) for row in self.coefficients.history]
            self.history_weights = weight.new_tensor(rows).repeat_interleave(shots, dim=1)

    def forward(self, x: Tensor, k: int) -> Tensor:
        z = self._shared(x, self.coefficients.shared[k])
        if k == 0:
            return z
        inputs, gradients = self._past(k)
        gram = torch.bmm(x, inputs.mT)  # [T, S, k * S]
        if self.bias is not None:
            gram.add_(1.0)
        return z.baddbmm_(self._weigh(gram, k), gradients, alpha=-1.0)

    def backward(self, d: Tensor, k: int) -> Tensor:
        dx = self._shared_backward(d, self.coefficients.shared[k])
        if k == 0:
            return dx
        inputs, gradients = self._past(k)
        gram = torch.bmm(d, gradients.mT)  # [T, S, k * S]
        return dx.baddbmm_(self._weigh(gram, k), inputs, alpha=-1.0)

    def step(self, x: Tensor, d: Tensor, k: int) -> None:
        start = k * self.shots
        self.inputs.narrow(1, start, self.shots).copy_(x)
        gradients = self.gradients.narrow(1, start, self.shots).copy_(d)
        if self.history_weights is None:  # then the history carries its rate and never has to be weighed again
            gradients.mul_(self.coefficients.history[-1][k])

    def query(self, x: Tensor) -> Tensor:
        return self.forward(x, self.steps)

    def query_backward(self, d: Tensor) -> Tensor:
        return self.backward(d, self.steps)

    def adapted(self, task: slice) -> tuple[Tensor, Tensor | None]:
        gradients = self.gradients[task]
        if self.history_weights is not None:
            gradients = gradients * self.history_weights[-1, :, None]
        return self._sum(self.coefficients.shared[-1], self.inputs[task], gradients, -1.0)

    def velocity(self) -> tuple[Tensor, Tensor | None]:
        """What the last step multiplied by its rate: weights [T, out, in] and biases [T, out]."""
        weights = self.gradients.new_tensor(self.coefficients.velocity_history[-1]).repeat_interleave(self.shots)
        return self._sum(self.coefficients.velocity_shared[-1], self.inputs, self.gradients * weights[:, None], 1.0)

    def _past(self, k: int) -> tuple[Tensor, Tensor]:
        """Inputs [T, k * S, in] and gradients [T, k * S, out] of the steps before k."""
        return self.inputs.narrow(1, 0, k * self.shots), self.gradients.narrow(1, 0, k * self.shots)

    def _weigh(self, gram: Tensor, k: int) -> Tensor:
        """Multiply the columns of step j by c_{k,j}, in place; [T, ..., k * S]."""
        return gram if self.history_weights is None else gram.mul_(self.history_weights[k, : gram.shape[-1]])


class DualFirstLayer(SharedLayer):
    """The dual form of a layer whose support input never changes: history and products collapse.

    `X W_0ᵀ` and the Gram matrix `X Xᵀ` are computed once, and the history is one matrix `H = sum_j c_{k,j} D_j`, which
    follows the recurrence of SGD itself.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        rates: tuple[float, ...],
        momentum: float,
        weight_decay: float,
        support: Tensor,
    ) -> None:
        """support: the layer's input on the support set at every step, [T, S, in]."""
        super().__init__(weight, bias)
        self.rates, self.momentum, self.weight_decay = rates, momentum, weight_decay
        self.coefficients = coefficients(rates, momentum, weight_decay)
        self.support = support
        self.shared_z: Tensor | None = self._shared(support)  # [T, S, out]
        self.gram: Tensor | None = self._gram(support)  # [T, S, S]
        self.history: Tensor | None = None  # H: [T, S, out]
        self.summed_velocity: Tensor | None = None  # sum_j vc_{k,j} D_j: [T, S, out]

    def forward(self, x: Tensor, k: int) -> Tensor:
        assert self.shared_z is not None
        assert self.gram is not None
        if self.history is None:
            return self.shared_z.clone()
        return torch.baddbmm(self.shared_z, self.gram, self.history, beta=self.coefficients.shared[k], alpha=-1.0)

    def backward(self, d: Tensor, k: int) -> Tensor:
        raise AssertionError("nothing below the first adapted layer moves")

    def step(self, x: Tensor, d: Tensor, k: int) -> None:
        rate = self.rates[k]
        if self.history is None:
            self.history = d * rate
            if self.momentum or self.weight_decay:
                self.summed_velocity = d.clone()
            return
        if self.summed_velocity is None:
            self.history.add_(d, alpha=rate)
            return
        self.summed_velocity.mul_(self.momentum).add_(d)
        if self.weight_decay:
            self.summed_velocity.sub_(self.history, alpha=self.weight_decay)
        self.history.add_(self.summed_velocity, alpha=rate)

    def finish(self) -> None:
        self.shared_z = self.gram = self.summed_velocity = None

    def query(self, x: Tensor) -> Tensor:
        z = self._shared(x, self.coefficients.shared[-1])
        assert self.history is not None
        return z.baddbmm_(self._gram(x), self.history, alpha=-1.0)

    def query_backward(self, d: Tensor) -> Tensor:
        assert self.history is not None
        dx = self._shared_backward(d, self.coefficients.shared[-1])
        return dx.baddbmm_(torch.bmm(d, self.history.mT), self.support, alpha=-1.0)

    def adapted(self, task: slice) -> tuple[Tensor, Tensor | None]:
        assert self.history is not None
        return self._sum(self.coefficients.shared[-1], self.support[task], self.history[task], -1.0)

    def velocity(self) -> tuple[Tensor, Tensor | None]:
        assert self.summed_velocity is not None
        return self._sum(self.coefficients.velocity_shared[-1], self.support, self.summed_velocity, 1.0)

    def _gram(self, x: Tensor) -> Tensor:
        """X X_supportᵀ, + 1 for the bias; [T, S or Q, S]."""
        gram = torch.bmm(x, self.support.mT)
        return gram if self.bias is None else gram.add_(1.0)


class FoldingLayer(SharedLayer):
    """Dual up to a step, primal from there on: the history folds into weights of each task and is let go."""

    def __init__(self, dual: DualLayer | DualFirstLayer, primal: PrimalLayer, fold: int) -> None:
        """dual: of the steps before `fold` alone.  primal: of all steps."""
        super().__init__(dual.weight, dual.bias)
        self.layer: DualLayer | DualFirstLayer | PrimalLayer = dual
        self.primal, self.fold = primal, fold

    def forward(self, x: Tensor, k: int) -> Tensor:
        return self.layer.forward(x, k)

    def backward(self, d: Tensor, k: int) -> Tensor:
        return self.layer.backward(d, k)

    def step(self, x: Tensor, d: Tensor, k: int) -> None:
        self.layer.step(x, d, k)
        if k + 1 == self.fold:
            assert not isinstance(self.layer, PrimalLayer)
            self.primal.take_over(self.layer, self.fold)
            self.layer = self.primal

    def finish(self) -> None:
        self.layer.finish()

    def query(self, x: Tensor) -> Tensor:
        return self.layer.query(x)

    def query_backward(self, d: Tensor) -> Tensor:
        return self.layer.query_backward(d)

    def adapted(self, task: slice) -> tuple[Tensor, Tensor | None]:
        return self.layer.adapted(task)


def _scaled_mm(a: Tensor, b: Tensor, scale: float) -> Tensor:
    if scale == 1.0:
        return torch.mm(a, b)
    return torch.addmm(a.new_zeros(()), a, b, beta=0, alpha=scale)


def _scaled(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1.0 else x * factor


def _scale_(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1.0 else x.mul_(factor)
