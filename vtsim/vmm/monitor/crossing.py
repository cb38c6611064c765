"""Between a guest and a program in ring 0 that has no VT-x: the ways in and out, interrupts, gates, system calls.

The monitor, the paravirtual hypervisor and software CPUs share these stretches. R15 is the vCPU, whose structure stands
above the frame that the processor leaves on the program's stack.

SDM: "64-Bit Mode Stack Frame"; "Fast System Calls in 64-Bit Mode"; "Interrupt Stack Table".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from vtsim.cpu import ops
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.kernels import hooks
from vtsim.cpu.slots import R9, R15, RAX, RBX, RCX, RDI, RDX, RSI, RSP
from vtsim.cpu.visible import EXCEPTION
from vtsim.vmm.monitor import layout as at
from vtsim.vmm.monitor.layout import F_RIP, F_RSP, V, saved, vcpu

ALL: Final = tuple(range(16))
BELOW_STACK_POINTER: Final = [register for register in ALL if register < RSP]
ABOVE_STACK_POINTER: Final = [register for register in ALL if register > RSP]
VECTORS: Final = 32
WITH_ERROR: Final = (8, 10, 11, 12, 13, 14, 17, 21)
INVALID_OPCODE, GENERAL_PROTECTION, PAGE_FAULT = 6, 13, 14
X2APIC_EOI, X2APIC_SPURIOUS, X2APIC_SELF_IPI = 0x80B, 0x80F, 0x83F
APIC_ENABLED: Final = 0x1FF
RING_3: Final = 3


def write_msr(a: Assembler, msr: int, value: int) -> None:
    """WRMSR of a 32-bit constant. Clobbers RAX, RCX, RDX."""
    a.mov(RCX, msr)
    a.mov(RAX, value)
    a.mov(RDX, 0)
    a.op(ops.WRMSR)


def ends(a: Assembler) -> None:
    """`ended`: the guest came to its end. `die`: it ends because of RAX."""
    a.label("ended")
    a.mov(RAX, at.FINISHED)
    a.label("die")
    a.st(vcpu("DEATH"), RAX)
    a.op(ops.STOP_OP)


def die(a: Assembler, code: int) -> None:
    """End the VM."""
    a.mov(RAX, code)
    a.jmp("die")


def illegal(a: Assembler) -> None:
    """`illegal`: the guest ends, because nothing emulates operation RAX."""
    a.label("illegal")
    a.and_(RAX, 0xFF)
    a.st(vcpu("DEATH_OP"), RAX)
    die(a, at.ILLEGAL)


# --- in --------------------------------------------------------------------------------------------------------------
def from_ring_3(a: Assembler, above: int, otherwise: str) -> None:
    """To a label where what the processor interrupted, whose CS is `above` bytes above RSP, is not in ring 3."""
    a.push(RAX)
    a.ld(RAX, Mem(RSP, above + 8))
    a.test(RAX, RING_3)
    a.pop(RAX)
    a.jcc(ops.CC_Z, otherwise)


def save(a: Assembler, above: int) -> None:
    """All registers of the guest, after an exception; its vCPU, `above` bytes above RSP, becomes R15. Clobbers RAX."""
    a.stm(Mem(RSP, above + V["REGISTERS"]), ALL)
    a.lea(R15, Mem(RSP, above))
    a.ld(RAX, F_RSP)
    a.st(saved(RSP), RAX)


def save_but_stack_pointer(a: Assembler, above: int) -> None:
    """All registers of the guest but RSP, after SYSCALL; its vCPU, `above` bytes above RSP, becomes R15."""
    a.stm(Mem(RSP, above + V["REGISTERS"]), BELOW_STACK_POINTER)
    a.stm(Mem(RSP, above + V["REGISTERS"] + 8 * (RSP + 1)), ABOVE_STACK_POINTER)
    a.lea(R15, Mem(RSP, above))


# --- out -------------------------------------------------------------------------------------------------------------
def restore(a: Assembler, offset: int) -> None:
    """All registers of the guest but RSP, which leads to the vCPU's structure less `offset`."""
    first = offset + V["REGISTERS"]
    a.ldm(Mem(RSP, first), BELOW_STACK_POINTER)
    a.ldm(Mem(RSP, first + 8 * (RSP + 1)), ABOVE_STACK_POINTER)


def return_by_iret(a: Assembler) -> None:
    """To the guest, at what the frame says."""
    a.ld(RAX, saved(RSP))
    a.st(F_RSP, RAX)
    a.lea(RSP, Mem(R15, -at.FRAME_BYTES))
    restore(a, at.FRAME_BYTES)
    a.op(ops.IRET)


def return_by_sysret(a: Assembler) -> None:
    """To the guest, at what its RCX and R11 say."""
    a.copy(RSP, R15)
    restore(a, 0)
    a.ld(RSP, Mem(RSP, V["REGISTERS"] + 8 * RSP))
    a.op(ops.SYSRET)


def step_over(a: Assembler) -> None:
    """The guest goes on behind the instruction at F_RIP, whose length is known. Clobbers RAX and RCX."""
    a.ld(RAX, F_RIP)
    a.ld(RCX, vcpu("LENGTH"))
    a.add(RAX, register=RCX)
    a.st(F_RIP, RAX)


# --- instructions ----------------------------------------------------------------------------------------------------
def decode(a: Assembler, otherwise: str) -> None:
    """RAX <- operation at F_RIP, and its operands; to a label where there is none. Its length is remembered."""
    a.ld(RSI, F_RIP)
    a.copy(RDI, RSI)
    a.hook(hooks.DECODE)
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_S, otherwise)
    a.st(vcpu("LENGTH"), R9)


def take_interrupt_flag(a: Assembler, flags: int, other: int) -> None:
    """The interrupt flag of RFLAGS becomes what the guest believes."""
    a.copy(other, flags)
    a.shr(other, 9)
    a.and_(other, 1)
    a.st(vcpu("INTERRUPTS"), other)


# --- interrupts ------------------------------------------------------------------------------------------------------
def take_interrupt(a: Assembler) -> None:
    """Acknowledge the physical interrupt; the guest's waits. Clobbers RAX, RCX, RDX."""
    write_msr(a, X2APIC_EOI, 0)
    a.ld(RAX, vcpu("TIMER_LVT"))
    a.and_(RAX, 0xFF)
    a.st(vcpu("PENDING"), RAX)


def if_deliverable(a: Assembler, otherwise: str) -> None:
    """To a label while the guest takes no interrupt. Clobbers RAX."""
    a.ld(RAX, vcpu("INTERRUPTS"))
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_Z, otherwise)
    a.ld(RAX, vcpu("IN_SERVICE"))
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_NZ, otherwise)


def idle(a: Assembler) -> None:
    """The processor waits until something interrupts it."""
    a.op(ops.STI)
    a.op(ops.HLT)
    a.op(ops.CLI)


def wait_for_interrupt(a: Assembler, then: str, wait: Callable[[Assembler], None] = idle) -> None:
    """Wait in the guest's place, as `wait` writes it, until an interrupt is there for the guest; on to a label."""
    a.label("halted")
    a.ld(RAX, vcpu("PENDING"))
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_Z, "halt_more")
    a.ld(RAX, vcpu("INTERRUPTS"))
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_NZ, then)
    a.label("halt_more")
    wait(a)
    a.jmp("halted")


# --- exceptions ------------------------------------------------------------------------------------------------------
def show_exception(a: Assembler, vector: int, error: int, then: str) -> None:
    """The guest sees an exception, whose vector and error code (-1 none) are in registers; on to a label behind this.

    Clobbers RAX, RCX, RDX.
    """
    a.copy(RAX, error)
    a.copy(RCX, vector)
    a.mov(RDX, EXCEPTION)
    a.hook(hooks.SHOW)
    a.cmp(RCX, PAGE_FAULT)
    a.jcc(ops.CC_NZ, then)
    a.ld(RAX, vcpu("CR2"))
    a.mov(RDX, EXCEPTION | 1 << 8)
    a.hook(hooks.SHOW)


# --- gates and system calls of the guest -----------------------------------------------------------------------------
def through_gate(a: Assembler, other: int) -> None:
    """RBX <- where the guest's gate RAX, RCX leads; its selector becomes CS. Clobbers RCX, RDX and `other`."""
    a.copy(other, RAX)
    a.shr(other, 16)
    a.and_(other, 0xFFFC)
    a.st(vcpu("CS"), other)
    a.copy(RBX, RAX)
    a.and_(RBX, 0xFFFF)
    a.copy(RDX, RAX)
    a.shr(RDX, 48)
    a.shl(RDX, 16)
    a.or_(RBX, register=RDX)
    a.shl(RCX, 32)
    a.or_(RBX, register=RCX)


def mask_of_system_call(a: Assembler) -> None:
    """RAX <- the flags that stay at a system call; the guest's interrupt flag is cleared if FMASK says so."""
    a.ld(RAX, vcpu("FMASK"))
    a.test(RAX, at.RF_IF)
    a.jcc(ops.CC_Z, "system_call_flags")
    a.st_value(vcpu("INTERRUPTS"), 0)
    a.label("system_call_flags")
    a.emit(ops.XOR, RAX, imm=-1)


def segments_of_system_call(a: Assembler) -> None:
    """CS and SS of the guest's kernel, from STAR. Clobbers RAX."""
    a.ld(RAX, vcpu("STAR"))
    a.shr(RAX, 32)
    a.and_(RAX, 0xFFFC)
    a.st(vcpu("CS"), RAX)
    a.add(RAX, 8)
    a.st(vcpu("SS"), RAX)
