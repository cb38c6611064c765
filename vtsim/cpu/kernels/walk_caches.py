"""Paging-structure caches of either dimension: one for each kind of entry that leads to another table.

With ENTRY_CACHE it is one cache for both dimensions, which AMD's processors have: it holds entries that lead to another
table by their own host-physical address (BHARGAVA08; Barr, Cox and Rixner, ISCA 2010). No level of a walk is saved, but
each is answered there. A context is part of the tag, as in all other structures, so that the same invalidations hold.

What is kept under a part of the address is the table that the entry leads to: its host-physical address, its level,
and the rights that hold so far.

Not modelled: entries of 32-bit and PAE paging in a walk cache of single entries.

SDM: "Caches for Paging Structures"; "Information That May Be Cached".
"""

from __future__ import annotations

from vtsim.base.jit import Arena, Record, kernel
from vtsim.cpu.kernels.caches import drop, find, keep, remove
from vtsim.cpu.kernels.contexts import CONTEXT_MASK, TAG_SHIFT, VPN_MASK
from vtsim.cpu.slots import ENTRY_CACHE, OWNER, PAGING_LEVELS, WALK_LATENCY

# fmt: off
TABLE_LEVEL = 4            # bits 6:4 of what is kept
DEEPEST, STRIDE = 1, 4     # the PDE cache leads to tables of level 1; each level up is a structure before it
# fmt: on


@kernel
def linear_number(m: Record, gva: int) -> int:
    """What caches of linear addresses are searched by: the page number; with 32-bit paging a PDE maps 4 MiB."""
    return (gva >> 22) << 9 if m[PAGING_LEVELS] == 2 else (gva >> 12) & VPN_MASK


@kernel
def deepest(m: Record, a: Arena, last: int, number: int, levels: int, context: int) -> int:
    """The deepest table that is known on the way to a page: address | level << 4 | rights, or -1.

    `last` is the dimension's PDE cache, `levels` how many the walk has.
    """
    for level in range(DEEPEST, levels):
        part = number >> (9 * level)
        up = find(m, a, last - STRIDE * (level - DEEPEST), part, part << TAG_SHIFT | context)
        if up >= 0:
            return up
    return -1


@kernel
def keep_table(m: Record, a: Arena, last: int, number: int, level: int, context: int, up: int) -> None:
    """Keep the table of a level on the way to a page: `up` is its address and the rights so far."""
    part = number >> (9 * level)
    keep(m, a, last - STRIDE * (level - DEEPEST), part, part << TAG_SHIFT | context, up | level << TABLE_LEVEL)


@kernel
def forget_tables(m: Record, a: Arena, last: int, number: int, context: int) -> None:
    """Remove every table on the way to a page; of single entries all of the context, any of which may be on it."""
    if m[ENTRY_CACHE]:
        drop(m, a, last, CONTEXT_MASK, context)
        return
    for level in range(DEEPEST, 5):
        part = number >> (9 * level)
        remove(m, a, last - STRIDE * (level - DEEPEST), part, part << TAG_SHIFT | context)


@kernel
def held_entry(m: Record, a: Arena, last: int, at: int, context: int, price: int, hits: int) -> int:
    """The entry at a host-physical address that a cache of entries holds, or -1: `price` and `hits` are slots."""
    number = at >> 3
    entry = find(m, a, last, number, number << TAG_SHIFT | context)
    if entry != -1:
        m[WALK_LATENCY] += m[price]
        a[m[OWNER] + hits] += 1
    return entry


@kernel
def keep_entry(m: Record, a: Arena, last: int, at: int, context: int, entry: int) -> None:
    """Hold an entry that leads to another table."""
    number = at >> 3
    keep(m, a, last, number, number << TAG_SHIFT | context, entry)
