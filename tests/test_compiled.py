"""Shipped kernel configurations compile to what the stored table says: no spills, within shared memory, no longer."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

import triton

from bench.compile_only import DEVICES, MAIN_DEVICES
from bench.compiled import Row, longest_loop, violations

ROOT = Path(__file__).parent.parent
STORED: dict[str, Any] = json.loads((ROOT / "bench" / "results" / "compiled.json").read_text())
FAST = r"^(sine meta_kernel tf32(x3)? sm_[89]0|omniglot \w+ tf32 sm_90|policy \w+ (inner )?own tf32 sm_90)$"
# Each spills a few words; mend a row and it must leave this list.
KNOWN = {
    "wide meta_kernel bf16 on sm_100",
    "omniglot query_kernel tf32x3 on sm_80",
    "omniglot query_kernel backward tf32x3 on sm_80",
    "omniglot inner_kernel tf32 on sm_100",
    "omniglot inner_kernel bf16 on sm_100",
    "crowd inner_kernel tf32x3 on sm_80",
    "crowd query_kernel forward tf32x3 on sm_80",
    "ragged inner_kernel tf32x3 on sm_80",
}
# The most words that a kernel spills on the other devices.
SPILLED = {"sm_86": 14, "sm_89": 14, "sm_120": 37, "gfx90a": 0, "gfx950": 0, "gfx1100": 780}


def python(*arguments: str) -> str:
    """What Python prints in a process that does not interpret kernels."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.compiles
def test_what_ships_compiles_to_what_is_stored(tmp_path: Path) -> None:
    if triton.__version__ != STORED["triton"]:
        pytest.skip(f"the table is of triton {STORED['triton']}, this is {triton.__version__}")
    python("-m", "bench.compiled", "--only", FAST, "--save", str(tmp_path / "rows.json"))
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert len(rows) == 9
    assert not violations(rows, STORED["rows"])


@pytest.mark.processes
def test_the_stored_table_has_every_launch() -> None:
    """Where not: python -m bench.compiled --save bench/results/compiled.json."""
    names = python("-c", "from bench.compiled import jobs\nfor _, target, name in jobs(): print(name, target)")
    assert names.splitlines() == [f"{row['case']} {row['target']}" for row in STORED["rows"]]


def test_the_stored_table_is_sound_but_for_what_is_known() -> None:
    violated = [row for row in STORED["rows"] if violations([row], [row])]
    assert {f"{row['case']} on {row['target']}" for row in violated if row["target"] in MAIN_DEVICES} == KNOWN
    others = [row for row in STORED["rows"] if row["target"] not in MAIN_DEVICES]
    assert all(row["shared"] <= DEVICES[row["target"]].shared_memory for row in others)
    assert {name: max(row["spilled"] for row in others if row["target"] == name) for name in SPILLED} == SPILLED


def test_primal_kernels_use_the_large_matrix_unit_of_sm_90() -> None:
    """But for a layer of three outputs, whose rows are fewer than that unit's; the rest of a kernel has no product."""
    rows = [
        row for row in STORED["rows"] if row["target"] == "sm_90" and re.match("meta_siren|policy|field", row["case"])
    ]
    without = {row["case"] for row in rows if row["matrix"] and "HGMMA" not in row["matrix_kind"]}
    assert len(rows) > 60
    assert all(re.match(r"field forward_kernel 2 ", case) for case in without)


def row(**changed: Any) -> Row:
    sound = {"case": "sine meta_kernel tf32", "target": "sm_90", "warps": 4, "registers": 200, "spilled": 0}
    return sound | {"shared": 20_000, "matrix": 36, "matrix_kind": "HGMMA", "instructions": 1000} | changed


def test_a_sound_row_is_no_violation() -> None:
    assert violations([row(instructions=1100, shared=DEVICES["sm_90"].shared_memory, matrix=1)], [row()]) == []


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"spilled": 2}, "spills 2 words"),
        ({"shared": DEVICES["sm_90"].shared_memory + 1}, "232,449 bytes of shared memory, a program has 232,448"),
        ({"matrix": 0, "matrix_kind": ""}, "lost its 36 matrix instructions, HGMMA"),
        ({"instructions": 1101}, "1101 instructions, the stored table 1000"),
    ],
)
def test_each_violation_is_found(changed: dict[str, Any], complaint: str) -> None:
    (found,) = violations([row(**changed)], [row()])
    assert found.startswith("sine meta_kernel tf32 on sm_90 ")
    assert complaint in found


def test_the_longest_loop_has_no_other_one_in_it() -> None:
    instructions = range(0, 100, 10)
    assert longest_loop(instructions, [(30, 10), (60, 50), (70, 0), (80, 90)]) == 3
    assert longest_loop(instructions, [(30, 10), (20, 10)]) == 3  # one loop, with a way around its end
    assert longest_loop(instructions, [(20, 50)]) == 0


def test_a_kernel_without_matrix_instructions_loses_none() -> None:
    without = row(matrix=0, matrix_kind="")
    assert violations([without], [without]) == []


def test_a_row_that_is_not_stored_is_named() -> None:
    stored = [row(target="sm_80"), row(case="sine meta_kernel bf16")]
    assert violations([row()], stored) == ["sine meta_kernel tf32 on sm_90 is not in the stored table"]


def test_what_does_not_compile_is_a_violation_and_no_standard_for_what_does() -> None:
    failed = {"case": "sine meta_kernel tf32", "target": "sm_90", "error": "RuntimeError: no"}
    assert violations([failed], [row()]) == ["sine meta_kernel tf32 on sm_90 does not compile: RuntimeError: no"]
    assert violations([row()], [failed]) == []


@pytest.mark.processes
def test_interpreted_kernels_are_not_compiled() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "bench.compiled"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 2
    assert "unset it" in run.stderr
