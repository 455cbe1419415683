"""Few-shot classification of handwritten digits whose classes were never trained on."""

from __future__ import annotations

import copy
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..module import FOMAML
from ..tasks import FewShot, TaskBatch, rotated_digits
from ..text import table
from .files import save_figure, save_json
from .loop import WINDOW, Outer

HELD_OUT = (3, 4, 7)  # digits that no rotation turns into themselves or into one of the others
STEPS = (0, 1, 5, 10, 50)
RATES = (0.05, 0.1, 0.4)


@dataclass(frozen=True)
class DigitsConfig:
    """Options of the run."""

    iterations: int = field(default=1000, metadata={"help": "outer iterations"})
    tasks: int = field(default=32, metadata={"help": "tasks a batch"})
    ways: int = field(default=5, metadata={"help": "classes a task, at most 12"})
    shots: int = field(default=1, metadata={"help": "support samples of each class"})
    queries: int = field(default=15, metadata={"help": "query samples of each class"})
    steps: int = field(default=5, metadata={"help": "inner steps"})
    lr: float = field(default=0.1, metadata={"help": "inner learning rate"})
    outer_lr: float = field(default=0.001, metadata={"help": "learning rate of Adam, the outer optimiser"})
    eval_tasks: int = field(default=600, metadata={"help": "held-out tasks of the table"})
    seed: int = field(default=0, metadata={"help": "seed of weights and tasks"})


def run(config: DigitsConfig, out: Path, *, resume: bool = False) -> str:
    """Train, write checkpoint, learning curve and results to `out`, and give the table as text."""
    x, digit, rotation = rotated_digits()
    held_out = torch.isin(digit, torch.tensor(HELD_OUT))
    classes = 4 * digit + rotation

    def sampler(rows: torch.Tensor, seed: int) -> FewShot:
        return FewShot(x[rows], classes[rows], ways=config.ways, shots=config.shots, queries=config.queries, seed=seed)

    train, test = sampler(~held_out, config.seed), sampler(held_out, config.seed + 1).sample(config.eval_tasks)
    model = _network(config)
    untrained = copy.deepcopy(model)
    meta = FOMAML(model, lr=config.lr, steps=config.steps, loss="cross_entropy")
    outer = Outer(
        model=model,
        loss=lambda: meta(*train.sample(config.tasks)),
        optimizer=torch.optim.Adam(model.parameters(), lr=config.outer_lr, fused=True),
        generators=[train.generator],
        config=asdict(config),
    )
    if resume:
        outer.resume(out / "checkpoint.pt")
    outer.run(config.iterations, out / "checkpoint.pt")

    accuracies = {
        f"meta-trained, lr {config.lr:g}": _accuracies(model, (config.lr,), test),
        f"not meta-trained, lr {config.lr:g}": _accuracies(untrained, (config.lr,), test),
        f"not meta-trained, best lr of {', '.join(f'{r:g}' for r in RATES)}": _accuracies(untrained, RATES, test),
    }
    save_json(out / "results.json", {"config": asdict(config), "accuracy": accuracies, "curve": outer.curve})
    save_figure(out / "learning_curve.png", lambda figure: _draw_curve(figure, outer.curve), (7, 4))
    rows = [["", *(f"{k} steps" if k != 1 else "1 step" for k in STEPS)]]
    for name, by_steps in accuracies.items():
        rows.append([name, *(f"{100 * mean:.1f} ± {100 * half:.1f}" for mean, half in by_steps.values())])
    return "\n".join(
        [
            f"{config.ways}-way {config.shots}-shot accuracy in %, with 95% intervals, on {config.eval_tasks} tasks of "
            f"the digits {', '.join(map(str, HELD_OUT))}, never trained on:",
            *table(rows),
            f"learning curve, results and checkpoint: {out}/",
        ]
    )


def _network(config: DigitsConfig) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, config.ways))


@torch.no_grad()
def _accuracies(model: nn.Module, rates: tuple[float, ...], batch: TaskBatch) -> dict[str, tuple[float, float]]:
    """Mean accuracy over tasks and the half width of its 95% interval, by steps, with the best of the rates."""
    found = {}
    for steps in STEPS:
        best = (0.0, 0.0)
        for rate in rates:
            meta = FOMAML(model, lr=rate, steps=steps, loss="cross_entropy")
            outputs = meta.predict(batch.support_x, batch.support_y, batch.query_x)
            per_task = (outputs.argmax(-1) == batch.query_y).float().mean(1)
            half = 1.96 * float(per_task.std()) / math.sqrt(len(per_task))
            best = max(best, (float(per_task.mean()), half))
        found[str(steps)] = best
    return found


def _draw_curve(figure: Any, curve: list[float]) -> None:
    axes = figure.subplots()
    axes.plot([WINDOW * (i + 1) for i in range(len(curve))], curve)
    axes.set(xlabel="outer iteration", ylabel="query loss", title="Meta-training on digits")
    axes.grid(alpha=0.3)
