"""Where the time of our meta-steps goes on a CPU, how low it could be, and what the first call in a process costs.

python -m bench.profile_steps [--save bench/results/profile-cpu-2-cores.json] [--workloads NAME ...] [--eager]

The profiler of torch says which ops take the time that a step takes, eager and compiled: products, activations, what a
compiler fused, the native engine, other ops, and what is left, which is Python and launching. The floor is the time of
the products alone at the rate of one `torch.mm` over all rows that the step has at a time, at the widest layer's width.
First calls are timed in fresh processes, without `compile=True`, once the package is imported and model and data are
there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import fomaml_fused as ff
from fomaml_fused.text import scaled
from fomaml_fused.train.files import save_json

from .contenders import seconds
from .cores import own_cores
from .peers import Step, ours
from .summaries import quartiles
from .test_workloads import environment
from .workloads import TIMED, WORKLOADS, Workload

STORED = Path(__file__).parent / "results" / "profile-cpu-2-cores.json"
PRODUCTS = frozenset({"mm", "bmm", "addmm", "baddbmm", "matmul", "dot", "mv", "addmv", "linear"})
ACTIVATIONS = frozenset(
    {"relu", "clamp_min", "threshold", "threshold_backward", "gelu", "gelu_backward", "tanh", "tanh_backward"}
    | {"sin", "cos", "sigmoid", "exp", "log", "log_softmax", "_log_softmax", "_softmax", "logsumexp", "erf"}
)
CATEGORIES = ("products", "activations", "fused", "native", "other ops", "outside of ops")
BUDGET = 1.0  # seconds for the steps that are timed, and as long for those that are profiled
STEPS = (5, 100)  # of them at least and at most
PROCESSES = 5  # for a first call each, of which two differ by more than what it adds where a step takes long
PATIENCE = 120.0  # seconds that a process has for its first call
GOAL = 0.05  # seconds that a first call may add

FIRST_CALL = """
import json, sys, time
import fomaml_fused as ff
from bench.contenders import seconds
from bench.peers import ours
from bench.workloads import WORKLOADS
import torch
workload = WORKLOADS[sys.argv[1]]
torch.set_num_threads(int(sys.argv[2]))
step = ours(workload, workload.model(), workload.batch())
print(json.dumps([seconds(step) for _ in range(8)]))
"""


def category(op: str) -> str:
    """Of a row of the profiler, by its name."""
    if "_cpp_fused_" in op:
        return "fused"
    namespace, _, name = op.partition("::")
    if op == "fomaml_fused::native":
        return "native"
    if namespace not in ("aten", "mkl", "mkldnn"):
        return "outside of ops"
    name = name.removesuffix("_")
    if name in PRODUCTS or namespace != "aten":
        return "products"
    return "activations" if name in ACTIVATIONS else "other ops"


def shares(step: Step, steps: int) -> dict[str, float]:
    """The fraction of each category in the time of some steps under the profiler."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        start = time.perf_counter()
        for _ in range(steps):
            step()
        whole = time.perf_counter() - start
    totals = dict.fromkeys(CATEGORIES, 0.0)
    for row in found.key_averages():
        totals[category(row.key)] += row.self_cpu_time_total / 1e6 / whole
    # Of what is no op the profiler sees a part.
    totals["outside of ops"] = max(0.0, 1.0 - sum(totals[name] for name in CATEGORIES[:-1]))
    return totals


def floor(workload: Workload, step: Step) -> dict[str, Any]:
    """The flops of a step's products, and the rate of one product as large as the step has them."""
    with FlopCounterMode(display=False) as counter:
        step()
    plan = ff.FOMAML(workload.model(), lr=workload.lr, steps=workload.steps, loss=workload.loss).plan(
        workload.tasks, workload.shots, workload.queries
    )
    samples = max(workload.shots, workload.queries)
    rows = min(plan.chunk, workload.tasks) * min(plan.rows or samples, samples)
    inner, outer = max(pairwise(workload.widths), key=lambda pair: pair[0] * pair[1])
    a, b = torch.randn(rows, inner), torch.randn(inner, outer)
    out = torch.empty(rows, outer)
    took = statistics.median(_timed(lambda: torch.mm(a, b, out=out), BUDGET / 4, (20, 2000)))
    flops, rate = counter.get_total_flops(), 2 * rows * inner * outer / took
    return {"flops": flops, "product": [rows, inner, outer], "flops_per_s": rate, "floor_s": flops / rate}


def _timed(step: Any, budget: float, steps: tuple[int, int]) -> list[float]:
    step()
    took = seconds(step)
    return [seconds(step) for _ in range(max(steps[0], min(steps[1], int(budget / took))))]


def profiled(name: str, *, compiled: bool) -> dict[str, Any]:
    """One workload: the time of a step without the profiler, what it goes to, and the floor."""
    workload = WORKLOADS[name]
    step = ours(workload, workload.model(), workload.batch(), compile=compiled)
    eager = ours(workload, workload.model(), workload.batch())
    times = _timed(step, BUDGET, STEPS)
    told = {"workload": name, "compiled": compiled, "seconds": quartiles(times)}
    # A compiled step has the same products, but a counter sees none of them.
    return told | {"shares": shares(step, len(times))} | floor(workload, eager)


def first_call(name: str) -> dict[str, Any]:
    """Seconds of the first step in a fresh process and of later ones, medians over some processes."""
    program = [sys.executable, "-c", FIRST_CALL, name, str(torch.get_num_threads())]
    firsts, laters = [], []
    with own_cores():
        for _ in range(PROCESSES):
            done = subprocess.run(program, check=True, capture_output=True, text=True, timeout=PATIENCE)
            first, _, *later = json.loads(done.stdout)
            firsts.append(first)
            laters.append(statistics.median(later))
    return {"workload": name, "first_s": statistics.median(firsts), "later_s": statistics.median(laters)}


def render(found: dict[str, Any]) -> str:
    """The Markdown table of shares and floors."""
    where = found["environment"]
    lines = [
        f"{where['device']}, {where['threads']} threads, torch {where['torch']}; medians in ms.",
        "",
        f"| workload | ours | ms | {' | '.join(CATEGORIES)} | products' GF | GF/s of one product | floor, ms | "
        "ms / floor |",
        "|---" * (len(CATEGORIES) + 7) + "|",
    ]
    for row in found["steps"]:
        took = row["seconds"]["median"]
        cells = [f"{row['shares'][name]:.0%}" for name in CATEGORIES]
        rows, inner, outer = row["product"]
        product = f"{row['flops_per_s'] / 1e9:.0f} ({rows:,} × {inner} × {outer})"
        ends = [f"{row['flops'] / 1e9:.3g}", product, f"{1e3 * row['floor_s']:.3g}", f"{took / row['floor_s']:.1f}"]
        how = "compiled" if row["compiled"] else "eager"
        lines.append(f"| {row['workload']} | {how} | {1e3 * took:.3g} | {' | '.join([*cells, *ends])} |")
    return "\n".join(lines)


def render_first_calls(found: dict[str, Any]) -> str:
    """The Markdown table of first calls."""
    lines = ["| workload | first call | later calls | the first adds |", "|---" * 4 + "|"]
    for row in found["first_calls"]:
        added = row["first_s"] - row["later_s"]
        over = "" if added <= GOAL else f", over the goal of {scaled(GOAL, 's')}"
        told = scaled(added, "s") if added > 0 else "less than calls differ"
        times = [scaled(row[part], "s") for part in ("first_s", "later_s")]
        lines.append(f"| {row['workload']} | {' | '.join(times)} | {told}{over} |")
    return "\n".join(lines)


def measure(names: Sequence[str], *, compiled: bool = True) -> dict[str, Any]:
    """First calls, then profiles, of workloads by name."""
    calls = [first_call(name) for name in names]
    steps = []
    # Else what a compiler fused would have no name in the profile.
    with torch._inductor.config.patch({"cpp.enable_kernel_profile": True}):
        for name in names:
            for form in (False, True) if compiled else (False,):
                steps.append(profiled(name, compiled=form))
                print(f"{name}{', compiled' * form}: {scaled(steps[-1]['seconds']['median'], 's')}", flush=True)
            torch.compiler.reset()
    return {"environment": environment(), "steps": steps, "first_calls": calls}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", type=Path, help="keep the rows as JSON")
    parser.add_argument("--workloads", nargs="+", choices=TIMED, default=TIMED)
    parser.add_argument("--eager", action="store_true", help="compile nothing")
    options = parser.parse_args()
    found = measure(options.workloads, compiled=not options.eager)
    if options.save:
        save_json(options.save, found)
    print(f"\n{render(found)}\n\n{render_first_calls(found)}")


if __name__ == "__main__":
    main()
