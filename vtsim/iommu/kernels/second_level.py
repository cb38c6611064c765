"""Second-level translation: from an input or guest-physical address through the tables of a domain.

VT-d: "Second-Stage Translation"; "Second-Stage Paging Entries"; "Accessed and Dirty Flags".
"""

from __future__ import annotations

from vtsim.base.jit import Arena, Record, kernel
from vtsim.base.memory import is_memory
from vtsim.iommu import faults as f
from vtsim.iommu import spec as sp
from vtsim.iommu.entries import (
    ADDRESS as ENTRY_ADDRESS,
)
from vtsim.iommu.entries import (
    EMTE,
    PWSNP,
    SL_A,
    SL_D,
    SL_EMT_SHIFT,
    SL_PS,
    SL_R,
    SL_RESERVED,
    SL_SNP,
    SL_W,
    SL_X,
    SLADE,
    SLEE,
)
from vtsim.iommu.kernels.memory_types import is_legal_type
from vtsim.iommu.kernels.unit_memory import flags_can_be_set, pend, read_entry, walk_begins
from vtsim.iommu.state import (
    CACHE_WORDS,
    DOMAIN,
    HOST_RESERVED,
    LEAF_AT,
    LEAF_ENTRY,
    PASID_0,
    PASID_1,
    REGISTERS,
    SCALABLE,
    SECOND_2,
    STEP_SECOND,
    WALK_HPA,
    WALK_RIGHTS,
    WALK_SHIFT,
)

# fmt: off
NOTHING_PERMITTED = -1           # an entry permits nothing: what that means is for the caller to say
# rights as the IOTLB keeps them, below the page's address
MAY_READ, MAY_WRITE, MAY_EXECUTE, USER_PAGE, IS_DIRTY, SNOOPED = 1, 2, 4, 8, 16, 32
SECOND_SHIFT = 7                 # second-level rights of a nested translation
# fmt: on


@kernel
def extended(u: Record, bit: int) -> bool:
    """Does the extended capability register have this bit?"""
    return u[REGISTERS + (sp.ECAP >> 3)] & bit != 0


@kernel
def capable(u: Record, bit: int) -> bool:
    """Does the capability register have this bit?"""
    return u[REGISTERS + (sp.CAP >> 3)] & bit != 0


@kernel
def walks_snoop(u: Record) -> bool:
    """Do page walks for the request in work snoop the processors' caches?"""
    if extended(u, sp.ECAP_SMPWC):
        return u[PASID_1] & PWSNP != 0
    return extended(u, sp.ECAP_C)


@kernel
def second_reserved(u: Record, entry: int, level: int) -> bool:
    """Are bits set that are reserved in a second-level entry of this level?"""
    if entry & (ENTRY_ADDRESS & u[HOST_RESERVED] | SL_RESERVED) != 0:
        return True
    large = level > 1 and entry & SL_PS != 0
    if large:
        if level > 3 or not capable(u, 1 << (sp.CAP_SLLPS + level - 2)):
            return True
        if entry & ((1 << (12 + 9 * (level - 1))) - 0x1000) != 0:
            return True
    if u[SCALABLE] != 0 and u[PASID_1] & EMTE != 0 and (level == 1 or large):
        if not is_legal_type((entry >> SL_EMT_SHIFT) & 7):
            return True
    if entry & SL_SNP != 0:
        return (level > 1 and not large) or not extended(u, sp.ECAP_SC)
    return False


@kernel
def second_access(u: Record, top: bool) -> int:
    """The fault reason of a table that cannot be read."""
    if u[SCALABLE] == 0:
        return f.SECOND_LEVEL_ACCESS
    if top:
        return f.SCALABLE_SECOND_TOP_ACCESS
    return f.SCALABLE_SECOND_ACCESS


@kernel
def second_flags(u: Record, a: Arena, where: int, entry: int, wanted: int) -> int:
    """Have the flags of an entry set once the request succeeds; a fault reason if they cannot be, else 0."""
    if entry & wanted == wanted:
        return 0
    if not walks_snoop(u):
        return f.SECOND_FLAGS_NOT_SNOOPED
    if not flags_can_be_set(a, where):
        return f.SECOND_FLAGS_FAILED
    pend(u, 0, where, 0, wanted, 0)
    return 0


@kernel
def walk_second(u: Record, a: Arena, table: int, levels: int, gpa: int, writes: bool) -> int:
    """Walk to the page of `gpa`: its address, shift and rights in WALK_…; a fault reason, NOTHING_PERMITTED, or 0.

    `writes`: the access will write, so the page becomes dirty. Rights are those of all entries together.
    """
    more = u[DOMAIN]
    flagged = u[SCALABLE] != 0 and u[PASID_0] & SLADE != 0
    executes = u[SCALABLE] != 0 and u[PASID_0] & SLEE != 0
    rights = MAY_READ | MAY_WRITE | MAY_EXECUTE
    level = walk_begins(u, SECOND_2, levels, gpa, more, 9)
    if level < levels:
        table = u[WALK_HPA]
        rights = u[WALK_RIGHTS]
    while True:
        where = table + ((gpa >> (9 * level)) & 0xFF8)
        if not is_memory(a, where):
            return second_access(u, level == levels)
        entry = read_entry(u, a, STEP_SECOND, level, where)
        own = entry & (SL_R | SL_W)
        if executes:
            own |= entry & SL_X
        elif own & SL_R != 0:
            own |= SL_X
        if own == 0:
            return NOTHING_PERMITTED
        if second_reserved(u, entry, level):
            return f.SCALABLE_SECOND_RESERVED if u[SCALABLE] != 0 else f.SECOND_LEVEL_RESERVED
        rights &= own
        leaf = level == 1 or entry & SL_PS != 0
        if flagged:
            wanted = SL_A
            if leaf and writes and rights & MAY_WRITE != 0:
                wanted |= SL_D
            reason = second_flags(u, a, where, entry, wanted)
            if reason != 0:
                return reason
        if leaf:
            shift = 3 + 9 * level
            u[WALK_HPA] = (entry & ENTRY_ADDRESS) | (gpa & ((1 << shift) - 1))
            u[WALK_SHIFT] = shift
            if entry & SL_SNP != 0:
                rights |= SNOOPED
            if not flagged or writes or entry & SL_D != 0:
                rights |= IS_DIRTY
            u[WALK_RIGHTS] = rights
            u[LEAF_AT] = where
            u[LEAF_ENTRY] = entry
            return 0
        table = entry & ENTRY_ADDRESS
        pend(u, SECOND_2 + (level - 2) * CACHE_WORDS, gpa >> (3 + 9 * level), more, table, rights)
        level -= 1
