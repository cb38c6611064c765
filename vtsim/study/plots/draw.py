"""Drawing with matplotlib: SVG, PNG or PDF, the same bytes for the same table and version of matplotlib."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from math import isfinite, log2
from pathlib import Path
from typing import Any, Final

from vtsim.base.errors import ConfigError
from vtsim.base.whole_file import write_whole
from vtsim.study.analysis.cells import Place, levels
from vtsim.study.extras import needed
from vtsim.study.plots import choose as c
from vtsim.study.plots.choose import Choice, Point, by_series
from vtsim.study.plots.words import SHARE, axis_title, figure_text, series_text, short_names, value_text
from vtsim.study.sweep.table import Column, Value

FORMATS: Final = ("svg", "png", "pdf")
# Okabe and Ito's colours for colour-blind readers; line styles, markers and hatches tell series apart without them.
COLOURS: Final = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#8A6D00", "#56B4E9", "#777777")
LINES: Final = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 3)), (0, (1, 2)), (0, (4, 1)))
MARKERS: Final = "osD^vPX*"
FILLS: Final = ("#3B5B7A", "#E8EDF2", "#9DB4CB", "#F7D9B5", "#6E9075", "#DDE8DC", "#B58DA5", "#F4EFC9", "#FFFFFF")
HATCHES: Final = ("", "///", "||", "\\\\\\", "xx", "--", "++", "/-", "")  # lines only: dots make large files
LEFT_OUT: Final = {  # of what matplotlib writes about a file: when and by which version
    "svg": ("Date", "Creator", "Format", "Type"),
    "png": ("Software",),
    "pdf": ("CreationDate", "Creator", "Producer"),
}
LOGARITHMIC: Final = 16  # ratio of largest to smallest value from which an axis is
SMALL: Final = 0.01  # of the longest bar: parts that are not drawn one by one
WIDTH: Final = 7.2  # inches
TITLE: Final = 78  # characters of a line
MOST_TICKS: Final = 10
MANY_VALUES: Final = 40
SHADES: Final = 24  # of a heat map; from 50 on its scale would be an image inside of the SVG
STYLE: Final[Mapping[str, Any]] = {
    "svg.hashsalt": "vtsim",
    "svg.fonttype": "none",
    "font.family": ["DejaVu Sans", "sans-serif"],
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "hatch.linewidth": 0.6,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}


def draw(choice: Choice, *, format: str = "svg", title: str | None = None) -> bytes:
    """The picture as a file's content; `title` instead of the study's question, empty for none."""
    if format not in FORMATS:
        raise ConfigError.unknown("format of pictures", format, FORMATS, field="--output")
    matplotlib = needed("matplotlib", "plots", "a plot")
    figures = needed("matplotlib.figure", "plots", "a plot")
    with matplotlib.rc_context(dict(STYLE)):
        figure = figures.Figure(figsize=(WIDTH, 4.3), dpi=150)
        _KINDS[choice.kind](figure, choice)
        text = choice.table.question if title is None else title
        if text:
            figure.suptitle("\n".join(textwrap.wrap(text, TITLE)), x=0.01, ha="left", fontsize=11)
        out = io.BytesIO()
        figure.savefig(out, format=format, metadata=dict.fromkeys(LEFT_OUT[format]))
    return out.getvalue()


def write(choice: Choice, path: Path, *, title: str | None = None) -> None:
    """Draw into a file, whose ending says the format; only a whole picture replaces an older one."""
    write_whole(path, draw(choice, format=path.suffix[1:].lower(), title=title))


# --- kinds ----------------------------------------------------------------------------------------------------
def _lines(figure: Any, choice: Choice) -> None:
    """One line for each series over a numeric axis, with bands of 95 % confidence."""
    assert choice.x is not None
    axes, at = figure.subplots(), choice.table.axes.index(choice.x)
    (column,) = choice.metrics
    found = by_series(choice, column)
    for number, (values, places) in enumerate(found.items()):
        ordered = sorted(places.items(), key=lambda item: item[0][at])  # type: ignore[arg-type,return-value]
        x, means = [place[at] for place, _ in ordered], [point.mean for _, point in ordered]
        look = {"color": COLOURS[number], "linestyle": LINES[number]}
        axes.plot(
            x, means, marker=MARKERS[number], markersize=5, markerfacecolor="white", linewidth=1.6,
            label=series_text(values, choice.series), **look,
        )  # fmt: skip
        if any(point.half_width is not None for _, point in ordered):
            half = [point.half_width or 0.0 for _, point in ordered]
            low, high = ([mean + sign * h for mean, h in zip(means, half, strict=True)] for sign in (-1, 1))
            axes.fill_between(x, low, high, color=COLOURS[number], alpha=0.18, linewidth=0)
    _numeric_axis(axes, "x", choice.x, c.numbers(choice.table, choice.x))
    _metric_axis(axes, column, [point.mean for places in found.values() for point in places.values()])
    axes.grid(True, axis="both")
    _legend(axes, choice.series, len(found))


def _scatter(figure: Any, choice: Choice) -> None:
    """A mark for each place of a design that was drawn at random, over its first numeric axis."""
    assert choice.x is not None
    axes, at = figure.subplots(), choice.table.axes.index(choice.x)
    (column,) = choice.metrics
    found = by_series(choice, column)
    for number, (values, places) in enumerate(found.items()):
        axes.plot(
            [place[at] for place in places], [point.mean for point in places.values()], linestyle="",
            marker=MARKERS[number], markersize=4.5, markerfacecolor="white", color=COLOURS[number],
            label=series_text(values, choice.series),
        )  # fmt: skip
    _numeric_axis(axes, "x", choice.x, c.numbers(choice.table, choice.x))
    _metric_axis(axes, column, [point.mean for places in found.values() for point in places.values()])
    axes.grid(True, axis="both")
    _legend(axes, choice.series, len(found))


def _heat(figure: Any, choice: Choice) -> None:
    """A grid of cells over two numeric axes, each with its figure; one grid for each series."""
    assert choice.x is not None and choice.y is not None
    (column,) = choice.metrics
    found = by_series(choice, column)
    panels = figure.subplots(1, len(found), squeeze=False, sharey=True)[0]
    figure.set_size_inches(max(WIDTH, 3.6 * len(found)), 4.3)
    means = [point.mean for places in found.values() for point in places.values()]
    xs, ys = (c.numbers(choice.table, axis) for axis in (choice.x, choice.y))
    at_x, at_y = (choice.table.axes.index(axis) for axis in (choice.x, choice.y))
    column_of: dict[Value, int] = {x: n for n, x in enumerate(xs)}
    row_of: dict[Value, int] = {y: n for n, y in enumerate(ys)}
    greys = needed("matplotlib", "plots", "a plot").colormaps["Greys"].resampled(SHADES)
    image = None
    for axes, (values, places) in zip(panels, found.items(), strict=True):
        grid = [[float("nan")] * len(xs) for _ in ys]
        for place, point in places.items():
            grid[row_of[place[at_y]]][column_of[place[at_x]]] = point.mean
        image = axes.pcolormesh(grid, cmap=greys, vmin=min(means), vmax=max(means) or 1, alpha=0.85, linewidth=0)
        _write_cells(axes, grid, column, min(means), max(means), small=len(xs) > 8)
        axes.set_xticks(
            [n + 0.5 for n in range(len(xs))], [value_text(x, choice.x) for x in xs], rotation=45 if len(xs) > 6 else 0
        )
        axes.set_yticks([n + 0.5 for n in range(len(ys))], [value_text(y, choice.y) for y in ys])
        axes.set_xlabel(axis_title(choice.x, values_have_units=True))
        axes.set_title(series_text(values, choice.series))
        axes.tick_params(length=0)
    panels[0].set_ylabel(axis_title(choice.y, values_have_units=True))
    bar = figure.colorbar(image, ax=list(panels), label=axis_title(column), pad=0.02)
    bar.ax.yaxis.set_major_formatter(lambda value, _: figure_text(value, column))


def _write_cells(
    axes: Any, grid: Sequence[Sequence[float]], column: Column, low: float, high: float, *, small: bool
) -> None:
    """The figure of each cell in it, white where the cell is dark."""
    if len(grid) * len(grid[0]) > 150:
        return
    for row, line in enumerate(grid):
        for at, value in enumerate(line):
            if isfinite(value):
                dark = (value - low) / ((high - low) or 1) > 0.55
                text, colour = figure_text(value, column), "white" if dark else "black"
                axes.text(
                    at + 0.5, row + 0.5, text, ha="center", va="center", color=colour, fontsize=7 if small else 8.5
                )


def _bars(figure: Any, choice: Choice) -> None:
    """Groups of bars over one axis, a bar for each series, with whiskers of 95 % confidence."""
    axes, (column,) = figure.subplots(), choice.metrics
    found = by_series(choice, column)
    groups = list(levels(choice.table, choice.x.path)) if choice.x is not None else [None]
    at = choice.table.axes.index(choice.x) if choice.x is not None else None
    width = 0.8 / len(found)
    means = []
    for number, (values, places) in enumerate(found.items()):
        by_group = {None if at is None else place[at]: point for place, point in places.items()}
        here = [(n, by_group[group]) for n, group in enumerate(groups) if group in by_group]
        x = [n + (number - (len(found) - 1) / 2) * width for n, _ in here]
        bars = axes.bar(
            x, [point.mean for _, point in here], width * 0.94, label=series_text(values, choice.series),
            yerr=[point.half_width or 0.0 for _, point in here] if _any_interval(here) else None, capsize=2.5,
            ecolor="black", error_kw={"linewidth": 0.9}, **_fill(number),
        )  # fmt: skip
        means += [point.mean for _, point in here]
        if len(groups) * len(found) <= 16:
            labels = [figure_text(point.mean, column) for _, point in here]
            axes.bar_label(bars, labels, padding=2, fontsize=8 if len(groups) * len(found) <= 9 else 7)
    names = [value_text(group, choice.x) if choice.x is not None else "" for group in groups]
    _named_axis(axes, names)
    if choice.x is not None:
        axes.set_xlabel(axis_title(choice.x, values_have_units=True))
    _metric_axis(axes, column, [0.0, *means])
    axes.margins(y=0.1)
    axes.grid(True, axis="y")
    _legend(axes, choice.series, len(found))


def _any_interval(here: Sequence[tuple[int, Point]]) -> bool:
    return any(point.half_width is not None for _, point in here)


def _stacks(figure: Any, choice: Choice) -> None:
    """One lying bar for each place, made of several metrics, the largest first; small ones are one together."""
    table, common = choice.table, choice.metrics[0]
    names = dict(zip((m.path for m in choice.metrics), short_names(choice.metrics), strict=True))
    found = {column.path: c.points(table, column) for column in choice.metrics}
    places: list[Place] = list(dict.fromkeys(place for points in found.values() for place in points))
    lengths = {path: [points[p].mean if p in points else 0.0 for p in places] for path, points in found.items()}
    longest = max(sum(row) for row in zip(*lengths.values(), strict=True))
    order = sorted(lengths, key=lambda path: -max(lengths[path]))
    small = [path for path in order if max(lengths[path]) < SMALL * longest]
    drawn = [path for path in order if path not in small or len(small) == 1][: len(FILLS)]
    if len(drawn) < len(order):
        drawn = drawn[: len(FILLS) - 1]
    layers = [(names[path], lengths[path]) for path in drawn]
    if len(drawn) < len(order):
        rest = [lengths[path] for path in order if path not in drawn]
        layers.append((f"{len(rest)} others", [sum(row) for row in zip(*rest, strict=True)]))
    figure.set_size_inches(WIDTH, max(2.4, 1.3 + 0.32 * len(places)))
    axes = figure.subplots()
    left = [0.0] * len(places)
    for number, (name, values) in enumerate(layers):
        axes.barh(range(len(places)), values, 0.72, left=left, label=name, **_fill(number))
        left = [before + value for before, value in zip(left, values, strict=True)]
    at = [table.axes.index(axis) for axis in choice.series]
    axes.set_yticks(
        range(len(places)), [", ".join(value_text(place[n], table.axes[n]) for n in at) for place in places]
    )
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.set_ylabel(", ".join(axis_title(axis, values_have_units=True) for axis in choice.series))
    axes.set_xlabel(common.unit if common.unit not in ("", SHARE) else common.meaning.replace("`", ""))
    axes.xaxis.set_major_formatter(lambda value, _: figure_text(value, common))
    axes.margins(y=0.02)
    axes.grid(True, axis="x")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), handleheight=1.4)


def _cdf(figure: Any, choice: Choice) -> None:
    """The share of runs at or below each figure, one staircase for each series."""
    axes, (column,) = figure.subplots(), choice.metrics
    found = by_series(choice, column)
    for number, (values, places) in enumerate(found.items()):
        runs = sorted(run for point in places.values() for run in point.runs)
        axes.step(
            [runs[0], *runs], [n / len(runs) for n in range(len(runs) + 1)], where="post", color=COLOURS[number],
            linestyle=LINES[number], linewidth=1.6, label=series_text(values, choice.series),
        )  # fmt: skip
    axes.set_xlabel(axis_title(column))
    axes.xaxis.set_major_formatter(lambda value, _: figure_text(value, column))
    axes.set_ylabel("share of runs")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}".replace("%", " %"))
    axes.set_ylim(0, 1.02)
    axes.grid(True)
    _legend(axes, choice.series, len(found))


_KINDS: Final = {c.LINES: _lines, c.HEAT: _heat, c.BARS: _bars, c.STACKS: _stacks, c.CDF: _cdf, c.SCATTER: _scatter}


# --- axes -----------------------------------------------------------------------------------------------------
def _numeric_axis(axes: Any, which: str, column: Column, numbers: Sequence[int | float]) -> None:
    """Ticks where the design has values, on a logarithmic scale where these grow by factors."""
    positive = numbers[0] > 0
    if positive and numbers[-1] / numbers[0] >= LOGARITHMIC and len(numbers) > 2:
        powers = all(log2(number).is_integer() for number in numbers)
        getattr(axes, f"set_{which}scale")("log", base=2 if powers else 10)
    getattr(axes, f"set_{which}label")(axis_title(column, values_have_units=True))
    if len(numbers) > MANY_VALUES:  # drawn at random: no tick for each
        getattr(axes, f"{which}axis").set_major_formatter(lambda value, _: value_text(value, column))
        return
    ticks = numbers if len(numbers) <= MOST_TICKS else numbers[:: -(-len(numbers) // MOST_TICKS)]
    texts = [value_text(value, column) for value in ticks]
    getattr(axes, f"set_{which}ticks")(ticks, texts, rotation=30 if sum(map(len, texts)) > 60 else 0)
    getattr(axes, f"{which}axis").set_minor_formatter(lambda *_: "")
    axes.tick_params(which="minor", length=0)


def _metric_axis(axes: Any, column: Column, figures: Sequence[float]) -> None:
    """From zero unless all figures are far from it; logarithmic over three powers of ten."""
    low, high = min(figures), max(figures)
    axes.set_ylabel(axis_title(column))
    if low > 0 and high / low > 1000:
        axes.set_yscale("log")
    elif low >= 0 and low < 0.6 * high:
        axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda value, _: figure_text(value, column))


def _named_axis(axes: Any, names: Sequence[str]) -> None:
    crowded = max(map(len, names)) * len(names) > 75
    turned = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if crowded else {}
    axes.set_xticks(range(len(names)), names, **turned)
    axes.tick_params(axis="x", length=0)


def _fill(number: int) -> dict[str, Any]:
    at = number % len(FILLS)
    return {"facecolor": FILLS[at], "hatch": HATCHES[at], "edgecolor": "black", "linewidth": 0.8}


def _legend(axes: Any, series: Sequence[Column], count: int) -> None:
    if series and count > 1:
        title = ", ".join(column.label for column in series)
        axes.legend(title=title, alignment="left", loc="center left", bbox_to_anchor=(1.0, 0.5), handlelength=3.4)
