"""One remapping unit as a vector: slots, register file, messages, caches; and how a unit with given caches is laid out.

A unit `u` is one int64 vector of its own beside the arena of simulated memory: kernels take `(u, a)`, and copying `u`
saves the unit. Slots below `REGISTERS` are the parts that have names here. Then follow the 64-bit words of the register
file with their access masks, the messages that wait to be sent, and the caches, as many entries as `Caches` says.

VT-d: "Translation Caching in Hardware".
"""

from __future__ import annotations

from typing import Final

import attrs
import numpy as np
import numpy.typing as npt

from vtsim.base.memory import signed
from vtsim.iommu import spec

# fmt: off
# --- the answer to the last request ---------------------------------------------------------------------------------
# STATUS is below; RIGHTS: READ, WRITE, EXECUTE of spec; SHIFT: 12, 21 or 30, and from bit TYPE_SHIFT on the memory type
# and 1, or 0 where types do not count; READS_…: memory reads per structure;
# FLAG_WRITES: updates of accessed and dirty flags; SERVED: a bit for each cache that answered.
(STATUS, HPA, RIGHTS, SHIFT, SNOOP, REASON, RECORDED, SERVED, READS_ROOT, READS_CONTEXT, READS_DIRECTORY, READS_PASID,
 READS_FIRST, READS_SECOND, FLAG_WRITES, ANSWER) = range(16)
SHIFT_ALONE, TYPE_SHIFT = 0xFF, 8
(COMPLETED, BLOCKED, INTERRUPT, DROPPED) = range(4)        # STATUS
STATUSES: Final = ("completed", "blocked", "interrupt request", "dropped")
READS: Final = {"root": READS_ROOT, "context": READS_CONTEXT, "PASID directory": READS_DIRECTORY, "PASID": READS_PASID,
                "first-level": READS_FIRST, "second-level": READS_SECOND}

# --- the request in work and what its entries say ---------------------------------------------------------------------
(SID, PASID, ADDRESS, SIZE, ACCESS, AT, HAS_PASID, SCALABLE, FPD_SEEN, DOMAIN, TYPE, CONTEXT_0, CONTEXT_1, PASID_0,
 PASID_1, PASID_2, TAG_MORE_NOW, WALK_RIGHTS, WALK_HPA, WALK_SHIFT, LEAF_AT, LEAF_ENTRY, PENDING_COUNT) = range(16, 39)
WALK_PAT: Final = 39           # which entry of the PAT the page's entry chooses

# --- the unit between requests --------------------------------------------------------------------------------------
# HOST_RESERVED: address bits beyond the host address width. ROOT_TABLE, INTERRUPT_TABLE: RTADDR and IRTA as SRTP and
# SIRTP took them. IOTLB_SIZES: which of the three IOTLBs hold anything. COMPRESS: one pending record for each source.
(HOST_WIDTH, HOST_RESERVED, FAULT_REGISTERS, CLOCK, FAULT_NEXT, DEVICE_PENDING, MESSAGE_COUNT, STEPS, STEP_COUNT,
 IOTLB_SIZES, ROOT_TABLE, INTERRUPT_TABLE, COMPRESS, MESSAGES_TAKEN) = range(48, 62)
# PROTECTING: protected memory regions are enabled. HELD_WORDS, VIRTUAL_PASIDS: where these areas begin, 0 for none.
PROTECTING, HELD_WORDS, VIRTUAL_PASIDS = 62, 63, 64

# --- the answer to the last interrupt request, and what interrupt remapping counts -----------------------------------
# INTERRUPT_MESSAGE, INTERRUPT_DATA: address and data to send. INTERRUPT_NOTIFIES: a posted interrupt has a message.
# INTERRUPT_MERGED: its vector was posted already.
(INTERRUPT_STATUS, INTERRUPT_INDEX, INTERRUPT_MESSAGE, INTERRUPT_DATA, INTERRUPT_NOTIFIES, INTERRUPT_MERGED,
 INTERRUPT_READS) = range(176, 183)
(INTERRUPT_REMAPPED, INTERRUPT_POSTED, INTERRUPT_COMPATIBLE, INTERRUPT_BLOCKED) = range(4)  # INTERRUPT_STATUS
INTERRUPT_STATUSES: Final = ("remapped", "posted", "passed on", "blocked")
(N_INTERRUPT_REQUESTS, N_INTERRUPTS_REMAPPED, N_INTERRUPTS_POSTED, N_INTERRUPTS_COMPATIBLE, N_INTERRUPT_HITS,
 N_INTERRUPT_MISSES, N_NOTIFICATIONS) = range(184, 191)

# --- statistics; `LAWS` says what holds between them ---------------------------------------------------
(N_REQUESTS, N_COMPLETED, N_BLOCKED, N_INTERRUPTS, N_DROPPED, N_FAULTS, N_RECORDED, N_OVERFLOWED, N_SILENCED,
 N_IOTLB_HITS, N_IOTLB_MISSES, N_WALKS, N_READS, N_FLAG_WRITES, N_CONTEXT_HITS, N_CONTEXT_MISSES, N_PASID_HITS,
 N_PASID_MISSES, N_STRUCTURE_HITS, N_DESCRIPTORS, N_INVALIDATED, N_MESSAGES, N_COMPRESSED,
 N_PAGE_REQUESTS, N_REFUSED, N_INTERRUPTS_BLOCKED, N_FLUSHES, N_HELD, N_QUEUED, N_UNQUEUED, N_PAGE_OVERFLOWS,
 N_RESPONSES) = range(72, 104)
STATISTICS: Final = {
    "requests": N_REQUESTS, "completed": N_COMPLETED, "blocked": N_BLOCKED, "interrupts": N_INTERRUPTS,
    "dropped": N_DROPPED, "faults": N_FAULTS, "faults recorded": N_RECORDED, "faults overflowed": N_OVERFLOWED,
    "faults silenced": N_SILENCED, "faults compressed": N_COMPRESSED, "IOTLB hits": N_IOTLB_HITS,
    "IOTLB misses": N_IOTLB_MISSES, "walks": N_WALKS, "memory reads": N_READS, "flag writes": N_FLAG_WRITES,
    "context hits": N_CONTEXT_HITS, "context misses": N_CONTEXT_MISSES, "PASID hits": N_PASID_HITS,
    "PASID misses": N_PASID_MISSES, "paging-structure hits": N_STRUCTURE_HITS, "descriptors": N_DESCRIPTORS,
    "entries invalidated": N_INVALIDATED, "messages": N_MESSAGES, "page requests": N_PAGE_REQUESTS,
    "page requests refused": N_REFUSED, "page requests queued": N_QUEUED, "page requests dropped": N_UNQUEUED,
    "page request overflows": N_PAGE_OVERFLOWS, "page group responses": N_RESPONSES,
    "interrupt requests": N_INTERRUPT_REQUESTS, "interrupt requests remapped": N_INTERRUPTS_REMAPPED, "interrupt requests posted": N_INTERRUPTS_POSTED,
    "interrupt requests passed on": N_INTERRUPTS_COMPATIBLE, "interrupt requests blocked": N_INTERRUPTS_BLOCKED,
    "interrupt entry hits": N_INTERRUPT_HITS, "interrupt entry misses": N_INTERRUPT_MISSES,
    "notifications": N_NOTIFICATIONS, "write buffer flushes": N_FLUSHES, "reads of held words": N_HELD,
}

# name: the two sides of an equation between statistics
LAWS: Final[dict[str, tuple[tuple[str, ...], tuple[str, ...]]]] = {
    "every request ends exactly once": (("requests",), ("completed", "blocked", "interrupts", "dropped")),
    "whatever is blocked is a fault": (
        ("blocked", "page requests refused", "interrupt requests blocked"), ("faults",)),
    "every fault is accounted for": (
        ("faults",), ("faults recorded", "faults overflowed", "faults silenced", "faults compressed")),
    "every interrupt request ends exactly once": (
        ("interrupt requests",),
        ("interrupt requests remapped", "interrupt requests posted", "interrupt requests passed on",
         "interrupt requests blocked")),
    "every walk begins with a miss": (("walks",), ("IOTLB misses",)),
    "every page request ends exactly once": (
        ("page requests",), ("page requests queued", "page requests dropped", "page requests refused")),
}

# --- caches: BASE, SETS, WAYS; an entry is TAG, TAG_MORE, STAMP (0: empty), and words of its own -------------------------
CACHE: Final = 112
CACHE_WORDS: Final = 4
(CONTEXTS, PASIDS, IOTLB_4K, IOTLB_2M, IOTLB_1G, FIRST_2, FIRST_3, FIRST_4, FIRST_5, SECOND_2, SECOND_3, SECOND_4,
 SECOND_5, INTERRUPT_ENTRIES) = range(CACHE, CACHE + 14 * CACHE_WORDS, CACHE_WORDS)
SETS, WAYS = 1, 2
CACHES: Final = {
    "context": CONTEXTS, "pasid": PASIDS, "iotlb_4k": IOTLB_4K, "iotlb_2m": IOTLB_2M, "iotlb_1g": IOTLB_1G,
    "first_2": FIRST_2, "first_3": FIRST_3, "first_4": FIRST_4, "first_5": FIRST_5, "second_2": SECOND_2,
    "second_3": SECOND_3, "second_4": SECOND_4, "second_5": SECOND_5, "interrupt": INTERRUPT_ENTRIES,
}
CACHE_TITLES: Final = {
    CONTEXTS: "context cache", PASIDS: "PASID cache", IOTLB_4K: "IOTLB (4 KiB)", IOTLB_2M: "IOTLB (2 MiB)",
    IOTLB_1G: "IOTLB (1 GiB)", FIRST_2: "first-level PDE cache", FIRST_3: "first-level PDPE cache",
    FIRST_4: "first-level PML4E cache", FIRST_5: "first-level PML5E cache", SECOND_2: "second-level PDE cache",
    SECOND_3: "second-level PDPE cache", SECOND_4: "second-level PML4E cache", SECOND_5: "second-level PML5E cache",
    INTERRUPT_ENTRIES: "interrupt entry cache",
}
TAG, TAG_MORE, STAMP, DATA = range(4)
ENTRY_WORDS: Final = 8         # one host line: three of tag and age, five of data

REGISTERS: Final = 256
REGISTER_WORDS: Final = spec.REGISTER_BYTES // 8
WRITABLE: Final = REGISTERS + REGISTER_WORDS          # bits that a write changes
CLEARED: Final = WRITABLE + REGISTER_WORDS            # bits that writing 1 clears
HIDDEN: Final = CLEARED + REGISTER_WORDS              # bits that read as zero
RING: Final = HIDDEN + REGISTER_WORDS                 # messages: kind, then address and data, or what its kind says
RING_ENTRIES, RING_WORDS = 64, 4
(FAULT_EVENT, INVALIDATION_EVENT, PAGE_REQUEST_EVENT, DEVICE_INVALIDATION, PAGE_RESPONSE) = range(1, 6)
STEP_AREA: Final = RING + RING_ENTRIES * RING_WORDS   # what `vtsim iommu walk` shows: structure, level, address, value
MOST_STEPS, STEP_WORDS = 64, 4
PENDING: Final = STEP_AREA + MOST_STEPS * STEP_WORDS  # what is done only when the translation succeeds: flags, entries
MOST_PENDING, PENDING_WORDS = 96, 5
DEVICES: Final = PENDING + MOST_PENDING * PENDING_WORDS  # device-TLB invalidations that wait: SID, and whom they burden
MOST_DEVICE_PENDING, DEVICE_WORDS = 64, 2
CACHE_AREA: Final = DEVICES + MOST_DEVICE_PENDING * DEVICE_WORDS
# behind the caches, where a unit has them: words of tables as the unit saw them last (address and 1, word), and a
# bitmap of the PASIDs that virtual commands have given
HELD_ENTRIES: Final = 512
MOST_VIRTUAL_PASIDS: Final = 1024

# --- a device's own vector: the slots that its cache needs are those of a unit ------------------------------------------
DEVICE_SID, DEVICE_PRI = 0, 1
DEVICE_CACHE: Final = CONTEXTS
DEVICE_ENTRIES: Final = DEVICE_CACHE + CACHE_WORDS
# fmt: on
# kinds of steps: an entry that was read, a cache that answered, a flag that was set
(
    STEP_ROOT,
    STEP_CONTEXT,
    STEP_DIRECTORY,
    STEP_PASID,
    STEP_FIRST,
    STEP_SECOND,
    STEP_CACHE,
    STEP_FLAGS,
    STEP_IRTE,
    STEP_DESCRIPTOR,
) = range(1, 11)


@attrs.frozen
class Cache:
    """Sets (a power of two) and ways of one cache; with 0 of either there is no such cache."""

    sets: int
    ways: int


NONE: Final = Cache(0, 0)


@attrs.frozen(kw_only=True)
class Caches:
    """The geometry of every cache of a unit, each a part that may be left out; replacement is least recently used."""

    context: Cache = Cache(8, 8)
    pasid: Cache = Cache(8, 8)
    iotlb_4k: Cache = Cache(16, 4)
    iotlb_2m: Cache = Cache(8, 4)
    iotlb_1g: Cache = Cache(1, 4)
    first_2: Cache = Cache(4, 4)
    first_3: Cache = Cache(1, 4)
    first_4: Cache = Cache(1, 2)
    first_5: Cache = Cache(1, 1)
    second_2: Cache = Cache(4, 4)
    second_3: Cache = Cache(1, 4)
    second_4: Cache = Cache(1, 2)
    second_5: Cache = Cache(1, 1)
    interrupt: Cache = Cache(8, 8)

    @classmethod
    def none(cls) -> Caches:
        """A unit that keeps nothing."""
        return cls(**{name: NONE for name in CACHES})


def build(
    *, capability: int, extended: int, host_width: int = 46, caches: Caches | None = None
) -> npt.NDArray[np.int64]:
    """A unit after reset: shape (words,), int64. `capability`, `extended`: words of CAP and ECAP.

    FRO, NFR and IRO must lead where `spec` has its registers, and what is not offered be 0; ValueError otherwise.
    """
    caches = caches or Caches()
    faults = (capability >> spec.CAP_NFR & 0xFF) + 1
    if (capability >> spec.CAP_FRO & 0x3FF) * 16 != spec.FAULT_OFFSET or faults > spec.MOST_FAULT_REGISTERS:
        raise ValueError(
            f"fault recording registers stand at {spec.FAULT_OFFSET:#x}, up to {spec.MOST_FAULT_REGISTERS}"
        )
    if (extended >> spec.ECAP_IRO & 0x3FF) * 16 != spec.IOTLB_OFFSET:
        raise ValueError(f"IOTLB registers stand at {spec.IOTLB_OFFSET:#x}")
    for row, word in (("CAP", capability), ("ECAP", extended)):
        for field in spec.register(row).fields:
            if field.name in spec.NOT_OFFERED[row] and word & field.mask:
                raise ValueError(f"{row} says {field.name}, which units do not have here")
    words = sum(each.sets * each.ways * ENTRY_WORDS for each in attrs.astuple(caches, recurse=False))
    held = 2 * HELD_ENTRIES if capability & spec.CAP_RWBF else 0
    given = MOST_VIRTUAL_PASIDS // 64 if extended & spec.ECAP_VCS else 0
    u = np.zeros(CACHE_AREA + words + held + given, np.int64)
    u[HELD_WORDS] = CACHE_AREA + words if held else 0
    u[VIRTUAL_PASIDS] = CACHE_AREA + words + held if given else 0
    u[HOST_WIDTH] = host_width
    u[HOST_RESERVED] = signed(~((1 << host_width) - 1))
    u[FAULT_REGISTERS] = faults
    at = CACHE_AREA
    for name, slot in CACHES.items():
        each: Cache = getattr(caches, name)
        if each.sets & (each.sets - 1):
            raise ValueError(f"{name} has {each.sets} sets, not a power of two")
        u[slot], u[slot + SETS], u[slot + WAYS] = at, each.sets, each.ways
        at += each.sets * each.ways * ENTRY_WORDS
    _lay_registers(u, faults, capability, extended)
    u[REGISTERS + spec.CAP // 8] = signed(capability)
    u[REGISTERS + spec.ECAP // 8] = signed(extended)
    return u


def build_device(*, sid: int, tlb: Cache, pri: bool) -> npt.NDArray[np.int64]:
    """A device with an empty device-TLB: shape (words,), int64."""
    t = np.zeros(DEVICE_ENTRIES + tlb.sets * tlb.ways * ENTRY_WORDS, np.int64)
    t[DEVICE_SID], t[DEVICE_PRI] = sid, pri
    t[DEVICE_CACHE], t[DEVICE_CACHE + SETS], t[DEVICE_CACHE + WAYS] = DEVICE_ENTRIES, tlb.sets, tlb.ways
    return t


def _lay_registers(u: npt.NDArray[np.int64], faults: int, capability: int, extended: int) -> None:
    """Access masks of every register that the unit has, and the values they have after reset."""
    masks = {spec.RW: WRITABLE, spec.WO: HIDDEN, spec.RW1C: CLEARED}

    def add(base: int, offset: int, mask: int) -> None:
        at = base + offset // 8
        u[at] = signed(int(u[at]) | mask << 8 * (offset % 8))

    words = {"CAP": capability, "ECAP": extended}
    has = {field.name for row, word in words.items() for field in spec.register(row).fields if word & field.mask}
    rows = [row for row in spec.REGISTERS if not row.needs or has & set(row.needs.split())]
    fields = [(row.offset, each) for row in rows for each in row.fields if not each.needs or each.needs in has]
    fields += [(spec.FAULT_OFFSET + 16 * n + 8, each) for n in range(faults) for each in spec.FAULT_RECORD_HIGH]
    for offset, each in fields:
        if each.access != spec.RO:
            add(masks[each.access], offset, each.mask)
            if each.access == spec.WO:
                add(WRITABLE, offset, each.mask)
    present = {row.name for row in rows}
    for name in {"FECTL", "IECTL", "PECTL"} & present:
        add(REGISTERS, spec.register(name).offset, spec.IM)
    add(REGISTERS, spec.VER, spec.VERSION)
    if "MTRRCAP" in present:
        add(REGISTERS, spec.MTRRCAP, spec.MTRRCAP_VALUE)
    if "VCCAP" in present:
        add(REGISTERS, spec.VCCAP, spec.VCCAP_PAS)
