"""What interrupts the guest's program: exceptions and interrupts of the guest, flags that are made when asked for.

A result that sets flags leaves its operands and the address of what makes the flags from them again; most flags are
never asked for.

SDM: "64-Bit Mode Stack Frame"; "Interrupt Stack Table".
"""

from __future__ import annotations

from typing import Final

from vtsim.cpu import ops
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.slots import R8, R10, R11, R14, R15, RAX, RBX, RCX, RDX, RSI, RSP
from vtsim.vmm.monitor import layout as at
from vtsim.vmm.monitor.crossing import (
    APIC_ENABLED,
    GENERAL_PROTECTION,
    INVALID_OPCODE,
    VECTORS,
    X2APIC_SPURIOUS,
    die,
    ends,
    if_deliverable,
    show_exception,
    take_interrupt,
    through_gate,
    write_msr,
)
from vtsim.vmm.monitor.layout import F_CS, F_RIP, F_SS, V, saved, vcpu
from vtsim.vmm.monitor.memory import count

ARITHMETIC_FLAGS: Final = 0x8D5
ALWAYS_FLAGS: Final = at.RF_IF | 2  # the program itself runs with interrupts enabled
NO_ERROR: Final = -1


def boot(a: Assembler) -> None:
    """`boot`: the local APIC on, then the guest's first instruction. R15 is the vCPU."""
    a.activity = ops.BOOT
    a.label("boot")
    write_msr(a, X2APIC_SPURIOUS, APIC_ENABLED)
    a.mov(RAX, 2)
    a.call("take_flags")
    a.ld(RBX, F_RIP)
    a.mov(R14, 0)
    a.mov(R11, 0)
    a.call("use_ring")
    a.op(ops.STI)
    a.jmp("next")
    ends(a)


def interrupt(a: Assembler) -> None:
    """`timer`: the physical timer's interrupt, at any place of the program; the guest's waits then."""
    a.activity = ops.INJECTION
    a.label("timer")
    for register in (RAX, RCX, RDX):
        a.push(register)
    take_interrupt(a)
    for register in (RDX, RCX, RAX):
        a.pop(register)
    a.op(ops.IRET)
    for vector in range(VECTORS):  # the program itself never faults
        a.label(f"trap_{vector}")
    die(a, at.IN_MONITOR)


def deliver(a: Assembler) -> None:
    """`interrupt_waits`: deliver it if it may be. `inject`: deliver vector SCRATCH with error code SCRATCH+1, -1 none.

    `inject_exception`: the same, and the guest sees it. `undefined`, `reflect`: #UD, #GP(0) of the instruction at RBX.
    """
    a.activity = ops.INJECTION
    a.label("interrupt_waits")
    if_deliverable(a, "next_unchecked")
    a.ld(RAX, vcpu("PENDING"))
    a.st(vcpu("IN_SERVICE"), RAX)
    a.st(vcpu("SCRATCH"), RAX)
    a.st_value(vcpu("SCRATCH", 1), NO_ERROR)
    a.st_value(vcpu("PENDING"), 0)
    count(a, "INJECTED_INTERRUPTS")
    a.jmp("inject")
    a.label("undefined")
    a.st_value(vcpu("SCRATCH"), INVALID_OPCODE)
    a.st_value(vcpu("SCRATCH", 1), NO_ERROR)
    a.jmp("inject_exception")
    a.label("reflect")
    a.ld(RBX, F_RIP)
    a.label("general_protection")
    a.st_value(vcpu("SCRATCH"), GENERAL_PROTECTION)
    a.st_value(vcpu("SCRATCH", 1), 0)
    a.label("inject_exception")
    a.ld(R8, vcpu("SCRATCH"))
    a.ld(R10, vcpu("SCRATCH", 1))
    show_exception(a, R8, R10, "inject")
    a.label("inject")
    a.lea(RSP, Mem(R15, -64))
    a.st(F_RIP, RBX)
    count(a, "INJECTED")
    a.call("flags")
    a.st(vcpu("SCRATCH", 2), RAX)
    a.st_value(vcpu("DELIVERING"), 1)
    a.ld(RAX, vcpu("KERNEL"))
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_NZ, "inject_from_kernel")
    a.call("spill")
    a.st_value(vcpu("KERNEL"), 1)
    a.call("use_ring")
    a.ld(RSI, vcpu("TR_BASE"))
    a.add(RSI, 4)
    a.call("load")
    a.copy(R10, RAX)
    a.ld(RAX, F_CS)
    a.ld(R8, F_SS)
    a.st_value(vcpu("SS"), 0)
    a.jmp("inject_gate")
    a.label("inject_from_kernel")
    a.ld(R10, saved(RSP))
    a.ld(RAX, vcpu("CS"))
    a.ld(R8, vcpu("SS"))
    a.label("inject_gate")
    a.st(vcpu("SCRATCH", 3), RAX)
    a.ld(RSI, vcpu("SCRATCH"))
    a.shl(RSI, 4)
    a.ld(RAX, vcpu("IDTR"))
    a.cmp(RSI, register=RAX)
    a.jcc(ops.CC_A, "bad_gate")
    a.ld(RAX, vcpu("IDTR", 1))
    a.add(RSI, register=RAX)
    a.call("load")
    a.st(vcpu("SCRATCH", 4), RAX)
    a.add(RSI, 8)
    a.call("load")
    a.st(vcpu("SCRATCH", 5), RAX)
    a.ld(RAX, vcpu("SCRATCH", 4))
    a.copy(RDX, RAX)
    a.shr(RDX, 47)
    a.test(RDX, 1)
    a.jcc(ops.CC_Z, "bad_gate")
    a.shr(RAX, 32)
    a.and_(RAX, 7)
    a.jcc(ops.CC_Z, "inject_frame")
    a.ld(RSI, vcpu("TR_BASE"))
    a.lea(RSI, Mem(RSI, 28, index=RAX, scale=8))
    a.call("load")
    a.copy(R10, RAX)
    a.label("inject_frame")
    a.and_(R10, ~15)
    _push(a)
    for word in (saved(RSP), vcpu("SCRATCH", 2), vcpu("SCRATCH", 3), F_RIP):
        a.ld(R8, word)
        _push(a)
    a.ld(R8, vcpu("SCRATCH", 1))
    a.cmp(R8, NO_ERROR)
    a.jcc(ops.CC_Z, "inject_no_error")
    _push(a)
    a.label("inject_no_error")
    a.st(saved(RSP), R10)
    a.ld(RAX, vcpu("SCRATCH", 4))
    a.ld(RCX, vcpu("SCRATCH", 5))
    through_gate(a, RDX)
    a.st_value(vcpu("DELIVERING"), 0)
    a.shr(RAX, 40)
    a.test(RAX, 1)
    a.jcc(ops.CC_NZ, "next")
    a.st_value(vcpu("INTERRUPTS"), 0)
    a.jmp("next")
    a.label("bad_gate")
    die(a, at.BAD_GATE)


def _push(a: Assembler) -> None:
    """R8 on the stack at R10 that is being built."""
    a.sub(R10, 8)
    a.copy(RSI, R10)
    a.call("store")


def flags(a: Assembler) -> None:
    """`flags`: RAX <- RFLAGS of the guest. `take_flags`: they become RAX. `spill`: what is counted goes to memory.

    `flags_sub` and others make the processor's flags from RAX and RCX, and go on at RDX.
    """
    a.activity = ops.EXIT_HANDLER
    a.label("flags")
    ask(a, "flags_made")
    a.label("flags_made")
    a.op(ops.PUSHF)
    a.pop(RAX)
    a.and_(RAX, ARITHMETIC_FLAGS)
    a.or_(RAX, 2)
    a.ld(RCX, vcpu("INTERRUPTS"))
    a.shl(RCX, 9)
    a.or_(RAX, register=RCX)
    a.ret()
    for name, op in (("flags_add", ops.ADD), ("flags_sub", ops.CMP)):
        a.label(name)
        a.alu(op, RAX, register=RCX)
        a.emit(ops.JMP_REG, RDX)
    a.label("flags_result")
    a.test(RAX, register=RAX)
    a.emit(ops.JMP_REG, RDX)
    a.label("flags_as_they_are")
    a.push(RAX)
    a.op(ops.POPF)
    a.emit(ops.JMP_REG, RDX)
    a.label("take_flags")
    a.and_(RAX, ARITHMETIC_FLAGS)
    a.or_(RAX, ALWAYS_FLAGS)
    a.st(vcpu("FLAGS_LEFT"), RAX)
    a.mov(RAX, "flags_as_they_are")
    a.st(vcpu("FLAGS_HOW"), RAX)
    a.ret()
    a.label("spill")
    a.ld(RCX, vcpu("KERNEL"))
    a.ld(RAX, Mem(R15, V["EMULATED"], index=RCX, scale=8))
    a.add(RAX, register=R14)
    a.st(Mem(R15, V["EMULATED"], index=RCX, scale=8), RAX)
    a.ld(RAX, vcpu("LOOKUPS"))
    a.add(RAX, register=R11)
    a.st(vcpu("LOOKUPS"), RAX)
    a.mov(R14, 0)
    a.mov(R11, 0)
    a.ret()


def ask(a: Assembler, then: str) -> None:
    """Make the guest's flags the processor's, and go on at a label. Clobbers RAX, RCX, RDX and RSI."""
    a.ld(RAX, vcpu("FLAGS_LEFT"))
    a.ld(RCX, vcpu("FLAGS_RIGHT"))
    a.ld(RSI, vcpu("FLAGS_HOW"))
    a.mov(RDX, then)
    a.emit(ops.JMP_REG, RSI)
