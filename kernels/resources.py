"""What the kernels need of a device, known before they are compiled: registers and shared memory.

An estimate from padded sizes, fitted to what ptxas (CUDA 12.9, sm_80 and sm_90) made of some hundred networks. It errs
by some tens of registers: what is said to fit may spill as many, what is said not to would spill in its inner loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from .configuration import Config, DualConfig, PrimalConfig
from .spec import DualSpec, PrimalSpec, Spec, contracted, features, full, gathers, padded

REGISTERS = 255  # a thread, on NVIDIA and AMD alike as far as the kernel goes


@dataclass(frozen=True)
class Need:
    """Registers of a thread; bytes of shared memory of a program."""

    registers: int
    shared: int


def weight_tiles(widths: Sequence[int]) -> list[int]:
    """Numbers in the tile of each weight that a matrix product takes; a vector's are beneath notice."""
    sides = [padded(width) for width in widths]
    return [a * b for a, b in pairwise(sides) if a > 1 and b > 1]


def resident_need(spec: Spec, config: Config) -> Need:
    """What the resident kernel needs for a network and its tiles."""
    threads = 32 * config.warps
    tiles = weight_tiles(spec.widths)
    activations = spec.samples * sum(padded(width) for width in spec.widths)
    # Beside the weights stand copies of them as operands; tf32x3 has two, a high and a low part. Where warps are more
    # than the four of a group, each group holds all of an operand.
    by_precision = {"bf16": (1.0, 8), "fp16": (1.0, 8), "tf32": (2.0, 8)}
    copies, per_layer = by_precision.get(spec.precision, (3.0, 28))
    copies *= 1.5 if config.warps > 4 else 1.0
    # A velocity stands beside them too, and so do the sums of a step that walks over samples, a gradient that is
    # gathered, both moments of Adam; and beside all of these the outer gradient, where every step has its part in it.
    copies += spec.momentum + max(full(spec), gathers(spec)) + 1.5 * spec.adam + spec.multi_step
    copies += spec.learns * (1 + spec.multi_step)
    if spec.multi_step and spec.one_query_tile:
        activations += spec.samples * (padded(spec.widths[0]) + padded(spec.widths[-1])) // 2
    registers = 64 + (int(copies * sum(tiles)) + 2 * activations) // threads + per_layer * len(tiles)
    staged = max(tiles, default=0) * (2 if spec.precision == "tf32x3" else 1)
    return Need(registers, 4 * (sum(tiles) + staged) + 12 * activations)


def dual_need(spec: DualSpec, config: DualConfig, layered: bool) -> Need:
    """What the dual kernels need for a network and their tiles; the larger of inner loop and query pass.

    layered: whether each launch is of one layer; all of them in one hold more at a time.
    """
    samples = max(spec.support, config.samples)
    block = max(features(spec, width) for width in spec.widths)
    depth = max(contracted(spec, width) for width in spec.widths)
    # The loss takes all outputs of a tile of samples at once.
    registers = 64 + 4 * padded(spec.widths[-1]) * samples // (32 * config.warps)
    # What is fetched ahead, and history on its way into operands; more for conversions, and for operands in two parts.
    numbers = config.stages * depth * (max(block, spec.history) + samples) + spec.history * (block + samples)
    return Need(registers, (5 if layered else 7) * numbers)


def primal_need(spec: PrimalSpec, config: PrimalConfig, chained: bool) -> Need:
    """What the primal kernels need for a network and their tiles.

    chained: whether a program takes its samples through all layers; else each launch is of one layer.
    """
    threads = 32 * config.warps
    operand = {"bf16": 2, "fp16": 2, "tf32": 4}.get(spec.precision, 8)
    block = max(features(spec, width) for width in spec.widths)
    depth = max(contracted(spec, width) for width in spec.widths)
    # Tiles of a product on their way, fetched ahead; and the sums of a tile.
    shared = operand * config.stages * depth * (block + max(block, config.samples))
    registers = 64 + block * max(block, config.samples) // threads
    # The loss takes all outputs of a tile of samples at once.
    registers = max(registers, 64 + 4 * padded(spec.widths[-1]) * config.samples // threads)
    if chained:
        # All that a derivative is taken from, what enters and leaves a layer, and a tile of its weight as an operand,
        # in one part or two; twice where warps are more than the four of a group, each of which holds it all.
        sides = [padded(width) for width in spec.widths]
        held = config.samples * (sum(sides[1:]) + 2 * max(sides)) // threads
        tile = min(64, max(sides)) ** 2 // threads * {8: 3}.get(operand, 1) * (2 if config.warps > 4 else 1)
        registers = max(registers, 24 + held + tile)
        shared = max(shared, operand * (64 * 64 + config.samples * max(sides)))
    return Need(registers, shared)
