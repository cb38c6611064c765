"""At which value of a setting one of two alternatives begins to beat the other: bisection on the model itself."""

from __future__ import annotations

from collections.abc import Callable

from attrs import frozen

from vtsim.base.errors import ConfigError

MOST_STEPS = 200  # more than halving a double can take


@frozen(kw_only=True)
class Crossover:
    """Between `low` and `high` the difference of a metric, A minus B, changes its sign.

    `tried` holds every value that the model was run at, with the difference there, in the order of trying.
    """

    low: float
    high: float
    low_difference: float
    high_difference: float
    tried: tuple[tuple[float, float], ...]

    @property
    def value(self) -> float:
        """Where a straight line between both ends is zero."""
        span = self.high_difference - self.low_difference
        return self.low if not span else self.low - self.low_difference * (self.high - self.low) / span


def crossover(
    difference: Callable[[float], float], low: float, high: float, *, tolerance: float, whole: bool = False
) -> Crossover:
    """Halve the interval until it is no wider than `tolerance`; with `whole`, values are integers and it is 1 or wider.

    Where the difference is zero, both ends are that value. Of several crossovers in the interval one
    is found. Raises `ConfigError` where the same alternative has less at both ends.
    """
    if low >= high:
        raise ConfigError(
            f"{low:g} to {high:g} is no interval", field="--between", help="the smaller value comes first"
        )
    tried: list[tuple[float, float]] = []

    def at(value: float) -> float:
        tried.append((value, difference(value)))
        return tried[-1][1]

    ends = [low, high]
    differences = [at(low), at(high)]
    if differences[0] * differences[1] > 0:
        less = "A" if differences[0] < 0 else "B"
        raise ConfigError(
            f"{less} has less at both ends: A minus B is {differences[0]:g} at {low:g}"
            f" and {differences[1]:g} at {high:g}",
            field="--between",
            help="widen the interval, if there is a crossover",
        )
    for _ in range(MOST_STEPS):
        if 0 in differences:
            zero = ends[differences.index(0)]
            ends, differences = [zero, zero], [0.0, 0.0]
            break
        middle = float((int(ends[0]) + int(ends[1])) // 2) if whole else (ends[0] + ends[1]) / 2
        if ends[1] - ends[0] <= max(tolerance, 1 if whole else 0) or middle in ends:
            break
        found = at(middle)
        side = 0 if found * differences[0] > 0 else 1
        ends[side], differences[side] = middle, found
    return Crossover(
        low=ends[0],
        high=ends[1],
        low_difference=differences[0],
        high_difference=differences[1],
        tried=tuple(tried),
    )
