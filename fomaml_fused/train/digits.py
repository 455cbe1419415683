"""Few-shot classification of handwritten digits whose classes were never trained on."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..module import FOMAML
from ..tasks import FewShot, TaskBatch, rotated_digits
from ..text import after_steps, table
from .files import save_figure, save_json
from .loop import Outer, draw_curve
from .rules import RunConfig, option, seeded

HELD_OUT = (3, 4, 7)  # digits that no rotation turns into themselves or into one of the others
STEPS = (0, 1, 5, 10, 50)
RATES = (0.05, 0.1, 0.4)
LOSS = "cross_entropy"


@dataclass(frozen=True, kw_only=True)
class DigitsConfig(RunConfig):
    """Options of the run."""

    iterations: int = 1000
    tasks: int = 32
    ways: int = option("classes a task, at most 12", 5)
    shots: int = option("support samples of each class", 1)
    queries: int = option("query samples of each class", 15)
    steps: int = 5
    lr: float = 0.1
    eval_tasks: int = 600


def run(config: DigitsConfig, out: Path, *, resume: bool = False) -> str:
    """Train, write checkpoint, learning curve and results to `out`, and give the table as text.

    Of several processes the first does.
    """
    meta, outer = prepare(config)
    untrained = copy.deepcopy(meta.model)
    if resume:
        outer.resume(out / "checkpoint.pt")
    outer.run(config.iterations, out / "checkpoint.pt")
    if not outer.ranks.first:
        return ""
    test = held_out(config)

    def from_scratch(*rates: float) -> dict[str, tuple[float, float]]:
        return _accuracies(lambda k: [config.untrained(untrained, LOSS, rate, k) for rate in rates], test)

    accuracies = {
        f"meta-trained, {config.rates_label}": _accuracies(lambda k: [config.trained(meta, k)], test),
        f"not meta-trained, lr {config.lr:g}": from_scratch(config.lr),
        f"not meta-trained, best lr of {', '.join(f'{r:g}' for r in RATES)}": from_scratch(*RATES),
    }
    found = {"accuracy": accuracies, "skipped_tasks": outer.skipped, "curve": outer.curve}
    save_json(out / "results.json", {"config": asdict(config), **found})
    save_figure(out / "learning_curve.png", lambda figure: _draw_curve(figure, outer.curve, config), (7, 4))
    rows = [["", *after_steps(STEPS)]]
    for name, by_steps in accuracies.items():
        rows.append([name, *(f"{100 * mean:.1f} ± {100 * half:.1f}" for mean, half in by_steps.values())])
    return "\n".join(
        [
            f"{config.ways}-way {config.shots}-shot accuracy in %, with 95% intervals, on {config.eval_tasks} tasks of "
            f"the digits {', '.join(map(str, HELD_OUT))}, never trained on:",
            *table(rows),
            *config.skipped_label(outer),
            f"learning curve, results and checkpoint: {out}/",
        ]
    )


def prepare(config: DigitsConfig) -> tuple[FOMAML, Outer]:
    """What is trained, and the loop that trains it."""
    meta = config.meta(_network(config), LOSS)
    return meta, config.outer_loop(meta, sampler(config, False, config.seed))


def held_out(config: DigitsConfig) -> TaskBatch:
    """The tasks that accuracies are taken on, of classes that are never trained on."""
    return sampler(config, True, config.seed + 1).sample(config.eval_tasks)


def sampler(config: DigitsConfig, held_out: bool, seed: int) -> FewShot:
    """Tasks of the classes that are held out, or of the others."""
    x, digit, rotation = rotated_digits()
    rows = torch.isin(digit, torch.tensor(HELD_OUT)) == held_out
    classes = (4 * digit + rotation)[rows]
    return FewShot(x[rows], classes, ways=config.ways, shots=config.shots, queries=config.queries, seed=seed)


def _network(config: DigitsConfig) -> nn.Sequential:
    with seeded(config.seed):
        return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, config.ways))


@torch.no_grad()
def _accuracies(adapters: Callable[[int], Iterable[FOMAML]], batch: TaskBatch) -> dict[str, tuple[float, float]]:
    """Mean accuracy over tasks and the half width of its 95% interval, by steps, with the best of the adapters."""
    found = {}
    for steps in STEPS:
        best = (0.0, 0.0)
        for meta in adapters(steps):
            per_task = accuracy(meta, batch)
            half = 1.96 * float(per_task.std()) / math.sqrt(len(per_task))
            best = max(best, (float(per_task.mean()), half))
        found[str(steps)] = best
    return found


def accuracy(meta: FOMAML, batch: TaskBatch) -> torch.Tensor:
    """The part of its query samples that each adapted task tells right, [T]."""
    outputs = meta.predict(batch.support_x, batch.support_y, batch.query_x)
    return (outputs.argmax(-1) == batch.query_y).float().mean(1)


def _draw_curve(figure: Any, curve: list[float], config: DigitsConfig) -> None:
    draw_curve(figure.subplots(), curve, config.loss_label, "Meta-training on digits")
