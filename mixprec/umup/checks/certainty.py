"""How certain a measured slope is, and what follows: ok, not ok, or uncertain.

A size is measured at several widths, and for several seeds at each. The slope is that of least
squares through the logarithms of all of them, and its standard error is the usual one,

    s / sqrt(sum (x - mean x)^2),    s^2 = sum of squared residuals / (points - 2)

(Draper and Smith, Applied Regression Analysis, section 1.4). Divided by it the slope's error has
Student's distribution with points - 2 degrees of freedom, so a few points make a wide interval.

    NOT ok      the interval that a hundred checks of right models would leave once lies outside
    ok          the slope is within its tolerance, and known to 95 % as closely as that
    uncertain   anything else: more seeds make the interval narrower
"""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["fit", "quantile"]


def fit(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float]:
    """Slope of least squares and its standard error, infinite for two points.

    >>> slope, error = fit([0.0, 1.0, 2.0], [0.0, 1.0, 3.0])
    >>> round(slope, 3), round(error, 3)
    (1.5, 0.289)
    """
    x0, y0 = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((x - x0) ** 2 for x in xs)
    slope = sum((x - x0) * (y - y0) for x, y in zip(xs, ys, strict=True)) / spread
    if len(xs) < 3:
        return slope, math.inf
    left = sum((y - y0 - slope * (x - x0)) ** 2 for x, y in zip(xs, ys, strict=True))
    return slope, math.sqrt(left / (len(xs) - 2) / spread)


def quantile(outside: float, freedom: int) -> float:
    """The t that Student's t exceeds, in either direction, with probability `outside`.

    >>> round(quantile(0.05, 10), 3), round(quantile(0.01, 1), 2)
    (2.228, 63.66)
    """
    if freedom < 1:
        return math.inf
    low, high = 0.0, 1.0
    while _outside(high, freedom) > outside:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _outside(middle, freedom) > outside else (low, middle)
    return high


def _outside(t: float, freedom: int) -> float:
    """Probability of a magnitude above t: Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(freedom))
    cosine = math.cos(angle)
    odd = freedom % 2
    term, total = (cosine if odd else 1.0), 0.0
    for k in range(1 + odd, freedom, 2):
        total += term
        term *= cosine * cosine * k / (k + 1)
    if odd:
        return 1 - 2 / math.pi * (angle + math.sin(angle) * total)
    return 1 - math.sin(angle) * total
