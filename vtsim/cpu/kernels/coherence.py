"""Which core holds a line of memory, and what it costs another one to have it: MESI, as one directory sees it.

The directory is a cache of tags with the owners of a set's lines behind them: the one core that may write a line, or
SHARED. A load of what only another core holds comes from that core's caches and is shared then; a store takes the line
from all others. A line that the directory has no room for leaves all caches, as with a processor's snoop filter. Owners
drop lines without a word, so that a core is asked whether it still has one. With one core there is no directory, and
none of this is asked.

CPUs run ahead of each other by up to a quantum, so that a line may be asked for before the cycle in which a core took
it to write it. It is sent no earlier than that: what another core has yet to do cannot be seen.

SDM: "Cache Control Protocol".
Not modelled: how busy caches and mesh are; owned copies of code in L1I alone; devices, which take no line away.
"""

from __future__ import annotations

from vtsim.base.jit import Arena, Record, Tags, kernel, lowest_bit
from vtsim.cpu.accounts import LINES_FROM_OTHERS, LINES_TAKEN
from vtsim.cpu.kernels.caches import EMPTY, bring_l3, held, line_of, set_of, tag_of, victim
from vtsim.cpu.slots import (
    CORE,
    CORES,
    CYCLE,
    DATA_GENERATION,
    DIRECTORY,
    L1D,
    L2,
    L3,
    LATENCY,
    OWNED_SINCE,
    OWNER,
    PEERS,
    REFERENCED,
    REMOTE_TRANSFER_CYCLES,
    TRANSFER_CYCLES,
    WAYS,
)

SHARED, NOBODY = -1, -2
# of each core: where its caches are, its node, and how often lines were taken from it since it ran last
(PEER_L1D, PEER_L2, PEER_NODE, PEER_TAKEN) = range(4)
PEER_WORDS: int = 4


@kernel
def remove_line(m: Record, t: Tags, cache: int, base: int, line: int) -> bool:
    """Remove a line from a core's cache at `base`, of the shape of this core's own; was it there?"""
    where = set_of(m, cache, line)
    first = base + where * m[cache + WAYS]
    hit = held(t, first, m[cache + WAYS], tag_of(m, cache, line))
    if hit:
        t[first + lowest_bit(hit)] = EMPTY
        t[base - m[cache] + m[cache + REFERENCED] + where] &= ~hit
    return hit != 0


@kernel
def transfer_cycles(m: Record, a: Arena, other: int) -> int:
    """Cycles until a line that the caches of another core hold is here."""
    node = a[m[PEERS] + m[CORE] * PEER_WORDS + PEER_NODE]
    same = a[m[PEERS] + other * PEER_WORDS + PEER_NODE] == node
    return m[TRANSFER_CYCLES] if same else m[REMOTE_TRANSFER_CYCLES]


@kernel
def take_from(m: Record, a: Arena, t: Tags, other: int, line: int) -> int:
    """Remove a line from the caches of a core: cycles until it is here, -1 if it was not there."""
    peer = m[PEERS] + other * PEER_WORDS
    in_l1d = remove_line(m, t, L1D, a[peer + PEER_L1D], line)
    if not (remove_line(m, t, L2, a[peer + PEER_L2], line) or in_l1d):
        return -1
    a[peer + PEER_TAKEN] += 1
    return transfer_cycles(m, a, other)


@kernel
def take_from_all(m: Record, a: Arena, t: Tags, line: int, but: int) -> int:
    """Remove a line from the caches of all cores but one: cycles until the last has answered, -1 if none had it."""
    cycles = -1
    for other in range(m[CORES]):
        if other != but:
            cycles = max(cycles, take_from(m, a, t, other, line))
    return cycles


@kernel
def has_line(m: Record, a: Arena, t: Tags, other: int, line: int) -> bool:
    """Do the data caches of a core hold a line?"""
    peer = m[PEERS] + other * PEER_WORDS
    ways = m[L1D + WAYS]
    if held(t, a[peer + PEER_L1D] + set_of(m, L1D, line) * ways, ways, tag_of(m, L1D, line)):
        return True
    ways = m[L2 + WAYS]
    return held(t, a[peer + PEER_L2] + set_of(m, L2, line) * ways, ways, tag_of(m, L2, line)) != 0


@kernel
def place_of(m: Record, t: Tags, line: int) -> int:
    """Where the directory has a line, or -1; its owner is a set's ways further on."""
    ways = m[DIRECTORY + WAYS]
    first = m[DIRECTORY] + set_of(m, DIRECTORY, line) * 2 * ways
    hit = held(t, first, ways, tag_of(m, DIRECTORY, line))
    return first + lowest_bit(hit) if hit else -1


@kernel
def owner_at(m: Record, t: Tags, at: int) -> int:
    """The core that owns the line at a place of the directory, SHARED or NOBODY."""
    return t[at + m[DIRECTORY + WAYS]] if at >= 0 else NOBODY


@kernel
def owner_of(m: Record, t: Tags, line: int) -> int:
    """The core that owns a line, SHARED or NOBODY."""
    return owner_at(m, t, place_of(m, t, line))


@kernel
def since(m: Record, at: int) -> int:
    """The word of the arena with the cycle in which a core came to own the line at a place of the directory."""
    ways = m[DIRECTORY + WAYS]
    offset = at - m[DIRECTORY]
    return m[OWNED_SINCE] + offset - offset // (2 * ways) * ways


@kernel
def cycles_ahead(m: Record, a: Arena, at: int) -> int:
    """Cycles until the line at a place of the directory has become what it is for this core, which may be behind."""
    return max(a[since(m, at)] - m[CYCLE], 0) if at >= 0 else 0


@kernel
def set_owner(m: Record, a: Arena, t: Tags, line: int, at: int, owner: int) -> None:
    """Enter the owner of a line, at its place if it has one; else one that it takes the place of leaves all caches."""
    where = set_of(m, DIRECTORY, line)
    ways = m[DIRECTORY + WAYS]
    first = m[DIRECTORY] + where * 2 * ways
    if at >= 0:
        t[m[DIRECTORY + REFERENCED] + where] |= 1 << (at - first)
    else:
        at = first + victim(m, t, DIRECTORY, where)
        if t[at] != EMPTY:
            gone = line_of(m, DIRECTORY, where, t[at])
            last = t[at + ways]
            if last == SHARED:
                take_from_all(m, a, t, gone, NOBODY)
            else:
                take_from(m, a, t, last, gone)
            forget_taken(m, a)  # it may have been in this core's own
        t[at] = tag_of(m, DIRECTORY, line)
    t[at + ways] = owner
    if owner != SHARED:
        a[since(m, at)] = m[CYCLE]


@kernel
def load_shared(m: Record, a: Arena, t: Tags, line: int, at: int) -> int:
    """A load that missed this core's caches, of the line at a place of the directory, -1 if it is not there.

    Cycles until the one other core that holds it alone has sent it, or 0.
    """
    owner = owner_at(m, t, at)
    if owner == m[CORE] or owner == SHARED:
        set_owner(m, a, t, line, at, owner)  # which says that it was used
        return 0
    if owner == NOBODY or not has_line(m, a, t, owner, line):
        set_owner(m, a, t, line, at, m[CORE])
        return 0
    set_owner(m, a, t, line, at, SHARED)
    a[m[PEERS] + owner * PEER_WORDS + PEER_TAKEN] += 1
    a[m[OWNER] + LINES_FROM_OTHERS] += 1
    bring_l3(m, t, line)  # through which a line moves between cores
    return transfer_cycles(m, a, owner)


@kernel
def store_owned(m: Record, a: Arena, t: Tags, line: int) -> int:
    """A store: cycles beyond an L1D hit until no other core holds the line, which this one owns then."""
    at = place_of(m, t, line)
    owner = owner_at(m, t, at)
    if owner == m[CORE]:
        return 0
    ahead = cycles_ahead(m, a, at)
    cycles = -1
    if owner == SHARED:
        cycles = take_from_all(m, a, t, line, m[CORE])
    elif owner != NOBODY:
        cycles = take_from(m, a, t, owner, line)
    set_owner(m, a, t, line, at, m[CORE])
    if cycles >= 0:
        a[m[OWNER] + LINES_TAKEN] += 1
        bring_l3(m, t, line)  # through which a line moves between cores
    if owner == SHARED:
        cycles = max(cycles, m[L3 + LATENCY])  # who asks does not know who has it yet
    return max(cycles - m[L1D + LATENCY], 0) + ahead


@kernel
def forget_taken(m: Record, a: Arena) -> None:
    """What this core knows of lines that it found holds no more, if others took some while it did not run."""
    at = m[PEERS] + m[CORE] * PEER_WORDS + PEER_TAKEN
    m[DATA_GENERATION] += a[at]
    a[at] = 0
