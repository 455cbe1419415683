"""The report of benchmarks: no ratio to what is wrong, plots, and pages that show what is stored."""

import copy
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import bench.test_workloads as timing
from bench import profile_steps, report
from bench.contenders import Race
from bench.pages import put
from bench.peers import Result, oracle
from bench.report import render, render_gain, render_peers, summarize, written
from bench.summaries import quartiles
from bench.workloads import TIMED, WORKLOADS

ENVIRONMENT: dict[str, Any] = {"device": "a CPU", "threads": 2, "torch": "2", "python": "3", "fomaml_fused": "0"}
PNG = b"\x89PNG"


def case(workload: str, **extra: Any) -> dict[str, Any]:
    told: dict[str, Any] = {"others": {}, "versions": {}, "failed": {}, "skipped": {}}
    return {"group": workload, "stats": {"data": [0.01, 0.02, 0.03]}, "extra_info": told | ENVIRONMENT | extra}


PEERS = {"ours, compiled": [0.01], "vmap(grad)": [0.1, 0.2, 0.3]}
RUN: dict[str, Any] = {
    "benchmarks": [
        case("right", others=PEERS, skipped={"higher": "not here"}),
        case("wrong", others=PEERS, incorrect=0.25),
        case("uncompiled", others={"vmap(grad)": [0.1]}, failed={"ours, compiled": "DisagreementError: it differs"}),
    ]
}


def row(text: str, workload: str) -> list[str]:
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {workload} |"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_where_ours_is_wrong_there_is_no_time_and_no_gain() -> None:
    summary = json.loads(json.dumps(summarize(RUN)))
    text = render(summary)
    assert row(text, "right") == ["10.0", "20.0", "–", "20", "10", "–", "200 (vmap(grad))"]
    assert row(text, "wrong") == ["–"] * 7
    assert row(text, "uncompiled") == ["5.0", "–", "–", "20", "–", "–", "100 (vmap(grad))"]
    assert [row(render_peers(summary), workload) for workload in ("right", "wrong")] == [["200"], ["–"]]
    assert (
        "Ours on wrong: no time and no gain, because its loss or gradient differs by 2.5e-01 of the oracle's." in text
    )
    assert "ours, compiled on uncompiled, not timed: DisagreementError: it differs." in text


def test_the_gain_in_one_line_spans_few_shot_workloads_and_the_others() -> None:
    times = {"omniglot": 0.01, "crowd": 0.04, "sine": 0.2, "rl": 0.05}
    seconds = {w: {"ours, compiled": quartiles([t]), "higher": quartiles([0.1])} for w, t in times.items()}
    line = render_gain({"environment": ENVIRONMENT, "seconds": seconds | {"wrong": {}}})
    assert "2.5 to 10 times as fast as the fastest peer on few-shot MLPs (omniglot, crowd)" in line
    assert "0.5 to 2 times on the rest (sine, rl)" in line


def test_a_summary_is_its_own_summary() -> None:
    found = summarize(copy.deepcopy(RUN))
    assert found["seconds"]["right"]["vmap(grad)"] == quartiles([0.1, 0.2, 0.3])
    assert found["seconds"]["right"]["vmap(grad)"]["q1"] == pytest.approx(0.15)
    assert summarize(found) == found


class Recorded:
    """What `test_meta_step` tells pytest-benchmark."""

    def __init__(self) -> None:
        self.group, self.extra_info, self.rounds = "", dict[str, Any](), 0

    def pedantic(self, step: Any, setup: Any = None, rounds: int = 1) -> None:
        self.rounds = rounds


def test_a_wrong_step_of_ours_fails_and_is_told_to_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    def double(*args: Any) -> Result:
        loss, gradients = oracle(*args)
        return loss, {name: 2 * g for name, g in gradients.items()}

    monkeypatch.setattr(timing, "oracle", double)
    monkeypatch.setattr(Race, "enter", lambda *_: pytest.fail("it goes on to the peers"))
    benchmark = Recorded()
    with pytest.raises(pytest.fail.Exception, match=r"differs by 5\.0e-01 of the oracle's"):
        timing.test_meta_step("sine", benchmark)
    told = {"group": benchmark.group, "stats": {"data": [1.0]}, "extra_info": benchmark.extra_info}
    assert (benchmark.rounds, summarize({"benchmarks": [told]})["seconds"]) == (1, {"sine": {}})
    assert list(summarize({"benchmarks": [told]})["incorrect"]) == ["sine"]


def test_the_bars_show_medians_and_name_who_is_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    drawn: list[Any] = []
    original = Figure.savefig

    def savefig(figure: Any, *args: Any, **options: Any) -> None:
        drawn.append(figure)
        original(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    report.draw(tmp_path / "benchmarks.png", summarize(RUN))
    (figure,) = drawn
    (axes,) = figure.axes
    bars = {bar.get_label(): bar for bar in axes.containers if len(bar.patches if hasattr(bar, "patches") else ())}
    heights = {name: [patch.get_height() for patch in bar.patches] for name, bar in bars.items()}
    assert heights == {"ours": [20, 20], "ours, compiled": [10], "vmap(grad)": [200, 100]}
    assert axes.get_yscale() == "log"
    assert [tick.get_text() for tick in axes.get_xticklabels()] == [
        "right\ngain\n10.0",
        "wrong\nno gain",
        "uncompiled\ngain\n5.0",
    ]
    beneath = figure.get_supxlabel()
    for words in ("wrong: no time", "uncompiled, not timed: DisagreementError", "higher: not here"):
        assert words in beneath
    assert (tmp_path / "benchmarks.png").read_bytes().startswith(PNG)


def test_a_page_gets_what_is_stored_and_keeps_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = tmp_path / "run.json"
    stored.write_text(json.dumps({"says": "new"}))
    monkeypatch.setitem(report.PLACES, "workloads", (stored, lambda found: f"| {found['says']} |"))
    page = "# a\n<!-- table: workloads -->\nold\n<!-- end of table -->\nb\n"
    assert written(page) == page.replace("old", "\n| new |\n")
    assert written(written(page)) == written(page)
    with pytest.raises(ValueError, match="places for nothing"):
        written("# a\n")
    with pytest.raises(ValueError, match="places for others"):
        written(page.replace("workloads", "others"))
    with pytest.raises(ValueError, match="no line <!-- end of table -->"):
        put("<!-- table: workloads -->", "workloads", "")
    stored.unlink()
    with pytest.raises(FileNotFoundError, match="nothing to put in place of 'workloads'"):
        written(page)


def test_rows_of_a_profile_are_told_apart() -> None:
    names = {
        "aten::baddbmm_": "products",
        "aten::threshold_backward": "activations",
        "aten::sin": "activations",
        "aten::copy_": "other ops",
        "graph_0_cpp_fused_add_mul_3": "fused",
        "fomaml_fused::native": "native",
        "_MetaLoss": "outside of ops",
        "autograd::engine::evaluate_function: _MetaLossBackward": "outside of ops",
    }
    assert {name: profile_steps.category(name) for name in names} == names


def test_shares_are_of_the_whole_and_floors_of_the_products(monkeypatch: pytest.MonkeyPatch) -> None:
    a = torch.randn(600, 600)

    def step() -> Result:
        return a @ a, {"sum": a.sum()}

    step()
    found = profile_steps.shares(step, 3)
    assert sum(found.values()) == pytest.approx(1.0)
    assert found["products"] > 0.5
    assert found["other ops"] > 0.0
    monkeypatch.setattr(profile_steps, "BUDGET", 0.02)
    omniglot = profile_steps.profiled("omniglot", compiled=False)
    # At the least, all samples go through all layers once.
    w = WORKLOADS["omniglot"]
    layers = sum(before * after for before, after in pairwise(w.widths))
    assert omniglot["flops"] > 2 * w.tasks * w.shots * layers
    assert omniglot["floor_s"] == omniglot["flops"] / omniglot["flops_per_s"]
    assert omniglot["product"] == [w.tasks * w.shots, 784, 256]


def test_the_stored_profile_is_a_whole_one() -> None:
    """Else: python -m bench.profile_steps --save bench/results/profile-cpu-2-cores.json"""
    stored = json.loads(profile_steps.STORED.read_text())
    assert [(r["workload"], r["compiled"]) for r in stored["steps"]] == [(w, c) for w in TIMED for c in (False, True)]
    assert [r["workload"] for r in stored["first_calls"]] == list(TIMED)
