"""Learned initialisations for images as fields (Tancik et al. 2021), beside the standard one of SIREN."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..diagnostics import first_order_gap
from ..module import FOMAML
from ..problem import OUTER_RULES
from ..sirens import siren
from ..tasks import Crops, TaskBatch, photographs
from ..text import after_steps, table
from .files import save_figure, save_json
from .loop import Outer, draw_curve
from .ranks import Ranks
from .rules import RunConfig, option, seeded

TRAINED = ("astronaut", "hubble_deep_field", "immunohistochemistry", "retina", "rocket", "stereo_motorcycle")
HELD_OUT = ("chelsea", "coffee")
STEPS = (0, 1, 2, 5)
# The standard initialisation gets the best of these rates in every cell of the table; learned ones keep their own.
STANDARD_RATES = (0.003, 0.01, 0.03, 0.1, 0.3)
LOSS = "mse"
NAMES = {"fomaml": "FOMAML", "reptile": "Reptile"}
DRAWN, DRAWN_STEPS = 6, (2, 5)  # crops of the figure, and what is shown of each network
GAP_TASKS = 4  # crops whose exact meta-gradient is taken, one at a time

Adapters = Callable[[int], Iterable[FOMAML]]  # by inner steps; the best of them counts
Reconstructions = dict[int, Tensor]  # by inner steps: colours [T, pixels, 3]


@dataclass(frozen=True, kw_only=True)
class ImagesConfig(RunConfig):
    """Options of the run: few inner steps on all pixels, as in the authors' demo; network and crops suit a CPU."""

    iterations: int = 600
    tasks: int = 4
    steps: int = 2
    lr: float = 0.01
    outer: str = option("the outer rule, or both in turn", "both", choices=("both", *OUTER_RULES))
    outer_lr: float = 0.0003
    size: int = option("pixels along a side of a crop", 32)
    width: int = option("hidden features of the network", 64)
    w0: float = option("frequency of its sines", 30.0)
    eval_tasks: int = 64

    def each_rule(self) -> list[ImagesConfig]:
        """The options of a training run for each outer rule that is asked for."""
        return [replace(self, outer=rule) for rule in (OUTER_RULES if self.outer == "both" else (self.outer,))]

    def for_reptile(self, batch: TaskBatch, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """All pixels at every step, as in the authors' demo: a field is measured where it was fitted."""
        return batch.support_x, batch.support_y


def run(config: ImagesConfig, out: Path, *, resume: bool = False) -> str:
    """Train by each outer rule, write checkpoints, figures and results to `out`, and give the table as text.

    Of several processes the first does.
    """
    runs = [(own, *prepare(own), out / f"checkpoint_{own.outer}.pt") for own in config.each_rule()]
    for i, (_, _, outer, checkpoint) in enumerate(runs):
        if not resume:
            checkpoint.unlink(missing_ok=True)  # an earlier run's; --resume after a Ctrl-C would take it for this one's
        elif i == 0 or checkpoint.exists():  # a run that was interrupted before its second rule has none of that
            outer.resume(checkpoint)
    for own, _, outer, checkpoint in runs:
        outer.run(config.iterations, checkpoint, f"meta-training, {NAMES[own.outer]}")
    if not Ranks.current().first:
        return ""
    untrained, test = network(config), held_out(config)
    found = {_standard_label(): reconstructed(standard(config, untrained), test)}
    found |= {_label(own): reconstructed(learned(own, meta), test) for own, meta, *_ in runs}
    decibels = {name: _means(by_steps, test.query_y) for name, by_steps in found.items()}
    gaps = {
        when: first_order_gap(measured, *(part[:GAP_TASKS] for part in test))
        for own, meta, *_ in runs
        if own.outer == "fomaml"
        for when, measured in (("start", own.meta(untrained, LOSS)), ("end", meta))
    }
    curves = {NAMES[own.outer]: (outer.curve, own.loss_label) for own, _, outer, _ in runs}
    results = {
        "config": asdict(config),
        "photographs": {"trained": TRAINED, "held_out": HELD_OUT},
        "psnr": decibels,
        "first_order_gap": {when: asdict(gap) for when, gap in gaps.items()},
        "skipped_tasks": {NAMES[own.outer]: outer.skipped for own, _, outer, _ in runs},
        "curves": {name: curve for name, (curve, _) in curves.items()},
    }
    save_json(out / "results.json", results)
    save_figure(out / "learning_curve.png", lambda figure: _draw_curves(figure, curves), (5 * len(curves), 4))
    save_figure(out / "reconstructions.png", lambda figure: _draw(figure, found, test.query_y, config), (9, 10))
    rows = [["", *after_steps(STEPS)]]
    rows += [[name, *(f"{value:.2f}" for value in by_steps.values())] for name, by_steps in decibels.items()]
    return "\n".join(
        [
            f"mean PSNR in dB on {config.eval_tasks} crops of {config.size} x {config.size} pixels of "
            f"{' and '.join(HELD_OUT)}, photographs never trained on:",
            *table(rows),
            *(f"{when} of training, {gap}" for when, gap in gaps.items()),
            *(f"{NAMES[own.outer]}, {line}" for own, _, outer, _ in runs for line in own.skipped_label(outer)),
            f"reconstructions, learning curves, results and checkpoints: {out}/",
        ]
    )


def prepare(config: ImagesConfig) -> tuple[FOMAML, Outer]:
    """What is trained by one outer rule, and the loop that trains it."""
    meta = config.meta(network(config), LOSS)
    return meta, config.outer_loop(meta, sampler(config, TRAINED, config.seed), anneal=True)


def held_out(config: ImagesConfig) -> TaskBatch:
    """The crops that errors are taken on, of photographs that are never trained on."""
    return sampler(config, HELD_OUT, config.seed + 1).sample(config.eval_tasks)


def sampler(config: ImagesConfig, names: Iterable[str], seed: int) -> Crops:
    """Crops of photographs by their names."""
    return Crops(_photographs(tuple(names)), config.size, seed=seed)


@functools.cache
def _photographs(names: tuple[str, ...]) -> list[Tensor]:
    """Read once: both rules train on the same."""
    return photographs(names)


def network(config: ImagesConfig) -> nn.Sequential:
    """The network in the standard initialisation, from which training starts."""
    with seeded(config.seed):
        return siren(2, config.width, 3, hidden_layers=2, w0=config.w0)


def standard(config: ImagesConfig, untrained: nn.Module) -> Adapters:
    """The standard initialisation, with each of its rates."""
    return lambda steps: [config.untrained(untrained, LOSS, rate, steps) for rate in STANDARD_RATES]


def learned(config: ImagesConfig, meta: FOMAML) -> Adapters:
    """What was trained, with the rates that it was trained for."""
    return lambda steps: [config.trained(meta, steps)]


@torch.no_grad()
def reconstructed(adapters: Adapters, batch: TaskBatch) -> Reconstructions:
    """What adapted networks give for their crops, with the best of the adapters after so many steps."""
    found = {}
    for steps in STEPS:
        outputs = [meta.predict(batch.support_x, batch.support_y, batch.query_x) for meta in adapters(steps)]
        found[steps] = max(outputs, key=lambda colours: float(psnr(colours, batch.query_y).mean()))
    return found


def psnr(colours: Tensor, targets: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, [T], of colours from -1 to 1, not clipped; -inf where one diverged."""
    return (10.0 * torch.log10(4.0 / (colours - targets).square().mean((1, 2)))).nan_to_num(nan=-torch.inf)


def _means(found: Reconstructions, targets: Tensor) -> dict[str, float]:
    return {str(steps): float(psnr(colours, targets).mean()) for steps, colours in found.items()}


def _standard_label() -> str:
    return f"standard, best lr of {', '.join(f'{rate:g}' for rate in STANDARD_RATES)}"


def _label(config: ImagesConfig) -> str:
    return f"learned by {NAMES[config.outer]}, {config.rates_label}"


def _draw_curves(figure: Any, curves: dict[str, tuple[list[float], str]]) -> None:
    for axes, (name, (curve, label)) in zip(
        figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True
    ):
        draw_curve(axes, curve, label, f"Meta-training on images, {name}")


def _draw(figure: Any, found: dict[str, Reconstructions], targets: Tensor, config: ImagesConfig) -> None:
    """A column for each of the first crops; below its target, what each network makes of it."""
    rows = [("target", targets)]
    for name, by_steps in found.items():
        short = name.split(",")[0].removeprefix("learned by ")
        rows += [
            (f"{short},\n{label}", by_steps[k]) for k, label in zip(DRAWN_STEPS, after_steps(DRAWN_STEPS), strict=True)
        ]
    grid = figure.subplots(len(rows), min(DRAWN, len(targets)), squeeze=False)
    for line, (name, colours) in zip(grid, rows, strict=True):
        for axes, pixels in zip(line, colours, strict=False):
            axes.imshow(pixels.unflatten(0, (config.size, config.size)).add(1).div(2).clamp(0, 1).numpy())
        for axes in line:
            axes.set(xticks=[], yticks=[], frame_on=False)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
