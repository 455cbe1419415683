"""Places in Markdown pages that hold what a program printed, from `<!-- table: NAME -->` to `<!-- end of table -->`."""

from __future__ import annotations

import re

END = "<!-- end of table -->"


def start(name: str) -> str:
    """The line that a place begins with."""
    return f"<!-- table: {name} -->"


def places(page: str) -> list[str]:
    """The names of a page's places."""
    return re.findall(r"^<!-- table: (.+) -->$", page, re.M)


def put(page: str, name: str, text: str) -> str:
    """A page with a text in the place of that name, instead of what is there.

    Raises:
        ValueError: it has no such place, or the place has no end.
    """
    before, found, rest = page.partition(start(name))
    if not found:
        raise ValueError(f"the page has no line {start(name)}")
    _, ends, after = rest.partition(END)
    if not ends:
        raise ValueError(f"the page has no line {END} behind {start(name)}")
    return f"{before}{start(name)}\n\n{text}\n\n{END}{after}"
