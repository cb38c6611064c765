"""What one setting changes, and what two change together that neither changes alone.

Every effect is a mean over the places of all other axes, so that each of them counts the same. The first value of an
axis in the design at which the metric has a figure (a native run has no slowdown) is what its other values are compared
with.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from math import sqrt
from statistics import fmean

from attrs import frozen

from vtsim.base.errors import ConfigError
from vtsim.study.analysis.cells import Cells, Place, cells, independent, is_drawn, levels, metric
from vtsim.study.sweep.intervals import t_quantile
from vtsim.study.sweep.table import StudyTable, Value

CONFIDENCE = 0.95


@frozen(kw_only=True)
class Effect:
    """How much a metric rises, in its unit, from the first values of one or two axes to others.

    For two axes, the interaction: what changing both brings beyond the sum of changing each. `half_width` of the
    confidence interval, None without replicates. `places` of the other axes are in the mean.
    """

    axes: tuple[str, ...]
    base: tuple[Value, ...]
    values: tuple[Value, ...]
    mean: float
    half_width: float | None
    places: int

    @property
    def clear(self) -> bool | None:
        """Is the interval on one side of zero? None without one."""
        return None if self.half_width is None else abs(self.mean) > self.half_width


def effects(table: StudyTable, path: str, confidence: float = CONFIDENCE) -> tuple[Effect, ...]:
    """Main effects of every axis, then interactions of every two, of the metric at `path`.

    The variance is pooled over all cells: t = effect / standard error has as many degrees of freedom as there are
    replicates beyond the first of each cell. What no place of the other axes allows to compare is left out;
    raises `ConfigError` if that is everything.
    """
    axes = independent(table)
    if not axes:
        raise ConfigError(
            "no axis of the study has two values, so nothing can be compared",
            help="give an axis several values, or choose fewer of them away by --where",
        )
    if is_drawn(table):
        raise ConfigError(
            "axes were drawn, so that points which differ in one axis alone are there by chance only",
            help="effects need axes of a few values; vtsim study sensitivity says what each drawn axis brings",
        )
    found = cells(table, metric(table, path), axes)
    half_widths = _Spread.of(found, confidence)
    names = [column.path for column in axes]
    out = []
    for count in (1, 2):
        for chosen in combinations(range(len(axes)), count):
            out += list(_of(table, found, half_widths, [names[at] for at in chosen], chosen))
    if not out:
        raise ConfigError(
            "no two points of the study differ in one axis alone",
            help="effects need a design of grids, in which axes change independently",
        )
    return tuple(out)


@frozen
class _Spread:
    """How far runs of one cell are from each other."""

    variance: float
    freedom: int
    confidence: float

    @classmethod
    def of(cls, found: Cells, confidence: float) -> _Spread:
        freedom = sum(len(values) - 1 for values in found.values())
        squares = sum(sum((value - fmean(values)) ** 2 for value in values) for values in found.values())
        return cls(squares / freedom if freedom else 0.0, freedom, confidence)

    def half_width(self, counts: Sequence[int], places: int) -> float | None:
        """Of a sum of cell means with weights ±1, divided by `places`."""
        if not self.freedom:
            return None
        error = sqrt(self.variance * sum(1 / count for count in counts)) / places
        return t_quantile(self.confidence, self.freedom) * error


def _of(
    table: StudyTable, found: Cells, spread: _Spread, names: Sequence[str], chosen: tuple[int, ...]
) -> Iterator[Effect]:
    """The effects of one or two axes, for each of their values with a figure but the first."""
    figured = [{place[at] for place in found} for at in chosen]
    choices = [
        tuple(value for value in levels(table, name) if value in has) for name, has in zip(names, figured, strict=True)
    ]
    base = tuple(values[0] for values in choices)
    others = list(dict.fromkeys(_without(place, chosen) for place in found))
    for values in _products([each[1:] for each in choices]):
        corners = list(_corners(base, values))
        total, counts, places = 0.0, [], 0
        for other in others:
            here = [(sign, found.get(_with(other, chosen, corner))) for corner, sign in corners]
            if all(runs for _, runs in here):
                places += 1
                total += sum(sign * fmean(runs) for sign, runs in here if runs)
                counts += [len(runs) for _, runs in here if runs]
        if not places:
            continue
        yield Effect(
            axes=tuple(names),
            base=base,
            values=values,
            mean=total / places,
            half_width=spread.half_width(counts, places),
            places=places,
        )


def _products(choices: Sequence[tuple[Value, ...]]) -> list[tuple[Value, ...]]:
    found: list[tuple[Value, ...]] = [()]
    for values in choices:
        found = [(*before, value) for before in found for value in values]
    return found


def _corners(base: tuple[Value, ...], values: tuple[Value, ...]) -> Iterator[tuple[tuple[Value, ...], int]]:
    """Every mixture of base and changed values, with the sign that it has in the difference (of differences)."""
    for mask in range(1 << len(base)):
        changed = [mask >> at & 1 for at in range(len(base))]
        mixed = tuple(v if c else b for b, v, c in zip(base, values, changed, strict=True))
        yield mixed, (-1) ** (len(base) - sum(changed))


def _without(place: Place, chosen: tuple[int, ...]) -> Place:
    return tuple(value for at, value in enumerate(place) if at not in chosen)


def _with(other: Place, chosen: tuple[int, ...], values: Place) -> Place:
    """A whole place from values of the chosen axes (in their order) and of the others."""
    rest, given = iter(other), dict(zip(chosen, values, strict=True))
    return tuple(given[at] if at in given else next(rest) for at in range(len(other) + len(chosen)))
