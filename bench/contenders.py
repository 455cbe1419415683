"""Who takes part in a benchmark on a CPU, and the race: everyone is checked first, then timed in turns.

A peer that is not installed, that raises or that finds another gradient is named with the reason, and never timed.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Protocol

from torch import nn

from fomaml_fused.tasks import TaskBatch

from . import jax_peer
from .library_peers import LIBRARIES, version_of
from .peers import PEERS, Result, Step, disagreement
from .workloads import Workload

WARM_UP = 0.02  # seconds of each contender in its turn, by whole steps
PATIENCE = 5.0  # a contender whose step takes longer is timed once
TOLERANCE = 1e-4  # float32 gradients of different orders of summation; what differs more is not the same step


class Contender(Protocol):
    """A meta-step that takes turns with others; version: of the library that it is written with, if not torch."""

    version: str | None

    def result(self) -> Result:
        """What one step finds."""

    def timed(self, warm_up: float) -> float:
        """Seconds of one step, after steps for `warm_up` seconds."""

    def close(self) -> None:
        """Free what it holds."""


@dataclass
class InProcess:
    """A contender that runs here."""

    step: Step
    version: str | None = None

    def result(self) -> Result:
        return self.step()

    def warm_up(self, for_seconds: float) -> None:
        end = time.perf_counter() + for_seconds
        while time.perf_counter() < end:
            self.step()

    def timed(self, warm_up: float) -> float:
        self.warm_up(warm_up)
        return seconds(self.step)

    def close(self) -> None:
        """Nothing: the step goes with this object."""


@dataclass(frozen=True)
class Peer:
    """How a contender is made, and why it cannot take part."""

    make: Callable[[Workload, nn.Module, TaskBatch], Contender]
    obstacle: Callable[[], str | None] = lambda: None


def in_process(adapter: Callable[[Workload, nn.Module, TaskBatch], Step], *, needs: str | None = None) -> Peer:
    """The peer of an adapter, which imports what it needs."""

    def obstacle() -> str | None:
        return None if needs is None or find_spec(needs) else f"{needs} is not installed"

    def make(workload: Workload, model: nn.Module, batch: TaskBatch) -> Contender:
        return InProcess(adapter(workload, model, batch), None if needs is None else version_of(needs))

    return Peer(make, obstacle)


ENTRANTS: dict[str, Peer] = {
    **{name: in_process(adapter) for name, adapter in PEERS.items()},
    **{name: in_process(adapter, needs=module) for name, (module, adapter) in LIBRARIES.items()},
    "jax jit(vmap(grad))": Peer(jax_peer.JaxProcess, jax_peer.process_obstacle),
}


@dataclass
class Race:
    """Contenders on one batch, which all have to find what is expected.

    Attributes:
        times: seconds of each that found it, one more with every turn.
        versions: of the libraries among them.
        failed: why others are not timed.
        skipped: why others cannot take part.
    """

    workload: Workload
    model: nn.Module
    batch: TaskBatch
    expected: Result
    times: dict[str, list[float]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    _running: dict[str, Contender] = field(default_factory=dict)

    def enter(self, name: str, peer: Peer) -> None:
        """Check a contender and take its time once; it takes turns from then on, unless its step takes long."""
        obstacle = peer.obstacle()
        if obstacle is not None:
            self.skipped[name] = obstacle
            return
        with self._reported(name):
            # Of the model a copy: what a peer does to it is not ours to suffer.
            contender = self._running[name] = peer.make(self.workload, copy.deepcopy(self.model), self.batch)
            error = disagreement(contender.result(), self.expected)
            if error > TOLERANCE:
                raise DisagreementError(f"its loss or gradient differs by {error:.1e} of ours")
            # The step before was the first, which loads libraries and compiles.
            self.times[name] = [contender.timed(0.0)]
            if contender.version is not None:
                self.versions[name] = contender.version
        if self.times.get(name, [0.0])[0] > PATIENCE:
            self._leave(name)

    def turns(self) -> Iterator[float]:
        """The seconds that a turn of each takes, warming up included."""
        for name in self._running:
            yield max(WARM_UP, self.times[name][0]) + self.times[name][0]

    def run(self) -> None:
        """Every contender's turn."""
        for name, contender in list(self._running.items()):
            with self._reported(name):
                self.times[name].append(contender.timed(WARM_UP))

    def close(self) -> None:
        for name in list(self._running):
            self._leave(name)

    @contextmanager
    def _reported(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.failed[name] = f"{type(error).__name__}: {str(error).strip() or 'no word'}".splitlines()[0]
            self.times.pop(name, None)
            self._leave(name)

    def _leave(self, name: str) -> None:
        contender = self._running.pop(name, None)
        if contender is not None:
            contender.close()


class DisagreementError(Exception):
    """A contender did not find what was expected."""


def seconds(step: Callable[[], object]) -> float:
    """What one step takes."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start
