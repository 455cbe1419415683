"""What `torch.compile` leaves out of its graphs: functions that it does not trace, by the name of the reason why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def _run(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    return function(*arguments, **keywords)


# Each calls what it is given. It breaks a graph, and with fullgraph=True is an error that says why.
OUTSIDE: dict[str, Callable[..., Any]] = {
    name: torch.compiler.disable(_run, reason=f"fomaml_fused: {reason} run outside of graphs")
    for name, reason in {
        "reference": "the tasks of backend 'reference', one at a time by autograd,",
        "callable": "an outer_loss that is a callable, with step_weights or counts of samples or steps,",
        "objects": "adapt(), what it returns, losses() and grad_and_value()",
    }.items()
}
