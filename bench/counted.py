"""What the kernels execute, counted on an emulator of GPUs: instructions, barriers, shared and global memory traffic.

python -m bench.counted [--save bench/results/counted.json]

Counts are facts about compiled kernels, not times. The emulator is that of the tests, so this runs in a checkout.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import triton

import fomaml_fused as ff
from fomaml_fused.train.files import save_json

from .compiled import Case
from .workloads import WORKLOADS

ARCHITECTURES = (80, 90)
CASES = (
    *(Case(WORKLOADS[name], "resident", p) for name in ("sine", "sine K=5") for p in ("tf32", "tf32x3", "bf16")),
    *(Case(WORKLOADS[name], "dual", p) for name in ("omniglot", "crowd") for p in ("tf32", "tf32x3")),
    Case(replace(WORKLOADS["crowd"], name="ragged crowd"), "dual", "tf32", ragged=True),
    *(Case(WORKLOADS["rl"], "chained", p) for p in ("tf32", "bf16")),
)
COLUMNS = ("instructions", "matrix", "barriers", "wavefronts", "sectors")


def count(architecture: int, cases: Sequence[Case] = CASES) -> list[dict[str, Any]]:
    """A row for each case and launch of a meta-step: what one program executes on the emulator, which is active.

    Tasks fill two programs, which are laid out as for all tasks of the workload. Where a kernel is launched again, the
    row's name of it has a number.
    """
    from tests import virtual_gpu

    rows = []
    for case in cases:
        workload, meta = case.workload, case.meta()
        if case.ragged:  # one of each size; a pack has the configuration that is planned for it
            tasks, config = workload.shots, None
        else:
            with ff.override(engine=case.engine):
                config = meta.plan(workload.tasks, workload.shots, workload.queries).config
            tasks = 2 * getattr(config, "tasks", 1)
        batch = workload.batch(tasks=tasks)
        with ff.override(engine=case.engine, config=config, packs=case.ragged), virtual_gpu.record() as launches:
            meta(*batch, **case.counts(tasks)).backward()
        about = {"workload": workload.name, "precision": case.precision, "target": f"sm_{architecture}"}
        names = [launch.name for launch in launches]
        for i, launch in enumerate(launches):
            times = names[: i + 1].count(launch.name)
            kernel = launch.name if times == 1 else f"{launch.name} {times}"
            rows.append({**about, "kernel": kernel, **_row(launch)})
    return rows


def _row(launch: Any) -> dict[str, Any]:
    counts = launch.counts
    programs = counts.programs
    return {
        "warps": launch.num_warps,
        # Of a warp; the others of a program, all its warps together.
        "instructions": round(counts.instructions / programs / launch.num_warps),
        "matrix": round(counts.matrix / programs / launch.num_warps),
        "barriers": round(counts.barriers / programs),
        "wavefronts": round(counts.shared_wavefronts / programs),
        "sectors": round(counts.global_sectors / programs),
    }


def render(stored: dict[str, Any], kernel: str = "meta_kernel") -> str:
    """The Markdown table of a kernel."""
    lines = [
        f"| workload | target | precision | {' | '.join(COLUMNS)} |",
        "|---" * (3 + len(COLUMNS)) + "|",
    ]
    for row in stored["rows"]:
        if row["kernel"] == kernel:
            cells = [f"{row[column]:,}" for column in COLUMNS]
            lines.append(f"| {row['workload']} | {row['target']} | {row['precision']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", type=Path, help="keep the counts as JSON")
    options = parser.parse_args()
    from tests import virtual_gpu

    rows = []
    for architecture in ARCHITECTURES:
        virtual_gpu.activate(architecture, traffic=True)
        rows += count(architecture)
    stored = {"triton": triton.__version__, "rows": rows}
    if options.save:
        save_json(options.save, stored)
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        print(f"{kernel}\n{render(stored, kernel)}\n")


if __name__ == "__main__":
    main()
