"""Builds the hypervisor into a machine: programs, a vCPU for each guest, types of its frames, CPUs ready to boot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from attrs import define, evolve

from vtsim.base import memory as mem
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler, Program
from vtsim.cpu.codes import FOREVER
from vtsim.cpu.engine import Engine
from vtsim.cpu.profile import Profile
from vtsim.ept import direct as d
from vtsim.ept import spec as e
from vtsim.ept.tables import KERNEL_PAGE
from vtsim.guest.machine_view import Start
from vtsim.vmm.direct import DirectHost
from vtsim.vmm.host import BLOCK, TEXT_FRAME, Host
from vtsim.vmm.hypervisor import Guest
from vtsim.vmm.memory import Pool, VmMemory
from vtsim.vmm.monitor import layout as at
from vtsim.vmm.monitor.build import (
    CR0,
    CR4,
    EFER,
    FLAGS_CLEARED,
    MSRS,
    PORTS,
    STORED_MSRS,
    TSS,
    Monitor,
    Vcpu,
    VirtualCpu,
    index_of,
    processor_msr,
)
from vtsim.vmm.monitor.crossing import VECTORS
from vtsim.vmm.needs import table_frames
from vtsim.vmm.paravirtual import calls, emulate, entry
from vtsim.vmm.paravirtual.layout import FIRST_OWN, LAST_OWN, V
from vtsim.vmm.programs.ports import port_entries
from vtsim.vmm.programs.upcalls import time_scales
from vtsim.vmm.spec import VmmSpec

FIRST_PORT: Final = 1


@define(eq=False)
class ParavirtualMonitor(Monitor):
    """The hypervisor as the platform sees it while it runs."""

    def word(self, vcpu: VirtualCpu, field: str, word: int = 0) -> int:
        return self.host.load(self.address(vcpu) + V[field] + 8 * word)

    def hypercalls(self) -> dict[str, dict[str, int]]:
        """What guests asked for, over all of them: hypercalls, requests, events."""

        def words(field: str, names: Sequence[str]) -> dict[str, int]:
            counts = {name: sum(self.word(v, field, n) for v in self.vcpus) for n, name in enumerate(names)}
            return {name: count for name, count in counts.items() if count}

        single = {name: sum(self.word(v, name.upper()) for v in self.vcpus) for name in COUNTED}
        return {"calls": words("HYPERCALLS", d.CALLS), "requests": words("REQUESTS", d.REQUESTS), "events": single}


COUNTED: Final = ("refusals", "events_sent", "upcalls", "blocks")


def build_paravirtual(
    *,
    vmm: VmmSpec,
    profile: Profile,
    engine: Engine,
    guests: Sequence[Guest],
    seed: int = 1,
    shuffled: bool = True,
) -> ParavirtualMonitor:
    """Lay the hypervisor and its guests, at most one for each CPU, into an engine whose memory is empty.

    The frame allocator of the engine is set up here. Raises `ConfigError` where the memory does not suffice.
    """
    host = Host(engine, profile, direct=at.DIRECT, text=at.TEXT)
    words = host.reserve(), host.reserve()  # of hypercalls, of emulators by op
    pages, data = [host.reserve() for _ in guests], [host.reserve() for _ in guests]
    tables = DirectHost.reserve(host)
    roots = [host.process() for _ in guests]
    pools = [Pool.of(host, 0, table_frames(guest.memory)) for guest in guests]
    host.give_out(0, BLOCK, shuffled=shuffled, seed=seed)
    vcpus = []
    for n, guest in enumerate(guests):
        window = evolve(roots[n], take=pools[n].take)
        ram = VmMemory(engine, guest.memory, window, None, at.RAM, KERNEL_PAGE | e.PTE_NO_EXECUTE)
        ram.back_all(mem.PAGE_BYTES)
        vcpus.append(
            Vcpu(
                name=guest.name,
                cpu=guest.cpu,
                page=pages[n],
                data=data[n],
                root=window,
                memory=ram,
                shadow=None,
                devices=guest.devices,
            )
        )
    program, handlers, emulators = _place(host, profile, vcpus, tables, words)
    monitor = ParavirtualMonitor(engine, host, vmm, program, tuple(vcpus))
    for frame, labels in zip(words, (handlers, emulators), strict=True):
        host.store_many(frame, np.array([mem.signed(program.labels[name]) for name in labels], np.int64))
    for vector in range(VECTORS):
        host.gate(vector, program.labels[f"trap_{vector}"])
    host.gate(at.TIMER_VECTOR, program.labels["timer"])
    for number, (vcpu, guest) in enumerate(zip(vcpus, guests, strict=True)):
        vcpu.memory.direct = tables.offer(vcpu.memory, number, vmm.pv.batch, ring3=True)
        start = guest.build(vcpu.memory)
        top = host.words(vcpu.root.root, mem.TABLE)
        own = {index: int(top[index]) for index in range(FIRST_OWN, LAST_OWN + 1)}
        tables.validate(vcpu.memory, number, start, own)
        _fill(monitor, vcpu, number, start)
        _boot(monitor, vcpu, start)
    for cpu in set(range(engine.geometry.cpus)) - {vcpu.cpu for vcpu in vcpus}:
        engine.cpus[cpu][s.HALTED], engine.cpus[cpu][s.APIC_DEADLINE] = 1, FOREVER
    return monitor


def _place(
    host: Host, profile: Profile, vcpus: Sequence[Vcpu], tables: DirectHost, words: tuple[int, int]
) -> tuple[Program, list[str], list[str]]:
    """The program, the labels of hypercalls by number, those of emulators by op."""
    a = Assembler("hypervisor", at.TEXT)
    deadline = profile.features.tsc_deadline
    entry.boot(a, deadline)
    for vcpu in vcpus:
        entry.system_call(a, vcpu.cpu, host.address(vcpu.page) + at.STACK_BYTES)
    entry.system_calls(a, host.address(words[0]))
    entry.leave(a)
    entry.call_back(a)
    entry.exceptions(a)
    entry.undefined(a)
    entry.timer(a)
    ground = calls.Ring3Ground(
        direct=at.DIRECT, words=host.address(tables.words), frames=host.engine.geometry.frame_count,
        own=(FIRST_OWN, LAST_OWN),
    )  # fmt: skip
    handlers = calls.calls(a, ground, deadline, profile.clock_hz)
    emulators = emulate.emulation(a, host.address(words[1]))
    program = a.assemble()
    host.engine.place(program, lambda page: TEXT_FRAME + (page - at.TEXT) // mem.PAGE_BYTES)
    return program, handlers, emulators


def _fill(monitor: Monitor, vcpu: Vcpu, number: int, start: Start) -> None:
    """The structure of a vCPU, its MSRs and the page that it shares."""
    host, data, here = monitor.host, monitor.host.address(vcpu.data), monitor.address(vcpu)
    shared = host.address(vcpu.memory.frame(start.shared >> mem.PAGE_SHIFT))
    machine = {index: processor_msr(host.engine, vcpu.cpu, index) for index in STORED_MSRS}
    msrs = [word for index in STORED_MSRS for word in (index, start.msrs.get(index, machine[index]))]
    ports = [word for row in port_entries(vcpu.devices) for word in row]
    for offset, row in ((MSRS, msrs), (PORTS, ports)):
        for n, value in enumerate(row):
            host.store(data + offset + 8 * n, value)
    values = {
        "KERNEL": 1, "CR0": start.cr0, "CR4": start.cr4, "EFER": start.efer, "MSR_TABLE": data + MSRS,
        "MSR_ENTRIES": len(STORED_MSRS), "PORTS": data + PORTS, "PORT_ENTRIES": len(ports) // 3,
        "TOP": host.address(vcpu.root.root), "NUMBER": number,
        "KERNEL_ROOT": start.roots[0], "SHARED_PAGE": shared, "KERNEL_CR3": start.cr3, "KERNEL_STACK": start.rsp,
        "NEXT_PORT": FIRST_PORT, "FEATURES": d.DIRECT_TABLES | d.RING_3 | d.SHARED_EVENTS,
    }  # fmt: skip
    for name, value in values.items():
        host.store(here + V[name], value)
    host.store(shared + d.TIME_SCALE, time_scales(host.profile.clock_hz)[0])
    host.store(shared + d.UPCALL_MASK, 1)
    host.store(here + V["REGISTERS"] + 8 * s.RSP, start.rsp)
    flags = start.rflags & ~at.IOPL | at.RF_IF | 2
    for n, value in enumerate((at.GUEST_DATA, start.rsp, flags, at.GUEST_CODE, start.rip)):
        host.store(here - 8 * (n + 1), value)
    host.store(data + TSS + 8, here)


def _boot(monitor: Monitor, vcpu: Vcpu, start: Start) -> None:
    """The state in which a CPU starts: in ring 0 at `boot`, on the hypervisor's own tables."""
    host, engine, here = monitor.host, monitor.engine, monitor.address(vcpu)
    m, labels = engine.cpus[vcpu.cpu], monitor.program.labels
    state = {
        s.RIP: labels["boot"], s.GPR + s.RSP: here - 64, s.GPR + s.R15: here, s.CR3: vcpu.root.root << 12,
        s.CR0: CR0, s.CR4: CR4, s.EFER: EFER, s.RFLAGS: 2, s.CS_SELECTOR: at.MONITOR_CODE,
        s.SS_SELECTOR: at.MONITOR_DATA, s.MSR_STAR: at.STAR, s.MSR_LSTAR: labels[f"system_call_{vcpu.cpu}"],
        s.MSR_FMASK: FLAGS_CLEARED, s.IDTR_BASE: host.address(host.idt), s.IDTR_LIMIT: mem.PAGE_BYTES - 1,
        s.TR_BASE: host.address(vcpu.data) + TSS + 4, s.GS_BASE: start.gs_base, s.FS_BASE: start.fs_base,
        s.MSR_KERNEL_GS_BASE: 0, s.MONITORED: engine.owner(vcpu.name),
    }  # fmt: skip
    for slot, value in state.items():
        m[slot] = mem.signed(value)
    words = host.words(vcpu.page)
    m[s.BELIEVED_AT] = index_of(engine, words) + (at.STACK_BYTES + V["KERNEL"]) // 8
    engine.sync(vcpu.cpu)
