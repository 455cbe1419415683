"""What is computed: the network, its losses, the inner loop and the outer rule, as frozen and validated values.

Nothing here holds a tensor. A `Problem` is hashable, so plans and compiled kernels are cached by it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

from torch import Tensor

from .hashing import hashed_once
from .inner import PARTS, InnerLoop

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
class Norm:
    """A normalisation of pre-activations z [N, out]: `scale * (z - mean) / sqrt(variance + eps) + shift`.

    Args:
        over: "features" of each sample (LayerNorm), or "samples" of each task (BatchNorm with batch statistics).
        scale, shift: whether there is one per feature.
    """

    over: str
    eps: float = 1e-5
    scale: bool = True
    shift: bool = True

    def __str__(self) -> str:
        return "layer norm" if self.over == "features" else "batch norm"


@dataclass(frozen=True)
class Layer:
    """A linear layer and what is behind it: `h = activation(norm(x @ W.T + b))`, W [out, in], b [out]."""

    in_features: int
    out_features: int
    bias: bool = True
    activation: Activation = field(default_factory=Activation)
    norm: Norm | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """The parameters that the layer has, of `inner.PARTS`."""
        norm = self.norm
        has = (True, self.bias, norm is not None and norm.scale, norm is not None and norm.shift)
        return tuple(part for part, there in zip(PARTS, has, strict=True) if there)

    def __post_init__(self) -> None:
        for name in ("in_features", "out_features"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; a layer takes at least one feature")

    @property
    def parameters(self) -> int:
        """Number of scalar parameters."""
        norm = 0 if self.norm is None else self.norm.scale + self.norm.shift
        return self.out_features * (self.in_features + self.bias + norm)


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

    @property
    def mixes_samples(self) -> bool:
        """Whether what a sample gives depends on the others of its set."""
        return any(layer.norm is not None and layer.norm.over == "samples" for layer in self.layers)

    def __str__(self) -> str:
        widths = "-".join(map(str, self.widths))
        activations = [str(layer.activation) for layer in self.layers]
        hidden, last = dict.fromkeys(activations[:-1]), activations[-1]
        norms = dict.fromkeys(str(layer.norm) for layer in self.layers if layer.norm is not None)
        return " ".join([widths, *norms, *hidden, *([f"-> {last}"] if last != "identity" else [])])


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


OUTER_RULES = ("fomaml", "reptile")
NONFINITE = ("propagate", "skip")


@hashed_once
@dataclass(frozen=True)
class Problem:
    """One task's meta-learning problem: adapt `network` on support samples, measure it on query samples.

    Args:
        outer: "fomaml", the query loss of the adapted network; or "reptile", half the squared distance that a task
            moves (Nichol et al. 2018), for which there is no query set.
        multi_step: whether the query loss of every step counts (Antoniou et al. 2019), not the last one's alone.
        nonfinite: what becomes of a task that diverged: "propagate" it to the mean over tasks, or "skip" it there.
    """

    network: Network
    inner: InnerLoop
    loss: Loss
    outer_loss: Loss
    outer: str = "fomaml"
    multi_step: bool = False
    nonfinite: str = "propagate"

    def __post_init__(self) -> None:
        if len(self.inner.adapt) != self.network.depth:
            raise ValueError(f"adapt has {len(self.inner.adapt)} layers, the network has {self.network.depth}")
        if self.outer not in OUTER_RULES:
            raise ValueError(f"outer is {self.outer!r}; it takes one of {', '.join(OUTER_RULES)}")
        if self.nonfinite not in NONFINITE:
            raise ValueError(f"nonfinite is {self.nonfinite!r}; it takes one of {', '.join(NONFINITE)}")
        if self.multi_step and self.outer == "reptile":
            raise ValueError("step_weights is given; outer 'reptile' has no query loss to weigh")
        if self.inner.learn_lr is not None and self.outer == "reptile":
            raise ValueError("learn_lr is given; outer 'reptile' has no query loss to learn rates from")

    def __str__(self) -> str:
        parts = [str(self.network), str(self.loss), str(self.inner)]
        if self.outer == "reptile":
            parts.append("outer reptile")
        elif self.outer_loss != self.loss:
            parts.append(f"outer {self.outer_loss}")
        if self.multi_step:
            parts.append("query loss of every step")
        if self.nonfinite == "skip":
            parts.append("skips diverged tasks")
        return ", ".join([*parts, *self._adapts()])

    def _adapts(self) -> list[str]:
        """What moves, where it is not all."""
        if all(self._moves_wholly(i) for i in range(self.network.depth)):
            return []
        moving = [
            str(i) if self._moves_wholly(i) else f"{i} ({' and '.join(parts).replace('_', ' ')})"
            for i, parts in enumerate(self.inner.adapt)
            if parts
        ]
        return ["adapts " + (",".join(moving) or "nothing")]

    def _moves_wholly(self, i: int) -> bool:
        return len(self.inner.adapt[i]) == len(self.network.layers[i].parts)
