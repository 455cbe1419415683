"""The GPU suite on a CPU: its dry run goes all the way, and says at every turn that it measured nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from bench import gpu, jax_peer
from bench.gpu_clock import errors, worst
from bench.gpu_timing import DRY, JAX, Job, Row, exact, in_float64
from bench.peers import oracle, ours
from bench.workloads import WORKLOADS, Workload

ROOT = Path(__file__).parent.parent


def run_suite(*arguments: str, **changed: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench.gpu", *arguments]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **changed}, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Row, str, str]:
    """What the dry run wrote, as JSON and as Markdown, and what it printed."""
    out = tmp_path_factory.mktemp("results")
    # More than it needs, for what else this machine is busy with must not decide what is skipped.
    done = run_suite("--dry-run", "--budget", "240", "--out", str(out))
    assert done.returncode == 0, done.stderr
    (results,), (text,) = out.glob("*.json"), out.glob("*.md")
    assert sorted(out.iterdir()) == sorted([results, text])
    return json.loads(results.read_text(), parse_constant=pytest.fail), text.read_text(), done.stdout


@pytest.mark.processes
def test_the_dry_run_goes_all_the_way(dry_run: tuple[Row, str, str]) -> None:
    results, _, _ = dry_run
    assert {"environment", "plans", "tests", "repeats", "speed", "notes"} <= set(results)
    assert {"torch", "triton", "python", "commit", "nvidia_smi", "nvidia_smi_after"} <= set(results["environment"])
    assert set(results["plans"]) == set(results["speed"]) == set(WORKLOADS)
    tests = results["tests"]
    assert (tests["passed"], tests["failed"], tests["without_result"], tests["exit_status"]) == (1, 0, 0, 0)
    assert set(results["repeats"]) == {n for n, p in results["plans"].items() if p["highest"]["engine"] != "batched"}
    for found in results["repeats"].values():
        assert found["highest"]["equal"] is True
        assert max(found["highest"]["loss_error"], found["highest"]["gradient_error"]) < 1e-5


@pytest.mark.processes
def test_the_dry_run_times_whoever_agrees_and_tells_why_others_are_not_there(dry_run: tuple[Row, str, str]) -> None:
    results, _, _ = dry_run
    for name, by_precision in results["speed"].items():
        contenders = by_precision["highest"]["contenders"]
        kernel = results["plans"][name]["highest"]["engine"] != "batched"
        timed = {"ours, torch", "eager loop", "vmap(grad)"} | ({"ours, highest"} if kernel else set())
        timed |= {contender for contender in contenders if contender.startswith("ours, highest, ")}
        assert {contender for contender, row in contenders.items() if "wall_s" in row} == timed
        assert all(contenders[contender]["error"] < 1e-4 for contender in timed)
        for contender in set(contenders) - timed:
            assert contenders[contender]["skipped"]
        for peer in ("compile(vmap(grad))", "compile(vmap(grad)), CUDA graphs", "jax jit(vmap(grad))"):
            assert peer in contenders
    assert set(results["speed"]["sine"]) == {"highest", "high"}


@pytest.mark.processes
def test_nothing_in_a_dry_run_claims_to_be_a_measurement(dry_run: tuple[Row, str, str]) -> None:
    results, text, printed = dry_run
    assert results["dry_run"] is True
    assert results["what"].startswith("DRY RUN")
    assert text.startswith("# DRY RUN")
    assert printed.strip() == text.strip()
    assert "dry run" in results["environment"]["device"]
    assert "dry run" in results["tests"]["what"]
    for by_precision in results["speed"].values():
        for result in by_precision.values():
            assert "dry run" in result["device"]
            for row in result["contenders"].values():
                assert "device_s" not in row
                assert row.get("peak_bytes") is None
    assert all("dry run" in row["device"] for found in results["repeats"].values() for row in found.values())


@pytest.mark.processes
def test_the_summary_names_every_workload(dry_run: tuple[Row, str, str]) -> None:
    _, text, _ = dry_run
    for name in WORKLOADS:
        assert f"| {name} | highest |" in text


@pytest.mark.processes
def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path: Path) -> None:
    # Not even interpreted kernels are measured.
    done = run_suite("--out", str(tmp_path / "results"), CUDA_VISIBLE_DEVICES="", TRITON_INTERPRET="1")
    assert done.returncode == 1
    assert "no GPU" in done.stderr
    assert not done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.processes
def test_kernel_tests_hand_no_cpu_tensors_to_a_gpu() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", *gpu.KERNEL_TESTS]
    command += ["-p", "tests.serves_cuda", "--kernels=driver", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTEST_ADDOPTS": ""}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:]
    assert "it moves to the GPU" in done.stdout


PROGRAM = """
import json, os, sys, time
order = json.loads(sys.argv[1])
def emit(**event):
    with open(order["events"], "a") as file:
        file.write(json.dumps(event) + "\\n")
for job in order["jobs"]:
    emit(doing="")
    for what in {work}[job["workload"]]:
        if what in job["avoid"]:
            continue
        emit(doing=what)
        if what.startswith("dies"):
            print("the last words"); sys.stdout.flush(); os._exit(7)
        if what.startswith("hangs"):
            time.sleep(60)
        if what.startswith("loses"):
            emit(lost="the device"); sys.exit(3)
        if what == {jax!r}:
            os._exit(9)
    emit(done={{"avoided": job["avoid"]}})
"""


def run_fake(work: dict[str, list[str]], seconds: float = 30.0) -> dict[str, Row]:
    found: dict[str, Row] = {}
    command = [sys.executable, "-c", PROGRAM.format(work=work, jax=JAX)]
    jobs = [Job("speed", name) for name in work]
    gpu.run_jobs(
        jobs, time.time() + seconds, True, lambda job, row: found.update({job.workload: row}), command, stuck=2.0
    )
    return found


@pytest.mark.processes
def test_what_kills_a_worker_costs_that_alone() -> None:
    found = run_fake({"a": ["fine"], "b": ["fine", "dies", "fine too", "loses it", "hangs"], "c": ["fine"]})
    assert found["a"] == found["c"] == {"avoided": {}}
    avoided = found["b"]["avoided"]
    assert set(avoided) == {"dies", "loses it", "hangs"}
    assert avoided["dies"] == "its process ended with status 7: the last words"
    assert avoided["loses it"] == "the device"
    assert avoided["hangs"].startswith("killed: no sign of life")


def test_jax_is_started_no_more_when_a_worker_died_of_it() -> None:
    found = run_fake({"a": [JAX], "b": [JAX], "c": ["fine"]})
    assert all(list(row["avoided"]) == [JAX] for row in found.values())


def test_jobs_that_no_worker_begins_fail_at_once() -> None:
    found: list[Row] = []
    command = [sys.executable, "-c", "raise SystemExit('no such thing')"]
    gpu.run_jobs([Job("probe"), Job("probe")], time.time() + 30, True, lambda _, row: found.append(row), command)
    assert [row["failed"] for row in found] == ["its process ended with status 1: no such thing"] * 2


@pytest.mark.processes
def test_a_job_past_its_deadline_is_ended_and_the_others_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "GRACE", 0.0)
    found = run_fake({"a": ["hangs"], "b": ["fine"]}, seconds=1.0)
    assert found == {"a": {"skipped": "no time was left for it"}, "b": {"skipped": "no time was left for it"}}


ALONE = """
collected 3 items

tests/test_resident.py::test_a PASSED                              [ 33%]
tests/test_resident.py::test_b[{'x': 1} - y] FAILED                [ 66%]
tests/test_resident.py::test_c SKIPPED (no reason)                 [100%]

=========================== short test summary info ===========================
FAILED tests/test_resident.py::test_b[{'x': 1} - y] - AssertionError: 1 is not 2
"""

SHARED = """
4 workers [5 items]

[gw0] [ 20%] PASSED tests/test_resident.py::test_a
[gw1] [ 40%] FAILED tests/test_resident.py::test_b[x y]
[gw1] [ 60%] ERROR tests/test_resident.py::test_c
"""


def test_results_are_read_from_what_pytest_says() -> None:
    alone = gpu.read_tests(ALONE)
    assert [alone[n] for n in ("passed", "failed", "skipped", "without_result")] == [1, 1, 1, 0]
    assert alone["failures"] == {"tests/test_resident.py::test_b[{'x': 1} - y]": "AssertionError: 1 is not 2"}
    shared = gpu.read_tests(SHARED)
    assert [shared[n] for n in ("passed", "failed", "skipped", "without_result")] == [1, 2, 0, 2]
    assert shared["failures"] == dict.fromkeys(
        ("tests/test_resident.py::test_b[x y]", "tests/test_resident.py::test_c"), ""
    )
    some = gpu.read_tests("collected 60 items / 59 deselected / 1 selected\n")
    assert some["without_result"] == 1


def test_the_roofline_is_that_of_the_data_sheet() -> None:
    h100 = "NVIDIA H100 80GB HBM3"
    assert gpu.roofline(h100, "tf32", 494.7e9, 3.35e8, 2e-3) == pytest.approx(
        {"arithmetic": 0.5, "memory": 0.05, "fraction": 0.5}
    )
    found = gpu.roofline(h100, "bf16", 989e6, 3.35e9, 1e-3)
    assert found == pytest.approx({"arithmetic": 0.001, "memory": 1.0, "fraction": 1.0})
    assert gpu.roofline("a card of next year", "tf32", 1.0, 1.0, 1.0) is None
    workload = Workload("w", (3, 5, 2), "relu", 7, 4, 6, 3, "cross_entropy")
    parameters = 3 * 5 + 5 + 5 * 2 + 2
    assert gpu.primal_flops(workload) == 6 * 7 * (3 * 4 + 6) * parameters
    assert gpu.least_bytes(workload) == 7 * (4 + 6) * (3 * 4 + 8) + 2 * 4 * parameters


def made_up() -> Row:
    def timed(wall: float, device: float | None = None, fraction: float = 0.0) -> Row:
        row: Row = {"wall_s": {"median": wall}}
        if device is not None:
            row |= {"device_s": {"median": device}, "roofline": {"fraction": fraction}}
        return row

    contenders = {
        "ours, highest": timed(2e-3, 1e-3, 0.25),
        "ours, high": timed(1e-3, 4e-4, 0.5),
        "ours, medium": {"disagrees": "its relative error is 0.3, 0.02 is allowed"},
        "ours, torch": timed(5e-4, 8e-4, 0.3),
        "vmap(grad)": timed(9e-3),
        "compile(vmap(grad))": timed(7e-3, 3e-3, 0.1),
        "jax jit(vmap(grad))": timed(6e-3),
        "eager loop": {"skipped": "a step would take about 40 s, going by one of 8 tasks"},
    }
    return {
        "what": "made up",
        "environment": {"device": "a GPU", "torch": "2", "nvidia_smi": [{"driver_version": "580"}], "commit": "abc"},
        "tests": {
            "what": "compiled kernels",
            "passed": 57,
            "failed": 1,
            "skipped": 0,
            "without_result": 2,
            "timed_out": True,
            "took_s": 9.5,
            "failures": {"test_x": "AssertionError: no"},
        },
        "repeats": {
            "sine": {
                "highest": {"runs": 10, "equal": False, "loss_error": 1e-7, "gradient_error": "nan", "against": 8},
                "medium": {"failed": "RuntimeError: no"},
            }
        },
        "speed": {"sine": {"highest": {"contenders": contenders}}, "crowd": {"highest": {"failed": "out of memory"}}},
    }


def test_the_summary_shows_times_ratios_and_what_went_wrong() -> None:
    text = gpu.summary(made_up())
    assert "a GPU, torch 2, driver 580, commit abc" in text
    assert "57 passed, 1 failed, 0 skipped, 2 without a result, cut short; 9.5 s" in text
    assert "* failed: `test_x` AssertionError: no" in text
    assert "| sine | highest | 10 | **NO** | 1e-07 | nan | 8 |" in text
    # The ratios are with the kernel in the peers' precision, though others of ours are faster.
    times = "2 ms | 1 ms | - | 500 µs | jax jit(vmap(grad)) | 6 ms | 3.00 | 1 ms | 3 ms | 3.00 | 25.0%"
    assert f"| sine | highest | {times} |" in text
    assert "| crowd | highest | - |" in text
    assert "* timing on crowd: failed: out of memory" in text
    assert "* eager loop on sine: a step would take about 40 s" in text
    assert "* ours, medium on sine: disagrees: its relative error is 0.3" in text
    assert "* repeated runs, medium on sine: failed: RuntimeError: no" in text


def test_a_nan_is_no_agreement() -> None:
    right = torch.tensor(1.0), {"w": torch.ones(2)}
    assert errors((torch.tensor(1.1), {"w": torch.ones(2)}), right) == pytest.approx((0.1, 0.0))
    wrong = torch.tensor(1.0), {"w": torch.tensor([1.0, nan])}
    assert not worst(errors(wrong, right)) < inf


def test_many_tasks_are_compared_with_what_agrees_with_the_oracle() -> None:
    workload = Workload("w", (3, 5, 2), "tanh", 70, 4, 6, 3, "cross_entropy")
    model, batch = workload.model(), workload.batch()
    found, how = exact(workload, model, batch)
    assert "on the first 8 tasks" in how
    assert worst(errors(found, oracle(workload, *in_float64(model, batch)))) < 1e-10
    assert worst(errors(ours(workload, model, batch, backend="torch")(), found)) < 1e-5


@pytest.mark.parametrize("name", ["sine K=5", "crowd", "wide", "rl", "meta_siren"])
def test_the_peer_in_jax_takes_our_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    pytest.importorskip("jax")
    workload = DRY.workload(name)
    model, batch = workload.model(), workload.batch()
    step, as_torch = jax_peer.jit_vmap_grad(workload, model, batch, precision="highest")
    found: Any = as_torch(step())
    assert worst(errors(found, oracle(workload, *in_float64(model, batch)))) < 1e-5
    assert "its backend is 'cpu'" in str(jax_peer.obstacle())


def test_jobs_travel_as_json() -> None:
    job = Job("speed", "sine", "high", {"ours, high": "it hung"})
    assert Job(**json.loads(json.dumps(asdict(job)))) == job
