"""The mended interpreter and the memory watch: whether each mend gives what a device would, and each fault is seen.

Where this process does not interpret, another one that does runs the tests below.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from .interpreter import mend
from .memory_watch import AccessError, watch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if not INTERPRETED:

    def test_in_a_process_that_interprets() -> None:
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "tests/test_interpreter.py"]
        environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""}
        root = Path(__file__).parents[1]
        done = subprocess.run(command, cwd=root, env=environment, text=True, capture_output=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(autouse=True)
def _mended(request: pytest.FixtureRequest) -> None:
    if INTERPRETED:
        mend()
    elif request.node.name != "test_in_a_process_that_interprets":
        pytest.skip("runs in a process that interprets")


@triton.jit
def _dot(p_x, p_y, p_out, NARROW: tl.constexpr, PRECISION: tl.constexpr):
    o = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    b_x, b_y = tl.load(p_x + o), tl.load(p_y + o)
    if NARROW:
        b_x, b_y = b_x.to(tl.bfloat16), b_y.to(tl.bfloat16)
    tl.store(p_out + o, tl.dot(b_x, b_y, input_precision=PRECISION))


def dot(x: Tensor, y: Tensor, narrow: bool, precision: str) -> Tensor:
    out = torch.empty(16, 16)
    _dot[1,](x, y, out, narrow, precision)
    return out


def test_bfloat16_dot() -> None:
    # More bits than a bfloat16 has, but not more than a float32 holds after 16 products: the sum is exact.
    x, y = torch.randint(-600, 600, (2, 16, 16)).float()
    expected = x.bfloat16().double() @ y.bfloat16().double()
    assert torch.equal(dot(x, y, True, "ieee").double(), expected)
    assert not torch.equal(expected, x.double() @ y.double())


def test_tf32_dot_drops_13_bits_of_each_operand() -> None:
    x, eye = torch.randn(16, 16), torch.eye(16)
    dropped = (x.view(torch.int32) & ~0x1FFF).view(torch.float32)
    assert torch.equal(dot(x, eye, False, "tf32"), dropped)
    assert torch.equal(dot(eye, x, False, "tf32"), dropped)
    assert torch.equal(dot(x, eye, False, "ieee"), x)


@triton.jit
def _chain(p_x, p_y, p_out, p_below):
    o = tl.arange(0, 64)
    b_x, b_y = tl.load(p_x + o), tl.load(p_y + o)
    b_z = (b_x * b_y + 0.3) / b_y - -b_x
    tl.store(p_out + o, tl.where(b_z < b_x, tl.abs(b_z), tl.fma(b_x, b_y, b_z)))
    tl.store(p_below + o, b_z < b_x)


def test_bfloat16_elementwise() -> None:
    x, y = torch.randn(2, 64).bfloat16()
    out, below = torch.empty(64, dtype=torch.bfloat16), torch.empty(64, dtype=torch.bool)
    _chain[1,](x, y, out, below)
    z = (x * y + torch.tensor(0.3).bfloat16()) / y + x
    assert torch.equal(below, z < x)
    assert torch.equal(out, torch.where(z < x, z.abs(), (x.float() * y.float() + z.float()).bfloat16()))


@triton.jit
def _cast(p_x, p_out, N: tl.constexpr):
    """To bfloat16, if that is what p_out has; from it, if p_x does."""
    o = tl.arange(0, N)
    tl.store(p_out + o, tl.load(p_x + o).to(p_out.dtype.element_ty))


SPECIAL = [1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -(1 + 2**-8), 3.4e38, 1e-40, float("inf"), float("nan")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int32, torch.int8], ids=str)
def test_bfloat16_casts(dtype: torch.dtype) -> None:
    x = torch.cat([torch.randn(56) * 50, torch.tensor(SPECIAL)])
    x = x if dtype.is_floating_point else x[:32]
    with np.errstate(over="ignore"):
        wide, out, back = x.to(dtype), torch.empty(x.shape, dtype=torch.bfloat16), torch.empty(x.shape, dtype=dtype)
        _cast[1,](wide, out, len(x))
        _cast[1,](out, back, len(x))
    assert torch.equal(out.view(torch.int16), wide.bfloat16().view(torch.int16))
    assert torch.equal(back.nan_to_num(7), wide.bfloat16().to(dtype).nan_to_num(7))


@triton.jit
def _reduce(p_x, p_out):
    b_x = tl.load(p_x + tl.arange(0, 8)) + tl.full([8], 0.5, tl.bfloat16)
    tl.store(p_out, tl.sum(b_x, 0))
    tl.store(p_out + 1, tl.max(b_x, 0))


def test_bfloat16_sum_and_constant() -> None:
    x, out = torch.arange(-8, 0).bfloat16(), torch.empty(2, dtype=torch.bfloat16)
    _reduce[1,](x, out)
    assert out.tolist() == [-32.0, -0.5]


@triton.jit
def _assert_below(p_x, LIMIT: tl.constexpr):
    tl.device_assert(tl.load(p_x + tl.arange(0, 4)) < LIMIT, "too large")


def test_device_assert_fires() -> None:
    x = torch.arange(4)
    _assert_below[1,](x, 4)
    with pytest.raises(interpreter.InterpreterError, match="too large"):
        _assert_below[1,](x, 3)


@triton.jit
def _identity(x):
    return x


@triton.jit
def _calling(p_x):
    for _ in range(5):
        tl.store(p_x, _identity(tl.sum(tl.load(p_x + tl.arange(0, 4)), 0)))


def test_the_language_is_replaced_once_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    scopes = []

    class Scope(interpreter._LangPatchScope):  # type: ignore[misc] # Triton has no types
        def __init__(self) -> None:
            super().__init__()
            scopes.append(self)

    monkeypatch.setattr(interpreter, "_LangPatchScope", Scope)
    load, core_load = tl.load, tl.core.load
    _calling[1,](torch.zeros(4))
    assert len(scopes) == 1
    assert (tl.load, tl.core.load) == (load, core_load)
