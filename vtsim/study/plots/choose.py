"""Which picture a study wants: from how many numeric and named axes vary, and how often each point was run.

Knows nothing of how pictures are drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from math import prod
from statistics import fmean
from typing import Final

from attrs import frozen

from vtsim.base.errors import ConfigError
from vtsim.study.analysis.cells import Place, cells, independent, levels, metric
from vtsim.study.sweep.intervals import half_width
from vtsim.study.sweep.table import Column, StudyTable, Value

CONFIDENCE: Final = 0.95
PATTERN: Final = "*"  # of metrics; stands for any part of a path, dots included
MANY_REPLICATES: Final = 20
MOST_SERIES: Final = 8
SPARSE: Final = 0.25  # of all combinations: a design with fewer was drawn at random
LINES, HEAT, BARS, STACKS, CDF, SCATTER = KINDS = ("lines", "heat", "bars", "stacks", "cdf", "scatter")


@frozen(kw_only=True)
class Choice:
    """What is drawn: `x` and, in a heat map, `y` are axes; all other axes that vary make series.

    `kind` is one of KINDS. Several metrics of one unit are stacked.
    """

    kind: str
    table: StudyTable
    metrics: tuple[Column, ...]
    x: Column | None = None
    y: Column | None = None
    series: tuple[Column, ...] = ()


@frozen
class Point:
    """Mean of the replicates of a place; `half_width` of its confidence interval, None for one run."""

    mean: float
    half_width: float | None
    runs: tuple[float, ...]


def choose(table: StudyTable, metrics: Sequence[str], kind: str | None = None) -> Choice:
    """The picture that a table wants, or the one asked for as far as its axes allow it.

    A metric with `*` stands for all that it matches. Raises `ConfigError` for names that the study lacks, and
    for a picture that its axes do not make.
    """
    if kind is not None and kind not in KINDS:
        raise ConfigError.unknown("kind of plot", kind, KINDS, field="--kind")
    columns = expand(table, metrics)
    varying = list(independent(table))
    numeric = [column for column in varying if is_numeric(table, column)]
    named = [column for column in varying if column not in numeric]
    if len(columns) > 1:
        if kind not in (None, STACKS):
            raise ConfigError(f"several metrics are stacked, not drawn as {kind}", field="--kind")
        return Choice(kind=STACKS, table=table, metrics=columns, series=tuple(varying))
    wanted = kind or _natural(table, columns[0], numeric)
    by_count = sorted(numeric, key=lambda column: -len(levels(table, column.path)))
    if wanted == HEAT:
        if len(numeric) < 2:
            raise ConfigError("a heat map needs two numeric axes that vary", field="--kind", help=_axes(varying))
        x, y = sorted(by_count[:2], key=table.axes.index)
        return Choice(
            kind=HEAT, table=table, metrics=columns, x=x, y=y, series=tuple(c for c in varying if c not in (x, y))
        )
    if wanted == SCATTER and numeric:
        return Choice(kind=SCATTER, table=table, metrics=columns, x=numeric[0], series=tuple(named))
    if wanted in (LINES, SCATTER):
        if not numeric:
            raise ConfigError(f"{wanted} needs a numeric axis that varies", field="--kind", help=_axes(varying))
        return Choice(
            kind=LINES, table=table, metrics=columns, x=by_count[0],
            series=tuple(c for c in varying if c is not by_count[0]),
        )  # fmt: skip
    if wanted == CDF:
        return Choice(kind=CDF, table=table, metrics=columns, series=tuple(varying))
    if wanted == STACKS:
        return Choice(kind=STACKS, table=table, metrics=columns, series=tuple(varying))
    along = next(iter(named or varying), None)
    return Choice(kind=BARS, table=table, metrics=columns, x=along, series=tuple(c for c in varying if c is not along))


def _natural(table: StudyTable, column: Column, numeric: Sequence[Column]) -> str:
    combinations = prod(len(levels(table, axis.path)) for axis in numeric)
    if len(numeric) > 1 and len(cells(table, column, numeric)) < SPARSE * combinations:
        return SCATTER
    if len(numeric) == 2:
        return HEAT
    if numeric:
        return LINES
    fewest = min(len(runs) for runs in cells(table, column).values())
    return CDF if fewest >= MANY_REPLICATES else BARS


def _axes(varying: Sequence[Column]) -> str:
    return f"axes that vary are {', '.join(column.path for column in varying)}" if varying else "no axis varies"


def expand(table: StudyTable, metrics: Sequence[str]) -> tuple[Column, ...]:
    """The columns that names and patterns stand for; patterns leave out those of which no run has a figure but zero."""
    found: dict[str, Column] = {}
    for name in metrics:
        if PATTERN not in name:
            found[name] = metric(table, name)
            continue
        several = [column for column in table.metrics if fnmatchcase(column.path, name)]
        if not several:
            raise ConfigError.unknown(
                "metric of the study", name, [column.path for column in table.metrics], field="--metric"
            )
        found |= {c.path: c for c in several if any(row.metrics.get(c.path) for row in table.rows)}
    units = {column.unit for column in found.values()}
    if len(units) > 1:
        raise ConfigError(f"metrics in {' and '.join(sorted(units))} cannot be stacked", field="--metric")
    if not found:
        raise ConfigError("no metric was named, or all are zero", field="--metric")
    return tuple(found.values())


def is_numeric(table: StudyTable, column: Column) -> bool:
    """Are all values of an axis numbers?"""
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in levels(table, column.path))


def numbers(table: StudyTable, column: Column) -> list[int | float]:
    """The values of a numeric axis, the least first."""
    return sorted(value for value in levels(table, column.path) if isinstance(value, int | float))


def points(table: StudyTable, column: Column) -> dict[Place, Point]:
    """Mean and interval of a metric at every place that has it."""
    return {
        place: Point(fmean(runs), half_width(runs, CONFIDENCE) if len(runs) > 1 else None, tuple(runs))
        for place, runs in cells(table, column).items()
    }


def by_series(choice: Choice, column: Column) -> dict[tuple[Value, ...], dict[Place, Point]]:
    """The places of each series {values of the axes that make series: {place: point}}, in the order of the design."""
    at = [choice.table.axes.index(axis) for axis in choice.series]
    found: dict[tuple[Value, ...], dict[Place, Point]] = {}
    for place, point in points(choice.table, column).items():
        found.setdefault(tuple(place[n] for n in at), {})[place] = point
    if len(found) > MOST_SERIES and choice.kind in (LINES, CDF, SCATTER):
        names = ", ".join(axis.path for axis in choice.series)
        raise ConfigError(
            f"{len(found)} series cannot be told apart; {MOST_SERIES} can",
            help=f"choose values of {names} with --where",
        )
    return found


def only(table: StudyTable, where: Mapping[str, str]) -> StudyTable:
    """The rows whose axes have these values, written as tables show them."""
    from attrs import evolve

    for path, text in where.items():
        known = levels(table, path) if path in [column.path for column in table.axes] else None
        if known is None:
            raise ConfigError.unknown(
                "axis of the study", path, [column.path for column in table.axes], field="--where"
            )
        if text not in map(str, known):
            raise ConfigError.unknown(f"value of {path}", text, known, field="--where")
    rows = [row for row in table.rows if all(str(row.axes[path]) == text for path, text in where.items())]
    if not rows:
        raise ConfigError("no run has all of these values", field="--where")
    return evolve(table, rows=tuple(rows))
