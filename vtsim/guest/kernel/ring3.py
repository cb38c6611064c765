"""What a kernel built for its hypervisor does in place of privileged instructions: hypercalls, words of a shared page.

In ring 3 the hypervisor calls it back with a frame on its stack, as the processor would build it, below which RCX and
R11 stand. It returns to processes by a hypercall, to itself by IRET, which ring 3 may do within its ring. Its interrupt
flag is a word of the shared page; time is the scaled distance to a reading of the TSC that the hypervisor left there.
In VMX non-root operation clock, timer and events are the same, where they are offered; the rest is as elsewhere.

Not modelled: kinds of events other than the timer's and, of several CPUs, another CPU's; a kernel in ring 3 that takes
what the hypervisor should have masked.
"""

from __future__ import annotations

from vtsim.cpu import ops
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.kernels import hooks
from vtsim.ept import direct as d
from vtsim.guest.kernel import KernelOptions, path
from vtsim.guest.kernel import layout as at
from vtsim.guest.kernel.interrupt_flag import disable as disable
from vtsim.guest.kernel.interrupt_flag import enable as enable
from vtsim.guest.kernel.interrupt_flag import shared as shared

RF_IF = 1 << 9
LOST = (s.RCX, s.R11)  # by SYSCALL


def hypercall(a: Assembler, kernel: KernelOptions, number: int) -> None:
    """A hypercall; RAX <- its answer, all other registers stay."""
    a.mov(s.RAX, number)
    if kernel.ring3:
        a.call("hypercall")
    else:
        a.op(ops.VMCALL)


def fault_address(a: Assembler, kernel: KernelOptions, register: int) -> None:
    """The address of the last page fault."""
    if kernel.ring3:
        a.ld(register, shared(kernel, d.FAULT_ADDRESS))
    else:
        a.op(ops.MOV_FROM_CR, register, imm=2)


def begin(a: Assembler, kernel: KernelOptions) -> None:
    """At boot: tell the hypervisor where events go; in ring 3 also exceptions and system calls."""
    if not kernel.ring3:
        a.mov(s.RDI, at.TIMER_VECTOR)
        hypercall(a, kernel, d.CALL_SET_CALLBACKS)
        return
    vectors = range(32)
    for vector in reversed(vectors):
        a.mov(s.RAX, f"vector_{vector}")
        a.push(s.RAX)
        a.push(value=vector)
    a.copy(s.RDI, s.RSP)
    a.mov(s.RSI, len(vectors))
    hypercall(a, kernel, d.CALL_SET_TRAPS)
    a.add(s.RSP, 16 * len(vectors))
    a.mov(s.RDI, "event")
    a.mov(s.RSI, "syscall_entry")
    hypercall(a, kernel, d.CALL_SET_CALLBACKS)


def bind_timer(a: Assembler, kernel: KernelOptions) -> None:
    """At boot: which event is the timer's."""
    a.mov(s.RDI, d.BIND_TIMER)
    hypercall(a, kernel, d.CALL_EVENT)
    a.copy(s.RCX, s.RAX)
    a.mov(s.RAX, 1)
    a.emit(ops.SHL, s.RAX, s.RCX)
    a.st(at.cpu_word(at.TIMER_EVENT), s.RAX)


def bind_ipi(a: Assembler, kernel: KernelOptions) -> None:
    """At boot of one of several CPUs: by which event others interrupt it."""
    a.mov(s.RDI, d.BIND_IPI)
    hypercall(a, kernel, d.CALL_EVENT)
    a.st(at.cpu_word(at.IPI_PORT), s.RAX)


def interrupt_cpu(a: Assembler) -> None:
    """Interrupt the CPU whose data is at RDI. Changes RAX, RDX and RSI."""
    a.ld(s.RSI, Mem(s.RDI, at.IPI_PORT))
    a.ld(s.RDX, Mem(s.RDI, at.APIC_ID))
    a.shl(s.RDX, d.OF_VCPU)
    a.or_(s.RSI, register=s.RDX)
    a.push(s.RDI)
    a.mov(s.RDI, d.SEND)
    a.mov(s.RAX, d.CALL_EVENT)
    a.call("hypercall")
    a.pop(s.RDI)


def _take_ipi_event(a: Assembler, kernel: KernelOptions) -> None:
    """Count the event that another CPU has sent, if it is pending. Changes RAX and RCX."""
    a.ld(s.RCX, at.cpu_word(at.IPI_PORT))
    a.mov(s.RAX, 1)
    a.emit(ops.SHL, s.RAX, s.RCX)
    a.ld(s.RCX, shared(kernel, d.EVENTS))
    a.test(s.RCX, register=s.RAX)
    a.jcc(ops.CC_Z, "no_ipi_event")
    a.mov(s.RCX, 0)
    a.sub(s.RCX, register=s.RAX)
    a.xadd(shared(kernel, d.EVENTS), s.RCX)
    a.ld(s.RAX, at.cpu_word(at.IPIS))
    a.add(s.RAX, 1)
    a.st(at.cpu_word(at.IPIS), s.RAX)
    a.label("no_ipi_event")


def entered(a: Assembler) -> None:
    """The first instructions of every handler: what SYSRET to it would have lost."""
    for register in LOST:
        a.pop(register)


def leave_by_hypercall(a: Assembler, flags: int, *, to_process: bool = False) -> None:
    """Return to where the frame at RSP says, all other registers being as they should."""
    a.push(value=flags)
    a.jmp("leave_to_process" if to_process else "leave_by_hypercall")


def host_calls(a: Assembler, kernel: KernelOptions, *names: str) -> None:
    """System calls of the host by which nothing changes that the guest sees. Changes RAX and RDI."""
    for name in names:
        a.mov(s.RDI, d.HOST_CALLS.index(name))
        hypercall(a, kernel, d.CALL_NOTHING)


def return_to_kernel(a: Assembler, kernel: KernelOptions, name: str) -> None:
    """Return within the kernel from the frame at RSP: interrupts as they were, and IRET unless one waits."""
    cs, rflags = Mem(s.RSP, 16), Mem(s.RSP, 24)  # RAX is pushed
    a.push(s.RAX)
    a.ld(s.RAX, rflags)
    a.test(s.RAX, RF_IF)
    a.jcc(ops.CC_Z, f"{name}_masked")
    a.st_value(shared(kernel, d.UPCALL_MASK), 0)
    a.ld(s.RAX, shared(kernel, d.UPCALL_PENDING))
    a.test(s.RAX, -1)
    a.jcc(ops.CC_NZ, f"{name}_event_waits")
    a.label(f"{name}_masked")
    a.ld(s.RAX, cs)
    a.or_(s.RAX, 3)
    a.st(cs, s.RAX)
    a.pop(s.RAX)
    a.op(ops.IRET)
    a.label(f"{name}_event_waits")
    a.pop(s.RAX)
    leave_by_hypercall(a, 0)


def take_timer_event(a: Assembler, kernel: KernelOptions, otherwise: str) -> None:
    """The timer's event is no longer pending; to `otherwise` if it was not. Changes RAX, RCX."""
    a.st_value(shared(kernel, d.UPCALL_PENDING), 0)
    if kernel.several:
        _take_ipi_event(a, kernel)
    a.ld(s.RAX, shared(kernel, d.EVENTS))
    a.ld(s.RCX, shared(kernel, d.EVENTS_MASKED))
    a.emit(ops.XOR, s.RCX, imm=-1)
    a.and_(s.RAX, register=s.RCX)
    a.ld(s.RCX, at.cpu_word(at.TIMER_EVENT))
    a.test(s.RAX, register=s.RCX)
    a.jcc(ops.CC_Z, otherwise)
    a.mov(s.RAX, 0)
    a.sub(s.RAX, register=s.RCX)
    a.xadd(shared(kernel, d.EVENTS), s.RAX)


def read_clock(a: Assembler, to: int) -> None:
    """`to` <- time in ns. Changes RAX and RDX."""
    a.call("clock")
    a.copy(to, s.RAX)


def duration(a: Assembler, kernel: KernelOptions, register: int) -> None:
    """A number of cycles becomes one of ns. Changes RAX and RCX."""
    a.copy(s.RAX, register)
    a.ld(s.RCX, shared(kernel, d.TIME_SCALE))
    a.hook(hooks.SCALE)
    a.copy(register, s.RAX)


def _clock(a: Assembler, kernel: KernelOptions) -> None:
    """`clock`: RAX <- time in ns. Changes RDX."""
    a.activity = ops.INTERRUPT_PATH
    a.label("clock")
    for register in (s.RCX, s.RSI):
        a.push(register)
    a.label("clock_again")
    a.ld(s.RSI, shared(kernel, d.TIME_VERSION))
    a.test(s.RSI, 1)
    a.jcc(ops.CC_NZ, "clock_again")
    a.op(ops.RDTSC)
    a.shl(s.RDX, 32)
    a.or_(s.RAX, register=s.RDX)
    a.ld(s.RCX, shared(kernel, d.TIME_STAMP))
    a.sub(s.RAX, register=s.RCX)
    a.ld(s.RCX, shared(kernel, d.TIME_SCALE))
    a.hook(hooks.SCALE)
    a.ld(s.RCX, shared(kernel, d.TIME_BASE))
    a.add(s.RAX, register=s.RCX)
    a.ld(s.RCX, shared(kernel, d.TIME_VERSION))
    a.cmp(s.RCX, register=s.RSI)
    a.jcc(ops.CC_NZ, "clock_again")
    for register in (s.RSI, s.RCX):
        a.pop(register)
    a.ret()


@path("ring 3")
def ring_3(a: Assembler, kernel: KernelOptions) -> None:
    """The clock of the shared page; hypercalls, the interrupt flag and the way out of a kernel in ring 3."""
    if kernel.events:
        _clock(a, kernel)
    if not kernel.ring3:
        return
    a.activity = ops.SYSCALL_PATH
    a.label("hypercall")
    if kernel.on_host:
        a.op(ops.INT, imm=d.HOST_VECTOR)
    else:
        for register in LOST:
            a.push(register)
        a.op(ops.SYSCALL)
        for register in reversed(LOST):
            a.pop(register)
    a.ret()

    if kernel.on_host:
        for label, value in (("mask", 1), ("unmask", 0)):
            a.label(label)
            a.push(s.RAX)
            a.push(s.RDI)
            a.mov(s.RDI, value)
            hypercall(a, kernel, d.CALL_MASK)
            a.pop(s.RDI)
            a.pop(s.RAX)
            a.ret()
    else:
        _unmask(a, kernel)

    if kernel.on_host:  # the tracing thread is asked, by a signal that waits until the handler's end
        a.label("leave_to_process")
        for register in (s.RAX, s.RDI):
            a.push(register)
        host_calls(a, kernel, "getpid", "kill")
        for register in (s.RDI, s.RAX):
            a.pop(register)
    a.label("leave_by_hypercall")  # the frame of IRET_FRAME from RCX on
    for register in (s.RCX, s.R11, s.RAX):
        a.push(register)
    a.mov(s.RAX, d.CALL_IRET)
    a.op(ops.INT if kernel.on_host else ops.SYSCALL, imm=d.HOST_VECTOR if kernel.on_host else 0)

    a.activity = ops.INTERRUPT_PATH
    a.label("event")
    entered(a)
    a.push(value=0)
    a.push(value=at.TIMER_VECTOR)
    a.jmp("enter")


def _unmask(a: Assembler, kernel: KernelOptions) -> None:
    """`unmask`: upcalls again; one that waits comes at once."""
    a.label("unmask")
    a.push(s.RAX)
    a.st_value(shared(kernel, d.UPCALL_MASK), 0)
    a.ld(s.RAX, shared(kernel, d.UPCALL_PENDING))
    a.test(s.RAX, -1)
    a.jcc(ops.CC_Z, "unmasked")
    hypercall(a, kernel, d.CALL_NOTHING)
    a.label("unmasked")
    a.pop(s.RAX)
    a.ret()
