"""Builds a monitor into a machine: its programs, a virtual CPU for each guest, shadow tables, CPUs ready to boot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
from attrs import define, evolve, frozen
from numpy.typing import NDArray

from vtsim.base import memory as mem
from vtsim.base.errors import ModelError
from vtsim.base.jit import quiet
from vtsim.cpu import accounts as k
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler, Program
from vtsim.cpu.codes import FOREVER
from vtsim.cpu.engine import Engine
from vtsim.cpu.kernels.cursor import set_privilege
from vtsim.cpu.kernels.msr_storage import msr_slot
from vtsim.cpu.profile import Profile
from vtsim.cpu.translation import COUNTED, TRANSLATOR
from vtsim.ept import shadow as d
from vtsim.ept import spec as e
from vtsim.ept.tables import KERNEL_PAGE, Table
from vtsim.guest.machine_view import Start
from vtsim.vmm.host import BLOCK, TEXT_FRAME, Host
from vtsim.vmm.hypervisor import Guest
from vtsim.vmm.memory import Pool, VmMemory, gfn_ranges
from vtsim.vmm.monitor import emulate, entry, memory, translate
from vtsim.vmm.monitor import layout as at
from vtsim.vmm.monitor.cache import Cache, fill_cache, reserve_cache
from vtsim.vmm.needs import table_frames
from vtsim.vmm.programs.ports import port_entries
from vtsim.vmm.shadow import PLAIN_PARAMETERS, ShadowPool, fill_pool, mode_of, reserve_pool
from vtsim.vmm.spec import VmmSpec

FLAGS_CLEARED: Final = 0x47700
CR0, CR4, EFER = 0x8005_0033, 0x6A0, 0xD01
STORED_MSRS: Final = (0x10A, 0x174, 0x175, 0x176, 0x1A0, 0x277, 0xC0000083, 0xC0000103)
STAR, LSTAR, FMASK, KERNEL_GS_BASE = 0xC0000081, 0xC0000082, 0xC0000084, 0xC0000102
OPS: Final = 256
SLOTS, MSRS, TSS, PORTS = 0, 1024, 2048, 2304  # byte offsets in a vCPU's data page


@frozen(kw_only=True)
class VirtualCpu:
    """Where the parts of one guest's virtual CPU stand.

    `page`: frame of the monitor's stack and the structure. `data`: frame of its memory slots, MSRs and TSS.
    """

    name: str
    cpu: int
    page: int
    data: int
    memory: VmMemory
    devices: tuple[str, ...]


@frozen(kw_only=True)
class Vcpu(VirtualCpu):
    """The same of a deprivileged guest; `root`: the monitor's own tables, through which it sees the guest's memory."""

    root: Table
    shadow: ShadowPool


@define(eq=False)
class Monitor:
    """A monitor in a machine, as the platform sees it while it runs."""

    engine: Engine
    host: Host
    vmm: VmmSpec
    program: Program
    vcpus: tuple[VirtualCpu, ...]
    caches: tuple[Cache, ...] = ()  # of translations, one for each vCPU; none where kernels run as they are

    def address(self, vcpu: VirtualCpu) -> int:
        """The linear address of a vCPU's structure."""
        return self.host.address(vcpu.page) + at.STACK_BYTES

    def current(self, cpu: int) -> VirtualCpu:
        """The guest of a CPU."""
        return next(vcpu for vcpu in self.vcpus if vcpu.cpu == cpu)

    def word(self, vcpu: VirtualCpu, field: str, word: int = 0) -> int:
        """A word of a vCPU's structure."""
        return self.host.load(self.address(vcpu) + at.V[field] + 8 * word)

    def shadow_root(self, number: int, root: int, ring: int) -> int | None:
        """What CR3 holds while the guest of a vCPU believes in a root and a ring; None unless it has been in both."""
        vcpu, view = self.vcpus[number], 0 if ring else at.VIEW_WORDS
        return self.word(vcpu, "VIEWS", view) or None if self.word(vcpu, "CR3") & e.ADDRESS == root else None

    def in_guest(self, cpu: int) -> bool:
        """Does a guest run on a CPU, and not the monitor?"""
        return bool(self.engine.cpus[cpu][s.PRIVILEGE] & 1)

    def finish(self, cpu: int) -> VirtualCpu:
        """The guest of a CPU came to its end; it is switched off from outside, which costs nothing."""
        m, vcpu = self.engine.cpus[cpu], self.current(cpu)
        with quiet():
            set_privilege(m, self.engine.arena, 0)
        m[s.GPR + s.R15], m[s.RIP] = self.address(vcpu), mem.signed(self.program.labels["ended"])
        self.engine.sync(cpu)
        return vcpu

    def deaths(self, cpu: int) -> list[tuple[str, str]]:
        """The VM of a CPU, and why it ended."""
        return [(vcpu.name, self.death(vcpu)) for vcpu in self.vcpus if vcpu.cpu == cpu]

    def death(self, vcpu: VirtualCpu) -> str:
        """Why a VM ended; empty while it runs."""
        code = self.word(vcpu, "DEATH")
        text = at.DEATHS.get(code, "")
        return f"{text}: {o.OPS[self.word(vcpu, 'DEATH_OP')].name}" if code == at.ILLEGAL else text

    def settle(self) -> None:
        """Hand what the monitor counted to the statistics of the guests' owners.

        What the processor delivered in ring 3 went to the monitor; what the guest got, the monitor delivered.
        """
        for vcpu in self.vcpus:
            owner = self.engine.owner(vcpu.name)
            injected, faults, interrupts = (
                self.word(vcpu, f"INJECTED{kind}") for kind in ("", "_FAULTS", "_INTERRUPTS")
            )
            counts = {
                k.OWN_EMULATED: self.word(vcpu, "EMULATED", 1), k.OWN_EMULATED + 1: self.word(vcpu, "EMULATED"),
                k.EXCEPTIONS: injected - interrupts, k.PAGE_FAULTS: faults, k.INTERRUPTS: interrupts,
                k.SYSCALLS: self.word(vcpu, "SYSTEM_CALLS"),
            }  # fmt: skip
            for slot, count in counts.items():
                self.engine.arena[owner + slot] = count

    def statistics(self) -> dict[str, int]:
        """What the monitor counted, over all guests."""
        names = ("traps", "system_calls", "injected", "switches")
        return {name: sum(self.word(vcpu, name.upper()) for vcpu in self.vcpus) for name in names}

    def software(self) -> dict[str, int] | None:
        """What a software CPU counted; None where the processor executes the guests."""
        return None

    def hook(self, cpu: int, number: int) -> None:
        """A hook that a program of this monitor leaves to the platform: it has none."""
        raise ModelError("a monitor asked for a hook of the platform", {"cpu": cpu, "number": number})

    def translations(self) -> dict[str, int] | None:
        """What the binary translator counted, over all guests; None where kernels run as they are."""
        if not self.caches:
            return None
        return {
            name.lower(): sum(self.host.load(self.host.address(c.structure) + TRANSLATOR[name]) for c in self.caches)
            for name in COUNTED
        }


def build_monitor(
    *,
    vmm: VmmSpec,
    profile: Profile,
    engine: Engine,
    guests: Sequence[Guest],
    seed: int = 1,
    shuffled: bool = True,
    translates: bool = False,
) -> Monitor:
    """Lay a monitor and its guests, at most one for each CPU, into an engine whose memory is empty.

    `translates`: guest kernels run from a cache of translations, and not as they are.

    The frame allocator of the engine is set up here. Raises `ConfigError` where the memory does not suffice.
    """
    host = Host(engine, profile, direct=at.DIRECT, text=at.TEXT)
    parameters = {name: one.value for name, one in PLAIN_PARAMETERS.items()}
    table = host.area(2 * OPS)
    pages, data = [host.reserve() for _ in guests], [host.reserve() for _ in guests]
    shadows = [reserve_pool(host, guest.memory, parameters["shadow_permille"], 0) for guest in guests]
    roots = [host.process() for _ in guests]
    caches = [reserve_cache(host, shared) for shared in pages] if translates else []
    pools = [Pool.of(host, 0, table_frames(guest.memory)) for guest in guests]
    host.give_out(0, BLOCK, shuffled=shuffled, seed=seed)
    vcpus = []
    for n, guest in enumerate(guests):
        window = evolve(roots[n], take=pools[n].take)
        ram = VmMemory(engine, guest.memory, window, None, at.RAM, KERNEL_PAGE | e.PTE_NO_EXECUTE)
        ram.back_all(mem.PAGE_BYTES)
        part = Vcpu(
            name=guest.name, cpu=guest.cpu, page=pages[n], data=data[n], root=window, memory=ram, shadow=shadows[n],
            devices=guest.devices,
        )  # fmt: skip
        vcpus.append(part)
    monitor, handlers = _place(host, vmm, vcpus, host.address(table), translates)
    host.store_many(table, np.array([mem.signed(monitor.program.labels[name]) for name in handlers], np.int64))
    for vector in range(32):
        host.gate(vector, monitor.program.labels[f"trap_{vector}"])
    host.gate(at.TIMER_VECTOR, monitor.program.labels["timer"])
    for vcpu, guest in zip(vcpus, guests, strict=True):
        start = guest.build(vcpu.memory)
        _fill(monitor, vcpu, start, parameters)
        _boot(monitor, vcpu, start)
    monitor.caches = tuple(caches)
    for vcpu, cache in zip(vcpus, caches, strict=False):
        fill_cache(host, cache, vcpu.root, monitor.address(vcpu), engine.cpus[vcpu.cpu])
    for cpu in set(range(engine.geometry.cpus)) - {vcpu.cpu for vcpu in vcpus}:
        engine.cpus[cpu][s.HALTED], engine.cpus[cpu][s.APIC_DEADLINE] = 1, FOREVER
    return monitor


def top_entries(host: Host) -> tuple[int, ...]:
    """The entries of a top-level table that lead to the monitor: guest memory, text, all of physical memory."""
    first = at.DIRECT // at.TOP_ENTRY % 512
    last = first + (host.engine.geometry.memory_bytes - 1) // at.TOP_ENTRY
    return (at.RAM // at.TOP_ENTRY % 512, at.TEXT // at.TOP_ENTRY % 512, *range(first, last + 1))


def _place(host: Host, vmm: VmmSpec, vcpus: Sequence[Vcpu], table: int, translates: bool) -> tuple[Monitor, list[str]]:
    """The monitor with its program, and the labels of the emulators by op: of processes, then of the kernel."""
    a = Assembler("monitor", at.TEXT)
    entry.boot(a)
    entry.resume(a, translates)
    entry.inject(a)
    entry.exceptions(a, translates)
    entry.interrupt(a, translates)
    for vcpu in vcpus:
        entry.system_call(a, vcpu.cpu, host.address(vcpu.page) + at.STACK_BYTES, translates)
    entry.system_calls(a, translates)
    emulate.general_protection(a, table, translates)
    handlers = emulate.emulators(a, translates)
    memory.page_fault(a, translates)
    memory.table_write(a, translates)
    memory.fill(a)
    memory.view(a, top_entries(host), translates)
    if translates:
        translate.call_out(a, entry.LEAN)
        translate.subroutines(a)
    memory.settle(a)
    program = a.assemble()
    host.engine.place(program, lambda page: TEXT_FRAME + (page - at.TEXT) // mem.PAGE_BYTES)
    return Monitor(host.engine, host, vmm, program, tuple(vcpus)), handlers


def _fill(monitor: Monitor, vcpu: Vcpu, start: Start, parameters: Mapping[str, int]) -> None:
    """The structure of a vCPU, its memory slots, MSRs and pool of shadow pages."""
    host, data, here = monitor.host, monitor.host.address(vcpu.data), monitor.address(vcpu)
    slots = [word for first, end in gfn_ranges(vcpu.memory.size) for word in (first << 12, end << 12, at.RAM, 0)]
    machine = {index: processor_msr(host.engine, vcpu.cpu, index) for index in STORED_MSRS}
    msrs = [word for index in STORED_MSRS for word in (index, start.msrs.get(index, machine[index]))]
    ports = [word for row in port_entries(vcpu.devices) for word in row]
    for offset, row in ((SLOTS, slots), (MSRS, msrs), (PORTS, ports)):
        for n, value in enumerate(row):
            host.store(data + offset + 8 * n, value)
    fill_pool(
        host, vcpu.shadow, start, host.profile, parameters, here + at.V["SLOTS"], vcpu.root.root, at.RAM
    )  # fmt: skip
    top = host.words(vcpu.root.root, mem.TABLE)
    for index in range(at.FIRST_ENTRY, at.LAST_ENTRY + 1):
        top[index] |= d.MONITOR
    values = {
        "KERNEL": 1, "INTERRUPTS": start.rflags >> 9 & 1, "CS": start.msrs[STAR] >> 32 & 0xFFFC,
        "SS": (start.msrs[STAR] >> 32 & 0xFFFC) + 8, "CR0": start.cr0, "CR3": start.cr3, "CR4": start.cr4,
        "EFER": start.efer, "STAR": start.msrs[STAR], "LSTAR": start.msrs[LSTAR], "FMASK": start.msrs[FMASK],
        "TR_BASE": start.tr_base, "MODE": mode_of(start), "POOL": host.address(vcpu.shadow.block),
        "TOP": host.address(vcpu.root.root), "SLOTS": data + SLOTS, "SLOT_ENTRIES": len(slots) // 4,
        "TIMER_LVT": 1 << 16, "PORTS": data + PORTS, "PORT_ENTRIES": len(ports) // 3,
        "MSR_TABLE": data + MSRS, "MSR_ENTRIES": len(STORED_MSRS),
    }  # fmt: skip
    for name, value in values.items():
        host.store(here + at.V[name], value)
    for n, value in enumerate((start.gdtr_limit, start.gdtr_base, start.idtr_limit, start.idtr_base)):
        host.store(here + at.V["GDTR"] + 8 * n, value)
    host.store(here + at.V["REGISTERS"] + 8 * s.RSP, start.rsp)
    flags = start.rflags & ~at.IOPL | at.RF_IF | 2
    for n, value in enumerate((at.GUEST_DATA, start.rsp, flags, at.GUEST_CODE, start.rip)):
        host.store(here - 8 * (n + 1), value)
    host.store(data + TSS + 8, here)


def processor_msr(engine: Engine, cpu: int, index: int) -> int:
    """What an MSR of the processor holds, as its guest is to find it; 0 where it has none."""
    with quiet():
        slot = int(msr_slot(engine.arena, index))
    return int(engine.cpus[cpu][slot]) if slot >= 0 else 0


def _boot(monitor: Monitor, vcpu: Vcpu, start: Start) -> None:
    """The state in which a CPU starts: in ring 0 at `boot`, on the monitor's own tables."""
    host, engine, here = monitor.host, monitor.engine, monitor.address(vcpu)
    m, labels = engine.cpus[vcpu.cpu], monitor.program.labels
    state = {
        s.RIP: labels["boot"], s.GPR + s.RSP: here - 64, s.GPR + s.R15: here, s.CR3: vcpu.root.root << 12,
        s.CR0: CR0, s.CR4: CR4, s.EFER: EFER, s.RFLAGS: 2, s.CS_SELECTOR: at.MONITOR_CODE,
        s.SS_SELECTOR: at.MONITOR_DATA, s.MSR_STAR: at.STAR, s.MSR_LSTAR: labels[f"system_call_{vcpu.cpu}"],
        s.MSR_FMASK: FLAGS_CLEARED, s.IDTR_BASE: host.address(host.idt), s.IDTR_LIMIT: mem.PAGE_BYTES - 1,
        s.TR_BASE: host.address(vcpu.data) + TSS + 4, s.GS_BASE: start.gs_base, s.FS_BASE: start.fs_base,
        s.MSR_KERNEL_GS_BASE: start.msrs.get(KERNEL_GS_BASE, 0), s.MONITORED: engine.owner(vcpu.name),
    }  # fmt: skip
    for slot, value in state.items():
        m[slot] = mem.signed(value)
    words = host.words(vcpu.page)
    m[s.BELIEVED_AT] = index_of(engine, words) + (at.STACK_BYTES + at.V["KERNEL"]) // 8
    engine.sync(vcpu.cpu)


def index_of(engine: Engine, words: NDArray[np.int64]) -> int:
    """Where a view of the arena begins in it."""
    return (words.ctypes.data - engine.arena.ctypes.data) // words.itemsize
