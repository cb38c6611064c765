"""How the hypervisor is entered and left: hypercalls, system calls, exceptions and the timer, and callbacks.

SDM: "Fast System Calls in 64-Bit Mode"; "64-Bit Mode Stack Frame".
"""

from __future__ import annotations

from collections.abc import Callable

from vtsim.cpu import ops
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.kernels import hooks
from vtsim.cpu.slots import R8, R9, R11, R12, R13, R15, RAX, RBX, RCX, RDI, RDX, RSI, RSP
from vtsim.ept import direct as d
from vtsim.ept import spec as e
from vtsim.vmm.guest_view import HYPERVISOR_LEAF, SIGNATURE
from vtsim.vmm.monitor import layout as at
from vtsim.vmm.monitor.crossing import (
    APIC_ENABLED,
    GENERAL_PROTECTION,
    INVALID_OPCODE,
    PAGE_FAULT,
    RING_3,
    VECTORS,
    WITH_ERROR,
    X2APIC_EOI,
    X2APIC_SPURIOUS,
    die,
    ends,
    from_ring_3,
    return_by_iret,
    return_by_sysret,
    save,
    save_but_stack_pointer,
    write_msr,
)
from vtsim.vmm.monitor.entry import RF_CLEARED
from vtsim.vmm.monitor.layout import F_ERROR, F_RFLAGS, F_RIP, saved
from vtsim.vmm.paravirtual.layout import FIRST_OWN, GUEST_KERNEL, LAST_OWN, V, count, count_one_of, vcpu
from vtsim.vmm.programs.upcalls import make_pending, tell_of

X2APIC_LVT_TIMER, X2APIC_DIVIDE = 0x832, 0x83E
DEADLINE_MODE, DIVIDE_BY_ONE = 2 << 17, 0xB
VMX = 1 << 5  # of CPUID leaf 1, ECX


def boot(a: Assembler, deadline: bool) -> None:
    """`boot`: the local APIC and its timer on, then the guest's first instruction. R15 is the vCPU."""
    a.activity = ops.BOOT
    a.label("boot")
    write_msr(a, X2APIC_SPURIOUS, APIC_ENABLED)
    write_msr(a, X2APIC_LVT_TIMER, at.TIMER_VECTOR | (DEADLINE_MODE if deadline else 0))
    if not deadline:
        write_msr(a, X2APIC_DIVIDE, DIVIDE_BY_ONE)
    a.ld(RAX, vcpu("KERNEL_CR3"))
    a.op(ops.MOV_TO_CR, RAX, imm=3)
    a.jmp("restore_guest")
    ends(a)


def system_call(a: Assembler, cpu: int, address: int) -> None:
    """`system_call_N`: SYSCALL in ring 3 of this CPU, whose vCPU is at `address`."""
    a.activity = ops.EXIT_DISPATCH
    a.label(f"system_call_{cpu}")
    a.st(Mem(displacement=address + V["REGISTERS"] + 8 * RSP), RSP)
    a.mov(RSP, address - 64)
    save_but_stack_pointer(a, 64)
    a.jmp("system_call")


def system_calls(a: Assembler, table: int) -> None:
    """The rest, the same on every CPU: a hypercall through the table at `table`, or a process's system call."""
    a.label("system_call")
    a.st(F_RIP, RCX)
    a.st(F_RFLAGS, R11)
    a.st_value(vcpu("BY_SYSCALL"), 1)
    a.ld(RCX, vcpu("KERNEL"))
    a.test(RCX, register=RCX)
    a.jcc(ops.CC_Z, "from_process")
    a.label("hypercall_made")
    a.cmp(RAX, len(d.CALLS))
    a.jcc(ops.CC_AE, "refused")
    count_one_of(a, "HYPERCALLS", RAX, RCX)
    a.jmp_mem(Mem(displacement=table, index=RAX, scale=8))
    a.label("from_process")
    count(a, "SYSTEM_CALLS")
    a.ld(R12, vcpu("CALL_HANDLER"))
    a.mov(R13, -1)
    a.jmp("call_back")


def leave(a: Assembler) -> None:
    """`refused`, `done`: the answer of a hypercall. `leave`: events, then `restore_guest`: back by SYSRET or IRET."""
    a.activity = ops.REENTRY
    a.label("refused")
    count(a, "REFUSALS")
    a.mov(RAX, -1)
    a.jmp("answer")
    a.label("done")
    a.mov(RAX, 0)
    a.label("answer")
    a.st(saved(RAX), RAX)
    a.label("leave")
    a.ld(RDI, vcpu("SHARED_PAGE"))
    a.ld(RAX, Mem(RDI, d.UPCALL_PENDING))
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_NZ, "event_waits")
    a.label("restore_guest")
    a.ld(RAX, vcpu("BY_SYSCALL"))
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_Z, "by_iret")
    a.ld(RAX, F_RIP)
    a.st(saved(RCX), RAX)
    a.ld(RAX, F_RFLAGS)
    a.st(saved(R11), RAX)
    return_by_sysret(a)
    a.label("by_iret")
    return_by_iret(a)
    a.label("event_waits")
    a.ld(RAX, Mem(RDI, d.UPCALL_MASK))
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_NZ, "restore_guest")
    a.ld(R12, vcpu("EVENT_HANDLER"))
    a.test(R12, register=R12)
    a.jcc(ops.CC_Z, "restore_guest")
    a.ld(RAX, vcpu("KERNEL"))
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_NZ, "nothing_to_show")
    a.ld(RAX, vcpu("BY_SYSCALL"))
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_Z, "nothing_to_show")
    a.ld(RAX, saved(RAX))  # the result of its system call, to which no SYSRET leads any more
    a.mov(RCX, 0)
    a.mov(RDX, ops.SYSRET)
    a.hook(hooks.SHOW)
    a.label("nothing_to_show")
    count(a, "UPCALLS")
    count(a, "INJECTED_INTERRUPTS")
    count(a, "INJECTED")
    a.mov(R13, -1)
    a.jmp("call_back")


def call_back(a: Assembler, stop: str = "", below: Callable[[Assembler], None] | None = None) -> None:
    """`call_back`: build a frame on the kernel's stack and go on at R12; R13 is its error code, -1 none.

    `exception`: the same for exception R8, if the kernel has a handler. `guest_address`: whether RSI is the guest's.
    `stop`: what is called with the kernel's root in RAX where the kernel itself is interrupted; `below`: what is to be
    done below the frame that ends at RSI.
    """
    a.activity = ops.INJECTION
    a.label("exception")
    count(a, "INJECTED")
    a.ld(R12, Mem(R15, V["TRAP_HANDLERS"], index=R8, scale=8))
    a.label("call_back")
    a.test(R12, register=R12)
    a.jcc(ops.CC_Z, "no_handler")
    a.ld(RDX, F_RFLAGS)
    a.and_(RDX, ~(at.RF_IF | at.IOPL))
    a.ld(RAX, vcpu("KERNEL"))
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_NZ, "from_kernel")
    a.st_value(vcpu("KERNEL"), 1)
    a.ld(RAX, vcpu("KERNEL_CR3"))
    a.call("toggle")
    a.ld(RDI, vcpu("SHARED_PAGE"))
    a.ld(RSI, vcpu("KERNEL_STACK"))
    a.mov(RBX, at.GUEST_CODE)
    a.or_(RDX, at.RF_IF)
    a.jmp("build_frame")
    a.label("from_kernel")
    if stop:
        a.ld(RAX, vcpu("KERNEL_CR3"))
        a.call(stop)
    a.ld(RDI, vcpu("SHARED_PAGE"))
    a.ld(RSI, saved(RSP))
    a.mov(RBX, GUEST_KERNEL)
    a.ld(RAX, Mem(RDI, d.UPCALL_MASK))
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_NZ, "build_frame")
    a.or_(RDX, at.RF_IF)
    a.label("build_frame")
    a.call("guest_address")
    a.jcc(ops.CC_BE, "no_stack")
    a.and_(RSI, ~15)
    a.st_value(Mem(RSI, -8), at.GUEST_DATA)
    a.ld(RAX, saved(RSP))
    a.st(Mem(RSI, -16), RAX)
    a.st(Mem(RSI, -24), RDX)
    a.st(Mem(RSI, -32), RBX)
    a.ld(RAX, F_RIP)
    a.st(Mem(RSI, -40), RAX)
    a.sub(RSI, 40)
    a.cmp(R13, -1)
    a.jcc(ops.CC_Z, "no_error_code")
    a.sub(RSI, 8)
    a.st(Mem(RSI), R13)
    a.label("no_error_code")
    a.ld(RAX, saved(R11))
    a.st(Mem(RSI, -8), RAX)
    a.ld(RAX, saved(RCX))
    a.st(Mem(RSI, -16), RAX)
    a.sub(RSI, 16)
    a.st(saved(RSP), RSI)
    if below is not None:
        below(a)
    a.st(F_RIP, R12)
    a.ld(RAX, F_RFLAGS)
    a.and_(RAX, RF_CLEARED)
    a.or_(RAX, at.RF_IF)
    a.st(F_RFLAGS, RAX)
    a.st_value(Mem(RDI, d.UPCALL_MASK), 1)
    a.jmp("restore_guest")
    a.label("no_handler")
    die(a, at.BAD_GATE)
    a.label("no_stack")
    die(a, at.NO_STACK)

    a.label("guest_address")  # flags: BE where RSI is among the hypervisor's own addresses; changes RAX
    a.copy(RAX, RSI)
    a.sub(RAX, 1)
    a.shr(RAX, 39)
    a.and_(RAX, 511)
    a.sub(RAX, FIRST_OWN)
    a.cmp(RAX, LAST_OWN - FIRST_OWN)
    a.ret()


def toggle(a: Assembler) -> None:
    """`toggle`: to the other root, RAX. Changes RAX."""
    a.label("toggle")
    a.op(ops.SWAPGS)
    a.op(ops.MOV_TO_CR, RAX, imm=3)
    count(a, "SWITCHES")
    a.ret()


def exceptions(a: Assembler, emulates: bool = True, to: str = "exception") -> None:
    """`trap_0` … `trap_31`: the guest's, which go on to its kernel; those of the hypervisor are its guest's stack."""
    a.activity = ops.EXIT_DISPATCH
    for vector in range(VECTORS):
        a.label(f"trap_{vector}")
        if vector not in WITH_ERROR:
            a.push(value=-1)
        a.push(value=vector)
        a.jmp("trap")
    a.label("trap")
    a.push(RAX)
    a.ld(RAX, Mem(RSP, 32))
    a.test(RAX, RING_3)
    a.jcc(ops.CC_Z, "no_stack")
    a.pop(RAX)
    save(a, 56)
    a.st_value(vcpu("BY_SYSCALL"), 0)
    a.ld(R8, Mem(R15, -56))
    a.ld(R13, F_ERROR)
    a.ld(RCX, vcpu("KERNEL"))
    a.cmp(R8, PAGE_FAULT)
    a.jcc(ops.CC_Z, "page_fault")
    a.test(RCX, register=RCX)
    a.jcc(ops.CC_Z, to)
    if emulates:
        a.cmp(R8, GENERAL_PROTECTION)
        a.jcc(ops.CC_Z, "emulate")
    a.cmp(R8, INVALID_OPCODE)
    a.jcc(ops.CC_Z, "undefined")
    a.jmp(to)

    a.label("page_fault")
    a.op(ops.MOV_FROM_CR, RSI, imm=2)
    a.ld(RDI, vcpu("SHARED_PAGE"))
    a.st(Mem(RDI, d.FAULT_ADDRESS), RSI)
    count(a, "INJECTED_FAULTS")
    a.test(RCX, register=RCX)
    a.jcc(ops.CC_Z, to)
    a.and_(R13, ~e.PF_USER)
    a.jmp(to)


def undefined(a: Assembler) -> None:
    """`undefined`: #UD of the kernel. It may ask for what CPUID says of the hypervisor, and not of the processor."""
    a.activity = ops.EXIT_HANDLER
    a.label("undefined")
    a.ld(RSI, F_RIP)
    a.copy(RDI, RSI)
    a.hook(hooks.DECODE)
    a.cmp(RAX, ops.UD)
    a.jcc(ops.CC_NZ, "undefined_indeed")
    a.cmp(RBX, d.ASK_HYPERVISOR)
    a.jcc(ops.CC_NZ, "undefined_indeed")
    a.add(RSI, register=R9)
    a.copy(RDI, RSI)
    a.hook(hooks.DECODE)
    a.cmp(RAX, ops.CPUID)
    a.jcc(ops.CC_NZ, "undefined_indeed")
    a.add(RSI, register=R9)
    a.st(F_RIP, RSI)
    a.st_value(vcpu("LENGTH"), 0)
    a.call("step_over")
    a.ld(RAX, saved(RAX))
    a.ld(RCX, saved(RCX))
    a.mov(RBX, HYPERVISOR_LEAF)
    a.cmp(RAX, register=RBX)
    a.jcc(ops.CC_NZ, "leaf_of_features")
    a.mov(RAX, d.FEATURE_LEAF)
    for register, word in zip((RBX, RCX, RDX), SIGNATURE, strict=True):
        a.mov(register, word)
    a.jmp("leaf_known")
    a.label("leaf_of_features")
    a.mov(RBX, d.FEATURE_LEAF)
    a.cmp(RAX, register=RBX)
    a.jcc(ops.CC_NZ, "leaf_of_processor")
    a.ld(RAX, vcpu("FEATURES"))
    for register in (RBX, RCX, RDX):
        a.mov(register, 0)
    a.jmp("leaf_known")
    a.label("leaf_of_processor")
    a.copy(R12, RAX)
    a.op(ops.CPUID)
    a.cmp(R12, 1)
    a.jcc(ops.CC_NZ, "leaf_known")
    a.and_(RCX, ~VMX)
    a.label("leaf_known")
    for register in (RAX, RBX, RCX, RDX):
        a.st(saved(register), register)
    a.jmp("leave")
    a.label("undefined_indeed")
    a.mov(R8, INVALID_OPCODE)
    a.mov(R13, -1)
    a.jmp("exception")


def timer(a: Assembler, shared: bool = False) -> None:
    """`timer`: the interrupt of the physical timer is an event of the guest, which runs or waits."""
    a.activity = ops.EXIT_DISPATCH
    a.label("timer")
    a.push(value=0)
    from_ring_3(a, 16, "timer_while_blocked")
    save(a, 48)
    a.st_value(vcpu("BY_SYSCALL"), 0)
    a.call("take_timer")
    a.jmp("leave")
    a.label("timer_while_blocked")
    a.call("take_timer")
    a.add(RSP, 8)
    a.op(ops.IRET)
    if shared:
        take_timer_of_several(a)
    else:
        take_timer(a)


def take_timer_of_several(a: Assembler) -> None:
    """`take_timer` where other vCPUs send events to this one, too. Changes RAX to RDX, RSI, RDI."""
    a.label("take_timer")
    write_msr(a, X2APIC_EOI, 0)
    a.ld(RSI, vcpu("TIMER_PORT"))
    a.test(RSI, register=RSI)
    a.jcc(ops.CC_Z, "timer_of_nobody")
    a.copy(RDI, R15)
    a.call("send_to")
    a.label("timer_of_nobody")
    a.ret()


def take_timer(a: Assembler) -> None:
    """`take_timer`: the timer's event is pending. `send_event`: that of bit RSI. Both change RAX to RDX, RSI, RDI."""
    a.label("take_timer")
    write_msr(a, X2APIC_EOI, 0)
    a.ld(RSI, vcpu("TIMER_BIT"))
    a.label("send_event")  # bit RSI; changes RAX, RDI
    a.ld(RDI, vcpu("SHARED_PAGE"))
    a.test(RSI, register=RSI)
    a.jcc(ops.CC_Z, "event_sent")
    make_pending(a, "event_sent")
    count(a, "EVENTS_SENT")
    tell_of(a, "event_sent")
    a.label("event_sent")
    a.ret()
