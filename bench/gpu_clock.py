"""Clocks of the GPU suite: wall time, device time by graph replay, memory; and what becomes of an error."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from typing import Any

import torch

from .peers import Result, Step


class DeviceLostError(Exception):
    """The device answers nothing any more in this process."""


def errors(actual: Result, expected: Result) -> tuple[float, float]:
    """The relative errors of the loss, and of the gradient as one vector."""
    loss = (actual[0].double() - expected[0]).abs() / expected[0].abs()
    a, b = (torch.cat([gradients[n].double().flatten() for n in expected[1]]) for gradients in (actual[1], expected[1]))
    return float(loss), float((a - b).norm() / b.norm())


def worst(found: tuple[float, float]) -> float:
    """The larger error; nan where one is, which `max` would lose."""
    return math.nan if any(math.isnan(error) for error in found) else max(found)


def capture(step: Step, device: torch.device, expected: Result, tolerance: float) -> torch.cuda.CUDAGraph:
    """The graph of a step, checked: a replay writes what the step gives.

    Raises:
        RuntimeError: it cannot be captured, or a replay gives something else.
    """
    # What a first call on a stream sets up, a workspace of cuBLAS for one, must be there before the capture.
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream(device).wait_stream(stream)
    torch.cuda.synchronize(device)
    # Autograd's nodes of earlier steps, where any is left in a cycle, would draw their own stream into the capture.
    gc.collect()
    graph = torch.cuda.CUDAGraph()
    # Threads of other libraries in this process may allocate meanwhile; that is no fault of the step.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        value, gradients = step()
    with torch.no_grad():
        for tensor in (value, *gradients.values()):
            tensor.fill_(math.nan)
    graph.replay()
    torch.cuda.synchronize(device)
    error = worst(errors((value, gradients), expected))
    if not error <= tolerance:
        raise RuntimeError(f"its replay has a relative error of {error:.2g}, {tolerance:g} is allowed")
    return graph


def replay_seconds(graph: torch.cuda.CUDAGraph, replays: int) -> float:
    """Device time of a replay, one of several between two events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / replays


def turn(step: Callable[[], Any], device: torch.device, warm_up: float) -> float:
    """The seconds of a step that has run for a while, as it would in its own training loop."""
    end = time.perf_counter() + warm_up
    while time.perf_counter() < end:
        step()
    return seconds(step, device)


def seconds(step: Callable[[], Any], device: torch.device) -> float:
    """Wall time of a step and of all that it put on the device."""
    synchronize(device)
    start = time.perf_counter()
    step()
    synchronize(device)
    return time.perf_counter() - start


def peak_bytes(step: Callable[[], Any], device: torch.device) -> int | None:
    """What a step allocates at its peak, beside what was there before it."""
    if device.type != "cuda":
        return None
    synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    synchronize(device)
    return int(torch.cuda.max_memory_allocated(device)) - before


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def told(error: Exception) -> str:
    """An error in a line or two."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"


def check_alive(device: torch.device) -> None:
    """Clear up after an error.

    Raises:
        DeviceLostError: it was of the kind after which a process gets no more from the device.
    """
    gc.collect()
    try:
        synchronize(device)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    except Exception as error:
        raise DeviceLostError(told(error)) from error
