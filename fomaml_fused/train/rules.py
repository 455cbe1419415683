"""What the runs share: their options, with the rules of the inner and outer loop, and what follows from these."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..inner import GRANULARITIES, OPTIMIZERS
from ..module import FOMAML
from ..problem import NONFINITE, OUTER_RULES
from ..rates import CONSTRAINTS
from ..tasks import Crops, FewShot, Sinusoids, TaskBatch
from .loop import Outer
from .ranks import Ranks

STEP_WEIGHTS = ("uniform", "annealed")
ANNEALED = 0.5  # the part of a run over which annealed step weights become the last step's alone


def option(text: str, default: Any = MISSING, **more: Any) -> Any:
    """A field of options with its line of help; a class that derives may give it another default, and no more."""
    return field(default=default, metadata={"help": text, **more})


@dataclass(frozen=True, kw_only=True)
class Rules:
    """The rules of inner and outer loop, by the names that `FOMAML` gives them."""

    steps: int = option("inner steps")
    lr: float = option("inner learning rate; where rates are learned, what they start from")
    optimizer: str = option("of the inner loop", "sgd", choices=OPTIMIZERS)
    momentum: float = option("of inner SGD", 0.0)
    nesterov: bool = option("take the momentum of inner SGD as Nesterov's", False)
    weight_decay: float = option("of the inner loop", 0.0)
    decoupled_weight_decay: bool = option("keep the decay out of momentum and Adam's moments", False)
    max_grad_norm: float | None = option("the longest gradient of a task", None, type=float)
    adapt: str = option("what moves: all, head, body, or parameters or modules by name, as 2.weight,4", "all")
    learn_lr: str | None = option("learn inner rates at this granularity", None, choices=GRANULARITIES, type=str)
    positive_lr: str | None = option("keeps learned rates from falling below 0", None, choices=CONSTRAINTS, type=str)
    outer: str = option(
        "fomaml, or reptile, which takes all samples of a task as support", "fomaml", choices=OUTER_RULES
    )
    step_weights: str | None = option(
        f"query loss of every step: uniform, or annealed to the last one's over {ANNEALED:.0%}% of the run",
        None,
        choices=STEP_WEIGHTS,
        type=str,
    )
    nonfinite: str = option("what becomes of diverged tasks in training", "propagate", choices=NONFINITE)
    compile: bool = option("run meta-steps as compiled code, which takes a compiler", False)

    def meta(self, model: nn.Module, loss: str) -> FOMAML:
        """What trains `model`.

        Raises:
            ValueError: rules that do not go together; the message names them.
        """
        return FOMAML(
            model,
            **self._inner(self.lr, self.steps),
            loss=loss,
            learn_lr=self.learn_lr,
            positive_lr=self.positive_lr,
            outer=self.outer,
            step_weights=self.weights_of_steps(0.0),
            nonfinite=self.nonfinite,
            compile=self.compile,
        )

    def untrained(self, model: nn.Module, loss: str, lr: Any, steps: int) -> FOMAML:
        """What adapts any network as the inner loop does, at given rates, to be measured."""
        return FOMAML(model, **self._inner(lr, steps), loss=loss)

    def trained(self, meta: FOMAML, steps: int) -> FOMAML:
        """What adapts the network of `meta` with so many steps, to be measured.

        Learned rates are taken as they stand; where steps have their own, those past the last go on with its.
        """
        model, loss = meta.model, meta.problem.loss.name
        if self.learn_lr is None or not steps:
            return self.untrained(model, loss, self.lr, steps)
        # Rates of elements have no steps; all others are a case of a rate for each layer and step.
        finest = "element" if self.learn_lr == "element" else "layer_step"
        found = FOMAML(model, **self._inner(self.lr, steps), loss=loss, learn_lr=finest)
        rows = torch.arange(steps).clamp(max=self.steps - 1 if meta.problem.inner.learns_each_step else 0)
        with torch.no_grad():
            for own, rates in zip(found.inner_lr.listed(), meta.inner_lr.listed(), strict=True):
                if own is not None and rates is not None:
                    own.copy_(rates if finest == "element" else rates[rows])
        return found

    def loss(
        self, meta: FOMAML, batch: TaskBatch, generator: torch.Generator, progress: float, share: slice = slice(None)
    ) -> Tensor:
        """What the outer loop descends on a share of a batch, when `progress` of the run (0 to 1) is through."""
        if self.step_weights is not None:
            meta.step_weights = self.weights_of_steps(progress)
        tensors = self.for_reptile(batch, generator) if self.outer == "reptile" else batch
        value: Tensor = meta(*(t[share] for t in tensors))
        return value

    def for_reptile(self, batch: TaskBatch, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """What Reptile, which has no query set, adapts on: x and y, for all inner steps or for each its own."""
        return dealt(batch, self.steps, generator)

    def weights_of_steps(self, progress: float) -> tuple[float, ...] | None:
        """What the query loss after each step counts when `progress` of the run (0 to 1) is through."""
        if self.step_weights is None:
            return None
        last = min(progress / ANNEALED, 1.0) if self.step_weights == "annealed" else 0.0
        each = (1.0 - last) / self.steps
        return (*(each,) * (self.steps - 1), each + last)

    def _inner(self, lr: Any, steps: int) -> dict[str, Any]:
        names = ("optimizer", "momentum", "nesterov", "weight_decay", "decoupled_weight_decay", "max_grad_norm")
        adapt = self.adapt if self.adapt in ("all", "head", "body") else self.adapt.split(",")
        return {name: getattr(self, name) for name in names} | {"lr": lr, "steps": steps, "adapt": adapt}


@dataclass(frozen=True, kw_only=True)
class RunConfig(Rules):
    """The options that every run has."""

    iterations: int = option("outer iterations")
    tasks: int = option("tasks a batch")
    outer_lr: float = option("learning rate of Adam, the outer optimiser, for weights and learned rates alike", 0.001)
    eval_tasks: int = option("held-out tasks of the table")
    seed: int = option("seed of weights and tasks", 0)

    def outer_loop(self, meta: FOMAML, sampler: Sinusoids | FewShot | Crops, **more: Any) -> Outer:
        """The outer loop of `meta` on tasks of the sampler; more: of `Outer`."""
        ranks = Ranks.current()
        share = ranks.share(self.tasks)
        outer = Outer(
            model=meta,
            loss=lambda: self.loss(
                meta, sampler.sample(self.tasks), sampler.generator, outer.iteration / self.iterations, share
            ),
            optimizer=torch.optim.Adam(meta.parameters(), lr=self.outer_lr, fused=True),
            generators=[sampler.generator],
            config=asdict(self),
            ranks=ranks,
            tasks=share.stop - share.start,
            **more,
        )
        return outer

    @property
    def rates_label(self) -> str:
        return f"lr {self.lr:g}" if self.learn_lr is None else "learned rates"

    @property
    def loss_label(self) -> str:
        return "half the squared distance a task moves" if self.outer == "reptile" else "query loss"

    def skipped_label(self, outer: Outer) -> list[str]:
        """A line of how many diverged tasks training left out, where it may."""
        return [f"diverged tasks left out in training: {outer.skipped}"] if self.nonfinite == "skip" else []


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Torch's global generator at a seed, and as it was afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def dealt(batch: TaskBatch, steps: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """All samples of each task, support and query, dealt out at random to its inner steps, as Reptile takes them.

    Steps that see different samples are what makes these generalise to one another, and the rule has no query set
    (Nichol et al. 2018, sections 5.1 and 6.3).

    Returns:
        x [T, K, N, in] and y [T, K, N] or [T, K, N, out], N the number of samples that each step gets.

    Raises:
        ValueError: there are fewer samples than steps.
    """
    x, y = torch.cat([batch.support_x, batch.query_x], 1), torch.cat([batch.support_y, batch.query_y], 1)
    tasks, samples = x.shape[:2]
    if samples < steps:
        raise ValueError(f"steps is {steps}; outer 'reptile' deals the {samples} samples of a task out to its steps")
    each = samples // steps
    order = torch.rand(tasks, samples, generator=generator).argsort(1)[:, : steps * each]
    row = torch.arange(tasks)[:, None]
    return x[row, order].unflatten(1, (steps, each)), y[row, order].unflatten(1, (steps, each))


def described(config: type[RunConfig]) -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    """Name, default and metadata of each option; metadata from the nearest class that says what it is."""
    ancestors = [base for base in config.__mro__ if is_dataclass(base)]
    for found in fields(config):
        told = [f.metadata for base in ancestors for f in fields(base) if f.name == found.name and f.metadata]
        yield found.name, found.default, told[0]
