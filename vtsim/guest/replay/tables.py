"""The paging structures of a recorded guest, as far as its recording tells: what shadow paging needs to see.

Stores into tables that were in use are recorded. What was written before a table came into use is known from the first
use of each leaf entry only; tables on the way to it that nothing names stand in frames that the guest never touched.

SDM: "4-Level Paging and 5-Level Paging"; "PAE Paging"; "32-Bit Paging".
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Collection, Iterator
from typing import Final

from attrs import define, field

from vtsim.ept import spec as e
from vtsim.guest.traces.paging import Shape

# fmt: off
FLAGS: Final = e.PTE_ACCESSED | e.PTE_DIRTY
USER_TABLE: Final = e.PTE_PRESENT | e.PTE_WRITE | e.PTE_USER | FLAGS
KERNEL_TABLE: Final = USER_TABLE & ~e.PTE_USER
DEVICES: Final = -0x3700_0000_0000              # where Linux maps devices
NARROW_DEVICES: Final = 0xFF7F_F000             # with 32-bit addresses: from here down, where nothing else is
STORE, ZERO = range(2)
HIGH_PART: Final = 0x1F_E000                    # of an entry of 32-bit paging for 4 MiB: bits 39:32 of the address
# fmt: on
Fill = tuple[int, int, int]  # STORE or ZERO, guest-physical address, value


@define
class GuestTables:
    """Tables by frame: {index: entry}. A root is named by its guest-physical address."""

    shape: Shape
    spare: Iterator[int]
    tables: dict[int, dict[int, int]] = field(factory=dict)
    leads: dict[int, int] = field(factory=dict)  # frame of a table: address of the entry that leads to it
    kernel: dict[tuple[int, int], int] = field(factory=dict)  # level and part of the address: frame
    retired: set[int] = field(factory=set)
    links: dict[int, list[tuple[int, int]]] = field(factory=dict)  # frame: rows that store to what led to it, or -1
    large: dict[tuple[int, int, int], list[tuple[int, int]]] = field(factory=dict)  # root, level, part: see `_guess`
    held: dict[int, list[tuple[int, int]]] = field(factory=dict)  # upper entry: rows that store, value before
    fresh: set[int] = field(factory=set)  # frames of tables in use whose way is not known yet
    row: int = -1  # of the recording, that is being followed
    places: dict[int, int] = field(factory=dict)  # frame: linear address at which the kernel used it last
    devices: dict[int, int] = field(factory=dict)  # page of a device: linear address, with 32-bit ones

    @property
    def shares_pages(self) -> bool:
        """Has a page room for several roots?"""
        return self.shape.levels == 3

    def entry(self, at: int) -> int:
        """The entry at a guest-physical address."""
        return self.tables.get(at >> 12, {}).get((at & 0xFFF) // self.shape.size, 0)

    def place(self, table: int, address: int, level: int) -> int:
        """Where the entry for a linear address stands in a table."""
        of = self.shape
        return table + of.size * ((address >> (12 + of.bits * (level - 1))) & ((1 << of.bits) - 1))

    def index_at(self, at: int, level: int) -> int:
        """The index in its table of an entry at an address."""
        table = 31 if self.shares_pages and level == self.shape.levels else 0xFFF
        return (at & table) // self.shape.size

    def is_page(self, entry: int, level: int) -> bool:
        """Does an entry map a page?"""
        return level == 1 or (entry & e.PTE_LARGE != 0 and level in self.shape.pages)

    def page(self, entry: int, level: int) -> int:
        """The first frame that an entry maps."""
        within = (1 << self.shape.bits * (level - 1)) - 1
        high = (entry & HIGH_PART) << 7 if self.shape.size == 4 and level == 2 else 0
        return ((entry & e.ADDRESS) >> 12 & ~within) | high

    def mapped(self, root: int, address: int) -> int:
        """The frame that an address is mapped to; -1 if to none."""
        of, page = self.shape, address >> 12
        size, bits = of.size, of.bits
        table = root
        for level in range(of.levels, 0, -1):  # as `entry` and `place` have it, without calls
            shift = bits * (level - 1)
            at = table + size * (page >> shift & (1 << bits) - 1)
            held = self.tables.get(at >> 12)
            entry = held.get((at & 0xFFF) // size, 0) if held else 0
            if not entry & e.PTE_PRESENT:
                return -1
            if level == 1:
                return (entry & e.ADDRESS) >> 12
            if entry & e.PTE_LARGE and self.is_page(entry, level):
                return self.page(entry, level) | page & (1 << shift) - 1
            table = entry & e.ADDRESS
        return -1

    def store(self, at: int, value: int) -> None:
        """An entry was written."""
        self.tables.setdefault(at >> 12, {})[(at & 0xFFF) // self.shape.size] = value

    def fill(self, at: int, value: int) -> Iterator[Fill]:
        """An entry was written before anybody looked."""
        if self.entry(at) & ~FLAGS != value & ~FLAGS:
            self.store(at, value)
            yield STORE, at, value

    def link(self, at: int, level: int, value: int, *, told: bool = False) -> Iterator[Fill]:
        """What an entry of an upper level leads to becomes a table: it was zeroed before, if it was one once.

        Where the recording has `told` of the entry, a table in use has got another way to it.
        """
        if not value & e.PTE_PRESENT or self.is_page(value, level):
            return
        frame = (value & e.ADDRESS) >> 12
        if told and (self.is_live(frame) or self._is_kernels(frame)):
            return
        top = level == self.shape.levels
        kernels = self.index_at(at, level) >= self.shape.kernel and frame in self.leads
        shared = top and (kernels or self.is_live(frame))  # two roots of a process: page-table isolation
        if self.leads.get(frame) != at and not shared:
            stale = None if frame in self.fresh else self.tables.pop(frame, None)
            if stale:
                yield ZERO, frame << 12, 0
            self.leads[frame] = at
            self.fresh.discard(frame)
            self.retired.discard(frame)

    def unlink(self, before: int, level: int) -> None:
        """What an entry led to before it was stored to may be a table again, another one then."""
        frame = (before & e.ADDRESS) >> 12
        if before & e.PTE_PRESENT and not self.is_page(before, level) and not self._is_kernels(frame):
            self.fresh.discard(frame)
            self.leads.pop(frame, None)

    def _is_kernels(self, frame: int) -> bool:
        """Is this a table of the kernel? Such are never freed."""
        return frame in self.kernel.values()

    def used_as_table(self, at: int) -> Iterator[Fill]:
        """A store at `at` is one into a table in use: if nothing leads to it, it was zeroed and linked unseen."""
        frame = at >> 12
        is_root = self.leads.get(frame) == -1
        if is_root or frame in self.fresh or self.is_live(frame) or self._is_kernels(frame):
            return
        if self.tables.pop(frame, None):
            yield ZERO, frame << 12, 0
        self.retired.discard(frame)
        self.leads.pop(frame, None)
        self.fresh.add(frame)

    def other_way(self, old: int, address: int, at: int, level: int) -> int:
        """The entry below a root that leads elsewhere than to a leaf entry at `at`; 0 if none does."""
        table, place = old, 0
        for above in range(self.shape.levels, level, -1):
            place = self.place(table, address, above)
            entry = self.entry(place)
            if not entry & e.PTE_PRESENT:
                return 0
            if self.is_page(entry, above):
                return place
            table = entry & e.ADDRESS
        return place if table != at & ~0xFFF else 0

    def new_root(self, root: int, old: int, others: Collection[int] = ()) -> Iterator[Fill]:
        """A table becomes a root, a page that was one before again: the kernel's half is that of the root before.

        Except the parts of the address (of the top level) in `others`, for which it has tables of its own.
        """
        frame, top = root >> 12, self.shape.levels
        for level, part in [key for key in self.kernel if key[1] >> self.shape.bits * (top - key[0]) in others]:
            del self.kernel[level, part]
        if not self.shares_pages:
            if self.tables.pop(frame, None):
                yield ZERO, frame << 12, 0
            self.leads[frame] = -1
        elif frame not in self.leads:
            self.leads[frame] = -1
        self.retired.discard(frame)
        indexes = {part & (1 << self.shape.bits) - 1 for part in others}
        first = (old & 0xFFF) // self.shape.size
        end = first + (4 if self.shares_pages else 1 << self.shape.bits)
        for index, value in list(self.tables.get(old >> 12, {}).items()):
            if first + self.shape.kernel <= index < end and index - first not in indexes:
                yield from self.fill(root + self.shape.size * (index - first), value)

    def table_entry(self, level: int, kernel: bool) -> int:
        """The flags of an entry at a level that leads to a table."""
        if self.shares_pages and level == self.shape.levels:
            return e.PTE_PRESENT  # others are reserved in a PDPTE
        return KERNEL_TABLE if kernel else USER_TABLE

    def first_use(self, root: int, address: int, at: int, level: int, value: int) -> Iterator[Fill]:
        """A leaf entry at `at` is used for an address: what leads to it must be there."""
        table = root
        self.retired.discard(at >> 12)
        kernel = self.shape.is_kernel(address)
        for above in range(self.shape.levels, level, -1):
            place = self.place(table, address, above)
            entry = self.entry(place)
            below = (entry & e.ADDRESS) >> 12 if entry & e.PTE_PRESENT and not self.is_page(entry, above) else 0
            if below in self.retired:
                below = 0
            wanted = at >> 12 if above - 1 == level else below or self._guess(root, address, above, at, level)
            if below != wanted:
                entry = self._held_until_store(place, wanted) or wanted << 12 | self.table_entry(above, kernel)
                if kernel and self.kernel.get((above, self.part(address, above))) == wanted:
                    self.leads[wanted] = place  # the same table, on another way
                else:
                    yield from self.link(place, above, entry)
                yield from self.fill(place, entry)
            if kernel:
                self.kernel[above, self.part(address, above)] = wanted
            table = wanted << 12
        yield from self.fill(at, value)
        if kernel and value & e.PTE_PRESENT:
            within = (1 << self.shape.bits * (level - 1)) - 1
            self.places[self.page(value, level) | ((address >> 12) & within)] = address & ~0xFFF

    def _held_until_store(self, place: int, frame: int) -> int:
        """What an entry of an upper level holds, as the next store there says of what was before; 0 if it does not.

        Linux with page-table isolation has programs not executable below its own root: such tables have other shadows.
        """
        stores = self.held.get(place, ())
        at = bisect(stores, (self.row, 1 << 64))
        before = stores[at][1] if at < len(stores) else 0
        return before if before & e.PTE_PRESENT and (before & e.ADDRESS) >> 12 == frame else 0

    def part(self, address: int, level: int) -> int:
        """The part of an address that one entry at a level is for."""
        return address >> (12 + self.shape.bits * (level - 1))

    def foresee(self, uses: dict[int, list[tuple[int, int]]], row: int) -> Iterator[Fill]:
        """A table of the kernel is used at a row: entries that are used later, and not stored before, stand in it.

        Tables of the kernel are never freed. `uses` has the rows of each entry with its value, -1 for a store.
        """
        for at, events in uses.items():
            value = next((held for later, held in events if later > row), -1)
            if value != -1 and self.entry(at) == 0:
                yield from self.fill(at, value)

    def _guess(self, root: int, address: int, above: int, at: int, level: int) -> int:
        """The frame of a table, as other roots, later uses, or stores that made or end it tell; else a spare."""
        part = self.part(address, above)
        known = self.kernel.get((above, part))
        if known is not None:
            return known
        uses = self.large.get((root, above, part), ())
        place = bisect(uses, (self.row, 0))
        if place < len(uses):
            return uses[place][1]
        frame = at >> 12
        for step in range(level + 1, above):
            parent = self._parent(frame, step)
            if parent < 0 or self.index_at(parent, step) != self.shape.index(address, step):
                return next(self.spare)
            frame = parent >> 12
        return frame

    def _parent(self, frame: int, level: int) -> int:
        """The entry at a level that leads to a table: which holds it when it is next stored to, or the last known."""
        stores = self.links.get(frame, ())
        place = bisect(stores, (self.row, 1 << 64))
        if place < len(stores) and stores[place][1] & 7 == level:
            return stores[place][1] & ~7
        return self.leads.get(frame, -1)

    def retire(self, frame: int) -> None:
        """A page that is written without being a table, as the recording knows, is none, whatever was guessed."""
        for index, entry in self.tables.pop(frame, {}).items():
            below = (entry & e.ADDRESS) >> 12
            if self.leads.get(below) == (frame << 12) + index * self.shape.size:
                del self.leads[below]
        self.retired.add(frame)
        self.leads.pop(frame, None)
        for key in [key for key, table in self.kernel.items() if table == frame]:
            del self.kernel[key]

    def is_live(self, frame: int) -> bool:
        """Is a table in use: does the entry that led to it still do so?"""
        parent = self.leads.get(frame, -1)
        entry = self.entry(parent) if parent >= 0 else 0
        return entry & e.PTE_PRESENT != 0 and (entry & e.ADDRESS) >> 12 == frame

    def path_again(self, root: int, address: int | None) -> Iterator[Fill]:
        """The way to an address that led through a retired table leads through another one."""
        table = root
        for level in range(self.shape.levels, 1, -1) if address is not None else ():
            at = self.place(table, address or 0, level)
            below = (self.entry(at) & e.ADDRESS) >> 12
            if below in self.retired:
                below = next(self.spare)
                yield from self.fill(at, below << 12 | self.table_entry(level, True))
            table = below << 12

    def device_at(self, root: int, gpa: int) -> int:
        """The linear address at which device memory is mapped; which it is, the recording does not say."""
        if not self.shape.narrow:
            return DEVICES + gpa
        address = self.devices.get(gpa >> 12, NARROW_DEVICES)
        taken = self.devices.values()  # of which some may not be mapped below this root
        while gpa >> 12 not in self.devices and (address in taken or self.mapped(root, address) >= 0):
            address -= 0x1000
        self.devices[gpa >> 12] = address
        return address | (gpa & 0xFFF)

    def device(self, root: int, gpa: int) -> Iterator[Fill]:
        """Device memory is mapped."""
        address = self.device_at(root, gpa) & ~0xFFF
        if self.mapped(root, address) != gpa >> 12:
            yield from self._map(root, address, gpa >> 12)

    def accessed(self, root: int, address: int) -> Iterator[Fill]:
        """An address of the kernel was accessed: if not even its table is known, it leads to an untouched page."""
        if self.mapped(root, address) < 0:
            yield from self._map(root, address, -1)

    def _map(self, root: int, address: int, frame: int) -> Iterator[Fill]:
        """An address of the kernel is mapped to a frame; to what its entry says or a spare one if that is -1."""
        table = self.kernel.get((2, self.part(address, 2)))
        table = next(self.spare) if table is None else table
        at = self.place(table << 12, address, 1)
        entry = self.entry(at) if frame < 0 else 0
        if not entry & e.PTE_PRESENT:
            entry = (next(self.spare) if frame < 0 else frame) << 12 | KERNEL_TABLE
        yield from self.first_use(root, address, at, 1, entry)

    def stored_to(self, root: int, gpa: int) -> Iterator[Fill]:
        """The kernel stores to a page by its map of all memory: the entry is there, though nothing tells of it.

        A large page of that map that was split left its table full.
        """
        frame = gpa >> 12
        address = self.shape.direct + (frame << 12)
        table = root
        for level in range(self.shape.levels, 0, -1):
            at = self.place(table, address, level)
            entry = self.entry(at)
            if level == 1 and not entry & e.PTE_PRESENT and not self.shape.narrow:
                yield from self.fill(at, frame << 12 | KERNEL_TABLE)
            if not entry & e.PTE_PRESENT or self.is_page(entry, level):
                return
            table = entry & e.ADDRESS

    def linear(self, root: int, gpa: int, identity: bool) -> int | None:
        """A linear address at which the kernel can store to guest-physical memory; None where none is known."""
        frame = gpa >> 12
        direct = self.shape.direct + (frame << 12)
        guesses = (self.places.get(frame, 0), direct, frame << 12 if identity else direct)
        for guess in guesses:
            if guess and not (self.shape.narrow and guess >> 32) and self.mapped(root, guess) == frame:
                return guess | (gpa & 0xFFF)
        return None
