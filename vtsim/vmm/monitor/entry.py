"""How the monitor is entered and left: exceptions, interrupts and system calls of the guest, and the way back to it.

SDM: "64-Bit Mode Stack Frame"; "Fast System Calls in 64-Bit Mode"; "Interrupt Stack Table".
Not modelled: the shadow of STI in a deprivileged guest, but before HLT; its interrupts beside the timer's; its task
priority, which blocks none.
"""

from __future__ import annotations

from vtsim.cpu import ops
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.slots import R8, R11, R12, R13, R15, RAX, RBX, RCX, RDI, RDX, RSI, RSP
from vtsim.vmm.monitor import hosted, translate
from vtsim.vmm.monitor import layout as at
from vtsim.vmm.monitor.crossing import (
    APIC_ENABLED,
    GENERAL_PROTECTION,
    PAGE_FAULT,
    VECTORS,
    WITH_ERROR,
    X2APIC_SPURIOUS,
    die,
    ends,
    from_ring_3,
    if_deliverable,
    mask_of_system_call,
    return_by_iret,
    save,
    segments_of_system_call,
    show_exception,
    step_over,
    take_interrupt,
    take_interrupt_flag,
    through_gate,
    write_msr,
)
from vtsim.vmm.monitor.layout import F_CS, F_ERROR, F_RFLAGS, F_RIP, F_RSP, F_SS, V, saved, vcpu
from vtsim.vmm.monitor.memory import count

RF_CLEARED = ~(1 << 8 | 1 << 14 | 1 << 16 | at.RF_IF)  # TF, NT, RF; IF stands elsewhere
LEAN = (RAX, RCX, RDX, RBX, RSI, RDI, R15)  # what a system call clobbers


def boot(a: Assembler) -> None:
    """`boot`: the local APIC on, then the guest's first instruction. R15 is the vCPU."""
    a.activity = ops.BOOT
    a.label("boot")
    write_msr(a, X2APIC_SPURIOUS, APIC_ENABLED)
    a.call("view_find")
    a.jmp("resume")
    ends(a)


def resume(a: Assembler, translates: bool) -> None:
    """`skip`: step over the instruction that was emulated. `check`: deliver an interrupt that may be. `resume`."""
    a.activity = ops.REENTRY
    a.label("skip")
    step_over(a)
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
    return_by_iret(a)

    a.activity = ops.INJECTION
    a.label("interrupt_waits")
    if_deliverable(a, "resume")
    a.st(vcpu("IN_SERVICE"), R12)
    a.st_value(vcpu("PENDING"), 0)
    count(a, "INJECTED_INTERRUPTS")
    a.mov(R13, -1)
    a.jmp("inject")


def inject(a: Assembler) -> None:
    """`inject`: deliver exception or interrupt R12 through the guest's IDT; R13 its error code, -1 none.

    `inject_exception`: the same of an exception, which the guest sees.

    The frame is built on the guest's stack with what the guest believes: its selectors, its interrupt flag.
    """
    a.activity = ops.INJECTION
    a.label("inject_exception")
    show_exception(a, R12, R13, "inject")
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
    through_gate(a, RBX)
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
    take_interrupt_flag(a, flags, other)
    a.and_(flags, ~at.IOPL)
    a.or_(flags, at.RF_IF | 2)


def exceptions(a: Assembler, translates: bool) -> None:
    """`trap_0` … `trap_31`: exceptions of the guest that are none of the monitor's business."""
    a.activity = ops.EXIT_DISPATCH
    for vector in range(VECTORS):
        if vector in (PAGE_FAULT, GENERAL_PROTECTION):
            continue
        a.label(f"trap_{vector}")
        if vector not in WITH_ERROR:
            a.push(value=-1)
        a.push(value=vector)
        a.jmp("exception")
    a.label("exception")
    save(a, 56)
    if translates:
        a.call("original")
    a.ld(R12, Mem(R15, -56))
    a.ld(R13, F_ERROR)
    a.jmp("inject_exception")


def interrupt(a: Assembler, translates: bool, by_host: bool) -> None:
    """`timer`: the interrupt of the physical timer, which is the guest's; in the guest, or while it is halted."""
    a.activity = ops.EXIT_DISPATCH
    a.label("timer")
    a.push(value=0)
    from_ring_3(a, 16, "timer_while_halted")
    save(a, 48)
    if translates:
        a.call("original")
    if by_host:
        hosted.interrupt(a)
    else:
        take_interrupt(a)
    a.jmp("check")
    a.label("timer_while_halted")
    take_interrupt(a)
    a.add(RSP, 8)
    a.op(ops.IRET)


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
    mask_of_system_call(a)
    a.and_(RAX, register=R11)
    a.or_(RAX, at.RF_IF)
    a.st(F_RFLAGS, RAX)
    segments_of_system_call(a)
    a.ld(RAX, vcpu("LSTAR"))
    a.st(F_RIP, RAX)
    a.ld(RAX, saved(RSP))
    a.st(F_RSP, RAX)
    a.call("view")
    a.activity = ops.REENTRY
    if translates:
        a.call("translation")
        a.ld(RAX, vcpu("SCRATCH", LEAN.index(RCX)))
        a.st(vcpu("BACK_RCX"), RAX)
        a.st(vcpu("BACK_R11"), R11)
        a.ld(RAX, F_RIP)
        a.st(vcpu("BACK_TO"), RAX)
        translate.way_back(a, RAX)
        a.st(vcpu("SCRATCH", LEAN.index(RCX)), RAX)
        a.ld(R11, F_RFLAGS)
        a.copy(RSP, R15)
        a.ldm(Mem(RSP, V["SCRATCH"]), LEAN)
        a.ld(RSP, Mem(RSP, F_RSP.displacement))
        a.op(ops.SYSRET)
        return
    a.lea(RSP, Mem(R15, -at.FRAME_BYTES))
    a.ldm(Mem(RSP, at.FRAME_BYTES + V["SCRATCH"]), LEAN)
    a.op(ops.IRET)
