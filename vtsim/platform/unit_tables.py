"""Tables through which driven devices reach memory and interrupt CPUs: the guest's own natively, else the host's.

VT-d: "DMA Remapping".
Not modelled: devices that come and go; I/O APICs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from attrs import define, evolve, frozen

from vtsim.base import memory as mem
from vtsim.base.errors import ModelError
from vtsim.cpu.engine import Engine
from vtsim.ept.tables import PAGING, Table, Words
from vtsim.guest.dma_memory import EXTENDED
from vtsim.guest.kernel import dma_layout as d
from vtsim.guest.machine_view import DmaMemory, DmaPort, PhysicalMemory
from vtsim.iommu import spec as sp
from vtsim.iommu.descriptors import descriptor
from vtsim.iommu.entries import ADDRESS, PWSNP, SRE
from vtsim.iommu.interrupts import SVT_SOURCE, posted_entry, remappable_request, remapped_entry
from vtsim.iommu.tables import READ_WRITE, Structures, domain_table
from vtsim.vmm import layout as at
from vtsim.vmm.hypervisor import Hypervisor, Vcpu
from vtsim.vmm.memory import VmMemory
from vtsim.vmm.programs import viommu_words as viommu
from vtsim.vmm.programs.events import ASSIGNED_BYTES


@frozen(kw_only=True)
class DrivenPort:
    """A device with the guest that drives it: what the guest's kernel keeps, in whose memory."""

    port: DmaPort
    memory: PhysicalMemory


@frozen(kw_only=True)
class UnitTables:
    """Host-physical: what a unit's registers are to hold; no queue is in use where `iqa` or `pqa` is 0."""

    rtaddr: int
    irta: int
    iqa: int = 0
    pqa: int = 0
    page_event: tuple[int, int] = (0, 0)  # address and data of the message


def native(layout: DmaMemory, memory: PhysicalMemory) -> tuple[tuple[DrivenPort, ...], UnitTables]:
    """The devices of a guest that has the machine to itself; its kernel has made the unit's tables."""
    ports = tuple(DrivenPort(port=port, memory=memory) for port in layout.ports)
    wide = sp.IQA_WIDE if layout.rtaddr >> 10 & 3 == sp.TTM_SCALABLE else 0
    return ports, UnitTables(
        rtaddr=layout.rtaddr, irta=layout.irta, iqa=layout.iqa | wide, pqa=layout.pqa, page_event=layout.page_event
    )


def assigned(
    hypervisor: Hypervisor, layouts: Sequence[tuple[str, DmaMemory]]
) -> tuple[tuple[DrivenPort, ...], UnitTables]:
    """Devices that VMs, by name, have of their own: the host's tables let each reach its VM's memory, and no other.

    VT-d: "DMA Remapping".
    """
    engine = hypervisor.engine
    vcpus = {(vcpu.name, vcpu.index): vcpu for vcpu in hypervisor.vcpus}
    free = {name: _Frames(engine, iter(vcpus[name, 0].domain)) for name, _ in layouts}
    first = free[layouts[0][0]]
    nested = hypervisor.path.addresses.get("viommu_step", 0) > 16
    structures = Structures(first, scalable=nested)
    interrupts = first.allocate()
    engine.contents(interrupts, mem.VALUES)
    ports: list[DrivenPort] = []
    domain, queue = 0, 0
    for name, layout in layouts:
        vcpu, frames = vcpus[name, 0], free[name]
        whole = domain_table(frames)
        large = min(hypervisor.path.vmm.ept.page_size, 2 << 20) if vcpu.memory.large else mem.PAGE_BYTES
        vcpu.memory.map_all(whole, large, READ_WRITE)
        for place, port in enumerate(layout.ports):
            domain += 1
            table = whole
            if port.root and not nested:
                table = domain_table(frames)
                _shadow(vcpu.memory, table, port)
            if nested:
                guest = Table(root=port.root >> 12, format=PAGING, take=frames.allocate, words=_no_words)
                structures.enable(port.device.source)
                first_level = guest if port.root else None
                structures.assign(
                    port.device.source, 0, domain, first=first_level, second=whole, middle=PWSNP, high=SRE
                )  # fmt: skip
            else:
                structures.attach(port.device.source, table, domain)
            if port.root:
                entry_at = structures.pasid_address(port.device.source, 0) if nested else 0
                queue = _tell(hypervisor, port, place, table, domain, entry_at)
            entry = _interrupt_entry(hypervisor, port, len(ports), vcpus[name, port.cpu])
            for word, value in enumerate(entry):
                engine.store((interrupts << 12) + 16 * len(ports) + 8 * word, value)
            port = evolve(port, message=remappable_request(len(ports)))
            ports.append(DrivenPort(port=port, memory=vcpu.memory))
    for name, layout in layouts:
        if any(port.root for port in layout.ports):
            _hand_over(hypervisor, layout, free[name], vcpus[name, 0].memory.size // mem.PAGE_BYTES)
    return tuple(ports), UnitTables(rtaddr=structures.rtaddr, irta=interrupts << 12 | EXTENDED, iqa=queue)


def _interrupt_entry(hypervisor: Hypervisor, port: DmaPort, number: int, owner: Vcpu) -> tuple[int, int]:
    """The interrupt of a device: posted to the vCPU, or for the host, whose handler is told of vCPU and vector."""
    if hypervisor.path.vmm.posted_interrupts:
        descriptor_at = owner.address + at.V["POSTED"] - at.HOST_DIRECT
        return posted_entry(port.vector, descriptor_at, source=port.device.source, validation=SVT_SOURCE)
    for word, value in enumerate((owner.address, port.vector)):
        hypervisor.host.store(hypervisor.path.addresses["assigned"] + ASSIGNED_BYTES * number + 8 * word, value)
    return remapped_entry(
        at.DEVICE_VECTOR + number, owner.cpu, extended=True, source=port.device.source, validation=SVT_SOURCE
    )


def _shadow(memory: VmMemory, table: Table, port: DmaPort) -> None:
    """Let a shadow table have what the guest's has from the start: ring and status page."""
    for n in range(d.RING_PAGES + 1):
        gpa = port.status if n == d.RING_PAGES else port.ring + n * mem.PAGE_BYTES
        table.map(port.ring_address + n * mem.PAGE_BYTES, memory.frame(gpa >> 12), READ_WRITE)


def _tell(hypervisor: Hypervisor, port: DmaPort, place: int, table: Table, domain: int, entry: int) -> int:
    """Tell the virtual unit of a device, whose real PASID entry may be at `entry`; what IQA is to hold really."""
    unit = hypervisor.path.addresses["viommu"]
    if entry:
        low, _ = descriptor("PASID_IOTLB", DID=domain)
    else:
        low, _ = descriptor("IOTLB", DW=1, DR=1, DID=domain)
    values = {
        viommu.VD_GUEST: port.root, viommu.VD_SHADOW: table.root << 12, viommu.VD_LOW: low,
        viommu.VD_SOURCE: port.device.source, viommu.VD_DOMAIN: place + 1, viommu.VD_ENTRY: at.direct(entry),
    }  # fmt: skip
    first = unit + viommu.VI_DEVICES + viommu.DEVICE_BYTES * place
    for word, value in values.items():
        hypervisor.host.store(first + word, value)
    hypervisor.host.store(unit + viommu.VI_END, first + viommu.DEVICE_BYTES)
    return unit + viommu.QUEUE_PAGE - at.HOST_DIRECT | (sp.IQA_WIDE if entry else 0)


def _no_words(gfn: int) -> Words:
    raise ModelError("the host does not look into a guest's table", {"gfn": gfn})


def _hand_over(hypervisor: Hypervisor, layout: DmaMemory, frames: _Frames, memory_pages: int) -> None:
    """The frames that are left are for the shadow tables that the program makes."""
    unit, left = hypervisor.path.addresses["viommu"], list(frames.free)
    values = {
        viommu.VI_QUEUE: layout.iqa, viommu.VI_TABLES: left[0], viommu.VI_TABLES_END: left[-1] + 1,
        viommu.VI_ROOT: layout.rtaddr & ADDRESS, viommu.VI_MOST: memory_pages + 1,
    }  # fmt: skip
    for word, value in values.items():
        hypervisor.host.store(unit + word, value)


@define
class _Frames:
    """Frames of the host from which tables are made."""

    engine: Engine
    free: Iterator[int]

    def allocate(self) -> int:
        return next(self.free)

    def contents(self, hfn: int, kind: int) -> Words:
        return self.engine.contents(hfn, kind)
