"""Simulated figures beside published ones: `vtsim validate`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import attrs
from attrs import frozen

from vtsim.base.errors import ConfigError, ModelError
from vtsim.base.registry import import_all
from vtsim.study import bindings as _bindings_package
from vtsim.study.binding import Binding, Figure, Run, bindings, old_host, old_kernel
from vtsim.study.published import Row, published, row

if TYPE_CHECKING:
    from rich.table import Table

Runner = Callable[[Run], Any]
Progress = Callable[[int, int, str], None]


@frozen(kw_only=True)
class Comparison:
    """One published figure beside the simulated one."""

    row: str
    key: str
    hardware: str
    published: float
    simulated: float
    unit: str
    deviation_percent: float | None
    split: str
    tolerance_percent: float | None
    within: bool | None
    note: str


def registered() -> dict[str, Binding]:
    """Return every binding by its row, in the order of the published file."""
    if not len(bindings):
        import_all(_bindings_package)
    return {id: bindings[id] for id in published() if id in bindings}


def validate(
    rows: Iterable[str] | None = None,
    run: Runner | None = None,
    progress: Progress | None = None,
    sets: Sequence[str] = (),
) -> list[Comparison]:
    """Simulate the figures of some rows (all that are bound, unless told) and compare them.

    A run that several figures need is made once; `sets` are settings on top of every run's own, for an experiment.
    Errors: ConfigError for a row that is unknown or not bound, or a run that such a setting does not fit.
    """
    known = registered()
    chosen = list(known) if rows is None else [_bound(id, known) for id in rows]
    runner, made = run or simulate, dict[Run, Any]()
    wanted = list(dict.fromkeys(r for id in chosen for f in known[id].figures for r in f.runs))
    for number, needed in enumerate(wanted):
        if progress is not None:
            progress(number, len(wanted), needed.scenario)
        made[needed] = runner(attrs.evolve(needed, sets=(*needed.sets, *sets)))
    return [
        compare(row(id), figure, [made[needed] for needed in figure.runs])
        for id in chosen
        for figure in known[id].figures
    ]


def _bound(id: str, known: Iterable[str]) -> str:
    if id not in known:
        row(id)
        raise ConfigError(f"published row {id!r} has no binding yet", help="bound rows are " + ", ".join(known))
    return id


def compare(of: Row, figure: Figure, results: Sequence[Any]) -> Comparison:
    """Compute one figure from its results and set it beside the published one."""
    hardware, simulated = figure.hardware(of), float(figure.compute(results))
    deviation = 100.0 * (simulated - hardware) / abs(hardware) if hardware else None
    within = None
    if figure.tolerance_percent is not None:
        if deviation is None:
            raise ModelError(f"{of.id}: {figure.key} has a tolerance in percent of a published 0")
        within = abs(deviation) <= figure.tolerance_percent
    return Comparison(
        row=of.id,
        key=figure.key,
        hardware=of.hardware,
        published=hardware,
        simulated=simulated,
        unit=figure.unit,
        deviation_percent=deviation,
        split=of.split,
        tolerance_percent=figure.tolerance_percent,
        within=within,
        note=figure.note,
    )


def simulate(needed: Run) -> Any:
    """Run a shipped scenario with its settings."""
    from vtsim.study.run import run

    baseline = () if needed.baseline else ("run.baseline=false",)
    return run(shipped(needed.scenario), sets=(*needed.sets, *baseline))


def shipped(scenario: str) -> Path:
    """Find a scenario that the project ships, here or in the checkout that this package is part of."""
    roots = (Path.cwd(), Path(__file__).parents[2])
    for root in roots:
        if (root / scenario).is_file():
            return root / scenario
    raise ConfigError(
        "this scenario is needed and not there", file=scenario, help="run it in a checkout of the project"
    )


def exit_status(comparisons: Iterable[Comparison]) -> int:
    """Return 1 when a declared tolerance is broken, else 0."""
    return int(any(comparison.within is False for comparison in comparisons))


# --- how it is shown -----------------------------------------------------------------------------------

KEPT: Final = {None: "", True: " kept", False: " BROKEN"}


def number(value: float) -> str:
    """Write a figure with four significant digits and no exponent."""
    text = f"{value:.4g}"
    if "e" in text:
        return f"{value:,.0f}" if abs(value) >= 1 else f"{value:.6f}"
    return text


def _deviation(comparison: Comparison) -> str:
    return "" if comparison.deviation_percent is None else f"{comparison.deviation_percent:+.1f} %"


def _tolerance(comparison: Comparison) -> str:
    if comparison.tolerance_percent is None:
        return ""
    return f"± {comparison.tolerance_percent:g} %{KEPT[comparison.within]}"


def table(comparisons: Sequence[Comparison]) -> Table:
    """Return the comparison as a rich table: each row's hardware, then its figures."""
    from rich.text import Text

    from vtsim.study.table import section

    shown = section("row and figure", ("published", "simulated", "deviation"))
    for heading in ("unit", "split", "tolerance"):
        shown.add_column(heading, no_wrap=True)
    shown.columns[0].no_wrap, shown.columns[0].overflow = False, "fold"
    before = ""
    for one in comparisons:
        if one.row != before:
            shown.add_row(Text.assemble((one.row, "bold"), " ", (one.hardware, "dim")), *[""] * 3, "", one.split)
        shown.add_row(
            f"  {one.key}",
            number(one.published),
            number(one.simulated),
            _deviation(one),
            one.unit,
            "",
            _tolerance(one),
            style="red" if one.within is False else "",
        )
        before = one.row
    return shown


def to_json(comparisons: Iterable[Comparison]) -> str:
    """Return the comparison as one JSON array."""
    return json.dumps([attrs.asdict(one) for one in comparisons], indent=2, ensure_ascii=False)


def to_markdown(comparisons: Sequence[Comparison]) -> str:
    """Return docs/validation.md: the same bytes for the same figures."""
    lines = [
        "# Validation",
        "",
        "Simulated figures beside published ones; written by `vtsim validate --write-docs`, not by hand.",
        "Rows of split *calibrate* may set parameters: agreement there shows that the wiring is as meant.",
        "Rows of split *validate* set nothing; their deviation is reported, whatever it is.",
    ]
    known = registered()
    for id in dict.fromkeys(one.row for one in comparisons):
        of, binding = row(id), known.get(id)
        lines += [
            "",
            f"## {id} ({of.split})",
            "",
            f"{of.metric}. {of.hardware}.",
            f"{of.source}; {of.where}.",
            "",
        ]
        lines += ["| figure | published | simulated | unit | deviation | tolerance | note |"]
        lines += ["|---|---:|---:|---|---:|---:|---|"]
        for one in (one for one in comparisons if one.row == id):
            cells = (number(one.published), number(one.simulated), one.unit, _deviation(one), _tolerance(one))
            lines.append("| " + " | ".join((one.key, *cells, one.note)) + " |")
        if kernel := old_host(id):
            whose = "Guests' and the host's" if old_kernel(id) else "The host's"
            nearest = f"{whose} paths are as long as in Linux 4.19, the counted kernel nearest in time to {kernel}."
            lines += ["", nearest]
        if binding is not None and binding.deviates:
            lines += ["", f"Why it deviates: {binding.deviates}."]
        if binding is not None and binding.unbound:
            lines += ["", f"Not compared: {binding.unbound}."]
    missing = [id for id in published() if id not in known]
    lines += ["", "## Rows without a binding", "", *(f"- {id}: {row(id).metric}" for id in missing)]
    return "\n".join(lines) + "\n"
