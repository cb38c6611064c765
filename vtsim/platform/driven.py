"""Devices that a guest's driver gives buffers: doorbell, ring of descriptors, DMA, write-back, interrupt.

A device fetches descriptors, moves data and reports, each of these at its own pace. A hostile one goes on writing to an
address that was its own, to find out how long it can. One that asks for pages moves the data of descriptors that it
reports together side by side: an operation whose page is missing waits for it alone.

Of a descriptor that carries values the first word is moved: the device keeps what it reads, and writes `MARK`.

PCIe: posted writes do not pass each other, so the interrupt comes after the data.
Not modelled: moderation of interrupts; descriptors that are written back one by one; what a device does after an error.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Generator, Sequence
from typing import Any, Final

import numpy as np
import simpy
from attrs import define, field

from vtsim.base.errors import ModelError
from vtsim.base.jit import quiet
from vtsim.cpu import slots as s
from vtsim.cpu.engine import Engine
from vtsim.cpu.kernels.apic import request
from vtsim.guest.kernel import dma_layout as d
from vtsim.guest.kernel_data import linear
from vtsim.guest.machine_view import DmaPort, PhysicalMemory
from vtsim.iommu import dma as g
from vtsim.iommu import spec as sp
from vtsim.iommu import state as st
from vtsim.iommu.entries import ADDRESS, SL_PS, SL_R, SL_W
from vtsim.iommu.kernels.device_tlb import device_forget, known_to_device
from vtsim.iommu.kernels.driven_engine import all_ended, last_landing, operate
from vtsim.iommu.unit import Message, RemappingUnit
from vtsim.platform.dma import PS, device_tlb_of, engine_of, landing_of, outcome_of, unit_of
from vtsim.platform.dma_spec import DmaSpec
from vtsim.platform.hostile import LINE, Hostile
from vtsim.platform.iommu_spec import requester
from vtsim.platform.outcome import DmaOutcome, DriverOutcome
from vtsim.platform.page_asking import Flood, PageRequests, Way
from vtsim.platform.remapping_registers import RemappingRegisters
from vtsim.platform.spec import Scenario
from vtsim.platform.unit_tables import DrivenPort, UnitTables

LARGEST: Final = 4096  # bytes of one operation
MARK: Final = 0xDEA_DBEE  # the word that a device writes
BATCH: Final = 16  # descriptors that are reported together at most
NODE: Final = (d.N_LOW, d.N_HIGH, d.N_BUFFER, d.N_PAGES)
EVENTS: Final = (st.FAULT_EVENT, st.INVALIDATION_EVENT, st.PAGE_REQUEST_EVENT)


@define(eq=False)
class DrivenDevice:
    """One device, from its doorbell to its interrupt."""

    platform: DrivenDevices
    spec: DmaSpec
    port: DmaPort
    memory: PhysicalMemory  # of the guest that drives it
    row: np.ndarray  # its engine
    tlb: np.ndarray = field(init=False)  # its device-TLB, asked where it has ATS
    invalidated: int = field(default=0, init=False)  # invalidations of it that came
    wanted: int = field(default=0, init=False)  # descriptors that the doorbell told of
    fetched: int = field(default=0, init=False)
    done: int = field(default=0, init=False)
    waiting: deque[tuple[int, int, int]] = field(factory=deque, init=False)
    rung: simpy.Event = field(init=False)
    filled: simpy.Event = field(init=False)
    moved: int = field(default=0, init=False)  # bytes
    refused: int = field(default=0, init=False)  # descriptors with an operation that was blocked
    interrupts: int = field(default=0, init=False)
    pages: PageRequests | None = field(default=None, init=False)  # where it asks for pages
    failed: int = field(default=0, init=False)  # operations that got no page
    lost: int = field(default=0, init=False)  # interrupts that were blocked
    merged: int = field(default=0, init=False)  # interrupts whose vector was pending already
    seen: int = field(default=0, init=False)  # the word that it read last
    last: int = field(default=-1, init=False)  # the address that it had last
    hostile: Hostile | None = field(default=None, init=False)

    def __attrs_post_init__(self) -> None:
        clock = self.platform.clock
        self.tlb = device_tlb_of(self.spec)
        self.rung, self.filled = clock.event(), clock.event()
        clock.process(self.fetch())
        clock.process(self.move())

    def ring(self, count: int) -> None:
        """The doorbell: so many descriptors were posted ever."""
        self.wanted = count
        if not self.rung.triggered:
            self.rung.succeed()

    def operate(
        self, address: int, size: int, writes: bool, beyond: Sequence[int] = ()
    ) -> Generator[simpy.Event, Any, bool]:
        """Begin an operation as soon as one can begin; was it let through?

        `beyond`: where the device goes on behind it; pages that are missing there are asked for together.
        """
        platform, since = self.platform, 0
        while True:
            aborted, now = int(self.row[g.N_ABORTED]), platform.now_ps
            later = platform.operate(self.row, self.tlb, address, size, writes, since)
            if not later:
                return int(self.row[g.N_ABORTED]) == aborted
            yield platform.until(abs(later))
            if later < 0:
                since = since or now
                if not (yield from self.ask([address, *beyond], writes)):
                    self.failed += 1
                    return False

    def ask(self, addresses: Sequence[int], writes: bool) -> Generator[simpy.Event, Any, bool]:
        """Ask for the page of the first address, and for those of the others that the device-TLB does not hold."""
        assert self.pages is not None
        access = sp.WRITE if writes else sp.READ
        with quiet():
            missing = [each for each in addresses[1:] if known_to_device(self.tlb, sp.NO_PASID, each, access) < 0]
        return (yield from self.pages.ask([addresses[0], *missing], access))

    def invalidate(self, word: int) -> Generator[simpy.Event, Any, None]:
        """Obey an invalidation of the device-TLB, and answer when what is in flight has ended: PCIe, ATS."""
        platform = self.platform
        self.invalidated += 1
        if self.invalidated <= self.spec.unanswered:
            return
        yield platform.clock.timeout(platform.cycles(self.spec.link.down_ns + self.spec.device_answer_ns))
        with quiet():
            device_forget(self.tlb, word, sp.NO_PASID)
        rows = [self.row] if self.hostile is None else [self.row, self.hostile.row]
        with quiet():
            ended = max(max(int(all_ended(row)), int(row[g.LAST_READY])) for row in rows)
        yield platform.until(ended)
        yield platform.clock.timeout(platform.cycles(self.spec.link.up_ns))
        platform.registers.answered(int(self.tlb[st.DEVICE_SID]))

    def ended(self) -> int:
        """When everything that has begun will have ended, in ps."""
        with quiet():
            return int(all_ended(self.row))

    def fetch(self) -> Generator[simpy.Event, Any, None]:
        """Read descriptors, as many at a time as a line holds."""
        platform = self.platform
        while True:
            if self.fetched == self.wanted:
                self.rung = platform.clock.event()
                yield self.rung
                yield platform.clock.timeout(platform.cycles(self.spec.link.down_ns))
            first, end = self.fetched, self.wanted
            per_line = LINE // d.RING_ENTRY_BYTES
            for line in range(first // per_line, -(-end // per_line)):
                where = self.port.ring_address + line * LINE % (d.RING_ENTRIES * d.RING_ENTRY_BYTES)
                if not (yield from self.operate(where, LINE, False)):
                    self.refused += end - first  # it is silent from now on
                    return
            yield platform.until(self.ended())
            for number in range(first, end):
                where = self.port.ring + number % d.RING_ENTRIES * d.RING_ENTRY_BYTES
                address, word = self.word(where), self.word(where + 8)
                self.waiting.append((address, word & 0xFFFF_FFFF, word))
            self.fetched = end
            if not self.filled.triggered:
                self.filled.succeed()

    def move(self) -> Generator[simpy.Event, Any, None]:
        """Read or write the buffers of descriptors; report some together."""
        while True:
            if not self.waiting:
                self.filled = self.platform.clock.event()
                yield self.filled
            count, under_way = 0, []
            while self.waiting and count < BATCH:
                count += 1
                transfer = self.transfer(*self.waiting.popleft())
                if self.pages is None:
                    yield from transfer
                else:
                    under_way.append(self.platform.clock.process(transfer))
            if under_way:
                yield self.platform.clock.all_of(under_way)
            self.platform.clock.process(self.report(self.ended(), count, self.last))

    def transfer(self, address: int, size: int, word: int) -> Generator[simpy.Event, Any, None]:
        """Move the data of one descriptor."""
        passed, writes = True, bool(word & d.DEVICE_WRITES)
        parts = range(address, address + size, LARGEST)
        for number, at in enumerate(parts, 1):
            passed &= yield from self.operate(at, min(LARGEST, address + size - at), writes, parts[number:])
        if passed and word & d.CARRIES:
            self.carry(address, writes)
        self.refused += not passed
        self.moved += size if passed else 0
        self.last = address

    def carry(self, address: int, writes: bool) -> None:
        """Move the word at an address that the last operation was let through to; there is nothing beyond memory."""
        engine, unit = self.platform.engine, self.platform.unit
        hpa = int(unit.u[st.HPA]) & ~0xFFF | address & 0xFF8 if self.row[g.TRANSLATES] else address & ~7
        if hpa >> 12 >= engine.geometry.frame_count:
            return
        if writes:
            engine.store(hpa, MARK)
        else:
            self.seen = engine.load(hpa) & (1 << 64) - 1

    def report(self, when: int, count: int, last: int) -> Generator[simpy.Event, Any, None]:
        """Write how many descriptors are done, then interrupt."""
        platform = self.platform
        yield platform.until(when)
        yield from self.operate(self.port.status_address, 8, True)
        with quiet():
            landed = int(last_landing(self.row[np.newaxis]))
        yield platform.until(landed)
        self.done += count
        platform.engine.store(self.hpa(self.port.status), self.done)
        if self.hostile is not None:
            self.hostile.begin(last)
        yield from platform.interrupt(self)

    # --- the guest's memory -----------------------------------------------------------------------------------------
    def hpa(self, gpa: int) -> int:
        """The host-physical address behind a guest-physical one."""
        return self.memory.frame(gpa >> 12) << 12 | gpa & 0xFFF

    def word(self, gpa: int) -> int:
        """A word of the guest's memory, unsigned."""
        return self.platform.engine.load(self.hpa(gpa)) & (1 << 64) - 1

    def allows(self, address: int) -> bool:
        """Does the driver allow an address whose pages it maps when they are asked for?"""
        page, node = address >> 12, self.word(self.port.words + d.P_TREE)
        while node:
            at = node - linear(0) & (1 << 64) - 1
            low, high, buffer, pages = (self.word(at + word) for word in NODE)
            if low <= page <= high:
                return bool(buffer) and page - low < pages
            node = self.word(at + (d.N_LEFT if page < low else d.N_RIGHT))
        return False

    def leads_to(self, address: int) -> int:
        """The host-physical address to which the driver's table lets an address lead now, or -1."""
        table = self.port.root
        for level in (4, 3, 2, 1):
            entry = self.word((table & ADDRESS) + (address >> 9 * level & 0xFF8))
            if not entry & (SL_R | SL_W):
                return -1
            within = (1 << (3 + 9 * level)) - 1
            if level == 1 or entry & SL_PS:
                return self.hpa((entry & ADDRESS & ~within) | (address & within))
            table = entry
        raise ModelError("a table has no last level", {"address": address})


@define(eq=False)
class DrivenDevices:
    """The devices that the guest of a machine drives, and the unit between them and memory."""

    scenario: Scenario
    engine: Engine
    clock: simpy.Environment
    clock_hz: int
    ports: Sequence[DrivenPort]
    tables: UnitTables
    unit: RemappingUnit = field(init=False)
    engines: np.ndarray = field(init=False)
    lines: np.ndarray = field(init=False)
    registers: RemappingRegisters = field(init=False)
    devices: list[DrivenDevice] = field(factory=list, init=False)
    doorbells: dict[int, DrivenDevice] = field(factory=dict, init=False)

    def __attrs_post_init__(self) -> None:
        iommu, landing = self.scenario.machine.iommu, landing_of(self.scenario)
        self.unit = unit_of(self.scenario, self.engine)
        self.lines = g.line_tags(landing)
        specs = {spec.name: spec for spec in self.scenario.dma}
        ports = self.ports
        self.engines = np.zeros((2 * len(ports), g.DMA_WORDS), np.int64)  # an engine each, and one for what is hostile
        for number, each in enumerate(ports):
            spec = specs[each.port.device.name]
            for row, gap in ((number, spec.gap_ns), (len(ports) + number, 0.0)):
                self.engines[row] = engine_of(self.scenario, spec, gap_ns=gap)
                mine = self.engines[row]
                mine[g.SOURCE], mine[g.TRANSLATES] = requester(spec.claims or spec.source), iommu.mode != "off"
                mine[g.OWN_END] = 1 << 62
                mine[g.COUNT] = 1 << 62
            device = DrivenDevice(self, spec, each.port, each.memory, self.engines[number])
            if spec.hostile_ns:
                every = max(1, self.cycles(spec.hostile_ns))
                device.hostile = Hostile(device, self.engines[len(ports) + number], every)
            if spec.page_requests:
                self._let_ask(device)
            self.devices.append(device)
            self.doorbells[each.port.device.doorbell] = device
        self.registers = RemappingRegisters(
            self.engine, self.clock, self.unit, self.cycles(iommu.invalidate_ns), self.cycles(iommu.read_ns),
            self._landed, self._deliver, self.cycles(iommu.device_timeout_ns),
        )  # fmt: skip
        if iommu.mode != "off":
            self._enable()

    def _enable(self) -> None:
        """Tables, invalidation queue and interrupt remapping, as the driver would have set them."""
        unit = self.unit
        if self.tables.iqa:
            unit.write("IQA", self.tables.iqa)
            unit.command(set=sp.QIE)
        unit.write("IRTA", self.tables.irta)
        unit.command(set=sp.SIRTP)
        unit.command(set=sp.IRE)
        unit.enable(self.tables.rtaddr)

        if self.tables.pqa:
            address, data = self.tables.page_event
            for name, value in {"PQA": self.tables.pqa, "PEADDR": address, "PEDATA": data, "PECTL": 0}.items():
                unit.write(name, value)

    def _let_ask(self, device: DrivenDevice) -> None:
        """Let a device ask for pages, and perhaps for others than its own."""
        spec, sid = device.spec, int(device.tlb[st.DEVICE_SID])

        def send(address: int, access: int, pasid: int, group: int, last: bool) -> None:
            self.unit.page_request(sid, address, access, pasid=pasid, group=group, last=last)
            self.registers.send()

        way = Way(up=self.cycles(spec.link.up_ns), down=self.cycles(spec.link.down_ns), send=send)
        device.pages = PageRequests(self.clock, spec.page_requests, way)
        if spec.flood_ns:
            order = random.Random(f"{self.scenario.seed} {spec.name}")
            device.pages.flood = Flood(device.pages, spec.flood, max(1, self.cycles(spec.flood_ns)), order)

    def _deliver(self, message: Message) -> None:
        """What the unit sends goes to a device, by its source-id, or it is an event of the unit, for a CPU."""
        if message.kind in EVENTS:
            self.clock.process(self._event(message.first, message.second))
            return
        for device in self.devices:
            if message.first & 0xFFFF != device.tlb[st.DEVICE_SID]:
                continue
            if message.kind == st.DEVICE_INVALIDATION:
                self.clock.process(device.invalidate(message.second))
            elif device.pages is not None:
                self.clock.process(device.pages.answer(message.second, message.third))

    def _event(self, address: int, data: int) -> Generator[simpy.Event, Any, None]:
        """An event of the unit: its message is not remapped, and comes after what the unit wrote to memory."""
        yield self.clock.timeout(self.cycles(self.scenario.machine.iommu.read_ns))
        self.interrupt_cpu(address, data)

    def operate(self, row: np.ndarray, tlb: np.ndarray, address: int, size: int, writes: bool, since: int = 0) -> int:
        """Begin an operation of an engine: 0, or when it can begin, in ps; negative, when it knows of no page.

        `since`: when it was tried first, in ps, if not now.
        """
        with quiet():
            return int(
                operate(
                    row,
                    tlb,
                    self.engines[0],
                    self.lines,
                    self.unit.u,
                    self.engine.arena,
                    self.now_ps,
                    address,
                    size,
                    writes,
                    since or self.now_ps,
                )
            )

    # --- time and memory ------------------------------------------------------------------------------------------
    def cycles(self, ns: float) -> int:
        """Cycles of so many nanoseconds."""
        return round(ns * self.clock_hz / 10**9)

    @property
    def posts(self) -> bool:
        """Are interrupts posted, so that the message to a CPU is a notification?"""
        return self.scenario.vmm.posted_interrupts and self.scenario.vmm.technique == "hardware"

    @property
    def now_ps(self) -> int:
        """The time in ps."""
        return int(self.clock.now) * PS // self.clock_hz

    def until(self, ps: int) -> simpy.Event:
        """The event that a time in ps has come."""
        return self.clock.timeout(max(0, -(-ps * self.clock_hz // PS) - int(self.clock.now)))

    def _landed(self) -> int:
        with quiet():
            return -(-int(last_landing(self.engines)) * self.clock_hz // PS)

    # --- what CPUs see ----------------------------------------------------------------------------------------------
    def answers(self, hpa: int) -> bool:
        """Is a device of these there?"""
        return self.registers.answers(hpa) or hpa in self.doorbells

    def read(self, hpa: int, size: int) -> int:
        """What a CPU reads; a doorbell reads as zero."""
        return self.registers.read(hpa, size) if self.registers.answers(hpa) else 0

    def write(self, hpa: int, size: int, value: int) -> None:
        """What a CPU writes."""
        if self.registers.answers(hpa):
            self.registers.write(hpa, size, value)
        else:
            self.doorbells[hpa].ring(value)

    def interrupt(self, device: DrivenDevice) -> Generator[simpy.Event, Any, None]:
        """A device's message, through the unit to a local APIC."""
        address, data = device.port.message
        yield self.clock.timeout(self.cycles(device.spec.link.up_ns))
        device.interrupts += 1
        if self.scenario.machine.iommu.mode != "off":
            answer = self.unit.interrupt(requester(device.spec.claims or device.spec.source), address, data)
            device.merged += answer.merged
            if answer.message is None:
                device.lost += answer.status == st.INTERRUPT_BLOCKED
                return
            address, data = answer.message
            yield self.clock.timeout(self.cycles(answer.reads * self.scenario.machine.iommu.read_ns))
        device.merged += self.interrupt_cpu(address, data) and not self.posts

    def interrupt_cpu(self, address: int, data: int) -> bool:
        """A message reaches a local APIC; was its vector pending there already?"""
        m, vector = self.engine.cpus[address >> 32 or address >> 12 & 0xFF], data & 0xFF
        pending = int(m[s.APIC_IRR + (vector >> 6)]) >> (vector & 63) & 1
        with quiet():
            request(m, self.engine.arena, vector)
        return bool(pending)

    # --- the end ----------------------------------------------------------------------------------------------------
    def outcome(self) -> tuple[DmaOutcome, ...]:
        """What every device did, after the laws of the unit were checked."""
        self.unit.check_laws()
        return tuple(self._outcome(device) for device in self.devices)

    def _outcome(self, device: DrivenDevice) -> DmaOutcome:
        device.ended()
        words = [device.word(device.port.words + d.STATISTICS + 8 * n) for n in range(len(d.STATISTIC_NAMES))]
        hostile, pages = device.hostile, device.pages
        return outcome_of(
            device.spec,
            device.row.tolist(),
            moved=device.moved,
            driver=DriverOutcome(
                counts=dict(zip(d.STATISTIC_NAMES, words, strict=True)),
                posted=device.wanted,
                done=device.done,
                refused=device.refused,
                interrupts=device.interrupts,
                interrupts_blocked=device.lost,
                interrupts_merged=device.merged,
                hostile_writes=hostile.writes if hostile else 0,
                hostile_through=hostile.through if hostile else 0,
                window=hostile.window if hostile else 0,
                pages=None if pages is None else pages.outcome(int(device.row[g.N_HELD]), device.failed),
            ),
        )
