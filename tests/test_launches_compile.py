"""The launches of the public calls compile for GPUs that need not be there, by the real launch code.

`make test-triton-versions` runs this under the oldest and the newest Triton too, because each compiler refuses other
things, and interpreting a kernel shows none of them.
"""

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

pytestmark = pytest.mark.compiles

ROOT = Path(__file__).parent.parent
SIZES = {"T", "N", "S", "Q", "K", "k", "P", "LENGTH", "SPLITS", "FIRST"}
# Of every kernel, the pointers that some launches leave out, or an element of them.
OPTIONAL = {
    "resident.meta_kernel": (
        "p_biases p_rates p_r p_query_x p_query_y p_query_r p_step_weight p_share p_kept p_out p_dx p_partials"
    ),
    "resident.adapt_kernel": "p_biases p_rates p_r p_directions",
    "resident.query_kernel": "",
    "resident.query_backward_kernel": "p_directions p_dx p_partials",
    "dual.inner_kernel": "p_biases p_r p_owner p_inputs p_gradients p_velocity p_first p_kept",
    "dual.query_kernel": (
        "p_biases p_inputs p_gradients p_y p_r p_cotangent p_owner p_past_owner p_now_gradients p_kept p_loss p_dx"
    ),
    "dual.forward_kernel": "p_bias p_base p_shrink p_past p_inputs p_gradients p_owner p_past_owner p_now p_kept",
    "dual.loss_kernel": "p_y p_r p_cotangent p_loss p_now p_now_gradients p_kept p_inner p_velocity",
    "dual.backward_kernel": (
        "p_shrink p_past p_inputs p_gradients p_owner p_past_owner p_now p_now_gradients p_kept p_dx p_inner p_velocity"
    ),
    "primal.pass_kernel": ("p_biases p_fast p_y p_r p_cotangent p_inputs p_gradients p_loss p_dx"),
    "primal.forward_kernel": "p_bias p_fast p_kept",
    "primal.loss_kernel": "p_y p_r p_cotangent p_loss p_d",
    "primal.backward_kernel": "p_fast p_kept",
    "primal.step_kernel": "p_biases p_first p_second p_directions p_rates p_inputs p_gradients",
    "primal.products_kernel": "p_inputs p_gradients",
    "dual.step_kernel": "p_bias p_weight_velocity p_bias_velocity",
    "primal.update_kernel": "p_biases p_first p_second p_directions p_rates",
    "outer.outer_kernel": "p_inputs p_gradients",
    "outer.reduce_kernel": "p_partials p_gradient p_loss p_share p_value",
}
NEVER_GIVEN = {("resident.meta_kernel", "p_out")}  # by no public call


def launched(cache: Path, *arguments: str) -> Any:
    """Return what `tests.launched` prints; in its own process, because one either interprets kernels or compiles."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "tests.launched", *arguments]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-5000:]
    return json.loads(run.stdout)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_every_choice_of_every_kernel_compiles(target: str, tmp_path: Path) -> None:
    assert launched(tmp_path, target, "--compile") > 100


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_every_kernel_is_launched_as_it_should_be_compiled(target: str, tmp_path: Path) -> None:
    given: set[tuple[str, str]] = set()
    left_out: set[tuple[str, str]] = set()
    for launch in launched(tmp_path, target):
        types, facts, kernel = launch["types"], launch["facts"], launch["kernel"]
        sizes = {name: kind for name, kind in types.items() if name in SIZES}
        assert set(sizes.values()) == {"i32"}, f"a size is compiled in, one binary does not serve all: {launch}"
        assert not SIZES & set(facts), f"a size is taken for a multiple of 16: {launch}"
        pointers = {name for name, kind in types.items() if kind.startswith("*")}
        unaligned = {name for name in pointers if ["tt.divisibility", 16] not in facts.get(name, [])}
        assert not unaligned, f"{unaligned} are not known to be aligned, so they are not loaded 16 bytes at a time"
        missing = {name for name, kind in types.items() if name.startswith("p_") and kind == "constexpr"}
        given |= {(kernel, name.partition("[")[0]) for name in pointers}
        left_out |= {(kernel, name.partition("[")[0]) for name in missing}

    kernels = {
        f"{file.stem}.{name}"
        for file in (ROOT / "kernels").glob("*.py")
        for name in re.findall(r"^def (\w+_kernel)\(", file.read_text(), re.MULTILINE)
    }
    assert {kernel for kernel, _ in given} == kernels
    assert left_out == {(kernel, name) for kernel, names in OPTIONAL.items() for name in names.split()}
    assert left_out - given == NEVER_GIVEN
