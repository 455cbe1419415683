"""The cost model: what a layer's form does, operation by operation, and how long a device takes for it.

A model orders alternatives; it does not predict seconds. Times are sums over operations of launch, matrices, arithmetic
and memory traffic, which fits small batched products better than their maximum does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from .engines import fold_step
from .problem import Layer


@dataclass(frozen=True)
class Device:
    """What the model knows of a device.

    Attributes:
        launch: seconds to start one torch op.
        matrix: seconds for each matrix of a batched product, beside its arithmetic and traffic.
        flops: floating-point operations a second in float32 matrix products.
        cached, streamed: bytes a second while the working set fits into `cache` bytes, and when it does not.
    """

    name: str
    launch: float
    matrix: float
    flops: float
    cached: float
    streamed: float
    cache: int

    def bandwidth(self, working_set: float) -> float:
        return self.cached if working_set <= self.cache else self.streamed


# Fitted to medians of single torch ops on two cores of a Xeon with AVX-512 (torch 2.13.0).
CPU = Device("cpu", launch=4e-6, matrix=0.12e-6, flops=200e9, cached=60e9, streamed=14e9, cache=32 << 20)
# The H100's data sheet (SXM, float32 outside the tensor cores); launch and matrix are assumptions, not measurements.
GPU = Device("gpu", launch=6e-6, matrix=0.01e-6, flops=60e12, cached=6e12, streamed=3e12, cache=40 << 20)


class Operation(NamedTuple):
    """Torch ops: how many, and how many matrices, flops and bytes read and written they have together."""

    launches: int
    matrices: int
    flops: float
    bytes: float

    def seconds(self, device: Device, working_set: float) -> float:
        traffic = self.bytes / device.bandwidth(working_set)
        return self.launches * device.launch + self.matrices * device.matrix + self.flops / device.flops + traffic


@dataclass(frozen=True)
class Shape:
    """The sizes of a chunk of tasks, and of the loop that runs over it."""

    tasks: int
    shots: int
    queries: int
    steps: int
    itemsize: int
    momentum: bool
    decay: bool

    def product(self, matrices: int, m: int, k: float, n: float, passes: int = 1, count: int = 1) -> Operation:
        """`matrices` products [m, k] x [k, n], `count` times; `passes` over the result, 2 where it is added to."""
        traffic = matrices * self.itemsize * (m * k + k * n + passes * m * n)
        separate = matrices if matrices > 1 else 0
        return Operation(count, count * separate, count * 2.0 * matrices * m * k * n, count * traffic)

    def elementwise(self, numbers: float, count: int = 1) -> Operation:
        """Ops that read and write `numbers` numbers each."""
        return Operation(count, 0, count * numbers, count * 2 * numbers * self.itemsize)


def layer_operations(layer: Layer, form: str, first: bool, shape: Shape) -> Iterator[Operation]:
    """Every operation of a layer in one meta-step of a chunk.

    Args:
        form: "shared", "primal", "dual", or "dual:k".
        first: whether the layer is the first that moves: nothing flows below it on the support set.
    """
    t, s, q, steps = shape.tasks, shape.shots, shape.queries, shape.steps
    i, o = layer.in_features, layer.out_features
    mm, elementwise = shape.product, shape.elementwise
    dual = _dual_steps(form, steps)

    yield elementwise(t * s * o, count=2 * steps)
    yield elementwise(t * q * o, count=2)
    yield mm(1, o, t * q, i, passes=2)
    if form == "shared":
        yield from _shared_passes(layer, shape, s, count=steps)
        yield from _shared_passes(layer, shape, q)
        return
    if dual and first:
        yield mm(1, t * s, i, o)
        yield mm(t, s, i, s)
        yield mm(t, s, s, o, count=dual)
        yield elementwise(t * s * o, count=dual * (1 + shape.momentum))
    elif dual:
        yield from _dual_passes(layer, shape, s, 0.0)
        yield from _dual_passes(layer, shape, s, dual * s / 2, count=dual - 1)  # the mean of s, ..., (dual - 1) * s
        yield elementwise(t * s * i, count=dual)
        yield elementwise(t * s * o, count=dual)
    if fold_step(form):
        moving = shape.momentum and dual < steps
        yield mm(t, o, s if first else dual * s, i, count=2 if moving else 1)
    if form == "dual" and first:
        yield mm(1, t * q, i, o)
        yield mm(t, q, i, s)
        yield mm(t, q, s, o, passes=2)
    elif form == "dual":
        yield from _dual_passes(layer, shape, q, dual * s)
    else:
        yield from _primal_steps(layer, first, shape, dual)
        yield mm(t, q, i, o)
        yield mm(t, q, o, i)


def _dual_steps(form: str, steps: int) -> int:
    """How many inner steps a layer takes in the dual form."""
    return fold_step(form) or (steps if form == "dual" else 0)


def _shared_passes(layer: Layer, shape: Shape, rows: int, count: int = 1) -> Iterator[Operation]:
    """Forward and backward of `rows` samples a task through the shared weights."""
    yield shape.product(1, shape.tasks * rows, layer.in_features, layer.out_features, count=count)
    yield shape.product(1, shape.tasks * rows, layer.out_features, layer.in_features, count=count)


def _dual_passes(layer: Layer, shape: Shape, rows: int, past: float, count: int = 1) -> Iterator[Operation]:
    """Forward and backward of `rows` samples a task, corrected by a history of `past` samples."""
    t, i, o, mm = shape.tasks, layer.in_features, layer.out_features, shape.product
    yield from _shared_passes(layer, shape, rows, count)
    if past:
        yield mm(t, rows, i, past, count=count)
        yield mm(t, rows, past, o, passes=2, count=count)
        yield mm(t, rows, o, past, count=count)
        yield mm(t, rows, past, i, passes=2, count=count)
        if shape.momentum or shape.decay:
            yield shape.elementwise(t * rows * past, count=2 * count)


def _primal_steps(layer: Layer, first: bool, shape: Shape, start: int) -> Iterator[Operation]:
    """The inner steps from `start` on, each a pass and an update; step 0 reads the shared weights."""
    t, s, i, o, mm = shape.tasks, shape.shots, layer.in_features, layer.out_features, shape.product
    if start == 0:
        yield mm(1, t * s, i, o)
        yield mm(1, t * s, o, i, count=not first)
        yield mm(t, o, s, i)
    later = shape.steps - max(start, 1)
    yield mm(t, s, i, o, count=later)
    yield mm(t, s, o, i, count=later * (not first))
    yield mm(t, o, s, i, passes=2, count=later)
    yield shape.elementwise(t * s * o, count=(shape.steps - start) * 2 * layer.bias)
    if shape.momentum:
        yield shape.elementwise(t * i * o, count=(shape.steps - start) * (1 + shape.decay))


def layer_bytes(layer: Layer, form: str, first: bool, shape: Shape) -> float:
    """Bytes that a layer holds for a chunk between its inner steps and its outer gradient."""
    s, q = shape.shots, shape.queries
    i, o = layer.in_features, layer.out_features
    rows, dual = s + q, _dual_steps(form, shape.steps)
    held = rows * (i + 2 * o)  # inputs, what the activation keeps, gradients
    if form == "primal" or fold_step(form):
        held += o * (i + 1) * (2 if shape.momentum else 1)
    if dual and first:
        held += s * o * (2 + shape.momentum) + rows * s
    elif dual:
        held += dual * s * (i + o) + 2 * rows * dual * s
    return float(held * shape.tasks * shape.itemsize)


def state_bytes(layer: Layer, form: str, first: bool, shape: Shape) -> float:
    """Bytes of a chunk's adapted layer, as `adapt` and `predict` keep it."""
    i, o, s = layer.in_features, layer.out_features, shape.shots
    if form == "primal" or fold_step(form):
        held = o * (i + layer.bias)
    elif form == "dual" and first:
        held = s * (2 * o + s + i)
    elif form == "dual":
        held = shape.steps * s * (i + o)
    else:
        held = 0
    return float(held * shape.tasks * shape.itemsize)
