"""Builds a hypervisor into a machine: host, programs, VMCSs, memory of the VMs, and the CPUs ready to boot it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

import vtsim.vmm.personalities
from vtsim.base import memory as mem
from vtsim.base.errors import ModelError
from vtsim.base.kept import Kept
from vtsim.base.memory import BLOCK, gfn_ranges
from vtsim.base.registry import import_all
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler, Program
from vtsim.cpu.engine import Engine
from vtsim.cpu.kernels.posted_interrupts import SUPPRESSED
from vtsim.cpu.profile import Profile
from vtsim.ept import direct as direct_interface
from vtsim.ept import spec as e
from vtsim.ept.memory_slots import SLOT_PRIVATE
from vtsim.ept.shadow import NARROW
from vtsim.ept.tables import EPT, EPT_PAGE, KERNEL_PAGE, USER_PAGE, Table
from vtsim.guest.machine_view import Start
from vtsim.vmcs import state as h
from vtsim.vmcs.bits import ENTRY_IA32E_MODE_GUEST
from vtsim.vmcs.generations import GENERATIONS
from vtsim.vmm import board, vmcs
from vtsim.vmm import layout as at
from vtsim.vmm.buddy import Buddy, reserve_zones
from vtsim.vmm.direct import DirectHost
from vtsim.vmm.guest_view import cpuid_entries, msr_entries
from vtsim.vmm.host import TEXT_FRAME, Host
from vtsim.vmm.hypervisor import Guest, Hypervisor, Vcpu
from vtsim.vmm.memory import EPT_WRITTEN, GIB, Blocks, Pool, VmMemory
from vtsim.vmm.needs import Needs, bitmap_frames, needs, pool_frames
from vtsim.vmm.personalities.kvm import chipset
from vtsim.vmm.placement import Placement
from vtsim.vmm.programs import dirty_log, locked_fault
from vtsim.vmm.programs.common import handler_label
from vtsim.vmm.programs.direct import CR0_FIXED, CR4_FIXED
from vtsim.vmm.programs.mitigations import user_bits
from vtsim.vmm.programs.ports import DEVICE_WORDS, EVENTS, FILE_SERVER, KERNEL_PORTS, LATCH, port_entries
from vtsim.vmm.programs.posted import MSR_ICR, NOTIFICATION, notification
from vtsim.vmm.programs.upcalls import time_scales
from vtsim.vmm.programs.viommu_words import PAGES as UNIT_PAGES
from vtsim.vmm.registry import Path, Processor, personalities
from vtsim.vmm.settings import resolve_parameters
from vtsim.vmm.shadow import (
    CR0_FORCED,
    CR0_WATCHED,
    CR4_PAE,
    CR4_PCIDE,
    CR4_WATCHED,
    EFER_LMA,
    EFER_LME,
    EFER_NX,
    fill_pool,
    join_pool,
    mode_of,
    reserve_pool,
)
from vtsim.vmm.sharing import mark_frames, reserve_sharing
from vtsim.vmm.spec import VmmSpec
from vtsim.vmm.swap_disk import share_out
from vtsim.vmm.vcpus import link_vcpus, name_descriptors, reserve_others
from vtsim.vmm.views import fill_views, reserve_views, view_fields

REASONS: Final = 96
TICK_NS: Final = 4_000_000
CHIPSET: Final = "i440fx"
APIC_CONTROLS: Final = (
    "VIRTUALIZE_X2APIC_MODE", "APIC_REGISTER_VIRTUALIZATION", "VIRTUAL_INTERRUPT_DELIVERY", "PROCESS_POSTED_INTERRUPTS",
)  # fmt: skip
APIC_MSRS: Final = {  # that need no exit then: priorities, bits of vectors; end of interrupt, interrupt to itself
    **dict.fromkeys((0x80A, *range(0x810, 0x828)), vmcs.PASS_READ),
    0x808: vmcs.PASS_READ | vmcs.PASS_WRITE, 0x80B: vmcs.PASS_WRITE, 0x83F: vmcs.PASS_WRITE,
}  # fmt: skip
PAUSE_GAP, PAUSE_WINDOW = 128, 4096  # cycles: KVM's ple_gap and ple_window
EPT_DEVICE: Final = e.EPT_READ | e.EPT_WRITE  # uncacheable
DOMAIN_TABLES: Final = 16  # of a remapping unit, beside those that lead to pages
LATE_FRAMES: Final = 16  # of the host, for each vCPU, after its memory was given out
PROGRAMS: Final[Kept[tuple[Program, Program]]] = Kept(8)
__all__ = ["Guest", "Hypervisor", "Needs", "Vcpu", "build_hypervisor", "needs"]


def build_hypervisor(
    *,
    vmm: VmmSpec,
    profile: Profile,
    engine: Engine,
    guests: Sequence[Guest],
    seed: int = 1,
    shuffled: bool = True,
    tick_ns: int = TICK_NS,
) -> Hypervisor:
    """VMX non-root operation: the guest runs on the processor until a control says that it exits.

    Lays a hypervisor and its VMs into an engine whose memory is empty, and sets its CPUs to boot it. The frame
    allocator of the engine is set up here. Raises `ConfigError` where the processor lacks what the personality needs.
    """
    import_all(vtsim.vmm.personalities)
    personality = personalities[vmm.personality]
    capabilities = GENERATIONS[profile.vmx.generation].capabilities()
    host = Host(engine, profile, isolated=vmm.mitigations.pti)
    parameters = resolve_parameters(vmm)
    handlers, wire, zero_page = host.reserve(), host.reserve(), host.zero_page
    direct = vmm.paging == "direct-pv"
    beforehand = vmm.ept.populate == "prebuilt" or vmm.paging in ("direct-pv", "agile") or vmm.views > 1
    large = vmm.largest_page > 4096 and (vmm.huge_pages == "always" or vmm.ept.populate == "prebuilt")
    gib = vmm.largest_page == GIB and vmm.ept.populate == "prebuilt"
    size = GIB // 4096 if gib else BLOCK
    wanted_blocks = sum(-(-guest.memory // (size * 4096)) + 2 for guest in guests)
    if not large or vmm.memory.buddy:
        wanted_blocks = 0
    block_list = host.area(2 + wanted_blocks)
    addresses = {
        "idt": at.frame_address(host.idt), "handlers": at.frame_address(handlers),
        "wire": at.frame_address(wire), "zero_page": zero_page, "blocks": at.frame_address(block_list),
        "tick_cycles": profile.cycles(tick_ns),
        "log_period": profile.cycles(vmm.dirty_log.period),
        "balloon_start": profile.cycles(vmm.balloon.start), "balloon_stop": profile.cycles(vmm.balloon.stop or 0),
        "collapse_period": profile.cycles(vmm.collapse.period),
        "share_period": profile.cycles(vmm.sharing.period),
        "agile_period": profile.cycles(parameters.get("agile_interval", 0) * 1000),
    }  # fmt: skip
    if vmm.memory.buddy:
        addresses |= reserve_zones(host)
    if vmm.sharing.on:
        addresses |= reserve_sharing(host, [guest.memory for guest in guests])
    if locked_fault.wanted(vmm, parameters):
        first = host.reserve(locked_fault.descriptor_frames(engine.geometry.frame_count))
        addresses["frame_hash"] = at.frame_address(first)
        addresses["frames"] = addresses["frame_hash"] + 8 * locked_fault.HASH_BUCKETS
    if vmm.swap.on:
        host.kernel.map(at.HOST_DISK, [at.DISK_FRAME], KERNEL_PAGE | e.PTE_NO_EXECUTE)
    served = sum(FILE_SERVER in guest.devices for guest in guests)
    if served:
        host.kernel.map(at.HOST_SERVER, [at.SERVER_FRAME], KERNEL_PAGE | e.PTE_NO_EXECUTE)
        addresses["server"] = at.HOST_SERVER
    assigned = sum(len(guest.assigned) for guest in guests)
    if assigned + served and not vmm.posted_interrupts:
        addresses |= {"assigned": at.frame_address(host.reserve()), "assigned_count": assigned + served}
    if units := [guest.viommu for guest in guests if guest.viommu != "none"]:
        addresses["viommu"] = at.frame_address(host.reserve(UNIT_PAGES))
        addresses["viommu_step"] = 32 if "nested" in units else 16  # bytes of a descriptor in the real unit's queue
        host.kernel.map(at.HOST_UNIT, [at.UNIT_FRAME], KERNEL_PAGE | e.PTE_NO_EXECUTE)
    tables = DirectHost.reserve(host) if direct else None
    if tables is not None:
        addresses |= tables.addresses
    path = Path(
        vmm=vmm, profile=Processor.of(profile), capabilities=capabilities, parameters=parameters, addresses=addresses,
        several=any(len(guest.cpus) > 1 for guest in guests),
        parallel=len({cpu for guest in guests for cpu in (guest.cpu, *guest.cpus)}) > 1,
        recorded=any(guest.recorded for guest in guests),
    )  # fmt: skip
    wanted = personality.wanted(path)
    wanted = _with_options(wanted, vmm)
    controls = vmcs.controls(wanted, capabilities, profile.name)
    program, user = PROGRAMS.get(path.key, lambda: _assemble(path))
    engine.place(program, lambda page: TEXT_FRAME + (page - at.HOST_TEXT) // mem.PAGE_BYTES)
    parts = [_reserve_vcpu(host, guest, user, path) for guest in guests]
    others = [reserve_others(host, vcpu, guest.cpus, user) for vcpu, guest in zip(parts, guests, strict=True)]
    cpu_pages = {cpu: host.reserve() for cpu in range(engine.geometry.cpus)}
    vcpus = (*parts, *(vcpu for more in others for vcpu in more))
    if host.isolated:
        host.isolate((vcpu.process for vcpu in vcpus), cpu_pages.values())
    vmxon = {cpu: host.reserve() for cpu in cpu_pages}
    disk_queues = {cpu: host.reserve(2) << 12 for cpu in cpu_pages} if vmm.swap.on else {}
    buddy = None
    if vmm.memory.buddy:
        late_frames = LATE_FRAMES * sum(max(len(guest.cpus), 1) for guest in guests)
        late = host.reserve(late_frames)
        buddy = Buddy.of(
            host, addresses, fragmentation=vmm.memory.fragmentation, limit=None, seed=seed, shuffled=shuffled,
            others=host.next_on,
        )  # fmt: skip
        engine.frames_from(late, late_frames, shuffled=False, seed=seed)
        free = np.empty(0, np.int64)
    else:
        free = host.give_out(wanted_blocks, size, shuffled=shuffled, seed=seed)
    listed = np.concatenate([np.array([0, len(free)], np.int64), free])
    host.store_many(block_list, listed)
    first = addresses["blocks"]
    blocks = Blocks(host, first, first + 16, len(free), size) if len(free) else None
    for vcpu in parts:
        vcpu.memory.blocks = blocks
        vcpu.memory.large = large
        if buddy is not None:
            vcpu.memory.placement = Placement(host, buddy, vmm.memory, engine.geometry.node_of(vcpu.cpu))
    hypervisor = Hypervisor(engine, host, path, program, user, vcpus, cpu_pages, disk_queues)
    table = host.words(handlers)
    labels = program.labels
    for reason in range(REASONS):
        table[reason] = mem.signed(labels[handler_label(labels, reason)])
    host.gate(at.TIMER_VECTOR, labels["timer_interrupt"])
    host.gate(at.WIRE_VECTOR, labels["wire_interrupt"])
    if vmm.swap.on:
        host.gate(at.DISK_VECTOR, labels["disk_interrupt"])
    for number in range(addresses.get("assigned_count", 0)):
        host.gate(at.DEVICE_VECTOR + number, labels[f"device_interrupt_{number}"])
    if path.remote:
        host.gate(at.KICK_VECTOR, labels["kick_interrupt"])
    if vmm.apicv:
        host.gate(at.POSTED_VECTOR, labels["posted_interrupt"])
    bitmap = host.reserve_late(mem.BITMAP)
    host.words(bitmap, mem.BITMAP)[:] = vmcs.msr_bitmap(wanted.passed_msrs)
    for number, (vcpu, guest) in enumerate(zip(parts, guests, strict=True)):
        whole = GIB if gib else BLOCK * mem.PAGE_BYTES if large else mem.PAGE_BYTES
        if beforehand or guest.assigned:
            vcpu.memory.back_all(whole)
        if tables is not None:
            vcpu.memory.direct = tables.offer(vcpu.memory, number, vmm.pv.batch)
        start = guest.build(vcpu.memory)
        for gfn in start.tables:
            vcpu.memory.place_table(gfn)
        if tables is not None:
            tables.validate(vcpu.memory, number, start)
        if vcpu.ept is not None and beforehand:
            flags = EPT_WRITTEN if vmm.ept.accessed_dirty else EPT_PAGE
            vcpu.memory.map_all(vcpu.ept, whole, flags | path.ignores_pat)
        if vcpu.ept is not None:
            for frame in guest.assigned:
                vcpu.ept.map(frame << 12, frame, EPT_DEVICE)
        if vcpu.views:
            fill_views(host, vcpu, vmm.ept.pointer_bits)
        _fill_vmcs(hypervisor, vcpu, number, start, controls, wanted, bitmap)
        for other, its_start in zip(others[number], start.others, strict=True):
            _fill_vmcs(hypervisor, other, number, its_start, controls, wanted, bitmap)
        link_vcpus(host, (vcpu, *others[number]))
        if vmm.ipi_virtualization:
            name_descriptors(host, (vcpu, *others[number]))
        for pool in vcpu.pools:
            pool.hand_over()
        if vcpu.memory.placement is not None:
            for each in (vcpu, *others[number]):
                vcpu.memory.placement.hand_over(each.address, engine.geometry.node_of(each.cpu))
        if vmm.takes_back:
            vcpu.memory.frames = None  # from now on the process's tables say what is where
    if buddy is not None:
        if vmm.swap.on:
            share_out(hypervisor, buddy)
        buddy.hand_over()
    for cpu in cpu_pages:
        _boot_cpu(hypervisor, cpu, vmxon[cpu], [v for v in vcpus if v.cpu == cpu])
    return hypervisor


def _with_options(wanted: vmcs.Wanted, vmm: VmmSpec) -> vmcs.Wanted:
    from attrs import evolve

    more = []
    if vmm.paging == "ept":
        more.append("ENABLE_EPT")
    elif vmm.paging == "direct-pv":
        more.append("CR3_LOAD_EXITING")
        wanted = evolve(
            wanted,
            used=tuple(name for name in wanted.used if name != "UNRESTRICTED_GUEST"),
            cr0_mask=wanted.cr0_mask | CR0_FIXED,
            cr4_mask=wanted.cr4_mask | CR4_FIXED,
        )
    else:
        more += ["ENABLE_EPT"] if vmm.paging == "agile" else []
        more += ["CR3_LOAD_EXITING", "CR3_STORE_EXITING"]
        if vmm.paging == "shadow":  # with agile paging no table is out of sync, and INVLPG finds nothing to read again
            more.append("INVLPG_EXITING")
        wanted = evolve(
            wanted,
            used=tuple(name for name in wanted.used if name != "UNRESTRICTED_GUEST"),
            exceptions=(*wanted.exceptions, "PF"),
            cr0_mask=wanted.cr0_mask | CR0_WATCHED,
            cr4_mask=wanted.cr4_mask | CR4_WATCHED,
        )
    if vmm.vpid:
        more.append("ENABLE_VPID")
    if vmm.views > 1:
        more.append("ENABLE_VM_FUNCTIONS")
    more += ["USE_TPR_SHADOW"] if vmm.tpr_shadow else ["CR8_LOAD_EXITING", "CR8_STORE_EXITING"]
    if vmm.apicv:
        more += APIC_CONTROLS
        passed = {**wanted.passed_msrs, **APIC_MSRS}
        if vmm.ipi_virtualization:
            more.append("IPI_VIRTUALIZATION")
            passed[MSR_ICR] = vmcs.PASS_READ | vmcs.PASS_WRITE
        wanted = evolve(wanted, passed_msrs=passed)
    return evolve(wanted, needed=(*wanted.needed, *more))


def _assemble(path: Path) -> tuple[Program, Program]:
    """The hypervisor's program, and that of its device process."""
    personality = path.vmm.personality
    kernel, user = (
        Assembler(f"{personality} hypervisor", at.HOST_TEXT),
        Assembler(f"{personality} device process", at.USER_TEXT),
    )
    personalities[personality].kernel(kernel, path)
    personalities[personality].user(user, path)
    return kernel.assemble(), user.assemble()


def _reserve_vcpu(host: Host, guest: Guest, user: Program, path: Path) -> Vcpu:
    size, vmm = guest.memory, path.vmm
    page, region, process = host.reserve(), host.reserve(), host.process()
    address = at.frame_address(page) + at.STACK_BYTES
    tables = pool_frames(size, vmm)
    geometry = host.engine.geometry
    node = (geometry.node_of(guest.cpu) + (vmm.memory.ept_tables == "remote")) % geometry.nodes
    pool = Pool.of(host, address + at.V["EPT_ALLOCATOR"], tables, node)
    backing_pool = Pool.of(host, address + at.V["BACKING_ALLOCATOR"], tables)
    backing = Table(root=process.root, format=process.format, take=backing_pool.take, words=process.words, levels=4)
    for linear in (at.USER_RUN, at.USER_DATA, at.USER_STACK - mem.PAGE_BYTES):
        process.map(linear, [host.reserve()], USER_PAGE | e.PTE_NO_EXECUTE)
    if user.instructions:
        pages = sorted({i.at // mem.PAGE_BYTES for i in user.instructions})
        frames = {n * mem.PAGE_BYTES: host.reserve() for n in pages}
        process.map(at.USER_TEXT, list(frames.values()), USER_PAGE & ~e.PTE_WRITE)
        host.engine.place(user, frames.__getitem__)
    ept, top = None, 0
    if vmm.paging in ("ept", "agile"):
        top = pool.take() if vmm.ept.levels == 5 else 0
        ept = Table(root=pool.take(), format=EPT, take=pool.take, words=process.words)
        if top:  # guest-physical addresses have fewer than 48 bits
            process.words(top)[0] = ept.root << 12 | EPT.interior
    shadow = None
    if vmm.on_shadow:
        slots_end = board.slots_at_reset(size)[-1][1] if CHIPSET in guest.devices else 0
        shadow = reserve_pool(host, size, path["shadow_permille"], slots_end, agile=vmm.paging == "agile")
    memory = VmMemory(host.engine, size, backing, None)
    vcpu = Vcpu(
        name=guest.name, cpu=guest.cpu, page=page, vmcs=region, process=process, memory=memory, ept=ept, shadow=shadow,
        ept_top=top or (ept.root if ept is not None else 0),
        pools=(pool, backing_pool), devices=guest.devices, recorded=guest.recorded,
        log=host.reserve() if vmm.dirty_log.on else None,
        dirty=host.reserve(bitmap_frames(size)) if vmm.dirty_log.on else None,
        marks=host.reserve(mark_frames(size)) if vmm.sharing.on else None,
        swap_marks=host.reserve(mark_frames(size)) if vmm.swap.on else None,
        domain=_reserve_domain(host, guest),
    )  # fmt: skip
    return reserve_views(host, vcpu, vmm.views) if vmm.views > 1 else vcpu


def _reserve_domain(host: Host, guest: Guest) -> range:
    """Frames for the tables through which devices reach a VM's memory: of pages of 4 KiB, at most.

    In caching mode each device has tables of its own.
    """
    devices = len(guest.assigned)
    each = (guest.memory >> 21) * (1 + devices * (guest.viommu == "caching")) + 8 * devices
    count = each + DOMAIN_TABLES if devices else 0
    first = host.reserve(count) if count else 0
    return range(first, first + count)


def _fill_vmcs(
    hypervisor: Hypervisor, vcpu: Vcpu, number: int, start: Start, controls: dict[str, int],
    wanted: vmcs.Wanted, bitmap: int,
) -> None:  # fmt: skip
    host, engine, vmm = hypervisor.host, hypervisor.engine, hypervisor.path.vmm
    words = engine.contents(vcpu.vmcs, mem.VMCS_REGION)
    apic_page, io_apic_page, slots, cpuid, msrs = (host.reserve_late(mem.VALUES) for _ in range(5))
    cpu_page = at.frame_address(hypervisor.cpu_pages[vcpu.cpu])
    fields = {
        **controls,
        **vmcs.host_state(
            root=vcpu.process.root, stack=vcpu.address, exit_address=hypervisor.program.labels["exit"],
            cpu_page=cpu_page, idt=at.frame_address(host.idt), cr4=host_cr4(hypervisor.path),
        ),
        **vmcs.guest_state(start),
        "EXCEPTION_BITMAP": sum(1 << vmcs.EXCEPTIONS[name] for name in wanted.exceptions),
        "CR0_GUEST_HOST_MASK": wanted.cr0_mask, "CR4_GUEST_HOST_MASK": wanted.cr4_mask,
        "MSR_BITMAPS": bitmap << 12, "VIRTUAL_APIC_ADDRESS": apic_page << 12,
        "VPID": hypervisor.vcpus.index(vcpu) + 1 if vmm.vpid else 0,
    }  # fmt: skip
    if start.protected:
        fields["ENTRY_CONTROLS"] &= ~ENTRY_IA32E_MODE_GUEST
    if vcpu.ept is not None:
        fields["EPT_POINTER"] = vcpu.ept_top << 12 | vmm.ept.pointer_bits
    values: dict[str, int] = {}
    if vcpu.log is not None and vcpu.dirty is not None:
        fields |= {"PML_ADDRESS": vcpu.log << 12, "PML_INDEX": dirty_log.LOG_EMPTY}
        values = {
            "PML_PAGE": at.frame_address(vcpu.log), "DIRTY_BITMAP": at.frame_address(vcpu.dirty),
            "DIRTY_WORDS": -(-gfn_ranges(vcpu.memory.size)[-1][1] // 64),
        }  # fmt: skip
    if vcpu.views:
        fields |= view_fields(vcpu)
        values["VIEWS"] = at.frame_address(vcpu.view_list)
    values["MEMORY_END"] = gfn_ranges(vcpu.memory.size)[-1][1] << 12
    if vmm.dirty_log.stop is not None:
        values["LOG_END"] = host.profile.cycles(vmm.dirty_log.stop)
    if vcpu.marks is not None:
        values["SHARE_MARKS"] = at.frame_address(vcpu.marks)
    if vcpu.index == 0:  # whose thread is that of the VM's daemons
        values |= _first_times(hypervisor.path)
    if vcpu.shadow is not None:
        narrow = mode_of(start) & NARROW != 0
        pdptes = [vcpu.memory.load((start.cr3 & e.PDPT_ADDRESS) + 8 * n) if narrow else 0 for n in range(4)]
        root, its_slots = 0, vcpu.address + at.V["SLOTS"]
        if vcpu.index == 0:
            root = fill_pool(
                host, vcpu.shadow, start, host.profile, hypervisor.path.parameters, its_slots, vcpu.process.root,
                ept=vcpu.ept.root if vcpu.ept is not None else 0, ept_tables=vcpu.address + at.V["EPT_ALLOCATOR"],
                shared=hypervisor.path.several, pdptes=pdptes,
            )  # fmt: skip
        else:
            first = next(other.shadow for other in hypervisor.vcpus if other.shadow and other.name == vcpu.name)
            join_pool(host, vcpu.shadow, first, its_slots, vcpu.process.root)
            values |= {"ASKED": 1, "ASKED_ROOT": 1}
        fields["GUEST_CR0"] |= CR0_FORCED
        fields["GUEST_CR4"] |= CR4_PAE
        if host.profile.features.nx:
            fields["GUEST_IA32_EFER"] |= EFER_NX
        if narrow and not start.protected:  # 64-bit code, whatever paging it believes in
            fields["GUEST_IA32_EFER"] |= EFER_LME | EFER_LMA
        fields["GUEST_CR3"] = root | (start.cr3 & 0xFFF if start.cr4 & CR4_PCIDE else 0)
        values["SHADOW"] = vcpu.shadow.address
        if vcpu.ept is not None and not narrow and (leaf := vcpu.ept.split(start.cr3 & e.ADDRESS)) is not None:
            vcpu.ept.words(leaf.table)[leaf.index] &= ~e.EPT_WRITE  # the root is shadowed from the start
    if start.shared:
        values["SHARED_PAGE"] = at.direct(vcpu.memory.frame(start.shared >> 12) << 12)
        host.store(values["SHARED_PAGE"] + direct_interface.TIME_SCALE, time_scales(host.profile.clock_hz)[0])
    if vmm.paging == "direct-pv":
        values["KERNEL_ROOT"] = start.roots[0]
    if vmm.apicv:
        fields |= {
            "POSTED_INTERRUPT_NOTIFICATION_VECTOR": at.POSTED_VECTOR,
            "POSTED_INTERRUPT_DESCRIPTOR_ADDRESS": vcpu.address + at.V["POSTED"] - at.HOST_DIRECT,
        }
        host.store(vcpu.address + at.V["POSTED"] + 8 * NOTIFICATION, notification(vcpu.cpu))
    if hypervisor.path.several and vmm.personality == "kvm":
        fields |= {"PLE_GAP": PAUSE_GAP, "PLE_WINDOW": PAUSE_WINDOW}
    vmcs.write(words, fields)
    _devices(hypervisor, vcpu)
    words[h.V_OWNER] = engine.owner(vcpu.name)
    words[h.V_EXIT_REASON] = -1
    words[h.V_AGILE] = int(vmm.paging == "agile")
    if vmm.paging == "agile" and hypervisor.path.profile.features.agile_cr3:
        words[h.V_CR3_LIST] = vcpu.address + at.V["SHADOW_CR3"] - at.HOST_DIRECT
    words[h.V_REVISION] = int(engine.cpus[vcpu.cpu][s.VMX_REVISION])
    words[h.V_REGISTERS] = vcpu.address + at.V["REGISTERS"] - at.HOST_DIRECT
    features = (direct_interface.DIRECT_TABLES if vmm.paging == "direct-pv" else 0) | (
        direct_interface.SHARED_EVENTS if vmm.pv.events else 0
    )
    leaves = cpuid_entries(engine, features)
    known = msr_entries(vcpu.index)
    host.store_many(cpuid, leaves.ravel())
    host.store_many(msrs, known.ravel())
    memory_slots = [(first << 12, end << 12, at.USER_RAM, 0) for first, end in gfn_ranges(vcpu.memory.size)]
    if CHIPSET in vcpu.devices:
        memory_slots = [*board.slots_at_reset(vcpu.memory.size)]
    if hypervisor.hosted:
        memory_slots.append((board.LOCAL_APIC, board.LOCAL_APIC + mem.PAGE_BYTES, 0, SLOT_PRIVATE))
    host.store_many(slots, np.array(memory_slots, np.int64).ravel())
    values |= {
        "VMCS_POINTER": vcpu.vmcs << 12, "STATE": at.RUNNABLE, "HOST_ROOT": vcpu.process.root << 12,
        "APIC_PAGE": at.frame_address(apic_page), "IO_APIC_PAGE": at.frame_address(io_apic_page),
        "UNTIMED": int(vcpu.recorded), "TIMER_LVT": 1 << 16, "CPUID_TABLE": at.frame_address(cpuid),
        "CPUID_WORDS": at.CPUID_BYTES // 8, "REQUEST": at.REQUEST_STATE, "CPUID_ENTRIES": len(leaves),
        "MSR_TABLE": at.frame_address(msrs), "MSR_ENTRIES": len(known),
        "SLOTS": at.frame_address(slots), "SLOT_ENTRIES": len(memory_slots),
        "PRIMARY": controls["PRIMARY_PROC_CONTROLS"], "NUMBER": number, "XCR0": 7,
        "EPT_ROOT": vcpu.ept.root << 12 if vcpu.ept is not None else 0, "EPT_TOP": vcpu.ept_top << 12,
        "EPT_FIRST": vcpu.ept.root + 1 if vcpu.ept is not None else 0, "SHADOW_CR3": start.cr3,
        "VPID": fields["VPID"], "GUEST_CR4": start.cr4,
    }  # fmt: skip
    values |= {name: locked_fault.CACHE_OBJECTS for name, _ in locked_fault.CACHES}
    for name, value in values.items():
        host.store(vcpu.address + at.V[name], value)
    for n, index in enumerate(at.SWITCHED_MSRS):
        host.store(vcpu.address + at.V["GUEST_MSRS"] + 8 * n, start.msrs.get(index, 0))


def _first_times(path: Path) -> dict[str, int]:
    """When each daemon that is wanted goes to work for the first time."""
    vmm, addresses = path.vmm, path.addresses
    wanted = {
        "LOG_AT": (vmm.dirty_log.on, path.profile.cycles(vmm.dirty_log.start) + 1),
        "COLLAPSE_AT": (vmm.collapse.on, addresses["collapse_period"]),
        "SHARE_AT": (vmm.sharing.on, addresses["share_period"]),
        "AGILE_AT": (vmm.paging == "agile", addresses["agile_period"]),
    }
    return {name: when for name, (on, when) in wanted.items() if on}


def _devices(hypervisor: Hypervisor, vcpu: Vcpu) -> None:
    """Port tables: the hypervisor's own, and those of the device process where there is one."""
    host, hosted = hypervisor.host, hypervisor.hosted
    kernel = [(port, LATCH, 0) for port in KERNEL_PORTS]
    process = port_entries(vcpu.devices)
    own = kernel if hosted else kernel + process
    table = host.reserve_late(mem.VALUES)
    events = [(address, 0, 0) for name in vcpu.devices for address in EVENTS.get(name, ())]
    host.store_many(table, np.array([*own, *events], np.int64).ravel())
    values = {"PORTS": at.frame_address(table), "PORT_ENTRIES": len(own)}
    values |= {"EVENTS": values["PORTS"] + 8 * DEVICE_WORDS * len(own), "EVENT_ENTRIES": len(events)}
    if hosted:
        run, data = (_user_frame(vcpu, linear) for linear in (at.USER_RUN, at.USER_DATA))
        host.store_many(data, np.array([0, len(process), *np.ravel(process)], np.int64))
        if CHIPSET in vcpu.devices:
            _chipset(host, data, vcpu.memory.size)
        values |= {
            "RUN_PAGE": at.frame_address(run), "USER_RIP": hypervisor.user.labels["user_resumed"],
            "USER_RFLAGS": 0x202, "USER_RSP": at.USER_STACK,
        }  # fmt: skip
    for name, value in values.items():
        host.store(vcpu.address + at.V[name], value)


def _chipset(host: Host, data: int, memory: int) -> None:
    """The host bridge's part of the device process's data page."""
    page = at.frame_address(data)
    parts, known = board.segments(memory), board.slots_at_reset(memory)
    constants = board.ALWAYS_RAM_VALUE << 8 * (board.ALWAYS_RAM % 8)
    host.store(page + chipset.CONFIG + board.ALWAYS_RAM // 8 * 8, constants)
    host.store(page + chipset.SEGMENT_COUNT, len(parts))
    host.store(page + chipset.OLD_COUNT, len(known))
    words = [word for part in parts for word in (part.first, part.end, part.register, part.high)]
    for offset, values in ((chipset.SEGMENTS, words), (chipset.OLD, [w for slot in known for w in slot])):
        for n, value in enumerate(values):
            host.store(page + offset + 8 * n, value)


def _user_frame(vcpu: Vcpu, linear: int) -> int:
    leaf = vcpu.process.find(linear)
    if leaf is None:
        raise ModelError("a page of the device process is not mapped", {"address": linear})
    return leaf.frame


def host_cr4(path: Path) -> int:
    """CR4 of the host: with PCIDs where they tell user space's translations from the kernel's."""
    return at.HOST_CR4 | (at.CR4_PCIDE if path.vmm.mitigations.pti and path.profile.features.pcid else 0)


def _boot_cpu(hypervisor: Hypervisor, cpu: int, vmxon: int, vcpus: list[Vcpu]) -> None:
    host, engine = hypervisor.host, hypervisor.engine
    page = at.frame_address(hypervisor.cpu_pages[cpu])
    labels, m = hypervisor.program.labels, engine.cpus[cpu]
    entry = labels.get("system_call", 0)
    msrs = dict(zip(at.SWITCHED_MSRS, (at.STAR, entry, 0x47700, 0), strict=True))
    words = {
        "SELF": page, "COUNT": len(vcpus), "ALIVE": len(vcpus), "VMXON_REGION": vmxon << 12,
        "CURRENT": vcpus[0].address if vcpus else 0,
        "TICK_AT": hypervisor.path.addresses["tick_cycles"] if len(vcpus) > 1 else 0,
        "DISK_QUEUE": at.direct(hypervisor.disk_queues.get(cpu, 0)), "DOORBELL": at.HOST_DISK + 8 * cpu,
    }  # fmt: skip
    for n, vcpu in enumerate(vcpus):
        host.store(page + at.C["LIST"] + 8 * n, vcpu.address)
        if n and hypervisor.path.vmm.posted_interrupts:  # it waits for the CPU
            host.store(vcpu.address + at.V["POSTED"] + 8 * NOTIFICATION, notification(cpu) | SUPPRESSED)
    for n, value in enumerate(msrs.values()):
        host.store(page + at.C["MSRS"] + 8 * n, value)
        host.store(page + at.C["HOST_MSRS"] + 8 * n, value)
    m[s.WIRE_HOST_VECTOR] = at.WIRE_VECTOR
    m[s.WIRE_MESSAGE] = hypervisor.path.addresses["wire"] - at.HOST_DIRECT
    host.store(at.frame_address(vmxon), int(m[s.VMX_REVISION]))
    host.store(page + at.C["GDTR"], 0x7F)
    host.store(page + at.C["IDTR"], 0xFFF)
    host.store(page + at.C["IDTR"] + 8, at.frame_address(host.idt))
    if host.isolated and vcpus:
        words["USER_CR3"] = vcpus[0].process.root << 12 | user_bits(pcid=host.profile.features.pcid)
    for name, value in words.items():
        host.store(page + at.C[name], value)
    host.store(page + at.C["TSS"] + 4, page + at.C["ENTRY_TOP"] if host.isolated else words["CURRENT"])
    state = {
        s.RIP: labels["boot" if vcpus else "all_ended"], s.GPR + s.RSP: page + mem.PAGE_BYTES,
        s.CR3: (vcpus[0].process.root if vcpus else host.kernel.root) << 12, s.CR0: 0x80050033,
        s.CR4: host_cr4(hypervisor.path),
        s.GS_BASE: page, s.EFER: 0xD01, s.CS_SELECTOR: at.KERNEL_CODE, s.SS_SELECTOR: at.KERNEL_DATA,
        s.MSR_STAR: at.STAR, s.MSR_LSTAR: entry, s.MSR_FMASK: 0x47700, s.RFLAGS: 2,
    }  # fmt: skip
    for slot, value in state.items():
        m[slot] = mem.signed(value)
    engine.sync(cpu)
