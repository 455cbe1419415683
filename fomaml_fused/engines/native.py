"""The native engine: a batch's meta-step in one call of compiled C++, for float32 tensors on a CPU.

What it does stands in `kernels/native`; here are the structures that it is handed, and the library.
"""

from __future__ import annotations

import ctypes as c
from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache

import torch
from torch import Tensor
from torch.profiler import record_function

from ..batch import Query, Support
from ..inner import PARTS
from ..problem import ACTIVATIONS, LOSSES, Loss
from . import FlatParameters, Gradients, Outcome, Planned
from .native_library import library

_KINDS = list(ACTIVATIONS)  # their order is that of `enum Activation`


class _Layer(c.Structure):
    _fields_ = (
        ("inputs", c.c_int64),
        ("outputs", c.c_int64),
        ("dual", c.c_int32),
        ("moves_weight", c.c_int32),
        ("moves_bias", c.c_int32),
        ("activation", c.c_int32),
        ("p0", c.c_float),
        ("p1", c.c_float),
    )


class _Loss(c.Structure):
    _fields_ = (("kind", c.c_int), ("delta", c.c_float), ("smoothing", c.c_float))


class _Samples(c.Structure):
    _fields_ = (("samples", c.c_int64), ("x", c.c_void_p), ("y", c.c_void_p), ("weight", c.c_void_p))


class _Step(c.Structure):
    _fields_ = (
        *(
            (name, c.c_int64)
            for name in ("tasks", "depth", "steps", "first", "lowest", "block", "rows", "threads", "gathers")
        ),
        ("layers", c.c_void_p),
        ("parameters", c.c_void_p),
        ("gradients", c.c_void_p),
        ("rates", c.c_void_p),
        ("loss", _Loss),
        ("outer_loss", _Loss),
        ("support", _Samples),
        ("query", _Samples),
        ("shares", c.c_void_p),
        ("share", c.c_float),
        ("value", c.c_void_p),
        ("features", c.c_void_p),
    )


def step(
    plan: Planned,
    needed: Sequence[bool],
    parameters: FlatParameters,
    support: Support,
    query: Query | None,
    share: float | Tensor,
) -> Outcome:
    """As `batched.step`, of all tasks of a batch."""
    assert query is not None
    prepared = _prepared(plan, tuple(needed), torch.get_num_threads())
    held = [_dense(parameters[i]) for i in prepared.places]
    gradients: Gradients = [None] * len(parameters)
    for i in prepared.wanted:
        gradients[i] = torch.empty(parameters[i].shape, dtype=torch.float32)  # type: ignore[union-attr]
    read = prepared.pointers(*map(_address, held))
    write = prepared.pointers(*(_address(gradients[i]) for i in prepared.places))

    call = _Step.from_buffer_copy(prepared.step)
    call.tasks, call.parameters, call.gradients = support.x.shape[0], c.addressof(read), c.addressof(write)
    for samples, own in ((call.support, support), (call.query, query)):
        sets = _dense(own.x), _dense(own.y), _dense(own.weight)
        samples.x, samples.y, samples.weight = map(_address, sets)
        held += sets
    if isinstance(share, Tensor):
        held.append(_dense(share))
        call.shares = _address(held[-1])
    else:
        call.share = share
    value = torch.empty((), dtype=torch.float32)
    features = torch.empty(query.x.shape, dtype=torch.float32) if needed[0] else None
    scratch = torch.empty(prepared.scratch, dtype=torch.uint8)
    call.value, call.features = value.data_ptr(), _address(features)
    # A name in profiles; one that nobody reads would take as long as a small step's checks.
    with record_function("fomaml_fused::native") if _profiling() else nullcontext():
        library().run_step(c.byref(call), scratch.data_ptr())
    return Outcome(value, features, gradients)


def _profiling() -> bool:
    return bool(torch.autograd._profiler_enabled())  # type: ignore[attr-defined]


def _dense(tensor: Tensor | None) -> Tensor | None:
    """The tensor, or a copy with its numbers one behind the other."""
    return tensor if tensor is None or tensor.is_contiguous() else tensor.contiguous()


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class _Prepared:
    """What is the same at every call of a plan."""

    def __init__(self, plan: Planned, needed: Sequence[bool], threads: int) -> None:
        problem, sizes = plan.problem, plan.sizes
        inner, depth = problem.inner, problem.network.depth
        # Where engines list weights and biases, and those of them whose gradient is asked for.
        self.places = [i for i in range(len(needed) - 1) if PARTS[i % len(PARTS)] in ("weight", "bias")]
        self.wanted = [i for i in self.places if needed[1 + i]]
        self.pointers = c.c_void_p * len(self.places)
        self.layers = (_Layer * depth)(*(_layer(plan, i) for i in range(depth)))
        rates = [rate for row in inner.rates for rate in row]
        self.rates = (c.c_float * len(rates))(*rates)
        self.step = _Step(
            tasks=sizes.tasks,
            depth=depth,
            steps=inner.steps,
            first=inner.first_adapted,
            lowest=0 if needed[0] else min((i // len(PARTS) for i in self.wanted), default=depth),
            block=plan.block,
            rows=plan.rows or max(sizes.shots, sizes.queries),
            threads=threads,
            gathers=plan.gathers,
            layers=c.addressof(self.layers),
            rates=c.addressof(self.rates),
            loss=_loss(problem.loss),
            outer_loss=_loss(problem.outer_loss),
            support=_Samples(sizes.shots),
            query=_Samples(sizes.queries),
            features=int(needed[0]) or None,
        )
        # Any address but none, to count what is there.
        there = [part in layer.parts for layer in problem.network.layers for part in ("weight", "bias")]
        parameters = self.pointers(*(int(is_there) or None for is_there in there))
        gradients = self.pointers(*(int(needed[1 + i]) or None for i in self.places))
        self.step.parameters, self.step.gradients = c.addressof(parameters), c.addressof(gradients)
        self.scratch = library().scratch_size(c.byref(self.step))


@lru_cache(maxsize=256)
def _prepared(plan: Planned, needed: tuple[bool, ...], threads: int) -> _Prepared:
    return _Prepared(plan, needed, threads)


def _layer(plan: Planned, i: int) -> _Layer:
    layer, moves = plan.problem.network.layers[i], plan.problem.inner.adapt[i]
    parameters = (*layer.activation.parameters, 0.0, 0.0)
    return _Layer(
        inputs=layer.in_features,
        outputs=layer.out_features,
        dual=plan.forms[i] == "dual",
        moves_weight="weight" in moves,
        moves_bias="bias" in moves,
        activation=_KINDS.index(layer.activation.name),
        p0=parameters[0],
        p1=parameters[1],
    )


def _loss(loss: Loss) -> _Loss:
    return _Loss(LOSSES.index(loss.name), loss.delta, loss.label_smoothing)
