"""The page of differences between the model and recorded cases, from the table of their causes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from vtsim.study.vmx.known_differences import KNOWN, MODEL, NOBODY, RECORDER

#    cases, recorded, the model by the manual, section
HELD: Final = (
    (
        'reserved bits of IA32_DEBUGCTL, with "load debug controls"',
        "enters",
        "VM-entry failure 33",
        "Checks on Guest Control Registers, Debug Registers, and MSRs",
    ),
    (
        "reserved bits of IA32_PERF_GLOBAL_CTRL (guest)",
        "enters",
        "VM-entry failure 33",
        "Checks on Guest Control Registers, Debug Registers, and MSRs",
    ),
    (
        "reserved bits of IA32_PERF_GLOBAL_CTRL (host)",
        "enters",
        "VM-instruction error 8",
        "Checks on Host Control Registers, MSRs, and SSP",
    ),
    (
        "pending debug exceptions: bits 63:32; BS against RFLAGS.TF and BTF while events are blocked or in HLT",
        "enters",
        "VM-entry failure 33",
        "Checks on Guest Non-Register State",
    ),
    ("RIP that is not canonical", "enters, then #GP", "VM-entry failure 33", "Checks on Guest RIP, RFLAGS, and SSP"),
    (
        "injection of an event that HLT does not allow",
        "enters",
        "VM-entry failure 33",
        "Checks on Guest Non-Register State",
    ),
    (
        '"entry to SMM" and "deactivate dual-monitor treatment" outside SMM',
        "VM-entry failure 33",
        "VM-instruction error 7",
        "VM-Entry Control Fields",
    ),
    (
        '"process posted interrupts" without virtual-interrupt delivery',
        "enters",
        "VM-instruction error 7",
        "VM-Execution Control Fields",
    ),
    (
        '"IA-32e mode guest" with CR0.PG or CR4.PAE clear',
        "enters",
        "VM-entry failure 33",
        "Checks on Guest Control Registers, Debug Registers, and MSRs",
    ),
    (
        "EPT violation on a guest paging structure with accessed and dirty flags on",
        "write",
        "read and write",
        "Exit Qualification for EPT Violations",
    ),
    (
        "setting a guest accessed or dirty flag in a page that EPT does not let write",
        "no exit",
        "EPT violation",
        "EPT Violations",
    ),
    (
        "external interrupt with external-interrupt exiting and RFLAGS.IF clear",
        "waits",
        "VM exit 1",
        "External Interrupts",
    ),
    (
        "interrupt window in the HLT activity state",
        "not taken",
        "VM exit 7",
        "Interrupt-Window Exiting and Virtual-Interrupt Delivery",
    ),
)
"""What is held against the manual's reading instead of the recorded outcome, which the recording disputes itself."""
NOT_RECORDED: Final = (
    ("VMCALL in root operation", "not implemented", "VM-instruction error 1", "VMCALL—Call to VM Monitor"),
)

Row = tuple[str, str, str, str]


def page() -> str:
    """Where the model contradicts recorded cases, and why."""
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    yield from (
        "# Where the model contradicts the recorded cases",
        "",
        "Generated from `vtsim/study/vmx/known_differences.py`, by which `vtsim vmcs replay` explains differences.",
        "A row names cases by what they have in common, not one by one; the manual is quoted by titles of sections.",
        "",
        "## Held against the manual",
        "",
        "The recording says of these cases that they are disputed, and what the manual says of them; the replay",
        "compares with that, not with the recorded outcome.",
        "",
    )
    yield from _table(HELD)
    yield from ("", "## Recorded and not disputed", "", "These differ in a replay. The model keeps to the manual.", "")
    yield from _table(_rows(RECORDER))
    yield from (
        "",
        "## What the recording does not hold",
        "",
        "These differ, and no manual says which is right.",
        "",
    )
    yield from _table(_rows(NOBODY))
    yield from ("", "## Limits of the model", "", "These differ, and the recorder is right.", "")
    yield from _table(_rows(MODEL))
    yield from ("", "## Not recorded", "")
    yield from _table(NOT_RECORDED)


def _rows(whose: str) -> Iterator[Row]:
    return ((each.cases, each.recorded, each.model, each.section) for each in KNOWN if each.whose == whose)


def _table(rows: Iterable[Row]) -> Iterator[str]:
    yield "| cases | recorded | the model | section |"
    yield "|---|---|---|---|"
    for cases, recorded, model, title in rows:
        cited = f'SDM: "{title}"' if title else "-"
        yield f"| {cases} | {recorded} | {model} | {cited} |"
