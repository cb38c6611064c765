"""The monitor's walk of the guest's own tables: what an access may do, which flags it leaves in them.

SDM: "4-Level Paging and 5-Level Paging".
Not modelled: under shadow paging, guests with PAE or 32-bit paging; protection keys, which KVM does not
offer its guests there either.
"""

from __future__ import annotations

from vtsim.base.jit import Arena, Record, Tags, kernel
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.kernels.access import read64, write64
from vtsim.cpu.kernels.rights import RFLAGS_AC
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
    PTE_LARGE,
    PTE_NO_EXECUTE,
    PTE_PRESENT,
    PTE_USER,
    PTE_WRITE,
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
WALK_ENTRIES: int = s.SHADOW_STACK      # a word for each level
# fmt: on


@kernel
def guest_word(m: Record, a: Arena, t: Tags, gpa: int) -> int:
    """Load an entry of the guest's tables through the process that has its memory; 0 where there is no memory."""
    m[s.RETIRED] += 1
    m[s.CYCLE] += m[s.PRICE + o.LD]
    value = read64(m, a, t, m[s.SHADOW_GUEST] + gpa)
    if m[s.FAULT_KIND]:
        m[s.FAULT_KIND] = 0
        return 0
    return value


@kernel
def set_guest_flags(m: Record, a: Arena, t: Tags, gpa: int, entry: int) -> None:
    """Store an entry of the guest's tables with its accessed or dirty flag set, as a locked operation does."""
    m[s.RETIRED] += 1
    m[s.CYCLE] += m[s.ATOMIC_CYCLES]
    write64(m, a, t, m[s.SHADOW_GUEST] + gpa, entry)


@kernel
def rights_of(m: Record, entry: int) -> int:
    """The rights of an entry of the guest, in its paging mode."""
    rights = d.RIGHT_WRITE if entry & PTE_WRITE else 0
    if entry & PTE_USER:
        rights |= d.RIGHT_USER
    if entry & PTE_NO_EXECUTE == 0 or m[s.SHADOW_MODE] & d.MODE_NX == 0:
        rights |= d.RIGHT_EXECUTE
    return rights


@kernel
def is_wrong(m: Record, entry: int, level: int, reserved: int) -> bool:
    """Has an entry of the guest at a level reserved bits set?"""
    if entry & reserved or (entry & PTE_NO_EXECUTE and m[s.SHADOW_MODE] & d.MODE_NX == 0):
        return True
    if entry & PTE_LARGE == 0 or level == 1:
        return False
    return level > 3 or entry & ((1 << (3 + 9 * level)) - 1) & ~0x1FFF != 0


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
    error = m[s.GPR + s.RDX] & (PF_WRITE | PF_USER | PF_FETCH)
    shadow_put(m, a, t, pool + P_ADDRESS, address)
    shadow_put(m, a, t, pool + P_ERROR, m[s.GPR + s.RDX])
    m[s.GPR + s.RAX] = 0
    if m[s.SHADOW_MODE] & d.MODE_PAGING == 0:
        shadow_put(m, a, t, pool + P_LEVEL, 0)
        shadow_put(m, a, t, pool + P_FRAME, address >> 12)
        shadow_put(m, a, t, pool + P_RIGHTS, d.ALL_RIGHTS)
        m[s.GPR + s.RCX] = address
        return 0
    reserved = shadow_get(m, a, t, pool + P_RESERVED)
    table = shadow_get(m, a, t, pool + P_CR3) & ADDRESS
    rights = d.ALL_RIGHTS
    top = top_level(m)
    level = top
    while True:
        shadow_put(m, a, t, pool + P_TABLE + 8 * level, table >> 12)
        entry = guest_word(m, a, t, table | ((address >> (3 + 9 * level)) & 511) << 3)
        m[WALK_ENTRIES + level] = entry
        if entry & PTE_PRESENT == 0:
            return true_fault(m, error)
        if is_wrong(m, entry, level, reserved):
            return true_fault(m, error | PF_RESERVED | PF_PRESENT)
        rights &= rights_of(m, entry)
        shadow_put(m, a, t, pool + P_PATH + 8 * level, rights)
        if level == 1 or (entry & PTE_LARGE and level <= 3):
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
            set_guest_flags(m, a, t, table | ((address >> (3 + 9 * each)) & 511) << 3, entry)
    if entry & PTE_DIRTY == 0:
        rights &= ~d.RIGHT_WRITE  # the first write must be seen
    if error & (PF_WRITE | PF_USER) == PF_WRITE and rights & d.RIGHT_WRITE == 0:
        # the kernel writes to a read-only page with CR0.WP clear, but the processor has it set
        rights = d.RIGHT_WRITE | (rights & d.RIGHT_EXECUTE if m[s.SHADOW_MODE] & d.MODE_SMEP == 0 else 0)
    within = (1 << (3 + 9 * level)) - 1
    gpa = (entry & ADDRESS & ~within) | (address & within)
    shadow_put(m, a, t, pool + P_LEVEL, level)
    shadow_put(m, a, t, pool + P_FRAME, gpa >> 12)
    shadow_put(m, a, t, pool + P_RIGHTS, rights)
    m[s.GPR + s.RCX] = gpa
    return 0


@kernel
def true_fault(m: Record, error: int) -> int:
    """The guest's own tables refuse the access: it is the guest's page fault."""
    m[s.GPR + s.RAX] = 1
    m[s.GPR + s.RDX] = error
    return 0
