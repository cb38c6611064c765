"""A comparison of techniques as tables, JSON and a drawing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Final

import attrs
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from vtsim.study.compare import Comparison
from vtsim.study.report import NOTHING, count, percent, times
from vtsim.study.result import Result
from vtsim.study.table import section

HYPERCALL: Final = "VMCALL"
SHORT: Final[Mapping[str, str]] = {"trap-and-emulate": "trap-emulate", "binary-translation": "bin. transl.",
                                   "dynamic-translation": "dyn. transl.", "paravirtual": "paravirt."}  # fmt: skip


def interventions(result: Result) -> dict[str, int]:
    """How often the guest did not run by itself: {kind: events}, without zeroes.

    `emulated` are instructions that were executed in its place, after a trap, in a call-out or by a program.
    """
    found = {
        "exits": sum(one.count for one in result.exits if one.reason != HYPERCALL),
        "hypercalls": sum(one.count for one in result.exits if one.reason == HYPERCALL),
    }
    if result.hypercalls is not None:
        found["hypercalls"] += sum(result.hypercalls.calls.values())
        found["stops"] = sum(result.hypercalls.stops.values())
    if result.monitor is not None:
        emulated = result.guest.ring0.emulated + result.guest.ring3.emulated
        found |= {"traps": result.monitor.traps, "system calls": result.monitor.system_calls, "emulated": emulated}
    return {kind: number for kind, number in found.items() if number}


def translator_statistics(result: Result) -> dict[str, int]:
    """What a translator counted; empty where nothing was translated."""
    return {} if result.translations is None else attrs.asdict(result.translations)


def comparison_tables(found: Comparison) -> RenderableType:
    """Everything that the techniques differ in, in the order in which a reader asks."""
    first, *others = _parts(found)
    return Group(first, *(Padding(part, (1, 0, 0, 0)) for part in others))


def _parts(found: Comparison) -> Iterator[RenderableType]:
    title = Text.assemble((found.scenario, "bold"), f"  under {len(found.results)} techniques")
    yield Group(title, Text(found.description, style="dim")) if found.description else title
    if found.results:
        yield _figures(found.results)
        yield _activities(found.results)
    translated = {name: row for name, one in found.results.items() if (row := translator_statistics(one))}
    if translated:
        yield _columns("Translator", translated)
    counted = {name: attrs.asdict(one.software) for name, one in found.results.items() if one.software is not None}
    if counted:
        yield _columns("Software CPU", counted)
    if found.refused or any(one.stopped for one in found.results.values()):
        yield Group(*_reasons(found))


def _figures(results: Mapping[str, Result]) -> RenderableType:
    table = section("Technique", ("efficiency", "ring 0", "ring 3", "slowdown", "interventions"))
    for name, one in results.items():
        shares = one.efficiency
        slowdown = NOTHING if one.slowdown is None else times(one.slowdown)
        events = "\n".join(f"{count(number)} {kind}" for kind, number in interventions(one).items())
        figures = map(percent, (shares.overall, shares.ring0, shares.ring3))
        table.add_row(name, *figures, slowdown, events or NOTHING)
    return table


def _activities(results: Mapping[str, Result]) -> RenderableType:
    elapsed = {name: one.cycles.elapsed for name, one in results.items()}
    return _columns("Cycles", {name: {"elapsed": elapsed[name], **activities(one)} for name, one in results.items()})


def activities(result: Result) -> dict[str, int]:
    """Cycles by activity, over all privilege states."""
    sums: dict[str, int] = {}
    for row in result.cycles.by.values():
        for activity, cycles in row.items():
            sums[activity] = sums.get(activity, 0) + cycles
    return sums


def _columns(title: str, rows: Mapping[str, Mapping[str, int]]) -> RenderableType:
    """A column for each technique, a row for each name, the largest first."""
    names = {name for row in rows.values() for name, number in row.items() if number}
    table = section(title, [SHORT.get(name, name) for name in rows])
    for column in table.columns[1:]:
        column.no_wrap = False
    for name in sorted(names, key=lambda name: (-max(row.get(name, 0) for row in rows.values()), name)):
        table.add_row(name.replace("_", " "), *(count(row.get(name, 0)) for row in rows.values()))
    return table


def _reasons(found: Comparison) -> Iterator[Text]:
    for name, one in found.results.items():
        for vm, why in one.stopped.items():
            yield Text.assemble((f"{name}: {vm} stopped early", "bold red"), f": {why}")
    for name, why in found.refused.items():
        yield Text.assemble((f"{name} does not apply", "bold"), f": {why}")


def comparison_json(found: Comparison) -> str:
    """One object: {scenario, description, techniques: {name: result}, refused: {name: reason}}."""
    plain = {
        "scenario": found.scenario, "description": found.description,
        "techniques": {name: one.to_dict() for name, one in found.results.items()}, "refused": dict(found.refused),
    }  # fmt: skip
    return json.dumps(plain, indent=2, ensure_ascii=False, allow_nan=False)


# --- drawing ----------------------------------------------------------------------------------------------------------

PALETTE: Final = ("#8fce8f", "#9bd3e6", "#f6d96b", "#f2a07b", "#b9c4f0", "#d9b3e6", "#c8b28f", "#9ad1c0")
REST: Final = "#dddddd"
LEFT, WIDTH, BAR, GAP, TOP = 160, 560, 26, 14, 64


def comparison_svg(found: Comparison) -> str:
    """Elapsed cycles as bars, split by activity; beside each its slowdown and efficiency."""
    sums = {name: activities(one) for name, one in found.results.items()}
    totals: dict[str, int] = {}
    for row in sums.values():
        for activity, cycles in row.items():
            totals[activity] = max(totals.get(activity, 0), cycles)
    shown = sorted(totals, key=lambda activity: (-totals[activity], activity))[: len(PALETTE)]
    longest = max((sum(row.values()) for row in sums.values()), default=0) or 1
    rows = -(-(len(shown) + 1) // 4)
    height = TOP + len(sums) * (BAR + GAP) + 24 * rows + 20
    width = LEFT + WIDTH + 170
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="13">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        label(10, 24, f"{found.scenario}: cycles by technique", 16),
        label(10, 44, found.description, 12),
    ]
    y = TOP
    for name, row in sums.items():
        result = found.results[name]
        parts.append(label(10, y + 18, name))
        x = float(LEFT)
        rest = sum(row.values()) - sum(row.get(activity, 0) for activity in shown)
        for colour, cycles in (*zip(PALETTE, (row.get(a, 0) for a in shown), strict=False), (REST, rest)):
            size = WIDTH * cycles / longest
            if size >= 0.05:
                parts.append(f'<rect x="{x:.1f}" y="{y}" width="{size:.1f}" height="{BAR}" fill="{colour}"/>')
            x += size
        slowdown = "stopped early" if result.slowdown is None else times(result.slowdown)
        parts.append(label(round(x) + 8, y + 18, f"{slowdown}, {percent(result.efficiency.overall)} direct"))
        y += BAR + GAP
    for n, (colour, activity) in enumerate((*zip(PALETTE, shown, strict=False), (REST, "others"))):
        x, at = LEFT + n % 4 * 160, y + 10 + n // 4 * 24
        parts.append(f'<rect x="{x}" y="{at}" width="14" height="14" fill="{colour}"/>')
        parts.append(label(round(x) + 20, at + 12, activity.replace("_", " "), 12))
    return "\n".join([*parts, "</svg>"]) + "\n"


def label(x: int, y: int, text: str, size: int = 13) -> str:
    """A text of the drawing."""
    escaped = text.replace("&", "&amp;").replace("<", "&lt;")
    return f'<text x="{x}" y="{y}" font-size="{size}">{escaped}</text>'
