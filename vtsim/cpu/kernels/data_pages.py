"""Pages of data that a CPU used lately, and which of their lines: what need not be looked up again.

A hit on an entry of a TLB or a line of L1D whose reference bit is set changes nothing, and it stays one until something
is filled there or invalidated. So a page that was translated, and a line that was found, since the last of these are
known without a search, until another CPU takes one. This is no hardware, only the simulator's memory.

Loads and stores ask it, not fetches. Where two first-level TLBs hold an address at once, as after a page was split and
not invalidated, either may answer, here as in hardware.
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
SPREAD: int = 0x9E3779B97F4A7C15 - (1 << 64)  # 2**64 by the golden ratio


@kernel
def stamp_now(m: Record, user: int) -> int:
    """What a page must bear that is used as a ring: all fills and invalidations so far, and whose translation it is."""
    return (m[s.DATA_GENERATION] + m[s.FETCH_GENERATION]) << 13 | m[s.CONTEXT] << 1 | user


@kernel
def place_of(page: int) -> int:
    """Where a page is remembered. Areas begin alike, so it is a hash."""
    return s.DATA_PAGES + ((page * SPREAD >> 58) & (s.DATA_PAGE_COUNT - 1)) * WORDS


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
def find_lines(m: Record, a: Arena, t: Tags, at: int, gva: int, span: int, access: int, stamp: int) -> bool:
    """Translate a page and find lines of it from an address on, `span` is a bit for each: do they all hit?

    They are remembered at `at`.
    """
    page = gva >> 12
    if m[at + PAGE] != page or m[at + STAMP] != stamp or (access == WRITE and m[at + WRITABLE] == 0):
        hpa = quickly(m, a, gva, access, stamp & 1)
        if hpa < 0 or not is_memory(a, hpa):
            return False
        m[at + PAGE] = page
        m[at + STAMP] = stamp
        m[at + FRAME] = hpa >> 12
        m[at + WRITABLE] = access == WRITE
        m[at + LINES] = 0
        m[at + OWNED] = 0 if m[s.PEERS] else -1
    line = m[at + FRAME] << 6 | (gva >> 6) & 63
    while span:
        known = m[at + LINES] & m[at + OWNED] if access == WRITE else m[at + LINES]
        if (known >> (line & 63)) & 1 == 0 and not found(m, t, at, line, access):
            return False
        line += 1
        span >>= 1
    return True


@kernel
def all_hit(m: Record, a: Arena, t: Tags, at: int, gva: int, size: int, access: int, stamp: int) -> bool:
    """Do the `size` bytes at an address, of one page, hit everywhere? `at` is the page's place, `stamp` that of now."""
    span = (2 << (((gva & 63) + size - 1) >> 6)) - 1  # its lines, from the first on
    lines = m[at + LINES]
    if access == WRITE:
        lines &= m[at + OWNED]
    known = m[at + PAGE] == gva >> 12 and m[at + STAMP] == stamp and (access != WRITE or m[at + WRITABLE] != 0)
    if known and ~(lines >> ((gva >> 6) & 63)) & span == 0:
        return True
    return find_lines(m, a, t, at, gva, span, access, stamp)


@kernel
def words_at(m: Record, a: Arena, t: Tags, gva: int, size: int, access: int, stamp: int) -> int:
    """The arena offset of the word at an address, if its `size` bytes, of one page, hit everywhere; else -1.

    `stamp` is that of now. To a store, the frame has changed.
    """
    at = place_of(gva >> 12)
    if not all_hit(m, a, t, at, gva, size, access, stamp):
        return -1
    hfn = m[at + FRAME]
    slot = a[a[A_FRAMES] + hfn] & SLOT_MASK
    if access == WRITE:
        if slot == 0:
            return -1
        touch(a, hfn)
    return a[A_POOL] + (slot << 9) + ((gva >> 3) & 511)  # of a frame without contents: in the page of zeroes
