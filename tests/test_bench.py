"""Benchmarks cannot rot: every workload builds, every peer takes our step, the report says what was measured."""

import json
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from bench import contenders, jax_peer
from bench.contenders import ENTRANTS, Peer, Race, in_process
from bench.jax_peer import JaxProcess
from bench.peers import Step, disagreement, oracle, ours, ours_as_function, vmap_grad
from bench.report import render, render_peers, summarize
from bench.workloads import TIMED, WORKLOADS, Workload


def small(workload: Workload) -> Workload:
    """The same workload with few, narrow layers' worth of data."""
    inner = tuple(min(width, 12) for width in workload.widths[1:-1])
    widths = (workload.widths[0], *inner, workload.widths[-1])
    return replace(workload, widths=widths, tasks=3, shots=min(workload.shots, 6), queries=min(workload.queries, 7))


def race_on(workload: Workload) -> Race:
    """On few, small tasks, with the oracle's gradient to find."""
    tiny = small(workload)
    model, batch = tiny.model(), tiny.batch()
    return Race(tiny, model, batch, oracle(tiny, model, batch))


STARTS_A_PROCESS = "jax jit(vmap(grad))"
CASES = [
    (peer, workload)
    for peer in ENTRANTS
    for workload in WORKLOADS.values()
    # What compiles takes too long here, and a process a few seconds: one for each activation and loss.
    if "compile" not in peer
    and (peer != STARTS_A_PROCESS or workload.name in ("sine K=5", "rl", "omniglot", "wide", "meta_siren"))
]


@pytest.mark.parametrize(("peer", "workload"), CASES, ids=str)
def test_every_peer_takes_our_step(peer: str, workload: Workload) -> None:
    entrant = ENTRANTS[peer]
    obstacle = entrant.obstacle()
    if obstacle is not None:
        pytest.skip(f"{peer}: {obstacle}")
    tiny = small(workload)
    model, batch = tiny.model(), tiny.batch()
    before = [p.detach().clone() for p in model.parameters()]
    expected = oracle(tiny, model, batch)
    with closing(entrant.make(tiny, model, batch)) as contender:
        for _ in range(2):  # nothing is carried from one step to the next
            assert disagreement(contender.result(), expected) < 1e-5
        assert contender.timed(0.0) > 0.0
    assert all(map(torch.equal, model.parameters(), before))


@pytest.mark.parametrize("workload", WORKLOADS.values(), ids=str)
def test_we_take_the_oracles_step(workload: Workload) -> None:
    race = race_on(workload)
    for adapter in (ours, ours_as_function):
        assert disagreement(adapter(race.workload, race.model, race.batch)(), race.expected) < 1e-5


def counted(adapter: Callable[..., Step], calls: list[str], name: str, spoils: Callable[[Any], Any]) -> Peer:
    """A peer that keeps count of its steps."""

    def adapted(workload: Workload, model: nn.Module, batch: Any) -> Step:
        step = adapter(workload, model, batch)

        def counting() -> Any:
            calls.append(name)
            return spoils(step())

        return counting

    return in_process(adapted)


def test_who_disagrees_or_raises_is_named_and_never_timed() -> None:
    def raises(result: Any) -> Any:
        raise ValueError("no such thing\nas this")

    spoils: dict[str, Callable[[Any], Any]] = {
        "right": lambda result: result,
        "a little off": lambda result: (result[0], {name: g * 1.001 for name, g in result[1].items()}),
        "another loss": lambda result: (result[0] * 1.001, result[1]),
        "lost": lambda result: (result[0], {name: g * torch.nan for name, g in result[1].items()}),
        "raises": raises,
    }
    calls: list[str] = []
    with closing(race_on(WORKLOADS["sine K=5"])) as race:
        for name, spoil in spoils.items():
            race.enter(name, counted(vmap_grad, calls, name, spoil))
        race.enter("elsewhere", in_process(vmap_grad, needs="no_such_library"))
        race.run()
    assert list(race.times) == ["right"]
    assert len(race.times["right"]) == 2
    assert [name for name in calls if name != "right"] == ["a little off", "another loss", "lost", "raises"]
    assert race.skipped == {"elsewhere": "no_such_library is not installed"}
    assert race.failed["raises"] == "ValueError: no such thing"
    assert race.failed["a little off"].startswith("DisagreementError: its loss or gradient differs by 1.0e-03")
    assert set(race.failed) == set(spoils) - {"right"}


def test_a_first_step_that_takes_long_is_nobody_s_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders, "PATIENCE", 0.2)
    calls: list[str] = []

    def loads(result: Any) -> Any:
        if len(calls) == 1:
            time.sleep(0.3)
        return result

    with closing(race_on(WORKLOADS["sine"])) as race:
        race.enter("loads", counted(vmap_grad, calls, "loads", loads))
        race.run()
    assert len(race.times["loads"]) == 2
    assert max(race.times["loads"]) < 0.2


def test_who_raises_in_a_later_turn_is_timed_no_more() -> None:
    calls: list[str] = []

    def later(result: Any) -> Any:
        if len(calls) > 3:
            raise ValueError("enough")
        return result

    race = race_on(WORKLOADS["sine"])
    race.enter("tires", counted(vmap_grad, calls, "tires", later))
    assert list(race.times) == ["tires"]
    race.run()
    race.run()
    assert not race.times
    assert race.failed == {"tires": "ValueError: enough"}
    assert len(calls) == 4


def test_a_peer_cannot_change_our_model() -> None:
    def meddles(workload: Workload, model: nn.Module, batch: Any) -> Step:
        with torch.no_grad():
            next(model.parameters()).zero_()
        return vmap_grad(workload, model, batch)

    race = race_on(WORKLOADS["sine"])
    race.enter("meddles", in_process(meddles))
    race.enter("honest", in_process(vmap_grad))
    assert list(race.times) == ["honest"]
    assert list(race.failed) == ["meddles"]


def test_a_process_that_ends_is_a_failure_with_its_last_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'no room left' >&2\nexit 3\n")
    python.chmod(0o755)
    monkeypatch.setattr(jax_peer, "interpreter", lambda: str(python))
    race = race_on(WORKLOADS["sine"])
    race.enter("jax", Peer(JaxProcess, jax_peer.process_obstacle))
    assert race.failed == {"jax": "RuntimeError: jax ended with status 3: no room left"}


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
        "ours, grad_and_value": [0.005],
        "eager loop": [0.3],
        "vmap(grad)": [0.2, 0.1, 0.4],
        "compile": [0.08, 0.09, 0.07],
        "TorchOpt": [0.5],
    }
    told: dict[str, Any] = {"versions": {"TorchOpt": "0.7.3"}, "failed": {}, "skipped": {"higher": "not here"}}
    apart = {name: seconds for name, seconds in times.items() if name != "TorchOpt"}
    failed = {"failed": {"TorchOpt": "DisagreementError: it differs"}, "versions": {}, "skipped": {}}
    run = {
        "benchmarks": [
            {
                "group": "wide",
                "stats": {"data": [0.01, 0.02, 0.03]},
                "extra_info": {"others": times, **told, **environment},
            },
            {
                "group": "narrow",
                "stats": {"data": [0.1]},
                "extra_info": {"others": apart, **failed, **environment},
            },
            {
                "group": "memory: omniglot, 10 tasks",
                "stats": {"data": [1.0]},
                "extra_info": {"memory": {"before": 1e9, "peak": 2e9, "naive": 2e10}, **environment},
            },
        ]
    }
    summary = json.loads(json.dumps(summarize(run)))
    text = f"{render(summary)}\n\n{render_peers(summary)}"
    assert "| wide | 4.0 | 8.0 | 16.0 | 20 | 10 | 5 | 80 (compile) |" in text
    assert "| narrow | 0.8 | 8.0 | 16.0 | 100 | 10 | 5 | 80 (compile) |" in text
    assert "| wide | 300 | 200 | 80 | 500 |" in text
    assert "| narrow | 300 | 200 | 80 | – |" in text
    assert "Versions: TorchOpt 0.7.3." in text
    assert "TorchOpt on narrow, not timed: DisagreementError: it differs." in text
    assert "higher: not here." in text
    assert "2.00 GB of process memory, 1.00 GB of it" in text
    assert "20.0 GB" in text


def test_what_is_timed_is_registered() -> None:
    assert set(TIMED) <= set(WORKLOADS)
