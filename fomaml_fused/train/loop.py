"""The outer loop of every run: a progress bar, exact resumption from checkpoints, and a Ctrl-C that saves first.

Several processes that share a run go in step; the first of them shows the bar and writes the checkpoint.
"""

from __future__ import annotations

import importlib.util
import math
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..module import FOMAML
from .files import load_checkpoint, save_checkpoint
from .ranks import Ranks

WINDOW = 100  # iterations whose losses are averaged into one point of the learning curve
CHECKPOINT_EVERY = 5000  # iterations


class InterruptedRunError(Exception):
    """The run was asked to stop; its state is saved."""


@dataclass
class Outer:
    """The outer loop of a run.

    Attributes:
        model: what is trained.
        loss: takes no argument, draws a batch of tasks and gives its meta-loss.
        generators: the random generators that `loss` draws from.
        config: the options that a resumed run has to share.
        validate: the error of the model as it stands on tasks of its own; None for no choice among iterations.
        anneal: let the outer learning rate fall to zero along a half cosine; else it stays.
        ranks: the processes that share the run; `loss` then is of this one's share.
        tasks: that this process computes of each batch.
        curve: mean loss of each `WINDOW` iterations, filled while training.
        skipped: diverged tasks that were left out of the loss, counted while training.
    """

    model: nn.Module
    loss: Callable[[], Tensor]
    optimizer: torch.optim.Optimizer
    generators: list[torch.Generator]
    config: dict[str, Any]
    validate: Callable[[], float] | None = None
    anneal: bool = False
    ranks: Ranks = field(default_factory=Ranks)
    tasks: int = 1
    iteration: int = 0
    skipped: int = 0
    curve: list[float] = field(default_factory=list)
    pending: list[float] = field(default_factory=list)
    best: dict[str, Any] = field(default_factory=lambda: {"error": math.inf, "iteration": 0, "model": None})

    def run(self, iterations: int, checkpoint: Path | None, title: str | None = "meta-training") -> None:
        """Train up to `iterations` iterations in all, then load the best model on the way.

        Args:
            title: in front of the progress bar; None for no bar.

        Raises:
            InterruptedRunError: SIGINT or SIGTERM came; the iteration in hand was finished and saved.
        """
        from tqdm import tqdm

        pause = 0.2 if sys.stderr.isatty() else 10.0  # seconds between two looks at the bar
        done = self.iteration
        with (
            _asked_to_stop() as asked,
            tqdm(
                total=iterations,
                initial=done,
                desc=title,
                unit="it",
                mininterval=pause,
                disable=title is None or not self.ranks.first,
            ) as bar,
        ):
            while self.iteration < iterations:
                if self.anneal:
                    self._set_rate(0.5 * (1.0 + math.cos(math.pi * self.iteration / iterations)))
                self._step()
                stop = self.ranks.agree(asked())
                bar.update()
                if not self.pending:
                    bar.set_postfix(loss=f"{self.curve[-1]:.4f}", refresh=False)
                if self.iteration % CHECKPOINT_EVERY == 0 or self.iteration == iterations:
                    self._keep_if_best()
                if checkpoint is not None and (stop or self.iteration % CHECKPOINT_EVERY == 0):
                    self.save(checkpoint)
                if stop:
                    raise InterruptedRunError
        if checkpoint is not None:
            self.save(checkpoint)
        if self.best["model"] is not None:
            self.model.load_state_dict(self.best["model"])

    def _set_rate(self, factor: float) -> None:
        """A function of the iteration alone, so that a resumed run needs no state for it."""
        for group in self.optimizer.param_groups:
            group["lr"] = factor * self.optimizer.defaults["lr"]

    def _keep_if_best(self) -> None:
        """Remember the model whose validation error is the lowest so far; the last one where there is no validation."""
        error = self.validate() if self.validate is not None else -self.iteration
        if error < self.best["error"]:
            weights = {name: value.clone() for name, value in self.model.state_dict().items()}
            self.best = {"error": error, "iteration": self.iteration, "model": weights}

    def _step(self) -> None:
        loss = self.loss()
        self.optimizer.zero_grad()
        loss.backward()
        skipped = self.model.skipped if isinstance(self.model, FOMAML) else None
        left_out = 0.0 if skipped is None else float(skipped)
        if self.ranks.world > 1:
            loss, left_out = self.ranks.average(self.model.parameters(), loss, self.tasks - left_out, left_out)
        self.optimizer.step()
        self.iteration += 1
        self.pending.append(loss.item())
        self.skipped += int(left_out)
        if len(self.pending) == WINDOW:
            self.curve.append(sum(self.pending) / WINDOW)
            self.pending.clear()

    def save(self, path: Path) -> None:
        """Write everything that the rest of the run depends on; the first process does."""
        if not self.ranks.first:
            return
        save_checkpoint(
            path,
            {
                "config": self.config,
                "iteration": self.iteration,
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "generators": [generator.get_state() for generator in self.generators],
                "skipped": self.skipped,
                "curve": self.curve,
                "pending": self.pending,
                "best": self.best,
            },
        )

    def resume(self, path: Path) -> None:
        """Take up what `save` wrote.

        Raises:
            FileNotFoundError: there is no checkpoint.
            ValueError: it is of a run with other options.
        """
        state = load_checkpoint(path)
        for name, value in self.config.items():
            if state["config"].get(name) != value:
                raise ValueError(
                    f"{name} is {value}; the checkpoint at {path} was made with {state['config'].get(name)}, "
                    "and --resume takes the same options"
                )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for generator, saved in zip(self.generators, state["generators"], strict=True):
            generator.set_state(saved)
        self.iteration, self.skipped, self.best = state["iteration"], state["skipped"], state["best"]
        self.curve, self.pending = state["curve"], state["pending"]


def draw_curve(axes: Any, curve: list[float], label: str, title: str) -> None:
    """The learning curve, a point for each `WINDOW` iterations."""
    axes.plot([WINDOW * (i + 1) for i in range(len(curve))], curve)
    axes.set(xlabel="outer iteration", ylabel=label, title=title)
    axes.grid(alpha=0.3)


def require_demo_packages() -> None:
    """Fail before the first iteration rather than after the last.

    Raises:
        ModuleNotFoundError: a package of the `demo` extra is not installed.
    """
    missing = [name for name in ("matplotlib", "skimage", "sklearn", "tqdm") if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"training runs need {', '.join(missing)}: pip install 'fomaml-fused[demo]'", name=missing[0]
        )


@contextmanager
def _asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Whether SIGINT or SIGTERM came within the block; a second one acts as it always does."""
    came = False
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: object) -> None:
        nonlocal came
        came = True
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, note)
    try:
        yield lambda: came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
