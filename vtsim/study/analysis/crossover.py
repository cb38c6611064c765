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
    difference: Callable[[float], float],
    low: float,
    high: float,
    *,
    tolerance: float,
    step: float = 0.0,
    text: Callable[[float], str] = "{:g}".format,
) -> Crossover:
    """Halve the interval until it is no wider than `tolerance`; with `step`, only `low` plus multiples of it are tried.

    Where the difference is zero, both ends are that value. Of several crossovers in the interval one is found. `text`
    writes values in messages. Raises `ConfigError` where the same alternative has less at both ends.
    """
    if low >= high or step > high - low:
        raise ConfigError(
            f"{text(low)} to {text(high)} is no interval" + (f" of steps of {text(step)}" if step else ""),
            field="--between",
            help="the smaller value comes first",
        )
    tried: list[tuple[float, float]] = []

    def at(value: float) -> float:
        tried.append((value, difference(value)))
        return tried[-1][1]

    ends = [low, low + (high - low) // step * step if step else high]
    differences = [at(end) for end in ends]
    if differences == [0, 0]:
        raise ConfigError(
            f"A and B are the same at both ends, {text(ends[0])} and {text(ends[1])}",
            field="--a, --b",
            help="give them settings that differ, and a metric that these change",
        )
    if differences[0] * differences[1] > 0:
        less = "A" if differences[0] < 0 else "B"
        raise ConfigError(
            f"{less} has less at both ends: A minus B is {differences[0]:g} at {text(ends[0])}"
            f" and {differences[1]:g} at {text(ends[1])}",
            field="--between",
            help="widen the interval, if there is a crossover",
        )
    for _ in range(MOST_STEPS):
        if 0 in differences:
            zero = ends[differences.index(0)]
            ends, differences = [zero, zero], [0.0, 0.0]
            break
        half = (ends[1] - ends[0]) / 2
        middle = ends[0] + (half // step * step if step else half)
        if ends[1] - ends[0] <= max(tolerance, step) or middle in ends:
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
