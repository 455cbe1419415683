"""Turns what benchmarks stored into Markdown tables, plots and the pages that quote them.

python -m bench.report [RUN.json] [--save bench/results/NAME.json] [--figures docs] [--write README.md ...]

RUN.json is what `pytest --benchmark-json` wrote, or the small summary of it that --save keeps. The pages show the
summary beside what `bench.scale` and `bench.profile_steps` stored; --figures draws the former two.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fomaml_fused.train.files import save_json

from . import profile_steps, scale
from .figures import draw_bars
from .pages import places, put
from .summaries import quartiles, ratio

RESULTS = Path(__file__).parent / "results"
STORED = RESULTS / "cpu-2-cores.json"
OTHER = RESULTS / "cpu-2-cores-other.json"
# The module, the module with compile=True, and that without autograd; below, what tables call them.
OURS = ("ours", "ours, compiled", "ours, grad_and_value")
KINDS = ("default", "`compile=True`", "`grad_and_value`")
FEW_SHOT = ("omniglot", "wide", "crowd")


def summarize(run: dict[str, Any]) -> dict[str, Any]:
    """Medians and quartiles in seconds by workload and contender, who was not timed and why, peak memory, versions.

    A workload on which ours disagreed with the oracle has no times, and stands under "incorrect" with the disagreement.

    Args:
        run: what `pytest --benchmark-json` wrote, or what this function made of it.
    """
    if "benchmarks" not in run:
        return run
    workloads: dict[str, Any] = {}
    incorrect: dict[str, str] = {}
    absent: dict[str, dict[str, dict[str, str]]] = {"failed": {}, "skipped": {}}
    versions: dict[str, str] = {}
    memory: dict[str, Any] = {}
    environment: dict[str, Any] = {}
    for case in run["benchmarks"]:
        extra = case["extra_info"]
        environment = {name: extra[name] for name in ("device", "threads", "torch", "python", "fomaml_fused")}
        if "memory" in extra:
            memory[case["group"].removeprefix("memory: ")] = extra["memory"]
            continue
        if "incorrect" in extra:
            incorrect[case["group"]] = f"its loss or gradient differs by {extra['incorrect']:.1e} of the oracle's"
            workloads[case["group"]] = {}
            continue
        found = {OURS[0]: quartiles(case["stats"]["data"])}
        found |= {name: quartiles(times) for name, times in extra["others"].items()}
        workloads[case["group"]] = found
        versions |= extra["versions"]
        for why, reasons in absent.items():
            for name, reason in extra[why].items():
                reasons.setdefault(name, {})[case["group"]] = reason
    return {
        "environment": environment,
        "versions": versions,
        "seconds": workloads,
        "incorrect": incorrect,
        "memory_bytes": memory,
        **absent,
    }


def contenders(summary: dict[str, Any]) -> list[str]:
    """Who was timed on any workload, ours first."""
    found = dict.fromkeys(name for times in summary["seconds"].values() for name in times)
    return sorted(found, key=lambda name: OURS.index(name) if name in OURS else len(OURS))


def medians(summary: dict[str, Any], workload: str) -> dict[str, float]:
    """Seconds by contender."""
    return {name: times["median"] for name, times in summary["seconds"][workload].items()}


def best_peer(found: dict[str, float]) -> str | None:
    """The name of the fastest peer; None where no peer was timed."""
    peers = {name: seconds for name, seconds in found.items() if name not in OURS}
    return min(peers, key=peers.__getitem__, default=None)


def gains(found: dict[str, float]) -> dict[str, str]:
    """The fastest peer's time over that of each of ours, by its name; a dash where one of them is missing."""
    peer = best_peer(found)
    best = None if peer is None else found[peer]
    return {name: ratio(best, found.get(name)) for name in OURS}


def absences(summary: dict[str, Any]) -> list[str]:
    """What is not in the table and why, a sentence for each contender and reason."""
    lines = [
        f"Ours on {workload}: no time and no gain, because {why}."
        for workload, why in summary.get("incorrect", {}).items()
    ]
    for name, reasons in summary.get("failed", {}).items():
        lines += [f"{name} on {workload}, not timed: {reason}." for workload, reason in reasons.items()]
    for name, reasons in summary.get("skipped", {}).items():
        lines += [f"{name}: {', '.join(dict.fromkeys(reasons.values()))}."]
    return lines


def milliseconds(seconds: float | None) -> str:
    """Three significant digits, without an exponent."""
    if seconds is None:
        return "–"
    value = 1e3 * seconds
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def render_gain(summary: dict[str, Any]) -> str:
    """One line: the gain with compile=True over the fastest peer, few-shot workloads apart from the others."""
    found = {w: medians(summary, w) for w in summary["seconds"]}
    compiled = {w: float(r) for w, times in found.items() if (r := gains(times)["ours, compiled"]) != "–"}

    def span(workloads: Sequence[str]) -> str:
        values = sorted(compiled[w] for w in workloads)
        return f"{values[0]:g} to {values[-1]:g} times"

    few = [w for w in FEW_SHOT if w in compiled]
    others = [w for w in compiled if w not in FEW_SHOT]
    return (
        f"**Gain:** with `compile=True` on {summary['environment']['threads']} CPU cores, a meta-step is {span(few)} "
        f"as fast as the fastest peer on few-shot MLPs ({', '.join(few)}), and {span(others)} on the rest "
        f"({', '.join(others)}). No GPU has been measured yet."
    )


def render(summary: dict[str, Any]) -> str:
    """The Markdown table of gains: the fastest peer's median over ours, and the medians behind them."""
    environment = summary["environment"]
    lines = [
        f"{environment['device']}, {environment['threads']} threads, torch {environment['torch']}. Times are medians "
        "of interleaved rounds, in ms.",
        "",
    ]
    if summary["seconds"]:
        columns = [
            "workload",
            *(f"gain, {kind}" for kind in KINDS),
            *(f"{kind}, ms" for kind in KINDS),
            "best peer, ms",
        ]
        rows = []
        for workload in summary["seconds"]:
            found = medians(summary, workload)
            peer = best_peer(found)
            best = "–" if peer is None else f"{milliseconds(found[peer])} ({peer})"
            times = [milliseconds(found.get(name)) for name in OURS]
            rows.append([workload, *gains(found).values(), *times, best])
        lines += markdown_table(columns, rows)
    for line in absences(summary):
        lines += ["", line]
    return "\n".join(lines)


def render_peers(summary: dict[str, Any]) -> str:
    """The Markdown table of every peer's median in milliseconds, versions, and the peak memory."""
    lines: list[str] = []
    peers = [name for name in contenders(summary) if name not in OURS]
    if peers:
        rows = []
        for workload in summary["seconds"]:
            found = medians(summary, workload)
            rows.append([workload, *(milliseconds(found.get(name)) for name in peers)])
        lines += markdown_table(["ms", *peers], rows)
    if summary.get("versions"):
        lines += ["", f"Versions: {', '.join(f'{name} {version}' for name, version in summary['versions'].items())}."]
    for name, found in summary["memory_bytes"].items():
        lines += [
            "",
            f"Peak memory, {name}: {found['peak'] / 1e9:.2f} GB of process memory, {found['before'] / 1e9:.2f} GB of "
            f"it before the step (libraries and data). Fast weights and gradients of every task would take "
            f"{found['naive'] / 1e9:.1f} GB.",
        ]
    return "\n".join(lines)


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    return [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *(f"| {' | '.join(row)} |" for row in rows)]


# By the name of a place in the pages: where its content is stored, and what shows it.
PLACES: dict[str, tuple[Path, Callable[[dict[str, Any]], str]]] = {
    "gain": (STORED, render_gain),
    "workloads": (STORED, render),
    "peers": (STORED, render_peers),
    "workloads on another processor": (OTHER, render),
    "peers on another processor": (OTHER, render_peers),
    "scale": (scale.STORED, scale.render),
    "slopes": (scale.STORED, scale.render_slopes),
    "profile": (profile_steps.STORED, profile_steps.render),
    "first call": (profile_steps.STORED, profile_steps.render_first_calls),
}


def written(page: str) -> str:
    """A page with what is stored in each of its places.

    Raises:
        ValueError: the page has none, or one of an unknown name.
        FileNotFoundError: there is no run to show.
    """
    names = places(page)
    if not names or not {*names} <= {*PLACES}:
        raise ValueError(f"the page has places for {', '.join(names) or 'nothing'}; known are {', '.join(PLACES)}")
    for name in names:
        stored, shown = PLACES[name]
        if not stored.exists():
            raise FileNotFoundError(f"nothing to put in place of {name!r}: there is no {stored}")
        page = put(page, name, shown(json.loads(stored.read_text())))
    return page


def draw(path: Path, summary: dict[str, Any]) -> None:
    """The bars of every workload, with the gain by default below its name, and who was not timed below all."""
    where, seconds = summary["environment"], summary["seconds"]
    beneath = {workload: gains(medians(summary, workload))[OURS[0]] for workload in seconds}
    draw_bars(
        path,
        seconds,
        contenders(summary),
        OURS,
        beneath={name: "no gain" if best == "–" else f"gain\n{best}" for name, best in beneath.items()},
        title=f"{where['device']}, {where['threads']} threads, torch {where['torch']}; medians and quartiles",
        notes=absences(summary),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "run", type=Path, nargs="?", default=STORED, help=f"a run or its summary; else bench/results/{STORED.name}"
    )
    parser.add_argument("--save", type=Path, help="keep the summary as JSON")
    parser.add_argument(
        "--figures", type=Path, help="a folder for benchmarks.png and the plots of the stored scale run"
    )
    parser.add_argument("--write", type=Path, nargs="+", metavar="PAGE", help="pages to put what is stored into")
    options = parser.parse_args()
    summary = summarize(json.loads(options.run.read_text()))
    if options.save:
        save_json(options.save, summary)
    print(render(summary), render_peers(summary), sep="\n\n")
    if options.figures:
        draw(options.figures / "benchmarks.png", summary)
        if scale.STORED.exists():
            scale.draw(options.figures, json.loads(scale.STORED.read_text()))
    for page in options.write or ():
        page.write_text(written(page.read_text()))


if __name__ == "__main__":
    main()
