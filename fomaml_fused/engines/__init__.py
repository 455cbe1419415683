"""Engines do what a plan says and decide nothing.

Each is a module with the same five functions: `step`, the meta-step of a chunk of tasks; `adapt`, which gives the
adapted tasks as the engine holds them; `query_pass` and `query_backward` on those; and `fast_weights`, which
materialises them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from ..problem import Problem

if TYPE_CHECKING:
    from ..kernels.configuration import Config

FlatParameters = Sequence[Tensor | None]  # weight, bias, weight, bias, ...
Gradients = list[Tensor | None]


class Planned(Protocol):
    """What engines read of a plan."""

    @property
    def problem(self) -> Problem: ...

    @property
    def forms(self) -> tuple[str, ...]:
        """The form of each layer: "shared", "primal", "dual", or "dual:k", which is primal from step k on."""

    @property
    def engine(self) -> str: ...

    @property
    def precision(self) -> str | None:
        """Of the operands of a kernel's products; None without a kernel."""

    @property
    def config(self) -> Config | None:
        """A kernel's warps and tiles; None without a kernel."""


def fold_step(form: str) -> int | None:
    """The step k from which a layer of form "dual:k" is primal, 1 <= k <= K, K being the query pass; else None."""
    found = re.fullmatch(r"dual:([1-9][0-9]*)", form)
    return int(found[1]) if found else None
