"""Lays out what a guest kernel keeps for DMA: domains, rings, queues, caches of addresses; and the unit's tables.

A driver would have made all this when it found its device.

Not modelled: the set-up of unit and devices as programs; several domains of a device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

from attrs import define, evolve, field, frozen

from vtsim.base import memory as mem
from vtsim.ept.tables import Words
from vtsim.guest.frames import Frames
from vtsim.guest.kernel import dma_layout as d
from vtsim.guest.kernel_data import fill, linear
from vtsim.guest.machine_view import DmaDevice, DmaMachine, DmaMemory, DmaPort, PhysicalMemory
from vtsim.guest.primitives import DmaPlace
from vtsim.guest.spec import DmaBuffersSpec, GuestSpec
from vtsim.iommu import spec as sp
from vtsim.iommu.descriptors import descriptor
from vtsim.iommu.entries import DTE, PASIDE, PRE, PWSNP
from vtsim.iommu.interrupts import SVT_SOURCE, compatible_request, remappable_request, remapped_entry
from vtsim.iommu.tables import READ_WRITE, USER_PAGE, Structures, domain_table, process_table

WIDEST: Final = 3  # AW of five levels, which a pass-through entry names
TABLE_SIZE: Final = 7  # of the interrupt table: 2 to the 8 entries, a page
EXTENDED: Final = sp.EIME | TABLE_SIZE


@define
class _Guest:
    """Guest frames as tables are made of them."""

    memory: PhysicalMemory
    frames: Frames

    def allocate(self) -> int:
        return self.frames.reserve(1)

    def contents(self, gfn: int, kind: int) -> Words:
        return self.memory.contents(gfn, kind)


@frozen(kw_only=True)
class DmaLayout:
    """What the kernel's text and the platform are told."""

    options: d.DmaOptions
    places: Mapping[tuple[int, int], DmaPlace]
    memory: DmaMemory


@define(kw_only=True)
class DmaBuilder:
    """What a guest needs to drive the devices of a machine, being laid out."""

    guest: GuestSpec
    memory: PhysicalMemory
    frames: Frames
    machine: DmaMachine
    tick_ns: int
    cpu_of: Callable[[int], int]  # of a process
    tables: _Guest = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.tables = _Guest(self.memory, self.frames)

    @property
    def maps(self) -> bool:
        """Do devices use addresses of their own?"""
        return self.machine.translates and self.guest.kernel.dma != "identity"

    def build(self) -> DmaLayout:
        """Lay everything out."""
        phases = self.guest.driven
        structures = Structures(self.tables, scalable=self.machine.first_level)
        ports: list[DmaPort] = []
        places: dict[tuple[int, int], DmaPlace] = {}
        owners: list[int] = []
        interrupts = self._page(mem.VALUES)
        for number, device in enumerate(self.machine.devices):
            mine = [(key, phase) for *key, phase in phases if phase.device == device.name]
            cpu = self.cpu_of(mine[0][0][0])
            owners.append(cpu)
            port = self._port(number, device, [phase for _, phase in mine], structures, cpu)
            entry = remapped_entry(
                d.DMA_VECTOR + number, cpu, extended=True, source=device.source, validation=SVT_SOURCE
            )
            for word, value in enumerate(entry):
                self.memory.store((interrupts << 12) + 16 * number + 8 * word, value)
            slots = []
            for (process, index), phase in mine:
                at = self._slots(phase)
                slots.append((at << 12, phase.buffers))
                places[process, index] = DmaPlace(
                    port=linear(port.words >> 12), slots=linear(at), on_request=device.pri
                )
            ports.append(evolve(port, slots=tuple(slots)))
        unit, queue = self._page(mem.VALUES), self._page(mem.VALUES)
        askers = [port for port in ports if port.device.pri]
        asked_bytes = self.guest.kernel.page_request_queue
        asked = self._page(mem.VALUES, asked_bytes // mem.PAGE_BYTES) if askers else 0
        tick = max(self.tick_ns, 1)
        options = d.DmaOptions(
            mode=self.guest.kernel.dma if self.maps else "identity",
            cached=self.guest.kernel.iova == "cached",
            coherent=self.machine.coherent,
            write_buffers=self.machine.write_buffers,
            caching_mode=self.machine.caching_mode,
            unit=linear(unit),
            unit_physical=unit << 12,
            queue=linear(queue),
            registers=linear(0) + self.machine.registers,
            ports=tuple(linear(port.words >> 12) for port in ports),
            owners=tuple(owners),
            rights=USER_PAGE if self.machine.first_level else READ_WRITE,
            device_tlbs=tuple(
                (port.device.source, linear(port.words >> 12)) for port in ports if self.maps and port.device.ats
            ),
            wide=self.machine.first_level,
            page_queue=linear(asked),
            page_queue_bytes=asked_bytes,
            askers=tuple((port.device.source, linear(port.words >> 12)) for port in askers),
            large=any(phase.page_bytes > mem.PAGE_BYTES for *_, phase in phases),
            timeout_ticks=-(-d.QUEUE_TIMEOUT_NS // tick),
        )
        return DmaLayout(
            options=options,
            places=places,
            memory=DmaMemory(
                ports=tuple(ports),
                rtaddr=structures.rtaddr,
                irta=interrupts << 12 | EXTENDED,
                iqa=queue << 12,
                pqa=asked << 12 | (asked_bytes // mem.PAGE_BYTES).bit_length() - 1 if askers else 0,
                page_event=compatible_request(d.PAGE_REQUEST_VECTOR, askers[0].cpu) if askers else (0, 0),
            ),
        )

    def _page(self, kind: int, count: int = 1) -> int:
        """The first of so many frames with contents."""
        first = self.frames.reserve(count)
        for gfn in range(first, first + count):
            self.memory.contents(gfn, kind)
        return first

    def _objects(self, count: int, size: int) -> int:
        """A list of free objects of a size; the linear address of the first."""
        each = mem.PAGE_BYTES // size
        pages = -(-count // each)
        first = self._page(mem.VALUES, pages)
        every = [linear(first) + size * n for n in range(pages * each)]
        for at, after in zip(every, [*every[1:], 0], strict=True):
            self._store(at, after)
        return every[0]

    def _store(self, address: int, value: int) -> None:
        self.memory.store(address - linear(0), value)

    def _port(
        self, number: int, device: DmaDevice, phases: Sequence[DmaBuffersSpec], structures: Structures, cpu: int
    ) -> DmaPort:
        words = self._page(mem.VALUES)
        ring = self._page(mem.VALUES, d.RING_PAGES)
        status = self._page(mem.VALUES)
        entries = self._page(mem.VALUES, d.QUEUE_ENTRIES * d.QUEUE_BYTES // mem.PAGE_BYTES)
        here = linear(words)
        first = {
            d.P_RING: linear(ring), d.P_STATUS: linear(status), d.Q_ENTRIES: linear(entries),
            d.P_DOORBELL: linear(0) + device.doorbell, d.Q_STARTED: 1, d.Q_FINISHED: 1,
        }  # fmt: skip
        domain, root = number + 1, 0
        ring_address, status_address = ring << 12, status << 12
        if self.maps:
            rights = USER_PAGE if self.machine.first_level else READ_WRITE
            table = process_table(self.tables) if self.machine.first_level else domain_table(self.tables)
            root = table.root << 12
            ring_address, status_address = d.RING_PAGE << 12, d.STATUS_PAGE << 12
            table.map(ring_address, range(ring, ring + d.RING_PAGES), rights)
            table.map(status_address, status, rights)
            if self.machine.first_level:
                asks = (DTE if device.ats else 0) | (PRE if device.pri else 0)
                structures.enable(device.source, flags=PASIDE | asks)
                structures.assign(device.source, 0, domain, first=table, middle=PWSNP)
            else:
                structures.attach(device.source, table, domain, devices=device.ats)
            spare = 8 + 2 * sum(map(_table_pages, phases))
            tables = self.frames.reserve(spare)
            first |= {d.P_ROOT: root, d.P_TABLES: tables, d.P_TABLES_END: tables + spare}
            first |= self._addresses(here, phases)
            pages, whole = {"G": 3, "DID": domain}, {"G": 2, "DID": domain}
            if self.machine.first_level:  # of the PASID of requests without one, which is 0
                (page_low, _), (domain_low, _) = (descriptor("PASID_IOTLB", **each) for each in (pages, whole))
            else:
                page_low, _ = descriptor("IOTLB", DW=1, DR=1, **pages)
                domain_low, _ = descriptor("IOTLB", DW=1, DR=1, **whole)
            first |= {d.P_PAGE_LOW: page_low, d.P_DOMAIN_LOW: domain_low}
            if device.pri:
                first[d.P_GROUPS] = linear(self._page(mem.VALUES))
            if device.ats:
                first[d.P_DEVICE_LOW], _ = descriptor("DEVICE_TLB", SID=device.source)
                first[d.P_CONTEXT] = linear(0) + structures.context_address(device.source)
                first[d.P_CONTEXT_LOW], _ = descriptor("CONTEXT_CACHE", G=3, DID=domain, SID=device.source)
        elif structures.scalable:
            structures.enable(device.source)
            structures.assign(device.source, 0, domain)
        else:
            structures.attach(device.source, None, domain, widest=WIDEST)
        for word, value in first.items():
            self._store(here + word, value)
        vector = d.DMA_VECTOR + number
        message = remappable_request(number) if self.machine.remaps else compatible_request(vector, cpu)
        return DmaPort(
            device=device, words=words << 12, ring=ring << 12, status=status << 12, ring_address=ring_address,
            status_address=status_address, root=root, message=message, vector=vector, cpu=cpu, slots=(),
        )  # fmt: skip

    def _addresses(self, here: int, phases: Sequence[DmaBuffersSpec]) -> dict[int, int]:
        """The tree of addresses in use, with what is in use from the start, and empty magazines."""
        most = sum(phase.buffers for phase in phases) + 2 * d.QUEUE_ENTRIES
        nodes = self._objects(most + 8, d.NODE_BYTES)
        used = [d.INTERRUPT_PAGES, (d.RING_PAGE, d.STATUS_PAGE), (d.ANCHOR, d.ANCHOR)]
        low, root, anchor = (nodes + d.NODE_BYTES * n for n in range(len(used)))
        links = {low: (root, 0, 0, d.RED), root: (0, low, anchor, d.BLACK), anchor: (root, 0, 0, d.RED)}
        for (node, words), pages in zip(links.items(), used, strict=True):
            for word, value in enumerate((*words, *pages)):
                self._store(node + 8 * word, value)
        magazines = self._objects(2 * d.CLASS_COUNT + most // d.MAGAZINE_LIMIT + 4, d.MAGAZINE_BYTES)
        free = magazines + 2 * d.CLASS_COUNT * d.MAGAZINE_BYTES
        for n in range(d.CLASS_COUNT):
            for place, word in enumerate((d.C_LOADED, d.C_PREVIOUS)):
                magazine = magazines + (2 * n + place) * d.MAGAZINE_BYTES
                self._store(magazine, 0)
                self._store(here + d.CLASSES + n * d.CLASS_BYTES + word, magazine)
        return {
            d.P_TREE: root,
            d.P_CACHED: anchor,
            d.P_NODES: nodes + d.NODE_BYTES * len(used),
            d.P_MAGAZINES: free,
        }

    def _slots(self, phase: DmaBuffersSpec) -> int:
        """A slot for each buffer, which says where the buffer is; the first frame of slots."""
        unit = phase.page_bytes // mem.PAGE_BYTES
        first = self.frames.reserve(phase.buffer_bytes // mem.PAGE_BYTES + unit - 1)
        first = -(-first // unit) * unit
        stride = phase.buffer_pages * phase.page_bytes
        words = [word for n in range(phase.buffers) for word in (0, (first << 12) + n * stride)]
        slots = self._page(mem.VALUES, -(-8 * len(words) // mem.PAGE_BYTES))
        fill(self.memory, slots, words)
        return slots


def _table_pages(phase: DmaBuffersSpec) -> int:
    """Tables of the last level that addresses of a phase need, with those that wait in a queue."""
    at_once = phase.group if phase.mapping == "group" else 1
    pages = (phase.buffers + d.QUEUE_ENTRIES * at_once) * phase.buffer_pages * 2
    return pages // mem.PAGE_WORDS + 4
