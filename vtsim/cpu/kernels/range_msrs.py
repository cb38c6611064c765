"""Memory-type range registers and clock counters, which hold values and nothing else here.

SDM: "Memory Type Range Registers (MTRRs)".
Not modelled: what ranges do to memory types; the counting of IA32_MPERF and IA32_APERF.
"""

from __future__ import annotations

from vtsim.base.jit import Record, kernel
from vtsim.cpu import slots as s

# fmt: off
FIRST_VARIABLE, FIXED_64K, FIRST_16K, FIRST_4K, DEFAULT_TYPE = 0x200, 0x250, 0x258, 0x268, 0x2FF
MPERF, APERF = 0xE7, 0xE8
VARIABLE_RANGES, FIXED_RANGES = 16, 11     # registers of each kind
# fmt: on


@kernel
def range_msr_slot(index: int) -> int:
    """The record slot of a memory-type range register or of a clock counter, or -1.

    SDM: "Memory Type Range Registers (MTRRs)".
    """
    if FIRST_VARIABLE <= index < FIRST_VARIABLE + VARIABLE_RANGES:
        return s.MTRR_VARIABLE + index - FIRST_VARIABLE
    if FIRST_4K <= index < FIRST_4K + 8:
        return s.MTRR_FIXED + 3 + index - FIRST_4K
    if index == FIXED_64K:
        return s.MTRR_FIXED
    if index == FIRST_16K or index == FIRST_16K + 1:
        return s.MTRR_FIXED + 1 + index - FIRST_16K
    if index == DEFAULT_TYPE:
        return s.MTRR_DEFAULT
    if index == MPERF or index == APERF:
        return s.CLOCKS + index - MPERF
    return -1


@kernel
def bad_memory_type(kind: int) -> bool:
    """Is this none of the memory types UC, WC, WT, WP and WB?"""
    return kind > 6 or kind == 2 or kind == 3


@kernel
def refuses_range(m: Record, slot: int, value: int) -> bool:
    """Would WRMSR of this value to a memory-type range register cause #GP?

    SDM: "Memory Type Range Registers (MTRRs)".
    """
    if slot == s.MTRR_DEFAULT:
        return value & ~0xCFF != 0 or bad_memory_type(value & 0xFF)
    if s.MTRR_FIXED <= slot < s.MTRR_FIXED + FIXED_RANGES:
        bad = 0
        for n in range(8):
            bad += bad_memory_type((value >> (8 * n)) & 0xFF)
        return bad != 0
    if value & (m[s.RESERVED_BITS] | -(1 << 52)):
        return True
    if (slot - s.MTRR_VARIABLE) & 1:
        return value & 0x7FF != 0
    return value & 0xF00 != 0 or bad_memory_type(value & 0xFF)
