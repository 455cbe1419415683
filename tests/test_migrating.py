"""What docs/migrating.md shows runs, and both loops of each pair leave the same gradients."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from .cases import relative_error

PAGE = (Path(__file__).parent.parent / "docs" / "migrating.md").read_text()
LIBRARIES = ("learn2learn", "higher", "torchopt")


def blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


OPENING, *SECTIONS = re.split(r"^## ", PAGE, flags=re.MULTILINE)
(START,) = blocks(OPENING)
PAIRS = {title: found for title, found in ((s.splitlines()[0], blocks(s)) for s in SECTIONS) if title != "State dicts"}


@pytest.fixture(autouse=True)
def _in_float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def run(*programs: str) -> dict[str, Any]:
    torch.manual_seed(3)
    space: dict[str, Any] = {}
    for program in programs:
        exec(compile(program, "docs/migrating.md", "exec"), space)
    return space


def gradients(space: dict[str, Any]) -> list[Tensor]:
    """Of the model, and of rates where there are any."""
    return [p.grad for p in (*space["model"].parameters(), *space.get("rates", ()))]


@pytest.mark.parametrize("title", PAIRS)
def test_both_loops_leave_the_same_gradients(title: str) -> None:
    theirs, ours = PAIRS[title]
    for library in re.findall(r"^import (\w+)", theirs, re.MULTILINE):
        pytest.importorskip(library)
    found, expected = gradients(run(START, ours)), gradients(run(START, theirs))
    assert len(found) == len(expected)
    assert all(e.abs().max() > 1e-6 for e in expected)
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b) < 1e-10


def test_every_library_has_its_pair() -> None:
    imported = re.findall(r"^import (\w+)", "\n".join(theirs for theirs, _ in PAIRS.values()), re.MULTILINE)
    assert set(imported) == set(LIBRARIES)
    assert {"torch.func", "A loop by hand"} < set(PAIRS)


def test_state_dicts_travel_as_shown() -> None:
    (section,) = (s for s in SECTIONS if s.startswith("State dicts"))
    space = run(START, *blocks(section))
    assert list(space["state"]) == [f"module.{name}" for name, _ in space["model"].named_parameters()]
