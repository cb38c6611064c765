"""Checks on the host-state area.

SDM: "Checks on Host Control Registers, MSRs, and SSP"; "Checks on Host Segment and Descriptor-Table Registers".
SDM: "Checks Related to Address-Space Size".
"""

from __future__ import annotations

from vtsim.base.jit import Arena, kernel
from vtsim.vmcs import bits as b
from vtsim.vmcs import checks as c
from vtsim.vmcs import slots as v
from vtsim.vmcs.kernels.values import (
    CR0_WP,
    CR4_CET,
    CR4_LA57,
    CR4_PAE,
    CR4_PCIDE,
    EFER_DEFINED,
    EFER_LMA,
    EFER_LME,
    SPEC_CTRL_DEFINED,
    bad_cr0,
    bad_cr3,
    bad_cr4,
    bad_fred,
    bad_pat,
    bad_perf_global_ctrl,
    bad_s_cet,
    is_canonical,
    linear_bits,
)


@kernel
def host_failure(a: Arena, at: int, beyond: int) -> int:
    """The first failed check on the host-state area, in the manual's order of lists."""
    failed = host_registers_failure(a, at, beyond)
    if failed == c.NONE:
        failed = host_segments_failure(a, at)
    if failed == c.NONE:
        failed = address_space_failure(a, at)
    return failed


@kernel
def host_registers_failure(a: Arena, at: int, beyond: int) -> int:
    """The first failed check on host control registers and MSRs.

    SDM: "Checks on Host Control Registers, MSRs, and SSP".
    """
    controls = a[at + v.EXIT_CONTROLS]
    bits = linear_bits(a)
    if bad_cr0(a, a[at + v.HOST_CR0], 0):
        return c.HOST_CR0_FIXED
    if bad_cr4(a, a[at + v.HOST_CR4]):
        return c.HOST_CR4_FIXED
    if a[at + v.HOST_CR4] & CR4_CET and a[at + v.HOST_CR0] & CR0_WP == 0:
        return c.HOST_CET_WITHOUT_WP
    if bad_cr3(a, a[at + v.HOST_CR3], beyond):
        return c.HOST_CR3_RESERVED
    if not is_canonical(a[at + v.HOST_IA32_SYSENTER_ESP], bits) or not is_canonical(
        a[at + v.HOST_IA32_SYSENTER_EIP], bits
    ):
        return c.HOST_SYSENTER
    if controls & b.EXIT_LOAD_IA32_PERF_GLOBAL_CTRL and bad_perf_global_ctrl(a, a[at + v.HOST_IA32_PERF_GLOBAL_CTRL]):
        return c.HOST_PERF_GLOBAL_CTRL
    if controls & b.EXIT_LOAD_IA32_PAT and bad_pat(a[at + v.HOST_IA32_PAT]):
        return c.HOST_PAT
    if controls & b.EXIT_LOAD_IA32_EFER:
        efer = a[at + v.HOST_IA32_EFER]
        if efer & ~EFER_DEFINED:
            return c.HOST_EFER_RESERVED
        mode = EFER_LMA | EFER_LME if controls & b.EXIT_HOST_ADDRESS_SPACE_SIZE else 0
        if efer & (EFER_LMA | EFER_LME) != mode:
            return c.HOST_EFER_MODE
    if controls & b.EXIT_LOAD_CET_STATE:
        if (
            bad_s_cet(a[at + v.HOST_IA32_S_CET], bits)
            or a[at + v.HOST_SSP] & 3
            or not is_canonical(a[at + v.HOST_SSP], bits)
            or not is_canonical(a[at + v.HOST_IA32_INTERRUPT_SSP_TABLE_ADDR], bits)
        ):
            return c.HOST_CET
    if controls & b.EXIT_LOAD_PKRS and a[at + v.HOST_IA32_PKRS] >> 32:
        return c.HOST_PKRS
    if controls & b.EXIT_ACTIVATE_SECONDARY_CONTROLS:
        more = a[at + v.SECONDARY_EXIT_CONTROLS]
        if more & b.EXIT_LOAD_IA32_SPEC_CTRL and a[at + v.HOST_IA32_SPEC_CTRL] & ~SPEC_CTRL_DEFINED:
            return c.HOST_SPEC_CTRL
        if more & b.EXIT_LOAD_FRED:
            if bad_fred(a, at + v.HOST_IA32_FRED_CONFIG, at + v.HOST_IA32_FRED_RSP1, at + v.HOST_IA32_FRED_SSP1, bits):
                return c.HOST_FRED
    return c.NONE


@kernel
def host_segments_failure(a: Arena, at: int) -> int:
    """The first failed check on host selectors and bases.

    SDM: "Checks on Host Segment and Descriptor-Table Registers".
    """
    selectors = 0
    for n in range(7):
        selectors |= a[at + v.HOST_ES_SELECTOR + n]
    if selectors & 7:
        return c.HOST_SELECTOR_BITS
    if a[at + v.HOST_CS_SELECTOR] == 0:
        return c.HOST_CS_ZERO
    if a[at + v.HOST_TR_SELECTOR] == 0:
        return c.HOST_TR_ZERO
    if a[at + v.HOST_SS_SELECTOR] == 0 and a[at + v.EXIT_CONTROLS] & b.EXIT_HOST_ADDRESS_SPACE_SIZE == 0:
        return c.HOST_SS_ZERO
    bits = linear_bits(a)
    for n in range(5):
        if not is_canonical(a[at + v.HOST_FS_BASE + n], bits):
            return c.HOST_BASES
    return c.NONE


@kernel
def address_space_failure(a: Arena, at: int) -> int:
    """The first failed check on the size of the host's address space; IA32_EFER.LMA is looked at elsewhere.

    SDM: "Checks Related to Address-Space Size".
    """
    rip = a[at + v.HOST_RIP]
    if a[at + v.EXIT_CONTROLS] & b.EXIT_HOST_ADDRESS_SPACE_SIZE == 0:
        if a[at + v.ENTRY_CONTROLS] & b.ENTRY_IA32E_MODE_GUEST:
            return c.ENTRY_MODE_FOR_32_BIT_HOST
        if a[at + v.HOST_CR4] & CR4_PCIDE:
            return c.HOST_PCIDE
        if rip >> 32:
            return c.HOST_RIP_HIGH
        return c.NONE
    if a[at + v.HOST_CR4] & CR4_PAE == 0:
        return c.HOST_PAE
    if not is_canonical(rip, 57 if a[at + v.HOST_CR4] & CR4_LA57 else 48):
        return c.HOST_RIP_CANONICAL
    return c.NONE
