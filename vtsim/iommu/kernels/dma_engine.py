"""DMA operations on their way: link up, translation, memory, link down; what bounds them are tags, walkers and bytes.

Operations are issued in order while a tag is free. Each of their packets is translated; a miss waits for a walker and
for the reads of its walk, unless a walker is at that page already. A device with a device-TLB asks for what it does not
hold before it sends the packet, whose address the unit then believes if the device's context entry allows that. An
operation whose page is not there is not begun by a device that can ask for pages. Data that is ready goes down in order
of time.
"""

from __future__ import annotations

from vtsim.base.jit import Arena, Record, Records, Tags, kernel
from vtsim.base.memory import is_memory, touch
from vtsim.ept.memory_types import CACHED, WB, WRITTEN_BACK
from vtsim.iommu import dma as g
from vtsim.iommu import spec as sp
from vtsim.iommu.kernels.device_tlb import DONE, ask_for_translation, known_to_device
from vtsim.iommu.kernels.requests import reads_of, translate_request
from vtsim.iommu.state import COMPLETED, DEVICE_PRI, HPA, SHIFT, SNOOP, STATUS, TYPE_SHIFT

PAGE_BYTES: int = 4096
LEHMER, MODULUS = 48271, 2147483647
HIT, HIT_DRAM, MISS, MISS_DRAM = range(4)  # the queues


@kernel
def run_engines(engines: Records, tlbs: Records, lines: Tags, u: Record, a: Arena, until: int) -> bool:
    """Let the engines, a row each, begin operations in order of time until `until`, in ps; True when all have ended.

    Each has a device-TLB, which only those use that ask for translations. They share what is in the first row: the
    walkers of the unit and the clock of the last-level cache.
    """
    while True:
        chosen = -1
        earliest = until
        for number in range(len(engines)):
            d = engines[number]
            if d[g.ISSUED] < d[g.COUNT]:
                begins = begins_at(d)
                if begins < earliest:
                    chosen = number
                    earliest = begins
        if chosen < 0:
            break
        d = engines[chosen]
        issue(d, tlbs[chosen], engines[0], lines, u, a, earliest, earliest)
        d[g.NEXT_ISSUE] = earliest + d[g.GAP]
        d[g.ISSUED] += 1
    over = True
    for number in range(len(engines)):
        d = engines[number]
        if d[g.ISSUED] < d[g.COUNT]:
            over = False
        else:
            while d[g.ENDED] < d[g.ISSUED]:
                end_next(d)
    return over


@kernel
def begins_at(d: Record) -> int:
    """When the next operation of an engine begins: its tag is free, and its own gap is over."""
    tags = d[g.TAGS]
    while d[g.ISSUED] - d[g.ENDED] >= tags:
        end_next(d)
    return max(d[g.NEXT_ISSUE], d[g.ENDS + d[g.ISSUED] % tags])


@kernel
def issue(d: Record, tlb: Record, shared: Record, lines: Tags, u: Record, a: Arena, now: int, since: int) -> int:
    """Send the packets of one operation up, translate them and find the lines they touch: 0.

    Of a device with PRI, whose operations stay within a page: where the page is not there, nothing begins, and the
    time when the device knows is returned, negative. `since`: from when on its latency counts.
    """
    writes = d[g.WRITES] != 0
    address = d[g.BASE] + next_place(d) * d[g.UNIT]
    left = d[g.BYTES]
    most = d[g.MAX_PAYLOAD] if writes else d[g.MAX_READ]
    ready = now
    queue = HIT
    down = 0
    aborted = False
    while left > 0:
        size = min(min(left, most), PAGE_BYTES - (address & (PAGE_BYTES - 1)))
        access = sp.WRITE if writes else sp.READ
        host = address
        begins = now
        if d[g.TRANSLATES] and d[g.REQUESTS] == g.BY_DEVICE:
            host = known_to_device(tlb, sp.NO_PASID, address, access)
            if host >= 0:
                d[g.N_TLB_HITS] += 1
            else:
                queue |= MISS
                down += g.COMPLETION_HEADER + g.TRANSLATION_BYTES
                begins = translation_asked(d, tlb, shared, u, a, address, size, access, now)
                host = u[HPA]
                if begins < 0 and tlb[DEVICE_PRI] != 0 and u[STATUS] == COMPLETED:
                    d[g.N_HELD] += 1
                    return begins
                aborted = begins < 0
        if aborted:
            ready = max(ready, -begins - d[g.DOWN_LATENCY])
            break
        sent = g.REQUEST_HEADER + (size if writes else 0)
        arrived = sent_up(d, sent, now, begins)
        snooped = d[g.NO_SNOOP] == 0
        kind = WB
        if d[g.TRANSLATES]:
            requests = sp.TRANSLATED if d[g.REQUESTS] else sp.UNTRANSLATED
            status = translate_request(u, a, d[g.SOURCE], sp.NO_PASID, host, size, access, requests)
            waited = translation_ends(d, shared, arrived, host >> 12, reads_of(u))
            if waited > arrived + d[g.HIT_LATENCY]:
                queue |= MISS
            arrived = waited
            aborted = aborted or status != COMPLETED
            host = u[HPA]
            snooped = snooped or u[SNOOP] != 0
            if u[SHIFT] >> TYPE_SHIFT != 0:
                kind = (u[SHIFT] >> TYPE_SHIFT) - 1
        if aborted:
            ready = max(ready, arrived)
            down += g.COMPLETION_HEADER
            break
        if host < d[g.OWN_FIRST] or host >= d[g.OWN_END]:
            d[g.N_ESCAPED] += 1
        if not line_found(d, shared, lines, host >> 6, writes, snooped, kind):
            queue |= HIT_DRAM
            arrived += d[g.DRAM_LATENCY]
        else:
            arrived += d[g.CACHE_LATENCY]
        if writes:
            if is_memory(a, host):
                touch(a, host >> 12)
        else:
            packets = (size + d[g.MAX_PAYLOAD] - 1) // d[g.MAX_PAYLOAD]
            down += size + packets * g.COMPLETION_HEADER
        ready = max(ready, arrived)
        address += size
        left -= size
    if aborted:
        d[g.N_ABORTED] += 1
    wait_in_queue(d, queue, ready, since, down)
    return 0


@kernel
def sent_up(d: Record, size: int, now: int, begins: int) -> int:
    """When a packet of an operation of `now` arrives above that could not be sent before `begins`.

    One that waits for its translation lets those of later operations pass.
    """
    d[g.UP_FREE] = max(d[g.UP_FREE], now) + size * d[g.BYTE_FS] // 1000
    d[g.N_PACKETS] += 1
    return max(d[g.UP_FREE], begins + size * d[g.BYTE_FS] // 1000) + d[g.UP_LATENCY]


@kernel
def translation_asked(
    d: Record, tlb: Record, shared: Record, u: Record, a: Arena, address: int, size: int, access: int, now: int
) -> int:
    """When the answer to a translation request is there, its address in HPA of `u`; negative if it has none.

    Its bytes on the way down are counted with those of the operation.
    """
    arrived = sent_up(d, g.REQUEST_HEADER, now, now)
    d[g.N_TRANSLATIONS] += 1
    status = ask_for_translation(tlb, u, a, sp.NO_PASID, address, size, access)
    answered = translation_ends(d, shared, arrived, address >> 12, reads_of(u)) + d[g.DOWN_LATENCY]
    return answered if status == DONE else -answered


@kernel
def next_place(d: Record) -> int:
    """Where in the window the next operation begins, in units."""
    units = d[g.WINDOW] // d[g.UNIT]
    if d[g.RANDOM]:
        d[g.RANDOM_STATE] = d[g.RANDOM_STATE] * LEHMER % MODULUS
        return d[g.RANDOM_STATE] % units
    place = d[g.PLACE]
    d[g.PLACE] = place + 1 if place + 1 < units else 0
    return place


@kernel
def translation_ends(d: Record, shared: Record, arrived: int, page: int, reads: int) -> int:
    """When the translation is there: at once, with a walk that is under way for this page, or after one's own walk."""
    free = g.WALKER
    for n in range(d[g.WALKERS]):
        at = g.WALKER + 2 * n
        if reads == 0 and shared[at + 1] == page and shared[at] > arrived:
            return shared[at]
        if shared[at] < shared[free]:
            free = at
    if reads == 0:
        return arrived + d[g.HIT_LATENCY]
    begins = max(arrived, shared[free])
    d[g.WALK_WAIT] += begins - arrived
    d[g.N_DMA_WALKS] += 1
    d[g.N_DMA_READS] += reads
    shared[free] = begins + d[g.WALK_LATENCY] + reads * d[g.WALK_READ]
    shared[free + 1] = page
    return shared[free]


@kernel
def line_found(d: Record, shared: Record, lines: Tags, line: int, writes: bool, snooped: bool, kind: int) -> bool:
    """Is a line in the last-level cache? What is written back is put there, into the ways that writes may take.

    An access that is not snooped goes past the cache. One of a type that is not cached takes the line out of it.
    """
    if not snooped:
        d[g.N_LINE_MISSES] += 1
        return False
    ways = d[g.LINE_WAYS]
    at = (line & (d[g.LINE_SETS] - 1)) * ways
    tag = line // d[g.LINE_SETS] + 1
    cached = (CACHED >> kind) & 1 != 0
    for way in range(ways):
        if lines[at + way] == tag:
            if not cached:
                lines[at + way] = 0
                break
            d[g.N_LINE_HITS] += 1
            return True
    d[g.N_LINE_MISSES] += 1
    if writes and (WRITTEN_BACK >> kind) & 1 != 0 and d[g.WRITE_WAYS]:
        lines[at + shared[g.LINE_CLOCK] % d[g.WRITE_WAYS]] = tag
        shared[g.LINE_CLOCK] += 1
        return True
    return False


@kernel
def wait_in_queue(d: Record, queue: int, ready: int, issued: int, down: int) -> None:
    """Put an operation into the queue of those like it; none is ready before the one in front of it."""
    tail = d[g.TAILS + queue]
    if tail > d[g.HEADS + queue]:
        ready = max(ready, d[queue_entry(queue, tail - 1)])
    d[g.LAST_READY] = max(d[g.LAST_READY], ready)
    at = queue_entry(queue, tail)
    d[at] = ready
    d[at + 1] = issued
    d[at + 2] = down
    d[g.TAILS + queue] = tail + 1


@kernel
def queue_entry(queue: int, number: int) -> int:
    """Where the entry of a number stands."""
    return g.QUEUE + (queue * g.MOST_TAGS + number % g.MOST_TAGS) * g.QUEUE_WORDS


@kernel
def end_next(d: Record) -> None:
    """Of all operations in flight, end the one that is ready first: its data goes down, then its tag is free."""
    chosen = -1
    earliest = 0
    for queue in range(g.QUEUES):
        head = d[g.HEADS + queue]
        if head < d[g.TAILS + queue]:
            ready = d[queue_entry(queue, head)]
            if chosen < 0 or ready < earliest:
                chosen = queue
                earliest = ready
    at = queue_entry(chosen, d[g.HEADS + chosen])
    d[g.HEADS + chosen] += 1
    d[g.DOWN_FREE] = max(d[g.DOWN_FREE], earliest) + d[at + 2] * d[g.BYTE_FS] // 1000
    end = d[g.DOWN_FREE] + d[g.DOWN_LATENCY]
    d[g.ENDS + d[g.ENDED] % d[g.TAGS]] = end
    d[g.ENDED] += 1
    d[g.LAST_END] = end
    d[g.N_OPERATIONS] += 1
    latency = end - d[at + 1]
    d[g.LATENCY_SUM] += latency
    d[g.LATENCY_MOST] = max(d[g.LATENCY_MOST], latency)
    d[g.HISTOGRAM + min(latency // g.BUCKET_PS, g.BUCKETS - 1)] += 1
