"""Plain-text tables and numbers with SI prefixes, for what the package prints."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines, each column as wide as its widest cell."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def after_steps(steps: Iterable[int]) -> list[str]:
    """What stands above columns of so many inner steps: "0 steps", "1 step", "2 steps"."""
    return [f"{k} step" + "s" * (k != 1) for k in steps]


def scaled(value: float, unit: str) -> str:
    """A value in a unit with three digits and an SI prefix: 0.00123, "s" -> "1.23 ms"."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""), (1e-3, "m"), (1e-6, "µ")):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"
