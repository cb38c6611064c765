"""The virtual local APIC in x2APIC mode: registers in a page, requests and service in the vCPU.

SDM: "Extended XAPIC (x2APIC)"; "Advanced Programmable Interrupt Controller (APIC)".
Not modelled: error reporting; the divide configuration of the timer.
"""

from __future__ import annotations

from typing import Final

from vtsim.cpu import ops
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.kernels import apic, hooks
from vtsim.cpu.slots import R12, R15, RAX, RBX, RCX, RDI, RDX, RSI
from vtsim.vmm import layout as at
from vtsim.vmm.programs import posted, several
from vtsim.vmm.programs.events import request
from vtsim.vmm.programs.timer import now
from vtsim.vmm.programs.words import LOW, vcpu, work, zero
from vtsim.vmm.registry import Path

FIRST_MSR, REGISTERS = 0x800, 0x40
VERSION: Final = 0x50014
SHORTHAND_OTHERS: Final = 3 << 18

# fmt: off
WRITES: Final = (
    (apic.REG_EOI,       "apic_eoi"),
    (apic.REG_TPR,       "apic_priority"),
    (apic.REG_LVT_TIMER, "apic_lvt_timer"),
    (apic.REG_INITIAL,   "apic_initial"),
    (apic.REG_SELF_IPI,  "apic_self"),
    (apic.REG_ICR,       "apic_command"),
)
READS: Final = (
    (apic.REG_ID,        "apic_id"),
    (apic.REG_VERSION,   "apic_version"),
    (apic.REG_CURRENT,   "apic_current"),
    (apic.REG_LVT_TIMER, "apic_read_lvt"),
    (apic.REG_INITIAL,   "apic_read_initial"),
)
# fmt: on


def write(a: Assembler, path: Path) -> None:
    """Subroutine `apic_write`: register number in RCX, value in RAX."""
    a.label("apic_write")
    a.activity = ops.DEVICE_EMULATION
    work(a, path, "apic_write")
    for register, label in WRITES:
        a.cmp(RCX, register)
        a.jcc(ops.CC_Z, label)
    a.label("apic_store")
    a.shl(RCX, 4)
    a.ld(RDI, vcpu("APIC_PAGE"))
    a.st(Mem(RDI, 0, index=RCX, size=4), RAX)
    a.jmp("apic_written")

    a.label("apic_eoi")
    a.lea(RDI, vcpu("ISR"))
    a.hook(hooks.HIGHEST_BIT)
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_S, "apic_written")
    a.copy(RSI, RAX)
    a.hook(hooks.CLEAR_BIT)
    request(a)
    a.jmp("apic_written")

    a.label("apic_priority")
    request(a)
    a.jmp("apic_store")

    a.label("apic_lvt_timer")
    a.st(vcpu("TIMER_LVT"), RAX)
    a.jmp("apic_written")

    if path.several:
        several.command(a, path)
    else:
        a.label("apic_command")
        a.copy(RDX, RAX)
        a.and_(RDX, SHORTHAND_OTHERS)
        a.cmp(RDX, SHORTHAND_OTHERS)
        a.jcc(ops.CC_Z, "apic_written")
    a.label("apic_self")
    a.copy(RSI, RAX)
    a.and_(RSI, 0xFF)
    a.lea(RDI, vcpu(posted.requested(path)))
    a.hook(hooks.SET_BIT)
    request(a)
    a.label("apic_written")
    a.ret()


def read(a: Assembler, path: Path) -> None:
    """`apic_read`: register number in RCX; ends in a jump to `msr_value` with the value in RAX."""
    a.label("apic_read")
    a.activity = ops.DEVICE_EMULATION
    work(a, path, "apic_read")
    for register, label in READS:
        a.cmp(RCX, register)
        a.jcc(ops.CC_Z, label)
    for first, bitmap in ((apic.REG_ISR, "ISR"), (apic.REG_IRR, "IRR")):
        a.lea(RDX, Mem(RCX, -first))
        a.cmp(RDX, 8)
        a.jcc(ops.CC_AE, f"apic_not_{bitmap}")
        a.ld(RAX, Mem(R15, at.V[bitmap], index=RDX, scale=4, size=4))
        a.jmp("msr_value")
        a.label(f"apic_not_{bitmap}")
    a.shl(RCX, 4)
    a.ld(RDI, vcpu("APIC_PAGE"))
    a.ld(RAX, Mem(RDI, 0, index=RCX, size=4))
    a.jmp("msr_value")

    a.label("apic_id")
    if path.several:
        a.ld(RAX, vcpu("INDEX"))
    else:
        zero(a, RAX)
    a.jmp("msr_value")
    a.label("apic_version")
    a.mov(RAX, VERSION)
    a.jmp("msr_value")
    a.label("apic_read_lvt")
    a.ld(RAX, vcpu("TIMER_LVT"))
    a.jmp("msr_value")
    a.label("apic_read_initial")
    a.ld(RAX, vcpu("TIMER_INITIAL"))
    a.jmp("msr_value")
    a.label("apic_current")
    a.ld(RBX, vcpu("DEADLINE"))
    zero(a, R12)
    a.test(RBX, register=RBX)
    a.jcc(ops.CC_Z, "apic_counted")
    now(a)
    a.sub(RBX, register=RAX)
    a.jcc(ops.CC_LE, "apic_counted")
    a.copy(R12, RBX)
    a.label("apic_counted")
    a.copy(RAX, R12)
    a.and_(RAX, LOW)
    a.jmp("msr_value")
