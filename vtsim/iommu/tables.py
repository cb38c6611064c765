"""Builders of root, context and PASID structures and of the tables of domains, in simulated memory.

Builders write memory only: they invalidate nothing, as a driver's stores do not.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
from attrs import define, field

from vtsim.base import memory as mem
from vtsim.base.errors import ModelError
from vtsim.ept.tables import PAGING, Format, HostMemory, Table, host_table
from vtsim.iommu import entries as e
from vtsim.iommu import spec as sp

Words = npt.NDArray[np.int64]

# fmt: off
SECOND_LEVEL: Final = Format(present=e.SL_R | e.SL_W | e.SL_X, large=e.SL_PS, interior=e.SL_R | e.SL_W | e.SL_X)
FIRST_LEVEL: Final  = PAGING
READ_WRITE: Final   = e.SL_R | e.SL_W                                  # a second-level page
USER_PAGE: Final    = e.PRESENT | e.FL_RW | e.FL_US                    # a first-level page
# fmt: on


@define(eq=False)
class Memory:
    """Simulated memory without logical CPUs: `arena` is laid out as every kernel of the package expects it."""

    bytes: int
    pool_pages: int = 4096
    arena: Words = field(init=False)

    def __attrs_post_init__(self) -> None:
        frames = self.bytes >> mem.PAGE_SHIFT
        if frames > mem.HOLE_FIRST:
            frames += mem.HOLE_LAST + 1 - mem.HOLE_FIRST
        pool = -(-(mem.HEADER_WORDS + frames) // mem.PAGE_WORDS) * mem.PAGE_WORDS
        a = self.arena = np.zeros(pool + (self.pool_pages + 1) * mem.PAGE_WORDS, np.int64)
        a[mem.A_FRAMES], a[mem.A_FRAME_COUNT] = mem.HEADER_WORDS, frames
        a[mem.A_POOL], a[mem.A_POOL_NEXT], a[mem.A_POOL_LIMIT] = pool, 1, self.pool_pages + 1
        a[mem.A_ALLOC_FIRST], a[mem.A_ALLOC_COUNT] = 1, (self.bytes >> mem.PAGE_SHIFT) - 1
        a[mem.A_ALLOC_BITS] = int(mem.scatter_bits(int(a[mem.A_ALLOC_COUNT])))

    def allocate(self) -> int:
        """The next free frame; ModelError if there is none."""
        hfn = int(mem.allocate(self.arena))
        if hfn < 0:
            raise ModelError("simulated memory is used up", {"bytes": self.bytes})
        return hfn

    def contents(self, hfn: int, kind: int) -> Words:
        """The 512 words of a frame, given contents on first use."""
        at = int(mem.give_contents(self.arena, hfn, kind))
        if at < 0:
            raise ModelError("no contents are left for frames", {"pool_pages": self.pool_pages})
        return self.arena[at : at + mem.PAGE_WORDS]

    def token(self, hfn: int) -> int:
        """The content token of a frame: every store changes it."""
        return int(self.arena[int(self.arena[mem.A_FRAMES]) + hfn]) >> mem.FRAME_TOKEN

    def word(self, hpa: int) -> int:
        """The aligned word at a host-physical address."""
        return int(mem.load_word(self.arena, hpa))

    def store(self, hpa: int, *words: int) -> None:
        """Store consecutive aligned words."""
        for place, word in enumerate(words):
            if int(mem.store_word(self.arena, hpa + 8 * place, mem.signed(word))) < 0:
                raise ModelError("no contents are left for frames", {"pool_pages": self.pool_pages})


@define(eq=False)
class Structures:
    """The root table of one remapping unit and what it leads to."""

    memory: HostMemory
    scalable: bool = False
    root: int = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.root = self._page()

    @property
    def rtaddr(self) -> int:
        """What RTADDR is to hold."""
        mode = sp.TTM_SCALABLE if self.scalable else sp.TTM_LEGACY
        return self.root << mem.PAGE_SHIFT | mode << 10

    def _page(self) -> int:
        hfn = self.memory.allocate()
        self.memory.contents(hfn, mem.TABLE)
        return hfn

    def _below(self, words: Words, index: int) -> int:
        """The frame that a pointer leads to, which is made when it is not present."""
        if not words[index] & e.PRESENT:
            words[index] = self._page() << mem.PAGE_SHIFT | e.PRESENT
        return int(words[index] & e.POINTER) >> mem.PAGE_SHIFT

    def context(self, sid: int) -> Words:
        """The words of a requester's context entry: a view of 2 or 4 words, made if need be."""
        root = self.memory.contents(self.root, mem.TABLE)
        half = (sid >> 7) & 1 if self.scalable else 0
        page = self.memory.contents(self._below(root, 2 * (sid >> 8) + half), mem.TABLE)
        size, number = (4, sid & 0x7F) if self.scalable else (2, sid & 0xFF)
        return page[size * number : size * (number + 1)]

    def context_address(self, sid: int) -> int:
        """The physical address of a requester's context entry."""
        self.context(sid)
        half = (sid >> 7) & 1 if self.scalable else 0
        page = int(self.memory.contents(self.root, mem.TABLE)[2 * (sid >> 8) + half] & e.POINTER)
        return page + (32 * (sid & 0x7F) if self.scalable else 16 * (sid & 0xFF))

    def pasid(self, sid: int, pasid: int) -> Words:
        """The words of a PASID table entry: a view of 8 words; a page of the directory holds 512 tables of 64."""
        directory = self._directory(sid, pasid)
        page = self.memory.contents(self._below(directory, pasid >> 6 & 511), mem.TABLE)
        return page[8 * (pasid & 63) : 8 * (pasid & 63) + 8]

    def pasid_address(self, sid: int, pasid: int) -> int:
        """The physical address of a PASID table entry."""
        self.pasid(sid, pasid)
        return int(self._directory(sid, pasid)[pasid >> 6 & 511] & e.POINTER) + 64 * (pasid & 63)

    def _directory(self, sid: int, pasid: int) -> Words:
        """The page of a requester's PASID directory in which a PASID is."""
        first = int(self.context(sid)[0] & e.POINTER) >> mem.PAGE_SHIFT
        return self.memory.contents(first + (pasid >> 15), mem.TABLE)

    def attach(self, sid: int, table: Table | None, domain: int, *, devices: bool = False, widest: int = 2) -> None:
        """Legacy mode: a requester's context entry, second-level or (without a table) pass-through.

        `widest`: AW of pass-through, which has to be the largest that the unit supports.
        """
        kind = e.TT_PASS_THROUGH if table is None else e.TT_ALL if devices else e.TT_UNTRANSLATED
        root = 0 if table is None else table.root << mem.PAGE_SHIFT
        width = widest if table is None else table.levels - 2
        self.context(sid)[:] = root | kind << e.TT_SHIFT | e.PRESENT, domain << e.CONTEXT_DID | width

    def enable(self, sid: int, *, directory_size: int = 2, flags: int = e.PASIDE, rid_pasid: int = 0) -> None:
        """Scalable mode: a requester's context entry with a PASID directory of 2**(directory_size + 7) tables.

        A directory of more than 512 tables takes frames that are allocated one behind the other.
        """
        entry = self.context(sid)
        if not entry[0] & e.PRESENT:
            frames = [self._page() for _ in range(1 << max(0, directory_size - 2))]
            if frames != list(range(frames[0], frames[0] + len(frames))):
                raise ModelError("a PASID directory is not in one piece", {"first": frames[0], "frames": len(frames)})
            entry[0] = frames[0] << mem.PAGE_SHIFT
        pointer = int(entry[0] & e.POINTER)
        entry[:] = pointer | directory_size << e.PDTS_SHIFT | flags | e.PRESENT, rid_pasid, 0, 0

    def assign(
        self,
        sid: int,
        pasid: int,
        domain: int,
        *,
        first: Table | None = None,
        second: Table | None = None,
        low: int = 0,
        middle: int = 0,
        high: int = 0,
    ) -> None:
        """Scalable mode: what translates a PASID of a requester; without tables, nothing does (pass-through).

        `low`, `middle`, `high`: further bits of the entry's first three words.
        """
        kind = {(1, 0): e.PGTT_FIRST, (0, 1): e.PGTT_SECOND, (1, 1): e.PGTT_NESTED, (0, 0): e.PGTT_PASS_THROUGH}
        words = [kind[first is not None, second is not None] << e.PGTT_SHIFT | e.PRESENT | low, domain | middle, high]
        if second is not None:
            words[0] |= second.root << mem.PAGE_SHIFT | (second.levels - 2) << e.PASID_AW_SHIFT
        if first is not None:
            words[2] |= first.root << mem.PAGE_SHIFT | (first.levels - 4) << e.FLPM_SHIFT
        self.pasid(sid, pasid)[:] = [*words, 0, 0, 0, 0, 0]


def domain_table(memory: HostMemory, levels: int = 4) -> Table:
    """A new empty second-level table."""
    return host_table(memory, SECOND_LEVEL, levels)


def process_table(memory: HostMemory, levels: int = 4) -> Table:
    """A new empty first-level table in host memory."""
    return host_table(memory, FIRST_LEVEL, levels)


def guest_table(memory: HostMemory, second: Table, first_gfn: int, levels: int = 4) -> Table:
    """A new empty first-level table in a guest's memory, its frames from `first_gfn` on backed through `second`."""
    taken = [first_gfn]

    def take() -> int:
        gfn = taken[0]
        taken[0] += 1
        hfn = memory.allocate()
        memory.contents(hfn, mem.TABLE)
        second.map(gfn << mem.PAGE_SHIFT, hfn, READ_WRITE)
        return gfn

    def words(gfn: int) -> Words:
        leaf = second.find(gfn << mem.PAGE_SHIFT)
        if leaf is None:
            raise ModelError("a guest's table is not mapped", {"gfn": gfn})
        return memory.contents(leaf.frame, mem.TABLE)

    return Table(root=take(), format=FIRST_LEVEL, take=take, words=words, levels=levels)
