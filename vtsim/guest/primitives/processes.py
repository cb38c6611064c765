"""What applications ask of the kernel: system calls, faults, new address spaces, switches, sleep."""

from __future__ import annotations

from vtsim.cpu import ops
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler
from vtsim.guest import spec
from vtsim.guest.kernel import layout
from vtsim.guest.primitives import OWN, Stage, again, counted_in_r12, enter_kernel, lowering, registers

PAGE = 4096
WORD = 4  # an int of the array that lat_ctx sums
NS = 1_000_000_000


def call(a: Assembler, number: int) -> None:
    """A system call; its arguments are in RDI and RSI."""
    a.mov(s.RAX, number)
    enter_kernel(a)


def touch(a: Assembler, at: Stage, pages: int) -> None:
    """Write to so many pages from the region's beginning on."""
    values = {s.RSI: at.base, s.RDX: pages * PAGE, s.RDI: 0, s.RBX: 1, s.R8: PAGE, s.RCX: pages}
    registers(a, values)
    a.emit(ops.STREAM, imm=ops.STRIDED | 1024 << ops.STREAM_WRITES)


@lowering(spec.SyscallSpec)
def syscall(a: Assembler, phase: spec.SyscallSpec, at: Stage) -> None:
    """SYSCALL with the number in RAX; the kernel spends what RDI says. SYSCALL overwrites RCX and R11."""
    a.mov(s.RDI, phase.work)
    label = counted_in_r12(a, at, at.scaled(phase.iterations))
    call(a, phase.number)
    again(a, label)


@lowering(spec.ContextSwitchSpec)
def context_switch(a: Assembler, phase: spec.ContextSwitchSpec, at: Stage) -> None:
    """A system call that gives up the CPU."""
    label = counted_in_r12(a, at, at.scaled(phase.iterations))
    if phase.work:
        a.mov(s.RCX, phase.work)
        a.emit(ops.LONG_WORK, length=64)
    if phase.region:
        registers(
            a, {s.RSI: at.base, s.RDX: phase.region, s.RDI: 0, s.RBX: 1, s.R8: WORD, s.RCX: -(-phase.region // WORD)}
        )
        a.emit(ops.STREAM, imm=ops.SEQUENTIAL)
    call(a, layout.CALL_YIELD)
    again(a, label)


@lowering(spec.IdleSpec)
def idle(a: Assembler, phase: spec.IdleSpec, at: Stage) -> None:
    """A system call that sleeps: the kernel's idle loop runs if nobody else wants the CPU."""
    a.mov(s.RDI, max(1, at.scaled(phase.duration) * at.profile.clock_hz // NS))
    call(a, layout.CALL_SLEEP)


@lowering(spec.BalloonSpec)
def balloon(a: Assembler, phase: spec.BalloonSpec, at: Stage) -> None:
    """A system call that makes the balloon as large as the host demands, then one that sleeps."""
    label = counted_in_r12(a, at, at.scaled(phase.iterations))
    call(a, layout.CALL_BALLOON)
    a.mov(s.RDI, max(1, phase.period * at.profile.clock_hz // NS))
    call(a, layout.CALL_SLEEP)
    again(a, label)


def pages_of(phase: spec.PageFaultSpec | spec.ProtectSpec) -> int:
    """How many pages are touched."""
    return -(-phase.region // PAGE)


@lowering(spec.PageFaultSpec, memory=OWN)
def page_fault(a: Assembler, phase: spec.PageFaultSpec, at: Stage) -> None:
    """A write to each page of the region, each a page fault, then a system call that unmaps them all."""
    label = counted_in_r12(a, at, at.scaled(phase.iterations))
    touch(a, at, pages_of(phase))
    registers(a, {s.RDI: at.base, s.RSI: pages_of(phase)})
    call(a, layout.CALL_UNMAP)
    again(a, label)


@lowering(spec.ProtectSpec, memory=OWN)
def protect(a: Assembler, phase: spec.ProtectSpec, at: Stage) -> None:
    """A write to each page of the region, then two system calls: read-only, and writable again."""
    label = counted_in_r12(a, at, at.scaled(phase.iterations))
    touch(a, at, pages_of(phase))
    for writable in (0, 1):
        registers(a, {s.RDI: at.base, s.RSI: pages_of(phase), s.RDX: writable})
        call(a, layout.CALL_PROTECT)
    again(a, label)


@lowering(spec.ForkSpec, memory=OWN, region=lambda phase: phase.pages * PAGE)
def fork(a: Assembler, phase: spec.ForkSpec, at: Stage) -> None:
    """The parent writes its pages, forks and waits; the child writes them too, each a copy, and exits."""
    _children(a, phase, at)


@lowering(spec.ExecSpec, memory=OWN, region=lambda phase: phase.pages * PAGE)
def exec_(a: Assembler, phase: spec.ExecSpec, at: Stage) -> None:
    """The same, but the child replaces its image before it writes: each page is fresh."""
    _children(a, phase, at, layout.CALL_EXEC)


def _children(a: Assembler, phase: spec.ForkSpec, at: Stage, *calls: int) -> None:
    label = counted_in_r12(a, at, at.scaled(phase.iterations))
    touch(a, at, phase.pages)
    call(a, layout.CALL_FORK)
    a.test(s.RAX, -1)
    a.jcc(ops.CC_NZ, at.label("parent"))
    for number in calls:
        call(a, number)
    touch(a, at, phase.pages)
    call(a, layout.CALL_EXIT)
    a.label(at.label("parent"))
    call(a, layout.CALL_WAIT)
    again(a, label)
