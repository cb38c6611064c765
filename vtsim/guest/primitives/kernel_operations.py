"""Loops of one operation of the guest's kernel each, where it has a handler or a table of its own to do with.

SDM: "Exceptions and Interrupts".
"""

from __future__ import annotations

from typing import Final

from vtsim.cpu import ops
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.kernels import hooks
from vtsim.ept import spec as e
from vtsim.guest import kernel_operations as spec
from vtsim.guest.kernel import hypercalls, layout
from vtsim.guest.primitives import OWN, Stage, again, counted, counted_in_r12, lowering, registers
from vtsim.guest.primitives.processes import touch

NOTHING_THERE: Final = layout.P2M - (1 << 39)  # a linear address that no kernel here maps
CONFIG_ADDRESS, CONFIG_DATA, ENABLED = 0xCF8, 0xCFC, 1 << 31
AVAILABLE: Final = 1 << 9  # a bit of an entry that processors ignore


@lowering(spec.EmptySpec, ring=0)
def empty(a: Assembler, phase: spec.EmptySpec, at: Stage) -> None:
    """LOOP to itself, in ring 0."""
    a.loop(counted(a, at, at.scaled(phase.iterations)))


@lowering(spec.CallReturnSpec, ring=0)
def call_return(a: Assembler, phase: spec.CallReturnSpec, at: Stage) -> None:
    """CALL and RET, in ring 0."""
    label = counted(a, at, at.scaled(phase.iterations))
    a.call(at.label("subroutine"))
    a.loop(label)
    a.jmp(at.label("called"))
    a.label(at.label("subroutine"))
    a.ret()
    a.label(at.label("called"))


def expecting_exceptions(a: Assembler, at: Stage, going_on: str | int) -> None:
    """Tell the kernel where it goes on after an exception of its own. Clobbers RAX and RDX."""
    a.ld(s.RAX, layout.cpu_word(layout.CURRENT))
    a.mov(s.RDX, going_on)
    a.st(Mem(s.RAX, layout.T_FIXUP), s.RDX)


@lowering(spec.DivideErrorSpec, ring=0)
def divide_error(a: Assembler, phase: spec.DivideErrorSpec, at: Stage) -> None:
    """DIV by R8, which is zero; the handler returns behind it."""
    expecting_exceptions(a, at, at.label("divided"))
    a.mov(s.R8, 0)
    label = counted(a, at, at.scaled(phase.iterations))
    a.op(ops.DIVIDE, r2=s.R8, mem=Mem(attributes=ops.MEM_DECODED | ops.MEM_REGISTER))
    a.label(at.label("divided"))
    a.loop(label)
    expecting_exceptions(a, at, 0)


@lowering(spec.InvalidOpcodeSpec, ring=0)
def invalid_opcode(a: Assembler, phase: spec.InvalidOpcodeSpec, at: Stage) -> None:
    """UD2; the handler returns behind it."""
    expecting_exceptions(a, at, at.label("refused"))
    label = counted(a, at, at.scaled(phase.iterations))
    a.op(ops.UD)
    a.label(at.label("refused"))
    a.loop(label)
    expecting_exceptions(a, at, 0)


@lowering(spec.KernelFaultSpec, ring=0)
def kernel_fault(a: Assembler, phase: spec.KernelFaultSpec, at: Stage) -> None:
    """A load that faults; the handler returns behind it."""
    expecting_exceptions(a, at, at.label("loaded"))
    a.mov(s.R8, NOTHING_THERE)
    label = counted(a, at, at.scaled(phase.iterations))
    a.ld(s.RAX, Mem(s.R8))
    a.label(at.label("loaded"))
    a.loop(label)
    expecting_exceptions(a, at, 0)


@lowering(spec.ConfigReadSpec, ring=0)
def config_read(a: Assembler, phase: spec.ConfigReadSpec, at: Stage) -> None:
    """OUT to CONFIG_ADDRESS, IN from CONFIG_DATA: two exits with a MOV between them."""
    label = counted(a, at, at.scaled(phase.iterations))
    registers(a, {s.RDX: CONFIG_ADDRESS, s.RAX: ENABLED})
    a.op(ops.OUT, r2=s.RDX, mem=Mem(size=4))
    a.mov(s.RDX, CONFIG_DATA)
    a.op(ops.IN, r2=s.RDX, mem=Mem(size=4))
    a.loop(label)


def touch_page(a: Assembler, phase: spec.PteWriteSpec, at: Stage) -> None:
    """The process writes its page, so that it is mapped and tables of a hypervisor know it; RDI <- its address."""
    touch(a, at, 1)
    a.mov(s.RDI, at.base)


@lowering(spec.PteWriteSpec, ring=0, memory=OWN, before=touch_page)
def pte_write(a: Assembler, phase: spec.PteWriteSpec, at: Stage) -> None:
    """Two stores a round to the entry of the page at RDI: with a bit that only software uses, and without.

    A paravirtual kernel makes a request of each and sends it, as Linux does under Xen (__xen_set_pte).
    """
    times = -(-at.scaled(phase.iterations) // 2)
    a.ld(s.RBX, layout.cpu_word(layout.CURRENT))
    a.copy(s.RSI, s.RDI)
    if at.paravirtual:
        hypercalls.look_up(a)
        a.copy(s.R13, s.R11)
    else:
        a.ld(s.RDI, Mem(s.RBX, layout.T_ROOT))
        registers(a, {s.R8: at.direct, s.R10: e.PTE_PRESENT})
        a.hook(hooks.TABLE_LOOKUP)
        a.copy(s.RBX, s.RCX)
    a.copy(s.RDX, s.RAX)
    a.or_(s.RDX, AVAILABLE)
    if at.paravirtual:
        a.copy(s.R14, s.RAX)
        label = counted_in_r12(a, at, times)
        for value in (s.RDX, s.R14):
            a.copy(s.RDI, s.R13)
            a.copy(s.RSI, value)
            a.call("pv_request")
            a.call("pv_send")
        again(a, label)
        return
    label = counted(a, at, times)
    a.st(Mem(s.RBX, size=at.entry_bytes), s.RDX)
    a.st(Mem(s.RBX, size=at.entry_bytes), s.RAX)
    a.loop(label)
