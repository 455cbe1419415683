"""Whether first-order training helps fields: initialisations of the images run under one budget, exact MAML's too.

python -m bench.fields [--save bench/results/fields.json] [--workers 2] [--quick] [--only NAME ...]

Network, crops, outer optimiser and evaluation are those of `fomaml-fused train images`. What is meta-trained gets the
inner rate of `RATES` with which it is the best after the steps it is trained for, by a seed that nothing else uses and
crops of the photographs trained on; what is not gets the best of the run's rates in every cell. Then come the seeds
that are reported, of network and crops to train on, all measured on the same crops of other photographs. Runs go side
by side, one thread each.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from fomaml_fused import reference
from fomaml_fused.diagnostics import first_order_gap
from fomaml_fused.tasks import TaskBatch
from fomaml_fused.train import images
from fomaml_fused.train.files import save_json

from .rules import TUNING_SEED, cells, summarize
from .test_workloads import environment


@dataclass(frozen=True)
class Initialisation:
    """Where adaptation starts from.

    Attributes:
        options: of the images run.  trained: by its outer loop.  tuned: at an inner rate of its own.
        exact: descends the query loss through the inner steps.
    """

    options: dict[str, Any] = field(default_factory=dict)
    trained: bool = True
    tuned: bool = True
    exact: bool = False


INITIALISATIONS = {
    "standard": Initialisation(trained=False, tuned=False),
    "trained on all crops jointly": Initialisation({"steps": 0}, tuned=False),
    "FOMAML": Initialisation(),
    "FOMAML, rates by layer": Initialisation({"learn_lr": "layer", "positive_lr": "clamp"}),
    "Reptile": Initialisation({"outer": "reptile"}),
    "exact MAML": Initialisation(exact=True),
}
RATES = (0.003, 0.01, 0.03, 0.1)


@dataclass(frozen=True)
class Budget:
    """How long and how often."""

    iterations: int = images.ImagesConfig.iterations
    seeds: int = 3
    eval_tasks: int = 64
    width: int = images.ImagesConfig.width
    size: int = images.ImagesConfig.size


QUICK = Budget(iterations=2, seeds=2, eval_tasks=4, width=8, size=8)


@dataclass(frozen=True)
class Job:
    """One initialisation at one inner rate, and what it comes to."""

    name: str
    lr: float
    seed: int
    budget: Budget

    def run(self) -> dict[str, Any]:
        """PSNR after each of the run's steps, the loss while training, and how far first order is off at both ends."""
        kind = INITIALISATIONS[self.name]
        shared = {name: value for name, value in asdict(self.budget).items() if name != "seeds"}
        options: dict[str, Any] = shared | {"outer": "fomaml", "lr": self.lr, "seed": self.seed} | kind.options
        config = images.ImagesConfig(**options)
        meta, outer = images.prepare(config)
        batch = images.held_out(replace(config, seed=0))
        if self.seed == TUNING_SEED:
            batch = images.sampler(config, images.TRAINED, config.seed + 4).sample(config.eval_tasks)
        few = TaskBatch(*(part[: images.GAP_TASKS] for part in batch))
        has_gap = kind.trained and kind.tuned and config.outer == "fomaml"
        gaps = [asdict(first_order_gap(meta, *few))] if has_gap else []
        if kind.exact:
            crops = images.sampler(config, images.TRAINED, config.seed)
            inner: dict[str, Any] = {"lr": config.lr, "steps": config.steps, "loss": images.LOSS, "first_order": False}
            outer.loss = lambda: reference.meta_loss(meta.model, *crops.sample(config.tasks), **inner)
        if kind.trained:
            outer.run(config.iterations, None, title=None)
        gaps += [asdict(first_order_gap(meta, *few))] if has_gap else []
        adapters = images.learned(config, meta) if kind.tuned else images.standard(config, meta.model)
        found = images.reconstructed(adapters, batch)
        decibels = [float(images.psnr(colours, batch.query_y).mean()) for colours in found.values()]
        return {
            "psnr": [round(value, 3) if math.isfinite(value) else None for value in decibels],
            "curve": [round(value, 5) for value in outer.curve],
            "gap": [{name: round(gap[name], 4) for name in ("cosine", "norm_ratio")} for gap in gaps],
        }


def compare(budget: Budget, workers: int, names: Iterable[str] = INITIALISATIONS) -> list[dict[str, Any]]:
    """A row for each initialisation."""
    kinds = {name: INITIALISATIONS[name] for name in names}
    tuned = [name for name, kind in kinds.items() if kind.tuned]
    jobs = [Job(name, lr, TUNING_SEED, budget) for name in tuned for lr in RATES]
    tried: dict[str, dict[float, float | None]] = {name: {} for name in kinds}
    for job, result in zip(jobs, _results(jobs, workers), strict=True):
        tried[job.name][job.lr] = result["psnr"][images.STEPS.index(images.ImagesConfig.steps)]
    best = {name: max(rates, key=lambda lr: _worth(rates[lr]), default=RATES[0]) for name, rates in tried.items()}
    jobs = [Job(name, best[name], seed, budget) for name in kinds for seed in range(budget.seeds)]
    results = iter(_results(jobs, workers))
    rows = []
    for name, kind in kinds.items():
        found = [next(results) for _ in range(budget.seeds)]
        row: dict[str, Any] = {"tasks": "images", "initialisation": name, "lr": best[name] if kind.tuned else None}
        row["validation"] = tried[name]
        row |= {("seeds" if part == "psnr" else part): [result[part] for result in found] for part in found[0]}
        rows.append(row | summarize(row["seeds"]))
    return rows


def _worth(decibels: float | None) -> float:
    return -math.inf if decibels is None else decibels


def _results(jobs: list[Job], workers: int) -> list[dict[str, Any]]:
    if workers == 1:
        return list(_told(jobs, map(Job.run, jobs)))
    with ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        return list(_told(jobs, pool.map(Job.run, jobs)))


def _told(jobs: list[Job], results: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for i, (job, result) in enumerate(zip(jobs, results, strict=True)):
        print(f"{i + 1}/{len(jobs)} {job.name}, lr {job.lr:g}, seed {job.seed}: {result['psnr']}", flush=True)
        yield result


def render(rows: list[dict[str, Any]]) -> str:
    """The Markdown table of PSNR by inner steps."""
    steps = " | ".join(f"{k} steps" if k != 1 else "1 step" for k in images.STEPS)
    lines = [f"| initialisation | inner rate | {steps} |", "|---" * (len(images.STEPS) + 2) + "|"]
    for row in rows:
        rate = "best of each cell" if row["lr"] is None else f"{row['lr']:g}"
        lines.append(f"| {row['initialisation']} | {rate} | {' | '.join(cells(row))} |")
    return "\n".join(lines)


def render_gaps(rows: list[dict[str, Any]]) -> str:
    """The Markdown table of the first-order gradient beside the exact one, before and after training, by means."""
    lines = ["| trained by | inner rate | cosine, start | cosine, end | norm ratio, start | norm ratio, end |"]
    lines.append("|---" * 6 + "|")
    for row in rows:
        if row["gap"][0]:
            ends = [(part, end) for part in ("cosine", "norm_ratio") for end in (0, 1)]
            means = (statistics.fmean(seed[end][part] for seed in row["gap"]) for part, end in ends)
            lines.append(f"| {row['initialisation']} | {row['lr']:g} | {' | '.join(f'{m:.2f}' for m in means)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", type=Path, help="keep the rows as JSON")
    parser.add_argument("--workers", type=int, default=2, help="training runs at a time, a process each")
    parser.add_argument("--quick", action="store_true", help="a few iterations in one process, to see that it works")
    parser.add_argument("--only", nargs="+", choices=INITIALISATIONS, help="others stay as they are in --save")
    options = parser.parse_args()
    if options.only and options.save is None:
        parser.error("--only takes the file at --save, whose other rows stay")
    torch.set_num_threads(1)
    budget, kept = QUICK if options.quick else Budget(), []
    if options.only:
        kept = json.loads(options.save.read_text())["rows"]
    renewed = compare(budget, 1 if options.quick else options.workers, options.only or INITIALISATIONS)
    named = {row["initialisation"]: row for row in (*kept, *renewed)}
    rows = [named[name] for name in INITIALISATIONS if name in named]
    if options.save:
        shared = {"budget": asdict(budget), "rates": RATES, "standard_rates": images.STANDARD_RATES}
        save_json(options.save, {"environment": environment(), "quick": options.quick, **shared, "rows": rows})
    print(f"\n{render(rows)}\n\n{render_gaps(rows)}")


if __name__ == "__main__":
    main()
