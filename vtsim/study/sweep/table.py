"""A finished study as one plain table: what analyses, plots and reports take, and all that they know of a sweep."""

from __future__ import annotations

from collections.abc import Mapping

from attrs import frozen

Value = str | int | float | bool | None


@frozen(kw_only=True)
class Column:
    """One column of the table: an axis of the study, or a metric of its results.

    `path` is the setting (`vmm.paging`) or the key of the result (`efficiency.overall`) as scenarios and docs/result.md
    spell them, `label` what a reader sees, `unit` empty for a plain number or a name.
    """

    path: str
    label: str
    unit: str = ""
    meaning: str = ""


@frozen(kw_only=True)
class Row:
    """One finished run: its place on every axis, its replicate, and every metric (None: a run without that figure)."""

    identity: str
    axes: Mapping[str, Value]
    replicate: int
    metrics: Mapping[str, Value]


@frozen(kw_only=True)
class StudyTable:
    """All finished runs of a study, in the order of its design; failed and missing ones are counted only."""

    name: str
    question: str
    axes: tuple[Column, ...]
    metrics: tuple[Column, ...]
    rows: tuple[Row, ...]
    failed: int = 0
    missing: int = 0

    def lacks(self, column: Column) -> bool:
        """Does no run have this metric?"""
        return all(row.metrics[column.path] is None for row in self.rows)
