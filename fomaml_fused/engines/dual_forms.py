"""The dual forms of a layer, as batched torch ops: adapted weights never exist, histories correct the shared ones."""

from __future__ import annotations

import torch
from torch import Tensor

from ..inner import InnerLoop
from .coefficients import Coefficients, LearnedCoefficients
from .forms import SharedLayer, squared_gradient_norm, times
from .rules import Rate, kept


class HistoryLayer(SharedLayer):
    """What the two dual forms share: a history (X, A) with which the weights are `s_k W_0 - A.T @ X`.

    Attributes:
        numbers: the coefficients of each step.
        taken: inner steps so far.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        inner: InnerLoop,
        numbers: Coefficients | LearnedCoefficients,
        bias_moves: bool,
    ) -> None:
        super().__init__(weight, bias)
        self.inner, self.numbers = inner, numbers
        self.bias_moves = bias_moves and bias is not None
        self.taken = 0

    def weighed(self) -> tuple[Tensor, Tensor]:
        """The history as it counts now: X [T, N, in] and A [T, N, out]."""
        raise NotImplementedError

    def squared_norm(self, x: Tensor, d: Tensor) -> Tensor:
        return squared_gradient_norm(x, d, True, self.bias_moves)

    def adapted(self, task: slice) -> tuple[Tensor, Tensor | None]:
        inputs, gradients = self.weighed()
        return self._sum(self._scale(), inputs[task], gradients[task], -1.0)

    def displacement(self, shares: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor | None]:
        inputs, gradients = (kept(t, keep) for t in self.weighed())
        rows = (gradients * shares[:, None, None]).flatten(0, 1)
        weight, bias = rows.t() @ inputs.flatten(0, 1), rows.sum(0)
        if self.inner.weight_decay:
            away = (1.0 - self._scale()) * shares.sum()
            weight = weight + away * self.weight
            bias = bias if self.bias is None else bias + away * self.bias
        if self.bias is None:
            return weight, None
        return weight, bias if self.bias_moves else torch.zeros_like(self.bias)

    def squared_displacement(self) -> Tensor:
        inputs, gradients = self.weighed()
        squared = squared_gradient_norm(inputs, gradients, True, self.bias_moves)
        if self.inner.weight_decay:
            away = 1.0 - self._scale()
            length = self.weight.square().sum()
            if self.bias_moves and self.bias is not None:
                length = length + self.bias.square().sum()
            squared = squared + away * (2.0 * (gradients * self._moving_part(inputs)).sum((1, 2)) + away * length)
        return squared

    def _scale(self) -> Rate:
        """S after the steps so far."""
        return self.numbers.shared[self.taken]

    def _shared(self, x: Tensor, scale: Rate = 1.0) -> Tensor:
        if self.bias is None or self.bias_moves or (isinstance(scale, float) and scale == 1.0):
            return super()._shared(x, scale)
        return self._moving_part(x).mul_(scale).add_(self.bias)

    def _moving_part(self, x: Tensor) -> Tensor:
        """X times the shared weights, and the bias if it moves; [T, N, out]."""
        if self.bias_moves:
            return super()._shared(x)
        return torch.mm(x.reshape(-1, x.shape[-1]), self.weight.t()).view(*x.shape[:-1], self.weight.shape[0])

    def _sum(self, scale: Rate, inputs: Tensor, gradients: Tensor, sign: float) -> tuple[Tensor, Tensor | None]:
        """Scale * W_0 + sign * gradients.T @ inputs, [t, out, in], and the bias alike, [t, out].

        inputs: [t, N, in].  gradients: [t, N, out].
        """
        if isinstance(scale, Tensor):
            weight = torch.baddbmm(scale * self.weight, gradients.mT, inputs, alpha=sign)
        else:
            weight = torch.baddbmm(self.weight, gradients.mT, inputs, beta=scale, alpha=sign)
        if self.bias is None:
            return weight, None
        if not self.bias_moves:
            return weight, self.bias.expand(len(inputs), -1)
        return weight, torch.add(scale * self.bias, gradients.sum(1), alpha=sign)

    def _rate_gradient(self, products: Tensor, x: Tensor, d: Tensor) -> Tensor:
        """From products [T, steps so far] of each task's query gradient with the gradients of its steps."""
        numbers = self.numbers
        assert isinstance(numbers, LearnedCoefficients)
        found = products @ numbers.direction_history[1 : self.taken + 1, : self.taken].t()
        if self.inner.weight_decay:
            shared = (d * self._moving_part(x)).sum((1, 2))
            found = torch.addr(found, shared, numbers.direction_shared[1 : self.taken + 1])
        return -(found if self.inner.learns_each_step else found.sum(1, keepdim=True))


class DualLayer(HistoryLayer):
    """No task has weights: the shared ones serve all, and each task's own history of (X_j, D_j) corrects them.

        Z  = s_k (X W_0ᵀ + b_0) - sum_j c_{k,j} (X X_jᵀ + 1) D_j
        dX = s_k  D W_0         - sum_j c_{k,j} (D D_jᵀ) X_j

    The history is [T, K * S, ...], the steps one after the other, so that a sum over j is one batched product.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        inner: InnerLoop,
        numbers: Coefficients | LearnedCoefficients,
        bias_moves: bool,
        steps: int,
        tasks: int,
        shots: int,
    ) -> None:
        super().__init__(weight, bias, inner, numbers, bias_moves)
        self.shots = shots
        self.inputs = weight.new_empty(tasks, steps * shots, weight.shape[1])  # X_j: [T, K * S, in]
        self.gradients = weight.new_empty(tasks, steps * shots, weight.shape[0])  # D_j: [T, K * S, out]
        self.history_weights: Tensor | None = None  # c_{k,j} for every sample of step j: [K + 1, K * S]
        if isinstance(numbers, LearnedCoefficients):
            self.history_weights = numbers.history.repeat_interleave(shots, dim=1)
        elif inner.momentum or not numbers.settled:  # a velocity needs the gradients as they came
            rows = [row + (0.0,) * (steps - len(row)) for row in numbers.history]
            self.history_weights = weight.new_tensor(rows).repeat_interleave(shots, dim=1)

    def forward(self, x: Tensor, scale: float) -> Tensor:
        z = self._shared(x, self._scale())
        if self.taken == 0:
            return times(z, scale)
        inputs, gradients = self._past()
        gram = torch.bmm(x, inputs.mT)  # [T, S, k * S]
        if self.bias_moves:
            gram.add_(1.0)
        return times(z.baddbmm_(self._weigh(gram), gradients, alpha=-1.0), scale)

    def backward(self, d: Tensor) -> Tensor:
        dx = self._shared_backward(d, self._scale())
        if self.taken == 0:
            return dx
        inputs, gradients = self._past()
        gram = torch.bmm(d, gradients.mT)  # [T, S, k * S]
        return dx.baddbmm_(self._weigh(gram), inputs, alpha=-1.0)

    def step(self, x: Tensor, d: Tensor) -> None:
        start = self.taken * self.shots
        self.inputs.narrow(1, start, self.shots).copy_(x)
        gradients = self.gradients.narrow(1, start, self.shots).copy_(d)
        if self.history_weights is None:  # then the history carries its rate and never has to be weighed again
            gradients.mul_(float(self.numbers.history[-1][self.taken]))
        self.taken += 1

    def weighed(self) -> tuple[Tensor, Tensor]:
        inputs, gradients = self._past()
        if self.history_weights is not None:
            gradients = gradients * self.history_weights[self.taken, : gradients.shape[1], None]
        return inputs, gradients

    def velocity(self) -> tuple[Tensor, Tensor | None]:
        """What momentum carries on: weights [T, out, in] and biases [T, out]."""
        assert isinstance(self.numbers, Coefficients)
        row = self.gradients.new_tensor(self.numbers.velocity_history[self.taken]).repeat_interleave(self.shots)
        inputs, gradients = self._past()
        return self._sum(self.numbers.velocity_shared[self.taken], inputs, gradients * row[:, None], 1.0)

    def rate_gradient(self, x: Tensor, d: Tensor) -> Tensor | None:
        if self.taken == 0:
            return None
        inputs, gradients = self._past()
        gram = torch.bmm(x, inputs.mT)  # [T, Q, k * S]
        if self.bias_moves:
            gram.add_(1.0)
        products = gram.mul_(torch.bmm(d, gradients.mT)).sum(1).unflatten(1, (self.taken, self.shots)).sum(2)
        return self._rate_gradient(products, x, d)

    def _past(self) -> tuple[Tensor, Tensor]:
        """Inputs [T, k * S, in] and gradients [T, k * S, out] of the steps so far."""
        rows = self.taken * self.shots
        return self.inputs.narrow(1, 0, rows), self.gradients.narrow(1, 0, rows)

    def _weigh(self, gram: Tensor) -> Tensor:
        """Multiply the columns of step j by c_{k,j}, in place; [T, ..., k * S]."""
        return gram if self.history_weights is None else gram.mul_(self.history_weights[self.taken, : gram.shape[-1]])


class DualFirstLayer(HistoryLayer):
    """The dual form of a layer whose support input never changes: history and products collapse.

    `X W_0ᵀ` and the Gram matrix `X Xᵀ` are computed once, and the history is one matrix `H = sum_j c_{k,j} D_j`, which
    follows the recurrence of SGD itself.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        inner: InnerLoop,
        numbers: Coefficients | LearnedCoefficients,
        bias_moves: bool,
        rates: tuple[Rate, ...],
        support: Tensor,
    ) -> None:
        """support: the layer's input on the support set at every step, [T, S, in]."""
        super().__init__(weight, bias, inner, numbers, bias_moves)
        self.rates = rates
        self.support = support
        self.shared_z: Tensor | None = self._shared(support)  # [T, S, out]
        self.gram: Tensor | None = self._gram(support)  # [T, S, S]
        self.history: Tensor | None = None  # H: [T, S, out]
        self.summed_velocity: Tensor | None = None  # sum_j vc_{k,j} D_j: [T, S, out]
        self.gradients: list[Tensor] = []  # D_j, where rates are learned

    def forward(self, x: Tensor, scale: float) -> Tensor:
        assert self.shared_z is not None
        assert self.gram is not None
        if self.history is None:
            return self.shared_z * scale if scale != 1.0 else self.shared_z.clone()
        of_shared = self._scale()
        if isinstance(of_shared, float) and (self.bias_moves or self.bias is None or of_shared == 1.0):
            return torch.baddbmm(self.shared_z, self.gram, self.history, beta=scale * of_shared, alpha=-scale)
        return times(self._shared(x, of_shared).baddbmm_(self.gram, self.history, alpha=-1.0), scale)

    def query(self, x: Tensor, scale: float) -> Tensor:
        z = self._shared(x, self._scale())
        return times(z if self.history is None else z.baddbmm_(self._gram(x), self.history, alpha=-1.0), scale)

    def backward(self, d: Tensor) -> Tensor:
        dx = self._shared_backward(d, self._scale())
        if self.history is None:
            return dx
        return dx.baddbmm_(torch.bmm(d, self.history.mT), self.support, alpha=-1.0)

    def step(self, x: Tensor, d: Tensor) -> None:
        inner, rate = self.inner, self.rates[self.taken]
        self.taken += 1
        if inner.learn_lr is not None:
            self.gradients.append(d)
        past = self.history if inner.weight_decay else None
        if past is not None and not inner.decoupled:
            d = torch.sub(d, past, alpha=inner.weight_decay)
        direction = d
        if inner.momentum:
            if self.summed_velocity is None:
                self.summed_velocity = d.clone()
            else:
                self.summed_velocity.mul_(inner.momentum).add_(d)
            direction = self.summed_velocity
            if inner.nesterov:
                direction = torch.add(d, direction, alpha=inner.momentum)
        if past is not None and inner.decoupled:
            direction = torch.sub(direction, past, alpha=inner.weight_decay)
        if self.history is None:
            self.history = direction * rate
        elif isinstance(rate, Tensor):
            self.history.add_(direction * rate)
        else:
            self.history.add_(direction, alpha=rate)

    def finish(self) -> None:
        self.shared_z = self.gram = self.summed_velocity = None

    def weighed(self) -> tuple[Tensor, Tensor]:
        assert self.history is not None
        return self.support, self.history

    def velocity(self) -> tuple[Tensor, Tensor | None]:
        """What momentum carries on: weights [T, out, in] and biases [T, out]."""
        assert isinstance(self.numbers, Coefficients)
        assert self.summed_velocity is not None
        return self._sum(self.numbers.velocity_shared[self.taken], self.support, self.summed_velocity, 1.0)

    def rate_gradient(self, x: Tensor, d: Tensor) -> Tensor | None:
        if not self.gradients:
            return None
        pulled = torch.bmm(self._gram(x).mT, d)  # [T, S, out]
        products = [(gradient * pulled).sum((1, 2)) for gradient in self.gradients]
        return self._rate_gradient(torch.stack(products, 1), x, d)

    def _gram(self, x: Tensor) -> Tensor:
        """X X_supportᵀ, + 1 for the bias; [T, S or Q, S]."""
        gram = torch.bmm(x, self.support.mT)
        return gram.add_(1.0) if self.bias_moves else gram
