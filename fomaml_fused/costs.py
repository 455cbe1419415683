"""The cost model: what a layer's form does, operation by operation, and how long a device takes for it.

A model orders alternatives; it does not predict seconds. Times are sums over operations of launch, matrices, arithmetic
and memory traffic, which fits small batched products better than their maximum does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from .engines import fold_step
from .engines.products import is_thin
from .problem import Layer


@dataclass(frozen=True)
class Device:
    """What the model knows of a device.

    Attributes:
        launch: seconds to start one torch op.
        matrix: seconds for each matrix of a batched product, beside its arithmetic and traffic.
        flops: floating-point operations a second in float32 matrix products.
        cached, streamed: bytes a second while the working set fits, and when it does not.
        cache: bytes that a layer may hold for that.
        turnover: bytes that a pass through all layers may hold for that; more is given back to the system after every
            pass, and comes again page by page.
        threads: that multiply a matrix each, where there are as many.
        fuses: whether products with a thin side are a part of what stands beside them, as `engines.products` has it.
    """

    name: str
    launch: float
    matrix: float
    flops: float
    cached: float
    streamed: float
    cache: int
    turnover: float
    threads: int
    fuses: bool = False

    def bandwidth(self, working_set: WorkingSet) -> float:
        fits = working_set.layer <= self.cache and working_set.of_pass <= self.turnover
        return self.cached if fits else self.streamed


# Fitted to whole meta-steps of the sweep of `bench.regret` on two cores of a Xeon with AVX-512 (torch 2.13.0): a launch
# is an op with the Python around it.
CPU = Device(
    "cpu",
    launch=8e-6,
    matrix=0.2e-6,
    flops=150e9,
    cached=60e9,
    streamed=14e9,
    cache=32 << 20,
    turnover=18 << 20,
    threads=2,
)
# Between products a compiler leaves little to start, and less Python around it.
COMPILED = replace(CPU, name="cpu, compiled", launch=3e-6, fuses=True)
# Fitted to whole meta-steps of the named workloads on the same cores, compiled by g++ 12. A launch is a loop over rows,
# a matrix a call with its padding, and the cache that a weight has to fit is one core's.
NATIVE = Device(
    "cpu, native",
    launch=0.2e-6,
    matrix=0.15e-6,
    flops=190e9,
    cached=100e9,
    streamed=12e9,
    cache=2 << 20,
    turnover=math.inf,
    threads=2,
)
# The H100's data sheet (SXM, float32 outside the tensor cores); launch and matrix are assumptions, not measurements.
# What a pass leaves there torch keeps for the next one.
GPU = Device(
    "gpu",
    launch=6e-6,
    matrix=0.01e-6,
    flops=60e12,
    cached=6e12,
    streamed=3e12,
    cache=40 << 20,
    turnover=math.inf,
    threads=1,
)


class WorkingSet(NamedTuple):
    """Bytes that the layer of an operation holds, and those that a pass through all layers does."""

    layer: float
    of_pass: float


class Operation(NamedTuple):
    """Torch ops: how many, and how many matrices, flops and bytes read and written they have together."""

    launches: int
    matrices: int
    flops: float
    bytes: float

    def seconds(self, device: Device, working_set: WorkingSet) -> float:
        traffic = self.bytes / device.bandwidth(working_set)
        return self.launches * device.launch + self.matrices * device.matrix + self.flops / device.flops + traffic


@dataclass(frozen=True)
class Shape:
    """The sizes of a chunk of tasks, and of the loop that runs over it.

    Attributes:
        momentum, decay: whether the loop has them.
        passes: of the query set.
        updates: of a step whose gradient is written before it is used, the operations on numbers as many as a weight's;
            0 where it is summed right into what it changes.
        copies: as large as a weight, of each task, beside that and a velocity: Adam's moments, what rates multiplied.
        fuses: as of the device.
    """

    tasks: int
    shots: int
    queries: int
    steps: int
    itemsize: int
    momentum: bool
    decay: bool
    passes: int = 1
    updates: int = 0
    copies: int = 0
    fuses: bool = False

    def product(self, matrices: int, m: int, k: float, n: float, passes: int = 1, count: int = 1) -> Operation:
        """`matrices` products [m, k] x [k, n], `count` times; `passes` over the result, 2 where it is added to."""
        traffic = matrices * self.itemsize * (m * k + k * n + passes * m * n)
        fused = self.fuses and is_thin(m, k, n)
        separate = matrices if matrices > 1 and not fused else 0
        return Operation(0 if fused else count, count * separate, count * 2.0 * matrices * m * k * n, count * traffic)

    def elementwise(self, numbers: float, passes: int = 2, count: int = 1) -> Operation:
        """`count` ops with a result of `numbers` numbers, with `passes` over that many, reading and writing."""
        return Operation(count, 0, count * numbers, count * passes * numbers * self.itemsize)


def layer_operations(layer: Layer, form: str, first: bool, lowest: bool, shape: Shape) -> Iterator[Operation]:
    """Every operation of a layer in one meta-step of a chunk.

    Args:
        form: "shared", "primal", "dual", or "dual:k".
        first: whether nothing flows below the layer on the support set, as nothing there moves.
        lowest: whether nothing flows below it on the query set either, where features ask for no gradient.
    """
    t, s, q, steps = shape.tasks, shape.shots, shape.queries, shape.steps
    i, o = layer.in_features, layer.out_features
    fold, mm = fold_step(form), shape.product

    norm = 0 if layer.norm is None else 14  # operations of a normalisation and of its derivative
    yield shape.elementwise(t * s * o, count=(2 + norm) * steps)  # the activation and its derivative
    yield shape.elementwise(t * q * o, count=(2 + norm + layer.bias) * shape.passes)  # and the bias's outer gradient
    yield mm(1, o, t * q, i, passes=2, count=shape.passes)
    if form == "shared":
        yield from _shared_passes(layer, shape, s, not first, count=steps)
        yield from _shared_passes(layer, shape, q, not lowest, count=shape.passes)
    elif form == "primal":
        yield from _primal_steps(layer, first, shape, 0)
        yield from _primal_passes(layer, shape, q, not lowest, count=shape.passes)
    else:
        yield from _dual_steps(layer, first, shape, fold or steps)
        if fold:
            rank, sums = s if first else fold * s, 2 if shape.momentum and fold < steps else 1
            yield mm(t, o, rank, i, passes=3, count=sums)
            yield shape.elementwise(t * rank * o, count=sums * (layer.bias + (shape.momentum or shape.decay)))
            yield shape.elementwise(t * o, count=sums * 2 * layer.bias)
            yield from _primal_steps(layer, first, shape, fold)
            yield from _primal_passes(layer, shape, q, not lowest, count=shape.passes)
        else:
            past = s if first else steps * s * (1.0 if shape.passes == 1 else 0.5)
            yield from _dual_passes(layer, shape, q, past, not lowest, count=shape.passes)


def _primal_steps(layer: Layer, first: bool, shape: Shape, start: int) -> Iterator[Operation]:
    """The inner steps from `start` on; step 0 reads the shared weights and writes each task its own."""
    t, s, i, o = shape.tasks, shape.shots, layer.in_features, layer.out_features
    steps, later = shape.steps - start, shape.steps - max(start, 1)
    if start == 0:
        yield from _shared_passes(layer, shape, s, not first)
        yield shape.product(t, o, s, i, passes=3)
    yield from _primal_passes(layer, shape, s, not first, count=later)
    yield shape.product(t, o, s, i, passes=2, count=later)
    if layer.bias:
        yield shape.elementwise(t * s * o, count=steps)
        yield shape.elementwise(t * o, count=steps * (3 if shape.momentum else 1))
    if shape.updates:
        yield shape.elementwise(t * i * o, passes=3, count=steps * shape.updates)
    elif shape.momentum:
        yield shape.elementwise(t * i * o, passes=3, count=steps * (1 + shape.decay))


def _dual_steps(layer: Layer, first: bool, shape: Shape, steps: int) -> Iterator[Operation]:
    """The first inner steps."""
    t, s, i, o = shape.tasks, shape.shots, layer.in_features, layer.out_features
    if first:
        yield from _shared_passes(layer, shape, s, False)
        yield shape.product(t, s, i, s)
        yield shape.product(t, s, s, o, passes=3, count=steps - 1)
        yield shape.elementwise(t * s * o, count=steps * (3 if shape.momentum or shape.decay else 1))
        return
    yield from _shared_passes(layer, shape, s, True)
    # The history at steps 1, 2, ... is s, 2 * s, ... rows; this is their mean.
    yield from _dual_passes(layer, shape, s, steps * s / 2, True, count=steps - 1)
    yield shape.elementwise(t * s * i, count=steps)
    yield shape.elementwise(t * s * o, count=2 * steps)


def _shared_passes(layer: Layer, shape: Shape, rows: int, backward: bool, count: int = 1) -> Iterator[Operation]:
    """`count` times forward, and backward or not, of `rows` samples a task through the shared weights."""
    yield shape.product(1, shape.tasks * rows, layer.in_features, layer.out_features, count=count)
    yield shape.product(1, shape.tasks * rows, layer.out_features, layer.in_features, count=count * backward)


def _primal_passes(layer: Layer, shape: Shape, rows: int, backward: bool, count: int = 1) -> Iterator[Operation]:
    """The same through each task's own weights."""
    t, i, o = shape.tasks, layer.in_features, layer.out_features
    yield shape.product(t, rows, i, o, passes=1 + 2 * layer.bias, count=count)
    yield shape.product(t, rows, o, i, count=count * backward)


def _dual_passes(
    layer: Layer, shape: Shape, rows: int, past: float, backward: bool, count: int = 1
) -> Iterator[Operation]:
    """The same through the shared weights, corrected by a history of `past` samples."""
    t, i, o, mm = shape.tasks, layer.in_features, layer.out_features, shape.product
    yield from _shared_passes(layer, shape, rows, backward, count)
    yield mm(t, rows, i, past, count=count)
    yield mm(t, rows, past, o, passes=2, count=count)
    yield mm(t, rows, o, past, count=count * backward)
    yield mm(t, rows, past, i, passes=2, count=count * backward)
    weighed = (1 + backward) * (shape.momentum or shape.decay)
    yield shape.elementwise(t * rows * past, count=count * (layer.bias + weighed))


def layer_bytes(layer: Layer, form: str, first: bool, shape: Shape) -> float:
    """Bytes that a layer holds for a chunk between its inner steps and its outer gradient."""
    s, q = shape.shots, shape.queries
    i, o = layer.in_features, layer.out_features
    rows, dual = s + q, fold_step(form) or (shape.steps if form == "dual" else 0)
    held = rows * (i + 2 * o)  # inputs, what the activation keeps, gradients
    if form == "primal" or fold_step(form):
        held += o * (i + 1) * (1 + shape.momentum + shape.copies + (3 if shape.updates else 0))
    if dual and first:
        held += s * o * (2 + shape.momentum) + rows * s
    elif dual:
        held += dual * s * (i + o) + 2 * rows * dual * s
    return float(held * shape.tasks * shape.itemsize)


def pass_bytes(layer: Layer, shape: Shape) -> float:
    """Bytes of a layer's part of a pass through the network: inputs, what the activation keeps, gradients."""
    numbers = max(shape.shots, shape.queries) * (layer.in_features + 2 * layer.out_features)
    return float(numbers * shape.tasks * shape.itemsize)


def state_bytes(layer: Layer, form: str, first: bool, shape: Shape) -> float:
    """Bytes of a chunk's adapted layer, as `adapt` and `predict` keep it."""
    i, o, s = layer.in_features, layer.out_features, shape.shots
    if form == "primal" or fold_step(form):
        held = o * (i + layer.bias) * (1 + shape.copies)
    elif form == "dual" and first:
        held = s * (2 * o + s + i)
    elif form == "dual":
        held = shape.steps * s * (i + o)
    else:
        held = 0
    return float(held * shape.tasks * shape.itemsize)
