"""The inner loop: how a task's parameters move on its support set, as frozen and validated values."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# The parameters of a layer, in the order in which everything lists them; a layer may lack all but the first.
PARTS = ("weight", "bias", "norm_weight", "norm_bias")
OPTIMIZERS = ("sgd", "adam")
GRANULARITIES = ("global", "step", "layer", "layer_step", "element")

Names = Mapping[str, str]  # of one layer: part -> the parameter's name in the model
Predicate = Callable[[str, Tensor], bool]
Adapt = str | Iterable[int | str] | Predicate


@dataclass(frozen=True)
class InnerLoop:
    """Gradient descent on the support loss: `theta_{k+1} = theta_k - rates[k][l] * direction_k`, layer by layer.

    The direction is what `torch.optim.SGD` or `torch.optim.Adam` multiplies by its rate:

        g_k = gradient, clipped                        + weight_decay * theta_k unless decoupled
        v_k = momentum * v_{k-1} + g_k
        direction_k = v_k, or g_k + momentum * v_k with nesterov, or Adam's of g_k
                                                       + weight_decay * theta_k if decoupled

    Args:
        rates: the learning rate of each step and layer, [steps][layers]; no step is an empty tuple. Where rates are
            learned, what they start from.
        adapt: the parts of each layer that move, of `PARTS`.
        optimizer: "sgd" or "adam", the latter with a state per task and corrected for its start (Kingma and Ba 2015).
        momentum, nesterov: of "sgd", as in `torch.optim.SGD`.
        weight_decay: not negative.  decoupled: keep it out of momentum and Adam's moments (Loshchilov and Hutter 2019).
        betas, eps: of "adam".
        max_grad_norm: the longest gradient of a task, all that moves taken together, as in
            `torch.nn.utils.clip_grad_norm_`.
        max_grad_value: the largest element of a gradient, as in `torch.nn.utils.clip_grad_value_`.
        learn_lr: the granularity at which rates are learned, of `GRANULARITIES`; None for fixed rates.

    Attributes:
        first_adapted: index of the first layer that moves; the number of layers when none does.
        update: how a parameter of a task's own moves. "plain" where a step is the gradient times a rate, and decay;
            "heavy ball" where it is along a velocity that the gradient can be summed right into; else "general", for
            which the gradient is written first.
        columns: the rates of each layer, [layers][steps].
    """

    rates: tuple[tuple[float, ...], ...]
    adapt: tuple[tuple[str, ...], ...]
    optimizer: str = "sgd"
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    decoupled: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    max_grad_norm: float | None = None
    max_grad_value: float | None = None
    learn_lr: str | None = None
    # Asked for many times in a step, and each but a function of the above.
    first_adapted: int = field(init=False, compare=False, repr=False)
    update: str = field(init=False, compare=False, repr=False)
    columns: tuple[tuple[float, ...], ...] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        for row in self.rates:
            if len(row) != len(self.adapt):
                raise ValueError(f"lr has {len(row)} rates a step, adapt has {len(self.adapt)} layers")
            if not all(math.isfinite(rate) for rate in row):
                raise ValueError(f"lr is {row}; it takes finite numbers")
        for name in ("momentum", "weight_decay", "eps"):
            check_number(name, getattr(self, name))
        for name in ("max_grad_norm", "max_grad_value"):
            if (bound := getattr(self, name)) is not None and check_number(name, bound) == 0.0:
                raise ValueError(f"{name} is 0; it takes None or a positive number")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer is {self.optimizer!r}; it takes one of {', '.join(OPTIMIZERS)}")
        if self.learn_lr not in (None, *GRANULARITIES):
            raise ValueError(f"learn_lr is {self.learn_lr!r}; it takes None or one of {', '.join(GRANULARITIES)}")
        if self.optimizer == "adam" and (self.momentum or self.nesterov):
            raise ValueError(f"momentum is {self.momentum}; optimizer 'adam' takes betas instead")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov is True; it takes a momentum above 0")
        if (
            not isinstance(self.betas, tuple)
            or len(self.betas) != 2
            or not all(0.0 <= beta < 1.0 for beta in self.betas)
        ):
            raise ValueError(f"betas is {self.betas}; it takes two numbers in [0, 1)")
        object.__setattr__(self, "first_adapted", self._first_adapted())
        object.__setattr__(self, "update", self._update())
        object.__setattr__(self, "columns", tuple(zip(*self.rates, strict=True)))

    @property
    def steps(self) -> int:
        return len(self.rates)

    @property
    def learns_each_step(self) -> bool:
        """Whether steps learn rates of their own."""
        return self.learn_lr in ("step", "layer_step")

    @property
    def needs_gradient(self) -> str | None:
        """Why each task's gradient itself has to exist; None where products with it do, and the dual form is exact."""
        if self.optimizer == "adam":
            return "Adam takes each task's gradient element by element"
        if self.max_grad_value is not None:
            return "max_grad_value takes each task's gradient element by element"
        if self.learn_lr == "element":
            return "rates of elements take each task's gradient element by element"
        return None

    def options(self) -> dict[str, Any]:
        """The keywords that make this loop but for `adapt` and learned rates, as the functions of `reference` do."""
        return {
            "lr": self.rates if self.rates else 0.0,
            "steps": self.steps,
            "optimizer": self.optimizer,
            "momentum": self.momentum,
            "nesterov": self.nesterov,
            "weight_decay": self.weight_decay,
            "decoupled_weight_decay": self.decoupled,
            "betas": self.betas,
            "eps": self.eps,
            "max_grad_norm": self.max_grad_norm,
            "max_grad_value": self.max_grad_value,
        }

    def layer_rates(self, layer: int) -> tuple[float, ...]:
        """The rates of one layer, [steps]."""
        return self.columns[layer] if self.rates else ()

    def _first_adapted(self) -> int:
        moving = [i for i, parts in enumerate(self.adapt) if parts]
        return moving[0] if self.steps and moving else len(self.adapt)

    def _update(self) -> str:
        if self.optimizer != "sgd" or self.learn_lr is not None:
            return "general"
        if not self.momentum or (self.steps <= 1 and not self.nesterov):  # the first step has no velocity yet
            return "plain"
        decoupled = self.decoupled and self.weight_decay > 0.0
        return "general" if self.nesterov or decoupled else "heavy ball"

    def __str__(self) -> str:
        parts = [f"K={self.steps}"]
        if self.optimizer != "sgd":
            parts.append(self.optimizer)
        if self.momentum:
            parts.append(f"momentum {self.momentum:g}" + (" (Nesterov)" if self.nesterov else ""))
        if self.weight_decay:
            parts.append(f"decay {self.weight_decay:g}" + (" (decoupled)" if self.decoupled else ""))
        if self.max_grad_norm is not None:
            parts.append(f"gradient norm at most {self.max_grad_norm:g}")
        if self.max_grad_value is not None:
            parts.append(f"gradient elements at most {self.max_grad_value:g}")
        if self.learn_lr is not None:
            parts.append(f"learns a rate per {self.learn_lr}" if self.learn_lr != "global" else "learns its rate")
        return ", ".join(parts)


def check_number(name: str, value: Any) -> float:
    """The value, or the error that it is no finite number from 0 on."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} is {value!r}; it takes a number")
    if not (value >= 0.0 and math.isfinite(value)):
        raise ValueError(f"{name} is {value}; it takes a finite number, not negative")
    return float(value)


def adapted_parts(
    adapt: Adapt, layers: Sequence[Names], parameters: Mapping[str, Tensor]
) -> tuple[tuple[str, ...], ...]:
    """The parts of each layer that move.

    Args:
        adapt: "all", "head" (the last layer), "body" (all but the last), layer indices, names of parameters or of
            modules ("2.weight", or "2" for all of module 2), or a predicate (name, parameter) -> bool.
        layers: of each layer, which part goes by which name in the model.
        parameters: the model's, by name.

    Raises:
        ValueError: an unknown name, or an index outside -depth..depth-1.
        TypeError: none of these.
    """
    depth = len(layers)
    takes = "'all', 'head', 'body', layer indices, parameters by name, or a predicate (name, parameter) -> bool"

    def those(moves: Callable[[int, str], bool]) -> tuple[tuple[str, ...], ...]:
        return tuple(
            tuple(part for part in PARTS if part in names and moves(i, names[part])) for i, names in enumerate(layers)
        )

    if isinstance(adapt, str):
        named = {"all": range(depth), "head": range(depth - 1, depth), "body": range(depth - 1)}
        if adapt not in named:
            raise ValueError(f"adapt is {adapt!r}; it takes {takes}")
        return those(lambda i, _: i in named[adapt])
    if callable(adapt):
        return those(lambda _, name: bool(adapt(name, parameters[name])))
    if not isinstance(adapt, Iterable):
        raise TypeError(f"adapt is {adapt!r}; it takes {takes}")
    chosen = list(adapt)
    if chosen and all(isinstance(name, str) for name in chosen):
        known = [name for names in layers for name in names.values()]
        for name in chosen:
            if not any(_within(parameter, str(name)) for parameter in known):
                raise ValueError(f"adapt names {name!r}; the model has the parameters {', '.join(known)}")
        return those(lambda _, parameter: any(_within(parameter, str(name)) for name in chosen))
    try:
        if any(isinstance(i, bool) for i in chosen):
            raise TypeError("a mask")
        indices = [operator.index(i) for i in chosen]  # type: ignore[arg-type]
    except TypeError as error:
        raise TypeError(f"adapt is {adapt!r}; it takes {takes}") from error
    for i in indices:
        if not -depth <= i < depth:
            raise ValueError(f"adapt names layer {i}; the network has layers 0 to {depth - 1}")
    moving = {i % depth for i in indices}
    return those(lambda i, _: i in moving)


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
    if isinstance(lr, Tensor) and lr.requires_grad:
        raise TypeError("lr asks for a gradient, and none would reach it; learn_lr makes rates that are learned")
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


def _within(parameter: str, name: str) -> bool:
    """Whether a name is that of a parameter, or of a module around it."""
    return parameter == name or parameter.startswith(name + ".")
