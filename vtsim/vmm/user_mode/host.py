"""The host's kernel: how it is entered, how a traced process stops, and what the tracing thread asks it for.

SDM: "Fast System Calls in 64-Bit Mode"; "64-Bit Mode Stack Frame".
"""

from __future__ import annotations

from typing import Final

from vtsim.cpu import ops
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.codes import HOST_PROCESS
from vtsim.cpu.slots import R8, R9, R10, R11, R12, R15, RAX, RBX, RCX, RDI, RDX, RSI, RSP
from vtsim.ept.direct import HOST_CALLS
from vtsim.vmm.monitor.crossing import (
    ABOVE_STACK_POINTER,
    ALL,
    BELOW_STACK_POINTER,
    from_ring_3,
    save,
    save_but_stack_pointer,
)
from vtsim.vmm.monitor.layout import saved
from vtsim.vmm.paravirtual import entry
from vtsim.vmm.paravirtual.calls import OF_XEN, Ring3Ground
from vtsim.vmm.paravirtual.layout import count
from vtsim.vmm.user_mode import layout as at
from vtsim.vmm.user_mode.layout import V, vcpu
from vtsim.vmm.user_mode.lengths import LENGTHS

CARRIERS: Final = (RAX, RCX, RDX, RBX, RSI, RDI, R8, R9)
NAMES: Final = {  # of what paravirtual guests ask for, as this host does it
    "update_entry": "map", "pin_table": "space", "load_cr3": "write_pipe", "load_user": "read_pipe",
    "stack": "set_stack", "iret": "sigreturn", "schedule": "schedule_idle", "set_timer": "set_timer",
    "mask": "sigprocmask",
}  # fmt: skip


def work(a: Assembler, name: str) -> None:
    """The compiled code of a step."""
    a.work(LENGTHS[name], comment=name)


class HostGround(Ring3Ground):
    """Page-table requests as system calls of a host that maps and unmaps."""

    def work(self, a: Assembler, name: str) -> None:
        if name in NAMES:
            work(a, NAMES[name])
        elif name == "nothing":
            for number, call in enumerate(HOST_CALLS[1:], 1):
                a.cmp(RDI, number)
                a.jcc(ops.CC_NZ, f"no_{call}")
                work(a, call)
                a.label(f"no_{call}")

    def drop_all(self, a: Assembler) -> None:
        a.op(ops.MOV_TO_CR, RAX, imm=3)


assert set(OF_XEN) - {"validate_table"} <= set(NAMES)


def system_call(a: Assembler, cpu: int, address: int) -> None:
    """`system_call_N`: SYSCALL in ring 3 of this CPU, whose vCPU is at `address`: by a process of the guest."""
    a.activity = ops.EXIT_DISPATCH
    a.label(f"system_call_{cpu}")
    a.st(Mem(displacement=address + V["REGISTERS"] + 8 * RSP), RSP)
    a.mov(RSP, address - 64)
    save_but_stack_pointer(a, 64)
    a.st_value(vcpu("STOPPED_BY"), at.CALL)
    a.jmp("system_call")


def host_call(a: Assembler) -> None:
    """`host_call`: INT 80H in ring 3, by the guest's kernel or the tracing thread, on the stack of either."""
    a.activity = ops.EXIT_DISPATCH
    a.label("host_call")
    a.push(value=0)
    a.push(RAX)
    a.copy(RAX, RSP)
    a.test(RAX, at.KERNEL_STACK)
    a.pop(RAX)
    a.jcc(ops.CC_Z, "tracer_call")
    save(a, 48)
    a.st_value(vcpu("BY_SYSCALL"), 0)
    a.ld(RCX, vcpu("KERNEL"))
    a.test(RCX, register=RCX)
    a.jcc(ops.CC_Z, "from_process")
    a.ld(RAX, saved(RAX))
    a.jmp("hypercall_made")


def stop(a: Assembler) -> None:
    """`toggle`: the process stops, and goes on with the root RAX in its other mode; `stop`: with RAX in the same.

    The tracing thread runs in between, to which this is the return from its wait. All registers stay but RAX.
    """
    a.activity = ops.SCHEDULING
    a.label("toggle")
    a.op(ops.SWAPGS)
    a.label("stop")
    a.stm(Mem(R15, at.CONTEXT), ALL)
    a.ld(RBX, vcpu("STOPPED_BY"))
    a.ld(RCX, vcpu("KERNEL"))
    a.test(RCX, register=RCX)
    a.jcc(ops.CC_NZ, "stop_known")
    a.mov(RBX, at.RETURN)
    a.ld(RSI, vcpu("KERNEL_STACK"))
    a.call("guest_address")
    a.jcc(ops.CC_BE, "no_stack")
    a.and_(RSI, ~15)
    for part in range(at.SIGNAL_FRAME, 0, -64):
        a.ldm(Mem(RSI, -64 - part), (R8, R9, R10, R11, R12, RAX, RDX, RDI))
    a.label("stop_known")
    a.st_value(vcpu("STOPPED_BY"), at.SIGNAL)
    a.st(vcpu("DELIVERS"), RBX)
    a.st(vcpu("BELIEVED"), RCX)
    a.ld(RAX, Mem(R15, V["STOPS"], index=RBX, scale=8))
    a.add(RAX, 1)
    a.st(Mem(R15, V["STOPS"], index=RBX, scale=8), RAX)
    work(a, "stop")
    work(a, "schedule")
    a.st_value(vcpu("KERNEL"), HOST_PROCESS)
    a.ld(RAX, vcpu("TRACER_CR3"))
    a.op(ops.MOV_TO_CR, RAX, imm=3)
    a.ld(RDI, vcpu("RING_0_STACK"))
    a.lea(RSI, Mem(R15, -at.KERNEL_STACK))
    a.st(Mem(RDI), RSI)
    work(a, "wait_return")
    a.st(Mem(R15, at.TRACER), RBX)
    a.label("tracer_goes_on")
    a.lea(RSP, Mem(R15, -at.KERNEL_STACK - at.TRACER_FRAME))
    above = at.KERNEL_STACK + at.TRACER_FRAME + at.TRACER
    a.ldm(Mem(RSP, above), BELOW_STACK_POINTER)
    a.ldm(Mem(RSP, above + 8 * (RSP + 1)), ABOVE_STACK_POINTER)
    a.op(ops.IRET)


def tracer_calls(a: Assembler) -> None:
    """`tracer_call`: a system call of the tracing thread, by number in RAX; its frame stays where it is."""
    a.activity = ops.SCHEDULING
    a.label("tracer_call")
    a.stm(Mem(RSP, at.KERNEL_STACK + 48 + at.TRACER), ALL)
    a.lea(R15, Mem(RSP, at.KERNEL_STACK + 48))
    a.cmp(RAX, at.WAIT)
    a.jcc(ops.CC_Z, "tracer_waits")
    work(a, "ptrace")
    a.cmp(RAX, at.CONTINUE)
    a.jcc(ops.CC_Z, "tracer_continues")
    a.cmp(RAX, at.POKE)
    a.jcc(ops.CC_Z, "tracer_pokes")
    a.mov(RDI, at.TRACER_DATA)
    a.lea(RSI, saved(RAX))
    work(a, "registers")
    for half in (0, 64):
        a.copy(R10, RSI)
        a.copy(R11, RDI)
        a.ldm(Mem(R10, half), CARRIERS)
        a.stm(Mem(R11, half), CARRIERS)
        a.copy(RSI, R10)
        a.copy(RDI, R11)
    a.jmp("tracer_answer")
    a.label("tracer_pokes")
    work(a, "poke")
    a.st_value(vcpu("SCRATCH"), HOST_CALLS.index("getpid"), comment="in place of what the process called")
    a.jmp("tracer_answer")
    a.label("tracer_continues")
    work(a, "continue")
    a.label("tracer_answer")
    a.st_value(Mem(R15, at.TRACER), 0)
    a.jmp("tracer_goes_on")

    a.label("tracer_waits")
    work(a, "wait")
    work(a, "schedule")
    a.ld(RCX, vcpu("BELIEVED"))
    a.st(vcpu("KERNEL"), RCX)
    a.ld(RDI, vcpu("RING_0_STACK"))
    a.st(Mem(RDI), R15)
    a.copy(RSP, R15)
    a.ldm(Mem(RSP, at.CONTEXT), BELOW_STACK_POINTER)
    a.ldm(Mem(RSP, at.CONTEXT + 8 * (RSP + 1)), ABOVE_STACK_POINTER)
    a.ld(RSP, Mem(RSP, at.CONTEXT + 8 * RSP))
    a.op(ops.MOV_TO_CR, RAX, imm=3)
    count(a, "SWITCHES")
    a.ret()


def signal(a: Assembler) -> None:
    """`signal`: exception R8 of the guest, which becomes a signal."""
    a.activity = ops.EXIT_HANDLER
    a.label("signal")
    work(a, "bad_area")
    a.jmp("exception")


def signal_frame(a: Assembler) -> None:
    """Below RSI, where the process goes on because of a signal: its frame. Changes RAX.

    That of a system call comes when the call is over that took its place.
    """
    a.ld(RAX, vcpu("DELIVERS"))
    a.cmp(RAX, at.CALL)
    a.jcc(ops.CC_NZ, "signal_taken")
    work(a, "getpid")
    a.label("signal_taken")
    work(a, "setup_frame")
    for part in range(at.SIGNAL_FRAME, 0, -64):
        a.stm(Mem(RSI, -part), CARRIERS)


def timer(a: Assembler) -> None:
    """`timer`: the physical timer's interrupt: of the guest, of the tracing thread, or while the host is idle."""
    a.activity = ops.EXIT_DISPATCH
    a.label("timer")
    a.push(value=0)
    from_ring_3(a, 16, "timer_while_blocked")
    a.push(RAX)
    a.copy(RAX, RSP)
    a.test(RAX, at.KERNEL_STACK)
    a.pop(RAX)
    a.jcc(ops.CC_Z, "timer_in_tracer")
    save(a, 48)
    a.st_value(vcpu("BY_SYSCALL"), 0)
    work(a, "interrupt")
    a.call("take_timer")
    a.jmp("leave")
    a.label("timer_in_tracer")
    a.sub(RSP, 128)
    a.stm(Mem(RSP), ALL)
    a.lea(R15, Mem(RSP, 128 + 48 + at.KERNEL_STACK))
    work(a, "interrupt")
    a.call("take_timer")
    a.ldm(Mem(RSP), BELOW_STACK_POINTER)
    a.ldm(Mem(RSP, 8 * (RSP + 1)), ABOVE_STACK_POINTER)
    a.add(RSP, 128 + 8)
    a.op(ops.IRET)
    a.label("timer_while_blocked")
    a.call("take_timer")
    a.add(RSP, 8)
    a.op(ops.IRET)
    entry.take_timer(a)
