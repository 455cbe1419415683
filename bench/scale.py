"""How a meta-step grows: time and memory over tasks, shots, width and steps, one at a time about a base problem.

python -m bench.scale [--save bench/results/scale-cpu-2-cores.json] [--figures docs/] [--quick]

The curves are ours as the planner chooses, ours with every layer primal, with every layer dual, and vmap(grad). At each
point every one of them has a process of its own, which tells what its first step takes in memory above model and data;
then they are timed in turns. A curve ends where a step takes, or by its flops would take, longer than the patience, or
where its memory would exceed the bound.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from fomaml_fused.text import scaled
from fomaml_fused.train.files import save_json

from .contenders import WARM_UP
from .figures import Curve as Line
from .figures import Panel, colours, draw_panels
from .regret import Choice
from .scale_point import Curve, Point
from .summaries import power, quartiles
from .test_workloads import environment
from .workloads import Workload

STORED = Path(__file__).parent / "results" / "scale-cpu-2-cores.json"
BASE = Workload("base", (64, 128, 128, 10), "relu", tasks=32, shots=5, queries=5, steps=5, loss="cross_entropy")
CURVES = {
    "ours": Curve(),
    "ours, all primal": Curve("primal"),
    "ours, all dual": Curve("dual"),
    "vmap(grad)": Curve(peer=True),
}
LEGEND = "forms that the planner chose, layer by layer; hollow where not all tasks run at a time"
# What stands for a decade, with the base's own size on it.
AXES: dict[str, tuple[int, ...]] = {
    "tasks": (1, 3, 10, 32, 100, 316, 1000, 3162, 10_000, 31_623, 100_000),
    "shots": (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000),
    "width": (16, 32, 64, 128, 256, 512, 1024, 2048, 4096),
    "steps": (1, 2, 5, 10, 20, 50),
}
QUICK: dict[str, tuple[int, ...]] = {"tasks": (1, 2, 4, 8), "steps": (1, 2)}


@dataclass(frozen=True)
class Limits:
    """Of a measurement.

    Attributes:
        patience: seconds of a step, after which a curve ends.
        memory: bytes of a step and its data, before which it ends.
        budget: seconds for the rounds of a point.
        rounds: at least and at most, whatever the budget, of a step that takes less than `slow` seconds; else one.
    """

    patience: float = 20.0
    memory: float = 4e9
    budget: float = 1.0
    rounds: tuple[int, int] = (3, 30)
    slow: float = 1.0


HASTE = Limits(patience=0.5, memory=1e8, budget=0.02, rounds=(2, 2))


def at(axis: str, size: int) -> Workload:
    """The base problem with one size changed; width is that of all hidden layers."""
    if axis == "width":
        return replace(BASE, widths=(BASE.widths[0], *(size for _ in BASE.widths[1:-1]), BASE.widths[-1]))
    sizes: dict[str, Any] = {axis: size}
    return replace(BASE, **sizes)


@dataclass
class Track:
    """A curve under way: its points, and why it ended before the end of its axis."""

    curve: Curve
    limits: Limits
    points: list[dict[str, Any]] = field(default_factory=list)
    stopped: str | None = None

    def goes_on(self, axis: str, size: int) -> bool:
        """Whether to measure the next point; else it says why not."""
        if self.stopped is not None:
            return False
        workload = at(axis, size)
        bytes_ = self.curve.memory(workload)
        if bytes_ > self.limits.memory:
            self.stopped = f"{axis} {size:,}: about {scaled(bytes_, 'B')}, over {scaled(self.limits.memory, 'B')}"
            return False
        if self.points:
            last = self.points[-1]
            flops = self.curve.plan(workload).estimate.flops
            expected = last["seconds"]["median"] * flops / last["flops"]
            if max(expected, last["seconds"]["median"]) > self.limits.patience:
                self.stopped = f"{axis} {size:,}: about {expected:.2g} s a step, over {self.limits.patience:g} s"
                return False
        return True

    def add(self, axis: str, size: int, point: Point, times: Sequence[float]) -> None:
        plan = self.curve.plan(at(axis, size))
        ours = {} if self.curve.peer else {"forms": plan.forms, "chunk": plan.chunk, "rows": plan.rows}
        found = {"x": size, "seconds": quartiles(times), "peak_bytes": point.peak_bytes, "flops": plan.estimate.flops}
        self.points.append(found | ours)

    def result(self) -> dict[str, Any]:
        xs = [point["x"] for point in self.points]
        return {
            "points": self.points,
            "stopped": self.stopped,
            "time_slope": power(xs, [point["seconds"]["median"] for point in self.points]),
            "memory_slope": power(xs, [point["peak_bytes"] for point in self.points]),
        }


def measure(axis: str, sizes: Sequence[int], limits: Limits) -> dict[str, Any]:
    """Every curve over one axis."""
    tracks = {name: Track(curve, limits) for name, curve in CURVES.items()}
    for size in sizes:
        with ExitStack() as processes:
            running: dict[str, Point] = {}
            for name, track in tracks.items():
                if track.goes_on(axis, size):
                    try:
                        running[name] = processes.enter_context(closing(Point(track.curve, BASE, at(axis, size))))
                    except RuntimeError as error:
                        track.stopped = f"{axis} {size:,}: {error}"
            for name, times in _in_turns(running, limits).items():
                tracks[name].add(axis, size, running[name], times)
        told = (f"{name} {scaled(track.points[-1]['seconds']['median'], 's')}" for name, track in tracks.items()
                if track.points and track.points[-1]["x"] == size)  # fmt: skip
        print(f"{axis} {size:,}: {', '.join(told) or 'nobody'}", flush=True)
    return {name: track.result() for name, track in tracks.items()}


def _in_turns(running: dict[str, Point], limits: Limits) -> dict[str, list[float]]:
    """Seconds of each one's steps; where a step is slow, of one that came after the first."""
    patient = {name: point for name, point in running.items() if point.first <= limits.patience}
    times = {name: [point.first] for name, point in running.items() if name not in patient}
    times |= {name: [point.timed(0.0)] for name, point in patient.items()}
    fast = [name for name in patient if times[name][0] < limits.slow]
    a_round = sum(max(WARM_UP, times[name][0]) + times[name][0] for name in fast)
    for name in fast:  # the first, which is not warm, was to know how many there is time for
        times[name] = []
    if fast:
        least, most = limits.rounds
        for _ in range(max(least, min(most, int(limits.budget / a_round)))):
            for name in fast:
                times[name].append(running[name].timed(WARM_UP))
    return times


def render_slopes(found: dict[str, Any]) -> str:
    """Where each curve leads: the powers of the upper half of its axis, its last point, and why it goes no further."""
    lines = ["| over | curve | time ~ | memory ~ | last point | time | memory | ends because of |", "|---" * 8 + "|"]
    for axis, curves in found["axes"].items():
        for name, curve in curves.items():
            cells = ["–"] * 3
            if curve["points"]:
                last = curve["points"][-1]
                cells = [f"{last['x']:,}", scaled(last["seconds"]["median"], "s"), scaled(last["peak_bytes"], "B")]
            powers = (_power(axis, curve["time_slope"]), _power(axis, curve["memory_slope"]))
            lines.append(f"| {axis} | {name} | {' | '.join([*powers, *cells])} | {curve['stopped'] or '–'} |")
    return "\n".join(lines)


def _power(axis: str, slope: float | None) -> str:
    return "–" if slope is None else f"{axis}^{round(slope, 2) + 0.0:.2f}"  # no negative zero


def render(found: dict[str, Any]) -> str:
    """The Markdown tables of all points, one for each axis: time and memory of each curve, and the planner's choice."""
    where, base = found["environment"], found["base"]
    lines = [
        f"{where['device']}, {where['threads']} threads, torch {where['torch']}; medians in ms and peaks in MB above "
        f"model and data. Base problem: {'-'.join(map(str, base['widths']))} {base['activation']}, {base['tasks']} "
        f"tasks, S = {base['shots']}, Q = {base['queries']}, K = {base['steps']}."
    ]
    for axis, curves in found["axes"].items():
        points = {name: {point["x"]: point for point in curve["points"]} for name, curve in curves.items()}
        sizes = sorted({x for of_one in points.values() for x in of_one})
        header = " | ".join(f"{name}, ms | MB" for name in curves)
        lines += ["", f"| {axis} | {header} | forms / tasks at a time |", "|---" * (2 * len(curves) + 2) + "|"]
        for x in sizes:
            cells = [_cells(points[name].get(x)) for name in curves]
            ours = points["ours"].get(x)
            lines.append(f"| {x:,} | {' | '.join(cells)} | {'–' if ours is None else choice(ours)} |")
    return "\n".join(lines)


def _cells(point: dict[str, Any] | None) -> str:
    if point is None:
        return "– | –"
    return f"{1e3 * point['seconds']['median']:.3g} | {point['peak_bytes'] / 1e6:.3g}"


def choice(point: dict[str, Any]) -> str:
    """The planner's, of a stored point of ours."""
    return str(Choice(tuple(point["forms"]), point["chunk"], point["rows"]))


def kind(point: dict[str, Any]) -> str:
    """The forms that the planner chose, short enough for a legend."""
    return ", ".join("folded" if ":" in form else form for form in point["forms"])


def in_parts(axis: str, point: dict[str, Any]) -> bool:
    """Whether the planner lets fewer than all tasks or samples run at a time."""
    tasks: int = at(axis, point["x"]).tasks
    return point["chunk"] < tasks or point["rows"] is not None


def draw(folder: Path, found: dict[str, Any]) -> None:
    """scale.png, time over every axis, and scale-memory.png, memory over tasks; markers tell the planner's choices."""
    where = found["environment"]
    device = f"{where['device']}, {where['threads']} threads, torch {where['torch']}"
    colour = colours([*CURVES], ["ours"])

    def panel(axis: str, y: str, value: Any, slope: str) -> Panel:
        lines = []
        for name, curve in found["axes"][axis].items():
            power_ = "" if curve[slope] is None else f", ~{_power(axis, curve[slope])}"
            points = curve["points"]
            kinds = [kind(point) if name == "ours" else "" for point in points]
            parts = [name == "ours" and in_parts(axis, point) for point in points]
            xs, ys = [point["x"] for point in points], [value(point) for point in points]
            lines.append(Line(name + power_, colour[name], xs, ys, kinds, parts, bold=name == "ours"))
        return Panel(axis, y, lines)

    panels = [panel(axis, "ms", lambda point: 1e3 * point["seconds"]["median"], "time_slope") for axis in found["axes"]]
    draw_panels(folder / "scale.png", panels, f"One meta-step about the base problem; {device}", LEGEND)
    memory = panel("tasks", "MB above model and data", lambda point: point["peak_bytes"] / 1e6, "memory_slope")
    draw_panels(folder / "scale-memory.png", [memory], f"Peak memory of one meta-step; {device}", LEGEND)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", type=Path, help="keep the points as JSON")
    parser.add_argument("--figures", type=Path, help="a folder for scale.png and scale-memory.png")
    parser.add_argument("--quick", action="store_true", help="tiny axes, to see that it works")
    options = parser.parse_args()
    start = time.perf_counter()
    sizes, limits = (QUICK, HASTE) if options.quick else (AXES, Limits())
    axes = {axis: measure(axis, along, limits) for axis, along in sizes.items()}
    found = {
        "environment": environment(),
        "quick": options.quick,
        "seconds": time.perf_counter() - start,
        "limits": asdict(limits),
        "base": asdict(BASE),
        "axes": axes,
    }
    found = json.loads(json.dumps(found))  # as it reads when stored
    if options.save:
        save_json(options.save, found)
    if options.figures:
        draw(options.figures, found)
    print(f"\n{render(found)}\n\n{render_slopes(found)}")


if __name__ == "__main__":
    main()
