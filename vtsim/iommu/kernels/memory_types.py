"""The memory type of a page for devices within the processors' coherency domain, from PAT, MTRRs and second level.

A unit that says MTS stands for one with such devices under it; for all others types do not count. A type is kept with
the translation: PASID entries that share a domain, and so the IOTLB entries of its second level, have to agree.

VT-d: "Memory Type"; "Scalable-Mode PASID Table Entry"; "Second-Stage Paging Entries"; "MTRR Capability Register".
SDM: "Memory Type Range Registers (MTRRs)"; "Selecting Memory Types for Pentium III and More Recent Processor Families".
Not modelled: the types of the unit's own reads of tables (PCD and PWT of what leads to a table; EMT of a PASID entry).
"""

from __future__ import annotations

from vtsim.base.jit import Record, kernel
from vtsim.ept import memory_types as m
from vtsim.ept.spec import LEGAL_TYPES
from vtsim.iommu import entries as e
from vtsim.iommu import spec as sp
from vtsim.iommu.state import LEAF_ENTRY, PASID_0, PASID_1, REGISTERS, TYPE, WALK_PAT

FIXED_END: int = 0x10_0000
PAGE_BASE: int = ~0xFFF


@kernel
def is_legal_type(kind: int) -> bool:
    """Is this UC, WC, WT, WP or WB?"""
    return (LEGAL_TYPES >> kind) & 1 != 0


@kernel
def pat_is_legal(pat: int) -> bool:
    """Are all eight entries of a PAT, four bits each, memory types? UC- is one in a PAT."""
    for place in range(0, 32, 4):
        kind = (pat >> place) & 0xF
        if kind != m.UC_MINUS and (kind > 7 or not is_legal_type(kind)):
            return False
    return True


@kernel
def types_are_legal(u: Record) -> bool:
    """Are the types legal that the PASID entry in work gives, as far as its kind of translation uses them?"""
    kind = (u[PASID_0] >> e.PGTT_SHIFT) & 7
    word = u[PASID_1]
    if kind == e.PGTT_FIRST or kind == e.PGTT_NESTED:
        if not pat_is_legal((word >> e.PAT_SHIFT) & 0xFFFF_FFFF):
            return False
    if (kind == e.PGTT_SECOND or kind == e.PGTT_NESTED) and word & e.EMTE != 0:
        return is_legal_type((word >> e.EMT_SHIFT) & 7)
    return True


@kernel
def range_type(u: Record, hpa: int) -> int:
    """The type that the unit's MTRRs give an address; where ranges overlap in another way than is allowed, UC."""
    control = u[REGISTERS + (sp.MTRRDEF >> 3)]
    if control & sp.MTRR_E == 0:
        return m.UC
    if hpa < FIXED_END and control & sp.MTRR_FE != 0:
        if hpa < 0x8_0000:
            place = hpa >> 16
        elif hpa < 0xC_0000:
            place = 8 + ((hpa - 0x8_0000) >> 14)
        else:
            place = 24 + ((hpa - 0xC_0000) >> 12)
        kind = (u[REGISTERS + (sp.MTRR_FIXED >> 3) + (place >> 3)] >> ((place & 7) << 3)) & 7
        return kind if is_legal_type(kind) else m.UC
    found = -1
    for n in range(sp.VARIABLE_MTRRS):
        at = REGISTERS + (sp.MTRR_BASE >> 3) + 2 * n
        mask = u[at + 1] & PAGE_BASE
        if u[at + 1] & sp.MTRR_V == 0 or (hpa ^ u[at]) & mask != 0:
            continue
        kind = u[at] & 7
        if found >= 0 and found != kind:
            kind = m.WT if found + kind == m.WT + m.WB else m.UC
        found = kind
    if found < 0:
        found = control & 7
    return found if is_legal_type(found) else m.UC


@kernel
def untranslated_type(u: Record, hpa: int, disabled: bool) -> int:
    """The type of an address that nothing translates."""
    return m.UC if disabled else range_type(u, hpa)


@kernel
def page_type(u: Record, hpa: int) -> int:
    """The type of the page at which the walk in work has ended."""
    word = u[PASID_1]
    if word & e.CD != 0:
        return m.UC
    outer = u[LEAF_ENTRY] if u[TYPE] != e.PGTT_FIRST and word & e.EMTE != 0 else -1
    below = (outer >> e.SL_EMT_SHIFT) & 7 if outer != -1 else range_type(u, hpa)
    if u[TYPE] == e.PGTT_SECOND or (outer != -1 and outer & e.SL_IPAT != 0):
        return below
    pat = (word >> (e.PAT_SHIFT + 4 * u[WALK_PAT])) & 0xF
    return (m.EFFECTIVE[below] >> (4 * pat)) & 0xF
