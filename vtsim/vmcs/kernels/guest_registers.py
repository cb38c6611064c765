"""Checks on guest control registers, debug registers and MSRs.

SDM: "Checks on Guest Control Registers, Debug Registers, and MSRs".
"""

from __future__ import annotations

from vtsim.base.jit import Arena, kernel
from vtsim.vmcs import bits as b
from vtsim.vmcs import checks as c
from vtsim.vmcs import slots as v
from vtsim.vmcs import state as h
from vtsim.vmcs.kernels.execution_controls import effective_secondary
from vtsim.vmcs.kernels.values import (
    CR0_PE,
    CR0_PG,
    CR0_WP,
    CR4_CET,
    CR4_PAE,
    CR4_PCIDE,
    EFER_DEFINED,
    EFER_LMA,
    EFER_LME,
    LBR_CTL_DEFINED,
    RTIT_CTL_DEFINED,
    SPEC_CTRL_DEFINED,
    bad_cr0,
    bad_cr3,
    bad_cr4,
    bad_debugctl,
    bad_fred,
    bad_pat,
    bad_perf_global_ctrl,
    bad_s_cet,
    is_canonical,
    linear_bits,
)

# fmt: off
LOADED_MSRS: int = (
    b.ENTRY_LOAD_CET_STATE | b.ENTRY_LOAD_IA32_PERF_GLOBAL_CTRL | b.ENTRY_LOAD_IA32_PAT | b.ENTRY_LOAD_IA32_EFER
    | b.ENTRY_LOAD_IA32_BNDCFGS | b.ENTRY_LOAD_IA32_RTIT_CTL | b.ENTRY_LOAD_IA32_LBR_CTL | b.ENTRY_LOAD_PKRS
    | b.ENTRY_LOAD_UINV | b.ENTRY_LOAD_IA32_SPEC_CTRL | b.ENTRY_LOAD_FRED
)
# fmt: on


@kernel
def guest_registers_failure(a: Arena, at: int, beyond: int) -> int:
    """The first failed check on guest control registers, debug registers and MSRs.

    SDM: "Checks on Guest Control Registers, Debug Registers, and MSRs".
    """
    controls = a[at + v.ENTRY_CONTROLS]
    unrestricted = effective_secondary(a, at) & b.UNRESTRICTED_GUEST != 0
    cr0 = a[at + v.GUEST_CR0]
    cr4 = a[at + v.GUEST_CR4]
    bits = linear_bits(a)
    if bad_cr0(a, cr0, CR0_PE | CR0_PG if unrestricted else 0):
        return c.GUEST_CR0_FIXED
    if cr0 & CR0_PG and cr0 & CR0_PE == 0:
        return c.GUEST_PG_WITHOUT_PE
    if bad_cr4(a, cr4):
        return c.GUEST_CR4_FIXED
    if cr4 & CR4_CET and cr0 & CR0_WP == 0:
        return c.GUEST_CET_WITHOUT_WP
    if controls & b.ENTRY_LOAD_DEBUG_CONTROLS and bad_debugctl(a, a[at + v.GUEST_IA32_DEBUGCTL]):
        return c.GUEST_DEBUGCTL
    if controls & b.ENTRY_IA32E_MODE_GUEST:
        if cr0 & CR0_PG == 0 or cr4 & CR4_PAE == 0:
            return c.GUEST_IA32E_PAGING
    elif cr4 & CR4_PCIDE:
        return c.GUEST_PCIDE
    cr3 = a[at + v.GUEST_CR3] & ~h.CR3_SWITCHES if a[at + h.V_AGILE] else a[at + v.GUEST_CR3]
    if bad_cr3(a, cr3, beyond):
        return c.GUEST_CR3_RESERVED
    if controls & b.ENTRY_LOAD_DEBUG_CONTROLS and a[at + v.GUEST_DR7] >> 32:
        return c.GUEST_DR7_HIGH
    if not is_canonical(a[at + v.GUEST_IA32_SYSENTER_ESP], bits) or not is_canonical(
        a[at + v.GUEST_IA32_SYSENTER_EIP], bits
    ):
        return c.GUEST_SYSENTER
    if controls & LOADED_MSRS:
        return loaded_msrs_failure(a, at, controls, cr0, bits)
    return c.NONE


@kernel
def loaded_msrs_failure(a: Arena, at: int, controls: int, cr0: int, bits: int) -> int:
    """The first failed check on MSRs that a VM-entry control asks to load.

    SDM: "Checks on Guest Control Registers, Debug Registers, and MSRs".
    """
    if controls & b.ENTRY_LOAD_CET_STATE:
        if bad_s_cet(a[at + v.GUEST_IA32_S_CET], bits) or not is_canonical(
            a[at + v.GUEST_IA32_INTERRUPT_SSP_TABLE_ADDR], bits
        ):
            return c.GUEST_CET
    if controls & b.ENTRY_LOAD_IA32_PERF_GLOBAL_CTRL:
        if bad_perf_global_ctrl(a, a[at + v.GUEST_IA32_PERF_GLOBAL_CTRL]):
            return c.GUEST_PERF_GLOBAL_CTRL
    if controls & b.ENTRY_LOAD_IA32_PAT and bad_pat(a[at + v.GUEST_IA32_PAT]):
        return c.GUEST_PAT
    if controls & b.ENTRY_LOAD_IA32_EFER:
        efer = a[at + v.GUEST_IA32_EFER]
        if efer & ~EFER_DEFINED:
            return c.GUEST_EFER_RESERVED
        long_mode = efer & EFER_LMA != 0
        if long_mode != (controls & b.ENTRY_IA32E_MODE_GUEST != 0):
            return c.GUEST_EFER_LMA
        if cr0 & CR0_PG and long_mode != (efer & EFER_LME != 0):
            return c.GUEST_EFER_LME
    if controls & b.ENTRY_LOAD_IA32_BNDCFGS:
        if a[at + v.GUEST_IA32_BNDCFGS] & 0xFFC or not is_canonical(a[at + v.GUEST_IA32_BNDCFGS], bits):
            return c.GUEST_BNDCFGS
    if controls & b.ENTRY_LOAD_IA32_RTIT_CTL and a[at + v.GUEST_IA32_RTIT_CTL] & ~RTIT_CTL_DEFINED:
        return c.GUEST_RTIT_CTL
    if controls & b.ENTRY_LOAD_IA32_LBR_CTL and a[at + v.GUEST_IA32_LBR_CTL] & ~LBR_CTL_DEFINED:
        return c.GUEST_LBR_CTL
    if controls & b.ENTRY_LOAD_PKRS and a[at + v.GUEST_IA32_PKRS] >> 32:
        return c.GUEST_PKRS
    if controls & b.ENTRY_LOAD_UINV and a[at + v.GUEST_UINV] >> 8:
        return c.GUEST_UINV
    if controls & b.ENTRY_LOAD_IA32_SPEC_CTRL and a[at + v.GUEST_IA32_SPEC_CTRL] & ~SPEC_CTRL_DEFINED:
        return c.GUEST_SPEC_CTRL
    if controls & b.ENTRY_LOAD_FRED:
        if bad_fred(a, at + v.GUEST_IA32_FRED_CONFIG, at + v.GUEST_IA32_FRED_RSP1, at + v.GUEST_IA32_FRED_SSP1, bits):
            return c.GUEST_FRED
    return c.NONE
