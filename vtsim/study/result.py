"""What a run gives back: one frozen object, whose JSON form is a documented, versioned interface.

Keys may be added within a schema version; a key that goes, or changes its meaning, needs the next version.
"""

# ruff: noqa: RUF009  (`key` declares an attrs field)

from __future__ import annotations

import io
import json
from array import array
from collections.abc import Mapping
from contextlib import ExitStack
from math import sqrt
from pathlib import Path
from typing import Any, Final

import attrs
from attrs import frozen

from vtsim.base import trace as trace_file
from vtsim.base.errors import ConfigError
from vtsim.base.whole_file import replacing
from vtsim.study.json_object import key, plain, reference_tables, structure

SCHEMA_VERSION: Final = 1
WRITTEN: Final = ("result.json", "resolved.yaml", "trace.npz")

CyclesBy = Mapping[str, Mapping[str, int]]  # {privilege: {activity: cycles}}
DramBy = Mapping[str, Mapping[str, int]]  # {purpose: {node: accesses}}


# fmt: off
@frozen(kw_only=True)
class Hypervisor:
    """Who runs the guests, and how."""

    technique: str   = key("", "how the guest kernel is virtualized; `native` means no hypervisor")
    personality: str = key("", "whose hypervisor programs run; empty when native")
    paging: str      = key("", "`ept`, `shadow`, `agile` or `direct-pv`; `software` where no "
                           "instruction of guests runs directly; `none` natively")


@frozen(kw_only=True)
class Monitor:
    """What a monitor counted that runs guest kernels in ring 3, over all its guests."""

    traps: int        = key("traps", "privileged operations of guests that faulted to the monitor")
    system_calls: int = key("calls", "system calls that went through the monitor to the guest's kernel")
    injected: int     = key("events", "exceptions and interrupts that it delivered to guests")
    switches: int     = key("switches", "between the address spaces of a guest's kernel and of its processes")
    world_switches: int = key("switches", "to the world of the host and back, where the monitor is hosted", default=0)


@frozen(kw_only=True)
class Hypercalls:
    """What paravirtual guests asked their hypervisor for, in ring 3, and how often it called them back."""

    calls: Mapping[str, int]    = key("calls", "{hypercall: count}; `multi` is a batch of requests")
    requests: Mapping[str, int] = key("requests", "{kind: count} of what was asked about page tables, batched or not")
    refusals: int               = key("requests", "that were refused, hypercalls included")
    events_sent: int            = key("events", "that became pending on a port")
    upcalls: int                = key("upcalls", "that kernels were called back because events were pending")
    blocks: int                 = key("times", "that a kernel waited for an event")
    lock_waits: int             = key("looks", "in vain at the lock of a VM's tables, of several vCPUs", default=0)
    remote_flushes: int         = key("times", "that a vCPU dropped translations because another one asked", default=0)
    kicks: int                  = key("interrupts", "from one CPU of the hypervisor to another", default=0)
    stops: Mapping[str, int]    = key("stops", "{reason: count} of traced processes, by ptrace", factory=dict)


@frozen(kw_only=True)
class Translations:
    """What a translator did: a binary translator of guest kernels, or a dynamic one of all that guests execute."""

    blocks: int    = key("blocks", "translated, again after an eviction included")
    taken: int     = key("instructions", "read and translated")
    made: int      = key("instructions", "written into the cache for them")
    identical: int = key("instructions", "of those taken, translated into themselves")
    in_line: int   = key("instructions", "of those taken, translated into others that need no monitor")
    call_outs: int = key("instructions", "of those taken, translated into a call to the monitor")
    flushes: int   = key("times", "the cache was full and emptied")
    evicted: int   = key("blocks", "dropped then")
    adapted: int   = key("instructions", "that faulted again and again, translated anew into a call to the monitor")
    chained: int   = key("exits", "of blocks, made to lead to another block without the monitor")
    lookups: int   = key("look-ups", "of the targets of returns and indirect branches")
    misses: int    = key("look-ups", "of these, that had to ask the monitor")


@frozen(kw_only=True)
class Clusters:
    """What exit clusters did, over all VMs."""

    exits_saved: int  = key("exits", "that clusters made unnecessary")
    instructions: int = key("instructions", "executed in them in the guests' place, exiting ones included")


@frozen(kw_only=True)
class SoftwareCpu:
    """What a program counted that executes every instruction of its guests itself, over all guests."""

    lookups: int = key("look-ups", "of its software TLB: one for each access of a guest, and where RIP left its page")
    misses: int  = key("walks", "of these, that walked the guest's tables")
    fills: int   = key("walks", "of these, that ended in a translation; the others are page faults of the guest")
    flushes: int = key("times", "the software TLB was emptied")
    decodes: int = key("", "instructions decoded by an interpreter, blocks translated by a translator")


@frozen(kw_only=True)
class Efficiency:
    """Share of guest instructions that executed without the hypervisor; null where none were executed."""

    overall: float | None = key("share", "of all guest instructions")
    ring0: float | None   = key("share", "of those that the guest believes to execute in ring 0")
    ring3: float | None   = key("share", "of those that the guest believes to execute in ring 3")


@frozen(kw_only=True)
class GuestRing:
    """Guest instructions of one believed ring."""

    executed: int = key("instructions", "retired by the guest's program, emulated ones included")
    emulated: int = key("instructions", "of these, completed by the hypervisor in the guest's place")


@frozen(kw_only=True)
class GuestInstructions:
    """What efficiency is computed from."""

    ring0: GuestRing = key("", "in ring 0 as the guest believes")
    ring3: GuestRing = key("", "in ring 3 as the guest believes")

    def efficiency(self) -> Efficiency:
        """The shares that were executed and not emulated."""
        rings = (self.ring0, self.ring3)
        executed, emulated = sum(ring.executed for ring in rings), sum(ring.emulated for ring in rings)
        return Efficiency(
            overall=_share(executed - emulated, executed),
            ring0=_share(self.ring0.executed - self.ring0.emulated, self.ring0.executed),
            ring3=_share(self.ring3.executed - self.ring3.emulated, self.ring3.executed),
        )


@frozen(kw_only=True)
class Cycles:
    """Where the time went; every cycle of every logical CPU has exactly one name."""

    total: int   = key("cycles", "sum of `by`, over all logical CPUs")
    elapsed: int = key("cycles", "of the clock, from the first operation to the last")
    by: CyclesBy = key("cycles", "{privilege R0 R3 N0 N3: {activity: n}}")
    by_owner: Mapping[str, Mapping[str, CyclesBy]] = key(
        "cycles", "{owner host, L0, L1 … or guest: {believed ring: {privilege: {activity: n}}}}")


@frozen(kw_only=True)
class Exit:
    """All VM exits of one basic exit reason."""

    reason: str             = key("", "as Linux and perf print it")
    count: int              = key("exits", "that occurred")
    cycles: int             = key("cycles", "from exit to re-entry, with what they caused below (inclusive)")
    exclusive_cycles: int   = key("cycles", "the same without nested exits")
    mean_cycles: float      = key("cycles", "inclusive, per exit")
    min_cycles: int         = key("cycles", "shortest, as exact as the percentiles")
    p50_cycles: int         = key("cycles", "median; exact below 128 cycles, within 1.6 % above")
    p99_cycles: int         = key("cycles", "99th percentile, as exact as the median")
    max_cycles: int         = key("cycles", "longest")
    stddev_cycles: float    = key("cycles", "standard deviation of single exits, from the same distribution")
    share: float            = key("share", "of the exclusive cycles of all exits; the shares sum to 1")
    share_of_run: float     = key("share", "inclusive cycles, of `cycles.total`")

    @classmethod
    def measured(
        cls,
        reason: str,
        distribution: Mapping[int, int],
        *,
        cycles: int,
        exclusive_cycles: int,
        max_cycles: int,
        cycles_of_exits: int,
        cycles_of_run: int,
    ) -> Exit:
        """The exits of one reason, at least one, from sums and {cycles: exits that took as many}."""
        count = sum(distribution.values())
        mean = cycles / count
        spread = sum(exits * (value - mean) ** 2 for value, exits in distribution.items())
        return cls(
            reason=reason,
            count=count,
            cycles=cycles,
            exclusive_cycles=exclusive_cycles,
            mean_cycles=mean,
            min_cycles=min(distribution),
            p50_cycles=percentile(distribution, 50),
            p99_cycles=percentile(distribution, 99),
            max_cycles=max_cycles,
            stddev_cycles=sqrt(spread / count),
            share=exclusive_cycles / cycles_of_exits,
            share_of_run=cycles / cycles_of_run,
        )


@frozen(kw_only=True)
class ServedBy:
    """Which level of the memory hierarchy answered."""

    l1d: int  = key("references", "answered by the L1 data cache")
    l2: int   = key("references", "answered by the L2 cache")
    l3: int   = key("references", "answered by the L3 cache")
    dram: int = key("references", "answered by memory")


@frozen(kw_only=True)
class StartedAt:
    """Where translations of one dimension began: what a cache of translations knew made no reference."""

    nested_tlb: int = key("walks", "nowhere: the nested TLB held the translation; always 0 in the guest's dimension")
    walk_cache: int = key("walks", "below the root, at a table that a paging-structure cache held")
    root: int       = key("walks", "at the root")


@frozen(kw_only=True)
class WalkDimension:
    """Paging-structure references of one dimension."""

    references: int       = key("references", "entries of this dimension's tables that were read")
    served_by: ServedBy   = key("references", "by level of the memory hierarchy")
    started_at: StartedAt = key("walks", "how each translation of this dimension began")


@frozen(kw_only=True)
class Walks:
    """Page walks in both dimensions together: a TLB miss starts one."""

    count: int                 = key("walks", "started; each ends in exactly one of the five ways below")
    completed: int             = key("walks", "that ended in a translation")
    faults: int                = key("walks", "that ended in a page fault")
    violations: int            = key("walks", "that ended in an EPT violation")
    misconfigurations: int     = key("walks", "that ended in an EPT misconfiguration")
    abandoned: int             = key("walks", "of wrong paths that would have faulted or set a flag")
    wrong_path: int            = key("walks", "of all, those that began on the wrong path of a mispredicted branch")
    cycles: int                = key("cycles", "latency of walks, overlapped or not")
    references: int            = key("references", "paging-structure entries read")
    references_per_walk: float = key("references", "mean; 0 without walks")
    served_by: ServedBy        = key("references", "by level, both dimensions")
    guest: WalkDimension       = key("", "the guest's (natively: the only) tables")
    ept: WalkDimension         = key("", "the EPT tables")


@frozen(kw_only=True)
class Tlb:
    """Look-ups in TLBs and walk caches."""

    accesses: int          = key("lookups", "data accesses, each of which looks into the first-level TLBs")
    dtlb_misses: int       = key("lookups", "data accesses that missed the first-level TLBs")
    itlb_misses: int       = key("lookups", "code translations that missed the first-level TLBs")
    stlb_hits: int         = key("lookups", "of these two, found in the second-level TLB")
    pwc_hits: int          = key("walks", "shortened by a paging-structure cache of the guest dimension")
    ept_pwc_hits: int      = key("walks", "nested ones shortened by an EPT paging-structure cache")
    entry_hits: int        = key("entries", "of the guest's tables, found in a walk cache that holds entries")
    ept_entry_hits: int    = key("entries", "of the EPT tables, found in such a cache")
    nested_tlb_hits: int   = key("lookups", "guest-physical addresses translated without an EPT walk")
    nested_tlb_misses: int = key("lookups", "guest-physical addresses translated by an EPT walk")
    dropped: int           = key("entries", "removed by invalidations")


@frozen(kw_only=True)
class CodeServedBy:
    """Which level answered the instruction fetches that missed the L1 instruction cache."""

    l2: int   = key("lines", "answered by the L2 cache")
    l3: int   = key("lines", "answered by the L3 cache")
    dram: int = key("lines", "answered by memory")


@frozen(kw_only=True)
class Caches:
    """Hits per level: data, page-table lines and code apart."""

    data: ServedBy     = key("", "data accesses of programs")
    tables: ServedBy   = key("", "paging-structure lines of both dimensions")
    code: CodeServedBy = key("", "code lines")
    pairs: int         = key("lines", "brought from memory into L2 by prefetchers", default=0)


@frozen(kw_only=True)
class Measured:
    """What is measured of a whole run, of its native baseline, and of each VM."""

    efficiency: Efficiency          = key("", "shares executed without the hypervisor")
    slowdown: float | None          = key("ratio", "elapsed cycles against native; null unless both did all their work")
    cycles: Cycles                  = key("", "where the time went")
    instructions: Mapping[str, int] = key("instructions", "{privilege R0 R3 N0 N3: n}, of any program")
    guest: GuestInstructions        = key("", "guest instructions executed and emulated")
    exits: tuple[Exit, ...]         = key("", "by reason, most cycles first")
    walks: Walks                    = key("", "page walks")
    tlb: Tlb                        = key("", "TLBs and walk caches")
    caches: Caches                  = key("", "the memory hierarchy")
    events: Mapping[str, int]       = key("events", "{event: n}: exceptions, interrupts, entries …")
    dram: DramBy                    = key("accesses", "{purpose data, guest_tables, ept_tables, code: {node local, "
                                          "remote: n}}: what memory answered", factory=dict)
    host_memory: Mapping[str, int]  = key("", "{count: n}: what the hypervisor did with the memory of its VMs (below); "
                                          "what it did not is left out", factory=dict)


@frozen(kw_only=True)
class ShadowPaging:
    """What became of page faults of a VM on shadow tables, and of its shadow pages. KVM's own counts in brackets."""

    page_faults: int           = key("exits", "for page faults; each is of exactly one of the four kinds below")
    true_page_faults: int      = key("exits", "for accesses that the guest's own tables refuse: reflected into it")
    hidden_page_faults: int    = key("exits", "for accesses that its tables allow: a shadow entry was missing or too "
                                     "strict and was filled; the guest sees nothing of them")
    unprotecting_page_faults: int = key("exits", "for writes to tables by instructions that write no tables: the page "
                                        "is none any more, and its shadow pages go")
    other_page_faults: int     = key("exits", "for stores to its tables that were emulated, accesses to devices, and "
                                     "accesses that were tried again")
    table_writes: int          = key("stores", "to tables of the guest that were emulated (mmu_pte_write)")
    entries_filled: int        = key("entries", "of leaf tables, for an access; not each one ends its page fault")
    entries_prefetched: int    = key("entries", "of leaf tables, beside these")
    pages_made: int            = key("pages", "of shadow tables (mmu_cache_miss)")
    pages_reused: int          = key("pages", "found again when a table or a root was needed")
    pages_zapped: int          = key("pages", "given up, for whatever reason (mmu_shadow_zapped)")
    pages_flooded: int         = key("pages", "of these, because the guest wrote to their table often (mmu_flooded)")
    pages_recycled: int        = key("pages", "of these, because few were free (mmu_recycled)")
    tables_unsynchronized: int = key("times", "a leaf table went out of sync: the guest may write it")
    tables_synchronized: int   = key("times", "one was held against the guest's again")
    tables_nested: int         = key("times", "a table of the guest became nested, with agile paging")
    tables_shadowed: int       = key("times", "one became shadowed again, with agile paging")


@frozen(kw_only=True)
class VmResult(Measured):
    """What is measured of one VM."""

    cpu: int = key("", "logical CPU that its vCPU was pinned to, the first of several")
    isa: str = key("", "instruction set of the guest; the machine's is x86", default="x86")
    shadow: ShadowPaging | None = key("", "what shadow or agile paging under VT-x counted; else null", default=None)


@frozen(kw_only=True)
class Run(Measured):
    """What is measured of a machine."""

    simulated_s: float = key("s", "`cycles.elapsed` at the profile's clock")


@frozen(kw_only=True)
class Parameter:
    """One profile or personality value that the run used."""

    value: float | str | bool = key("", "as used, overrides included")
    unit: str                 = key("", "of the value")
    source: str               = key("", "where it comes from")
    confidence: str           = key("", "`measured`, `vendor`, `paper`, `estimated`; `set` by the scenario")


@frozen(kw_only=True)
class Stated:
    """The range that sources give for a cost, in its unit."""

    low: int    = key("", "the least figure")
    high: int   = key("", "the largest")
    source: str = key("", "which figures")


@frozen(kw_only=True)
class Parameters:
    """The numbers behind the numbers."""

    confidence: Mapping[str, int]    = key("values", "{confidence: how many of the values below have it}")
    values: Mapping[str, Parameter]  = key("", "{dotted name: value with its source}")
    ranges: Mapping[str, Stated] = key(
        "", "{dotted name: range of its sources}, of costs that state one", default=attrs.Factory(dict)
    )


@frozen(kw_only=True)
class ReplayExit:
    """One exit reason: what the model did and what real KVM did with the same recorded guest."""

    reason: str                     = key("", "as Linux and perf print it")
    predicted: int                  = key("exits", "of the simulated hypervisor, without what is left out")
    recorded: int                   = key("exits", "of the real one, without what is left out")
    deviation_percent: float | None = key("%", "predicted against recorded; null when not comparable")
    left_out_predicted: int         = key("exits", "that depend on host timing, in the model")
    left_out_recorded: int          = key("exits", "that depend on host timing, on the real machine")


@frozen(kw_only=True)
class Replay:
    """A recorded guest beside its truth."""

    trace: str                    = key("", "name of the recorded guest")
    recorded_on: str              = key("", "the hypervisor and settings that gave the recorded counts")
    exits: tuple[ReplayExit, ...] = key("", "by reason")


@frozen(kw_only=True)
class Latency:
    """How long operations took, from the first packet to the last byte."""

    mean_ns: float = key("ns", "mean")
    p50_ns: int    = key("ns", "median, of buckets of 4 ns")
    p99_ns: int    = key("ns", "99th percentile, of buckets of 4 ns")
    max_ns: float  = key("ns", "longest")


@frozen(kw_only=True)
class PageRequests:
    """What a device asked of pages, and how its driver's kernel served it."""

    requests: int            = key("requests", "for a page that was not mapped, or mapped by then")
    groups: int              = key("groups", "of these, each of which is answered once")
    succeeded: int           = key("groups", "answered with success, by the kernel or because the queue was full")
    refused: int             = key("groups", "answered as invalid: an address that was not allowed")
    waiting: int             = key("groups", "that had no answer when the run ended")
    unexpected: int          = key("responses", "to no group that waited")
    most: int                = key("requests", "that were outstanding at a time")
    held: int                = key("operations", "that found their page missing, each time that one did")
    failed: int              = key("operations", "that moved nothing, because their page was refused")
    wait_mean_ns: float      = key("ns", "mean time from the first request of a group to its response")
    wait_max_ns: float       = key("ns", "longest")
    handled: int             = key("requests", "that the kernel read from the queue")
    handled_cycles: float    = key("cycles", "that one took in the kernel, with the response of its group")
    mapped: int              = key("pages", "that the kernel mapped for them")
    invalid: int             = key("requests", "of those that it read, for addresses that were not allowed")
    flood: int               = key("requests", "of a hostile device, for what its driver never allowed")
    flood_owed: int          = key("requests", "of these, that are to be answered: the last of their group")
    flood_refused: int       = key("requests", "of these, answered as invalid")
    flood_succeeded: int     = key("requests", "of these, answered by the unit because its queue was full")


@frozen(kw_only=True)
class Driver:
    """What a guest's kernel did to drive a device. Cycles of one are means, and hold one RDTSC."""

    descriptors: int            = key("descriptors", "that the device was given")
    done: int                   = key("descriptors", "that it reported as done")
    refused: int                = key("descriptors", "of these, with an access that the remapping unit blocked")
    elapsed_cycles: int         = key("cycles", "from the first map to the last unmap")
    cycles_per_buffer: float    = key("cycles", "of these, for each descriptor that was done")
    maps: int                   = key("maps", "of a buffer, or of a group")
    map_cycles: float           = key("cycles", "that one took")
    unmaps: int                 = key("unmaps", "of a buffer, or of a group")
    unmap_cycles: float         = key("cycles", "that one took, with its invalidation")
    invalidations: int          = key("invalidations", "that the kernel asked for, each with a wait")
    invalidation_cycles: float  = key("cycles", "that one took")
    invalidation_share: float   = key("", "of the elapsed cycles, those of invalidations")
    device_invalidations: int   = key("invalidations", "of the device-TLB that follow these, each with a wait")
    timeouts: int               = key("errors", "of the queue that the kernel cleared: a device did not answer in time")
    given_up: int               = key("devices", "1 if the kernel blocked the device, which answered no invalidation")
    flushes: int                = key("flushes", "of a whole domain, for what was deferred")
    interrupts: int             = key("interrupts", "that the device sent")
    interrupts_blocked: int     = key("interrupts", "of these, that interrupt remapping blocked")
    interrupts_merged: int      = key("interrupts", "of these, that found their vector pending at a CPU")
    interrupts_handled: int     = key("interrupts", "that the kernel handled")
    hostile_writes: int         = key("writes", "of a hostile device, to addresses whose buffers were done")
    hostile_through: int        = key("writes", "of these, that went through after the unmap")
    window_ns: float            = key("ns", "longest time from the last allowed to the last of these")
    pages: PageRequests | None  = key("", "of a device that asks for pages; else null", default=None)


@frozen(kw_only=True)
class Dma:
    """What one device did that reads and writes memory by itself."""

    name: str            = key("", "of the device")
    operations: int      = key("operations", "that ended; each ends once")
    aborted: int         = key("operations", "that the remapping unit blocked")
    escaped: int         = key("packets", "that landed outside of the device's own memory")
    gbps: float          = key("Gb/s", "payload over the time until the last operation, or that its driver took")
    latency: Latency     = key("", "of operations")
    walks: int           = key("walks", "of translation tables that packets waited for")
    walk_reads: int      = key("reads", "of entries in these walks")
    walk_wait_ns: float  = key("ns", "that packets waited for a free walker, all together")
    line_hits: int       = key("lines", "found in the last-level cache, or written into it")
    line_misses: int     = key("lines", "that came from memory")
    tlb_hits: int        = key("packets", "whose translation the device's own TLB held")
    translations: int    = key("requests", "for translations, which the device then keeps")
    driver: Driver | None = key("", "the guest that drives it; null for a device that acts by itself", default=None)


@frozen(kw_only=True)
class Rate:
    """How fast the simulation itself was; differs from run to run."""

    instructions_per_s: float = key("instructions/s", "simulated, per second of wall time")
    accesses_per_s: float     = key("accesses/s", "simulated memory accesses, per second of wall time")
    exits_per_s: float        = key("exits/s", "simulated VM exits, per second of wall time")
    wall_s: float             = key("s", "wall time of the run without its baseline")


@frozen(kw_only=True)
class Result(Run):
    """One run of one scenario."""

    schema_version: int             = key("", "of this object", default=SCHEMA_VERSION)
    vtsim_version: str              = key("", "that made it")
    scenario: str                   = key("", "its name")
    description: str                = key("", "what the scenario says of itself")
    seed: int                       = key("", "of every random stream")
    profile: str                    = key("", "name of the CPU profile")
    profile_digest: str             = key("", "of all its values, overrides included")
    clock_hz: int                   = key("Hz", "the clock that cycles count")
    hypervisor: Hypervisor          = key("", "who ran the guests")
    vms: Mapping[str, VmResult]     = key("", "{VM: the same per VM}")
    native: Run | None              = key("", "the native baseline; null when it was not run")
    rate: Rate                      = key("", "of the simulation itself")
    stopped: Mapping[str, str]      = key("", "{VM: why it ended before its work was done}")
    partial: bool                   = key("", "true when the run was interrupted")
    approximations: tuple[str, ...] = key("", "sentences: what this run simplified")
    notes: tuple[str, ...]          = key("", "sentences: settings that change nothing here, and what keeps "
                                          "guests from their work", default=())
    parameters: Parameters          = key("", "values used, with sources")
    replay: Replay | None           = key("", "recorded against predicted exits", default=None)
    dma: tuple[Dma, ...]            = key("", "devices that did DMA", default=())
    iommu: Mapping[str, int] | None = key("", "{what: n} of the remapping unit; null without one", default=None)
    monitor: Monitor | None         = key("", "what a monitor of deprivileged guests counted", default=None)
    hypercalls: Hypercalls | None   = key("", "what paravirtual guests asked for in ring 3", default=None)
    clusters: Clusters | None       = key("", "what exit clusters did; null where they are off", default=None)
    translations: Translations | None = key("", "what a translator of guest code did", default=None)
    software: SoftwareCpu | None    = key("", "what an interpreter or dynamic translator counted", default=None)
# fmt: on

    def to_dict(self) -> dict[str, Any]:
        """The JSON object, what identifies the run first."""
        own = [item.name for item in attrs.fields(type(self)) if not item.inherited]
        everything: dict[str, Any] = plain(self)
        return {name: everything[name] for name in dict.fromkeys([*own, *everything])}

    def to_json(self) -> str:
        """The JSON object as text, without a final newline."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Result:
        """The result that `to_dict` wrote."""
        version = data.get("schema_version")
        if version != SCHEMA_VERSION:
            raise ConfigError(f"schema_version {version!r} is not {SCHEMA_VERSION}", field="result")
        return structure(cls, data, "result")

    def against(self, native: Result) -> Result:
        """This result with its native baseline, and the slowdowns that follow; work left undone has none."""
        undone = {**self.stopped, **native.stopped}
        vms = {
            name: attrs.evolve(vm, slowdown=_share(vm.cycles.elapsed, native.vms[name].cycles.elapsed))
            for name, vm in self.vms.items()
            if name not in undone
        }
        baseline = Run(**{item.name: getattr(native, item.name) for item in attrs.fields(Run)})
        slowdown = None if undone else _share(self.cycles.elapsed, native.cycles.elapsed)
        return attrs.evolve(self, native=baseline, vms={**self.vms, **vms}, slowdown=slowdown)

    def write(self, directory: Path, resolved: str, trace: array[int] | None = None) -> tuple[Path, ...]:
        """Write result.json, resolved.yaml and trace.npz; only a whole result replaces an older one."""
        result, scenario, events = WRITTEN
        contents = {scenario: resolved.encode()}
        if trace is not None:
            packed = io.BytesIO()
            trace_file.save(packed, trace)
            contents[events] = packed.getvalue()
        contents[result] = (self.to_json() + "\n").encode()
        directory.mkdir(parents=True, exist_ok=True)
        with ExitStack() as whole:
            for name in reversed(contents):  # they are put in place last first: the result when all else is there
                whole.enter_context(replacing(directory / name)).write_bytes(contents[name])
        if trace is None:
            (directory / events).unlink(missing_ok=True)  # an older run's
        return tuple(directory / name for name in contents)


def percentile(distribution: Mapping[int, int], percent: int) -> int:
    """The smallest value that at least `percent` of a distribution {value: count} do not exceed."""
    total, seen = sum(distribution.values()), 0
    for value in sorted(distribution):
        seen += distribution[value]
        if seen * 100 >= total * percent:
            return value
    raise ValueError("an empty distribution has no percentiles")


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


INTRODUCTION: Final = f"""# The result of a run

What `vtsim run --json` prints, `result.json` holds and `vtsim.run(...)` returns. The keys below are
attributes of the same names; `Result.to_dict()` and `Result.from_dict()` go between the two.

This is schema version {SCHEMA_VERSION}. Keys may be added within a version; a key that goes, or changes its
meaning, makes the next. For the same scenario, seed and version of vtsim everything is the same but `rate`.

This page is generated from `vtsim/study/result.py`.

"""


def reference() -> str:
    """The reference page of the JSON object."""
    from vtsim.vmm.layout import STATISTICS, VCPU_WORDS

    meanings = {name: meaning for name, _, meaning in VCPU_WORDS}
    rows = [f"| `{name.lower()}` | {meanings[name]} |" for name in STATISTICS]
    title = "\n## Counts of `host_memory`\n\nOver all vCPUs of a VM.\n\n| key | meaning |\n|---|---|\n"
    return INTRODUCTION + reference_tables(Result) + title + "\n".join(rows) + "\n"
