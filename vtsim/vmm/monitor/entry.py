"""How the monitor is entered and left: exceptions, interrupts and system calls of the guest, and the way back to it.

SDM: "64-Bit Mode Stack Frame"; "Fast System Calls in 64-Bit Mode"; "Interrupt Stack Table".
Not modelled: the shadow of STI in a deprivileged guest, but before HLT; its interrupts beside the timer's; its task
priority, which blocks none.
"""

from __future__ import annotations

from vtsim.cpu import ops
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.slots import R8, R11, R12, R13, R15, RAX, RBX, RCX, RDI, RDX, RSI, RSP
from vtsim.vmm.monitor import layout as at
from vtsim.vmm.monitor import translate
from vtsim.vmm.monitor.layout import F_CS, F_ERROR, F_RFLAGS, F_RIP, F_RSP, F_SS, V, saved, vcpu
from vtsim.vmm.monitor.memory import ALL, PAGE_FAULT, count, die

WITH_ERROR = (8, 10, 11, 12, 13, 14, 17, 21)
GENERAL_PROTECTION = 13
X2APIC_EOI, X2APIC_SPURIOUS, X2APIC_SELF_IPI = 0x80B, 0x80F, 0x83F
RF_CLEARED = ~(1 << 8 | 1 << 14 | 1 << 16 | at.RF_IF)  # TF, NT, RF; IF stands elsewhere
LEAN = (RAX, RCX, RDX, RBX, RSI, RDI, R15)  # what a system call clobbers
FROM_USER = 3


def boot(a: Assembler) -> None:
    """`boot`: the local APIC on, then the guest's first instruction. R15 is the vCPU."""
    a.activity = ops.BOOT
    a.label("boot")
    a.mov(RCX, X2APIC_SPURIOUS)
    a.mov(RAX, 0x1FF)
    a.mov(RDX, 0)
    a.op(ops.WRMSR)
    a.call("view_find")
    a.jmp("resume")
    a.label("ended")
    a.mov(RAX, at.FINISHED)
    a.label("die")
    a.st(vcpu("DEATH"), RAX)
    a.op(ops.STOP_OP)


def resume(a: Assembler, translates: bool) -> None:
    """`skip`: step over the instruction that was emulated. `check`: deliver an interrupt that may be. `resume`."""
    a.activity = ops.REENTRY
    a.label("skip")
    a.ld(RAX, F_RIP)
    a.ld(RCX, vcpu("LENGTH"))
    a.add(RAX, register=RCX)
    a.st(F_RIP, RAX)
    a.label("emulated")
    a.ld(RCX, vcpu("KERNEL"))
    a.ld(RAX, Mem(R15, V["EMULATED"], index=RCX, scale=8))
    a.add(RAX, 1)
    a.st(Mem(R15, V["EMULATED"], index=RCX, scale=8), RAX)
    a.label("check")
    a.ld(R12, vcpu("PENDING"))
    a.test(R12, register=R12)
    a.jcc(ops.CC_NZ, "interrupt_waits")
    a.label("resume")
    a.activity = ops.REENTRY
    if translates:
        translate.to_translation(a)
    a.label("resume_there")
    a.ld(RAX, saved(RSP))
    a.st(F_RSP, RAX)
    a.lea(RSP, Mem(R15, -at.FRAME_BYTES))
    restore(a, at.FRAME_BYTES)
    a.op(ops.IRET)

    a.activity = ops.INJECTION
    a.label("interrupt_waits")
    a.ld(RAX, vcpu("INTERRUPTS"))
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_Z, "resume")
    a.ld(RAX, vcpu("IN_SERVICE"))
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_NZ, "resume")
    a.st(vcpu("IN_SERVICE"), R12)
    a.st_value(vcpu("PENDING"), 0)
    count(a, "INJECTED_INTERRUPTS")
    a.mov(R13, -1)
    a.jmp("inject")


def restore(a: Assembler, offset: int) -> None:
    """All registers of the guest but RSP, which leads to the vCPU's structure less `offset`."""
    first = offset + V["REGISTERS"]
    a.ldm(Mem(RSP, first), [r for r in ALL if r < RSP])
    a.ldm(Mem(RSP, first + 8 * (RSP + 1)), [r for r in ALL if r > RSP])


def inject(a: Assembler) -> None:
    """`inject`: deliver exception or interrupt R12 through the guest's IDT; R13 its error code, -1 none.

    The frame is built on the guest's stack with what the guest believes: its selectors, its interrupt flag.
    """
    a.activity = ops.INJECTION
    a.label("inject")
    a.st_value(vcpu("EMULATING"), 0)
    count(a, "INJECTED")
    a.ld(RAX, vcpu("KERNEL"))
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_NZ, "inject_from_kernel")
    a.st_value(vcpu("KERNEL"), 1)
    a.call("view")
    a.ld(RDI, vcpu("TR_BASE"))
    a.ld(RSI, Mem(RDI, 4))
    a.ld(RBX, F_CS)
    a.ld(R8, F_SS)
    a.st_value(vcpu("SS"), 0)
    a.jmp("inject_gate")
    a.label("inject_from_kernel")
    a.ld(RSI, saved(RSP))
    a.ld(RBX, vcpu("CS"))
    a.ld(R8, vcpu("SS"))
    a.label("inject_gate")
    a.copy(RDX, R12)
    a.shl(RDX, 4)
    a.ld(RAX, vcpu("IDTR"))
    a.cmp(RDX, register=RAX)
    a.jcc(ops.CC_A, "bad_gate")
    a.ld(RDI, vcpu("IDTR", 1))
    a.add(RDI, register=RDX)
    a.ld(RAX, Mem(RDI))
    a.ld(RCX, Mem(RDI, 8))
    a.copy(RDX, RAX)
    a.shr(RDX, 47)
    a.test(RDX, 1)
    a.jcc(ops.CC_Z, "bad_gate")
    a.copy(RDX, RAX)
    a.shr(RDX, 32)
    a.and_(RDX, 7)
    a.jcc(ops.CC_Z, "inject_frame")
    a.ld(RDI, vcpu("TR_BASE"))
    a.ld(RSI, Mem(RDI, 28, index=RDX, scale=8))
    a.label("inject_frame")
    a.and_(RSI, ~15)
    a.st(Mem(RSI, -8), R8)
    a.ld(RDX, saved(RSP))
    a.st(Mem(RSI, -16), RDX)
    a.ld(RDX, F_RFLAGS)
    believed_flags(a, RDX, RDI)
    a.st(Mem(RSI, -24), RDX)
    a.st(Mem(RSI, -32), RBX)
    a.ld(RBX, F_RIP)
    a.st(Mem(RSI, -40), RBX)
    a.sub(RSI, 40)
    a.cmp(R13, -1)
    a.jcc(ops.CC_Z, "inject_no_error")
    a.sub(RSI, 8)
    a.st(Mem(RSI), R13)
    a.label("inject_no_error")
    a.st(saved(RSP), RSI)
    a.and_(RDX, RF_CLEARED)
    a.or_(RDX, at.RF_IF)
    a.st(F_RFLAGS, RDX)
    a.copy(RBX, RAX)
    a.shr(RBX, 16)
    a.and_(RBX, 0xFFFC)
    a.st(vcpu("CS"), RBX)
    a.copy(RBX, RAX)
    a.and_(RBX, 0xFFFF)
    a.copy(RDX, RAX)
    a.shr(RDX, 48)
    a.shl(RDX, 16)
    a.or_(RBX, register=RDX)
    a.shl(RCX, 32)
    a.or_(RBX, register=RCX)
    a.st(F_RIP, RBX)
    a.shr(RAX, 40)
    a.test(RAX, 1)
    a.jcc(ops.CC_NZ, "resume")
    a.st_value(vcpu("INTERRUPTS"), 0)
    a.jmp("resume")
    a.label("bad_gate")
    die(a, at.BAD_GATE)


def believed_flags(a: Assembler, flags: int, other: int) -> None:
    """`flags` <- RFLAGS as the guest believes, from those that the processor had."""
    a.and_(flags, ~(at.RF_IF | at.IOPL))
    a.ld(other, vcpu("INTERRUPTS"))
    a.shl(other, 9)
    a.or_(flags, register=other)


def enter_flags(a: Assembler, flags: int, other: int) -> None:
    """Take over RFLAGS that the guest loads: its interrupt flag into the structure, the rest for the processor."""
    a.copy(other, flags)
    a.shr(other, 9)
    a.and_(other, 1)
    a.st(vcpu("INTERRUPTS"), other)
    a.and_(flags, ~at.IOPL)
    a.or_(flags, at.RF_IF | 2)


def exceptions(a: Assembler, translates: bool) -> None:
    """`trap_0` … `trap_31`: exceptions of the guest that are none of the monitor's business."""
    a.activity = ops.EXIT_DISPATCH
    for vector in range(32):
        if vector in (PAGE_FAULT, GENERAL_PROTECTION):
            continue
        a.label(f"trap_{vector}")
        if vector not in WITH_ERROR:
            a.push(value=-1)
        a.push(value=vector)
        a.jmp("exception")
    a.label("exception")
    a.stm(Mem(RSP, 56 + V["REGISTERS"]), ALL)
    a.lea(R15, Mem(RSP, 56))
    a.ld(RAX, F_RSP)
    a.st(saved(RSP), RAX)
    if translates:
        a.call("original")
    a.ld(R12, Mem(R15, -56))
    a.ld(R13, F_ERROR)
    a.jmp("inject")


def interrupt(a: Assembler, translates: bool) -> None:
    """`timer`: the interrupt of the physical timer, which is the guest's; in the guest, or while it is halted."""
    a.activity = ops.EXIT_DISPATCH
    a.label("timer")
    a.push(value=0)
    a.push(RAX)
    a.ld(RAX, Mem(RSP, 24))
    a.test(RAX, 3)
    a.pop(RAX)
    a.jcc(ops.CC_Z, "timer_while_halted")
    a.stm(Mem(RSP, 48 + V["REGISTERS"]), ALL)
    a.lea(R15, Mem(RSP, 48))
    a.ld(RAX, F_RSP)
    a.st(saved(RSP), RAX)
    if translates:
        a.call("original")
    take_interrupt(a)
    a.jmp("check")
    a.label("timer_while_halted")
    take_interrupt(a)
    a.add(RSP, 8)
    a.op(ops.IRET)


def take_interrupt(a: Assembler) -> None:
    """Acknowledge the physical interrupt; the guest's waits. Clobbers RAX, RCX, RDX."""
    a.mov(RCX, X2APIC_EOI)
    a.mov(RAX, 0)
    a.mov(RDX, 0)
    a.op(ops.WRMSR)
    a.ld(RAX, vcpu("TIMER_LVT"))
    a.and_(RAX, 0xFF)
    a.st(vcpu("PENDING"), RAX)


def system_call(a: Assembler, cpu: int, address: int, translates: bool) -> None:
    """`system_call_N`: SYSCALL in ring 3 of this CPU, whose vCPU is at `address`; on to the guest's entry in ring 3."""
    a.activity = ops.EXIT_DISPATCH
    a.label(f"system_call_{cpu}")
    a.st(Mem(displacement=address + V["REGISTERS"] + 8 * RSP), RSP)
    a.mov(RSP, address - 64)
    a.stm(Mem(RSP, 64 + V["SCRATCH"]), LEAN)
    a.lea(R15, Mem(RSP, 64))
    if translates:
        a.ld(RAX, vcpu("KERNEL"))
        a.test(RAX, register=RAX)
        a.jcc(ops.CC_NZ, "call_out")
    a.jmp("system_call")


def system_calls(a: Assembler, translates: bool) -> None:
    """The rest of a system call, the same on every CPU: RCX and R11 are as the guest expects them."""
    a.label("system_call")
    count(a, "SYSTEM_CALLS")
    a.st_value(vcpu("KERNEL"), 1)
    a.ld(RAX, vcpu("FMASK"))
    a.test(RAX, at.RF_IF)
    a.jcc(ops.CC_Z, "system_call_flags")
    a.st_value(vcpu("INTERRUPTS"), 0)
    a.label("system_call_flags")
    a.emit(ops.XOR, RAX, imm=-1)
    a.and_(RAX, register=R11)
    a.or_(RAX, at.RF_IF)
    a.st(F_RFLAGS, RAX)
    a.ld(RAX, vcpu("STAR"))
    a.shr(RAX, 32)
    a.and_(RAX, 0xFFFC)
    a.st(vcpu("CS"), RAX)
    a.add(RAX, 8)
    a.st(vcpu("SS"), RAX)
    a.ld(RAX, vcpu("LSTAR"))
    a.st(F_RIP, RAX)
    a.ld(RAX, saved(RSP))
    a.st(F_RSP, RAX)
    a.call("view")
    a.activity = ops.REENTRY
    if translates:
        a.call("translation")
    a.lea(RSP, Mem(R15, -at.FRAME_BYTES))
    a.ldm(Mem(RSP, at.FRAME_BYTES + V["SCRATCH"]), LEAN)
    a.op(ops.IRET)
