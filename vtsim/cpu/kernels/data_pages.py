"""Pages of data that a CPU used lately, and which of their lines: what need not be looked up again.

A hit on an entry of a TLB or a line of L1D whose reference bit is set changes nothing, and it stays one until something
is filled there or invalidated. So a page that was translated, and a line that was found, since the last of these are
known without a search, until another CPU takes one. This is no hardware, only the simulator's memory.
"""

from __future__ import annotations

from vtsim.base.jit import Arena, Record, Tags, kernel
from vtsim.base.memory import A_FRAMES, A_POOL, SLOT_MASK, is_memory, touch
from vtsim.cpu import slots as s
from vtsim.cpu.kernels.caches import probe, way_bit
from vtsim.cpu.kernels.coherence import owner_of
from vtsim.cpu.kernels.rights import WRITE
from vtsim.cpu.kernels.translate import quickly

# LINES: a bit for each of the page's lines that is in L1D; OWNED: for each that this CPU may write
(PAGE, STAMP, FRAME, WRITABLE, LINES, OWNED) = range(6)
WORDS: int = 8


@kernel
def stamp_now(m: Record) -> int:
    """What a page must bear: all fills and invalidations so far, and for whom it was translated."""
    return (m[s.DATA_GENERATION] + m[s.FETCH_GENERATION]) << 13 | m[s.CONTEXT] << 1 | m[s.PRIVILEGE] & 1


@kernel
def found(m: Record, t: Tags, at: int, line: int, access: int) -> bool:
    """Does L1D hold a line of the page remembered at `at`, and, for a store, no other CPU? It is remembered."""
    if not probe(m, t, s.L1D, line):
        return False
    m[at + LINES] |= way_bit(line & 63)
    if access == WRITE and m[s.PEERS]:
        if owner_of(m, t, line) != m[s.CORE]:
            return False
        m[at + OWNED] |= way_bit(line & 63)
    return True


@kernel
def words_at(m: Record, a: Arena, t: Tags, gva: int, size: int, access: int, stamp: int) -> int:
    """The arena offset of the word at an address, if its `size` bytes, of one page, hit everywhere; else -1.

    `stamp` is that of now. To a store, the frame has changed.
    """
    page = gva >> 12
    at = s.DATA_PAGES + (page & (s.DATA_PAGE_COUNT - 1)) * WORDS
    if m[at + PAGE] != page or m[at + STAMP] != stamp or (access == WRITE and m[at + WRITABLE] == 0):
        hpa = quickly(m, a, gva, access, m[s.PRIVILEGE] & 1)
        if hpa < 0 or not is_memory(a, hpa):
            return -1
        m[at + PAGE] = page
        m[at + STAMP] = stamp
        m[at + FRAME] = hpa >> 12
        m[at + WRITABLE] = access == WRITE
        m[at + LINES] = 0
        m[at + OWNED] = 0 if m[s.PEERS] else -1
    hfn = m[at + FRAME]
    slot = a[a[A_FRAMES] + hfn] & SLOT_MASK
    if slot == 0 and access == WRITE:
        return -1
    first = (gva >> 6) & 63
    last = ((gva + size - 1) >> 6) & 63
    known = m[at + LINES] & m[at + OWNED] if access == WRITE else m[at + LINES]
    for line in range(first, last + 1):
        if (known >> line) & 1 == 0 and not found(m, t, at, hfn << 6 | line, access):
            return -1
    if access == WRITE:
        touch(a, hfn)
    return a[A_POOL] + (slot << 9) + ((gva >> 3) & 511)  # of a frame without contents: in the page of zeroes
