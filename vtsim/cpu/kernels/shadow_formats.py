"""Entries of the guest's tables as the monitor reads them: of 4- and 5-level, of PAE and of 32-bit paging.

A table of 32-bit paging has 1024 entries, and its shadow pages have 512: several stand for it, each for a quadrant. One
for a page directory has two entries for each of the guest's, since an entry of the guest's spans 4 MiB.

SDM: "4-Level Paging and 5-Level Paging"; "PAE Paging"; "32-Bit Paging".
"""

from __future__ import annotations

from vtsim.base.jit import Arena, Record, Tags, kernel
from vtsim.base.memory import is_memory, store
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.codes import OUT_OF_MEMORY
from vtsim.cpu.kernels.access import read64, timed_access
from vtsim.cpu.kernels.rights import WRITE
from vtsim.ept import shadow as d
from vtsim.ept.spec import ADDRESS, PTE_LARGE, PTE_NO_EXECUTE, PTE_USER, PTE_WRITE

# fmt: off
PAE_IGNORED_ELSEWHERE: int = 0x7FF << 52    # bits that are reserved in an entry of PAE paging
WIDE_RESERVED: int = 1 << 21                # of an entry for 4 MiB
PSE_HIGH: int = 0xFF << 13                  # of the same: bits 39:32 of the address
# fmt: on


@kernel
def format_of(mode: int) -> int:
    """A paging mode in which CR4.PAE and CR4.PSE stand as they are: the same with what they mean for tables."""
    mode &= ~d.MODE_32BIT
    if mode & (d.MODE_LEGACY | d.MODE_PAGING) != d.MODE_LEGACY | d.MODE_PAGING:
        return mode & ~(d.MODE_PAE | d.MODE_PSE)
    return mode & ~d.MODE_PSE if mode & d.MODE_PAE else mode | d.MODE_32BIT


@kernel
def mode_in(key: int) -> int:
    """The paging mode that the role of a shadow page names."""
    return (key >> d.ROLE_MODE) & d.ROLE_MODES


@kernel
def quadrant_of(mode: int, level: int, address: int) -> int:
    """What the role of the shadow page at a level for an address says of the quadrant."""
    if mode & d.MODE_32BIT == 0 or level > 2:
        return 0
    return ((address >> 30) & 3 if level == 2 else (address >> 21) & 1) << d.ROLE_QUADRANT


@kernel
def index_in(mode: int, level: int, address: int) -> int:
    """The index of an address in a table of the guest."""
    if mode & d.MODE_32BIT:
        return (address >> (2 + 10 * level)) & 1023
    return (address >> (3 + 9 * level)) & 511


@kernel
def within_page(mode: int, level: int) -> int:
    """Which bits of an address are the offset in a page that an entry at a level maps."""
    return (1 << (2 + 10 * level if mode & d.MODE_32BIT else 3 + 9 * level)) - 1


@kernel
def is_leaf(mode: int, level: int, entry: int) -> bool:
    """Does an entry of the guest map a page?"""
    if level == 1:
        return True
    return entry & PTE_LARGE != 0 and level <= 3 and mode & (d.MODE_32BIT | d.MODE_PSE) != d.MODE_32BIT


@kernel
def frame_of(mode: int, level: int, entry: int, address: int) -> int:
    """The guest frame that an entry which maps a page has for an address."""
    within = within_page(mode, level)
    page = entry & ADDRESS & ~within
    if mode & d.MODE_32BIT and level == 2:
        page |= (entry & PSE_HIGH) << 19
    return (page | (address & within)) >> 12


@kernel
def is_wrong(mode: int, entry: int, level: int, reserved: int) -> bool:
    """Has an entry of the guest at a level reserved bits set?"""
    if mode & d.MODE_32BIT:
        large = level == 2 and is_leaf(mode, level, entry)
        return (large and entry & WIDE_RESERVED != 0) or (large and (entry & PSE_HIGH) << 19 & reserved != 0)
    if entry & reserved or (entry & PTE_NO_EXECUTE and mode & d.MODE_NX == 0):
        return True
    if mode & d.MODE_PAE and entry & PAE_IGNORED_ELSEWHERE:
        return True
    if entry & PTE_LARGE == 0 or level == 1:
        return False
    return level > 3 or entry & ((1 << (3 + 9 * level)) - 1) & ~0x1FFF != 0


@kernel
def rights_of(mode: int, entry: int) -> int:
    """The rights of an entry of the guest."""
    rights = d.RIGHT_WRITE if entry & PTE_WRITE else 0
    if entry & PTE_USER:
        rights |= d.RIGHT_USER
    if entry & PTE_NO_EXECUTE == 0 or mode & d.MODE_NX == 0:
        rights |= d.RIGHT_EXECUTE
    return rights


@kernel
def leaf_index(key: int, index: int) -> int:
    """The index of the guest's entry that an entry of a leaf table's shadow page stands for, by the key of the page."""
    return ((key >> d.ROLE_QUADRANT) & 3) << 9 | index


@kernel
def first_entry(key: int, offset: int) -> int:
    """The first entry of a shadow page that stands for the guest's at an offset of the table; -1 if none does."""
    if mode_in(key) & d.MODE_32BIT == 0:
        return offset >> 3
    bits = 9 if key & d.ROLE_LEVEL == 1 else 8
    index = offset >> 2
    if index >> bits != (key >> d.ROLE_QUADRANT) & 3:
        return -1
    return (index & ((1 << bits) - 1)) << (9 - bits)


@kernel
def guest_entry(m: Record, a: Arena, t: Tags, mode: int, table: int, index: int) -> int:
    """Load an entry of the guest's tables through the process that has its memory; 0 where there is no memory."""
    m[s.RETIRED] += 1
    m[s.CYCLE] += m[s.PRICE + o.LD]
    short = mode & d.MODE_32BIT != 0
    value = read64(m, a, t, m[s.SHADOW_GUEST] + (table | (index >> 1 if short else index) << 3))
    if m[s.FAULT_KIND]:
        m[s.FAULT_KIND] = 0
        return 0
    if short:
        value = (value >> 32 if index & 1 else value) & 0xFFFFFFFF
    return value


@kernel
def set_guest_flags(m: Record, a: Arena, t: Tags, mode: int, table: int, index: int, entry: int) -> None:
    """Store an entry of the guest's tables with its accessed or dirty flag set, as a locked operation does."""
    m[s.RETIRED] += 1
    m[s.CYCLE] += m[s.ATOMIC_CYCLES]
    size = 4 if mode & d.MODE_32BIT else 8
    hpa = timed_access(m, a, t, m[s.SHADOW_GUEST] + (table | index * size), WRITE)
    if hpa >= 0 and is_memory(a, hpa) and store(a, hpa, size, entry) < 0:
        m[s.STOP] = OUT_OF_MEMORY
        m[s.LIMIT] = 0
