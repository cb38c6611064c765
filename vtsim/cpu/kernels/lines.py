"""The cycles that an access to a line of memory takes: through the caches of this CPU, of others, and to DRAM.

Where there are several CPUs, lines that they want of one node's memory share its bandwidth: a table says of each
stretch of time how much of it is taken, and a line takes the first that is left from when it is wanted. So it is all
the same in which order CPUs run, some of which may be far ahead. One CPU has too few misses at once to fill it.
Before that, where a machine says how many ranks its channels have, a line waits for room in its channel's queue, then
for its bank, which opens a row for each line and is busy for a row cycle then, and for its rank, which opens none from
when it is its turn to refresh until it has, and does so when all its rows are closed; and each channel has a bandwidth
of its own. Of each bank it is known when it is done with its latest lines, of each rank how late its latest refresh is,
of each entry of a queue which line had it last, and when.

What L2 fetches it completes to an aligned pair of lines, for which nobody waits. Who wants the other line before it has
come waits for the rest of its time. A load that L1D lacks, behind a line that it has, fetches what comes next: the rest
of its pair, which is there already, or the pair behind.

SDM: "Cache Control Protocol".
Source: Intel, Disclosure of Hardware Prefetcher Control on Some Intel Processors: L2 adjacent line, DCU; Intel 64 and
IA-32 Architectures Optimization Reference Manual: the latter follows an ascending access to data loaded lately.
Not modelled: lines of one row that are read while it is open; what else a channel waits for (between banks of a
group, between ranks, from writes to reads); that a processor leaves the other
line, or the next one, where it has much else to fetch; all but the last pair that are under way: theirs seem to have
come; next lines that go into L1D, or that a load asks for which L1D has; prefetchers of strides and streams.
"""

from __future__ import annotations

from vtsim.base.jit import Arena, Record, Tags, kernel
from vtsim.cpu.accounts import DATA_L2, FETCH_L2, PAIR_DRAM
from vtsim.cpu.kernels.caches import bring, bring_l3, fill, fill_l1d, has, probe, probe_at_once
from vtsim.cpu.kernels.coherence import NOBODY, SHARED, cycles_ahead, load_shared, owner_at, place_of, store_owned
from vtsim.cpu.kernels.memory_types import COMBINING
from vtsim.cpu.kernels.rights import READ, WRITE
from vtsim.cpu.slots import (
    BANDWIDTHS,
    BANKS,
    BANKS_OF_RANK,
    CHANNELS,
    CORE,
    CYCLE,
    DRAM_CYCLES,
    FETCH_GENERATION,
    HELD_BACK,
    IN_PAIRS,
    L1D,
    L1I,
    L2,
    L3,
    LATENCY,
    LINE_FETCHED,
    LINE_TIME,
    NEXT_LINES,
    NODE,
    NODE_END,
    NODE_FIRST,
    OWNER,
    PAIR_LINE,
    PAIR_THERE,
    PEERS,
    QUEUE,
    QUEUES,
    RANKS,
    REFRESH,
    REFRESH_INTERVAL,
    REMOTE_CYCLES,
    ROW_CYCLE,
    UNCACHED,
    WALK_LATENCY,
    WALKS_IN_L1D,
    WAYS,
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


@kernel
def fetch_unasked(m: Record, a: Arena, t: Tags, line: int, after: int) -> None:
    """L2 fetches a line that nobody waits for, the other one of a pair, say, unless another core has it alone."""
    if m[PEERS]:
        place = place_of(m, t, line)
        owner = owner_at(m, t, place)
        if owner != SHARED and owner != NOBODY and owner != m[CORE]:
            return
        load_shared(m, a, t, line, place)
    if bring(m, t, L2, line):
        return
    cycles = m[L3 + LATENCY]
    if not bring_l3(m, t, line):
        a[m[OWNER] + PAIR_DRAM] += 1
        cycles = from_memory(m, a, line, after)
    m[PAIR_LINE] = line
    m[PAIR_THERE] = m[CYCLE] + after + cycles


@kernel
def beyond_l1(m: Record, a: Arena, t: Tags, line: int, served: int, after: int) -> int:
    """Cycles until a line that missed its first-level cache `after` cycles from now arrives; fills L2 and L3.

    `served` is the counter of what L2 serves; those of L3, DRAM and DRAM of another node come after it.
    """
    at = m[OWNER] + served
    if probe_at_once(m, t, L2, line):
        a[at] += 1
        if line == m[PAIR_LINE]:
            return max(m[L2 + LATENCY], m[PAIR_THERE] - m[CYCLE] - after)
        return m[L2 + LATENCY]
    cycles = m[L3 + LATENCY]
    ahead = moved = 0
    if m[PEERS]:
        place = place_of(m, t, line)
        ahead = cycles_ahead(m, a, place)
        moved = load_shared(m, a, t, line, place)
    if moved:
        a[at + 1] += 1
        cycles = moved
    elif bring_l3(m, t, line):
        a[at + 1] += 1
    else:
        a[at + 2] += 1
        cycles = from_memory(m, a, line, after)
        if remote(m, line):
            a[at + 3] += 1
    fill(m, t, L2, line)
    if m[IN_PAIRS]:
        fetch_unasked(m, a, t, line ^ 1, after)
    return cycles + ahead


@kernel
def read_line(m: Record, a: Arena, t: Tags, hpa: int, served: int) -> int:
    """Cycles of a page-walker read: paging-structure lines are cached like any other, or from L2 on.

    It begins when the walk's earlier ones are there, which the walk has added up in WALK_LATENCY.
    `served` is the first of the dimension's counters, GUEST_L1D or EPT_L1D.
    """
    line = hpa >> 6
    if m[WALKS_IN_L1D] == 0:
        return beyond_l1(m, a, t, line, served + 1, m[WALK_LATENCY])
    if probe_at_once(m, t, L1D, line):
        a[m[OWNER] + served] += 1
        return m[L1D + LATENCY]
    cycles = beyond_l1(m, a, t, line, served + 1, m[WALK_LATENCY])
    fill_l1d(m, t, line)
    return cycles


@kernel
def read_uncached(m: Record, a: Arena, line: int, served: int, after: int) -> int:
    """Cycles until memory itself has answered for a line that is cached nowhere; `served` as `beyond_l1` has it."""
    at = m[OWNER] + served
    a[at + 2] += 1
    if remote(m, line):
        a[at + 3] += 1
    return from_memory(m, a, line, after)


@kernel
def read_entry(m: Record, a: Arena, t: Tags, hpa: int, served: int, uncached: bool) -> int:
    """Cycles of a page-walker read as `read_line` has it, or of one from memory that is not cached."""
    if uncached:
        return read_uncached(m, a, hpa >> 6, served + 1, m[WALK_LATENCY])
    return read_line(m, a, t, hpa, served)


@kernel
def data_uncached(m: Record, a: Arena, line: int, access: int) -> int:
    """Cycles beyond an L1D hit of a data access to a page of which UNCACHED says that it is not cached; clears it.

    Stores that are combined wait in buffers, and nobody for them.
    """
    kind = m[UNCACHED]
    m[UNCACHED] = 0
    if kind == COMBINING and access == WRITE:
        return 0
    return max(read_uncached(m, a, line, DATA_L2, 0) - m[L1D + LATENCY], 0)


@kernel
def go_ahead(m: Record, a: Arena, t: Tags, line: int, after: int) -> None:
    """A load that misses L1D behind a line that L1D has fetches what comes next of the page: into L2, the next pair.

    Only of the second line of a pair is that anything new.
    """
    if line & 63 < 63 and has(m, t, L1D, line - 1):
        fetch_unasked(m, a, t, line + 2, after)
        fetch_unasked(m, a, t, line + 1, after)


@kernel
def data_miss(m: Record, a: Arena, t: Tags, line: int, access: int, after: int) -> int:
    """Cycles beyond an L1D hit of a data access that misses L1D `after` cycles from now, which its walk takes, say."""
    cycles = beyond_l1(m, a, t, line, DATA_L2, after) - m[L1D + LATENCY]
    if m[NEXT_LINES] and line & 1 and access == READ:
        go_ahead(m, a, t, line, after)
    fill_l1d(m, t, line)
    return cycles if cycles > 0 else 0


@kernel
def own_line(m: Record, a: Arena, t: Tags, line: int) -> int:
    """Cycles beyond an L1D hit until no other CPU holds a line that is to be written."""
    return store_owned(m, a, t, line) if m[PEERS] else 0


@kernel
def data_line(m: Record, a: Arena, t: Tags, line: int, access: int) -> int:
    """Cycles beyond an L1D hit of a data access; a store waits until no other CPU has the line."""
    taken = own_line(m, a, t, line) if access == WRITE else 0
    if probe(m, t, L1D, line):
        return taken
    return max(taken, data_miss(m, a, t, line, access, 0))


@kernel
def fetch_uncached(m: Record, a: Arena, hpa: int) -> int:
    """Stall cycles of fetching a code line that is not cached, unless it is what was fetched last of such memory."""
    line = hpa >> 6
    if line == m[LINE_FETCHED]:
        return 0
    m[LINE_FETCHED] = line
    return max(read_uncached(m, a, line, FETCH_L2, 0) - m[L1I + LATENCY], 0)


@kernel
def fetch_line(m: Record, a: Arena, t: Tags, hpa: int) -> int:
    """Stall cycles of fetching one code line; a fill starts a new fetch generation."""
    line = hpa >> 6
    if probe(m, t, L1I, line):
        return 0
    cycles = beyond_l1(m, a, t, line, FETCH_L2, 0) - m[L1I + LATENCY]
    if m[L1I + WAYS] > 0:
        fill(m, t, L1I, line)
        m[FETCH_GENERATION] += 1
    return cycles if cycles > 0 else 0
