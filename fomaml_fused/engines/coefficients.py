"""The host-side recurrences that make the dual form exact under momentum and weight decay (docs/math.md)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True)
class Coefficients:
    """How a layer's weights after k steps, and what the last of these steps moved along, hang together with W_0.

        W_k     = shared[k] * W_0          - sum_{j < k} history[k][j] * D_j.T @ X_j
        V_{k-1} = velocity_shared[k] * W_0 + sum_{j < k} velocity_history[k][j] * D_j.T @ X_j

    Attributes:
        shared: s_k, k = 0..K.
        history: c_{k,j}, k = 0..K, j < k.
        velocity_shared: vs_{k-1}, k = 0..K; 0 for k = 0.
        velocity_history: vc_{k-1,j}, k = 0..K, j < k.
    """

    shared: tuple[float, ...]
    history: tuple[tuple[float, ...], ...]
    velocity_shared: tuple[float, ...]
    velocity_history: tuple[tuple[float, ...], ...]

    @property
    def settled(self) -> bool:
        """Whether a step's coefficient never changes once it is taken, and W_0 keeps its own: plain SGD."""
        last = self.history[-1]
        return all(row == last[: len(row)] for row in self.history) and set(self.shared) == {1.0}


@lru_cache(maxsize=1024)
def coefficients(rates: tuple[float, ...], momentum: float, weight_decay: float) -> Coefficients:
    """The coefficients of every step, from the rates of the steps."""
    s, vs = 1.0, 0.0
    c: list[float] = []
    vc: list[float] = []
    rows = [(s, tuple(c), vs, tuple(vc))]
    for rate in rates:
        vs = momentum * vs + weight_decay * s
        vc = [momentum * v - weight_decay * past for v, past in zip(vc, c, strict=True)] + [1.0]
        s -= rate * vs
        c = [past + rate * v for past, v in zip([*c, 0.0], vc, strict=True)]
        rows.append((s, tuple(c), vs, tuple(vc)))
    return Coefficients(*zip(*rows, strict=True))
