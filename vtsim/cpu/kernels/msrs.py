"""Model-specific registers: which are storage, which exit, reads and writes.

SDM: "MSR-Bitmap Address".
"""

from __future__ import annotations

from vtsim.base.jit import Arena, Record, kernel
from vtsim.base.memory import A_CAPABILITIES
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.codes import FOREVER, GP, NEXT
from vtsim.cpu.kernels.access import bitmap_bit
from vtsim.cpu.kernels.apic import TSC_DEADLINE, read_register, write_register
from vtsim.cpu.kernels.contexts import recorded
from vtsim.cpu.kernels.control_registers import flush_linear
from vtsim.cpu.kernels.cursor import set_limit
from vtsim.cpu.kernels.digest import saw
from vtsim.cpu.kernels.exceptions import raise_exception
from vtsim.vmcs import bits as b
from vtsim.vmcs import slots as v
from vtsim.vmcs.capabilities import CAPABILITY_MSRS, FIRST_CAPABILITY


@kernel
def msr_slot(index: int) -> int:
    """The record slot of an MSR that is plain storage, or -1."""
    if index == 0xC0000080:
        return s.EFER
    if index == 0xC0000081:
        return s.MSR_STAR
    if index == 0xC0000082:
        return s.MSR_LSTAR
    if index == 0xC0000083:
        return s.MSR_CSTAR
    if index == 0xC0000084:
        return s.MSR_FMASK
    if index == 0xC0000100:
        return s.FS_BASE
    if index == 0xC0000101:
        return s.GS_BASE
    if index == 0xC0000102:
        return s.MSR_KERNEL_GS_BASE
    if index == 0xC0000103:
        return s.MSR_TSC_AUX
    if index == 0x1B:
        return s.MSR_APIC_BASE
    if index == 0x3A:
        return s.MSR_FEATURE_CONTROL
    if index == 0x3B:
        return s.MSR_TSC_ADJUST
    if index == 0x48:
        return s.MSR_SPEC_CTRL
    if index == 0x174:
        return s.SYSENTER_CS
    if index == 0x175:
        return s.SYSENTER_ESP
    if index == 0x176:
        return s.SYSENTER_EIP
    if index == 0x1A0:
        return s.MSR_MISC_ENABLE
    if index == 0x1D9:
        return s.DEBUGCTL
    if index == 0x277:
        return s.PAT
    if index == 0x6E0:
        return s.MSR_TSC_DEADLINE
    if index == 0xDA0:
        return s.MSR_XSS
    return -1


@kernel
def time_stamp(m: Record) -> int:
    """What RDTSC reads now."""
    tsc = m[s.CYCLE] + m[s.MSR_TSC_ADJUST]
    if m[s.NONROOT]:
        tsc += m[s.TSC_OFFSET]
    return tsc


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
    slot = msr_slot(index)
    if slot >= 0:
        value = m[slot]
        saw(m, value)
    elif index == 0x10:
        value = time_stamp(m)
    elif 0x800 <= index <= 0x83F:
        value = read_register(m, index - 0x800)
    elif FIRST_CAPABILITY <= index < FIRST_CAPABILITY + CAPABILITY_MSRS:
        value = a[a[A_CAPABILITIES] + index - FIRST_CAPABILITY]
    elif not recorded(m, a):  # the recorded machine had the register: its guest saw no fault
        return raise_exception(m, GP, 1, 0)
    m[s.GPR + s.RAX] = value & 0xFFFFFFFF
    m[s.GPR + s.RDX] = (value >> 32) & 0xFFFFFFFF
    return NEXT


@kernel
def write_msr(m: Record, a: Arena, index: int, value: int) -> int:
    """WRMSR: NEXT, or #GP."""
    if 0x800 <= index <= 0x83F:
        m[s.CYCLE] += m[s.P_WRMSR_X2APIC] - m[s.PRICE + o.WRMSR]
        write_register(m, a, index - 0x800, value)
        return NEXT
    slot = msr_slot(index)
    if index == 0x10:
        m[s.MSR_TSC_ADJUST] += value - time_stamp(m)
        return NEXT
    if slot < 0:
        return NEXT if recorded(m, a) else raise_exception(m, GP, 1, 0)
    if slot == s.MSR_TSC_DEADLINE and m[s.APIC_TIMER_MODE] != TSC_DEADLINE:
        return NEXT
    old = m[slot]
    m[slot] = value
    if slot == s.EFER and (old ^ value) & (1 << 11):
        flush_linear(m, a)
    if slot == s.MSR_TSC_DEADLINE:
        m[s.CYCLE] += m[s.P_WRMSR_X2APIC] - m[s.PRICE + o.WRMSR]
        m[s.APIC_DEADLINE] = FOREVER
        if value:
            m[s.APIC_DEADLINE] = value - m[s.MSR_TSC_ADJUST] - (m[s.TSC_OFFSET] if m[s.NONROOT] else 0)
        set_limit(m, a)
    return NEXT
