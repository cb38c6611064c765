"""How values and columns read on a picture: with the units that a person would write."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from vtsim.base.units import COUNT, DURATION, FREQUENCY, SIZE, Dimension
from vtsim.study.sweep.table import Column, Value

DIMENSIONS: Final[dict[str, Dimension]] = {"B": SIZE, "bytes": SIZE, "ns": DURATION, "Hz": FREQUENCY}
SHARE, RATIO = "share", "ratio"


def value_text(value: Value, column: Column) -> str:
    """A value of an axis: `2 MiB`, `10 M`, `on`."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, str):
        return value
    dimension = DIMENSIONS.get(column.unit)
    if dimension is not None:
        return dimension.format(int(value) if dimension.whole else value)
    return COUNT.format(value) if isinstance(value, int) and value % 1000 == 0 else number_text(float(value))


def number_text(value: float, digits: int = 4) -> str:
    """A figure in three or four digits."""
    if value and not 1e-3 <= abs(value) < 1e15:
        return f"{value:.{min(digits, 3)}g}"
    for size, prefix in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e4, " k")):
        if abs(value) >= size:
            scale = 1e3 if prefix == " k" else size
            return f"{value / scale:.4g}{prefix}"
    return f"{value:.{digits if abs(value) < 10**digits else 4}g}"


def figure_text(value: float, column: Column, digits: int = 4) -> str:
    """A figure of a metric; shares as percent."""
    return f"{100 * value:.{digits}g} %" if column.unit == SHARE else number_text(value, digits)


def axis_title(column: Column, *, values_have_units: bool = False) -> str:
    """What stands beside an axis of a picture."""
    unit = "" if values_have_units or column.unit in ("", SHARE, RATIO) else f" ({column.unit})"
    return f"{column.label}{unit}"


def series_text(values: Sequence[Value], columns: Sequence[Column]) -> str:
    """The name of a series: its values, with the axis where a value alone says nothing."""
    parts = []
    for value, column in zip(values, columns, strict=True):
        text = value_text(value, column)
        parts.append(text if isinstance(value, str) else f"{column.label} {text}")
    return ", ".join(parts)


def short_names(columns: Sequence[Column]) -> list[str]:
    """Names of stacked metrics: labels as written by people, else the part of the path in which they differ."""
    paths = [column.path.split(".") for column in columns]
    front = back = 0
    while len(paths) > 1 and all(len(path) > front + 1 and path[front] == paths[0][front] for path in paths):
        front += 1
    while len(paths) > 1 and all(
        len(path) > front + back + 1 and path[-1 - back] == paths[0][-1 - back] for path in paths
    ):
        back += 1
    return [
        column.label if column.label != column.path else " ".join(path[front : len(path) - back]).replace("_", " ")
        for column, path in zip(columns, paths, strict=True)
    ]
