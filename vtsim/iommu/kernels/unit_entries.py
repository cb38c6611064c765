"""From a requester to what translates it: root, context, PASID directory and PASID table entries, and their caches.

VT-d: "Root Entry"; "Context Entry"; "Scalable-Mode Context Entry"; "Scalable-Mode PASID Table Entry".
"""

from __future__ import annotations

from vtsim.base.jit import Arena, Record, kernel
from vtsim.iommu import entries as e
from vtsim.iommu import faults as f
from vtsim.iommu import spec as sp
from vtsim.iommu.kernels.memory_types import types_are_legal
from vtsim.iommu.kernels.second_level import capable, extended
from vtsim.iommu.kernels.unit_caches import NEGATIVE, held_by_unit, make_room, refused_before, remember_refusal
from vtsim.iommu.kernels.unit_memory import note_step, read_entry, readable, word_seen
from vtsim.iommu.state import (
    CONTEXT_0,
    CONTEXT_1,
    CONTEXTS,
    DATA,
    FPD_SEEN,
    HOST_RESERVED,
    N_CONTEXT_HITS,
    N_CONTEXT_MISSES,
    N_PASID_HITS,
    N_PASID_MISSES,
    PASID_0,
    PASID_1,
    PASID_2,
    PASIDS,
    REGISTERS,
    ROOT_TABLE,
    SCALABLE,
    SERVED,
    STEP_CACHE,
    STEP_CONTEXT,
    STEP_DIRECTORY,
    STEP_PASID,
    STEP_ROOT,
)

# fmt: off
SERVED_CONTEXT, SERVED_PASID, SERVED_4K = 1 << 0, 1 << 1, 1 << 2
# fmt: on


@kernel
def width_supported(u: Record, width: int) -> bool:
    """Is this adjusted guest address width one that the capability register lists?"""
    return width >= 1 and width <= 3 and capable(u, 1 << (sp.CAP_SAGAW + width))


@kernel
def widest(u: Record) -> int:
    """The largest adjusted guest address width that the capability register lists, or 0."""
    for width in range(3, 0, -1):
        if capable(u, 1 << (sp.CAP_SAGAW + width)):
            return width
    return 0


@kernel
def domain_reserved(u: Record) -> int:
    """Bits of a 16-bit domain identifier that are beyond the number of domains."""
    return 0xFFFF & ~((1 << (4 + 2 * (u[REGISTERS + (sp.CAP >> 3)] & 7))) - 1)


@kernel
def find_context(u: Record, a: Arena, sid: int) -> int:
    """The context entry of a requester in CONTEXT_0 and CONTEXT_1: from its cache, else from memory; a reason, or 0."""
    known = held_by_unit(u, CONTEXTS, sid, u[SCALABLE])
    if known >= 0:
        u[N_CONTEXT_HITS] += 1
        u[SERVED] |= SERVED_CONTEXT
        u[CONTEXT_0] = u[known + DATA]
        u[CONTEXT_1] = u[known + DATA + 1]
        u[FPD_SEEN] |= u[CONTEXT_0] & e.FPD
        note_step(u, STEP_CACHE, 0, CONTEXTS, u[CONTEXT_0])
        return 0
    u[N_CONTEXT_MISSES] += 1
    reason = refused_before(u, CONTEXTS, sid, u[SCALABLE])
    if reason != 0:
        u[FPD_SEEN] |= u[held_by_unit(u, CONTEXTS, sid, u[SCALABLE] | NEGATIVE) + DATA] & e.FPD
        return reason
    u[CONTEXT_0] = 0
    reason = scalable_context(u, a, sid) if u[SCALABLE] != 0 else legacy_context(u, a, sid)
    if reason != 0:
        remember_refusal(u, CONTEXTS, sid, u[SCALABLE], u[CONTEXT_0], reason)
        return reason
    at = make_room(u, CONTEXTS, sid, u[SCALABLE])
    if at >= 0:
        u[at + DATA] = u[CONTEXT_0]
        u[at + DATA + 1] = u[CONTEXT_1]
    return 0


@kernel
def legacy_context(u: Record, a: Arena, sid: int) -> int:
    """Read root and context entries of legacy mode; a fault reason, or 0."""
    where = (u[ROOT_TABLE] & e.POINTER) + (sid >> 8) * 16
    if not readable(u, a, where, 16):
        return f.ROOT_ACCESS
    root = read_entry(u, a, STEP_ROOT, 0, where)
    if root & e.PRESENT == 0:
        return f.ROOT_NOT_PRESENT
    if root & (e.ROOT_RESERVED_0 | (e.POINTER & u[HOST_RESERVED])) != 0 or word_seen(u, a, where + 8) != 0:
        return f.ROOT_RESERVED
    where = (root & e.POINTER) + (sid & 0xFF) * 16
    if not readable(u, a, where, 16):
        return f.CONTEXT_ACCESS
    low = read_entry(u, a, STEP_CONTEXT, 0, where)
    high = word_seen(u, a, where + 8)
    u[CONTEXT_0] = low
    u[CONTEXT_1] = high
    u[FPD_SEEN] |= low & e.FPD
    if low & e.PRESENT == 0:
        return f.CONTEXT_NOT_PRESENT
    kind = (low >> e.TT_SHIFT) & 3
    reserved = e.CONTEXT_RESERVED_0
    if kind != e.TT_PASS_THROUGH:
        reserved |= e.POINTER & u[HOST_RESERVED]
    if low & reserved != 0 or high & (e.CONTEXT_RESERVED_1 | domain_reserved(u) << e.CONTEXT_DID) != 0:
        return f.CONTEXT_RESERVED
    width = high & e.CONTEXT_AW
    if kind == e.TT_RESERVED or (kind == e.TT_ALL and not extended(u, sp.ECAP_DT)):
        return f.CONTEXT_INVALID
    if kind == e.TT_PASS_THROUGH and (not extended(u, sp.ECAP_PT) or width != widest(u)):
        return f.CONTEXT_INVALID
    if not width_supported(u, width):
        return f.CONTEXT_INVALID
    return 0


@kernel
def scalable_context(u: Record, a: Arena, sid: int) -> int:
    """Read root and context entries of scalable mode; a fault reason, or 0."""
    where = (u[ROOT_TABLE] & e.POINTER) + (sid >> 8) * 16
    if not readable(u, a, where, 16):
        return f.SCALABLE_ROOT_ACCESS
    root = read_entry(u, a, STEP_ROOT, 0, where)
    if sid & 0x80 != 0:
        root = word_seen(u, a, where + 8)
    if root & e.PRESENT == 0:
        return f.SCALABLE_ROOT_NOT_PRESENT
    if root & (e.SCALABLE_ROOT_RESERVED | (e.POINTER & u[HOST_RESERVED])) != 0:
        return f.SCALABLE_ROOT_RESERVED
    where = (root & e.POINTER) + (sid & 0x7F) * 32
    if not readable(u, a, where, 32):
        return f.SCALABLE_CONTEXT_ACCESS
    low = read_entry(u, a, STEP_CONTEXT, 0, where)
    high = word_seen(u, a, where + 8)
    u[CONTEXT_0] = low
    u[CONTEXT_1] = high
    u[FPD_SEEN] |= low & e.FPD
    if low & e.PRESENT == 0:
        return f.SCALABLE_CONTEXT_NOT_PRESENT
    reserved = e.SCALABLE_CONTEXT_RESERVED_0 | (e.POINTER & u[HOST_RESERVED])
    if not extended(u, sp.ECAP_DT):
        reserved |= e.DTE
    if not extended(u, sp.ECAP_PASID):
        reserved |= e.PASIDE
    if not extended(u, sp.ECAP_PRS):
        reserved |= e.PRE
    more = e.SCALABLE_CONTEXT_RESERVED_1
    if not extended(u, sp.ECAP_RPS):
        more |= e.RID_PASID
    if not extended(u, sp.ECAP_RPRIVS):
        more |= e.RID_PRIV
    rest = word_seen(u, a, where + 16) | word_seen(u, a, where + 24)
    if low & reserved != 0 or high & more != 0 or rest != 0:
        return f.SCALABLE_CONTEXT_RESERVED
    if low & e.PRE != 0 and low & e.DTE == 0:
        return f.SCALABLE_CONTEXT_INVALID
    return 0


@kernel
def pasid_limit(u: Record) -> int:
    """The number of PASIDs that the PASID directory of the context entry in work has room for."""
    return 1 << (((u[CONTEXT_0] >> e.PDTS_SHIFT) & 7) + 13)


@kernel
def find_pasid(u: Record, a: Arena, sid: int, pasid: int) -> int:
    """The PASID table entry in PASID_0 to PASID_2, from its cache, else from memory; a fault reason, or 0."""
    known = held_by_unit(u, PASIDS, pasid, sid)
    if known >= 0:
        u[N_PASID_HITS] += 1
        u[SERVED] |= SERVED_PASID
        u[PASID_0] = u[known + DATA]
        u[PASID_1] = u[known + DATA + 1]
        u[PASID_2] = u[known + DATA + 2]
        u[FPD_SEEN] |= u[PASID_0] & e.FPD
        note_step(u, STEP_CACHE, 0, PASIDS, u[PASID_0])
        return 0
    u[N_PASID_MISSES] += 1
    reason = refused_before(u, PASIDS, pasid, sid)
    if reason != 0:
        u[FPD_SEEN] |= u[held_by_unit(u, PASIDS, pasid, sid | NEGATIVE) + DATA] & e.FPD
        return reason
    u[PASID_0] = 0
    reason = read_pasid(u, a, pasid)
    if reason != 0:
        remember_refusal(u, PASIDS, pasid, sid, u[PASID_0], reason)
        return reason
    at = make_room(u, PASIDS, pasid, sid)
    if at >= 0:
        u[at + DATA] = u[PASID_0]
        u[at + DATA + 1] = u[PASID_1]
        u[at + DATA + 2] = u[PASID_2]
    return 0


@kernel
def read_pasid(u: Record, a: Arena, pasid: int) -> int:
    """Read PASID directory and PASID table entries; a fault reason, or 0."""
    where = (u[CONTEXT_0] & e.POINTER) + (pasid >> 6) * 8
    if not readable(u, a, where, 8):
        return f.DIRECTORY_ACCESS
    entry = read_entry(u, a, STEP_DIRECTORY, 0, where)
    u[FPD_SEEN] |= entry & e.FPD
    u[PASID_0] = entry & e.FPD
    if entry & e.PRESENT == 0:
        return f.DIRECTORY_NOT_PRESENT
    if entry & (e.DIRECTORY_RESERVED | (e.POINTER & u[HOST_RESERVED])) != 0:
        return f.DIRECTORY_RESERVED
    where = (entry & e.POINTER) + (pasid & 0x3F) * 64
    if not readable(u, a, where, 64):
        return f.PASID_ACCESS
    u[PASID_0] = read_entry(u, a, STEP_PASID, 0, where) | (entry & e.FPD)  # the cached entry silences for both
    u[PASID_1] = word_seen(u, a, where + 8)
    u[PASID_2] = word_seen(u, a, where + 16)
    u[FPD_SEEN] |= u[PASID_0] & e.FPD
    if u[PASID_0] & e.PRESENT == 0:
        return f.PASID_NOT_PRESENT
    rest = 0
    for word in range(3, 8):
        rest |= word_seen(u, a, where + 8 * word)
    if rest != 0 or pasid_reserved(u):
        return f.PASID_RESERVED
    return pasid_programming(u)


@kernel
def pasid_reserved(u: Record) -> bool:
    """Are bits set in the PASID entry in work that are reserved, or that a missing capability reserves?"""
    kind = (u[PASID_0] >> e.PGTT_SHIFT) & 7
    reserved = e.PASID_RESERVED_0
    if not extended(u, sp.ECAP_SLADS):
        reserved |= e.SLADE
    if kind == e.PGTT_SECOND or kind == e.PGTT_NESTED:
        reserved |= e.POINTER & u[HOST_RESERVED]
    if u[PASID_0] & reserved != 0:
        return True
    reserved = e.PASID_RESERVED_1 | domain_reserved(u)
    if not extended(u, sp.ECAP_SMPWC):
        reserved |= e.PWSNP
    if not extended(u, sp.ECAP_SC):
        reserved |= e.PGSNP
    if not extended(u, sp.ECAP_MTS):
        reserved |= e.MEMORY_TYPING
    if u[PASID_1] & reserved != 0:
        return True
    reserved = e.PASID_RESERVED_2
    if not extended(u, sp.ECAP_SRS):
        reserved |= e.SRE
    if not extended(u, sp.ECAP_ERS):
        reserved |= e.ERE
    if not extended(u, sp.ECAP_EAFS):
        reserved |= e.EAFE
    if kind == e.PGTT_FIRST:
        reserved |= e.POINTER & u[HOST_RESERVED]
    return u[PASID_2] & reserved != 0


@kernel
def pasid_programming(u: Record) -> int:
    """Is the translation type of the PASID entry in work one that the unit has, and widths? Reason or 0."""
    kind = (u[PASID_0] >> e.PGTT_SHIFT) & 7
    first = kind == e.PGTT_FIRST or kind == e.PGTT_NESTED
    second = kind == e.PGTT_SECOND or kind == e.PGTT_NESTED
    mode = (u[PASID_2] >> e.FLPM_SHIFT) & 3
    if kind < e.PGTT_FIRST or kind > e.PGTT_PASS_THROUGH:
        return f.PASID_INVALID
    if first and (not extended(u, sp.ECAP_FLTS) or mode > 1 or (mode == 1 and not capable(u, sp.CAP_FL5LP))):
        return f.PASID_INVALID
    if second and (not extended(u, sp.ECAP_SLTS) or not width_supported(u, (u[PASID_0] >> e.PASID_AW_SHIFT) & 7)):
        return f.PASID_INVALID
    if kind == e.PGTT_NESTED and not extended(u, sp.ECAP_NEST):
        return f.PASID_INVALID
    if kind == e.PGTT_PASS_THROUGH and not extended(u, sp.ECAP_PT):
        return f.PASID_INVALID
    return 0 if types_are_legal(u) else f.PASID_INVALID
