"""What a core fetches into L2 without being asked: the rest of a pair, what comes next, and what a stream goes on with.

What L2 fetches it completes to an aligned pair of lines. A load that L1D lacks, behind a line that it has, asks L2 for
the next line of the page. And L2 follows streams: of each of the pages that it was asked for lines of lately it knows
the last one, and how far it has fetched upwards and downwards. Who asks for a line above the last one makes it fetch
the next two that it has not fetched above, so far ahead as it goes at most; below the last one likewise; the first of a
page none. Loads and stores ask, fetches of code, and L1D's next lines; walks do not.

Nobody waits for these lines, and they are fetched only while the super queue has room, which holds all lines that L2
waits for: a stream goes on with the next line that is asked for. Who wants a line before it has come waits for the rest
of its time: of each place in a page it is known which line came last there, and when.

Source: Intel, Disclosure of Hardware Prefetcher Control on Some Intel Processors: L2 streamer, L2 adjacent line, DCU.
Intel 64 and IA-32 Architectures Optimization Reference Manual, "Data Prefetching": a stream upwards and one downwards
of each page, two lines for each look-up; DCU follows an ascending access to data loaded lately. A. Bertschi, Battling
the Prefetcher: Exploring Coffee Lake (2022), measured: from the second access to a page on, whatever the distance.
Not modelled: lines that stay in L3 because they are far ahead, or L2 has much else to fetch; entries of the super queue
that come free out of turn, and a full one that L1's misses wait for; next lines that go into L1D, or that a load asks
for which L1D has; lines of other pages; what loads at regular distances want next, each by its instruction.
"""

from __future__ import annotations

from vtsim.base.jit import Arena, Record, Tags, kernel
from vtsim.cpu.accounts import PAIR_DRAM
from vtsim.cpu.kernels.caches import bring, bring_l3, has, keep, way_bit, way_of
from vtsim.cpu.kernels.coherence import NOBODY, SHARED, load_shared, owner_at, place_of
from vtsim.cpu.kernels.dram import from_memory
from vtsim.cpu.slots import (
    ARRIVALS,
    CORE,
    CYCLE,
    DATA,
    IN_PAIRS,
    L1D,
    L2,
    L3,
    LATENCY,
    LINES_AHEAD,
    MASK,
    OWNER,
    PEERS,
    STREAMS,
    SUPER_QUEUE,
    SUPER_QUEUE_LINES,
    WAYS,
)

PLACES: int = 64  # lines of a page
TOGETHER: int = 2  # lines that a look-up makes L2 fetch
(LINE, THERE) = range(2)  # of each place in a page: the line that was fetched last there, and when it comes
ARRIVAL_WORDS: int = 2 * PLACES
(SINCE, UNTIL) = range(2)  # of an entry of the super queue, behind the word that says which one is next
UPWARDS, DOWNWARDS = 6, 12  # in the word of a page: its last line, and how far it was fetched each way


@kernel
def until_there(m: Record, a: Arena, line: int, after: int) -> int:
    """Cycles from `after` cycles from now until a line of L2 has come, if it was fetched unasked; 0 if it has."""
    at = m[ARRIVALS] + 2 * (line & (PLACES - 1))
    return max(a[at + THERE] - m[CYCLE] - after, 0) if a[at + LINE] == line else 0


@kernel
def is_full(m: Record, a: Arena, after: int) -> bool:
    """Does the super queue hold as many lines as it can `after` cycles from now? What comes later does not count."""
    at = m[SUPER_QUEUE] + 1 + 2 * a[m[SUPER_QUEUE]]
    return a[at + SINCE] <= m[CYCLE] + after < a[at + UNTIL]


@kernel
def wait_for(m: Record, a: Arena, after: int, cycles: int) -> None:
    """The super queue holds a line that L2 asks for `after` cycles from now until it comes."""
    entry = a[m[SUPER_QUEUE]]
    at = m[SUPER_QUEUE] + 1 + 2 * entry
    a[at + SINCE] = m[CYCLE] + after
    a[at + UNTIL] = m[CYCLE] + after + cycles
    a[m[SUPER_QUEUE]] = entry + 1 if entry + 1 < m[SUPER_QUEUE_LINES] else 0


@kernel
def fetch_unasked(m: Record, a: Arena, t: Tags, line: int, after: int) -> bool:
    """L2 fetches a line that nobody waits for, unless another core has it alone; False: there is no room to."""
    if is_full(m, a, after):
        return has(m, t, L2, line)
    if m[PEERS]:
        place = place_of(m, t, line)
        owner = owner_at(m, t, place)
        if owner != SHARED and owner != NOBODY and owner != m[CORE]:
            return True
        load_shared(m, a, t, line, place)
    if bring(m, t, L2, line):
        return True
    cycles = m[L3 + LATENCY]
    if not bring_l3(m, t, line):
        a[m[OWNER] + PAIR_DRAM] += 1
        cycles = from_memory(m, a, line, after)
    at = m[ARRIVALS] + 2 * (line & (PLACES - 1))
    a[at + LINE] = line
    a[at + THERE] = m[CYCLE] + after + cycles
    wait_for(m, a, after, cycles)
    return True


@kernel
def follow(m: Record, a: Arena, t: Tags, line: int, after: int) -> None:
    """L1 asks L2 for a line `after` cycles from now: what it makes L2 fetch of the stream that it belongs to."""
    page = line // PLACES
    here = line % PLACES
    ways = m[STREAMS + WAYS]
    where = page & m[STREAMS + MASK]
    way = way_of(a, m[STREAMS] + where * ways, ways, page)
    if way < 0:
        keep(m, a, STREAMS, page, page, here | (PLACES - 1) << DOWNWARDS)
        return
    a[m[STREAMS + DATA] + (m[STREAMS + MASK] + 1) * ways + where] |= way_bit(way)
    at = m[STREAMS + DATA] + where * ways + way
    last = a[at] % PLACES
    up = (a[at] >> UPWARDS) % PLACES
    down = (a[at] >> DOWNWARDS) % PLACES
    if here > last:
        up = max(up, here)
        end = min(up + TOGETHER, here + m[LINES_AHEAD], PLACES - 1)
        while up < end and fetch_unasked(m, a, t, page * PLACES + up + 1, after):
            up += 1
    elif here < last:
        down = min(down, here)
        end = max(down - TOGETHER, here - m[LINES_AHEAD], 0)
        while down > end and fetch_unasked(m, a, t, page * PLACES + down - 1, after):
            down -= 1
    a[at] = here | up << UPWARDS | down << DOWNWARDS


@kernel
def go_ahead(m: Record, a: Arena, t: Tags, line: int, after: int) -> None:
    """A load that misses L1D behind a line that L1D has asks L2 for the next line of the page."""
    line += 1
    if line % PLACES == 0 or not has(m, t, L1D, line - 2):
        return
    if not has(m, t, L2, line):
        fetch_unasked(m, a, t, line, after)
        if m[IN_PAIRS]:
            fetch_unasked(m, a, t, line ^ 1, after)
    if m[STREAMS + WAYS]:
        follow(m, a, t, line, after)
