"""What the commands of `study_output` do: results in, analyses called, tables and files out."""

from __future__ import annotations

import json as json_text
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from math import isnan
from pathlib import Path
from typing import Any, Final

import attrs

from vtsim.base import jit
from vtsim.base.errors import ConfigError
from vtsim.cli import FINE
from vtsim.cli.output import emit, note, show
from vtsim.study.analysis.cells import independent
from vtsim.study.analysis.cells import metric as find_metric
from vtsim.study.json_object import plain
from vtsim.study.plots.choose import PATTERN, choose, only
from vtsim.study.plots.words import axis_title, figure_text, number_text, value_text
from vtsim.study.sweep.metrics import absent, figures
from vtsim.study.sweep.study import Study
from vtsim.study.sweep.table import Column, StudyTable, Value
from vtsim.study.table import section

METHODS: Final = ("sobol", "morris")


# --- tables ---------------------------------------------------------------------------------------------------
def table_of(study: Study, metrics: Sequence[str], where: Sequence[str]) -> StudyTable:
    """The table of a study with further metrics: figures of its results that it did not name, and patterns of them."""
    table = study.table()
    known = {name for column in table.metrics for name in (column.path, column.label)}
    patterns = [name for name in metrics if PATTERN in name]
    more = [name for name in metrics if name not in known and name not in patterns]
    if patterns:
        keys = dict.fromkeys(key for _, result in study.results() for key in figures(result))
        more += [key for key in keys if key not in known and any(fnmatchcase(key, each) for each in patterns)]
    if more:
        other = study.table(list(dict.fromkeys(more)))
        rows = [
            attrs.evolve(row, metrics={**row.metrics, **added.metrics})
            for row, added in zip(table.rows, other.rows, strict=True)
        ]
        table = attrs.evolve(table, metrics=(*table.metrics, *other.metrics), rows=tuple(rows))
    if not table.rows:
        raise ConfigError("no run of the study is finished", file=str(study.path), help="vtsim sweep runs it")
    for column in table.metrics:
        if {column.path, column.label} & {*metrics} and table.lacks(column):
            raise absent(column.path, study.results())
    return only(table, _pairs(where)) if where else table


def _pairs(where: Sequence[str]) -> dict[str, str]:
    found = {}
    for text in where:
        axis, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"{text!r} is not AXIS=VALUE", field="--where")
        found[axis.strip()] = value.strip()
    return found


# --- files ----------------------------------------------------------------------------------------------------
def write_report(file: Path, output: Path | None, metrics: Sequence[str], where: Sequence[str]) -> int:
    """Write the page."""
    from vtsim.study.html_report.page import page, write
    from vtsim.study.html_report.provenance import Provenance

    study = Study(file)
    target = output or study.path.with_suffix(".html")
    study.check_output(target)
    table = table_of(study, metrics, where)
    write(page(table, Provenance.of(result for _, result in study.results()), metrics), target)
    note(f"wrote {target}")
    return FINE


def write_plot(file: Path, output: Path | None, metrics: Sequence[str], kind: str | None, where: Sequence[str]) -> int:
    """Draw the metrics named, or the first of the study."""
    from vtsim.study.plots.draw import write

    study = Study(file)
    table = table_of(study, metrics, where)
    target = output or study.path.with_suffix(".svg")
    study.check_output(target)
    write(choose(table, metrics or [table.metrics[0].path], kind), target)
    note(f"wrote {target}")
    return FINE


# --- of a table -----------------------------------------------------------------------------------------------
def show_effects(file: Path, metric: str, confidence: float, where: Sequence[str], *, json: bool) -> int:
    """Print effects and interactions, the largest first within each kind."""
    from vtsim.study.analysis.effects import effects

    if isnan(confidence):  # which no bound of the option refuses
        raise ConfigError("nan is no share", field="--confidence", help="as in 0.95")
    table = table_of(Study(file), [metric], where)
    found = effects(table, metric, confidence)
    if json:
        return _emit_json({"metric": metric, "confidence": confidence, "effects": plain(found)})
    column, axes = find_metric(table, metric), {each.path: each for each in table.axes}
    shown = section(f"Effects on {axis_title(column)}", ["mean", f"± {100 * confidence:g} %", "clear"])
    shown.columns[0].no_wrap = False
    for each in sorted(found, key=lambda effect: (len(effect.axes), -abs(effect.mean))):
        changes = [
            f"{axes[path].label}: {value_text(base, axes[path])} to {value_text(value, axes[path])}"
            for path, base, value in zip(each.axes, each.base, each.values, strict=True)
        ]
        sign = "+" if each.mean > 0 else ""
        width = "–" if each.half_width is None else figure_text(each.half_width, column, 2)
        clear = {None: "–", True: "yes", False: "no"}[each.clear]
        shown.add_row(" × ".join(changes), sign + figure_text(each.mean, column), width, clear)
    return _show(shown, table)


def show_pareto(file: Path, least: Sequence[str], most: Sequence[str], where: Sequence[str], *, json: bool) -> int:
    """Print the front."""
    from vtsim.study.analysis.pareto import Direction, pareto_front

    wanted: list[tuple[str, Direction]] = [*((name, "min") for name in least), *((name, "max") for name in most)]
    if len(wanted) != 2:
        raise ConfigError(
            f"{len(wanted)} figures were named",
            field="--min, --max",
            help="two make a front, as in --min slowdown --max X",
        )
    (first, a), (second, b) = wanted
    table = table_of(Study(file), [first, second], where)
    if find_metric(table, first) == find_metric(table, second):
        raise ConfigError(
            f"{first} is named twice",
            field="--min, --max",
            help="two figures make a front, as in --min slowdown --max X",
        )
    front = pareto_front(table, first, second, (a, b))
    if json:
        points = [{"axes": _axes(table, point.place), first: point.first, second: point.second} for point in front]
        return _emit_json({"directions": {first: a, second: b}, "points": points})
    columns = [find_metric(table, name) for name in (first, second)]
    shown = section("Front", [f"{way} {column.label}" for column, way in zip(columns, (a, b), strict=True)])
    for point in front:
        shown.add_row(
            _place(table, point.place), figure_text(point.first, columns[0]), figure_text(point.second, columns[1])
        )
    return _show(shown, table)


def show_fit(file: Path, measurements: Path, metric: str, column: str, where: Sequence[str], *, json: bool) -> int:
    """Print the line and every row."""
    from vtsim.study.analysis.fit import fit

    table = table_of(Study(file), [metric], where)
    found = fit(table, metric, measurements, column)
    if json:
        rows = [
            {"line": row.line, "axes": _axes(table, row.place), "measured": row.measured, "model": row.model,
             "deviation_percent": row.deviation_percent}
            for row in found.rows
        ]  # fmt: skip
        line = {"slope": found.slope, "intercept": found.intercept, "r_squared": found.r_squared}
        return _emit_json({"metric": metric, **line, "rows": rows, "unmatched_lines": list(found.unmatched)})
    of = find_metric(table, metric)
    shown = section(axis_title(of), ["measured", "model", "deviation"])
    for row in found.rows:
        off = "–" if row.deviation_percent is None else f"{row.deviation_percent:+.1f} %"
        shown.add_row(_place(table, row.place), figure_text(row.measured, of), figure_text(row.model, of), off)
    show(shown)
    mean = "" if found.mean_deviation_percent is None else f"; off by {found.mean_deviation_percent:.1f} % on average"
    emit(
        f"\nmodel = {number_text(found.slope)} × measured {found.intercept:+.4g}, R² {found.r_squared:.4f}"
        f", {len(found.rows)} rows{mean}\n"
    )
    if found.unmatched:
        note(f"no run of the study matches line {', '.join(map(str, found.unmatched))} of {measurements}")
    return FINE


# --- on the model ---------------------------------------------------------------------------------------------
def show_sensitivity(
    file: Path, metric: str, axes: Sequence[str], method: str, samples: int, seed: int, sets: Sequence[str], jobs: int,
    *, json: bool, beyond_stated: bool = False,
) -> int:  # fmt: skip
    """Print the exact shares of a whole grid, or what a method finds on the model."""
    from vtsim.study.analysis.sensitivity import MeanChange, VarianceShare, morris, shares_of_variance, sobol

    found: Sequence[VarianceShare | MeanChange]
    column, labels = None, {}
    if not axes:
        table = table_of(Study(file), [metric], ())
        found, column = shares_of_variance(table, metric), find_metric(table, metric)
        labels = {each.path: each.label for each in table.axes}
    else:
        from vtsim.study.analysis.model import evaluator, parse_ranges
        from vtsim.study.sweep.executors import Local, cpus
        from vtsim.study.sweep.metrics import column as result_column

        if method not in METHODS:
            raise ConfigError.unknown("method", method, METHODS, field="--method")
        column, ranges = result_column(metric), parse_ranges(axes, file, sets, beyond_stated=beyond_stated)
        _note_compiling()
        workers = Local(jobs or cpus())
        analyse: Callable[..., Sequence[VarianceShare | MeanChange]] = sobol if method == "sobol" else morris
        try:
            run = evaluator(file, sets, metric, workers, beyond_stated=beyond_stated)
            found = analyse(ranges, run, samples, seed=seed)
        except BaseException:
            workers.drop()
            raise
        finally:
            workers.close()
    if json:
        return _emit_json({"metric": metric, "settings": plain(tuple(found))})
    show(_sensitivity_table(found, column, labels))
    return FINE


def _sensitivity_table(found: Sequence[Any], column: Column, labels: Mapping[str, str]) -> Any:
    if found and hasattr(found[0], "alone"):
        shown = section(f"Shares of the variance of {column.label}", ["alone", "± 95 %", "with interactions", "± 95 %"])
        _fold_names(shown)
        for each in found:
            widths = [_share_text(width) for width in (each.alone_half_width, each.total_half_width)]
            name = labels.get(each.path, each.path)
            shown.add_row(name, _share_text(each.alone), widths[0], _share_text(each.total), widths[1])
        return shown
    shown = section(f"Changes of {axis_title(column)}", ["mean", "± 95 %", "spread"])
    _fold_names(shown)
    for each in found:
        texts = [figure_text(value, column) for value in (each.mean, each.half_width, each.spread)]
        shown.add_row(each.path, *texts)
    return shown


def _fold_names(table: Any) -> None:
    """Long paths go on in a further line, so that no figure is cut."""
    table.columns[0].no_wrap, table.columns[0].overflow = False, "fold"


def _share_text(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


def show_crossover(
    scenario: Path, axis: str, between: tuple[str, str], a: Sequence[str], b: Sequence[str], metric: str, step: str,
    tolerance: float, sets: Sequence[str], *, json: bool, beyond_stated: bool = False,
) -> int:  # fmt: skip
    """Print where the sign changes; every run is noted as it ends."""
    from vtsim.base.spec import kind_of
    from vtsim.config.paths import setting_at, unit_of
    from vtsim.study.analysis.crossover import crossover
    from vtsim.study.analysis.model import amount, difference, is_whole
    from vtsim.study.sweep.metrics import column as result_column

    for field, own in (("--a", a), ("--b", b)):
        if axis in (each.partition("=")[0].strip() for each in own):
            raise ConfigError(f"{axis} is the axis, which has other values", field=field, help="leave it out")
    low, high = (amount(end, axis, "--between") for end in between)
    width = amount(step, axis, "--step") if step else float(is_whole(axis, low, high))
    if width < 0:
        raise ConfigError(f"{step} is less than nothing", field="--step")
    found_setting = setting_at(axis)
    of = Column(path=axis, label=axis, unit=unit_of(kind_of(found_setting)) if found_setting else "")
    figure = result_column(metric)

    def text(value: float) -> str:
        return value_text(int(value) if value == int(value) else value, of)

    def tell(value: Value, first: float, second: float) -> None:
        if isinstance(value, int | float):
            note(f"{text(value)}: A {figure_text(first, figure)}, B {figure_text(second, figure)}")

    _note_compiling()
    run = difference(scenario, sets, axis, metric, a, b, tell, beyond_stated=beyond_stated)

    found = crossover(
        lambda value: run(int(value) if value == int(value) else value),
        low, high, tolerance=tolerance * (high - low), step=width, text=text,
    )  # fmt: skip
    ends = (found.low, found.high)
    below, above = found.tried[0][1], found.tried[1][1]
    if json:
        return _emit_json(
            {"axis": axis, "unit": of.unit, "metric": metric, "low": ends[0], "high": ends[1], "value": found.value,
             "low_difference": found.low_difference, "high_difference": found.high_difference,
             "runs": 2 * len(found.tried)}
        )  # fmt: skip
    less, more = ("A", "B") if (below < 0 or above > 0) else ("B", "A")
    emit(
        f"{less} has less {figure.label} below, {more} above {axis} = {' to '.join(dict.fromkeys(map(text, ends)))}"
        f" (A minus B: {number_text(found.low_difference)} and {number_text(found.high_difference)}"
        f"; {2 * len(found.tried)} runs)\n"
    )
    return FINE


def _note_compiling() -> None:
    from vtsim.cli.run import COMPILING
    from vtsim.cpu.kernels.run import run_all

    if not jit.kernels_are_cached(run_all):
        note(COMPILING)


# --- texts ----------------------------------------------------------------------------------------------------
def _axes(table: StudyTable, place: Sequence[Value]) -> dict[str, Value]:
    return {column.path: value for column, value in zip(table.axes, place, strict=True)}


def _place(table: StudyTable, place: Sequence[Value]) -> str:
    varying = [table.axes.index(column) for column in independent(table)]
    return ", ".join(value_text(place[n], table.axes[n]) for n in varying)


def _emit_json(found: Mapping[str, Any]) -> int:
    emit(json_text.dumps(found, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    return FINE


def _show(shown: Any, table: StudyTable) -> int:
    show(shown)
    for count, what in ((table.failed, "failed"), (table.missing, "are missing")):
        if count:
            note(f"{count} runs {what}")
    return FINE
