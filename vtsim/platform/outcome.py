"""What a machine leaves behind when it stops: its statistics as plain numbers, one block per owner."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

import numpy as np
from attrs import field, frozen

from vtsim.base.errors import ModelError
from vtsim.cpu import accounts as k
from vtsim.cpu import ops as o
from vtsim.cpu.engine import Engine
from vtsim.cpu.profile import Profile
from vtsim.guest.replay.exits import ReplayedExits
from vtsim.platform.spec import Scenario

BUCKETS: Final = k.BUCKETS_PER_OCTAVE


@frozen(kw_only=True)
class ExitCounts:
    """The exits of one reason: sums, and {cycles: exits} from the histogram (bucket floors)."""

    reason: int
    count: int
    cycles: int
    exclusive_cycles: int
    longest: int
    distribution: Mapping[int, int]


@frozen(kw_only=True)
class OwnerCounts:
    """Everything charged to one owner.

    `cycles`: [believed ring 0, 3][R0 R3 N0 N3][activity]. `instructions`: by privilege state. `emulated`: by ring.
    `deprivileged`: of the instructions in R3, those of a kernel.
    """

    name: str
    cycles: tuple[tuple[tuple[int, ...], ...], ...]
    instructions: tuple[int, ...]
    emulated: tuple[int, ...]
    counters: Mapping[str, int]
    exits: tuple[ExitCounts, ...]
    deprivileged: int = 0


@frozen(kw_only=True)
class VmOutcome:
    """How one VM ended. `elapsed`: cycles from the start of the run to its end. `stopped`: why, if not by finishing.

    `memory`: what the hypervisor counted of its memory; `shadow`: of its shadow pages, where it has them.
    """

    name: str
    cpu: int
    elapsed: int
    stopped: str | None
    memory: Mapping[str, int] = field(factory=dict)
    shadow: Mapping[str, int] | None = None


@frozen(kw_only=True)
class PageRequestOutcome:
    """What a device asked of pages. `waiting`: groups that have no answer at the end; `most`: requests outstanding.

    `held`: times that an operation found its page missing; `failed`: operations that got none. `wait_sum`, `wait_most`:
    cycles from the first request of a group to its response. `flood…`: requests for what its driver never allowed, of
    these those that are to be answered, and how they were.
    """

    requests: int
    groups: int
    succeeded: int
    refused: int
    waiting: int
    unexpected: int
    most: int
    held: int
    failed: int
    wait_sum: int
    wait_most: int
    flood: int
    flood_owed: int
    flood_succeeded: int
    flood_refused: int


@frozen(kw_only=True)
class DriverOutcome:
    """What a guest's driver and its device did: words that the kernel counted, descriptors, interrupts.

    `hostile_through`: writes that went through after the buffer was unmapped; `window`: longest such time, in cycles.
    """

    counts: Mapping[str, int]
    posted: int
    done: int
    refused: int
    interrupts: int
    interrupts_blocked: int
    interrupts_merged: int
    hostile_writes: int
    hostile_through: int
    window: int
    pages: PageRequestOutcome | None = None


@frozen(kw_only=True)
class DmaOutcome:
    """What one device did. Times in ns; `latencies`: {ns: operations} in buckets."""

    name: str
    operations: int
    aborted: int
    bytes: int
    elapsed_ns: float
    latency_sum_ns: float
    longest_ns: float
    latencies: dict[int, int]
    walks: int
    walk_reads: int
    walk_wait_ns: float
    line_hits: int
    line_misses: int
    escaped: int
    tlb_hits: int
    translations: int
    driver: DriverOutcome | None = None


@frozen(kw_only=True)
class Outcome:
    """One finished run of one machine."""

    scenario: Scenario
    profile: Profile
    owners: Mapping[str, OwnerCounts]
    vms: tuple[VmOutcome, ...]
    elapsed: int
    wall_s: float
    partial: bool
    approximations: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    replayed: ReplayedExits | None = None
    memory: Mapping[str, int] = field(factory=dict)  # what is of the host, and of no single VM
    dma: tuple[DmaOutcome, ...] = ()
    iommu: Mapping[str, int] | None = None
    monitor: Mapping[str, int] | None = None
    translations: Mapping[str, int] | None = None
    hypercalls: Mapping[str, Mapping[str, int]] | None = None
    clusters: Mapping[str, int] | None = None
    software: Mapping[str, int] | None = None


def sums(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Add mappings of the same names up."""
    total: dict[str, int] = {}
    for each in counts:
        for name, count in each.items():
            total[name] = total.get(name, 0) + count
    return total


def bucket_floor(bucket: int) -> int:
    """The smallest duration that falls into a histogram bucket; the inverse of `histogram_bucket`."""
    if bucket < 2 * BUCKETS:
        return bucket
    octave = bucket // BUCKETS - 1
    return (bucket - octave * BUCKETS) << octave


def owner_counts(engine: Engine, name: str, at: int) -> OwnerCounts:
    """Read one owner's block."""
    a = engine.arena
    cycles = a[at : at + 2 * k.RING_STRIDE].reshape(2, 4, o.ACTIVITY_SLOTS)
    first = at + k.OWN_COUNTERS
    exits = []
    for reason in range(k.REASONS):
        line = a[at + k.OWN_EXITS + reason * k.EXIT_WORDS :][: k.EXIT_WORDS]
        if line[k.EXIT_COUNT]:
            buckets = a[at + k.OWN_HISTOGRAMS + reason * k.HISTOGRAM_BUCKETS :][: k.HISTOGRAM_BUCKETS]
            exits.append(
                ExitCounts(
                    reason=reason,
                    count=int(line[k.EXIT_COUNT]),
                    cycles=int(line[k.EXIT_TOTAL]),
                    exclusive_cycles=int(line[k.EXIT_EXCLUSIVE]),
                    longest=int(line[k.EXIT_LONGEST]),
                    distribution={bucket_floor(int(n)): int(buckets[n]) for n in np.flatnonzero(buckets)},
                )
            )
    return OwnerCounts(
        name=name,
        cycles=tuple(tuple(tuple(int(n) for n in row) for row in ring) for ring in cycles),
        instructions=tuple(int(n) for n in a[at + k.OWN_INSTRUCTIONS :][:4]),
        emulated=tuple(int(n) for n in a[at + k.OWN_EMULATED :][:2]),
        counters={row[0]: int(a[first + n]) for n, row in enumerate(k.COUNTERS)},
        exits=tuple(exits),
        deprivileged=int(a[at + k.OWN_DEPRIVILEGED]),
    )


LEVELS: Final = ("l1d", "l2", "l3", "dram")


def served(counters: Mapping[str, int], dimension: str) -> int:
    """References of one dimension that some level answered."""
    return sum(counters[f"{dimension}_{level}"] for level in LEVELS)


def check_laws(owner: OwnerCounts) -> None:
    """What must hold of every finished run, whatever it simulated."""
    n = owner.counters
    laws = {
        "every walk ends exactly once": n["walks"]
        == n["walks_completed"]
        + n["walks_faulted"]
        + n["walks_violated"]
        + n["walks_misconfigured"]
        + n["walks_abandoned"],
        "every guest reference is served once": n["guest_references"] == served(n, "guest"),
        "every EPT reference is served once": n["ept_references"] == served(n, "ept"),
        "a walk starts at the root or in one walk cache": n["pwc_hits"] <= n["walks"]
        and n["ept_pwc_hits"] <= n["nested_tlb_misses"],
        "exits are distributed as often as counted": all(sum(e.distribution.values()) == e.count for e in owner.exits),
        "no count is negative": min(n.values()) >= 0 and min(owner.instructions) >= 0,
        "a page fault is an exception": n["page_faults"] <= n["exceptions"],
        "a page fault that exits ends in one way": n["true_page_faults"]
        + n["hidden_page_faults"]
        + n["unprotecting_page_faults"]
        <= n["page_fault_exits"],
    }
    for law, holds in laws.items():
        if not holds:
            raise ModelError(f"{owner.name}: {law} is false", n)
