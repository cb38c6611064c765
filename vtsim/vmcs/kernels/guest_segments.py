"""Checks on guest segment registers: selector, base, limit and access rights, in every mode.

SDM: "Checks on Guest Segment Registers".
"""

from __future__ import annotations

from vtsim.base.jit import Arena, kernel
from vtsim.vmcs import bits as b
from vtsim.vmcs import checks as c
from vtsim.vmcs import slots as v
from vtsim.vmcs.kernels.execution_controls import effective_secondary
from vtsim.vmcs.kernels.values import CR0_PE, is_canonical, linear_bits

# fmt: off
ES, CS, SS, DS, FS, GS, LDTR, TR = range(8)
RFLAGS_VM: int = 1 << 17
# access rights: type 3:0, S 4, DPL 6:5, P 7, reserved 11:8, AVL 12, L 13, D/B 14, G 15, unusable 16, reserved 31:17
ACCESSED, READABLE, EXPAND_DOWN_OR_CONFORMING, CODE = 1, 2, 4, 8
S, PRESENT, LONG, BIG, GRANULAR, UNUSABLE = 1 << 4, 1 << 7, 1 << 13, 1 << 14, 1 << 15, 1 << 16
RESERVED: int = 0xFFFE0F00
V86_RIGHTS, V86_LIMIT = 0xF3, 0xFFFF
# fmt: on


@kernel
def guest_segments_failure(a: Arena, at: int) -> int:
    """The first failed check on guest segment registers.

    SDM: "Checks on Guest Segment Registers".
    """
    virtual_8086 = a[at + v.GUEST_RFLAGS] & RFLAGS_VM != 0
    unrestricted = effective_secondary(a, at) & b.UNRESTRICTED_GUEST != 0
    failed = selectors_failure(a, at, virtual_8086, unrestricted)
    if failed == c.NONE:
        failed = bases_failure(a, at, virtual_8086)
    if failed == c.NONE and virtual_8086:
        failed = virtual_8086_failure(a, at)
    elif failed == c.NONE:
        failed = access_rights_failure(a, at, unrestricted)
    if failed == c.NONE:
        failed = system_segments_failure(a, at)
    return failed


@kernel
def rights_of(a: Arena, at: int, segment: int) -> int:
    """The access rights of a segment register."""
    return a[at + v.GUEST_ES_ACCESS_RIGHTS + segment]


@kernel
def is_usable(a: Arena, at: int, segment: int) -> bool:
    """Is a segment register usable?"""
    return rights_of(a, at, segment) & UNUSABLE == 0


@kernel
def selectors_failure(a: Arena, at: int, virtual_8086: bool, unrestricted: bool) -> int:
    """The first failed check on selectors."""
    if a[at + v.GUEST_TR_SELECTOR] & 4:
        return c.SELECTOR_TABLE + TR
    if is_usable(a, at, LDTR) and a[at + v.GUEST_LDTR_SELECTOR] & 4:
        return c.SELECTOR_TABLE + LDTR
    if not virtual_8086 and not unrestricted:
        if (a[at + v.GUEST_SS_SELECTOR] ^ a[at + v.GUEST_CS_SELECTOR]) & 3:
            return c.SELECTOR_RPL + SS
    return c.NONE


@kernel
def bases_failure(a: Arena, at: int, virtual_8086: bool) -> int:
    """The first failed check on bases."""
    if virtual_8086:
        for n in range(ES, GS + 1):
            if a[at + v.GUEST_ES_BASE + n] != a[at + v.GUEST_ES_SELECTOR + n] << 4:
                return c.BASE_V86 + n
    bits = linear_bits(a)
    for n in range(FS, TR + 1):
        if (n != LDTR or is_usable(a, at, LDTR)) and not is_canonical(a[at + v.GUEST_ES_BASE + n], bits):
            return c.BASE_LINEAR + n
    for n in range(ES, DS + 1):
        if (n == CS or is_usable(a, at, n)) and a[at + v.GUEST_ES_BASE + n] >> 32:
            return c.BASE_LINEAR + n
    return c.NONE


@kernel
def virtual_8086_failure(a: Arena, at: int) -> int:
    """The first failed check on limits and access rights in virtual-8086 mode."""
    for n in range(ES, GS + 1):
        if a[at + v.GUEST_ES_LIMIT + n] != V86_LIMIT:
            return c.LIMIT_V86 + n
    for n in range(ES, GS + 1):
        if rights_of(a, at, n) != V86_RIGHTS:
            return c.RIGHTS_V86 + n
    return c.NONE


@kernel
def bad_granularity(a: Arena, at: int, segment: int) -> bool:
    """Does G not go with the limit?"""
    limit = a[at + v.GUEST_ES_LIMIT + segment]
    if rights_of(a, at, segment) & GRANULAR:
        return limit & 0xFFF != 0xFFF
    return limit & 0xFFF00000 != 0


@kernel
def access_rights_failure(a: Arena, at: int, unrestricted: bool) -> int:
    """The first failed check on the access rights of CS, SS, DS, ES, FS and GS outside virtual-8086 mode."""
    for n in range(ES, GS + 1):
        if n != CS and not is_usable(a, at, n):
            continue
        kind = rights_of(a, at, n) & 15
        if n == CS:
            if kind & (CODE | ACCESSED) != CODE | ACCESSED and not (unrestricted and kind == 3):
                return c.TYPE + CS
        elif n == SS:
            if kind != 3 and kind != 7:
                return c.TYPE + SS
        elif kind & ACCESSED == 0 or kind & (CODE | READABLE) == CODE:
            return c.TYPE + n
        if rights_of(a, at, n) & S == 0:
            return c.DESCRIPTOR_TYPE + n
    failed = privilege_failure(a, at, unrestricted)
    if failed:
        return failed
    for n in range(ES, GS + 1):
        if n != CS and not is_usable(a, at, n):
            continue
        rights = rights_of(a, at, n)
        if rights & PRESENT == 0:
            return c.PRESENT + n
        if rights & RESERVED:
            return c.RIGHTS_RESERVED + n
        if n == CS and a[at + v.ENTRY_CONTROLS] & b.ENTRY_IA32E_MODE_GUEST and rights & LONG and rights & BIG:
            return c.CODE_SIZE + CS
        if bad_granularity(a, at, n):
            return c.GRANULARITY + n
    return c.NONE


@kernel
def privilege_failure(a: Arena, at: int, unrestricted: bool) -> int:
    """The first failed check on descriptor privilege levels."""
    kind = rights_of(a, at, CS) & 15
    level = (rights_of(a, at, CS) >> 5) & 3
    stack_level = (rights_of(a, at, SS) >> 5) & 3
    if kind == 3:
        if level:
            return c.DPL + CS
    elif kind & EXPAND_DOWN_OR_CONFORMING:
        if level > stack_level:
            return c.DPL + CS
    elif level != stack_level:
        return c.DPL + CS
    if not unrestricted and stack_level != a[at + v.GUEST_SS_SELECTOR] & 3:
        return c.DPL + SS
    if stack_level and (kind == 3 or a[at + v.GUEST_CR0] & CR0_PE == 0):
        return c.DPL + SS
    if unrestricted:
        return c.NONE
    for n in range(ES, GS + 1):
        if n == CS or n == SS or not is_usable(a, at, n):
            continue
        rights = rights_of(a, at, n)
        if rights & 15 < 12 and (rights >> 5) & 3 < a[at + v.GUEST_ES_SELECTOR + n] & 3:
            return c.DPL + n
    return c.NONE


@kernel
def system_segments_failure(a: Arena, at: int) -> int:
    """The first failed check on the access rights of TR and LDTR."""
    rights = rights_of(a, at, TR)
    if rights & 15 != 11 and (rights & 15 != 3 or a[at + v.ENTRY_CONTROLS] & b.ENTRY_IA32E_MODE_GUEST):
        return c.TYPE + TR
    if not is_usable(a, at, TR):
        return c.USABLE + TR
    if is_usable(a, at, LDTR) and rights_of(a, at, LDTR) & 15 != 2:
        return c.TYPE + LDTR
    for n in range(LDTR, TR + 1):
        if not is_usable(a, at, n):
            continue
        rights = rights_of(a, at, n)
        if rights & S:
            return c.DESCRIPTOR_TYPE + n
        if rights & PRESENT == 0:
            return c.PRESENT + n
        if rights & RESERVED:
            return c.RIGHTS_RESERVED + n
        if bad_granularity(a, at, n):
            return c.GRANULARITY + n
    return c.NONE
