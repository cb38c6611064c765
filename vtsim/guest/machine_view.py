"""What a guest builder sees of a machine: guest-physical memory, and the state in which a vCPU starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from vtsim.cpu.assembler import Program
from vtsim.cpu.engine import Engine


class PhysicalMemory(Protocol):
    """Guest-physical memory; with more than 3 GiB, RAM continues above the devices' hole at 3 to 4 GiB."""

    engine: Engine
    size: int  # bytes of RAM

    def frame(self, gfn: int) -> int:
        """Return the host frame behind a guest frame, allocated now if there is none."""
        ...

    def contents(self, gfn: int, kind: int) -> NDArray[np.int64]:
        """Return the 512 words of a guest frame as a writable view, giving it contents of this kind."""
        ...

    def store(self, gpa: int, value: int) -> None:
        """Store an 8-byte word; `value` is taken modulo 2**64."""
        ...


@frozen(kw_only=True)
class DmaDevice:
    """A device that the guest drives: its name, its source-id, and the guest-physical address of its doorbell.

    `ats`: may it ask for translations and keep them? `pri`: for pages as well, which are mapped when it does?
    """

    name: str
    source: int
    doorbell: int
    ats: bool = False
    pri: bool = False


@frozen(kw_only=True)
class DmaMachine:
    """What a machine offers to drivers: its devices and the remapping unit between them and memory.

    `registers`: guest-physical address of the unit's registers; `translates`: may domains map pages, or do devices use
    physical addresses? `remaps`: are interrupts remapped? `coherent`: does the unit snoop; `write_buffers`: do stores
    stand in buffers until they are flushed; `caching_mode`: may it cache what is not present?
    `first_level`: is the unit in scalable mode, with first-level tables, which a real unit nests in a VM's memory?
    """

    devices: tuple[DmaDevice, ...]
    registers: int
    translates: bool
    remaps: bool
    coherent: bool = True
    write_buffers: bool = False
    caching_mode: bool = False
    first_level: bool = False


@frozen(kw_only=True)
class DmaPort:
    """Where a kernel keeps what belongs to a device: guest-physical addresses of its page of words, ring and status
    word, and the last two as the device finds them; `root`: of the domain's table, 0 where none is."""

    device: DmaDevice
    words: int
    ring: int
    status: int
    ring_address: int
    status_address: int
    root: int
    message: tuple[int, int]  # address and data of its interrupt
    vector: int  # that the kernel expects it with
    cpu: int  # of the guest, on which its driver runs and the interrupt is expected
    slots: tuple[tuple[int, int], ...]  # of its buffers, by phase: guest-physical address, how many


@frozen(kw_only=True)
class DmaMemory:
    """Where a kernel keeps what belongs to a remapping unit; what its registers are to hold, and its ports.

    `pqa`, `page_event`: page request queue, 0 where none is, and address and data of its event.
    """

    ports: tuple[DmaPort, ...]
    rtaddr: int = 0
    irta: int = 0
    iqa: int = 0
    pqa: int = 0
    page_event: tuple[int, int] = (0, 0)


@frozen(kw_only=True)
class DirectTables:
    """What a hypervisor offers to a paravirtual guest whose tables hold host-physical addresses.

    `machine` gives the host frames behind guest frames; `machine_to_physical` are the host frames of a table from host
    frame to guest-physical address, which the guest may map read-only; `batch` is how many requests it should gather;
    `ring3` says that its kernel runs in ring 3, `on_host` that it is a process of a host: pages of
    a copied space are mapped by a request each, and events masked by a call.
    """

    machine: Callable[[NDArray[np.int64]], NDArray[np.int64]]
    machine_to_physical: tuple[int, ...]
    batch: int
    ring3: bool = False
    on_host: bool = False


@frozen(kw_only=True)
class Space:
    """A process's address space: what CR3 holds while its kernel half is loaded, and its areas.

    An area is its name, its first linear address and the address after its last. `user_cr3` is what CR3 holds while the
    process itself runs, where its kernel has a root for that: with KPTI, and in ring 3; else 0.
    """

    name: str
    cr3: int
    areas: tuple[tuple[str, int, int], ...]
    user_cr3: int = 0


@frozen(kw_only=True)
class Start:
    """The architectural state with which a vCPU starts; `msrs` are those that the fields do not name, by index.

    `roots` are the guest-physical addresses of every paging hierarchy that the guest may load, `log` that of the page
    in which the guest's kernel records how its processes ended, `tables` the frames that it will make page tables of.
    `process_roots` are, for each process and each child that is set aside, the number of the process and what CR3 holds
    in its address space, without PCID (two values with KPTI). With direct tables `cr3` and all roots are host-physical,
    `roots` are those that are pinned; `shared` is the guest-physical address of the page shared with the hypervisor.
    `texts` are the programs: the kernel's, then those of the processes.
    `file_queue` is the guest-physical address of the queue to the device that has the mapped file, 0 where none has.
    `others` are the states of the other vCPUs, `log_lines` the processes whose ends are recorded, in order.
    `protected`: programs run in 32-bit protected mode, with flat segments; `pdptes` are loaded then, with PAE paging.
    """

    rip: int
    rsp: int
    rflags: int
    cr0: int
    cr3: int
    cr4: int
    efer: int
    idtr_base: int
    idtr_limit: int
    gdtr_base: int
    gdtr_limit: int
    tr_base: int
    tr_selector: int = 0x40
    cpl: int
    msrs: Mapping[int, int]
    gs_base: int
    fs_base: int
    roots: tuple[int, ...] = ()
    log: int = 0
    spaces: tuple[Space, ...] = ()
    process_roots: tuple[tuple[int, tuple[int, ...]], ...] = ()
    tables: tuple[int, ...] = ()
    shared: int = 0
    texts: tuple[Program, ...] = ()
    others: tuple[Start, ...] = ()
    log_lines: tuple[int, ...] = ()
    dma: DmaMemory | None = None
    file_queue: int = 0
    protected: bool = False
    pdptes: tuple[int, ...] = ()
