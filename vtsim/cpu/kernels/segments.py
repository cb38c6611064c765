"""Descriptors: fetched from GDT and LDT, loaded into segment registers.

SDM: "Segment Descriptors"; "Loading Segment Registers"; "Code-Segment Descriptor in 64-bit Mode".
Not modelled: setting the accessed flag of descriptors in memory.
"""

from __future__ import annotations

from vtsim.base.jit import Arena, Record, Tags, kernel
from vtsim.cpu import slots as s
from vtsim.cpu.codes import EVENT, GP, NEXT, NP, SS
from vtsim.cpu.kernels import modes
from vtsim.cpu.kernels.exceptions import raise_exception, raise_fault
from vtsim.cpu.kernels.modes import BASES, LIMITS_AT, LOW32, RIGHTS, SELECTORS_AT, UNUSABLE, cpl
from vtsim.cpu.kernels.operands import SEGMENT_REFUSED, load_linear


@kernel
def fetch_descriptor(m: Record, a: Arena, t: Tags, selector: int) -> int:
    """The descriptor of a selector. FAULT_KIND is 0, SEGMENT_REFUSED beyond the table, or a translation's fault."""
    base = m[s.GDTR_BASE]
    limit = m[s.GDTR_LIMIT]
    if selector & 4:
        base = m[BASES + modes.LDTR]
        limit = m[LIMITS_AT + modes.LDTR]
        if m[RIGHTS + modes.LDTR] & UNUSABLE:
            limit = -1
    if (selector & 0xFFF8) + 7 > limit:
        m[s.FAULT_KIND] = SEGMENT_REFUSED
        return 0
    return load_linear(m, a, t, base + (selector & 0xFFF8), 8, 0)


@kernel
def rights_of(descriptor: int) -> int:
    """The access rights of a descriptor, as the VMCS holds them."""
    return (descriptor >> 40) & 0xF0FF


@kernel
def base_of(descriptor: int) -> int:
    """The base address in a descriptor of 8 bytes."""
    return ((descriptor >> 16) & 0xFFFFFF) | ((descriptor >> 56) & 0xFF) << 24


@kernel
def limit_of(descriptor: int) -> int:
    """The limit in a descriptor, in bytes."""
    limit = (descriptor & 0xFFFF) | ((descriptor >> 48) & 0xF) << 16
    if rights_of(descriptor) & modes.AR_G:
        limit = limit << 12 | 0xFFF
    return limit & LOW32


@kernel
def load_cached(m: Record, segment: int, selector: int, descriptor: int) -> None:
    """Fill a segment register from a descriptor."""
    m[SELECTORS_AT + segment] = selector
    m[BASES + segment] = base_of(descriptor)
    rights = rights_of(descriptor)
    m[LIMITS_AT + segment] = limit_of(descriptor)
    m[RIGHTS + segment] = rights | 1 if rights & modes.AR_S else rights


@kernel
def load_real(m: Record, segment: int, selector: int) -> None:
    """Load a segment register as real and virtual-8086 mode do: only selector and base change."""
    m[SELECTORS_AT + segment] = selector
    m[BASES + segment] = selector << 4
    if m[s.MODE] & modes.V86:
        m[LIMITS_AT + segment] = 0xFFFF
        m[RIGHTS + segment] = 0xF3


@kernel
def load_data_segment(m: Record, a: Arena, t: Tags, segment: int, selector: int) -> int:
    """MOV to ES, SS, DS, FS or GS: NEXT, or how it ended.

    SDM: "MOV—Move".
    """
    if m[s.MODE] & (modes.REAL | modes.V86):
        load_real(m, segment, selector)
        return NEXT
    ring = cpl(m)
    if selector & 0xFFFC == 0:
        if segment == modes.SS and (m[s.MODE] or ring == 3 or selector & 3 != ring):
            return raise_exception(m, GP, 1, 0)
        m[SELECTORS_AT + segment] = selector
        m[RIGHTS + segment] = UNUSABLE | (ring << 5 if segment == modes.SS else 0)
        return NEXT
    descriptor = fetch_descriptor(m, a, t, selector)
    error = selector & 0xFFFC
    if m[s.FAULT_KIND] == SEGMENT_REFUSED:
        return raise_exception(m, GP, 1, error)
    if m[s.FAULT_KIND]:
        return raise_fault(m, a, t, m[s.FAULT_KIND])
    rights = rights_of(descriptor)
    dpl = (rights >> 5) & 3
    if rights & modes.AR_S == 0:
        return raise_exception(m, GP, 1, error)
    if segment == modes.SS:
        if selector & 3 != ring or dpl != ring or rights & 8 or rights & 2 == 0:
            return raise_exception(m, GP, 1, error)
        if rights & modes.AR_P == 0:
            return raise_exception(m, SS, 1, error)
    else:
        if rights & 10 == 8:  # execute-only code
            return raise_exception(m, GP, 1, error)
        if rights & 12 != 12 and (selector & 3 > dpl or ring > dpl):
            return raise_exception(m, GP, 1, error)
        if rights & modes.AR_P == 0:
            return raise_exception(m, NP, 1, error)
    load_cached(m, segment, selector, descriptor)
    return NEXT


@kernel
def load_system_segment(m: Record, a: Arena, t: Tags, segment: int, selector: int) -> int:
    """LLDT and LTR: NEXT, or how it ended.

    SDM: "LLDT—Load Local Descriptor Table Register"; "LTR—Load Task Register".
    """
    if selector & 0xFFFC == 0:
        if segment == modes.TR:
            return raise_exception(m, GP, 1, 0)
        m[SELECTORS_AT + segment] = selector
        m[RIGHTS + segment] |= UNUSABLE
        return NEXT
    error = selector & 0xFFFC
    if selector & 4:
        return raise_exception(m, GP, 1, error)
    descriptor = fetch_descriptor(m, a, t, selector)
    if m[s.FAULT_KIND] == SEGMENT_REFUSED:
        return raise_exception(m, GP, 1, error)
    if m[s.FAULT_KIND]:
        return raise_fault(m, a, t, m[s.FAULT_KIND])
    rights = rights_of(descriptor)
    kind = rights & 0x1F
    good = kind == 2 if segment == modes.LDTR else kind == 9 or (kind == 1 and m[s.EFER] & modes.LMA == 0)
    if not good:
        return raise_exception(m, GP, 1, error)
    if rights & modes.AR_P == 0:
        return raise_exception(m, NP, 1, error)
    high = 0
    if m[s.EFER] & modes.LMA:
        high = load_linear(m, a, t, m[s.GDTR_BASE] + (selector & 0xFFF8) + 8, 8, 0)
        if m[s.FAULT_KIND]:
            return raise_fault(m, a, t, m[s.FAULT_KIND])
    load_cached(m, segment, selector, descriptor)
    m[BASES + segment] |= (high & LOW32) << 32
    if segment == modes.TR:
        m[RIGHTS + segment] |= 2
    return NEXT


@kernel
def refuse_code(m: Record, a: Arena, t: Tags, error: int) -> int:
    """A code descriptor could not be fetched: #GP with its selector, or the translation's fault."""
    if m[s.FAULT_KIND] == SEGMENT_REFUSED:
        return raise_exception(m, GP, 1, error)
    ended = raise_fault(m, a, t, m[s.FAULT_KIND])
    return ended if ended else EVENT
