"""The caches of a remapping unit: sets of entries, the least recently used of a set is replaced.

VT-d: "Caching Translation Information"; "Tagging of Cached Translations".
"""

from __future__ import annotations

from typing import Final

from vtsim.base.jit import Record, kernel
from vtsim.iommu.spec import CAP, CAP_CM
from vtsim.iommu.state import (
    CLOCK,
    DATA,
    ENTRY_WORDS,
    N_INVALIDATED,
    REGISTERS,
    SETS,
    STAMP,
    TAG,
    TAG_MORE,
    WAYS,
)

NEGATIVE: Final = 1 << 40  # in the second tag of an entry that says only with which reason a request ends


@kernel
def held_by_unit(u: Record, cache: int, tag: int, more: int) -> int:
    """Where the entry of these two tags is, now the most recently used of its set; -1 if it is not held."""
    ways = u[cache + WAYS]
    if u[cache + SETS] == 0:
        return -1
    at = u[cache] + (tag & (u[cache + SETS] - 1)) * ways * ENTRY_WORDS
    for _ in range(ways):
        if u[at + TAG] == tag and u[at + TAG_MORE] == more and u[at + STAMP] != 0:
            u[CLOCK] += 1
            u[at + STAMP] = u[CLOCK]
            return at
        at += ENTRY_WORDS
    return -1


@kernel
def make_room(u: Record, cache: int, tag: int, more: int) -> int:
    """Where to write the words of a new entry of these tags; -1 if there is no such cache."""
    ways = u[cache + WAYS]
    if u[cache + SETS] == 0 or ways == 0:
        return -1
    at = u[cache] + (tag & (u[cache + SETS] - 1)) * ways * ENTRY_WORDS
    oldest = at
    for _ in range(ways):
        if u[at + TAG] == tag and u[at + TAG_MORE] == more and u[at + STAMP] != 0:
            oldest = at
            break
        if u[at + STAMP] < u[oldest + STAMP]:
            oldest = at
        at += ENTRY_WORDS
    u[CLOCK] += 1
    u[oldest + TAG] = tag
    u[oldest + TAG_MORE] = more
    u[oldest + STAMP] = u[CLOCK]
    return oldest


@kernel
def refused_before(u: Record, cache: int, tag: int, more: int) -> int:
    """The reason with which a cache remembers that this ends, where it remembers such (CM); 0 if it does not."""
    if u[REGISTERS + (CAP >> 3)] & CAP_CM == 0:
        return 0
    known = held_by_unit(u, cache, tag, more | NEGATIVE)
    return u[known + DATA + 2] if known >= 0 else 0


@kernel
def remember_refusal(u: Record, cache: int, tag: int, more: int, low: int, reason: int) -> None:
    """In caching mode, keep that this ends with a reason; `low` is the first word of the entry that was read.

    The second word of such an entry is 0: it is tagged by domain 0.
    """
    if u[REGISTERS + (CAP >> 3)] & CAP_CM == 0:
        return
    at = make_room(u, cache, tag, more | NEGATIVE)
    if at >= 0:
        u[at + DATA] = low
        u[at + DATA + 1] = 0
        u[at + DATA + 2] = reason


@kernel
def drop_refusals(u: Record, cache: int) -> None:
    """Empty the entries of a cache that remember refusals."""
    drop_where(u, cache, TAG_MORE, NEGATIVE, NEGATIVE, DATA, 0, 0)


@kernel
def drop_at(u: Record, at: int) -> None:
    """Empty one entry."""
    u[at + STAMP] = 0
    u[N_INVALIDATED] += 1


@kernel
def drop_where(u: Record, cache: int, word: int, mask: int, value: int, other: int, other_mask: int, also: int) -> None:
    """Empty the entries of a cache whose `word` under `mask` is `value`, and whose `other` under its mask is `also`."""
    at = u[cache]
    for _ in range(u[cache + SETS] * u[cache + WAYS]):
        if u[at + STAMP] != 0 and u[at + word] & mask == value and u[at + other] & other_mask == also:
            drop_at(u, at)
        at += ENTRY_WORDS


@kernel
def drop_all(u: Record, cache: int) -> None:
    """Empty a cache."""
    drop_where(u, cache, TAG, 0, 0, DATA, 0, 0)
