"""Sine regression as in the MAML paper (Finn et al. 2017, section 5.1), beside joint pretraining on the same tasks."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..module import FOMAML
from ..tasks import Sinusoids, sinusoid
from ..text import table
from .files import save_figure, save_json
from .loop import WINDOW, Outer

SHOTS = (5, 10, 20)
STEPS = (0, 1, 5, 10)
# Fine-tuning a pretrained network gets the best of these rates in every cell of the table; meta-training keeps its own.
FINE_TUNING_RATES = (0.001, 0.003, 0.01, 0.03, 0.1)


@dataclass(frozen=True)
class SineConfig:
    """Options of the run; the defaults are the paper's, but for the schedule.

    The paper keeps Adam's rate, which `schedule="constant"` does. First-order training at that rate may jump to a worse
    plateau late in the run (with seed 0 it does). Annealed it does not, yet it still sharpens around the one step it is
    trained for, until some tasks diverge in ten. So the model that is kept is the one of all checkpoints with the
    lowest validation error after one and ten steps.
    """

    iterations: int = field(default=70_000, metadata={"help": "outer iterations"})
    tasks: int = field(default=25, metadata={"help": "tasks a batch"})
    shots: int = field(default=10, metadata={"help": "support samples a task, and as many query samples"})
    steps: int = field(default=1, metadata={"help": "inner steps"})
    lr: float = field(default=0.01, metadata={"help": "inner learning rate"})
    outer_lr: float = field(default=0.001, metadata={"help": "learning rate of Adam, the outer optimiser"})
    schedule: str = field(default="cosine", metadata={"help": "of the outer rate", "choices": ("cosine", "constant")})
    joint_iterations: int = field(default=20_000, metadata={"help": "iterations of the jointly pretrained network"})
    eval_tasks: int = field(default=1000, metadata={"help": "held-out tasks of the table"})
    seed: int = field(default=0, metadata={"help": "seed of weights and tasks"})


def run(config: SineConfig, out: Path, *, resume: bool = False) -> str:
    """Train, write checkpoint, figures and results to `out`, and give the table as text."""
    model = _network(config.seed)
    meta = FOMAML(model, lr=config.lr, steps=config.steps, loss="mse")
    sampler = Sinusoids(config.shots, config.shots, seed=config.seed)
    outer = Outer(
        model=model,
        loss=lambda: meta(*sampler.sample(config.tasks)),
        optimizer=torch.optim.Adam(model.parameters(), lr=config.outer_lr, fused=True),
        generators=[sampler.generator],
        config=asdict(config),
        validate=lambda: _validation_error(model, config),
        anneal=config.schedule == "cosine",
    )
    if resume:
        outer.resume(out / "checkpoint.pt")
    outer.run(config.iterations, out / "checkpoint.pt")
    pretrained = _pretrain(config)

    errors = {
        "meta-trained": _errors(model, (config.lr,), config),
        "pretrained jointly": _errors(pretrained, FINE_TUNING_RATES, config),
    }
    found = {"best_iteration": outer.best["iteration"], "mean_squared_error": errors, "curve": outer.curve}
    save_json(out / "results.json", {"config": asdict(config), **found})
    save_figure(out / "learning_curve.png", lambda figure: _draw_curve(figure, outer.curve, config), (7, 4))
    save_figure(out / "adapted.png", lambda figure: _draw_adapted(figure, model, pretrained, config), (10, 6))
    return "\n".join(
        [
            f"mean squared error on {config.eval_tasks} held-out sinusoids, before and after adaptation",
            f"(meta-trained: the model of iteration {outer.best['iteration']}, the best on validation tasks):",
            *_error_table(errors),
            f"learning curve, adapted curves, results and checkpoint: {out}/",
        ]
    )


@torch.no_grad()
def _validation_error(model: nn.Module, config: SineConfig) -> float:
    """Mean 5-shot error after one and after ten steps, on tasks that nothing else uses; infinite where one diverges."""
    batch = Sinusoids(5, 100, seed=config.seed + 4).sample(config.eval_tasks)
    errors = [FOMAML(model, lr=config.lr, steps=steps, loss="mse")(*batch).item() for steps in (1, 10)]
    return sum(errors) / 2 if all(map(math.isfinite, errors)) else math.inf


def _network(seed: int) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
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
def _errors(model: nn.Module, rates: tuple[float, ...], config: SineConfig) -> dict[str, dict[str, float]]:
    """Mean squared error by shots and steps, with the best of the rates in each cell."""
    errors: dict[str, dict[str, float]] = {}
    for shots in SHOTS:
        batch = Sinusoids(shots, 100, seed=config.seed + 2).sample(config.eval_tasks)
        errors[str(shots)] = {
            str(steps): min(FOMAML(model, lr=rate, steps=steps, loss="mse")(*batch).item() for rate in rates)
            for steps in STEPS
        }
    return errors


def _error_table(errors: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    rows = [["", "shots", *(f"{k} steps" if k != 1 else "1 step" for k in STEPS)]]
    for name, by_shots in errors.items():
        for shots, by_steps in by_shots.items():
            rows.append([name, shots, *(f"{error:.3f}" for error in by_steps.values())])
    return table(rows)


def _draw_curve(figure: Any, curve: list[float], config: SineConfig) -> None:
    axes = figure.subplots()
    axes.semilogy([WINDOW * (i + 1) for i in range(len(curve))], curve, linewidth=0.8)
    axes.set(xlabel="outer iteration", ylabel=f"query loss after {config.steps} inner step(s)", title="Meta-training")
    axes.grid(alpha=0.3)


@torch.no_grad()
def _draw_adapted(figure: Any, model: nn.Module, pretrained: nn.Module, config: SineConfig) -> None:
    """Two rows of networks, three columns of tasks: the truth, the five points adapted on, the curves after steps."""
    sampler = Sinusoids(5, 0, seed=config.seed + 3)
    amplitude, phase = sampler.draw(3)
    support_x = torch.rand(3, 5, 1, generator=sampler.generator) * 10 - 5
    support_y = sinusoid(support_x, amplitude, phase)
    x = torch.linspace(-5, 5, 200).expand(3, -1).unsqueeze(-1)
    y = sinusoid(x, amplitude, phase)
    grid = figure.subplots(2, 3, sharex=True, sharey="col")
    for row, (name, network) in enumerate({"meta-trained": model, "pretrained jointly": pretrained}.items()):
        for steps, style in ((0, ":"), (1, "--"), (10, "-")):
            curves = FOMAML(network, lr=config.lr, steps=steps).predict(support_x, support_y, x)
            for t in range(3):
                grid[row][t].plot(x[t, :, 0], curves[t, :, 0], style, label=f"after {steps} step(s)")
        for t in range(3):
            grid[row][t].plot(x[t, :, 0], y[t, :, 0], "k", alpha=0.4, label="truth")
            grid[row][t].plot(support_x[t, :, 0], support_y[t, :, 0], "k^", label="support")
        grid[row][0].set_ylabel(name)
    grid[0][0].legend(fontsize="small")
