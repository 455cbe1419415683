"""Members of the family by their names: `FOMAML` with one option set."""

from __future__ import annotations

from typing import Any

from torch import nn

from .module import FOMAML


class ANIL(FOMAML):
    """`FOMAML` whose inner loop moves the head alone (Raghu et al. 2020); every layer gets its outer gradient."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__(model, **_with("ANIL", options, adapt="head"))


class MetaSGD(FOMAML):
    """`FOMAML` that learns a rate for every element of every parameter (Li et al. 2017, to first order)."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__(model, **_with("MetaSGD", options, learn_lr="element"))


class Reptile(FOMAML):
    """The outer rule of Reptile (Nichol et al. 2018, algorithm 2): no query set; the gradient is how far tasks move."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__(model, **_with("Reptile", options, outer="reptile"))


def _with(name: str, options: dict[str, Any], **own: str) -> dict[str, Any]:
    for option, value in own.items():
        if option in options:
            raise TypeError(f"{name} is FOMAML with {option}={value!r}; FOMAML takes another {option}")
    return options | own
