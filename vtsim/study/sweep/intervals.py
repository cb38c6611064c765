"""Confidence intervals of the mean of a few runs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import atan, cos, inf, pi, sin, sqrt
from statistics import fmean, stdev

STEPS = 200  # of bisection; more than a double can tell apart


def t_probability(t: float, freedom: int) -> float:
    """Return how likely |T| < t is, of Student's distribution with `freedom` degrees of freedom: its finite sums."""
    angle = atan(t / sqrt(freedom))
    term = cos(angle) if freedom % 2 else 1.0
    total = term if freedom > 1 or not freedom % 2 else 0.0
    for k in range(3 if freedom % 2 else 2, freedom, 2):
        term *= cos(angle) ** 2 * (k - 1) / k
        total += term
    return 2 / pi * (angle + sin(angle) * total) if freedom % 2 else sin(angle) * total


@cache
def t_quantile(confidence: float, freedom: int) -> float:
    """Return the t with P(|T| < t) = confidence."""
    low, high = 0.0, 1.0
    while t_probability(high, freedom) < confidence:
        low, high = high, high * 2
    for _ in range(STEPS):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if t_probability(middle, freedom) < confidence else (low, middle)
    return high


def half_width(values: Sequence[float], confidence: float) -> float:
    """Return half the width of the confidence interval of the mean; infinite for fewer than two values."""
    if len(values) < 2:
        return inf
    return t_quantile(confidence, len(values) - 1) * stdev(values) / sqrt(len(values))


def is_tight(values: Sequence[float], confidence: float, share: float) -> bool:
    """Is half the width of the interval at most this share of the mean?"""
    return half_width(values, confidence) <= share * abs(fmean(values)) if values else False
