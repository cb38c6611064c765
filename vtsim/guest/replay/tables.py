"""The paging structures of a recorded guest, as far as its recording tells: what shadow paging needs to see.

Stores into tables that were in use are recorded. What was written before a table came into use is known from the first
use of each leaf entry only; tables on the way to it that nothing names stand in frames that the guest never touched.

SDM: "4-Level Paging and 5-Level Paging".
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
from attrs import define, field
from numpy.typing import NDArray

from vtsim.base.errors import ConfigError
from vtsim.ept import spec as e
from vtsim.guest.traces.format import Trace
from vtsim.guest.traces.kinds import NAME, NUMBER
from vtsim.guest.traces.rows import LEAVES, TOUCHES, outside

# fmt: off
FLAGS: Final = e.PTE_ACCESSED | e.PTE_DIRTY
USER_TABLE: Final = e.PTE_PRESENT | e.PTE_WRITE | e.PTE_USER | FLAGS
KERNEL_TABLE: Final = USER_TABLE & ~e.PTE_USER
DIRECT: Final = -0x7780_0000_0000               # Linux's map of all physical memory
DEVICES: Final = -0x3700_0000_0000              # where Linux maps devices
KERNEL_HALF: Final = 256
STORE, ZERO = range(2)
LEVELS: Final = 4
IA32_EFER: Final = 0xC000_0080
CR0_PG, CR4_LA57, EFER_LME = 1 << 31, 1 << 12, 1 << 8
# fmt: on
Fill = tuple[int, int, int]  # STORE or ZERO, guest-physical address, value


def index_of(address: int, level: int) -> int:
    """The index of an address in a table."""
    return (address >> (3 + 9 * level)) & 511


def paging_mode(trace: Trace) -> tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.bool_]]:
    """Which rows ran with paging, in IA-32e mode, and with 5 levels, as far as writes of registers tell."""

    def held(rows: NDArray[np.bool_], first: int) -> NDArray[np.int64]:
        """What a register holds before each row, that these rows write."""
        at = np.nonzero(rows)[0]
        values = np.append(first, trace.a1[at])
        return values[np.searchsorted(at, np.arange(len(trace)))]

    moves = trace.kind == NUMBER["MOV_TO_CR"]
    cr0, cr4 = held(moves & (trace.a0 == 0), 0), held(moves & (trace.a0 == 4), 0)
    efer = held((trace.kind == NUMBER["WRMSR"]) & (trace.a0 == IA32_EFER), 0)
    paging = cr0 & CR0_PG != 0
    long = paging & (efer & EFER_LME != 0)
    return paging, long, long & (cr4 & CR4_LA57 != 0)


def refuse_unfollowed(trace: Trace) -> None:
    """Shadow tables need the guest's: refuse a recording whose tables are in no shape that is recorded or followed."""
    paging, long, five = paging_mode(trace)
    accesses = np.isin(trace.kind, [NUMBER[name] for name in (*TOUCHES, *LEAVES, "PTW")])
    mapped = np.isin(trace.kind, [NUMBER[name] for name in LEAVES])
    level_5 = (trace.kind == NUMBER["PTW"]) & (trace.a0 & 7 > LEVELS)
    frame = trace.a2 & e.ADDRESS
    # fmt: off
    refused = (
        (accesses & paging & ~long,                            "the guest pages with 32-bit or PAE tables here"),
        ((accesses & five) | level_5,                          "the guest has 5-level tables here"),
        (mapped & (trace.a2 & e.PTE_PRESENT == 0),             "the entry that was used is not present"),
        (mapped & outside(frame, trace.guest.memory_bytes),    "the page is in neither memory nor firmware"),
    )
    # fmt: on
    for rows, what in refused:
        if rows.any():
            row = int(np.argmax(rows))
            raise ConfigError(
                f"row {row} ({NAME[int(trace.kind[row])]}): {what}, which shadow tables are not made of",
                help="vmm.paging can be ept",
            )


@define
class GuestTables:
    """Tables by frame: {index: entry}."""

    spare: Iterator[int]
    tables: dict[int, dict[int, int]] = field(factory=dict)
    leads: dict[int, int] = field(factory=dict)  # frame of a table: address of the entry that leads to it
    kernel: dict[tuple[int, int], int] = field(factory=dict)  # level and part of the address: frame
    retired: set[int] = field(factory=set)
    places: dict[int, int] = field(factory=dict)  # frame: linear address at which the kernel used it last

    def entry(self, at: int) -> int:
        """The entry at a guest-physical address."""
        return self.tables.get(at >> 12, {}).get((at & 0xFFF) >> 3, 0)

    def mapped(self, root: int, address: int) -> int:
        """The frame that an address is mapped to; -1 if to none."""
        table = root
        for level in (4, 3, 2, 1):
            entry = self.tables.get(table, {}).get(index_of(address, level), 0)
            if not entry & e.PTE_PRESENT:
                return -1
            if level == 1 or (entry & e.PTE_LARGE and level < 4):
                within = (1 << 9 * (level - 1)) - 1
                return ((entry & e.ADDRESS) >> 12 & ~within) | ((address >> 12) & within)
            table = (entry & e.ADDRESS) >> 12
        return -1

    def store(self, at: int, value: int) -> None:
        """An entry was written."""
        self.tables.setdefault(at >> 12, {})[(at & 0xFFF) >> 3] = value

    def fill(self, at: int, value: int) -> Iterator[Fill]:
        """An entry was written before anybody looked."""
        if self.entry(at) & ~FLAGS != value & ~FLAGS:
            self.store(at, value)
            yield STORE, at, value

    def link(self, at: int, level: int, value: int) -> Iterator[Fill]:
        """What an entry of an upper level leads to becomes a table: it was zeroed before, if it was one once."""
        if level == 1 or not value & e.PTE_PRESENT or value & e.PTE_LARGE:
            return
        frame = (value & e.ADDRESS) >> 12
        shared = level == 4 and (at & 0xFFF) >> 3 >= KERNEL_HALF and frame in self.leads
        if self.leads.get(frame) != at and not shared:
            if self.tables.pop(frame, None):
                yield ZERO, frame << 12, 0
            self.leads[frame] = at
            self.retired.discard(frame)

    def new_root(self, frame: int, old: int) -> Iterator[Fill]:
        """A table becomes a root: the kernel's half is that of the root before."""
        if frame not in self.leads:
            if self.tables.pop(frame, None):
                yield ZERO, frame << 12, 0
            self.leads[frame] = -1
            self.retired.discard(frame)
        for index, value in list(self.tables.get(old, {}).items()):
            if index >= KERNEL_HALF:
                yield from self.fill(frame << 12 | index << 3, value)

    def first_use(self, root: int, address: int, at: int, level: int, value: int) -> Iterator[Fill]:
        """A leaf entry at `at` is used for an address: what leads to it must be there."""
        table = root
        self.retired.discard(at >> 12)
        kernel = address < 0
        for above in range(4, level, -1):
            place = table << 12 | index_of(address, above) << 3
            entry = self.entry(place)
            below = (entry & e.ADDRESS) >> 12 if entry & e.PTE_PRESENT and not entry & e.PTE_LARGE else 0
            if below in self.retired:
                below = 0
            wanted = at >> 12 if above - 1 == level else below or self._guess(address, above, at, level)
            if below != wanted:
                entry = wanted << 12 | (KERNEL_TABLE if kernel else USER_TABLE)
                yield from self.link(place, above, entry)
                yield from self.fill(place, entry)
            if kernel:
                self.kernel[above, address >> (3 + 9 * above)] = wanted
            table = wanted
        yield from self.fill(at, value)
        within = (1 << 9 * (level - 1)) - 1
        if kernel and value & e.PTE_PRESENT:
            self.places[((value & e.ADDRESS) >> 12 & ~within) | ((address >> 12) & within)] = address & ~0xFFF

    def foresee(self, uses: dict[int, list[tuple[int, int]]], row: int) -> Iterator[Fill]:
        """A table of the kernel is used at a row: entries that are used later, and not stored before, stand in it.

        Tables of the kernel are never freed. `uses` has the rows of each entry with its value, -1 for a store.
        """
        for at, events in uses.items():
            value = next((held for later, held in events if later > row), -1)
            if value != -1 and self.entry(at) == 0:
                yield from self.fill(at, value)

    def _guess(self, address: int, above: int, at: int, level: int) -> int:
        """The frame of a table that is known from elsewhere: another root, or the stores that made it; else a spare."""
        known = self.kernel.get((above, address >> (3 + 9 * above)))
        if known is not None:
            return known
        frame = at >> 12
        for step in range(level + 1, above):
            parent = self.leads.get(frame, -1)
            if parent < 0 or (parent & 0xFFF) >> 3 != index_of(address, step):
                return next(self.spare)
            frame = parent >> 12
        return frame

    def retire(self, frame: int) -> None:
        """A page that is written without being a table, as the recording knows, is none, whatever was guessed."""
        for index, entry in self.tables.pop(frame, {}).items():
            below = (entry & e.ADDRESS) >> 12
            if self.leads.get(below) == frame << 12 | index << 3:
                del self.leads[below]
        self.retired.add(frame)
        self.leads.pop(frame, None)
        for key in [key for key, table in self.kernel.items() if table == frame]:
            del self.kernel[key]

    def path_again(self, root: int, address: int | None) -> Iterator[Fill]:
        """The way to an address that led through a retired table leads through another one."""
        table = root
        for level in (4, 3, 2) if address is not None else ():
            at = table << 12 | index_of(address or 0, level) << 3
            below = (self.entry(at) & e.ADDRESS) >> 12
            if below in self.retired:
                below = next(self.spare)
                yield from self.fill(at, below << 12 | KERNEL_TABLE)
            table = below

    def device(self, root: int, gpa: int) -> Iterator[Fill]:
        """Device memory is mapped; where, the recording does not say: at DEVICES + gpa."""
        address = DEVICES + (gpa & ~0xFFF)
        if self.mapped(root, address) != gpa >> 12:
            table = self.kernel.get((2, address >> 21))
            table = next(self.spare) if table is None else table
            at = table << 12 | index_of(address, 1) << 3
            yield from self.first_use(root, address, at, 1, (gpa & ~0xFFF) | KERNEL_TABLE)

    def linear(self, root: int, gpa: int, identity: bool) -> int | None:
        """A linear address at which the kernel can store to guest-physical memory; None where none is known."""
        frame = gpa >> 12
        guesses = (self.places.get(frame, 0), DIRECT + (frame << 12), frame << 12 if identity else DIRECT)
        for guess in guesses:
            if guess and self.mapped(root, guess) == frame:
                return guess | (gpa & 0xFFF)
        return None
