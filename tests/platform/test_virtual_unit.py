"""A guest's remapping unit against a slow reading of the guest's tables, whatever its driver does.

The test is the driver: each time the guest's program rings its device, it looks at what the real unit answers now, then
changes tables, writes descriptors, and leaves word which register the program is to write.

VT-d: "Caching Mode"; "IOTLB Invalidate Descriptor"; "Context-Cache Invalidate Descriptor".
VT-d: "PASID-cache Invalidate Descriptor"; "PASID-based-IOTLB Invalidate Descriptor".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random
from typing import Any, Final

import pytest
from attrs import define, field

from vtsim.base import memory as mem
from vtsim.base.jit import DISABLED as INTERPRETED
from vtsim.config import parse_scenario
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.ept.tables import KERNEL_PAGE, PAGING, Table
from vtsim.guest.kernel import dma_layout as d
from vtsim.guest.machine_view import DmaDevice, DmaMemory, DmaPort, PhysicalMemory, Start
from vtsim.iommu import entries as e
from vtsim.iommu import spec as sp
from vtsim.iommu import state as st
from vtsim.iommu.descriptors import descriptor
from vtsim.iommu.tables import READ_WRITE, USER_PAGE, Structures, domain_table, process_table
from vtsim.platform import machine as platform
from vtsim.platform.dma_spec import DOORBELLS, REGISTERS
from vtsim.platform.machine import Machine
from vtsim.study.measure import result_of

CODE, DEVICES, MAIL = 0x1000_0000, 0x2000_0000, 0x3000_0000
FIRST_GFN, LARGE_GFN = 0x200, 0x1000  # the second is where a page of 2 MiB may begin
SOURCES: Final = (0x0300, 0x0408)
PAGES: Final = (0x10, 0x11, 0x12, 0x1FF)  # of 4 KiB, with a page of 2 MiB or another table behind them
LARGE: Final = 0x200
LOOKED_AT: Final = (*PAGES, LARGE, LARGE + 1, LARGE + 0x1FF, 0x5000)
RING: Final = 0x100


class Done(Exception):
    """The driver has nothing more to do."""


@define(eq=False)
class Frames:
    """Guest frames as tables are made of them."""

    memory: PhysicalMemory
    next: int = FIRST_GFN

    def allocate(self) -> int:
        self.next += 1
        return self.next - 1

    def contents(self, gfn: int, kind: int) -> Any:
        return self.memory.contents(gfn, kind)

    def page(self) -> int:
        gfn = self.allocate()
        self.contents(gfn, mem.VALUES)
        return gfn << 12


def program() -> Any:
    """Ring, take the word that was left, write the register that it names, and again."""
    a = Assembler("driver", CODE)
    a.label("again")
    a.mov(s.RCX, DEVICES)
    a.st(Mem(s.RCX), s.RBX)
    a.mov(s.RDX, MAIL)
    a.ld(s.RCX, Mem(s.RDX))
    a.ld(s.RAX, Mem(s.RDX, 8))
    a.st(Mem(s.RCX), s.RAX)
    a.add(s.RBX, 1)
    a.jmp("again")
    return a.assemble()


@define(eq=False)
class Driver:
    """Tables of two devices, two roots for each, and what was changed since it was invalidated."""

    nested: bool
    polite: bool = True
    memory: Any = field(init=False)
    frames: Frames = field(init=False)
    structures: Structures = field(init=False)
    roots: list[list[Table]] = field(factory=list, init=False)
    now: list[int] = field(factory=lambda: [0, 0], init=False)
    mail: int = field(default=0, init=False)
    queue: int = field(default=0, init=False)
    status: int = field(default=0, init=False)
    tail: int = field(default=0, init=False)
    found: int = field(default=0, init=False)
    stale: list[set[int]] = field(factory=lambda: [{PAGES[0]}, {PAGES[0]}], init=False)

    @property
    def step(self) -> int:
        return 32 if self.nested else 16

    @property
    def rights(self) -> int:
        return USER_PAGE if self.nested else READ_WRITE

    def build(self, memory: Any) -> Start:
        """What the guest starts with."""
        self.memory, self.frames = memory, Frames(memory)
        frames = self.frames
        table = Table(
            root=frames.allocate(),
            format=PAGING,
            take=frames.allocate,
            words=lambda gfn: memory.contents(gfn, mem.TABLE),
        )
        memory.contents(table.root, mem.TABLE)
        text = program()
        (code,) = (page for page, _ in text.pages())
        text_gfn = frames.allocate()
        table.map(code, [text_gfn], KERNEL_PAGE)
        memory.engine.place(text, lambda page: memory.frame(text_gfn))
        self.mail = frames.page()
        table.map(MAIL, [self.mail >> 12], KERNEL_PAGE)
        table.map(DEVICES, [DOORBELLS >> 12], KERNEL_PAGE)
        table.map(DEVICES + 4096, [REGISTERS >> 12], KERNEL_PAGE)
        self.queue, self.status = frames.page(), frames.page()
        self.structures = Structures(frames, scalable=self.nested)
        ports = []
        for number, source in enumerate(SOURCES):
            ring = [frames.page() for _ in range(d.RING_PAGES + 1)]
            both = [process_table(frames) if self.nested else domain_table(frames) for _ in range(2)]
            for each in both:
                each.map(PAGES[0] << 12, [0x800], self.rights)
                each.map(RING << 12, [page >> 12 for page in ring], self.rights)
            self.roots.append(both)
            self.attach(number)
            ports.append(
                DmaPort(
                    device=DmaDevice(name="ab"[number], source=source, doorbell=DOORBELLS + 4096 * number),
                    words=self.status,
                    ring=ring[0],
                    status=ring[-1],
                    ring_address=RING << 12,
                    status_address=(RING << 12) + d.RING_PAGES * 4096,
                    root=both[0].root << 12,
                    message=(0, 0),
                    vector=d.DMA_VECTOR + number,
                    cpu=0,
                    slots=(),
                )
            )
        assert frames.next < LARGE_GFN
        dma = DmaMemory(ports=tuple(ports), rtaddr=self.structures.rtaddr, iqa=self.queue)
        return Start(
            rip=CODE, rsp=MAIL + 4096, rflags=2, cr0=0x80050033, cr3=table.root << 12, cr4=0xA0, efer=0xD01,
            idtr_base=0, idtr_limit=0xFFF, gdtr_base=0, gdtr_limit=0x7F, tr_base=0, cpl=0, msrs={}, gs_base=0,
            fs_base=0, roots=(table.root << 12,), dma=dma,
        )  # fmt: skip

    def attach(self, number: int) -> None:
        table = self.roots[number][self.now[number]]
        if self.nested:
            self.structures.enable(SOURCES[number])
            self.structures.assign(SOURCES[number], 0, number + 1, first=table)
        else:
            self.structures.attach(SOURCES[number], table, number + 1)

    def word(self, gpa: int) -> int:
        """A word of the guest's memory."""
        return self.memory.engine.load(self.memory.frame(gpa >> 12) << 12 | gpa & 0xFFF)

    # --- the slow reading ---------------------------------------------------------------------------------------
    def reading(self, number: int, page: int) -> tuple[int, int]:
        """The host frame to which a page of a device leads, and rights; (0, 0) where it leads nowhere."""
        table, both = self.roots[number][self.now[number]].root << 12, sp.READ | sp.WRITE
        for level in (4, 3, 2, 1):
            entry = self.word(table + (page >> 9 * (level - 1) & 511) * 8)
            if self.nested:
                both &= 0 if not entry & e.PRESENT else sp.READ | (sp.WRITE if entry & e.FL_RW else 0)
            else:
                both &= entry & READ_WRITE
            if not both:
                return 0, 0
            table = entry & e.ADDRESS
            if level == 2 and entry & e.SL_PS:
                table = (table & ~0x1F_FFFF) | (page & 511) << 12
                break
        return self.memory.frame(table >> 12), both

    def check(self, unit: Any) -> int:
        """What the real unit answers for each page that nothing is outstanding for; how many lead somewhere."""
        found = 0
        for number, source in enumerate(SOURCES):
            for page in LOOKED_AT:
                frame, rights = self.reading(number, page)
                for access in (sp.READ, sp.WRITE):
                    answer = unit.translate(source, page << 12 | 0x10, access)
                    if page in self.stale[number]:
                        continue
                    allowed = answer.status == st.COMPLETED
                    assert allowed == bool(rights & access), (number, hex(page), access, answer)
                    assert not allowed or answer.hpa == frame << 12 | 0x10, (number, hex(page))
                    found += allowed
        return found

    # --- what a driver does ---------------------------------------------------------------------------------------
    def change(self, random: Random) -> None:
        """Map or unmap something, for one device."""
        number = random.randrange(2)
        table = self.roots[number][self.now[number]]
        rights = random.choice([self.rights, self.rights, e.PRESENT | e.FL_US if self.nested else e.SL_R, 0])
        if random.random() < 0.3:
            table.map(LARGE << 12, LARGE_GFN, self.rights | e.SL_PS, size=1) if rights else self.clear(table)
            self.stale[number].update(range(LARGE, LARGE + 512))
            return
        page = random.choice(PAGES)
        table.map(page << 12, [random.randrange(0x800, 0x900)], rights)
        self.stale[number].add(page)

    def clear(self, table: Table) -> None:
        """Nothing is mapped any more by the entry of 2 MiB."""
        table.map(LARGE << 12, 0, 0, size=1)

    def invalidate(self, random: Random) -> tuple[int, int]:
        """Ask for an invalidation: what register is to be written, and what with."""
        number = random.randrange(2)
        kinds: list[Callable[[Random, int], list[tuple[str, dict[str, int]]]]] = [
            self.by_page,
            self.by_domain,
            self.of_all,
        ]
        kinds.append(self.of_entries)
        asked = random.choice(kinds)(random, number)
        if not self.nested and random.random() < 0.3 and len(asked) == 1:
            return self.by_register(*asked[0])
        for name, fields in [*asked, ("WAIT", {"SW": 1, "STDATA": 7, "STADDR": self.status >> 2})]:
            for word, value in enumerate(descriptor(name, **fields)):
                self.memory.store(self.queue + self.tail + 8 * word, value)
            self.tail = (self.tail + self.step) % 4096
        self.memory.store(self.status, 0)
        return sp.IQT, self.tail

    def by_page(self, random: Random, number: int) -> list[tuple[str, dict[str, int]]]:
        page = random.choice((*PAGES, LARGE))
        mask = 9 if page == LARGE else random.choice((0, 1, 3))
        first = page >> mask << mask
        self.stale[number] -= set(range(first, first + (1 << mask)))
        return [(self.translations, {"G": 3, "DID": number + 1, "AM": mask, "ADDR": first})]

    def by_domain(self, random: Random, number: int) -> list[tuple[str, dict[str, int]]]:
        self.stale[number].clear()
        return [(self.translations, {"G": 2, "DID": number + 1})]

    def of_all(self, random: Random, number: int) -> list[tuple[str, dict[str, int]]]:
        for each in self.stale:
            each.clear()
        return [("IOTLB", {"G": 1})]

    def of_entries(self, random: Random, number: int) -> list[tuple[str, dict[str, int]]]:
        """The device changes to its other tables."""
        self.now[number] ^= 1
        self.attach(number)
        self.stale[number].clear()
        if self.nested:
            entry = random.choice(({"G": 0, "DID": number + 1}, {"G": 1, "DID": number + 1}, {"G": 3}))
            return [("PASID_CACHE", entry), (self.translations, {"G": 2, "DID": number + 1})]
        entry = random.choice(
            ({"G": 1}, {"G": 2, "DID": number + 1}, {"G": 3, "DID": number + 1, "SID": SOURCES[number]})
        )
        return [("CONTEXT_CACHE", entry), (self.translations, {"G": 2, "DID": number + 1})]

    @property
    def translations(self) -> str:
        return "PASID_IOTLB" if self.nested else "IOTLB"

    def by_register(self, name: str, fields: dict[str, int]) -> tuple[int, int]:
        """The same by the register interface; the address has been left in its register before, as 0 here."""
        value = 1 << 63 | min(fields["G"], 2) << sp.IIRG | fields.get("DID", 0) << 32
        return sp.IOTLB, value

    def steps(self, unit: Any, seed: int, count: int) -> Iterator[tuple[int, int]]:
        random = Random(seed)
        for _ in range(count):
            self.check(unit)
            for _ in range(random.randrange(1, 4)):
                self.change(random)
            yield self.invalidate(random)
            self.found += self.check(unit)


def made(driver: Driver, todo: Callable[[Any], Iterator[tuple[int, int]]], monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine whose guest does what is to do."""
    nested = driver.nested
    monkeypatch.setattr(platform, "build_guest", lambda spec, profile, memory, **_: driver.build(memory))
    guest = "guest: {kernel: {dma: strict}, processes: [{phases: [{primitive: dma_buffers, device: a}]}, {name: other, phases: [{primitive: dma_buffers, device: b}]}]}"
    machine = Machine(
        parse_scenario(
            "run: {limit: 1 s}\nmachine: {memory: 256 MiB}\nvmm: {personality: minimal}\n"
            "dma: [{name: a, source: '03:00.0'}, {name: b, source: '04:01.0'}]\n"
            f"vms: [{{memory: 64 MiB, viommu: {'nested' if nested else 'caching'}, {guest}}}]\n"
        )
    )
    devices = machine.driven
    assert devices is not None
    steps = todo(devices.unit)

    class Bell:
        def ring(self, value: int) -> None:
            if driver.polite and value and driver.word(driver.mail) == DEVICES + 4096 + sp.IQT:
                assert driver.word(driver.status) == 7, "the wait descriptor acknowledges"
            try:
                register, what = next(steps)
            except StopIteration:
                raise Done from None
            driver.memory.store(driver.mail, DEVICES + 4096 + register)
            driver.memory.store(driver.mail + 8, mem.signed(what))

    devices.doorbells[DOORBELLS] = Bell()  # type: ignore[assignment]
    return machine


def drive(nested: bool, seed: int, count: int, monkeypatch: pytest.MonkeyPatch) -> int:
    driver = Driver(nested)
    machine = made(driver, lambda unit: driver.steps(unit, seed, count), monkeypatch)
    with pytest.raises(Done):
        machine.run()
    return driver.found


@pytest.mark.parametrize("nested", [False, True], ids=["caching", "nested"])
@pytest.mark.parametrize("seed", [4] if INTERPRETED else range(4))
def test_after_an_invalidation_devices_use_what_the_guest_s_tables_say_now(
    nested: bool, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert drive(nested, seed, 1 if INTERPRETED else 50, monkeypatch) > 0


@pytest.mark.compiled_only
@pytest.mark.parametrize("nested", [False, True], ids=["caching", "nested"])
@pytest.mark.parametrize(
    ("hostile", "ends"),
    [
        ("tail", False),  # not at a descriptor
        ("type", False),  # of a descriptor that there is not: an error of the queue
        ("domain", False),  # that there is not
        ("mask", False),  # of more pages than there are
        ("wait", True),  # for a word outside memory
        ("context", True),  # table outside memory
        ("outside", True),  # a page outside memory
        ("loop", True),  # a table that leads to itself
    ],
)
def test_a_hostile_driver_harms_its_own_vm_at_most(
    nested: bool, hostile: str, ends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver, answers = Driver(nested, polite=False), []

    def steps(unit: Any) -> Iterator[tuple[int, int]]:
        root = driver.roots[0][0].root << 12
        name, fields = driver.translations, {"G": 3, "DID": 1, "ADDR": PAGES[0], "AM": 0}
        if hostile == "domain":
            fields["DID"] = 0xFFFF
        elif hostile == "mask":
            fields["AM"] = 63
        elif hostile == "wait":
            name, fields = "WAIT", {"SW": 1, "STADDR": 1 << 40}
        elif hostile == "context":
            driver.memory.store(driver.structures.root << 12 | 3 << 4, 1 << 40 | e.PRESENT)
            name, fields = ("PASID_CACHE" if nested else "CONTEXT_CACHE"), {"G": 3 if nested else 1}
        elif hostile == "outside":
            driver.roots[0][0].map(PAGES[0] << 12, [1 << 30], driver.rights)
        elif hostile == "loop":
            for n in range(512):
                driver.memory.store(root + 8 * n, root | driver.rights)
            name, fields = "IOTLB", {"G": 1}
        low, high = descriptor(name, **fields)
        driver.memory.store(driver.queue, 0xF if hostile == "type" else low)
        driver.memory.store(driver.queue + 8, high)
        yield sp.IQT, driver.step + (3 if hostile == "tail" else 0)
        answers.append(unit.translate(SOURCES[0], PAGES[0] << 12))

    machine = made(driver, steps, monkeypatch)
    if ends and not (nested and hostile in ("outside", "loop")):  # there the real unit walks
        assert result_of([machine.run()]).stopped
        assert not answers
        return
    with pytest.raises(Done):
        machine.run()
    (answer,) = answers
    own = {driver.memory.frame(gfn) for gfn in range(64 << 8)}
    assert answer.status == st.BLOCKED or answer.hpa >> 12 in own
