"""RDMSR and WRMSR: which of them exit, and what they do otherwise.

SDM: "MSR-Bitmap Address".
"""

from __future__ import annotations

from vtsim.base.jit import Arena, Record, Tags, kernel
from vtsim.base.memory import A_CAPABILITIES, A_DECODE
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.codes import GP, NEXT
from vtsim.cpu.kernels.access import bitmap_bit
from vtsim.cpu.kernels.active_controls import secondary_controls, tertiary_controls
from vtsim.cpu.kernels.apic import TSC_DEADLINE, read_register, write_register
from vtsim.cpu.kernels.apic_virtualization import (
    note_write,
    self_interrupt,
    virtual_load,
    virtual_store,
)
from vtsim.cpu.kernels.caches import forget
from vtsim.cpu.kernels.contexts import recorded
from vtsim.cpu.kernels.digest import saw
from vtsim.cpu.kernels.exceptions import raise_exception
from vtsim.cpu.kernels.msr_storage import msr_slot, store_msr, time_stamp
from vtsim.cpu.kernels.msr_values import refuses
from vtsim.vmcs import bits as b
from vtsim.vmcs import slots as v
from vtsim.vmcs.capabilities import CAPABILITY_MSRS, FIRST_CAPABILITY

# fmt: off
X2APIC: int = 1 << 10             # of IA32_APIC_BASE
FIRST_X2APIC, LAST_X2APIC, X2APIC_TPR, X2APIC_EOI, X2APIC_SELF_IPI = 0x800, 0x8FF, 0x808, 0x80B, 0x83F
X2APIC_ICR, SPEC_CTRL, PRED_CMD, FLUSH_CMD = 0x830, 0x48, 0x49, 0x10B
ICR_RESERVED: int = 0xFFF32000    # bits 31:20, 17:16 and 13 of the interrupt-command register
# fmt: on


@kernel
def msr_exits(m: Record, a: Arena, index: int, write: bool) -> bool:
    """Does this RDMSR or WRMSR exit?

    SDM: "MSR-Bitmap Address".
    """
    at = m[s.VMCS]
    if a[at + v.PRIMARY_PROC_CONTROLS] & b.USE_MSR_BITMAPS == 0:
        return True
    bit = index
    if 0xC0000000 <= index <= 0xC0001FFF:
        bit = (index & 0x1FFF) + 1024 * 8
    elif index > 0x1FFF:
        return True
    if write:
        bit += 2048 * 8
    return bitmap_bit(a, a[at + v.MSR_BITMAPS], bit)


@kernel
def read_msr(m: Record, a: Arena, index: int) -> int:
    """RDMSR: NEXT with RDX:RAX, or #GP."""
    value = 0
    slot = msr_slot(a, index)
    if FIRST_X2APIC <= index <= LAST_X2APIC:
        if m[s.NONROOT] and read_virtual(m, a, index):
            return NEXT
        if a[A_DECODE] and m[s.MSR_APIC_BASE] & X2APIC == 0:
            return raise_exception(m, GP, 1, 0)
    if slot >= 0:
        value = a[m[s.VMCS] + v.IA32_SPEC_CTRL_SHADOW] if virtual_spec_ctrl(m, a, slot) else m[slot]
    elif index == 0x10:
        value = time_stamp(m, a)
    elif 0x800 <= index <= 0x83F:
        value = read_register(m, index - 0x800)
    elif FIRST_CAPABILITY <= index < FIRST_CAPABILITY + CAPABILITY_MSRS:
        value = a[a[A_CAPABILITIES] + index - FIRST_CAPABILITY]
    elif not recorded(m, a):  # the recorded machine had the register: its guest saw no fault
        return raise_exception(m, GP, 1, 0)
    saw(m, a, o.RDMSR, index, 0, value)
    m[s.GPR + s.RAX] = value & 0xFFFFFFFF
    m[s.GPR + s.RDX] = (value >> 32) & 0xFFFFFFFF
    return NEXT


@kernel
def refused(m: Record, a: Arena, index: int, value: int) -> bool:
    """Does this processor refuse a write: x2APIC registers outside x2APIC mode, reserved bits?"""
    if FIRST_X2APIC <= index <= LAST_X2APIC:
        return m[s.MSR_APIC_BASE] & X2APIC == 0
    return refuses(m, a, index, value)


@kernel
def virtual_spec_ctrl(m: Record, a: Arena, slot: int) -> bool:
    """Is IA32_SPEC_CTRL virtualized, and is this where it is kept?

    SDM: "Fields Controlling Virtualization of the IA32_SPEC_CTRL MSR".
    """
    if slot != s.MSR_SPEC_CTRL or m[s.NONROOT] == 0:
        return False
    return tertiary_controls(m, a) & b.VIRTUALIZE_IA32_SPEC_CTRL != 0


@kernel
def read_virtual(m: Record, a: Arena, index: int) -> bool:
    """RDMSR of an x2APIC register that the virtual-APIC page answers: True if it did.

    SDM: "Virtualizing MSR-Based APIC Accesses".
    """
    controls = secondary_controls(m, a)
    if controls & b.VIRTUALIZE_X2APIC_MODE == 0:
        return False
    if index != X2APIC_TPR and controls & b.APIC_REGISTER_VIRTUALIZATION == 0:
        return False
    value = virtual_load(m, a, (index & 0xFF) << 4, 8)
    m[s.GPR + s.RAX] = value & 0xFFFFFFFF
    m[s.GPR + s.RDX] = (value >> 32) & 0xFFFFFFFF
    return True


@kernel
def write_virtual(m: Record, a: Arena, index: int, value: int) -> int:
    """WRMSR of an x2APIC register that is virtualized: NEXT or EVENT, or -1 where it is not.

    SDM: "Virtualizing MSR-Based APIC Accesses".
    """
    controls = secondary_controls(m, a)
    if controls & b.VIRTUALIZE_X2APIC_MODE == 0:
        return -1
    if index == X2APIC_ICR and tertiary_controls(m, a) & b.IPI_VIRTUALIZATION:
        if value & ICR_RESERVED:
            return raise_exception(m, GP, 1, 0)
        virtual_store(m, a, (index & 0xFF) << 4, 8, value)
        note_write(m, (index & 0xFF) << 4)
        return NEXT
    if index != X2APIC_TPR and controls & b.VIRTUAL_INTERRUPT_DELIVERY == 0:
        return -1
    if index != X2APIC_TPR and index != X2APIC_EOI and index != X2APIC_SELF_IPI:
        return -1
    if value & ~0xFF or (index == X2APIC_EOI and value):
        return raise_exception(m, GP, 1, 0)
    if index == X2APIC_SELF_IPI and value & 0xF0:
        self_interrupt(m, a, value)
        return NEXT
    virtual_store(m, a, (index & 0xFF) << 4, 8, value)
    note_write(m, (index & 0xFF) << 4)
    return NEXT


@kernel
def command(m: Record, a: Arena, t: Tags, index: int) -> bool:
    """WRMSR of IA32_PRED_CMD or IA32_FLUSH_CMD in VMX root operation, which empties L1D; False where it is neither.

    What a flushed line is written back to keeps it, and this CPU's right to write it.

    SDM: "Model-Specific Registers (MSRs)".
    Not modelled: predictors, so that the barrier has a price and no effect; these MSRs outside of VMX root operation.
    """
    if (index != PRED_CMD and index != FLUSH_CMD) or m[s.VMXON] == 0 or m[s.NONROOT] or a[A_DECODE]:
        return False
    if index == FLUSH_CMD:
        forget(m, t, s.L1D)
        m[s.DATA_GENERATION] += 1
    m[s.CYCLE] += m[s.P_L1D_FLUSH if index == FLUSH_CMD else s.P_IBPB] - m[s.PRICE + o.WRMSR]
    return True


@kernel
def write_msr(m: Record, a: Arena, index: int, value: int) -> int:
    """WRMSR: NEXT, or #GP."""
    if FIRST_X2APIC <= index <= LAST_X2APIC and m[s.NONROOT]:
        ended = write_virtual(m, a, index, value)
        if ended >= 0:
            return ended
    if a[A_DECODE] and refused(m, a, index, value):
        return raise_exception(m, GP, 1, 0)
    if index == SPEC_CTRL and virtual_spec_ctrl(m, a, s.MSR_SPEC_CTRL):
        mask = a[m[s.VMCS] + v.IA32_SPEC_CTRL_MASK]
        a[m[s.VMCS] + v.IA32_SPEC_CTRL_SHADOW] = value
        m[s.MSR_SPEC_CTRL] = (m[s.MSR_SPEC_CTRL] & mask) | (value & ~mask)
        return NEXT
    if 0x800 <= index <= 0x83F:
        m[s.CYCLE] += m[s.P_WRMSR_X2APIC] - m[s.PRICE + o.WRMSR]
        write_register(m, a, index - 0x800, value)
        return NEXT
    if index == 0x6E0 and m[s.APIC_TIMER_MODE] == TSC_DEADLINE:
        m[s.CYCLE] += m[s.P_WRMSR_X2APIC] - m[s.PRICE + o.WRMSR]
    if not store_msr(m, a, index, value) and not recorded(m, a):
        return raise_exception(m, GP, 1, 0)
    return NEXT
