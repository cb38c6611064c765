"""In which mode the CPU is, and what its segment registers hold.

MODE is 0 in 64-bit mode, so that what is hot asks one word. Segments are numbered as VMCS fields are ordered.

SDM: "Modes of Operation"; "Segment Registers"; "Limit Checking"; "Type Checking".
Not modelled: CPL 1 and 2 apart from CPL 0 and 3 where pages are concerned.
"""

from __future__ import annotations

from vtsim.base.jit import Record, kernel
from vtsim.cpu import slots as s
from vtsim.vmcs import slots as v

# fmt: off
SEGMENTED, BIG, REAL, V86, LONG = 1, 2, 4, 8, 16
ES, CS, SS, DS, FS, GS, LDTR, TR = range(8)
BASES: int = s.STATE + v.GUEST_ES_BASE - v.GUEST_START
LIMITS_AT: int = s.STATE + v.GUEST_ES_LIMIT - v.GUEST_START
RIGHTS: int = s.STATE + v.GUEST_ES_ACCESS_RIGHTS - v.GUEST_START
SELECTORS_AT: int = s.ES_SELECTOR
UNUSABLE: int = 1 << 16
RF_VM: int = 1 << 17
LMA: int = 1 << 10
AR_S, AR_L, AR_D, AR_G, AR_P = 1 << 4, 1 << 13, 1 << 14, 1 << 15, 1 << 7
LOW32: int = 0xFFFFFFFF
# fmt: on


@kernel
def set_mode(m: Record) -> None:
    """Work out MODE: after CR0, EFER, RFLAGS.VM or CS changed."""
    rights = m[s.CS_ACCESS_RIGHTS]
    big = BIG if rights & AR_D else 0
    if m[s.CR0] & 1 == 0:
        m[s.MODE] = SEGMENTED | REAL | big
    elif m[s.RFLAGS] & RF_VM:
        m[s.MODE] = SEGMENTED | V86
    elif m[s.EFER] & LMA and rights & AR_L:
        m[s.MODE] = 0
    else:
        m[s.MODE] = SEGMENTED | big | (LONG if m[s.EFER] & LMA else 0)


@kernel
def cpl(m: Record) -> int:
    """The current privilege level, where VMX looks for it: SS.DPL."""
    return (m[RIGHTS + SS] >> 5) & 3


@kernel
def code_address(m: Record) -> int:
    """The linear address of the next instruction outside 64-bit mode."""
    return (m[s.RIP] + m[BASES + CS]) & LOW32


@kernel
def segment_allows(m: Record, segment: int, offset: int, size: int, write: bool) -> bool:
    """Do the segment's limit and type allow an access of `size` bytes? Outside 64-bit mode.

    SDM: "Limit Checking"; "Type Checking".
    """
    rights = m[RIGHTS + segment]
    if m[s.MODE] & (REAL | V86) == 0:
        if rights & UNUSABLE:
            return False
        code = rights & 8
        if write and (code or rights & 2 == 0):
            return False
        if not write and code and rights & 2 == 0:
            return False
    limit = m[LIMITS_AT + segment] & LOW32
    last = offset + max(size, 1) - 1
    if rights & 12 == 4 and rights & AR_S and m[s.MODE] & (REAL | V86) == 0:  # data, expand down
        top = LOW32 if rights & AR_D else 0xFFFF
        return offset > limit and last <= top
    return last <= limit


@kernel
def canonical(m: Record, gva: int) -> bool:
    """Is a linear address canonical in 64-bit mode?"""
    top = gva >> (56 if m[s.CR4] & (1 << 12) else 47)
    return top == 0 or top == -1


@kernel
def flat(m: Record, segment: int, selector: int, rights: int) -> None:
    """Load a segment register with a flat segment."""
    m[SELECTORS_AT + segment] = selector
    m[BASES + segment] = 0
    m[LIMITS_AT + segment] = LOW32
    m[RIGHTS + segment] = rights
