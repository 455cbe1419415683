"""What a benchmark starts has all cores, however the benchmark's own first thread is bound."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import cores
from bench.cores import own_cores

CORES = "import os; print(sorted(os.sched_getaffinity(0)))"


@pytest.mark.parametrize(
    ("listed", "name"),
    [
        ("processor\t: 0\nmodel name\t: X 9\ncpu family\t: 25\nmodel\t\t: 17\n\n", "X 9 (family 25, model 17)"),
        ("model name\t: X 9\n", "X 9"),
        ("CPU part\t: 0xd40\n", None),
    ],
)
def test_a_processor_has_the_name_that_the_system_lists(
    listed: str, name: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cores, "CPU_INFO", tmp_path / "cpuinfo")
    assert cores.processor() is None
    cores.CPU_INFO.write_text(listed)
    assert cores.processor() == name


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system binds no threads")
def test_processes_have_the_cores_that_this_one_was_started_with() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, [min(before)])
        with own_cores():
            found = subprocess.run([sys.executable, "-c", CORES], capture_output=True, text=True, check=True)
        assert os.sched_getaffinity(0) == {min(before)}
    finally:
        os.sched_setaffinity(0, before)
    assert found.stdout.strip() == str(sorted(os.sched_getaffinity(os.getppid())))
