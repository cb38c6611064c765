"""Delivery of events through gates of every mode, faults on the way, and events at instruction boundaries.

SDM: "Information for VM Exits Due to Vectored Events".
SDM: "Information for VM Exits That Occur During Event Delivery".
SDM: "Treatment of Task Switches".
SDM: "Monitor Trap Flag".
SDM: "Architectural State Before a VM Exit".
"""

from __future__ import annotations

import pytest

from tests.cpu.guest import IDT32, IDT64, PIN, PRIMARY, STACK, enter
from vtsim.vmcs import bits as b
from vtsim.vmcs import reasons as x

DB, BP, UD, DF, NP, GP, PF = 1, 3, 6, 8, 11, 13, 14
VALID, ERROR, HARDWARE, SOFTWARE, SOFTWARE_EXCEPTION = 1 << 31, 1 << 11, 3 << 8, 4 << 8, 6 << 8


def not_present(vector: int, table: int = IDT64) -> dict[int, str]:
    """The byte of a gate with type and P, P being 0."""
    return {table + (16 if table == IDT64 else 8) * vector + 5: "0e"}


@pytest.mark.parametrize(("base", "pushed"), [("b64", 40), ("b32", 12), ("bpae", 12), ("bv86", 36), ("brealu", 6)])
def test_an_exception_without_error_code_pushes_the_frame_of_its_mode(base: str, pushed: int) -> None:
    got = enter(base, "0f0b")
    tops = {"b64": STACK, "b32": STACK, "bpae": STACK, "bv86": 0x802800, "brealu": 0xE00}

    assert got["guest_handler_vector"] == UD
    if base != "bv86":
        assert tops[base] - got["vmcs"]["GUEST_RSP"] == pushed


def test_a_fault_saves_rf_set_and_a_software_exception_does_not() -> None:
    fault = enter("b64", "0f0b", vmcs={"exception_bitmap": 1 << UD})
    trap = enter("b64", "cc", vmcs={"exception_bitmap": 1 << BP})

    assert (fault["interruption_info"], fault["vmcs"]["GUEST_RFLAGS"]) == (VALID | HARDWARE | UD, 0x10002)
    assert (trap["interruption_info"], trap["vmcs"]["GUEST_RFLAGS"]) == (VALID | SOFTWARE_EXCEPTION | BP, 2)
    assert trap["instruction_length"] == 1


def test_a_gate_that_is_not_present_is_np_with_vector_and_ext() -> None:
    got = enter("b64", "0f0b", vmcs={"exception_bitmap": 1 << NP}, memory=not_present(UD))

    assert got["interruption_info"] == VALID | ERROR | HARDWARE | NP
    assert got["interruption_error_code"] == UD << 3 | 2 | 1
    assert got["idt_vectoring_info"] == VALID | HARDWARE | UD


def test_int_n_is_not_external_in_the_error_code_of_a_fault_on_its_way() -> None:
    got = enter("b64", "cd30", vmcs={"exception_bitmap": 1 << NP}, memory=not_present(0x30))

    assert got["interruption_error_code"] == 0x30 << 3 | 2
    assert (got["idt_vectoring_info"], got["instruction_length"]) == (VALID | SOFTWARE | 0x30, 2)


def test_two_contributory_exceptions_make_a_double_fault_that_reports_no_first_event() -> None:
    got = enter("b64", "0f0b", vmcs={"exception_bitmap": 1 << DF}, memory={**not_present(UD), **not_present(NP)})

    assert got["interruption_info"] == VALID | ERROR | HARDWARE | DF
    assert got["idt_vectoring_info"] & VALID == 0


def test_the_second_exception_is_held_against_the_bitmap_before_it_makes_a_double_fault() -> None:
    got = enter(
        "b64", "90", vmcs={
            "exception_bitmap": 1 << NP, "entry_interruption_info": VALID | ERROR | HARDWARE | GP, "entry_error_code": 8,
        }, memory=not_present(GP),
    )  # fmt: skip

    assert got["interruption_info"] == VALID | ERROR | HARDWARE | NP
    assert (got["idt_vectoring_info"], got["idt_vectoring_error_code"]) == (VALID | ERROR | HARDWARE | GP, 8)


def test_without_an_idt_a_fault_ends_in_a_triple_fault_exit() -> None:
    assert enter("b64", "0f0b", vmcs={"guest_idtr_limit": 0})["reason"] == x.TRIPLE_FAULT


def test_real_mode_has_no_error_codes() -> None:
    got = enter("brealu", "0f0b", vmcs={"guest_idtr_limit": 0, "exception_bitmap": 1 << GP})

    assert got["interruption_info"] == VALID | HARDWARE | GP


@pytest.mark.parametrize(
    ("code", "source", "length"), [("9a000000008000", 0, 7), ("ea000000008000", 2, 7)], ids=["CALL", "JMP"]
)
def test_a_far_transfer_to_a_task_exits_with_its_selector(code: str, source: int, length: int) -> None:
    got = enter("b32", code)  # selector 0x80: a task gate for the TSS at 0x50

    assert (got["reason"], got["qualification"], got["instruction_length"]) == (
        x.TASK_SWITCH, source << 30 | 0x50, length,
    )  # fmt: skip


def test_the_monitor_trap_flag_exits_after_one_instruction() -> None:
    got = enter("b64", "9090", vmcs={"proc_controls": PRIMARY | b.MONITOR_TRAP_FLAG})

    assert (got["reason"], got["vmcs"]["GUEST_RIP"]) == (x.MONITOR_TRAP_FLAG, 0x800001)


def test_the_monitor_trap_flag_exits_before_the_handler_of_an_injected_event() -> None:
    got = enter("b64", "90", vmcs={
        "proc_controls": PRIMARY | b.MONITOR_TRAP_FLAG, "entry_interruption_info": VALID | 0x30, "guest_rflags": 0x202,
    })  # fmt: skip

    assert (got["reason"], got["vmcs"]["GUEST_RIP"]) == (x.MONITOR_TRAP_FLAG, 0x801300)


def test_a_single_step_is_pending_when_the_monitor_trap_flag_exits() -> None:
    got = enter("b64", "9090", vmcs={"proc_controls": PRIMARY | b.MONITOR_TRAP_FLAG, "guest_rflags": 0x102})

    assert (got["reason"], got["vmcs"]["GUEST_PENDING_DEBUG_EXCEPTIONS"]) == (x.MONITOR_TRAP_FLAG, 1 << 14)


def test_a_single_step_exits_with_bs_and_leaves_dr6() -> None:
    got = enter("b64", "9090", vmcs={"guest_rflags": 0x102, "exception_bitmap": 1 << DB})

    assert (got["interruption_info"], got["qualification"]) == (VALID | HARDWARE | DB, 1 << 14)
    assert (got["vmcs"]["GUEST_RIP"], got["dr6"]) == (0x800001, 0xFFFF0FF0)


@pytest.mark.parametrize(("blocked", "reason"), [(0, x.NMI_WINDOW), (8, x.VMCALL)])
def test_the_nmi_window_is_open_unless_virtual_nmis_are_blocked(blocked: int, reason: int) -> None:
    got = enter("b64", "9090", vmcs={
        "pin_controls": PIN | b.NMI_EXITING | b.VIRTUAL_NMIS, "proc_controls": PRIMARY | b.NMI_WINDOW_EXITING,
        "guest_interruptibility": blocked,
    })  # fmt: skip

    assert got["reason"] == reason


def test_mov_ss_blocks_until_the_next_instruction_has_ended() -> None:
    got = enter("b64", "8ed0" + "0fa2", gpr={"rax": 0x10})

    assert (got["reason"], got["vmcs"]["GUEST_INTERRUPTIBILITY_STATE"]) == (x.CPUID, 2)


def test_a_page_fault_of_32_bit_paging_has_its_address_and_error_code() -> None:
    got = enter(
        "b32", "8901", vmcs={"exception_bitmap": 1 << PF}, gpr={"rcx": 0x0083_0000}, memory={0x80E0C0: "00000000"}
    )

    assert (got["reason"], got["qualification"], got["interruption_error_code"]) == (x.EXCEPTION_NMI, 0x0083_0000, 2)


def test_a_segment_limit_outside_64_bit_mode_is_a_general_protection_fault() -> None:
    got = enter("bv86", "8807", gpr={"rbx": 0x1_0000})  # 16-bit addressing wraps; FS has the limit that is exceeded
    beyond = enter("b32", "648801", vmcs={"guest_fs_limit": 0xF, "guest_fs_ar": 0x4093}, gpr={"rcx": 0x10})

    assert got["reason"] == x.VMCALL and "guest_handler_vector" not in got
    assert beyond["guest_handler_vector"] == GP


def test_a_gate_below_the_idt_limit_of_protected_mode_is_found_by_eight_bytes() -> None:
    got = enter("b32", "0f0b", vmcs={"exception_bitmap": 1 << NP}, memory=not_present(UD, IDT32))

    assert got["interruption_error_code"] == UD << 3 | 2 | 1


@pytest.mark.parametrize(("code", "pushed"), [("cc", 0), ("cd30", 0), ("f1", 0), ("0f0b", 1)])
def test_a_software_interrupt_pushes_a_clear_resume_flag_and_a_fault_a_set_one(code: str, pushed: int) -> None:
    got = enter("b64", code, vmcs={"guest_rflags": 1 << 16 | 2}, memory={IDT64 + 0x305: "8e"})

    flags = bytes.fromhex(got["guest_stack"][1])[16:24]
    assert "guest_handler_vector" in got
    assert flags[2] & 1 == pushed
