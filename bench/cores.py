"""The processor of a benchmark, and cores for the processes that it starts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CPU_INFO = Path("/proc/cpuinfo")


def processor() -> str | None:
    """What the processor is called, as the system lists it; None where it does not.

    Family and model tell apart what a virtual machine gives one name.
    """
    try:
        pairs = (line.split(":", 1) for line in CPU_INFO.read_text().splitlines() if ":" in line)
    except OSError:
        return None
    listed = {key.strip(): value.strip() for key, value in pairs}
    if "model name" not in listed:
        return None
    numbers = [f"{key.removeprefix('cpu ')} {listed[key]}" for key in ("cpu family", "model") if key in listed]
    return f"{listed['model name']} ({', '.join(numbers)})" if numbers else listed["model name"]


@contextmanager
def own_cores() -> Iterator[None]:
    """Processes that start within may use the cores that this one was started with.

    Under `OMP_PROC_BIND` a process's first thread is bound to one core as soon as torch is there. What it starts would
    inherit that core alone, and all its threads with it.
    """
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    bound = os.sched_getaffinity(0)
    os.sched_setaffinity(0, os.sched_getaffinity(os.getppid()))
    try:
        yield
    finally:
        os.sched_setaffinity(0, bound)
