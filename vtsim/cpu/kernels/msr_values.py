"""Which MSRs there are to load on VM transitions, and which values WRMSR would refuse.

SDM: "Loading MSRs"; "Model-Specific Registers (MSRs)".
Not modelled: reserved bits of IA32_MISC_ENABLE.
"""

from __future__ import annotations

from vtsim.base.jit import Arena, Record, kernel
from vtsim.cpu import slots as s
from vtsim.cpu.kernels.msr_storage import TIME_STAMP_COUNTER, msr_slot
from vtsim.cpu.kernels.rare_msrs import refuses_rare
from vtsim.vmcs.kernels.values import (
    CR0_PG,
    ECX,
    EFER_DEFINED,
    EFER_LME,
    SPEC_CTRL_DEFINED,
    bad_debugctl,
    bad_pat,
    cpuid_register,
    is_canonical,
    linear_bits,
)

# fmt: off
EFER: int = 0xC0000080
FS_BASE, GS_BASE, SMM_MONITOR_CTL, SMBASE = 0xC0000100, 0xC0000101, 0x9B, 0x9E
APIC_ENABLED, APIC_X2, APIC_RESERVED = 1 << 11, 1 << 10, 0x2FF
FEATURE_LOCKED: int = 1
# fmt: on


@kernel
def unloadable(index: int) -> bool:
    """May this MSR stand in no MSR area: base addresses of FS and GS, x2APIC registers, MSRs of SMM?

    SDM: "Loading MSRs".
    """
    return index == FS_BASE or index == GS_BASE or index >> 8 == 8 or index == SMM_MONITOR_CTL or index == SMBASE


@kernel
def unsavable(index: int) -> bool:
    """May this MSR not be stored in an MSR area: x2APIC registers, MSRs of SMM?

    SDM: "Saving MSRs".
    """
    return index >> 8 == 8 or index == SMBASE


@kernel
def refuses(m: Record, a: Arena, index: int, value: int) -> bool:
    """Would WRMSR of this value cause #GP at privilege level 0?

    SDM: "Loading MSRs".
    """
    if index == TIME_STAMP_COUNTER:
        return False
    slot = msr_slot(a, index)
    if slot < 0:
        return True
    if slot == s.EFER:
        return value & ~EFER_DEFINED != 0 or (m[s.CR0] & CR0_PG != 0 and (value ^ m[s.EFER]) & EFER_LME != 0)
    if (
        slot == s.MSR_LSTAR
        or slot == s.MSR_CSTAR
        or slot == s.MSR_KERNEL_GS_BASE
        or slot == s.SYSENTER_ESP
        or slot == s.SYSENTER_EIP
    ):
        return not is_canonical(value, linear_bits(a))
    if slot == s.MSR_TSC_AUX:
        return value >> 32 != 0
    if slot == s.PAT:
        return bad_pat(value)
    if slot == s.DEBUGCTL:
        return bad_debugctl(a, value)
    if slot == s.MSR_SPEC_CTRL:
        return value & ~SPEC_CTRL_DEFINED != 0
    if slot == s.MSR_XSS:
        return value & ~cpuid_register(a, 0xD, 1, ECX) != 0
    if slot == s.MSR_FEATURE_CONTROL:
        return m[slot] & FEATURE_LOCKED != 0
    if slot == s.MSR_APIC_BASE:
        if value & APIC_RESERVED or value & (m[s.RESERVED_BITS] | -(1 << 52)):
            return True
        if value & APIC_X2 and (value & APIC_ENABLED == 0 or cpuid_register(a, 1, 0, ECX) & 1 << 21 == 0):
            return True
        return m[slot] & APIC_X2 != 0 and value & (APIC_ENABLED | APIC_X2) == APIC_ENABLED
    return refuses_rare(m, a, slot, value)
