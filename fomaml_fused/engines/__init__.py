"""Engines do what a plan says and decide nothing.

Each is a module with the same five functions: `step`, the meta-step of a chunk of tasks; `adapt`, which gives the
adapted tasks as the engine holds them; `query_pass` and `query_backward` on those; and `fast_weights`, which
materialises them.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from torch import Tensor

from ..batch import Sizes
from ..inner import PARTS
from ..problem import Problem

if TYPE_CHECKING:
    from ..kernels.configuration import Config

# Of each layer those of `PARTS`, None for what it lacks; then rates that are learned: one tensor [K, layers], or [1,
# layers] where all steps share them, or for rates of elements one of each parameter's shape, None where it stays.
FlatParameters = Sequence[Tensor | None]
Gradients = list[Tensor | None]  # alike


class Outcome(NamedTuple):
    """A chunk's meta-step.

    Attributes:
        value: the tasks' losses times their shares, summed.
        dx: the gradient of the query features [t, Q, in], if asked for.
        gradients: the outer gradient of each parameter, if asked for.
        kept: where diverged tasks are skipped, the shares of the others, summed.
    """

    value: Tensor
    dx: Tensor | None
    gradients: Gradients
    kept: Tensor | None = None


class Planned(Hashable, Protocol):
    """What engines read of a plan."""

    @property
    def problem(self) -> Problem: ...

    @property
    def forms(self) -> tuple[str, ...]:
        """The form of each layer: "shared", "primal", "dual", or "dual:k", which is primal from step k on."""

    @property
    def rows(self) -> int | None:
        """Samples of a task that the batched engine takes at a time; None for all of its set."""

    @property
    def block(self) -> int | None:
        """Tasks that a thread of the native engine takes at a time."""

    @property
    def gathers(self) -> bool:
        """Whether it takes the outer gradient of all tasks' query samples at once."""

    @property
    def sizes(self) -> Sizes: ...

    @property
    def engine(self) -> str: ...

    @property
    def precision(self) -> str | None:
        """Of the operands of a kernel's products; None without a kernel."""

    @property
    def config(self) -> Config | None:
        """A kernel's warps and tiles; None without a kernel."""


def layers_of(problem: Problem, flat: FlatParameters) -> list[dict[str, Tensor | None]]:
    """Of each layer what is listed for its parameters, by part."""
    starts = range(0, len(PARTS) * problem.network.depth, len(PARTS))
    return [dict(zip(PARTS, flat[start:], strict=False)) for start in starts]


def rates_of(problem: Problem, flat: FlatParameters) -> FlatParameters:
    """What is listed for learned rates."""
    return flat[len(PARTS) * problem.network.depth :]


def listed(pairs: Sequence[tuple[Tensor, Tensor | None]]) -> Gradients:
    """Weights and biases of each layer, as engines list parameters."""
    rest: Gradients = [None] * (len(PARTS) - 2)
    return [value for pair in pairs for value in (*pair, *rest)]


def fold_step(form: str) -> int | None:
    """The step k from which a layer of form "dual:k" is primal, 1 <= k <= K, K being the query pass; else None."""
    found = re.fullmatch(r"dual:([1-9][0-9]*)", form)
    return int(found[1]) if found else None
