"""`vtsim validate`: published figures beside simulated ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from vtsim.base.errors import ConfigError
from vtsim.base.whole_file import write_whole
from vtsim.cli.output import emit, note, show
from vtsim.config import parse_scenario
from vtsim.study.exit_costs import exit_costs
from vtsim.study.exit_costs import to_markdown as costs_section
from vtsim.study.run import run
from vtsim.study.validate import exit_status, table, to_json, to_markdown, validate

PAGE: Final = Path("docs/validation.md")


def validate_rows(rows: Sequence[str] | None, sets: Sequence[str] = (), *, json: bool, write_docs: bool) -> int:
    """Compare, print, write; return 1 when a declared tolerance is broken."""
    if write_docs and rows:
        raise ConfigError("the page holds all rows, and --row chooses some", field="--write-docs")
    if write_docs and sets:
        raise ConfigError("the page holds what is shipped, and --set changes it", field="--write-docs")
    if write_docs and not PAGE.parent.is_dir():
        raise ConfigError(f"{PAGE.parent} is not here; run it in a checkout of vtsim", field="--write-docs")
    comparisons = validate(rows or None, progress=_progress, sets=sets)
    if json:
        emit(to_json(comparisons) + "\n")
    else:
        show(table(comparisons))
    if write_docs:
        costs = exit_costs(lambda text: run(parse_scenario(text, name="exit costs")))
        text = to_markdown(comparisons) + "\n".join(costs_section(costs)) + "\n"
        write_whole(PAGE, text.encode(), field="--write-docs")
        note(f"wrote {PAGE}")
    return exit_status(comparisons)


def _progress(number: int, total: int, scenario: str) -> None:
    note(f"[{number + 1}/{total}] {scenario}")
