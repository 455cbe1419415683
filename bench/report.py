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
OURS = ("ours", "ours, compiled", "ours, grad_and_value")  # the module, with compile=True, without autograd as well


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


def ratios(found: dict[str, float], mine: Sequence[str] = OURS) -> list[str]:
    """How many times each of `mine` the best peer took, and vmap took ours."""
    best = min((seconds for name, seconds in found.items() if name not in OURS), default=None)
    return [*(ratio(best, found.get(name)) for name in mine), ratio(found.get("vmap(grad)"), found.get(OURS[0]))]


def absences(summary: dict[str, Any]) -> list[str]:
    """What is not in the table and why, a sentence for each contender and reason."""
    lines = [
        f"Ours on {workload}: no time and no ratio, for {why}."
        for workload, why in summary.get("incorrect", {}).items()
    ]
    for name, reasons in summary.get("failed", {}).items():
        lines += [f"{name} on {workload}, not timed: {reason}." for workload, reason in reasons.items()]
    for name, reasons in summary.get("skipped", {}).items():
        lines += [f"{name}: {', '.join(dict.fromkeys(reasons.values()))}."]
    return lines


def render(summary: dict[str, Any]) -> str:
    """The Markdown table: medians in milliseconds, and ratios of peers' medians to ours."""
    environment = summary["environment"]
    lines = [
        f"{environment['device']}, {environment['threads']} threads, torch {environment['torch']}; medians in ms, "
        "interleaved rounds",
        "",
    ]
    if summary["seconds"]:
        columns = contenders(summary)
        mine = [name for name in columns if name in OURS]
        compared = [*(f"best peer / {name.removeprefix('ours, ')}" for name in mine), "vmap / ours"]
        lines.append(f"| workload | {' | '.join([*columns, *compared])} |")
        lines.append("|---" * (1 + len(columns) + len(compared)) + "|")
        for workload in summary["seconds"]:
            found = medians(summary, workload)
            cells = [f"{1e3 * found[name]:.3g}" if name in found else "–" for name in columns]
            lines.append(f"| {workload} | {' | '.join([*cells, *ratios(found, mine)])} |")
    if summary.get("versions"):
        lines += ["", f"Versions: {', '.join(f'{name} {version}' for name, version in summary['versions'].items())}."]
    for line in absences(summary):
        lines += ["", line]
    for name, found in summary["memory_bytes"].items():
        lines += [
            "",
            f"Peak memory, {name}: {found['peak'] / 1e9:.2f} GB of process memory, {found['before'] / 1e9:.2f} GB of "
            f"it before the step (libraries and data). Fast weights and gradients of every task would take "
            f"{found['naive'] / 1e9:.1f} GB.",
        ]
    return "\n".join(lines)


# By the name of a place in the pages: where its content is stored, and what shows it.
PLACES: dict[str, tuple[Path, Callable[[dict[str, Any]], str]]] = {
    "workloads": (STORED, render),
    "workloads on another processor": (RESULTS / "cpu-2-cores-other.json", render),
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
    """The bars of every workload, with the best peer's ratio to ours below its name and the absent below all."""
    where, seconds = summary["environment"], summary["seconds"]
    beneath = {workload: ratios(medians(summary, workload))[0] for workload in seconds}
    draw_bars(
        path,
        seconds,
        contenders(summary),
        OURS,
        beneath={name: "no ratio" if best == "–" else f"best peer / ours\n{best}" for name, best in beneath.items()},
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
    print(render(summary))
    if options.figures:
        draw(options.figures / "benchmarks.png", summary)
        if scale.STORED.exists():
            scale.draw(options.figures, json.loads(scale.STORED.read_text()))
    for page in options.write or ():
        page.write_text(written(page.read_text()))


if __name__ == "__main__":
    main()
