"""Times one meta-step of each workload, ours and every peer's in turn, after all agree on the gradient.

pytest-benchmark times ours; its set-up of each round runs and times the others, so that rounds are interleaved. In each
turn a step runs for a while untimed, as it would in its own training loop, and then once timed.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fomaml_fused as ff

from .peers import PEERS, disagreement, oracle, ours
from .workloads import TIMED, WORKLOADS

SECONDS = 40.0  # for the rounds of a workload
WARM_UP = 0.02  # of each contender in its turn, at least one step
PATIENCE = 5.0  # a peer whose step takes longer runs once
TOLERANCE = 1e-4  # float32 gradients of different orders of summation; what differs more is not the same step


@pytest.mark.parametrize("name", TIMED)
def test_meta_step(name: str, benchmark: Any) -> None:
    workload = WORKLOADS[name]
    model, batch = workload.model(), workload.batch()

    few = workload.batch(tasks=min(workload.tasks, 8))
    assert disagreement(ours(workload, model, few)(), oracle(workload, model, few)) < TOLERANCE

    step = ours(workload, model, batch)
    others = {"ours, compiled": ours(workload, model, batch, compile=True)}
    others |= {peer: adapter(workload, model, batch) for peer, adapter in PEERS.items()}
    expected, times = step(), {}
    for name_of, other in others.items():
        start = time.perf_counter()
        assert disagreement(other(), expected) < TOLERANCE, f"{name_of} disagrees on {name}"
        took = time.perf_counter() - start
        times[name_of] = [took if took > PATIENCE and "compile" not in name_of else seconds(other)]
    patient = [name_of for name_of in others if times[name_of][0] < PATIENCE]
    steps = [seconds(step), *(times[name_of].pop() for name_of in patient)]
    a_round = sum(max(WARM_UP, t) + t for t in steps)

    def run_others() -> None:
        for name_of in patient:
            warm_up(others[name_of])
            times[name_of].append(seconds(others[name_of]))
        warm_up(step)

    benchmark.group = name
    benchmark.extra_info.update(
        others=times,
        plan=str(ff.FOMAML(model, steps=workload.steps, loss=workload.loss).plan(workload.tasks, workload.shots)),
        **environment(),
    )
    benchmark.pedantic(step, setup=run_others, rounds=max(5, min(200, int(SECONDS / a_round))))


def warm_up(step: Callable[[], object]) -> None:
    end = time.perf_counter() + WARM_UP
    step()
    while time.perf_counter() < end:
        step()


def seconds(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def environment() -> dict[str, str | int]:
    """Device and versions that a figure depends on."""
    return {
        "device": f"CPU, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "fomaml_fused": ff.__version__,
    }
