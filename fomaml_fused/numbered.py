"""Modules by numbers of their own, by which the ops of a graph find them."""

from __future__ import annotations

from itertools import count
from typing import Any
from weakref import WeakValueDictionary

_modules: WeakValueDictionary[int, Any] = WeakValueDictionary()
_numbers = count()


def number_of(module: Any) -> int:
    """A number for a module, under which it is found as long as it lives."""
    number = next(_numbers)
    _modules[number] = module
    return number


def module_of(number: int) -> Any:
    """The module with a number."""
    return _modules[number]
