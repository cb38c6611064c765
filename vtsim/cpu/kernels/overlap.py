"""What lets accesses overlap: miss buffers, walkers and the reorder buffer, which instructions leave in order.

An access waits for a free miss buffer and for room in the reorder buffer, its walk for a free walker. What a wrong path
loaded keeps its buffer until it is there, but holds nothing back in the reorder buffer, which it has left.

Not modelled: that an access waits for a walk of a larger page that another access began, or for a line that another
one asked for, unless it did so on a wrong path.
"""

from __future__ import annotations

from vtsim.base.jit import Arena, Record, kernel
from vtsim.cpu import accounts as k
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.kernels.ledger import charge

SQUASHED: int = -1  # in MISS_ISSUED: of a wrong path


@kernel
def passes(m: Record, instructions: int) -> None:
    """Let ordinary instructions retire and their cycles pass; fractions of a cycle are carried."""
    total = m[s.FRACTION] + instructions * m[s.CPI_NUMERATOR]
    cycles = total // 100
    m[s.FRACTION] = total - cycles * 100
    m[s.CYCLE] += cycles
    m[s.RETIRED] += instructions


@kernel
def next_random(x: int) -> int:
    """One step of a 64-bit xorshift generator (never zero)."""
    x ^= x << 13
    x ^= (x >> 7) & 0x1FF_FFFF_FFFF_FFFF
    x ^= x << 17
    return x


@kernel
def room(m: Record) -> int:
    """When the reorder buffer has room: every miss that lies further back than it reaches is complete."""
    free = m[s.CYCLE]
    horizon = m[s.RETIRED] - m[s.ROB]
    held = m[s.MISS_HELD]
    while held > 0:
        at = m[s.MISS_NEXT] - held
        if at < 0:
            at += m[s.MLP]
        issued = m[s.MISS_ISSUED + at]
        if issued > horizon:
            break
        if issued != SQUASHED:
            free = max(free, m[s.MISS_WINDOW + at])
        held -= 1
    m[s.MISS_HELD] = held
    return free


@kernel
def held_back(m: Record) -> int:
    """Cycles until the next access that misses has room and a buffer."""
    return max(room(m), m[s.MISS_WINDOW + m[s.MISS_NEXT]]) - m[s.CYCLE]


@kernel
def take_buffer(m: Record, there: int, issued: int) -> None:
    """The next miss buffer is an access's until a cycle; `issued`: instructions before it, or SQUASHED."""
    m[s.MISS_WINDOW + m[s.MISS_NEXT]] = there
    m[s.MISS_ISSUED + m[s.MISS_NEXT]] = issued
    m[s.MISS_HELD] = min(m[s.MISS_HELD] + 1, m[s.MLP])
    turn = m[s.MISS_NEXT] + 1
    m[s.MISS_NEXT] = turn if turn < m[s.MLP] else 0


@kernel
def take_walker(m: Record, known: int, walk: int, page: int) -> int:
    """When the walk of a 4 KiB page ends that the next walker makes, from a cycle on."""
    walker = s.WALK_WINDOW + m[s.WALK_NEXT]
    ready = max(known, m[walker]) + walk
    m[walker] = ready
    m[s.WALK_PAGE + m[s.WALK_NEXT]] = page
    turn = m[s.WALK_NEXT] + 1
    m[s.WALK_NEXT] = turn if turn < m[s.WALKERS] else 0
    return ready


@kernel
def overlapped(m: Record, a: Arena, walk: int, miss: int, after: int, updates: int, page: int, translated: int) -> int:
    """An independent access with a walk of `walk` cycles and a miss of `miss`: wait only for buffers. When is it there?

    Its address is known after `after` cycles; has it a load and a store (`updates`)? `page` is its 4 KiB page; a walk
    for it that another access began ends at cycle `translated`.
    """
    now = m[s.CYCLE]
    wait = held_back(m)
    if wait > 0:
        share = wait * walk // (walk + miss) if walk else 0
        charge(m, a, o.PAGE_WALK, share)
        charge(m, a, o.DATA_STALL, wait - share)
        now += wait
    known = max(now + after, translated)
    ready = known + walk
    looked_up = m[s.STLB_HIT_CYCLES]
    if walk > looked_up:  # its walker begins when the second-level TLB is known to lack the page
        known += looked_up
        walk -= looked_up
        idle = m[s.WALK_WINDOW + m[s.WALK_NEXT]] <= known
        ready = take_walker(m, known, walk, page)
        other = s.WALK_WINDOW + m[s.WALK_NEXT]
        if updates and idle and m[other] <= known:  # with one walker that is the load's, which is busy
            m[other] = ready
            m[s.WALK_PAGE + m[s.WALK_NEXT]] = page
            a[m[s.OWNER] + k.WALK_CYCLES] += walk
    take_buffer(m, ready + miss, m[s.RETIRED])
    return ready + miss


@kernel
def walked(m: Record, page: int) -> int:
    """Until when a walk for this 4 KiB page is under way, or 0."""
    until = 0
    for n in range(m[s.WALKERS]):
        if m[s.WALK_PAGE + n] == page:
            until = max(until, m[s.WALK_WINDOW + n])
    return until


@kernel
def outstanding(m: Record) -> int:
    """When every outstanding access is there, but those of a wrong path."""
    last = m[s.CYCLE]
    for n in range(m[s.MLP]):
        if m[s.MISS_ISSUED + n] != SQUASHED:
            last = max(last, m[s.MISS_WINDOW + n])
    return last


@kernel
def drain(m: Record, a: Arena) -> None:
    """Wait for every outstanding access."""
    m[s.MISS_HELD] = 0
    last = outstanding(m)
    if last > m[s.CYCLE]:
        charge(m, a, o.DATA_STALL, last - m[s.CYCLE])
