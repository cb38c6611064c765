"""Shadow pages: found or made, linked, put out of sync, given up; and the lists that their entries hang in.

A shadow page that stands for a table of the guest makes the guest's page read-only wherever it is mapped, until it may
go out of sync. Entries that become stricter leave word in SHADOW_FLAGS that translations are to be dropped.

Where vCPUs share a pool, a shadow page that is given up may still be walked on other CPUs. It is free only when all
have dropped translations, which the program asks for, and if no vCPU has it as its root.

SDM: "Memory Virtualization".
Not modelled: the order in which a real hypervisor evicts (a hand goes round here); 1 GiB shadow entries.
"""

from __future__ import annotations

from vtsim.base.jit import Arena, Record, Tags, kernel
from vtsim.cpu import slots as s
from vtsim.cpu.codes import MODEL_FAULT
from vtsim.cpu.kernels.agile_ept import set_ept_flags
from vtsim.cpu.kernels.hook_access import zero_page
from vtsim.cpu.kernels.shadow_pool import (
    FLUSH,
    KEY_FRAME,
    LOW,
    NO_ROOT,
    OTHER_ROOTS,
    P_EVICTED,
    P_FREE,
    P_FREE_COUNT,
    P_GIVEN_UP,
    P_HAND,
    P_LEFT_SYNC,
    P_MADE,
    P_OUT_OF_SYNC,
    P_PAGES,
    P_ROOT,
    P_ZAPPED,
    PROTECTED,
    R_BELOW,
    R_BITMAP,
    R_NEXT,
    R_ORPHAN,
    R_PARENTS,
    R_ROOTS,
    R_STATE,
    bucket_at,
    entry_at,
    note_at,
    page_behind,
    record_at,
    shadow_count,
    shadow_get,
    shadow_put,
)
from vtsim.cpu.kernels.shadow_use import P_HELD, free_page, give_up, unlist_roots
from vtsim.ept import shadow as d
from vtsim.ept.spec import ADDRESS, EPT_DIRTY, EPT_WRITE, PTE_LARGE, PTE_PRESENT, PTE_SWITCHES, PTE_WRITE

ASKED, BESIDE, AGAIN = range(3)  # why a leaf is made: for an access, beside one, in synchronization


# --- lists of entries ------------------------------------------------------------------------------------------------
@kernel
def leaves_of(m: Record, frame: int, large: bool) -> int:
    """The linear address of the word in which the list of a guest frame's leaves begins, or that of its 2 MiB."""
    return m[s.SHADOW_LARGE] + 8 * (frame >> 9) if large else m[s.SHADOW_FRAMES] + 8 * frame


@kernel
def list_leaf(m: Record, a: Arena, t: Tags, entry: int, frame: int, large: bool) -> None:
    """Hang a leaf in the list of its guest frame."""
    at = leaves_of(m, frame, large)
    word = shadow_get(m, a, t, at)
    shadow_put(m, a, t, note_at(m, entry), frame << 32 | (word & LOW))
    shadow_put(m, a, t, at, (word & ~LOW) | (entry + 1))


@kernel
def unlist(m: Record, a: Arena, t: Tags, entry: int, at: int) -> None:
    """Take an entry out of the list whose head is the low half of the word at `at`."""
    following = shadow_get(m, a, t, note_at(m, entry)) & LOW
    word = shadow_get(m, a, t, at)
    before = word & LOW
    if before == entry + 1:
        shadow_put(m, a, t, at, (word & ~LOW) | following)
        return
    while before:
        at = note_at(m, before - 1)
        word = shadow_get(m, a, t, at)
        before = word & LOW
        if before == entry + 1:
            shadow_put(m, a, t, at, (word & ~LOW) | following)
            return
    m[s.STOP] = MODEL_FAULT


@kernel
def drop_entry(m: Record, a: Arena, t: Tags, entry: int) -> None:
    """Clear an entry; what it led to stays. Where somebody asks for orphans, a page that nothing leads to is one."""
    at = entry_at(m, entry)
    word = shadow_get(m, a, t, at)
    if word == 0:
        return
    shadow_put(m, a, t, at, 0)
    if word & (d.DEVICE | d.MONITOR):
        return
    m[s.SHADOW_FLAGS] |= FLUSH
    if word & d.LEADS_TO_TABLE:
        below = page_behind(m, word)
        unlist(m, a, t, entry, record_at(m, below) + R_PARENTS)
        if m[s.SHADOW_ORPHANS] >= 0 and shadow_get(m, a, t, record_at(m, below) + R_PARENTS) & LOW == 0:
            shadow_put(m, a, t, record_at(m, below) + R_ORPHAN, m[s.SHADOW_ORPHANS])
            m[s.SHADOW_ORPHANS] = below + 1
    else:
        frame = (shadow_get(m, a, t, note_at(m, entry)) >> 32) & LOW
        unlist(m, a, t, entry, leaves_of(m, frame, word & PTE_LARGE != 0))


@kernel
def put_switch(m: Record, a: Arena, t: Tags, entry: int, frame: int, host: int, flags: int) -> None:
    """With agile paging: let an entry lead to the guest's own table in a frame; `host` is the host's entry for it."""
    drop_entry(m, a, t, entry)
    shadow_put(m, a, t, entry_at(m, entry), (host & ADDRESS) | flags | PTE_PRESENT | PTE_SWITCHES)
    list_leaf(m, a, t, entry, frame, False)


@kernel
def protect_frame(m: Record, a: Arena, t: Tags, frame: int) -> None:
    """Make every leaf that maps a guest frame read-only."""
    for large in range(2):
        entry = shadow_get(m, a, t, leaves_of(m, frame, large != 0)) & LOW
        while entry:
            at = entry_at(m, entry - 1)
            word = shadow_get(m, a, t, at)
            if word & PTE_WRITE and word & PTE_SWITCHES == 0:
                shadow_put(m, a, t, at, word & ~PTE_WRITE)
                m[s.SHADOW_FLAGS] |= FLUSH | PROTECTED
            entry = shadow_get(m, a, t, note_at(m, entry - 1)) & LOW
    if m[s.SHADOW_MODE] & d.MODE_AGILE:
        set_ept_flags(m, a, t, frame, EPT_WRITE | EPT_DIRTY, 0)


@kernel
def unmap_frame(m: Record, a: Arena, t: Tags, frame: int) -> None:
    """Clear every leaf that maps a guest frame."""
    for large in range(2):
        at = leaves_of(m, frame, large != 0)
        entry = shadow_get(m, a, t, at) & LOW
        while entry and m[s.STOP] == 0:
            drop_entry(m, a, t, entry - 1)
            entry = shadow_get(m, a, t, at) & LOW


# --- out of sync -----------------------------------------------------------------------------------------------------
@kernel
def mark_above(m: Record, a: Arena, t: Tags, page: int) -> None:
    """Note in all shadow pages that lead to this one that something below is out of sync."""
    depth = 0
    m[s.SHADOW_MARKS] = shadow_get(m, a, t, record_at(m, page) + R_PARENTS)
    while depth >= 0:
        entry = m[s.SHADOW_MARKS + depth]
        if entry == 0:
            depth -= 1
            continue
        m[s.SHADOW_MARKS + depth] = shadow_get(m, a, t, note_at(m, entry - 1)) & LOW
        parent = (entry - 1) >> 9
        if not mark_entry(m, a, t, entry - 1) and depth < 4:
            depth += 1
            m[s.SHADOW_MARKS + depth] = shadow_get(m, a, t, record_at(m, parent) + R_PARENTS)


@kernel
def mark_entry(m: Record, a: Arena, t: Tags, entry: int) -> bool:
    """Note that something below an entry is out of sync; was anything in its page noted before?"""
    at = record_at(m, entry >> 9)
    place = at + R_BITMAP + 8 * ((entry & 511) >> 6)
    bits = shadow_get(m, a, t, place)
    if (bits >> (entry & 63)) & 1:
        return True
    shadow_put(m, a, t, place, bits | 1 << (entry & 63))
    below = shadow_get(m, a, t, at + R_BELOW)
    shadow_put(m, a, t, at + R_BELOW, below + 1)
    return below > 0


@kernel
def stays_protected(m: Record, a: Arena, t: Tags, frame: int, why: int) -> bool:
    """Must a guest frame stay read-only because it is a table? Leaf tables go out of sync here, if they may.

    Only a leaf that is ASKED for puts a table out of sync.
    """
    word = shadow_get(m, a, t, m[s.SHADOW_FRAMES] + 8 * frame)
    if (word >> d.UPPER_TABLES) & d.COUNT_MASK:
        return True
    if (word >> d.LEAF_TABLES) & d.COUNT_MASK == 0:
        return False
    if why == AGAIN or shadow_get(m, a, t, m[s.SHADOW_POOL] + P_OUT_OF_SYNC) == 0:
        return True
    page = shadow_get(m, a, t, bucket_at(m, frame))
    while page:
        at = record_at(m, page - 1)
        key = shadow_get(m, a, t, at)
        if key >> KEY_FRAME == frame and key & d.ROLE_DIRECT == 0:
            state = shadow_get(m, a, t, at + R_STATE)
            if state & d.UNSYNC == 0:
                if why != ASKED:
                    return True
                shadow_put(m, a, t, at + R_STATE, state | d.UNSYNC)
                shadow_count(m, a, t, P_LEFT_SYNC)
                mark_above(m, a, t, page - 1)
        page = shadow_get(m, a, t, at + R_NEXT)
    return False


# --- pages -----------------------------------------------------------------------------------------------------------
@kernel
def count_tables(m: Record, a: Arena, t: Tags, key: int, change: int) -> None:
    """One shadow page more or less stands for a guest's table."""
    if key & d.ROLE_DIRECT:
        return
    at = m[s.SHADOW_FRAMES] + 8 * (key >> KEY_FRAME)
    shift = d.LEAF_TABLES if key & d.ROLE_LEVEL == 1 else d.UPPER_TABLES
    shadow_put(m, a, t, at, shadow_get(m, a, t, at) + (change << shift))
    at = leaves_of(m, key >> KEY_FRAME, True)
    shadow_put(m, a, t, at, shadow_get(m, a, t, at) + (change << d.TABLES_INSIDE))


@kernel
def release_page(m: Record, a: Arena, t: Tags, page: int) -> None:
    """Give up one shadow page: its entries, what leads to it, its place in the hash table."""
    at = record_at(m, page)
    key = shadow_get(m, a, t, at)
    for index in range(512):
        drop_entry(m, a, t, page * 512 + index)
    parent = shadow_get(m, a, t, at + R_PARENTS) & LOW
    while parent:
        shadow_put(m, a, t, entry_at(m, parent - 1), 0)
        m[s.SHADOW_FLAGS] |= FLUSH
        parent = shadow_get(m, a, t, note_at(m, parent - 1)) & LOW
    count_tables(m, a, t, key, -1)
    place = bucket_at(m, key >> KEY_FRAME)
    other = shadow_get(m, a, t, place)
    while other and other != page + 1:
        place = record_at(m, other - 1) + R_NEXT
        other = shadow_get(m, a, t, place)
    shadow_put(m, a, t, place, shadow_get(m, a, t, at + R_NEXT))
    shadow_count(m, a, t, P_ZAPPED)
    if key & d.ROLE_LEVEL >= 4:
        unlist_roots(m, a, t)
    users = shadow_get(m, a, t, at + R_ROOTS) if m[s.SHADOW_SEVERAL] else 0
    if page == m[s.SHADOW_ROOT]:
        m[s.SHADOW_ROOT] = -1
        m[s.SHADOW_FLAGS] |= NO_ROOT
        shadow_put(m, a, t, m[s.SHADOW_POOL] + P_ROOT, 0)
    if users and shadow_get(m, a, t, m[s.SHADOW_POOL] + P_HELD) == page + 1:
        shadow_put(m, a, t, m[s.SHADOW_POOL] + P_HELD, 0)
        users -= 1
        shadow_put(m, a, t, at + R_ROOTS, users)
    if users:
        m[s.SHADOW_FLAGS] |= OTHER_ROOTS
        shadow_put(m, a, t, at + R_STATE, d.GONE)
    elif m[s.SHADOW_SEVERAL]:
        give_up(m, a, t, page)
    else:
        free_page(m, a, t, page)


@kernel
def free_given_up(m: Record, a: Arena, t: Tags) -> int:
    """SHADOW_FREE: all vCPUs have dropped translations since shadow pages were given up: those are free."""
    vm = m[s.SHADOW_VM]
    page = shadow_get(m, a, t, vm + P_GIVEN_UP)
    shadow_put(m, a, t, vm + P_GIVEN_UP, 0)
    while page:
        following = shadow_get(m, a, t, record_at(m, page - 1) + R_NEXT)
        free_page(m, a, t, page - 1)
        page = following
    return 0


@kernel
def next_unsync(m: Record, a: Arena, t: Tags, depth: int, clear: bool) -> int:
    """Of the walk of what is out of sync that stands in SHADOW_STACK at `depth`: the next depth, or -1 at its end.

    A leaf table that is found is in the stack at the depth returned, with its lowest bit set. The bits on the way are
    cleared, if that is wanted.
    """
    while depth >= 0:
        place = m[s.SHADOW_STACK + depth]
        if place & 1:  # a leaf table: it was dealt with
            depth -= 1
            continue
        page = place >> 12
        index = (place >> 1) & 1023
        at = record_at(m, page)
        bits = 0
        while index < 512:
            bits = shadow_get(m, a, t, at + R_BITMAP + 8 * (index >> 6)) >> (index & 63)
            if bits:
                break
            index = (index | 63) + 1
        if index >= 512 or bits == 0:
            if clear:
                shadow_put(m, a, t, at + R_BELOW, 0)
            depth -= 1
            continue
        while bits & 1 == 0:
            bits >>= 1
            index += 1
        if clear:
            word_at = at + R_BITMAP + 8 * (index >> 6)
            shadow_put(m, a, t, word_at, shadow_get(m, a, t, word_at) & ~(1 << (index & 63)))
        m[s.SHADOW_STACK + depth] = page << 12 | (index + 1) << 1
        word = shadow_get(m, a, t, entry_at(m, page * 512 + index))
        if word & PTE_PRESENT == 0 or word & d.LEADS_TO_TABLE == 0:
            continue
        below = page_behind(m, word)
        if shadow_get(m, a, t, record_at(m, below) + R_BELOW):
            depth += 1
            m[s.SHADOW_STACK + depth] = below << 12
        elif shadow_get(m, a, t, record_at(m, below) + R_STATE) & d.UNSYNC:
            depth += 1
            m[s.SHADOW_STACK + depth] = below << 12 | 1
            return depth
    return -1


@kernel
def zap_page(m: Record, a: Arena, t: Tags, page: int) -> None:
    """Give up a shadow page, and what is out of sync below it."""
    if shadow_get(m, a, t, record_at(m, page) + R_BELOW):
        m[s.SHADOW_STACK] = page << 12
        depth = next_unsync(m, a, t, 0, True)
        while depth >= 0:
            release_page(m, a, t, m[s.SHADOW_STACK + depth] >> 12)
            depth = next_unsync(m, a, t, depth, True)
    release_page(m, a, t, page)


@kernel
def keep_free(m: Record, a: Arena, t: Tags) -> None:
    """See to it that the pages of one fault are free; where vCPUs share a pool, a hook before it has done so."""
    if m[s.SHADOW_SEVERAL] == 0:
        evict(m, a, t)


@kernel
def evict(m: Record, a: Arena, t: Tags) -> int:
    """SHADOW_ROOM: give up shadow pages if few are free; no root in use is evicted."""
    vm = m[s.SHADOW_VM]
    free = shadow_get(m, a, t, vm + P_FREE_COUNT)
    if free >= d.MIN_FREE:
        return 0
    pages = shadow_get(m, a, t, vm + P_PAGES)
    hand = shadow_get(m, a, t, vm + P_HAND)
    zapped = shadow_get(m, a, t, vm + P_ZAPPED)
    for _ in range(2 * pages):
        if free + shadow_get(m, a, t, vm + P_ZAPPED) - zapped >= min(d.REFILL, pages >> 1):
            break
        hand = hand + 1 if hand + 1 < pages else 0
        if hand == m[s.SHADOW_ROOT] or (m[s.SHADOW_SEVERAL] and shadow_get(m, a, t, record_at(m, hand) + R_ROOTS)):
            continue
        if shadow_get(m, a, t, record_at(m, hand) + R_STATE) & d.IN_USE:
            zap_page(m, a, t, hand)
            shadow_count(m, a, t, P_EVICTED)
    shadow_put(m, a, t, vm + P_HAND, hand)
    return 0


@kernel
def forget_writes(m: Record, a: Arena, t: Tags, page: int) -> None:
    """A shadow page was used: the writes to its table are counted anew."""
    at = record_at(m, page) + R_STATE
    state = shadow_get(m, a, t, at)
    if state >> d.WRITES:
        shadow_put(m, a, t, at, state & (d.IN_USE | d.UNSYNC))


@kernel
def new_page(m: Record, a: Arena, t: Tags, frame: int, role: int) -> int:
    """Make the shadow page of a guest frame in a role; the guest's table is read-only from now on."""
    vm = m[s.SHADOW_VM]
    page = shadow_get(m, a, t, vm + P_FREE) - 1
    if page < 0:
        m[s.STOP] = MODEL_FAULT
        return 0
    at = record_at(m, page)
    shadow_put(m, a, t, vm + P_FREE, shadow_get(m, a, t, at + R_NEXT))
    shadow_put(m, a, t, vm + P_FREE_COUNT, shadow_get(m, a, t, vm + P_FREE_COUNT) - 1)
    bucket = bucket_at(m, frame)
    shadow_put(m, a, t, at, frame << KEY_FRAME | role)
    shadow_put(m, a, t, at + R_NEXT, shadow_get(m, a, t, bucket))
    shadow_put(m, a, t, bucket, page + 1)
    shadow_put(m, a, t, at + R_PARENTS, 0)
    shadow_put(m, a, t, at + R_STATE, d.IN_USE)
    for word in range(9):
        shadow_put(m, a, t, at + R_BELOW + 8 * word, 0)
    zero_page(m, a, t, entry_at(m, page * 512))
    count_tables(m, a, t, frame << KEY_FRAME | role, 1)
    if role & d.ROLE_DIRECT == 0:
        protect_frame(m, a, t, frame)
    shadow_count(m, a, t, P_MADE)
    return page


@kernel
def link_page(m: Record, a: Arena, t: Tags, entry: int, page: int) -> None:
    """Let an upper entry lead to a shadow page; the guest's rights are in the page's role."""
    at = record_at(m, page)
    shadow_put(m, a, t, note_at(m, entry), shadow_get(m, a, t, at + R_PARENTS))
    shadow_put(m, a, t, at + R_PARENTS, entry + 1)
    pdpte = m[s.SHADOW_MODE] & d.MODE_PAE_ROOT and shadow_get(m, a, t, at) & d.ROLE_LEVEL == 2
    shadow_put(m, a, t, entry_at(m, entry), m[s.SHADOW_TABLES] + (page << 12) | (d.UPPER_PDPTE if pdpte else d.UPPER))
    if shadow_get(m, a, t, at + R_STATE) & d.UNSYNC or shadow_get(m, a, t, at + R_BELOW):
        if not mark_entry(m, a, t, entry):
            mark_above(m, a, t, entry >> 9)
