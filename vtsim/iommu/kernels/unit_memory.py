"""What a remapping unit reads and writes in memory: counted, shown to `vtsim iommu walk`, and flags kept back.

Accessed and dirty flags, and entries of paging-structure caches, are only pending while a walk goes on: a request that
ends blocked changes neither memory nor caches.
"""

from __future__ import annotations

from vtsim.base.jit import Arena, Record, kernel
from vtsim.base.memory import ROM, is_memory, kind_of, load_word, store_word
from vtsim.iommu.kernels.unit_caches import held_by_unit, make_room
from vtsim.iommu.state import (
    CACHE_WORDS,
    DATA,
    FLAG_WRITES,
    HELD_ENTRIES,
    HELD_WORDS,
    MOST_PENDING,
    MOST_STEPS,
    N_FLAG_WRITES,
    N_FLUSHES,
    N_HELD,
    N_READS,
    N_STRUCTURE_HITS,
    PENDING,
    PENDING_COUNT,
    PENDING_WORDS,
    READS_ROOT,
    SERVED,
    STEP_AREA,
    STEP_CACHE,
    STEP_COUNT,
    STEP_FLAGS,
    STEP_ROOT,
    STEP_WORDS,
    STEPS,
    WALK_HPA,
    WALK_RIGHTS,
)


@kernel
def word_seen(u: Record, a: Arena, where: int) -> int:
    """A word of a table. Behind write buffers that have to be flushed (RWBF): as it was when it was read first.

    A store that stands in a buffer is not seen. One that has left it on its own is: here, when another word of the
    same place was read in between.
    """
    if u[HELD_WORDS] == 0:
        return load_word(a, where)
    at = u[HELD_WORDS] + 2 * ((where >> 3) & (HELD_ENTRIES - 1))
    if u[at] == where + 1:
        u[N_HELD] += 1
        return u[at + 1]
    u[at] = where + 1
    u[at + 1] = load_word(a, where)
    return u[at + 1]


@kernel
def flush_writes(u: Record) -> None:
    """Flush the write buffers: all stores are seen from now on.

    VT-d: "Write Buffer Flushing".
    """
    if u[HELD_WORDS] == 0:
        return
    u[N_FLUSHES] += 1
    for at in range(u[HELD_WORDS], u[HELD_WORDS] + 2 * HELD_ENTRIES, 2):
        u[at] = 0


@kernel
def note_step(u: Record, kind: int, level: int, where: int, value: int) -> None:
    """Write down one step of the request in work, while steps are wanted."""
    if u[STEPS] == 0 or u[STEP_COUNT] >= MOST_STEPS:
        return
    at = STEP_AREA + u[STEP_COUNT] * STEP_WORDS
    u[STEP_COUNT] += 1
    u[at] = kind
    u[at + 1] = level
    u[at + 2] = where
    u[at + 3] = value


@kernel
def read_entry(u: Record, a: Arena, kind: int, level: int, where: int) -> int:
    """The first word of an entry of one kind of structure: one memory read, however many words it has."""
    value = word_seen(u, a, where)
    u[READS_ROOT + kind - STEP_ROOT] += 1
    u[N_READS] += 1
    note_step(u, kind, level, where, value)
    return value


@kernel
def walk_begins(u: Record, first: int, levels: int, address: int, more: int, bit: int) -> int:
    """The level at which a walk begins, `levels` if no paging-structure cache knows a table nearer to the page.

    `first` is the cache of level-2 entries, `bit` its bit of SERVED. Table and rights go to WALK_HPA and WALK_RIGHTS.
    """
    for upper in range(2, levels + 1):
        cache = first + (upper - 2) * CACHE_WORDS
        known = held_by_unit(u, cache, address >> (3 + 9 * upper), more)
        if known >= 0:
            u[WALK_HPA] = u[known + DATA]
            u[WALK_RIGHTS] = u[known + DATA + 1]
            u[SERVED] |= 1 << (bit + upper - 2)
            u[N_STRUCTURE_HITS] += 1
            note_step(u, STEP_CACHE, upper - 1, cache, u[known + DATA])
            return upper - 1
    return levels


@kernel
def readable(u: Record, a: Arena, where: int, size: int) -> bool:
    """Is this range, which crosses no page, memory?"""
    return is_memory(a, where) and is_memory(a, where + size - 1)


@kernel
def flags_can_be_set(a: Arena, where: int) -> bool:
    """May a flag be written there?"""
    return kind_of(a, where >> 12) != ROM


@kernel
def pend(u: Record, cache: int, tag: int, more: int, data: int, rights: int) -> None:
    """Keep an entry for a paging-structure cache, or (cache 0) flags for the entry at an address, until success."""
    if u[PENDING_COUNT] >= MOST_PENDING:
        return
    at = PENDING + u[PENDING_COUNT] * PENDING_WORDS
    u[PENDING_COUNT] += 1
    u[at] = cache
    u[at + 1] = tag
    u[at + 2] = more
    u[at + 3] = data
    u[at + 4] = rights


@kernel
def commit_pending(u: Record, a: Arena) -> None:
    """Set the flags and fill the caches that the walk has left pending."""
    at = PENDING
    for _ in range(u[PENDING_COUNT]):
        if u[at] == 0:
            where = u[at + 1]
            value = load_word(a, where)
            if value | u[at + 3] != value:
                store_word(a, where, value | u[at + 3])
                if u[HELD_WORDS] != 0:  # an atomic update finds what is in the buffers
                    u[u[HELD_WORDS] + 2 * ((where >> 3) & (HELD_ENTRIES - 1))] = 0
                u[FLAG_WRITES] += 1
                u[N_FLAG_WRITES] += 1
                note_step(u, STEP_FLAGS, 0, where, value | u[at + 3])
        else:
            entry = make_room(u, u[at], u[at + 1], u[at + 2])
            if entry >= 0:
                u[entry + DATA] = u[at + 3]
                u[entry + DATA + 1] = u[at + 4]
        at += PENDING_WORDS
    u[PENDING_COUNT] = 0
