"""What is computed: the network, its losses and the inner loop, as frozen and validated values.

Nothing here holds a tensor. A `Problem` is hashable, so plans and compiled kernels are cached by it.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# Each activation with the names of its parameters, in the order in which `Activation.parameters` holds them.
ACTIVATIONS: dict[str, tuple[str, ...]] = {
    "identity": (),
    "relu": (),
    "leaky_relu": ("negative_slope",),
    "elu": ("alpha",),
    "gelu": (),
    "gelu_tanh": (),
    "silu": (),
    "tanh": (),
    "sigmoid": (),
    "softplus": ("beta", "threshold"),
    "sine": ("w0",),
}

LOSSES = ("mse", "l1", "huber", "cross_entropy", "bce_with_logits")

SampleLoss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Activation:
    """An element-wise activation, by name and parameters (see `ACTIVATIONS`)."""

    name: str = "identity"
    parameters: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.name not in ACTIVATIONS:
            raise ValueError(f"activation is {self.name!r}; it takes one of {', '.join(ACTIVATIONS)}")
        expected = ACTIVATIONS[self.name]
        if len(self.parameters) != len(expected):
            raise ValueError(f"activation {self.name!r} takes parameters {expected}, got {self.parameters}")

    def __str__(self) -> str:
        return self.name + (f"({', '.join(f'{p:g}' for p in self.parameters)})" if self.parameters else "")


@dataclass(frozen=True)
class Layer:
    """A linear layer and the activation behind it: `h = activation(x @ W.T + b)`, W [out, in], b [out]."""

    in_features: int
    out_features: int
    bias: bool = True
    activation: Activation = field(default_factory=Activation)

    def __post_init__(self) -> None:
        for name in ("in_features", "out_features"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; a layer takes at least one feature")

    @property
    def parameters(self) -> int:
        """Number of scalar parameters."""
        return self.out_features * (self.in_features + self.bias)


@dataclass(frozen=True)
class Network:
    """A multi-layer perceptron: layers in the order in which they run."""

    layers: tuple[Layer, ...]

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("network has no layer; it takes at least one Linear")
        for i, (before, after) in enumerate(zip(self.layers, self.layers[1:], strict=False)):
            if before.out_features != after.in_features:
                raise ValueError(
                    f"layer {i} gives {before.out_features} features, layer {i + 1} takes {after.in_features}"
                )

    @property
    def depth(self) -> int:
        return len(self.layers)

    @property
    def in_features(self) -> int:
        return self.layers[0].in_features

    @property
    def out_features(self) -> int:
        return self.layers[-1].out_features

    @property
    def widths(self) -> tuple[int, ...]:
        """Features from the input to the output, [layers + 1]."""
        return (self.in_features, *(layer.out_features for layer in self.layers))

    @property
    def parameters(self) -> int:
        """Number of scalar parameters."""
        return sum(layer.parameters for layer in self.layers)

    def __str__(self) -> str:
        widths = "-".join(map(str, self.widths))
        activations = [str(layer.activation) for layer in self.layers]
        hidden, last = dict.fromkeys(activations[:-1]), activations[-1]
        return " ".join([widths, *hidden, *([f"-> {last}"] if last != "identity" else [])])


@dataclass(frozen=True)
class Loss:
    """A loss per sample; over samples the weighted mean is taken.

    Args:
        name: one of `LOSSES`, or "callable".
        label_smoothing: for "cross_entropy", in [0, 1), as in `torch.nn.functional.cross_entropy`.
        delta: for "huber", positive, as in `torch.nn.functional.huber_loss`.
        function: for "callable": (outputs [N, out], targets [N, ...]) -> loss per sample [N].

    "mse", "l1", "huber" and "bce_with_logits" average over output features, so that the mean over samples is what
    `torch.nn.functional` gives with `reduction="mean"`.
    """

    name: str
    label_smoothing: float = 0.0
    delta: float = 1.0
    function: SampleLoss | None = None

    def __post_init__(self) -> None:
        if self.name not in (*LOSSES, "callable"):
            raise ValueError(f"loss is {self.name!r}; it takes one of {', '.join(LOSSES)}, or a callable")
        if (self.name == "callable") != (self.function is not None):
            raise ValueError("loss takes a function exactly when its name is 'callable'")
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ValueError(f"label_smoothing is {self.label_smoothing}; it takes a number in [0, 1)")
        if not (self.delta > 0.0 and math.isfinite(self.delta)):
            raise ValueError(f"delta is {self.delta}; it takes a positive finite number")

    @property
    def takes_classes(self) -> bool:
        """Whether targets are class indices [T, S] rather than values [T, S, out]."""
        return self.name == "cross_entropy"

    @classmethod
    def of(cls, loss: str | Loss | SampleLoss, argument: str = "loss") -> Loss:
        """The `Loss` a user means by a name, a `Loss`, or a callable.

        Raises:
            ValueError: an unknown name.
            TypeError: `loss` is none of these.
        """
        if isinstance(loss, Loss):
            return loss
        if isinstance(loss, str):
            if loss not in LOSSES:
                raise ValueError(f"{argument} is {loss!r}; it takes one of {', '.join(LOSSES)}, or a callable")
            return cls(loss)
        if callable(loss):
            if not isinstance(loss, Hashable):
                raise TypeError(f"{argument} is {type(loss).__name__}, which cannot be hashed; plans are cached by it")
            return cls("callable", function=loss)
        raise TypeError(f"{argument} is {type(loss).__name__}; it takes a name, a fomaml_fused.Loss or a callable")

    def __str__(self) -> str:
        if self.name == "huber":
            return f"huber({self.delta:g})"
        return self.name + (f"({self.label_smoothing:g})" if self.label_smoothing else "")


@dataclass(frozen=True)
class InnerLoop:
    """Gradient descent on the support loss, as `torch.optim.SGD` does it, layer by layer.

        v_k = momentum * v_{k-1} + g_k + weight_decay * theta_k          theta_{k+1} = theta_k - rates[k][l] * v_k

    Args:
        rates: the inner learning rate of each step and layer, [steps][layers]; no step is an empty tuple.
        adapt: whether each layer moves, [layers].
        momentum, weight_decay: not negative.
    """

    rates: tuple[tuple[float, ...], ...]
    adapt: tuple[bool, ...]
    momentum: float = 0.0
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        for row in self.rates:
            if len(row) != len(self.adapt):
                raise ValueError(f"lr has {len(row)} rates a step, adapt has {len(self.adapt)} layers")
            if not all(math.isfinite(rate) for rate in row):
                raise ValueError(f"lr is {row}; it takes finite numbers")
        for name in ("momentum", "weight_decay"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{name} is {value!r}; it takes a number")
            if not (value >= 0.0 and math.isfinite(value)):
                raise ValueError(f"{name} is {value}; it takes a finite number, not negative")

    @property
    def steps(self) -> int:
        return len(self.rates)

    @property
    def first_adapted(self) -> int:
        """Index of the first layer that moves; the number of layers when none does."""
        if not self.steps or not any(self.adapt):
            return len(self.adapt)
        return self.adapt.index(True)

    def options(self) -> dict[str, Any]:
        """The keywords that make this loop, as `FOMAML` and the functions of `reference` take them."""
        return {
            "lr": self.rates if self.rates else 0.0,
            "steps": self.steps,
            "momentum": self.momentum,
            "weight_decay": self.weight_decay,
            "adapt": [i for i, moves in enumerate(self.adapt) if moves],
        }

    def layer_rates(self, layer: int) -> tuple[float, ...]:
        """The rates of one layer, [steps]."""
        return tuple(row[layer] for row in self.rates)


@dataclass(frozen=True)
class Problem:
    """One task's meta-learning problem: adapt `network` on support samples, measure it on query samples."""

    network: Network
    inner: InnerLoop
    loss: Loss
    outer_loss: Loss

    def __post_init__(self) -> None:
        if len(self.inner.adapt) != self.network.depth:
            raise ValueError(f"adapt has {len(self.inner.adapt)} layers, the network has {self.network.depth}")

    def __str__(self) -> str:
        inner = self.inner
        parts = [str(self.network), str(self.loss), f"K={inner.steps}"]
        if self.outer_loss != self.loss:
            parts.append(f"outer {self.outer_loss}")
        if inner.momentum:
            parts.append(f"momentum {inner.momentum:g}")
        if inner.weight_decay:
            parts.append(f"decay {inner.weight_decay:g}")
        if not all(inner.adapt):
            parts.append("adapts " + (",".join(str(i) for i, moves in enumerate(inner.adapt) if moves) or "nothing"))
        return ", ".join(parts)


def adapted_layers(adapt: str | Iterable[int], depth: int) -> tuple[bool, ...]:
    """Which layers move, from "all", "head" (the last), "body" (all but the last) or layer indices.

    Raises:
        ValueError: an unknown name, or an index outside -depth..depth-1.
        TypeError: neither a name nor indices.
    """
    if isinstance(adapt, str):
        named = {"all": range(depth), "head": range(depth - 1, depth), "body": range(depth - 1)}
        if adapt not in named:
            raise ValueError(f"adapt is {adapt!r}; it takes 'all', 'head', 'body' or layer indices")
        return tuple(i in named[adapt] for i in range(depth))
    adapt = list(adapt) if isinstance(adapt, Iterable) else adapt
    try:
        if any(isinstance(i, bool) for i in adapt):
            raise TypeError("a mask")
        indices = [operator.index(i) for i in adapt]
    except TypeError as error:
        raise TypeError(f"adapt is {adapt!r}; it takes 'all', 'head', 'body' or layer indices") from error
    for i in indices:
        if not -depth <= i < depth:
            raise ValueError(f"adapt names layer {i}; the network has layers 0 to {depth - 1}")
    moving = {i % depth for i in indices}
    return tuple(i in moving for i in range(depth))


def inner_rates(lr: Any, steps: int, depth: int) -> tuple[tuple[float, ...], ...]:
    """The rate of each step and layer, [steps][depth], from a number or anything that broadcasts to that shape.

    A flat list of `depth` numbers is a rate per layer, a column [[a], [b], ...] of `steps` rows a rate per step.

    Raises:
        ValueError: a negative number of steps, a shape that does not broadcast, or a rate that is not finite.
        TypeError: `lr` is not made of numbers, or `steps` is no whole number.
    """
    if isinstance(steps, bool) or not hasattr(steps, "__index__"):
        raise TypeError(f"steps is {steps!r}; it takes a whole number, 0 or more")
    steps = operator.index(steps)
    if steps < 0:
        raise ValueError(f"steps is {steps}; it takes a whole number, 0 or more")
    if isinstance(lr, torch.Tensor) and lr.requires_grad:
        raise TypeError("lr asks for a gradient; rates are values here, and no gradient would reach it")
    try:
        values = torch.as_tensor(lr, dtype=torch.float64).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"lr is {lr!r}; it takes a number or rows of numbers [steps, layers]") from error
    if not bool(values.isfinite().all()):
        raise ValueError(f"lr is {lr}; it takes finite numbers")
    try:
        rows = values.broadcast_to(steps, depth)
    except RuntimeError as error:
        raise ValueError(
            f"lr has shape {list(values.shape)}; it takes a number, [layers] = [{depth}], [steps, 1] = [{steps}, 1] "
            f"or [steps, layers] = [{steps}, {depth}]"
        ) from error
    return tuple(tuple(row) for row in rows.tolist())
