"""Caches of lines and of translations: what is looked up, filled and removed.

One-bit replacement: a hit sets the entry's reference bit; a fill takes the first way whose bit is clear, and clears
all others first when none is. So a hit on an entry whose bit is set changes nothing, and need not be repeated.

L3 may have ages from 0 to 3 instead (quad-age): the first line of age 3 goes, and when there is none all grow older
until there is. A hit makes a line 1, or 0 if it was 1. A new line is 1, or, where most are used once, 3 but for one in
16. Which of both it is, sets decide that always do the one or the other: a counter says which of them miss less.

SDM: "Caching Translation Information".
Source: A. Abel, J. Reineke, nanoBench, of L3s of Intel's client processors (QLRU_H11_M1_R0_U0, or MR31 for M1); how
sets decide is M. Qureshi et al., "Adaptive Insertion Policies for High Performance Caching", ISCA 2007.
Not modelled: write-back traffic; inclusion of inner in outer caches.
"""

from __future__ import annotations

import numpy as np

from vtsim.base.jit import Arena, Record, Tags, kernel, lowest_bit, which_of_4, which_of_8, which_of_16
from vtsim.cpu.accounts import TRANSLATIONS_DROPPED
from vtsim.cpu.slots import (
    AGED,
    DATA,
    DATA_GENERATION,
    L1D,
    L3,
    MASK,
    OWNER,
    POWER,
    REFERENCED,
    SETS,
    WAYS,
)

EMPTY: int = -1  # the tag of a way that holds nothing
DECIDING: int = 64  # of so many sets of L3 two take new lines at age 1 and two rarely do
MOST: int = 512  # as far as their counter counts


@kernel
def set_of(m: Record, cache: int, line: int) -> int:
    """The set of a line: its low bits, or a hash where the number of sets is no power of two.

    The two lines of a pair have sets beside each other; of an odd number of sets the last one is not used.
    """
    mask = m[cache + POWER]
    if mask >= 0:
        return line & mask
    mixed = ((line >> 1) * 0x9E3779B1) & 0xFFFFFFFF
    mixed = ((mixed >> 15) ^ mixed) & 0xFFFFFFFF
    return ((mixed * (m[cache + SETS] >> 1)) >> 32) * 2 + (line & 1)


@kernel
def tag_of(m: Record, cache: int, line: int) -> int:
    """What tells a line from others of its set, in 32 bits: the number of its pair, or with one set its own.

    That is enough for 512 GiB of memory but its last pair, with one set for 256 GiB.
    """
    number = line >> 1 if m[cache + SETS] > 1 else line
    return np.int32(((number & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000)


@kernel
def line_of(m: Record, cache: int, where: int, tag: int) -> int:
    """The line of a set that a tag stands for."""
    number = np.int64(tag) & 0xFFFFFFFF
    return number << 1 | where & 1 if m[cache + SETS] > 1 else number


@kernel
def held(t: Tags, base: int, ways: int, tag: int) -> int:
    """The way that holds the tag, as a bit, or 0, of a set whose tags begin at `base`; 16 are compared at once."""
    if ways <= 8:
        hit = which_of_8(t, base, tag)
    else:
        hit = which_of_16(t, base, tag)
        for first in range(16, ways, 16):
            hit |= which_of_16(t, base + first, tag) << first
    return hit & ((1 << ways) - 1)


@kernel
def has(m: Record, t: Tags, cache: int, line: int) -> bool:
    """Is the line in this cache? Nothing is remembered."""
    ways = m[cache + WAYS]
    return held(t, m[cache] + set_of(m, cache, line) * ways, ways, tag_of(m, cache, line)) != 0


@kernel
def probe_at_once(m: Record, t: Tags, cache: int, line: int) -> bool:
    """`probe` where nobody can predict the way."""
    where = set_of(m, cache, line)
    ways = m[cache + WAYS]
    hit = held(t, m[cache] + where * ways, ways, tag_of(m, cache, line))
    if hit:
        t[m[cache + REFERENCED] + where] |= hit
    return hit != 0


@kernel
def probe(m: Record, t: Tags, cache: int, line: int) -> bool:
    """Is the line in this cache? A hit is remembered. One way after the other: most hit where the last one did."""
    ways = m[cache + WAYS]
    s = set_of(m, cache, line)
    base = m[cache] + s * ways
    tag = tag_of(m, cache, line)
    for way in range(ways):
        if t[base + way] == tag:
            t[m[cache + REFERENCED] + s] |= 1 << way
            return True
    return False


@kernel
def victim(m: Record, t: Tags, cache: int, s: int) -> int:
    """The way of a set that was not referenced lately; it is referenced now."""
    at = m[cache + REFERENCED] + s
    used = t[at]
    free = ~used & ((1 << m[cache + WAYS]) - 1)
    if free == 0:
        used = 0
        free = 1
    way = lowest_bit(free)
    t[at] = used | (1 << way)
    return way


@kernel
def fill(m: Record, t: Tags, cache: int, line: int) -> None:
    """Put a line in, in place of one not referenced lately."""
    ways = m[cache + WAYS]
    if ways == 0:
        return
    s = set_of(m, cache, line)
    t[m[cache] + s * ways + victim(m, t, cache, s)] = tag_of(m, cache, line)


@kernel
def bring(m: Record, t: Tags, cache: int, line: int) -> bool:
    """`probe_at_once`, and `fill` where it fails."""
    ways = m[cache + WAYS]
    if ways == 0:
        return False
    where = set_of(m, cache, line)
    base = m[cache] + where * ways
    tag = tag_of(m, cache, line)
    hit = held(t, base, ways, tag)
    if hit:
        t[m[cache + REFERENCED] + where] |= hit
    else:
        t[base + victim(m, t, cache, where)] = tag
    return hit != 0


@kernel
def keep_ages(t: Tags, at: int, low: int, high: int, every: int) -> None:
    """Store a set's ages, as masks of their low and high bits: all are older by what the oldest lacks of 3."""
    if low & high == 0:
        if high:
            low, high = ~low, high | low
        elif low:
            high = every
        else:
            low = high = every
    t[at] = low & every
    t[at + 1] = high & every


@kernel
def comes_young(m: Record, t: Tags, where: int) -> bool:
    """Is a line that this set of L3 lacked new to it at age 1, not at 3? Counts the miss where the set decides."""
    sets = m[L3 + SETS]
    counter = m[L3 + REFERENCED] + 2 * sets
    kind = where & (DECIDING - 1) & ~1 if sets >= DECIDING else -1  # the same of both sets of a pair
    if kind == 0:
        t[counter] = min(t[counter] + 1, MOST)
        return True
    if kind == DECIDING // 2:
        t[counter] = max(t[counter] - 1, -MOST)
    elif t[counter] <= 0:
        return True
    t[counter + 1] = (np.int64(t[counter + 1]) * 0x41C64E6D + 12345) & 0x7FFFFFFF
    return t[counter + 1] >> 16 & 15 == 0


@kernel
def bring_l3(m: Record, t: Tags, line: int) -> bool:
    """`bring` of L3, whose lines may have ages."""
    if m[L3 + AGED] == 0:
        return bring(m, t, L3, line)
    ways = m[L3 + WAYS]
    where = set_of(m, L3, line)
    base = m[L3] + where * ways
    tag = tag_of(m, L3, line)
    at = m[L3 + REFERENCED] + 2 * where
    low = np.int64(t[at])
    high = np.int64(t[at + 1])
    hit = held(t, base, ways, tag)
    if hit:
        low = low & ~hit | high & hit
        high &= ~hit
    else:
        way = lowest_bit(held(t, base, ways, EMPTY) or low & high)
        t[base + way] = tag
        low |= 1 << way
        high |= 1 << way
        if comes_young(m, t, where):
            high &= ~(1 << way)
    keep_ages(t, at, low, high, (1 << ways) - 1)
    return hit != 0


@kernel
def fill_l1d(m: Record, t: Tags, line: int) -> None:
    """The same of L1D: what is known of its lines holds no more."""
    fill(m, t, L1D, line)
    m[DATA_GENERATION] += 1


@kernel
def forget(m: Record, t: Tags, cache: int) -> None:
    """Empty a cache."""
    for n in range(m[cache + SETS] * m[cache + WAYS]):
        t[m[cache] + n] = EMPTY


# --- translations: arena structures of tags, data and reference masks ---------------------------------------


@kernel
def way_bit(way: int) -> int:
    """The bit of a way in a word of 64: the last one is the word's sign."""
    return 1 << way if way < 63 else -(1 << 62) * 2


@kernel
def way_of(a: Arena, base: int, ways: int, tag: int) -> int:
    """The first way of a set whose tags begin at `base` that holds this one, or -1; four are compared at once."""
    if ways == 4:  # as most sets have: no loop, which costs 3 to 7 % of exits and random accesses
        hit = which_of_4(a, base, tag)
        return lowest_bit(hit) if hit else -1
    for first in range(0, ways, 4):
        hit = which_of_4(a, base + first, tag) & ((1 << min(ways - first, 4)) - 1)
        if hit:
            return first + lowest_bit(hit)
    return -1


@kernel
def find(m: Record, a: Arena, structure: int, index: int, tag: int) -> int:
    """The data word stored under `tag`, or -1. Tags are never negative; an empty entry's tag is -1."""
    ways = m[structure + WAYS]
    s = index & m[structure + MASK]
    way = way_of(a, m[structure] + s * ways, ways, tag)
    if way < 0:
        return -1
    sets = m[structure + MASK] + 1
    a[m[structure + DATA] + sets * ways + s] |= way_bit(way)
    return a[m[structure + DATA] + s * ways + way]


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
    victim = way_of(a, base, ways, tag)
    if victim < 0:
        victim = way_of(a, base, ways, EMPTY)
    if victim < 0 and used != -1:
        victim = lowest_bit(~used)
    if victim < 0 or victim >= ways:
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
    way = way_of(a, base, ways, tag)
    if way >= 0:
        a[base + way] = EMPTY
        a[m[OWNER] + TRANSLATIONS_DROPPED] += 1


@kernel
def drop(m: Record, a: Arena, structure: int, mask: int, value: int) -> None:
    """Remove every entry whose tag, under `mask`, is `value`; counts what it removed."""
    base = m[structure]
    removed = 0
    for n in range((m[structure + MASK] + 1) * m[structure + WAYS]):
        tag = a[base + n]
        if tag >= 0 and tag & mask == value:
            a[base + n] = EMPTY
            removed += 1
    a[m[OWNER] + TRANSLATIONS_DROPPED] += removed
