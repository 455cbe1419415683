"""Warps and tiles of a kernel by device and size, from the tables in `configs/`; needs no Triton.

A table lists rules; the first whose bound is not exceeded applies: by the largest weight tile of a network, by the
samples in a tile of history, or by the widest layer and what operands are. What `fomaml_fused.tune` measures in a
process comes before the tables.
"""

from __future__ import annotations

import json
from collections.abc import Hashable
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any


@dataclass(frozen=True, order=True)
class Config:
    """How a kernel is laid out.

    Attributes:
        warps: of a program, a power of two.
        samples: columns of a tile of samples, a power of two, at least 16.
    """

    warps: int
    samples: int


@dataclass(frozen=True, order=True)
class TiledConfig(Config):
    """How kernels are laid out that take a layer by tiles; powers of two, and all but `stages` at least 16.

    Attributes:
        features: of a layer's output that are computed at a time.
        contracted: features, or samples of an outer gradient, contracted at a time.
        stages: tiles that are fetched ahead.
    """

    features: int = 64
    contracted: int = 32
    stages: int = 2


@dataclass(frozen=True, order=True)
class DualConfig(TiledConfig):
    """How the dual kernels are laid out.

    Attributes:
        tasks: of a pack; any number.
    """

    tasks: int = 1


@dataclass(frozen=True, order=True)
class PrimalConfig(TiledConfig):
    """How the primal kernels are laid out."""


def configuration(device: str, kernel: str, largest_weight: int) -> Config | None:
    """The configuration of a kernel on a device; None where no rule takes a weight tile of that many numbers.

    device: as "cuda-90" or "hip-gfx942".
    """
    for rule in _table(device)[kernel]:
        if largest_weight <= rule["weights"]:
            return Config(rule["warps"], rule["samples"])
    return None


def dual_configuration(device: str, tasks: int, samples: int, history: int) -> DualConfig | None:
    """The configuration of the dual kernels on a device; None where no rule takes that much history.

    tasks: of a pack.  samples: of a tile of them in the query pass.  history: of a tile of it.
    """
    for rule in _table(device)["dual"]:
        if history <= rule["history"]:
            return DualConfig(rule["warps"], samples, rule["features"], rule["contracted"], rule["stages"], tasks)
    return None


def primal_configuration(device: str, engine: str, precision: str, widest: int) -> PrimalConfig | None:
    """The configuration of the primal kernels on a device; None where no rule takes a layer that wide.

    engine: "primal", a layer a launch; or "chained", all layers.  widest: features of the widest layer, padded.
    """
    # Products of whole float32 numbers need as many registers as those of their two parts.
    operands = {"bf16": "16 bits", "fp16": "16 bits", "tf32": "32 bits"}.get(precision, "two parts")
    for rule in _table(device)[engine]:
        if operands == rule["operands"] and widest <= rule["width"]:
            return PrimalConfig(rule["warps"], rule["samples"], rule["features"], rule["contracted"], rule["stages"])
    return None


def remembered(device: str, kernel: str, problem: Hashable) -> Config | None:
    """What `remember` was told last, in this process."""
    return _tuned.get((device, kernel, problem))


def remember(device: str, kernel: str, problem: Hashable, config: Config) -> None:
    """Have `remembered` give this configuration of a kernel for a problem."""
    _tuned[device, kernel, problem] = config


_tuned: dict[tuple[str, str, Hashable], Config] = {}


@cache
def _table(device: str) -> Any:
    """Rules by kernel: the device's own, else those of its backend, else the default ones."""
    folder = resources.files(__package__) / "configs"
    found: dict[str, Any] = {}
    for name in ("default", device.partition("-")[0], device):
        file = folder / f"{name}.json"
        found |= json.loads(file.read_text()) if file.is_file() else {}
    return found
