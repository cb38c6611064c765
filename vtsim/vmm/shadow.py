"""The pool of shadow pages of a VM, laid into the host's memory; what a personality may choose about it.

SDM: "Memory Virtualization".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
from attrs import frozen

from vtsim.base import memory as mem
from vtsim.base.memory import BLOCK, gfn_ranges
from vtsim.cpu.profile import Profile
from vtsim.ept import shadow as d
from vtsim.ept import spec as e
from vtsim.guest.machine_view import Start
from vtsim.vmm import layout as at
from vtsim.vmm.host import Host
from vtsim.vmm.registry import Parameter

LEAST_PAGES: Final = 64
PERMILLE: Final = 1000
CR0_WP, CR0_PG, CR4_PAE, CR4_PCIDE, CR4_SMEP, EFER_NX = 1 << 16, 1 << 31, 1 << 5, 1 << 17, 1 << 20, 1 << 11
CR4_LA57, CR4_SMAP, CR4_PSE = 1 << 12, 1 << 21, 1 << 4
EFER_LME, EFER_LMA = 1 << 8, 1 << 10
# fmt: off
# bits of CR0 and CR4 that the guest must not change without the monitor: they decide how its tables are read
CR0_WATCHED: Final = CR0_PG | CR0_WP | 1
CR4_WATCHED: Final = 1 << 4 | 1 << 5 | 1 << 7 | CR4_LA57 | CR4_PCIDE | CR4_SMEP | CR4_SMAP | 1 << 22
#                    PSE      PAE      PGE      LA57      PCIDE     SMEP       SMAP      PKE
CR0_FORCED: Final = CR0_PG | CR0_WP | 1 << 5 | 1        # in the processor, whatever the guest believes
# fmt: on


def _parameter(value: int, unit: str, source: str, meaning: str) -> Parameter:
    return Parameter(value=value, unit=unit, source=source, confidence="vendor", meaning=meaning)


AGILE: Final = "AGILE16: two writes in a fixed interval; its length is this project's choice"
TEXTBOOK: Final = "the simplest monitor: no guess, no delay"
# words that each vCPU has for itself where they share a pool, and that are as the first one's to begin with
OF_EACH: Final = (
    "MODE", "CR3", "DIRECT", "GUEST", "TABLES", "NOTES", "RECORDS", "PAGES", "FRAMES", "FRAME_COUNT", "LARGE",
    "LARGE_NX", "BUCKETS", "PREFETCH", "OUT_OF_SYNC", "SWITCHES", "EPT", "EPT_TABLES", "RESERVED", "VM",
)  # fmt: skip
# fmt: off
KVM_PARAMETERS: Final[Mapping[str, Parameter]] = {
    "shadow_permille": _parameter(20, "shadow pages for 1000 pages of guest memory, at least 64",
                                  "KVM: KVM_PERMILLE_MMU_PAGES, KVM_MIN_ALLOC_MMU_PAGES", "size of the pool"),
    "agile_writes":    _parameter(2, "writes to a table of the guest in an interval", AGILE,
                                  "so many let it be nested, with agile paging"),
    "agile_interval":  _parameter(1000, "microseconds", AGILE,
                                  "tables that were not written so long are shadowed again"),
    "shadow_prefetch": _parameter(8, "entries, a power of two", "KVM: PTE_PREFETCH_NUM",
                                  "leaf entries filled together"),
    "out_of_sync":     _parameter(1, "flag, 0 or 1", "KVM: mmu_try_to_unsync_pages",
                                  "leaf tables are writable after the first write, until a flush of the TLB"),
}
PLAIN_PARAMETERS: Final[Mapping[str, Parameter]] = {
    "shadow_permille": _parameter(20, "shadow pages for 1000 pages of guest memory, at least 64",
                                  "as the kvm personality's", "size of the pool"),
    "agile_writes":    _parameter(2, "writes to a table of the guest in an interval", AGILE,
                                  "so many let it be nested, with agile paging"),
    "agile_interval":  _parameter(1000, "microseconds", AGILE,
                                  "tables that were not written so long are shadowed again"),
    "shadow_prefetch": _parameter(1, "entries, a power of two", TEXTBOOK, "leaf entries filled together"),
    "out_of_sync":     _parameter(0, "flag, 0 or 1", TEXTBOOK,
                                  "leaf tables are writable after the first write, until a flush of the TLB"),
}
# fmt: on


@frozen(kw_only=True)
class ShadowPool:
    """Where the parts of a VM's pool stand: frames of the host."""

    block: int
    tables: int
    notes: int
    records: int
    frames: int
    buckets: int
    pages: int
    frame_count: int
    switches: int | None = None  # with agile paging

    @property
    def address(self) -> int:
        """The linear address of the pool's words."""
        return at.frame_address(self.block)


def shadow_pages(memory: int, permille: int) -> int:
    """How many shadow pages a VM with so much memory gets."""
    return max(LEAST_PAGES, memory // mem.PAGE_BYTES * permille // PERMILLE)


def _areas(pages: int, frame_count: int) -> tuple[int, ...]:
    """Frames of tables, notes, records, words of guest frames and of 2 MiB, buckets."""
    words = (pages * d.RECORD_BYTES // 8, frame_count + frame_count // BLOCK + 1, d.BUCKET_COUNT)
    return (pages, pages, *(-(-count // mem.PAGE_WORDS) for count in words))


def switch_frames(frame_count: int) -> int:
    """Frames of the words that agile paging has for each guest frame."""
    return -(-frame_count // mem.PAGE_WORDS)


def shadow_frames(memory: int, permille: int, frame_count: int) -> int:
    """How many frames of the host the pool of a VM takes at most."""
    return 1 + switch_frames(frame_count) + sum(_areas(shadow_pages(memory, permille), frame_count))


def frame_limit(memory: int, slots_end: int) -> int:
    """Guest frames that a pool has words for: up to the end of memory, and of the last memory slot."""
    return max(gfn_ranges(memory)[-1][1], -(-slots_end // mem.PAGE_BYTES))


def reserve_pool(host: Host, memory: int, permille: int, slots_end: int, *, agile: bool = False) -> ShadowPool:
    """Take the frames of a pool from the host's own memory."""
    pages, count = shadow_pages(memory, permille), frame_limit(memory, slots_end)
    block = host.reserve()
    tables, notes, records, frames, buckets = (host.reserve(area) for area in _areas(pages, count))
    return ShadowPool(
        block=block, tables=tables, notes=notes, records=records, frames=frames, buckets=buckets, pages=pages,
        frame_count=count, switches=host.reserve(switch_frames(count)) if agile else None,
    )  # fmt: skip


def mode_of(start: Start) -> int:
    """The paging mode in which a guest starts."""
    paging, long = start.cr0 & CR0_PG, start.efer & EFER_LME
    legacy = paging and not long
    flags = (
        (d.MODE_WP, start.cr0 & CR0_WP),
        (d.MODE_NX, start.efer & EFER_NX),
        (d.MODE_SMEP, start.cr4 & CR4_SMEP),
        (d.MODE_SMAP, start.cr4 & CR4_SMAP),
        (d.MODE_LA57, start.cr4 & CR4_LA57),
        (d.MODE_PAGING, paging),
        (d.MODE_LEGACY, not long),
        (d.MODE_PAE, legacy and start.cr4 & CR4_PAE),
        (d.MODE_32BIT, legacy and not start.cr4 & CR4_PAE),
        (d.MODE_PSE, legacy and not start.cr4 & CR4_PAE and start.cr4 & CR4_PSE),
        (d.MODE_PAE_ROOT, start.protected),
    )
    return sum(mode for mode, present in flags if present)


def fill_pool(
    host: Host,
    pool: ShadowPool,
    start: Start,
    profile: Profile,
    parameters: Mapping[str, int],
    slots: int,
    root: int,
    guest: int = at.USER_RAM,
    ept: int = 0,
    ept_tables: int = 0,
    pdptes: Sequence[int] = (0, 0, 0, 0),
    shared: bool = False,
) -> int:
    """Write the pool's words, all pages free but the root; the host-physical address of the root.

    `slots` is the linear address of two words, the memory slots and how many; `root` the frame of the root through
    which guest memory is seen from the linear address `guest` on, `ept` that of the root of EPT, with agile paging,
    and `ept_tables` the linear address of the words that give frames for its tables; `pdptes` what a guest starts with
    that has PAE paging. A pool that is `shared` has words for each vCPU (see `join_pool`).
    """
    mode = mode_of(start) | (d.MODE_AGILE if pool.switches is not None else 0)
    records = np.zeros((pool.pages, d.RECORD_BYTES // 8), np.int64)
    records[1:, d.RECORD["NEXT"] // 8] = np.arange(3, pool.pages + 2)
    records[-1, d.RECORD["NEXT"] // 8] = 0
    direct = not mode & d.MODE_PAGING or bool(mode & d.NARROW)
    frame = 0 if direct else (start.cr3 & e.ADDRESS) // mem.PAGE_BYTES
    top = 3 if mode & d.MODE_PAE_ROOT else 5 if mode & d.MODE_LA57 else 4
    role = top | d.ALL_RIGHTS << d.ROLE_RIGHTS | (mode & d.ROLE_MODES) << d.ROLE_MODE | (d.ROLE_DIRECT if direct else 0)
    records[0, d.RECORD["KEY"] // 8] = frame << d.KEY_FRAME | role
    records[0, d.RECORD["STATE"] // 8] = d.IN_USE
    records[0, d.RECORD["ROOTS"] // 8] = int(shared)
    host.store_many(pool.records, records.ravel())
    bucket = (frame ^ frame >> 12) & (d.BUCKET_COUNT - 1)
    host.store(host.address(pool.buckets) + 8 * bucket, 1)
    if not direct:
        host.store(host.address(pool.frames) + 8 * frame, 1 << d.UPPER_TABLES)
        host.store(host.address(pool.frames) + 8 * (pool.frame_count + frame // BLOCK), 1 << d.TABLES_INSIDE)
    host.words(pool.tables, mem.TABLE)
    words = {
        "MODE": mode, "ROOT": 1, "HELD": int(shared), "CR3": start.cr3,
        "LOADED": start.cr3 | (mode & ~d.OF_NO_ROOT) << d.MODE_SHIFT,
        "DIRECT": host.direct, "GUEST": guest,
        "TABLES": pool.tables << 12, "NOTES": host.address(pool.notes),
        "RECORDS": host.address(pool.records), "PAGES": pool.pages, "FREE": 2, "FREE_COUNT": pool.pages - 1,
        "FRAMES": host.address(pool.frames), "FRAME_COUNT": pool.frame_count,
        "LARGE": host.address(pool.frames) + 8 * pool.frame_count,
        "LARGE_NX": int(profile.features.nx and parameters.get("nx_huge_pages", 0) > 0),
        "BUCKETS": host.address(pool.buckets), "PREFETCH": parameters["shadow_prefetch"],
        "OUT_OF_SYNC": parameters["out_of_sync"] if pool.switches is None else 0,
        "SWITCHES": host.address(pool.switches or 0), "EPT": ept << 12, "EPT_TABLES": ept_tables,
        "HOST_ROOT": root << 12, "SLOTS": slots, "VM": host.address(pool.block) if shared else 0,
        "RESERVED": ((1 << 52) - 1) & ~((1 << profile.physical_address_bits) - 1),
    }  # fmt: skip
    for n, pdpte in enumerate(pdptes):
        host.store(host.address(pool.block) + d.POOL["PDPTE"] + 8 * n, pdpte)
    for name, value in words.items():
        host.store(host.address(pool.block) + d.POOL[name], value)
    return pool.tables << 12


def join_pool(host: Host, pool: ShadowPool, first: ShadowPool, slots: int, root: int) -> None:
    """Write another vCPU's words of a shared pool, whose `first` are there; it has no root yet, and loads one."""
    words = {name: host.load(host.address(first.block) + d.POOL[name]) for name in OF_EACH}
    for name, value in {**words, "HOST_ROOT": root << 12, "SLOTS": slots}.items():
        host.store(host.address(pool.block) + d.POOL[name], value)
