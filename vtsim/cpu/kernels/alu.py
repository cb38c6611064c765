"""Flags of arithmetic on general registers, and the conditions on them."""

from __future__ import annotations

from vtsim.base.jit import kernel
from vtsim.cpu.codes import ARITHMETIC, RF_CF, RF_OF, RF_SF, RF_ZF

LOWEST: int = -(1 << 63)


@kernel
def holds(rflags: int, truth: int) -> bool:
    """Does a condition hold? Bit n of `truth` says so for CF | ZF << 1 | SF << 2 | OF << 3 being n."""
    return (truth >> ((rflags & 1) | (rflags >> 5) & 6 | (rflags >> 8) & 8)) & 1 != 0


@kernel
def below(left: int, right: int) -> bool:
    """Unsigned comparison of two's-complement words."""
    return left ^ LOWEST < right ^ LOWEST


@kernel
def shifted_right(value: int, bits: int) -> int:
    """A logical shift by 0 to 63."""
    return (value >> bits) & ((LOWEST >> bits << 1) ^ -1) if bits else value


@kernel
def with_flags(rflags: int, result: int, carry: bool, overflow: bool) -> int:
    """RFLAGS after an operation with this result."""
    flags = (RF_CF if carry else 0) | (RF_OF if overflow else 0) | (RF_ZF if result == 0 else 0)
    return (rflags & ~ARITHMETIC) | flags | (RF_SF if result < 0 else 0)
