"""Builds a monitor into a machine: its programs, a virtual CPU for each guest, shadow tables, CPUs ready to boot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
from attrs import frozen

from vtsim.base import memory as mem
from vtsim.base.memory import gfn_ranges
from vtsim.cpu.assembler import Assembler
from vtsim.cpu.engine import Engine
from vtsim.cpu.profile import Profile
from vtsim.ept import shadow as d
from vtsim.ept.tables import Table
from vtsim.guest.machine_view import Start
from vtsim.vmm.host import TEXT_FRAME, Host
from vtsim.vmm.hypervisor import Guest
from vtsim.vmm.monitor import emulate, entry, hosted, memory, translate
from vtsim.vmm.monitor import layout as at
from vtsim.vmm.monitor.cache import fill_cache, reserve_cache
from vtsim.vmm.monitor.virtual_cpus import (
    KERNEL_GS_BASE,
    SLOTS,
    Monitor,
    VirtualCpu,
    believed,
    boot_for_ring_3,
    descriptor_tables,
    fill,
    flags_in_ring_3,
    gates,
    switch_off,
    windows,
)
from vtsim.vmm.programs.ports import port_entries
from vtsim.vmm.shadow import PLAIN_PARAMETERS, ShadowPool, fill_pool, mode_of, reserve_pool
from vtsim.vmm.spec import VmmSpec

OPS: Final = 256


@frozen(kw_only=True)
class Vcpu(VirtualCpu):
    """The same of a deprivileged guest, with the pool of its shadow tables."""

    shadow: ShadowPool

    @property
    def root(self) -> Table:
        """The monitor's own tables, through which it sees the guest's memory."""
        return self.memory.backing


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
    worlds = [hosted.reserve_world(host, ports, vmm.lengths) for ports in data] if vmm.hosted else []
    idt = host.reserve() if vmm.hosted else 0
    caches = [reserve_cache(host, shared) for shared in pages] if translates else []
    memories = windows(host, guests, roots, shuffled=shuffled, seed=seed)
    vcpus = [
        Vcpu(name=guest.name, cpu=guest.cpu, page=page, data=words, memory=ram, shadow=shadow, devices=guest.devices)
        for guest, page, words, ram, shadow in zip(guests, pages, data, memories, shadows, strict=True)
    ]
    monitor, handlers = _place(host, vmm, vcpus, host.address(table), worlds, translates)
    host.store_many(table, np.array([mem.signed(monitor.program.labels[name]) for name in handlers], np.int64))
    gates(host, monitor.program)
    if worlds:
        host.gate(at.TIMER_VECTOR, monitor.program.labels["host_timer"], idt)
    for vcpu, guest in zip(vcpus, guests, strict=True):
        start = guest.build(vcpu.memory)
        _fill(monitor, vcpu, start, parameters)
        boot_for_ring_3(monitor, vcpu, start, start.msrs.get(KERNEL_GS_BASE, 0))
    for vcpu, world in zip(vcpus, worlds, strict=False):
        here, ports = monitor.address(vcpu), len(port_entries(vcpu.devices))
        hosted.fill_world(host, world, idt, monitor.program.labels, vcpu.cpu, here, ports)
        monitor.put(vcpu, {"WORLD": host.address(world.page)})
    monitor.caches = tuple(caches)
    for vcpu, cache in zip(vcpus, caches, strict=False):
        fill_cache(host, cache, vcpu.root, monitor.address(vcpu), engine.cpus[vcpu.cpu])
    for vcpu in vcpus:  # what roots have of it is none of the guest's, when they are evicted
        host.words(vcpu.root.root, mem.TABLE)[at.FIRST_ENTRY : at.LAST_ENTRY + 1] |= d.MONITOR
    switch_off(engine, vcpus)
    return monitor


def top_entries(host: Host) -> tuple[int, ...]:
    """The entries of a top-level table that lead to the monitor: guest memory, text, all of physical memory."""
    first = at.DIRECT // at.TOP_ENTRY % 512
    last = first + (host.engine.geometry.memory_bytes - 1) // at.TOP_ENTRY
    return (at.RAM // at.TOP_ENTRY % 512, at.TEXT // at.TOP_ENTRY % 512, *range(first, last + 1))


def _place(
    host: Host, vmm: VmmSpec, vcpus: Sequence[Vcpu], table: int, worlds: Sequence[hosted.World], translates: bool
) -> tuple[Monitor, list[str]]:
    """The monitor with its program, and the labels of the emulators by op: of processes, then of the kernel."""
    a = Assembler("monitor", at.TEXT)
    entry.boot(a)
    entry.resume(a, translates)
    entry.inject(a)
    entry.exceptions(a, translates)
    entry.interrupt(a, translates, vmm.hosted)
    for vcpu in vcpus:
        entry.system_call(a, vcpu.cpu, host.address(vcpu.page) + at.STACK_BYTES, translates)
    entry.system_calls(a, translates)
    emulate.general_protection(a, table, translates)
    handlers = emulate.emulators(a, translates, vmm.hosted)
    memory.page_fault(a, translates)
    memory.table_write(a, translates)
    memory.fill(a)
    memory.view(a, top_entries(host), translates)
    if translates:
        translate.call_out(a, entry.LEAN)
        translate.subroutines(a)
    if worlds:
        hosted.worlds(a)
        hosted.driver(a, vmm.lengths)
        for vcpu, world in zip(vcpus, worlds, strict=True):
            here = host.address(vcpu.page) + at.STACK_BYTES
            hosted.host_system_call(a, vcpu.cpu, host.address(world.page), here)
        hosted.host_system_calls(a, vmm.lengths)
    memory.settle(a)
    program = a.assemble()
    host.engine.place(program, lambda page: TEXT_FRAME + (page - at.TEXT) // mem.PAGE_BYTES)
    return Monitor(host.engine, host, vmm, program, tuple(vcpus)), handlers


def _fill(monitor: Monitor, vcpu: Vcpu, start: Start, parameters: Mapping[str, int]) -> None:
    """The structure of a vCPU, its memory slots, MSRs and pool of shadow pages."""
    host, data, here = monitor.host, monitor.host.address(vcpu.data), monitor.address(vcpu)
    slots = [word for first, end in gfn_ranges(vcpu.memory.size) for word in (first << 12, end << 12, at.RAM, 0)]
    host.store_words(data + SLOTS, slots)
    fill_pool(host, vcpu.shadow, start, host.profile, parameters, here + at.V["SLOTS"], vcpu.root.root, at.RAM)
    fill(monitor, vcpu, start, flags_in_ring_3(start))
    values = believed(start) | {
        "MODE": mode_of(start), "POOL": host.address(vcpu.shadow.block), "TOP": host.address(vcpu.root.root),
        "SLOTS": data + SLOTS, "SLOT_ENTRIES": len(slots) // 4,
    }  # fmt: skip
    monitor.put(vcpu, values)
    descriptor_tables(monitor, vcpu, start)
