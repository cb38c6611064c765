"""One bit of one field changed from a VMCS that enters: what becomes of VM entry, and that it enters again afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.vmcs.checked import ALL, RECORDED, environment
from vtsim.base import jit
from vtsim.base.memory import signed
from vtsim.cpu.slots import VMCS
from vtsim.study.vmx.entry_cases import Bench, bench
from vtsim.vmcs import checks as c
from vtsim.vmcs import groups as g
from vtsim.vmcs import state as h
from vtsim.vmcs.controls import CONTROL, ENTRY, EXIT, PIN, PRIMARY, SECONDARY
from vtsim.vmcs.fields import BY_NAME, FIELDS, SLOT
from vtsim.vmcs.groups import ALL_GROUPS, GROUPS
from vtsim.vmcs.kernels.guest_registers import guest_registers_failure
from vtsim.vmcs.kernels.guest_rest import descriptor_tables_failure, flow_failure, non_register_failure
from vtsim.vmcs.kernels.guest_segments import guest_segments_failure
from vtsim.vmcs.kernels.host_state import host_failure

BASES = ("b64e", "bv86", "bpaee", "brealu")
LEGAL = (
    {"kind": "exit"},
    {"kind": "vmfail_valid", "error": 7},
    {"kind": "vmfail_valid", "error": 8},
    *({"kind": "entry_failure", "reason": 33, "qualification": n} for n in (0, 2, 3, 4)),
)
CONTROLS = {"kind": "vmfail_valid", "error": 7}
HOST = {"kind": "vmfail_valid", "error": 8}
GUEST = {"kind": "entry_failure", "reason": 33, "qualification": 0}
ENTERS = {"kind": "exit"}
WIDTH = 40  # physical-address bits of the recorded processor; it has 48 linear-address bits
CANONICAL_HOST = ("FS_BASE", "GS_BASE", "TR_BASE", "GDTR_BASE", "IDTR_BASE", "IA32_SYSENTER_ESP", "IA32_SYSENTER_EIP")
CANONICAL_GUEST = ("FS_BASE", "GS_BASE", "TR_BASE", "GDTR_BASE", "IDTR_BASE", "IA32_SYSENTER_ESP", "IA32_SYSENTER_EIP")
RFLAGS_FREE = {0, 2, 4, 6, 7, 8, 9, 10, 11, 12, 13, 14, 16, 18, 19, 20, 21}


def again(machine: Bench, record: Any, checked: int | None = None) -> dict[str, Any]:
    """VM entry once more with the VMCS as it stands, the CPU as it was before the first."""
    machine.m[:] = record
    words = machine.vmcs()
    words[h.V_LAUNCHED] = h.CLEAR
    if checked is not None:
        words[h.V_CHECKED] = checked
    return machine.enter("vmlaunch")


def is_legal(outcome: dict[str, Any], field: str) -> bool:
    """An MSR of the VM-entry area may fail to load, too, where the flip makes the area be read."""
    if outcome.get("reason") == 34:
        return field == "ENTRY_MSR_LOAD_COUNT" and outcome["qualification"] > 0
    return outcome in LEGAL


def flips(name: str) -> Iterator[tuple[int, int]]:
    for bit in range(BY_NAME[name].bits):
        yield bit, signed(1 << bit)


def expected(name: str, bit: int, value: int) -> dict[str, Any] | None:
    """What the manual says of one bit of a field in base state b64e; None where more than that field decides."""
    capabilities = environment("b64e", on=RECORDED).capabilities
    for word in (PIN, PRIMARY, SECONDARY, EXIT, ENTRY):
        if word.field == name:
            must, may = capabilities.allowed0(word), capabilities.allowed1(word)
            broken = must & ~value or value & ~may
            return CONTROLS if broken else None
    if name in ("HOST_CR0", "GUEST_CR0", "HOST_CR4", "GUEST_CR4"):
        if name.endswith("CR0") and bit in (29, 30):
            return ENTERS
        must, may = capabilities.cr0_fixed() if name.endswith("CR0") else capabilities.cr4_fixed()
        if must & ~value or value & ~may:
            return HOST if name.startswith("HOST") else GUEST
        return None
    host, _, part = name.partition("_")
    if host == "HOST" and part in CANONICAL_HOST:
        return HOST if bit >= 47 else ENTERS
    if host == "GUEST" and part in CANONICAL_GUEST:
        return GUEST if bit >= 47 else ENTERS
    if name in ("HOST_CR3", "GUEST_CR3"):
        return (HOST if host == "HOST" else GUEST) if bit >= WIDTH else ENTERS
    if name == "GUEST_RIP":
        return GUEST if bit >= 48 else ENTERS
    if name == "GUEST_RFLAGS":
        return ENTERS if bit in RFLAGS_FREE else GUEST
    if name in ("GUEST_GDTR_LIMIT", "GUEST_IDTR_LIMIT"):
        return GUEST if bit >= 16 else ENTERS
    if host == "HOST" and part.endswith("_SELECTOR"):
        return HOST if bit < 3 else None
    if name in ("GUEST_RSP", "CR0_READ_SHADOW", "CR4_READ_SHADOW", "TSC_OFFSET", "EXCEPTION_BITMAP"):
        return ENTERS
    if name == "EPT_POINTER":
        return ENTERS if bit == 6 or 12 <= bit < WIDTH else CONTROLS
    return None


# controls that do not go with the others: with another control, with a guest that runs, or outside SMM
APART = {
    "VIRTUALIZE_X2APIC_MODE",
    "UNRESTRICTED_GUEST",
    "ENTRY_TO_SMM",
    "ENTRY_DEACTIVATE_DUAL_MONITOR",
    "MONITOR_TRAP_FLAG",
}
EVERYTHING = " ".join(name for name in CONTROL if name not in APART)
# what their checks want to be other than 0
WITH_EVERYTHING = {
    "VIRTUAL_TIMER_VECTOR": 16,
    "GUEST_IA32_EFER": 0xD01,
    "HOST_IA32_EFER": 0xD01,
    "TSC_MULTIPLIER": 1 << 48,
}


@pytest.mark.parametrize(
    ("base", "on"),
    [("b64e", RECORDED), ("b64e", ALL), *(pytest.param(base, RECORDED, marks=pytest.mark.slow) for base in BASES[1:])],
)
def test_any_flipped_bit_leaves_a_legal_outcome_and_flipped_back_it_enters(base: str, on: str) -> None:
    """Only the checks of the field's groups are made again, and that finds what making all of them finds.

    On the processor that has everything, every control that goes with the others is 1, so that every field counts.
    """
    machine = bench()
    every = on == ALL
    machine.prepare(environment(base, EVERYTHING if every else "", on, **(WITH_EVERYTHING if every else {})))
    record, words = machine.m.copy(), machine.vmcs()
    assert again(machine, record) == ENTERS
    assert words[h.V_CHECKED] == ALL_GROUPS
    for field in FIELDS:
        slot = SLOT[field.name]
        old = np.int64(words[slot])
        for bit, mask in flips(field.name):
            words[slot] = old ^ mask
            words[h.V_CHECKED] &= ~GROUPS[slot]
            some = again(machine, record)
            found = int(words[h.V_FAILED_CHECK])
            whole = again(machine, record, checked=0)

            assert is_legal(some, field.name), (field.name, bit)
            assert (some, found) == (whole, int(words[h.V_FAILED_CHECK])), (field.name, bit)
            if base == "b64e" and not every:
                wanted = expected(field.name, bit, int(words[slot]) & (1 << 64) - 1)
                assert wanted is None or some == wanted, (field.name, bit)
            words[slot] = old
            words[h.V_CHECKED] &= ~GROUPS[slot]
        assert again(machine, record) == ENTERS, field.name
        assert words[h.V_CHECKED] == ALL_GROUPS


class Reads(np.ndarray):
    """An arena that notes which words are read."""

    seen: set[int]

    def __getitem__(self, key: Any) -> Any:
        if not isinstance(key, slice):
            self.seen.add(int(key))
        return super().__getitem__(key)


def test_no_group_of_guest_checks_reads_a_field_whose_writing_does_not_make_it_due() -> None:
    """Controls that guest checks read are compared as a whole (V_CHECKED_MODE), so they may be read besides."""
    if not jit.DISABLED:
        pytest.skip("compiled kernels take no arena that notes reads")
    always = {"ENTRY_CONTROLS", "PRIMARY_PROC_CONTROLS", "SECONDARY_PROC_CONTROLS", *g.OF_THE_EVENT}
    machine = bench()
    for base in BASES:
        machine.prepare(environment(base, on=RECORDED))
        at = int(machine.m[VMCS])
        for group, check, beyond in (
            (g.HOST, host_failure, True), (g.REGISTERS, guest_registers_failure, True),
            (g.SEGMENTS, guest_segments_failure, False), (g.TABLES, descriptor_tables_failure, False),
            (g.FLOW, flow_failure, False), (g.NON_REGISTER, non_register_failure, False),
        ):  # fmt: skip
            arena = machine.engine.arena.view(Reads)
            arena.seen = set()
            assert check(arena, at, *([-(1 << 40)] if beyond else [])) == c.NONE
            names = {field.name for field in FIELDS if at + SLOT[field.name] in arena.seen} - always
            assert {name for name in names if not GROUPS[SLOT[name]] & group} == set(), check.__name__
