"""Where cycles, instructions, exits and counts are charged: the statistics block of an owner.

An owner is the host, a hypervisor or a guest. Every cycle is charged to (owner × the ring the owner believes in ×
physical privilege state × activity); the sums equal the clock.
"""

from __future__ import annotations

from typing import Final

from vtsim.cpu.ops import ACTIVITY_SLOTS

# fmt: off
OWN_CYCLES: Final = 0                     # [believed ring 0, 3][R0 R3 N0 N3][activity]
RING_STRIDE: Final = 4 * ACTIVITY_SLOTS
OWN_INSTRUCTIONS: Final = 2 * RING_STRIDE           # by privilege state
OWN_EMULATED: Final = OWN_INSTRUCTIONS + 4          # instructions the monitor executed instead, by ring
OWN_DEPRIVILEGED: Final = OWN_EMULATED + 2          # of those in R3, the instructions of a guest's kernel
OWN_COUNTERS: Final = OWN_EMULATED + 4

COUNTERS: Final = (
    # name                 unit          meaning
    ("walks",              "walks",      "page walks started"),
    ("walks_completed",    "walks",      "page walks that ended in a translation"),
    ("walks_faulted",      "walks",      "page walks that ended in a page fault"),
    ("walks_violated",     "walks",      "page walks that ended in an EPT violation"),
    ("walks_misconfigured", "walks",     "page walks that ended in an EPT misconfiguration"),
    ("guest_references",   "references", "guest (or native) paging-structure entries read by walks"),
    ("ept_references",     "references", "EPT paging-structure entries read by walks"),
    ("guest_l1d",          "references", "guest references served by L1D"),
    ("guest_l2",           "references", "guest references served by L2"),
    ("guest_l3",           "references", "guest references served by L3"),
    ("guest_dram",         "references", "guest references served by DRAM"),
    ("guest_dram_remote",  "references", "of these, by DRAM of another node"),
    ("ept_l1d",            "references", "EPT references served by L1D"),
    ("ept_l2",             "references", "EPT references served by L2"),
    ("ept_l3",             "references", "EPT references served by L3"),
    ("ept_dram",           "references", "EPT references served by DRAM"),
    ("ept_dram_remote",    "references", "of these, by DRAM of another node"),
    ("walk_cycles",        "cycles",     "latency of walks, overlapped or not"),
    ("pwc_hits",           "hits",       "walks shortened by a paging-structure cache of the guest dimension"),
    ("ept_pwc_hits",       "hits",       "nested translations shortened by an EPT paging-structure cache"),
    ("nested_tlb_hits",    "hits",       "guest-physical addresses translated without an EPT walk"),
    ("nested_tlb_misses",  "misses",     "guest-physical addresses translated by an EPT walk"),
    ("accesses",           "accesses",   "data accesses"),
    ("dtlb_misses",        "misses",     "data accesses that missed the first-level TLBs"),
    ("stlb_hits",          "hits",       "data or code translations found in the second-level TLB"),
    ("itlb_misses",        "misses",     "code translations that missed the first-level TLBs"),
    ("data_l2",            "accesses",   "data accesses served by L2"),
    ("data_l3",            "accesses",   "data accesses served by L3"),
    ("data_dram",          "accesses",   "data accesses served by DRAM"),
    ("data_dram_remote",   "accesses",   "of these, by DRAM of another node"),
    ("fetch_l2",           "lines",      "code lines served by L2"),
    ("fetch_l3",           "lines",      "code lines served by L3"),
    ("fetch_dram",         "lines",      "code lines served by DRAM"),
    ("fetch_dram_remote",  "lines",      "of these, by DRAM of another node"),
    ("exceptions",         "events",     "exceptions delivered through the IDT"),
    ("page_faults",        "events",     "page faults delivered through the IDT"),
    ("interrupts",         "events",     "external interrupts delivered through the IDT"),
    ("injections",         "events",     "events injected by VM entry"),
    ("syscalls",           "events",     "SYSCALL and SYSENTER executed"),
    ("device_accesses",    "accesses",   "memory accesses that a device answered"),
    ("port_accesses",      "accesses",   "IN and OUT that a device answered"),
    ("dirty_assists",      "assists",    "walks made only to set a dirty flag"),
    ("translations_dropped", "entries",  "translations removed by invalidations"),
    ("entries",            "entries",    "VM entries"),
    ("halts",              "events",     "HLT executed"),
    ("guest_entry_hits",   "hits",       "entries of the guest's tables that a walk cache of entries held"),
    ("ept_entry_hits",     "hits",       "entries of the EPT tables that a walk cache of entries held"),
    ("lines_from_other_cpus", "lines",   "of what L3 served: lines that the caches of one other CPU alone held"),
    ("lines_taken_from_other_cpus", "lines", "lines that a store took from the caches of other CPUs"),
    ("mispredictions",     "branches",   "decisions of look-ups that were mispredicted"),
    ("wrong_loads",        "loads",      "loads that wrong paths began"),
    ("wrong_walks",        "walks",      "of the page walks started, those of wrong paths"),
    ("walks_abandoned",    "walks",      "of these, those that would have faulted or set a flag"),
    ("pair_dram",          "lines",      "lines that prefetchers brought from DRAM into L2"),
    ("page_fault_exits",   "exits",      "VM exits for page faults"),
    ("true_page_faults",   "exits",      "of these, those of accesses that the guest's own tables refuse"),
    ("hidden_page_faults", "exits",      "of these, those that its hypervisor answered by a shadow entry"),
    ("unprotecting_page_faults", "exits", "of these, those after which a page was no table of the guest any more"),
)
(WALKS, WALKS_COMPLETED, WALKS_FAULTED, WALKS_VIOLATED, WALKS_MISCONFIGURED, GUEST_REFERENCES, EPT_REFERENCES,
 GUEST_L1D, GUEST_L2, GUEST_L3, GUEST_DRAM, GUEST_DRAM_REMOTE, EPT_L1D, EPT_L2, EPT_L3, EPT_DRAM, EPT_DRAM_REMOTE,
 WALK_CYCLES, PWC_HITS, EPT_PWC_HITS, NESTED_TLB_HITS, NESTED_TLB_MISSES,
 ACCESSES, DTLB_MISSES, STLB_HITS, ITLB_MISSES, DATA_L2, DATA_L3, DATA_DRAM, DATA_DRAM_REMOTE,
 FETCH_L2, FETCH_L3, FETCH_DRAM, FETCH_DRAM_REMOTE,
 EXCEPTIONS, PAGE_FAULTS, INTERRUPTS, INJECTIONS, SYSCALLS, DEVICE_ACCESSES, PORT_ACCESSES, DIRTY_ASSISTS,
 TRANSLATIONS_DROPPED, ENTRIES, HALTS,
 GUEST_ENTRY_HITS, EPT_ENTRY_HITS, LINES_FROM_OTHERS, LINES_TAKEN, MISPREDICTIONS, WRONG_LOADS, WRONG_WALKS,
 WALKS_ABANDONED, PAIR_DRAM, PAGE_FAULT_EXITS, TRUE_PAGE_FAULTS, HIDDEN_PAGE_FAULTS,
 UNPROTECTING_PAGE_FAULTS) = range(OWN_COUNTERS, OWN_COUNTERS + len(COUNTERS))

OWN_EXITS: Final = OWN_COUNTERS + 64
REASONS: Final = 96                                 # basic exit reasons
EXIT_WORDS: Final = 4                               # count, inclusive cycles, exclusive cycles, longest
EXIT_COUNT, EXIT_TOTAL, EXIT_EXCLUSIVE, EXIT_LONGEST = range(EXIT_WORDS)
OWN_HISTOGRAMS: Final = OWN_EXITS + REASONS * EXIT_WORDS
BUCKETS_PER_OCTAVE: Final = 64                      # a percentile is exact below 128 cycles, within 1.6 % above
HISTOGRAM_BUCKETS: Final = 64 * 36
OWNER_WORDS: Final = OWN_HISTOGRAMS + REASONS * HISTOGRAM_BUCKETS
# fmt: on
