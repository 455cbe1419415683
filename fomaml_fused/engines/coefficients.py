"""The recurrences that make the dual form exact under momentum and weight decay (docs/math.md)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Coefficients:
    """How a layer's weights after k steps, and what the last of these steps moved along, hang together with W_0.

        W_k             = shared[k] * W_0           - sum_{j < k} history[k][j] * D_j.T @ X_j
        V_{k-1}         = velocity_shared[k] * W_0  + sum_{j < k} velocity_history[k][j] * D_j.T @ X_j
        direction_{k-1} = direction_shared[k] * W_0 + sum_{j < k} direction_history[k][j] * D_j.T @ X_j

    The velocity is what momentum carries from step to step, the direction what a step multiplies by its rate. They are
    the same but with Nesterov's momentum or decoupled weight decay.

    Attributes:
        shared: s_k, k = 0..K.
        history: c_{k,j}, k = 0..K, j < k.
        velocity_shared: vs_{k-1}, k = 0..K; 0 for k = 0.
        velocity_history: vc_{k-1,j}, k = 0..K, j < k.
        direction_shared, direction_history: us_{k-1} and uc_{k-1,j}, alike.
    """

    shared: tuple[float, ...]
    history: tuple[tuple[float, ...], ...]
    velocity_shared: tuple[float, ...]
    velocity_history: tuple[tuple[float, ...], ...]
    direction_shared: tuple[float, ...]
    direction_history: tuple[tuple[float, ...], ...]

    @property
    def settled(self) -> bool:
        """Whether a step's coefficient never changes once it is taken, and W_0 keeps its own: plain SGD."""
        last = self.history[-1]
        return all(row == last[: len(row)] for row in self.history) and set(self.shared) == {1.0}


class TensorCoefficients(NamedTuple):
    """`Coefficients` of all layers side by side, 0 for steps yet to come.

    Attributes:
        shared, velocity_shared, direction_shared: [K + 1, layers].
        history, velocity_history, direction_history: [K + 1, layers, K].
    """

    shared: Tensor
    history: Tensor
    velocity_shared: Tensor
    velocity_history: Tensor
    direction_shared: Tensor
    direction_history: Tensor


@lru_cache(maxsize=1024)
def coefficients(
    rates: tuple[float, ...], momentum: float, weight_decay: float, nesterov: bool = False, decoupled: bool = False
) -> Coefficients:
    """The coefficients of every step, from the rates of the steps; the rules are those of `inner.InnerLoop`."""
    coupled, apart = (0.0, weight_decay) if decoupled else (weight_decay, 0.0)
    s, vs, us = 1.0, 0.0, 0.0
    c: list[float] = []
    vc: list[float] = []
    uc: list[float] = []
    rows = [(s, tuple(c), vs, tuple(vc), us, tuple(uc))]
    for rate in rates:
        # Of the gradient with its decay, then of the velocity, then of the direction.
        gs, gc = coupled * s, [-coupled * past for past in c] + [1.0]
        vs, vc = momentum * vs + gs, [momentum * v + g for v, g in zip([*vc, 0.0], gc, strict=True)]
        us, uc = vs, vc
        if nesterov:
            us, uc = gs + momentum * vs, [g + momentum * v for g, v in zip(gc, vc, strict=True)]
        us, uc = us + apart * s, [u - apart * past for u, past in zip(uc, [*c, 0.0], strict=True)]
        s -= rate * us
        c = [past + rate * u for past, u in zip([*c, 0.0], uc, strict=True)]
        rows.append((s, tuple(c), vs, tuple(vc), us, tuple(uc)))
    return Coefficients(*zip(*rows, strict=True))


def tensor_coefficients(
    rates: Tensor, momentum: float, weight_decay: float, nesterov: bool = False, decoupled: bool = False
) -> TensorCoefficients:
    """`coefficients` of rates [K, layers] in a tensor, whose values nothing on the host waits for."""
    steps, layers = rates.shape
    coupled, apart = (0.0, weight_decay) if decoupled else (weight_decay, 0.0)
    s, vs, us = rates.new_ones(layers), rates.new_zeros(layers), rates.new_zeros(layers)
    c, vc, uc = rates.new_zeros(3, layers, steps)
    own = torch.eye(steps, dtype=rates.dtype, device=rates.device)
    rows = [(s, c, vs, vc, us, uc)]
    for k in range(steps):
        gs, gc = coupled * s, own[k] - coupled * c
        vs, vc = momentum * vs + gs, momentum * vc + gc
        us, uc = (gs + momentum * vs, gc + momentum * vc) if nesterov else (vs, vc)
        us, uc = us + apart * s, uc - apart * c
        s, c = s - rates[k] * us, c + rates[k, :, None] * uc
        rows.append((s, c, vs, vc, us, uc))
    return TensorCoefficients(*(torch.stack(column) for column in zip(*rows, strict=True)))


@dataclass(frozen=True)
class LearnedCoefficients:
    """As `Coefficients`, of one layer whose rates are tensors.

    Attributes:
        shared: s_k, k = 0..K; the numbers 1 without decay.
        history: c_{k,j}, [K + 1, K], 0 where j >= k.
        direction_shared: us_{k-1}, [K + 1].
        direction_history: uc_{k-1,j}, [K + 1, K].
    """

    shared: tuple[float | Tensor, ...]
    history: Tensor
    direction_shared: Tensor
    direction_history: Tensor


def learned_coefficients(
    rates: Tensor, momentum: float, weight_decay: float, nesterov: bool = False, decoupled: bool = False
) -> list[LearnedCoefficients]:
    """The `tensor_coefficients` of each layer, from rates [K, layers]."""
    of = tensor_coefficients(rates, momentum, weight_decay, nesterov, decoupled)
    return [
        LearnedCoefficients(
            of.shared[:, i].unbind() if weight_decay else (1.0,) * len(of.shared),
            of.history[:, i],
            of.direction_shared[:, i],
            of.direction_history[:, i],
        )
        for i in range(rates.shape[1])
    ]
