"""The virtual local APIC as the processor keeps it: virtual-interrupt delivery, and vectors posted into a descriptor.

Whoever requests a vector sets its bit in the vCPU's descriptor; a vCPU on another CPU is notified, which takes no VM
exit while it is in its guest. On its way into the guest the vCPU moves what was posted into the virtual-APIC page and
says which vector is the highest; all else is the processor's: priorities, delivery, the end of an interrupt, and with
IPI virtualization interrupts to other vCPUs. While a vCPU is halted, its notifications have the vector that wakes it.

SDM: "Virtual-Interrupt Delivery"; "Posted-Interrupt Processing"; "IPI Virtualization".
A remapping unit that posts interrupts of devices is one of those who request; nobody is notified of them while their
vCPU waits for its CPU.

VT-d: "Interrupt-Posting Hardware Operation".
Not modelled: level-triggered interrupts, whose EOI exits; vCPUs that move to another CPU.
"""

from __future__ import annotations

from typing import Final

from vtsim.cpu import ops
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.kernels import hooks
from vtsim.cpu.slots import R12, R13, R14, R15, RAX, RBX, RCX, RDI, RDX, RSI
from vtsim.vmm import layout as at
from vtsim.vmm.programs.words import vcpu, zero
from vtsim.vmm.registry import Path

MSR_ICR: Final = 0x830
OUTSTANDING_BIT, SUPPRESSED_BIT = 256, 257  # of the descriptor, seen as a bit string
NOTIFICATION: Final = 4  # its word with that bit, vector and destination
VECTOR_BYTE: Final = 2  # in that word
PAGE_IRR, PAGE_PPR = 0x200, 0xA0  # in the virtual-APIC page


def requested(path: Path) -> str:
    """The word of a vCPU from which on vectors are requested."""
    return "POSTED" if path.vmm.apicv else "IRR"


def notification(cpu_number: int) -> int:
    """The last word of a descriptor: notify a CPU."""
    return at.POSTED_VECTOR << 16 | cpu_number << 32


def notify_here(a: Assembler, path: Path, vector: int) -> None:
    """Notifications of the vCPU in R15 have this vector from now on."""
    if path.vmm.apicv and path.remote:
        a.st_value(Mem(R15, at.V["POSTED"] + 8 * NOTIFICATION + VECTOR_BYTE, size=1), vector)


def jump_if_posted(a: Assembler, path: Path, then: str) -> None:
    """To `then` if a notification of the vCPU in R15 is outstanding. Changes RAX."""
    if path.vmm.apicv:
        a.ld(RAX, vcpu("POSTED", NOTIFICATION))
        a.test(RAX, 1)
        a.jcc(ops.CC_NZ, then)


def no_longer_outstanding(a: Assembler, path: Path) -> None:
    """The vCPU in R15 has seen its notification. Changes RAX, RDI and RSI."""
    if path.vmm.apicv:
        _descriptor_bit(a, OUTSTANDING_BIT, hooks.CLEAR_BIT)


def suppress(a: Assembler, path: Path) -> None:
    """The vCPU in R15 gives up its CPU to another: if it waits for the CPU, nobody need be told of what is posted.

    Changes RAX, RDI and RSI.
    """
    if path.vmm.posted_interrupts:
        a.ld(RAX, vcpu("STATE"))
        a.cmp(RAX, at.HALTED)
        a.jcc(ops.CC_Z, "not_suppressed")
        _descriptor_bit(a, SUPPRESSED_BIT, hooks.SET_BIT)
        a.label("not_suppressed")


def resume(a: Assembler, path: Path) -> None:
    """The vCPU in R15 gets its CPU: notifications come again, and what was posted is one. Changes as above."""
    if path.vmm.posted_interrupts:
        _descriptor_bit(a, SUPPRESSED_BIT, hooks.CLEAR_BIT)
        for word in range(4):
            a.ld(RAX, vcpu("POSTED", word))
            a.test(RAX, register=RAX)
            a.jcc(ops.CC_NZ, "posted_meanwhile")
        a.jmp("nothing_posted")
        a.label("posted_meanwhile")
        _descriptor_bit(a, OUTSTANDING_BIT, hooks.SET_BIT)
        a.label("nothing_posted")


def _descriptor_bit(a: Assembler, bit: int, hook: int) -> None:
    a.lea(RDI, vcpu("POSTED"))
    a.mov(RSI, bit)
    a.hook(hook)


def take_posted(a: Assembler, path: Path) -> None:
    """Subroutine: move posted vectors into the virtual-APIC page. Changes all registers but RSP, R13, R14 and R15."""
    a.label("take_posted")
    a.activity = ops.INJECTION
    no_longer_outstanding(a, path)
    a.ld(RDX, vcpu("APIC_PAGE"))
    for word in range(4):
        a.ld(RBX, vcpu("POSTED", word))
        a.st(vcpu("IRR", word), RBX)
        a.test(RBX, register=RBX)
        a.jcc(ops.CC_Z, f"posted_{word}")
        zero(a, RAX)
        a.sub(RAX, register=RBX)
        a.xadd(vcpu("POSTED", word), RAX)  # others may set more bits meanwhile
        for half in range(2):
            register = Mem(RDX, PAGE_IRR + 16 * (2 * word + half), size=4)
            a.ld(RAX, register)
            a.or_(RAX, register=RBX)
            a.st(register, RAX)
            a.shr(RBX, 32)
        a.label(f"posted_{word}")
    a.lea(RDI, vcpu("IRR"))
    a.hook(hooks.HIGHEST_BIT)
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_S, "posted_taken")
    a.vmread(RBX, "GUEST_INTERRUPT_STATUS")
    a.copy(RCX, RBX)
    a.and_(RCX, 0xFF)
    a.cmp(RCX, register=RAX)
    a.jcc(ops.CC_AE, "posted_taken")
    a.and_(RBX, 0xFF00)
    a.or_(RBX, register=RAX)
    a.vmwrite("GUEST_INTERRUPT_STATUS", RBX)
    a.label("posted_taken")
    a.ret()


def evaluate(a: Assembler, path: Path) -> None:
    """The part of `requests` behind an injected exception: the processor delivers what is in the page."""
    a.call("take_posted")
    a.jmp("requests_done")


def pending(a: Assembler, path: Path) -> None:
    """Subroutine `pending_vector`: R12 the highest requested vector or -1, R13 its class, R14 the processor's class."""
    a.label("pending_vector")
    a.call("take_posted")
    a.vmread(R12, "GUEST_INTERRUPT_STATUS")
    a.and_(R12, 0xFF)
    a.copy(R13, R12)
    a.and_(R13, 0xF0)
    a.ld(RCX, vcpu("APIC_PAGE"))
    a.ld(R14, Mem(RCX, PAGE_PPR, size=4))
    a.and_(R14, 0xF0)
    a.test(R12, register=R12)
    a.jcc(ops.CC_NZ, "vector_pends")
    a.mov(R12, -1)
    a.label("vector_pends")
    a.ret()


def send(a: Assembler, path: Path) -> None:
    """Post the vector in RBX to the vCPU at RDI, and notify it unless that was done. Changes RAX, RCX, RDX and RSI."""
    a.push(RDI)
    a.copy(RSI, RBX)
    a.and_(RSI, 0xFF)
    a.lea(RDI, Mem(RDI, at.V["POSTED"]))
    a.hook(hooks.SET_BIT)
    a.mov(RSI, OUTSTANDING_BIT)
    a.hook(hooks.SET_BIT)
    a.pop(RDI)
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_NZ, "command_sent")
    a.ld(RAX, Mem(RDI, at.V["IN_GUEST"]))
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_NZ, "post_notify")
    a.ld(RAX, Mem(RDI, at.V["STATE"]))
    a.cmp(RAX, at.HALTED)
    a.jcc(ops.CC_NZ, "command_sent")
    a.label("post_notify")
    word = at.V["POSTED"] + 8 * NOTIFICATION
    a.ld(RAX, Mem(RDI, word + VECTOR_BYTE, size=1))
    a.ld(RDX, Mem(RDI, at.V["CPU"]))
    a.mov(RCX, MSR_ICR)
    a.op(ops.WRMSR)
    a.label("command_sent")


def notified(a: Assembler, path: Path) -> None:
    """Part of the host's interrupt handler, which has nothing to do: it came while no guest ran, the way in looks."""
