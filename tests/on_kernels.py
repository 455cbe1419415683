"""What tests of kernels share: where kernels run, the engine as a solver, torch in their precision."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cases import ALLOWANCE, Case, Solution


def kernel_device() -> torch.device:
    """The device whose tensors the kernels take."""
    import triton

    if triton.knobs.runtime.interpret:
        return torch.device("cpu")
    device: torch.device = triton.runtime.driver.active.get_active_torch_device()
    return device


def tensor_cores_sum() -> bool:
    """Whether matrix products are summed as tensor cores sum them: on a GPU, or by that model of the emulator."""
    import triton

    if triton.knobs.runtime.interpret:
        return False
    driver = triton.runtime.driver.active
    return getattr(driver, "hardware_sums", kernel_device().type == "cuda")


def allowance(case: Case, precision: str) -> float:
    """The relative error that an engine may have beside twice torch's own.

    Tensor cores round sums towards zero, and the resident kernel leaves its tf32x3 sums to them (docs/kernels.md).
    """
    if precision in ("highest", "tf32x3") and tensor_cores_sum():
        meta = case.meta(case.model(torch.float32).to(kernel_device()), "triton", precision=precision)
        if meta.plan(case.tasks, case.shots, case.queries).engine == "resident":
            return 5e-6
    return ALLOWANCE


def on_device(case: Case) -> dict[str, Any]:
    """A case's batch where kernels run."""
    batch, device = case.batch(torch.float32), kernel_device()
    return {name: t.detach().to(device) if isinstance(t, Tensor) else t for name, t in batch.items()}


def by_kernels(
    case: Case, precision: str = "highest", dtype: torch.dtype = torch.float32, per_task: bool = True
) -> Solution:
    """An engine of kernels, the one that plans are to name if they are; an error if none takes the case."""
    model = case.model(dtype).to(kernel_device())
    meta = case.meta(model, "triton", precision=precision)
    plan = meta.plan(case.tasks, case.shots, case.queries)
    assert plan.engine != "batched", plan.reason
    return Solution.of(meta, case, meta, dtype, per_task)


def in_precision(case: Case, precision: str) -> list[Solution]:
    """As `cases.yardsticks`, with the operands of matrix products rounded as a kernel of that precision rounds them."""
    rounding = {"tf32": 2.0**-10, "bf16": 2.0**-7, "fp16": 2.0**-10}[precision]
    return [_rounded(replace(case, jitter=jitter, rounding=rounding), precision) for jitter in range(4)]


def _rounded(case: Case, precision: str) -> Solution:
    model = case.model(torch.float32)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.forward = _RoundedForward(module, precision)  # type: ignore[assignment]
    meta = case.meta(model, "reference")
    return Solution.of(meta, case, meta, torch.float32)


class _RoundedForward:
    def __init__(self, linear: nn.Linear, precision: str) -> None:
        self.linear, self.precision = linear, precision

    def __call__(self, x: Tensor) -> Tensor:
        product: Tensor = _RoundedProduct.apply(x, self.linear.weight, self.precision)
        return product if self.linear.bias is None else product + self.linear.bias


class _RoundedProduct(torch.autograd.Function):
    """x @ w.T, and its derivative, with rounded operands."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, precision: str) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.precision = precision
        return F.linear(_round(x, precision), _round(w, precision))

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, Tensor, None]:
        x, w = (_round(t, ctx.precision) for t in ctx.saved_tensors)
        d = _round(d, ctx.precision)
        return d @ w, d.t() @ x, None


def _round(x: Tensor, precision: str) -> Tensor:
    match precision:
        case "tf32":  # what the matrix unit does to a float32: the low 13 bits of the significand are not read
            return (x.contiguous().view(torch.int32) & -8192).view(torch.float32)
        case "bf16":
            return x.bfloat16().float()
        case "fp16":
            return x.half().float()
    return x
