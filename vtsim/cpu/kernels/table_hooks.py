"""Hooks on radix tables: map, look up, copy, clear. Whoever is refused goes on where it stood, in registers.

Bits 53:52 of a root say how its tables are read: with four levels, or as those of PAE or of 32-bit paging. With PAE
paging the page directories exist before: a new PDPTE would have no effect until CR3 is loaded.

SDM: "4-Level Paging and 5-Level Paging"; "PAE Paging"; "32-Bit Paging".
Not modelled: kernels of PAE paging that store the halves of an entry one after the other, as Linux does for leaves.
"""

from __future__ import annotations

from vtsim.base.jit import Arena, Record, Tags, kernel
from vtsim.cpu import slots as s
from vtsim.cpu.kernels.hook_access import hook_load, hook_store, load_half, store_half, zero_page
from vtsim.ept.spec import ADDRESS

PRESENT_ANY: int = 7
MODE_SHIFT: int = 52  # of a root
FOUR_LEVELS, PAE, NARROW = range(3)  # NARROW: 32-bit paging


@kernel
def mode_of(root: int) -> int:
    """How the tables below a root are read."""
    return (root >> MODE_SHIFT) & 3


@kernel
def shift_of(mode: int, level: int) -> int:
    """The lowest bit of an address that is part of the index at a level."""
    return 2 + 10 * level if mode == NARROW else 3 + 9 * level


@kernel
def last_index(mode: int) -> int:
    """The last index of a table."""
    return 1023 if mode == NARROW else 511


@kernel
def offset_at(mode: int, level: int, address: int) -> int:
    """Where in its table the entry for an address stands."""
    if mode == NARROW:
        return ((address >> (2 + 10 * level)) & 1023) * 4
    return ((address >> (3 + 9 * level)) & 511) * 8


@kernel
def load_entry(m: Record, a: Arena, t: Tags, mode: int, at: int) -> int:
    """Load an entry. FAULT_KIND says whether it worked."""
    return load_half(m, a, t, at) if mode == NARROW else hook_load(m, a, t, at)


@kernel
def store_entry(m: Record, a: Arena, t: Tags, mode: int, at: int, entry: int) -> int:
    """Store an entry: 0 or a fault."""
    return store_half(m, a, t, at, entry) if mode == NARROW else hook_store(m, a, t, at, entry)


@kernel
def new_table(m: Record, a: Arena, t: Tags) -> int:
    """Take a frame from the allocator at R9 and zero it: its number, 0 if none is left, or a fault."""
    at = m[s.GPR + s.R9]
    frame = hook_load(m, a, t, at)
    if m[s.FAULT_KIND]:
        return m[s.FAULT_KIND]
    end = hook_load(m, a, t, at + 8)
    if m[s.FAULT_KIND]:
        return m[s.FAULT_KIND]
    if frame >= end:
        return 0
    if zero_page(m, a, t, m[s.GPR + s.R8] + (frame << 12)) < 0:
        return m[s.FAULT_KIND]
    fault = hook_store(m, a, t, at, frame + 1)
    return fault if fault < 0 else frame


@kernel
def table_map(m: Record, a: Arena, t: Tags) -> int:
    """Write a leaf entry, making the tables above it: a fault or 0."""
    table = m[s.GPR + s.RDI] & ADDRESS
    address = m[s.GPR + s.RSI]
    leaf = m[s.GPR + s.RCX]
    mode = mode_of(m[s.GPR + s.RDI])
    level = 4 - mode
    while True:
        at = m[s.GPR + s.R8] + table + offset_at(mode, level, address)
        entry = load_entry(m, a, t, mode, at)
        if m[s.FAULT_KIND]:
            return m[s.FAULT_KIND]
        if level == leaf:
            if store_entry(m, a, t, mode, at, m[s.GPR + s.RDX]):
                return m[s.FAULT_KIND]
            m[s.GPR + s.RDX] = entry
            m[s.GPR + s.RAX] = 0
            return 0
        waiting = m[s.GPR + s.R11]  # a frame for a table and, in bits 2:0, the level of the entry it waits for
        if entry & PRESENT_ANY == 0:
            frame = waiting >> 3
            if frame == 0:
                frame = new_table(m, a, t)
                if frame < 0:
                    return frame
                if frame == 0:
                    m[s.GPR + s.RAX] = 1
                    return 0
            m[s.GPR + s.R11] = frame << 3 | level
            entry = frame << 12 | m[s.GPR + s.R10]
            if store_entry(m, a, t, mode, at, entry):
                return m[s.FAULT_KIND]
            m[s.GPR + s.R11] = 0
        elif waiting & 7 == level:  # whoever refused the store has made it
            m[s.GPR + s.R11] = 0
        table = entry & ADDRESS
        level -= 1


@kernel
def table_lookup(m: Record, a: Arena, t: Tags) -> int:
    """Find the leaf entry of an address: a fault or 0."""
    table = m[s.GPR + s.RDI] & ADDRESS
    address = m[s.GPR + s.RSI]
    mode = mode_of(m[s.GPR + s.RDI])
    level = 4 - mode
    while True:
        at = m[s.GPR + s.R8] + table + offset_at(mode, level, address)
        entry = load_entry(m, a, t, mode, at)
        if m[s.FAULT_KIND]:
            return m[s.FAULT_KIND]
        if entry & m[s.GPR + s.R10] == 0 or level == 1 or (level <= 3 and entry & 0x80):
            m[s.GPR + s.RAX] = entry if entry & m[s.GPR + s.R10] else 0
            m[s.GPR + s.RDX] = level
            m[s.GPR + s.RCX] = at
            return 0
        table = entry & ADDRESS
        level -= 1


@kernel
def table_lookup_direct(m: Record, a: Arena, t: Tags) -> int:
    """Find the leaf entry of an address in tables that hold host-physical addresses: a fault or 0."""
    table = m[s.GPR + s.RDI] & ADDRESS
    address = m[s.GPR + s.RSI]
    level = 4
    while True:
        within = ((address >> (3 + 9 * level)) & 511) * 8
        known_as = hook_load(m, a, t, m[s.GPR + s.R9] + (table >> 9))
        if m[s.FAULT_KIND]:
            return m[s.FAULT_KIND]
        at = m[s.GPR + s.R8] + known_as + within
        entry = hook_load(m, a, t, at)
        if m[s.FAULT_KIND]:
            return m[s.FAULT_KIND]
        if entry & m[s.GPR + s.R10] == 0 or level == 1:
            m[s.GPR + s.RAX] = entry if entry & m[s.GPR + s.R10] else 0
            m[s.GPR + s.RDX] = level
            m[s.GPR + s.RCX] = at
            m[s.GPR + s.R11] = table | within
            return 0
        table = entry & ADDRESS
        level -= 1


@kernel
def table_copy(m: Record, a: Arena, t: Tags) -> int:
    """Copy an address space's tables for copy-on-write: a fault or 0. One that was refused goes on at R11."""
    base = m[s.GPR + s.R8]
    sources, targets, index = s.COPY_SOURCES, s.COPY_TARGETS, s.COPY_INDEX  # one word a level
    cursor = m[s.GPR + s.R11]  # linear address of the entry to go on with, its level from bit 1 on, and 1
    mode = mode_of(m[s.GPR + s.RDI])
    top, end, size = 4 - mode, last_index(mode), 4 if mode == NARROW else 8
    m[index + top] = (cursor >> shift_of(mode, top)) & end if cursor else m[s.GPR + s.RDX]
    m[sources + top] = m[s.GPR + s.RDI] & ADDRESS
    m[targets + top] = m[s.GPR + s.RSI] & ADDRESS
    level = top
    while True:
        last = m[s.GPR + s.RCX] if level == top else end
        if m[index + level] > last:
            if level == top:
                break
            level += 1
            m[index + level] += 1
            continue
        at = m[sources + level] + m[index + level] * size
        to = m[targets + level] + m[index + level] * size
        entry = load_entry(m, a, t, mode, base + at)
        if m[s.FAULT_KIND]:
            return stand(m, mode, level, cursor)
        if entry & 1 == 0:
            m[index + level] += 1
            cursor = 0
            continue
        if level == 1 or entry & 0x80:
            shared = entry & ~m[s.GPR + s.R10]
            if shared != entry and store_entry(m, a, t, mode, base + at, shared):
                return stand(m, mode, level, cursor)
            if store_entry(m, a, t, mode, base + to, shared):
                return stand(m, mode, level, cursor)
            m[s.GPR + s.RAX] += 1
            m[index + level] += 1
            cursor = 0
            continue
        frame = 0
        if (level > (cursor >> 1) & 7 and cursor) or (mode == PAE and level == 3):  # on the way to where it stood
            frame = (load_entry(m, a, t, mode, base + to) & ADDRESS) >> 12
            if m[s.FAULT_KIND]:
                return stand(m, mode, level, cursor)
        if frame == 0:
            cursor = 0
            frame = m[s.GPR + s.RBX]
            if frame == 0:
                frame = new_table(m, a, t)
                if frame < 0:
                    return stand(m, mode, level, cursor)
                if frame == 0:
                    m[s.GPR + s.RAX] = -1
                    break
                m[s.GPR + s.RBX] = frame
            if store_entry(m, a, t, mode, base + to, frame << 12 | (entry & 0xFFF)):
                return stand(m, mode, level, cursor)
            m[s.GPR + s.RBX] = 0
        level -= 1
        m[sources + level] = entry & ADDRESS
        m[targets + level] = frame << 12
        m[index + level] = (cursor >> shift_of(mode, level)) & end
    m[s.GPR + s.R11] = 0
    return 0


@kernel
def stand(m: Record, mode: int, level: int, cursor: int) -> int:
    """A copy was refused: R11 says where it stands, which on the way there is where it stood; the fault."""
    if cursor == 0 or level <= (cursor >> 1) & 7:
        cursor = level << 1 | 1
        for above in range(level, 5 - mode):
            cursor |= m[s.COPY_INDEX + above] << shift_of(mode, above)
    m[s.GPR + s.R11] = cursor
    return m[s.FAULT_KIND]


@kernel
def table_clear(m: Record, a: Arena, t: Tags) -> int:
    """Clear the 4 KiB leaves of a range: a fault or 0. Tables stay. Registers say how far it is."""
    base = m[s.GPR + s.R8]
    mode = mode_of(m[s.GPR + s.RDI])
    while m[s.GPR + s.RDX] > 0:
        table = m[s.GPR + s.RDI] & ADDRESS
        for level in range(4 - mode, 0, -1):
            at = base + table + offset_at(mode, level, m[s.GPR + s.RSI])
            entry = load_entry(m, a, t, mode, at)
            if m[s.FAULT_KIND]:
                return m[s.FAULT_KIND]
            if entry & 1 == 0:
                break
            if level == 1:
                if store_entry(m, a, t, mode, at, 0):
                    return m[s.FAULT_KIND]
                m[s.GPR + s.RAX] += 1
            table = entry & ADDRESS
        m[s.GPR + s.RSI] += 4096
        m[s.GPR + s.RDX] -= 1
    return 0
