"""The mended interpreter computes what a device would, and the memory watch sees each kind of fault.

Where this process does not interpret, another one that does runs these tests.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor, arange, float32, frombuffer, half, inf, nan, ones, tensor, zeros
from triton.runtime import interpreter

from .interpreter import mend
from .memory_watch import AccessError, watch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if not INTERPRETED:

    def test_in_a_process_that_interprets() -> None:
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "tests/test_interpreter.py"]
        # Options for this process, such as where kernels run, are not for that one.
        environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""}
        root = Path(__file__).parents[1]
        done = subprocess.run(command, cwd=root, env=environment, text=True, capture_output=True)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(autouse=True)
def _mended(request: pytest.FixtureRequest) -> None:
    if INTERPRETED:
        mend()
    elif request.node.name != "test_in_a_process_that_interprets":
        pytest.skip("runs in a process that interprets")


@triton.jit
def _dot(p_x, p_y, p_out, PRECISION: tl.constexpr):
    o = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(p_out + o, tl.dot(tl.load(p_x + o), tl.load(p_y + o), input_precision=PRECISION))


def dot(x: Tensor, y: Tensor, precision: str) -> Tensor:
    out = torch.empty(16, 16)
    _dot[1,](x, y, out, precision)
    return out


def test_bfloat16_dot() -> None:
    # 16 products of 8 bits each leave a float32 exact.
    x, y = torch.randint(-255, 256, (2, 16, 16)).bfloat16()
    assert torch.equal(dot(x, y, "ieee"), x.float() @ y.float())


def test_tf32_dot_drops_13_bits_of_each_operand() -> None:
    x, eye = torch.randn(16, 16), torch.eye(16)
    dropped = (x.view(torch.int32) & ~0x1FFF).view(float32)
    assert torch.equal(dot(x, eye, "tf32"), dropped)
    assert torch.equal(dot(eye, x, "tf32"), dropped)
    assert torch.equal(dot(x, eye, "ieee"), x)


@triton.jit
def _chain(p_x, p_y, p_out, p_less, p_sum):
    o = tl.arange(0, 64)
    b_x, b_y = tl.load(p_x + o), tl.load(p_y + o)
    b_z = (b_x * b_y + 0.3) * b_y - -b_x
    tl.store(p_less + o, (b_z < b_x) & (o < 64))
    b_z = tl.where(b_z < b_x, tl.abs(b_z) + tl.full([64], 0.7, tl.bfloat16), tl.fma(b_x, b_y, b_z))
    tl.store(p_out + o, b_z)
    tl.store(p_sum, tl.sum(tl.where(b_z > 0, -1.0, 2.0).to(tl.bfloat16), 0))


def test_bfloat16_elementwise_and_sum() -> None:
    x, y = torch.randn(2, 64).bfloat16()
    out, less, total = torch.empty(64).bfloat16(), torch.empty(64).int(), torch.empty(()).bfloat16()
    _chain[1,](x, y, out, less, total)
    z = (x * y + tensor(0.3).bfloat16()) * y + x
    fma = (x.float() * y.float() + z.float()).bfloat16()
    assert torch.equal(less, (z < x).int())
    assert torch.equal(out, torch.where(z < x, z.abs() + tensor(0.7).bfloat16(), fma))
    assert total == torch.where(out > 0, -1.0, 2.0).sum()


@triton.jit
def _cast(p_x, p_out):
    o = tl.arange(0, 32)
    tl.store(p_out + o, tl.load(p_x + o).to(p_out.dtype.element_ty))


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.empty(32, dtype=dtype)
    _cast[1,](x, out)
    return out


@pytest.mark.parametrize("dtype", [float32, half, torch.int32, torch.int8], ids=str)
def test_bfloat16_casts(dtype: torch.dtype) -> None:
    x = (torch.randn(32) * 50).to(dtype)
    assert torch.equal(cast(x, torch.bfloat16), x.bfloat16())
    assert torch.equal(cast(x.bfloat16(), dtype), x.bfloat16().to(dtype))


def test_bfloat16_rounds_to_nearest_even() -> None:
    ulp = 2.0**-7
    x = tensor([1 + ulp / 2, 1 + 1.5 * ulp, 1 + 0.51 * ulp, -1 - ulp / 2, 3.4e38, inf, 2**-130, nan]).repeat(4)
    x.view(torch.int32)[-1] = 0x7FFFFFFF  # a NaN too
    expected = tensor([1.0, 1 + 2 * ulp, 1 + ulp, -1.0, inf, inf, 2**-130, nan]).repeat(4)
    rounded = cast(x, torch.bfloat16)
    for y in rounded.float(), cast(rounded, float32):
        torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)


@triton.jit
def _assert_below(p_x, LIMIT: tl.constexpr):
    tl.device_assert(tl.load(p_x + tl.arange(0, 4)) < LIMIT, "too large")


def test_device_assert_fires() -> None:
    _assert_below[1,](arange(4), 4)
    with pytest.raises(interpreter.InterpreterError, match="too large"):
        _assert_below[1,](arange(4), 3)


@triton.jit
def _sums(p_x):
    for _ in range(5):
        tl.store(p_x, tl.sum(tl.load(p_x + tl.arange(0, 4)) + tl.zeros([4], tl.float32), 0))


def test_a_launch_replaces_the_language_once_and_restores_it(monkeypatch: pytest.MonkeyPatch) -> None:
    scope = Mock(wraps=interpreter._LangPatchScope)
    monkeypatch.setattr(interpreter, "_LangPatchScope", scope)
    before = tl.load, tl.core.load, tl.core.reduce
    _sums[1,](ones(4))
    scope.assert_called_once()
    assert (tl.load, tl.core.load, tl.core.reduce) == before


@triton.jit
def _copy(p_xs, p_out, N):
    o = tl.program_id(0) * 4 + tl.arange(0, 4)
    tl.store(p_out + o, tl.load(p_xs[1] + o, mask=o < N), mask=o < N)


@triton.jit
def _number(p_out, stride):
    tl.store(p_out + tl.program_id(1) * stride, tl.program_id(1))


@triton.jit
def _race(p_x, WRITER: tl.constexpr):
    if tl.program_id(0) == WRITER:
        tl.store(p_x + 1, 5.0)
    else:
        tl.load(p_x + 1)


@triton.jit
def _update(p_x, p_sum, LOADER: tl.constexpr, STORER: tl.constexpr):
    if tl.program_id(0) == LOADER:
        tl.load(p_sum)
    elif tl.program_id(0) == STORER:
        tl.store(p_sum, 0)
    elif p_x is None:
        tl.atomic_cas(p_sum, 1, 2)
    else:
        tl.atomic_add(p_sum, tl.load(p_x))


@triton.jit
def _store_pairs(p_x, p_out):
    tl.store(p_out + tl.arange(0, 4) // 2, tl.load(p_x + tl.arange(0, 4)))


@triton.jit
def _reverse_twice(p_x, BARRIER: tl.constexpr):
    o = tl.arange(0, 4)
    tl.debug_barrier()
    tl.store(p_x + 3 - o, tl.load(p_x + o))
    if BARRIER:
        tl.debug_barrier()
    tl.store(p_x + 3 - o, tl.load(p_x + o))


FAULTS: list[tuple[str, str, Callable[[], object]]] = [
    ("outside", "(1, 0, 0) loads p_xs[1][6]", lambda: _copy[2,]((None, ones(6)), ones(8), 8)),
    ("outside", "(0, 0, 0) loads null[0]", lambda: _copy[1,]((None, ones(0)), ones(0), 4)),
    ("outside", "(0, 1, 0) stores p_out[-1]", lambda: _number[1, 2](ones(8)[4:], -1)),
    ("outside", "(0, 0, 0) updates null[0]", lambda: _update[1,](ones(1), ones(0), 9, 9)),
    ("outside", "(0, 0, 0) updates null[0]", lambda: _update[1,](None, ones(0).int(), 9, 9)),
    ("misaligned", "(0, 0, 0) stores p_out[0]", lambda: _number[1,](frombuffer(bytearray(3), dtype=half, offset=1), 0)),
    ("write-write race", "(0, 1, 0) stores p_out[0]", lambda: _number[1, 2](ones(1), 0)),
    ("read-write race", "(1, 0, 0) loads p_x[1], which program (0, 0, 0) stores", lambda: _race[2,](ones(2), 0)),
    ("read-write race", "(2, 0, 0) stores p_x[1], which more than one program loads", lambda: _race[3,](ones(2), 2)),
    ("read-write race", "(1, 0, 0) stores p_xs[1][3] = p_out[4]", lambda: _copy[2,]((None, (x := ones(9))[1:]), x, 8)),
    ("atomic and plain", "(1, 0, 0) loads p_sum[0]", lambda: _update[2,](ones(1), ones(1), 1, 9)),
    ("atomic and plain", "(1, 0, 0) updates p_sum[0]", lambda: _update[2,](ones(1), ones(1), 0, 9)),
    ("atomic and plain", "(1, 0, 0) stores p_sum[0]", lambda: _update[2,](ones(1), ones(1), 9, 1)),
    ("atomic and plain", "(1, 0, 0) updates p_sum[0]", lambda: _update[2,](ones(1), ones(1), 9, 0)),
    ("atomic and plain", "(1, 0, 0) updates p_sum[0]", lambda: _update[2,](None, ones(1).int(), 9, 0)),
    ("contradiction", "(0, 0, 0) stores p_out[1]", lambda: _store_pairs[1,](tensor([1.0, 1, 2, 3]), ones(2))),
    ("no barrier", "(0, 0, 0) loads p_x[0]", lambda: _reverse_twice[1,](ones(4), False)),
]


@pytest.mark.parametrize(("kind", "what", "launch"), FAULTS, ids=[f"{kind}: {what}" for kind, what, _ in FAULTS])
def test_a_fault_is_seen(kind: str, what: str, launch: Callable[[], object]) -> None:
    with watch(), pytest.raises(AccessError, match=f"^{kind}: _.*: program {re.escape(what)}") as caught:
        launch()
    assert caught.value.kind == kind
    with watch(raising=False) as faults:
        launch()
    assert {fault.kind for fault in faults} == {kind}


def test_nothing_is_stored_outside() -> None:
    out = zeros(8)
    with watch(raising=False) as faults:
        _number[1, 2](out, -(2**61))  # to an address below 0
        _copy[2,]((None, ones(8)), out[:6], 8)
    assert [fault.kind for fault in faults] == ["outside", "outside"]
    assert out.tolist() == [1, 1, 1, 1, 1, 1, 0, 0]


def test_sound_kernels_raise_nothing() -> None:
    x, out = arange(8.0), torch.empty(8)
    with watch() as faults:
        _copy[2,]((None, x[:7]), out[:7], 7)
        _copy[2,]((x[2:4], x), x, 8)
        _copy[2,]((x[:4], x[2:]), torch.empty(6), 6)
        _number[1, 3](out, 1)
        _update[3,](x[1:], x, 9, 9)
        _store_pairs[1,](tensor([1.0, 1, nan, nan]), out)
        _reverse_twice[1,](x[4:], True)
    assert faults == []
    assert (x.tolist(), out[2:7].tolist()) == ([3, 1, 2, 3, 4, 5, 6, 7], [2, 3, 4, 5, 6])
