"""Small worlds for tests of the remapping unit: memory, one requester, and tables with a few pages of known rights."""

from __future__ import annotations

import random
from collections.abc import Callable

from attrs import define, field

from vtsim.base.memory import ROM, give_contents, signed
from vtsim.ept.tables import Table
from vtsim.iommu import entries as e
from vtsim.iommu import spec as sp
from vtsim.iommu.state import COMPLETED, Caches
from vtsim.iommu.tables import (
    READ_WRITE,
    USER_PAGE,
    Memory,
    Structures,
    domain_table,
    guest_table,
    process_table,
)
from vtsim.iommu.unit import Answer, Capabilities, RemappingUnit

MIB = 1 << 20
SID = 0x0310  # bus 3, device 2, function 0
DOMAIN = 5
PASID = 67  # its entry is the fourth of the second table of the directory
NEW = 0x2100  # where `remapped` leads to
TARGET = 0x2000  # frames that pages lead to: the upper half of memory
OUTSIDE = 0x3FFF_F000  # no memory there
READ_ONLY_PAGE, WRITE_ONLY_PAGE, RW_PAGE, SUPERVISOR_PAGE, HUGE_PAGE = (
    0x20_1000,
    0x20_2000,
    0x20_3000,
    0x20_4000,
    2 << 30,
)
GUEST_TABLES = 0x10_0000  # first guest frame of a guest's tables


@define(eq=False)
class World:
    """One remapping unit with one requester; `second` and `first` are its tables, where it has them."""

    kind: str
    capabilities: Capabilities = field(factory=Capabilities)
    caches: Caches = field(factory=Caches)
    levels: int = 4
    memory: Memory = field(init=False)
    structures: Structures = field(init=False)
    second: Table | None = field(default=None, init=False)
    first: Table | None = field(default=None, init=False)
    unit: RemappingUnit = field(init=False)
    ranges: dict[range, str] = field(factory=dict, init=False)  # memory types, as `type_memory` has set them
    default_type: str = field(default="UC", init=False)

    def __attrs_post_init__(self) -> None:
        self.memory = Memory(64 * MIB, pool_pages=256)
        self.structures = Structures(self.memory, scalable=self.kind != "legacy")
        self.unit = RemappingUnit(self.memory.arena, self.capabilities, self.caches)
        getattr(self, "_" + self.kind.replace("-", "_"))()
        self.unit.enable(self.structures.rtaddr)

    @property
    def pasid(self) -> int:
        return sp.NO_PASID if self.kind == "legacy" else PASID

    def _legacy(self) -> None:
        self.second = domain_table(self.memory, self.levels)
        self._map_second(self.second)
        self.structures.attach(SID, self.second, DOMAIN, devices=True)

    def _scalable(self, middle: int = e.PWSNP, high: int = e.SRE | e.ERE | e.NXE | e.WPE, low: int = 0) -> None:
        flags = e.PASIDE | e.DTE | e.PRE
        self.structures.enable(SID, flags=flags)
        for pasid in (0, PASID):
            self.structures.assign(
                SID, pasid, DOMAIN, first=self.first, second=self.second, low=low, middle=middle, high=high
            )

    def _second_level(self) -> None:
        self.second = domain_table(self.memory, self.levels)
        self._map_second(self.second)
        self._scalable(low=e.SLADE)

    def _first_level(self) -> None:
        self.first = process_table(self.memory, self.levels)
        self._map_first(self.first, TARGET)
        self._scalable()

    def _nested(self) -> None:
        self.second = domain_table(self.memory)
        self.second.map_range(TARGET << 12, TARGET, 0x800, READ_WRITE)  # identity, 4 KiB pages
        self.first = guest_table(self.memory, self.second, GUEST_TABLES, self.levels)
        self._map_first(self.first, TARGET)
        self._scalable(low=e.SLADE)

    def _pass_through(self) -> None:
        self._scalable()

    def _map_second(self, table: Table) -> None:
        table.map(READ_ONLY_PAGE, TARGET, e.SL_R)
        table.map(WRITE_ONLY_PAGE, TARGET + 1, e.SL_W)
        table.map(RW_PAGE, TARGET + 2, READ_WRITE)
        table.map(HUGE_PAGE, TARGET + 0x200, READ_WRITE, size=1)

    def _map_first(self, table: Table, frame: int) -> None:
        table.map(READ_ONLY_PAGE, frame, e.PRESENT | e.FL_US)
        table.map(WRITE_ONLY_PAGE, frame + 1, USER_PAGE | e.FL_XD)
        table.map(RW_PAGE, frame + 2, USER_PAGE)
        table.map(SUPERVISOR_PAGE, frame + 3, e.PRESENT | e.FL_RW)
        table.map(HUGE_PAGE, frame + 0x200, USER_PAGE, size=1)

    def ask(self, address: int, access: int = sp.READ, **more: int) -> Answer:
        """A request of the requester, with its PASID in scalable mode."""
        return self.unit.translate(SID, address, access, **{"pasid": self.pasid, **more})

    def entry_at(self, table: Table, address: int, level: int) -> int:
        """The host-physical address of a paging entry of a level on the way to an address."""
        frame = table.root
        for depth in range(table.levels, level, -1):
            words = table.words(frame)
            frame = (int(words[(address >> (3 + 9 * depth)) & 511]) & e.ADDRESS) >> 12
        host = frame
        if table is self.first and self.second is not None:
            leaf = self.second.find(frame << 12)
            assert leaf is not None
            host = leaf.frame
        return (host << 12) + 8 * ((address >> (3 + 9 * level)) & 511)

    def change(self, where: int, change: Callable[[int], int]) -> None:
        """Change a word of memory."""
        self.memory.store(where, change(self.memory.word(where)))

    def freeze(self, hpa: int) -> None:
        """Make a frame read-only memory."""
        give_contents(self.memory.arena, hpa >> 12, ROM)

    def type_memory(self, dice: int) -> None:
        """Give ranges, PASID entry and leaves memory types by chance; where there are MTRRs, of a part of memory."""
        chance = random.Random(dice)
        types = {"UC": 0, "WC": 1, "WT": 4, "WP": 5, "WB": 6}
        if chance.random() < 0.8:
            kind, self.default_type = chance.choice(sorted(types)), chance.choice(sorted(types))
            self.unit.write("MTRRDEF", sp.MTRR_E | types[self.default_type])
            self.unit.write("MTRR_PHYSBASE3", TARGET << 12 | types[kind])
            self.unit.write("MTRR_PHYSMASK3", ((1 << 46) - (2 << 12)) | sp.MTRR_V)
            self.ranges = {range(TARGET << 12, (TARGET + 2) << 12): kind}
        if self.kind == "legacy":
            return
        pat = sum(chance.choice([0, 1, 4, 5, 6, 7]) << 4 * n for n in range(8))
        word = pat << 32 | chance.choice([0, e.EMTE, e.EMTE]) | (chance.random() < 0.1) * e.CD
        word |= chance.choice([0, 1, 4, 5, 6]) << e.EMT_SHIFT
        for pasid in (0, PASID):  # alike: they share a domain, and so what IOTLBs hold of its second level
            entry = self.structures.pasid(SID, pasid)
            entry[1] = signed(int(entry[1]) | word)
        for page in (READ_ONLY_PAGE, WRITE_ONLY_PAGE, RW_PAGE, SUPERVISOR_PAGE, HUGE_PAGE):
            size = int(page == HUGE_PAGE)
            if self.first is not None:
                where = self.entry_at(self.first, page, 1 + size)
                bits = chance.choice([0, 8, 16, 24]) | chance.choice([0, e.FL_PAT_LARGE if size else e.FL_PS])
                self.change(where, lambda word, bits=bits: word | bits)
            if self.second is not None and not (self.first is None and page == SUPERVISOR_PAGE):
                at = page if self.first is None else TARGET + (page >> 12 & 3) << 12
                where = self.entry_at(self.second, at, 1 + size if self.first is None else 1)
                bits = chance.choice([0, 1, 4, 5, 6, 6]) << e.SL_EMT_SHIFT | chance.choice([0, e.SL_IPAT])
                self.change(where, lambda word, bits=bits: word | bits)

    def invalidate_all(self) -> None:
        """Invalidate every cache: by registers, which only legacy mode has, or by a queue of its own."""
        unit = self.unit
        if self.kind == "legacy":
            unit.write("CCMD", 1 << 63 | sp.GLOBAL << sp.CIRG)
            unit.write("IOTLB", 1 << 63 | sp.GLOBAL << sp.IIRG)
            return
        start_queue(self)
        unit.submit("CONTEXT_CACHE", G=sp.GLOBAL)
        unit.submit("PASID_CACHE", G=3)
        unit.submit("IOTLB", G=sp.GLOBAL)
        unit.command(clear=sp.QIE)


def start_queue(world: World) -> None:
    """An invalidation queue of one page, turned on: wide descriptors in scalable mode."""
    page = world.memory.allocate()
    wide = sp.IQA_WIDE if world.kind != "legacy" else 0
    world.unit.write("IQT", 0)
    world.unit.write("IQA", page << 12 | wide)
    world.unit.command(set=sp.QIE)


def queued(kind: str = "legacy", capabilities: Capabilities | None = None) -> World:
    world = World(kind, capabilities or Capabilities())
    start_queue(world)
    return world


def remapped(world: World, address: int = RW_PAGE) -> None:
    """Let a page lead elsewhere, behind the caches' back."""
    assert world.ask(address, sp.READ).status == COMPLETED
    size = 1 if address == HUGE_PAGE else 0
    table, rights = (world.first, USER_PAGE) if world.first else (world.second, READ_WRITE)
    assert isinstance(table, Table)
    table.map(address, NEW if not size else TARGET + 0x400, rights, size=size)


def is_stale(world: World, address: int = RW_PAGE) -> bool:
    """Does the unit still use the mapping that was replaced?"""
    return world.ask(address).hpa >> 12 not in (NEW, TARGET + 0x400)
