"""The kernels' own sine, beside double precision, over arguments that a sine layer's frequency makes large."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from .kernel_contract import watched
from .on_kernels import kernel_device

pytest.importorskip("triton")

import triton
import triton.language as tl
from fomaml_fused.kernels.activations import activate, pull_back

__all__ = ["watched"]


@triton.jit  # type: ignore[untyped-decorator]
def sines(p_x, p_sine, p_cosine, N: tl.constexpr):  # type: ignore[no-untyped-def]
    o = tl.arange(0, N)
    b_x = tl.load(p_x + o)
    tl.store(p_sine + o, activate(b_x, ("sine", (1.0,))))
    tl.store(p_cosine + o, pull_back(tl.full([N], 1.0, tl.float32), b_x, ("sine", (1.0,))))


def computed(x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.to(kernel_device())
    sine, cosine = torch.empty_like(x), torch.empty_like(x)
    sines[1,](x, sine, cosine, len(x))
    return sine.cpu().double(), cosine.cpu().double()


@pytest.mark.parametrize("largest", [1e-3, 2.0, 30.0, 3000.0])
def test_a_sine_is_exact_to_rounding(largest: float) -> None:
    x = torch.linspace(-largest, largest, 4096)
    sine, cosine = computed(x)
    assert (sine - x.double().sin()).abs().max() < 2e-7
    assert (cosine - x.double().cos()).abs().max() < 2e-7


def test_a_small_sine_keeps_its_digits_and_an_infinite_one_is_nan() -> None:
    x = torch.tensor([1e-30, -1e-6, 0.0, 1e-3, torch.inf, -torch.inf, torch.nan, 0.1])
    sine, cosine = computed(x)
    torch.testing.assert_close(sine[:4], x[:4].double().sin(), rtol=2e-7, atol=0.0)
    assert sine[4:7].isnan().all()
    assert cosine[4:7].isnan().all()
