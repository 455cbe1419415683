"""The workloads that every benchmark, report and test of them draws on."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fomaml_fused as ff
from fomaml_fused.tasks import TaskBatch

ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "tanh": nn.Tanh}


@dataclass(frozen=True)
class Workload:
    """A network, the sizes of a batch of tasks, and an inner loop."""

    name: str
    widths: tuple[int, ...]
    activation: str
    tasks: int
    shots: int
    queries: int
    steps: int
    loss: str
    lr: float = 0.01

    def __str__(self) -> str:
        return self.name

    def model(self, seed: int = 0) -> nn.Sequential:
        """The network, freshly drawn."""
        torch.manual_seed(seed)
        if self.activation == "sine":
            return ff.siren(self.widths[0], self.widths[1], self.widths[-1], hidden_layers=len(self.widths) - 3)
        layers: list[nn.Module] = []
        for before, after in pairwise(self.widths):
            layers += [nn.Linear(before, after), ACTIVATIONS[self.activation]()]
        return nn.Sequential(*layers[:-1])

    def batch(self, tasks: int | None = None, seed: int = 1) -> TaskBatch:
        """Random tasks; the numbers do not matter for the time they take."""
        generator = torch.Generator().manual_seed(seed)
        t = self.tasks if tasks is None else tasks

        def part(samples: int) -> tuple[Tensor, Tensor]:
            x = torch.randn(t, samples, self.widths[0], generator=generator)
            if self.loss == "cross_entropy":
                return x, torch.randint(self.widths[-1], (t, samples), generator=generator)
            return x, torch.randn(t, samples, self.widths[-1], generator=generator)

        return TaskBatch(*part(self.shots), *part(self.queries))

    def sample_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of one task, as a peer's user writes it."""
        if self.loss == "cross_entropy":
            return F.cross_entropy(outputs, targets)
        return F.mse_loss(outputs, targets)


_OMNIGLOT = (784, 256, 128, 64, 64, 5)

WORKLOADS = {
    w.name: w
    for w in (
        Workload("sine", (1, 40, 40, 1), "relu", 25, 10, 10, 1, "mse"),
        Workload("sine K=5", (1, 40, 40, 1), "relu", 25, 10, 10, 5, "mse"),
        Workload("rl", (20, 100, 100, 6), "tanh", 40, 200, 200, 1, "cross_entropy"),
        Workload("omniglot", _OMNIGLOT, "relu", 32, 5, 5, 5, "cross_entropy"),
        Workload("omniglot K=1", _OMNIGLOT, "relu", 32, 5, 5, 1, "cross_entropy"),
        Workload("omniglot Q=75", _OMNIGLOT, "relu", 32, 5, 75, 5, "cross_entropy"),
        Workload("wide", (512, 1024, 1024, 1024, 10), "gelu", 32, 10, 10, 5, "cross_entropy"),
        Workload("meta_siren", (2, 128, 128, 128, 128, 3), "sine", 32, 1024, 1024, 3, "mse", lr=1e-4),
        Workload("learnit", (2, 256, 256, 256, 256, 3), "sine", 4, 4096, 4096, 2, "mse", lr=1e-4),
        Workload("crowd", (64, 128, 64, 10), "relu", 10_000, 5, 5, 3, "cross_entropy"),
    )
}
# What `make bench` times.
TIMED = ("sine", "sine K=5", "rl", "omniglot", "wide", "meta_siren", "learnit", "crowd")
