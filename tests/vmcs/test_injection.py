"""Event injection by VM entry: which event, whence it returns, what it wakes and blocks, what it leaves in the VMCS.

SDM: "VM-Entry Controls for Event Injection"; "Event Injection"; "Special Features of VM Entry".
SDM: "VM-Entry Failures During or After Loading Guest State".
SDM: "Recording VM-Exit Information and Updating VM-entry Control Fields".
"""

from __future__ import annotations

import pytest

from tests.vmcs.control_cases import IF, NO_EXIT
from tests.vmcs.guests import CODE, STACK, VIRTUAL_APIC, Guest, quad
from vtsim.vmcs import reasons as x

VALID, ERROR = 1 << 31, 1 << 11
EXTERNAL, NMI, HARDWARE, SOFTWARE, PRIVILEGED, SOFTWARE_EXCEPTION, OTHER = (
    0,
    2 << 8,
    3 << 8,
    4 << 8,
    5 << 8,
    6 << 8,
    7 << 8,
)
GP, DB, BP, OF, DF = 13, 1, 3, 4, 8
INFORMATION, LENGTH, CODE_FIELD = (
    "ENTRY_INTERRUPTION_INFORMATION",
    "ENTRY_INSTRUCTION_LENGTH",
    "ENTRY_EXCEPTION_ERROR_CODE",
)
GATE_OF_GP = {0x804000 + 16 * GP + 5: "0e"}  # not present


def inject(kind: int, code: str = "9090", **fields: int) -> Guest:
    return Guest(code=code, fields={INFORMATION: VALID | kind, "GUEST_RFLAGS": IF, **fields})


@pytest.mark.parametrize(
    ("kind", "length", "pushed"),
    [
        (EXTERNAL | 0x30, 0, CODE), (NMI | 2, 0, CODE), (HARDWARE | 6, 0, CODE), (HARDWARE | DB, 0, CODE),
        (SOFTWARE | 0x30, 2, CODE + 2), (PRIVILEGED | DB, 1, CODE + 1), (SOFTWARE_EXCEPTION | BP, 1, CODE + 1),
        (SOFTWARE_EXCEPTION | OF, 3, CODE + 3),
    ],
)  # fmt: skip
def test_an_injected_event_returns_to_the_instruction_or_behind_it(kind: int, length: int, pushed: int) -> None:
    guest = inject(kind, **{LENGTH: length})
    got = Guest(code=guest.code, fields=guest.fields, dump=(STACK - 40, 8)).run()

    assert got.differs({**NO_EXIT, "vector": kind & 0xFF, "dump": quad(pushed)}) == {}


def test_an_injected_exception_pushes_the_error_code_of_the_field() -> None:
    guest = inject(HARDWARE | ERROR | GP, **{CODE_FIELD: 0x1234})
    got = Guest(code=guest.code, fields=guest.fields, dump=(STACK - 48, 16)).run()

    assert got.differs({"vector": GP, "dump": quad(0x1234, CODE)}) == {}


def test_the_exception_bitmap_does_not_count_for_an_injected_event() -> None:
    assert inject(HARDWARE | 6, EXCEPTION_BITMAP=0xFFFFFFFF).run().differs({"reason": x.VMCALL, "vector": 6}) == {}


def test_external_interrupt_exiting_and_nmi_exiting_do_not_count_for_injected_events() -> None:
    assert inject(EXTERNAL | 0x30).run("EXTERNAL_INTERRUPT_EXITING").at("vector") == 0x30
    assert inject(NMI | 2).run("NMI_EXITING").at("vector") == 2


@pytest.mark.parametrize("state", [0, 1])
def test_an_injected_interrupt_makes_the_guest_active_and_ends_blocking(state: int) -> None:
    got = inject(EXTERNAL | 0x30, GUEST_ACTIVITY_STATE=state).run()

    assert got.differs({"vector": 0x30, "GUEST_ACTIVITY_STATE": 0, "GUEST_INTERRUPTIBILITY_STATE": 0}) == {}


@pytest.mark.parametrize(("controls", "nmi"), [("", "NMI_EXITING"), ("NMI_EXITING VIRTUAL_NMIS", "")])
def test_an_injected_nmi_blocks_nmis_and_what_was_blocked_before_is_saved(controls: str, nmi: str) -> None:
    got = inject(NMI | 2).run(f"{controls} {nmi}")

    assert got.differs({"vector": 2, "GUEST_INTERRUPTIBILITY_STATE": 8}) == {}


def test_a_fault_of_the_delivery_is_held_against_the_bitmap_and_reports_the_injected_event() -> None:
    guest = inject(HARDWARE | ERROR | GP, **{CODE_FIELD: 8}, EXCEPTION_BITMAP=1 << 11)
    got = Guest(code=guest.code, fields=guest.fields, memory=GATE_OF_GP).run()

    assert got.differs({
        "reason": x.EXCEPTION_NMI, "EXIT_INTERRUPTION_INFORMATION": VALID | ERROR | HARDWARE | 11,
        "IDT_VECTORING_INFORMATION": VALID | ERROR | HARDWARE | GP, "IDT_VECTORING_ERROR_CODE": 8, "GUEST_RIP": CODE,
    }) == {}  # fmt: skip


def test_an_injected_event_that_the_idt_does_not_hold_ends_in_a_triple_fault() -> None:
    assert inject(HARDWARE | 6, GUEST_IDTR_LIMIT=0).run().at("reason") == x.TRIPLE_FAULT


def test_an_ept_violation_of_the_delivery_reports_type_vector_and_length() -> None:
    guest = inject(SOFTWARE | 0x30, **{LENGTH: 2})
    got = Guest(code=guest.code, fields=guest.fields, memory={0x813020: quad(0)}).run()  # of the IDT at 804000H

    assert got.differs({
        "reason": x.EPT_VIOLATION, "IDT_VECTORING_INFORMATION": VALID | SOFTWARE | 0x30, "EXIT_INSTRUCTION_LENGTH": 2,
        "GUEST_PHYSICAL_ADDRESS": 0x804300,
    }) == {}  # fmt: skip


def test_a_vm_exit_clears_the_valid_bit_and_keeps_the_rest() -> None:
    assert inject(EXTERNAL | 0x30).run().fields[INFORMATION] == 0x30


@pytest.mark.parametrize(
    ("fields", "left"), [({"GUEST_RFLAGS": 0}, VALID | 0x306), ({"HOST_TR_SELECTOR": 0}, VALID | 0x306)]
)
def test_an_entry_that_fails_keeps_the_valid_bit(fields: dict[str, int], left: int) -> None:
    assert inject(HARDWARE | 6, **fields).run().fields[INFORMATION] == left


def test_a_pending_mtf_exit_comes_before_the_first_instruction() -> None:
    got = inject(OTHER).run("MONITOR_TRAP_FLAG")

    assert got.differs({"reason": x.MONITOR_TRAP_FLAG, "GUEST_RIP": CODE}) == {}


# --- what else a VM entry does ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("blocking", "next_exit"), [(0, CODE), (1, CODE + 1), (2, CODE + 1)])
def test_blocking_by_sti_and_mov_ss_holds_for_one_instruction(blocking: int, next_exit: int) -> None:
    got = Guest(
        code="9090", controls="INTERRUPT_WINDOW_EXITING",
        fields={"GUEST_RFLAGS": IF, "GUEST_INTERRUPTIBILITY_STATE": blocking},
    ).run()  # fmt: skip

    assert got.differs({"reason": x.INTERRUPT_WINDOW, "GUEST_RIP": next_exit}) == {}


@pytest.mark.parametrize(("blocking", "at"), [(0, CODE), (2, CODE + 1)])
def test_pending_debug_exceptions_are_delivered_once_mov_ss_no_longer_blocks(blocking: int, at: int) -> None:
    got = Guest(
        code="9090", fields={
            "GUEST_PENDING_DEBUG_EXCEPTIONS": 0x1002, "GUEST_INTERRUPTIBILITY_STATE": blocking,
            "EXCEPTION_BITMAP": 1 << DB,
        },
    ).run()  # fmt: skip

    assert got.differs({"reason": x.EXCEPTION_NMI, "qualification": 2, "GUEST_RIP": at}) == {}


def test_an_injected_event_comes_before_pending_debug_exceptions() -> None:
    got = inject(EXTERNAL | 0x30, GUEST_PENDING_DEBUG_EXCEPTIONS=0x1002, EXCEPTION_BITMAP=1 << DB).run()

    assert got.differs({"reason": x.EXCEPTION_NMI, "qualification": 2, "GUEST_RIP": 0x801300}) == {}


@pytest.mark.parametrize(
    ("order", "controls", "fields"),
    [
        (x.INTERRUPT_WINDOW, "INTERRUPT_WINDOW_EXITING", {"GUEST_RFLAGS": IF}),
        (x.NMI_WINDOW, "INTERRUPT_WINDOW_EXITING NMI_WINDOW_EXITING NMI_EXITING VIRTUAL_NMIS", {"GUEST_RFLAGS": IF}),
        (x.PREEMPTION_TIMER, "INTERRUPT_WINDOW_EXITING NMI_WINDOW_EXITING NMI_EXITING VIRTUAL_NMIS "
                             "ACTIVATE_PREEMPTION_TIMER", {"GUEST_RFLAGS": IF, "PREEMPTION_TIMER_VALUE": 0}),
    ],
)  # fmt: skip
def test_timer_nmi_window_and_interrupt_window_exit_in_this_order_before_any_instruction(
    order: int, controls: str, fields: dict[str, int]
) -> None:
    got = Guest(code="9090", controls=controls, fields=fields).run()

    assert got.differs({"reason": order, "GUEST_RIP": CODE}) == {}


@pytest.mark.parametrize(("threshold", "leaves"), [(4, False), (5, True)])
def test_a_task_priority_below_its_threshold_exits_before_any_instruction(threshold: int, leaves: bool) -> None:
    guest = Guest(
        code="9090", controls="USE_TPR_SHADOW VIRTUALIZE_APIC_ACCESSES", fields={"TPR_THRESHOLD": threshold},
        memory={VIRTUAL_APIC + 0x80: "4f01"}, dump=(VIRTUAL_APIC + 0x80, 2),
    )  # fmt: skip
    expected = {"reason": x.TPR_BELOW_THRESHOLD, "GUEST_RIP": CODE} if leaves else NO_EXIT

    assert guest.run().differs({**expected, "dump": "4f01"}) == {}


def test_a_task_priority_below_its_threshold_exits_after_the_delivery_of_an_injected_event() -> None:
    got = Guest(
        code="9090", controls="USE_TPR_SHADOW VIRTUALIZE_APIC_ACCESSES",
        fields={"TPR_THRESHOLD": 5, INFORMATION: VALID | 0x30, "GUEST_RFLAGS": IF},
    ).run()  # fmt: skip

    assert got.differs({"reason": x.TPR_BELOW_THRESHOLD, "GUEST_RIP": 0x801300}) == {}


def test_a_failed_entry_says_which_kind_of_failure_and_keeps_the_guest_area() -> None:
    """Reasons 33 and 34 with bit 31; nothing of the guest is saved, and the launch state stays clear."""
    got = Guest(fields={"GUEST_RFLAGS": 0, "GUEST_RSP": 0x1234, "EXIT_INSTRUCTION_LENGTH": 5}).run()

    assert got.fields["EXIT_REASON"] == 1 << 31 | x.INVALID_STATE
    assert (got.fields["GUEST_RSP"], got.fields["GUEST_RFLAGS"], got.fields["EXIT_INSTRUCTION_LENGTH"]) == (
        0x1234,
        0,
        5,
    )
