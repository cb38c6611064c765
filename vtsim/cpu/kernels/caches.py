"""Caches of lines and of translations, and the cycles that an access to memory takes.

One-bit replacement: a hit sets the entry's reference bit; a fill takes the first way whose bit is clear, and clears
all others first when none is. So a hit on an entry whose bit is set changes nothing, and need not be repeated.

SDM: "Caching Translation Information".
Not modelled: write-back traffic; inclusion of inner in outer caches; coherence between cores; hardware prefetch.
"""

from __future__ import annotations

import numpy as np

from vtsim.base.jit import Arena, Record, Tags, kernel, lowest_bit
from vtsim.cpu.accounts import DATA_L2, FETCH_L2, TRANSLATIONS_DROPPED
from vtsim.cpu.slots import (
    DATA,
    DATA_GENERATION,
    DRAM_CYCLES,
    FETCH_GENERATION,
    L1D,
    L1I,
    L2,
    L3,
    LATENCY,
    MASK,
    NODE_END,
    NODE_FIRST,
    OWNER,
    POWER,
    REFERENCED,
    REMOTE_CYCLES,
    SETS,
    WALKS_IN_L1D,
    WAYS,
)


@kernel
def set_of(m: Record, cache: int, line: int) -> int:
    """The set of a line: its low bits, or a hash where the number of sets is no power of two."""
    mask = m[cache + POWER]
    if mask >= 0:
        return line & mask
    mixed = (line * 0x9E3779B1) & 0xFFFFFFFF
    mixed = ((mixed >> 15) ^ mixed) & 0xFFFFFFFF
    return (mixed * m[cache + SETS]) >> 32


@kernel
def held(m: Record, t: Tags, cache: int, where: int, line: int) -> int:
    """The way of a set that holds the line, as a bit, or 0; up to 16 ways are compared at once."""
    ways = m[cache + WAYS]
    base = m[cache] + where * ways
    tag = np.int32(line)
    hit = 0
    if ways <= 8:
        for way in range(8):
            hit |= (1 << way) if t[base + way] == tag else 0
    elif ways <= 16:
        for way in range(16):
            hit |= (1 << way) if t[base + way] == tag else 0
    else:
        for way in range(ways):
            hit |= (1 << way) if t[base + way] == tag else 0
    return hit & ((1 << ways) - 1)


@kernel
def probe_at_once(m: Record, t: Tags, cache: int, line: int) -> bool:
    """`probe` where nobody can predict the way."""
    where = set_of(m, cache, line)
    hit = held(m, t, cache, where, line)
    if hit:
        t[m[cache + REFERENCED] + where] |= hit
    return hit != 0


@kernel
def probe(m: Record, t: Tags, cache: int, line: int) -> bool:
    """Is the line in this cache? A hit is remembered. One way after the other: most hit where the last one did."""
    ways = m[cache + WAYS]
    s = set_of(m, cache, line)
    base = m[cache] + s * ways
    for way in range(ways):
        if t[base + way] == line:
            t[m[cache + REFERENCED] + s] |= 1 << way
            return True
    return False


@kernel
def fill(m: Record, t: Tags, cache: int, line: int) -> None:
    """Put a line in, in place of one not referenced lately."""
    ways = m[cache + WAYS]
    if ways == 0:
        return
    s = set_of(m, cache, line)
    at = m[cache + REFERENCED] + s
    used = t[at]
    free = ~used & ((1 << ways) - 1)
    if free == 0:
        used = 0
        free = 1
    victim = lowest_bit(free)
    t[m[cache] + s * ways + victim] = line
    t[at] = used | (1 << victim)


@kernel
def fill_l1d(m: Record, t: Tags, line: int) -> None:
    """The same of L1D: what is known of its lines holds no more."""
    fill(m, t, L1D, line)
    m[DATA_GENERATION] += 1


@kernel
def beyond_l1(m: Record, a: Arena, t: Tags, line: int, served: int) -> int:
    """Cycles until a line that missed its first-level cache arrives; fills L2 and L3.

    `served` is the counter of what L2 serves; those of L3, DRAM and DRAM of another node come after it.
    """
    at = m[OWNER] + served
    if probe_at_once(m, t, L2, line):
        a[at] += 1
        return m[L2 + LATENCY]
    cycles = m[L3 + LATENCY]
    if m[L3 + WAYS] > 0 and probe_at_once(m, t, L3, line):
        a[at + 1] += 1
    else:
        a[at + 2] += 1
        cycles = m[DRAM_CYCLES]
        if line >> 6 < m[NODE_FIRST] or line >> 6 >= m[NODE_END]:
            a[at + 3] += 1
            cycles = m[REMOTE_CYCLES]
        fill(m, t, L3, line)
    fill(m, t, L2, line)
    return cycles


@kernel
def read_line(m: Record, a: Arena, t: Tags, hpa: int, served: int) -> int:
    """Cycles of a page-walker read: paging-structure lines are cached like any other, or from L2 on.

    `served` is the first of the dimension's counters, GUEST_L1D or EPT_L1D.
    """
    line = hpa >> 6
    if m[WALKS_IN_L1D] == 0:
        return beyond_l1(m, a, t, line, served + 1)
    if probe_at_once(m, t, L1D, line):
        a[m[OWNER] + served] += 1
        return m[L1D + LATENCY]
    cycles = beyond_l1(m, a, t, line, served + 1)
    fill_l1d(m, t, line)
    return cycles


@kernel
def data_miss(m: Record, a: Arena, t: Tags, line: int) -> int:
    """Cycles beyond an L1D hit of a data access that missed L1D."""
    cycles = beyond_l1(m, a, t, line, DATA_L2) - m[L1D + LATENCY]
    fill_l1d(m, t, line)
    return cycles if cycles > 0 else 0


@kernel
def fetch_line(m: Record, a: Arena, t: Tags, hpa: int) -> int:
    """Stall cycles of fetching one code line; a fill starts a new fetch generation."""
    line = hpa >> 6
    if probe(m, t, L1I, line):
        return 0
    cycles = beyond_l1(m, a, t, line, FETCH_L2) - m[L1I + LATENCY]
    if m[L1I + WAYS] > 0:
        fill(m, t, L1I, line)
        m[FETCH_GENERATION] += 1
    return cycles if cycles > 0 else 0


# --- translations: arena structures of tags, data and reference masks ---------------------------------------


@kernel
def way_bit(way: int) -> int:
    """The bit of a way in a word of 64: the last one is the word's sign."""
    return 1 << way if way < 63 else -(1 << 62) * 2


@kernel
def find(m: Record, a: Arena, structure: int, index: int, tag: int) -> int:
    """The data word stored under `tag`, or -1. Tags are never negative; an empty entry's tag is -1."""
    ways = m[structure + WAYS]
    s = index & m[structure + MASK]
    base = m[structure] + s * ways
    for way in range(ways):
        if a[base + way] == tag:
            sets = m[structure + MASK] + 1
            a[m[structure + DATA] + sets * ways + s] |= way_bit(way)
            return a[m[structure + DATA] + s * ways + way]
    return -1


@kernel
def keep(m: Record, a: Arena, structure: int, index: int, tag: int, data: int) -> None:
    """Store a translation, over its own old entry if there is one, else over one not referenced lately."""
    ways = m[structure + WAYS]
    if ways == 0:
        return
    s = index & m[structure + MASK]
    base = m[structure] + s * ways
    at = m[structure + DATA] + (m[structure + MASK] + 1) * ways + s
    used = a[at]
    victim = -1
    for way in range(ways):
        if a[base + way] == tag:
            victim = way
            break
    if victim < 0:
        for way in range(ways):
            if a[base + way] == -1:
                victim = way
                break
    if victim < 0:
        for way in range(ways):
            if (used >> way) & 1 == 0:
                victim = way
                break
    if victim < 0:
        victim = 0
        used = 0
    a[base + victim] = tag
    a[m[structure + DATA] + s * ways + victim] = data
    a[at] = used | way_bit(victim)


@kernel
def remove(m: Record, a: Arena, structure: int, index: int, tag: int) -> None:
    """Remove the entry stored under `tag`, if there is one."""
    ways = m[structure + WAYS]
    base = m[structure] + (index & m[structure + MASK]) * ways
    for way in range(ways):
        if a[base + way] == tag:
            a[base + way] = -1
            a[m[OWNER] + TRANSLATIONS_DROPPED] += 1


@kernel
def drop(m: Record, a: Arena, structure: int, mask: int, value: int) -> None:
    """Remove every entry whose tag, under `mask`, is `value`; counts what it removed."""
    base = m[structure]
    removed = 0
    for n in range((m[structure + MASK] + 1) * m[structure + WAYS]):
        tag = a[base + n]
        if tag >= 0 and tag & mask == value:
            a[base + n] = -1
            removed += 1
    a[m[OWNER] + TRANSLATIONS_DROPPED] += removed
