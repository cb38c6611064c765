"""The host under a hypervisor: its memory, page tables, IDT and per-CPU pages.

Low memory is the host's own, handed out in order; behind it are 2 MiB blocks for guests where huge pages are used,
and frames for everything else, as the engine's allocator hands them out.

Under page-table isolation (`isolated`) each root is a pair: the kernel's, and behind it that of user space, which has
of the kernel its text, the IDT and the pages of CPUs only, and of user space what is mapped at the start.

Not modelled: host memory that is not mapped by the direct map; text of the kernel that is not an entry, which user
space's tables should lack.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import numpy as np
import numpy.typing as npt
from attrs import define, field

from vtsim.base import memory as mem
from vtsim.base.errors import ConfigError
from vtsim.base.memory import BLOCK
from vtsim.base.units import SIZE
from vtsim.cpu.engine import Engine
from vtsim.cpu.profile import Profile
from vtsim.ept import spec as e
from vtsim.ept.tables import KERNEL_PAGE, PAGING, SIZE_1G, SIZE_2M, Table
from vtsim.vmm import layout as at

Words = npt.NDArray[np.int64]
TEXT_FRAME: Final = BLOCK  # the host's code: one 2 MiB page
FIRST_FRAME: Final = 2 * BLOCK
LEFT_SMALL: Final = 8192  # frames that are never part of a block, for what is smaller
UPPER_HALF: Final = 256  # first PML4 entry of the kernel's half


@define(eq=False)
class Host:
    """Physical memory and linear maps of the host, while a hypervisor is built."""

    engine: Engine
    profile: Profile
    direct: int = at.HOST_DIRECT  # linear address of physical address 0
    text: int = at.HOST_TEXT
    isolated: bool = False
    next_frame: int = field(default=FIRST_FRAME, init=False)
    kernel: Table = field(init=False)
    idt: int = field(init=False)
    zero_page: int = field(init=False)
    blocks: int = field(default=0, init=False)
    next_on: dict[int, int] = field(factory=dict, init=False)  # frame, on nodes other than the first

    def __attrs_post_init__(self) -> None:
        self.kernel = self._root()
        flags = KERNEL_PAGE | (0 if self.isolated else e.PTE_GLOBAL)
        largest = SIZE_1G if self.profile.features.pages_1g else SIZE_2M
        frames = -(-self.engine.geometry.frame_count // BLOCK) * BLOCK
        self.kernel.map_range(self.direct, 0, frames, flags | e.PTE_NO_EXECUTE, largest)
        self.kernel.map(self.text, [TEXT_FRAME], flags, SIZE_2M)
        self.idt = self.reserve()
        self.words(self.idt)
        self.zero_page = self.reserve()

    def reserve(self, count: int = 1, align: int = 1) -> int:
        """Take consecutive frames of the host's own memory; the first frame's number."""
        first = -(-self.next_frame // align) * align
        if first < mem.HOLE_FIRST and first + count > mem.HOLE_FIRST:
            first = mem.HOLE_LAST + 1
        self.next_frame = first + count
        if self.next_frame > self.engine.geometry.frame_count:
            have = SIZE.format(self.engine.geometry.memory_bytes)
            raise ConfigError(
                f"the hypervisor's own tables do not fit in {have}",
                field="machine.memory",
                help="raise machine.memory",
            )
        return first

    def reserve_on(self, node: int, count: int) -> int:
        """Take consecutive frames of a node's memory for the host; the first frame's number."""
        if node == 0:
            return self.reserve(count)
        first = self.next_on.get(node, self.engine.geometry.node_frames(node)[0])
        self.next_on[node] = first + count
        return first

    def words(self, hfn: int, kind: int = mem.VALUES) -> Words:
        """The 512 words of a frame."""
        return self.engine.contents(hfn, kind)

    def reserve_late(self, kind: int) -> int:
        """A frame of the host's own after its memory was given out."""
        hfn = self.engine.allocate()
        self.words(hfn, kind)
        return hfn

    def area(self, words: int) -> int:
        """Reserve memory for so many words; the first frame's number."""
        return self.reserve(-(-words // mem.PAGE_WORDS))

    def address(self, hfn: int) -> int:
        """The linear address of a frame."""
        return self.direct + hfn * mem.PAGE_BYTES

    def store(self, linear: int, value: int) -> None:
        """Store a word at a linear address of the direct map."""
        self.engine.store(linear - self.direct, value)

    def store_words(self, linear: int, values: Iterable[int]) -> None:
        """Store consecutive words from a linear address of the direct map on."""
        for n, value in enumerate(values):
            self.store(linear + 8 * n, value)

    def load(self, linear: int) -> int:
        """The word at a linear address of the direct map."""
        return self.engine.load(linear - self.direct)

    def place(self, linear: int) -> int:
        """Where in the arena the word at a linear address of the direct map stands."""
        hpa = linear - self.direct
        view, arena = self.words(hpa >> mem.PAGE_SHIFT), self.engine.arena
        return (view.ctypes.data - arena.ctypes.data + (hpa & mem.PAGE_BYTES - 1)) // arena.itemsize

    def store_many(self, hfn: int, values: Words) -> None:
        """Fill consecutive frames with words."""
        for start in range(0, len(values), mem.PAGE_WORDS):
            part = values[start : start + mem.PAGE_WORDS]
            self.words(hfn + start // mem.PAGE_WORDS)[: len(part)] = part

    def process(self) -> Table:
        """A new process: page tables whose upper half is the kernel's."""
        table = self._root()
        self.words(table.root, mem.TABLE)[UPPER_HALF:] = self.words(self.kernel.root, mem.TABLE)[UPPER_HALF:]
        return table

    def isolate(self, processes: Iterable[Table], cpu_pages: Iterable[int]) -> None:
        """Fill the roots of user space, once all is mapped that user space of these processes uses."""
        entry = self._root()
        entry.map(self.text, [TEXT_FRAME], KERNEL_PAGE, SIZE_2M)
        for hfn in (self.idt, *cpu_pages):
            entry.map(self.address(hfn), [hfn], KERNEL_PAGE | e.PTE_NO_EXECUTE)
        for process in processes:
            user = self.words(process.root + 1, mem.TABLE)
            user[:UPPER_HALF] = self.words(process.root, mem.TABLE)[:UPPER_HALF]
            user[UPPER_HALF:] = self.words(entry.root, mem.TABLE)[UPPER_HALF:]

    def gate(self, vector: int, handler: int, idt: int | None = None, *, ring: int = 0) -> None:
        """Let an interrupt gate of the host, or of the IDT in a frame, open to INT from `ring`, lead to a handler."""
        low = (handler & 0xFFFF) | at.KERNEL_CODE << 16 | (0x8E | ring << 5) << 40 | (handler >> 16 & 0xFFFF) << 48
        address = self.address(self.idt if idt is None else idt) + 16 * vector
        self.store(address, low)
        self.store(address + 8, handler >> 32 & 0xFFFF_FFFF)

    def give_out(self, blocks: int, size: int, *, shuffled: bool, seed: int) -> Words:
        """Split what is left of memory: blocks of `size` frames (their first ones), and frames for the allocator."""
        total = self.engine.geometry.frame_count
        usable = np.arange(-(-self.next_frame // size) * size, total // size * size, size, dtype=np.int64)
        usable = usable[(usable < mem.HOLE_FIRST) | (usable > mem.HOLE_LAST)]
        before = int(usable[0]) - self.next_frame if len(usable) else 0
        kept = -(-max(LEFT_SMALL - before, 0) // size)
        chosen = usable[max(kept, len(usable) - blocks) :] if blocks else usable[:0]
        end = int(chosen[0]) if len(chosen) else total
        count = end - self.next_frame
        if self.next_frame < mem.HOLE_FIRST <= end:
            count -= mem.HOLE_LAST + 1 - mem.HOLE_FIRST
        self.engine.frames_from(self.next_frame, count, shuffled=shuffled, seed=seed)
        if shuffled:
            chosen = np.random.default_rng(seed).permutation(chosen)
        return chosen

    def _root(self) -> Table:
        root = self.reserve(2, 2) if self.isolated else self.reserve()
        self.words(root, mem.TABLE)
        return Table(root=root, format=PAGING, take=self.reserve, words=lambda hfn: self.words(hfn, mem.TABLE))
