"""Turns stored benchmark runs into one Markdown table, and into the small file that the docs quote.

python -m bench.report RUN.json [--save bench/results/NAME.json]
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from fomaml_fused.train.files import save_json


def summarize(run: dict[str, Any]) -> dict[str, Any]:
    """Medians and quartiles in seconds by workload and contender, who was not timed and why, peak memory, versions.

    Args:
        run: what `pytest --benchmark-json` wrote. A workload whose gradient of ours was wrong is not in it: its test
            failed before anything was timed.
    """
    workloads: dict[str, Any] = {}
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
        found = {"ours": quartiles(case["stats"]["data"])}
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
        "memory_bytes": memory,
        **absent,
    }


def render(summary: dict[str, Any]) -> str:
    """The Markdown table: medians in milliseconds, and ratios of peers' medians to ours."""
    environment = summary["environment"]
    lines = [
        f"{environment['device']}, {environment['threads']} threads, torch {environment['torch']}; medians in ms, "
        "interleaved rounds",
        "",
    ]
    if summary["seconds"]:
        columns = list(dict.fromkeys(name for found in summary["seconds"].values() for name in found))
        lines.append(f"| workload | {' | '.join(columns)} | best peer / ours | best peer / compiled | vmap / ours |")
        lines.append("|---" * (len(columns) + 4) + "|")
        for workload, found in summary["seconds"].items():
            medians = {name: times["median"] for name, times in found.items()}
            best = min((median for name, median in medians.items() if not name.startswith("ours")), default=None)
            ratios = (
                ratio(best, medians["ours"]),
                ratio(best, medians["ours, compiled"]),
                ratio(medians.get("vmap(grad)"), medians["ours"]),
            )
            cells = [f"{1e3 * medians[name]:.3g}" if name in medians else "–" for name in columns]
            lines.append(f"| {workload} | {' | '.join([*cells, *ratios])} |")
    if summary.get("versions"):
        lines += ["", f"Versions: {', '.join(f'{name} {version}' for name, version in summary['versions'].items())}."]
    for name, reasons in summary.get("failed", {}).items():
        lines += ["", *(f"{name} on {workload}, not timed: {reason}." for workload, reason in reasons.items())]
    for name, reasons in summary.get("skipped", {}).items():
        lines += ["", f"{name}: {', '.join(dict.fromkeys(reasons.values()))}."]
    for name, found in summary["memory_bytes"].items():
        lines += [
            "",
            f"Peak memory, {name}: {found['peak'] / 1e9:.2f} GB of process memory, {found['before'] / 1e9:.2f} GB of "
            f"it before the step (libraries and data). Fast weights and gradients of every task would take "
            f"{found['naive'] / 1e9:.1f} GB.",
        ]
    return "\n".join(lines)


def ratio(of: float | None, to: float) -> str:
    """With one decimal, where there is one."""
    return "–" if of is None else f"{of / to:.1f}"


def quartiles(seconds: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    if len(seconds) == 1:
        return {"median": seconds[0], "q1": seconds[0], "q3": seconds[0], "rounds": 1}
    q1, median, q3 = statistics.quantiles(seconds, n=4, method="inclusive")
    return {"median": median, "q1": q1, "q3": q3, "rounds": len(seconds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="what pytest --benchmark-json wrote")
    parser.add_argument("--save", type=Path, help="keep the summary as JSON")
    options = parser.parse_args()
    summary = summarize(json.loads(options.run.read_text()))
    if options.save:
        save_json(options.save, summary)
    print(render(summary))


if __name__ == "__main__":
    main()
