"""Reads an `nn.Sequential` of Linear layers, normalisations and activations as a `Network`, or says what it is not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .inner import PARTS
from .problem import Activation, Layer, Network, Norm


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
_NORMS = (nn.LayerNorm, nn.BatchNorm1d)


@dataclass
class Block:
    """A Linear of a model, with the normalisation and the activation behind it; each at most one."""

    linear: nn.Linear
    norm: nn.LayerNorm | nn.BatchNorm1d | None = None
    activation: Activation | None = None

    def listed(self) -> tuple[Tensor | None, ...]:
        """In the order of `inner.PARTS`; None for those that it lacks."""
        linear, norm = self.linear, self.norm
        if norm is None:
            return linear.weight, linear.bias, None, None
        return linear.weight, linear.bias, norm.weight, norm.bias

    def parameters(self) -> dict[str, nn.Parameter]:
        """By part, those that it has."""
        return {part: p for part, p in zip(PARTS, self.listed(), strict=True) if isinstance(p, nn.Parameter)}


def read_network(model: nn.Module) -> tuple[Network, list[Block]]:
    """The network that `model` is, and where it keeps its parameters, layer by layer.

    Args:
        model: an `nn.Linear`, or an `nn.Sequential` (nested ones too) of `nn.Linear`, and behind each at most one
            `nn.LayerNorm` or `nn.BatchNorm1d` and then at most one activation.

    Raises:
        TypeError: `model` is no such module, or holds a layer that is not supported.
        ValueError: a normalisation or activation that is out of place, a Linear that appears twice, widths that do not
            chain, a BatchNorm that keeps running statistics.
    """
    blocks: list[Block] = []
    for name, module in _flatten(model, ""):
        kind = type(module).__name__
        if not isinstance(module, nn.Linear) and type(module) in (*_ACTIVATIONS, *_NORMS) and not blocks:
            raise ValueError(f"model[{name}] is {kind}; the first layer has to be a Linear")
        if type(module) is nn.Linear:
            _check_parameters(name, module, blocks)
            blocks.append(Block(module))
        elif isinstance(module, nn.LayerNorm | nn.BatchNorm1d) and type(module) in _NORMS:
            if blocks[-1].norm is not None or blocks[-1].activation is not None:
                raise ValueError(f"model[{name}] is {kind}; it takes its place right behind a Linear")
            _check_norm(name, module, blocks[-1].linear.out_features)
            _check_parameters(name, module, blocks)
            blocks[-1].norm = module
        elif type(module) in _ACTIVATIONS:
            activation = _ACTIVATIONS[type(module)](module)
            if activation.name == "identity":
                continue
            if blocks[-1].activation is not None:
                raise ValueError(f"model[{name}] is {kind}, behind another activation; one is taken")
            blocks[-1].activation = activation
        else:
            supported = ", ".join(cls.__name__ for cls in (nn.Linear, *_NORMS, *_ACTIVATIONS))
            raise TypeError(f"model[{name}] is {kind}, which is not supported; taken are {supported}")
    return Network(tuple(_layer(block) for block in blocks)), blocks


def part_names(model: nn.Module, blocks: Sequence[Block]) -> list[dict[str, str]]:
    """Of each layer, the names that its parameters have in the model, by part."""
    names = {id(p): name for name, p in model.named_parameters()}
    return [{part: names[id(p)] for part, p in block.parameters().items()} for block in blocks]


def _layer(block: Block) -> Layer:
    linear, norm = block.linear, block.norm
    found = None
    if norm is not None:
        over = "features" if isinstance(norm, nn.LayerNorm) else "samples"
        found = Norm(over, float(norm.eps), norm.weight is not None, norm.bias is not None)
    return Layer(
        linear.in_features, linear.out_features, linear.bias is not None, block.activation or Activation(), found
    )


def _check_parameters(name: str, module: nn.Module, blocks: list[Block]) -> None:
    """Raises where a layer shares parameters with an earlier one, or has others than real floating-point ones."""
    own = {id(p) for p in module.parameters()}
    if any(id(p) in own for block in blocks for p in block.parameters().values()):
        raise ValueError(f"model[{name}] shares a parameter with an earlier layer; each layer takes its own")
    for part in ("weight", "bias"):
        value = getattr(module, part)
        if value is not None and not (isinstance(value, nn.Parameter) and value.is_floating_point()):
            raise TypeError(f"model[{name}].{part} is not a Parameter of real floating-point numbers")


def _check_norm(name: str, norm: nn.LayerNorm | nn.BatchNorm1d, width: int) -> None:
    if isinstance(norm, nn.LayerNorm):
        if tuple(norm.normalized_shape) != (width,):
            raise ValueError(f"model[{name}] normalizes {list(norm.normalized_shape)}; the layer has {width} features")
        return
    if norm.num_features != width:
        raise ValueError(f"model[{name}] normalizes {norm.num_features} features; the layer has {width}")
    if norm.track_running_stats:
        raise ValueError(
            f"model[{name}] tracks running statistics; tasks are normalized by their own samples, so it takes "
            "track_running_stats=False"
        )


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
