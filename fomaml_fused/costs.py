"""The cost model: what a layer's form does, operation by operation, and how long a device takes for it.

A model orders alternatives; it does not predict seconds. Times are sums over operations of launch, matrices, arithmetic
and memory traffic, which fits small batched products better than their maximum does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Operation:
    """One torch op: how many matrices, its flops, and the bytes it reads and writes."""

    matrices: int
    flops: float
    bytes: float

    def seconds(self, device: Device, working_set: float) -> float:
        traffic = self.bytes / device.bandwidth(working_set)
        return device.launch + self.matrices * device.matrix + self.flops / device.flops + traffic


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

    def product(self, matrices: int, m: int, k: int, n: int, passes: int = 1) -> Operation:
        """`matrices` products [m, k] x [k, n]; `passes` over the result, 2 where it is added to."""
        traffic = matrices * self.itemsize * (m * k + k * n + passes * m * n)
        return Operation(matrices if matrices > 1 else 0, 2.0 * matrices * m * k * n, traffic)

    def elementwise(self, numbers: int) -> Operation:
        """An op that reads and writes `numbers` numbers."""
        return Operation(0, numbers, 2 * numbers * self.itemsize)


# A layer's pass over one tile of samples, forward or backward, in a program of its own: a chain of a product, a barrier
# and an activation. And how many programs run at a time. Assumptions, not measurements.
RESIDENT_PASS = 0.5e-6
RESIDENT_PROGRAMS = 264


def resident_seconds(tasks: int, passes: int, flops: float, device: Device) -> float:
    """Seconds of a meta-step of the resident kernel: two launches, and the chain of each program's tasks.

    Args:
        passes: of a task, layers times tiles of samples, each of them forward and backward.
    """
    waves = -(-tasks // RESIDENT_PROGRAMS)
    return 2 * device.launch + waves * 2 * passes * RESIDENT_PASS + flops / device.flops


def layer_operations(layer: Layer, form: str, first: bool, shape: Shape) -> Iterator[Operation]:
    """Every operation of a layer in one meta-step of a chunk.

    Args:
        form: "shared", "primal" or "dual".
        first: whether the layer is the first that moves: nothing flows below it on the support set.
    """
    t, s, q, steps = shape.tasks, shape.shots, shape.queries, shape.steps
    i, o = layer.in_features, layer.out_features
    mm, elementwise = shape.product, shape.elementwise

    for _ in range(steps):
        yield from [elementwise(t * s * o)] * 2
    if form == "primal":
        yield mm(1, t * s, i, o)
        for k in range(steps):
            if k > 0:
                yield mm(t, s, i, o)
            if not first:
                yield mm(t, s, o, i) if k > 0 else mm(1, t * s, o, i)
            yield mm(t, o, s, i, passes=1 if k == 0 else 2)
            yield from [elementwise(t * s * o)] * (2 * layer.bias)
            if shape.momentum:
                yield from [elementwise(t * i * o)] * (1 + shape.decay)
        yield mm(t, q, i, o)
        yield mm(t, q, o, i)
    elif form == "dual" and first:
        yield mm(1, t * s, i, o)
        yield mm(t, s, i, s)
        for _ in range(steps):
            yield mm(t, s, s, o)
            yield from [elementwise(t * s * o)] * (1 + shape.momentum)
        yield mm(1, t * q, i, o)
        yield mm(t, q, i, s)
        yield mm(t, q, s, o, passes=2)
    elif form == "dual":
        for k in range(steps + 1):
            rows, past = (s if k < steps else q), k * s
            yield mm(1, t * rows, i, o)
            yield mm(1, t * rows, o, i)
            if past:
                yield mm(t, rows, i, past)
                yield mm(t, rows, past, o, passes=2)
                yield mm(t, rows, o, past)
                yield mm(t, rows, past, i, passes=2)
                if shape.momentum or shape.decay:
                    yield from [elementwise(t * rows * past)] * 2
            if k < steps:
                yield elementwise(t * s * i)
                yield elementwise(t * s * o)
    else:
        for k in range(steps + 1):
            rows = s if k < steps else q
            yield mm(1, t * rows, i, o)
            yield mm(1, t * rows, o, i)
    yield from [elementwise(t * q * o)] * 2
    yield mm(1, o, t * q, i, passes=2)


def layer_bytes(layer: Layer, form: str, first: bool, shape: Shape) -> float:
    """Bytes that a layer holds for a chunk between its inner steps and its outer gradient."""
    s, q = shape.shots, shape.queries
    i, o = layer.in_features, layer.out_features
    rows = s + q
    held = rows * (i + 2 * o)  # inputs, what the activation keeps, gradients
    if form == "primal":
        held += o * (i + 1) * (2 if shape.momentum else 1)
    elif form == "dual" and first:
        held += s * o * (2 + shape.momentum) + rows * s
    elif form == "dual":
        held += shape.steps * s * (i + o) + 2 * rows * shape.steps * s
    return float(held * shape.tasks * shape.itemsize)


def state_bytes(layer: Layer, form: str, first: bool, shape: Shape) -> float:
    """Bytes of a chunk's adapted layer, as `adapt` and `predict` keep it."""
    i, o, s = layer.in_features, layer.out_features, shape.shots
    if form == "primal":
        held = o * (i + layer.bias)
    elif form == "dual" and first:
        held = s * (2 * o + s + i)
    elif form == "dual":
        held = shape.steps * s * (i + o)
    else:
        held = 0
    return float(held * shape.tasks * shape.itemsize)
