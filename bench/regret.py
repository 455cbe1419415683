"""How far the planner's choice is from the best one: problems, each timed in all choices that make sense.

python -m bench.regret [--problems 220] [--seed 0] [--save bench/results/regret-cpu-2-cores.json]

Problems are random; beside them stand the workloads of many samples a task, whose problems are too large to draw.

A choice is the form of each layer, the number of tasks at a time and that of their samples. Beside the planner's, a
problem runs all primal, all dual, all folded, with any one layer in another form, in other chunks, and in other blocks
of samples, in turns; the least time of each counts.
Where the planner's choice seems to lose, it and its betters run again, longer, and that alone counts: the least of many
noisy times is lucky now and then.

On a machine that others use, set OMP_PROC_BIND=true: two threads that the system puts on one core wait for each other.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

import fomaml_fused as ff
from fomaml_fused.batched_plans import LEAST_ROWS, block_obstacle
from fomaml_fused.plans import MEMORY_BOUND
from fomaml_fused.text import scaled, table
from fomaml_fused.train.files import save_json

from .contenders import seconds
from .peers import Step, ours
from .test_workloads import environment
from .workloads import WORKLOADS, Workload

CLOSE = 1.25  # a regret that does not matter
DOUBT = 1.15  # a regret that is measured again
HOPELESS = 3.0  # times the best: not worth further rounds, nor where it is arithmetic, of much, a first one
BUDGET = 0.3  # seconds for the rounds of a problem, and twice that for those measured again
ROUNDS = (4, 40)  # at least and at most, whatever the budget
NAMED = ("rl", "meta_siren", "learnit")
FLOPS, TRAFFIC = 3e9, 6e7  # a problem's most: operations in the primal form, and numbers in all tasks' weights x steps


@dataclass(frozen=True)
class Case:
    """A problem of the sweep, or one of the workloads."""

    workload: Workload
    momentum: float

    def __str__(self) -> str:
        w = self.workload
        if w.name:
            return w.name
        name = f"{'-'.join(map(str, w.widths))} T={w.tasks} S={w.shots} Q={w.queries} K={w.steps}"
        return name + (" momentum" if self.momentum else "")

    def step(self) -> Step:
        return ours(self.workload, self.workload.model(), self.workload.batch(), **self._options())

    def plan(self, **told: Any) -> ff.Plan:
        """The planner's, where it is not told otherwise."""
        w = self.workload
        with torch.device("meta"):
            model = w.model()
        meta = ff.FOMAML(model, lr=w.lr, steps=w.steps, loss=w.loss, **self._options())
        with ff.override(**told):
            return meta.plan(w.tasks, w.shots, w.queries, device="cpu")

    def _options(self) -> dict[str, Any]:
        return {"momentum": self.momentum, "backend": "torch"}


@dataclass(frozen=True)
class Choice:
    """What the planner chooses for a problem; rows: samples of a task at a time, None for all."""

    forms: tuple[str, ...]
    chunk: int
    rows: int | None = None

    def __str__(self) -> str:
        return f"{' '.join(self.forms)} / {self.chunk}" + ("" if self.rows is None else f" x {self.rows}")

    @property
    def told(self) -> dict[str, Any]:
        """For `override`, to which no number of samples is one to choose."""
        return {"forms": self.forms, "chunk": self.chunk, "rows": self.rows or sys.maxsize}


def cases(problems: int, seed: int) -> Iterator[Case]:
    """Problems drawn evenly over the orders of magnitude of every size, those left out that take long."""
    draw = random.Random(seed)

    def size(least: int, most: int) -> int:
        return round(least * math.exp(draw.random() * math.log(most / least)))

    while problems:
        widths = tuple(size(8, 1024) for _ in range(draw.randint(1, 5) + 1))
        tasks, shots, queries, steps = size(1, 2000), size(1, 100), size(1, 100), size(1, 20)
        workload = Workload("", widths, "relu", tasks, shots, queries, steps, "mse", lr=1e-3)
        numbers = tasks * sum(a * b for a, b in pairwise(widths))
        momentum = draw.choice((0.0, 0.9))
        if 6 * numbers * (steps * shots + queries) <= FLOPS and numbers * steps <= TRAFFIC:
            problems -= 1
            yield Case(workload, momentum)


def choices(case: Case) -> list[Choice]:
    """The planner's choice, then the others."""
    plan = case.plan()
    depth, steps, tasks = len(plan.forms), case.workload.steps, case.workload.tasks
    found = [Choice(plan.forms, plan.chunk, plan.rows)]
    for form in ("primal", "dual", "dual:1", f"dual:{steps}"):
        found.append(Choice((form,) * depth, case.plan(forms=(form,) * depth, rows=sys.maxsize).chunk))
        found.append(Choice((form,) * depth, tasks))
    for i, layer in enumerate(plan.layers):
        for form, _ in layer.estimates:
            forms = (*plan.forms[:i], form, *plan.forms[i + 1 :])
            found.append(Choice(forms, plan.chunk, plan.rows if form == plan.forms[i] else None))
    for chunk in (plan.chunk * 4, plan.chunk * 2, plan.chunk // 2, plan.chunk // 4, plan.chunk // 16):
        found.append(Choice(plan.forms, max(1, min(tasks, chunk)), plan.rows))
    if block_obstacle(plan.problem, plan.forms) is None:
        samples = max(case.workload.shots, case.workload.queries)
        for times in (4, 2, 1, 1 / 2, 1 / 4):
            rows = int((plan.rows or samples) * times)
            if rows >= LEAST_ROWS:
                for chunk in (plan.chunk, plan.chunk * 2, plan.chunk * 4):
                    found.append(Choice(plan.forms, min(tasks, chunk), rows if rows < samples else None))
    most = HOPELESS * max(plan.estimate.flops, FLOPS)
    possible = [
        choice
        for choice in dict.fromkeys(found)
        if (told := case.plan(**choice.told)).memory <= MEMORY_BOUND and told.estimate.flops <= most
    ]
    return list(dict.fromkeys(found[:1] + possible))


def measure(step: Step, compared: Iterable[Choice], budget: float) -> dict[Choice, float]:
    """The least seconds of a step in each choice, in turns for as long as the budget lasts."""

    def timed(choice: Choice) -> float:
        with ff.override(**choice.told):
            return seconds(step)

    compared = list(compared)
    for choice in compared:  # plans, and memory that is used for the first time
        timed(choice)
    times = {choice: timed(choice) for choice in compared}
    hopeful = [choice for choice in compared if times[choice] < HOPELESS * min(times.values())]
    rounds = int(budget / sum(times[choice] for choice in hopeful))
    for _ in range(max(ROUNDS[0], min(ROUNDS[1], rounds))):
        for choice in hopeful:
            times[choice] = min(times[choice], timed(choice))
    return times


def regret(case: Case, budget: float = BUDGET) -> dict[str, Any]:
    """The planner's choice for a problem, the best one, and the ratio of their times."""
    step = case.step()
    chosen, *others = choices(case)
    times = measure(step, [chosen, *others], budget)
    first = times
    if times[chosen] > DOUBT * min(times.values()):
        better = [choice for choice in others if times[choice] < times[chosen]]
        times = measure(step, [chosen, *better], 2 * budget)
    best = min(times, key=lambda choice: times[choice])
    return {
        "problem": str(case),
        "regret": times[chosen] / times[best],
        "chosen": str(chosen),
        "chosen_s": times[chosen],
        "best": str(best),
        "best_s": times[best],
        "choices": len(first),
        "seconds": {str(choice): t for choice, t in first.items()},
    }


def summarize(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Quantiles of regret, and the fraction that is close to the best."""
    found = sorted(row["regret"] for row in rows)
    quantiles = {f"{q:.0%}": found[min(len(found) - 1, int(q * len(found)))] for q in (0.5, 0.75, 0.9, 0.95, 0.99, 1.0)}
    close = sum(r <= CLOSE for r in found) / len(found)
    return {
        "problems": len(found),
        f"within_{CLOSE}": close,
        "quantiles": quantiles,
        "geometric_mean": statistics.geometric_mean(found),
    }


def render(summary: dict[str, Any], rows: list[dict[str, Any]], named: list[dict[str, Any]], worst: int = 10) -> str:
    """The summary in words, the workloads by name, and the worst choices with what would have been better."""
    quantiles = ", ".join(f"{name} {value:.2f}" for name, value in summary["quantiles"].items())
    lines = [
        f"{summary['problems']} problems: {summary[f'within_{CLOSE}']:.1%} within {CLOSE} of the best choice",
        f"regret, time of the choice / time of the best: {quantiles}; mean {summary['geometric_mean']:.3f}",
        "",
    ]
    cells = [("regret", "problem", "chosen: forms / tasks at a time", "time", "best", "time")]
    for row in [*named, *sorted(rows, key=lambda row: -float(row["regret"]))[:worst]]:
        times = scaled(row["chosen_s"], "s"), scaled(row["best_s"], "s")
        cells.append((f"{row['regret']:.2f}", row["problem"], row["chosen"], times[0], row["best"], times[1]))
    return "\n".join([*lines, *table(cells)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=220)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for the rounds of a problem")
    parser.add_argument("--save", type=Path, help="keep the rows as JSON")
    options = parser.parse_args()
    start = time.perf_counter()
    named = [regret(Case(WORKLOADS[name], 0.0), options.budget) for name in NAMED]
    rows = [regret(case, options.budget) for case in cases(options.problems, options.seed)]
    summary = summarize(rows)
    if options.save:
        run = {"seed": options.seed, "seconds": time.perf_counter() - start}
        found = {"environment": environment(), "run": run, "summary": summary, "workloads": named, "rows": rows}
        save_json(options.save, found)
    print(render(summary, rows, named))


if __name__ == "__main__":
    main()
