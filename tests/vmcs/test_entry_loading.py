"""What VM entry loads, and what one that fails leaves as it was."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from attrs import evolve

from tests.vmcs.checked import RECORDED, environment
from vtsim.base import memory as mem
from vtsim.cpu import slots as s
from vtsim.study.vmx.entry_cases import Bench, bench
from vtsim.vmcs import reasons as x
from vtsim.vmcs import slots as v
from vtsim.vmcs import state as h
from vtsim.vmcs.fields import FIELDS, SLOT, Area

VALID, NMI, MTF = 1 << 31, 0x202, 0x700
MSR_AREA = 0x822000
SYSENTER_CS, SYSENTER_EIP, PAT, EFER, FS_BASE, X2APIC_TPR, SMBASE = (
    0x174,
    0x176,
    0x277,
    0xC0000080,
    0xC0000100,
    0x808,
    0x9E,
)


def entered(base: str, controls: str = "", memory: bytes = b"", **fields: int) -> tuple[dict[str, Any], Bench]:
    """VM entry from a base state of the recorded processor; `memory` is the VM-entry MSR-load area."""
    state = environment(base, controls, on=RECORDED, **fields)
    if memory:
        state = evolve(state, memory={**state.memory, MSR_AREA: memory.ljust(mem.PAGE_BYTES, b"\0")})
    machine = bench()
    machine.prepare(state)
    return machine.enter("vmlaunch"), machine


def area(*entries: tuple[int, int]) -> bytes:
    return b"".join(index.to_bytes(8, "little") + value.to_bytes(8, "little") for index, value in entries)


def test_bits_of_cr0_and_dr7_that_vm_entry_does_not_load_stay() -> None:
    """CR0: CD, NW, ET and reserved bits keep their values; DR7: bits 12, 14 and 15 are 0 and bit 10 is 1."""
    got, machine = entered("b64e", GUEST_CR0=0xE0000031 & ~0x10 | 1 << 8, GUEST_DR7=0xFFFFF8FF)

    assert got == {"kind": "exit"}
    assert int(machine.m[s.CR0]) == 0x80000031
    assert int(machine.m[s.DR7]) == 0xFFFF2CFF


@pytest.mark.parametrize("load", [False, True])
def test_efer_is_loaded_or_follows_the_guests_mode(load: bool) -> None:
    _, machine = entered("b32", "ENTRY_LOAD_IA32_EFER" if load else "", GUEST_IA32_EFER=0x800)

    assert int(machine.m[s.EFER]) & 0x500 == 0
    assert int(machine.m[s.EFER]) & 0x801 == (0x800 if load else 0x801)


def test_a_failed_entry_records_reason_and_qualification_and_nothing_else() -> None:
    state = environment("b64e", on=RECORDED, GUEST_RFLAGS=0, ENTRY_INTERRUPTION_INFORMATION=VALID | 0x306)
    machine = bench()
    machine.prepare(state)
    words = machine.vmcs()
    for field in FIELDS:
        if field.area is Area.EXIT_INFO:
            words[SLOT[field.name]] = 0x55
    before = words.copy()
    got = machine.enter("vmlaunch")
    after = machine.vmcs()

    changed = {field.name for field in FIELDS if before[SLOT[field.name]] != after[SLOT[field.name]]}
    assert got == {"kind": "entry_failure", "reason": 33, "qualification": 0}
    assert changed == {"EXIT_REASON", "EXIT_QUALIFICATION"}
    assert int(after[v.EXIT_REASON]) == x.INVALID_STATE | 1 << 31
    assert int(after[h.V_LAUNCHED]) == h.CLEAR
    assert int(machine.m[s.RIP]) == state.vmcs["HOST_RIP"]
    assert int(machine.m[s.NONROOT]) == 0


def test_a_refused_entry_changes_the_vm_instruction_error_alone() -> None:
    machine = bench()
    machine.prepare(environment("b64e", on=RECORDED, VPID=0))
    before = machine.vmcs().copy()
    got = machine.enter("vmlaunch")

    differ = np.nonzero(machine.vmcs() != before)[0].tolist()
    assert got == {"kind": "vmfail_valid", "error": 7}
    assert [slot for slot in differ if slot < h.V_OWNER] == [v.VM_INSTRUCTION_ERROR]


def test_msrs_of_the_area_are_loaded_in_order_after_the_guest_state() -> None:
    entries = area((SYSENTER_CS, 1), (SYSENTER_CS, 2), (PAT, 0x0606060606060606), (SYSENTER_EIP, 0x1234))
    got, machine = entered("b64e", memory=entries, ENTRY_MSR_LOAD_COUNT=4, GUEST_IA32_SYSENTER_CS=7)

    assert got == {"kind": "exit"}
    assert [int(machine.m[slot]) for slot in (s.SYSENTER_CS, s.PAT, s.SYSENTER_EIP)] == [2, 0x0606060606060606, 0x1234]


@pytest.mark.parametrize(
    ("index", "value"),
    [
        (FS_BASE, 0), (0xC0000101, 0), (X2APIC_TPR, 0), (0x8FF, 0), (0x9B, 0), (SMBASE, 0), (SYSENTER_CS | 1 << 32, 0),
        (0x12345, 0), (0x480, 0), (SYSENTER_EIP, 1 << 47), (PAT, 2), (EFER, 0xD03), (EFER, 0xC01), (0xC0000103, 1 << 32),
        (0x1B, 0xFEE00D01), (0x1B, 0xFEE00500), (0x3A, 5), (0x1D9, 8), (0xDA0, 1 << 63),
    ],
)  # fmt: skip
@pytest.mark.parametrize("place", [1, 3])
def test_an_msr_that_cannot_be_loaded_fails_the_entry_with_its_number(index: int, value: int, place: int) -> None:
    entries = area(*[(SYSENTER_CS, 1)] * (place - 1), (index, value))
    got, _ = entered("b64e", memory=entries, ENTRY_MSR_LOAD_COUNT=place)

    assert got == {"kind": "entry_failure", "reason": 34, "qualification": place}


@pytest.mark.parametrize("state", [0, 1, 2, 3])
def test_the_activity_state_is_loaded(state: int) -> None:
    _, machine = entered("b64e", GUEST_ACTIVITY_STATE=state)

    assert (int(machine.m[s.ACTIVITY_STATE]), int(machine.m[s.HALTED])) == (state, min(state, 1))


def test_an_injected_event_wakes_the_guest() -> None:
    _, machine = entered(
        "b64e", GUEST_ACTIVITY_STATE=1, GUEST_RFLAGS=0x202, ENTRY_INTERRUPTION_INFORMATION=VALID | 0x20
    )

    assert int(machine.m[s.HALTED]) == 0


@pytest.mark.parametrize("virtual", [False, True])
def test_an_injected_nmi_blocks_nmis(virtual: bool) -> None:
    controls = "NMI_EXITING VIRTUAL_NMIS" if virtual else ""
    _, machine = entered("b64e", controls, ENTRY_INTERRUPTION_INFORMATION=VALID | NMI)

    assert (int(machine.m[s.NMI_BLOCKED]), int(machine.m[s.VIRTUAL_NMI_BLOCKED])) == (not virtual, virtual)


def test_a_pending_mtf_vm_exit_happens_before_the_guest_does_anything() -> None:
    got, machine = entered("b64e", ENTRY_INTERRUPTION_INFORMATION=VALID | MTF)
    words = machine.vmcs()

    assert got == {"kind": "exit"}
    assert int(words[v.EXIT_REASON]) == x.MONITOR_TRAP_FLAG
    assert int(words[v.GUEST_RIP]) == machine_rip()
    assert int(words[v.ENTRY_INTERRUPTION_INFORMATION]) == MTF


def machine_rip() -> int:
    return environment("b64e", on=RECORDED).vmcs["GUEST_RIP"]
