"""The native engine: a batch's meta-step in one call of compiled C++, for float32 tensors on a CPU.

What it does stands in `kernels/native`; here are the structures that it is handed, and the library.
"""

from __future__ import annotations

import ctypes as c
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

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
        ("weight", c.c_void_p),
        ("bias", c.c_void_p),
        ("weight_gradient", c.c_void_p),
        ("bias_gradient", c.c_void_p),
    )


class _Loss(c.Structure):
    _fields_ = (("kind", c.c_int), ("delta", c.c_float), ("smoothing", c.c_float))


class _Samples(c.Structure):
    _fields_ = (("samples", c.c_int64), ("x", c.c_void_p), ("y", c.c_void_p), ("weight", c.c_void_p))


class _Step(c.Structure):
    _fields_ = (
        *((name, c.c_int64) for name in ("tasks", "depth", "steps", "first", "lowest", "block", "rows", "threads")),
        ("layers", c.c_void_p),
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
    call, layers = prepared.copies()
    held = []  # until the call is over

    def address(tensor: Tensor) -> int:
        """Where the numbers of a tensor are, one behind the other."""
        if not tensor.is_contiguous():
            tensor = tensor.contiguous()
            held.append(tensor)
        return tensor.data_ptr()

    gradients: Gradients = [None] * len(parameters)
    for i, field in prepared.fields:
        parameter, layer = parameters[i], layers[i // len(PARTS)]
        assert parameter is not None
        setattr(layer, field, address(parameter))
        if needed[1 + i]:
            gradient = gradients[i] = torch.empty(parameter.shape, dtype=torch.float32)
            setattr(layer, f"{field}_gradient", gradient.data_ptr())
    for samples, own in ((call.support, support), (call.query, query)):
        samples.x, samples.y = address(own.x), address(own.y)
        if own.weight is not None:
            samples.weight = address(own.weight)
    if isinstance(share, Tensor):
        call.shares = address(share)
    else:
        call.share = share
    value, features = torch.empty((), dtype=torch.float32), None
    if needed[0]:
        features = torch.empty(query.x.shape, dtype=torch.float32)
        call.features = features.data_ptr()
    scratch = torch.empty(prepared.scratch, dtype=torch.uint8)
    call.tasks, call.value = support.x.shape[0], value.data_ptr()
    library().run_step(c.byref(call), scratch.data_ptr())
    return Outcome(value, features, gradients)


class _Prepared:
    """What is the same at every call of a plan."""

    def __init__(self, plan: Planned, needed: Sequence[bool], threads: int) -> None:
        problem, sizes = plan.problem, plan.sizes
        inner, depth = problem.inner, problem.network.depth
        # Where engines list the parameters that there are, and what a layer calls them.
        self.fields = [
            (len(PARTS) * i + PARTS.index(part), part)
            for i, layer in enumerate(problem.network.layers)
            for part in layer.parts
        ]
        self.layers = (_Layer * depth)(*(_layer(plan, i) for i in range(depth)))
        rates = [rate for row in inner.rates for rate in row]
        self.rates = (c.c_float * len(rates))(*rates)
        wanted = [i // len(PARTS) for i, need in enumerate(needed[1:]) if need]
        self.step = _Step(
            tasks=sizes.tasks,
            depth=depth,
            steps=inner.steps,
            first=inner.first_adapted,
            lowest=0 if needed[0] else min(wanted, default=depth),
            block=plan.block,
            rows=plan.rows or max(sizes.shots, sizes.queries),
            threads=threads,
            layers=c.addressof(self.layers),
            rates=c.addressof(self.rates),
            loss=_loss(problem.loss),
            outer_loss=_loss(problem.outer_loss),
            support=_Samples(sizes.shots),
            query=_Samples(sizes.queries),
            features=1 if needed[0] else None,  # any address but none, to count what it takes
        )
        for layer, start in zip(self.layers, range(1, len(needed), len(PARTS)), strict=True):
            layer.weight_gradient, layer.bias_gradient = (int(need) or None for need in needed[start : start + 2])
        self.scratch = library().scratch_size(c.byref(self.step))

    def copies(self) -> tuple[_Step, c.Array[_Layer]]:
        """The step and its layers, to be filled in."""
        step, layers = _Step.from_buffer_copy(self.step), type(self.layers).from_buffer_copy(self.layers)
        step.layers = c.addressof(layers)
        return step, layers


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
        bias=int(layer.bias) or None,
    )


def _loss(loss: Loss) -> _Loss:
    return _Loss(LOSSES.index(loss.name), loss.delta, loss.label_smoothing)
