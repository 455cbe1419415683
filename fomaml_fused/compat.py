"""State dicts under the names of other libraries, written and read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .module import FOMAML


def learn2learn_state_dict(meta: FOMAML) -> dict[str, Tensor]:
    """The state of `meta` under the names of learn2learn, as `meta.state_dict()` gives it under the plain model's::

        maml = l2l.algorithms.MAML(model, lr=0.01)
        maml.load_state_dict(ff.compat.learn2learn_state_dict(meta))

    learn2learn keeps the model as `module`. With `learn_lr="element"` the state is that of its `MetaSGD`, which keeps
    the rates as `lrs` in the order of the model's parameters. The inner rate of its `MAML` is no part of a state dict.

    Args:
        meta: with rates that are not learned, or as in `MetaSGD`.

    Returns:
        The same tensors as in `meta.state_dict()`, detached, in `meta`'s memory.

    Raises:
        TypeError: `meta` is no `FOMAML`.
        ValueError: it learns rates that learn2learn has no place for.
    """
    names = _learn2learn_names(meta)
    own = meta.state_dict()
    return {other: own[name] for name, other in names.items()}


def load_learn2learn_state_dict(meta: FOMAML, state: Mapping[str, Any]) -> None:
    """Copy into `meta` the state of a learn2learn `MAML`, or `MetaSGD`, around a model of the same layers::

        ff.compat.load_learn2learn_state_dict(meta, maml.state_dict())

    Args:
        meta: as `learn2learn_state_dict` takes it.
        state: tensors by name, of any dtype and device, of the shapes of `meta`'s.

    Raises:
        TypeError: `meta` is no `FOMAML`.
        ValueError: names that are missing, that `meta` has no place for, or whose tensor has another shape; the message
            names each, and nothing was copied. Or `meta` learns rates that learn2learn has no place for.
    """
    names = _learn2learn_names(meta)
    own = meta.state_dict()
    wrong = [f"it lacks {name}" for name in names.values() if name not in state]
    wrong += [f"it has {name}, which meta has no place for" for name in state if name not in names.values()]
    for name, other in names.items():
        value = state.get(other)
        if isinstance(value, Tensor) and value.shape != own[name].shape:
            wrong.append(f"its {other} is {list(value.shape)}, which takes {list(own[name].shape)}")
        elif other in state and not isinstance(value, Tensor):
            wrong.append(f"its {other} is {type(value).__name__}, which takes a tensor")
    if wrong:
        raise ValueError(f"state is not that of learn2learn around a model like meta's: {'; '.join(wrong)}")
    meta.load_state_dict({name: state[other] for name, other in names.items()})


def _learn2learn_names(meta: FOMAML) -> dict[str, str]:
    """What learn2learn calls each entry of `meta.state_dict()`."""
    if not isinstance(meta, FOMAML):
        raise TypeError(f"meta is {type(meta).__name__}; it takes a FOMAML, and state dicts of learn2learn come second")
    names = {name: f"module.{name}" for name in meta.model.state_dict()}
    learned = meta.problem.inner.learn_lr
    if learned is None:
        return names
    parameters = [name for name, _ in meta.model.named_parameters()]
    moving = meta.adapted_names()
    if learned != "element" or meta.inner_lr.positive is not None or len(moving) != len(parameters):
        raise ValueError(
            f"meta has learn_lr={learned!r}, positive_lr={meta.inner_lr.positive!r} and {len(moving)} of "
            f"{len(parameters)} parameters that move; learn2learn takes no learned rates, or as MetaSGD has them: "
            "learn_lr='element', positive_lr=None, adapt='all'"
        )
    return names | {f"inner_lr.values.{i}": f"lrs.{parameters.index(name)}" for i, name in enumerate(moving)}
