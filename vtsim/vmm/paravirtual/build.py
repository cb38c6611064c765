"""Builds the hypervisor into a machine: programs, a vCPU for each guest, types of its frames, CPUs ready to boot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
from attrs import define, evolve, frozen

from vtsim.base import memory as mem
from vtsim.cpu.assembler import Assembler
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
from vtsim.vmm.paravirtual import calls, emulate, entry, several
from vtsim.vmm.paravirtual.layout import EVENT_VECTOR, FIRST_OWN, INVALIDATE_VECTOR, LAST_OWN, V
from vtsim.vmm.programs.upcalls import time_scales
from vtsim.vmm.spec import VmmSpec

FIRST_PORT: Final = 1


@define(eq=False)
class ParavirtualMonitor(Monitor):
    """The hypervisor as the platform sees it while it runs."""

    offsets = V
    root = "KERNEL_CR3"

    def hypercalls(self) -> dict[str, dict[str, int]]:
        """What guests asked for, over all of them: hypercalls, requests, events."""

        def words(field: str, names: Sequence[str]) -> dict[str, int]:
            counts = {name: sum(self.word(v, field, n) for v in self.vcpus) for n, name in enumerate(names)}
            return {name: count for name, count in counts.items() if count}

        names = (*COUNTED, *(OF_OTHERS if len({v.name for v in self.vcpus}) < len(self.vcpus) else ()))
        single = {name: sum(self.word(v, name.upper()) for v in self.vcpus) for name in names}
        return {"calls": words("HYPERCALLS", d.CALLS), "requests": words("REQUESTS", d.REQUESTS), "events": single}


COUNTED: Final = ("refusals", "events_sent", "upcalls", "blocks")
OF_OTHERS: Final = ("lock_waits", "remote_flushes", "kicks")


@frozen(kw_only=True)
class Kind:
    """What a hypervisor of this family is made of.

    `emit` emits the program for vCPUs and `DirectHost`, given the addresses of its two tables of handlers, and returns
    the labels that belong into them. `prepare` takes what a vCPU needs of the host's memory, and `fill` completes its
    words, given that. `batch`: how many requests a guest may
    gather; None: as many as it wants. `on_host`: is its guest's kernel a process of a host? `keeps`: do translations
    of its processes stay when CR3 is loaded?
    """

    monitor: type[ParavirtualMonitor]
    emit: Callable[[Assembler, Host, Sequence[VirtualCpu], DirectHost, tuple[int, int]], tuple[list[str], list[str]]]
    prepare: Callable[[Host], int] = lambda host: 0
    fill: Callable[[Monitor, VirtualCpu, int], None] = lambda monitor, vcpu, prepared: None
    batch: int | None = None
    on_host: bool = False
    keeps: bool = True


def build_paravirtual(**machine: Any) -> ParavirtualMonitor:
    """Lay the hypervisor and its guests, at most one for each CPU, into an engine whose memory is empty.

    The frame allocator of the engine is set up here. Raises `ConfigError` where the memory does not suffice.
    """
    return build_kind(Kind(monitor=ParavirtualMonitor, emit=emit), **machine)


def build_kind(
    kind: Kind,
    *,
    vmm: VmmSpec,
    profile: Profile,
    engine: Engine,
    guests: Sequence[Guest],
    seed: int = 1,
    shuffled: bool = True,
) -> ParavirtualMonitor:
    """The same for any hypervisor of the family."""
    host = Host(engine, profile, direct=at.DIRECT, text=at.TEXT)
    words = host.reserve(), host.reserve()  # of hypercalls, of emulators by op
    more = [(guest, index) for guest in guests for index in range(1, len(guest.cpus))]
    pages, data = [host.reserve() for _ in guests], [host.reserve() for _ in guests]
    further = [(host.reserve(), host.reserve()) for _ in more]
    tables = DirectHost.reserve(host)
    roots = [host.process() for _ in guests]
    prepared = [kind.prepare(host) for _ in guests]
    memories = windows(host, guests, roots, shuffled=shuffled, seed=seed)
    vcpus = [
        VirtualCpu(name=guest.name, cpu=guest.cpu, page=page, data=own, memory=ram, devices=guest.devices)
        for guest, page, own, ram in zip(guests, pages, data, memories, strict=True)
    ]
    vcpus += [
        evolve(vcpus[guests.index(guest)], cpu=guest.cpus[index], page=page, data=own, index=index)
        for (guest, index), (page, own) in zip(more, further, strict=True)
    ]
    a = Assembler("hypervisor", at.TEXT)
    labelled = kind.emit(a, host, vcpus, tables, words)
    program = a.assemble()
    host.engine.place(program, lambda page: TEXT_FRAME + (page - at.TEXT) // mem.PAGE_BYTES)
    monitor = kind.monitor(engine, host, vmm, program, tuple(vcpus))
    for frame, labels in zip(words, labelled, strict=True):
        host.store_many(frame, np.array([mem.signed(program.labels[name]) for name in labels], np.int64))
    gates(host, program)
    if more:
        host.gate(INVALIDATE_VECTOR, program.labels["invalidate"])
        host.gate(EVENT_VECTOR, program.labels["event_check"])
    for number, (vcpu, guest) in enumerate(zip(vcpus[: len(guests)], guests, strict=True)):
        vcpu.memory.direct = tables.offer(
            vcpu.memory, number, kind.batch or vmm.pv.batch, ring3=True, on_host=kind.on_host
        )
        start = guest.build(vcpu.memory)
        top = host.words(vcpu.memory.backing.root, mem.TABLE)
        own = {index: int(top[index]) for index in range(FIRST_OWN, LAST_OWN + 1)}
        tables.validate(vcpu.memory, number, start, own, keeps=kind.keeps)
        _fill(monitor, vcpu, number, start)
        kind.fill(monitor, vcpu, prepared[number])
        all_of_it = [vcpu, *(other for other in vcpus if other.name == vcpu.name and other.index)]
        for each, its_start in zip(all_of_it, (start, *start.others), strict=True):
            if each.index:
                _fill(monitor, each, number, its_start)
            boot_for_ring_3(monitor, each, its_start, 0)
        _link(monitor, all_of_it)
    switch_off(engine, vcpus)
    return monitor


def _link(monitor: Monitor, vcpus: Sequence[VirtualCpu]) -> None:
    """Let the vCPUs of a VM know of each other."""
    for vcpu, peer in zip(vcpus, (*vcpus[1:], vcpus[0]), strict=True):
        first, following = monitor.address(vcpus[0]), monitor.address(peer)
        monitor.put(vcpu, {"INDEX": vcpu.index, "PEER": following, "VM": first, "CPU": vcpu.cpu})


def emit(
    a: Assembler, host: Host, vcpus: Sequence[VirtualCpu], tables: DirectHost, words: tuple[int, int]
) -> tuple[list[str], list[str]]:
    """The program; the labels of hypercalls by number, those of emulators by op."""
    deadline = host.profile.features.tsc_deadline
    entry.boot(a, deadline)
    for vcpu in vcpus:
        entry.system_call(a, vcpu.cpu, host.address(vcpu.page) + at.STACK_BYTES)
    entry.system_calls(a, host.address(words[0]))
    entry.leave(a)
    entry.call_back(a)
    entry.toggle(a)
    entry.exceptions(a)
    entry.undefined(a)
    shared = any(vcpu.index for vcpu in vcpus)
    entry.timer(a, shared)
    if shared:
        several.interrupts(a)
    on = calls.Ring3Ground(**ground(host, tables), shared=shared)
    handlers = calls.calls(a, on, deadline, host.profile.clock_hz)
    return handlers, emulate.emulation(a, host.address(words[1]))


def ground(host: Host, tables: DirectHost) -> dict[str, Any]:
    """What validation of direct tables stands on."""
    return {
        "direct": at.DIRECT, "words": host.address(tables.words), "frames": host.engine.geometry.frame_count,
        "own": (FIRST_OWN, LAST_OWN),
    }  # fmt: skip


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
