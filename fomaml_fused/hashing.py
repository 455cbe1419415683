"""Frozen values that are looked up at every call."""

from __future__ import annotations

from typing import Any, TypeVar

T = TypeVar("T")


def hashed_once(cls: type[T]) -> type[T]:
    """Have a frozen dataclass keep its hash: that of a problem or a plan walks some hundred numbers.

    It is not pickled, for another process hashes strings differently.
    """
    compute: Any = cls.__hash__

    def hash_once(self: Any) -> int:
        found: int | None = self.__dict__.get("_hash")
        if found is None:
            found = compute(self)
            self.__dict__["_hash"] = found
        return found

    def state(self: Any) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_hash"}

    cls.__hash__ = hash_once  # type: ignore[method-assign]
    cls.__getstate__ = state  # type: ignore[method-assign]
    return cls
