"""The meta-step of the batched engine through `torch.compile`: one graph for each plan, static shapes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import count
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from ..batch import Query, Support
from . import FlatParameters, Outcome, Planned, batched

_COUNTER = count()
_TENSOR = "tensor"  # stands for one in a layout


def step(
    plan: Planned,
    needed: tuple[bool, ...],
    parameters: FlatParameters,
    support: Support,
    query: Query | None,
    share: float | Tensor,
) -> Outcome:
    """As `batched.step`; the first call of each plan, with each set of arguments that are left out, compiles it."""
    sets = [support.x, support.y, support.weight, *(() if query is None else (query.x, query.y, query.weight))]
    steps = () if query is None or query.step_weights is None else query.step_weights
    arguments = (share, *sets, *steps, *parameters)
    layout = tuple(_TENSOR if isinstance(a, Tensor) else a for a in arguments)
    run = _compiled(plan, needed, layout, len(sets), len(steps))
    found: Outcome = run(*[a for a in arguments if isinstance(a, Tensor)])
    return found


def annealed(query: Query) -> Query:
    """The query sets of a call, for `step`: numbers are compiled in, so weights that are annealed become tensors."""
    if query.step_weights is None:
        return query
    weights = tuple(w and torch.full((), w, device=query.x.device) for w in query.step_weights)
    return replace(query, step_weights=weights)  # type: ignore[arg-type]


@lru_cache(maxsize=64)
def _compiled(
    plan: Planned, needed: tuple[bool, ...], layout: tuple[Any, ...], sets: int, steps: int
) -> Callable[..., Any]:
    """`batched.step` as a compiled function of the tensors among its arguments.

    layout: what the arguments are that are no tensors.  sets: how many of them are the support and query sets.  steps:
        how many are the weights of steps.
    """
    # Dynamo tells that it traces through functions with a cache, which is what they are there for.
    warnings.filterwarnings("ignore", message=r"(?s).*functools\.lru_cache", module="torch")

    def run(*tensors: Any) -> Outcome:
        rest = iter(tensors)
        share, *others = [next(rest) if a is _TENSOR else a for a in layout]
        query = None
        if sets > 3:
            x, y, weight = others[3:sets]
            query = Query(x, y, weight, step_weights=tuple(others[sets : sets + steps]) if steps else None)
        return batched.step(plan, needed, others[sets + steps :], Support(*others[:3]), query, share)

    # Dynamo counts how often it compiles by code, and stops at eight; so every plan has code of its own.
    code = run.__code__.replace(co_name=f"step_{next(_COUNTER)}")
    own = FunctionType(code, run.__globals__, code.co_name, run.__defaults__, run.__closure__)
    return torch.compile(own, fullgraph=True, dynamic=False, options={"guard_filter_fn": _of_tensors})


def _of_tensors(guards: Sequence[Any]) -> list[bool]:
    """Which guards to check at every call: those of tensors and of torch's modes. All else is what was compiled for."""
    return [guard.guard_type in ("TENSOR_MATCH", "GLOBAL_STATE", "SHAPE_ENV") for guard in guards]
