"""Shadow tables built beforehand: guest-linear to host-physical, for processors without EPT.

SDM: "Memory Virtualization".
Not modelled: changes that the guest makes to its tables later; accessed and dirty flags in the guest's entries.
"""

from __future__ import annotations

import numpy as np
from attrs import define, field

from vtsim.base.memory import HOLE_FIRST, HOLE_LAST, PAGE_SHIFT, TABLE
from vtsim.ept import spec as e
from vtsim.ept.tables import ENTRIES, TO_TABLE, Words
from vtsim.vmm.host import Host
from vtsim.vmm.memory import VmMemory, gfn_ranges


@define(eq=False)
class Shadow:
    """Copies of one guest's paging structures with host frames in them; tables that it shares are shared here."""

    host: Host
    memory: VmMemory
    _copies: dict[tuple[int, int], int] = field(factory=dict)

    def of(self, cr3: int) -> int:
        """The host-physical address of the shadow of a guest's root."""
        return self._table((cr3 & e.ADDRESS) >> PAGE_SHIFT, 4) << PAGE_SHIFT

    def _table(self, gfn: int, level: int) -> int:
        known = self._copies.get((gfn, level))
        if known is not None:
            return known
        words = self.memory.contents(gfn, TABLE)
        hfn, copy = self._new()
        self._copies[gfn, level] = hfn
        present = np.flatnonzero(words & e.PTE_PRESENT)
        if level == 1:
            copy[present] = self._leaves((words[present] & e.ADDRESS) >> PAGE_SHIFT, words[present])
            return hfn
        for index in present:
            entry = int(words[index])
            if entry & e.PTE_LARGE:
                below = self._split((entry & e.ADDRESS) >> PAGE_SHIFT, level - 1, entry & ~(e.ADDRESS | e.PTE_LARGE))
                copy[index] = below << PAGE_SHIFT | TO_TABLE
            else:
                below = self._table((entry & e.ADDRESS) >> PAGE_SHIFT, level - 1)
                copy[index] = below << PAGE_SHIFT | entry & ~e.ADDRESS
        return hfn

    def _split(self, gfn: int, level: int, flags: int) -> int:
        """A table of 4 KiB pages under a large page of the guest."""
        hfn, copy = self._new()
        if level == 1:
            frames = np.arange(gfn, gfn + ENTRIES)
            copy[:] = self._leaves(frames, np.full(ENTRIES, flags, np.int64))
        else:
            for index in range(ENTRIES):
                copy[index] = self._split(gfn + index * ENTRIES, level - 1, flags) << PAGE_SHIFT | TO_TABLE
        return hfn

    def _leaves(self, gfns: Words, entries: Words) -> Words:
        """Entries that lead to the host frames of guest frames; what is not RAM stays a device's address."""
        assert self.memory.frames is not None
        ram = np.zeros(len(gfns), bool)
        for first, end in gfn_ranges(self.memory.size):
            ram |= (gfns >= first) & (gfns < end)
        places = np.where(gfns < HOLE_FIRST, gfns, gfns - (HOLE_LAST + 1 - HOLE_FIRST))
        hfns = np.where(ram, self.memory.frames[np.where(ram, places, 0)], gfns)
        return hfns << PAGE_SHIFT | entries & ~e.ADDRESS

    def _new(self) -> tuple[int, Words]:
        hfn = self.host.reserve_late(TABLE)
        return hfn, self.host.words(hfn, TABLE)
