"""Popek and Goldberg's analysis of the instruction set, as a table and as JSON."""

from __future__ import annotations

import json

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from vtsim.platform.isa import Analysis
from vtsim.study.table import section


def isa_json(analysis: Analysis) -> str:
    """One JSON object: the class of each op and why, the ops left out, the conclusions and the offenders."""
    return json.dumps(
        {
            "ops": {
                each.op: {"class": each.kind, "changes": each.control, "depends_on": each.behaviour}
                for each in analysis.ops
            },
            "left_out": analysis.left_out,
            **{name: not offenders for name, offenders in _conclusions(analysis).items()},
            "offenders": analysis.offenders,
            "hybrid_offenders": analysis.hybrid_offenders,
        },
        indent=2,
    )


def isa_text(analysis: Analysis) -> RenderableType:
    """A row for each op that is not innocuous, then the conclusions."""
    table = section("op", ())
    for heading in ("class", "op", "changes", "depends on"):
        table.add_column(heading)
    for each in sorted(analysis.ops, key=lambda each: each.kind):
        if each.kind != "innocuous":
            table.add_row(each.kind, each.op, ", ".join(each.control), ", ".join(each.behaviour))
    lines = [
        Text(f"{name.replace('_', ' ')}: " + (f"no, because of {', '.join(offenders)}" if offenders else "yes"))
        for name, offenders in _conclusions(analysis).items()
    ]
    lines.append(Text(f"Not analysed: {', '.join(analysis.left_out)}.", style="dim"))
    return Group(table, Padding(Group(*lines), (1, 0, 0, 0)))


def _conclusions(analysis: Analysis) -> dict[str, tuple[str, ...]]:
    """What keeps each conclusion from holding. Recursion asks no more of the instruction set (theorem 2)."""
    return {
        "virtualizable": analysis.offenders,
        "recursively_virtualizable": analysis.offenders,
        "hybrid_virtualizable": analysis.hybrid_offenders,
    }
