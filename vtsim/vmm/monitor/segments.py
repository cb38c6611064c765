"""Descriptors and segment registers of a virtual CPU: found, checked and loaded by programs that emulators call.

The monitor of deprivileged kernels and software CPUs emit the same programs; they differ in how the guest's memory is
reached (`Ways`). R8 is a selector or the number of a segment register, R10 a descriptor, R9 whether there is one.

SDM: "Loading Segment Registers"; "JMP—Jump"; "CALL—Call Procedure".
Not modelled: under a monitor and on a software CPU, call gates, far returns to an outer ring, the shadow of a load of
SS, code that is not 64-bit code, segment registers that processes load without the monitor.
"""

from __future__ import annotations

from collections.abc import Callable

from attrs import frozen

from vtsim.cpu import ops
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.kernels import hooks
from vtsim.cpu.kernels.modes import CS, FS, GS, SS
from vtsim.cpu.slots import R8, R9, R10, R15, RAX, RCX, RDX, RSI
from vtsim.vmm.monitor.crossing import RING_3
from vtsim.vmm.monitor.layout import F_CS, F_SS, V, vcpu

# fmt: off
REGISTER, TARGET, SELECTOR = (vcpu("SCRATCH", word) for word in (3, 4, 5))  # number of a register or segment, …
NULL, INDEX, LOCAL = 0xFFFC, 0xFFF8, 4                 # of a selector
NOT_PRESENT, STACK_FAULT, GENERAL_PROTECTION = 11, 12, 13
ORDINARY, PRESENT, CALL_GATE = 0x10, 0x80, 12
READABLE, CODE, CONFORMING = 2, 8, 4
# fmt: on
Emit = Callable[[Assembler], None]


@frozen(kw_only=True)
class Ways:
    """How a program reaches its guest.

    `load`, `store`: RAX <- memory at RSI, memory at RSI <- R8; RAX, RCX and RDX change. `table`: `load` as the
    processor reads tables. `base`: the base of segment register RCX (FS or GS) <- RAX. `zero_flag`: ZF <- R9. `go`: the
    guest goes on at RAX. `refuse`: vector R9 with error code R10. `undefined`: a label.
    """

    load: Emit
    store: Emit
    table: Emit
    base: Emit
    zero_flag: Emit
    go: Emit
    refuse: Emit
    undefined: str


def show(a: Assembler, op: int) -> None:
    """The guest sees RAX, which `op` reads of R8. RCX and RDX change."""
    a.copy(RCX, R8)
    a.mov(RDX, op)
    a.hook(hooks.SHOW)


def ring(a: Assembler, to: int) -> None:
    """`to` <- the ring that the guest believes in."""
    a.ld(to, vcpu("KERNEL"))
    a.emit(ops.XOR, to, imm=1)
    a.lea(to, Mem(to, index=to, scale=2))


def field(a: Assembler, to: int, source: int, shift: int, mask: int) -> None:
    """`to` <- bits of a register."""
    a.copy(to, source)
    a.shr(to, shift)
    a.and_(to, mask)


def unless(a: Assembler, condition: int, register: int, value: int, otherwise: str) -> None:
    """To a label if a comparison holds."""
    a.cmp(register, value)
    a.jcc(condition, otherwise)


# --- subroutines -----------------------------------------------------------------------------------------------------
def subroutines(a: Assembler, ways: Ways) -> None:
    """What the emulators call; `protect` and others: the exception with the selector R8 as its error code."""
    for name, vector in (("protect", GENERAL_PROTECTION), ("absent", NOT_PRESENT), ("no_stack_there", STACK_FAULT)):
        a.label(f"segment_{name}")
        a.mov(R9, vector)
        field(a, R10, R8, 0, NULL)
        a.jmp("segment_refused")
    a.label("segment_refused")
    ways.refuse(a)
    _find(a, ways)
    _selector(a)
    _load(a, ways)
    _code(a)


def _find(a: Assembler, ways: Ways) -> None:
    """`find_descriptor`: R10 <- the descriptor that R8 selects, R9 <- 1; R9 <- 0 beyond the table."""
    a.label("find_descriptor")
    a.mov(R9, 0)
    field(a, RSI, R8, 0, INDEX)
    a.ld(RAX, vcpu("GDTR"))
    a.ld(RCX, vcpu("GDTR", 1))
    a.test(R8, LOCAL)
    a.jcc(ops.CC_Z, "find_in_table")
    a.ld(RAX, vcpu("LDT"))
    a.ld(RCX, vcpu("LDT", 1))
    a.label("find_in_table")
    a.lea(RDX, Mem(RSI, 7))
    a.cmp(RDX, register=RAX)
    a.jcc(ops.CC_G, "find_none")
    a.add(RSI, register=RCX)
    ways.table(a)
    a.copy(R10, RAX)
    a.mov(R9, 1)
    a.label("find_none")
    a.ret()


def _selector(a: Assembler) -> None:
    """`segment_selector`: RAX <- selector in segment register R8."""
    a.label("segment_selector")
    for number, mine, process in ((CS, "CS", F_CS), (SS, "SS", F_SS)):
        unless(a, ops.CC_NZ, R8, number, f"selector_not_{mine}")
        a.ld(RAX, process)
        a.ld(RCX, vcpu("KERNEL"))
        a.test(RCX, register=RCX)
        a.jcc(ops.CC_Z, "selector_there")
        a.ld(RAX, vcpu(mine))
        a.ret()
        a.label(f"selector_not_{mine}")
    a.ld(RAX, Mem(R15, V["SEGMENTS"], index=R8, scale=8))
    a.label("selector_there")
    a.ret()


def _load(a: Assembler, ways: Ways) -> None:
    """`load_segment`: the segment register whose number is REGISTER takes selector R8."""
    a.label("load_segment")
    a.and_(R8, 0xFFFF)
    a.ld(RDX, REGISTER)
    unless(a, ops.CC_Z, RDX, CS, ways.undefined)
    unless(a, ops.CC_A, RDX, GS, ways.undefined)
    a.test(R8, NULL)
    a.jcc(ops.CC_NZ, "load_described")
    unless(a, ops.CC_NZ, RDX, SS, "load_take")
    a.ld(RAX, vcpu("KERNEL"))
    unless(a, ops.CC_Z, RAX, 0, "segment_protect")
    a.test(R8, RING_3)
    a.jcc(ops.CC_NZ, "segment_protect")
    a.jmp("load_take")
    a.label("load_described")
    a.call("find_descriptor")
    unless(a, ops.CC_Z, R9, 0, "segment_protect")
    field(a, RDX, R10, 40, 0xFF)
    a.test(RDX, ORDINARY)
    a.jcc(ops.CC_Z, "segment_protect")
    ring(a, RAX)
    a.ld(RCX, REGISTER)
    unless(a, ops.CC_NZ, RCX, SS, "load_data")
    for shift, source in ((0, R8), (5, RDX)):  # RPL and DPL are the ring
        field(a, RCX, source, shift, RING_3)
        a.cmp(RCX, register=RAX)
        a.jcc(ops.CC_NZ, "segment_protect")
    field(a, RCX, RDX, 0, CODE | READABLE)
    unless(a, ops.CC_NZ, RCX, READABLE, "segment_protect")
    a.test(RDX, PRESENT)
    a.jcc(ops.CC_Z, "segment_no_stack_there")
    a.jmp("load_take")
    a.label("load_data")
    field(a, RCX, RDX, 0, CODE | READABLE)
    unless(a, ops.CC_Z, RCX, CODE, "segment_protect")
    field(a, RCX, RDX, 0, CODE | CONFORMING)
    unless(a, ops.CC_Z, RCX, CODE | CONFORMING, "load_allowed")
    field(a, RCX, RDX, 5, RING_3)
    a.cmp(RAX, register=RCX)
    a.jcc(ops.CC_A, "segment_protect")
    field(a, RAX, R8, 0, RING_3)
    a.cmp(RAX, register=RCX)
    a.jcc(ops.CC_A, "segment_protect")
    a.label("load_allowed")
    a.test(RDX, PRESENT)
    a.jcc(ops.CC_Z, "segment_absent")
    a.ld(RCX, REGISTER)
    unless(a, ops.CC_B, RCX, FS, "load_take")
    descriptor_base(a)
    ways.base(a)
    a.label("load_take")
    a.ld(RDX, REGISTER)
    unless(a, ops.CC_Z, RDX, SS, "load_stack")
    a.st(Mem(R15, V["SEGMENTS"], index=RDX, scale=8), R8)
    a.ret()
    a.label("load_stack")
    a.ld(RAX, vcpu("KERNEL"))
    unless(a, ops.CC_Z, RAX, 0, "load_stack_of_process")
    a.st(vcpu("SS"), R8)
    a.ret()
    a.label("load_stack_of_process")
    a.st(F_SS, R8)
    a.ret()


def _code(a: Assembler) -> None:
    """`find_code`: R8 selects code that a far transfer of the guest's ring may go to, or is refused.

    `take_code`: CS <- R8, with the ring as its RPL.
    """
    a.label("find_code")
    a.and_(R8, 0xFFFF)
    a.test(R8, NULL)
    a.jcc(ops.CC_Z, "segment_protect")
    a.call("find_descriptor")
    unless(a, ops.CC_Z, R9, 0, "segment_protect")
    field(a, RDX, R10, 40, 0x1F)
    unless(a, ops.CC_Z, RDX, CALL_GATE, "far_illegal")
    field(a, RCX, RDX, 0, ORDINARY | CODE)
    unless(a, ops.CC_NZ, RCX, ORDINARY | CODE, "segment_protect")
    ring(a, RAX)
    field(a, RCX, R10, 45, RING_3)
    a.test(RDX, CONFORMING)
    a.jcc(ops.CC_Z, "code_of_a_ring")
    a.cmp(RCX, register=RAX)
    a.jcc(ops.CC_A, "segment_protect")
    a.jmp("code_allowed")
    a.label("code_of_a_ring")
    a.cmp(RCX, register=RAX)
    a.jcc(ops.CC_NZ, "segment_protect")
    field(a, RCX, R8, 0, RING_3)
    a.cmp(RCX, register=RAX)
    a.jcc(ops.CC_A, "segment_protect")
    a.label("code_allowed")
    field(a, RDX, R10, 53, 3)  # L and D
    unless(a, ops.CC_Z, RDX, 3, "segment_protect")
    field(a, RCX, R10, 47, 1)
    unless(a, ops.CC_Z, RCX, 0, "segment_absent")
    unless(a, ops.CC_NZ, RDX, 1, "far_illegal")
    a.ret()
    a.label("far_illegal")
    a.mov(RAX, ops.JMP_FAR)
    a.jmp("illegal")
    a.label("take_code")
    ring(a, RAX)
    a.and_(R8, NULL)
    a.or_(R8, register=RAX)
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_NZ, "take_code_of_process")
    a.st(vcpu("CS"), R8)
    a.ret()
    a.label("take_code_of_process")
    a.st(F_CS, R8)
    a.ret()


def descriptor_base(a: Assembler) -> None:
    """RAX <- the base in descriptor R10. Clobbers RDX."""
    field(a, RAX, R10, 16, 0xFFFFFF)
    field(a, RDX, R10, 56, 0xFF)
    a.shl(RDX, 24)
    a.or_(RAX, register=RDX)


def descriptor_limit(a: Assembler, name: str) -> None:
    """RAX <- the limit in descriptor R10, in bytes. Clobbers RCX."""
    field(a, RAX, R10, 0, 0xFFFF)
    field(a, RCX, R10, 48, 0xF)
    a.shl(RCX, 16)
    a.or_(RAX, register=RCX)
    field(a, RCX, R10, 55, 1)
    unless(a, ops.CC_Z, RCX, 0, name)
    a.shl(RAX, 12)
    a.or_(RAX, 0xFFF)
    a.label(name)
