"""Popek and Goldberg's analysis of the instruction set, as a table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from vtsim.platform.isa import IN_OTHER_MODES, OFFENDER, Analysis
from vtsim.platform.isa_nonroot import NonRootAnalysis
from vtsim.study.table import section


def isa_json(analysis: Analysis) -> str:
    """One JSON object: the class of each op and why, the ops left out, the conclusions and the offenders."""
    return json.dumps(
        {
            "ops": {
                each.op: {"class": each.kind, "changes": each.control, "depends_on": each.behaviour}
                for each in analysis.ops
            },
            "isa": analysis.isa,
            "left_out": analysis.left_out,
            **{name: not offenders for name, offenders in _conclusions(analysis).items()},
            "offenders": analysis.offenders,
            "hybrid_offenders": analysis.hybrid_offenders,
            "robin_irvine": analysis.literature,
        },
        indent=2,
    )


def isa_text(analysis: Analysis) -> RenderableType:
    """A row for each op that is not innocuous, then the others by name, and the conclusions."""
    table = section("class", ())
    table.columns[0].no_wrap = False
    for heading in ("op", "changes", "depends on"):
        table.add_column(heading, no_wrap=heading == "op")
    named: dict[str, list[str]] = {}
    for each in sorted(analysis.ops, key=lambda each: each.kind):
        if each.executed and each.kind != "innocuous":
            table.add_row(each.kind, each.op, ", ".join(each.control), ", ".join(each.behaviour))
        else:
            named.setdefault(each.kind, []).append(each.op)
    lines = [Text(f"{kind.capitalize()}: {', '.join(ops)}.") for kind, ops in named.items()]
    lines += [Text(f"Not analysed: {name}, {why}.", style="dim") for name, why in analysis.left_out.items()]
    return Group(table, Padding(Group(*lines, *_literature(analysis), *_said(_conclusions(analysis))), (1, 0, 0, 0)))


def _literature(analysis: Analysis) -> list[Text]:
    """How many of the instructions of Robin and Irvine offend, and why the others do not."""
    found = analysis.literature
    offenders = [name for name, said in found.items() if said == OFFENDER]
    line = f"Of the {len(found)} sensitive unprivileged instructions of Robin and Irvine, {len(offenders)} offend"
    names = f": {', '.join(offenders)}." if offenders else "."
    return [Text(line + names), *(Text(f"{name}: {why}.", style="dim") for name, why in IN_OTHER_MODES.items())]


def _conclusions(analysis: Analysis) -> dict[str, tuple[str, ...]]:
    """What keeps each conclusion from holding. Recursion asks no more of the instruction set (theorem 2)."""
    return {
        "virtualizable": analysis.offenders,
        "recursively_virtualizable": analysis.offenders,
        "hybrid_virtualizable": analysis.hybrid_offenders,
    }


def _said(conclusions: Mapping[str, tuple[str, ...]]) -> list[Text]:
    """A line for each conclusion, with what keeps it from holding."""
    return [
        Text(f"{name.replace('_', ' ')}: " + (f"no, because of {', '.join(offenders)}" if offenders else "yes"))
        for name, offenders in conclusions.items()
    ]


# --- non-root operation -----------------------------------------------------------------------------------------------


def nonroot_json(analysis: NonRootAnalysis) -> str:
    """One JSON object: what makes each op exit in N0 and N3, what it is sensitive to otherwise, the conclusions."""
    ops: dict[str, dict[str, object]] = {}
    for each in analysis.ops:
        ops.setdefault(each.op, {})[each.ring] = {
            "exits": each.exits,
            "without_controls": {"changes": each.free.changes, "depends_on": each.free.depends},
            "with_all_controls": {"changes": each.held.changes, "depends_on": each.held.depends},
        }
    return json.dumps(
        {
            "ops": ops,
            "controls": analysis.controls,
            **{name: not offenders for name, offenders in _nonroot_conclusions(analysis).items()},
            "offenders": analysis.offenders,
            "offenders_without_controls": analysis.offenders_without_controls,
        },
        indent=2,
    )


def nonroot_text(analysis: NonRootAnalysis) -> RenderableType:
    """A row for each op that is sensitive without a control or exits by one, then the conclusions."""
    table = section("op", ())
    table.columns[0].no_wrap = True
    for heading in ("ring", "exits", "else changes", "else depends on"):
        table.add_column(heading, no_wrap=heading == "exits")
    for each in analysis.ops:
        if each.free or each.held or each.exits not in ("always", "never"):
            changes, depends = (", ".join(found) for found in (each.free.changes, each.free.depends))
            table.add_row(each.op, each.ring, each.exits, changes, depends)
    always = dict.fromkeys(each.op for each in analysis.ops if each.exits == "always")
    lines = _said(_nonroot_conclusions(analysis))
    return Group(table, Padding(Group(Text(f"Always exit: {', '.join(always)}."), *lines), (1, 0, 0, 0)))


def _nonroot_conclusions(analysis: NonRootAnalysis) -> dict[str, tuple[str, ...]]:
    """VMX instructions exit, so that a monitor below another finds the same processor again (theorem 2)."""
    return {
        "virtualizable_with_all_controls": analysis.offenders,
        "recursively_virtualizable_with_all_controls": analysis.offenders,
        "virtualizable_without_controls": analysis.offenders_without_controls,
    }
