"""The page that shows every technique: what each is, and what one guest under all of them measures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from vtsim.study.compare import Comparison
from vtsim.study.compare_view import activities, interventions, translator_statistics
from vtsim.study.report import count, percent, times
from vtsim.vmm.techniques import techniques

INTRODUCTION: Final = """# Techniques

How a guest's kernel can be virtualized: `vmm.technique` names one, and each is one file in `vtsim/vmm/techniques/`.
This page is written by `python -m scripts.generate_techniques`, which runs the guest below under all of them, as
`vtsim compare workloads/techniques/boot_like.yaml` does.

"""


def doors() -> str:
    """The table of all techniques."""
    lines = [
        "| technique | what it is | translation of guest memory | the processor executes guest code |",
        "|---|---|---|---|",
    ]
    for name, one in techniques.items():
        executes = "no" if one.in_software else "yes, its kernel in ring 3" if one.deprivileged else "yes"
        paging = ", ".join(one.paging) or "what the processor has"
        lines.append(f"| `{name}` | {one.meaning} | {paging} | {executes} |")
    return "\n".join(lines) + "\n"


def page(found: Mapping[str, Comparison]) -> str:
    """The whole page, of comparisons by the title of their section."""
    parts = [INTRODUCTION, doors()]
    for title, comparison in found.items():
        parts += [f"\n## {title}\n\n", "\n".join(_section(comparison)), "\n"]
    return "".join(parts)


def _section(found: Comparison) -> Iterator[str]:
    yield f"{found.description}.\n"
    yield "| technique | efficiency | ring 0 | ring 3 | slowdown | interventions |"
    yield "|---|--:|--:|--:|--:|---|"
    for name, one in found.results.items():
        shares = (one.efficiency.overall, one.efficiency.ring0, one.efficiency.ring3)
        slowdown = "stopped early" if one.slowdown is None else times(one.slowdown)
        events = ", ".join(f"{count(number)} {kind}" for kind, number in interventions(one).items())
        yield f"| `{name}` | {' | '.join(map(percent, shares))} | {slowdown} | {events or 'none'} |"
    yield ""
    for name, one in found.results.items():
        for vm, why in one.stopped.items():
            yield f"Under `{name}` {vm} stopped early: {why}.\n"
    for name, why in found.refused.items():
        yield f"`{name}` does not apply: {why}.\n"
    yield from _columns("cycles", {name: activities(one) for name, one in found.results.items()})
    translated = {name: row for name, one in found.results.items() if (row := translator_statistics(one))}
    if translated:
        yield from _columns("translator", translated)


def _columns(title: str, rows: Mapping[str, Mapping[str, int]]) -> Iterator[str]:
    names = {name for row in rows.values() for name, number in row.items() if number}
    yield f"| {title} | {' | '.join(rows)} |"
    yield f"|---|{'--:|' * len(rows)}"
    for name in sorted(names, key=lambda name: (-max(row.get(name, 0) for row in rows.values()), name)):
        yield f"| {name.replace('_', ' ')} | {' | '.join(count(row.get(name, 0)) for row in rows.values())} |"
    yield ""


def named(text: str) -> tuple[str, ...]:
    """The techniques that a written page lists, in order."""
    first = text.partition("\n\n## ")[0]
    return tuple(line.split("`")[1] for line in first.splitlines() if line.startswith("| `"))
