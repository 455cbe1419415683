"""The benchmark of growth: slopes, when a curve ends, memory, and that the stored run is a whole one."""

import json
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench import scale
from bench.scale import AXES, BASE, CURVES, HASTE, QUICK, Limits, Track, at, choice, draw, render, render_slopes
from bench.scale_point import Point
from bench.summaries import power


@pytest.mark.parametrize("exponent", [-1.0, 0.0, 0.5, 1.0, 2.0])
def test_the_slope_of_a_power_is_its_exponent(exponent: float) -> None:
    xs = (1, 3, 10, 32, 100, 316, 1000)
    ys = [7e-3 * x**exponent for x in xs]
    assert power(xs, ys) == pytest.approx(exponent)
    flat_at_first = [ys[3] if x < 32 else y for x, y in zip(xs, ys, strict=True)]
    assert power(xs, flat_at_first) == pytest.approx(exponent)


def test_two_points_are_no_fit() -> None:
    assert power([1, 2, 4], [1.0, 2.0, 4.0]) is None
    assert power([1, 10, 20, 30], [1.0, 0.0, 2.0, 3.0]) is None
    assert power([], []) is None


def test_every_axis_has_the_base_and_ends_as_told() -> None:
    assert {axis: (sizes[0], sizes[-1]) for axis, sizes in AXES.items()} == {
        "tasks": (1, 100_000),
        "shots": (1, 1000),
        "width": (16, 4096),
        "steps": (1, 50),
    }
    for axis, sizes in AXES.items():
        assert [at(axis, size) for size in sizes].count(BASE) == 1
    assert at("width", 7).widths == (64, 7, 7, 10)


def track(name: str, seconds: float, tasks: int, **limits: Any) -> Track:
    """A curve over tasks whose last point took so long."""
    found = Track(CURVES[name], replace(Limits(), **limits))
    flops = CURVES[name].plan(at("tasks", tasks)).estimate.flops
    found.points.append({"x": tasks, "seconds": {"median": seconds}, "flops": flops})
    return found


def test_a_curve_ends_where_a_step_would_take_too_long_or_too_much() -> None:
    quick = track("ours", 1.0, 1000, patience=3.5)
    assert quick.goes_on("tasks", 3162)
    slow = track("ours", 1.2, 1000, patience=3.5)
    assert not slow.goes_on("tasks", 3162)
    assert slow.stopped == "tasks 3,162: about 3.8 s a step, over 3.5 s"
    assert not slow.goes_on("tasks", 1)
    # Every task's weights are the peer's alone to hold.
    assert track("ours", 1e-3, 1000, memory=1e9).goes_on("tasks", 31_623)
    large = track("vmap(grad)", 1e-3, 1000, memory=1e9)
    assert not large.goes_on("tasks", 31_623)
    assert "GB, over 1 GB" in str(large.stopped)


@pytest.mark.processes
def test_a_failure_ends_a_curve_with_its_reason() -> None:
    with pytest.raises(RuntimeError, match=r"^ValueError: .*forms"):
        Point(replace(CURVES["ours"], form="dual:99"), BASE, BASE)


@pytest.mark.processes
def test_memory_is_that_of_the_step() -> None:
    """Every task has weights of its own under vmap, several times; ours hold a chunk's."""
    workload = at("tasks", 400)
    weights = 4 * 400 * sum(p.numel() for p in BASE.model().parameters())
    peaks = {}
    for name in ("ours", "vmap(grad)"):
        with closing(Point(CURVES[name], BASE, workload)) as point:
            peaks[name] = point.peak_bytes
            assert point.timed(0.0) > 0.0
    assert 2 * weights < peaks["vmap(grad)"] < 1.5 * CURVES["vmap(grad)"].memory(workload)
    assert 0 < peaks["ours"] < weights


@pytest.mark.processes
def test_the_quick_run_measures_every_curve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = tmp_path / "scale.json"
    monkeypatch.setattr("sys.argv", ["scale", "--quick", "--save", str(saved), "--figures", str(tmp_path)])
    scale.main()
    found = json.loads(saved.read_text())
    assert {axis: list(curves) for axis, curves in found["axes"].items()} == {axis: list(CURVES) for axis in QUICK}
    for axis, curves in found["axes"].items():
        for curve in curves.values():
            assert [point["x"] for point in curve["points"]] == list(QUICK[axis])
            assert curve["stopped"] is None
            assert all(point["seconds"]["rounds"] == HASTE.rounds[1] for point in curve["points"])
    printed = capsys.readouterr().out
    assert render(found) in printed
    assert render_slopes(found) in printed
    for name in ("scale.png", "scale-memory.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def synthetic(tasks: tuple[int, ...]) -> dict[str, Any]:
    """A run whose time is linear and whose planner changes its mind half way."""

    def points(ours: bool) -> list[dict[str, Any]]:
        found = []
        for i, x in enumerate(tasks):
            forms = ["dual", "dual"] if i < len(tasks) / 2 else ["primal", "dual:2"]
            told = {"forms": forms, "chunk": x if i < 3 else 7, "rows": 4 if i == 1 else None} if ours else {}
            took = {"median": 1e-3 * x, "q1": 1e-3 * x, "q3": 1e-3 * x, "rounds": 3}
            found.append({"x": x, "seconds": took, "peak_bytes": 1e6 * x, "flops": 1.0} | told)
        return found

    axes = {}
    for name, curve in CURVES.items():
        axis = Track(curve, Limits(), points(name == "ours"), "tired" if name == "vmap(grad)" else None)
        axes[name] = axis.result()
    environment = {"device": "a CPU", "threads": 1, "torch": "2"}
    return {"environment": environment, "base": vars(BASE), "axes": {"tasks": axes}}


def test_the_planners_choice_and_the_slopes_are_told_in_tables_and_plots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = synthetic((1, 10, 100, 1000, 10_000, 100_000))
    panels: list[Any] = []
    monkeypatch.setattr(scale, "draw_panels", lambda path, shown, *_: panels.extend(shown))
    draw(tmp_path, run)
    ours = panels[0].curves[0]
    assert ours.label == "ours, ~tasks^1.00"
    assert ours.kinds == ["dual, dual"] * 3 + ["primal, folded"] * 3
    assert ours.hollow == [False, True, False, True, True, True]
    assert (panels[0].y, panels[1].y) == ("ms", "MB above model and data")
    assert panels[1].curves[3].ys[-1] == 1e5
    assert render_slopes(run).splitlines()[-1] == (
        "| tasks | vmap(grad) | tasks^1.00 | tasks^1.00 | 100,000 | 100 s | 100 GB | tired |"
    )
    assert render(run).splitlines()[-1].endswith("| 1e+05 | 1e+05 | primal dual:2 / 7 |")
    point = run["axes"]["tasks"]["ours"]["points"][0]
    assert choice(point) == "dual dual / 1"


def test_the_stored_run_is_a_whole_one() -> None:
    """Else: python -m bench.scale --save bench/results/scale-cpu-2-cores.json"""
    stored = json.loads(scale.STORED.read_text())
    assert not stored["quick"]
    for axis, sizes in AXES.items():
        for name, curve in stored["axes"][axis].items():
            covered = [point["x"] for point in curve["points"]]
            assert covered == list(sizes[: len(covered)]), (axis, name)
            assert (curve["stopped"] is None) == (len(covered) == len(sizes)), (axis, name)
