"""What the rules of the family come to under the same budget: error on sine, accuracy on digits, after each inner step.

python -m bench.rules [--save bench/results/rules.json] [--figure docs/rules.png] [--workers 2] [--quick]
                      [--rules NAME ...]

Every rule trains the same network on the same tasks for as many outer iterations, with Adam as outer optimiser at one
rate. Only the inner rate is a rule's own, of `RATES`: the best after all inner steps, by a seed and validation tasks
that nothing else uses, with both its neighbours tried. Learned rates start from it. Then come the seeds, and the tasks,
that are reported. Runs go side by side, one thread each.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from fomaml_fused.tasks import Sinusoids
from fomaml_fused.train import digits, sine
from fomaml_fused.train.files import save_figure, save_json
from fomaml_fused.train.rules import ANNEALED

from .test_workloads import environment

# What each rule sets beside what all share.
RULES: dict[str, dict[str, Any]] = {
    "FOMAML": {},
    "ANIL": {"adapt": "head"},
    "Reptile": {"outer": "reptile"},
    "multi-step loss": {"step_weights": "annealed"},
    "rates by layer and step": {"learn_lr": "layer_step"},
    "rates by layer and step, softplus": {"learn_lr": "layer_step", "positive_lr": "softplus"},
    "Meta-SGD": {"learn_lr": "element"},
    "Meta-SGD, softplus": {"learn_lr": "element", "positive_lr": "softplus"},
}
SHARED: dict[str, dict[str, Any]] = {
    "sine": {"steps": 5, "shots": 10, "tasks": 25},
    "digits": {"steps": 5, "shots": 1, "tasks": 32},
}
MEASURES = {"sine": "mean squared error", "digits": "accuracy in %"}
RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
TUNING_SEED = 100


Pair = tuple[str, str]  # kind of tasks, rule
Measured = list[float | None]  # after 0 to K inner steps; None where the run diverged


@dataclass(frozen=True)
class Budget:
    """How long, how often, and the inner rate that is tried first; by tasks, in the order of `SHARED`, where two."""

    iterations: tuple[int, int] = (3000, 600)
    first_rate: tuple[float, float] = (0.01, 0.3)
    seeds: int = 4
    eval_tasks: int = 600


QUICK = Budget(iterations=(3, 2), seeds=2, eval_tasks=5)


@dataclass(frozen=True)
class Job:
    """A training run of a rule, and its measure: on validation tasks with the tuning seed, else on held-out ones."""

    tasks: str
    rule: str
    lr: float
    seed: int
    iterations: int
    eval_tasks: int

    def run(self) -> Measured:
        own = {"lr": self.lr, "seed": self.seed, "iterations": self.iterations, "eval_tasks": self.eval_tasks}
        options: dict[str, Any] = SHARED[self.tasks] | RULES[self.rule] | own
        found = _sine(**options) if self.tasks == "sine" else _digits(**options)
        return [value if math.isfinite(value) else None for value in found]


@torch.no_grad()
def _sine(**options: Any) -> list[float]:
    config = sine.SineConfig(**options)
    meta, outer = sine.prepare(config)
    with torch.enable_grad():
        outer.run(config.iterations, None, title=None)
    batch = sine.held_out(config.shots, config)
    if config.seed == TUNING_SEED:
        batch = Sinusoids(config.shots, 100, seed=config.seed + 4).sample(config.eval_tasks)
    return [float(config.trained(meta, steps)(*batch)) for steps in range(config.steps + 1)]


@torch.no_grad()
def _digits(**options: Any) -> list[float]:
    config = digits.DigitsConfig(**options)
    meta, outer = digits.prepare(config)
    with torch.enable_grad():
        outer.run(config.iterations, None, title=None)
    batch = digits.held_out(config)
    if config.seed == TUNING_SEED:  # of the classes that are trained on, for no others are left
        batch = digits.sampler(config, False, config.seed + 4).sample(config.eval_tasks)
    adapters = (config.trained(meta, steps) for steps in range(config.steps + 1))
    return [100 * float(digits.accuracy(adapter, batch).mean()) for adapter in adapters]


def compare(budget: Budget, workers: int, rules: Iterable[str] = RULES) -> list[dict[str, Any]]:
    """A row for each kind of tasks and rule."""
    iterations = dict(zip(SHARED, budget.iterations, strict=True))

    def job(pair: Pair, lr: float, seed: int) -> Job:
        return Job(*pair, lr, seed, iterations[pair[0]], budget.eval_tasks)

    pairs = [(tasks, rule) for tasks in SHARED for rule in rules]
    best = {pair: dict(zip(SHARED, budget.first_rate, strict=True))[pair[0]] for pair in pairs}
    tried: dict[Pair, dict[float, float | None]] = {pair: {} for pair in pairs}
    while wanted := [(pair, lr) for pair in pairs for lr in _around(best[pair]) if lr not in tried[pair]]:
        jobs = [job(pair, lr, TUNING_SEED) for pair, lr in wanted]
        for (pair, lr), found in zip(wanted, _results(jobs, workers), strict=True):
            tried[pair][lr] = None if found[-1] is None else round(found[-1], 3)
        best = {pair: _best(found, pair[0]) for pair, found in tried.items()}
    seeds = range(budget.seeds)
    results = iter(_results([job(pair, best[pair], seed) for pair in pairs for seed in seeds], workers))
    rows = []
    for pair in pairs:
        measured = [next(results) for _ in seeds]
        row = {"tasks": pair[0], "rule": pair[1], "lr": best[pair], "validation": dict(sorted(tried[pair].items()))}
        rows.append(row | {"seeds": measured} | summarize(measured))
    return rows


def _around(rate: float) -> tuple[float, ...]:
    """A rate and its neighbours."""
    i = RATES.index(rate)
    return RATES[max(i - 1, 0) : i + 2]


def _results(jobs: list[Job], workers: int) -> list[Measured]:
    def told(results: Iterable[Measured]) -> list[Measured]:
        found = []
        for job, result in zip(jobs, results, strict=True):
            found.append(result)
            name = f"{job.tasks}, {job.rule}, lr {job.lr:g}, seed {job.seed}"
            print(f"{len(found)}/{len(jobs)} {name}: {result[-1]}", flush=True)
        return found

    if workers == 1:
        return told(map(Job.run, jobs))
    with ProcessPoolExecutor(workers, get_context("spawn"), _one_thread) as pool:
        return told(pool.map(Job.run, jobs))


def _one_thread() -> None:
    torch.set_num_threads(1)


def _best(found: dict[float, float | None], tasks: str) -> float:
    """The rate with the lowest error or the highest accuracy; one that diverged, None, only where all did."""
    sign = 1.0 if tasks == "sine" else -1.0
    worth = {lr: math.inf if value is None else sign * value for lr, value in found.items()}
    return min(worth, key=lambda lr: worth[lr])


def summarize(seeds: list[Measured]) -> dict[str, Measured]:
    """Mean and standard error over seeds, after each step; None where a seed diverged."""
    mean: Measured = []
    error: Measured = []
    for values in zip(*seeds, strict=True):
        finite = [value for value in values if value is not None]
        whole = len(finite) == len(values)
        mean.append(statistics.fmean(finite) if whole else None)
        error.append(statistics.stdev(finite) / math.sqrt(len(finite)) if whole else None)
    return {"mean": mean, "standard_error": error}


def merged(kept: list[dict[str, Any]], renewed: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All rows in the order of `SHARED` and `RULES`, renewed ones instead of kept ones."""
    rows = {(row["tasks"], row["rule"]): row for row in (*kept, *renewed)}
    return [rows[tasks, rule] for tasks in SHARED for rule in RULES if (tasks, rule) in rows]


def cells(row: dict[str, Any]) -> list[str]:
    """Mean ± standard error after each step, or how many seeds diverged, as the docs quote them."""
    digits_behind = 3 if row["tasks"] == "sine" else 1
    found = []
    for k, (mean, error) in enumerate(zip(row["mean"], row["standard_error"], strict=True)):
        lost = sum(seed[k] is None for seed in row["seeds"])
        spread = "" if lost else f"{mean:.{digits_behind}f} ± {error:.{digits_behind}f}"
        found.append(spread or f"{lost} of {len(row['seeds'])} diverged")
    return found


def render(rows: list[dict[str, Any]], tasks: str) -> str:
    """The Markdown table of one kind of tasks."""
    own = [row for row in rows if row["tasks"] == tasks]
    steps = range(len(own[0]["mean"]))
    lines = [f"| rule | inner rate | {' | '.join(f'{k} steps' if k != 1 else '1 step' for k in steps)} |"]
    lines.append("|---" * (len(steps) + 2) + "|")
    lines += [f"| {row['rule']} | {row['lr']:g} | {' | '.join(cells(row))} |" for row in own]
    return "\n".join(lines)


def draw(figure: Any, rows: list[dict[str, Any]]) -> None:
    """A panel for each kind of tasks: the measure by inner steps, bars of one standard error."""
    for axes, (tasks, measure) in zip(figure.subplots(1, 2), MEASURES.items(), strict=True):
        for row in rows:
            if row["tasks"] == tasks:
                steps = range(len(row["mean"]))
                mean, bars = ([math.nan if v is None else v for v in row[name]] for name in ("mean", "standard_error"))
                axes.errorbar(steps, mean, bars, label=row["rule"], marker="o", markersize=3, capsize=2)
        axes.set(xlabel="inner steps on a new task", ylabel=measure, title=tasks)
        axes.set_xticks(list(steps))
        axes.grid(alpha=0.3)
    figure.axes[0].set_yscale("log")
    figure.axes[1].legend(fontsize="small")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", type=Path, help="keep the rows as JSON")
    parser.add_argument("--figure", type=Path, help="draw them, as PNG")
    parser.add_argument("--workers", type=int, default=2, help="training runs at a time, a process each")
    parser.add_argument("--quick", action="store_true", help="a few iterations in one process, to see that it works")
    parser.add_argument("--rules", nargs="+", choices=RULES, help="these alone; others stay as they are in --save")
    options = parser.parse_args()
    if options.rules and options.save is None:
        parser.error("--rules takes the file at --save, whose other rows stay")
    _one_thread()
    budget, kept = QUICK if options.quick else Budget(), []
    if options.rules:
        kept = json.loads(options.save.read_text())["rows"]
    rows = merged(kept, compare(budget, 1 if options.quick else options.workers, options.rules or RULES))
    if options.save:
        shared = {"budget": asdict(budget), "shared": SHARED, "rules": RULES, "rates": RATES, "annealed": ANNEALED}
        save_json(options.save, {"environment": environment(), "quick": options.quick, **shared, "rows": rows})
    if options.figure:
        save_figure(options.figure, lambda figure: draw(figure, rows), (10, 4))
    for tasks, measure in MEASURES.items():
        print(f"\n{tasks}, {measure}:\n\n{render(rows, tasks)}")


if __name__ == "__main__":
    main()
