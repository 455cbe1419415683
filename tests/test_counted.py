"""What compiled kernels execute stays within what is stored; needs an emulator of GPUs (`make test-virtual-gpu`)."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
STORED = json.loads((Path(__file__).parent.parent / "bench" / "results" / "counted.json").read_text())


def test_counts_stay_within_a_tenth_of_the_stored_ones() -> None:
    emulator = pytest.importorskip("virtual_gpu")
    from bench.counted import CASES, COLUMNS, count

    if triton.__version__ != STORED["triton"]:
        pytest.skip(f"the counts are of triton {STORED['triton']}, this is {triton.__version__}")
    architecture = int(os.environ["VIRTUAL_GPU"])
    # Of the dual kernels the cheapest cases, for they take the emulator long.
    cases = [c for c in CASES if c.engine != "dual" or (str(c.workload).endswith("crowd") and c.precision == "tf32")]
    counted = {(str(case.workload), case.precision, f"sm_{architecture}") for case in cases}
    stored = [row for row in STORED["rows"] if (row["workload"], row["precision"], row["target"]) in counted]
    with emulator.options(memory_stats=True):
        rows = count(architecture, emulator, cases)
    assert [(row["workload"], row["precision"], row["kernel"]) for row in rows] == [
        (row["workload"], row["precision"], row["kernel"]) for row in stored
    ]
    for row, before in zip(rows, stored, strict=True):
        for column in COLUMNS:
            assert row[column] <= 1.1 * before[column], (
                f"{row['workload']} {row['precision']} {row['kernel']}: {column}"
            )
