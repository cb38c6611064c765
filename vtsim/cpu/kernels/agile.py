"""Agile paging: which tables of the guest are nested, and the entries of shadow tables that lead to them.

A table that the guest writes often ceases to be shadowed, and so do those that only it leads to: the shadow entry above
it, or CR3 for a root, leads to the guest's own table, and the walk is two-dimensional from there on. One that it has
not written for an interval is shadowed again. Guest frames that are shadowed tables are read-only in EPT too, so that
no nested part of an address space lets them be written unseen. A table that is shadowed for one address space and met
in a nested walk of another is nested for both: a walk reads it as what it may have to set flags in.

Not modelled: under agile paging, large pages of EPT made again from those that were split.
"""

from __future__ import annotations

from vtsim.base.jit import Arena, Record, Tags, kernel
from vtsim.cpu import slots as s
from vtsim.cpu.kernels.agile_ept import set_ept_flags
from vtsim.cpu.kernels.shadow_map import host_leaf, way_down
from vtsim.cpu.kernels.shadow_pages import (
    ASKED,
    drop_entry,
    keep_free,
    leaves_of,
    put_switch,
    stays_protected,
    zap_page,
)
from vtsim.cpu.kernels.shadow_pool import (
    FLUSH,
    KEY_FRAME,
    LOW,
    R_ORPHAN,
    R_STATE,
    entry_at,
    has_frame,
    note_at,
    record_at,
    shadow_count,
    shadow_get,
    shadow_put,
    switch_of,
    top_level,
)
from vtsim.cpu.kernels.shadow_sync import zap_tables
from vtsim.cpu.kernels.shadow_use import nested_root
from vtsim.cpu.kernels.shadow_walk import P_LEVEL, P_PATH, P_TABLE
from vtsim.ept import shadow as d
from vtsim.ept.spec import (
    EPT_DIRTY,
    EPT_WRITE,
    PTE_ACCESSED,
    PTE_DIRTY,
    PTE_NO_EXECUTE,
    PTE_SWITCHES,
    PTE_USER,
    PTE_WRITE,
    Q_FINAL,
)

P_NESTED: int = d.POOL["NESTED"]
P_TO_NESTED: int = d.POOL["TO_NESTED"]
P_TO_SHADOW: int = d.POOL["TO_SHADOW"]


@kernel
def map_switch(m: Record, a: Arena, t: Tags) -> bool:
    """If the address of the last walk lies below a nested table, let the entry above it lead there.

    With PAE and 32-bit paging the first such entry is a PDPTE, which has no rights and is loaded by VM entry.
    RAX <- 0, or 2 where other vCPUs must drop translations first.
    """
    keep_free(m, a, t)
    pool = m[s.SHADOW_POOL]
    leaf = shadow_get(m, a, t, pool + P_LEVEL)
    if leaf == 0 or m[s.SHADOW_ROOT] < 0:
        return False
    narrow = m[s.SHADOW_MODE] & d.NARROW != 0
    for level in range(3 if narrow else top_level(m) + 1, leaf, -1):
        frame = shadow_get(m, a, t, pool + P_TABLE + 8 * (level - 1))
        if not has_frame(m, a, t, frame):
            continue
        if shadow_get(m, a, t, switch_of(m, frame)) & d.SWITCH_NESTED == 0:
            continue
        if level > top_level(m):  # the root: another vCPU has had it nested, and here it is loaded before VM entry
            m[s.GPR + s.RAX] = 0
            return True
        host = host_leaf(m, a, t, frame)
        if host == 0:
            return False
        entry = way_down(m, a, t, level)
        if entry < 0:
            m[s.GPR + s.RAX] = 2
            return True
        m[s.GPR + s.RAX] = 0
        if narrow and level == 3:
            put_switch(m, a, t, entry, frame, host, 0)
        else:
            rights = shadow_get(m, a, t, pool + P_PATH + 8 * level)
            flags = PTE_ACCESSED | (PTE_WRITE if rights & d.RIGHT_WRITE else 0)
            flags |= PTE_USER if rights & d.RIGHT_USER else 0
            flags |= PTE_NO_EXECUTE if rights & d.RIGHT_EXECUTE == 0 else 0
            put_switch(m, a, t, entry, frame, host, flags)
        return True
    return False


@kernel
def nest_table(m: Record, a: Arena, t: Tags, frame: int) -> None:
    """A table of the guest is nested: nothing shadows it, and the guest writes it without an exit."""
    pool = m[s.SHADOW_VM]
    if shadow_get(m, a, t, switch_of(m, frame)) & d.SWITCH_NESTED == 0:
        following = shadow_get(m, a, t, pool + P_NESTED)
        shadow_put(m, a, t, switch_of(m, frame), following << d.SWITCH_NEXT | d.SWITCH_NESTED)
        shadow_put(m, a, t, pool + P_NESTED, frame + 1)
        shadow_count(m, a, t, P_TO_NESTED)
    zap_tables(m, a, t, frame)
    set_ept_flags(m, a, t, frame, 0, EPT_WRITE)


@kernel
def nest_with_those_below(m: Record, a: Arena, t: Tags, frame: int) -> None:
    """A table is nested, and so are tables that nothing leads to any more: walks reach them in two dimensions now."""
    m[s.SHADOW_ORPHANS] = 0
    nest_table(m, a, t, frame)
    while m[s.SHADOW_ORPHANS] > 0 and m[s.STOP] == 0:
        at = record_at(m, m[s.SHADOW_ORPHANS] - 1)
        m[s.SHADOW_ORPHANS] = shadow_get(m, a, t, at + R_ORPHAN)
        key = shadow_get(m, a, t, at)
        root = key & d.ROLE_LEVEL == top_level(m)
        if shadow_get(m, a, t, at + R_STATE) & d.IN_USE and key & d.ROLE_DIRECT == 0 and not root:
            nest_table(m, a, t, key >> KEY_FRAME)
    m[s.SHADOW_ORPHANS] = -1


@kernel
def note_write(m: Record, a: Arena, t: Tags) -> int:
    """AGILE_NOTE: the table at RSI was written; after RCX times in an interval it is nested. RAX <- is it now?"""
    frame = m[s.GPR + s.RSI] >> 12
    m[s.GPR + s.RAX] = 0
    if not has_frame(m, a, t, frame):
        return 0
    word = shadow_get(m, a, t, switch_of(m, frame)) + 1
    if word & d.SWITCH_WRITES < m[s.GPR + s.RCX] or word & d.SWITCH_NESTED:
        shadow_put(m, a, t, switch_of(m, frame), word)
        return 0
    nest_with_those_below(m, a, t, frame)
    m[s.GPR + s.RAX] = 1
    return 0


@kernel
def ept_written(m: Record, a: Arena, t: Tags) -> int:
    """AGILE_WRITE: EPT refused a write at RSI, qualification RDX; RAX <- 0 if it may now, 1 if it is one to a table."""
    frame = m[s.GPR + s.RSI] >> 12
    if not has_frame(m, a, t, frame):
        m[s.GPR + s.RAX] = 1
        return 0
    if m[s.GPR + s.RDX] & Q_FINAL == 0:
        nest_with_those_below(m, a, t, frame)  # a walk that is nested leads there, and its flags cannot be emulated
    elif stays_protected(m, a, t, frame, ASKED):
        m[s.GPR + s.RAX] = 1
        return 0
    set_ept_flags(m, a, t, frame, 0, EPT_WRITE)
    m[s.GPR + s.RAX] = 0
    return 0


@kernel
def was_written(m: Record, a: Arena, t: Tags, frame: int) -> bool:
    """Was a guest frame written since this was asked last? Dirty flags of what maps it are cleared."""
    dirty = set_ept_flags(m, a, t, frame, EPT_DIRTY, 0) & EPT_DIRTY != 0
    for large in range(2):
        entry = shadow_get(m, a, t, leaves_of(m, frame, large != 0)) & LOW
        while entry:
            at = entry_at(m, entry - 1)
            word = shadow_get(m, a, t, at)
            if word & PTE_DIRTY and word & PTE_SWITCHES == 0:
                dirty = True
                shadow_put(m, a, t, at, word & ~PTE_DIRTY)
                m[s.SHADOW_FLAGS] |= FLUSH
            entry = shadow_get(m, a, t, note_at(m, entry - 1)) & LOW
    return dirty


@kernel
def drop_switches(m: Record, a: Arena, t: Tags, frame: int) -> None:
    """No entry leads any more to a table of the guest's own."""
    entry = shadow_get(m, a, t, leaves_of(m, frame, False)) & LOW
    while entry:
        following = shadow_get(m, a, t, note_at(m, entry - 1)) & LOW
        if shadow_get(m, a, t, entry_at(m, entry - 1)) & PTE_SWITCHES:
            drop_entry(m, a, t, entry - 1)
        entry = following


@kernel
def scan_nested(m: Record, a: Arena, t: Tags) -> int:
    """AGILE_SCAN: an interval is over: tables that were not written in it are shadowed again; RAX <- how many."""
    at = m[s.SHADOW_VM] + P_NESTED
    shift = 0
    back = 0
    frame = shadow_get(m, a, t, at) - 1
    while frame >= 0:
        word = shadow_get(m, a, t, switch_of(m, frame))
        following = (word >> d.SWITCH_NEXT) & LOW
        if was_written(m, a, t, frame):
            at = switch_of(m, frame)
            shift = d.SWITCH_NEXT
            shadow_put(m, a, t, at, word & ~d.SWITCH_WRITES)
        else:
            shadow_put(m, a, t, switch_of(m, frame), 0)
            before = shadow_get(m, a, t, at)
            shadow_put(m, a, t, at, before & LOW | following << shift if shift else following)
            drop_switches(m, a, t, frame)
            root = nested_root(m, a, t, frame)
            if root >= 0:
                zap_page(m, a, t, root)
            shadow_count(m, a, t, P_TO_SHADOW)
            back += 1
        frame = following - 1
    m[s.GPR + s.RAX] = back
    return 0
