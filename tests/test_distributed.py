"""Several processes: gradients of halves are those of the whole, and a run that is shared is the run alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from fomaml_fused.train import sine
from fomaml_fused.train.files import load_checkpoint
from fomaml_fused.train.loop import InterruptedRunError
from fomaml_fused.train.ranks import Ranks

from .cases import Case, relative_error

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch has no gloo"),
]

CASE = Case(widths=(3, 17, 5), tasks=4, learn_lr="layer")
RUN = sine.SineConfig(iterations=6, tasks=5, steps=2, eval_tasks=3)
RUNS = {
    "plain": RUN,
    "annealed, learned": replace(RUN, step_weights="annealed", learn_lr="layer_step"),
    "reptile": replace(RUN, outer="reptile"),
    "skips": replace(RUN, nonfinite="skip", lr=1e15),
    "more processes than tasks": replace(RUN, tasks=1, iterations=2),
}


def train(config: sine.SineConfig, path: Path, *, resume: bool = False, interrupt: bool = False) -> None:
    """The meta-training of a run; interrupt: the last process alone is told to stop in its third iteration."""
    _, outer = sine.prepare(config)
    if resume:
        outer.resume(path)
    draw = outer.loss

    def interrupted() -> Tensor:
        if outer.iteration == 2 and outer.ranks.rank == outer.ranks.world - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return draw()

    if not interrupt:
        outer.run(config.iterations, path, title=None)
        return
    outer.loss = interrupted
    with pytest.raises(InterruptedRunError):
        outer.run(config.iterations, path, title=None)
    assert outer.iteration == 3


def work(rank: int, folder: Path) -> None:
    """What each of two processes does."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    ranks = Ranks.current()
    meta, batch = CASE.meta(CASE.model(torch.float64), "torch"), CASE.batch(torch.float64)
    own = {name: value.detach()[ranks.share(CASE.tasks)] for name, value in batch.items()}
    parallel = DistributedDataParallel(meta)
    parallel(**own).backward()
    torch.save([p.grad for p in meta.parameters()], folder / f"gradients.{rank}")
    del parallel  # which, as the last to hold the group, would wait for it with Python's lock in its hand
    for name, config in RUNS.items():
        train(config, folder / name)
    train(RUN, folder / "resumed", interrupt=True)
    dist.barrier()  # until the first has written
    train(RUN, folder / "resumed", resume=True)
    parameter = torch.zeros(2, requires_grad=True)
    found = []
    for weights in ((0.0, 3.0), (1.0, 3.0), (0.0, 0.0)):  # of which the first one's loss is nan
        parameter.grad = torch.full((2,), 4.0 * (weights[rank] > 0) * (1 + rank))
        loss = torch.tensor(8.0 * (1 + rank) if weights[rank] else torch.nan)
        value, counted = ranks.average([parameter], loss, weights[rank], 1.0 + rank)
        found.append((value.item(), parameter.grad[1].item(), counted))
    (folder / f"averages.{rank}").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that two processes have worked in."""
    folder = tmp_path_factory.mktemp("two")
    processes = spawn(work, (folder,), nprocs=2, join=False)
    end = time.monotonic() + 240.0
    while not processes.join(timeout=10.0):
        if time.monotonic() > end:
            for process in processes.processes:
                process.kill()
            pytest.fail("the processes wait for each other")
    return folder


def test_gradients_of_halves_are_those_of_the_whole(two: Path) -> None:
    meta, batch = CASE.meta(CASE.model(torch.float64), "torch"), CASE.batch(torch.float64)
    meta(**batch).backward()
    for rank in (0, 1):
        for p, found in zip(meta.parameters(), torch.load(two / f"gradients.{rank}"), strict=True):
            assert p.grad is not None
            assert relative_error(found, p.grad) < 1e-12


@pytest.mark.parametrize("name", RUNS)
def test_a_shared_run_is_the_run_alone(name: str, two: Path, tmp_path: Path) -> None:
    train(RUNS[name], tmp_path / "alone")
    found, alone = load_checkpoint(two / name), load_checkpoint(tmp_path / "alone")
    assert found["pending"] == pytest.approx(alone["pending"], rel=1e-4, nan_ok=True)
    for key, value in alone["model"].items():
        assert relative_error(found["model"][key], value) < 1e-4
    assert {key: found[key] for key in ("config", "iteration", "skipped")} == {
        key: alone[key] for key in ("config", "iteration", "skipped")
    }
    assert torch.equal(found["generators"][0], alone["generators"][0])
    assert (alone["skipped"] > 0) == (name == "skips")


def test_all_stop_when_one_is_told_to_and_go_on_to_the_same_bits(two: Path) -> None:
    whole, resumed = load_checkpoint(two / "plain"), load_checkpoint(two / "resumed")
    assert resumed["iteration"] == RUN.iterations
    assert resumed["pending"] == whole["pending"]
    assert all(torch.equal(resumed["model"][name], value) for name, value in whole["model"].items())


def test_means_are_over_what_each_process_had(two: Path) -> None:
    first, second = (json.loads((two / f"averages.{rank}").read_text()) for rank in (0, 1))
    one, both, none = first
    assert one == [16.0, 8.0, 3.0]
    assert both == [14.0, 7.0, 3.0]
    assert none[1:] == [0.0, 3.0]
    assert none[0] != none[0]
    assert second[:2] == first[:2]


def test_a_run_under_torchrun_leaves_the_files_of_one(tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = ["--iterations", "100", "--joint-iterations", "1", "--eval-tasks", "5", "--out", str(tmp_path)]
    command = [*launcher, "-m", "fomaml_fused.cli", "train", "sine", *options]
    environment: dict[str, Any] = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("mean squared error on 5 held-out sinusoids") == 1
    assert done.stderr.count("100/100") >= 1
    assert {path.name for path in tmp_path.iterdir()} == {
        *("checkpoint.pt", "learning_curve.png", "adapted.png", "results.json"),
    }
    _, outer = sine.prepare(sine.SineConfig(iterations=100, joint_iterations=1, eval_tasks=5))
    outer.run(100, None, title=None)
    assert json.loads((tmp_path / "results.json").read_text())["curve"] == pytest.approx(outer.curve, rel=1e-4)
