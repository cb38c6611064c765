"""Rings, the IDT, interrupts, halting and the local APIC."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.cpu.bench import (
    CS0,
    CS3,
    DATA,
    INTERRUPT_STACK,
    KERNEL_STACK,
    SS3,
    TABLES,
    TEXT,
    USER_STACK,
    USER_TEXT,
    Native,
    native,
    o_mem,
)
from vtsim.base import jit
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.codes import HORIZON, PROGRAM_END, TRIPLE_FAULTED
from vtsim.cpu.kernels.apic import request

HANDLER = TEXT + 0x8000
FRAME = ("error", "RIP", "CS", "RFLAGS", "RSP", "SS")


def stops_with(number: int) -> Callable[[Assembler], None]:
    return lambda a: a.op(o.STOP_OP, imm=number)


def handled(bench: Native, vector: int, **gate: int) -> None:
    """A handler for a vector that stops with its number."""
    bench.space.gate(vector, HANDLER + 16 * vector, **gate)  # type: ignore[arg-type]
    bench.space.code(stops_with(vector), HANDLER + 16 * vector)


def frame(bench: Native, *, error: bool) -> dict[str, int]:
    at = bench.reg(s.RSP) - (0 if error else 8)
    return {name: bench.space.get(at + 8 * n) for n, name in enumerate(FRAME) if n or error}


def ended(bench: Native) -> int:
    assert int(bench.m[s.STOP]) == PROGRAM_END
    return int(bench.m[s.STOP_A])


# --- exceptions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ring", [0, 3])
def test_an_exception_pushes_the_frame_of_the_manual(ring: int) -> None:
    bench = native()
    handled(bench, 14)
    bench.run(lambda a: a.st_value(o_mem(0x500008), 1), ring)
    base = USER_TEXT if ring else TEXT
    pushed = frame(bench, error=True)

    assert ended(bench) == 14
    assert pushed == {
        "error": 2 | (4 if ring else 0), "RIP": base, "CS": CS3 if ring else CS0, "RFLAGS": 2,
        "RSP": bench.space.stack(ring), "SS": SS3 if ring else 0x18,
    }  # fmt: skip
    assert bench.reg(s.RSP) == (KERNEL_STACK if ring else (KERNEL_STACK - 64) // 16 * 16) - 48
    assert (int(bench.m[s.CS_SELECTOR]), int(bench.m[s.PRIVILEGE]), int(bench.m[s.CR2])) == (
        CS0,
        o.R0,
        0x500008,
    )


@pytest.mark.parametrize(("trap", "flag"), [(False, 0), (True, 0x200)])
def test_an_interrupt_gate_closes_if_and_a_trap_gate_does_not(trap: bool, flag: int) -> None:
    bench = native()
    bench.space.gate(6, HANDLER, trap=trap)
    bench.space.code(stops_with(6), HANDLER)
    bench.run(lambda a: (a.op(o.STI), a.op(o.NOP), a.op(o.UD))[0])

    assert ended(bench) == 6
    assert int(bench.m[s.RFLAGS]) & 0x200 == flag
    assert frame(bench, error=False)["RFLAGS"] & 0x200


def test_an_interrupt_stack_of_the_tss_is_used_from_any_ring() -> None:
    for ring in (0, 3):
        bench = native()
        handled(bench, 6, ist=1)
        bench.run(lambda a: a.op(o.UD), ring)

        assert bench.reg(s.RSP) == INTERRUPT_STACK - 40


def test_a_software_interrupt_from_ring_3_needs_a_gate_for_ring_3() -> None:
    outcomes = []
    for dpl in (0, 3):
        bench = native()
        handled(bench, 0x80, dpl=dpl)
        handled(bench, 13)
        bench.run(lambda a: a.op(o.INT, imm=0x80), 3)
        outcomes.append((ended(bench), bench.space.get(bench.reg(s.RSP) + (8 if dpl == 0 else 0))))
        if dpl == 0:
            assert bench.space.get(bench.reg(s.RSP)) == 0x80 << 3 | 2

    assert outcomes == [(13, USER_TEXT), (0x80, USER_TEXT + 2)]


@pytest.mark.parametrize(("op", "dearer"), [(o.INT, s.PRICE + o.INT), (o.UD, s.P_EXCEPTION)])
def test_a_software_interrupt_pays_for_its_gate_once_and_an_exception_by_its_own_price(op: int, dearer: int) -> None:
    cycles = {}
    for price in (-1, s.PRICE + o.INT, s.P_EXCEPTION):
        bench = native()
        for vector in (6, 0x80):
            handled(bench, vector)
        if price >= 0:
            bench.m[price] += 1000
        bench.run(lambda a: a.op(op, imm=0x80))
        cycles[price] = int(bench.m[s.CYCLE])

    more = {price: each - cycles[-1] for price, each in cycles.items() if price >= 0}
    assert more == {s.PRICE + o.INT: 0, s.P_EXCEPTION: 0} | {dearer: 1000}


def test_a_page_fault_while_a_page_fault_is_delivered_is_a_double_fault() -> None:
    bench = native()
    handled(bench, 8, ist=0)
    bench.space.gate(14, HANDLER, ist=2)  # a stack pointer of zero
    bench.run(lambda a: a.st_value(o_mem(0x500000), 1))

    assert ended(bench) == 8
    assert frame(bench, error=True)["error"] == 0
    assert frame(bench, error=True)["RIP"] == TEXT


def test_a_page_fault_while_another_exception_is_delivered_is_a_page_fault() -> None:
    bench = native()
    handled(bench, 14)
    bench.space.gate(6, HANDLER, ist=2)
    bench.run(lambda a: a.op(o.UD))

    assert ended(bench) == 14
    assert int(bench.m[s.CR2]) & 0xFFFF_FFFF_FFFF_F000 == 0xFFFF_FFFF_FFFF_F000 or int(bench.m[s.CR2]) == -8


def test_two_contributory_exceptions_are_a_double_fault() -> None:
    """#GP whose gate is not present: delivering it is contributory too."""
    bench = native()
    handled(bench, 8)
    bench.run(lambda a: (a.mov(s.RCX, 0x7777), a.op(o.RDMSR))[0])

    assert ended(bench) == 8


def test_a_machine_without_handlers_shuts_down() -> None:
    bench = native()

    assert bench.run(lambda a: a.op(o.UD)) == TRIPLE_FAULTED


@pytest.mark.parametrize(
    "op",
    [o.HLT, o.MOV_TO_CR, o.RDMSR, o.INVLPG, o.LGDT, o.CLI, o.IN, o.SWAPGS, o.LTR, o.CLTS, o.SYSRET, o.WBINVD],
)
def test_a_privileged_op_in_ring_3_is_a_general_protection_fault(op: int) -> None:
    bench = native()
    handled(bench, 13)
    bench.run(lambda a: a.emit(op, s.RAX, mem=o_mem(DATA, 1), imm=3), 3)

    assert ended(bench) == 13
    assert frame(bench, error=True)["error"] == 0


def test_port_ops_and_cli_are_allowed_in_ring_3_by_iopl() -> None:
    bench = native()
    bench.space.code(
        lambda a: (a.op(o.CLI), a.emit(o.IN, imm=0x60, mem=Mem(size=1)), a.op(o.STOP_OP, imm=1))[0], USER_TEXT
    )
    bench.start(USER_TEXT, 3)
    bench.m[s.RFLAGS] = 0x3202

    assert bench.engine.run(ops=20) == PROGRAM_END
    assert int(bench.m[s.RFLAGS]) & 0x200 == 0


# --- ring changes ---------------------------------------------------------------------------------------------------


def test_iret_returns_to_ring_3_with_what_was_pushed() -> None:
    bench = native()
    bench.space.code(stops_with(3), USER_TEXT)

    def write(a: Assembler) -> None:
        for value in (SS3, USER_STACK - 128, 0x3202, CS3, USER_TEXT):
            a.push(value=value)
        a.op(o.IRET)

    bench.run(write)

    assert ended(bench) == 3
    assert (int(bench.m[s.PRIVILEGE]), bench.reg(s.RSP), int(bench.m[s.RFLAGS])) == (
        o.R3,
        USER_STACK - 128,
        0x3202,
    )
    assert int(bench.m[s.CS_SELECTOR]) == CS3


def test_iret_in_ring_3_cannot_reach_ring_0_nor_change_if() -> None:
    for cs, vector in ((CS0, 13), (CS3, 3)):
        bench = native()
        handled(bench, 13)

        def write(a: Assembler, cs: int = cs) -> None:
            for value in (SS3, USER_STACK - 128, 0x3202, cs):
                a.push(value=value)
            a.mov(s.RAX, "there")
            a.push(s.RAX)
            a.op(o.IRET)
            a.label("there")
            a.op(o.STOP_OP, imm=3)

        bench.run(write, 3)

        assert ended(bench) == vector
        assert int(bench.m[s.RFLAGS]) & 0x3200 == 0


def test_syscall_and_sysret_follow_star_lstar_and_fmask() -> None:
    bench = native()
    bench.m[s.MSR_STAR], bench.m[s.MSR_LSTAR], bench.m[s.MSR_FMASK] = 0x0023_0010 << 32, HANDLER, 0x40

    def entry(a: Assembler) -> None:
        a.copy(s.RBX, s.RCX)
        a.copy(s.RBP, s.R11)
        a.op(o.PUSHF)
        a.pop(s.RSI)
        a.op(o.SYSRET)

    def write(a: Assembler) -> None:
        a.mov(s.RAX, 0)
        a.cmp(s.RAX, 0)
        a.op(o.SYSCALL)
        a.op(o.STOP_OP, imm=3)

    bench.space.code(entry, HANDLER)
    bench.run(write, 3)

    assert ended(bench) == 3
    assert [bench.reg(r) for r in (s.RBX, s.RBP, s.RSI)] == [USER_TEXT + 5 + 4 + 2, 0x42, 2]
    assert (int(bench.m[s.PRIVILEGE]), int(bench.m[s.CS_SELECTOR]), int(bench.m[s.SS_SELECTOR])) == (
        o.R3,
        0x33,
        0x2B,
    )
    assert int(bench.m[s.RFLAGS]) == 0x42


@pytest.mark.parametrize(("op", "imm"), [(o.PUSHF, 0), (o.SGDT, 0), (o.SIDT, 0)])
def test_an_op_of_ring_3_reaches_memory_as_ring_3(op: int, imm: int) -> None:
    bench = native()
    handled(bench, 14)

    def write(a: Assembler) -> None:
        a.mov(s.RSP, TABLES + 0x100)
        a.emit(op, mem=o_mem(TABLES + 0x80), imm=imm)

    bench.run(write, 3)

    assert ended(bench) == 14
    assert frame(bench, error=True)["error"] == 7  # present, write, user


@pytest.mark.parametrize(("ring", "allowed"), [(0, True), (3, False)])
@pytest.mark.parametrize(("before", "popped"), [(0x202, 2), (2, 0x202)])
def test_popf_changes_if_only_where_iopl_allows(ring: int, allowed: bool, before: int, popped: int) -> None:
    bench = native()
    text = USER_TEXT if ring else TEXT
    bench.space.code(lambda a: (a.push(value=popped), a.op(o.POPF), a.op(o.STOP_OP, imm=1))[0], text)
    bench.start(text, ring)
    bench.m[s.RFLAGS] = before
    bench.engine.run(ops=10)

    assert int(bench.m[s.RFLAGS]) & 0x200 == (popped if allowed else before) & 0x200


# --- interrupts -----------------------------------------------------------------------------------------------------


def arrive(bench: Native, *vectors: int) -> None:
    with jit.quiet():
        for vector in vectors:
            request(bench.m, bench.engine.arena, vector)


def test_sti_opens_after_the_next_op() -> None:
    bench = native()
    handled(bench, 0x50)
    bench.space.code(lambda a: (a.op(o.STI), a.op(o.NOP), a.op(o.NOP))[0], TEXT)
    bench.start()
    arrive(bench, 0x50)
    bench.engine.run(ops=10)

    assert ended(bench) == 0x50
    assert frame(bench, error=False)["RIP"] == TEXT + 2


@pytest.mark.parametrize("slices", [1, 2, 3])
def test_the_shadow_of_sti_survives_any_slicing(slices: int) -> None:
    bench = native()
    handled(bench, 0x50)
    bench.space.code(lambda a: (a.op(o.STI), a.op(o.NOP), a.op(o.NOP))[0], TEXT)
    bench.start()
    arrive(bench, 0x50)
    for _ in range(12):
        if bench.engine.run(ops=slices) == PROGRAM_END:
            break

    assert frame(bench, error=False)["RIP"] == TEXT + 2


def test_a_halted_cpu_wakes_behind_the_halt_after_the_wake_latency() -> None:
    bench = native()
    handled(bench, 0x50)
    bench.space.code(lambda a: (a.op(o.STI), a.op(o.HLT))[0], TEXT)
    bench.start()

    assert bench.engine.run(until=100_000) == HORIZON
    assert int(bench.m[s.CYCLE]) == 100_000
    arrive(bench, 0x50)
    bench.engine.run(until=200_000)
    assert ended(bench) == 0x50
    assert frame(bench, error=False)["RIP"] == TEXT + 2
    assert int(bench.m[s.CYCLE]) >= 100_000 + bench.engine.profile.cycles(bench.engine.profile.latency.wake_ns)


def test_interrupts_are_taken_by_class_and_eoi_opens_the_next() -> None:
    """0x31 and 0x35 share a class, 0x55 is above: 0x55 first, then 0x35, then 0x31, each after an EOI."""
    bench = native()
    for vector in (0x31, 0x35, 0x55):
        bench.space.gate(vector, HANDLER + 0x100 * (vector - 0x30))

        def handler(a: Assembler, vector: int = vector) -> None:
            a.shl(s.RBX, 8)
            a.or_(s.RBX, vector)
            a.mov(s.RCX, 0x80B)
            a.op(o.STI)  # a lower or equal class stays out until the EOI
            a.op(o.NOP)
            a.op(o.NOP)
            a.shl(s.RBX, 8)
            a.op(o.WRMSR)
            a.op(o.IRET)

        bench.space.code(handler, HANDLER + 0x100 * (vector - 0x30))
    bench.space.code(lambda a: (a.mov(s.RBX, 0), a.op(o.STI), a.op(o.NOP), a.work(4), a.op(o.STOP_OP, imm=1))[0], TEXT)
    bench.start()
    arrive(bench, 0x31, 0x55, 0x35)
    bench.engine.run(ops=100)

    assert ended(bench) == 1
    assert bench.reg(s.RBX) == 0x5500_3500_3100
    assert [int(bench.m[s.APIC_ISR + n]) for n in range(4)] == [0] * 4


@pytest.mark.parametrize(("tpr", "taken"), [(0x40, True), (0x4F, True), (0x50, False), (0xF0, False)])
def test_the_task_priority_holds_back_its_class_and_below(tpr: int, taken: bool) -> None:
    bench = native()
    handled(bench, 0x55)

    def write(a: Assembler) -> None:
        a.mov(s.RCX, 0x808)
        a.mov(s.RAX, tpr)
        a.mov(s.RDX, 0)
        a.op(o.WRMSR)
        a.op(o.MOV_FROM_CR, s.RBX, imm=8)
        a.mov(s.RCX, 0x83F)  # self IPI
        a.mov(s.RAX, 0x55)
        a.op(o.WRMSR)
        a.op(o.STI)
        a.op(o.NOP)
        a.op(o.STOP_OP, imm=1)

    bench.run(write)

    assert ended(bench) == (0x55 if taken else 1)
    assert bench.reg(s.RBX) == tpr >> 4


def timer(a: Assembler, mode: int, vector: int = 0x55) -> None:
    for index, value in ((0x83E, 0xB), (0x832, vector | mode << 17)):
        a.mov(s.RCX, index)
        a.mov(s.RAX, value)
        a.mov(s.RDX, 0)
        a.op(o.WRMSR)


@pytest.mark.parametrize(("mode", "times"), [(0, 1), (1, 4)])
def test_the_timer_fires_once_or_periodically(mode: int, times: int) -> None:
    bench = native()
    bench.space.gate(0x55, HANDLER)
    bench.space.code(lambda a: (a.add(s.RBX, 1), a.mov(s.RCX, 0x80B), a.op(o.WRMSR), a.op(o.IRET))[0], HANDLER)

    def write(a: Assembler) -> None:
        a.mov(s.RBX, 0)
        timer(a, mode)
        a.mov(s.RCX, 0x838)
        a.mov(s.RAX, 20_000)
        a.op(o.WRMSR)
        a.op(o.STI)
        a.label("idle")
        a.op(o.HLT)
        a.jmp("idle")

    bench.space.code(write)
    bench.start()
    bench.engine.run(until=95_000)

    assert bench.reg(s.RBX) == times


@pytest.mark.parametrize(("mode", "fires"), [(0, False), (1, False), (2, True)])
def test_a_deadline_counts_only_in_deadline_mode(mode: int, fires: bool) -> None:
    """SDM, "TSC-Deadline Mode": in other modes the write is ignored and the register reads zero."""
    bench = native()
    handled(bench, 0x55)

    def write(a: Assembler) -> None:
        timer(a, mode)
        a.mov(s.RCX, 0x6E0)
        a.mov(s.RAX, 40_000)
        a.op(o.WRMSR)
        a.op(o.RDMSR)
        a.copy(s.RBX, s.RAX)
        a.op(o.STI)
        a.op(o.HLT)

    bench.space.code(write)
    bench.start()
    stop = bench.engine.run(until=80_000)

    assert (stop, bench.reg(s.RBX)) == ((PROGRAM_END, 40_000) if fires else (HORIZON, 0))
    if fires:
        assert 40_000 <= int(bench.m[s.CYCLE]) < 80_000


def test_leaving_deadline_mode_disarms_the_timer() -> None:
    bench = native()
    handled(bench, 0x55)

    def write(a: Assembler) -> None:
        timer(a, 2)
        a.mov(s.RCX, 0x6E0)
        a.mov(s.RAX, 40_000)
        a.op(o.WRMSR)
        timer(a, 0)
        a.op(o.STI)
        a.op(o.HLT)

    bench.space.code(write)
    bench.start()

    assert bench.engine.run(until=80_000) == HORIZON


def test_a_store_through_a_new_mapping_is_fetched_from_it() -> None:
    """After MOV CR3 the next op comes from the new mapping of the same page."""
    bench = native()
    space = bench.space
    other = Native(bench.engine)
    other.space.code(lambda a: (a.emit(o.NOP, length=8), a.op(o.STOP_OP, imm=2))[0], TEXT)

    def write(a: Assembler) -> None:
        a.mov(s.RAX, other.space.table.root << 12)
        a.op(o.MOV_TO_CR, s.RAX, imm=3)
        a.op(o.STOP_OP, imm=1)

    space.code(write)
    bench.start()
    bench.engine.run(ops=10)

    assert ended(bench) == 2
