"""Stores to pages that a view of memory protects, and the ways to make them.

SDM: "General Operation of the VMFUNC Instruction"; "VMCALL—Call to VM Monitor".
Not modelled: processes that switch views themselves, in ring 3; a view that a task keeps while others run.
"""

from __future__ import annotations

from typing import Final

from vtsim.cpu import ops
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.kernels import hooks
from vtsim.ept import spec as e
from vtsim.ept import views as w
from vtsim.guest.kernel import layout
from vtsim.guest.primitives import OWN, Stage, again, counted_in_r12, lowering, registers
from vtsim.guest.primitives.memory import LINE, PAGE, WORD, start_of_random
from vtsim.guest.primitives.processes import touch
from vtsim.guest.watched import BY_EXCEPTION, BY_VMFUNC, NOBODY, SWITCHING, WatchedStoresSpec

EPTP_SWITCHING: Final = 0  # VM function


def touch_all(a: Assembler, phase: WatchedStoresSpec, at: Stage) -> None:
    """The process writes to all pages of its thread, so that they are mapped; RDI <- where they begin."""
    touch(a, at, -(-phase.region_bytes // PAGE))
    a.mov(s.RDI, at.base)


def call(a: Assembler, number: int, **arguments: int) -> None:
    """A hypercall about views. RAX <- its answer."""
    registers(a, {{"view": s.RDI, "page": s.RDI, "what": s.RDX}[name]: value for name, value in arguments.items()})
    a.mov(s.RAX, number)
    a.op(ops.VMCALL)


def protect(a: Assembler, phase: WatchedStoresSpec, at: Stage, what: int) -> None:
    """What becomes of stores to the watched pages, which begin at R14, in the first view."""
    label = at.label(f"protect_{what}")
    a.ld(s.RBX, layout.cpu_word(layout.CURRENT))
    a.copy(s.R12, s.R14)
    a.mov(s.R13, phase.pages)
    a.label(label)
    a.ld(s.RDI, Mem(s.RBX, layout.T_ROOT))
    a.copy(s.RSI, s.R12)
    registers(a, {s.R8: at.direct, s.R10: e.PTE_PRESENT})
    a.hook(hooks.TABLE_LOOKUP)
    a.mov(s.RSI, e.ADDRESS)
    a.and_(s.RSI, register=s.RAX)
    call(a, w.PROTECT, view=w.RESTRICTED, what=what)
    a.add(s.R12, PAGE)
    a.sub(s.R13, 1)
    a.jcc(ops.CC_NZ, label)


def switch(a: Assembler, phase: WatchedStoresSpec, view: int | None) -> None:
    """To a view, or to that in RBP."""
    target = s.RCX if phase.by == BY_VMFUNC else s.RDI
    if view is None:
        a.copy(target, s.RBP)
    else:
        a.mov(target, view)
    if phase.by == BY_VMFUNC:
        a.mov(s.RAX, EPTP_SWITCHING)
        a.op(ops.VMFUNC)
    else:
        a.mov(s.RAX, w.SWITCH)
        a.op(ops.VMCALL)


@lowering(WatchedStoresSpec, ring=0, memory=OWN, before=touch_all)
def watched_stores(a: Assembler, phase: WatchedStoresSpec, at: Stage) -> None:
    """Groups of stores and loads; at the end what the pages hold is the system call's result.

    Interrupts are off while another view is in use: no other task may run in it. An interrupt that was held off comes
    between two groups.
    """
    watched = at.views > 1 and phase.by != NOBODY
    switching = watched and phase.by in SWITCHING
    a.copy(s.R14, s.RDI)
    if watched:
        if phase.by == BY_EXCEPTION:
            call(a, w.NOTIFY, page=at.exception_page - at.direct)
        protect(a, phase, at, w.RAISES if phase.by == BY_EXCEPTION else w.EXITS)
    step = LINE + (PAGE if phase.pages > 1 else 0)
    registers(a, {s.R13: 0, s.RBP: w.PERMISSIVE, s.RBX: start_of_random(at)})
    label = counted_in_r12(a, at, at.scaled(phase.iterations))
    if phase.loads:
        a.lea(s.RSI, Mem(s.R14, phase.watched_bytes))
        registers(a, {s.RDX: phase.region, s.RDI: 0, s.R8: WORD})
        a.mov(s.RCX, phase.loads)
        a.emit(ops.STREAM, imm=ops.UNIFORM)
    if switching:
        a.op(ops.CLI)
        switch(a, phase, phase.view)
    a.mov(s.R15, phase.stores)
    a.label(at.label("store"))
    a.st(Mem(s.R14, index=s.R13), s.R12)
    a.add(s.R13, step)
    a.cmp(s.R13, phase.watched_bytes)
    a.jcc(ops.CC_B, at.label("within"))
    a.sub(s.R13, phase.watched_bytes)
    a.label(at.label("within"))
    a.sub(s.R15, 1)
    a.jcc(ops.CC_NZ, at.label("store"))
    if switching:
        switch(a, phase, w.RESTRICTED)
        a.op(ops.STI)
        a.add(s.RBP, 1)
        a.cmp(s.RBP, at.views)
        a.jcc(ops.CC_B, at.label("turn"))
        a.mov(s.RBP, w.PERMISSIVE)
        a.label(at.label("turn"))
    again(a, label)
    if watched:
        protect(a, phase, at, w.ALLOWED)
        if phase.by == BY_EXCEPTION:
            call(a, w.NOTIFY, page=0)
    a.copy(s.RSI, s.R14)
    registers(a, {s.RAX: 0, s.RCX: phase.watched_bytes // LINE})
    a.label(at.label("sum"))
    a.lea(s.RAX, Mem(s.RAX, index=s.RAX, scale=2))
    a.ld(s.RDX, Mem(s.RSI))
    a.add(s.RAX, register=s.RDX)
    a.add(s.RSI, LINE)
    a.loop(at.label("sum"))
    a.ret()
