"""The monitor's walk of the guest's own tables: what an access may do, which flags it leaves in them.

SDM: "4-Level Paging and 5-Level Paging"; "PAE Paging"; "32-Bit Paging".
Not modelled: under shadow paging, protection keys, which KVM does not offer its guests there either; SMAP for user
pages that ring 0 writes to while CR0.WP is clear, whose entries are those of supervisor pages, as KVM's are.
"""

from __future__ import annotations

from vtsim.base.jit import Arena, Record, Tags, kernel
from vtsim.cpu import slots as s
from vtsim.cpu.kernels.rights import RFLAGS_AC
from vtsim.cpu.kernels.shadow_formats import (
    frame_of,
    guest_entry,
    index_in,
    is_leaf,
    is_wrong,
    rights_of,
    set_guest_flags,
)
from vtsim.cpu.kernels.shadow_pool import P_CR3, shadow_get, shadow_put, top_level
from vtsim.ept import shadow as d
from vtsim.ept.spec import (
    ADDRESS,
    PF_FETCH,
    PF_PRESENT,
    PF_RESERVED,
    PF_USER,
    PF_WRITE,
    PTE_ACCESSED,
    PTE_DIRTY,
    PTE_PRESENT,
)

# fmt: off
P_RESERVED: int = d.POOL["RESERVED"]
P_ADDRESS: int  = d.POOL["ADDRESS"]
P_ERROR: int    = d.POOL["ERROR"]
P_LEVEL: int    = d.POOL["LEVEL"]
P_FRAME: int    = d.POOL["FRAME"]
P_RIGHTS: int   = d.POOL["RIGHTS"]
P_TABLE: int    = d.POOL["TABLE"]
P_PATH: int     = d.POOL["PATH"]
P_PDPTE: int    = d.POOL["PDPTE"]
WALK_ENTRIES: int = s.SHADOW_STACK      # a word for each level
# fmt: on


@kernel
def refused_by_rights(m: Record, rights: int, error: int) -> bool:
    """Do the rights of a path refuse an access with this error code, in which RFLAGS.AC may stand?"""
    user = error & PF_USER
    if user and rights & d.RIGHT_USER == 0:
        return True
    if error & PF_WRITE and rights & d.RIGHT_WRITE == 0 and (user or m[s.SHADOW_MODE] & d.MODE_WP):
        return True
    if error & PF_FETCH == 0:
        smap = m[s.SHADOW_MODE] & d.MODE_SMAP != 0 and error & RFLAGS_AC == 0
        return smap and user == 0 and rights & d.RIGHT_USER != 0
    return rights & d.RIGHT_EXECUTE == 0 or (
        user == 0 and rights & d.RIGHT_USER != 0 and m[s.SHADOW_MODE] & d.MODE_SMEP != 0
    )


@kernel
def walk_guest(m: Record, a: Arena, t: Tags) -> int:
    """SHADOW_WALK: walk for the access at RSI with error code and RFLAGS.AC RDX; what is found stays in the pool."""
    pool = m[s.SHADOW_POOL]
    address = m[s.GPR + s.RSI]
    alignment = m[s.GPR + s.RDX] & RFLAGS_AC
    mode = m[s.SHADOW_MODE]
    error = m[s.GPR + s.RDX] & (PF_WRITE | PF_USER | PF_FETCH)
    shadow_put(m, a, t, pool + P_ADDRESS, address)
    shadow_put(m, a, t, pool + P_ERROR, m[s.GPR + s.RDX])
    m[s.GPR + s.RAX] = 0
    if mode & d.MODE_PAGING == 0:
        shadow_put(m, a, t, pool + P_LEVEL, 0)
        shadow_put(m, a, t, pool + P_FRAME, address >> 12)
        shadow_put(m, a, t, pool + P_RIGHTS, d.ALL_RIGHTS)
        m[s.GPR + s.RCX] = address
        return 0
    reserved = shadow_get(m, a, t, pool + P_RESERVED)
    table = shadow_get(m, a, t, pool + P_CR3) & ADDRESS
    rights = d.ALL_RIGHTS
    top = top_level(m)
    if mode & d.NARROW:
        top = 2
        shadow_put(m, a, t, pool + P_PATH + 8 * 3, rights)
        if mode & d.MODE_PAE:
            entry = shadow_get(m, a, t, pool + P_PDPTE + 8 * ((address >> 30) & 3))
            if entry & PTE_PRESENT == 0:
                return true_fault(m, error)
            table = entry & ADDRESS
    level = top
    while True:
        shadow_put(m, a, t, pool + P_TABLE + 8 * level, table >> 12)
        entry = guest_entry(m, a, t, mode, table, index_in(mode, level, address))
        m[WALK_ENTRIES + level] = entry
        if entry & PTE_PRESENT == 0:
            return true_fault(m, error)
        if is_wrong(mode, entry, level, reserved):
            return true_fault(m, error | PF_RESERVED | PF_PRESENT)
        rights &= rights_of(mode, entry)
        shadow_put(m, a, t, pool + P_PATH + 8 * level, rights)
        if is_leaf(mode, level, entry):
            break
        table = entry & ADDRESS
        level -= 1
    if refused_by_rights(m, rights, error | alignment):
        return true_fault(m, error | PF_PRESENT)
    for each in range(top, level - 1, -1):
        entry = m[WALK_ENTRIES + each]
        flags = PTE_ACCESSED | (PTE_DIRTY if each == level and error & PF_WRITE else 0)
        if entry & flags != flags:
            table = shadow_get(m, a, t, pool + P_TABLE + 8 * each) << 12
            entry |= flags
            set_guest_flags(m, a, t, mode, table, index_in(mode, each, address), entry)
    if entry & PTE_DIRTY == 0:
        rights &= ~d.RIGHT_WRITE  # the first write must be seen
    if error & (PF_WRITE | PF_USER) == PF_WRITE and rights & d.RIGHT_WRITE == 0:
        # the kernel writes to a read-only page with CR0.WP clear, but the processor has it set
        rights = d.RIGHT_WRITE | (rights & d.RIGHT_EXECUTE if m[s.SHADOW_MODE] & d.MODE_SMEP == 0 else 0)
    frame = frame_of(mode, level, entry, address)
    shadow_put(m, a, t, pool + P_LEVEL, level)
    shadow_put(m, a, t, pool + P_FRAME, frame)
    shadow_put(m, a, t, pool + P_RIGHTS, rights)
    m[s.GPR + s.RCX] = frame << 12 | (address & 0xFFF)
    return 0


@kernel
def true_fault(m: Record, error: int) -> int:
    """The guest's own tables refuse the access: it is the guest's page fault.

    That it was a fetch is said only to a guest that may have pages which refuse fetches alone.

    SDM: "Page-Fault Exceptions".
    """
    mode = m[s.SHADOW_MODE]
    if mode & d.MODE_SMEP == 0 and (mode & d.MODE_NX == 0 or mode & d.MODE_32BIT):
        error &= ~PF_FETCH
    m[s.GPR + s.RAX] = 1
    m[s.GPR + s.RDX] = error
    return 0
