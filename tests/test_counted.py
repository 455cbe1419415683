"""Compiled kernels execute no more than is stored; on the emulator (`pytest --kernels=sm_90`)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from . import virtual_gpu

triton = pytest.importorskip("triton")
STORED = json.loads((Path(__file__).parent.parent / "bench" / "results" / "counted.json").read_text())


def test_counts_stay_within_a_tenth_of_the_stored_ones(emulated: int) -> None:
    from bench.counted import CASES, COLUMNS, count

    if triton.__version__ != STORED["triton"]:
        pytest.skip(f"the counts are of triton {STORED['triton']}, this is {triton.__version__}")
    # Of the dual kernels the cheapest cases, for they take the emulator long.
    cases = [c for c in CASES if c.engine != "dual" or (str(c.workload).endswith("crowd") and c.precision == "tf32")]
    counted = {(str(case.workload), case.precision, f"sm_{emulated}") for case in cases}
    stored = [row for row in STORED["rows"] if (row["workload"], row["precision"], row["target"]) in counted]
    with virtual_gpu.changed(traffic=True, races=False):
        rows = count(emulated, cases)
    assert [(row["workload"], row["precision"], row["kernel"]) for row in rows] == [
        (row["workload"], row["precision"], row["kernel"]) for row in stored
    ]
    for row, before in zip(rows, stored, strict=True):
        for column in COLUMNS:
            assert row[column] <= 1.1 * before[column], (
                f"{row['workload']} {row['precision']} {row['kernel']}: {column}"
            )
