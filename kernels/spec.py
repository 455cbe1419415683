"""What a kernel is compiled for: all of a problem that is no number at run time, and what follows from it."""

from __future__ import annotations

from dataclasses import dataclass

import triton

Function = tuple[str, tuple[float, ...]]  # an activation or a loss: its name and its parameters

PRECISIONS = ("ieee", "tf32x3", "tf32", "bf16", "fp16")


@dataclass(frozen=True)
class Spec:
    """A network, its inner loop and its tiles; a kernel takes it whole, as one compile-time value.

    Attributes:
        widths: features from the input to the output, [layers + 1].
        biases, activations, adapts: of each layer: whether it has a bias, what comes behind it, whether it moves.
        loss, outer_loss: on the support set and on the query set.
        momentum, decay: whether the inner loop has them; how much of them, it reads at run time, as all numbers.
        precision: of the operands of matrix products, one of `PRECISIONS`; they are summed in float32.
        samples: columns of a tile of samples, a power of two, at least 16.
        one_support_tile, one_query_tile: whether a task's samples fit one tile; else they are walked over.
        nesterov, adam, clips_value, clips_norm: whether the inner loop has them.
        decoupled: whether decay stays out of momentum and of Adam's moments.
        each_step: whether every step has support samples of its own.
        reptile: whether the outer gradient is the way that a task went; no query set.
        multi_step: whether the query loss after every step counts.
        skips: whether tasks that diverge are left out.
        learns: whether each layer has a rate that is learned, the same for all steps.
    """

    widths: tuple[int, ...]
    biases: tuple[bool, ...]
    activations: tuple[Function, ...]
    adapts: tuple[bool, ...]
    loss: Function
    outer_loss: Function
    momentum: bool = False
    decay: bool = False
    precision: str = "tf32x3"
    samples: int = 16
    one_support_tile: bool = True
    one_query_tile: bool = True
    nesterov: bool = False
    adam: bool = False
    clips_value: bool = False
    clips_norm: bool = False
    decoupled: bool = False
    each_step: bool = False
    reptile: bool = False
    multi_step: bool = False
    skips: bool = False
    learns: bool = False

    @property
    def parameters(self) -> int:
        """Number of scalar parameters."""
        return weight_offset(self, len(self.activations))


@dataclass(frozen=True)
class TiledSpec(Spec):
    """The same for kernels that take a layer by tiles of its features.

    Attributes:
        features: of a layer's output that are computed at a time; and of its input, contracted at a time.
        contracted: both powers of two, at least 16.
    """

    features: int = 64
    contracted: int = 32


@dataclass(frozen=True)
class PrimalSpec(TiledSpec):
    """A network and its inner loop in the primal form.

    Attributes:
        rates: where those of the inner loop come from: "fixed", or learned by "layer" or "element".
    """

    rates: str = "fixed"


@dataclass(frozen=True)
class DualSpec(TiledSpec):
    """A network and its inner loop in the dual form; `samples` of a tile may be those of several tasks.

    Attributes:
        tasks: of a pack, whose samples share tiles.
        support: samples of a tile that holds a pack's support set, a power of two, at least 16.
        history: the same for its samples at all inner steps.
        ragged: whether a task here is a pack of several of unequal sizes, and each sample says whose it is.
    """

    tasks: int = 1
    support: int = 16
    history: int = 16
    ragged: bool = False


# What kernels ask of a `Spec` while they compile; on the host these are ordinary functions.


@triton.constexpr_function
def depth(SPEC):
    return len(SPEC.activations)


@triton.constexpr_function
def samples(SPEC):
    return SPEC.samples


@triton.constexpr_function
def width(SPEC, i):
    return SPEC.widths[i]


@triton.constexpr_function
def padded(width):
    """The side of a tile for a width: 1 stays 1, for it needs no matrix unit; others are at least its depth."""
    return 1 if width == 1 else max(16, triton.next_power_of_2(width))


@triton.constexpr_function
def activation(SPEC, layer):
    return SPEC.activations[layer]


@triton.constexpr_function
def support_loss(SPEC):
    return SPEC.loss


@triton.constexpr_function
def query_loss(SPEC):
    return SPEC.outer_loss


@triton.constexpr_function
def walked(SPEC):
    """Whether a task's samples are more than a tile."""
    return not (SPEC.one_support_tile and SPEC.one_query_tile)


@triton.constexpr_function
def sixteen_bits(SPEC):
    return SPEC.precision in ("bf16", "fp16")


@triton.constexpr_function
def in_tf32(SPEC):
    """Whether operands are tf32, or split in two that are."""
    return SPEC.precision in ("tf32x3", "tf32")


@triton.constexpr_function
def in_parts(SPEC):
    """Whether operands are split in two, a high and a low part."""
    return SPEC.precision == "tf32x3"


@triton.constexpr_function
def full(SPEC):
    """Whether a step's sums stand beside the weights, or the outer gradient does during all steps."""
    return walked(SPEC) or SPEC.multi_step


@triton.constexpr_function
def tight(SPEC):
    """Whether registers run short in a step: where operands are split in two, or what it sums has tiles of its own."""
    return SPEC.precision in ("tf32x3", "ieee") or full(SPEC) or gathers(SPEC)


@triton.constexpr_function
def gathers(SPEC):
    """Whether a step's gradient is summed before it moves anything; else it is summed right into what it moves."""
    return SPEC.nesterov or SPEC.adam or SPEC.clips_value or SPEC.clips_norm or SPEC.learns


@triton.constexpr_function
def moves(SPEC, block):
    """Whether a tile moves in the inner loop, of a tuple of all weights and then all biases."""
    layer = block % len(SPEC.adapts)
    return SPEC.adapts[layer] and (block < len(SPEC.adapts) or SPEC.biases[layer])


@triton.constexpr_function
def adapted(SPEC):
    """Whether each layer moves in the inner loop."""
    return SPEC.adapts


@triton.constexpr_function
def first_adapted(SPEC):
    """The lowest layer that moves; the number of layers where none does."""
    return SPEC.adapts.index(True) if True in SPEC.adapts else len(SPEC.adapts)


@triton.constexpr_function
def collapses(SPEC, layer):
    """Whether a layer has the same input at every step, so that its history in the dual form is one matrix."""
    return not SPEC.each_step and first_adapted(SPEC) == layer


@triton.constexpr_function
def shares_tiles(SPEC):
    """Whether samples of several tasks lie in one tile."""
    return SPEC.tasks > 1 or SPEC.ragged


@triton.constexpr_function
def features(SPEC, width):
    """Of those that kernels of tiles compute, as many as they compute at a time."""
    return min(SPEC.features, max(16, padded(width)))


@triton.constexpr_function
def contracted(SPEC, width):
    """Of those that kernels of tiles contract, as many as they contract at a time."""
    return min(SPEC.contracted, max(16, padded(width)))


@triton.constexpr_function
def outer_tiles(SPEC, layer):
    """Tiles of the gradients of the layers before one."""
    tiles = 0
    for i in range(layer):
        before, after = SPEC.widths[i], SPEC.widths[i + 1]
        tiles += -(-before // features(SPEC, before)) * -(-after // features(SPEC, after))
    return tiles


@triton.constexpr_function
def every_layer(SPEC, WANTED):
    return (bool(WANTED),) * len(SPEC.activations)


@triton.constexpr_function
def lowest(MOVING, FEATURES):
    """The lowest layer that a backward pass reaches; the number of layers where it reaches none."""
    return 0 if FEATURES else MOVING.index(True) if True in MOVING else len(MOVING)


@triton.constexpr_function
def weight_offset(SPEC, layer):
    """Where a layer's weight starts when all parameters lie end to end: weight, bias, weight, bias, ...

    Each starts at a multiple of 16 bytes, so that rows can be moved by 16 bytes where their length allows it. The
    offset past the last layer is the length of all.
    """
    offset = 0
    for i in range(layer):
        offset += aligned(SPEC.widths[i] * SPEC.widths[i + 1]) + aligned(SPEC.widths[i + 1] * SPEC.biases[i])
    return offset


@triton.constexpr_function
def gradients_length(SPEC):
    """Numbers in the gradient of all parameters, and of the rates that are learned behind them."""
    return weight_offset(SPEC, len(SPEC.activations)) + (aligned(len(SPEC.activations)) if SPEC.learns else 0)


@triton.constexpr_function
def bias_offset(SPEC, layer):
    return weight_offset(SPEC, layer) + aligned(SPEC.widths[layer] * SPEC.widths[layer + 1])


@triton.constexpr_function
def aligned(numbers):
    return (numbers + 3) // 4 * 4
