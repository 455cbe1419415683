"""What the kernels execute, counted on an emulator of GPUs: instructions, barriers, shared and global memory traffic.

python -m bench.counted [--save bench/results/counted.json]

Counts are facts about compiled kernels, not times. The emulator is a Triton driver, the module `virtual_gpu`, found on
PYTHONPATH.
"""

from __future__ import annotations

import argparse
import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import triton

import fomaml_fused as ff
from fomaml_fused.train.files import save_json

from .peers import ours
from .workloads import WORKLOADS

COUNTED = ("sine", "sine K=5")
ARCHITECTURES = (80, 90)
PRECISIONS = ("tf32", "tf32x3", "bf16")
COLUMNS = ("instructions", "matrix", "barriers", "wavefronts", "sectors")


def count(architecture: int, emulator: Any) -> list[dict[str, Any]]:
    """A row for each workload, precision and kernel: what one program executes."""
    emulator.activate(arch=architecture, memory_stats=True)
    ff.planner.forget_plans()
    rows = []
    for name in COUNTED:
        workload = replace(WORKLOADS[name], tasks=2)
        for precision in PRECISIONS:
            step = ours(workload, workload.model(), workload.batch(), backend="triton", precision=precision)
            with emulator.record() as launches:
                step()
            for launch in launches:
                rows.append({"workload": name, "precision": precision, "target": f"sm_{architecture}", **_row(launch)})
    return rows


def _row(launch: Any) -> dict[str, Any]:
    profile = launch.profile
    programs = profile.ctas
    return {
        "kernel": launch.name,
        "warps": launch.num_warps,
        # Of a warp; the others of a program, all its warps together.
        "instructions": round(profile.instructions / programs / launch.num_warps),
        "matrix": round(profile.mma / programs / launch.num_warps),
        "barriers": round(profile.barriers / programs),
        "wavefronts": round(profile.shared_wavefronts / programs),
        "sectors": round(profile.global_sectors / programs),
    }


def render(stored: dict[str, Any]) -> str:
    """The Markdown table of the meta-step's kernel."""
    lines = [
        f"| workload | target | precision | {' | '.join(COLUMNS)} |",
        "|---" * (3 + len(COLUMNS)) + "|",
    ]
    for row in stored["rows"]:
        if row["kernel"] == "meta_kernel":
            cells = [f"{row[column]:,}" for column in COLUMNS]
            lines.append(f"| {row['workload']} | {row['target']} | {row['precision']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", type=Path, help="keep the counts as JSON")
    options = parser.parse_args()
    emulator = importlib.import_module("virtual_gpu")
    rows = [row for architecture in ARCHITECTURES for row in count(architecture, emulator)]
    stored = {"triton": triton.__version__, "rows": rows}
    if options.save:
        save_json(options.save, stored)
    print(render(stored))


if __name__ == "__main__":
    main()
