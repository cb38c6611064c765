"""The page: what a template needs, and nothing else; every figure of it comes from the table."""

from __future__ import annotations

import platform
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from attrs import frozen

from vtsim import __version__
from vtsim.base.errors import ConfigError
from vtsim.base.whole_file import write_whole
from vtsim.study.analysis.cells import independent
from vtsim.study.analysis.effects import Effect, effects
from vtsim.study.analysis.sensitivity import VarianceShare, shares_of_variance
from vtsim.study.extras import needed
from vtsim.study.html_report.provenance import Provenance
from vtsim.study.not_modelled import limits
from vtsim.study.plots.choose import PATTERN, choose, points
from vtsim.study.plots.draw import draw
from vtsim.study.plots.words import axis_title, figure_text, value_text
from vtsim.study.sweep.table import Column, StudyTable

TEMPLATE: Final = Path(__file__).with_name("page.html.jinja")
MOST_PICTURES: Final = 4  # where nobody says which
MOST_ROWS: Final = 1000
MOST_EFFECTS: Final = 40


@frozen(kw_only=True)
class Picture:
    """A drawing that stands in the page, and what it shows in words."""

    title: str
    svg: str


@frozen(kw_only=True)
class Findings:
    """What the analyses say of one metric; a study that is no grid has neither."""

    metric: Column
    effects: tuple[Effect, ...]
    left_out: int
    shares: tuple[VarianceShare, ...]


def page(table: StudyTable, provenance: Provenance, metrics: Sequence[str] = ()) -> str:
    """The page as text. `metrics` are drawn, each alone, those with `*` stacked; if none are named, the first few."""
    jinja2 = needed("jinja2", "report", "a report")
    names = list(metrics) or [column.path for column in _worth_drawing(table)[:MOST_PICTURES]]
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["thousands"] = lambda number: f"{number:,}"
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    text: str = template.render(
        table=table,
        pictures=[_picture(table, name, number) for number, name in enumerate(names)],
        findings=[_findings(table, name) for name in names if PATTERN not in name],
        header=[*independent(table), *table.metrics],
        rows=_rows(table),
        most_rows=MOST_ROWS,
        provenance=provenance,
        limits=limits(),
        version=__version__,
        python=platform.python_version(),
        figure=figure_text,
        signed=lambda value, column: ("+" if value > 0 else "") + figure_text(value, column),
        value=value_text,
        column={column.path: column for column in (*table.axes, *table.metrics)},
        title=axis_title,
    )
    return text


def write(text: str, path: Path) -> None:
    """Only a whole page replaces an older one."""
    write_whole(path, text.encode())


def _worth_drawing(table: StudyTable) -> list[Column]:
    """Metrics that have figures, and different ones."""
    found = []
    for column in table.metrics:
        values = {row.metrics.get(column.path) for row in table.rows}
        if len(values) > 1 and any(isinstance(value, int | float) for value in values):
            found.append(column)
    return found or list(table.metrics[:1])


def _picture(table: StudyTable, name: str, number: int) -> Picture:
    choice = choose(table, [name])
    svg = draw(choice, title="").decode()
    title = ", ".join(column.label for column in choice.metrics) if len(choice.metrics) == 1 else name.strip("*.")
    return Picture(title=title, svg=inline(svg, f"p{number}-", title))


def inline(svg: str, prefix: str, title: str) -> str:
    """A drawing as a part of a page: no prologue, identifiers of its own, a name for those who cannot see it."""
    svg = svg[svg.index("<svg") :]
    for found in sorted(set(re.findall(r'\bid="([^"]+)"', svg)), key=len, reverse=True):
        name = re.escape(found)
        svg = re.sub(rf'(\bid="|href="#|url\(#){name}(?=["\)])', rf"\g<1>{prefix}{found}", svg)
    label = title.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def _findings(table: StudyTable, name: str) -> Findings:
    column = next(column for column in table.metrics if name in (column.path, column.label))
    try:
        found = effects(table, name)
    except ConfigError:
        found = ()
    try:
        shares = shares_of_variance(table, name) if len(independent(table)) > 1 else ()
    except ConfigError:
        shares = ()
    kept = found if len(found) <= MOST_EFFECTS else sorted(found, key=lambda effect: -abs(effect.mean))[:MOST_EFFECTS]
    return Findings(metric=column, effects=tuple(kept), left_out=len(found) - len(kept), shares=shares)


def _rows(table: StudyTable) -> list[list[str]]:
    """One row for each place: its values, then the mean of each metric, with the half width of its interval."""
    axes = independent(table)
    at = [table.axes.index(column) for column in axes]
    by_metric = {}
    for column in table.metrics:
        try:
            by_metric[column.path] = points(table, column)
        except ConfigError:  # no run has it
            by_metric[column.path] = {}
    places = dict.fromkeys(tuple(row.axes[column.path] for column in table.axes) for row in table.rows)
    rows = []
    for place in list(places)[:MOST_ROWS]:
        cells = [value_text(place[n], axis) for n, axis in zip(at, axes, strict=True)]
        for column in table.metrics:
            point = by_metric[column.path].get(place)
            text = "–" if point is None else figure_text(point.mean, column)
            if point is not None and point.half_width is not None:
                text += f" ± {figure_text(point.half_width, column, 2)}"
            cells.append(text)
        rows.append(cells)
    return rows
