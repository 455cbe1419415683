"""What the public calls launch compiles for GPUs that are not there: the real launch code, up to the launch itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from bench.compiled import KERNELS
from fomaml_fused.engines import fused

ROOT = Path(__file__).parent.parent
NUMBERS = ("T", "S", "Q", "K", "N", "P")


@pytest.fixture(scope="module", params=["sm_80", "sm_90"])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What `tests.compile_only` prints; a process of its own, for one either interprets kernels or compiles them."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("cache"))}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "tests.compile_only", request.param]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_every_kernel_is_launched_and_compiles(found: Any) -> None:
    kernels = {name for module in (fused.resident, fused.outer) for name in vars(module) if name.endswith("_kernel")}
    assert {launch["kernel"] for launch in found["launched"]} == kernels == set(KERNELS)
    assert set(found["binaries"]) == {b"\x7fELF".hex()}


def test_sizes_are_not_compiled_in(found: Any) -> None:
    """One binary serves every number of tasks, samples and steps."""
    for launch in found["launched"]:
        numbers = {name: kind for name, kind in launch["types"].items() if name in NUMBERS}
        assert set(numbers.values()) == {"i32"}, f"{launch['kernel']}: {numbers}"
        assert not set(numbers) & set(launch["facts"]), f"{launch['kernel']} takes a size for a multiple of 16"


def test_pointers_are_known_to_be_aligned(found: Any) -> None:
    """To 16 bytes, or loads of several numbers at a time are lost."""
    for launch in found["launched"]:
        pointers = {name for name, kind in launch["types"].items() if kind.startswith("*")}
        assert all(launch["facts"].get(name) == [["tt.divisibility", 16]] for name in pointers), launch


def test_classes_and_what_may_be_left_out_reach_the_kernels(found: Any) -> None:
    types = [launch["types"] for launch in found["launched"] if launch["kernel"] == "meta_kernel"]
    assert {kinds["p_y"] for kinds in types} == {"*fp32", "*i64"}
    for name in ("p_r", "p_query_r", "p_share", "p_dx"):
        assert {kinds[name] for kinds in types} == {"constexpr", "*fp32"}, name


def test_the_report_compiles_what_is_launched(found: Any) -> None:
    for case in found["report"]:
        launches = [launch for launch in found["launched"] if launch["kernel"] == case["kernel"]]
        assert case in launches, f"the report compiles\n{case}\nand launched is\n{launches}"
