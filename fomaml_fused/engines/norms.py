"""Normalisation of pre-activations, with scale and shift of each task's own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..problem import Norm
from .rules import OwnParameter


@dataclass
class NormSaved:
    """What the derivative of a normalisation needs: the normalized values [T, S, H], and one over their deviation."""

    normalized: Tensor
    inverse_deviation: Tensor


class NormLayer:
    """LayerNorm (Ba et al. 2016), or BatchNorm by the samples of each task's own set (Ioffe and Szegedy 2015).

    Attributes:
        parameters: scale and shift, as far as there are any, by part.
    """

    def __init__(self, norm: Norm, parameters: dict[str, OwnParameter]) -> None:
        self.eps, self.axis = norm.eps, -1 if norm.over == "features" else 1
        self.parameters = parameters

    def forward(self, z: Tensor) -> tuple[Tensor, NormSaved]:
        """Scale and shift of normalized pre-activations z [T, S, H], which stay as they are."""
        variance, mean = torch.var_mean(z, self.axis, correction=0, keepdim=True)
        inverse = (variance + self.eps).rsqrt()
        normalized = (z - mean) * inverse
        scale, shift = self._value("norm_weight"), self._value("norm_bias")
        y = normalized.clone() if scale is None else normalized * scale
        return (y if shift is None else y + shift), NormSaved(normalized, inverse)

    def backward(self, d: Tensor, saved: NormSaved) -> Tensor:
        """The gradient of the pre-activations from that of what `forward` gave; d [T, S, H] stays as it is."""
        scale = self._value("norm_weight")
        d = d if scale is None else d * scale
        across = (d * saved.normalized).mean(self.axis, keepdim=True)
        return (d - d.mean(self.axis, keepdim=True) - saved.normalized * across) * saved.inverse_deviation

    def gradients(self, d: Tensor, saved: NormSaved) -> dict[str, Tensor]:
        """Of each part [T, H], from the gradient d [T, S, H] of what `forward` gave."""
        found = {"norm_weight": (d * saved.normalized).sum(1), "norm_bias": d.sum(1)}
        return {part: found[part] for part in self.parameters}

    def adapted(self, part: str, task: slice) -> Tensor | None:
        """A part after the last step, [t, H]; None where there is none."""
        if part not in self.parameters:
            return None
        own = self.parameters[part]
        return own.shared.expand(task.stop - task.start, -1) if own.value is None else own.value[task]

    def _value(self, part: str) -> Tensor | None:
        """A part as the samples [T, S, H] take it."""
        own = self.parameters.get(part)
        return None if own is None else own.shared if own.value is None else own.value.unsqueeze(1)
