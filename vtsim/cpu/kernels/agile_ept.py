"""EPT of a VM with agile paging: flags of the leaf of one guest frame, for which a large page is split.

A large page stays until a frame in it is to differ from its neighbours: a table of the guest that is shadowed, whose
writes are to exit, or one that is nested and asked whether it was written.

SDM: "EPT Translation Mechanism"; "Guidelines for Use of the INVEPT Instruction".
"""

from __future__ import annotations

from vtsim.base.jit import Arena, Record, Tags, kernel
from vtsim.base.memory import PAGE_WORDS
from vtsim.cpu import slots as s
from vtsim.cpu.codes import MODEL_FAULT
from vtsim.cpu.kernels.shadow_pool import FLUSH, PROTECTED, shadow_count, shadow_get, shadow_put
from vtsim.ept import shadow as d
from vtsim.ept.spec import ADDRESS, EPT_LARGE, EPT_RWX, EPT_WRITE

P_EPT: int = d.POOL["EPT"]
P_EPT_TABLES: int = d.POOL["EPT_TABLES"]
P_EPT_SPLIT: int = d.POOL["EPT_SPLIT"]


@kernel
def split_page(m: Record, a: Arena, t: Tags, at: int, leaf: int, level: int) -> int:
    """Replace the leaf that stands at an address by a table of pages of the next size: the entry that leads there.

    Each of them has the leaf's rights, memory type and flags. The processor may have cached the leaf: all are to drop
    what they have.
    """
    tables = shadow_get(m, a, t, m[s.SHADOW_POOL] + P_EPT_TABLES)
    frame = shadow_get(m, a, t, tables)
    if frame >= shadow_get(m, a, t, tables + 8):  # there is one for every 2 MiB of the VM
        m[s.STOP] = MODEL_FAULT
        return 0
    shadow_put(m, a, t, tables, frame + 1)
    below = leaf & ~EPT_LARGE if level == 2 else leaf
    for index in range(PAGE_WORDS):
        page = below + (index << (3 + 9 * (level - 1)))
        shadow_put(m, a, t, m[s.SHADOW_DIRECT] + (frame << 12) + 8 * index, page)
    entry = frame << 12 | EPT_RWX
    shadow_put(m, a, t, at, entry)
    m[s.SHADOW_FLAGS] |= FLUSH
    shadow_count(m, a, t, P_EPT_SPLIT)
    return entry


@kernel
def set_ept_flags(m: Record, a: Arena, t: Tags, frame: int, cleared: int, given: int) -> int:
    """Clear and set flags of the EPT leaf of a guest frame; the leaf as it was, 0 where nothing is mapped."""
    table = shadow_get(m, a, t, m[s.SHADOW_POOL] + P_EPT)
    for level in range(4, 0, -1):
        at = m[s.SHADOW_DIRECT] + (table & ADDRESS) + ((frame >> (9 * (level - 1))) & 511) * 8
        table = shadow_get(m, a, t, at)
        if table & EPT_RWX == 0:
            return 0
        if level > 1 and table & EPT_LARGE:
            if table & cleared == 0 and table | given == table:
                return table
            table = split_page(m, a, t, at, table, level)
    if table & cleared or table | given != table:
        shadow_put(m, a, t, at, (table & ~cleared) | given)
        if table & cleared:
            m[s.SHADOW_FLAGS] |= FLUSH | PROTECTED if table & cleared & EPT_WRITE else FLUSH
    return table
