"""What stands for many times: their median and quartiles, and the power law that a curve follows."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


def quartiles(seconds: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    if len(seconds) == 1:
        return {"median": seconds[0], "q1": seconds[0], "q3": seconds[0], "rounds": 1}
    q1, median, q3 = statistics.quantiles(seconds, n=4, method="inclusive")
    return {"median": median, "q1": q1, "q3": q3, "rounds": len(seconds)}


def ratio(of: float | None, to: float | None) -> str:
    """With one decimal, where there is one."""
    return "–" if of is None or to is None else f"{of / to:.1f}"


def power(xs: Sequence[float], ys: Sequence[float]) -> float | None:
    """The slope of least squares through log y over log x, on the upper half of the axis as it is drawn.

    None where fewer than three points of that half are positive: two are no fit.
    """
    middle = math.sqrt(min(xs) * max(xs)) if xs else math.inf
    # The middle point itself may fall on either side by rounding.
    upper = [(math.log(x), math.log(y)) for x, y in zip(xs, ys, strict=True) if x > 0.999 * middle and y > 0]
    if len(upper) < 3:
        return None
    return statistics.linear_regression(*zip(*upper, strict=True)).slope
