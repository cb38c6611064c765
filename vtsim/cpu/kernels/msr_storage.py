"""Model-specific registers that are storage: where each is kept, and what else a write does.

SDM: "Model-Specific Registers (MSRs)"; "TSC-Deadline Mode".
"""

from __future__ import annotations

from vtsim.base.jit import Arena, Record, kernel
from vtsim.cpu import slots as s
from vtsim.cpu.codes import FOREVER
from vtsim.cpu.kernels.active_controls import secondary_controls
from vtsim.cpu.kernels.apic import TSC_DEADLINE
from vtsim.cpu.kernels.cursor import set_limit
from vtsim.cpu.kernels.invalidate import drop_contexts
from vtsim.cpu.kernels.rare_msrs import rare_msr_slot
from vtsim.vmcs import bits as b
from vtsim.vmcs import slots as v

# fmt: off
TIME_STAMP_COUNTER: int = 0x10
EFER_NXE: int = 1 << 11
# fmt: on


@kernel
def msr_slot(a: Arena, index: int) -> int:
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
    return rare_msr_slot(a, index)


@kernel
def time_stamp(m: Record, a: Arena) -> int:
    """What RDTSC reads now: in VMX non-root operation multiplied, then offset.

    SDM: "Time-Stamp Counter Offset and Multiplier"; "Changes to Instruction Behavior in VMX Non-Root Operation".
    """
    tsc = m[s.CYCLE] + m[s.MSR_TSC_ADJUST]
    if m[s.NONROOT]:
        at = m[s.VMCS]
        if secondary_controls(m, a) & b.USE_TSC_SCALING and a[at + v.PRIMARY_PROC_CONTROLS] & b.USE_TSC_OFFSETTING:
            tsc = scaled(tsc, a[at + v.TSC_MULTIPLIER])
        tsc += m[s.TSC_OFFSET]
    return tsc


@kernel
def scaled(value: int, multiplier: int) -> int:
    """The product of two unsigned 64-bit numbers, shifted right by 48."""
    low = value & 0xFFFFFFFF
    high = (value >> 32) & 0xFFFFFFFF
    by_low = multiplier & 0xFFFFFFFF
    by_high = (multiplier >> 32) & 0xFFFFFFFF
    carry = ((low * by_low) >> 32) & 0xFFFFFFFF  # each partial product is unsigned and fills 64 bits
    middle = (low * by_high & 0xFFFFFFFF) + (high * by_low & 0xFFFFFFFF) + carry
    third = ((low * by_high >> 32) & 0xFFFFFFFF) + ((high * by_low >> 32) & 0xFFFFFFFF) + (middle >> 32)
    return ((high * by_high + third) << 16) | ((middle & 0xFFFFFFFF) >> 16)


@kernel
def store_msr(m: Record, a: Arena, index: int, value: int) -> bool:
    """Write an MSR that is storage, or the time-stamp counter (without any offset). False where there is none."""
    if index == TIME_STAMP_COUNTER:
        m[s.MSR_TSC_ADJUST] = value - m[s.CYCLE]
        return True
    slot = msr_slot(a, index)
    if slot < 0:
        return False
    if slot == s.MSR_TSC_DEADLINE and m[s.APIC_TIMER_MODE] != TSC_DEADLINE:
        return True
    old = m[slot]
    m[slot] = value
    if slot == s.EFER and (old ^ value) & EFER_NXE:
        drop_contexts(m, a, 0xFFFF, m[s.CONTEXT_KEY] & 0xFFFF, True)
    if slot == s.MSR_TSC_DEADLINE:
        m[s.APIC_DEADLINE] = FOREVER
        if value:
            m[s.APIC_DEADLINE] = value - m[s.MSR_TSC_ADJUST] - (m[s.TSC_OFFSET] if m[s.NONROOT] else 0)
        set_limit(m, a)
    return True
