"""What the launchers of kernels share: the device, tensors as kernels take them, the ordered reduction.

Imports Triton, so it is imported only where a plan asks for kernels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, lru_cache
from itertools import pairwise
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from ..batch import Query, Support, cast_targets
from ..inner import PARTS
from ..kernels import outer
from ..kernels.resources import REGISTERS
from ..kernels.spec import Spec, TiledSpec, bias_offset, outer_tiles, weight_offset
from ..problem import Loss, Problem
from . import FlatParameters, Gradients
from .losses import TaskLoss, task_loss

# The ordered reduction: rows and columns of a tile of gradients, losses at a time, and how it is launched.
REDUCTION = {"ROWS": 16, "BLOCK": 64, "LOSSES": 512}
REDUCTION_OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
OLDEST_CUDA = 80  # those before have no matrix instructions for tf32 and bf16, and spill thousands of words
INTERPRETED_MULTIPROCESSORS = 2  # few, so that programs walk over tasks and samples as they do on a device


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
    with on_device(device):
        backend, architecture = target()
    if backend == "cuda" and int(architecture) < OLDEST_CUDA:
        return f"the GPU is an sm_{architecture}, and the kernels need an sm_{OLDEST_CUDA} or newer"
    return None


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels; TRITON_INTERPRET=1 decides when they are first imported."""
    return isinstance(outer.reduce_kernel, InterpretedFunction)


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
    return 1 << 30 if interpreted() else int(properties(device)["max_shared_mem"])


@lru_cache(maxsize=64)
def properties(device: torch.device) -> dict[str, int]:
    """What Triton's driver tells of a device."""
    driver = triton.runtime.driver.active
    index = driver.get_current_device() if device.index is None else device.index
    properties: dict[str, int] = driver.utils.get_device_properties(index)
    return properties


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def multiprocessors(device: torch.device) -> int:
    """How many of them the device has."""
    return INTERPRETED_MULTIPROCESSORS if interpreted() else int(properties(device)["multiprocessor_count"])


def options(warps: int, stages: int) -> dict[str, int | bool]:
    """How a kernel is compiled."""
    found = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    # Told that it may have them all, ptxas does not spill some for the sake of an occupancy nobody asked for.
    return found | ({"maxnreg": REGISTERS} if target()[0] == "cuda" else {})


def reduce(
    partials: Tensor | None, losses: Tensor | None = None, shares: Tensor | None = None, share: float = 0.0
) -> tuple[Tensor | None, Tensor | None]:
    """Sum partial gradients [N, parameters], and losses times their shares, in a fixed order; None where not given."""
    found = losses if partials is None else partials
    if found is None:
        return None, None
    count, length = partials.shape if partials is not None else (0, 0)
    gradient = None if partials is None else new(found.device, length)
    value = None if losses is None else new(found.device)
    blocks = triton.cdiv(length, REDUCTION["BLOCK"]) + (losses is not None)
    outer.reduce_kernel[blocks,](
        partials, gradient, losses, shares, share, value, count, length, 0 if losses is None else len(losses),
        **REDUCTION, **REDUCTION_OPTIONS,
    )  # fmt: skip
    return gradient, value


def products(
    spec: TiledSpec,
    launch: dict[str, int | bool],
    inputs: Sequence[Tensor | None],
    gradients: Sequence[Tensor | None],
    unit: float,
) -> Tensor:
    """Partial sums of DᵀX over all samples, and of D, times `unit`; of all parameters [splits, parameters].

    inputs, gradients: of each layer X [..., in] and D [..., out], with as many samples in all; None where none of it is
    wanted, and then that part is not written.  launch: as of `options`.
    """
    found = next(d for d in gradients if d is not None)
    rows, tiles = found.numel() // found.shape[-1], outer_tiles(spec, len(spec.activations))
    splits, length = split_samples(spec, rows, tiles, found.device)
    partials = new(found.device, splits, spec.parameters)
    outer.outer_kernel[tiles, splits](tuple(inputs), tuple(gradients), partials, unit, rows, length, spec, **launch)
    return partials


def split_samples(spec: TiledSpec, rows: int, tiles: int, device: torch.device) -> tuple[int, int]:
    """How many parts a sum over so many rows has, and the rows of a part, where each of so many tiles has that sum."""
    # Enough programs that no multiprocessor idles, each with enough samples to be worth its partial sum.
    splits = max(1, min(2 * multiprocessors(device) // max(tiles, 1), rows // (4 * spec.contracted)))
    length = -(-rows // splits // spec.contracted) * spec.contracted if rows else spec.contracted
    return max(1, -(-rows // length)), length


def wanted_layers(spec: Spec, needed: Sequence[bool]) -> list[bool]:
    """Whether something is to be known of each layer's query gradient; needed: of each parameter, and learned rates."""
    of = len(PARTS) * len(spec.activations)
    wanted = [w or b for w, b in zip(needed[0 : of : len(PARTS)], needed[1 : of : len(PARTS)], strict=True)]
    return [want or (any(needed[of:]) and spec.adapts[i]) for i, want in enumerate(wanted)]


def counts(part: Tensor | None, share: float | Tensor, tasks: int, samples: int) -> tuple[Tensor | None, float]:
    """What each sample counts in a sum of tasks' mean losses, [T, N] or None where all are alike, and its unit.

    part: what it counts in its task's, as of `part_of_task`.  share: what each task counts. In that unit gradients are
    of the size of a sample's own, which 16 bits hold.
    """
    per_task = max(samples, 1)
    found = None if part is None else part * per_task
    if not isinstance(share, Tensor):
        return found, share / per_task
    # Shares of a mean over tasks are near 1 / T, of a sum near 1, and which they are only the device knows.
    middle = math.sqrt(tasks)
    shares = share.float()[:, None] * middle
    return (shares.expand(tasks, samples).contiguous() if found is None else found * shares), 1 / (per_task * middle)


def passes_that_count(problem: Problem, query: Query) -> dict[int, float]:
    """After which steps the query loss counts, and what."""
    last = {problem.inner.steps: 1.0}
    return {k: weight for k, weight in enumerate(query.step_weights or (), 1) if weight} or last


def part_of_task(weight: Tensor | None) -> Tensor | None:
    """What each sample counts in the loss of its task; None where all count the same."""
    if weight is None:
        return None
    weight = weight.float()
    return weight / weight.sum(-1, keepdim=True)


def loss_of_task(problem: Problem, loss: Loss, y: Tensor, weight: Tensor | None) -> TaskLoss:
    """A loss in torch, which may be a callable, for what kernels leave of outputs."""
    weight = None if weight is None else weight.float()
    return task_loss(loss, cast_targets(y, torch.float32), weight, problem.network.out_features, torch.float32)


def of_sound(values: Tensor, sound: Tensor | None) -> Tensor:
    """What there is of each task [T, ...], 0 for those that do not count; sound: which do, [T], or None for all."""
    return values if sound is None else torch.where(sound.view(-1, *[1] * (values.dim() - 1)), values, 0.0)


def new(device: torch.device, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Uninitialised numbers."""
    return torch.empty(shape, dtype=dtype, device=device)


def _loss(loss: Loss) -> tuple[str, tuple[float, ...]]:
    """A loss as kernels name it."""
    options = {"huber": (loss.delta,), "cross_entropy": (loss.label_smoothing,)}
    return loss.name, options.get(loss.name, ())


def compiled_for(problem: Problem, precision: str) -> dict[str, Any]:
    """What all kernels are compiled for."""
    described, inner = problem.network.layers, problem.inner
    return {
        "widths": problem.network.widths,
        "biases": tuple(layer.bias for layer in described),
        "activations": tuple((layer.activation.name, layer.activation.parameters) for layer in described),
        "adapts": tuple(bool(parts) and inner.steps > 0 for parts in inner.adapt),
        "loss": _loss(problem.loss),
        "outer_loss": _loss(problem.outer_loss),
        # The first step has no velocity yet, so one step has no momentum, but Nesterov's, which looks ahead.
        "momentum": inner.momentum > 0.0 and (inner.steps > 1 or inner.nesterov),
        "nesterov": inner.nesterov,
        "decay": inner.weight_decay > 0.0,
        "decoupled": inner.decoupled and inner.weight_decay > 0.0,
        "precision": precision,
    }


@cache  # for good: a captured graph reads them wherever they lie
def inner_numbers(problem: Problem, device: torch.device) -> Tensor:
    """Momentum, weight decay and the rate of each step and layer, as the kernels read them; what else rules take."""
    inner = problem.inner
    numbers = [inner.momentum, inner.weight_decay, *(rate for row in inner.rates for rate in row)]
    numbers += [math.inf if bound is None else bound for bound in (inner.max_grad_norm, inner.max_grad_value)]
    numbers += [number for beta in inner.betas for number in (beta, 1.0 - beta)] + [inner.eps]
    numbers += [1.0 / (1.0 - beta**step) for step in range(1, inner.steps + 1) for beta in inner.betas]
    return torch.tensor(numbers, dtype=torch.float32, device=device)


def pointers(parameters: FlatParameters) -> tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...]]:
    """Weights and biases of all layers; kernels take no other parameters."""
    flat = [None if p is None else p.contiguous() for p in parameters]
    return tuple(flat[0 :: len(PARTS)]), tuple(flat[1 :: len(PARTS)])


def tensors(batch: Support | Query) -> tuple[Tensor, Tensor, Tensor | None]:
    weight = None if batch.weight is None else batch.weight.contiguous()
    return batch.x.contiguous(), batch.y.contiguous(), weight


def layers(spec: Spec, flat: Tensor) -> list[tuple[Tensor, Tensor | None]]:
    """Views of each layer's weight [..., out, in] and bias [..., out] in what kernels lay out, [..., parameters]."""
    layers: list[tuple[Tensor, Tensor | None]] = []
    for i, (before, after) in enumerate(pairwise(spec.widths)):
        weight = flat[..., weight_offset(spec, i) :][..., : after * before].unflatten(-1, (after, before))
        layers.append((weight, flat[..., bias_offset(spec, i) :][..., :after] if spec.biases[i] else None))
    return layers


def split(spec: Spec, flat: Tensor | None, needed: Sequence[bool]) -> Gradients:
    """The gradients asked for, as views of the one that the kernels lay out."""
    found: Gradients = [None] * len(needed)
    if flat is not None:
        for i, layer in enumerate(layers(spec, flat)):
            found[len(PARTS) * i : len(PARTS) * i + 2] = layer
    return [gradient if need else None for gradient, need in zip(found, needed, strict=True)]
