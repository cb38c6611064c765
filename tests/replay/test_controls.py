"""Flipping one control changes exactly the exits that it rules: numbers from the recording's own rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import lru_cache

import numpy as np
import pytest

from tests.replay.monitor import (
    CR0_GUEST,
    CR4_GUEST,
    EXCEPTIONS,
    PASSED_THROUGH,
    PRIMARY,
    READ_THROUGH,
    SECONDARY,
    monitor,
)
from tests.replay.recordings import boot, boot_recording, profile, recording, row, trace
from vtsim.guest.traces.kinds import NUMBER
from vtsim.guest.traces.paging import RESET_CR0
from vtsim.vmcs import bits as b
from vtsim.vmcs import slots as v

SMRAM = 0x72  # a register whose writes change no map


def rows(name: str) -> int:
    """How many rows of a kind the boot has."""
    return boot().counts()[name][0]


def control_register_rows(number: int) -> int:
    of = boot()
    return int(((of.kind == NUMBER["MOV_TO_CR"]) & (of.a0 == number)).sum())


def exits(fields: dict[int, int] | None = None, **options: bool) -> Counter[str]:
    replay = monitor(profile(), boot_recording(True), fields=fields, **options)
    replay.run()
    return replay.exits()


@lru_cache(maxsize=1)
def unchanged() -> Counter[str]:
    return exits()


def nonzero(counts: Mapping[str, int]) -> dict[str, int]:
    return {reason: count for reason, count in counts.items() if count}


def changed_writes(number: int, guest: int, first: int) -> int:
    """Writes of a control register that change a bit which the guest does not own."""
    of = boot()
    written = of.a1[(of.kind == NUMBER["MOV_TO_CR"]) & (of.a0 == number)]
    before = np.append(first, written[:-1])
    return int(((written ^ before) & ~guest != 0).sum())


@pytest.mark.compiled_only
def test_every_count_follows_from_rows_and_controls():
    of, counts = boot(), unchanged()
    reads = ~np.isin(of.a0, [*PASSED_THROUGH, READ_THROUGH]) & (of.kind == NUMBER["RDMSR"])
    writes = ~np.isin(of.a0, PASSED_THROUGH) & (of.kind == NUMBER["WRMSR"])
    string = np.isin(of.kind, [NUMBER["IN"], NUMBER["OUT"]]) & (of.a0 >> 20 & 1 == 1)
    assert counts["CPUID"] == rows("CPUID")
    assert counts["MSR_READ"] == int(reads.sum())
    assert counts["MSR_WRITE"] == int(writes.sum())
    assert counts["IO_INSTRUCTION"] == rows("IN") + rows("OUT") - int(string.sum()) + 1
    assert counts["WBINVD"] == rows("WBINVD")
    assert counts["HLT"] == rows("HLT")
    assert counts["DR_ACCESS"] == 1  # six in a row: the first turns the control off
    assert counts["EXTERNAL_INTERRUPT"] == rows("IRQ")
    assert counts["CR_ACCESS"] == changed_writes(0, CR0_GUEST, RESET_CR0) + changed_writes(4, CR4_GUEST, 0)


# fmt: off
FLIPS = {
    "RDTSC exiting on":         ({v.PRIMARY_PROC_CONTROLS: PRIMARY | b.RDTSC_EXITING},
                                 lambda: {"RDTSC": rows("RDTSC"), "RDTSCP": rows("RDTSCP")}),
    "CR3-load exiting on":      ({v.PRIMARY_PROC_CONTROLS: PRIMARY | b.CR3_LOAD_EXITING},
                                 lambda: {"CR_ACCESS": control_register_rows(3)}),
    "INVLPG exiting on":        ({v.PRIMARY_PROC_CONTROLS: PRIMARY | b.INVLPG_EXITING}, lambda: {"INVLPG": rows("INVLPG")}),
    "PAUSE exiting on":         ({v.PRIMARY_PROC_CONTROLS: PRIMARY | b.PAUSE_EXITING},
                                 lambda: {"PAUSE_INSTRUCTION": rows("PAUSE")}),
    "HLT exiting off":          ({v.PRIMARY_PROC_CONTROLS: PRIMARY & ~b.HLT_EXITING}, lambda: {"HLT": -rows("HLT")}),
    "MOV-DR exiting off":       ({v.PRIMARY_PROC_CONTROLS: PRIMARY & ~b.MOV_DR_EXITING}, lambda: {"DR_ACCESS": -1}),
    "MSR bitmaps off":          ({v.PRIMARY_PROC_CONTROLS: PRIMARY & ~b.USE_MSR_BITMAPS},
                                 lambda: {"MSR_READ": rows("RDMSR") - unchanged()["MSR_READ"],
                                          "MSR_WRITE": rows("WRMSR") - unchanged()["MSR_WRITE"]}),
    "WBINVD exiting off":       ({v.SECONDARY_PROC_CONTROLS: SECONDARY & ~b.WBINVD_EXITING},
                                 lambda: {"WBINVD": -rows("WBINVD")}),
    "descriptor tables on":     ({v.SECONDARY_PROC_CONTROLS: SECONDARY | b.DESCRIPTOR_TABLE_EXITING},
                                 lambda: {"GDTR_IDTR": rows("LGDT") + rows("LIDT"),
                                          "LDTR_TR": rows("LTR") + rows("LLDT")}),
    "page faults intercepted":  ({v.EXCEPTION_BITMAP: EXCEPTIONS | 1 << 14}, lambda: {"EXCEPTION_NMI": rows("EXC")}),
    "whole CR4 is the host's":  ({v.CR4_GUEST_HOST_MASK: -1},
                                 lambda: {"CR_ACCESS": changed_writes(4, 0, 0) - changed_writes(4, CR4_GUEST, 0)}),
}
# fmt: on


@pytest.mark.compiled_only
@pytest.mark.parametrize("name", FLIPS)
def test_a_control_changes_its_own_exits_and_no_others(name):
    fields, expected = FLIPS[name]
    difference = exits(fields)
    difference.subtract(unchanged())
    assert nonzero(difference) == nonzero(expected())


@pytest.mark.compiled_only
def test_without_unconditional_io_exiting_only_the_memory_map_changes():
    difference = exits({v.PRIMARY_PROC_CONTROLS: PRIMARY & ~b.UNCONDITIONAL_IO_EXITING})
    difference.subtract(unchanged())
    changed = set(nonzero(difference))
    assert difference["IO_INSTRUCTION"] == -unchanged()["IO_INSTRUCTION"]
    assert changed == {"IO_INSTRUCTION", "EPT_VIOLATION"}  # the monitor does not see PAM writes any more


@pytest.mark.compiled_only
def test_without_the_apic_slot_its_page_is_a_device_like_any_other():
    of = boot()
    apic = of.a0 >> 12 == 0xFEE00
    loads = int((apic & (of.kind == NUMBER["MMIO_R"])).sum())
    stores = int((apic & (of.kind == NUMBER["MMIO_W"])).sum())
    accesses = np.nonzero(apic & np.isin(of.kind, [NUMBER["MMIO_R"], NUMBER["MMIO_W"]]))[0]
    zaps = np.nonzero((of.kind == NUMBER["REARM"]) & (of.a0 != SMRAM))[0]
    first = len(set(np.searchsorted(zaps, accesses).tolist()))  # a new memory map forgets device pages too
    difference = exits(apic_slot=False)
    difference.subtract(unchanged())
    assert nonzero(difference) == {
        "EPT_VIOLATION": first - 2 * loads - stores,
        "EPT_MISCONFIG": loads + stores - first,
    }


@pytest.mark.compiled_only
def test_executable_huge_pages_are_never_split():
    replay = monitor(profile(), boot_recording(True), nx_huge_pages=False)
    replay.run()
    assert 0x19C not in replay.qualifications()


def test_a_control_decides_also_in_a_recording_of_three_rows():
    of = recording(trace([row("RDTSC", 0), row("CPUID", 5), row("WBINVD", 9)]), profile())
    for controls, expected in (
        (PRIMARY, {"CPUID": 1, "WBINVD": 1}),
        (PRIMARY | b.RDTSC_EXITING, {"RDTSC": 1, "CPUID": 1, "WBINVD": 1}),
    ):
        replay = monitor(profile(), of, fields={v.PRIMARY_PROC_CONTROLS: controls})
        replay.run()
        assert replay.exits() == expected


def test_touches_ask_ept_and_nothing_else():
    of = recording(
        trace([row("TOUCH_R", 0, a0=0x400000, a1=0x400000), row("TOUCH_W", 1, a0=0x401000, a1=0x401000),
               row("TOUCH_F", 2, a0=0x402000, a1=0x402000), row("RETOUCH_W", 3, a0=0x403000, a1=0x403000)]),
        profile(),
    )  # fmt: skip
    large = monitor(profile(), of)
    large.run()
    assert large.qualifications() == {0x181: 1, 0x19C: 1, 0x182: 1}  # the fetch drops the large page
    small = monitor(profile(), of, huge_pages=False)
    small.run()
    assert small.qualifications() == {0x181: 1, 0x182: 2, 0x184: 1}


def test_a_read_modify_write_is_one_access():
    same = {"rip": 0x1000, "a0": 0x400000, "a1": 0x400000}
    replay = monitor(profile(), recording(trace([row("TOUCH_R", 5, **same), row("TOUCH_W", 5, **same)]), profile()))
    replay.run()
    assert replay.qualifications() == {0x182: 1}


def test_a_walk_of_the_guest_is_a_write_to_ept():
    replay = monitor(profile(), recording(trace([row("LEAF_R", 0, a0=0x7000, a1=0x400008 | 1)]), profile()))
    replay.run()
    assert replay.qualifications() == {0x83: 1}  # read and write, linear address valid, not the final access


def test_an_interrupt_reaches_the_guest_through_the_host():
    replay = monitor(profile(), recording(trace([row("HLT", 5), row("IRQ", 9, a0=0xEC), row("CPUID", 20)]), profile()))
    replay.run()
    vector_table = 1  # real mode: delivery reads it, and nothing was mapped
    assert replay.exits() == {"HLT": 1, "EXTERNAL_INTERRUPT": 1, "CPUID": 1, "EPT_VIOLATION": vector_table}
