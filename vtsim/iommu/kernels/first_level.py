"""First-level and nested translation: the processes' own tables, themselves translated by the second level if nested.

VT-d: "First-Stage Translation"; "First-Stage Paging Entries"; "Nested Translation".
"""

from __future__ import annotations

from vtsim.base.jit import Arena, Record, kernel
from vtsim.base.memory import is_memory
from vtsim.iommu import faults as f
from vtsim.iommu import spec as sp
from vtsim.iommu.entries import ADDRESS as ENTRY_ADDRESS
from vtsim.iommu.entries import (
    EAFE,
    FL_A,
    FL_D,
    FL_EA,
    FL_PAT_LARGE,
    FL_PS,
    FL_PWT_SHIFT,
    FL_RW,
    FL_US,
    FL_XD,
    FLPM_SHIFT,
    NXE,
    PASID_AW_SHIFT,
    PGSNP,
    PGTT_NESTED,
    POINTER,
    PRESENT,
    SL_D,
    SLADE,
    WPE,
)
from vtsim.iommu.kernels.second_level import (
    IS_DIRTY,
    MAY_EXECUTE,
    MAY_READ,
    MAY_WRITE,
    NOTHING_PERMITTED,
    SECOND_SHIFT,
    SNOOPED,
    USER_PAGE,
    capable,
    extended,
    second_flags,
    walk_second,
    walks_snoop,
)
from vtsim.iommu.kernels.unit_memory import flags_can_be_set, pend, read_entry, walk_begins
from vtsim.iommu.state import (
    CACHE_WORDS,
    FIRST_2,
    HOST_RESERVED,
    LEAF_AT,
    LEAF_ENTRY,
    PASID_0,
    PASID_1,
    PASID_2,
    STEP_FIRST,
    TAG_MORE_NOW,
    TYPE,
    WALK_HPA,
    WALK_PAT,
    WALK_RIGHTS,
    WALK_SHIFT,
)


@kernel
def second_levels(u: Record) -> int:
    """Levels of the second-level tables that the PASID entry in work names."""
    return ((u[PASID_0] >> PASID_AW_SHIFT) & 7) + 2


@kernel
def nested_second(u: Record, a: Arena, gpa: int, writes: bool) -> int:
    """Walk the second level for a guest-physical address of the request in work."""
    return walk_second(u, a, u[PASID_0] & POINTER, second_levels(u), gpa, writes)


@kernel
def beyond_second(u: Record, gpa: int) -> bool:
    """Is a guest-physical address beyond the width of the second-level tables?"""
    return gpa >> (12 + 9 * second_levels(u)) != 0


@kernel
def first_reserved(u: Record, entry: int, level: int) -> bool:
    """Are bits set that are reserved in a first-level entry of this level?"""
    if u[TYPE] != PGTT_NESTED and entry & ENTRY_ADDRESS & u[HOST_RESERVED] != 0:
        return True
    if entry & FL_XD != 0 and u[PASID_2] & NXE == 0:
        return True
    if level > 1 and entry & FL_PS != 0:
        if level > 3 or (level == 3 and not capable(u, sp.CAP_FL1GP)):
            return True
        return entry & ((1 << (12 + 9 * (level - 1))) - 0x2000) != 0
    return False


@kernel
def first_table(u: Record, a: Arena, table: int, top: bool) -> int:
    """Find a first-level table in memory: its host-physical address in WALK_HPA; a fault reason, or 0."""
    if u[TYPE] != PGTT_NESTED:
        u[WALK_HPA] = table
        return 0
    if beyond_second(u, table):
        return f.FIRST_LEVEL_BEYOND
    reason = nested_second(u, a, table, False)
    if reason == NOTHING_PERMITTED or (reason == 0 and u[WALK_RIGHTS] & MAY_READ == 0):
        return f.NESTED_NO_READ_TOP if top else f.NESTED_NO_READ
    return reason


@kernel
def first_flags(u: Record, a: Arena, where: int, wanted: int, snooped: bool) -> int:
    """Have the flags of a first-level entry set on success; in a nested walk that is a write to the guest's memory."""
    if not snooped:
        return f.FIRST_FLAGS_NOT_SNOOPED
    if u[TYPE] == PGTT_NESTED:
        if u[WALK_RIGHTS] & MAY_WRITE == 0:
            return f.NESTED_NO_WRITE
        if u[PASID_0] & SLADE != 0:
            reason = second_flags(u, a, u[LEAF_AT], u[LEAF_ENTRY], SL_D)
            if reason != 0:
                return reason
    if not flags_can_be_set(a, where):
        return f.FIRST_FLAGS_FAILED
    pend(u, 0, where, 0, wanted, 0)
    return 0


@kernel
def is_sign_extended(address: int, levels: int) -> bool:
    """Are the bits above those that this many levels translate copies of the highest of them?"""
    high = address >> (11 + 9 * levels)
    return high == 0 or high == -1


@kernel
def walk_first(u: Record, a: Arena, address: int, writes: bool, user: bool) -> int:
    """Walk to the page of `address`: host-physical address, shift and rights in WALK_…; a fault reason, or 0.

    In a nested walk the rights of the second level stand above, by SECOND_SHIFT; the page is the smaller of the two.
    """
    levels = 4 + ((u[PASID_2] >> FLPM_SHIFT) & 1)
    if not is_sign_extended(address, levels):
        return f.NOT_CANONICAL
    more = u[TAG_MORE_NOW]
    table = u[PASID_2] & POINTER
    rights = MAY_READ | MAY_WRITE | MAY_EXECUTE | USER_PAGE
    level = walk_begins(u, FIRST_2, levels, address, more, 5)
    if level < levels:
        table = u[WALK_HPA]
        rights = u[WALK_RIGHTS]
    nested = u[TYPE] == PGTT_NESTED
    snooped = walks_snoop(u)
    while True:
        top = level == levels
        reason = first_table(u, a, table, top)
        if reason != 0:
            return reason
        where = u[WALK_HPA] + ((address >> (9 * level)) & 0xFF8)
        if not is_memory(a, where):
            return f.FIRST_LEVEL_TOP_ACCESS if top else f.FIRST_LEVEL_ACCESS
        entry = read_entry(u, a, STEP_FIRST, level, where)
        if entry & PRESENT == 0:
            return f.FIRST_LEVEL_NOT_PRESENT
        if first_reserved(u, entry, level):
            return f.FIRST_LEVEL_RESERVED
        if entry & FL_RW == 0:
            rights &= ~MAY_WRITE
        if entry & FL_US == 0:
            rights &= ~USER_PAGE
        if entry & FL_XD != 0:
            rights &= ~MAY_EXECUTE
        leaf = level == 1 or entry & FL_PS != 0
        wanted = FL_A
        if u[PASID_2] & EAFE != 0 and extended(u, sp.ECAP_EAFS):
            wanted |= FL_EA
        dirties = leaf and writes and may_write(u, rights, user)
        if dirties and not nested:
            wanted |= FL_D
        if entry & wanted != wanted:
            reason = first_flags(u, a, where, wanted, snooped)
            if reason != 0:
                return reason
        if leaf:
            break
        table = entry & ENTRY_ADDRESS
        pend(u, FIRST_2 + (level - 2) * CACHE_WORDS, address >> (3 + 9 * level), more, table, rights)
        level -= 1
    place = (entry >> FL_PWT_SHIFT) & 3
    if entry & (FL_PS if level == 1 else FL_PAT_LARGE) != 0:
        place |= 4
    u[WALK_PAT] = place
    shift = 3 + 9 * level
    gpa = (entry & ENTRY_ADDRESS & ~((1 << shift) - 1)) | (address & ((1 << shift) - 1))
    dirty = (wanted | entry) & FL_D
    if nested:
        if beyond_second(u, gpa):
            return f.NESTED_BEYOND
        table_rights, table_leaf, table_entry = u[WALK_RIGHTS], u[LEAF_AT], u[LEAF_ENTRY]
        reason = nested_second(u, a, gpa, dirties)
        if reason == NOTHING_PERMITTED:
            return f.SCALABLE_SECOND_NOT_PRESENT
        if reason != 0:
            return reason
        second, page_leaf = u[WALK_RIGHTS], u[LEAF_ENTRY]
        if dirties and dirty == 0 and second & MAY_WRITE != 0:
            u[WALK_RIGHTS], u[LEAF_AT], u[LEAF_ENTRY] = table_rights, table_leaf, table_entry
            reason = first_flags(u, a, where, FL_D, snooped)
            if reason != 0:
                return reason
            dirty = FL_D
        u[LEAF_ENTRY] = page_leaf
        if second & IS_DIRTY == 0:
            dirty = 0
        if second & SNOOPED != 0:
            rights |= SNOOPED
        rights |= (second & (MAY_READ | MAY_WRITE | MAY_EXECUTE)) << SECOND_SHIFT
        if u[WALK_SHIFT] < shift:
            shift = u[WALK_SHIFT]
    else:
        u[WALK_HPA] = gpa
    if dirty != 0:
        rights |= IS_DIRTY
    if u[PASID_1] & PGSNP != 0:
        rights |= SNOOPED
    u[WALK_RIGHTS] = rights
    u[WALK_SHIFT] = shift
    return 0


@kernel
def may_write(u: Record, rights: int, user: bool) -> bool:
    """Will the first level let this request write? A supervisor may write read-only pages unless WPE is set."""
    if user:
        return rights & (MAY_WRITE | USER_PAGE) == MAY_WRITE | USER_PAGE
    return rights & MAY_WRITE != 0 or u[PASID_2] & WPE == 0
