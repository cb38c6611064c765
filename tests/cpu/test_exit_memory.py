"""VM exits of memory accesses: APIC virtualization, EPT violations with all they say, logging, virtualization exceptions.

SDM: "Virtualization Exceptions".
SDM: "Virtualization-Exception Information".
SDM: "Page-Modification Logging".
SDM: "Control Fields for Page-Modification Logging".
SDM: "Controls for Virtualization Exceptions".
SDM: "EPT Violations".
SDM: "Virtual APIC State".
SDM: "Evaluation and Delivery of Virtual Interrupts".
SDM: "Virtualizing Memory-Mapped APIC Accesses".
SDM: "Virtualizing MSR-Based APIC Accesses".
"""

from __future__ import annotations

import pytest

from tests.cpu.guest import APIC_ACCESS, EPT_DATA, PRIMARY, SECONDARY_ON, VIRTUAL_APIC, enter
from vtsim.ept import spec as e
from vtsim.vmcs import bits as b
from vtsim.vmcs import reasons as x

GP, VE = 13, 20
DATA1 = 0x829010  # its EPT entry is at EPT_DATA
READ, WRITE = "8b01", "8901"  # MOV EAX, [RCX] and back


def apic(bits: int = b.VIRTUALIZE_APIC_ACCESSES, tpr: bool = True) -> dict[str, int]:
    primary = PRIMARY | SECONDARY_ON | (b.USE_TPR_SHADOW if tpr else 0)
    return {"proc_controls": primary, "secondary_proc_controls": bits}


@pytest.mark.parametrize(
    ("code", "offset", "controls", "qualification"),
    [
        (READ, 0x80, apic(tpr=False), 0x80), (WRITE, 0x80, apic(tpr=False), 1 << 12 | 0x80),
        (READ, 0x80, apic(), None), (READ, 0x90, apic(), 0x90), ("488b01", 0x80, apic(), 0x80),
        (READ, 0x84, apic(), 0x84), (READ, 0x20, apic(b.VIRTUALIZE_APIC_ACCESSES | b.APIC_REGISTER_VIRTUALIZATION), None),
        (WRITE, 0x20, apic(b.VIRTUALIZE_APIC_ACCESSES | b.APIC_REGISTER_VIRTUALIZATION), None),
        (WRITE, 0xB0, apic(), 1 << 12 | 0xB0),
    ],
)  # fmt: skip
def test_an_access_to_the_apic_page_exits_unless_the_virtual_apic_page_answers(
    code: str, offset: int, controls: dict[str, int], qualification: int | None
) -> None:
    got = enter("b64", code, vmcs=controls, gpr={"rcx": APIC_ACCESS + offset})

    if qualification is None:
        assert got["reason"] in (x.VMCALL, x.APIC_WRITE)
    else:
        assert (got["reason"], got["qualification"]) == (x.APIC_ACCESS, qualification)
        assert got["vmcs"]["GUEST_RFLAGS"] == 0x10002


def test_a_write_of_the_task_priority_below_the_threshold_exits_after_the_instruction() -> None:
    got = enter(
        "b64", WRITE, vmcs={**apic(), "tpr_threshold": 5}, gpr={"rcx": APIC_ACCESS + 0x80, "rax": 0x40},
        memory={VIRTUAL_APIC + 0x80: "f0000000"}, dump=(VIRTUAL_APIC + 0x80, 4),
    )  # fmt: skip

    assert (got["reason"], got["vmcs"]["GUEST_RIP"], got["dump"]) == (x.TPR_BELOW_THRESHOLD, 0x800002, "40000000")


def test_a_virtualized_write_with_effect_exits_with_its_offset_after_the_instruction() -> None:
    controls = apic(b.VIRTUALIZE_APIC_ACCESSES | b.APIC_REGISTER_VIRTUALIZATION)
    got = enter("b64", WRITE, vmcs=controls, gpr={"rcx": APIC_ACCESS + 0x320, "rax": 0x1})

    assert (got["reason"], got["qualification"], got["vmcs"]["GUEST_RIP"]) == (x.APIC_WRITE, 0x320, 0x800002)


def test_a_virtual_interrupt_above_the_priority_is_delivered_and_moves_from_requested_to_serviced() -> None:
    controls = apic(b.VIRTUALIZE_APIC_ACCESSES | b.VIRTUAL_INTERRUPT_DELIVERY)
    got = enter(
        "b64", "9090", vmcs={**controls, "guest_interrupt_status": 0x41, "guest_rflags": 0x202},
        memory={VIRTUAL_APIC + 0x220: "02000000"}, dump=(VIRTUAL_APIC + 0x120, 4),
    )  # fmt: skip

    assert got["guest_handler_vector"] == 0x41
    assert (got["vmcs"]["GUEST_INTERRUPT_STATUS"], got["dump"]) == (0x4100, "02000000")


def test_an_end_of_interrupt_in_the_bitmap_exits_with_its_vector() -> None:
    controls = apic(b.VIRTUALIZE_APIC_ACCESSES | b.VIRTUAL_INTERRUPT_DELIVERY)
    got = enter("b64", WRITE, vmcs={
        **controls, "guest_interrupt_status": 0x4100, "eoi_exit_bitmap_1": 2,
    }, gpr={"rcx": APIC_ACCESS + 0xB0})  # fmt: skip

    assert (got["reason"], got["qualification"]) == (x.EOI_INDUCED, 0x41)


@pytest.mark.parametrize(("value", "vector"), [(0x50, None), (0x150, GP)])
def test_x2apic_task_priority_is_virtualized_and_has_eight_bits(value: int, vector: int | None) -> None:
    controls = apic(b.VIRTUALIZE_X2APIC_MODE)
    controls["proc_controls"] |= b.USE_MSR_BITMAPS
    got = enter("b64", "0f30", vmcs=controls, gpr={"rcx": 0x808, "rax": value}, dump=(VIRTUAL_APIC + 0x80, 8))

    assert got.get("guest_handler_vector") == vector
    assert got["dump"] == ("5000000000000000" if vector is None else "0000000000000000")


@pytest.mark.parametrize(
    ("rights", "code", "tried"),
    [(0, READ, e.Q_READ), (1, WRITE, e.Q_WRITE), (5, WRITE, e.Q_WRITE), (3, "ffe1", e.Q_FETCH)],
)
def test_an_ept_violation_says_what_was_tried_allowed_and_where(rights: int, code: str, tried: int) -> None:
    entry = f"{0x829000 | 0x30 | rights:016x}"
    got = enter("b64e", code, gpr={"rcx": DATA1}, memory={EPT_DATA: bytes.fromhex(entry)[::-1].hex()})

    assert got["reason"] == x.EPT_VIOLATION
    assert got["qualification"] & 0x1FF == tried | rights << e.Q_RIGHTS | e.Q_LINEAR_VALID | e.Q_FINAL
    assert (got["guest_linear_address"], got["guest_physical_address"]) == (DATA1, DATA1)


def ept(bits: int, **more: int) -> dict[str, int]:
    return {
        "proc_controls": PRIMARY | SECONDARY_ON,
        "secondary_proc_controls": b.ENABLE_EPT | b.ENABLE_VPID | bits,
        **more,
    }


def test_setting_a_dirty_flag_logs_the_page_and_counts_down() -> None:
    got = enter(
        "b64e", WRITE, vmcs=ept(b.ENABLE_PML, eptp=0x81005E, guest_pml_index=0x1FF), gpr={"rcx": DATA1},
        dump=(0x824000, 4096),
    )  # fmt: skip
    logged = {got["dump"][n : n + 16] for n in range(0, len(got["dump"]), 16)}

    assert "0090820000000000" in logged
    assert got["vmcs"]["PML_INDEX"] == 0x1FF - (len(logged) - 1)


def test_a_full_log_exits_before_the_flag_is_set() -> None:
    got = enter("b64e", WRITE, vmcs=ept(b.ENABLE_PML, eptp=0x81005E, guest_pml_index=0xFFFF), gpr={"rcx": DATA1})

    assert got["reason"] == x.PML_FULL


@pytest.mark.parametrize(("suppressed", "busy", "converted"), [(0, 0, True), (1, 0, False), (0, 1, False)])
def test_a_convertible_violation_is_a_virtualization_exception(suppressed: int, busy: int, converted: bool) -> None:
    got = enter(
        "b64e", READ, vmcs=ept(b.EPT_VIOLATION_VE, eptp_index=3), gpr={"rcx": DATA1}, dump=(0x823000, 40),
        memory={EPT_DATA: f"3090820000000{'8' if suppressed else '0'}00"[:14] + ("80" if suppressed else "00"),
                0x823004: "ffffffff" if busy else "00000000"},
    )  # fmt: skip

    assert (got.get("guest_handler_vector") == VE) == converted
    if converted:
        assert got["dump"][:16] == "30000000ffffffff"
        assert got["dump"][-16:] == "0300000000000000"
    else:
        assert got["reason"] == x.EPT_VIOLATION


ROOT, ALIAS = 0x808000, 1 << 39  # the guest's PML4 table; what its second entry makes of the first 512 GiB


@pytest.mark.parametrize(
    ("rights", "code", "tried"),
    [(0, READ, e.Q_READ), (1, WRITE, e.Q_WRITE), (5, WRITE, e.Q_WRITE), (3, "ffe1", e.Q_FETCH)],
)
@pytest.mark.parametrize("address", [DATA1, ALIAS | DATA1])
def test_the_information_of_a_virtualization_exception_is_what_the_exit_would_have_said(
    address: int, rights: int, code: str, tried: int
) -> None:
    """SDM: "Virtualization-Exception Information". All else in its page stays as it was."""
    area, index = 0x823000, 0x1A5
    entry = 0x829000 | 0x30 | rights
    pml4e = enter("b64e", READ, gpr={"rcx": DATA1}, dump=(ROOT, 8))["dump"]
    memory = {EPT_DATA: entry.to_bytes(8, "little").hex(), ROOT + 8: pml4e}
    left, converted = (
        enter(
            "b64e", code, vmcs=ept(control, eptp_index=index), gpr={"rcx": address}, dump=(area, 64),
            memory=memory | {area: "a5" * 4 + "00" * 4 + "a5" * 56},
        )
        for control in (0, b.EPT_VIOLATION_VE)
    )  # fmt: skip
    words = (left["qualification"], left["guest_linear_address"], left["guest_physical_address"])

    assert left["reason"] == x.EPT_VIOLATION
    assert left["dump"] == "a5" * 4 + "00" * 4 + "a5" * 56
    assert converted["guest_handler_vector"] == VE
    assert words[1:] == (address, DATA1)
    assert words[0] & 0x1FF == tried | rights << e.Q_RIGHTS | e.Q_LINEAR_VALID | e.Q_FINAL
    assert bytes.fromhex(converted["dump"]) == b"".join((
        x.EPT_VIOLATION.to_bytes(4, "little"), b"\xff" * 4, *(word.to_bytes(8, "little") for word in words),
        index.to_bytes(2, "little"), b"\xa5" * 30,
    ))  # fmt: skip


@pytest.mark.parametrize(("execute", "leaves"), [(4, True), (1 << 10, False)])
def test_mode_based_execute_control_looks_at_its_own_bit_for_user_pages(execute: int, leaves: bool) -> None:
    """All pages of the guest are user pages: the code page needs bit 10, whatever ring runs."""
    tables = {0x810000: 0x811000, 0x811000: 0x812000, 0x812020: 0x813000}
    entries = {place: table | 7 | 1 << 10 for place, table in tables.items()} | {0x813000: 0x800000 | 0x31 | execute}
    memory = {place: entry.to_bytes(8, "little").hex() for place, entry in entries.items()}
    got = enter("b64e", "90", vmcs=ept(b.MODE_BASED_EXECUTE_CONTROL), memory=memory)

    assert (got["reason"] == x.EPT_VIOLATION) == leaves
