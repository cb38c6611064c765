"""One translation of a guest's address, observed: every paging-structure entry that is read, and what served it.

The engine's own translation runs on the machine's own memory, caches and flags. Nothing is calculated here.

SDM: "4-Level Paging and 5-Level Paging"; "EPT Translation Mechanism".
"""

from __future__ import annotations

from operator import index
from typing import Final, SupportsIndex

import attrs
from attrs import frozen

from vtsim.base import memory as mem
from vtsim.base.errors import ConfigError
from vtsim.base.jit import quiet
from vtsim.base.spec import inside
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.engine import Engine
from vtsim.cpu.kernels import control_registers, entry, ept_walk
from vtsim.cpu.kernels.contexts import CR4_PCIDE, NO_CONTEXT
from vtsim.cpu.kernels.rights import DATA_SIZE
from vtsim.ept import spec as e
from vtsim.guest.machine_view import Space
from vtsim.guest.paging import ROWS
from vtsim.platform.machine import Machine, alone
from vtsim.platform.observed import Function, Observed
from vtsim.platform.spec import Scenario
from vtsim.platform.steps import NAMES, UNSIGNED, Level, Recorder, Reference
from vtsim.vmcs import slots as v
from vtsim.vmcs import state as h
from vtsim.vmm.techniques import techniques

READ, WRITE, FETCH = "read", "write", "fetch"
ACCESSES: Final = {READ: 0, WRITE: 1, FETCH: 2}
PAGE_FAULT, EPT_VIOLATION, EPT_MISCONFIGURATION = "page fault", "EPT violation", "EPT misconfiguration"
NOT_CANONICAL, LOG_FULL = "not canonical", "page-modification log full"
ON_APIC_ACCESS_PAGE = "a paging structure is on the APIC-access page"
FAULTS: Final = {
    ept_walk.PAGE_FAULT: PAGE_FAULT, ept_walk.VIOLATION: EPT_VIOLATION,
    ept_walk.MISCONFIGURATION: EPT_MISCONFIGURATION, ept_walk.NOT_CANONICAL: NOT_CANONICAL,
    ept_walk.LOG_FULL: LOG_FULL, ept_walk.ON_APIC_ACCESS_PAGE: ON_APIC_ACCESS_PAGE,
}  # fmt: skip
ARGUMENTS: Final = ("vm", "process", "address", "access", "ring")
# settings without which some entries are not read, because a cache of the walker has what they say
EVERY_ENTRY: Final = tuple(
    f"machine.cpu.{path}.entries=0" for path in s.TRANSLATION_STRUCTURES if "pwc" in path or path == "nested_tlb"
)


@frozen(kw_only=True)
class Walk:
    """An observed translation, with the sizes and counts in the units of the names.

    `address` is unsigned. `guest_levels` are those that the processor walks, `paging` is the mode of the guest's own
    tables, on shadow tables perhaps another one. `pdpte` is what PAE paging has loaded before the walk, which reads
    none. `fault` is empty, or what ended the translation, then with `error_code` of a page fault or `qualification` of
    an EPT violation and `fault_gpa`. `tlb` names the TLB that had the translation (no walk then), `cache` the
    paging-structure cache that the walk began with. Before a walk the second-level TLB is looked up in
    `look_up_cycles`; `start_cycles` are the walk's besides references and caches.
    """

    scenario: str
    profile: str
    vm: str
    process: str
    technique: str
    address: int
    access: str
    ring: int
    caches: str
    cr3: int
    pdpte: int | None
    eptp: int
    guest_levels: int
    paging: str
    ept_levels: int
    tlb: str
    cache: str
    cache_cycles: int
    look_up_cycles: int
    start_cycles: int
    levels: tuple[Level, ...]
    hpa: int | None
    page_bytes: int
    fault: str
    error_code: int | None
    qualification: int | None
    fault_gpa: int | None
    cycles: int
    areas: tuple[tuple[str, int, int], ...]

    @property
    def references(self) -> tuple[Reference, ...]:
        """Every entry that was read, in order."""
        found = [r for level in self.levels for nested in level.nested for r in nested.references]
        found += [level.entry for level in self.levels if level.entry is not None]
        return tuple(sorted(found, key=lambda r: r.number))


def walk(
    scenario: Scenario,
    vm: int | str,
    address: int,
    *,
    access: str = READ,
    ring: int | None = None,
    process: int | str = 0,
    native: bool = False,
    after_run: bool = False,
    cold: bool = False,
) -> Walk:
    """Translate one linear address of a VM's guest, and show every step.

    Parameters
    ----------
    vm, process: the number or name of a VM, and of one of its processes, whose address space is used.
    address: linear, 64 bits, unsigned.
    access: `read`, `write` or `fetch`.
    ring: 0 or 3; the half of the address space that the address is in decides where it is left out.
    native: without the hypervisor.
    after_run: after the scenario has run to its end, with tables and caches as they then are; else before it begins,
        with tables as they are built and nothing in any cache.
    cold: empty the caches after the run.

    Raises `ConfigError` for a VM, process, ring or access that is not there. A fault is no error.
    """
    number = _place(vm, [each.name for each in scenario.vms], "VM", "vm")
    if native or scenario.vmm.technique == "native":
        vmm = attrs.evolve(scenario.vmm, technique="native", paging="none")
        scenario, number = alone(attrs.evolve(scenario, vmm=vmm), scenario.vms[number]), 0
    if techniques[scenario.vmm.technique].in_software:
        raise ConfigError(
            f"under technique {scenario.vmm.technique!r} a program walks the guest's tables, and not the processor",
            field="vmm.technique",
            help="walk --native shows the guest's own tables",
        )
    if access not in ACCESSES:
        raise ConfigError(f"there is no access {access!r}", field="access", help="access can be read, write, fetch")
    if ring not in (None, 0, 3):
        raise ConfigError(f"pages know no ring {ring}", field="ring", help="ring can be 0, 3")
    if not isinstance(address, SupportsIndex) or not 0 <= (address := index(address)) <= UNSIGNED:
        raise ConfigError("a linear address has 64 bits", field="address", help="as in 0x10000000")
    paging = ROWS[scenario.vms[number].guest.kernel.paging]
    if paging.protected and address >> 32:
        message = f"a linear address has 32 bits with {paging.name} paging"
        raise ConfigError(message, field="address", help=f"as in {paging.places.regions:#x}")
    machine = Machine(scenario)
    target = machine.vms[number]
    if not target.spaces:
        raise ConfigError(
            "a recorded guest's paging structures are not in memory",
            field="vm",
            help="walk wants a guest that the scenario describes by processes",
        )
    space = target.spaces[_place(process, [each.name for each in target.spaces], "process", "process")]
    if after_run:
        machine.run()
    engine, cpu, deprivileged = machine.engine, target.spec.cpu or 0, machine.monitor is not None
    if ring is None:
        ring = 0 if address >= (paging.places.direct if paging.protected else 1 << 63) & UNSIGNED else 3
    _become_guest(machine, number, space, ring)
    if cold or not after_run:
        empty_caches(engine, cpu)
    m = engine.cpus[cpu]
    recorder = Recorder(m, engine.arena, on_shadow=scenario.vmm.on_shadow)
    got = recorder.translate(engine, mem.signed(address), ACCESSES[access], int(ring == 3 or deprivileged))
    fault = FAULTS.get(got, "")
    size = (int(recorder.data) >> DATA_SIZE) & 3 if got >= 0 else 0
    return Walk(
        scenario=scenario.name,
        profile=machine.profile.name,
        vm=target.spec.name,
        process=space.name,
        technique=scenario.vmm.technique if machine.hypervisor is None else scenario.vmm.paging,
        address=address,
        access=access,
        ring=ring,
        caches="cold" if cold or not after_run else "as the run left them",
        cr3=int(m[s.CR3]),
        pdpte=int(m[s.PDPTE0 + (address >> 30 & 3)]) if m[s.PAGING_LEVELS] == 3 else None,
        eptp=int(m[s.EPTP]) if m[s.NONROOT] else 0,
        guest_levels=int(m[s.PAGING_LEVELS]),
        paging=paging.name,
        ept_levels=((int(m[s.EPTP]) >> e.EPTP_LEVELS) & 7) + 1 if m[s.NONROOT] and m[s.EPTP] else 0,
        tlb=recorder.tlb,
        cache=recorder.cache,
        cache_cycles=recorder.cache_cycles,
        look_up_cycles=recorder.look_up_cycles,
        start_cycles=recorder.start_cycles,
        levels=tuple(recorder.levels),
        hpa=got if got >= 0 else None,
        page_bytes=e.PAGE_SIZES[size] if got >= 0 else 0,
        fault=fault,
        error_code=int(m[s.FAULT_CODE]) if fault == PAGE_FAULT else None,
        qualification=int(m[s.FAULT_QUALIFICATION]) if fault == EPT_VIOLATION else None,
        fault_gpa=int(m[s.FAULT_GPA]) if fault in (EPT_VIOLATION, EPT_MISCONFIGURATION) else None,
        cycles=recorder.cycles,
        areas=space.areas,
    )


def _place(wanted: int | str, names: list[str], noun: str, option: str) -> int:
    """The number of what is asked for by number or name."""
    if isinstance(wanted, str) and wanted in names:
        return names.index(wanted)
    number = int(wanted) if str(wanted).isdecimal() else -1
    if 0 <= number < len(names):
        return number
    known = ", ".join(f"{n} ({name})" for n, name in enumerate(names))
    help = f"{option} can be {known}" if known else f"the scenario has no {noun} at all"
    raise ConfigError(f"there is no {noun} {str(wanted)!r}", field=option, help=help)


def empty_caches(engine: Engine, cpu: int) -> None:
    """Remove every line, translation and paging-structure entry that a CPU has cached."""
    m, a, t = engine.cpus[cpu], engine.arena, engine.tags
    for structure in NAMES:
        start, sets, ways = int(m[structure]), int(m[structure + s.MASK]) + 1, int(m[structure + s.WAYS])
        a[start : start + sets * ways] = -1
    for cache in (s.L1I, s.L1D, s.L2, s.L3):
        start, sets, ways = (int(m[cache + n]) for n in (0, s.SETS, s.WAYS))
        t[start : start + sets * ways] = -1
    m[s.FETCH_GENERATION] += 1


def _become_guest(machine: Machine, number: int, space: Space, ring: int) -> None:
    """Put a CPU into the state in which a VM's guest runs a process, or its kernel for one."""
    engine, vm = machine.engine, machine.vms[number]
    cpu = vm.spec.cpu or 0
    m, hypervisor = engine.cpus[cpu], machine.hypervisor
    if hypervisor is not None:
        vcpu = hypervisor.vcpus[number]
        words = engine.contents(vcpu.vmcs, mem.VMCS_REGION)
        at = int(mem.contents(engine.arena, vcpu.vmcs))
        if not (m[s.NONROOT] and m[s.VMCS] == at):
            with quiet():
                Observed(_unobserved).copy(entry.load_guest_state)(m, engine.arena, at)
        secondary = int(words[v.SECONDARY_PROC_CONTROLS])
        m[s.VMCS], m[s.NONROOT], m[s.OWNER] = at, 1, words[h.V_OWNER]
        with quiet():
            Observed(_unobserved).copy(entry.load_translation)(m, engine.arena, words, secondary)
    m[s.PRIVILEGE] = o.N0 if hypervisor is not None else o.R0 if machine.monitor is None else o.R3
    loaded = _loaded(machine, number, space, ring)
    if m[s.CR3] != loaded:  # as its kernel loads it: what has a PCID is kept
        keep = -1 << 63 if m[s.CR4] & CR4_PCIDE else 0
        with quiet():
            Observed(_unobserved).copy(control_registers.load_cr3)(m, engine.arena, loaded | keep)
    m[s.RIP] = 0  # of no recorded row
    m[s.CONTEXT_KEY] = NO_CONTEXT
    engine.sync(cpu)
    if m[s.PAGING_LEVELS] == 3:
        own = hypervisor is not None and m[s.EPTP] and not machine.scenario.vmm.on_shadow  # in the guest's memory?
        load = hypervisor.vcpus[number].memory.load if hypervisor is not None and own else engine.load
        m[s.PDPTE0 : s.PDPTE0 + 4] = [load((loaded & e.PDPT_ADDRESS) + 8 * n) for n in range(4)]


def _loaded(machine: Machine, number: int, space: Space, ring: int) -> int:
    """What the processor's CR3 holds while the guest has loaded a process's."""
    cr3 = space.user_cr3 if space.user_cr3 and ring == 3 else space.cr3
    if not machine.scenario.vmm.on_shadow:
        return cr3
    assert machine.below is not None
    shadow = machine.below.shadow_root(number, cr3 & e.ADDRESS, ring)
    if shadow is None:
        message = "shadow tables come with use: only the root that was loaded last has any"
        after = "(--after-run)" if cr3 == space.cr3 else "(--after-run), with --ring 0: it ends in the kernel's root"
        other = "" if machine.monitor is not None else ", or choose paging 'ept'"
        raise inside("vmm", ConfigError(message, field="paging", help=f"walk after the run {after}{other}"))
    return shadow


def _unobserved(caller: str, callee: str, function: Function) -> Function:
    return function
