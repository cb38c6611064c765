"""RDMSR and WRMSR: which of them exit, and what they do otherwise.

SDM: "MSR-Bitmap Address".
"""

from __future__ import annotations

from vtsim.base.jit import Arena, Record, kernel
from vtsim.base.memory import A_CAPABILITIES
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.codes import GP, NEXT
from vtsim.cpu.kernels.access import bitmap_bit
from vtsim.cpu.kernels.apic import TSC_DEADLINE, read_register, write_register
from vtsim.cpu.kernels.contexts import recorded
from vtsim.cpu.kernels.digest import saw
from vtsim.cpu.kernels.events import raise_exception
from vtsim.cpu.kernels.msr_storage import msr_slot, store_msr, time_stamp
from vtsim.vmcs import bits as b
from vtsim.vmcs import slots as v
from vtsim.vmcs.capabilities import CAPABILITY_MSRS, FIRST_CAPABILITY


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
    if index == 0x6E0 and m[s.APIC_TIMER_MODE] == TSC_DEADLINE:
        m[s.CYCLE] += m[s.P_WRMSR_X2APIC] - m[s.PRICE + o.WRMSR]
    if not store_msr(m, a, index, value) and not recorded(m, a):
        return raise_exception(m, GP, 1, 0)
    return NEXT
