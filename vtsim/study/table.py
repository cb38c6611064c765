"""The one look of every table that vtsim prints."""

from __future__ import annotations

from collections.abc import Iterable

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text


def section(title: str, numbers: Iterable[str] = ()) -> Table:
    """A table whose first column is headed by the section's title; `numbers` head right-aligned columns."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="none", padding=(0, 1, 0, 0))
    table.add_column(Text(title, style="bold"), no_wrap=True)
    for column in numbers:
        table.add_column(column, justify="right", no_wrap=True)
    return table
