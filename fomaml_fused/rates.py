"""Inner learning rates that are learned, as parameters of a module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .inner import PARTS, InnerLoop

CONSTRAINTS = ("softplus", "clamp")


class LearnedRates(nn.Module):
    """The rates of an inner loop, at the granularity of `InnerLoop.learn_lr`.

    Meta-SGD (Li et al. 2017) learns one for every element, MAML++ (Antoniou et al. 2019) one for every layer and step.

    Args:
        inner: whose rates these start from.
        positive: "softplus" or "clamp" keep rates from falling below 0; None lets them.
        layers: of each layer, its parameters by part.

    Raises:
        ValueError: an unknown constraint, rates that differ where they are to be one, or a start that softplus cannot
            give.
    """

    def __init__(self, inner: InnerLoop, positive: str | None, layers: Sequence[Mapping[str, nn.Parameter]]) -> None:
        super().__init__()
        if positive not in (None, *CONSTRAINTS):
            raise ValueError(f"positive_lr is {positive!r}; it takes None, 'softplus' or 'clamp'")
        if not inner.steps:
            raise ValueError(f"learn_lr is {inner.learn_lr!r}; without an inner step there is no rate to learn")
        self.inner, self.positive = inner, positive
        like = layers[0]["weight"]
        start = torch.tensor(inner.rates, dtype=torch.float64)  # [K, layers]
        if positive is not None and bool((start < 0).any() or (positive == "softplus" and (start == 0).any())):
            raise ValueError(f"lr is {start.min():g}; positive_lr={positive!r} takes rates above 0 to start from")
        axes = {"global": (0, 1), "step": (1,), "layer": (0,), "layer_step": (), "element": (0,)}[str(inner.learn_lr)]
        for axis in axes:
            if bool((start != start.narrow(axis, 0, 1)).any()):
                raise ValueError(f"lr is {inner.rates}; learn_lr={inner.learn_lr!r} takes one rate for all of them")
            start = start.narrow(axis, 0, 1)
        raw = torch.log(torch.expm1(start)) if positive == "softplus" else start
        self.places: list[int] = []  # of each element-wise parameter, where engines list it
        if inner.learn_lr != "element":
            self.value = nn.Parameter(raw.to(like.dtype).to(like.device))  # broadcasts to [K, layers]
            return
        self.values = nn.ParameterList()
        self.length = len(PARTS) * len(layers)
        for i, parts in enumerate(layers):
            for part in inner.adapt[i]:
                self.places.append(len(PARTS) * i + PARTS.index(part))
                self.values.append(nn.Parameter(torch.full_like(parts[part], float(raw[0, i]))))

    def listed(self) -> list[Tensor | None]:
        """As engines list them."""
        if self.inner.learn_lr != "element":
            rates = self._constrained(self.value)
            rows = self.inner.steps if self.inner.learns_each_step else 1
            return [rates.expand(rows, len(self.inner.adapt))]
        found: list[Tensor | None] = [None] * self.length
        for place, raw in zip(self.places, self.values, strict=True):
            found[place] = self._constrained(raw)
        return found

    def for_reference(self, layers: Sequence[dict[str, str]]) -> Any:
        """As the functions of `reference` take `lr`; layers: of each, the names of its parameters by part."""
        listed = self.listed()
        if self.inner.learn_lr != "element":
            return listed[0]
        named = {len(PARTS) * i + PARTS.index(p): name for i, parts in enumerate(layers) for p, name in parts.items()}
        return {named[place]: listed[place] for place in self.places}

    def extra_repr(self) -> str:
        return f"{self.inner.learn_lr}" + (f", {self.positive}" if self.positive else "")

    def _constrained(self, raw: Tensor) -> Tensor:
        if self.positive == "softplus":
            return F.softplus(raw)
        return raw.clamp(min=0.0) if self.positive == "clamp" else raw
