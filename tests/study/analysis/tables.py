"""Hand-made tables of studies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product

from vtsim.study.sweep.table import Column, Row, StudyTable, Value


def table(
    axes: Mapping[str, Sequence[Value]],
    figures: Mapping[tuple[Value, ...], Sequence[Mapping[str, Value]]],
    *,
    units: Mapping[str, str] | None = None,
    labels: Mapping[str, str] | None = None,
) -> StudyTable:
    """A table of a whole grid, as far as `figures` {place: metrics of each replicate} has its places."""
    return only_rows(axes, figures, list(product(*axes.values())), units=units, labels=labels)


def only_rows(
    axes: Mapping[str, Sequence[Value]],
    figures: Mapping[tuple[Value, ...], Sequence[Mapping[str, Value]]],
    places: Sequence[tuple[Value, ...]] = (),
    *,
    units: Mapping[str, str] | None = None,
    labels: Mapping[str, str] | None = None,
) -> StudyTable:
    """A table of the places that `figures` has, in its order or in that of `places`."""
    metrics = list(dict.fromkeys(name for runs in figures.values() for run in runs for name in run))
    units, labels = units or {}, labels or {}
    rows = [
        Row(identity=f"{place}{n}", axes=dict(zip(axes, place, strict=True)), replicate=n, metrics=run)
        for place in places or figures
        for n, run in enumerate(figures.get(place, ()))
    ]
    columns = {
        name: Column(path=name, label=labels.get(name, name), unit=units.get(name, "")) for name in [*axes, *metrics]
    }
    return StudyTable(
        name="hand-made",
        question="What does a table say?",
        axes=tuple(columns[name] for name in axes),
        metrics=tuple(columns[name] for name in metrics),
        rows=tuple(rows),
    )
