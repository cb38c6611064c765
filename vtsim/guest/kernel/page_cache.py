"""Where the pages of a cached file are known: a radix tree of 64 slots a node, and a descriptor for each page.

The layout is that of Linux: a slot holds the address of a page's descriptor, whose place among the others gives the
frame.

Not modelled: more than one file; pages that are not in the cache, or in another order in memory than in the file;
large folios; a tag for pages being written.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler, Mem

# fmt: off
SLOTS, SLOT_BITS = 64, 6                            # XA_CHUNK_SIZE
NODE_BYTES, NODE_HEADER = 576, 64                   # of struct xa_node
NODE_DIRTY: Final = 8                               # a bit for each slot: is a page there or below dirty?
MAPPING_BYTES: Final = 64                           # of struct address_space, what is read here, and of the counters
# dirty pages, pages being written, pages that became dirty since it was last looked whether they are too many
(X_ROOT, X_PAGES, X_DIRTY, X_WRITEBACK, X_RATE) = range(0, 40, 8)
PAGE_BYTES: Final = 64                              # of struct page
(P_FLAGS, P_MAPPING, P_INDEX, P_MAPPED, P_COUNT) = range(0, 40, 8)
LOCKED, UPTODATE, DIRTY = 1, 4, 16                  # of the flags: PG_locked, PG_uptodate, PG_dirty
WRITEBACK: Final = 1 << 15                          # PG_writeback
FRAME_BITS, PAGE_BITS = 12, 6                       # of the bytes of a frame, and of a descriptor
# fmt: on


@frozen(kw_only=True)
class CachedFile:
    """A file of so many pages; all numbers follow from it and from where its descriptors stand."""

    pages: int

    @property
    def levels(self) -> int:
        """How many nodes there are from the root to a slot."""
        return max(1, -(-(self.pages - 1).bit_length() // SLOT_BITS))

    @property
    def bytes(self) -> int:
        """How much memory the tree and the descriptors take."""
        return MAPPING_BYTES + self.pages * PAGE_BYTES + sum(self._nodes()) * NODE_BYTES

    def _nodes(self) -> list[int]:
        """How many nodes there are, by level, the last one first."""
        return [-(-self.pages // SLOTS**level) for level in range(1, self.levels + 1)]

    def words(self, base: int) -> NDArray[np.int64]:
        """The contents, for the address at which they will be."""
        words = np.zeros(-(-self.bytes // 8), np.int64)
        first = MAPPING_BYTES
        pages = words[first // 8 : (first + self.pages * PAGE_BYTES) // 8].reshape(self.pages, -1)
        pages[:, P_FLAGS // 8] = UPTODATE
        pages[:, P_MAPPING // 8] = base
        pages[:, P_INDEX // 8] = np.arange(self.pages)
        pages[:, P_MAPPED // 8] = -1
        pages[:, P_COUNT // 8] = 1
        below = base + first + np.arange(self.pages) * PAGE_BYTES
        here = first + self.pages * PAGE_BYTES
        for level, count in enumerate(self._nodes()):
            nodes = words[here // 8 : (here + count * NODE_BYTES) // 8].reshape(count, -1)
            nodes[:, 0] = level * SLOT_BITS
            slots = np.zeros(count * SLOTS, np.int64)
            slots[: len(below)] = below
            nodes[:, NODE_HEADER // 8 :] = slots.reshape(count, SLOTS)
            below = base + here + np.arange(count) * NODE_BYTES
            here += count * NODE_BYTES
        words[X_ROOT // 8] = below[0]
        words[X_PAGES // 8] = self.pages
        return words


@frozen(kw_only=True)
class FileOptions:
    """What the kernel's text knows of the cached file: linear address of what `words` gives, first frame."""

    mapping: int
    first: int
    levels: int
    queue: int = 0  # linear address of the queue to the device that has the file; 0: no page is written
    bounce: int = 0  # the first frame of copies that the device reads, one for each request; 0: it reads the pages
    background: int = 0  # dirty pages beyond which they are written
    ceiling: int = 0  # dirty pages and pages being written beyond which writers wait

    @property
    def descriptors(self) -> int:
        """Linear address of the descriptor of the first page."""
        return self.mapping + MAPPING_BYTES


def find_slot(a: Assembler, file: FileOptions) -> None:
    """RDX <- address of the slot for page number RDX of the file. Clobbers RAX, R8, R9."""
    a.mov(s.R8, file.mapping)
    a.ld(s.R8, Mem(s.R8, X_ROOT))
    for level in reversed(range(file.levels)):
        a.ld(s.R9, Mem(s.R8))
        a.copy(s.RAX, s.RDX)
        if level:
            a.shr(s.RAX, level * SLOT_BITS)
        a.and_(s.RAX, SLOTS - 1)
        if level:
            a.ld(s.R8, Mem(s.R8, NODE_HEADER, index=s.RAX, scale=8))
        else:
            a.lea(s.RDX, Mem(s.R8, NODE_HEADER, index=s.RAX, scale=8))


def to_frame(a: Assembler, file: FileOptions, register: int) -> None:
    """The physical address of the page whose descriptor's address the register holds. Clobbers RAX."""
    a.mov(s.RAX, file.descriptors)
    a.sub(register, register=s.RAX)
    a.shl(register, FRAME_BITS - PAGE_BITS)
    a.add(register, file.first << FRAME_BITS)


def to_descriptor(a: Assembler, file: FileOptions, register: int) -> None:
    """The address of the descriptor of the page whose physical address the register holds. Clobbers RAX."""
    a.sub(register, file.first << FRAME_BITS)
    a.shr(register, FRAME_BITS - PAGE_BITS)
    a.mov(s.RAX, file.descriptors)
    a.add(register, register=s.RAX)


def change(a: Assembler, descriptor: int, word: int, by: int) -> None:
    """Count a descriptor's word up or down, atomically. Clobbers RAX."""
    a.mov(s.RAX, by)
    a.xadd(Mem(descriptor, word), s.RAX)
