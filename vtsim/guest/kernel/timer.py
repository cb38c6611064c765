"""The timer: the tick, the wake-up of sleepers, and the next deadline; sleeping.

SDM: "APIC Timer"; "TSC-Deadline Mode".
Not modelled: xAPIC registers in memory (the APIC is used in x2APIC mode everywhere); soft interrupts.
"""

from __future__ import annotations

from vtsim.cpu import ops
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.ept import direct as d
from vtsim.guest.kernel import KernelOptions, path, ring3, smp
from vtsim.guest.kernel import layout as at
from vtsim.guest.kernel.lengths import length

X2APIC_EOI, X2APIC_INITIAL, TSC_DEADLINE = 0x80B, 0x838, 0x6E0
NEVER = (1 << 62) - 1


def read_tsc(a: Assembler, to: int) -> None:
    """`to` <- time-stamp counter. Clobbers RAX and RDX."""
    a.op(ops.RDTSC)
    a.shl(s.RDX, 32)
    a.or_(s.RAX, register=s.RDX)
    a.copy(to, s.RAX)


def read_clock(a: Assembler, kernel: KernelOptions, to: int) -> None:
    """`to` <- time-stamp counter, or where it is shared the time in ns. Clobbers RAX and RDX."""
    if kernel.events:
        ring3.read_clock(a, to)
    else:
        read_tsc(a, to)


@path("interrupt")
def interrupt(a: Assembler, kernel: KernelOptions) -> None:
    """External interrupt: acknowledge it; on the timer's vector do the tick and wake who has slept long enough."""
    a.activity = ops.INTERRUPT_PATH
    a.label("interrupt")
    a.copy(s.RBX, s.RAX)
    a.work(length("irq_enter"))
    if kernel.events:
        ring3.take_timer_event(a, kernel, "interrupt_done")
    else:
        _acknowledge(a, kernel)
    a.work(length("timer"))
    read_clock(a, kernel, s.R12)
    if kernel.tick_cycles:
        a.ld(s.R13, at.cpu_word(at.NEXT_TICK))
        a.cmp(s.R12, register=s.R13)
        a.jcc(ops.CC_B, "no_tick")
        a.work(length("tick"))
        a.label("next_tick")
        a.ld(s.RAX, at.cpu_word(at.JIFFIES))
        a.add(s.RAX, 1)
        a.st(at.cpu_word(at.JIFFIES), s.RAX)
        a.add(s.R13, kernel.tick_cycles)
        a.cmp(s.R12, register=s.R13)
        a.jcc(ops.CC_AE, "next_tick")
        a.st(at.cpu_word(at.NEXT_TICK), s.R13)
        a.st_value(at.cpu_word(at.NEED_RESCHED), 1)
        if kernel.dma and kernel.dma.mode == "deferred":
            a.call("dma_tick")
        a.label("no_tick")
    smp.count_tasks(a, kernel, s.R8)
    a.ld(s.RSI, at.cpu_word(at.FIRST_TASK))
    a.label("wake_task")
    a.ld(s.RAX, Mem(s.RSI, at.T_STATE))
    a.cmp(s.RAX, at.SLEEPING)
    a.jcc(ops.CC_NZ, "wake_next")
    a.ld(s.RAX, Mem(s.RSI, at.T_WAKE))
    a.cmp(s.R12, register=s.RAX)
    a.jcc(ops.CC_B, "wake_next")
    a.work(length("wake"))
    a.st_value(Mem(s.RSI, at.T_STATE), at.RUNNABLE)
    a.st_value(at.cpu_word(at.NEED_RESCHED), 1)
    a.label("wake_next")
    a.ld(s.RSI, Mem(s.RSI, at.T_NEXT))
    a.sub(s.R8, 1)
    a.jcc(ops.CC_NZ, "wake_task")
    a.call("program_timer")
    a.label("interrupt_done")
    a.work(length("irq_exit"))
    a.jmp("leave")


def _acknowledge(a: Assembler, kernel: KernelOptions) -> None:
    """Acknowledge the interrupt whose vector is in RBX; on if it is the timer's.

    Of interrupts that the other CPU only waits for it hears first, as in kvm-unit-tests.
    """
    if kernel.several:
        smp.count_ipi(a)
    a.mov(s.RCX, X2APIC_EOI)
    a.mov(s.RAX, 0)
    a.mov(s.RDX, 0)
    a.op(ops.WRMSR)
    if kernel.several:
        a.cmp(s.RBX, at.CALL_VECTOR)
        a.jcc(ops.CC_Z, "called")
    a.cmp(s.RBX, at.TIMER_VECTOR)
    device = "dma_done" if kernel.dma else "interrupt_done"
    a.jcc(ops.CC_NZ, "file_written" if kernel.file and kernel.file.queue else device)


@path("timer deadline")
def program_timer(a: Assembler, kernel: KernelOptions) -> None:
    """Arm the timer for the next tick or the first sleeper, whichever comes first; called with interrupts off."""
    a.activity = ops.INTERRUPT_PATH
    a.label("program_timer")
    a.work(length("timer_program"))
    a.mov(s.R13, NEVER)
    if kernel.tick_cycles:
        a.ld(s.R13, at.cpu_word(at.NEXT_TICK))
    smp.count_tasks(a, kernel, s.R8)
    a.ld(s.RSI, at.cpu_word(at.FIRST_TASK))
    a.label("look_task")
    a.ld(s.RAX, Mem(s.RSI, at.T_STATE))
    a.cmp(s.RAX, at.SLEEPING)
    a.jcc(ops.CC_NZ, "look_next")
    a.ld(s.RAX, Mem(s.RSI, at.T_WAKE))
    a.cmp(s.RAX, register=s.R13)
    a.jcc(ops.CC_AE, "look_next")
    a.copy(s.R13, s.RAX)
    a.label("look_next")
    a.ld(s.RSI, Mem(s.RSI, at.T_NEXT))
    a.sub(s.R8, 1)
    a.jcc(ops.CC_NZ, "look_task")
    a.mov(s.RAX, NEVER)
    a.cmp(s.R13, register=s.RAX)
    a.jcc(ops.CC_Z, "timer_armed")
    if kernel.events:
        a.copy(s.RDI, s.R13)
        ring3.hypercall(a, kernel, d.CALL_SET_TIMER)
        a.label("timer_armed")
        a.ret()
        return
    if kernel.deadline:
        a.mov(s.RCX, TSC_DEADLINE)
    else:
        read_clock(a, kernel, s.RCX)
        a.sub(s.R13, register=s.RCX)
        a.cmp(s.R13, 1)
        a.jcc(ops.CC_GE, "timer_ahead")
        a.mov(s.R13, 1)
        a.label("timer_ahead")
        a.mov(s.RCX, X2APIC_INITIAL)
    a.copy(s.RAX, s.R13)
    a.copy(s.RDX, s.R13)
    a.shr(s.RDX, 32)
    a.op(ops.WRMSR)
    a.label("timer_armed")
    a.ret()


@path("sleep")
def sleep(a: Assembler, kernel: KernelOptions) -> None:
    """System call: sleep for RDI cycles."""
    a.activity = ops.SYSCALL_PATH
    a.label("call_sleep")
    if not kernel.timer:
        a.jmp("no_such_call")
        return
    a.work(length("sleep"))
    ring3.disable(a, kernel)
    a.ld(s.RBX, at.cpu_word(at.CURRENT))
    if kernel.events:
        ring3.duration(a, kernel, s.RDI)
    read_clock(a, kernel, s.RCX)
    a.add(s.RCX, register=s.RDI)
    a.st(Mem(s.RBX, at.T_WAKE), s.RCX)
    a.st_value(Mem(s.RBX, at.T_STATE), at.SLEEPING)
    a.call("program_timer")
    a.call("schedule")
    ring3.enable(a, kernel)
    a.mov(s.RAX, 0)
    a.ret()
