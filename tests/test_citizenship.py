"""The manners of a torch module that are not of its gradients: modes, scalers, strides, devices, and no waiting."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fomaml_fused as ff
from fomaml_fused.calls import Given

from .cases import Case, relative_error
from .test_rules import RULES

CASE = Case(widths=(3, 17, 5), weighted=True)
ENGINES = ("batched", "resident", "dual", "layered", "chained", "primal")


def meta_of(case: Case, engine: str, dtype: torch.dtype = torch.float32) -> tuple[ff.FOMAML, dict[str, Any]]:
    """A module and its batch, where the engine runs."""
    if engine == "batched":
        return case.meta(case.model(dtype), "torch"), case.batch(dtype)
    pytest.importorskip("triton")
    from .on_kernels import kernel_device, on_device

    return case.meta(case.model(dtype).to(kernel_device()), "triton"), on_device(case)


class Ops(TorchDispatchMode):
    """Counts ops that a CUDA graph cannot hold: those that wait for values, or bring them from the host."""

    WAIT = (
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "equal",
        "unique",
        "_unique2",
        "is_nonzero",
        "lift_fresh",
    )

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        masked = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in self.WAIT or masked:
            self.seen[name] += 1
        return function(*args, **(kwargs or {}))


def waits(case: Case, engine: str, reduction: str) -> Counter[str]:
    """The ops of a step that wait, after a first step; without the look at classes, which is not taken on a device."""
    meta, given = meta_of(case, engine)
    ops = Ops()
    with ff.override(engine=None if engine == "batched" else engine):
        for _ in range(2):
            call = meta._call()
            batch = call.check(Given(**given))
            ops.seen.clear()
            with ops:
                loss, _ = call.loss(batch, reduction)
                loss.sum().backward()
    return ops.seen


@pytest.mark.parametrize("rule", [name for name in RULES if "ragged" not in name])
def test_no_rule_of_the_batched_engine_waits_for_its_device(rule: str) -> None:
    case = Case(widths=(3, 7, 6, 5), tasks=4, steps=3, **RULES[rule])
    for reduction in ("mean", "none"):
        assert not waits(case, "batched", reduction)


@pytest.mark.parametrize("engine", ENGINES)
def test_no_engine_waits_for_its_device(engine: str) -> None:
    case = Case(widths=(3, 5), tasks=2, loss="cross_entropy", learn_lr="layer", nonfinite="skip", weighted=True)
    assert not waits(case, engine, "mean")


def test_counts_that_are_read_are_seen_to_be() -> None:
    meta, batch = meta_of(CASE, "batched")
    with Ops() as ops:
        meta(**batch, support_counts=torch.tensor([1, 5, 4]))
    assert ops.seen["_local_scalar_dense"] or ops.seen["lift_fresh"]


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_scaler_scales_what_comes_from_outside_alone(reduction: str) -> None:
    """Inner steps see no scale, so that gradients are the same bits; a step with what is not finite is left out."""
    meta, batch = meta_of(CASE, "batched")
    optimizer = torch.optim.SGD(meta.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    plain = torch.autograd.grad(meta(**batch, reduction=reduction).sum(), list(meta.parameters()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = meta(**batch, reduction=reduction).sum()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    for p, gradient in zip(meta.parameters(), plain, strict=True):
        assert p.grad is not None
        assert torch.equal(p.grad, gradient)
    scaler.step(optimizer)
    scaler.update()
    before = [p.detach().clone() for p in meta.parameters()]
    optimizer.zero_grad()
    batch["support_y"][1] = torch.inf
    scaler.scale(meta(**batch, reduction=reduction).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**9
    assert all(torch.equal(p, value) for p, value in zip(meta.parameters(), before, strict=True))


@pytest.mark.parametrize("options", [{}, {"learn_lr": "layer"}], ids=str)
def test_parameters_that_are_swapped_in_get_the_gradient(options: dict[str, Any]) -> None:
    case = replace(CASE, **options)
    meta, batch = meta_of(case, "batched", torch.float64)
    other = {name: (p.detach() * 1.1 + 0.1).requires_grad_() for name, p in meta.named_parameters()}
    loss = torch.func.functional_call(meta, other, kwargs=batch)
    found = torch.autograd.grad(loss, list(other.values()))
    assert all(p.grad is None for p in meta.parameters())
    with torch.no_grad():
        for name, p in meta.named_parameters():
            p.copy_(other[name])
    for a, b in zip(found, torch.autograd.grad(meta(**batch), list(meta.parameters())), strict=True):
        assert torch.equal(a, b)


def strange(value: Tensor, kind: str) -> Tensor:
    """The same values otherwise in memory."""
    filler = torch.nan if value.is_floating_point() else 1 << 30
    match kind:
        case "transposed":
            return value.transpose(0, -1).contiguous().transpose(0, -1)
        case "sliced, with strides, off the boundary":
            room = value.new_full([2 * size + 3 for size in value.shape], filler)
            found = room[tuple(slice(3, 3 + 2 * size, 2) for size in value.shape)]
        case "off the boundary":
            found = value.new_full([value.numel() + 1], filler)[1:].view(value.shape)
        case "expanded":
            return value[:1].expand_as(value)
    return found.copy_(value)


def results(meta: ff.FOMAML, batch: dict[str, Any]) -> list[Tensor]:
    """Losses, outputs, and the gradients of both."""
    batch = batch | {"query_x": batch["query_x"].detach().requires_grad_()}
    inputs = [*meta.parameters(), batch["query_x"]]
    loss, outputs = meta(**batch), meta.predict(batch["support_x"], batch["support_y"], batch["query_x"])
    gradients = [*torch.autograd.grad(loss, inputs), *torch.autograd.grad(outputs.sin().sum(), inputs)]
    return [loss, outputs, *gradients]


@pytest.mark.parametrize(
    ("engine", "kind"),
    [
        *(("batched", kind) for kind in ("transposed", "off the boundary", "expanded")),
        ("resident", "expanded"),
        *((engine, "sliced, with strides, off the boundary") for engine in ENGINES),
    ],
)
@pytest.mark.sampled(2)
def test_memory_may_be_laid_out_in_any_way(engine: str, kind: str) -> None:
    case = Case(widths=(3, 5), tasks=2, weighted=True, loss="cross_entropy", steps=1)
    meta, batch = meta_of(case, engine)
    batch = {name: value.detach() for name, value in batch.items()}
    if kind == "expanded":  # the same task, again and again
        batch = {name: value[:1].expand_as(value).clone() for name, value in batch.items()}
    with ff.override(engine=None if engine == "batched" else engine):
        expected = results(meta, batch)
        if kind != "expanded":
            for p in meta.parameters():
                p.data = strange(p.data, kind)
        found = results(meta, {name: strange(value, kind) for name, value in batch.items()})
    # In which order a BLAS sums depends on how its operands lie; what kernels read lies as they ask for it.
    rounding = 1e-6 if engine == "batched" else 0.0
    assert all(relative_error(a, b) <= rounding for a, b in zip(found, expected, strict=True))


def test_parameters_elsewhere_than_the_data_are_named() -> None:
    meta, batch = meta_of(CASE, "batched")
    with pytest.raises(ValueError, match="support_x is on cpu, the model is on meta; both take the same device"):
        ff.FOMAML(nn.Sequential(nn.Linear(3, 5, device="meta")))(**batch)
    for change, message in (
        ({"device": "meta"}, r"model has parameters of torch\.float32 on cpu and of torch\.float32 on meta"),
        ({"dtype": torch.float64}, r"model has parameters of torch\.float32 on cpu and of torch\.float64 on cpu"),
    ):
        other = {"model.2.bias": torch.zeros(5, **change)}
        with pytest.raises(ValueError, match=message):
            torch.func.functional_call(meta, other, kwargs=batch)
    compiled = torch.compile(lambda: torch.func.functional_call(meta, other, kwargs=batch), backend="eager")
    with pytest.raises(ValueError, match=message):
        compiled()


@pytest.mark.parametrize("loss", ["mse", "callable"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_tensors_of_inference_mode_are_data_as_any_other(loss: str, reduction: str) -> None:
    case = replace(CASE, loss=loss, outer_loss=loss, steps=3)
    meta, batch = meta_of(case, "batched", torch.float64)
    batch = {name: value.detach() for name, value in batch.items()}
    support = {name: value for name, value in batch.items() if name.startswith("support")}
    with torch.inference_mode():
        inferred = {name: value.clone() for name, value in batch.items()}

    def found(batch: dict[str, Any]) -> list[Tensor]:
        own = {name: batch[name] for name in support}
        values = [meta(**batch, reduction=reduction), meta.predict(**own, query_x=batch["query_x"])]
        return [*values, meta.adapt(**own)(batch["query_x"])]

    expected, actual = found(batch), found(inferred)
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)
        gradients = [torch.autograd.grad(value.sum(), list(meta.parameters())) for value in (a, b)]
        assert all(torch.equal(c, d) for c, d in zip(*gradients, strict=True))
    with torch.inference_mode():
        for data in (batch, inferred):
            for a, b in zip(found(data), expected, strict=True):
                assert relative_error(a, b) < 1e-14
