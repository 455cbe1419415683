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

from fomaml_fused.kernels import outer, resident

from bench.compiled import KERNELS

ROOT = Path(__file__).parent.parent
SIZES = {"T", "S", "Q", "K", "N", "P"}


def launches(target: str, cache: Path) -> Any:
    """What `tests.compile_only` prints; a process of its own, for one either interprets kernels or compiles them."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "tests.compile_only", target]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


# One test a target, for compiling is what takes the time.
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_every_kernel_compiles_as_it_is_launched(target: str, tmp_path: Path) -> None:
    found = launches(target, tmp_path)
    launched = found["launched"]

    kernels = {name for module in (resident, outer) for name in vars(module) if name.endswith("_kernel")}
    assert {launch["kernel"] for launch in launched} == kernels == set(KERNELS)
    assert set(found["binaries"]) == {b"\x7fELF".hex()}

    for launch in launched:
        sizes = {name: kind for name, kind in launch["types"].items() if name in SIZES}
        assert set(sizes.values()) == {"i32"}, f"a size is compiled in, one binary does not serve all: {launch}"
        assert not SIZES & set(launch["facts"]), f"a size is taken for a multiple of 16: {launch}"
        pointers = {name for name, kind in launch["types"].items() if kind.startswith("*")}
        unaligned = {name for name in pointers if launch["facts"].get(name) != [["tt.divisibility", 16]]}
        assert not unaligned, f"{unaligned} are not known to be aligned, so they are not loaded 16 bytes at a time"

    meta = [launch["types"] for launch in launched if launch["kernel"] == "meta_kernel"]
    assert {types["p_y"] for types in meta} == {"*fp32", "*i64"}
    for name in ("p_r", "p_query_r", "p_share", "p_dx"):
        assert {types[name] for types in meta} == {"constexpr", "*fp32"}, f"{name} is never given, or never left out"

    for case in found["report"]:
        same = [launch for launch in launched if launch["kernel"] == case["kernel"]]
        assert case in same, f"the report of resources compiles\n{case}\nbut launched is\n{same}"
