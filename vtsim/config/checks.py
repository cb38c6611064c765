"""What a scenario may ask of its processor, and what it gets when it leaves that open."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import attrs

from vtsim.base.errors import ConfigError, Problem
from vtsim.base.registry import import_all
from vtsim.base.units import SIZE
from vtsim.cpu.profile import Profile, load_profile, profile_names
from vtsim.guest.attack_spec import (
    AttackLinearSpec,
    AttackMemorySpec,
    AttackNativeSpec,
    AttackStateSpec,
    AttackUpdateSpec,
)
from vtsim.guest.kernel_operations import ConfigReadSpec
from vtsim.guest.paging import LOW_MEMORY, ROWS
from vtsim.guest.spec import (
    GROWN_HEAP,
    SLABS,
    DmaBuffersSpec,
    HltSpec,
    IpiSpec,
    MemoryTraceSpec,
    MmioReadSpec,
    MmioWriteSpec,
    MovFromCr8Spec,
    MovToCr8Spec,
    Phase,
    PortInSpec,
    PortOutSpec,
    RdmsrSpec,
    ReplaySpec,
    SensitiveSpec,
    WrmsrSpec,
)
from vtsim.guest.structures import (
    BTreeSpec,
    CrossSectionsSpec,
    GraphGatherSpec,
    KeyValuesSpec,
    NetlistSwapsSpec,
    UpdatesSpec,
)
from vtsim.guest.watched import BY_EXCEPTION, NOBODY, WAYS, WatchedStoresSpec
from vtsim.platform.spec import GIB, MACHINE_ISA, MIB, Scenario, VmSpec
from vtsim.vmcs.capabilities import Capabilities
from vtsim.vmcs.generations import GENERATIONS
from vtsim.vmm.spec import EptSpec, VmmSpec
from vtsim.vmm.techniques import techniques

Check = Callable[[Scenario, Profile], Iterable[Problem]]

CR4_LA57 = 1 << 12
EXIT_COST = "transitions.vm_exit_cycles"
NO_KPTI = "keeps no separate tables for user mode: Linux turns KPTI off under Xen"
NO_LARGE_PAGES = "has 4 KiB pages only: Xen's CPUID has no PSE, and none of its updates takes a large entry"
NO_DEVICE_MEMORY = "finds no emulated device memory: Xen's reach theirs by shared pages, or map a real device's"
NOT_PARAVIRTUAL = {
    ReplaySpec: "is not a recorded one, which loads tables of its own",
    MmioReadSpec: NO_DEVICE_MEMORY,
    MmioWriteSpec: NO_DEVICE_MEMORY,
}
NOT_IN_A_PROCESS = (
    ConfigReadSpec, HltSpec, IpiSpec, MovFromCr8Spec, MovToCr8Spec, PortInSpec, PortOutSpec, RdmsrSpec, WrmsrSpec,
)  # fmt: skip
NOT_IN_SOFTWARE = (
    MemoryTraceSpec, UpdatesSpec, BTreeSpec, NetlistSwapsSpec, CrossSectionsSpec, GraphGatherSpec, KeyValuesSpec,
    MmioReadSpec, MmioWriteSpec,
)  # fmt: skip
BUILT_FOR_RING_3 = ("paravirtual", "user-mode")
NOT_IN_PROTECTED_MODE = (
    MemoryTraceSpec, ReplaySpec, MmioReadSpec, MmioWriteSpec, DmaBuffersSpec, SensitiveSpec, AttackMemorySpec,
    AttackLinearSpec, AttackNativeSpec, AttackUpdateSpec, AttackStateSpec, WatchedStoresSpec,
)  # fmt: skip
NOT_FOR_HYPERCALLS = "has no kernel that is built for hypercalls"
NOT_FIVE = "paging can be 4-level, PAE, 32-bit"
PAGE_FEATURES = {2 * MIB: "EPT_2M_PAGES", GIB: "EPT_1G_PAGES"}


def resolve(scenario: Scenario, name: str) -> Scenario:
    """Return the scenario with nothing left open, or raise `ConfigError` with all that cannot be."""
    scenario = _with_agile_walker(scenario)
    profile = _profile(scenario)
    complete = _with_features(scenario.resolved(name), profile)
    problems = [problem for check in CHECKS for problem in check(complete, profile)]
    if problems:
        raise ConfigError.of(problems)
    return complete


AGILE_WALKER = "features.agile_paging"


def _with_agile_walker(scenario: Scenario) -> Scenario:
    """Who chooses agile paging supposes a processor with its walker, unless `machine.cpu` says that it has none."""
    machine, vmm = scenario.machine, scenario.vmm
    if vmm.technique == "native" or vmm.paging != "agile" or AGILE_WALKER in dict(machine.cpu):
        return scenario
    return attrs.evolve(scenario, machine=attrs.evolve(machine, cpu=(*machine.cpu, (AGILE_WALKER, True))))


def _profile(scenario: Scenario) -> Profile:
    try:
        profile = load_profile(scenario.machine.profile)
    except ConfigError as error:
        raise ConfigError.of(_under("machine.profile", error)) from None
    try:
        return profile.with_overrides(dict(scenario.machine.cpu))
    except ConfigError as error:
        raise ConfigError.of(_under("machine.cpu", error)) from None


def _under(prefix: str, error: ConfigError) -> list[Problem]:
    """Turn a profile's paths into the scenario's; a problem of the profile's own file stays there."""
    return [
        problem if problem.file else attrs.evolve(problem, path=f"{prefix}.{problem.path}".rstrip("."))
        for problem in error.problems
    ]


def _capabilities(profile: Profile) -> Capabilities:
    return GENERATIONS[profile.vmx.generation].capabilities()


def _with_features(scenario: Scenario, profile: Profile) -> Scenario:
    """Give the processor's answer to every `auto`."""
    vmm, can = scenario.vmm, _capabilities(profile).supports
    if vmm.technique == "native":
        paging = "none"
    elif vmm.paging == "auto" and without_vt_x(vmm):
        (paging,) = techniques[vmm.technique].paging
    elif vmm.paging == "auto":
        paging = "ept" if can("ENABLE_EPT") else "shadow"
    else:
        paging = vmm.paging
    if without_vt_x(vmm):  # and one monitor
        vmm = attrs.evolve(vmm, personality="minimal", vpid=bool(vmm.vpid), tpr_shadow=bool(vmm.tpr_shadow))
    ept = attrs.evolve(vmm.ept, accessed_dirty=_given(vmm.ept.accessed_dirty, can("EPT_ACCESSED_DIRTY")))
    try:
        vmm = attrs.evolve(
            vmm,
            paging=paging,
            ept=ept,
            memory=attrs.evolve(vmm.memory, allocator=_allocator(scenario)),
            dirty_log=attrs.evolve(vmm.dirty_log, method=_log_method(vmm.dirty_log.method, ept, can)),
            vpid=_given(vmm.vpid, can("ENABLE_VPID")),
            tpr_shadow=_given(vmm.tpr_shadow, can("USE_TPR_SHADOW")),
        )
    except ConfigError as error:  # an answer does not go with what the scenario says
        raise ConfigError.of(_under("vmm", error)) from None
    vms = []
    for vm in scenario.vms:
        has_pcid = profile.features.pcid and not ROWS[vm.guest.kernel.paging].protected
        kernel = attrs.evolve(vm.guest.kernel, pcid=_given(vm.guest.kernel.pcid, has_pcid))
        vms.append(attrs.evolve(vm, guest=attrs.evolve(vm.guest, kernel=kernel)))
    return attrs.evolve(scenario, vmm=vmm, vms=tuple(vms))


def _allocator(scenario: Scenario) -> str:
    memory = scenario.vmm.memory
    if memory.allocator != "auto":
        return memory.allocator
    needed = memory.fragmentation or scenario.machine.nodes > 1 or scenario.vmm.takes_back
    return "buddy" if needed else "list"


def _log_method(wish: str, ept: EptSpec, can: Callable[[str], bool]) -> str:
    if wish != "auto":
        return wish
    return "pml" if ept.accessed_dirty and can("ENABLE_PML") else "write-protect"


def _given(wish: bool | None, possible: bool) -> bool:
    return possible if wish is None else wish


def _wishes(vmm: VmmSpec) -> Iterator[tuple[str, str, str]]:
    """Yield the path, the words and the VMX feature of everything the hypervisor is asked to use."""
    if vmm.paging in ("ept", "agile"):
        yield "paging", "EPT", "ENABLE_EPT"
    if vmm.paging == "agile":
        yield "paging", "accessed and dirty flags for EPT", "EPT_ACCESSED_DIRTY"
    if vmm.paging in ("ept", "agile") and vmm.ept.page_size in PAGE_FEATURES:
        pages = f"{SIZE.format(vmm.ept.page_size)} pages in EPT"
        yield "ept.page_size", pages, PAGE_FEATURES[vmm.ept.page_size]
    if vmm.paging == "ept":
        if vmm.ept.accessed_dirty:
            yield "ept.accessed_dirty", "accessed and dirty flags for EPT", "EPT_ACCESSED_DIRTY"
        if vmm.ept.levels == 5:
            yield "ept.levels", "EPT of five levels", "EPT_WALK_LENGTH_5"
        if vmm.dirty_log.method == "pml":
            yield "dirty_log.method", "a page-modification log", "ENABLE_PML"
    if vmm.views > 1:
        yield "views", "EPTP switching by VMFUNC", "EPTP_SWITCHING"
    if vmm.vpid:
        yield "vpid", "VPIDs", "ENABLE_VPID"
    if vmm.tpr_shadow:
        yield "tpr_shadow", "a TPR shadow", "USE_TPR_SHADOW"
    if vmm.apicv:
        yield "apicv", "virtual-interrupt delivery", "VIRTUAL_INTERRUPT_DELIVERY"
        yield "apicv", "posted interrupts", "PROCESS_POSTED_INTERRUPTS"
    if vmm.ipi_virtualization:
        yield "ipi_virtualization", "IPI virtualization", "IPI_VIRTUALIZATION"


def _features_exist(scenario: Scenario, profile: Profile) -> Iterator[Problem]:
    """What the hypervisor uses, the processor must have."""
    if scenario.vmm.technique != "hardware":
        return
    if not profile.has_vmx:
        others = ", ".join(name for name in techniques if name != "hardware")
        if EXIT_COST in dict(scenario.machine.cpu):
            message = "0 cycles for a VM exit is a processor without VMX, which technique 'hardware' needs"
            help = f"write 1 or more; or vmm.technique can be {others}"
            yield Problem(path=f"machine.cpu.{EXIT_COST}", message=message, help=help)
            return
        message = f"technique 'hardware' needs VMX, which profile {profile.name!r} does not have"
        newer = ", ".join(name for name in profile_names() if load_profile(name).has_vmx)
        help = f"profiles that have it: {newer}; or vmm.technique can be {others}"
        yield Problem(path="machine.profile", message=message, help=help)
        return
    capabilities = _capabilities(profile)
    for path, words, feature in _wishes(scenario.vmm):
        if capabilities.supports(feature):
            continue
        able = [other for other in profile_names() if _capabilities(load_profile(other)).supports(feature)]
        instead = "; or vmm.paging 'shadow', which can do without" if path == "paging" else ""
        yield Problem(
            path=f"vmm.{path}",
            message=f"this needs {words} ({feature}), which profile {profile.name!r} does not have",
            help=f"profiles that have it: {', '.join(able)}{instead}" if able else _newer(feature),
        )


def _mitigations_are_there(scenario: Scenario, profile: Profile) -> Iterator[Problem]:
    """KVM's host has them; all but page-table isolation take microcode of 2018 or 2019."""
    vmm = scenario.vmm
    if vmm.technique != "hardware":
        return
    for name in vmm.mitigations.chosen:
        if vmm.personality != "kvm":
            yield Problem(
                message=f"personality {vmm.personality!r} has no mitigations",
                path=f"vmm.mitigations.{name}",
                help="leave it out; or choose vmm.personality kvm",
            )
        elif name != "pti" and not profile.features.spec_ctrl:
            able = [one for one in profile_names() if load_profile(one).features.spec_ctrl]
            yield Problem(
                message=f"{scenario.machine.profile} has no microcode for it",
                path=f"vmm.mitigations.{name}",
                help=f"leave it out; or choose machine.profile {', '.join(able)}",
            )


def _log_is_filled(scenario: Scenario, profile: Profile) -> Iterator[Problem]:
    """The page-modification log gets an address where a dirty flag of EPT is set."""
    vmm = scenario.vmm
    if vmm.technique == "native" or vmm.dirty_log.method != "pml" or vmm.ept.accessed_dirty:
        return
    if _capabilities(profile).supports("ENABLE_PML"):
        yield Problem(
            path="vmm.dirty_log.method",
            message="the page-modification log needs the dirty flags of EPT",
            help="method can be write-protect; or let ept.accessed_dirty be true",
        )


def _phases(number: int, vm: VmSpec) -> Iterator[tuple[str, Phase]]:
    """The phases of the VM of that number, each with where the scenario has it."""
    for p, process in enumerate(vm.guest.processes):
        for n, phase in enumerate(process.phases):
            yield f"vms.{number}.guest.processes.{p}.phases.{n}", phase


def _apic_can_be_virtual(scenario: Scenario, profile: Profile) -> Iterator[Problem]:
    """What a virtual local APIC that the processor keeps cannot be without."""
    vmm = scenario.vmm
    if vmm.technique != "hardware" or not vmm.apicv:
        return
    if not vmm.tpr_shadow:
        yield Problem(
            path="vmm.apicv",
            message="virtual-interrupt delivery needs a TPR shadow",
            help="let tpr_shadow be auto, true",
        )
    for number, vm in enumerate(scenario.vms):
        if any(isinstance(phase, ReplaySpec) for _, phase in _phases(number, vm)):
            yield Problem(
                path="vmm.apicv",
                message=f"the recorded guest of VM {number} says which accesses to its APIC exit",
                help="apicv can be false",
            )


def _guests_are_of_this_machine(scenario: Scenario, profile: Profile) -> Iterator[Problem]:
    """A processor executes the code of its own instruction set."""
    technique = scenario.vmm.technique
    if techniques[technique].in_software:
        return
    able = ", ".join(name for name, one in techniques.items() if one.in_software)
    for number, vm in enumerate(scenario.vms):
        if vm.isa != MACHINE_ISA:
            yield Problem(
                path=f"vms.{number}.isa",
                message=f"technique {technique!r} lets the processor execute guest code, and {vm.isa} code is none of "
                f"an {MACHINE_ISA} processor",
                help=f"isa can be {MACHINE_ISA}; or vmm.technique can be {able}",
            )


def _programs_execute(scenario: Scenario, profile: Profile) -> Iterator[Problem]:
    """What a program that executes guests does not know."""
    technique = scenario.vmm.technique
    if not techniques[technique].in_software:
        return
    for number, vm in enumerate(scenario.vms):
        for path, phase in _phases(number, vm):
            if isinstance(phase, NOT_IN_SOFTWARE):
                yield Problem(
                    path=path,
                    message=f"technique {technique!r} executes no recorded streams, look-ups or device accesses",
                    help="technique can be native, hardware; or choose stream, mix, fill",
                )


def _processes_can(scenario: Scenario, profile: Profile) -> Iterator[Problem]:
    """What a guest's kernel cannot do that is a process of the host."""
    if scenario.vmm.technique != "user-mode":
        return
    why = "under technique 'user-mode' the guest's kernel is a process of the host, which has no"
    others = "technique can be native, hardware, binary-translation"
    for number, vm in enumerate(scenario.vms):
        if vm.devices or vm.guest.kernel.probe:
            path = "devices" if vm.devices else "guest.kernel.probe"
            yield Problem(path=f"vms.{number}.{path}", message=f"{why} ports to find devices by", help=others)
        for path, phase in _phases(number, vm):
            if isinstance(phase, NOT_IN_A_PROCESS):
                yield Problem(path=path, message=f"{why} privileged operations", help=others)


def _kernels_are_built_for_ring_3(scenario: Scenario, profile: Profile) -> Iterator[Problem]:
    """A kernel that is built for ring 3 does not ask the processor for what it knows that ring 3 cannot tell."""
    technique = scenario.vmm.technique
    if technique not in BUILT_FOR_RING_3:
        return
    why = f"under technique {technique!r} kernels are built for ring 3, and do not ask there for the system's state"
    others = "technique can be native, hardware, binary-translation"
    for number, vm in enumerate(scenario.vms):
        if vm.guest.kernel.sensitive:
            yield Problem(path=f"vms.{number}.guest.kernel.sensitive", message=why, help=others)
        for path, phase in _phases(number, vm):
            if type(phase) is SensitiveSpec:
                yield Problem(path=path, message=why, help=others)


def without_vt_x(vmm: VmmSpec) -> bool:
    """Does a technique use nothing of VT-x?"""
    return techniques[vmm.technique].deprivileged or techniques[vmm.technique].in_software


def _monitor_can(scenario: Scenario, profile: Profile) -> Iterator[Problem]:
    """What a deprivileging monitor cannot do."""
    vmm = scenario.vmm
    if not without_vt_x(vmm):
        return
    (paging,) = techniques[vmm.technique].paging
    kind = {"shadow": "shadow tables", "direct-pv": "direct tables"}.get(paging, "tables")
    translates = "walks of its own" if paging == "software" else kind
    others = "technique can be native, hardware"
    wrong = (
        ("paging", f"technique {vmm.technique!r} translates by {translates}", vmm.paging != paging, f"{paging}, auto"),
        ("vpid", f"technique {vmm.technique!r} uses nothing of VT-x", vmm.vpid, "false, auto"),
        ("tpr_shadow", f"technique {vmm.technique!r} uses nothing of VT-x", vmm.tpr_shadow, "false, auto"),
        ("dirty_log.method", "dirty logging works on EPT", vmm.dirty_log.on, "off"),
        (
            "pv.events",
            f"technique {vmm.technique!r} shares no page with its guests",
            vmm.pv.events and paging != "direct-pv",
            "false",
        ),
        ("apicv", f"technique {vmm.technique!r} uses nothing of VT-x", vmm.apicv, "false"),
    )
    for path, message, found, allowed in wrong:
        if found:
            yield Problem(path=f"vmm.{path}", message=message, help=f"{path} can be {allowed}")
    taken = [vm.cpus or (vm.cpu,) for vm in scenario.vms]
    places = [cpu for each in taken for cpu in each]
    if len(set(places)) < len(places):
        who = "VM" if len(places) == len(scenario.vms) else "vCPU"
        message = f"under technique {vmm.technique!r} every {who} needs a CPU of its own"
        free = sorted(set(range(scenario.machine.cpus)) - set(places))
        if scenario.machine.cpus < len(places):
            yield Problem(path="machine.cpus", message=message, help=f"cpus can be {len(places)} or more")
        else:  # there are enough, and a scenario says which ones
            met = (n for n, each in enumerate(taken) if set(each) & {cpu for before in taken[:n] for cpu in before})
            help = f"free are the CPUs {', '.join(map(str, free))}"
            yield Problem(path=f"vms.{next(met, 0)}.cpu", message=message, help=help)
    for number, vm in enumerate(scenario.vms):
        if vm.guest.kernel.paging == "5-level":
            message = f"technique {vmm.technique!r} has {kind} of four levels"
            path = f"vms.{number}.guest.kernel.paging"
            yield Problem(path=path, message=message, help="paging can be 4-level")
        for process in vm.guest.processes:
            if any(isinstance(phase, ReplaySpec) for phase in process.phases):
                yield Problem(path="vmm.technique", message="a recorded guest needs VT-x", help=others)


def _newer(feature: str) -> str:
    """No profile has a feature; perhaps a generation of VMX does."""
    able = [name for name, generation in GENERATIONS.items() if generation.capabilities().supports(feature)]
    return f"generations that have it: {', '.join(able)}, as in machine.cpu: {{vmx.generation: {able[-1]}}}"


def _kernels_can_run(scenario: Scenario, profile: Profile) -> Iterator[Problem]:
    """What the guest kernel uses, the processor must have."""
    for number, vm in enumerate(scenario.vms):
        kernel = vm.guest.kernel
        if kernel.pcid and not profile.features.pcid:
            yield Problem(
                path=f"vms.{number}.guest.kernel.pcid",
                message=f"this needs PCIDs, which profile {profile.name!r} does not have",
                help="pcid can be false, auto",
            )
        elsewhere = without_vt_x(scenario.vmm) or scenario.vmm.paging == "direct-pv"  # it is refused there
        if kernel.paging == "5-level" and not profile.features.la57 and not elsewhere:
            yield Problem(
                path=f"vms.{number}.guest.kernel.paging",
                message=f"this needs 57-bit linear addresses, which profile {profile.name!r} does not have",
                help=f"{NOT_FIVE}; or machine.cpu: {{features.la57: true, vmx.generation: ice-lake-sp}}",
            )
        elif kernel.paging == "5-level" and scenario.vmm.technique != "native" and not elsewhere:
            _, allowed = _capabilities(profile).cr4_fixed()
            if not allowed & CR4_LA57:
                yield Problem(
                    path=f"vms.{number}.guest.kernel.paging",
                    message="this needs CR4.LA57 in VMX operation",
                    help=f"{NOT_FIVE}; or machine.cpu: {{vmx.generation: ice-lake-sp}}",
                )
        if kernel.page_size == GIB and not profile.features.pages_1g:
            yield Problem(
                path=f"vms.{number}.guest.kernel.page_size",
                message=f"this needs 1 GiB pages, which profile {profile.name!r} does not have",
                help="page_size can be 4 KiB, 2 MiB",
            )


def _direct_tables(scenario: Scenario, profile: Profile) -> Iterator[Problem]:
    """What a paravirtual kernel cannot have, and who can run on direct tables."""
    direct = scenario.vmm.technique != "native" and scenario.vmm.paging == "direct-pv"
    ring3 = techniques[scenario.vmm.technique].deprivileged
    elsewhere = "choose vmm.technique 'hardware'" if ring3 else "choose vmm.paging 'ept', 'shadow'"
    if direct and scenario.vmm.memory.guest_tables != "as-data":
        yield Problem(
            path="vmm.memory.guest_tables",
            message="direct page tables name the frames of all others, which are not moved afterwards",
            help=f"guest_tables can be as-data; or {elsewhere}",
        )
    for number, vm in enumerate(scenario.vms):
        kernel, where = vm.guest.kernel, f"vms.{number}"
        if direct and kernel.interface == "hardware":
            yield Problem(
                path=f"{where}.guest.kernel.interface",
                message="this kernel loads tables of guest-physical addresses, which direct page tables are not",
                help=f"interface can be auto, paravirtual; or {elsewhere}",
            )
        if not direct and kernel.interface != "paravirtual":
            continue
        instead = f"; or {elsewhere}" if direct else "; or let interface be auto"
        for setting, wrong, words, legal in (
            ("kpti", kernel.kpti and not ring3, NO_KPTI, "kpti can be false"),
            ("page_size", kernel.page_size > 4096, NO_LARGE_PAGES, "page_size can be 4 KiB"),
            ("paging", kernel.paging == "5-level", "has tables of four levels", "paging can be 4-level"),
        ):
            if wrong:
                yield Problem(
                    path=f"{where}.guest.kernel.{setting}",
                    message=f"a paravirtual kernel {words}",
                    help=legal + instead,
                )
        if "i440fx" in vm.devices:
            yield Problem(
                path=f"{where}.devices",
                message="a paravirtual guest finds no chipset whose registers move its memory",
                help="leave i440fx out" + instead,
            )
        for path, phase in _phases(number, vm):
            for kind, words in NOT_PARAVIRTUAL.items():
                if isinstance(phase, kind):
                    yield Problem(
                        path=path,
                        message=f"a paravirtual kernel {words}",
                        help=elsewhere if direct else "let interface be auto",
                    )


def _agile_paging(scenario: Scenario, profile: Profile) -> Iterator[Problem]:
    """Agile paging is a proposal: it needs a processor that is supposed to have it."""
    if scenario.vmm.technique == "native" or scenario.vmm.paging != "agile":
        return
    if not profile.features.agile_paging:
        yield Problem(
            path="vmm.paging",
            message="this needs a walker that goes on from shadow tables to the guest's own, and machine.cpu says that "
            "there is none",
            help="leave features.agile_paging out, or let it be true; or choose vmm.paging 'ept', 'shadow'",
        )
    for path, wrong, words, legal in (
        ("vmm.ept.levels", scenario.vmm.ept.levels != 4, "EPT of four levels", "levels can be 4"),
        ("vmm.ept.accessed_dirty", not scenario.vmm.ept.accessed_dirty, "the flags of EPT", "let it be auto"),
    ):
        if wrong:
            yield Problem(path=path, message=f"agile paging needs {words}", help=legal)
    for number, vm in enumerate(scenario.vms):
        for path, phase in _phases(number, vm):
            if isinstance(phase, ReplaySpec):
                yield Problem(
                    path=path,
                    message="a recorded guest's tables are not in memory, where a walk could go on in them",
                    help="choose vmm.paging 'ept', 'shadow'",
                )


def _views_can_be_had(scenario: Scenario, profile: Profile) -> Iterator[Problem]:
    """Who switches between views needs some, a VM that has some is one of one vCPU whose memory stays where it is."""
    vmm = scenario.vmm
    if vmm.technique == "native":
        return
    several = vmm.views > 1
    for number, vm in enumerate(scenario.vms):
        for path, wrong, message, help in (
            (f"vms.{number}.vcpus", vm.vcpus > 1, "views of memory are built for VMs of one vCPU", "vcpus can be 1"),
            (f"vms.{number}.devices", "i440fx" in vm.devices, "a chipset whose registers move memory would move it in "
             "one view only", "leave i440fx out"),
        ):  # fmt: skip
            if several and wrong:
                yield Problem(path=path, message=message, help=f"{help}; or vmm.views 1")
        for path, phase in _phases(number, vm):
            if not isinstance(phase, WatchedStoresSpec) or phase.by == NOBODY:
                continue
            if not several:
                yield Problem(
                    path=f"{path}.by",
                    message="this VM has one view of its memory, in which nothing is protected",
                    help=f"by can be {NOBODY}; or give it more: vmm.views 2",
                )
            elif phase.by == BY_EXCEPTION and not _capabilities(profile).supports("EPT_VIOLATION_VE"):
                others = ", ".join(way for way in WAYS if way != BY_EXCEPTION)
                yield Problem(
                    path=f"{path}.by",
                    message=f"this needs virtualization exceptions (EPT_VIOLATION_VE), which profile {profile.name!r} "
                    "does not have",
                    help=f"by can be {others}",
                )


def _protected_mode(scenario: Scenario, profile: Profile) -> Iterator[Problem]:
    """What a guest cannot have whose processor is in 32-bit protected mode, and page sizes of each paging mode."""
    vmm = scenario.vmm
    for number, vm in enumerate(scenario.vms):
        kernel, paging = vm.guest.kernel, ROWS[vm.guest.kernel.paging]
        guest, where = f"a guest with {paging.name} paging", f"vms.{number}.guest.kernel"
        instead = "; or guest.kernel.paging '4-level'"
        if kernel.page_size not in paging.sizes:
            legal = ", ".join(map(SIZE.format, paging.sizes))
            message = f"{paging.name} paging has no pages of {SIZE.format(kernel.page_size)}"
            yield Problem(path=f"{where}.page_size", message=message, help=f"page_size can be {legal}")
        if not paging.protected:
            continue
        native = vmm.technique == "native"
        by_events = vmm.pv.events and not native and kernel.interface != "hardware"
        for path, wrong, words, legal in (
            ("vmm.technique", vmm.technique not in ("native", "hardware"), "has ring 0, or VT-x below it",
             "technique can be native, hardware"),
            ("vmm.paging", vmm.paging == "direct-pv" and not without_vt_x(vmm),
             "has tables of its own, which it writes itself",
             "paging can be auto, ept, shadow, agile"),
            ("vmm.pv.events", by_events, NOT_FOR_HYPERCALLS, "events can be false"),
            ("vmm.features.exit_clustering", vmm.features.exit_clustering and vmm.paging == "ept",
             "has tables by which exit clusters find no instruction", "exit_clustering can be false"),
            (f"vms.{number}.vcpus", vm.vcpus > 1, "has one CPU", "vcpus can be 1"),
            (f"vms.{number}.memory", vm.memory > LOW_MEMORY, "maps all its memory above 3 GiB",
             f"memory can be at most {SIZE.format(LOW_MEMORY)}"),
            (f"{where}.kpti", kernel.kpti, "has one root for kernel and user mode", "kpti can be false"),
            (f"{where}.pcid", bool(kernel.pcid), "has no PCIDs, which need IA-32e mode", "pcid can be false, auto"),
            (f"{where}.interface", kernel.interface == "paravirtual", NOT_FOR_HYPERCALLS,
             "interface can be auto, hardware"),
            (f"{where}.sensitive", bool(kernel.sensitive), "has other descriptors, gates and frames than these want",
             "sensitive can be []"),
        ):  # fmt: skip
            if wrong:
                yield Problem(path=path, message=f"{guest} {words}", help=legal + instead)
        for path, phase in _phases(number, vm):
            if isinstance(phase, NOT_IN_PROTECTED_MODE):
                yield Problem(
                    path=path,
                    message=f"{guest} {_why_not(phase)}",
                    help="choose others, as page_fault, fork, exec, protect, context_switch, stream" + instead,
                )
                continue
            for size, name, start in (
                (phase.slab_bytes, "slabs", SLABS), (phase.grown_bytes, "grown_heap", GROWN_HEAP),
            ):  # fmt: skip
                if size:
                    yield Problem(
                        path=f"{path}.{name}",
                        message=f"{guest} has no linear addresses from {start:#x} on",
                        help=f"{name} can be false" + instead,
                    )


def _why_not(phase: Phase) -> str:
    if isinstance(phase, MemoryTraceSpec | ReplaySpec):
        return "replays nothing that was recorded in 64-bit mode"
    if isinstance(phase, MmioReadSpec | MmioWriteSpec | DmaBuffersSpec):
        return "maps no registers of devices"
    return "has other descriptors, gates and registers than this wants"


def _memory_is_addressable(scenario: Scenario, profile: Profile) -> Iterator[Problem]:
    """Physical addresses have only so many bits."""
    limit = 2**profile.physical_address_bits
    if scenario.machine.memory > limit:
        yield Problem(
            path="machine.memory",
            message=f"this is more memory than profile {profile.name!r} can address",
            help=f"memory can be at most {SIZE.format(limit)}",
        )


def _parameters_exist(scenario: Scenario, profile: Profile) -> Iterator[Problem]:
    """What is changed of the personality, it must have; only then are its programs loaded to ask."""
    if not scenario.vmm.parameters:
        return
    import vtsim.vmm.personalities
    from vtsim.vmm.settings import resolve_parameters

    import_all(vtsim.vmm.personalities)
    for parameter in scenario.vmm.parameters:
        try:
            resolve_parameters(attrs.evolve(scenario.vmm, parameters=(parameter,)))
        except ConfigError as error:
            yield from error.problems


def _memory_can_be_placed(scenario: Scenario, profile: Profile) -> Iterator[Problem]:
    """Nodes have to be there, with a price, and the allocator has to know them."""
    vmm, nodes = scenario.vmm, scenario.machine.nodes
    if nodes > 1 and profile.dram.remote_ns <= profile.dram.local_ns:
        yield Problem(
            path="machine.nodes",
            message=f"profile {profile.name!r} has one socket: no latency of remote DRAM that differs from local",
            help="nodes can be 1; or give machine.cpu: {dram.remote_ns: …} in ns",
        )
    if vmm.technique == "native":
        return
    for name, value in (
        ("data", vmm.memory.data),
        ("guest_tables", vmm.memory.guest_tables),
        ("ept_tables", vmm.memory.ept_tables),
    ):
        if nodes == 1 and value in ("remote", "interleaved"):
            yield Problem(
                path=f"vmm.memory.{name}",
                message="a machine of one node has no remote memory",
                help=f"{name} can be local; or give the machine 2 nodes: machine.nodes",
            )
    if nodes > 1 and not vmm.memory.buddy:
        yield Problem(
            path="vmm.memory.allocator",
            message="a list of frames knows no nodes",
            help="allocator can be auto, buddy; or machine.nodes 1",
        )
    if vmm.memory.buddy and vmm.ept.page_size == GIB:
        yield Problem(
            path="vmm.ept.page_size",
            message="the buddy allocator has blocks of at most 2 MiB",
            help="page_size can be 4 KiB, 2 MiB; or choose vmm.memory.allocator 'list'",
        )
    if vmm.memory.guest_tables != "as-data" and vmm.ept.page_size > 4096:
        yield Problem(
            path="vmm.memory.guest_tables",
            message="page tables of the guest cannot be placed apart from data that shares their large page",
            help="guest_tables can be as-data; or choose vmm.ept.page_size '4 KiB'",
        )


CHECKS: tuple[Check, ...] = (
    _features_exist,
    _log_is_filled,
    _mitigations_are_there,
    _apic_can_be_virtual,
    _monitor_can,
    _guests_are_of_this_machine,
    _programs_execute,
    _processes_can,
    _kernels_are_built_for_ring_3,
    _kernels_can_run,
    _direct_tables,
    _agile_paging,
    _views_can_be_had,
    _protected_mode,
    _memory_is_addressable,
    _memory_can_be_placed,
    _parameters_exist,
)
