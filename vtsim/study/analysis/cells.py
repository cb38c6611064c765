"""A table seen as cells: the runs of one place on all axes, which are its replicates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

from vtsim.base.errors import ConfigError
from vtsim.study.sweep.table import Column, StudyTable, Value

MOST_WRITTEN = 12  # values that somebody wrote into a zip, rather than a range that they were drawn from

Place = tuple[Value, ...]  # a value of every axis, in the order of the table's axes
Cells = Mapping[Place, Sequence[float]]


def axis(table: StudyTable, path: str) -> Column:
    """Find an axis by its path or label."""
    return _column("axis of the study", path, table.axes, "--axis")


def metric(table: StudyTable, path: str, field: str = "--metric") -> Column:
    """Find a metric by its path or label."""
    return _column("metric of the study", path, table.metrics, field)


def _column(noun: str, path: str, columns: Sequence[Column], field: str) -> Column:
    for column in columns:
        if path in (column.path, column.label):
            return column
    raise ConfigError.unknown(noun, path, [column.path for column in columns], field=field)


def levels(table: StudyTable, path: str) -> tuple[Value, ...]:
    """The values of an axis in the order in which the design first has them."""
    return tuple(dict.fromkeys(row.axes[path] for row in table.rows))


def independent(table: StudyTable) -> tuple[Column, ...]:
    """The axes that vary, without those that follow from another one, as the second list of a zip from the first.

    Of two that follow from each other the second is left out, unless they have so many values that they were drawn.
    """
    varying = [column for column in table.axes if len(levels(table, column.path)) > 1]
    pairs = {
        (a.path, b.path): {(row.axes[a.path], row.axes[b.path]) for row in table.rows} for a in varying for b in varying
    }

    def determines(a: Column, b: Column) -> bool:
        return len(pairs[a.path, b.path]) == len(levels(table, a.path))

    def follows(b: Column) -> bool:
        others = (a for a in varying if a is not b and determines(a, b))
        written = len(levels(table, b.path)) <= MOST_WRITTEN
        return any(not determines(b, a) or (written and varying.index(a) < varying.index(b)) for a in others)

    return tuple(column for column in varying if not follows(column))


def is_drawn(table: StudyTable) -> bool:
    """Has an axis so many values that they were drawn from a range, each with a few values of the others only?"""
    axes = independent(table)
    counts = [len(levels(table, column.path)) for column in axes]
    places = {tuple(row.axes[column.path] for column in axes) for row in table.rows}
    return any(count > MOST_WRITTEN for count in counts) and len(places) < prod(counts)


def cells(table: StudyTable, metric: Column, axes: Sequence[Column] = ()) -> dict[Place, list[float]]:
    """The figures of a metric by place, on all axes or on some; a run without that figure is left out."""
    found: dict[Place, list[float]] = {}
    for row in table.rows:
        value = number(row.metrics.get(metric.path))
        if value is not None:
            found.setdefault(tuple(row.axes[column.path] for column in axes or table.axes), []).append(value)
    if not found:
        raise ConfigError(f"no run of the study has a figure for {metric.path!r}", field="--metric")
    return found


def number(value: Value) -> float | None:
    """A figure that can be reckoned with; True and False are 1 and 0, text is none."""
    return float(value) if isinstance(value, int | float) else None
