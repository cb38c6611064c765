"""What a hypervisor keeps of every frame for direct page tables, and the first look at a new guest's tables.

The domain's builder lays tables as the guest would have them made; here their frames get types and counts, and the
guest's own mappings of them become read-only, as if every entry had been a request.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
import numpy.typing as npt
from attrs import define, field

from vtsim.base import memory as mem
from vtsim.base.errors import ModelError
from vtsim.base.memory import gfn_ranges
from vtsim.ept import direct as d
from vtsim.ept import spec as e
from vtsim.guest.machine_view import DirectTables, Start
from vtsim.vmm import layout as at
from vtsim.vmm.host import Host
from vtsim.vmm.memory import VmMemory
from vtsim.vmm.needs import frame_words

Numbers = npt.NDArray[np.int64]
LEVELS: Final = 4


@define(eq=False)
class DirectHost:
    """The two tables with a word for every frame of the machine: its type, and the guest-physical address it has."""

    host: Host
    words: int  # first frame of the words
    numbers: int  # first frame of the guest-physical addresses
    frames: int  # of each
    types: dict[int, int] = field(factory=dict, init=False)  # table frames of the guest at hand, and their level
    counts: Numbers = field(init=False)

    @classmethod
    def reserve(cls, host: Host) -> DirectHost:
        """Take the frames of both tables from the host's own memory."""
        frames = frame_words(host.engine.geometry.memory_bytes)
        return cls(host, host.reserve(frames), host.reserve(frames), frames)

    @property
    def addresses(self) -> Mapping[str, int]:
        """What programs need to know."""
        return {
            "frame_words": at.frame_address(self.words),
            "frame_count": self.host.engine.geometry.frame_count,
        }

    def offer(
        self, memory: VmMemory, number: int, batch: int, *, ring3: bool = False, on_host: bool = False
    ) -> DirectTables:
        """Let the VM with this number own its frames, and say what its guest's builder needs."""
        gfns = np.concatenate([np.arange(first, end) for first, end in gfn_ranges(memory.size)])
        owned = memory.machine(gfns)
        self._store(self.words, owned, np.full(len(owned), number + 1 << d.OWNER, np.int64))
        self._store(self.numbers, owned, gfns << mem.PAGE_SHIFT)
        return DirectTables(
            machine=memory.machine,
            machine_to_physical=tuple(range(self.numbers, self.numbers + self.frames)),
            batch=batch,
            ring3=ring3,
            on_host=on_host,
        )

    def validate(
        self,
        memory: VmMemory,
        number: int,
        start: Start,
        own: Mapping[int, int] | None = None,
        *,
        keeps: bool = True,
    ) -> None:
        """Give types and counts to the frames of the guest's tables, and make its mappings of them read-only.

        `own`: entries of every root that are the hypervisor's, where the guest's kernel runs in ring 3. `keeps`: do
        translations of processes stay when CR3 is loaded?
        """
        self.types, self.counts = {}, np.zeros(self.host.engine.geometry.frame_count, np.int64)
        for root in start.roots:
            self._look(root >> mem.PAGE_SHIFT, LEVELS)
        kernel = self._entries(start.roots[0] >> mem.PAGE_SHIFT)[d.KERNEL_HALF :]
        for root in start.roots:
            upper = self._entries(root >> mem.PAGE_SHIFT)[d.KERNEL_HALF :]
            if (upper != kernel).any() and (own is None or upper.any()):
                raise ModelError("a root of a new guest has another kernel half", {"root": root})
        tables = np.zeros(len(self.counts), bool)
        tables[list(self.types)] = True
        for frame in (frame for frame, level in self.types.items() if level == 1):
            entries = self._entries(frame)
            leads = (entries & e.PTE_PRESENT != 0) & (entries & e.PTE_WRITE != 0)
            targets = (entries[leads] & e.ADDRESS) >> mem.PAGE_SHIFT
            entries[leads] &= ~np.where(tables[targets], e.PTE_WRITE, 0)
            np.add.at(self.counts, targets[~tables[targets]], 1)
        if own is not None:
            self._for_ring_3(start, own, keeps)
        frames = np.flatnonzero(self.counts)
        types = np.full(len(frames), d.WRITABLE, np.int64)
        types[tables[frames]] = [self.types[frame] for frame in frames[tables[frames]].tolist()]
        self._store(self.words, frames, number + 1 << d.OWNER | types << d.TYPE | self.counts[frames])

    def _look(self, frame: int, level: int) -> None:
        """A root or an entry leads to a table: count it, and go on below where it is new."""
        self.counts[frame] += 1
        if self.types.setdefault(frame, level) != level:
            raise ModelError("a table of a new guest is used at two levels", {"frame": frame})
        if self.counts[frame] > 1 or level == 1:
            return
        for entry in self._entries(frame).tolist():
            if entry & e.PTE_PRESENT:
                self._look((entry & e.ADDRESS) >> mem.PAGE_SHIFT, level - 1)

    def _for_ring_3(self, start: Start, own: Mapping[int, int], keeps: bool) -> None:
        """Make all that the guest maps user memory, that of processes global, and map the hypervisor in every root."""
        for frame, level in self.types.items():
            entries = self._entries(frame)
            present, user = entries & e.PTE_PRESENT != 0, entries & e.PTE_USER != 0
            if level == 1:
                entries[present] &= ~e.PTE_GLOBAL
                entries[present & user] |= e.PTE_GLOBAL if keeps else 0
            entries[present] |= e.PTE_USER
        for root in start.roots:
            for index, entry in own.items():
                self._entries(root >> mem.PAGE_SHIFT)[index] = entry

    def _entries(self, frame: int) -> Numbers:
        return self.host.words(frame, mem.TABLE)

    def _store(self, table: int, frames: Numbers, values: Numbers) -> None:
        """Store the words of some frames."""
        order = np.argsort(frames)
        frames, values = frames[order], values[order]
        pages, starts = np.unique(frames // mem.PAGE_WORDS, return_index=True)
        for page, some, what in zip(pages, np.split(frames, starts[1:]), np.split(values, starts[1:]), strict=True):
            self.host.words(table + int(page))[some % mem.PAGE_WORDS] = what
