"""The cycles that an access to a line of memory takes: through the caches of this CPU, of others, and to DRAM.

What L2 fetches besides, without being asked, is in `prefetchers`; how long memory takes, in `dram`.

SDM: "Cache Control Protocol".
"""

from __future__ import annotations

from vtsim.base.jit import Arena, Record, Tags, kernel
from vtsim.cpu.accounts import DATA_L2, FETCH_L2
from vtsim.cpu.kernels.caches import bring_l3, fill, fill_l1d, probe, probe_at_once
from vtsim.cpu.kernels.coherence import cycles_ahead, load_shared, place_of, store_owned
from vtsim.cpu.kernels.dram import from_memory, remote
from vtsim.cpu.kernels.memory_types import COMBINING
from vtsim.cpu.kernels.prefetchers import fetch_unasked, follow, go_ahead, until_there, wait_for
from vtsim.cpu.kernels.rights import READ, WRITE
from vtsim.cpu.slots import (
    FETCH_GENERATION,
    IN_PAIRS,
    L1D,
    L1I,
    L2,
    L3,
    LATENCY,
    LINE_FETCHED,
    NEXT_LINES,
    OWNER,
    PEERS,
    STREAMS,
    UNCACHED,
    WALK_LATENCY,
    WALKS_IN_L1D,
    WAYS,
)


@kernel
def beyond_l1(m: Record, a: Arena, t: Tags, line: int, served: int, after: int) -> int:
    """Cycles until a line that missed its first-level cache `after` cycles from now arrives; fills L2 and L3.

    `served` is the counter of what L2 serves; those of L3, DRAM and DRAM of another node come after it.
    """
    at = m[OWNER] + served
    if probe_at_once(m, t, L2, line):
        a[at] += 1
        return max(m[L2 + LATENCY], until_there(m, a, line, after))
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
    wait_for(m, a, after, cycles)
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
def data_miss(m: Record, a: Arena, t: Tags, line: int, access: int, after: int) -> int:
    """Cycles beyond an L1D hit of a data access that misses L1D `after` cycles from now, which its walk takes, say."""
    cycles = beyond_l1(m, a, t, line, DATA_L2, after) - m[L1D + LATENCY]
    if m[STREAMS + WAYS]:
        follow(m, a, t, line, after)
    if m[NEXT_LINES] and access == READ:
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
    if m[STREAMS + WAYS]:
        follow(m, a, t, line, 0)
    return cycles if cycles > 0 else 0
