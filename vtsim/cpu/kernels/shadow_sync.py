"""What keeps shadow tables true: emulated writes to the guest's tables, synchronization, INVLPG.

SDM: "Memory Virtualization".
"""

from __future__ import annotations

from vtsim.base.jit import Arena, Record, Tags, kernel
from vtsim.cpu import slots as s
from vtsim.cpu.kernels.shadow_formats import first_entry, mode_in
from vtsim.cpu.kernels.shadow_leaves import bring_into_sync, protect_below, synchronize_below
from vtsim.cpu.kernels.shadow_map import fill_beside
from vtsim.cpu.kernels.shadow_pages import drop_entry, keep_free, protect_frame, unmap_frame, zap_page
from vtsim.cpu.kernels.shadow_pool import (
    KEY_FRAME,
    P_PAGES,
    R_BELOW,
    R_NEXT,
    R_STATE,
    bucket_at,
    entry_at,
    has_frame,
    page_behind,
    record_at,
    role_in,
    shadow_count,
    shadow_get,
    shadow_put,
    top_level,
    top_of,
)
from vtsim.cpu.kernels.shadow_roots import P_LOADED
from vtsim.ept import shadow as d
from vtsim.ept.spec import ADDRESS, PTE_PRESENT

P_WRITES: int = d.POOL["WRITES"]
P_FLOODED: int = d.POOL["FLOODED"]


@kernel
def table_written(m: Record, a: Arena, t: Tags) -> int:
    """SHADOW_WRITE: RCX bytes at RSI of a table were written. The entry goes; so does a table written too often.

    A write that is not one whole entry says that the page is no table any more.
    """
    gpa, size = m[s.GPR + s.RSI], m[s.GPR + s.RCX]
    frame = gpa >> 12
    if not has_frame(m, a, t, frame):
        return 0
    shadow_count(m, a, t, P_WRITES)
    counted = False
    page = shadow_get(m, a, t, bucket_at(m, frame))
    while page:
        at = record_at(m, page - 1)
        key = shadow_get(m, a, t, at)
        following = shadow_get(m, a, t, at + R_NEXT)
        if key >> KEY_FRAME == frame and key & d.ROLE_DIRECT == 0:
            state = shadow_get(m, a, t, at + R_STATE)
            if key & d.ROLE_LEVEL > 1 and not counted:
                state += 1 << d.WRITES
                shadow_put(m, a, t, at + R_STATE, state)
            wide = mode_in(key) & d.MODE_32BIT == 0
            if state >> d.WRITES >= d.FLOOD or size < 4 or gpa & (size - 1) or (size > 4 and not wide):
                zap_page(m, a, t, page - 1)
                shadow_count(m, a, t, P_FLOODED)
                if following and shadow_get(m, a, t, record_at(m, following - 1) + R_STATE) & d.IN_USE == 0:
                    following = shadow_get(m, a, t, bucket_at(m, frame))  # what followed went too: once more
                    counted = True
            else:
                first = first_entry(key, gpa & 0xFFF)
                count = 0 if first < 0 else 1 if wide or key & d.ROLE_LEVEL == 1 else 2
                for index in range(first, first + count):
                    drop_entry(m, a, t, (page - 1) * 512 + index)
        page = following
    return 0


@kernel
def unprotect(m: Record, a: Arena, t: Tags) -> int:
    """SHADOW_UNPROTECT: give up every shadow page of the guest frame of RSI."""
    m[s.GPR + s.RAX] = zap_tables(m, a, t, m[s.GPR + s.RSI] >> 12)
    return 0


@kernel
def zap_tables(m: Record, a: Arena, t: Tags, frame: int) -> int:
    """Give up every shadow page that stands for a guest frame as a table: how many."""
    zapped = 0
    page = shadow_get(m, a, t, bucket_at(m, frame)) if has_frame(m, a, t, frame) else 0
    while page:
        at = record_at(m, page - 1)
        key = shadow_get(m, a, t, at)
        following = shadow_get(m, a, t, at + R_NEXT)
        if key >> KEY_FRAME == frame and key & d.ROLE_DIRECT == 0:
            zap_page(m, a, t, page - 1)
            zapped += 1
            following = shadow_get(m, a, t, bucket_at(m, frame))
        page = following
    return zapped


@kernel
def protect_unsync(m: Record, a: Arena, t: Tags) -> int:
    """SHADOW_PROTECT: leaf tables out of sync are read-only for the guest: below the root in use, or (RCX 1) all."""
    if m[s.GPR + s.RCX] == 0:
        if m[s.SHADOW_ROOT] >= 0:
            protect_below(m, a, t, m[s.SHADOW_ROOT])
        return 0
    for page in range(shadow_get(m, a, t, m[s.SHADOW_POOL] + P_PAGES)):
        if shadow_get(m, a, t, record_at(m, page) + R_STATE) & d.UNSYNC:
            protect_frame(m, a, t, shadow_get(m, a, t, record_at(m, page)) >> KEY_FRAME)
    return 0


@kernel
def synchronize(m: Record, a: Arena, t: Tags) -> int:
    """SHADOW_SYNC: bring every leaf table below the root in use into sync."""
    if m[s.SHADOW_ROOT] >= 0:
        synchronize_below(m, a, t, m[s.SHADOW_ROOT])
    return 0


@kernel
def synchronize_all(m: Record, a: Arena, t: Tags) -> int:
    """SHADOW_SYNC_ALL: bring every leaf table into sync."""
    for page in range(shadow_get(m, a, t, m[s.SHADOW_POOL] + P_PAGES)):
        if shadow_get(m, a, t, record_at(m, page) + R_STATE) & d.UNSYNC:
            bring_into_sync(m, a, t, page)
    return 0


@kernel
def invalidate_address(m: Record, a: Arena, t: Tags) -> int:
    """SHADOW_INVLPG: of a leaf table that is out of sync, the entry for RSI is read again."""
    keep_free(m, a, t)
    read_again(m, a, t, m[s.SHADOW_ROOT], m[s.GPR + s.RSI])
    return 0


@kernel
def read_again(m: Record, a: Arena, t: Tags, page: int, address: int) -> None:
    """If an address lies in a leaf table that is out of sync, below a root, its entry is read again."""
    if page < 0:
        return
    for level in range(top_level(m), 0, -1):
        entry = page * 512 + ((address >> (3 + 9 * level)) & 511)
        if level == 1:
            if shadow_get(m, a, t, record_at(m, page) + R_STATE) & d.UNSYNC:
                drop_entry(m, a, t, entry)
                fill_beside(m, a, t, entry, shadow_get(m, a, t, record_at(m, page)))
            return
        if shadow_get(m, a, t, record_at(m, page) + R_BELOW) == 0:
            return
        word = shadow_get(m, a, t, entry_at(m, entry))
        if word & PTE_PRESENT == 0 or word & d.LEADS_TO_TABLE == 0:
            return
        page = page_behind(m, word)


@kernel
def root_of(m: Record, a: Arena, t: Tags, key: int) -> int:
    """The shadow page of a root that was loaded, by CR3 and paging mode; -1 if it was given up since."""
    mode = key >> d.MODE_SHIFT
    frame = (key & ADDRESS) >> 12
    wanted = frame << KEY_FRAME | role_in(mode, top_of(mode), d.ALL_RIGHTS, False)
    page = shadow_get(m, a, t, bucket_at(m, frame))
    while page:
        at = record_at(m, page - 1)
        if shadow_get(m, a, t, at) == wanted:
            return page - 1
        page = shadow_get(m, a, t, at + R_NEXT)
    return -1


@kernel
def invalidate_contexts(m: Record, a: Arena, t: Tags) -> int:
    """SHADOW_INVPCID: type RCX, PCID RBX, address RSI. Of the roots loaded last, those that it names.

    One address is read again in each. The root in use is synchronized; another one is when it is loaded next.
    """
    keep_free(m, a, t)
    kind = m[s.GPR + s.RCX]
    m[s.GPR + s.RAX] = 0
    at = m[s.SHADOW_POOL] + P_LOADED
    for n in range(d.LOADED_ROOTS):
        key = shadow_get(m, a, t, at + 8 * n)
        narrow = (key >> d.MODE_SHIFT) & d.NARROW != 0  # without PCIDs, and whoever loads its CR3 synchronizes
        if key == 0 or (kind < 2 and not narrow and key & 0xFFF != m[s.GPR + s.RBX]) or (narrow and n):
            continue
        m[s.GPR + s.RAX] = 1
        if kind == 0:
            read_again(m, a, t, m[s.SHADOW_ROOT] if n == 0 else root_of(m, a, t, key), m[s.GPR + s.RSI])
        elif n:
            shadow_put(m, a, t, at + 8 * n, 0)
        elif m[s.SHADOW_ROOT] >= 0:
            synchronize_below(m, a, t, m[s.SHADOW_ROOT])
    return 0


@kernel
def forget_frame(m: Record, a: Arena, t: Tags) -> int:
    """SHADOW_UNMAP: the host's page behind the guest frame of RSI changes."""
    frame = m[s.GPR + s.RSI] >> 12
    if has_frame(m, a, t, frame):
        unmap_frame(m, a, t, frame)
    return 0


@kernel
def zap_all(m: Record, a: Arena, t: Tags) -> int:
    """SHADOW_ZAP_ALL: the memory map changed, and with it everything."""
    for page in range(shadow_get(m, a, t, m[s.SHADOW_POOL] + P_PAGES)):
        if shadow_get(m, a, t, record_at(m, page) + R_STATE) & d.IN_USE:
            zap_page(m, a, t, page)
    return 0
