"""Times one meta-step of each workload, ours and every peer's in turn, after all agree on the gradient.

pytest-benchmark times ours; its set-up of each round runs and times the peers, so that rounds are interleaved.
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

from .peers import PEERS, disagreement, ours
from .workloads import TIMED, WORKLOADS

SECONDS = 40.0  # for the rounds of a workload
PATIENCE = 5.0  # a peer whose step takes longer runs once
TOLERANCE = 1e-4  # float32 gradients of different orders of summation; what differs more is not the same step


@pytest.mark.parametrize("name", TIMED)
def test_meta_step(name: str, benchmark: Any) -> None:
    workload = WORKLOADS[name]
    model, batch = workload.model(), workload.batch()

    few = workload.batch(tasks=min(workload.tasks, 8))
    loss = ff.reference.meta_loss(model, *few, lr=workload.lr, steps=workload.steps, loss=workload.loss)
    parameters = dict(model.named_parameters())
    oracle = loss.detach(), dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
    assert disagreement(ours(workload, model, few)(), oracle) < TOLERANCE

    step = ours(workload, model, batch)
    peers = {peer: adapter(workload, model, batch) for peer, adapter in PEERS.items()}
    expected, times = step(), {}
    for peer, peer_step in peers.items():
        start = time.perf_counter()
        assert disagreement(peer_step(), expected) < TOLERANCE, f"{peer} disagrees on {name}"
        took = time.perf_counter() - start
        times[peer] = [took if took > PATIENCE and "compile" not in peer else seconds(peer_step)]
    patient = [peer for peer in peers if times[peer][0] < PATIENCE]
    a_round = seconds(step) + sum(times[peer].pop() for peer in patient)

    def run_peers() -> None:
        for peer in patient:
            times[peer].append(seconds(peers[peer]))

    rounds = max(5, min(200, int(SECONDS / a_round)))
    benchmark.group = name
    benchmark.extra_info.update(
        peers=times,
        plan=str(ff.FOMAML(model, steps=workload.steps, loss=workload.loss).plan(workload.tasks, workload.shots)),
        **environment(),
    )
    benchmark.pedantic(step, setup=run_peers, rounds=rounds)


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
