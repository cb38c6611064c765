"""Events on their way into a guest: exceptions, the virtual local APIC's interrupts, what an exit interrupted.

SDM: "Event Injection"; "Information for VM Exits That Occur During Event Delivery"; "Interrupt-Window Exiting".
Not modelled: NMIs; interrupts from an interrupt controller other than the local APIC.
"""

from __future__ import annotations

from vtsim.cpu import ops
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.kernels import hooks
from vtsim.cpu.slots import R12, R13, R14, R15, RAX, RCX, RDI, RDX, RSI
from vtsim.vmcs import bits as b
from vtsim.vmm import layout as at
from vtsim.vmm.programs import posted, upcalls
from vtsim.vmm.programs.daemons import daemons, what_may_be_due
from vtsim.vmm.programs.words import VALID, WITH_ERROR, count, cpu, retpolines, vcpu, work, zero
from vtsim.vmm.registry import Path

CR0_PE, RF_IF = 1 << 0, 1 << 9
BLOCKING_BY_STI_AND_MOV_SS = 3
ASSIGNED_BYTES = 16  # of a device that is assigned: linear address of its vCPU, vector


def evaluate(a: Assembler, path: Path) -> None:
    """`requests` (their word in RAX): before a VM entry, decide what to inject; ends in a jump to `requests_done`."""
    a.label("requests")
    a.activity = ops.INJECTION
    a.ld(RCX, cpu("RESCHEDULE"))
    a.test(RCX, register=RCX)
    a.jcc(ops.CC_NZ, "give_up_cpu" if path.remote else "schedule")
    for word, label in what_may_be_due(path):
        a.ld(RCX, vcpu(word))
        a.test(RCX, register=RCX)
        a.jcc(ops.CC_NZ, label)
    if path.several and daemons(path):
        a.ld(RCX, vcpu("WOKEN_BY"))
        a.test(RCX, register=RCX)
        a.jcc(ops.CC_NZ, "halt_again")
    zero(a, RCX)
    a.st(vcpu("REQUEST"), RCX)
    a.test(RAX, at.REQUEST_EVENTS)
    a.jcc(ops.CC_Z, "requests_done")
    work(a, path, "evaluate_events")
    a.ld(RCX, vcpu("PENDING"))
    a.test(RCX, VALID)
    a.jcc(ops.CC_NZ, "inject_pending")
    if path.vmm.views > 1 and not path.vmm.apicv:
        _hold_while_stepping(a)
    upcalls.look(a, path, "upcall_waits", "no_upcall")
    if path.vmm.apicv:
        posted.evaluate(a, path)
    else:
        _choose_interrupt(a, path)

    a.label("inject_pending")
    a.ld(RAX, vcpu("PENDING_ERROR"))
    a.vmwrite("ENTRY_EXCEPTION_ERROR_CODE", RAX)
    a.ld(RAX, vcpu("PENDING_LENGTH"))
    a.vmwrite("ENTRY_INSTRUCTION_LENGTH", RAX)
    a.vmwrite("ENTRY_INTERRUPTION_INFORMATION", RCX)
    zero(a, RAX)
    a.st(vcpu("PENDING"), RAX)
    if path.vmm.apicv:
        posted.evaluate(a, path)
        return
    upcalls.look(a, path, "open_window", "no_upcall_behind")
    a.lea(RDI, vcpu("IRR"))
    a.hook(hooks.HIGHEST_BIT)
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_S, "requests_done")
    a.label("open_window")
    a.ld(RAX, vcpu("PRIMARY"))
    a.or_(RAX, b.INTERRUPT_WINDOW_EXITING)
    a.st(vcpu("PRIMARY"), RAX)
    a.vmwrite("PRIMARY_PROC_CONTROLS", RAX)
    a.jmp("requests_done")
    if path.vmm.pv.events:  # a vector that the virtual local APIC does not know
        a.label("upcall_waits")
        _to_window_if_blocked(a)
        count(a, "UPCALLS")
        a.or_(R12, VALID)
        a.vmwrite("ENTRY_INTERRUPTION_INFORMATION", R12)
        a.jmp("requests_done")


def _hold_while_stepping(a: Assembler) -> None:
    """No interrupt between a store that is let through and the exit behind it, which asks again. Changes RAX, RDI."""
    a.ld(RAX, vcpu("PRIMARY"))
    a.test(RAX, b.MONITOR_TRAP_FLAG)
    a.jcc(ops.CC_Z, "not_stepping")
    a.ld(RDI, vcpu("VIEWS"))
    a.st_value(Mem(RDI, at.STEP["HELD"]), 1)
    a.jmp("requests_done")
    a.label("not_stepping")


def _to_window_if_blocked(a: Assembler) -> None:
    """To `open_window` while the guest takes no interrupt. Changes RAX."""
    a.vmread(RAX, "GUEST_RFLAGS")
    a.test(RAX, RF_IF)
    a.jcc(ops.CC_Z, "open_window")
    a.vmread(RAX, "GUEST_INTERRUPTIBILITY_STATE")
    a.test(RAX, BLOCKING_BY_STI_AND_MOV_SS)
    a.jcc(ops.CC_NZ, "open_window")


def _choose_interrupt(a: Assembler, path: Path) -> None:
    """Inject the highest requested vector if the guest can take it, or find out when it can."""
    a.call("pending_vector")
    a.test(R12, register=R12)
    a.jcc(ops.CC_S, "requests_done")
    a.cmp(R13, register=R14, comment="priority class against the processor's")
    a.jcc(ops.CC_BE, "below_priority")
    _to_window_if_blocked(a)
    for bitmap, hook in (("IRR", hooks.CLEAR_BIT), ("ISR", hooks.SET_BIT)):
        a.lea(RDI, vcpu(bitmap))
        a.copy(RSI, R12)
        a.hook(hook)
    a.or_(R12, VALID)
    a.vmwrite("ENTRY_INTERRUPTION_INFORMATION", R12)
    a.jmp("requests_done")
    a.label("below_priority")
    if path.vmm.tpr_shadow:
        a.ld(RCX, vcpu("APIC_PAGE"))
        a.ld(RAX, Mem(RCX, 0x80, size=4), comment="task priority")
        a.and_(RAX, 0xF0)
        a.cmp(RAX, register=R13)
        a.jcc(ops.CC_AE, "task_priority_is_higher")
        zero(a, R13)  # what is in service holds it back: its end will be seen
        a.label("task_priority_is_higher")
        a.shr(R13, 4)
        a.vmwrite("TPR_THRESHOLD", R13)
    a.jmp("requests_done")


def pending_vector(a: Assembler, path: Path) -> None:
    """Subroutine: R12 the highest requested vector or -1, R13 its class, R14 the processor's class.

    SDM: "Interrupt, Task, and Processor Priority".
    """
    if path.vmm.apicv:
        posted.pending(a, path)
        posted.take_posted(a, path)
        return
    a.label("pending_vector")
    a.lea(RDI, vcpu("IRR"))
    a.hook(hooks.HIGHEST_BIT)
    a.copy(R12, RAX)
    a.copy(R13, RAX)
    a.and_(R13, 0xF0)
    a.lea(RDI, vcpu("ISR"))
    a.hook(hooks.HIGHEST_BIT)
    zero(a, R14)
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_S, "nothing_in_service")
    a.copy(R14, RAX)
    a.and_(R14, 0xF0)
    a.label("nothing_in_service")
    a.ld(RCX, vcpu("APIC_PAGE"))
    a.ld(RAX, Mem(RCX, 0x80, size=4), comment="task priority")
    a.and_(RAX, 0xF0)
    a.cmp(RAX, register=R14)
    a.jcc(ops.CC_BE, "priority_known")
    a.copy(R14, RAX)
    a.label("priority_known")
    a.ret()


def interrupt_window(a: Assembler, path: Path) -> None:
    """The guest can take an interrupt now: close the window and evaluate again.

    SDM: "Interrupt-Window Exiting".
    """
    a.ld(RAX, vcpu("PRIMARY"))
    a.and_(RAX, ~b.INTERRUPT_WINDOW_EXITING)
    a.st(vcpu("PRIMARY"), RAX)
    a.vmwrite("PRIMARY_PROC_CONTROLS", RAX)
    request(a)
    a.jmp("reenter")


def request(a: Assembler) -> None:
    """Ask for events to be evaluated before the next VM entry."""
    a.st_value(vcpu("REQUEST"), at.REQUEST_EVENTS)


def recover_interrupted(a: Assembler, path: Path, back: str) -> None:
    """`recover`: the exit (information in RCX) interrupted the delivery of an event: it is to be injected again."""
    a.label("recover")
    a.and_(RCX, VALID | 0xFFF)
    a.st(vcpu("PENDING"), RCX)
    a.vmread(RAX, "IDT_VECTORING_ERROR_CODE")
    a.st(vcpu("PENDING_ERROR"), RAX)
    a.vmread(RAX, "EXIT_INSTRUCTION_LENGTH")
    a.st(vcpu("PENDING_LENGTH"), RAX)
    request(a)
    a.jmp(back)


def inject(a: Assembler, path: Path) -> None:
    """`inject`: an exception for the guest, information in RAX, error code in RDX."""
    a.label("inject")
    work(a, path, "queue_exception")
    if path.recorded and not path.vmm.on_shadow:
        a.vmread(RCX, "GUEST_CR0")
        a.test(RCX, CR0_PE)
        a.jcc(ops.CC_NZ, "inject_protected")
        a.and_(RAX, ~WITH_ERROR, comment="no exception has an error code in real-address mode")
        a.label("inject_protected")
    a.st(vcpu("PENDING"), RAX)
    a.st(vcpu("PENDING_ERROR"), RDX)
    request(a)
    a.jmp("reenter")


def external_interrupt(a: Assembler, path: Path) -> None:
    """Run the host's handler for the interrupt that caused the exit, as if it had come through the IDT."""
    a.activity = ops.INTERRUPT_PATH
    a.vmread(RAX, "EXIT_INTERRUPTION_INFORMATION")
    a.and_(RAX, 0xFF)
    a.shl(RAX, 4)
    idt = path.addresses["idt"]
    a.mov(RDI, idt)
    a.ld(RCX, Mem(RDI, 0, index=RAX))
    a.ld(RDX, Mem(RDI, 8, index=RAX))
    a.copy(RAX, RCX)
    a.and_(RAX, 0xFFFF)
    a.shr(RCX, 48)
    a.shl(RCX, 16)
    a.or_(RAX, register=RCX)
    a.shl(RDX, 32)
    a.or_(RAX, register=RDX)
    a.copy(RDX, R15)
    a.push(value=at.KERNEL_DATA)
    a.push(RDX)
    a.op(ops.PUSHF)
    a.push(value=at.KERNEL_CODE)
    retpolines(a, path, 1)
    a.op(ops.CALL_REG, RAX)


def from_device(a: Assembler, path: Path, number: int) -> None:
    """Part of the host's interrupt handler: a device that is assigned to a VM has a vector for its vCPU."""
    a.mov(RDI, path.addresses["assigned"] + ASSIGNED_BYTES * number)
    a.ld(R15, Mem(RDI))
    a.ld(RSI, Mem(RDI, 8))
    a.lea(RDI, vcpu(posted.requested(path)))
    a.hook(hooks.SET_BIT)
    a.call("wake")


def wire(a: Assembler, path: Path) -> None:
    """Part of the host's interrupt handler: an outside device's message is a vector for the vCPU of this CPU.

    The guest took it when it was recorded, so nothing of its priority is in service any more: what a PIC delivered has
    ended without the local APIC, whose end of interrupt is the only one that a monitor sees.

    SDM: "Interrupt, Task, and Processor Priority".
    """
    a.ld(R15, cpu("CURRENT"))
    a.mov(RDI, path.addresses["wire"])
    a.ld(R12, Mem(RDI))
    if path.recorded and not path.vmm.apicv:
        a.copy(R13, R12)
        a.and_(R13, 0xF0)
        a.label("wire_in_service")
        a.lea(RDI, vcpu("ISR"))
        a.hook(hooks.HIGHEST_BIT)
        a.cmp(RAX, register=R13)
        a.jcc(ops.CC_L, "wire_request")
        a.copy(RSI, RAX)
        a.hook(hooks.CLEAR_BIT)
        a.jmp("wire_in_service")
        a.label("wire_request")
    a.copy(RSI, R12)
    a.lea(RDI, vcpu(posted.requested(path)))
    a.hook(hooks.SET_BIT)
    a.call("wake")
