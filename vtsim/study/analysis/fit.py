"""A study beside a user's measurements: a straight line through both, and how far each row is off."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from math import isclose, isfinite
from pathlib import Path
from statistics import fmean
from typing import Final

from attrs import frozen

from vtsim.base.errors import ConfigError, Problem, alternatives
from vtsim.base.units import quantity
from vtsim.study.analysis.cells import Place, axis, cells, metric
from vtsim.study.sweep.table import Column, StudyTable, Value

EXPECTED: Final = "give a CSV file in UTF-8 whose first line names axes and `measured`"
OTHER_SEPARATORS: Final = (";", "\t", "|")


@frozen(kw_only=True)
class FitRow:
    """One row of the measurements beside the model; both in the metric's unit."""

    line: int
    place: Place
    measured: float
    model: float

    @property
    def deviation_percent(self) -> float | None:
        """How far the model is off; None where nothing was measured but zero."""
        return 100 * (self.model - self.measured) / self.measured if self.measured else None


@frozen(kw_only=True)
class Fit:
    """model = slope × measured + intercept, by least squares. A perfect model has slope 1, intercept 0 and R² 1."""

    slope: float
    intercept: float
    r_squared: float
    rows: tuple[FitRow, ...]
    unmatched: tuple[int, ...]  # lines of the file without a run of the study

    @property
    def mean_deviation_percent(self) -> float | None:
        """The mean of absolute deviations."""
        found = [abs(row.deviation_percent) for row in self.rows if row.deviation_percent is not None]
        return fmean(found) if found else None


def regression(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float]:
    """Slope, intercept and R² of the line through at least two points with different x; R² is 1 for a constant y."""
    mean_x, mean_y = fmean(x), fmean(y)
    square_x = sum((a - mean_x) ** 2 for a in x)
    product = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    slope = product / square_x
    intercept = mean_y - slope * mean_x
    square_y = sum((b - mean_y) ** 2 for b in y)
    left = sum((b - slope * a - intercept) ** 2 for a, b in zip(x, y, strict=True))
    return slope, intercept, 1 - left / square_y if square_y else 1.0


def fit(table: StudyTable, path: str, file: Path, measured: str = "measured") -> Fit:
    """Match the rows of a CSV file with places of the study and draw the line.

    The file's first line names its columns: paths or labels of axes, and one named `measured`, whose figures are in the
    metric's unit. Other columns are ignored. An axis with one value may be left out. Raises `ConfigError` with file and
    line for what cannot be.
    """
    column = metric(table, path)
    found = {place: fmean(runs) for place, runs in cells(table, column).items()}
    header, rows = _read(file)
    if len(header) == 1 and (other := next((each for each in OTHER_SEPARATORS if each in header[0]), "")):
        raise _error(file, 1, header, f"cells are separated by {other!r}", "separate them by commas")
    if measured not in header:
        raise _error(file, 1, header, f"no column {measured!r}", alternatives("column", measured, header))
    for at, name in enumerate(header):
        if name in header[:at]:
            raise _error(file, 1, header, f"two columns are named {name!r}", "give each column a name of its own")
    named = [(at, _axis(table, name)) for at, name in enumerate(header) if name != measured]
    chosen = [(at, table.axes.index(column)) for at, column in named if column is not None]
    _check_axes(table, file, header, {at for _, at in chosen}, found)
    out, unmatched = [], []
    for line, cells_of in rows:
        figure = _number(cells_of[header.index(measured)])
        if figure is None:
            text = f"{measured} {cells_of[header.index(measured)]!r} is not a number"
            raise _error(
                file, line, cells_of, text, f"figures of {column.path} are in {column.unit or 'plain numbers'}"
            )
        places = [place for place in found if all(_same(place[at], cells_of[here]) for here, at in chosen)]
        if not places:
            unmatched.append(line)
        out += [FitRow(line=line, place=place, measured=figure, model=found[place]) for place in places]
    if len({row.measured for row in out}) < 2:
        raise ConfigError(
            f"{len(out)} rows match a run of the study; a line needs two different measurements",
            file=str(file),
            help="; ".join(_values(table, found).values()) or "its axes have one value each",
        )
    try:
        slope, intercept, r_squared = regression([row.measured for row in out], [row.model for row in out])
    except OverflowError:
        raise ConfigError("the figures are too large for a line through them", file=str(file)) from None
    return Fit(slope=slope, intercept=intercept, r_squared=r_squared, rows=tuple(out), unmatched=tuple(unmatched))


def _read(file: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """The names of the columns, and the rows with their lines; all rows have as many cells."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as opened:
            reader = csv.reader(opened, skipinitialspace=True)
            lines = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if any(map(str.strip, row))]
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", file=str(file), help=EXPECTED) from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"not a CSV file: {error}", file=str(file), help=EXPECTED) from None
    if not lines:
        raise ConfigError("the file is empty", file=str(file), help=EXPECTED)
    header, rows = lines[0][1], lines[1:]
    for line, row in rows:
        if len(row) != len(header):
            help = "give each row a cell for each name; one with a comma in it is quoted"
            raise _error(file, line, row, f"{len(row)} cells, and the first line names {len(header)}", help)
    return header, rows


def _error(file: Path, line: int, row: Sequence[str], message: str, help: str) -> ConfigError:
    source = ",".join(row)
    return ConfigError.of([Problem(message=message, file=str(file), line=line, column=0, source=source, help=help)])


def _axis(table: StudyTable, name: str) -> Column | None:
    try:
        return axis(table, name)
    except ConfigError:
        return None


def _check_axes(
    table: StudyTable, file: Path, header: Sequence[str], given: set[int], found: dict[Place, float]
) -> None:
    """An axis that has several values must be in the file, or a row would match several places."""
    texts = _values(table, found)
    for at, column in enumerate(table.axes):
        if at not in given and column.path in texts:
            raise _error(file, 1, header, f"no column for the axis {column.path!r}", texts[column.path])


def _values(table: StudyTable, found: dict[Place, float]) -> dict[str, str]:
    """What the axes that have several values can be, in words."""
    texts = {}
    for at, column in enumerate(table.axes):
        values = list(dict.fromkeys(place[at] for place in found))
        shown = ", ".join(map(str, values[:5]))
        if len(values) > 1:
            texts[column.path] = f"values of {column.path} are {shown}{' …' if len(values) > 5 else ''}"
    return texts


def _same(value: Value, text: str) -> bool:
    """Does text mean this value: the same number, with a unit or not, or the same word?"""
    if isinstance(value, bool):
        return text.lower() in (("true", "on", "yes", "1") if value else ("false", "off", "no", "0"))
    ours, theirs = _number(str(value)), _number(text)
    if ours is not None and theirs is not None:
        return isclose(ours, theirs, rel_tol=1e-9)
    return str(value).casefold() == text.casefold()


def _number(text: str) -> float | None:
    """A number, or the value of one with a unit in its base unit."""
    try:
        found: float | None = float(text)
    except ValueError:
        try:
            found = quantity(text)
        except ConfigError:
            return None
    return None if found is None or not isfinite(found) else float(found)
