"""Arithmetic of general registers, and the conditions on its flags."""

from __future__ import annotations

from vtsim.base.jit import Arena, Record, kernel
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.codes import ARITHMETIC, RF_CF, RF_OF, RF_SF, RF_ZF


@kernel
def holds(flags: int, condition: int) -> bool:
    """Does a condition hold in these flags?"""
    zero = flags & RF_ZF != 0
    carry = flags & RF_CF != 0
    sign = flags & RF_SF != 0
    less = sign != (flags & RF_OF != 0)
    if condition == o.CC_Z:
        return zero
    if condition == o.CC_NZ:
        return not zero
    if condition == o.CC_B:
        return carry
    if condition == o.CC_AE:
        return not carry
    if condition == o.CC_S:
        return sign
    if condition == o.CC_NS:
        return not sign
    if condition == o.CC_L:
        return less
    if condition == o.CC_GE:
        return not less
    if condition == o.CC_LE:
        return less or zero
    if condition == o.CC_G:
        return not less and not zero
    if condition == o.CC_BE:
        return carry or zero
    return not carry and not zero


@kernel
def below(left: int, right: int) -> bool:
    """Unsigned comparison of two's-complement words."""
    if (left < 0) != (right < 0):
        return right < 0
    return left < right


@kernel
def arithmetic(m: Record, a: Arena, r: int, op: int, rflags: int) -> int:
    """ADD SUB AND OR XOR SHL SHR CMP TEST: RFLAGS with the flags that conditions read."""
    target = s.GPR + a[r + o.ROW_R1]
    left = m[target]
    source = a[r + o.ROW_R2]
    right = m[s.GPR + source] if source < 16 else a[r + o.ROW_IMM]
    flags = 0
    if op == o.ADD:
        result = left + right
        if below(result, left):
            flags = RF_CF
        if (left ^ result) & (right ^ result) < 0:
            flags |= RF_OF
    elif op == o.SUB or op == o.CMP:
        result = left - right
        if below(left, right):
            flags = RF_CF
        if (left ^ right) & (left ^ result) < 0:
            flags |= RF_OF
    elif op == o.AND or op == o.TEST:
        result = left & right
    elif op == o.OR:
        result = left | right
    elif op == o.XOR:
        result = left ^ right
    elif op == o.SHL:
        result = left << (right & 63)
    else:
        bits = right & 63
        result = left
        if bits:
            result = (left >> bits) & ((1 << (64 - bits)) - 1)
    if result == 0:
        flags |= RF_ZF
    elif result < 0:
        flags |= RF_SF
    if op != o.CMP and op != o.TEST:
        m[target] = result
    return (rflags & ~ARITHMETIC) | flags
