"""Peak memory of one meta-step over very many tasks, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from .cores import own_cores
from .test_workloads import environment
from .workloads import WORKLOADS

TASKS = 10_000
BOUND = 3e9  # bytes; fast weights and gradients of every task would take 20e9

PROGRAM = f"""
import json, resource
import fomaml_fused as ff
from bench.workloads import WORKLOADS
workload = WORKLOADS["omniglot"]
model, batch = workload.model(), workload.batch(tasks={TASKS})
held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
ff.FOMAML(model, lr=workload.lr, steps=workload.steps, loss=workload.loss)(*batch).backward()
print(json.dumps({{"before": held, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}}))
"""


def test_peak_memory(benchmark: Any) -> None:
    def run() -> dict[str, float]:
        with own_cores():
            done = subprocess.run([sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True)
        found: dict[str, float] = json.loads(done.stdout)
        return found

    benchmark.group = f"memory: omniglot, {TASKS} tasks"  # before the run: it is read then
    found = benchmark.pedantic(run, rounds=1)
    workload = WORKLOADS["omniglot"]
    parameters = sum(p.numel() for p in workload.model().parameters())
    benchmark.extra_info.update(memory=found | {"naive": 2.0 * 4 * TASKS * parameters}, **environment())
    assert found["peak"] < BOUND
