"""Compiled kernels on the emulator: each barrier and wait that is deleted from one is missed, and sums are accurate.

Where this process interprets kernels, another one that compiles them runs these tests.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from fomaml_fused.kernels.products import dot, running_dot

import fomaml_fused as ff

from . import virtual_gpu
from .virtual_gpu import KernelError

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRETED:

    @pytest.mark.compiles
    @pytest.mark.parametrize("target", ["sm_80", "sm_90"])
    def test_in_a_process_that_compiles(target: str) -> None:
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", f"--kernels={target}", __file__]
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        root = Path(__file__).parents[1]
        done = subprocess.run(command, cwd=root, env=environment, text=True, capture_output=True)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def watched(emulated: int) -> Iterator[None]:
    """On the emulator, which watches for races."""
    with virtual_gpu.changed(races=True):
        yield


def step(engine: str, width: int) -> None:
    """Take a training step of a small network."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, width), torch.nn.Tanh(), torch.nn.Linear(width, 5))
    x, y, q, t = (torch.randn(2, samples, side) for samples, side in ((6, 3), (6, 5), (7, 3), (7, 5)))
    with ff.override(engine=engine):
        ff.FOMAML(model, steps=2, backend="triton", precision="tf32")(x, y, q, t).backward()


# Of what a kernel waits at, not all is needed for sizes so small: warps have bytes of their own behind some barriers,
# and nothing is under way at the last wait of a pipeline.
DELETED = {
    "barriers of the resident kernel": ("resident", 17, "meta_kernel", r"bar\.sync", 0.7),
    "barriers of the dual form": ("dual", 70, "query_kernel", r"bar\.sync", 0.7),
    "waits for copies": ("dual", 70, "outer_kernel", r"cp\.async\.wait_group", 0.5),
}


@pytest.mark.parametrize("deleted", DELETED)
def test_what_is_deleted_from_a_kernel_is_missed(watched: None, deleted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, width, name, instruction, needed = DELETED[deleted]
    launch, kernels = virtual_gpu.launch, []

    def keep(ptx: str, *arguments: Any) -> Any:
        kernels.append((ptx, arguments))
        return launch(ptx, *arguments)

    monkeypatch.setattr("tests.virtual_gpu.driver.launch", keep)
    step(engine, width)
    ptx, arguments = next(kernel for kernel in kernels if f".entry {name}(" in kernel[0])
    places = [match.span() for match in re.finditer(rf"{instruction}[^;]*;", ptx)]
    missed = 0
    for start, end in places:
        try:
            launch(ptx[:start] + ptx[end:], *arguments)
        except KernelError:
            missed += 1
    assert missed >= needed * len(places) > 0


@dataclass(frozen=True)
class Spec:
    precision: str


@triton.jit
def product_kernel(p_a, p_b, p_out, K, RUNNING: tl.constexpr, SPEC: tl.constexpr):
    """Store [32, K] @ [K, 32], 32 of K at a time."""
    o_i, o_k = tl.arange(0, 32), tl.arange(0, 32)
    b_sum = tl.zeros([32, 32], tl.float32)
    for k in range(0, K, 32):
        b_a = tl.load(p_a + o_i[:, None] * K + k + o_k[None, :])
        b_b = tl.load(p_b + (k + o_k)[:, None] * 32 + o_i[None, :])
        b_sum = running_dot(b_a, b_b, b_sum, SPEC) if RUNNING else dot(b_a, b_b, b_sum, SPEC)
    tl.store(p_out + o_i[:, None] * 32 + o_i[None, :], b_sum)


def test_the_outer_product_waits_before_the_next_tile_is_copied(watched: None) -> None:
    """On sm_90, Triton lets a product run on that is summed into one accumulator, over a tile that it has once."""
    step("dual", 70)


def test_long_sums_are_accurate_as_tensor_cores_add(emulated: int) -> None:
    """tf32x3 keeps a float32's accuracy at any length; with one accumulator for all it loses it."""
    a, b = torch.randn(32, 1024), torch.randn(1024, 32)
    exact = a.double() @ b.double()
    errors = []
    for running in (False, True):
        out = torch.empty(32, 32)
        with virtual_gpu.changed(hardware_sums=True, races=False):
            product_kernel[(1,)](a, b, out, 1024, running, Spec("tf32x3"), num_warps=4, enable_fp_fusion=True)
        errors.append(((out.double() - exact).norm() / exact.norm()).item())
    assert errors[0] < 2.5e-7
    assert errors[1] > 2e-6
