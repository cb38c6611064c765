"""Guest-physical memory as a hypervisor provides it: backed by pages of a host process, mapped by EPT.

The process's page tables are what says which host frame is behind a guest frame, as in a hosted hypervisor; EPT
is filled from them, on demand or beforehand.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
from attrs import define, field

from vtsim.base import memory as mem
from vtsim.base.errors import ConfigError, ModelError
from vtsim.base.memory import BLOCK, PAGE_BYTES, gfn_ranges
from vtsim.cpu.engine import Engine
from vtsim.ept import spec as e
from vtsim.ept.tables import EPT_PAGE, SIZE_1G, SIZE_2M, SIZE_4K, USER_PAGE, Table
from vtsim.guest.machine_view import DirectTables
from vtsim.vmm import layout as at
from vtsim.vmm.host import Host
from vtsim.vmm.kernels import allocate_many
from vtsim.vmm.placement import Placement

GIB: Final = 1 << 30
RAM_PAGE: Final = USER_PAGE | e.PTE_NO_EXECUTE
EPT_WRITTEN: Final = EPT_PAGE | e.EPT_ACCESSED | e.EPT_DIRTY  # flags as a hypervisor sets them in a new leaf


@define(eq=False)
class Pool:
    """Frames for tables, handed out in order: first to builders, then to programs, by two words in memory."""

    host: Host
    words: int
    next: int
    end: int
    handed_over: bool = False

    @classmethod
    def of(cls, host: Host, words: int, frames: int, node: int = 0) -> Pool:
        first = host.reserve_on(node, frames)
        return cls(host, words, first, first + frames)

    def take(self) -> int:
        if self.next >= self.end or self.handed_over:
            raise ModelError("a pool of table frames is used up", {"next": self.next})
        self.next += 1
        return self.next - 1

    def hand_over(self) -> None:
        """From now on only programs take frames."""
        self.handed_over = True
        self.host.store(self.words, self.next)
        self.host.store(self.words + 8, self.end)


@define(eq=False)
class Blocks:
    """Free large pages of the host: a list in simulated memory, and the address of how many are taken."""

    host: Host
    taken: int
    first: int
    count: int
    frames: int  # of one block: 512, or 512 * 512

    def take(self) -> int | None:
        """The first frame of a free block; None where there is none."""
        n = self.host.load(self.taken)
        if n >= self.count:
            return None
        self.host.store(self.taken, n + 1)
        return self.host.load(self.first + 8 * n)


def _too_small() -> ConfigError:
    return ConfigError(
        "there is not enough memory to back all of every VM's before it starts",
        field="machine.memory",
        help="raise machine.memory, or choose vmm.ept.populate 'demand'",
    )


@define(eq=False)
class VmMemory:
    """The memory of one VM: what a guest builder lays its programs, tables and data into."""

    engine: Engine
    size: int
    backing: Table
    blocks: Blocks | None
    base: int = at.USER_RAM  # linear address of guest-physical address 0
    leaf: int = RAM_PAGE
    frames: npt.NDArray[np.int64] | None = field(default=None, init=False)
    large: bool = field(default=False, init=False)  # is it given in 2 MiB blocks, as long as there are any?
    placement: Placement | None = field(default=None, init=False)  # where a buddy allocator gives the frames
    direct: DirectTables | None = field(default=None, init=False)

    def frame(self, gfn: int) -> int:
        """The host frame behind a guest frame, given now if there was none."""
        if self.frames is not None:
            return int(self.frames[self._place(gfn)])
        address = self.base + gfn * PAGE_BYTES
        leaf = self.backing.find(address)
        if leaf:
            return leaf.frame + gfn % (1 << 9 * leaf.size)
        if not any(first <= gfn < end for first, end in gfn_ranges(self.size)):
            raise ModelError("a guest frame outside of RAM", {"gfn": gfn})
        block = self._block(gfn)
        if block is not None:
            self.backing.map(address // (BLOCK * PAGE_BYTES) * BLOCK * PAGE_BYTES, [block], self.leaf, SIZE_2M)
            return block + gfn % BLOCK
        hfn = self.engine.allocate() if self.placement is None else int(self.placement.frames(np.array([gfn]))[0])
        self.backing.map(address, [hfn], self.leaf)
        return hfn

    def contents(self, gfn: int, kind: int) -> npt.NDArray[np.int64]:
        """The 512 words of a guest frame as a writable view, giving it contents of this kind."""
        if kind == mem.TABLE:
            self.place_table(gfn)
        return self.engine.contents(self.frame(gfn), kind)

    def store(self, gpa: int, value: int) -> None:
        """Store an 8-byte word at a guest-physical address."""
        self.engine.store(self.frame(gpa // PAGE_BYTES) * PAGE_BYTES + gpa % PAGE_BYTES, value)

    def load(self, gpa: int) -> int:
        """The 8-byte word at a guest-physical address."""
        return self.engine.load(self.frame(gpa // PAGE_BYTES) * PAGE_BYTES + gpa % PAGE_BYTES)

    def place_table(self, gfn: int) -> None:
        """A guest frame holds a page table, or will: where tables lie apart, it gets a frame there."""
        place = self.placement
        if place is None or not place.tables_apart or gfn in place.moved:
            return
        hfn = place.table_frame(gfn)
        self.backing.map(self.base + gfn * PAGE_BYTES, [hfn], self.leaf)
        if self.frames is not None:
            self.frames[self._place(gfn)] = hfn

    def peek(self, gpa: int) -> int | None:
        """The 8-byte word at a guest-physical address, changing nothing; None where no frame is."""
        leaf = self.backing.find(at.USER_RAM + gpa)
        if leaf is None:
            return None
        return self.engine.load((leaf.frame + (gpa >> 12) % (1 << 9 * leaf.size)) * PAGE_BYTES + gpa % PAGE_BYTES)

    def back_all(self, page_size: int) -> None:
        """Give every guest frame a host frame now, in pages of the given size."""
        ranges = gfn_ranges(self.size)
        frames = np.zeros(sum(end - first for first, end in ranges), np.int64)
        if self.placement is not None:
            self._take_frames(self.placement, frames, ranges, page_size)
        elif page_size == PAGE_BYTES:
            if allocate_many(self.engine.arena, frames) < 0:
                raise _too_small()
        else:
            self._fill_with_blocks(frames)
        self.frames = frames
        done = 0
        for first, end in ranges:
            self._map(self.backing, self.base, first, frames[done : done + end - first], self.leaf, page_size)
            done += end - first

    def map_all(self, ept: Table, page_size: int, flags: int) -> None:
        """Map every guest frame in EPT."""
        if self.frames is None:
            raise ModelError("only memory that is all backed can be mapped beforehand", {})
        done = 0
        for first, end in gfn_ranges(self.size):
            self._map(ept, 0, first, self.frames[done : done + end - first], flags, page_size)
            done += end - first

    def _map(
        self, table: Table, base: int, first: int, frames: npt.NDArray[np.int64], flags: int, page_size: int
    ) -> None:
        if self.placement is not None and page_size > PAGE_BYTES:
            for start in range(0, len(frames), BLOCK):
                part = frames[start : start + BLOCK]
                large = len(part) == BLOCK and part[0] % BLOCK == 0 and part[-1] - part[0] == BLOCK - 1
                address = base + (first + start) * PAGE_BYTES
                table.map(address, part[:1] if large else part, flags, SIZE_2M if large else SIZE_4K)
            return
        size = {PAGE_BYTES: SIZE_4K, BLOCK * PAGE_BYTES: SIZE_2M, GIB: SIZE_1G}[page_size]
        step = 1 << 9 * size
        whole = len(frames) // step * step
        if whole:
            table.map(base + first * PAGE_BYTES, frames[:whole:step], flags, size)
        if whole < len(frames):
            rest = frames[whole:]
            self._map(table, base, first + whole, rest, flags, page_size >> 9)

    def _take_frames(
        self, place: Placement, frames: npt.NDArray[np.int64], ranges: tuple[tuple[int, int], ...], page_size: int
    ) -> None:
        """Fill `frames` from the buddy allocator: in blocks where they are wanted and there."""
        gfns = np.concatenate([np.arange(first, end) for first, end in ranges])
        small = np.ones(len(gfns), bool)
        for start in range(0, len(gfns) - BLOCK + 1, BLOCK) if page_size > PAGE_BYTES else ():
            block = place.block(int(gfns[start]))
            if block is not None:
                frames[start : start + BLOCK] = np.arange(block, block + BLOCK)
                small[start : start + BLOCK] = False
        frames[small] = place.frames(gfns[small])

    def _fill_with_blocks(self, frames: npt.NDArray[np.int64]) -> None:
        step = self.blocks.frames if self.blocks is not None else 0
        for start in range(0, len(frames), step or len(frames)):
            block = self.blocks.take() if self.blocks is not None else None
            if block is None:
                raise _too_small()
            part = frames[start : start + step]
            part[:] = np.arange(block, block + len(part))

    def _block(self, gfn: int) -> int | None:
        first = gfn // BLOCK * BLOCK
        whole = any(low <= first and first + BLOCK <= end for low, end in gfn_ranges(self.size))
        if self.placement is not None:
            return self.placement.block(first) if whole and self.large else None
        return self.blocks.take() if self.blocks is not None and whole else None

    def machine(self, gfns: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The host frames behind guest frames, where all of memory is backed."""
        if self.frames is None:
            raise ModelError("only memory that is all backed has a list of its frames", {})
        return self.frames[np.where(gfns < mem.HOLE_FIRST, gfns, gfns - (mem.HOLE_LAST + 1 - mem.HOLE_FIRST))]

    def _place(self, gfn: int) -> int:
        return gfn if gfn < mem.HOLE_FIRST else gfn - (mem.HOLE_LAST + 1 - mem.HOLE_FIRST)
