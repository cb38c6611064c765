"""What the recorded rows become under shadow paging: accesses at linear addresses, through tables that are kept true.

`GuestTables` follows the guest's tables row by row. Where a recorder did not follow the tables of a paging mode, the
first touches of pages are uses of entries in tables that stand in frames that the guest never touched.

SDM: "4-Level Paging and 5-Level Paging"; "PAE Paging"; "32-Bit Paging".
Not modelled: on shadow tables, stores into tables of a recorded guest whose tables were not recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Final

import numpy as np
from attrs import define, evolve, field
from numpy.typing import NDArray

from vtsim.base.errors import ConfigError
from vtsim.base.memory import gfn_ranges
from vtsim.cpu import ops as o
from vtsim.cpu.kernels import replay as e
from vtsim.cpu.slots import RAX
from vtsim.ept import spec as e_spec
from vtsim.guest.replay.steps import ABSOLUTE, ABSOLUTE_4, DELIVERED, FETCH, WRITE, Step, event, registers
from vtsim.guest.replay.tables import KERNEL_TABLE, USER_TABLE, ZERO, GuestTables
from vtsim.guest.traces.format import Trace
from vtsim.guest.traces.kinds import NAME, NUMBER
from vtsim.guest.traces.paging import (
    CR0_PDPTES,
    CR4_PDPTES,
    FLAT,
    PAE,
    SHAPES,
    Shape,
    large_pages,
    register_writes,
    shapes,
    table_shapes,
)
from vtsim.guest.traces.rows import LEAVES, TOUCHES, outside

RESERVED: Final = e_spec.ADDRESS & ~((1 << 46) - 1)
DEVICES_ACCESSED: Final = ("MMIO_R", "MMIO_W")
LOW_32: Final = 0xFFFF_FFFF
GIB: Final = 1 << 30
KERNEL_IMAGE: Final = -0x8000_0000  # where Linux's 64-bit kernels are linked to run, and modules above
# rows whose instruction was not fetched, or is not yet known to have been
NOT_FETCHED: Final = (*TOUCHES, "LEAF_F", "EXC", "IRQ", "ROOT", "REARM")
Uses = dict[int, list[tuple[int, int]]]


def refuse_unfollowed(trace: Trace, of_rows: NDArray[np.int64]) -> None:
    """Refuse a recording that says of its tables what cannot be."""

    def of(*names: str) -> NDArray[np.bool_]:
        return np.isin(trace.kind, [NUMBER[name] for name in names])

    levels = np.array([0, *(SHAPES[key].levels for key in sorted(SHAPES))])
    leaves = np.array([0, *(max(SHAPES[key].pages) for key in sorted(SHAPES))])
    level = np.where(of_rows == min(SHAPES), trace.a0 & 3, trace.a0 & 7)
    frame = trace.a2 & e_spec.ADDRESS
    # fmt: off
    refused = (
        (of("PTW") & (level > levels[of_rows]),                   "the guest's tables have fewer levels here"),
        (of(*LEAVES) & (trace.a1 & 3 > leaves[of_rows]),          "an entry of that level maps no page here"),
        (of(*LEAVES) & (trace.a2 & e_spec.PTE_PRESENT == 0),      "the entry that was used is not present"),
        (of(*LEAVES) & outside(frame, trace.guest.memory_bytes),  "the page is in neither memory nor firmware"),
    )
    # fmt: on
    for rows, what in refused:
        if rows.any():
            row = int(np.argmax(rows))
            raise ConfigError(
                f"row {row} ({NAME[int(trace.kind[row])]}): {what}, which shadow tables are not made of",
                help="vmm.paging can be ept",
            )


@define(eq=False)
class Follower:
    """Goes through a trace; `steps` are what rows become, by row, and `dropped` the rows that become nothing."""

    trace: Trace
    operands: NDArray[np.int64]  # of loads and stores of device memory
    ordinary: Callable[[Iterable[int]], Iterator[tuple[Step, int]]]  # steps that rows become without shadow tables
    steps: dict[int, tuple[tuple[Step, int], ...]] = field(factory=dict)
    dropped: NDArray[np.bool_] = field(init=False)
    kind: NDArray[np.uint8] = field(init=False)  # this and the next ones: the trace's, with what touches tell
    a0: NDArray[np.int64] = field(init=False)
    a1: NDArray[np.int64] = field(init=False)
    a2: NDArray[np.int64] = field(init=False)
    shape: NDArray[np.int64] = field(init=False)
    tables: dict[int, GuestTables] = field(factory=dict)
    loads: NDArray[np.int64] = field(init=False)  # rows that load PDPTEs
    early: dict[int, list[Step]] = field(factory=dict)  # what fills these before, by row
    roots: NDArray[np.int64] = field(init=False)  # rows, as the next two
    stored: NDArray[np.int64] = field(init=False)
    of_leaves: NDArray[np.bool_] = field(init=False)
    iterates: list[bool] = field(init=False)

    def __attrs_post_init__(self) -> None:
        t = self.trace
        running, self.shape = shapes(t), table_shapes(t)
        refuse_unfollowed(t, self.shape)
        self.kind, self.a0, self.a1, self.a2 = t.kind.copy(), t.a0, t.a1.copy(), t.a2.copy()
        spare = self._untouched()
        self.tables = {key: GuestTables(shape=self._with_map(key), spare=spare) for key in SHAPES}
        flat = self._without_paging(running)
        touches = self.of(*TOUCHES)
        followed = np.unique(self.shape[self.of(*LEAVES, "PTW", "ROOT")])
        unknown = touches & ~flat & ~np.isin(self.shape, followed) & (running != FLAT)
        self.dropped = touches & ~flat
        self.loads = self._loads_of_pdptes(running)
        self._use_touches(np.nonzero(unknown)[0].tolist(), spare)
        self.roots, self.stored = (np.nonzero(self.of(name))[0] for name in ("ROOT", "PTW"))
        self.of_leaves = self.of(*LEAVES)
        self.iterates = self._iterations()
        self._stores_of_links()
        self._uses_of_large_pages()
        self._follow(flat)
        self._put_early()

    def of(self, *names: str) -> NDArray[np.bool_]:
        """Which rows are of these kinds."""
        return np.isin(self.kind, [NUMBER[name] for name in names])

    def _with_map(self, key: int) -> Shape:
        """The shape, with Linux's map of all memory where the recording shows it: its place may be random.

        It lies whole GiB from physical addresses, as nothing else below the kernel's image that has as many entries.

        Source: Linux 6.1, kernel_randomize_memory in arch/x86/mm/kaslr.c (aligned to PUD_SIZE).
        """
        shape = SHAPES[key]
        uses = self.of(*LEAVES) & (self.shape == key) & (self.a0 < KERNEL_IMAGE) & (self.a1 & 3 > 1)
        if shape.narrow or not uses.any():
            return shape
        page = np.int64(-1) << (12 + shape.bits * ((self.a1[uses] & 3) - 1))
        distances = (self.a0[uses] & page) - (self.a2[uses] & e_spec.ADDRESS & page)
        found, times = np.unique(distances[distances & GIB - 1 == 0], return_counts=True)
        return evolve(shape, direct=int(found[np.argmax(times)])) if len(found) else shape

    def _without_paging(self, running: NDArray[np.int64]) -> NDArray[np.bool_]:
        """In which rows are linear addresses physical ones? A recording may begin when paging is on already."""
        paged = np.maximum.accumulate(running != FLAT)
        rooted = np.maximum.accumulate(self.of("ROOT"))
        flat: NDArray[np.bool_] = (running == FLAT) & (paged | ~rooted)
        return flat

    def _loads_of_pdptes(self, running: NDArray[np.int64]) -> NDArray[np.int64]:
        """Rows that load the PDPTEs of PAE paging.

        SDM: "PDPTE Registers".
        """
        t = self.trace
        after = np.append(running[1:], running[-1:])
        watched = register_writes(t, 3) & (running == PAE)
        for register, bits in ((0, CR0_PDPTES), (4, CR4_PDPTES)):
            watched |= register_writes(t, register) & ((t.a1 ^ t.a2) & bits != 0)
        return np.nonzero(watched & (after == PAE))[0]

    def _roots(self) -> NDArray[np.int64]:
        """The guest-physical address of the root in each row."""
        masks = np.array([SHAPES[key].root if key in SHAPES else 0 for key in range(max(SHAPES) + 1)])
        roots: NDArray[np.int64] = self.trace.cr3 & masks[self.shape]
        return roots

    # --- tables that were not recorded
    def _use_touches(self, rows: list[int], spare: Iterator[int]) -> None:
        """First touches become uses of entries, in tables of which nothing else is known."""
        known: dict[tuple[int, int, int, int], int] = {}
        flags: dict[int, int] = {}
        regions, roots = self._regions(rows), self._roots()
        for row in rows:
            key = int(self.shape[row])
            shape, tables = SHAPES[key], self.tables[key]
            address, page = self._linear(row, int(self.trace.a1[row])), int(self.trace.a0[row]) & ~0xFFF
            kernel = shape.is_kernel(address)
            level = 2 if len(regions[key, tables.part(address, 2)]) == 1 else 1
            table, root = int(roots[row]), 0 if kernel else int(roots[row])
            if level < shape.levels:
                part = tables.part(address, level + 1)
                if (key, root, level, part) not in known:
                    known[key, root, level, part] = next(spare)
                    if kernel:
                        tables.kernel[level + 1, part] = known[key, root, level, part]
                table = known[key, root, level, part] << 12
            at = tables.place(table, address, level)
            value = page & ~((1 << shape.bits * (level - 1)) - 1 << 12) | (e_spec.PTE_LARGE if level == 2 else 0)
            value |= USER_TABLE if self.trace.cpl[row] == 3 else KERNEL_TABLE
            if (flags.get(at, -1) ^ value) & ~0xFFF == 0:
                value |= flags[at] & e_spec.PTE_USER
            flags[at] = value
            self.kind[row] = NUMBER[LEAVES[TOUCHES.index(NAME[int(self.trace.kind[row])]) % len(LEAVES)]]
            self.a1[row], self.a2[row] = at | level, value
            self.dropped[row] = False
        self.a0 = np.where(np.isin(np.arange(len(self.kind)), rows), self.trace.a1, self.trace.a0)

    def _regions(self, rows: list[int]) -> dict[tuple[int, int], set[int]]:
        """By shape and what an entry of level 2 is for: how far physical addresses lie from linear ones.

        One distance that is a multiple of a large page, where only ring 0 was, is taken for a large page: kernels map
        memory with them, and loaders all addresses to themselves.
        """
        found: dict[tuple[int, int], set[int]] = {}
        allowed = large_pages(self.trace)
        for row in rows:
            key, address = int(self.shape[row]), self._linear(row, int(self.trace.a1[row]))
            distance = (address & ~0xFFF) - (int(self.trace.a0[row]) & ~0xFFF)
            distances = found.setdefault((key, self.tables[key].part(address, 2)), set())
            distances.add(distance)
            if distance & ((1 << 12 + SHAPES[key].bits) - 1) or not allowed[row] or self.trace.cpl[row]:
                distances.add(-1)
        return found

    def _linear(self, row: int, address: int) -> int:
        return address & LOW_32 if SHAPES[int(self.shape[row])].narrow else address

    # --- row by row
    def _follow(self, flat: NDArray[np.bool_]) -> None:
        loads = np.isin(np.arange(len(self.kind)), self.loads)
        gates, fetches = self._gates(flat), self._fetches(flat)
        told = self.of(*LEAVES, "PTW", "ROOT", *DEVICES_ACCESSED) | loads
        rows = np.nonzero(told | (gates != 0) | fetches)[0].tolist()
        written, uses, directories = self._stores_after(), self._uses_of_entries(), self._directories()
        columns = (self.kind[rows], self.shape[rows], self._roots()[rows], self.a0[rows], self.a1[rows], self.a2[rows])
        for row, number, key, root, a0, a1, a2 in zip(rows, *(each.tolist() for each in columns), strict=True):
            kind, tables, shape = NAME[number], self.tables[key], SHAPES[key]
            tables.row = row
            fetch = self._fetch(tables, row, root) if fetches[row] else []
            if loads[row]:
                self._load(row, a1 if a0 == 3 else int(self.trace.cr3[row]))
                continue
            if kind == "ROOT":
                found = self._with_zeroes(
                    tables, root, tables.new_root(a0 & shape.root, root, self._others(tables, row, root))
                )
                if key != PAE and (before := self._load_of(row, a0 & shape.root)) is not None:
                    self._put_before(before, found)
                    found = []
            elif kind == "PTW":
                found = self._store(tables, row, root, a0, a1, a2)
            elif kind in LEAVES:
                a0, level = a0 & LOW_32 if shape.narrow else a0, a1 & 3
                at = shape.leaf_at(a1, a0, level)
                if key == PAE:
                    directory = directories.get((self._load_before(row), a0 >> 30))
                    found = self._directory(tables, root, a0, directory)
                else:
                    found = []
                found += self._with_zeroes(tables, root, tables.first_use(root, a0, at, level, a2))
                if shape.is_kernel(a0):
                    found += [fill_step(f, shape.size) for f in tables.foresee(uses.pop((key, at >> 12), {}), row)]
                frame = tables.mapped(root, a0)
                if kind == "LEAF_W" and written.get(row) != frame and frame in tables.tables:
                    tables.retire(frame)
                    found += self._with_zeroes(tables, root, tables.first_use(root, a0, at, level, a2))
                if kind != "LEAF_W" or written.get(row) != frame:
                    found.append(event(e.ACCESS, LEAVES.index(kind), (frame << 12) | (a0 & 0xFFF), a0))
            elif flat[row]:
                continue
            elif gates[row]:
                found = [fill_step(f, shape.size) for f in tables.accessed(root, int(gates[row]))]
            elif not told[row]:
                found = []
            else:
                found = [fill_step(f, shape.size) for f in tables.device(root, a0)]
                place, operand = tables.device_at(root, a0), int(self.operands[row])
                load = Step(o.LD, RAX, mem=operand, disp=place, extra=a1)
                found += [load] if kind == "MMIO_R" else [registers(a1), Step(o.ST, RAX, mem=operand, disp=place)]
            if key == PAE:
                found = self._loaded_earlier(row, kind, root, found)
            if told[row]:
                self.steps[row] = tuple((step, row) for step in (*fetch, *found))
            elif fetch or found:
                self._put_before(row, [*fetch, *found])

    def _others(self, tables: GuestTables, row: int, old: int) -> set[int]:
        """For which parts of the kernel's half has the root of this row other tables than the root before?

        For those of which an entry is used, before the next root comes, that stands elsewhere than on the old way,
        while nothing on that way was stored to in between. (Linux leaves the tables of its start so.)
        """
        shape = tables.shape
        found: set[int] = set()
        if tables.shares_pages:  # PDPTEs are known from their loads
            return found
        place = int(np.searchsorted(self.roots, row, side="right"))
        end = int(self.roots[place]) if place < len(self.roots) else len(self.kind)
        stores = self.stored[np.searchsorted(self.stored, row) : np.searchsorted(self.stored, end)]
        stored = {shape.place_of(int(self.a0[store])): int(store) for store in reversed(stores.tolist())}
        below = self.of_leaves[row:end] & (self.trace.cr3[row:end] & shape.root == int(self.a0[row]) & shape.root)
        for use in (np.nonzero(below)[0] + row).tolist():
            address, level = self._linear(use, int(self.a0[use])), int(self.a1[use]) & 3
            part = tables.part(address, shape.levels)
            if shape.is_kernel(address) and part not in found:
                other = tables.other_way(old, address, shape.leaf_at(int(self.a1[use]), address, level), level)
                if other and stored.get(other, end) > use:
                    found.add(part)
        return found

    def _put_before(self, row: int, steps: list[Step]) -> None:
        """Steps before what a row becomes."""
        self.steps[row] = (*((step, row) for step in steps), *(self.steps.get(row) or self.ordinary([row])))

    def _fetches(self, flat: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Rows that say of a page for the first time since CR3 or the ring changed that code in it runs."""
        t = self.trace
        changes = register_writes(t, 3) | self.of("SYSRET", "IRET") | (np.append(t.cpl[1:], t.cpl[-1:]) != t.cpl)
        since = np.append(0, np.cumsum(changes)[:-1])
        rows = np.nonzero(~flat & (t.rip != 0) & ~self.of(*NOT_FETCHED))[0]
        first: NDArray[np.bool_] = np.zeros(len(t), bool)
        first[rows[np.unique(np.stack((since[rows], t.rip[rows] >> 12)), axis=1, return_index=True)[1]]] = True
        return first

    def _fetch(self, tables: GuestTables, row: int, root: int) -> list[Step]:
        """The fetch of an instruction, where it is known which page that is."""
        address = self._linear(row, int(self.trace.rip[row]))
        frame = tables.mapped(root, address)
        return [] if frame < 0 else [event(e.ACCESS, FETCH, frame << 12 | address & 0xFFF, address)]

    def _gates(self, flat: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Of rows that deliver an event: the linear address of its gate in the IDT; 0 where that is not known."""
        loads = np.nonzero(self.of("LIDT"))[0]
        base = np.append(0, self.trace.a0[loads])[np.searchsorted(loads, np.arange(len(self.kind)))]
        shift = np.where(np.isin(self.shape, [key for key in SHAPES if SHAPES[key].narrow]), 3, 4)
        known = self.of(*DELIVERED) & (base != 0) & ~flat
        gates: NDArray[np.int64] = np.where(known, base + (self.trace.a0 << shift), 0)
        return gates

    def _load_of(self, row: int, root: int) -> int | None:
        """The MOV to CR3 before a row that says that what it loaded is a root now: that was filled before."""
        t = self.trace
        for load in range(row - 1, -1, -1):
            if t.icount[row] - t.icount[load] > 1:
                break
            if t.kind[load] == NUMBER["MOV_TO_CR"] and t.a0[load] == 3:
                return load if int(t.a1[load]) & SHAPES[int(self.shape[row])].root == root else None
        return None

    # --- PDPTEs, which are read when they are loaded and at no other time
    def _load_before(self, row: int) -> int:
        """The last row before that loads PDPTEs; -1 if there is none."""
        place = int(np.searchsorted(self.loads, row))
        return int(self.loads[place - 1]) if place else -1

    def _directories(self) -> dict[tuple[int, int], int]:
        """By load of PDPTEs and GiB: the page directory, where an entry of it was used for a page of 2 MiB."""
        found: dict[tuple[int, int], int] = {}
        for row in np.nonzero(self.of(*LEAVES) & (self.shape == PAE) & (self.a1 & 3 == 2))[0].tolist():
            found.setdefault((self._load_before(row), int(self.a0[row]) >> 30 & 3), int(self.a1[row]) >> 12)
        return found

    def _directory(self, tables: GuestTables, root: int, address: int, directory: int | None) -> list[Step]:
        """A page directory that is known: the PDPTE leads to it."""
        place = tables.place(root, address, 3)
        if directory is None or (tables.entry(place) & e_spec.ADDRESS) >> 12 == directory:
            return []
        fills = [*tables.link(place, 3, directory << 12 | 1), *tables.fill(place, directory << 12 | 1)]
        if tables.shape.is_kernel(address):
            tables.kernel[3, tables.part(address, 3)] = directory
        return [fill_step(fill, 8) for fill in fills]

    def _loaded_earlier(self, row: int, kind: str, root: int, found: list[Step]) -> list[Step]:
        """Of the steps of a row, those that fill PDPTEs are put before the row that loads them; the others."""
        load = self._load_before(row) if kind != "PTW" else -1
        if load < 0:
            return found
        roots = (root, int(self.a0[row]) & SHAPES[PAE].root if kind == "ROOT" else root)
        early = [step for step in found if step.r1 == e.FILL and int(step.imm) & ~31 in roots]
        self.early.setdefault(load, []).extend(early)
        return [step for step in found if step not in early]

    def _load(self, row: int, cr3: int) -> None:
        """PDPTEs are loaded: those that nothing is known of are not present, whatever else has stood there."""
        root = cr3 & SHAPES[PAE].root
        known = ((root + 8 * n, self.tables[PAE].entry(root + 8 * n)) for n in range(4))
        self.early[row] = [fill_step((0, at, entry), 8) for at, entry in known]

    def _put_early(self) -> None:
        for load, early in self.early.items():
            if early:
                self._put_before(load, early)

    # --- stores into tables
    def _store(self, tables: GuestTables, row: int, root: int, a0: int, value: int, before: int) -> list[Step]:
        """A store into a table in use; and the zeroing of what it makes a table."""
        t, shape = self.trace, tables.shape
        at, level = shape.place_of(a0), shape.level_of(a0)
        found = self._with_zeroes(tables, root, tables.used_as_table(at))
        if (before ^ value) & (e_spec.ADDRESS | e_spec.PTE_PRESENT):
            tables.unlink(before, level)
        found += self._with_zeroes(tables, root, tables.link(at, level, value, told=True))
        found += self._overwritten(tables, root, level, value)
        identity = 0 <= int(t.rip[row]) < 1 << 46
        if tables.linear(root, at, identity) is None:
            found += [fill_step(fill, shape.size) for fill in tables.stored_to(root, at)]
        place = tables.linear(root, at, identity)
        tables.store(at, value)
        if value & e_spec.PTE_PRESENT == 0 and value & RESERVED:
            tables.retire(at >> 12)  # no entry looks like this: the page is poisoned
            found += self._with_zeroes(tables, root, tables.path_again(root, place))
        string = row + 1 < len(t) and self.iterates[row + 1]
        fill = fill_step((0, at, value), shape.size)
        if self.iterates[row] or place is None:
            return [*found, fill]
        if string:
            return [*found, event(e.ACCESS, WRITE, at, place), fill]
        return [*found, Step(o.ST, imm=value, mem=ABSOLUTE if shape.size == 8 else ABSOLUTE_4, disp=place)]

    def _overwritten(self, tables: GuestTables, root: int, level: int, value: int) -> list[Step]:
        """A page that user programs get holds no table any more: the kernel has overwritten it."""
        frame = (value & e_spec.ADDRESS) >> 12
        given = value & e_spec.PTE_PRESENT and value & e_spec.PTE_USER and tables.is_page(value, level)
        if not given or frame not in tables.tables or frame == root >> 12 or tables.is_live(frame):
            return []
        tables.retire(frame)
        place = tables.linear(root, frame << 12, False)
        return [] if place is None else [event(e.ACCESS, WRITE, frame << 12, place)]

    def _iterations(self) -> list[bool]:
        """Of each row: is it a further iteration of a string instruction that stores into tables?"""
        t, stores = self.trace, self.of("PTW")
        again = stores[1:] & stores[:-1] & (t.rip[1:] == t.rip[:-1]) & (t.icount[1:] - t.icount[:-1] <= 1)
        return [False, *again.tolist()]

    def _with_zeroes(self, tables: GuestTables, root: int, fills: Iterator[tuple[int, int, int]]) -> list[Step]:
        """Fills as steps; the guest zeroes a page with stores before it makes it a table.

        With 64-bit addresses that is one instruction, REP STOS. A 32-bit kernel clears pages with memset, of which the
        compiler makes a store to the first word, one to the last, and REP STOS.

        Source: Linux 6.1, clear_page in asm/page_64.h and asm/page_32.h; Debian's 686-pae kernel, disassembled.
        """
        found = []
        for fill in fills:
            if fill[0] == ZERO:
                place = tables.linear(root, fill[1], False)
                if place is not None and tables.shape.narrow:
                    found += [Step(o.ST, imm=0, mem=ABSOLUTE_4, disp=place + at) for at in (0, 0xFFC)]
                    found.append(event(e.ACCESS, WRITE, fill[1] + 4, place + 4))
                elif place is not None:
                    found.append(event(e.ACCESS, WRITE, fill[1], place))
            found.append(fill_step(fill, tables.shape.size))
        return found

    def _stores_after(self) -> dict[int, int]:
        """Rows directly before a recorded store of the same instruction into a table: the frame of that table."""
        t = self.trace
        stores = np.nonzero(self.of("PTW"))[0]
        stores = stores[stores > 0]
        before = stores[t.icount[stores] == t.icount[stores - 1]]
        return dict(zip((before - 1).tolist(), (t.a0[before] >> 12).tolist(), strict=True))

    def _uses_of_entries(self) -> dict[tuple[int, int], Uses]:
        """By shape and frame, by entry: rows that use it first for the kernel (what it holds), all others (-1)."""
        uses: dict[tuple[int, int], Uses] = {}
        rows = np.nonzero(self.of(*LEAVES, "PTW"))[0]
        columns = (
            rows,
            self.kind[rows] == NUMBER["PTW"],
            self.shape[rows],
            self.a0[rows],
            self.a1[rows],
            self.a2[rows],
        )
        for row, stored, key, a0, a1, a2 in zip(*(each.tolist() for each in columns), strict=True):
            shape = SHAPES[key]
            at = shape.place_of(a0) if stored else shape.leaf_at(a1, a0, a1 & 3)
            value = -1 if stored or not shape.is_kernel(a0 & LOW_32 if shape.narrow else a0) else a2
            uses.setdefault((key, at >> 12), {}).setdefault(at, []).append((row, value))
        return uses

    def _stores_of_links(self) -> None:
        """For each table, the stores after which an entry does not lead to it any more: where that entry is and its
        level. -1 for a store after which one does.
        """
        t = self.trace
        rows = np.nonzero(self.of("PTW"))[0]
        columns = (rows, self.shape[rows], t.a0[rows], t.a1[rows], t.a2[rows])
        for row, key, a0, after, before in zip(*(each.tolist() for each in columns), strict=True):
            shape, tables = SHAPES[key], self.tables[key]
            level = shape.level_of(a0)
            if level > 1:
                tables.held.setdefault(shape.place_of(a0), []).append((row, before))
            for entry, at in ((before, shape.place_of(a0) | level), (after, -1)):
                if level > 1 and entry & e_spec.PTE_PRESENT and not tables.is_page(entry, level):
                    tables.links.setdefault((entry & e_spec.ADDRESS) >> 12, []).append((row, at))

    def _uses_of_large_pages(self) -> None:
        """By root, level and part of the kernel's addresses: rows that use a large page there, its table."""
        rows = np.nonzero(self.of_leaves & (self.a1 & 3 > 1))[0]
        columns = (rows, self.shape[rows], self._roots()[rows], self.a0[rows], self.a1[rows])
        for row, key, root, address, a1 in zip(*(each.tolist() for each in columns), strict=True):
            tables, above = self.tables[key], (a1 & 3) + 1
            address = self._linear(row, address)
            if tables.shape.is_kernel(address) and above <= tables.shape.levels:
                uses = tables.large.setdefault((root, above, tables.part(address, above)), [])
                uses.append((row, a1 >> 12))

    def _untouched(self) -> Iterator[int]:
        """Frames of memory that no row names, from the end."""
        t = self.trace
        used = {int(frame) for frame in np.unique(t.a0[self.of(*TOUCHES, "PTW", "ROOT")] >> 12)}
        used |= {int(frame) for frame in np.unique(t.a1[self.of(*LEAVES)] >> 12)}
        used |= {int(frame) for frame in np.unique((t.a2[self.of(*LEAVES)] & e_spec.ADDRESS) >> 12)}
        for first, end in reversed(gfn_ranges(t.guest.memory_bytes)):
            yield from (frame for frame in range(end - 1, max(first - 1, 0), -1) if frame not in used)
        raise ConfigError(
            "the recording names all of its memory: no frame is left for tables that it does not tell of",
            help="vmm.paging can be ept",
        )


def fill_step(fill: tuple[int, int, int], size: int) -> Step:
    """A word of a table, or a whole table, that the guest wrote before it was in use; entries have `size` bytes."""
    kind, at, value = fill
    return event(e.CLEAR if kind == ZERO else e.FILL, size, at, value)
