"""Results and flags of arithmetic on operands of 1, 2, 4 and 8 bytes.

SDM: "Status Flags".
"""

from __future__ import annotations

from vtsim.base.jit import Record, kernel
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.codes import (
    ARITHMETIC,
    RF_AF,
    RF_CF,
    RF_OF,
    RF_PF,
    RF_SF,
    RF_ZF,
)


@kernel
def low_parity(value: int) -> bool:
    """Has the low byte an even number of ones?"""
    bits = value & 0xFF
    bits ^= bits >> 4
    bits ^= bits >> 2
    bits ^= bits >> 1
    return bits & 1 == 0


@kernel
def arithmetic_result(m: Record, left: int, right: int, kind: int, size: int) -> int:
    """The result of an arithmetic kind; flags are set.

    SDM: "Status Flags".
    """
    bits = 8 * size
    mask = (1 << bits) - 1 if size < 8 else -1
    sign = 1 << (bits - 1) if size < 8 else -(1 << 63)
    left &= mask
    right &= mask
    carry = m[s.RFLAGS] & RF_CF
    flags = 0
    if kind == o.K_INC or kind == o.K_DEC:
        right = 1
    if kind == o.K_ADD or kind == o.K_ADC or kind == o.K_INC:
        extra = carry if kind == o.K_ADC else 0
        result = (left + right + extra) & mask
        over = ((left & right) | ((left | right) & ~result)) & sign
        if over:
            flags |= RF_CF
        if (left ^ result) & (right ^ result) & sign:
            flags |= RF_OF
    elif kind == o.K_SUB or kind == o.K_SBB or kind == o.K_CMP or kind == o.K_DEC:
        extra = carry if kind == o.K_SBB else 0
        result = (left - right - extra) & mask
        if ((~left & right) | ((~left | right) & result)) & sign:
            flags |= RF_CF
        if (left ^ right) & (left ^ result) & sign:
            flags |= RF_OF
    elif kind == o.K_OR:
        result = left | right
    elif kind == o.K_XOR:
        result = left ^ right
    else:
        result = left & right
    if kind == o.K_INC or kind == o.K_DEC:
        flags = (flags & ~RF_CF) | carry
    if result & mask == 0:
        flags |= RF_ZF
    if result & sign:
        flags |= RF_SF
    if low_parity(result):
        flags |= RF_PF
    logical = kind == o.K_OR or kind == o.K_XOR or kind == o.K_AND or kind == o.K_TEST
    if not logical and (left ^ right ^ result) & 16:
        flags |= RF_AF
    m[s.RFLAGS] = (m[s.RFLAGS] & ~ARITHMETIC) | flags
    return result
