"""MSRs that hold values and nothing else here: VM transitions load, save and clear them as their controls say.

They stand in the guest-state block of the record, at the place of their VMCS field.

SDM: "Saving Guest State"; "Loading Host State"; "Loading Guest Control Registers, Debug Registers, and MSRs".
Not modelled: what protection keys, shadow stacks, bounds, branch records, Intel PT, performance counters, user
interrupts and FRED do with these values; the saving of IA32_SPEC_CTRL, whose control the editions describe differently.
"""

from __future__ import annotations

import numpy as np

from vtsim.base.jit import Arena, Record, kernel
from vtsim.cpu import slots as s
from vtsim.cpu.kernels.range_msrs import range_msr_slot, refuses_range
from vtsim.vmcs import bits as b
from vtsim.vmcs import slots as v
from vtsim.vmcs.controls import CONTROL
from vtsim.vmcs.kernels.values import (
    EAX,
    LBR_CTL_DEFINED,
    RTIT_CTL_DEFINED,
    bad_perf_global_ctrl,
    bad_s_cet,
    capability,
    cpuid_register,
    is_canonical,
    linear_bits,
)

# fmt: off
PLACE: int = s.STATE - v.GUEST_START       # from the slot of a guest-state field to its place in the record
PERF_GLOBAL_CTRL: int = PLACE + v.GUEST_IA32_PERF_GLOBAL_CTRL
BNDCFGS: int = PLACE + v.GUEST_IA32_BNDCFGS
RTIT_CTL: int = PLACE + v.GUEST_IA32_RTIT_CTL
LBR_CTL: int = PLACE + v.GUEST_IA32_LBR_CTL
PKRS: int = PLACE + v.GUEST_IA32_PKRS
UINV: int = PLACE + v.GUEST_UINV
S_CET: int = PLACE + v.GUEST_IA32_S_CET
SSP_TABLE: int = PLACE + v.GUEST_IA32_INTERRUPT_SSP_TABLE_ADDR
FRED: int = PLACE + v.GUEST_IA32_FRED_CONFIG
FRED_MSRS: int = v.GUEST_IA32_FRED_SSP3 - v.GUEST_IA32_FRED_CONFIG + 1

# MSRs in the order of a table: index, place in the record, a control whose 1-setting says that the processor has it
_MSRS = (
    (0x38F,  PERF_GLOBAL_CTRL,                         "ENTRY_LOAD_IA32_PERF_GLOBAL_CTRL"),
    (0xD90,  BNDCFGS,                                  "ENTRY_LOAD_IA32_BNDCFGS"),
    (0x570,  RTIT_CTL,                                 "ENTRY_LOAD_IA32_RTIT_CTL"),
    (0x14CE, LBR_CTL,                                  "ENTRY_LOAD_IA32_LBR_CTL"),
    (0x6E1,  PKRS,                                     "ENTRY_LOAD_PKRS"),
    (0x6A2,  S_CET,                                    "ENTRY_LOAD_CET_STATE"),
    (0x6A8,  SSP_TABLE,                                "ENTRY_LOAD_CET_STATE"),
    (0x1D4,  FRED,                                     "ENTRY_LOAD_FRED"),
    (0x1CD,  PLACE + v.GUEST_IA32_FRED_RSP1,           "ENTRY_LOAD_FRED"),
    (0x1CE,  PLACE + v.GUEST_IA32_FRED_RSP2,           "ENTRY_LOAD_FRED"),
    (0x1CF,  PLACE + v.GUEST_IA32_FRED_RSP3,           "ENTRY_LOAD_FRED"),
    (0x1D0,  PLACE + v.GUEST_IA32_FRED_STKLVLS,        "ENTRY_LOAD_FRED"),
    (0x1D1,  PLACE + v.GUEST_IA32_FRED_SSP1,           "ENTRY_LOAD_FRED"),
    (0x1D2,  PLACE + v.GUEST_IA32_FRED_SSP2,           "ENTRY_LOAD_FRED"),
    (0x1D3,  PLACE + v.GUEST_IA32_FRED_SSP3,           "ENTRY_LOAD_FRED"),
)
MSRS = np.array(
    [(index, place, CONTROL[name].word.msr, CONTROL[name].bit + 32) for index, place, name in _MSRS], np.int64
)
COUNT: int = len(_MSRS)

# what every VM exit saves because the processor has it (SAVED_MSRS of the record)
HAS_BNDCFGS, HAS_RTIT_CTL, HAS_LBR_CTL, HAS_PKRS, HAS_CET, HAS_UINV = (1 << n for n in range(6))
SAVED = (
    (HAS_BNDCFGS,  ("ENTRY_LOAD_IA32_BNDCFGS", "EXIT_CLEAR_IA32_BNDCFGS")),
    (HAS_RTIT_CTL, ("ENTRY_LOAD_IA32_RTIT_CTL", "EXIT_CLEAR_IA32_RTIT_CTL")),
    (HAS_LBR_CTL,  ("ENTRY_LOAD_IA32_LBR_CTL", "EXIT_CLEAR_IA32_LBR_CTL")),
    (HAS_PKRS,     ("ENTRY_LOAD_PKRS",)),
    (HAS_CET,      ("ENTRY_LOAD_CET_STATE",)),
    (HAS_UINV,     ("ENTRY_LOAD_UINV", "EXIT_CLEAR_UINV")),
)
# VM-exit controls that save or load more than what every VM exit does
SAVING: int = b.EXIT_SAVE_IA32_PERF_GLOBAL_CTRL | b.EXIT_ACTIVATE_SECONDARY_CONTROLS
LOADING: int = (
    b.EXIT_LOAD_IA32_PERF_GLOBAL_CTRL | b.EXIT_LOAD_PKRS | b.EXIT_CLEAR_IA32_BNDCFGS | b.EXIT_CLEAR_IA32_RTIT_CTL
    | b.EXIT_CLEAR_IA32_LBR_CTL | b.EXIT_CLEAR_UINV | b.EXIT_LOAD_CET_STATE | b.EXIT_ACTIVATE_SECONDARY_CONTROLS
)
BNDCFGS_RESERVED: int = 0xFFC
MONITORING: int = 10                       # the CPUID leaf of performance monitoring
# fmt: on


@kernel
def rare_msr_slot(a: Arena, index: int) -> int:
    """The record slot of one of these MSRs, or -1 where the processor does not have it."""
    for n in range(COUNT):
        if MSRS[n, 0] == index:
            there = (capability(a, MSRS[n, 2]) >> MSRS[n, 3]) & 1
            if there and index == MSRS[0, 0]:
                there = cpuid_register(a, MONITORING, 0, EAX) & 0xFF  # the version of performance monitoring
            return MSRS[n, 1] if there else -1
    return range_msr_slot(index)


@kernel
def refuses_rare(m: Record, a: Arena, slot: int, value: int) -> bool:
    """Would WRMSR of this value to the MSR at a record slot cause #GP at privilege level 0?

    SDM: "Loading MSRs".
    """
    if slot == PERF_GLOBAL_CTRL:
        return bad_perf_global_ctrl(a, value)
    if slot == BNDCFGS:
        return value & BNDCFGS_RESERVED != 0 or not is_canonical(value, linear_bits(a))
    if slot == RTIT_CTL:
        return value & ~RTIT_CTL_DEFINED != 0
    if slot == LBR_CTL:
        return value & ~LBR_CTL_DEFINED != 0
    if slot == PKRS:
        return value >> 32 != 0
    if slot == S_CET:
        return bad_s_cet(value, linear_bits(a))
    if slot == SSP_TABLE:
        return value & 7 != 0 or not is_canonical(value, linear_bits(a))
    if s.MTRR_VARIABLE <= slot <= s.MTRR_DEFAULT:
        return refuses_range(m, slot, value)
    return False


@kernel
def save_rare_msrs(m: Record, a: Arena, at: int, controls: int) -> None:
    """Save into the guest-state area what the processor has of these MSRs, and what VM-exit controls ask for.

    SDM: "Saving Guest State".
    """
    saved = m[s.SAVED_MSRS]
    if saved & HAS_BNDCFGS:
        a[at + v.GUEST_IA32_BNDCFGS] = m[BNDCFGS]
    if saved & ~HAS_BNDCFGS:
        if saved & HAS_RTIT_CTL:
            a[at + v.GUEST_IA32_RTIT_CTL] = m[RTIT_CTL]
        if saved & HAS_LBR_CTL:
            a[at + v.GUEST_IA32_LBR_CTL] = m[LBR_CTL]
        if saved & HAS_PKRS:
            a[at + v.GUEST_IA32_PKRS] = m[PKRS]
        if saved & HAS_UINV:
            a[at + v.GUEST_UINV] = m[UINV]
        if saved & HAS_CET:
            for n in range(3):
                a[at + v.GUEST_IA32_S_CET + n] = m[S_CET + n]
    if controls & b.EXIT_SAVE_IA32_PERF_GLOBAL_CTRL:
        a[at + v.GUEST_IA32_PERF_GLOBAL_CTRL] = m[PERF_GLOBAL_CTRL]
    if controls & b.EXIT_ACTIVATE_SECONDARY_CONTROLS and a[at + v.SECONDARY_EXIT_CONTROLS] & b.EXIT_SAVE_FRED:
        for n in range(FRED_MSRS):
            a[at + v.GUEST_IA32_FRED_CONFIG + n] = m[FRED + n]


@kernel
def load_rare_guest_msrs(m: Record, a: Arena, at: int, controls: int) -> None:
    """Load these MSRs as VM-entry controls ask for.

    SDM: "Loading Guest Control Registers, Debug Registers, and MSRs".
    """
    if controls & b.ENTRY_LOAD_IA32_PERF_GLOBAL_CTRL:
        m[PERF_GLOBAL_CTRL] = a[at + v.GUEST_IA32_PERF_GLOBAL_CTRL]
    if controls & b.ENTRY_LOAD_IA32_BNDCFGS:
        m[BNDCFGS] = a[at + v.GUEST_IA32_BNDCFGS]
    if controls & b.ENTRY_LOAD_IA32_RTIT_CTL:
        m[RTIT_CTL] = a[at + v.GUEST_IA32_RTIT_CTL]
    if controls & b.ENTRY_LOAD_UINV:
        m[UINV] = a[at + v.GUEST_UINV]
    if controls & b.ENTRY_LOAD_CET_STATE:
        for n in range(3):
            m[S_CET + n] = a[at + v.GUEST_IA32_S_CET + n]
    if controls & b.ENTRY_LOAD_IA32_LBR_CTL:
        m[LBR_CTL] = a[at + v.GUEST_IA32_LBR_CTL]
    if controls & b.ENTRY_LOAD_PKRS:
        m[PKRS] = a[at + v.GUEST_IA32_PKRS]
    if controls & b.ENTRY_LOAD_IA32_SPEC_CTRL:
        m[s.MSR_SPEC_CTRL] = a[at + v.GUEST_IA32_SPEC_CTRL]
    if controls & b.ENTRY_LOAD_FRED:
        for n in range(FRED_MSRS):
            m[FRED + n] = a[at + v.GUEST_IA32_FRED_CONFIG + n]


@kernel
def load_rare_host_msrs(m: Record, a: Arena, at: int, controls: int) -> None:
    """Load or clear these MSRs as VM-exit controls ask for.

    SDM: "Loading Host State".
    """
    if controls & b.EXIT_LOAD_IA32_PERF_GLOBAL_CTRL:
        m[PERF_GLOBAL_CTRL] = a[at + v.HOST_IA32_PERF_GLOBAL_CTRL]
    if controls & b.EXIT_LOAD_PKRS:
        m[PKRS] = a[at + v.HOST_IA32_PKRS]
    if controls & b.EXIT_CLEAR_IA32_BNDCFGS:
        m[BNDCFGS] = 0
    if controls & b.EXIT_CLEAR_IA32_RTIT_CTL:
        m[RTIT_CTL] = 0
    if controls & b.EXIT_CLEAR_IA32_LBR_CTL:
        m[LBR_CTL] = 0
    if controls & b.EXIT_CLEAR_UINV:
        m[UINV] = 0
    if controls & b.EXIT_LOAD_CET_STATE:
        for n in range(3):
            m[S_CET + n] = a[at + v.HOST_IA32_S_CET + n]
    if controls & b.EXIT_ACTIVATE_SECONDARY_CONTROLS:
        more = a[at + v.SECONDARY_EXIT_CONTROLS]
        if more & b.EXIT_LOAD_IA32_SPEC_CTRL:
            m[s.MSR_SPEC_CTRL] = a[at + v.HOST_IA32_SPEC_CTRL]
        if more & b.EXIT_LOAD_FRED:
            for n in range(FRED_MSRS):
                m[FRED + n] = a[at + v.HOST_IA32_FRED_CONFIG + n]
