"""The emulator computes what PTX says, and sees each kind of fault that is planted."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from . import virtual_gpu
from .virtual_gpu import Counts, KernelError, Options, blocks
from .virtual_gpu.matrix import summed

THREADS = 64

# In each thread: %r1 is its number, %r2 that times 4; %rd4 and %rd5 are its elements of input and output, %r4 its
# word of shared memory, and %r10 and %r11 its input, which are two numbers.
KERNEL = """
.version 8.7
.target sm_80
.address_size 64
.extern .shared .align 16 .b8 memory[];
.visible .entry kernel(
  .param .u64 .ptr .global .align 1 kernel_param_0,
  .param .u64 .ptr .global .align 1 kernel_param_1
)
.reqntid 64
{
  .reg .pred %p<8>;
  .reg .b16 %rs<8>;
  .reg .b32 %r<40>;
  .reg .b64 %rd<16>;
  ld.param.b64 %rd1, [kernel_param_0];
  ld.param.b64 %rd2, [kernel_param_1];
  mov.u32 %r1, %tid.x;
  mov.u32 %r3, %ctaid.x;
  shl.b32 %r2, %r1, 2;
  mad.wide.u32 %rd4, %r1, 8, %rd1;
  mad.wide.u32 %rd5, %r1, 4, %rd2;
  mov.b32 %r4, memory;
  add.s32 %r4, %r4, %r2;
  ld.global.v2.b32 {%r10, %r11}, [%rd4];
  BODY
  st.global.b32 [%rd5], %r20;
  ret;
}
"""


def run(body: str, values: Tensor | None = None, programs: int = 1, shared: int = 1024, **options: bool) -> Tensor:
    """What the threads leave in %r20, as int32. `values` are two numbers of 32 bits for each thread."""
    out = torch.zeros(THREADS, dtype=torch.int32)
    values = torch.arange(2 * THREADS, dtype=torch.int32) if values is None else values
    execute(body, [("input", values), ("output", out)], programs, shared, **options)
    return out


def execute(body: str, arguments: list[tuple[str, Any]], programs: int, shared: int, **options: bool) -> Counts:
    ptx = KERNEL.replace("BODY", body)
    return virtual_gpu.launch(ptx, (programs, 1, 1), THREADS, shared, arguments, Options(**options))


def signed(value: int) -> int:
    """The 32 last bits as an int32."""
    return (value + 2**31) % 2**32 - 2**31


def halves(function: Callable[[int, int], int]) -> Callable[[int, int], int]:
    """A function of unsigned numbers, given signed ones."""
    return lambda a, b: function(a % 2**32, b % 2**32)


def towards_zero(a: int, b: int) -> int:
    return -1 if b == 0 else abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def field(a: int, b: int) -> int:
    """Bits of a from b % 32 on, b // 256 % 32 of them, extended by the sign (PTX ISA 9.7.1.20)."""
    position, length = b % 32, b // 256 % 32
    found: int = (a >> position) % 2**length
    last = min(position + length - 1, 31)
    return found - 2**length if length and a >> last & 1 else found


INTEGERS: dict[str, Callable[[int, int], int]] = {
    "add.s32 %r20, %r10, %r11;": operator.add,
    "sub.s32 %r20, %r10, %r11;": operator.sub,
    "mul.lo.s32 %r20, %r10, %r11;": operator.mul,
    "mul.hi.s32 %r20, %r10, %r11;": lambda a, b: a * b >> 32,
    "mul.hi.u32 %r20, %r10, %r11;": halves(lambda a, b: a * b >> 32),
    "mul.wide.s32 %rd6, %r10, %r11; shr.s64 %rd6, %rd6, 7; cvt.u32.u64 %r20, %rd6;": lambda a, b: a * b >> 7,
    "mad.lo.s32 %r20, %r10, %r11, 5;": lambda a, b: a * b + 5,
    "div.s32 %r20, %r10, %r11;": towards_zero,
    "rem.s32 %r20, %r10, %r11;": lambda a, b: a - towards_zero(a, b) * b if b else a,
    "rem.u32 %r20, %r10, 7;": halves(lambda a, b: a % 7),
    "min.s32 %r20, %r10, %r11;": min,
    "max.u32 %r20, %r10, %r11;": halves(max),
    "neg.s32 %r20, %r10;": lambda a, b: -a,
    "abs.s32 %r20, %r10;": lambda a, b: abs(a),
    "and.b32 %r20, %r10, %r11;": operator.and_,
    "xor.b32 %r20, %r10, -1;": lambda a, b: ~a,
    "lop3.b32 %r20, %r10, %r11, %r1, 0x3c;": operator.xor,
    "shl.b32 %r20, %r10, 5;": lambda a, b: a << 5,
    "shl.b32 %r20, %r10, %r11;": lambda a, b: a << min(b % 2**32, 32),
    "shr.s32 %r20, %r10, %r11;": lambda a, b: a >> min(b % 2**32, 32),
    "shr.u32 %r20, %r10, 31;": halves(lambda a, b: a >> 31),
    "shf.l.wrap.b32 %r20, %r10, %r11, 3;": halves(lambda a, b: b << 3 | a >> 29),
    "and.b32 %r12, %r11, 31; bfe.u32 %r20, %r10, %r12, 9;": halves(lambda a, b: (a >> b % 32) % 2**9),
    "and.b32 %r12, %r11, 31; bfe.u32 %r13, %r11, 8, 5; bfe.s32 %r20, %r10, %r12, %r13;": field,
    "prmt.b32 %r20, %r10, %r11, 0x5410;": halves(lambda a, b: a % 2**16 | b << 16),
    "popc.b32 %r20, %r10;": halves(lambda a, b: a.bit_count()),
    "clz.b32 %r20, %r10;": halves(lambda a, b: 32 - a.bit_length()),
    "cvt.u16.u32 %rs1, %r10; cvt.s32.s16 %r20, %rs1;": lambda a, b: (a + 2**15) % 2**16 - 2**15,
    "cvt.s64.s32 %rd6, %r10; shr.u64 %rd6, %rd6, 32; cvt.u32.u64 %r20, %rd6;": lambda a, b: -1 if a < 0 else 0,
    "mov.b32 {%rs1, %rs2}, %r10; mov.b32 %r20, {%rs2, %rs1};": halves(lambda a, b: a >> 16 | a << 16),
    "setp.lt.s32 %p1, %r10, %r11; selp.b32 %r20, 1, 0, %p1;": lambda a, b: int(a < b),
    "setp.lt.u32 %p1, %r10, %r11; not.pred %p2, %p1; selp.b32 %r20, 1, 0, %p2;": halves(lambda a, b: int(a >= b)),
    "setp.eq.s32 %p1, %r10, 0; setp.ne.and.s32 %p2, %r11, 0, %p1; selp.b32 %r20, 1, 0, %p2;": lambda a, b: int(
        a == 0 and b != 0
    ),
    "mov.b32 %r20, 7; setp.gt.s32 %p1, %r10, 0; @!%p1 mov.b32 %r20, %r11;": lambda a, b: 7 if a > 0 else b,
    "{ .reg .b32 %r10; mov.b32 %r10, 3; add.s32 %r20, %r11, %r10; } add.s32 %r20, %r20, %r10;": lambda a, b: a + b + 3,
}
EDGES = [0, 1, -1, 7, 31, -40, 2**31 - 1, -(2**31)]


@pytest.mark.parametrize("body", INTEGERS)
def test_integers(body: str) -> None:
    values = torch.tensor([(a, b) for a in EDGES for b in EDGES], dtype=torch.int32)
    for numbers in (values, torch.randint(-(2**31), 2**31, values.shape, dtype=torch.int32)):
        expected = [signed(INTEGERS[body](a, b)) for a, b in numbers.tolist()]
        assert run(body, numbers).tolist() == expected


FLOATS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add.f32 %r20, %r10, %r11;": torch.add,
    "mul.f32 %r20, %r10, 0f40490FDB;": lambda a, b: a * torch.tensor(torch.pi),
    "fma.rn.f32 %r20, %r10, %r11, %r11;": lambda a, b: (a.double() * b.double() + b.double()).float(),
    "div.full.f32 %r20, %r10, %r11;": torch.div,
    "sqrt.approx.ftz.f32 %r20, %r10;": lambda a, b: torch.from_numpy(np.sqrt(a.numpy())),
    "ex2.approx.f32 %r20, %r10;": lambda a, b: torch.from_numpy(np.exp2(a.numpy())),
    "neg.f32 %r20, %r10;": lambda a, b: -a,
    "abs.f32 %r20, %r10;": lambda a, b: a.abs(),
    "max.f32 %r20, %r10, %r11;": torch.fmax,
    "max.NaN.f32 %r20, %r10, %r11;": torch.maximum,
    "cvt.rmi.f32.f32 %r20, %r10;": lambda a, b: a.floor(),
    "cvt.rzi.s32.f32 %r12, %r10; cvt.rn.f32.s32 %r20, %r12;": lambda a, b: (
        a.nan_to_num(0).double().clamp(-(2**31), 2**31 - 1).trunc().float()
    ),
    "cvt.rn.bf16.f32 %rs1, %r10; cvt.f32.bf16 %r20, %rs1;": lambda a, b: a.bfloat16().float(),
    "cvt.rn.f16.f32 %rs1, %r10; cvt.f32.f16 %r20, %rs1;": lambda a, b: a.half().float(),
    "cvt.rn.bf16x2.f32 %r12, %r10, %r11; and.b32 %r20, %r12, -65536;": lambda a, b: a.bfloat16().float(),
    "setp.ltu.f32 %p1, %r10, %r11; selp.f32 %r20, 0f3F800000, 0f00000000, %p1;": lambda a, b: (~(a >= b)).float(),
    "setp.ne.f32 %p1, %r10, %r11; selp.f32 %r20, 0f3F800000, 0f00000000, %p1;": lambda a, b: (
        (a < b) | (a > b)
    ).float(),
}
REALS = [0.0, -0.0, 1.5, -2.5, 1e-30, -3e9, torch.inf, torch.nan]


@pytest.mark.parametrize("body", FLOATS)
@np.errstate(all="ignore")
def test_floats(body: str) -> None:
    values = torch.tensor([(a, b) for a in REALS for b in REALS])
    for numbers in (values, torch.randn(values.shape) * 100):
        found = run(body, numbers.view(torch.int32)).view(torch.float32)
        expected = FLOATS[body](numbers[:, 0].contiguous(), numbers[:, 1].contiguous())
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_threads_that_branch_apart_meet_again() -> None:
    """Each walks a loop as often as its number says, and takes a way of its own out of it."""
    body = """
    mov.b32 %r20, 0; mov.b32 %r12, 0;
    $loop: setp.ge.s32 %p1, %r12, %r1; @%p1 bra $out;
    add.s32 %r12, %r12, 1; add.s32 %r20, %r20, %r12; bra.uni $loop;
    $out: and.b32 %r13, %r1, 3;
    $ways: .branchtargets $none, $one, $none, $many;
    brx.idx %r13, $ways;
    $one: add.s32 %r20, %r20, 1000; bra.uni $none;
    $many: neg.s32 %r20, %r20;
    $none: bar.sync 0; st.shared.b32 [%r4], %r20; bar.sync 0; ld.shared.b32 %r20, [%r4];
    """
    triangle = [t * (t + 1) // 2 for t in range(THREADS)]
    expected = [(s, s + 1000, s, -s)[t % 4] for t, s in enumerate(triangle)]
    for races in (False, True):
        assert run(body, races=races).tolist() == expected


def test_programs_know_their_places_and_run_side_by_side_too() -> None:
    out = torch.zeros(200 * THREADS, dtype=torch.int32)
    body = "mul.lo.s32 %r12, %r3, 256; cvt.u64.u32 %rd6, %r12; add.s64 %rd5, %rd5, %rd6; mad.lo.s32 %r20, %r3, 64, %r1;"
    counts = execute(body, [("input", torch.zeros(2 * THREADS, dtype=torch.int32)), ("output", out)], 200, 0)
    assert out.tolist() == list(range(200 * THREADS))
    assert counts.programs == 200
    assert counts.opcodes["mad.lo.s32"] == 200 * THREADS // 32


def test_a_part_of_a_parameter_is_loaded() -> None:
    body = "ld.param.b32 %r20, [kernel_param_1];"
    assert run(body).tolist() == [0] * THREADS  # tensors begin at multiples of 2**36


def test_shuffles_and_reductions() -> None:
    lanes = torch.arange(THREADS, dtype=torch.int32)
    assert run("shfl.sync.bfly.b32 %r20, %r1, 5, 31, -1;").equal(lanes ^ 5)
    assert run("shfl.sync.idx.b32 %r20, %r1, 3, 31, -1;").equal(lanes // 32 * 32 + 3)
    shifted = run("shfl.sync.up.b32 %r20|%p1, %r1, 1, 0, -1; @!%p1 mov.b32 %r20, -1;")
    assert shifted.equal(torch.where(lanes % 32 == 0, -1, lanes - 1).int())
    assert run("redux.sync.add.s32 %r20, %r1, -1;").tolist() == [496] * 32 + [496 + 32 * 32] * 32


EXCHANGE = "st.shared.b32 [%r4], %r10; bar.sync 0; xor.b32 %r5, %r2, 128; ld.shared.b32 %r20, [%r5];"
COPY = """
mul.lo.s32 %r5, %r1, 8; add.s32 %r6, %r4, %r2;
cp.async.ca.shared.global [ %r6 + 0 ], [ %rd4 + 0 ], 0x8, 0x8; cp.async.commit_group; cp.async.wait_group 0x0;
ld.shared.b32 %r20, [%r6];
"""


def test_exchanges_and_copies() -> None:
    inputs = torch.arange(0, 2 * THREADS, 2, dtype=torch.int32)
    assert run(EXCHANGE, races=True).equal(inputs.roll(32))
    assert run(COPY, races=True).equal(inputs)
    assert run(COPY.replace("0x8, 0x8;", "0x8, %r3;"), races=True).equal(torch.zeros_like(inputs))  # a copy of nothing


FAULTS = {
    "a deleted barrier": (
        EXCHANGE.replace("bar.sync 0;", "bar.warp.sync -1;"),
        "race, read after write.*no barrier since",
    ),
    "a write too early": (EXCHANGE + " st.shared.b32 [%r4], %r1;", "race, write after read"),
    "two writers": ("and.b32 %r5, %r2, 4; st.shared.b32 [%r5], %r1; mov.b32 %r20, 0;", "race, write after write"),
    "two programs": ("mov.b32 %r20, %r3;", "race, write after write.*global memory in program 1"),
    "a missing wait": (COPY.replace("cp.async.wait_group 0x0;", ""), "whose copy is still under way"),
    "a wait for too few": (COPY.replace("wait_group 0x0", "wait_group 0x1"), "whose copy is still under way"),
    "nothing written": ("ld.shared.b32 %r20, [%r4];", "shared memory that is not initialised"),
    "a load behind the end": ("ld.global.b32 %r20, [%rd4+8];", "global load of 4 bytes, at byte 512 of input"),
    "a store before the start": (
        "st.global.b32 [%rd5+-4], %r1; mov.b32 %r20, 0;",
        "store of 4 bytes, at byte -4 of output",
    ),
    "a pointer to nothing": ("mov.b64 %rd6, 64; ld.global.b32 %r20, [%rd6];", "out-of-bounds global load"),
    "too much shared memory": (
        "st.shared.b32 [%r4+1000], %r1; mov.b32 %r20, 0;",
        "out-of-bounds shared store.*of 1,024",
    ),
    "no alignment": ("ld.global.v2.b32 {%r20, %r21}, [%rd4+4];", "misaligned global load of 8 bytes"),
    "a matrix row out of line": (
        "st.shared.b32 [%r4], %r1; bar.sync 0; ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r20}, [%r4];",
        "matrix row is not a multiple of 16",
    ),
    "device_assert": ("call.uni __assertfail, (param0);", "device_assert failed"),
    "an unknown instruction": ("mov.b32 %r20, 0; frobnicate.b32 %r20, %r10;", "the instruction is not modelled"),
    "another barrier": ("bar.sync 1; mov.b32 %r20, 0;", "only bar.sync 0 is modelled"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_seen(fault: str) -> None:
    body, message = FAULTS[fault]
    with pytest.raises(KernelError, match=message) as raised:
        run(body, programs=2 if fault == "two programs" else 1, races=True)
    assert "PTX line" in str(raised.value)


@pytest.mark.parametrize("fault", ["an unknown instruction", "a pointer to nothing"])
def test_what_no_thread_executes_is_no_fault(fault: str) -> None:
    body = FAULTS[fault][0].rstrip(";").replace("; ", "; @%p1 ")
    assert run(f"mov.b32 %r20, 0; setp.lt.s32 %p1, %r1, 0; {body}; mov.b32 %r20, 1;").tolist() == [1] * THREADS


def test_an_endless_loop_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "MOST_BLOCKS", 100)
    with pytest.raises(KernelError, match="an endless loop"):
        run("mov.b32 %r20, 0; $again: bra $again;")


def test_tensors_that_share_memory_unknowingly_are_refused() -> None:
    whole = torch.zeros(4 * THREADS, dtype=torch.int32)
    part = torch.from_numpy(whole.numpy()[THREADS:])
    with pytest.raises(ValueError, match="share memory"):
        execute("mov.b32 %r20, 0;", [("input", whole), ("output", part)], 1, 0)


def test_traffic_is_counted() -> None:
    """64 threads of 4 bytes are two wavefronts and eight sectors; 32 that hit one bank are 32 wavefronts."""
    zeros = torch.zeros(2 * THREADS, dtype=torch.int32)
    body = "shl.b32 %r5, %r2, STRIDE; st.shared.b32 [%r5], %r1; mov.b32 %r20, 0;"
    for stride, wavefronts in ((0, 2), (1, 4), (5, 64)):
        arguments = [("input", zeros), ("output", zeros.clone())]
        counts = execute(body.replace("STRIDE", str(stride)), arguments, 1, 8192, traffic=True)
        assert counts.shared_wavefronts == wavefronts
        assert counts.global_sectors == 16 + 8


@given(seed=st.integers(0, 2**31), depth=st.sampled_from([4, 8, 16]))
def test_hardware_sums_round_towards_zero_and_little(seed: int, depth: int) -> None:
    random = np.random.default_rng(seed)
    a, b, c = (
        random.standard_normal((3, 16, depth)),
        random.standard_normal((3, depth, 8)),
        random.standard_normal((3, 16, 8)),
    )
    exact = np.matmul(a, b) + c
    largest = np.maximum(np.abs(a[..., None] * b[:, None]).max(-2), np.abs(c))
    found = summed(a, b, c, hardware=True)
    assert (np.abs(found - exact) <= (depth + 1) * largest * 2.0**-25 + np.abs(exact) * 2.0**-23).all()
    one = summed(np.ones((1, 1)), np.ones((1, 1)), np.full((1, 1), 2.0**-24), hardware=True)
    assert one.item() == 1.0
    assert summed(a * 0, b, c, hardware=True).astype(np.float64) == pytest.approx(c, rel=2**-22)


def test_a_module_without_a_kernel_is_named() -> None:
    with pytest.raises(KernelError, match=re.escape("no .entry")):
        virtual_gpu.launch(".version 8.7", (1, 1, 1), 32, 0, [], Options())
