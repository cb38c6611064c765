"""A PCIe DMA engine as a vector: what its link and device are like, what it is to do, what it counts.

An engine `d` is one int64 vector: parameters, the job in work, clocks of its queues, statistics. Times are picoseconds.
A job is a number of DMA operations, reads or writes of one size in a window of its address space.

PCIe: a transaction-layer packet carries framing, a sequence number, a header of 3 or 4 words and an LCRC; of the link's
bits, `dllp_percent` go to acknowledgements and flow control.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
from attrs import frozen

Words = npt.NDArray[np.int64]
# megatransfers per second and lane, and coded bits of 130, by generation
RATES: Final = {1: (2500, 104), 2: (5000, 104), 3: (8000, 128), 4: (16000, 128), 5: (32000, 128)}
PS_PER_NS: Final = 1000
# bytes beside the payload: framing, sequence number, header of four words (of three in a completion), LCRC
REQUEST_HEADER: Final = 24
COMPLETION_HEADER: Final = 20
TRANSLATION_BYTES: Final = 8  # that a translation completion carries for one page

# fmt: off
# --- parameters -----------------------------------------------------------------------------------------------------
(BYTE_FS, MAX_PAYLOAD, MAX_READ, TAGS, GAP, UP_LATENCY, DOWN_LATENCY, HIT_LATENCY, WALK_LATENCY, WALK_READ, WALKERS,
 CACHE_LATENCY, DRAM_LATENCY, LINE_SETS, LINE_WAYS, WRITE_WAYS, NO_SNOOP, REQUESTS) = range(18)
# REQUESTS: untranslated ones; through a device-TLB; or translated ones whose addresses nobody has translated
(BY_UNIT, BY_DEVICE, FORGED) = range(3)
# --- the job ----------------------------------------------------------------------------------------------------------
# UNIT: distance between two places of the window where operations begin.
# OWN_FIRST, OWN_END: host addresses that are the device's own; packets that land elsewhere are counted.
(SOURCE, BASE, WINDOW, BYTES, WRITES, RANDOM, COUNT, UNIT, TRANSLATES, OWN_FIRST, OWN_END) = range(24, 35)
# --- what changes -----------------------------------------------------------------------------------------------------
# LAST_READY: when everything that was sent has reached memory.
(ISSUED, ENDED, RANDOM_STATE, PLACE, NEXT_ISSUE, UP_FREE, DOWN_FREE, LINE_CLOCK, LAST_END, LAST_READY) = range(40, 50)
# --- statistics; N_HELD: times that an operation was not begun because its page was not there -------------------------
(N_OPERATIONS, N_ABORTED, N_PACKETS, N_DMA_WALKS, N_LINE_HITS, N_LINE_MISSES, LATENCY_SUM, LATENCY_MOST, WALK_WAIT,
 N_DMA_READS, N_ESCAPED, N_TLB_HITS, N_TRANSLATIONS, N_HELD) = range(56, 70)
HISTOGRAM: Final = 80               # of latencies, BUCKET_PS each; the last takes all beyond
BUCKETS: Final = 1024
BUCKET_PS: Final = 4000
WALKER: Final = HISTOGRAM + BUCKETS    # when each walker is free, and the page that it walks for
MOST_WALKERS: Final = 64
ENDS: Final = WALKER + 2 * MOST_WALKERS   # when each tag is free again, by the order of operations that ended
MOST_TAGS: Final = 512
# operations whose data is ready, in four queues by what they met: each in order of time. Heads and tails count up.
QUEUES: Final = 4
HEADS: Final = ENDS + MOST_TAGS
TAILS: Final = HEADS + QUEUES
QUEUE: Final = TAILS + QUEUES      # each entry: when ready, when issued, bytes on the way down
QUEUE_WORDS: Final = 3
DMA_WORDS: Final = QUEUE + QUEUES * MOST_TAGS * QUEUE_WORDS
# fmt: on
LINE_BYTES: Final = 64


@frozen(kw_only=True)
class Link:
    """A PCIe link and what stands at its ends. Latencies in ns; percentages of the link's bits."""

    generation: int
    lanes: int
    max_payload: int
    max_read: int
    dllp_percent: float
    up_ns: float
    down_ns: float

    @property
    def bits_per_ns(self) -> float:
        """Bits that transaction-layer packets may use."""
        rate, coded = RATES[self.generation]
        return rate / 1000 * self.lanes * coded / 130 * (1 - self.dllp_percent / 100)


@frozen(kw_only=True)
class Translation:
    """What translating costs: an IOTLB hit, a walk apart from its reads, one of them, and walks at a time."""

    hit_ns: float
    walk_ns: float
    read_ns: float
    walkers: int


@frozen(kw_only=True)
class Landing:
    """Where DMA lands: the last-level cache, of which writes allocate only some ways, and memory behind it."""

    cache_bytes: int
    ways: int
    write_ways: int
    cache_ns: float
    dram_ns: float

    @property
    def sets(self) -> int:
        """A power of two, so that no more lines are held than fit."""
        return 1 << max(0, (self.cache_bytes // LINE_BYTES // self.ways).bit_length() - 1)


def engine(
    link: Link,
    translation: Translation,
    landing: Landing,
    *,
    tags: int,
    gap_ns: float,
    no_snoop: bool = False,
    requests: int = BY_UNIT,
) -> Words:
    """An idle engine: shape (DMA_WORDS,), int64. ValueError for more walkers or tags than there is room for.

    `tags`: operations in flight. `gap_ns`: time between two operations that the device's own engine needs.
    `no_snoop`: its packets ask that caches are not looked at, which holds unless its translation wants that.
    `requests`: BY_UNIT, BY_DEVICE or FORGED, as they say who has translated their addresses.
    """
    if not 1 <= translation.walkers <= MOST_WALKERS:
        raise ValueError(f"walkers can be 1 to {MOST_WALKERS}")
    if not 1 <= tags <= MOST_TAGS:
        raise ValueError(f"tags can be 1 to {MOST_TAGS}")
    d = np.zeros(DMA_WORDS, np.int64)
    values = {
        BYTE_FS: 8e6 / link.bits_per_ns, MAX_PAYLOAD: link.max_payload, MAX_READ: link.max_read, TAGS: tags,
        GAP: gap_ns * PS_PER_NS, UP_LATENCY: link.up_ns * PS_PER_NS, DOWN_LATENCY: link.down_ns * PS_PER_NS,
        HIT_LATENCY: translation.hit_ns * PS_PER_NS, WALK_LATENCY: translation.walk_ns * PS_PER_NS,
        WALK_READ: translation.read_ns * PS_PER_NS, WALKERS: translation.walkers,
        CACHE_LATENCY: landing.cache_ns * PS_PER_NS, DRAM_LATENCY: landing.dram_ns * PS_PER_NS,
        LINE_SETS: landing.sets, LINE_WAYS: landing.ways, WRITE_WAYS: landing.write_ways, NO_SNOOP: no_snoop,
        REQUESTS: requests,
    }  # fmt: skip
    for slot, value in values.items():
        d[slot] = round(value)
    return d


def line_tags(landing: Landing) -> npt.NDArray[np.int32]:
    """Tags of the lines that the last-level cache holds, empty: shape (sets × ways,), int32."""
    return np.zeros(landing.sets * landing.ways, np.int32)


@frozen(kw_only=True)
class Job:
    """Operations of one kind. `random`: places in any order, or one after the other; `translates`: through the unit.

    `own`: host addresses that are the device's own, first and end. `stride`: least distance between two places.
    """

    source: int
    base: int
    window: int
    bytes: int
    count: int
    writes: bool
    random: bool
    seed: int
    translates: bool
    own: tuple[int, int]
    stride: int = LINE_BYTES


def give(d: Words, job: Job) -> None:
    """Let an idle engine do this job."""
    unit = max(-(-job.bytes // LINE_BYTES) * LINE_BYTES, job.stride)
    if not 1 <= job.bytes <= 4096 or job.window < unit:
        raise ValueError("an operation has 1 to 4096 bytes, and fits into its window")
    slots = {
        SOURCE: job.source, BASE: job.base, WINDOW: job.window, BYTES: job.bytes, WRITES: job.writes,
        RANDOM: job.random, COUNT: job.count, UNIT: unit, TRANSLATES: job.translates, OWN_FIRST: job.own[0],
        OWN_END: job.own[1], RANDOM_STATE: job.seed % 2147483646 + 1,
    }  # fmt: skip
    for slot, value in slots.items():
        d[slot] = int(value)


def warm(lines: npt.NDArray[np.int32], landing: Landing, first: int, end: int) -> None:
    """Let the last-level cache hold the last lines of a range of host addresses that a CPU has just written."""
    sets, ways = landing.sets, landing.ways
    line = np.arange(max(first // LINE_BYTES, end // LINE_BYTES - sets * ways), end // LINE_BYTES)
    way = (line - line[0]) // sets if len(line) else line
    lines[(line & (sets - 1)) * ways + way] = (line // sets + 1).astype(np.int32)
