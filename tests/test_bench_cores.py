"""What a benchmark starts has all cores, however the benchmark's own first thread is bound."""

import os
import subprocess
import sys

import pytest

from bench.cores import own_cores

CORES = "import os; print(sorted(os.sched_getaffinity(0)))"


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
