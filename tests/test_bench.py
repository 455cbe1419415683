"""Benchmarks cannot rot: every workload builds, every peer takes our step, the report says what was measured."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from bench.peers import PEERS, disagreement, oracle, ours
from bench.report import render, summarize
from bench.workloads import TIMED, WORKLOADS, Workload


def small(workload: Workload) -> Workload:
    """The same workload with few, narrow layers' worth of data."""
    inner = tuple(min(width, 12) for width in workload.widths[1:-1])
    widths = (workload.widths[0], *inner, workload.widths[-1])
    return replace(workload, widths=widths, tasks=3, shots=min(workload.shots, 6), queries=min(workload.queries, 7))


@pytest.mark.parametrize("workload", WORKLOADS.values(), ids=str)
@pytest.mark.parametrize("peer", [name for name in PEERS if "compile" not in name])
def test_every_peer_takes_our_step(peer: str, workload: Workload) -> None:
    tiny = small(workload)
    model, batch = tiny.model(), tiny.batch()
    expected = oracle(tiny, model, batch)
    assert disagreement(PEERS[peer](tiny, model, batch)(), expected) < 1e-5
    assert disagreement(ours(tiny, model, batch)(), expected) < 1e-5


def test_a_wrong_gradient_is_a_disagreement() -> None:
    tiny = small(WORKLOADS["sine K=5"])
    model, batch = tiny.model(), tiny.batch()
    right = ours(tiny, model, batch)()
    wrong = ours(replace(tiny, lr=tiny.lr * 1.01), model, batch)()
    assert disagreement(wrong, right) > 1e-4
    lost = {name: torch.full_like(g, torch.nan) for name, g in right[1].items()}
    assert disagreement((right[0], lost), right) > 1e-4


def test_the_report_shows_medians_and_ratios() -> None:
    environment: dict[str, Any] = {"device": "a CPU", "threads": 2, "torch": "2", "python": "3", "fomaml_fused": "0"}
    times = {
        "ours, compiled": [0.01],
        "eager loop": [0.3],
        "vmap(grad)": [0.2, 0.1, 0.4],
        "compile": [0.08, 0.09, 0.07],
    }
    run = {
        "benchmarks": [
            {"group": "wide", "stats": {"data": [0.01, 0.02, 0.03]}, "extra_info": {"others": times, **environment}},
            {
                "group": "memory: omniglot, 10 tasks",
                "stats": {"data": [1.0]},
                "extra_info": {"memory": {"before": 1e9, "peak": 2e9, "naive": 2e10}, **environment},
            },
        ]
    }
    text = render(summarize(run))
    assert "| wide | 20 | 10 | 300 | 200 | 80 | 4.0 | 8.0 | 10.0 |" in text
    assert "2.00 GB of process memory, 1.00 GB of it" in text
    assert "20.0 GB" in text


def test_what_is_timed_is_registered() -> None:
    assert set(TIMED) <= set(WORKLOADS)
