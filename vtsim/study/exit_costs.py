"""What an exit costs on every profile, in three parts: hardware transition, in-kernel path, user-space path."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from attrs import frozen

from vtsim.cpu.profile import load_profile, profile_names
from vtsim.study.published import row
from vtsim.vmcs.generations import GENERATIONS

ITERATIONS: Final = 2000
SCENARIO: Final = """
machine: {{profile: {profile}, memory: 256 MiB}}
vmm: {{personality: {personality}}}
vms:
- memory: 64 MiB
  guest:
    kernel: {{tick: off}}
    processes:
    - phases:
      - {phase}
run: {{baseline: false}}
"""
# fmt: off
PROBES: Final = (  # column, exit reason, phase
    ("vmcall",          "VMCALL",         "{primitive: vmcall, iterations: %d}"),
    ("cpuid",           "CPUID",          "{primitive: cpuid, iterations: %d}"),
    ("inl_from_kernel", "IO_INSTRUCTION", "{primitive: port_in, port: 0x4d0, size: 1, iterations: %d}"),
    ("inl_from_qemu",   "IO_INSTRUCTION", "{primitive: port_in, port: 0x1234, size: 4, iterations: %d}"),
)
# `calibrate` figures that stand beside a cell: profile, column, personality -> row, figures that are added
PUBLISHED: Final = {
    ("p4-672",      "hardware", "minimal"): ("EXIT-PF-HALVES", ("p4_672.vm_entry", "p4_672.pf_vm_exit")),
    ("nehalem-ep",  "hardware", "minimal"): ("EXIT-HW-RT",     ("nehalem",)),
    ("snb-e5-2450", "hardware", "minimal"): ("EXIT-HW-RT",     ("sandy_bridge",)),
    ("skx-4114",    "vmcall",   "kvm"):     ("KVM-SKX-VMCALL", ("before",)),
}
# fmt: on


@frozen(kw_only=True)
class ExitCosts:
    """Median cycles of one profile under one personality; `hardware` is VM exit plus VM entry alone."""

    profile: str
    personality: str
    cycles: dict[str, int]


def exit_costs(run: Callable[[str], Any]) -> list[ExitCosts]:
    """Measure every profile with VMX: under kvm where it has EPT, and under minimal. `run` takes a scenario text."""
    found = []
    for profile in profile_names():
        loaded = load_profile(profile)
        if not loaded.has_vmx:
            continue
        has_ept = GENERATIONS[loaded.vmx.generation].capabilities().supports("ENABLE_EPT")
        for personality in ("minimal", "kvm") if has_ept else ("minimal",):
            cycles = {"hardware": loaded.transitions.vm_exit_cycles + loaded.transitions.vm_entry_cycles}
            for column, reason, phase in PROBES:
                text = SCENARIO.format(profile=profile, personality=personality, phase=phase % ITERATIONS)
                result = run(text)
                cycles[column] = next(one.p50_cycles for one in result.exits if one.reason == reason)
            found.append(ExitCosts(profile=profile, personality=personality, cycles=cycles))
    return found


def to_markdown(costs: Sequence[ExitCosts]) -> list[str]:
    """The section of docs/validation.md."""
    columns = ("hardware", *(column for column, _, _ in PROBES))
    lines = [
        "",
        "## What an exit costs, by profile",
        "",
        "Median cycles from exit to re-entry. *hardware* is VM exit plus VM entry alone; vmcall, cpuid and",
        "inl_from_kernel are handled in the kernel; inl_from_qemu goes to user space under kvm (R0 → R3 → R0).",
        "A published `calibrate` figure stands in brackets beside the cell that it belongs to.",
        "",
        "| profile | personality | " + " | ".join(columns) + " |",
        "|---|---|" + "---:|" * len(columns),
    ]
    for one in costs:
        cells = []
        for column in columns:
            beside = ""
            if (one.profile, column, one.personality) in PUBLISHED:
                id, figures = PUBLISHED[one.profile, column, one.personality]
                beside = f" ({id}: {sum(row(id).value(figure) for figure in figures):g})"
            cells.append(f"{one.cycles[column]}{beside}")
        lines.append(f"| {one.profile} | {one.personality} | " + " | ".join(cells) + " |")
    return lines
