"""Which values an address or a register may hold, as several lists of checks ask it.

SDM: "VMX Capability Reporting Facility"; "CPUID—CPU Identification".
Not modelled: processors without execute-disable; MSR bits that only one processor family has.
"""

from __future__ import annotations

from vtsim.base.jit import Arena, kernel
from vtsim.base.memory import A_CAPABILITIES, A_CPUID, A_CPUID_COUNT

# fmt: off
FIRST: int = 0x480                       # the capability MSRs stand in the arena from this one on
BASIC, MISC, CR0_FIXED0, CR0_FIXED1, CR4_FIXED0, CR4_FIXED1 = 0x480, 0x485, 0x486, 0x487, 0x488, 0x489
EPT_VPID_CAP, VM_FUNCTIONS, TERTIARY, SECONDARY_EXIT = 0x48C, 0x491, 0x492, 0x493
CR0_PE, CR0_WP, CR0_NW, CR0_CD, CR0_PG = 1 << 0, 1 << 16, 1 << 29, 1 << 30, 1 << 31
CR4_PAE, CR4_LA57, CR4_PCIDE, CR4_CET = 1 << 5, 1 << 12, 1 << 17, 1 << 23
EFER_LME, EFER_LMA = 1 << 8, 1 << 10
EFER_DEFINED: int = 1 << 0 | EFER_LME | EFER_LMA | 1 << 11
DEBUGCTL_DEFINED: int = 0xDFC3           # LBR, BTF, TR to FREEZE_PERFMON_ON_PMI, FREEZE_WHILE_SMM, RTM
DEBUGCTL_BUS_LOCK: int = 1 << 2
SPEC_CTRL_DEFINED: int = 0x5FF           # IBRS to DDPD_U, BHI_DIS_S
LBR_CTL_DEFINED: int = 0x7F000F
RTIT_CTL_DEFINED: int = 0x180FFFF8F7BFFFF
EAX, EBX, ECX, EDX = 0, 1, 2, 3
# fmt: on


@kernel
def capability(a: Arena, msr: int) -> int:
    """The value of a capability MSR; 0 where the processor does not have it."""
    return a[a[A_CAPABILITIES] + msr - FIRST]


@kernel
def cpuid_register(a: Arena, leaf: int, subleaf: int, register: int) -> int:
    """One register of what CPUID answers; 0 for a leaf that the machine does not have."""
    line = a[A_CPUID]
    for _ in range(a[A_CPUID_COUNT]):
        if a[line] == leaf and (a[line + 1] == -1 or a[line + 1] == subleaf):
            return a[line + 2 + register]
        line += 6
    return 0


@kernel
def linear_bits(a: Arena) -> int:
    """How many bits of a linear address the processor has."""
    return 57 if capability(a, CR4_FIXED1) & CR4_LA57 else 48


@kernel
def is_canonical(address: int, bits: int) -> bool:
    """Are all bits above the linear-address width copies of the highest bit within it?"""
    high = address >> (bits - 1)
    return high == 0 or high == -1


@kernel
def bad_address(address: int, low: int, beyond: int) -> bool:
    """Does a physical address set bits of `low`, which must be 0, or beyond the physical-address width?"""
    return address & (low | beyond) != 0


@kernel
def bad_area(address: int, count: int, beyond: int) -> bool:
    """Is an MSR area misaligned, or not wholly within the physical-address width?"""
    if count == 0:
        return False
    last = address + count * 16 - 1
    return address & 15 != 0 or address & beyond != 0 or last & beyond != 0


@kernel
def bad_control(value: int, allowed: int) -> bool:
    """Does a 32-bit control word clear a bit that must be 1 or set one that must be 0?"""
    return allowed & 0xFFFFFFFF & ~value != 0 or value & ~((allowed >> 32) & 0xFFFFFFFF) != 0


@kernel
def true_controls(a: Arena, msr: int, true_msr: int) -> int:
    """Which settings a control word may have: the TRUE capability MSR where there is one.

    SDM: "Algorithms for Determining VMX Capabilities".
    """
    return capability(a, true_msr if (capability(a, BASIC) >> 55) & 1 else msr)


@kernel
def bad_cr0(a: Arena, value: int, free: int) -> bool:
    """Does CR0 hold a bit that VMX operation does not support? CD, NW and the bits of `free` are not looked at.

    SDM: "VMX-Fixed Bits in CR0".
    """
    free |= CR0_CD | CR0_NW
    return (capability(a, CR0_FIXED0) & ~value | value & ~capability(a, CR0_FIXED1)) & ~free != 0


@kernel
def bad_cr4(a: Arena, value: int) -> bool:
    """Does CR4 hold a bit that VMX operation does not support?

    SDM: "VMX-Fixed Bits in CR4".
    """
    return capability(a, CR4_FIXED0) & ~value != 0 or value & ~capability(a, CR4_FIXED1) != 0


@kernel
def bad_cr3(a: Arena, value: int, beyond: int) -> bool:
    """Does CR3 set a bit beyond the physical-address width? Bits 62:61 are free on a processor with LAM."""
    if cpuid_register(a, 7, 1, EAX) & 1 << 26:
        value &= ~(3 << 61)
    return value & beyond != 0


@kernel
def bad_pat(value: int) -> bool:
    """Is a byte none of the memory types UC, WC, WT, WP, WB, UC-?"""
    for n in range(8):
        kind = (value >> (8 * n)) & 0xFF
        if kind > 7 or kind == 2 or kind == 3:
            return True
    return False


@kernel
def bad_perf_global_ctrl(a: Arena, value: int) -> bool:
    """Is a bit set for a counter that the processor does not have?

    Without the leaf of performance monitoring there are four general counters and three with a fixed function.
    """
    general = (cpuid_register(a, 10, 0, EAX) >> 8) & 0xFF
    fixed = cpuid_register(a, 10, 0, EDX) & 0x1F
    if general == 0:
        general = 4
        fixed = 3
    counters = ((1 << general) - 1) | ((1 << fixed) - 1) << 32
    return value & ~counters != 0


@kernel
def bad_debugctl(a: Arena, value: int) -> bool:
    """Is a reserved bit of IA32_DEBUGCTL set?"""
    defined = DEBUGCTL_DEFINED
    if cpuid_register(a, 7, 0, ECX) & 1 << 24:
        defined |= DEBUGCTL_BUS_LOCK
    return value & ~defined != 0


@kernel
def bad_s_cet(value: int, bits: int) -> bool:
    """Is IA32_S_CET reserved bit 9:6 set, are both SUPPRESS and TRACKER, or is the bitmap address not canonical?"""
    return value & 0x3C0 != 0 or value & 0xC00 == 0xC00 or not is_canonical(value, bits)


@kernel
def bad_fred(a: Arena, config: int, first_rsp: int, first_ssp: int, bits: int) -> bool:
    """Are FRED MSRs not what WRMSR would accept? The offsets are those of RSP1 and SSP1, each of three."""
    if a[config] & 0x834 or not is_canonical(a[config], bits):
        return True
    for n in range(3):
        if a[first_rsp + n] & 0x3F or not is_canonical(a[first_rsp + n], bits):
            return True
        if a[first_ssp + n] & 7 or not is_canonical(a[first_ssp + n], bits):
            return True
    return False
