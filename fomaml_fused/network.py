"""Reads an `nn.Sequential` of Linear layers and activations as a `Network`, and says what it cannot take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .problem import Activation, Layer, Network


class Sine(nn.Module):
    """`sin(w0 * x)`, the activation of SIREN (Sitzmann et al. 2020, eq. 1 and section 3.2)."""

    def __init__(self, w0: float = 30.0) -> None:
        super().__init__()
        self.w0 = float(w0)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.w0 * x)

    def extra_repr(self) -> str:
        return f"w0={self.w0:g}"


_ACTIVATIONS: dict[type[nn.Module], Callable[[Any], Activation]] = {
    nn.Identity: lambda m: Activation("identity"),
    nn.ReLU: lambda m: Activation("relu"),
    nn.LeakyReLU: lambda m: Activation("leaky_relu", (float(m.negative_slope),)),
    nn.ELU: lambda m: Activation("elu", (float(m.alpha),)),
    nn.GELU: lambda m: Activation("gelu" if m.approximate == "none" else "gelu_tanh"),
    nn.SiLU: lambda m: Activation("silu"),
    nn.Tanh: lambda m: Activation("tanh"),
    nn.Sigmoid: lambda m: Activation("sigmoid"),
    nn.Softplus: lambda m: Activation("softplus", (float(m.beta), float(m.threshold))),
    Sine: lambda m: Activation("sine", (m.w0,)),
}


def read_network(model: nn.Module) -> tuple[Network, list[nn.Linear]]:
    """The network that `model` is, and its Linear layers in order.

    Args:
        model: an `nn.Linear`, or an `nn.Sequential` (nested ones too) of `nn.Linear` and at most one activation behind
            each.

    Raises:
        TypeError: `model` is no such module, or holds a layer that is not supported.
        ValueError: an activation before the first Linear or behind another one, a Linear that appears twice, widths
            that do not chain.
    """
    linears: list[nn.Linear] = []
    activations: list[Activation | None] = []
    for name, module in _flatten(model, ""):
        if type(module) is nn.Linear:
            own = {id(p) for p in module.parameters()}
            if any(id(p) in own for other in linears for p in other.parameters()):
                raise ValueError(f"model[{name}] shares a parameter with an earlier layer; each layer takes its own")
            if not isinstance(module.weight, nn.Parameter) or not module.weight.is_floating_point():
                raise TypeError(f"model[{name}].weight is not a Parameter of real floating-point numbers")
            linears.append(module)
            activations.append(None)
        elif type(module) in _ACTIVATIONS:
            if not linears:
                raise ValueError(f"model[{name}] is {type(module).__name__}; the first layer has to be a Linear")
            activation = _ACTIVATIONS[type(module)](module)
            if activation.name == "identity":
                continue
            if activations[-1] is not None:
                raise ValueError(f"model[{name}] is {type(module).__name__}, behind another activation; one is taken")
            activations[-1] = activation
        else:
            supported = ", ".join(["Linear", *(cls.__name__ for cls in _ACTIVATIONS)])
            raise TypeError(f"model[{name}] is {type(module).__name__}, which is not supported; taken are {supported}")
    layers = tuple(
        Layer(linear.in_features, linear.out_features, linear.bias is not None, activation or Activation())
        for linear, activation in zip(linears, activations, strict=True)
    )
    return Network(layers), linears


def _flatten(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    if module._forward_hooks or module._forward_pre_hooks:
        raise TypeError(f"model[{prefix}] has forward hooks, which a fused network would not run")
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        for i, child in enumerate(module):  # unlike named_children(), this yields a module as often as it runs
            yield from _flatten(child, f"{prefix}.{i}" if prefix else str(i))
    else:
        yield prefix or "0", module


# A module for each activation that a name can stand for, with its usual parameters.
MODULES: dict[str, Callable[[], nn.Module]] = {
    "identity": nn.Identity,
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "softplus": nn.Softplus,
    "sine": Sine,
}
