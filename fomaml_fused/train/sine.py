"""Sine regression as in the MAML paper (Finn et al. 2017, section 5.1), beside joint pretraining on the same tasks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..module import FOMAML
from ..tasks import Sinusoids, TaskBatch, sinusoid
from ..text import after_steps, table
from .files import save_figure, save_json
from .loop import Outer, draw_curve
from .rules import RunConfig, option, seeded

SHOTS = (5, 10, 20)
STEPS = (0, 1, 5, 10)
# Fine-tuning a pretrained network gets the best of these rates in every cell of the table; meta-training keeps its own.
FINE_TUNING_RATES = (0.001, 0.003, 0.01, 0.03, 0.1)


@dataclass(frozen=True, kw_only=True)
class SineConfig(RunConfig):
    """Options of the run; the defaults are the paper's, but for the schedule.

    The paper keeps Adam's rate, which `schedule="constant"` does. First-order training at that rate may jump to a worse
    plateau late in the run (with seed 0 it does). Annealed it does not, yet it still sharpens around the one step it is
    trained for, until some tasks diverge in ten. So the model that is kept is the one of all checkpoints with the
    lowest validation error after one and ten steps.
    """

    iterations: int = 70_000
    tasks: int = 25
    shots: int = option("support samples a task, and as many query samples", 10)
    steps: int = 1
    lr: float = 0.01
    schedule: str = option("of the outer rate", "cosine", choices=("cosine", "constant"))
    joint_iterations: int = option("iterations of the jointly pretrained network", 20_000)
    eval_tasks: int = 1000


def run(config: SineConfig, out: Path, *, resume: bool = False) -> str:
    """Train, write checkpoint, figures and results to `out`, and give the table as text.

    Of several processes the first does.
    """
    meta, outer = prepare(config)
    if resume:
        outer.resume(out / "checkpoint.pt")
    outer.run(config.iterations, out / "checkpoint.pt")
    if not outer.ranks.first:
        return ""
    pretrained = _pretrain(config)

    def trained(steps: int) -> list[FOMAML]:
        return [config.trained(meta, steps)]

    def fine_tuned(steps: int) -> list[FOMAML]:
        return [config.untrained(pretrained, "mse", rate, steps) for rate in FINE_TUNING_RATES]

    errors = {"meta-trained": _errors(trained, config), "pretrained jointly": _errors(fine_tuned, config)}
    found = {"best_iteration": outer.best["iteration"], "skipped_tasks": outer.skipped, "mean_squared_error": errors}
    found["curve"] = outer.curve
    save_json(out / "results.json", {"config": asdict(config), **found})
    save_figure(out / "learning_curve.png", lambda figure: _draw_curve(figure, outer.curve, config), (7, 4))
    save_figure(out / "adapted.png", lambda figure: _draw_adapted(figure, meta, pretrained, config), (10, 5.5))
    return "\n".join(
        [
            f"mean squared error on {config.eval_tasks} held-out sinusoids, before and after adaptation",
            f"(meta-trained: the model of iteration {outer.best['iteration']}, the best on validation tasks):",
            *_error_table(errors),
            *config.skipped_label(outer),
            f"learning curve, adapted curves, results and checkpoint: {out}/",
        ]
    )


def prepare(config: SineConfig) -> tuple[FOMAML, Outer]:
    """What is trained, and the loop that trains it."""
    meta = config.meta(_network(config.seed), "mse")
    sampler = Sinusoids(config.shots, config.shots, seed=config.seed)
    validate, anneal = partial(_validation_error, meta, config), config.schedule == "cosine"
    return meta, config.outer_loop(meta, sampler, validate=validate, anneal=anneal)


@torch.no_grad()
def _validation_error(meta: FOMAML, config: SineConfig) -> float:
    """Mean 5-shot error after one and after ten steps, on tasks that nothing else uses; infinite where one diverges."""
    batch = Sinusoids(5, 100, seed=config.seed + 4).sample(config.eval_tasks)
    errors = [config.trained(meta, steps)(*batch).item() for steps in (1, 10)]
    return sum(errors) / 2 if all(map(math.isfinite, errors)) else math.inf


def _network(seed: int) -> nn.Sequential:
    with seeded(seed):
        return nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))


def _pretrain(config: SineConfig) -> nn.Sequential:
    """The same network trained on the samples of all tasks at once, as the paper's baseline."""
    model = _network(config.seed)
    sampler = Sinusoids(config.shots, config.shots, seed=config.seed + 1)

    def loss() -> Tensor:
        batch = sampler.sample(config.tasks)
        x, y = torch.cat([batch.support_x, batch.query_x], 1), torch.cat([batch.support_y, batch.query_y], 1)
        return F.mse_loss(model(x), y)

    optimizer = torch.optim.Adam(model.parameters(), lr=config.outer_lr, fused=True)
    Outer(model, loss, optimizer, [sampler.generator], {}).run(config.joint_iterations, None, "joint pretraining")
    return model


@torch.no_grad()
def _errors(adapters: Callable[[int], Iterable[FOMAML]], config: SineConfig) -> dict[str, dict[str, float]]:
    """Mean squared error by shots and steps, with the best of the adapters of so many steps in each cell."""
    errors: dict[str, dict[str, float]] = {}
    for shots in SHOTS:
        batch = held_out(shots, config)
        errors[str(shots)] = {str(steps): min(meta(*batch).item() for meta in adapters(steps)) for steps in STEPS}
    return errors


def held_out(shots: int, config: SineConfig) -> TaskBatch:
    """The tasks that errors are taken on, each with 100 query samples."""
    return Sinusoids(shots, 100, seed=config.seed + 2).sample(config.eval_tasks)


def _error_table(errors: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    rows = [["", "shots", *after_steps(STEPS)]]
    for name, by_shots in errors.items():
        for shots, by_steps in by_shots.items():
            rows.append([name, shots, *(f"{error:.3f}" for error in by_steps.values())])
    return table(rows)


def _draw_curve(figure: Any, curve: list[float], config: SineConfig) -> None:
    axes = figure.subplots()
    draw_curve(axes, curve, f"{config.loss_label} after {config.steps} inner step(s)", "Meta-training")
    axes.set_yscale("log")


@torch.no_grad()
def _draw_adapted(figure: Any, meta: FOMAML, pretrained: nn.Module, config: SineConfig) -> None:
    """Draw two rows of networks by three sinusoids: the truth, five support points, the curves before and after steps.

    The amplitudes lie a quarter, a half and three quarters through their range.
    """
    sampler = Sinusoids(5, 0, seed=config.seed + 3)
    _, phase = sampler.draw(3)
    amplitude = torch.linspace(*sampler.amplitude, 5)[1:4].view_as(phase)
    support_x = torch.rand(3, 5, 1, generator=sampler.generator) * 10 - 5
    support_y = sinusoid(support_x, amplitude, phase)
    x = torch.linspace(-5, 5, 200).expand(3, -1).unsqueeze(-1)
    y = sinusoid(x, amplitude, phase)
    grid = figure.subplots(2, 3, sharex=True, sharey="col")
    for row, name in enumerate(("meta-trained", "pretrained jointly")):
        for steps, style in ((0, ":"), (1, "--"), (10, "-")):
            adapts = config.untrained(pretrained, "mse", config.lr, steps) if row else config.trained(meta, steps)
            curves = adapts.predict(support_x, support_y, x)
            for t in range(3):
                label = "before adaptation" if steps == 0 else f"after {steps} step{'s' * (steps > 1)}"
                grid[row][t].plot(x[t, :, 0], curves[t, :, 0], style, label=label)
        for t in range(3):
            grid[row][t].plot(x[t, :, 0], y[t, :, 0], "k", alpha=0.4, label="true sinusoid")
            grid[row][t].plot(support_x[t, :, 0], support_y[t, :, 0], "k^", label="support points")
            grid[row][t].grid(alpha=0.3)
        grid[row][0].set_ylabel(f"{name}\ny")
    for axes in grid[1]:
        axes.set_xlabel("x")
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=5, frameon=False)
