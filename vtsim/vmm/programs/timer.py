"""The host's local timer, and the virtual timers that it serves.

One physical deadline serves all vCPUs of a CPU and the scheduler's tick: it is set to the earliest of them.

SDM: "APIC Timer"; "TSC-Deadline Mode".
Not modelled: hrtimer trees; a timer interrupt for a vCPU that runs on another CPU; the divide configuration.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from vtsim.cpu import ops
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.kernels import hooks
from vtsim.cpu.slots import R12, R13, R14, R15, RAX, RBX, RCX, RDI, RDX, RSI, RSP
from vtsim.vmm import layout as at
from vtsim.vmm.programs import mitigations, posted, several, upcalls
from vtsim.vmm.programs.daemons import Daemon, daemons
from vtsim.vmm.programs.events import from_device, request, wire
from vtsim.vmm.programs.words import ALL, FRAME, LOW, cpu, join, split, vcpu, work, zero
from vtsim.vmm.registry import Path

MSR_TSC_DEADLINE, MSR_EOI, MSR_LVT_TIMER, MSR_INITIAL_COUNT = 0x6E0, 0x80B, 0x832, 0x838
MASKED = 1 << 16
DEADLINE_MODE = 2 << 17


def now(a: Assembler) -> None:
    """RAX <- TSC of the host."""
    a.op(ops.RDTSC)
    join(a)


def program_timer(a: Assembler, path: Path) -> None:
    """Subroutine: set the physical timer to the earliest deadline. Changes RAX RCX RDX RBX RDI RSI."""
    a.label("program_timer")
    work(a, path, "program_timer")
    a.ld(RBX, cpu("TICK_AT"))
    a.ld(RCX, cpu("COUNT"))
    a.ld(RDI, cpu("SELF"))
    a.label("program_next")
    a.ld(RSI, Mem(RDI, at.C["LIST"]))
    for deadline in ("DEADLINE", *(daemon.at for daemon in daemons(path))):
        a.ld(RAX, Mem(RSI, at.V[deadline]))
        a.test(RAX, register=RAX)
        a.jcc(ops.CC_Z, f"program_past_{deadline}")
        a.test(RBX, register=RBX)
        a.jcc(ops.CC_Z, f"program_{deadline}")
        a.cmp(RAX, register=RBX)
        a.jcc(ops.CC_AE, f"program_past_{deadline}")
        a.label(f"program_{deadline}")
        a.copy(RBX, RAX)
        a.label(f"program_past_{deadline}")
    a.add(RDI, 8)
    a.loop("program_next")
    if path.profile.features.tsc_deadline:
        a.copy(RAX, RBX)
        a.mov(RCX, MSR_TSC_DEADLINE)
    else:
        a.test(RBX, register=RBX)
        a.jcc(ops.CC_Z, "program_stop")
        now(a)
        a.sub(RBX, register=RAX)
        a.jcc(ops.CC_G, "program_stop")
        a.mov(RBX, 1, comment="already passed")
        a.label("program_stop")
        a.copy(RAX, RBX)
        a.mov(RCX, MSR_INITIAL_COUNT)
    split(a)
    a.op(ops.WRMSR)
    a.ret()


def interrupt_handlers(a: Assembler, path: Path) -> None:
    """What the host's IDT leads to: `timer_…`, `wire_interrupt`, and `kick_…`, `disk_…`, `device_…` if need be."""
    bodies: dict[str, Callable[[Assembler, Path], None]] = {"timer_interrupt": expire, "wire_interrupt": wire}
    if path.remote:
        bodies["kick_interrupt"] = several.kicked
    if path.vmm.apicv:
        bodies["posted_interrupt"] = posted.notified
    if path.vmm.swap.on:
        from vtsim.vmm.programs import swap  # which needs this module

        bodies["disk_interrupt"] = swap.complete
    for number in range(path.addresses.get("assigned_count", 0)):
        bodies[f"device_interrupt_{number}"] = partial(from_device, number=number)
    for name, body in bodies.items():
        a.label(name)
        a.activity = ops.INTERRUPT_PATH
        a.sub(RSP, FRAME)
        a.stm(Mem(RSP), ALL)
        a.ld(RAX, Mem(RSP, FRAME + 8), comment="CS")
        a.test(RAX, 3)
        a.jcc(ops.CC_Z, f"{name}_from_kernel")
        a.op(ops.SWAPGS)
        mitigations.interrupted_user(a, path)
        a.label(f"{name}_from_kernel")
        work(a, path, "interrupt_entry")
        body(a, path)
        a.mov(RCX, MSR_EOI)
        zero(a, RAX)
        zero(a, RDX)
        a.op(ops.WRMSR)
        work(a, path, "interrupt_exit")
        a.ld(RAX, Mem(RSP, FRAME + 8))
        a.test(RAX, 3)
        a.jcc(ops.CC_Z, f"{name}_to_kernel")
        mitigations.return_to_user(a, path)
        a.op(ops.SWAPGS)
        a.label(f"{name}_to_kernel")
        a.ldm(Mem(RSP), ALL)
        a.add(RSP, FRAME)
        a.op(ops.IRET)


def expire(a: Assembler, path: Path) -> None:
    """Every virtual timer whose deadline has passed requests its vector; the tick asks for the scheduler."""
    now(a)
    a.copy(R14, RAX)
    a.ld(R12, cpu("SELF"))
    a.ld(R13, cpu("COUNT"))
    a.label("expire_next")
    a.ld(R15, Mem(R12, at.C["LIST"]))
    for daemon in daemons(path):
        call_daemon(a, path, daemon)
    a.ld(RAX, vcpu("DEADLINE"))
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_Z, "expire_later")
    a.cmp(RAX, register=R14)
    a.jcc(ops.CC_A, "expire_later")
    work(a, path, "expire_timer")
    zero(a, RCX)
    a.ld(RDX, vcpu("TIMER_PERIOD"))
    a.test(RDX, register=RDX)
    a.jcc(ops.CC_Z, "expire_once")
    a.copy(RCX, RAX)
    a.add(RCX, register=RDX)
    a.label("expire_once")
    a.st(vcpu("DEADLINE"), RCX)
    zero(a, RCX)
    a.st(vcpu("TSC_DEADLINE"), RCX)
    upcalls.expire(a, path)
    a.ld(RSI, vcpu("TIMER_LVT"))
    a.test(RSI, MASKED)
    a.jcc(ops.CC_NZ, "expire_later")
    a.and_(RSI, 0xFF)
    a.lea(RDI, vcpu(posted.requested(path)))
    a.hook(hooks.SET_BIT)
    a.call("wake")
    a.label("expire_later")
    a.add(R12, 8)
    a.sub(R13, 1)
    a.jcc(ops.CC_NZ, "expire_next")
    a.ld(RAX, cpu("TICK_AT"))
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_Z, "no_tick")
    a.cmp(RAX, register=R14)
    a.jcc(ops.CC_A, "no_tick")
    work(a, path, "scheduler_tick")
    a.add(RAX, path.addresses["tick_cycles"])
    a.st(cpu("TICK_AT"), RAX)
    want_cpu(a)
    a.label("no_tick")
    a.call("program_timer")


def call_daemon(a: Assembler, path: Path, daemon: Daemon) -> None:
    """A daemon of the vCPU in R15 has something to do when its time has passed (now: R14). Changes RAX.

    The VM's other vCPUs do not wait for it to find an end of its halt: it is woken for the daemon, and halts again.
    """
    a.ld(RAX, vcpu(daemon.at))
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_Z, f"{daemon.label}_later")
    a.cmp(RAX, register=R14)
    a.jcc(ops.CC_A, f"{daemon.label}_later")
    zero(a, RAX)
    a.st(vcpu(daemon.at), RAX)
    a.st_value(vcpu(daemon.due), 1)
    request(a)
    if path.several:
        a.ld(RAX, vcpu("STATE"))
        a.cmp(RAX, at.HALTED)
        a.jcc(ops.CC_NZ, f"{daemon.label}_later")
        a.st_value(vcpu("WOKEN_BY"), 1)
        a.call("wake")
    a.label(f"{daemon.label}_later")


def begin_daemon(a: Assembler, path: Path, daemon: Daemon) -> None:
    """The first lines of what a daemon does, with interrupts on. Changes RAX."""
    a.label(daemon.label)
    a.activity = ops.MEMORY_MANAGEMENT
    several.left_guest(a, path)
    several.because(a, path, daemon.cause)
    a.op(ops.STI)
    zero(a, RAX)
    a.st(vcpu(daemon.due), RAX)


def end_daemon(a: Assembler, path: Path, daemon: Daemon, period: str) -> None:
    """It goes on when a period, one of `path.addresses`, has passed."""
    now(a)
    a.add(RAX, path.addresses[period])
    a.op(ops.CLI)
    a.st(vcpu(daemon.at), RAX)
    a.call("program_timer")
    a.jmp("reenter")


def write_initial_count(a: Assembler, path: Path) -> None:
    """`apic_initial`: value in RAX."""
    a.label("apic_initial")
    a.and_(RAX, LOW)
    a.st(vcpu("TIMER_INITIAL"), RAX)
    a.ld(RDX, vcpu("UNTIMED"))
    a.test(RDX, register=RDX)
    a.jcc(ops.CC_NZ, "apic_written")
    zero(a, RCX)
    a.ld(RDX, vcpu("TIMER_LVT"))
    a.test(RDX, DEADLINE_MODE)
    a.jcc(ops.CC_NZ, "apic_written")
    a.test(RDX, 1 << 17)
    a.jcc(ops.CC_Z, "apic_one_shot")
    a.copy(RCX, RAX)
    a.label("apic_one_shot")
    a.st(vcpu("TIMER_PERIOD"), RCX)
    a.copy(RBX, RAX)
    a.test(RBX, register=RBX)
    a.jcc(ops.CC_Z, "apic_armed")
    now(a)
    a.add(RBX, register=RAX)
    a.label("apic_armed")
    a.st(vcpu("DEADLINE"), RBX)
    a.call("program_timer")
    a.jmp("apic_written")


def write_tsc_deadline(a: Assembler, path: Path) -> None:
    """`write_tsc_deadline`: value in RAX, in the guest's time."""
    a.label("write_tsc_deadline")
    work(a, path, "start_timer")
    a.st(vcpu("TSC_DEADLINE"), RAX)
    a.ld(RDX, vcpu("UNTIMED"))
    a.test(RDX, register=RDX)
    a.jcc(ops.CC_NZ, "skip")
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_Z, "deadline_known")
    a.ld(RCX, vcpu("TSC_OFFSET"))
    a.sub(RAX, register=RCX)
    a.label("deadline_known")
    a.st(vcpu("DEADLINE"), RAX)
    zero(a, RAX)
    a.st(vcpu("TIMER_PERIOD"), RAX)
    a.call("program_timer")
    a.jmp("skip")


def wake(a: Assembler, path: Path) -> None:
    """Subroutine: the vCPU in R15 has an event; let it run."""
    a.label("wake")
    request(a)
    a.ld(RAX, vcpu("STATE"))
    a.cmp(RAX, at.HALTED)
    a.jcc(ops.CC_NZ, "awake")
    work(a, path, "wake_up")
    posted.notify_here(a, path, at.POSTED_VECTOR)
    a.st_value(vcpu("STATE"), at.RUNNABLE)
    want_cpu(a)
    a.label("awake")
    a.ret()


def want_cpu(a: Assembler) -> None:
    """Let the thread that runs give up the CPU before it enters its guest; RAX changes."""
    a.st_value(cpu("RESCHEDULE"), 1)
    a.ld(RAX, cpu("CURRENT"))
    a.st_value(Mem(RAX, at.V["REQUEST"]), at.REQUEST_EVENTS)
