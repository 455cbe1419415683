"""The native engine: a batch's meta-step in one call of compiled C++, for float32 tensors on a CPU.

What it does stands in `kernels/native`; here are the structures that it is handed, and the library.
"""

from __future__ import annotations

import ctypes as c
from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor
from torch.profiler import record_function

from ..batch import Query, Support
from ..inner import PARTS
from ..problem import ACTIVATIONS, LOSSES, Loss
from . import FlatParameters, Gradients, Outcome, Planned
from .native_library import library

T = TypeVar("T")

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


class _Plan(c.Structure):
    _fields_ = (
        *((name, c.c_int64) for name in ("tasks", "shots", "queries", "depth", "steps")),
        *((name, c.c_int64) for name in ("first", "lowest", "block", "rows", "threads", "gathers")),
        ("layers", c.c_void_p),
        ("rates", c.c_void_p),
        ("loss", _Loss),
        ("outer_loss", _Loss),
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
    shares, each = (share, 1.0) if isinstance(share, Tensor) else (None, share)
    sets = (support.x, support.y, support.weight, query.x, query.y, query.weight)
    given = (*sets, shares, *prepared.of_layers(parameters))
    # What is not dense is copied, and the copy held until the call is over.
    dense = [t if t is None or t.is_contiguous() else t.contiguous() for t in given]

    value = torch.empty((), dtype=torch.float32)
    features = torch.empty(query.x.shape, dtype=torch.float32) if needed[0] else None
    gradients: Gradients = [None] * len(parameters)
    for i in prepared.wanted:
        gradients[i] = torch.empty_like(parameters[i], memory_format=torch.contiguous_format)  # type: ignore[arg-type]
    scratch = torch.empty(prepared.scratch, dtype=torch.uint8)

    tensors = (*dense, *prepared.of_layers(gradients), value, features)
    addresses = prepared.addresses(*[None if t is None else t.data_ptr() for t in tensors])
    # A name in profiles; one that nobody reads would take as long as a small step's checks.
    with record_function("fomaml_fused::native") if _profiling() else nullcontext():
        prepared.run(prepared.plan, addresses, each, scratch.data_ptr())
    return Outcome(value, features, gradients)


def _profiling() -> bool:
    return bool(torch.autograd._profiler_enabled())  # type: ignore[attr-defined]


class _Prepared:
    """What is the same at every call of a plan."""

    def __init__(self, plan: Planned, needed: Sequence[bool], threads: int) -> None:
        problem, sizes = plan.problem, plan.sizes
        inner, depth = problem.inner, problem.network.depth
        # Where engines list weights and biases, and those of them whose gradient is asked for.
        self.places = [i for i in range(len(needed) - 1) if PARTS[i % len(PARTS)] in ("weight", "bias")]
        self.wanted = [i for i in self.places if needed[1 + i]]
        self.layers = (_Layer * depth)(*(_layer(plan, i) for i in range(depth)))
        rates = [rate for row in inner.rates for rate in row]
        self.rates = (c.c_float * len(rates))(*rates)
        own = _Plan(
            tasks=sizes.tasks,
            shots=sizes.shots,
            queries=sizes.queries,
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
        )
        self.plan = c.byref(own)
        # In the order of `struct Step`, as `step` puts the tensors; here any address but none tells what there is.
        there = [part in layer.parts for layer in problem.network.layers for part in ("weight", "bias")]
        some = (*[True] * 7, *there, *self.of_layers(needed[1:]), True, needed[0])
        self.addresses = c.c_void_p * len(some)
        self.run = library().run_step
        self.scratch = library().scratch_size(self.plan, self.addresses(*[int(is_there) or None for is_there in some]))

    def of_layers(self, listed: Sequence[T]) -> list[T]:
        """Of what engines list, that of weights and biases."""
        return [listed[i] for i in self.places]


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
