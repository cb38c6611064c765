"""What exits, what does not, and what is recorded: each control bit on and off.

SDM: "Exception Bitmap"; "I/O-Bitmap Addresses"; "Guest/Host Masks and Read Shadows for CR0 and CR4".
SDM: "XSS-Exiting Bitmap"; "CR3-Target Controls"; "Instructions That Cause VM Exits Unconditionally".
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.cpu.bench import DATA, END, TEXT, exits, o_mem, virtual
from vtsim.base import memory as mem
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.exit_rules import ALWAYS, PRIMARY, RULES, SPECIAL
from vtsim.vmcs import bits as b
from vtsim.vmcs import reasons as x


def sensitive(op: int) -> Callable[[Assembler], None]:
    def write(a: Assembler) -> None:
        a.mov(s.RBX, 0)
        a.emit(op, s.RBX, mem=o_mem(DATA), imm=7 if op in (o.MOV_TO_DR, o.MOV_FROM_DR) else 0, length=3)

    return write


BY_ONE_BIT = [rule for rule in RULES if rule[1] != SPECIAL and rule[0] < o.MOVE]


@pytest.mark.parametrize(("op", "where", "bit", "reason"), BY_ONE_BIT, ids=[o.OPS[rule[0]].name for rule in BY_ONE_BIT])
def test_a_control_bit_decides_whether_an_op_exits(op: int, where: int, bit: int, reason: int) -> None:
    outcomes = []
    for on in (False, True):
        bench = virtual()
        field = "PRIMARY_PROC_CONTROLS" if where == PRIMARY else "SECONDARY_PROC_CONTROLS"
        bench.set(**{field: bench.field(field) & ~bit | (bit if on else 0)})
        if op in (o.HLT, o.MWAIT) and not on:
            bench.set(PIN_CONTROLS=b.ACTIVATE_PREEMPTION_TIMER, PREEMPTION_TIMER_VALUE=10_000)
        outcomes.append(exits(bench, sensitive(op)))

    without = reason if where == ALWAYS else x.PREEMPTION_TIMER if op in (o.HLT, o.MWAIT) else None
    assert outcomes == [without, reason]


@pytest.mark.parametrize("on", [False, True])
def test_pause_exits_by_its_control(on: bool) -> None:
    bench = virtual()
    bench.set(PRIMARY_PROC_CONTROLS=bench.field("PRIMARY_PROC_CONTROLS") | (b.PAUSE_EXITING if on else 0))

    assert exits(bench, sensitive(o.PAUSE)) == (x.PAUSE_INSTRUCTION if on else None)


@pytest.mark.parametrize(("op", "reason"), [(o.XSAVES, x.XSAVES), (o.XRSTORS, x.XRSTORS)])
@pytest.mark.parametrize(
    ("asked", "xss", "bitmap", "leaves"),
    [(0x100, 0x100, 0x100, True), (0x100, 0x100, 0, False), (0x100, 0, 0x100, False), (0, 0x100, 0x100, False)],
)
def test_xsaves_exits_for_a_component_that_is_asked_for_enabled_and_in_the_bitmap(
    op: int, reason: int, asked: int, xss: int, bitmap: int, leaves: bool
) -> None:
    bench = virtual()
    bench.set(
        SECONDARY_PROC_CONTROLS=bench.field("SECONDARY_PROC_CONTROLS") | b.ENABLE_XSAVES_XRSTORS,
        XSS_EXITING_BITMAP=bitmap,
    )
    bench.m[s.MSR_XSS] = xss

    def write(a: Assembler) -> None:
        a.mov(s.RAX, asked)
        a.mov(s.RDX, 0)
        sensitive(op)(a)

    assert exits(bench, write) == (reason if leaves else None)


def test_secondary_controls_count_only_when_they_are_activated() -> None:
    bench = virtual()
    bench.set(SECONDARY_PROC_CONTROLS=bench.field("SECONDARY_PROC_CONTROLS") | b.RDRAND_EXITING)
    assert exits(bench, sensitive(o.RDRAND)) == x.RDRAND


def test_an_exit_records_where_and_how_long_the_instruction_was_and_takes_it_back() -> None:
    bench = virtual()

    def write(a: Assembler) -> None:
        a.mov(s.RAX, 1)
        a.op(o.CPUID)

    assert exits(bench, write) == x.CPUID
    assert (bench.field("GUEST_RIP"), bench.field("EXIT_INSTRUCTION_LENGTH")) == (TEXT + 5, 2)
    assert bench.field("EXIT_QUALIFICATION") == 0
    assert bench.reg(s.RAX) == 1


# --- control registers ----------------------------------------------------------------------------------------------


def move(number: int, value: int) -> Callable[[Assembler], None]:
    def write(a: Assembler) -> None:
        a.mov(s.R9, value)
        a.op(o.MOV_TO_CR, s.R9, imm=number)

    return write


CR4 = 0x20A0


@pytest.mark.parametrize("bit", [0, 5, 7, 9, 13, 17, 20])
@pytest.mark.parametrize(
    ("masked", "shadow", "written", "exit"),
    [(0, 0, 1, 0), (1, 0, 1, 1), (1, 1, 1, 0), (1, 1, 0, 1), (1, 0, 0, 0)],
)
def test_a_write_of_cr4_exits_when_an_owned_bit_differs_from_its_shadow(
    bit: int, masked: int, shadow: int, written: int, exit: int
) -> None:
    bench = virtual()
    bench.set(CR4_GUEST_HOST_MASK=masked << bit, CR4_READ_SHADOW=shadow << bit)
    value = CR4 & ~(1 << bit) | written << bit if bit != 5 else CR4 & ~(1 << 5) | written << 5
    got = exits(bench, move(4, value))

    assert got == (x.CR_ACCESS if exit else None)
    if exit:
        assert bench.field("EXIT_QUALIFICATION") == 4 | 0 << 4 | s.R9 << 8
    elif masked:
        assert int(bench.m[s.CR4]) & 1 << bit == CR4 & 1 << bit  # the host's bit stays


def test_reads_of_cr0_and_cr4_see_the_shadow_where_the_host_owns_bits() -> None:
    bench = virtual()
    bench.set(CR0_GUEST_HOST_MASK=0xF, CR0_READ_SHADOW=0x6, CR4_GUEST_HOST_MASK=0xFF, CR4_READ_SHADOW=0x1234)

    def write(a: Assembler) -> None:
        a.op(o.MOV_FROM_CR, s.RBX, imm=0)
        a.op(o.MOV_FROM_CR, s.RBP, imm=4)
        a.op(o.SMSW, s.RSI)

    assert exits(bench, write) is None
    assert [bench.reg(r) for r in (s.RBX, s.RBP, s.RSI)] == [0x80050036, 0x2034, 0x80050036]


@pytest.mark.parametrize(
    ("mask", "shadow", "value", "exit"),
    [
        (0, 0, 8, 0),
        (8, 8, 8, 0),
        (8, 0, 8, 1),
        (1, 0, 1, 1),
        (1, 0, 0, 0),
        (1, 1, 1, 0),
        (14, 2, 2, 0),
        (14, 2, 6, 1),
    ],
)
def test_lmsw_exits_on_owned_bits_and_never_for_clearing_pe(mask: int, shadow: int, value: int, exit: int) -> None:
    bench = virtual()
    bench.set(CR0_GUEST_HOST_MASK=mask, CR0_READ_SHADOW=shadow)

    def write(a: Assembler) -> None:
        a.mov(s.R9, value)
        a.op(o.LMSW, s.R9)

    assert exits(bench, write) == (x.CR_ACCESS if exit else None)
    if exit:
        assert bench.field("EXIT_QUALIFICATION") == 3 << 4 | value << 16


@pytest.mark.parametrize(("mask", "shadow", "exit", "ts"), [(0, 0, 0, 0), (8, 8, 1, 1), (8, 0, 0, 1)])
def test_clts_exits_clears_or_does_nothing(mask: int, shadow: int, exit: int, ts: int) -> None:
    bench = virtual()
    bench.set(CR0_GUEST_HOST_MASK=mask, CR0_READ_SHADOW=shadow)

    def write(a: Assembler) -> None:
        a.op(o.CLTS)

    bench.guest.code(lambda a: (write(a), a.op(o.STOP_OP, imm=END))[0], TEXT)
    bench.host()
    bench.enter(TEXT)
    bench.set(GUEST_CR0=0x80050033 | 8)
    bench.engine.run(ops=50)

    assert (int(bench.m[s.STOP_A]) != END) == bool(exit)
    if exit:
        assert (bench.reason, bench.field("EXIT_QUALIFICATION")) == (x.CR_ACCESS, 2 << 4)
    else:
        assert int(bench.m[s.CR0]) >> 3 & 1 == ts


@pytest.mark.parametrize("listed", range(5))
def test_a_write_of_cr3_exits_unless_the_value_is_a_target(listed: int) -> None:
    """The value stands in target 2; the count of targets decides."""
    bench = virtual()
    root = bench.guest.table.root << 12
    bench.set(
        PRIMARY_PROC_CONTROLS=bench.field("PRIMARY_PROC_CONTROLS") | b.CR3_LOAD_EXITING,
        CR3_TARGET_COUNT=listed,
        CR3_TARGET_VALUE_2=root,
    )

    assert exits(bench, move(3, root)) == (x.CR_ACCESS if listed < 3 else None)


@pytest.mark.parametrize(
    ("bit", "op", "number", "qualification"),
    [
        (b.CR3_STORE_EXITING, o.MOV_FROM_CR, 3, 3 | 1 << 4 | s.RBX << 8),
        (b.CR8_LOAD_EXITING, o.MOV_TO_CR, 8, 8 | s.RBX << 8),
        (b.CR8_STORE_EXITING, o.MOV_FROM_CR, 8, 8 | 1 << 4 | s.RBX << 8),
    ],
)
def test_moves_of_cr3_and_cr8_exit_by_their_bits(bit: int, op: int, number: int, qualification: int) -> None:
    outcomes = []
    for on in (0, bit):
        bench = virtual()
        bench.set(PRIMARY_PROC_CONTROLS=bench.field("PRIMARY_PROC_CONTROLS") | on)
        outcomes.append(exits(bench, lambda a: (a.mov(s.RBX, 0), a.op(op, s.RBX, imm=number))[0]))

    assert outcomes == [None, x.CR_ACCESS]
    assert bench.field("EXIT_QUALIFICATION") == qualification


@pytest.mark.parametrize(("threshold", "exit"), [(0, False), (3, False), (4, True)])
def test_a_tpr_below_its_threshold_exits_after_the_move(threshold: int, exit: bool) -> None:
    bench = virtual()
    bench.set(PRIMARY_PROC_CONTROLS=bench.field("PRIMARY_PROC_CONTROLS") | b.USE_TPR_SHADOW, TPR_THRESHOLD=threshold)
    bench.engine.store(bench.field("VIRTUAL_APIC_ADDRESS") + 0x80, 0x40)  # VM entry wants no VTPR below the threshold

    assert exits(bench, move(8, 3)) == (x.TPR_BELOW_THRESHOLD if exit else None)
    assert bench.engine.load(bench.field("VIRTUAL_APIC_ADDRESS") + 0x80) == 0x30
    if exit:
        assert bench.field("GUEST_RIP") == TEXT + 5 + 3


# --- bitmaps --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [False, True], ids=["RDMSR", "WRMSR"])
@pytest.mark.parametrize(
    ("index", "byte"),
    [(0x1B, 0), (0x10, 0), (0x1FFF, 0), (0xC0000081, 1024), (0xC0000103, 1024), (0xC0001FFF, 1024)],
)
def test_an_msr_exits_by_its_own_bit_of_the_bitmap(index: int, byte: int, write: bool) -> None:
    """SDM, "MSR-Bitmap Address": read low, read high, write low, write high, 1 KiB each."""
    bit = 8 * (byte + (2048 if write else 0)) + (index & 0x1FFF)
    for n, (neighbour, hit) in enumerate(
        [(bit - 1, False), (bit, True), (bit + 1, False), (bit ^ 8 * 2048, False), (bit ^ 8 * 1024, False)]
    ):
        if not 0 <= neighbour < 32768:
            continue
        bench = virtual()
        words = bench.engine.contents(bench.field("MSR_BITMAPS") >> 12, mem.BITMAP)
        words[neighbour >> 6] = (1 << (neighbour & 63)) - ((1 << 64) if neighbour & 63 == 63 else 0)

        def program(a: Assembler) -> None:
            a.mov(s.RCX, index)
            a.mov(s.RAX, 0)
            a.mov(s.RDX, 0)
            a.op(o.WRMSR if write else o.RDMSR)

        bench.set(EXCEPTION_BITMAP=1 << 13)  # an MSR that does not exist faults instead
        got = exits(bench, program)
        assert (got == (x.MSR_WRITE if write else x.MSR_READ)) == hit, n


@pytest.mark.parametrize("index", [0x2000, 0xBFFFFFFF, 0xC0002000, 0xFFFFFFFF])
def test_an_msr_outside_the_bitmap_always_exits(index: int) -> None:
    assert exits(virtual(), lambda a: (a.mov(s.RCX, index), a.op(o.RDMSR))[0]) == x.MSR_READ


def test_without_the_bitmap_every_msr_exits() -> None:
    bench = virtual()
    bench.set(PRIMARY_PROC_CONTROLS=bench.field("PRIMARY_PROC_CONTROLS") & ~b.USE_MSR_BITMAPS)

    assert exits(bench, lambda a: (a.mov(s.RCX, 0x10), a.op(o.RDMSR))[0]) == x.MSR_READ


@pytest.mark.parametrize(
    ("port", "size", "bit", "exit"),
    [
        (0, 1, 0, True), (0, 1, 1, False), (0x7FFF, 1, 0x7FFF, True), (0x7FFF, 2, 0x8000, True), (0x7FFE, 1, 0x7FFF, False),
        (0x8000, 1, 0x8000, True), (0x8000, 1, 0, False), (0xFFFF, 1, 0xFFFF, True), (0xFFFF, 1, 0x7FFF, False),
        (0xFFFF, 2, 5, True), (0x60, 4, 0x63, True), (0x60, 4, 0x64, False), (0x60, 2, 0x62, False),
    ],
)  # fmt: skip
@pytest.mark.parametrize("op", [o.IN, o.OUT])
def test_a_port_exits_by_the_bits_of_all_its_bytes(port: int, size: int, bit: int, exit: bool, op: int) -> None:
    bench = virtual()
    bench.set(PRIMARY_PROC_CONTROLS=bench.field("PRIMARY_PROC_CONTROLS") | b.USE_IO_BITMAPS)
    words = bench.engine.contents(bench.field("IO_BITMAP_B" if bit >> 15 else "IO_BITMAP_A") >> 12, mem.BITMAP)
    at = bit & 0x7FFF
    words[at >> 6] = (1 << (at & 63)) - ((1 << 64) if at & 63 == 63 else 0)

    got = exits(bench, lambda a: (a.mov(s.RDX, port), a.emit(op, r2=s.RDX, mem=Mem(size=size)))[0])
    assert got == (x.IO_INSTRUCTION if exit else None)
    if exit:
        assert bench.field("EXIT_QUALIFICATION") == size - 1 | (8 if op == o.IN else 0) | port << 16


@pytest.mark.parametrize("on", [False, True])
def test_without_bitmaps_one_bit_decides_for_all_ports(on: bool) -> None:
    bench = virtual()
    bench.set(PRIMARY_PROC_CONTROLS=bench.field("PRIMARY_PROC_CONTROLS") | (b.UNCONDITIONAL_IO_EXITING if on else 0))

    assert exits(bench, lambda a: a.emit(o.IN, imm=0x71, mem=Mem(size=1))) == (x.IO_INSTRUCTION if on else None)
    if on:
        assert bench.field("EXIT_QUALIFICATION") == 8 | 64 | 0x71 << 16
