"""Activations and their derivatives as single torch ops, in place where the derivative allows it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..problem import Activation

_aten = torch.ops.aten


@dataclass(frozen=True)
class ActivationOps:
    """An activation on the pre-activation `z`, which it may overwrite, and its derivative.

    Attributes:
        forward: z -> h.
        backward: (d, saved) -> d * h'(z); overwrites d. `saved` is z where `saves_input`, else h.
        scale: what z is multiplied by before `forward` gets it: a product can do so on its way.
    """

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]
    saves_input: bool
    scale: float = 1.0

    def run(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The activation's output and what its derivative needs."""
        h = self.forward(z)
        return h, (z if self.saves_input else h)


@cache
def activation_ops(activation: Activation) -> ActivationOps:
    """The torch ops of an activation."""
    p = activation.parameters
    match activation.name:
        case "identity":
            return ActivationOps(lambda z: z, lambda d, h: d, saves_input=False)
        case "relu":
            threshold = _aten.threshold_backward.grad_input
            return ActivationOps(Tensor.relu_, lambda d, h: threshold(d, h, 0, grad_input=d), saves_input=False)
        case "leaky_relu":
            return ActivationOps(
                lambda z: F.leaky_relu(z, p[0]),
                lambda d, z: _aten.leaky_relu_backward.grad_input(d, z, p[0], False, grad_input=d),
                saves_input=True,
            )
        case "elu":
            return ActivationOps(
                lambda z: F.elu(z, p[0]),
                lambda d, z: _aten.elu_backward.grad_input(d, p[0], 1, 1, False, z, grad_input=d),
                saves_input=True,
            )
        case "gelu" | "gelu_tanh":
            approximate = "none" if activation.name == "gelu" else "tanh"
            return ActivationOps(
                lambda z: F.gelu(z, approximate=approximate),
                lambda d, z: _aten.gelu_backward.grad_input(d, z, approximate=approximate, grad_input=d),
                saves_input=True,
            )
        case "silu":
            return ActivationOps(F.silu, lambda d, z: _aten.silu_backward.grad_input(d, z, grad_input=d), True)
        case "tanh":
            return ActivationOps(Tensor.tanh_, lambda d, h: _aten.tanh_backward.grad_input(d, h, grad_input=d), False)
        case "sigmoid":
            return ActivationOps(
                Tensor.sigmoid_, lambda d, h: _aten.sigmoid_backward.grad_input(d, h, grad_input=d), saves_input=False
            )
        case "softplus":
            return ActivationOps(
                lambda z: F.softplus(z, p[0], p[1]),
                lambda d, z: _aten.softplus_backward.grad_input(d, z, p[0], p[1], grad_input=d),
                saves_input=True,
            )
        case "sine":
            return ActivationOps(
                torch.sin,
                lambda d, z: torch.addcmul(d.new_zeros(()), d, z.cos(), value=p[0], out=d),
                saves_input=True,
                scale=p[0],
            )
    raise AssertionError(f"no ops for activation {activation}")
