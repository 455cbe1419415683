"""Times one meta-step of each workload, ours and every peer's in turn, once all are known to agree with the oracle.

pytest-benchmark times ours; its set-up of each round runs and times the others, so that rounds are interleaved. In each
turn a step runs for a while untimed, as it would in its own training loop, and then once timed.
"""

from __future__ import annotations

import os
import platform
from contextlib import closing
from functools import partial
from typing import Any

import pytest
import torch

import fomaml_fused as ff

from .contenders import ENTRANTS, TOLERANCE, WARM_UP, InProcess, Race, in_process
from .cores import processor
from .peers import disagreement, oracle, ours, ours_as_function
from .workloads import TIMED, WORKLOADS

SECONDS = 30.0  # for the rounds of a workload
# Of ours, beside the module as it comes: with `compile=True`, and without autograd as well.
VARIANTS = {"ours, compiled": ours, "ours, grad_and_value": ours_as_function}


@pytest.mark.parametrize("name", TIMED)
def test_meta_step(name: str, benchmark: Any) -> None:
    workload = WORKLOADS[name]
    model, batch = workload.model(), workload.batch()

    benchmark.group = name
    step = ours(workload, model, batch)
    few = workload.batch(tasks=min(workload.tasks, 8))
    error = disagreement(ours(workload, model, few)(), oracle(workload, model, few))
    if error > TOLERANCE:
        # One round, without which nothing is kept: the report is to know of it, and takes no time from it.
        benchmark.extra_info.update(incorrect=error, **environment())
        benchmark.pedantic(step, rounds=1)
        pytest.fail(f"our loss or gradient differs by {error:.1e} of the oracle's")

    with closing(Race(workload, model, batch, step())) as race:
        for peer, entrant in ENTRANTS.items():
            race.enter(peer, entrant)
        # Behind the peers, one of which forgets what was compiled before it.
        for other, adapter in VARIANTS.items():
            race.enter(other, in_process(partial(adapter, compile=True)))
        own = InProcess(step)
        took = own.timed(WARM_UP)
        a_round = sum(race.turns()) + max(WARM_UP, took) + took

        def run_others() -> None:
            race.run()
            own.warm_up(WARM_UP)

        rounds = max(5, min(200, int(SECONDS / a_round)))
        benchmark.extra_info.update(  # before the run: it is read then
            others=race.times,
            versions=race.versions,
            failed=race.failed,
            skipped=race.skipped,
            plan=str(ff.FOMAML(model, steps=workload.steps, loss=workload.loss).plan(workload.tasks, workload.shots)),
            **environment(),
        )
        benchmark.pedantic(step, setup=run_others, rounds=rounds)
        assert not {*VARIANTS} & {*race.failed}, race.failed


def environment() -> dict[str, str | int]:
    """Device and versions that a figure depends on."""
    capability = torch.backends.cpu.get_cpu_capability()
    return {
        "device": ", ".join(filter(None, ("CPU", processor(), f"{os.cpu_count()} cores", capability))),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "fomaml_fused": ff.__version__,
    }
