"""Tables of exits as `perf kvm stat report` and `kvmexit` of bcc print them: exits by reason, and nothing beside.

A file may hold several tables, each behind its heading. Shares and times are passed over. Lines that belong to no table
are, too, so that a log of a terminal can be read; a table that does not add up to its own total is refused.

Not modelled: tables of other events than exits (`--event=msr` and the like).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Final

from attrs import Factory, define

from vtsim.base.errors import ConfigError, Problem
from vtsim.guest.traces.recorded_exits import NAMES, reason_name

# fmt: off
HEADING: Final = re.compile(r"\s*(VM-EXIT\s+Samples|KVM_EXIT_REASON\s+COUNT|PID\s+TID\s+KVM_EXIT_REASON)")
OTHER_EVENT: Final = re.compile(r"\s*(.+?)\s+Samples\s+Samples%")
OF_PERF: Final = re.compile(r"\s*([A-Za-z_][\w.+-]*)\s+(\d+)\s+\d+(?:\.\d+)?%")
OF_BCC: Final = re.compile(r"\s*(?:\d+\s+\d+\s+)?([A-Z][A-Z_]+)\s+(\d+)\s*$")
TOTAL: Final = re.compile(r"\s*Total Samples:\s*(\d+)")
# fmt: on


@define
class ExitTable:
    """Exits by reason, under our names where we know them; `total` is what the table says itself, if it does."""

    line: int
    counts: Counter[str] = Factory(Counter)
    total: int | None = None


def exit_tables(text: str, file: str) -> tuple[ExitTable, ...]:
    """All tables of exits in a text, or `ConfigError` where there is none or one does not add up."""
    found = [table for table in _tables(text.splitlines()) if table.counts or table.total is not None]
    for table in found:
        if table.total is not None and table.total != table.counts.total():
            raise _refusal(
                file, table.line, f"the exits of this table are {table.counts.total()}, not {table.total}", text
            )
    if not found:
        raise ConfigError("no table of exits in this file", file=file, help="perf kvm stat report, or kvmexit of bcc")
    return tuple(found)


def _tables(lines: list[str]) -> Iterator[ExitTable]:
    table: ExitTable | None = None
    headed = other = False  # has it a heading; are these rows of another event?
    for number, line in enumerate(lines, 1):
        row, bare = OF_PERF.match(line), OF_BCC.match(line)
        if bare and reason_name(bare[1]) not in NAMES:
            bare = None
        if HEADING.match(line) or (table is None and not other and (row or bare)):
            if table is not None:
                yield table
            table, headed, other = ExitTable(number), HEADING.match(line) is not None, False
        elif OTHER_EVENT.match(line):
            if table is not None:
                yield table
            table, other = None, True
        if table is None:
            other = other and TOTAL.match(line) is None
            continue
        if total := TOTAL.match(line):
            table.total = int(total[1])
            yield table
            table = None
        elif found := row or bare:
            table.counts[reason_name(found[1])] += int(found[2])
        elif line.strip() and not headed:  # without a heading anything else ends a table
            yield table
            table = None
    if table is not None:
        yield table


def _refusal(file: str, line: int, why: str, text: str) -> ConfigError:
    problem = Problem(message=why, help="", file=file, line=line, column=0, source=text.splitlines()[line - 1])
    return ConfigError.of([problem])
