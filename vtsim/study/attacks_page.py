"""The page that shows what becomes of every attack under every technique and paging: computed by the suite itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from attrs import frozen

from vtsim.config import parse_scenario, resolve
from vtsim.platform.spec import Scenario
from vtsim.study.attacks import Attempt, Skipped, Suite

SCENARIO: Final = """
machine: {memory: 512 MiB, devices: [vga, pro-1000]}
vmm: {personality: minimal}
vms:
  - memory: 16 MiB
    devices: [vga, pro-1000]
    assigned: [pro-1000]
    guest:
      kernel: {tick: off, dma: strict}
      processes: [{phases: [{primitive: syscall, iterations: 3}]}]
"""
LA57: Final = ("vms.0.guest.kernel.paging=5-level", "machine.cpu={features.la57: true, vmx.generation: ice-lake-sp}")
NATIVE: Final = "vmm.technique=native"
TRANSLATION: Final = "vmm.technique=dynamic-translation"
WAYS: Final[Mapping[str, tuple[str, ...]]] = {
    "native": (NATIVE,),
    "native, five levels": (NATIVE, *LA57),
    "native, deferred invalidation": (NATIVE, "vms.0.guest.kernel.dma=deferred", "vms.0.guest.kernel.tick=4 ms"),
    "native, no invalidation": (NATIVE, "vms.0.guest.kernel.dma=never"),
    "EPT": ("vmm.paging=ept",),
    "EPT, five levels": ("vmm.paging=ept", *LA57),
    "EPT, no remapping unit": ("vmm.paging=ept", "machine.iommu.mode=off"),
    "shadow": ("vmm.paging=shadow",),
    "agile": ("vmm.paging=agile",),
    "direct-pv": ("vmm.paging=direct-pv",),
    "trap-and-emulate": ("vmm.technique=trap-and-emulate",),
    "trap-and-emulate, virtualizable": ("vmm.technique=trap-and-emulate", "machine.isa=virtualizable"),
    "binary-translation": ("vmm.technique=binary-translation",),
    "paravirtual": ("vmm.technique=paravirtual",),
    "user-mode": ("vmm.technique=user-mode", "vms.0.devices=[]", "vms.0.assigned=[]", "vms.0.guest.kernel.probe=false"),
    "interpreter": ("vmm.technique=interpreter",),
    "dynamic-translation": (TRANSLATION,),
    "dynamic-translation, native methods": (TRANSLATION, "vmm.native_methods=true"),
}
INTRODUCTION: Final = """# Attacks

What becomes of every attack of the suite in `vtsim/study/attacks.py`, which is part of [a verdict](verdict.md), under
every technique and way of paging. Each attack is a guest that runs beside a second VM, where the technique lets two be
there; afterwards canaries, the machine's registers, MSRs and ports, and the second VM's share of the CPU are looked at.
This page is written by `python -m scripts.generate_attacks`, which makes all of them. `tests/study/test_containment.py`
takes the mechanisms away by which attacks are held, and sees them get through. EPT, shadow, agile and direct-pv are
ways of paging under technique `hardware`.

*held*: without effect outside the attacker's VM. **through**: with one, as listed below. `·`: there was no occasion.
"""


@frozen(kw_only=True)
class Tried:
    """The suite in one way."""

    attempts: Sequence[Attempt]
    skipped: Sequence[Skipped]


def scenario_in(way: str) -> Scenario:
    """The guest of the page in one way."""
    return resolve(parse_scenario(SCENARIO, list(WAYS[way])), "attacks")


def tried(way: str) -> Tried:
    """Make every attack in one way."""
    attempts, skipped = Suite(scenario_in(way)).run()
    return Tried(attempts=attempts, skipped=skipped)


def page(found: Mapping[str, Tried]) -> str:
    """The whole page."""
    return "\n".join((INTRODUCTION, *_table(found), *_through(found), *_within(found), *_skipped(found))) + "\n"


def cells(found: Mapping[str, Tried]) -> dict[str, dict[str, str]]:
    """{attack: {way: what became of it}}; no entry where there was no occasion."""
    names: dict[str, dict[str, str]] = {}
    for way, one in found.items():
        for attempt in one.attempts:
            names.setdefault(attempt.name, {})[way] = "held" if attempt.contained else "**through**"
    return names


def _table(found: Mapping[str, Tried]) -> Iterator[str]:
    yield f"| attack | {' | '.join(found)} |"
    yield f"|---|{'---|' * len(found)}"
    for name, row in cells(found).items():
        yield f"| {name} | {' | '.join(row.get(way, '·') for way in found)} |"
    totals = ((sum(each.contained for each in one.attempts), len(one.attempts)) for one in found.values())
    yield f"| held | {' | '.join(f'{held} of {made}' for held, made in totals)} |"


def _through(found: Mapping[str, Tried]) -> Iterator[str]:
    yield "\n## What got through\n"
    for way, one in found.items():
        for each in one.attempts:
            if not each.contained:
                yield f"- {way}: {each.name}: {'; '.join(each.effects)}."


def _within(found: Mapping[str, Tried]) -> Iterator[str]:
    yield "\n## What the platform only bounds\n"
    for way, one in found.items():
        for each in one.attempts:
            if each.contained and each.within:
                yield f"- {way}: {each.name}: {each.within}."


def _skipped(found: Mapping[str, Tried]) -> Iterator[str]:
    yield "\n## What there was no occasion for\n"
    for way, one in found.items():
        reasons: dict[str, list[str]] = {}
        for each in one.skipped:
            reasons.setdefault(each.why, []).append(each.name)
        for why, names in reasons.items():
            yield f"- {way}: {why}: {', '.join(names)}."
