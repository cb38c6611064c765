"""Which task runs next, and the switch to it.

Not modelled: priorities and fair shares (tasks take turns); FPU state; migration between CPUs.
"""

from __future__ import annotations

from attrs import evolve

from vtsim.cpu import ops
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.ept import direct as d
from vtsim.guest.kernel import KernelOptions, hypercalls, path, ring3, smp
from vtsim.guest.kernel import layout as at
from vtsim.guest.kernel.lengths import length

# What the port of a kernel to a host does by system calls beside those that switch. The files whose signals follow the
# process that runs are an estimate: console, disk, network. Then interrupts off, three timers' signals and those that
# wait; behind the switch the timers' signals, and interrupts as they were.
BEFORE_SWITCH = (*["fcntl"] * 3, *["sigprocmask"] * (2 + 3), "sigpending")
AFTER_SWITCH = ("sigprocmask",) * (3 + 2)


@path("schedule")
def schedule(a: Assembler, kernel: KernelOptions) -> None:
    """Pick the next task that can run, in turn, or the idle task; called with interrupts off."""
    a.activity = ops.CONTEXT_SWITCH
    a.label("schedule")
    a.st_value(at.cpu_word(at.NEED_RESCHED), 0)
    a.work(length("pick"))
    a.ld(s.RDI, at.cpu_word(at.CURRENT))
    a.ld(s.RSI, Mem(s.RDI, at.T_NEXT))
    smp.count_tasks(a, kernel, s.R8)
    a.label("try_task")
    a.ld(s.RAX, Mem(s.RSI, at.T_STATE))
    a.cmp(s.RAX, at.RUNNABLE)
    a.jcc(ops.CC_Z, "task_found")
    a.ld(s.RSI, Mem(s.RSI, at.T_NEXT))
    a.sub(s.R8, 1)
    a.jcc(ops.CC_NZ, "try_task")
    a.ld(s.RSI, at.cpu_word(at.IDLE_TASK))
    a.label("task_found")
    a.cmp(s.RSI, register=s.RDI)
    a.jcc(ops.CC_NZ, "switch")
    a.ret()


@path("context switch")
def context_switch(a: Assembler, kernel: KernelOptions) -> None:
    """From the task at RDI to that at RSI: address space, stacks, callee-saved registers; idle borrows a space."""
    a.activity = ops.CONTEXT_SWITCH
    a.label("switch")
    a.ld(s.RAX, at.cpu_word(at.SWITCHES))
    a.add(s.RAX, 1)
    a.st(at.cpu_word(at.SWITCHES), s.RAX)
    if kernel.several:
        smp.take_space(a)
    a.ld(s.RAX, Mem(s.RSI, at.T_CR3))
    a.test(s.RAX, -1)
    a.jcc(ops.CC_Z, "same_space")
    a.ld(s.RCX, at.cpu_word(at.LOADED_CR3))
    a.cmp(s.RAX, register=s.RCX)
    a.jcc(ops.CC_Z, "same_space")
    a.work(length("switch_mm"))
    if kernel.paravirtual:
        a.push(s.RDI)
        a.push(s.RSI)
        a.copy(s.RSI, s.RAX)
        if kernel.on_host:
            ring3.host_calls(a, kernel, *BEFORE_SWITCH)
        hypercalls.request(a, d.LOAD)
        if kernel.ring3:
            a.ld(s.RSI, Mem(s.RSP))
            a.ld(s.RSI, Mem(s.RSI, at.T_USER_CR3))
            hypercalls.request(a, d.LOAD_USER)
            if kernel.on_host:
                ring3.host_calls(a, kernel, *AFTER_SWITCH)
        else:
            a.call("pv_send")
        a.pop(s.RSI)
        a.pop(s.RDI)
        a.ld(s.RAX, Mem(s.RSI, at.T_CR3))
    else:
        a.op(ops.MOV_TO_CR, s.RAX, imm=3)
    if kernel.pcid:  # a new address space flushes what its PCID had; from now on it keeps
        a.or_(s.RAX, at.NOFLUSH)
        a.st(Mem(s.RSI, at.T_CR3), s.RAX)
    a.st(at.cpu_word(at.LOADED_CR3), s.RAX)
    a.label("same_space")
    a.ld(s.RAX, Mem(s.RSI, at.T_STACK_TOP))
    a.st(at.cpu_word(at.STACK_TOP), s.RAX)
    if kernel.ring3:
        a.push(s.RDI)
        a.push(s.RSI)
        a.copy(s.RSI, s.RAX)
        hypercalls.request(a, d.STACK)
        a.call("pv_send")
        a.pop(s.RSI)
        a.pop(s.RDI)
    elif not kernel.kpti:
        stack = at.cpu_word(at.TSS - at.CPU_DATA + 4)
        a.st(evolve(stack, size=4) if kernel.protected else stack, s.RAX, "RSP0")
    a.st(at.cpu_word(at.CURRENT), s.RSI)
    a.work(length("switch_to"))
    a.sub(s.RSP, at.SWITCH_BYTES)
    a.stm(Mem(s.RSP), at.CALLEE)
    a.st(Mem(s.RDI, at.T_RSP), s.RSP)
    a.ld(s.RSP, Mem(s.RSI, at.T_RSP))
    a.ldm(Mem(s.RSP), at.CALLEE)
    a.add(s.RSP, at.SWITCH_BYTES)
    a.ret()
