"""The command line as it is typed: runs that write what they promise, resume exactly, and stop when asked."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from fomaml_fused.cli import main
from fomaml_fused.train.files import load_checkpoint, replacing

QUICK_SINE = ["train", "sine", "--iterations", "300", "--joint-iterations", "50", "--eval-tasks", "20"]
QUICK_DIGITS = ["train", "digits", "--iterations", "150", "--eval-tasks", "50"]


def start(*arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "fomaml_fused.cli", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.mark.parametrize("command", [QUICK_SINE, QUICK_DIGITS], ids=["sine", "digits"])
def test_a_run_learns_and_leaves_its_files(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "meta-trained" in printed
    assert "10 steps" in printed
    expected = {"checkpoint.pt", "learning_curve.png", "results.json"} | (
        {"adapted.png"} if "sine" in command else set()
    )
    assert {path.name for path in tmp_path.iterdir()} == expected
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in expected if name.endswith(".png"))
    results = json.loads((tmp_path / "results.json").read_text())
    if "digits" in command:
        accuracy = {name: by_steps["5"][0] for name, by_steps in results["accuracy"].items()}
        assert accuracy["meta-trained, lr 0.1"] > accuracy["not meta-trained, lr 0.1"] + 0.2
    else:
        assert results["curve"][-1] < results["curve"][0]


def states(folder: Path) -> dict[str, Any]:
    return load_checkpoint(folder / "checkpoint.pt")


@pytest.mark.processes
def test_an_interrupted_run_resumes_to_the_same_bits(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    long = ["train", "sine", "--iterations", "3000", "--joint-iterations", "1", "--eval-tasks", "5", "--out"]
    process = start(*long, str(parts))
    time.sleep(0.1)
    for _ in range(600):  # wait until it trains, as its first signal handler shows, then press Ctrl-C
        if process.poll() is None and "SigCgt" in (status := Path(f"/proc/{process.pid}/status").read_text()):
            caught = int(next(line for line in status.splitlines() if line.startswith("SigCgt")).split()[1], 16)
            if caught >> (signal.SIGTERM - 1) & 1:
                break
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "--resume" in error
    assert 0 < states(parts)["iteration"] < 3000
    assert main([*long, str(parts), "--resume"]) == 0
    assert main([*long, str(whole)]) == 0
    assert states(parts)["curve"] == states(whole)["curve"]
    for name, value in states(whole)["model"].items():
        assert torch.equal(states(parts)["model"][name], value)


def test_resuming_with_other_options_or_from_nothing_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*QUICK_SINE, "--out", str(tmp_path), "--resume"]) == 1
    assert f"no checkpoint at {tmp_path}" in capsys.readouterr().err
    assert main([*QUICK_SINE, "--out", str(tmp_path)]) == 0
    assert main([*QUICK_SINE, "--out", str(tmp_path), "--lr", "0.02", "--resume"]) == 1
    assert "lr is 0.02; the checkpoint" in capsys.readouterr().err


def test_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text("before")

    def fail() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_plan_explains_given_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "784-256-128-64-64-5", "--queries", "5", "--adapt", "head"]) == 0
    printed = capsys.readouterr().out
    assert "784-256-128-64-64-5 relu, cross_entropy, K=5, adapts 4" in printed
    assert "0: 784 -> 256  shared" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "3-4", "--tasks", "-5"], "tasks is -5; it takes a whole number, 0 or more"),
        (["plan", "3-4", "--device", "foo"], "device is 'foo'"),
        (["train", "sine", "--tasks", "0"], "tasks is 0; it takes at least 1"),
        (["train", "digits", "--iterations", "-1"], "iterations is -1; it takes at least 1"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("widths", ["784", "3-x", "3-0-2"])
def test_plan_refuses_what_is_no_network(widths: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", widths]) == 1
    assert f"widths is '{widths}'" in capsys.readouterr().err


def test_doctor_says_what_runs_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    for expected in (torch.__version__, "triton", "engine batched", "the fastest on a CPU", "threads", "native"):
        assert expected in printed


@pytest.mark.parametrize("package", ["tqdm", "skimage"])
def test_a_missing_package_of_the_demo_is_named(
    package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert main(QUICK_SINE) == 1
    assert f"training runs need {package}: pip install 'fomaml-fused[demo]'" in capsys.readouterr().err
