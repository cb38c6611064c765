"""Events around VM exits and entries: exceptions, interrupts, windows, timers, injection, VMX failures."""

from __future__ import annotations

import pytest

from tests.cpu.bench import DATA, END, HOST_TEXT, KERNEL_STACK, TABLES, TEXT, Virtual, exits, o_mem, virtual
from vtsim.base import jit
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler
from vtsim.cpu.kernels.apic import request
from vtsim.ept import spec as e
from vtsim.ept.tables import EPT_PAGE
from vtsim.vmcs import bits as b
from vtsim.vmcs import reasons as x

# --- exceptions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [False, True])
@pytest.mark.parametrize(("mask", "match"), [(0, 0), (0, 1), (4, 0), (4, 4), (2, 2)])
def test_a_page_fault_exits_by_bitmap_mask_and_match(wanted: bool, mask: int, match: int) -> None:
    """A write of ring 0 to a page that is not present: error code 2."""
    bench = virtual()
    bench.set(
        EXCEPTION_BITMAP=1 << 14 if wanted else 0,
        PAGE_FAULT_ERROR_CODE_MASK=mask,
        PAGE_FAULT_ERROR_CODE_MATCH=match,
    )
    bench.guest.gate(14, TEXT + 0x8000)
    bench.guest.code(lambda a: a.op(o.STOP_OP, imm=END), TEXT + 0x8000)
    got = exits(bench, lambda a: a.st_value(o_mem(0x500123), 1))

    assert (got == x.EXCEPTION_NMI) == (wanted == (2 & mask == match))
    if got is not None:
        assert bench.field("EXIT_INTERRUPTION_INFORMATION") == 1 << 31 | 1 << 11 | 3 << 8 | 14
        assert (bench.field("EXIT_INTERRUPTION_ERROR_CODE"), bench.field("EXIT_QUALIFICATION")) == (
            2,
            0x500123,
        )
        assert bench.field("IDT_VECTORING_INFORMATION") == 0
        assert bench.field("GUEST_RIP") == TEXT
    else:
        assert int(bench.m[s.CR2]) == 0x500123


@pytest.mark.parametrize("bit", range(32))
def test_only_bit_6_of_the_bitmap_stands_for_an_invalid_opcode(bit: int) -> None:
    bench = virtual()
    bench.set(EXCEPTION_BITMAP=1 << bit, PAGE_FAULT_ERROR_CODE_MATCH=1)
    bench.guest.gate(6, TEXT + 0x8000)
    bench.guest.code(lambda a: a.op(o.STOP_OP, imm=END), TEXT + 0x8000)

    assert exits(bench, lambda a: a.op(o.UD)) == (x.EXCEPTION_NMI if bit == 6 else None)


def test_an_ept_violation_while_an_event_is_delivered_reports_the_event() -> None:
    """The IDT is not in memory: INT 0x80 meets an EPT violation, with vector, type and length of the INT."""
    bench = virtual()
    bench.guest.gate(0x80, TEXT, dpl=3)
    frame = bench.guest.table.find(TABLES)
    assert frame is not None and bench.guest.ept is not None
    bench.guest.ept.unmap(frame.frame << 12, 1)

    assert exits(bench, lambda a: a.op(o.INT, imm=0x80)) == x.EPT_VIOLATION
    assert bench.field("IDT_VECTORING_INFORMATION") == 1 << 31 | 4 << 8 | 0x80
    assert bench.field("EXIT_INSTRUCTION_LENGTH") == 2
    assert bench.field("GUEST_PHYSICAL_ADDRESS") == frame.frame << 12 | 0x800
    assert bench.field("GUEST_LINEAR_ADDRESS") == TABLES + 0x800
    assert bench.field("EXIT_QUALIFICATION") == e.Q_READ | e.Q_LINEAR_VALID | e.Q_FINAL | e.Q_WRITABLE
    assert bench.field("GUEST_RIP") == TEXT


def test_a_nested_page_fault_respects_mask_and_match_and_reports_the_first_event() -> None:
    outcomes = []
    for match in (0, 1):
        bench = virtual()
        bench.set(EXCEPTION_BITMAP=1 << 14, PAGE_FAULT_ERROR_CODE_MASK=1, PAGE_FAULT_ERROR_CODE_MATCH=match)
        bench.guest.gate(6, TEXT, ist=1)
        bench.guest.put(bench.guest.tss + 36, 0x500_0000)  # this stack is not mapped
        bench.guest.gate(14, TEXT + 0x8000)
        bench.guest.code(lambda a: a.op(o.STOP_OP, imm=END), TEXT + 0x8000)
        outcomes.append(exits(bench, lambda a: a.op(o.UD)))
        if match == 0:
            assert bench.field("IDT_VECTORING_INFORMATION") == 1 << 31 | 3 << 8 | 6
            assert bench.field("EXIT_INTERRUPTION_INFORMATION") == 1 << 31 | 1 << 11 | 3 << 8 | 14

    assert outcomes == [x.EXCEPTION_NMI, None]


def test_a_double_fault_that_exits_reports_no_first_event() -> None:
    bench = virtual()
    bench.set(EXCEPTION_BITMAP=1 << 8)
    bench.guest.gate(14, TEXT, ist=1)
    bench.guest.put(bench.guest.tss + 36, 0x500_0000)

    assert exits(bench, lambda a: a.st_value(o_mem(0x500123), 1)) == x.EXCEPTION_NMI
    assert bench.field("EXIT_INTERRUPTION_INFORMATION") == 1 << 31 | 1 << 11 | 3 << 8 | 8
    assert bench.field("IDT_VECTORING_INFORMATION") == 0


def test_a_guest_without_handlers_ends_in_a_triple_fault_exit() -> None:
    bench = virtual()

    assert exits(bench, lambda a: a.op(o.UD)) == x.TRIPLE_FAULT


# --- interrupts and timers ------------------------------------------------------------------------------------------


def interrupted(bench: Virtual, *, flags: int) -> int:
    """Let a vector be pending while the guest runs a long program."""
    bench.guest.code(lambda a: (a.label("x"), a.op(o.NOP), a.jmp("x"))[0], TEXT)
    bench.guest.gate(0x55, TEXT + 0x8000)
    bench.guest.code(lambda a: a.op(o.STOP_OP, imm=END), TEXT + 0x8000)
    bench.host()
    bench.enter(TEXT)
    bench.set(GUEST_RFLAGS=flags)
    bench.engine.run(ops=9)
    with jit.quiet():
        request(bench.m, bench.engine.arena, 0x55)
    return bench.engine.run(ops=100)


@pytest.mark.parametrize("flags", [2, 0x202])
@pytest.mark.parametrize("acknowledge", [False, True])
def test_an_external_interrupt_exits_whatever_if_says(flags: int, acknowledge: bool) -> None:
    bench = virtual()
    bench.set(EXIT_CONTROLS=bench.field("EXIT_CONTROLS") | (b.EXIT_ACKNOWLEDGE_INTERRUPT if acknowledge else 0))
    interrupted(bench, flags=flags)

    assert bench.reason == x.EXTERNAL_INTERRUPT
    assert bench.field("EXIT_INTERRUPTION_INFORMATION") == (1 << 31 | 0x55 if acknowledge else 0)
    assert int(bench.m[s.APIC_PENDING]) == (0 if acknowledge else 0x56)
    assert int(bench.m[s.RFLAGS]) & 0x200 == 0


def test_without_the_control_the_guest_takes_the_interrupt_itself() -> None:
    bench = virtual()
    bench.set(PIN_CONTROLS=0)

    assert interrupted(bench, flags=0x202) == 4
    assert int(bench.m[s.STOP_A]) == END


def test_an_exit_after_a_jump_takes_nothing_back() -> None:
    """Cycles never run backwards: the jump before the interrupt has retired."""
    bench = virtual({"prices.JMP": 50})
    bench.guest.code(lambda a: (a.label("x"), a.jmp("x"))[0], TEXT)
    bench.host()
    bench.enter(TEXT)
    bench.engine.run(ops=9)
    cycle, retired = int(bench.m[s.CYCLE]), int(bench.m[s.RETIRED])
    with jit.quiet():
        request(bench.m, bench.engine.arena, 0x55)
    bench.engine.run(ops=0)
    bench.engine.run(until=cycle)

    assert int(bench.m[s.CYCLE]) >= cycle
    bench.engine.run(ops=1)
    assert int(bench.m[s.CYCLE]) >= cycle + bench.engine.profile.transitions.vm_exit_cycles
    assert int(bench.m[s.RETIRED]) >= retired


@pytest.mark.parametrize(("flags", "exit"), [(2, False), (0x202, True)])
def test_the_interrupt_window_opens_with_if(flags: int, exit: bool) -> None:
    bench = virtual()
    bench.set(PRIMARY_PROC_CONTROLS=bench.field("PRIMARY_PROC_CONTROLS") | b.INTERRUPT_WINDOW_EXITING)
    bench.guest.code(lambda a: (a.op(o.NOP), a.op(o.STOP_OP, imm=END))[0], TEXT)
    bench.host()
    bench.enter(TEXT)
    bench.set(GUEST_RFLAGS=flags)
    bench.engine.run(ops=50)

    assert (bench.reason == x.INTERRUPT_WINDOW and int(bench.m[s.STOP_A]) != END) == exit
    if exit:
        assert bench.field("GUEST_RIP") == TEXT


def test_the_interrupt_window_opens_one_instruction_after_sti() -> None:
    bench = virtual()
    bench.set(PRIMARY_PROC_CONTROLS=bench.field("PRIMARY_PROC_CONTROLS") | b.INTERRUPT_WINDOW_EXITING)

    assert exits(bench, lambda a: (a.op(o.STI), a.op(o.NOP), a.op(o.NOP))[0]) == x.INTERRUPT_WINDOW
    assert bench.field("GUEST_RIP") == TEXT + 2


@pytest.mark.parametrize("save", [False, True])
def test_the_preemption_timer_counts_down_to_an_exit(save: bool) -> None:
    bench = virtual()
    bench.set(
        PIN_CONTROLS=b.ACTIVATE_PREEMPTION_TIMER, PREEMPTION_TIMER_VALUE=400,
        EXIT_CONTROLS=bench.field("EXIT_CONTROLS") | (b.EXIT_SAVE_PREEMPTION_TIMER if save else 0),
    )  # fmt: skip

    assert exits(bench, lambda a: (a.label("x"), a.op(o.NOP), a.jmp("x"))[0]) == x.PREEMPTION_TIMER
    assert bench.field("PREEMPTION_TIMER_VALUE") == (0 if save else 400)
    spent = bench.engine.profile.transitions
    assert int(bench.m[s.CYCLE]) >= 400 + spent.vm_exit_cycles + spent.vm_entry_cycles


def test_a_halted_guest_that_an_interrupt_takes_out_is_saved_as_halted() -> None:
    """SDM, "Saving Non-Register State": the activity state before the exit, RIP behind the HLT."""
    bench = virtual()
    bench.set(PRIMARY_PROC_CONTROLS=bench.field("PRIMARY_PROC_CONTROLS") & ~b.HLT_EXITING)
    bench.guest.code(lambda a: (a.op(o.STI), a.op(o.HLT), a.op(o.STOP_OP, imm=END))[0], TEXT)
    bench.host()
    bench.enter(TEXT)
    bench.engine.run(until=1_000_000)
    with jit.quiet():
        request(bench.m, bench.engine.arena, 0x55)
    bench.engine.run(ops=50)

    assert bench.reason == x.EXTERNAL_INTERRUPT
    assert (bench.field("GUEST_ACTIVITY_STATE"), bench.field("GUEST_RIP")) == (1, TEXT + 2)


@pytest.mark.parametrize(("kind", "length", "pushed"), [(0, 0, TEXT), (3, 0, TEXT), (4, 2, TEXT + 2)])
def test_an_entry_injects_through_the_guests_idt(kind: int, length: int, pushed: int) -> None:
    bench = virtual()
    vector = {0: 0x55, 3: 13, 4: 0x80}[kind]
    bench.guest.gate(vector, TEXT + 0x8000)
    bench.guest.code(lambda a: a.op(o.STOP_OP, imm=END), TEXT + 0x8000)
    bench.guest.code(lambda a: a.op(o.STOP_OP, imm=1), TEXT)
    bench.host()
    bench.enter(TEXT)
    bench.set(
        ENTRY_INTERRUPTION_INFORMATION=1 << 31 | kind << 8 | vector | (1 << 11 if kind == 3 else 0), ENTRY_EXCEPTION_ERROR_CODE=0x18,
        ENTRY_INSTRUCTION_LENGTH=length, GUEST_RFLAGS=0x202,
    )  # fmt: skip
    bench.engine.run(ops=50)
    top = (KERNEL_STACK - 64) // 16 * 16

    assert int(bench.m[s.STOP_A]) == END
    assert bench.guest.get(top - 40) == pushed
    assert bench.reg(s.RSP) == top - (48 if kind == 3 else 40)
    assert kind != 3 or bench.guest.get(top - 48) == 0x18


def test_vmwrite_then_vmread_gives_the_value_back() -> None:
    bench = virtual()
    bench.space.code(
        lambda a: (
            a.op(o.VMXON, mem=o_mem(DATA + 0x808)), a.op(o.VMPTRLD, mem=o_mem(DATA + 0x800)), a.mov(s.RAX, 0x1234_5678),
            a.vmwrite("GUEST_RIP", s.RAX), a.vmread(s.RBX, "GUEST_RIP"), a.op(o.STOP_OP),
        )[0],
        HOST_TEXT,
    )  # fmt: skip
    bench.start(HOST_TEXT)

    assert bench.engine.run(ops=20) == 4
    assert bench.reg(s.RBX) == bench.field("GUEST_RIP") == 0x1234_5678


@pytest.mark.parametrize(
    ("ops", "carry", "zero", "error"),
    [
        ([(o.VMLAUNCH, 0)], True, False, 0),
        ([(o.VMPTRLD, DATA + 0x800), (o.VMRESUME, 0)], False, True, 5),
        ([(o.VMPTRLD, DATA + 0x800), (o.VMPTRLD, DATA + 0x808)], False, True, 10),
        ([(o.VMPTRLD, DATA + 0x800), (o.VMCLEAR, DATA + 0x808)], False, True, 3),
        ([(o.VMPTRLD, DATA + 0x800), (o.VMCLEAR, DATA + 0x800), (o.VMLAUNCH, 0)], True, False, 0),
    ],
)
def test_vmx_instructions_fail_as_the_manual_says(
    ops: list[tuple[int, int]], carry: bool, zero: bool, error: int
) -> None:
    bench = virtual()

    def write(a: Assembler) -> None:
        a.op(o.VMXON, mem=o_mem(DATA + 0x808))
        for op, at in ops:
            a.emit(op, mem=o_mem(at))
        a.op(o.STOP_OP, imm=END)

    bench.space.code(write, HOST_TEXT)
    bench.start(HOST_TEXT)
    bench.engine.run(ops=20)

    assert (bool(bench.m[s.RFLAGS] & 1), bool(bench.m[s.RFLAGS] & 64)) == (carry, zero)
    assert not zero or bench.field("VM_INSTRUCTION_ERROR") == error


def test_an_ept_misconfiguration_exits_with_its_address_and_no_qualification() -> None:
    bench = virtual()
    leaf = bench.guest.table.find(DATA)
    assert leaf is not None and bench.guest.ept is not None
    bench.guest.ept.map(leaf.frame << 12, bench.guest.hfn(leaf.frame), EPT_PAGE & ~1)

    assert exits(bench, lambda a: a.ld(s.RAX, o_mem(DATA + 8))) == x.EPT_MISCONFIG
    assert (bench.field("GUEST_PHYSICAL_ADDRESS") >> 12, bench.field("EXIT_QUALIFICATION")) == (leaf.frame, 0)
