"""Cores for the processes that a benchmark starts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


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
