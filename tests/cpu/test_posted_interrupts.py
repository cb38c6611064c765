"""Posted interrupts reach a guest without a VM exit, and virtual IPIs post them.

SDM: "Posted-Interrupt Processing"; "IPI Virtualization"; "Controls for APIC Virtualization".
SDM: "Virtualizing CR8-Based TPR Accesses".
"""

from __future__ import annotations

import pytest
from attrs import evolve

from tests.vmcs.control_cases import APIC, ICR, IF, LINEAR, NO_EXIT, SELF, THIRD, WRMSR
from tests.vmcs.guests import APIC_ACCESS, DESCRIPTOR, GP, PID_TABLE, POSTED, VIRTUAL_APIC, Guest, quad
from vtsim.cpu import slots as s
from vtsim.vmcs import reasons as x

VECTOR, NOTIFICATION, OUTSTANDING, SUPPRESSED = 0x71, 0xF2, 1, 2
POST = f"{APIC} PROCESS_POSTED_INTERRUPTS EXIT_ACKNOWLEDGE_INTERRUPT"
HALT, NOPS = "f4", "9090"


def requests(*vectors: int) -> str:
    """The request bits of a descriptor."""
    return quad(*(sum(1 << v - 64 * n for v in vectors if v >> 6 == n) for n in range(4)))


def posted(code: str = NOPS, vectors: tuple[int, ...] = (VECTOR,), *, sent: int = NOTIFICATION, **fields: int) -> Guest:
    return Guest(
        code=code, controls=POST, send=SELF | sent, fields={"GUEST_RFLAGS": IF, **fields}, dump=(POSTED, 40),
        memory={POSTED: requests(*vectors) + quad(OUTSTANDING | 0xABCD << 16)},
    )  # fmt: skip


def test_a_notification_empties_the_descriptor_into_the_virtual_apic_without_an_exit() -> None:
    got = posted().run()

    assert got.differs({"reason": x.VMCALL, "vector": VECTOR, "GUEST_INTERRUPT_STATUS": VECTOR << 8}) == {}
    assert got.dump == requests() + quad(0xABCD << 16)  # the rest of the descriptor belongs to software


def test_the_notification_is_dismissed_from_the_local_apic() -> None:
    got = posted().run()

    assert [got.record[s.APIC_ISR + n] | got.record[s.APIC_IRR + n] for n in range(4)] == [0, 0, 0, 0]


def test_another_vector_exits_and_leaves_the_descriptor() -> None:
    got = posted(sent=0xF1).run()

    assert got.differs({
        "reason": x.EXTERNAL_INTERRUPT, "EXIT_INTERRUPTION_INFORMATION": 1 << 31 | 0xF1, "GUEST_INTERRUPT_STATUS": 0,
    }) == {}  # fmt: skip
    assert got.dump == requests(VECTOR) + quad(OUTSTANDING | 0xABCD << 16)


@pytest.mark.parametrize(
    ("before", "vectors", "after"),
    [(0x31, (0x45,), 0x45), (0x51, (0x45,), 0x51), (0x31, (), 0x31), (0, (0x22, 0x61, 0xF0), 0xF0)],
)
def test_rvi_becomes_the_highest_of_what_it_was_and_what_was_posted(
    before: int, vectors: tuple[int, ...], after: int
) -> None:
    """While RFLAGS.IF is 0, which holds back the delivery and not the processing."""
    got = posted(vectors=vectors, GUEST_RFLAGS=2, GUEST_INTERRUPT_STATUS=before).run()

    assert got.differs({**NO_EXIT, "GUEST_INTERRUPT_STATUS": after}) == {}


def test_a_halted_guest_stays_halted_unless_a_virtual_interrupt_is_recognized() -> None:
    """SVI 80H makes the processor priority 80H: vector 71H is posted and not recognized, 91H is."""
    memory = {VIRTUAL_APIC + 0x80: "00"}
    low = posted(HALT, GUEST_INTERRUPT_STATUS=0x8000, GUEST_ACTIVITY_STATE=1)
    high = posted(HALT, (0x91,), GUEST_INTERRUPT_STATUS=0x8000, GUEST_ACTIVITY_STATE=1)

    stays = evolve(low, memory={**low.memory, **memory}).run()
    assert stays.differs({"reason": x.EXTERNAL_INTERRUPT, "GUEST_ACTIVITY_STATE": 1}) == {}
    assert stays.fields["GUEST_INTERRUPT_STATUS"] == 0x8071
    assert evolve(high, memory={**high.memory, **memory}).run().differs({"reason": x.VMCALL, "vector": 0x91}) == {}


def test_virtual_interrupts_do_not_wake_a_cpu_that_is_shut_down() -> None:
    guest = Guest(
        controls=f"{APIC} ACTIVATE_PREEMPTION_TIMER", memory={VIRTUAL_APIC + 0x220: "02"},
        fields={"GUEST_RFLAGS": IF, "GUEST_ACTIVITY_STATE": 2, "GUEST_INTERRUPT_STATUS": 0x41, "PREEMPTION_TIMER_VALUE": 500},
    )  # fmt: skip

    assert guest.run().differs({"reason": x.PREEMPTION_TIMER, "GUEST_ACTIVITY_STATE": 2}) == {}


# --- virtual IPIs ---------------------------------------------------------------------------------------------------

IPI = evolve(ICR, controls=f"{ICR.controls} IPI_VIRTUALIZATION")
SENT = {**NO_EXIT, "dump": requests(0x55) + quad(OUTSTANDING)}
EXITED = {"reason": x.APIC_WRITE, "qualification": 0x300, "dump": requests() + quad(0)}


def test_a_virtual_ipi_is_posted_into_the_descriptor_that_the_table_names() -> None:
    assert IPI.run().differs(SENT) == {}


@pytest.mark.parametrize(
    "command",
    [0x5, 0x155, 0x455, 0x855, 0x1055, 0x2055, 0x8055, 0x10055, 0x40055, 0x80055, 0xC0055, 1 << 31 | 0x55],
)
def test_a_command_that_is_not_fixed_physical_edge_to_one_apic_exits(command: int) -> None:
    assert evolve(IPI, gpr={**IPI.gpr, "rax": command}).run().differs(EXITED) == {}


@pytest.mark.parametrize("entry", [0, DESCRIPTOR, DESCRIPTOR | 3, DESCRIPTOR | 0x21, 1 << 45 | DESCRIPTOR | 1])
def test_an_entry_that_is_not_valid_exits(entry: int) -> None:
    assert evolve(IPI, memory={**IPI.memory, PID_TABLE: quad(0, 0, entry)}).run().differs(EXITED) == {}


def test_a_target_beyond_the_table_exits() -> None:
    guest = evolve(IPI, memory={**IPI.memory, VIRTUAL_APIC + 0x310: "00000003"})

    assert guest.run().differs(EXITED) == {}


@pytest.mark.parametrize(("notify", "sends"), [(0, True), (OUTSTANDING, False), (SUPPRESSED, False)])
def test_a_notification_is_sent_unless_one_is_outstanding_or_suppressed(notify: int, sends: bool) -> None:
    """NV 61H to the APIC with the identifier in NDST[15:8], which is the one that sends."""
    information = notify | 0x61 << 16
    guest = evolve(
        IPI, controls=f"{IPI.controls} EXIT_ACKNOWLEDGE_INTERRUPT",
        memory={**IPI.memory, DESCRIPTOR + 32: quad(information)},
    )  # fmt: skip
    got = guest.run()

    if sends:
        expected = {"reason": x.EXTERNAL_INTERRUPT, "EXIT_INTERRUPTION_INFORMATION": 1 << 31 | 0x61}
        assert got.differs({**expected, "GUEST_RIP": 0x800002}) == {}
    else:
        assert got.differs(NO_EXIT) == {}
    assert got.dump == requests(0x55) + quad(information | OUTSTANDING if sends else information)


def test_a_virtual_ipi_to_itself_comes_back_as_a_virtual_interrupt_with_no_exit_on_the_way() -> None:
    guest = evolve(
        IPI, code="8901" + "9090", controls=f"{IPI.controls} {POST}",
        fields={**IPI.fields, "GUEST_RFLAGS": IF, "POSTED_INTERRUPT_DESCRIPTOR_ADDRESS": DESCRIPTOR},
        memory={**IPI.memory, DESCRIPTOR + 32: quad(NOTIFICATION << 16)},
    )  # fmt: skip
    got = guest.run()

    assert got.differs({"reason": x.VMCALL, "vector": 0x55, "GUEST_INTERRUPT_STATUS": 0x5500}) == {}
    assert got.dump == requests() + quad(NOTIFICATION << 16)


@pytest.mark.parametrize(("low", "high", "ended"), [(0x55, 2, SENT), (0x55, 3, EXITED), (0x805, 2, EXITED)])
def test_the_x2apic_command_register_is_virtualized_with_its_32_bit_target(
    low: int, high: int, ended: dict[str | int, int | str]
) -> None:
    guest = Guest(
        code=WRMSR, controls=f"USE_TPR_SHADOW VIRTUALIZE_X2APIC_MODE USE_MSR_BITMAPS {THIRD} IPI_VIRTUALIZATION",
        gpr={"rcx": 0x830, "rax": low, "rdx": high}, memory=IPI.memory, fields=IPI.fields, dump=IPI.dump,
    )  # fmt: skip

    assert guest.run().differs(ended) == {}


def test_reserved_bits_of_the_x2apic_command_register_are_refused() -> None:
    guest = Guest(
        code=WRMSR, controls=f"USE_TPR_SHADOW VIRTUALIZE_X2APIC_MODE USE_MSR_BITMAPS {THIRD} IPI_VIRTUALIZATION",
        gpr={"rcx": 0x830, "rax": 1 << 13 | 0x55, "rdx": 2}, memory=IPI.memory, fields=IPI.fields, dump=IPI.dump,
    )  # fmt: skip

    assert guest.run().differs({"vector": GP, "dump": requests() + quad(0)}) == {}


# --- other accesses to the virtual APIC ---------------------------------------------------------------------------------


def test_an_instruction_fetch_from_the_apic_access_page_exits_as_one() -> None:
    guest = Guest(
        code="ffe1", controls=f"{LINEAR} USE_TPR_SHADOW APIC_REGISTER_VIRTUALIZATION", gpr={"rcx": APIC_ACCESS + 0x80}
    )
    got = guest.run()

    assert (
        got.differs({"reason": x.APIC_ACCESS, "qualification": 2 << 12 | 0x80, "GUEST_RIP": APIC_ACCESS + 0x80}) == {}
    )


@pytest.mark.parametrize(("value", "threshold", "leaves"), [(3, 4, True), (4, 4, False), (5, 4, False)])
def test_mov_to_cr8_writes_vtpr_and_exits_below_the_threshold(value: int, threshold: int, leaves: bool) -> None:
    guest = Guest(
        code="440f22c0", controls="USE_TPR_SHADOW", gpr={"rax": value}, fields={"TPR_THRESHOLD": threshold},
        memory={VIRTUAL_APIC + 0x80: "f0"}, dump=(VIRTUAL_APIC + 0x80, 4),
    )  # fmt: skip
    expected = {"reason": x.TPR_BELOW_THRESHOLD if leaves else x.VMCALL, "dump": f"{value << 4:02x}000000"}

    assert guest.run().differs({**expected, "GUEST_RIP": 0x800004}) == {}


def test_with_virtual_interrupt_delivery_mov_to_cr8_delivers_what_it_lets_through() -> None:
    guest = Guest(
        code="440f22c0" + NOPS, controls=APIC, gpr={"rax": 3},
        fields={"GUEST_RFLAGS": IF, "GUEST_INTERRUPT_STATUS": 0x41, "TPR_THRESHOLD": 0},
        memory={VIRTUAL_APIC + 0x80: "50", VIRTUAL_APIC + 0x220: "02"},
    )  # fmt: skip

    assert guest.run().differs({"reason": x.VMCALL, "vector": 0x41}) == {}


@pytest.mark.parametrize("code", ["440f22c0", "440f20c0"])
def test_cr8_of_a_guest_without_the_shadow_is_the_apics_task_priority(code: str) -> None:
    got = Guest(code=code, gpr={"rax": 6}, record={s.CR8: 9}, dump=(VIRTUAL_APIC + 0x80, 4)).run()

    assert (got.record[s.CR8], got.record[s.GPR]) == ((6, 6) if code == "440f22c0" else (9, 9))
    assert got.dump == "00000000"
