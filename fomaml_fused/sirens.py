"""SIREN, a network of sines for fields: plain modules of torch and `Sine`, in the initialisation that sines take."""

from __future__ import annotations

import math
import operator

import torch
from torch import nn

from .inner import check_number
from .network import Sine


@torch.no_grad()
def siren(
    in_features: int,
    hidden_features: int,
    out_features: int,
    *,
    hidden_layers: int = 3,
    w0: float = 30.0,
    w0_first: float | None = None,
) -> nn.Sequential:
    """A SIREN, freshly drawn from torch's global generator (Sitzmann et al. 2020, section 3.2 and supplement, 1.5).

    With n the inputs of a layer, weights are uniform within 1/n in the first layer and sqrt(6/n)/w0 in all others. On
    inputs in [-1, 1] each sine after the first then gets arguments of standard deviation 1, whatever the depth, but for
    the biases, which are torch's own. That is the authors' code, `sin(w0 * (W x + b))`. The text of the paper differs:
    w0 leaves the bias alone, and the first layer has larger weights, by mistake (https://github.com/vsitzmann/siren,
    issues 4 and 55).

    Args:
        hidden_layers: layers from `hidden_features` to `hidden_features`, between the first layer and the last.
        w0: what sines multiply their inputs by. It scales the gradients of weights, so inner rates depend on it.
        w0_first: that of the first sine, which says what frequencies the field begins with; None for `w0`.

    Returns:
        Linear and `Sine` in turn, from [..., in_features] to [..., out_features]; no sine behind the last Linear.

    Raises:
        TypeError, ValueError: a width, a depth or a frequency that is none; the message names it.
    """
    first, hidden, last = (
        _whole(name, value, 1)
        for name, value in (
            ("in_features", in_features),
            ("hidden_features", hidden_features),
            ("out_features", out_features),
        )
    )
    depth = _whole("hidden_layers", hidden_layers, 0)
    w0 = _frequency("w0", w0)
    w0_first = w0 if w0_first is None else _frequency("w0_first", w0_first)
    layers: list[nn.Module] = [_linear(first, hidden, 1.0 / first), Sine(w0_first)]
    bound = math.sqrt(6.0 / hidden) / w0
    for _ in range(depth):
        layers += [_linear(hidden, hidden, bound), Sine(w0)]
    return nn.Sequential(*layers, _linear(hidden, last, bound))


def _linear(in_features: int, out_features: int, bound: float) -> nn.Linear:
    linear = nn.Linear(in_features, out_features)
    linear.weight.uniform_(-bound, bound)
    return linear


def _whole(name: str, value: int, least: int) -> int:
    takes = f"it takes a whole number, {least} or more"
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} is {value!r}; {takes}")
    if operator.index(value) < least:
        raise ValueError(f"{name} is {value}; {takes}")
    return operator.index(value)


def _frequency(name: str, value: float) -> float:
    if not check_number(name, value):
        raise ValueError(f"{name} is 0; it takes a positive number")
    return float(value)
