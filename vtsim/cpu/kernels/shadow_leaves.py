"""Leaf entries of shadow pages, made and held against the guest's; shadow pages found for a guest's table.

SDM: "Memory Virtualization".
"""

from __future__ import annotations

from vtsim.base.jit import Arena, Record, Tags, kernel
from vtsim.cpu import slots as s
from vtsim.cpu.kernels.shadow_formats import guest_entry, is_wrong, leaf_index, mode_in, rights_of
from vtsim.cpu.kernels.shadow_pages import (
    AGAIN,
    ASKED,
    drop_entry,
    forget_writes,
    list_leaf,
    new_page,
    next_unsync,
    protect_frame,
    stays_protected,
    zap_page,
)
from vtsim.cpu.kernels.shadow_pool import (
    FLUSH,
    HELD_ONE,
    KEY_FRAME,
    P_REUSED,
    R_BELOW,
    R_NEXT,
    R_STATE,
    bucket_at,
    entry_at,
    note_at,
    record_at,
    role_in,
    shadow_count,
    shadow_get,
    shadow_put,
)
from vtsim.cpu.kernels.shadow_walk import P_RESERVED
from vtsim.ept import shadow as d
from vtsim.ept.spec import ADDRESS, PTE_ACCESSED, PTE_DIRTY, PTE_LARGE, PTE_NO_EXECUTE, PTE_PRESENT, PTE_USER, PTE_WRITE

P_LARGE_NX: int = d.POOL["LARGE_NX"]
P_SYNCHRONIZED: int = d.POOL["SYNCHRONIZED"]


@kernel
def make_leaf(
    m: Record, a: Arena, t: Tags, frame: int, host: int, rights: int, writable: bool, old: int, why: int, large: bool
) -> int:
    """A leaf for a guest frame behind which a host frame is; `old` is what stands in its place.

    It is writable if the rights and the host's page allow, and if no table of the guest is there.
    """
    word = host << 12 | PTE_PRESENT
    word |= PTE_ACCESSED if why == ASKED else old & PTE_ACCESSED
    if rights & d.RIGHT_USER:
        word |= PTE_USER
    if large:
        word |= PTE_LARGE
        if shadow_get(m, a, t, m[s.SHADOW_POOL] + P_LARGE_NX):
            rights &= ~d.RIGHT_EXECUTE
    if rights & d.RIGHT_EXECUTE == 0:
        word |= PTE_NO_EXECUTE
    if writable:
        word |= d.HOST_WRITABLE
        if rights & d.RIGHT_WRITE and (old & PTE_WRITE or large or not stays_protected(m, a, t, frame, why)):
            word |= PTE_WRITE | PTE_DIRTY
    return word


@kernel
def set_leaf(
    m: Record, a: Arena, t: Tags, entry: int, frame: int, host: int, rights: int, writable: bool, why: int, large: bool
) -> bool:
    """Write a leaf; is it writable?"""
    old = shadow_get(m, a, t, entry_at(m, entry))
    if old & PTE_PRESENT and ((old ^ host << 12) & ADDRESS or old & d.LEADS_TO_TABLE):
        drop_entry(m, a, t, entry)
        old = 0
    if old & PTE_PRESENT == 0:
        old = 0
    if m[s.SHADOW_MODE] & d.MODE_KERNEL:
        rights |= d.RIGHT_USER
    word = make_leaf(m, a, t, frame, host, rights, writable, old, why, large)
    if old & PTE_WRITE and word & PTE_WRITE == 0:
        m[s.SHADOW_FLAGS] |= FLUSH
    shadow_put(m, a, t, entry_at(m, entry), word)
    if old == 0:
        list_leaf(m, a, t, entry, frame, large)
    return word & PTE_WRITE != 0


@kernel
def synchronize_page(m: Record, a: Arena, t: Tags, page: int) -> None:
    """Hold every entry of a leaf table against the guest's: drop what it does not allow any more, weaken the rest.

    An entry of the guest that was not accessed yet is dropped too, so that the next access is seen.
    """
    shadow_count(m, a, t, P_SYNCHRONIZED)
    key = shadow_get(m, a, t, record_at(m, page))
    mode = mode_in(key)
    reserved = shadow_get(m, a, t, m[s.SHADOW_POOL] + P_RESERVED)
    for index in range(512):
        entry = page * 512 + index
        old = shadow_get(m, a, t, entry_at(m, entry))
        if old == 0:
            continue
        m[s.SHADOW_FLAGS] += HELD_ONE
        wanted = guest_entry(m, a, t, mode, key >> KEY_FRAME << 12, leaf_index(key, index))
        frame = (wanted & ADDRESS) >> 12
        if wanted & PTE_PRESENT == 0 or wanted & PTE_ACCESSED == 0 or is_wrong(mode, wanted, 1, reserved):
            drop_entry(m, a, t, entry)
            continue
        if old & d.DEVICE:
            if ((old & ~d.DEVICE & ADDRESS) >> 12) != frame:
                drop_entry(m, a, t, entry)
            continue
        if (shadow_get(m, a, t, note_at(m, entry)) >> 32) & d.LOW != frame:
            drop_entry(m, a, t, entry)
            continue
        rights = (key >> d.ROLE_RIGHTS) & rights_of(mode, wanted)
        if wanted & PTE_DIRTY == 0:
            rights &= ~d.RIGHT_WRITE
        if mode & d.MODE_KERNEL:
            rights |= d.RIGHT_USER
        writable = old & d.HOST_WRITABLE != 0
        word = make_leaf(m, a, t, frame, (old & ADDRESS) >> 12, rights, writable, old, AGAIN, False)
        if word != old:
            shadow_put(m, a, t, entry_at(m, entry), word)
            m[s.SHADOW_FLAGS] |= FLUSH


@kernel
def bring_into_sync(m: Record, a: Arena, t: Tags, page: int) -> None:
    """A leaf table is read-only for the guest again, and its entries are as the guest's."""
    at = record_at(m, page)
    protect_frame(m, a, t, shadow_get(m, a, t, at) >> KEY_FRAME)
    shadow_put(m, a, t, at + R_STATE, shadow_get(m, a, t, at + R_STATE) & ~d.UNSYNC)
    synchronize_page(m, a, t, page)


@kernel
def synchronize_below(m: Record, a: Arena, t: Tags, page: int) -> None:
    """Bring every leaf table below a shadow page into sync."""
    if shadow_get(m, a, t, record_at(m, page) + R_BELOW) == 0:
        return
    m[s.SHADOW_STACK] = page << 12
    depth = next_unsync(m, a, t, 0, True)
    while depth >= 0:
        bring_into_sync(m, a, t, m[s.SHADOW_STACK + depth] >> 12)
        depth = next_unsync(m, a, t, depth, True)


@kernel
def protect_below(m: Record, a: Arena, t: Tags, page: int) -> None:
    """Make every leaf table below a shadow page read-only for the guest; it stays out of sync.

    Other vCPUs may store to it until they have dropped translations: only then may its entries be read.
    """
    if shadow_get(m, a, t, record_at(m, page) + R_BELOW) == 0:
        return
    m[s.SHADOW_STACK] = page << 12
    depth = next_unsync(m, a, t, 0, False)
    while depth >= 0:
        leaf = m[s.SHADOW_STACK + depth] >> 12
        protect_frame(m, a, t, shadow_get(m, a, t, record_at(m, leaf)) >> KEY_FRAME)
        depth = next_unsync(m, a, t, depth, False)


@kernel
def find_page(m: Record, a: Arena, t: Tags, frame: int, role: int) -> int:
    """The shadow page of a guest frame in a role: found in the hash table, or made."""
    key = frame << KEY_FRAME | role
    page = shadow_get(m, a, t, bucket_at(m, frame))
    while page:
        at = record_at(m, page - 1)
        found = shadow_get(m, a, t, at)
        following = shadow_get(m, a, t, at + R_NEXT)
        if found == key:
            if role & d.ROLE_DIRECT == 0:
                if shadow_get(m, a, t, at + R_STATE) & d.UNSYNC:
                    synchronize_page(m, a, t, page - 1)  # stale, but it may stay writable
                forget_writes(m, a, t, page - 1)
            shadow_count(m, a, t, P_REUSED)
            return page - 1
        if found >> KEY_FRAME == frame and (found | role) & d.ROLE_DIRECT == 0 and role & d.ROLE_LEVEL > 1:
            if shadow_get(m, a, t, at + R_STATE) & d.UNSYNC:
                zap_page(m, a, t, page - 1)  # an upper table is never written without an exit
        page = following
    return new_page(m, a, t, frame, role)


@kernel
def role_of(m: Record, level: int, rights: int, direct: bool) -> int:
    """The role of a shadow page, in the paging mode of the guest."""
    return role_in(m[s.SHADOW_MODE], level, rights, direct)
