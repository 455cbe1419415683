"""One point of a curve of `bench.scale`, in a process of its own: the memory of its first step, then times in turns.

The process is forked from one that has imported everything and computed nothing, so it starts at once, its threads and
its memory are its own, and what the first step takes above model and data is seen by the system's high-water mark.
"""

from __future__ import annotations

import resource
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import torch

import fomaml_fused as ff

from .contenders import InProcess
from .cores import own_cores
from .peers import Step, vmap_grad
from .regret import Case
from .workloads import Workload

START = 120.0  # seconds that a process has before the first word


@dataclass(frozen=True)
class Curve:
    """A contender: ours in the planner's forms or with every layer in one, or a peer.

    Attributes:
        form: of every layer; None for the planner's choice.
        peer: vmap(grad), in place of ours.
    """

    form: str | None = None
    peer: bool = False

    def told(self, workload: Workload) -> dict[str, Any]:
        """For `override`."""
        return {} if self.form is None else {"forms": (self.form,) * (len(workload.widths) - 1)}

    def plan(self, workload: Workload) -> ff.Plan:
        """Of ours; a peer's work is that of all layers primal."""
        told = replace(self, form="primal") if self.peer else self
        return Case(workload, 0.0).plan(**told.told(workload))

    def memory(self, workload: Workload) -> float:
        """Bytes that a step takes at most, with its data: by the plan, or for a peer by its formula."""
        w, plan = workload, self.plan(workload)
        data = 4.0 * w.tasks * (w.shots + w.queries) * (w.widths[0] + 1)
        if not self.peer:
            return data + plan.memory
        # Five times every task's weights, as measured (gradients, products with the rate, both steps' weights), and of
        # each activation four copies.
        weights = 5 * 4.0 * w.tasks * sum((before + 1) * after for before, after in pairwise(w.widths))
        return data + weights + 4 * 4.0 * w.tasks * max(w.shots, w.queries) * sum(w.widths)

    def step(self, workload: Workload) -> Step:
        if self.peer:
            return vmap_grad(workload, workload.model(), workload.batch())
        step = Case(workload, 0.0).step()
        told = self.told(workload)

        def forced() -> Any:
            with ff.override(**told) if told else nullcontext():
                return step()

        return forced


def high_water() -> int:
    """Bytes of memory that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def serve(pipe: Connection, curve: Curve, base: Workload, workload: Workload, threads: int) -> None:
    """Tell the bytes and seconds of a first step, then for each number that comes the seconds of a step.

    The number is how many seconds of steps come before, 0.0 for none. An error is told as text, and ends this.
    """
    try:
        torch.set_num_threads(threads)
        # Threads and the libraries' buffers are not the step's.
        curve.step(replace(base, tasks=1))()
        step = curve.step(workload)
        before, start = high_water(), time.perf_counter()
        step()
        pipe.send((high_water() - before, time.perf_counter() - start))
        timed = InProcess(step).timed
        while True:
            pipe.send(timed(pipe.recv()))
    except EOFError:
        return
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}".splitlines()[0])


class Point:
    """The process of a curve's point.

    Attributes:
        peak_bytes: what its first step took above model and data.
        first: seconds of that step.
    """

    def __init__(self, curve: Curve, base: Workload, workload: Workload) -> None:
        """Raises: RuntimeError: the step raised, or the process ended."""
        context = get_context("forkserver")
        context.set_forkserver_preload([__name__])
        self._pipe, theirs = context.Pipe()
        told = (theirs, curve, base, workload, torch.get_num_threads())
        self._process = context.Process(target=partial(serve, *told), daemon=True)
        with own_cores():
            self._process.start()
        theirs.close()
        try:
            self.peak_bytes, self.first = self._answer()
        except RuntimeError:
            self.close()
            raise

    def timed(self, warm_up: float) -> float:
        """Seconds of a step, after steps for `warm_up` seconds."""
        self._pipe.send(warm_up)
        found: float = self._answer()
        return found

    def close(self) -> None:
        self._pipe.close()
        self._process.join(START)
        self._process.close()

    def _answer(self) -> Any:
        try:
            if not self._pipe.poll(START):
                self._process.kill()
                raise RuntimeError(f"no answer within {START:g} s")
            answer = self._pipe.recv()
        except (EOFError, ConnectionError):
            self._process.join(START)
            raise RuntimeError(f"its process ended with status {self._process.exitcode}") from None
        if isinstance(answer, str):
            raise RuntimeError(answer)
        return answer
