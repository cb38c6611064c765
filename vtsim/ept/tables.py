"""Builders of real radix tables in simulated memory: guest (and native) paging structures, and EPT.

A `Table` knows its root, its format, and how to reach the memory of its own dimension: a guest's tables are
addressed by gfn, EPT and native tables by hfn. Ranges are written a leaf table at a time, so that large
memories are cheap to map. Builders write memory only: they cost no cycles and invalidate nothing.

SDM: "4-Level Paging and 5-Level Paging"; "EPT Translation Mechanism".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt
from attrs import frozen

from vtsim.base.errors import ModelError
from vtsim.base.memory import PAGE_SHIFT, TABLE, signed
from vtsim.ept import spec as e

Words = npt.NDArray[np.int64]
BITS: Final = 9
SIZE_4K, SIZE_2M, SIZE_1G = range(3)


@frozen(kw_only=True)
class Format:
    """A kind of entry: the bits that make it present, that make it a large page, and that lead to a table.

    An entry has 8 bytes, or 4 where a table of 4 KiB has 1024 of them.
    """

    present: int
    large: int
    interior: int
    root: int | None = None  # of a root, where it differs
    bits: int = BITS  # of an address that the index in a table takes

    @property
    def above(self) -> int:
        """The bits of an entry of a root that leads to a table."""
        return self.interior if self.root is None else self.root

    @property
    def entries(self) -> int:
        """How many entries a table has."""
        return 1 << self.bits


# fmt: off
TO_TABLE: Final = e.PTE_PRESENT | e.PTE_WRITE | e.PTE_USER | e.PTE_ACCESSED
PAGING: Final   = Format(present=e.PTE_PRESENT, large=e.PTE_LARGE, interior=TO_TABLE)
EPT: Final      = Format(present=e.EPT_RWX,     large=e.EPT_LARGE, interior=e.EPT_RWX)
PAE_PAGING: Final = Format(present=e.PTE_PRESENT, large=e.PTE_LARGE, interior=TO_TABLE, root=e.PTE_PRESENT)
PAGING_32: Final  = Format(present=e.PTE_PRESENT, large=e.PTE_LARGE, interior=TO_TABLE, bits=10)
KERNEL_PAGE: Final = e.PTE_PRESENT | e.PTE_WRITE | e.PTE_ACCESSED | e.PTE_DIRTY
USER_PAGE: Final   = KERNEL_PAGE | e.PTE_USER
EPT_PAGE: Final    = e.EPT_RWX | 6 << e.EPT_TYPE                # read, write, execute; write-back
# fmt: on


@frozen(kw_only=True)
class Leaf:
    """Where a mapping ends: the table's frame, the index in it, the entry, the page size (0, 1, 2)."""

    table: int
    index: int
    entry: int
    size: int
    bits: int = BITS

    @property
    def frame(self) -> int:
        """The first frame of the page, in 4 KiB frames of the table's dimension."""
        return (self.entry & e.ADDRESS) >> (PAGE_SHIFT + self.bits * self.size) << (self.bits * self.size)


@frozen(kw_only=True)
class Table:
    """A radix table: `take` gives a new table page's frame number, `words` the entries in a frame."""

    root: int
    format: Format
    take: Callable[[], int]
    words: Callable[[int], Words]
    levels: int = 4

    def map(self, address: int, frames: npt.ArrayLike, flags: int, size: int = SIZE_4K) -> None:
        """Map consecutive pages from `address` on to `frames`: for each page its first 4 KiB frame number.

        Entries that exist already are replaced. Raises `ModelError` for an address or frame not aligned to
        the page size, and where a page of another size is in the way.
        """
        targets = np.atleast_1d(np.asarray(frames, np.int64))
        bits = self.format.bits
        first = self._page(address, size)
        if address & ((1 << (PAGE_SHIFT + bits * size)) - 1) or (targets & ((1 << bits * size) - 1)).any():
            raise ModelError("a page is not aligned to its size", {"address": address, "size": size})
        if first + len(targets) > 1 << (bits * (self.levels - size)):
            raise ModelError("pages end beyond the table", {"address": address, "pages": len(targets)})
        entries = targets << PAGE_SHIFT | (flags | (self.format.large if size else 0))
        self._write(self.root, self.levels - 1, first, entries, size)

    def map_range(self, address: int, frame: int, count: int, flags: int, largest: int = SIZE_4K) -> None:
        """Map `count` 4 KiB pages from `address` on to consecutive frames, in the largest pages that fit."""
        page, bits = self._page(address, SIZE_4K), self.format.bits
        while count:
            size = largest
            while size and ((page | frame) & ((1 << bits * size) - 1) or count < 1 << bits * size):
                size -= 1
            step = 1 << bits * size
            pages = count // step
            if size < largest and not (page ^ frame) & ((1 << bits * (size + 1)) - 1):
                above = step << bits
                pages = min(pages, (-page % above or above) // step)  # then larger pages fit again
            self.map(page << PAGE_SHIFT, np.arange(frame, frame + pages * step, step), flags, size)
            page, frame, count = page + pages * step, frame + pages * step, count - pages * step

    def unmap(self, address: int, count: int, size: int = SIZE_4K) -> None:
        """Clear `count` entries of this page size from `address` on."""
        self._write(self.root, self.levels - 1, self._page(address, size), np.zeros(count, np.int64), size)

    def set_entry(self, address: int, entry: int, level: int) -> None:
        """Store a raw entry at `level` (1 the last, as the manuals count), making the tables above it."""
        size = level - 1
        entries = np.array([signed(entry)], np.int64)
        self._write(self.root, self.levels - 1, self._page(address, size), entries, size)

    def _page(self, address: int, size: int) -> int:
        """The number of the page of a size that an address lies in."""
        within = address & ((1 << (PAGE_SHIFT + self.format.bits * self.levels)) - 1)
        return within >> (PAGE_SHIFT + self.format.bits * size)

    def find(self, address: int) -> Leaf | None:
        """The leaf that maps `address`, or None."""
        table = self.root
        for depth in range(self.levels - 1, -1, -1):
            index = (address >> (PAGE_SHIFT + self.format.bits * depth)) & (self.format.entries - 1)
            entry = int(self.words(table)[index])
            if not entry & self.format.present:
                return None
            if depth == 0 or (entry & self.format.large and depth <= SIZE_1G):
                return Leaf(table=table, index=index, entry=entry, size=depth, bits=self.format.bits)
            table = (entry & e.ADDRESS) >> PAGE_SHIFT
        return None

    def split(self, address: int) -> Leaf | None:
        """The leaf of the smallest size that maps `address`, or None; a larger page is split, with its flags."""
        while (leaf := self.find(address)) is not None and leaf.size:
            below = self.take()
            kept = leaf.entry & ~(self.format.large if leaf.size == SIZE_2M else 0)
            self.words(below)[:] = kept + (np.arange(self.format.entries) << (PAGE_SHIFT + leaf.bits * (leaf.size - 1)))
            self.words(leaf.table)[leaf.index] = below << PAGE_SHIFT | self.format.interior
        return leaf

    def tables(self) -> Iterator[int]:
        """The frames of all table pages, the root first."""
        return self._tables(self.root, self.levels - 1)

    def _tables(self, table: int, depth: int) -> Iterator[int]:
        yield table
        if depth:
            words = self.words(table)
            large = (words & self.format.large != 0) & (depth <= SIZE_1G)
            leads = (words & self.format.present != 0) & ~large
            for entry in words[leads]:
                yield from self._tables((int(entry) & e.ADDRESS) >> PAGE_SHIFT, depth - 1)

    def _write(self, table: int, depth: int, first: int, entries: Words, size: int) -> None:
        words = self.words(table)
        if depth == size:
            at = first & (self.format.entries - 1)
            new = words[at : at + len(entries)]
            if size and ((new & self.format.present != 0) & (new & self.format.large == 0)).any():
                raise ModelError("smaller pages are mapped there", {"page": first, "size": size})
            new[:] = entries
            return
        below = self.format.bits * (depth - size)  # pages of this size under one entry: 1 << below
        done = 0
        while done < len(entries):
            page = first + done
            index = (page >> below) & (self.format.entries - 1)
            count = min(len(entries) - done, (1 << below) - (page & ((1 << below) - 1)))
            entry = int(words[index])
            if not entry & self.format.present:
                top = depth == self.levels - 1
                entry = self.take() << PAGE_SHIFT | (self.format.above if top else self.format.interior)
                words[index] = entry
            elif entry & self.format.large and depth <= SIZE_1G:
                raise ModelError("a larger page is mapped there", {"page": page, "size": size})
            child = (entry & e.ADDRESS) >> PAGE_SHIFT
            self._write(child, depth - 1, page, entries[done : done + count], size)
            done += count


class HostMemory(Protocol):
    """What gives and shows host frames: the engine."""

    def allocate(self) -> int: ...
    def contents(self, hfn: int, kind: int) -> Words: ...


def host_table(engine: HostMemory, format: Format, levels: int = 4) -> Table:
    """A new empty table in host memory: EPT, or paging structures of the host itself."""

    def words(hfn: int) -> Words:
        return engine.contents(hfn, TABLE)

    root = engine.allocate()
    words(root)
    return Table(root=root, format=format, take=engine.allocate, words=words, levels=levels)
