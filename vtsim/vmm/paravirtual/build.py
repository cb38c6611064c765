"""Builds the hypervisor into a machine: programs, a vCPU for each guest, types of its frames, CPUs ready to boot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from attrs import define

from vtsim.base import memory as mem
from vtsim.cpu.assembler import Assembler, Program
from vtsim.cpu.engine import Engine
from vtsim.cpu.profile import Profile
from vtsim.ept import direct as d
from vtsim.guest.machine_view import Start
from vtsim.vmm.direct import DirectHost
from vtsim.vmm.host import TEXT_FRAME, Host
from vtsim.vmm.hypervisor import Guest
from vtsim.vmm.monitor import layout as at
from vtsim.vmm.monitor.virtual_cpus import (
    Monitor,
    VirtualCpu,
    boot_for_ring_3,
    fill,
    flags_in_ring_3,
    gates,
    switch_off,
    windows,
)
from vtsim.vmm.paravirtual import calls, emulate, entry
from vtsim.vmm.paravirtual.layout import FIRST_OWN, LAST_OWN, V
from vtsim.vmm.programs.upcalls import time_scales
from vtsim.vmm.spec import VmmSpec

FIRST_PORT: Final = 1


@define(eq=False)
class ParavirtualMonitor(Monitor):
    """The hypervisor as the platform sees it while it runs."""

    offsets = V

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
    memories = windows(host, guests, roots, shuffled=shuffled, seed=seed)
    vcpus = [
        VirtualCpu(name=guest.name, cpu=guest.cpu, page=page, data=own, memory=ram, devices=guest.devices)
        for guest, page, own, ram in zip(guests, pages, data, memories, strict=True)
    ]
    program, handlers, emulators = _place(host, profile, vcpus, tables, words)
    monitor = ParavirtualMonitor(engine, host, vmm, program, tuple(vcpus))
    for frame, labels in zip(words, (handlers, emulators), strict=True):
        host.store_many(frame, np.array([mem.signed(program.labels[name]) for name in labels], np.int64))
    gates(host, program)
    for number, (vcpu, guest) in enumerate(zip(vcpus, guests, strict=True)):
        vcpu.memory.direct = tables.offer(vcpu.memory, number, vmm.pv.batch, ring3=True)
        start = guest.build(vcpu.memory)
        top = host.words(vcpu.memory.backing.root, mem.TABLE)
        own = {index: int(top[index]) for index in range(FIRST_OWN, LAST_OWN + 1)}
        tables.validate(vcpu.memory, number, start, own)
        _fill(monitor, vcpu, number, start)
        boot_for_ring_3(monitor, vcpu, start, 0)
    switch_off(engine, vcpus)
    return monitor


def _place(
    host: Host, profile: Profile, vcpus: Sequence[VirtualCpu], tables: DirectHost, words: tuple[int, int]
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


def _fill(monitor: Monitor, vcpu: VirtualCpu, number: int, start: Start) -> None:
    """The structure of a vCPU, its MSRs and the page that it shares."""
    host = monitor.host
    shared = host.address(vcpu.memory.frame(start.shared >> mem.PAGE_SHIFT))
    fill(monitor, vcpu, start, flags_in_ring_3(start))
    values = {
        "CR0": start.cr0, "CR4": start.cr4, "EFER": start.efer, "TOP": host.address(vcpu.memory.backing.root),
        "NUMBER": number, "KERNEL_ROOT": start.roots[0], "SHARED_PAGE": shared, "KERNEL_CR3": start.cr3,
        "KERNEL_STACK": start.rsp, "NEXT_PORT": FIRST_PORT,
        "FEATURES": d.DIRECT_TABLES | d.RING_3 | d.SHARED_EVENTS,
    }  # fmt: skip
    monitor.put(vcpu, values)
    host.store(shared + d.TIME_SCALE, time_scales(host.profile.clock_hz)[0])
    host.store(shared + d.UPCALL_MASK, 1)
