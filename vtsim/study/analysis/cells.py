"""A table seen as cells: the runs of one place on all axes, which are its replicates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vtsim.base.errors import ConfigError
from vtsim.study.sweep.table import Column, StudyTable, Value

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


def cells(table: StudyTable, metric: Column) -> dict[Place, list[float]]:
    """The figures of a metric by place; a run without that figure is left out."""
    found: dict[Place, list[float]] = {}
    for row in table.rows:
        value = number(row.metrics.get(metric.path))
        if value is not None:
            found.setdefault(tuple(row.axes[column.path] for column in table.axes), []).append(value)
    if not found:
        raise ConfigError(f"no run of the study has a figure for {metric.path!r}", field="--metric")
    return found


def number(value: Value) -> float | None:
    """A figure that can be reckoned with; True and False are 1 and 0, text is none."""
    return float(value) if isinstance(value, int | float) else None
