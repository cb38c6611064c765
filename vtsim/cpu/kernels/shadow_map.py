"""Shadow entries: made for an access that the guest's tables allow, and beside it for its neighbours.

SDM: "Memory Virtualization".
"""

from __future__ import annotations

from vtsim.base.jit import Arena, Record, Tags, kernel
from vtsim.cpu import slots as s
from vtsim.cpu.kernels.shadow_formats import guest_entry, is_wrong, leaf_index, mode_in, quadrant_of, rights_of
from vtsim.cpu.kernels.shadow_leaves import P_LARGE_NX, find_page, protect_below, role_of, set_leaf, synchronize_below
from vtsim.cpu.kernels.shadow_pages import ASKED, BESIDE, drop_entry, forget_writes, keep_free, leaves_of, link_page
from vtsim.cpu.kernels.shadow_pool import (
    FILLED_ONE,
    KEY_FRAME,
    NO_ROOT,
    PROTECTED,
    entry_at,
    has_frame,
    page_behind,
    record_at,
    shadow_count,
    shadow_get,
    shadow_put,
    top_level,
)
from vtsim.cpu.kernels.shadow_walk import (
    P_ADDRESS,
    P_ERROR,
    P_FRAME,
    P_LEVEL,
    P_PATH,
    P_RESERVED,
    P_RIGHTS,
    P_TABLE,
)
from vtsim.ept import shadow as d
from vtsim.ept.memory_slots import SLOT, SLOT_BYTES, SLOT_PRIVATE, SLOT_READ_ONLY
from vtsim.ept.spec import (
    ADDRESS,
    PF_FETCH,
    PF_PRESENT,
    PF_WRITE,
    PTE_ACCESSED,
    PTE_DIRTY,
    PTE_LARGE,
    PTE_PRESENT,
    PTE_WRITE,
)

# fmt: off
P_PREFETCH: int   = d.POOL["PREFETCH"]
P_HOST_ROOT: int  = d.POOL["HOST_ROOT"]
P_SLOTS: int      = d.POOL["SLOTS"]
P_FILLED: int     = d.POOL["FILLED"]
P_PREFETCHED: int = d.POOL["PREFETCHED"]
FIRST: int = SLOT["FIRST"]
END: int = SLOT["END"]
USER: int = SLOT["USER"]
FLAGS: int = SLOT["FLAGS"]
# fmt: on


@kernel
def way_down(m: Record, a: Arena, t: Tags, target: int) -> int:
    """The entry of level `target` for the address of the last walk; shadow pages on the way are made and linked.

    -1 where other vCPUs must drop translations first, because they may store to a table that is read here.
    """
    pool = m[s.SHADOW_POOL]
    address = shadow_get(m, a, t, pool + P_ADDRESS)
    leaf = shadow_get(m, a, t, pool + P_LEVEL)
    rights = shadow_get(m, a, t, pool + P_RIGHTS)
    frame = shadow_get(m, a, t, pool + P_FRAME)
    mode = m[s.SHADOW_MODE]
    page = m[s.SHADOW_ROOT]
    for level in range(top_level(m), target, -1):
        forget_writes(m, a, t, page)
        entry = page * 512 + ((address >> (3 + 9 * level)) & 511)
        word = shadow_get(m, a, t, entry_at(m, entry))
        direct = level <= leaf or leaf == 0
        if word & PTE_PRESENT and word & d.LEADS_TO_TABLE == 0:  # a large leaf is in the way
            drop_entry(m, a, t, entry)
            word = 0
        if word & PTE_PRESENT and direct:  # pieces of a large page: is it still the same one, with the same rights?
            key = shadow_get(m, a, t, record_at(m, page_behind(m, word)))
            first = frame & ~((1 << 9 * (level - 1)) - 1)
            if key != first << KEY_FRAME | role_of(m, level - 1, rights, True):
                drop_entry(m, a, t, entry)
                word = 0
        if word & PTE_PRESENT == 0:
            if direct:
                first = frame & ~((1 << 9 * (level - 1)) - 1)
                below = find_page(m, a, t, first, role_of(m, level - 1, rights, True))
            elif level > 3 and mode & d.NARROW:  # above the guest's tables
                below = find_page(m, a, t, 0, role_of(m, level - 1, d.ALL_RIGHTS, True))
            else:
                table = shadow_get(m, a, t, pool + P_TABLE + 8 * (level - 1))
                path = shadow_get(m, a, t, pool + P_PATH + 8 * level)
                role = role_of(m, level - 1, path, False) | quadrant_of(mode, level - 1, address)
                below = find_page(m, a, t, table, role)
                if m[s.SHADOW_SEVERAL]:
                    protect_below(m, a, t, below)
                    if m[s.SHADOW_FLAGS] & PROTECTED:
                        return -1
                synchronize_below(m, a, t, below)  # a guest flushes nothing for what was not present
            link_page(m, a, t, entry, below)
            page = below
        else:
            page = page_behind(m, word)
    forget_writes(m, a, t, page)
    return page * 512 + ((address >> (3 + 9 * target)) & 511)


@kernel
def may_be_large(m: Record, a: Arena, t: Tags, frame: int, error: int) -> bool:
    """May the entry for the last walk map 2 MiB: does the guest, does the host, is no table of the guest inside?"""
    pool = m[s.SHADOW_POOL]
    level = shadow_get(m, a, t, pool + P_LEVEL)
    if m[s.GPR + s.RCX] < 2 or level == 1:
        return False
    if error & PF_FETCH and shadow_get(m, a, t, pool + P_LARGE_NX):
        return False
    if shadow_get(m, a, t, leaves_of(m, frame, True)) >> d.TABLES_INSIDE:
        return False
    first = (frame & ~511) << 12
    slot = m[s.GPR + s.R14]
    return first >= shadow_get(m, a, t, slot + FIRST) and first + (512 << 12) <= shadow_get(m, a, t, slot + END)


@kernel
def map_shadow(m: Record, a: Arena, t: Tags) -> int:
    """SHADOW_MAP: fill the entry for the last walk. RBX is the host's entry of level RCX, R10 the slot's flags."""
    pool = m[s.SHADOW_POOL]
    m[s.GPR + s.RAX] = 0
    keep_free(m, a, t)
    if m[s.SHADOW_ROOT] < 0:
        m[s.SHADOW_FLAGS] |= NO_ROOT
        return 0
    host = m[s.GPR + s.RBX]
    frame = shadow_get(m, a, t, pool + P_FRAME)
    error = shadow_get(m, a, t, pool + P_ERROR)
    tables = shadow_get(m, a, t, m[s.SHADOW_FRAMES] + 8 * frame) >> d.UPPER_TABLES
    if error & PF_WRITE and error & PF_PRESENT and tables & d.COUNT_MASK:
        m[s.GPR + s.RAX] = 1
        return 0
    within = frame & ((1 << 9 * (m[s.GPR + s.RCX] - 1)) - 1)
    hfn = ((host & ADDRESS) >> 12 & ~((1 << 9 * (m[s.GPR + s.RCX] - 1)) - 1)) | within
    writable = host & PTE_WRITE != 0 and m[s.GPR + s.R10] & SLOT_READ_ONLY == 0
    rights = shadow_get(m, a, t, pool + P_RIGHTS)
    if may_be_large(m, a, t, frame, error):
        entry = way_down(m, a, t, 2)
        if entry < 0:
            m[s.GPR + s.RAX] = 2
            return 0
        if shadow_get(m, a, t, entry_at(m, entry)) & d.LEADS_TO_TABLE == 0:
            set_leaf(m, a, t, entry, frame & ~511, hfn & ~511, rights, writable, ASKED, True)
            shadow_count(m, a, t, P_FILLED)
            return 0
    entry = way_down(m, a, t, 1)
    if entry < 0:
        m[s.GPR + s.RAX] = 2
        return 0
    written = set_leaf(m, a, t, entry, frame, hfn, rights, writable, ASKED, False)
    shadow_count(m, a, t, P_FILLED)
    if error & PF_WRITE and not written:
        m[s.GPR + s.RAX] = 1
    prefetch_leaves(m, a, t, entry)
    return 0


@kernel
def host_leaf(m: Record, a: Arena, t: Tags, frame: int) -> int:
    """The host's entry for a guest frame that is memory and has a page: its frame and write flag, else 0."""
    pool = m[s.SHADOW_POOL]
    slots = shadow_get(m, a, t, pool + P_SLOTS)
    at = shadow_get(m, a, t, slots)
    gpa = frame << 12
    for _ in range(shadow_get(m, a, t, slots + 8)):
        if gpa >= shadow_get(m, a, t, at + FIRST) and gpa < shadow_get(m, a, t, at + END):
            flags = shadow_get(m, a, t, at + FLAGS)
            if flags & SLOT_PRIVATE:
                return 0
            address = gpa + shadow_get(m, a, t, at + USER)
            table = shadow_get(m, a, t, pool + P_HOST_ROOT) & ADDRESS
            for level in range(4, 0, -1):
                place = m[s.SHADOW_DIRECT] + table + ((address >> (3 + 9 * level)) & 511) * 8
                entry = shadow_get(m, a, t, place)
                if entry & PTE_PRESENT == 0:
                    return 0
                if level == 1 or (level <= 3 and entry & PTE_LARGE):
                    within = (1 << (3 + 9 * level)) - 1
                    found = (entry & ADDRESS & ~within) | (address & within & ~0xFFF) | PTE_PRESENT
                    if entry & PTE_WRITE and flags & SLOT_READ_ONLY == 0:
                        found |= PTE_WRITE
                    return found
                table = entry & ADDRESS
        at += SLOT_BYTES
    return 0


@kernel
def fill_beside(m: Record, a: Arena, t: Tags, entry: int, key: int) -> bool:
    """Fill one empty leaf that nobody has asked for; False where the guest's entry is not to be filled from, because it
    is not present, not accessed or has reserved bits set, and where the host would have to make a page.
    """
    frame = (key >> KEY_FRAME) + (entry & 511)
    rights = (key >> d.ROLE_RIGHTS) & d.ALL_RIGHTS
    if key & d.ROLE_DIRECT == 0:
        mode = mode_in(key)
        wanted = guest_entry(m, a, t, mode, key >> KEY_FRAME << 12, leaf_index(key, entry & 511))
        reserved = shadow_get(m, a, t, m[s.SHADOW_POOL] + P_RESERVED)
        if wanted & PTE_PRESENT == 0 or wanted & PTE_ACCESSED == 0 or is_wrong(mode, wanted, 1, reserved):
            return False
        frame = (wanted & ADDRESS) >> 12
        rights &= rights_of(mode, wanted)
        if wanted & PTE_DIRTY == 0:
            rights &= ~d.RIGHT_WRITE
    if not has_frame(m, a, t, frame):
        return False
    host = host_leaf(m, a, t, frame)
    if host == 0:
        return False
    set_leaf(m, a, t, entry, frame, (host & ADDRESS) >> 12, rights, host & PTE_WRITE != 0, BESIDE, False)
    m[s.SHADOW_FLAGS] += FILLED_ONE
    shadow_count(m, a, t, P_PREFETCHED)
    return True


@kernel
def prefetch_leaves(m: Record, a: Arena, t: Tags, entry: int) -> None:
    """Fill the neighbours of an entry that are empty, in order, up to the first that cannot be filled.

    Source: Linux 6.1, pte_prefetch and prefetch_gpte in arch/x86/kvm/mmu/paging_tmpl.h.
    """
    together = shadow_get(m, a, t, m[s.SHADOW_POOL] + P_PREFETCH)
    if together <= 1:
        return
    key = shadow_get(m, a, t, record_at(m, entry >> 9))
    first = entry & ~(together - 1)
    for other in range(first, first + together):
        if other == entry:
            continue
        word = shadow_get(m, a, t, entry_at(m, other))
        if (word == 0 or word & d.DEVICE) and not fill_beside(m, a, t, other, key):
            return


@kernel
def map_device(m: Record, a: Arena, t: Tags) -> int:
    """SHADOW_MAP_DEVICE: let accesses to the frame of the last walk fault on a reserved bit.

    Where translations must be dropped first, it is the next access that is walked again.
    """
    keep_free(m, a, t)
    if m[s.SHADOW_ROOT] < 0:
        m[s.SHADOW_FLAGS] |= NO_ROOT
        return 0
    frame = shadow_get(m, a, t, m[s.SHADOW_POOL] + P_FRAME)
    entry = way_down(m, a, t, 1)
    if entry < 0:
        return 0
    drop_entry(m, a, t, entry)
    shadow_put(m, a, t, entry_at(m, entry), frame << 12 | d.DEVICE | PTE_PRESENT)
    return 0


@kernel
def find_device(m: Record, a: Arena, t: Tags) -> int:
    """SHADOW_FIND_DEVICE: the guest-physical address behind the linear one in RSI, if a device's entry is there."""
    address = m[s.GPR + s.RSI]
    m[s.GPR + s.RAX] = 0
    page = m[s.SHADOW_ROOT]
    if page < 0:
        return 0
    for level in range(top_level(m), 0, -1):
        word = shadow_get(m, a, t, entry_at(m, page * 512 + ((address >> (3 + 9 * level)) & 511)))
        if word & PTE_PRESENT == 0:
            return 0
        if word & d.DEVICE:
            m[s.GPR + s.RAX] = (word & ADDRESS & ~d.DEVICE) | (address & 0xFFF)
            return 0
        if word & d.LEADS_TO_TABLE == 0:
            return 0
        page = page_behind(m, word)
    return 0
