"""Where a stream's next walks will go: told to the host early, so that its own cache misses overlap.

Nothing that is simulated depends on it, and it changes nothing but its own memory of where page tables were.
"""

from __future__ import annotations

from vtsim.base.jit import Arena, Record, Tags, kernel, prefetch
from vtsim.base.memory import A_FRAMES, A_POOL, SLOT_MASK, is_memory
from vtsim.cpu import slots as s
from vtsim.cpu.kernels.caches import set_of
from vtsim.ept.spec import ADDRESS, PTE_PRESENT

# fmt: off
GUEST, NESTED = range(2)                 # whose table
ENTRIES: int = 2048                      # page tables remembered in each dimension
WORDS: int = 2 * ENTRIES * 2
# how many accesses before its own one each read is told
TABLE_AHEAD, NESTED_AHEAD, DATA_AHEAD = 6, 4, 2
# fmt: on


@kernel
def remember(m: Record, a: Arena, whose: int, number: int, table: int) -> None:
    """A walk read a leaf of the page table for these 2 MiB."""
    at = m[s.FORESEEN] + (whose * ENTRIES + (number & (ENTRIES - 1))) * 2
    a[at] = number
    a[at + 1] = table


@kernel
def leaf_of(m: Record, a: Arena, whose: int, address: int) -> int:
    """Where the leaf entry of this address was, or 0; it may have moved since."""
    number = address >> 21
    at = m[s.FORESEEN] + (whose * ENTRIES + (number & (ENTRIES - 1))) * 2
    return a[at + 1] | ((address >> 12) & 511) << 3 if a[at] == number else 0


@kernel
def ask(m: Record, t: Tags, hpa: int) -> None:
    """The sets in which L2, L3 and the directory will look for this line."""
    line = hpa >> 6
    for cache in (s.L2, s.L3):
        where = set_of(m, cache, line)
        prefetch(t, m[cache] + where * m[cache + s.WAYS])
        prefetch(t, m[cache] + (where ^ 1) * m[cache + s.WAYS])  # of its pair
        prefetch(t, m[cache + s.REFERENCED] + (where << m[cache + s.AGED]))
    if m[s.PEERS]:
        where = set_of(m, s.DIRECTORY, line)
        ways = m[s.DIRECTORY + s.WAYS]
        prefetch(t, m[s.DIRECTORY] + where * 2 * ways)
        prefetch(t, m[s.DIRECTORY] + (where * 2 + 1) * ways)
        prefetch(t, m[s.DIRECTORY + s.REFERENCED] + where)


@kernel
def word_of(a: Arena, hpa: int) -> int:
    """The arena offset of a word of a page table."""
    return a[A_POOL] + ((a[a[A_FRAMES] + (hpa >> 12)] & SLOT_MASK) << 9) + ((hpa >> 3) & 511)


@kernel
def foresee(m: Record, a: Arena, t: Tags, gva: int, ahead: int) -> None:
    """An access to `gva` will be made `ahead` accesses from now."""
    at = leaf_of(m, a, GUEST, gva)
    if at == 0:
        return
    if ahead == TABLE_AHEAD:
        prefetch(a, word_of(a, at))
        ask(m, t, at)
        return
    entry = a[word_of(a, at)]
    if entry & PTE_PRESENT == 0:
        return
    hpa = entry & ADDRESS
    if m[s.NONROOT] and m[s.EPTP]:
        at = leaf_of(m, a, NESTED, hpa)
        if at == 0:
            return
        if ahead == NESTED_AHEAD:
            prefetch(a, word_of(a, at))
            ask(m, t, at)
            return
        hpa = a[word_of(a, at)] & ADDRESS
    if ahead == DATA_AHEAD and is_memory(a, hpa):
        prefetch(a, a[A_FRAMES] + (hpa >> 12))
        ask(m, t, hpa | (gva & 0xFFF))
