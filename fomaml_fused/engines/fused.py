"""The fused engine: launches the kernels that a plan names, on whatever device Triton's active driver serves.

Imports Triton, so it is imported only where a plan asks for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import pairwise

import torch
import triton
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from ..batch import Query, Support
from ..kernels import outer, resident
from ..kernels.configuration import Config
from ..kernels.resources import REGISTERS
from ..kernels.spec import Spec, bias_offset, weight_offset
from ..problem import Loss, Problem
from . import FlatParameters, Gradients, Planned

# The ordered reduction: rows and columns of a tile of gradients, losses at a time, and how it is launched.
REDUCTION = {"ROWS": 16, "BLOCK": 64, "LOSSES": 512}
REDUCTION_OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
# The kernels use up to 255 registers a thread, and a multiprocessor has 65,536: room for eight warps of theirs.
WARPS_PER_MULTIPROCESSOR = 8
INTERPRETED_PROGRAMS = 4  # one after another anyway; few, so that programs walk over tasks as they do on a device


def obstacle(device: torch.device) -> str | None:
    """Why kernels cannot run on tensors of this device; None where they can."""
    if interpreted():
        return None
    try:
        served = triton.runtime.driver.active.get_active_torch_device()
    except RuntimeError as error:
        return f"Triton finds no driver ({error})"
    if served.type != device.type:
        return f"Triton's active driver serves {served.type} tensors"
    return None


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels; TRITON_INTERPRET=1 decides when they are first imported."""
    return isinstance(resident.meta_kernel, InterpretedFunction)


def target() -> tuple[str, int | str]:
    """Backend and architecture of the current device, as ("cuda", 90); ("cpu", 0) where kernels are interpreted."""
    if interpreted():
        return "cpu", 0
    found = triton.runtime.driver.active.get_current_target()
    return found.backend, found.arch


def device_name(device: torch.device) -> str:
    """What `kernels/configs/` has a table for: backend and architecture, as "cuda-90"."""
    with on_device(device):
        backend, architecture = target()
    return f"{backend}-{architecture}"


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may have."""
    return 1 << 30 if interpreted() else int(_properties(device)["max_shared_mem"])


@lru_cache(maxsize=64)
def _properties(device: torch.device) -> dict[str, int]:
    driver = triton.runtime.driver.active
    index = driver.get_current_device() if device.index is None else device.index
    properties: dict[str, int] = driver.utils.get_device_properties(index)
    return properties


@lru_cache(maxsize=1024)
def spec_of(problem: Problem, shots: int, queries: int, precision: str, config: Config) -> Spec:
    """What the kernels are compiled for."""
    layers, inner = problem.network.layers, problem.inner
    return Spec(
        widths=problem.network.widths,
        biases=tuple(layer.bias for layer in layers),
        activations=tuple((layer.activation.name, layer.activation.parameters) for layer in layers),
        adapts=inner.adapt,
        loss=_loss(problem.loss),
        outer_loss=_loss(problem.outer_loss),
        # The first step has no velocity yet, so one step has no momentum.
        momentum=inner.momentum > 0.0 and inner.steps > 1,
        decay=inner.weight_decay > 0.0,
        precision=precision,
        samples=config.samples,
        one_support_tile=shots <= config.samples,
        one_query_tile=queries <= config.samples,
    )


@dataclass
class Adapted:
    """The fast weights of a chunk of tasks, as the kernels lay them out: [t, parameters], each at its offset."""

    plan: Planned
    spec: Spec
    weights: Tensor


@dataclass
class Trace:
    """The query pass of a chunk: its outputs [t, Q, out], and the features it ran on."""

    outputs: Tensor
    x: Tensor


def step(
    plan: Planned,
    needed: Sequence[bool],
    parameters: FlatParameters,
    support: Support,
    query: Query,
    share: float | Tensor,
    outputs: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Gradients]:
    """The meta-step of a chunk of tasks in two launches; arguments and results as of `batched.step`.

    Args:
        outputs: where the query outputs go, [t, Q, out] float32.
    """
    (tasks, shots, _), queries = support.x.shape, query.x.shape[1]
    if queries == 0:  # weights of nothing would make the gradient 0 / 0, where torch has 0
        query = Query(query.x, query.y)
    spec = _spec(plan, shots, queries)
    device = support.x.device
    programs, length = _programs(plan, tasks, device), spec.parameters
    losses, value = _new(device, tasks), _new(device)
    dx = _new(device, *query.x.shape) if needed[0] else None
    partials = _new(device, programs, length) if any(needed[1:]) else None
    gradient = _new(device, length) if any(needed[1:]) else None
    shares, share_of_all = (share.contiguous(), 0.0) if isinstance(share, Tensor) else (None, share)
    blocks = triton.cdiv(length, REDUCTION["BLOCK"]) if partials is not None else 0
    with on_device(device):
        resident.meta_kernel[programs,](
            *_pointers(parameters), _inner(plan.problem, device), *_tensors(support), *_tensors(query),
            shares, share_of_all, losses, outputs, dx, partials, tasks, shots, queries, plan.problem.inner.steps, spec,
            **_options(plan),
        )  # fmt: skip
        outer.reduce_kernel[blocks + 1,](
            partials,
            gradient,
            losses,
            shares,
            share_of_all,
            value,
            programs,
            length,
            tasks,
            **REDUCTION,
            **REDUCTION_OPTIONS,
        )
    return value, dx, _split(spec, gradient, needed[1:])


def adapt(plan: Planned, parameters: FlatParameters, support: Support) -> Adapted:
    """Run the inner steps of a chunk of tasks."""
    tasks, shots, _ = support.x.shape
    spec, device = _spec(plan, shots, shots), support.x.device
    weights = _new(device, tasks, spec.parameters)
    with on_device(device):
        resident.adapt_kernel[_programs(plan, tasks, device),](
            *_pointers(parameters), _inner(plan.problem, device), *_tensors(support), weights,
            tasks, shots, plan.problem.inner.steps, spec, **_options(plan),
        )  # fmt: skip
    return Adapted(plan, spec, weights)


def query_pass(adapted: Adapted, x: Tensor) -> Trace:
    """The adapted networks on query features [t, Q, in]."""
    tasks, queries, _ = x.shape
    x = x.contiguous()
    outputs = _new(x.device, tasks, queries, adapted.spec.widths[-1])
    with on_device(x.device):
        resident.query_kernel[_programs(adapted.plan, tasks, x.device),](
            adapted.weights, x, outputs, tasks, queries, adapted.spec, **_options(adapted.plan)
        )
    return Trace(outputs, x)


def query_backward(
    adapted: Adapted, trace: Trace, d: Tensor, needed: Sequence[bool], features: bool
) -> tuple[Tensor | None, Gradients]:
    """The query pass in reverse; arguments and results as of `batched.query_backward`."""
    tasks, queries, _ = trace.x.shape
    spec, device = adapted.spec, d.device
    programs, length = _programs(adapted.plan, tasks, device), spec.parameters
    dx = _new(device, *trace.x.shape) if features else None
    partials = _new(device, programs, length) if any(needed) else None
    gradient = _new(device, length) if any(needed) else None
    with on_device(device):
        resident.query_backward_kernel[programs,](
            adapted.weights, trace.x, d.contiguous(), dx, partials, tasks, queries, spec, **_options(adapted.plan)
        )
        if partials is not None:
            outer.reduce_kernel[triton.cdiv(length, REDUCTION["BLOCK"]),](
                partials, gradient, None, None, 0.0, None, programs, length, 0, **REDUCTION, **REDUCTION_OPTIONS
            )
    return dx, _split(spec, gradient, needed)


def fast_weights(adapted: Adapted, tasks: slice) -> list[tuple[Tensor, Tensor | None]]:
    """Weights [t, out, in] and biases [t, out] of each layer after the last step."""
    return _layers(adapted.spec, adapted.weights[tasks])


def _spec(plan: Planned, shots: int, queries: int) -> Spec:
    assert plan.precision is not None
    assert plan.config is not None
    return spec_of(plan.problem, shots, queries, plan.precision, plan.config)


def _new(device: torch.device, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=device)


def _loss(loss: Loss) -> tuple[str, tuple[float, ...]]:
    options = {"huber": (loss.delta,), "cross_entropy": (loss.label_smoothing,)}
    return loss.name, options.get(loss.name, ())


def _options(plan: Planned) -> dict[str, int | bool]:
    assert plan.config is not None
    options = {"num_warps": plan.config.warps, "num_stages": 1, "enable_fp_fusion": True}
    # Told that it may have them all, ptxas does not spill some for the sake of an occupancy nobody asked for.
    return options | ({"maxnreg": REGISTERS} if target()[0] == "cuda" else {})


def _programs(plan: Planned, tasks: int, device: torch.device) -> int:
    """As many programs as the device holds at a time, or fewer: each of them with as many tasks, give or take one."""
    assert plan.config is not None
    if interpreted():
        most = INTERPRETED_PROGRAMS
    else:
        most = int(_properties(device)["multiprocessor_count"]) * max(1, WARPS_PER_MULTIPROCESSOR // plan.config.warps)
    return -(-tasks // -(-tasks // most)) if tasks else 0


@cache  # for good: a captured graph reads them wherever they lie
def _inner(problem: Problem, device: torch.device) -> Tensor:
    """Momentum, weight decay and the rate of each step and layer, as the kernels read them."""
    inner = problem.inner
    numbers = [inner.momentum, inner.weight_decay, *(rate for row in inner.rates for rate in row)]
    return torch.tensor(numbers, dtype=torch.float32, device=device)


def _pointers(parameters: FlatParameters) -> tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...]]:
    flat = [None if p is None else p.contiguous() for p in parameters]
    return tuple(flat[0::2]), tuple(flat[1::2])


def _tensors(batch: Support | Query) -> tuple[Tensor, Tensor, Tensor | None]:
    weight = None if batch.weight is None else batch.weight.contiguous()
    return batch.x.contiguous(), batch.y.contiguous(), weight


def _layers(spec: Spec, flat: Tensor) -> list[tuple[Tensor, Tensor | None]]:
    """Views of each layer's weight [..., out, in] and bias [..., out] in what kernels lay out, [..., parameters]."""
    layers: list[tuple[Tensor, Tensor | None]] = []
    for i, (before, after) in enumerate(pairwise(spec.widths)):
        weight = flat[..., weight_offset(spec, i) :][..., : after * before].unflatten(-1, (after, before))
        layers.append((weight, flat[..., bias_offset(spec, i) :][..., :after] if spec.biases[i] else None))
    return layers


def _split(spec: Spec, flat: Tensor | None, needed: Sequence[bool]) -> Gradients:
    """The gradients asked for, as views of the one that the kernels lay out."""
    if flat is None:
        return [None] * len(needed)
    gradients = [gradient for layer in _layers(spec, flat) for gradient in layer]
    return [gradient if need else None for gradient, need in zip(gradients, needed, strict=True)]


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
