"""MSR areas of VM transitions: what is stored and loaded, in which order, what cannot be, and the VMX abort that follows.

SDM: "VM-Exit Controls for MSRs"; "VM-Entry Controls for MSRs"; "Loading MSRs"; "Saving MSRs"; "VMX Aborts".
SDM: "Format of the VMCS Region".
"""

from __future__ import annotations

import pytest
from attrs import evolve

from tests.vmcs.guests import GUEST_AREA, HOST_AREA, STORE_AREA, Guest, quad
from vtsim.base import memory as mem
from vtsim.cpu import codes as c
from vtsim.cpu import slots as s
from vtsim.study.vmx.drivers import bytes_at
from vtsim.study.vmx.exit_cases import CURRENT, bench
from vtsim.vmcs import reasons as x

PAT, SYSENTER_CS, EFER, SPEC_CTRL, TSC, STAR = 0x277, 0x174, 0xC0000080, 0x48, 0x10, 0xC0000081
PERF_GLOBAL_CTRL, PKRS, S_CET, FRED_RSP1 = 0x38F, 0x6E1, 0x6A2, 0x1CD
FS_BASE, GS_BASE, X2APIC_TPR, SMBASE, SMM_MONITOR = 0xC0000100, 0xC0000101, 0x808, 0x9E, 0x9B
RESET_PAT = 0x0007040600070406
ABORT_SAVING, ABORT_LOADING = 1, 4


def stored(*indexes: int, **more: object) -> Guest:
    entries = quad(*(word for index in indexes for word in (index, 0x77)))
    return Guest(
        fields={"EXIT_MSR_STORE_COUNT": len(indexes)}, memory={STORE_AREA: entries},
        dump=(STORE_AREA, 16 * len(indexes)), **more,
    )  # type: ignore[arg-type]  # fmt: skip


def abort_indicator() -> int:
    """The second word of the current VMCS's region."""
    return int(bench().engine.contents(CURRENT >> 12, mem.VMCS_REGION)[0]) >> 32


@pytest.mark.parametrize("index", [PERF_GLOBAL_CTRL, PKRS, S_CET, FRED_RSP1, SPEC_CTRL, STAR])
def test_an_exit_stores_the_value_that_the_guest_left(index: int) -> None:
    guest = stored(index, PAT)
    written = Guest(
        code="0f30", controls="USE_MSR_BITMAPS", gpr={"rcx": index, "rax": 1}, fields=guest.fields, memory=guest.memory,
        dump=guest.dump,
    )  # fmt: skip

    assert written.run().dump == quad(index, 1, PAT, RESET_PAT)


def test_the_time_stamp_counter_is_stored_as_the_guest_reads_it() -> None:
    guest = stored(TSC, controls="USE_TSC_OFFSETTING")
    got = Guest(
        controls=guest.controls, fields={**guest.fields, "TSC_OFFSET": 1 << 50}, memory=guest.memory, dump=guest.dump
    ).run()

    assert int.from_bytes(bytes.fromhex(got.dump)[8:], "little") >> 40 == 1 << 10


@pytest.mark.parametrize("index", [X2APIC_TPR, SMBASE, 0x12345, SYSENTER_CS | 1 << 32])
def test_an_msr_that_cannot_be_stored_aborts(index: int) -> None:
    """The entries before it are stored; the indicator is 1; the CPU is shut down."""
    with pytest.raises(Exception, match="stopped the engine"):
        stored(PAT, index).run()

    assert bytes_at(bench().engine, STORE_AREA, 32).hex() == quad(PAT, RESET_PAT, index, 0x77)
    assert (int(bench().m[s.STOP]), abort_indicator()) == (c.SHUTDOWN, ABORT_SAVING)


def host(*entries: int) -> Guest:
    return Guest(fields={"EXIT_MSR_LOAD_COUNT": len(entries) // 2}, memory={HOST_AREA: quad(*entries)})


def test_an_exit_loads_the_hosts_msrs_in_order_after_its_host_state() -> None:
    got = host(SYSENTER_CS, 1, SYSENTER_CS, 2, PKRS, 0x33, STAR, 0x44).run()

    assert got.differs({"reason": x.VMCALL, s.SYSENTER_CS: 2, s.MSR_STAR: 0x44}) == {}


@pytest.mark.parametrize(
    ("index", "value"),
    [(FS_BASE, 0), (GS_BASE, 0), (X2APIC_TPR, 0), (SMM_MONITOR, 0), (SMBASE, 0), (0x12345, 0), (PAT, 2), (PKRS, 1 << 32),
     (S_CET, 0x40), (PERF_GLOBAL_CTRL, 0x10)],
)  # fmt: skip
def test_an_msr_that_cannot_be_loaded_for_the_host_aborts(index: int, value: int) -> None:
    with pytest.raises(Exception, match="stopped the engine"):
        host(SYSENTER_CS, 5, index, value).run()

    assert (int(bench().m[s.STOP]), abort_indicator()) == (c.SHUTDOWN, ABORT_LOADING)
    assert int(bench().m[s.SYSENTER_CS]) == 5


def test_a_failed_entry_loads_the_hosts_msrs_and_stores_none() -> None:
    guest = Guest(
        fields={"GUEST_RFLAGS": 0, "EXIT_MSR_LOAD_COUNT": 1, "EXIT_MSR_STORE_COUNT": 1},
        memory={HOST_AREA: quad(SYSENTER_CS, 5), STORE_AREA: quad(PAT, 0x77)}, dump=(STORE_AREA, 16),
    )  # fmt: skip

    assert guest.run().differs({
        "kind": "entry_failure", "reason": x.INVALID_STATE, s.SYSENTER_CS: 5, "dump": quad(PAT, 0x77),
    }) == {}  # fmt: skip


def test_without_an_abort_the_indicator_is_0() -> None:
    host(SYSENTER_CS, 5).run()

    assert abort_indicator() == 0


def test_an_entry_loads_the_guests_msrs_after_its_guest_state() -> None:
    guest = Guest(
        fields={"ENTRY_MSR_LOAD_COUNT": 3, "GUEST_IA32_SYSENTER_CS": 9},
        memory={GUEST_AREA: quad(SYSENTER_CS, 3, PKRS, 0x12, SYSENTER_CS, 4)},
    )  # fmt: skip

    assert guest.run().differs({
        "reason": x.VMCALL, "GUEST_IA32_SYSENTER_CS": 4, "GUEST_IA32_PKRS": 0x12,
    }) == {}  # fmt: skip


def test_lma_of_efer_in_an_area_is_not_loaded() -> None:
    """ "Loading MSRs": IA32_EFER.LMA is what VM entry made it, whatever the area says."""
    guest = Guest(
        code="0f32", controls="USE_MSR_BITMAPS", gpr={"rcx": EFER},
        fields={"ENTRY_MSR_LOAD_COUNT": 1}, memory={GUEST_AREA: quad(EFER, 0x900)},
    )  # fmt: skip

    assert guest.run().at("rax") == 0xD00


@pytest.mark.parametrize(
    ("index", "value", "refused"),
    [
        (0x2FF, 0xC06, 0x1000), (0x2FF, 0, 0x302), (0x250, 0x0606060606060606, 2), (0x259, 0x0101010101010101, 3),
        (0x26F, 0x0405040504050405, 7), (0x200, 0x12345006, 0x106), (0x20F, 0xFF00000800, 0x801), (0xE7, -1, None),
        (0xE8, 5, None),
    ],
)  # fmt: skip
def test_range_registers_and_clock_counters_are_loaded_unless_wrmsr_would_refuse_the_value(
    index: int, value: int, refused: int | None
) -> None:
    """Memory types 2, 3 and 7 are reserved, as are bits of the default type and of ranges."""
    entry = Guest(
        code="0f32", controls="USE_MSR_BITMAPS", gpr={"rcx": index}, fields={"ENTRY_MSR_LOAD_COUNT": 1},
        memory={GUEST_AREA: quad(index, value)},
    )  # fmt: skip

    assert entry.run().differs({"reason": x.VMCALL, "rax": value & 0xFFFFFFFF}) == {}
    if refused is not None:
        bad = evolve(entry, memory={GUEST_AREA: quad(index, refused)})
        assert bad.run().differs({"kind": "entry_failure", "qualification": 1}) == {}
