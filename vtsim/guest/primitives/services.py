"""Loops of system calls on files, of signals, and of whole processes, with their arguments on the user's stack."""

from __future__ import annotations

from typing import Final

from vtsim.cpu import ops
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.guest import services as spec
from vtsim.guest.kernel import layout
from vtsim.guest.primitives import OWN, Stage, again, counted_in_r12, lowering, registers
from vtsim.guest.primitives.processes import PAGE, call, touch

BUFFER_BYTES: Final = 256  # on the user's stack: what a system call reads, or fills
NULL_DESCRIPTORS: Final = (0, 1)
OPENED: Final = "opened"  # a label: where a process sees the descriptor that it got


def _names(a: Assembler, components: int) -> None:
    """The path on the stack, R13 where it begins; a buffer below it, R14. The stack's page is touched with them."""
    for name in range(components, 0, -1):
        a.push(value=name)
    a.copy(s.R13, s.RSP)
    a.sub(s.RSP, BUFFER_BYTES)
    a.copy(s.R14, s.RSP)
    a.st_value(Mem(s.R14), 0)


def _drop(a: Assembler, components: int) -> None:
    a.add(s.RSP, BUFFER_BYTES + 8 * components)


@lowering(spec.NullIoSpec)
def null_io(a: Assembler, phase: spec.NullIoSpec, at: Stage) -> None:
    """Read and write of one byte."""
    _names(a, 0)
    label = counted_in_r12(a, at, at.scaled(phase.iterations))
    for number, descriptor in zip((layout.CALL_READ, layout.CALL_WRITE), NULL_DESCRIPTORS, strict=True):
        a.mov(s.RDI, descriptor)
        a.copy(s.RSI, s.R14)
        call(a, number)
    again(a, label)
    _drop(a, 0)


@lowering(spec.StatSpec)
def stat(a: Assembler, phase: spec.StatSpec, at: Stage) -> None:
    """What stat fills is on the stack."""
    _names(a, phase.components)
    label = counted_in_r12(a, at, at.scaled(phase.iterations))
    a.copy(s.RDI, s.R13)
    a.mov(s.RSI, phase.components)
    a.copy(s.RDX, s.R14)
    call(a, layout.CALL_STAT)
    again(a, label)
    _drop(a, phase.components)


@lowering(spec.OpenCloseSpec)
def open_close(a: Assembler, phase: spec.OpenCloseSpec, at: Stage) -> None:
    """Open, and close of the descriptor that it gives."""
    _names(a, phase.components)
    label = counted_in_r12(a, at, at.scaled(phase.iterations))
    a.copy(s.RDI, s.R13)
    a.mov(s.RSI, phase.components)
    call(a, layout.CALL_OPEN)
    a.label(at.label(OPENED))
    a.copy(s.RDI, s.RAX)
    call(a, layout.CALL_CLOSE)
    again(a, label)
    _drop(a, phase.components)


@lowering(spec.SelectSpec)
def select(a: Assembler, phase: spec.SelectSpec, at: Stage) -> None:
    """The sets of descriptors are on the stack."""
    _names(a, 0)
    label = counted_in_r12(a, at, at.scaled(phase.iterations))
    a.mov(s.RDI, phase.sockets)
    a.copy(s.RSI, s.R14)
    a.mov(s.RDX, int(phase.ordinary))
    call(a, layout.CALL_SELECT)
    again(a, label)
    _drop(a, 0)


def _install(a: Assembler, handler: str | int) -> None:
    """Install a handler: the four words of a struct sigaction are on the stack."""
    for _ in ("mask", "restorer", "flags"):
        a.push(value=0)
    a.mov(s.RAX, handler)
    a.push(s.RAX)
    a.copy(s.RDI, s.RSP)
    call(a, layout.CALL_SIGACTION)
    a.add(s.RSP, 32)


@lowering(spec.SignalInstallSpec)
def signal_install(a: Assembler, phase: spec.SignalInstallSpec, at: Stage) -> None:
    """The struct sigaction is written once; the kernel exchanges it with the old one each time."""
    for _ in range(4):
        a.push(value=0)
    label = counted_in_r12(a, at, at.scaled(phase.iterations))
    a.copy(s.RDI, s.RSP)
    call(a, layout.CALL_SIGACTION)
    again(a, label)
    a.add(s.RSP, 32)


@lowering(spec.SignalHandleSpec)
def signal_handle(a: Assembler, phase: spec.SignalHandleSpec, at: Stage) -> None:
    """The handler is a store and the call that ends it."""
    _install(a, at.label("handler"))
    label = counted_in_r12(a, at, at.scaled(phase.iterations))
    a.mov(s.RDI, 0 if phase.null else layout.SIGUSR1)
    call(a, layout.CALL_KILL)
    again(a, label)
    a.jmp(at.label("handled"))
    a.label(at.label("handler"))
    a.push(value=0)
    a.add(s.RSP, 8)
    call(a, layout.CALL_SIGRETURN)
    a.label(at.label("handled"))
    _install(a, 0)


@lowering(spec.ProtectionFaultSpec)
def protection_fault(a: Assembler, phase: spec.ProtectionFaultSpec, at: Stage) -> None:
    """The store is tried again by each return of the handler, which jumps on in place of the last one."""
    _install(a, at.label("handler"))
    a.push(value=at.scaled(phase.iterations))
    a.copy(s.R13, s.RSP)
    a.mov(s.RBX, layout.USER_TEXT)
    a.st(Mem(s.RBX), s.RBX)
    a.label(at.label("handler"))
    a.ld(s.RAX, Mem(s.R13))
    a.sub(s.RAX, 1)
    a.st(Mem(s.R13), s.RAX)
    a.jcc(ops.CC_Z, at.label("enough"))
    call(a, layout.CALL_SIGRETURN)
    a.label(at.label("enough"))
    a.copy(s.RSP, s.R13)
    a.add(s.RSP, 8)
    _install(a, 0)


@lowering(spec.LifeSpec, memory=OWN, region=lambda phase: max(phase.pages, phase.fresh) * PAGE)
def process(a: Assembler, phase: spec.LifeSpec, at: Stage) -> None:
    """The parent has its pages already; the child writes some, becomes programs that write others, and ends."""
    touch(a, at, phase.pages)
    label = counted_in_r12(a, at, at.scaled(phase.iterations))
    call(a, layout.CALL_FORK)
    a.test(s.RAX, -1)
    a.jcc(ops.CC_NZ, at.label("parent"))
    if phase.written:
        touch(a, at, phase.written)
    for _ in range(phase.images):
        call(a, layout.CALL_EXEC)
        if phase.fresh:
            touch(a, at, phase.fresh)
        if phase.work:
            registers(a, {s.RCX: phase.work})
            a.emit(ops.LONG_WORK, length=64)
    call(a, layout.CALL_EXIT)
    a.label(at.label("parent"))
    call(a, layout.CALL_WAIT)
    if phase.written:
        touch(a, at, phase.written)
    again(a, label)
