"""The cycles until memory has sent a line: what it takes without others, and how long the line waits for those.

Where there are several CPUs, or one core's super queue can ask for more than memory delivers, lines that are wanted of
one node's memory share its bandwidth: a table says of each stretch of time how much of it is taken, and a line takes
the first that is left from when it is wanted. So it is all the same in which order CPUs run, some of which may be far
ahead. Before that, where a machine says how many ranks its channels have, a line waits for room in its channel's
queue, then for its bank, which opens a row for each line and is busy for a row cycle then, and for its rank, which
opens none from when it is its turn to refresh until it has, and does so when all its rows are closed; and each channel
has a bandwidth of its own. Of each bank it is known when it is done with its latest lines, of each rank how late its
latest refresh is, of each entry of a queue which line had it last, and when.

Source: JEDEC, JESD79-4 (DDR4 SDRAM), of rows, banks, ranks and refreshes.
Not modelled: lines of one row that are read while it is open; what else a channel waits for (between banks of a
group, between ranks, from writes to reads).
"""

from __future__ import annotations

from vtsim.base.jit import Arena, Record, kernel
from vtsim.cpu.slots import (
    BANDWIDTHS,
    BANKS,
    BANKS_OF_RANK,
    CHANNELS,
    CYCLE,
    DRAM_CYCLES,
    HELD_BACK,
    LINE_TIME,
    NODE,
    NODE_END,
    NODE_FIRST,
    QUEUE,
    QUEUES,
    RANKS,
    REFRESH,
    REFRESH_INTERVAL,
    REMOTE_CYCLES,
    ROW_CYCLE,
)

# of a channel, for each stretch of time: its number, and what of it is taken, in parts of a cycle
(STRETCH, TAKEN) = range(2)
(WANTED, UNTIL) = range(2)  # of an entry of a channel's queue: when its last line was wanted, until when it holds it
QUEUE_WORDS: int = 2
STRETCHES: int = 8192
BANDWIDTH_WORDS: int = 2 * STRETCHES
STRETCH_BITS: int = 5  # 32 cycles
PARTS: int = 1024
WHOLE: int = PARTS << STRETCH_BITS
(LATEST, LATE) = range(2)  # of a rank: the latest refresh that rows put off, and by how many cycles
RANK_WORDS: int = 2
BANK_WORDS: int = 8  # of a bank: when it is done with as many lines


@kernel
def until_served(m: Record, a: Arena, bandwidth: int, after: int) -> int:
    """Cycles until a channel serves a line that is wanted `after` cycles from now."""
    now = m[CYCLE] + after
    first = now >> STRETCH_BITS
    wanted = m[LINE_TIME]
    wait = -1
    for stretch in range(first, first + STRETCHES):
        at = bandwidth + 2 * (stretch & (STRETCHES - 1))
        if a[at + STRETCH] < stretch:
            a[at + STRETCH] = stretch
            a[at + TAKEN] = 0
        left = WHOLE - a[at + TAKEN] if a[at + STRETCH] == stretch else WHOLE  # else others are too far ahead to tell
        if left > 0:
            if wait < 0:
                begins = (stretch << STRETCH_BITS) + a[at + TAKEN] // PARTS
                wait = max(begins - now, 0) if stretch > first else 0
            part = min(left, wanted)
            if a[at + STRETCH] == stretch:
                a[at + TAKEN] += part
            wanted -= part
            if wanted == 0:
                break
    return wait if wait >= 0 else STRETCHES << STRETCH_BITS  # all is taken that the table tells of


@kernel
def since_refresh(m: Record, rank: int, cycle: int) -> int:
    """Cycles since it was last a rank's turn to refresh; ranks take turns."""
    return (cycle + m[REFRESH_INTERVAL] * rank // m[RANKS]) % m[REFRESH_INTERVAL]


@kernel
def refreshed(m: Record, a: Arena, at: int, rank: int, cycle: int) -> int:
    """The first cycle from this one on in which a rank neither refreshes nor waits for its rows to close for that."""
    since = since_refresh(m, rank, cycle)
    late = a[at + LATE] if a[at + LATEST] == cycle - since else 0
    return cycle + max(m[REFRESH] + late - since, 0)


@kernel
def put_off(m: Record, a: Arena, at: int, rank: int, opened: int) -> None:
    """A row was opened: if it is still open when it is its rank's turn to refresh, that waits."""
    turn = opened - since_refresh(m, rank, opened) + m[REFRESH_INTERVAL]
    late = opened + m[ROW_CYCLE] - turn
    if m[REFRESH] == 0 or late <= 0 or a[at + LATEST] > turn:
        return
    before = a[at + LATE] if a[at + LATEST] == turn else 0
    a[at + LATEST] = turn
    a[at + LATE] = max(before, late)


@kernel
def bank_of(m: Record, line: int) -> int:
    """The bank of a line, of all of its node's; those of a rank follow each other."""
    return (line ^ line >> 8 ^ line >> 16) % (m[RANKS] * m[BANKS_OF_RANK])


@kernel
def place_in_queue(m: Record, a: Arena, queue: int, wanted: int) -> int:
    """The entry of a channel's queue for a line that is wanted at a cycle: one that is left, or the first that will be.

    -1 if one is left but for lines that are wanted later, by CPUs that are ahead.
    """
    soonest = queue
    later = False
    for at in range(queue, queue + QUEUE_WORDS * m[QUEUE], QUEUE_WORDS):
        if a[at + UNTIL] <= wanted:
            return at
        later = later or a[at + WANTED] > wanted
        if a[at + UNTIL] < a[soonest + UNTIL]:
            soonest = at
    return -1 if later else soonest


@kernel
def until_opened(m: Record, a: Arena, line: int, node: int, after: int) -> int:
    """Cycles until a bank of a node's memory opens the row of a line that is wanted `after` cycles from now."""
    bank = bank_of(m, line)
    rank = bank // m[BANKS_OF_RANK]
    of_rank = m[BANKS] + (node * m[RANKS] + rank) * (RANK_WORDS + m[BANKS_OF_RANK] * BANK_WORDS)
    at = of_rank + RANK_WORDS + bank % m[BANKS_OF_RANK] * BANK_WORDS
    wanted = m[CYCLE] + after
    opened = refreshed(m, a, of_rank, rank, wanted)
    oldest = n = 0
    while n < BANK_WORDS:
        done = a[at + n]
        if opened < done < opened + 2 * m[ROW_CYCLE]:
            opened = refreshed(m, a, of_rank, rank, done)
            n = 0
        else:
            n += 1
    for n in range(1, BANK_WORDS):
        if a[at + n] < a[at + oldest]:
            oldest = n
    a[at + oldest] = opened + m[ROW_CYCLE]
    put_off(m, a, of_rank, rank, opened)
    return opened - wanted


@kernel
def remote(m: Record, line: int) -> bool:
    """Does a line lie in the other node's memory?"""
    return line >> 6 < m[NODE_FIRST] or line >> 6 >= m[NODE_END]


@kernel
def from_memory(m: Record, a: Arena, line: int, after: int) -> int:
    """Cycles until memory has sent a line that is wanted `after` cycles from now."""
    node = m[NODE]
    cycles = m[DRAM_CYCLES]
    if remote(m, line):
        node ^= 1
        cycles = m[REMOTE_CYCLES]
    waits = channel = 0
    place = -1
    if m[RANKS]:
        after += m[HELD_BACK]
        channel = bank_of(m, line) // m[BANKS_OF_RANK] % m[CHANNELS]
        since = m[CYCLE] + after
        place = place_in_queue(m, a, m[QUEUES] + (node * m[CHANNELS] + channel) * QUEUE_WORDS * m[QUEUE], since)
        if place >= 0:
            waits = max(a[place + UNTIL] - since, 0)
            a[place + WANTED] = since
        waits += until_opened(m, a, line, node, after + waits)
    if m[LINE_TIME]:
        bus = m[BANDWIDTHS] + (node * m[CHANNELS] + channel) * BANDWIDTH_WORDS
        waits += until_served(m, a, bus, after + waits)
    if place >= 0:
        a[place + UNTIL] = m[CYCLE] + after + waits
    return cycles + waits
