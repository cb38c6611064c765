"""An engine that does one operation after the other as its device asks, instead of a job."""

from __future__ import annotations

from vtsim.base.jit import Arena, Record, Records, Tags, kernel
from vtsim.iommu import dma as g
from vtsim.iommu.kernels.dma_engine import begins_at, end_next, issue


@kernel
def operate(
    d: Record,
    tlb: Record,
    shared: Record,
    lines: Tags,
    u: Record,
    a: Arena,
    now: int,
    address: int,
    size: int,
    writes: bool,
    since: int,
) -> int:
    """Begin an operation of `size` bytes at `address`, at `now` in ps: 0, or when it can begin if that is later.

    Negative: its page is not there, which the device knows at this time. `since`: when it was tried first.
    """
    begins = begins_at(d)
    if begins > now:
        return begins
    d[g.BASE] = address
    d[g.WINDOW] = 1
    d[g.UNIT] = 1
    d[g.BYTES] = size
    d[g.WRITES] = 1 if writes else 0
    held = issue(d, tlb, shared, lines, u, a, now, since)
    d[g.NEXT_ISSUE] = now + d[g.GAP]
    if held == 0:
        d[g.ISSUED] += 1
    return held


@kernel
def all_ended(d: Record) -> int:
    """Let all operations end that have begun: when the last did, in ps."""
    while d[g.ENDED] < d[g.ISSUED]:
        end_next(d)
    return d[g.LAST_END]


@kernel
def last_landing(engines: Records) -> int:
    """When everything has reached memory that engines, a row each, have sent, in ps."""
    latest = 0
    for number in range(len(engines)):
        latest = max(latest, engines[number][g.LAST_READY])
    return latest
