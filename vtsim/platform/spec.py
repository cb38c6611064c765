"""A scenario: the machine, the hypervisor, the VMs, and how the run ends."""

from __future__ import annotations

from collections.abc import Iterator

import attrs
from attrs import frozen

from vtsim.base.errors import ConfigError, Problem
from vtsim.base.spec import (
    Boolean,
    Free,
    Group,
    Many,
    Overrides,
    Text,
    counts,
    durations,
    setting,
    sizes,
)
from vtsim.base.units import SIZE
from vtsim.cpu.profile_spec import LEAVES
from vtsim.guest import attack_spec  # noqa: F401  (registers its primitives)
from vtsim.guest.spec import CPU_LIMIT, DmaBuffersSpec, GuestSpec, Phase
from vtsim.platform.dma_spec import (
    DEFAULT,
    MOST_BEHIND_VIRTUAL,
    MOST_DRIVEN,
    REQUESTS,
    DmaSpec,
    IommuSpec,
    LandingSpec,
    dma_conflicts,
)
from vtsim.platform.file_spec import file_conflicts
from vtsim.platform.vcpu_spec import memory_conflicts, vcpu_conflicts
from vtsim.vmm.pci import DEVICE_LIMIT, MODELS
from vtsim.vmm.spec import VmmSpec

MIB, GIB, TIB = 2**20, 2**30, 2**40
BOARD_DEVICES = ("i440fx", "pm-timer", "testdev")
DEVICES = (*BOARD_DEVICES, *MODELS)
MACHINE_ISA = "x86"


@frozen(kw_only=True)
class MachineSpec:
    """The physical machine."""

    profile: str = setting(Text(), "CPU profile; `vtsim list profile` names them", default="skx-4114")
    cpus: int = setting(counts(ge=1, le=256), "Logical CPUs", default=1)
    threads: int = setting(
        counts(choices=(1, 2)), "Logical CPUs of a core: 2 are hyper-threads, CPU 0 with 1, 2 with 3, …", default=1
    )
    memory: int = setting(sizes(ge=16 * MIB, le=512 * GIB), "Physical memory", default=4 * GIB)
    nodes: int = setting(counts(choices=(1, 2)), "NUMA nodes, between which CPUs and memory are halved", default=1)
    frames: str = setting(
        Text(choices=("shuffled", "contiguous")),
        "Hand out page frames scattered, as on a machine that has run for long, or in order",
        default="shuffled",
    )
    quantum: int | None = setting(
        counts(ge=1, le=2**40, words={"default": None}),
        "Cycles that one CPU may run ahead; the default is in what one can hear of another at the earliest: of an "
        "interrupt, or where vCPUs of one VM share memory, of a word in the last-level cache. CPUs of one core that "
        "both run are ahead of each other by a load from the second-level cache at most",
        default=None,
    )
    isa: str = setting(
        Text(choices=("x86", "virtualizable")),
        "Sensitive operations that ring 3 may execute: as they are, or trapping where a monitor asks for it",
        default="x86",
    )
    devices: tuple[str, ...] = setting(
        Many(item=Text(choices=tuple(MODELS))),
        "Devices on bus 0 of the machine, from device 1 on, which a guest finds that runs natively",
        default=(),
    )
    iommu: IommuSpec = setting(Group(spec=IommuSpec), "The DMA-remapping unit", factory=IommuSpec)
    landing: LandingSpec = setting(Group(spec=LandingSpec), "Where DMA lands", factory=LandingSpec)
    cpu: Overrides = setting(
        Free(noun="profile value", known=LEAVES.get),
        "Profile values to change, as in `pwc.pde.entries: 0`; `vtsim explain profile NAME` lists them",
        default=(),
    )

    def with_cpus(self, least: int) -> MachineSpec:
        """The same machine with so many logical CPUs, or one more where a core has two."""
        return attrs.evolve(self, cpus=-(-least // self.threads) * self.threads)


@frozen(kw_only=True)
class VmSpec:
    """A virtual machine."""

    name: str = setting(Text(), "Name in reports; vm0, vm1, … when left out", default="")
    memory: int = setting(sizes(ge=16 * MIB, le=16 * TIB), "Guest-physical memory", default=GIB)
    cpu: int | None = setting(
        counts(le=255, words={"auto": None}),
        "Logical CPU that the vCPU is pinned to; taken in turn when left out",
        default=None,
    )
    vcpus: int = setting(counts(ge=1, le=CPU_LIMIT), "Virtual CPUs, each on a logical CPU of its own", default=1)
    cpus: tuple[int, ...] = setting(
        Many(item=counts(le=255)),
        "Logical CPUs that several vCPUs are pinned to; `cpu` and the next ones when left out",
        default=(),
    )
    devices: tuple[str, ...] = setting(
        Many(item=Text(choices=DEVICES)),
        "Devices that the hypervisor shows the VM, on bus 0 from device 1 on",
        default=(),
    )
    isa: str = setting(
        Text(choices=(MACHINE_ISA, "arm", "jvm")),
        "Instruction set that its programs are encoded in; to the machine's processor another one is invalid opcodes",
        default=MACHINE_ISA,
    )
    assigned: tuple[str, ...] = setting(
        Many(item=Text(choices=tuple(MODELS))),
        "Devices of the machine that the VM drives itself, so that their DMA goes where its guest says",
        default=(),
    )
    viommu: str = setting(
        Text(choices=("none", "caching", "nested")),
        "The remapping unit that a VM sees: none, one in caching mode whose tables the hypervisor shadows, or one "
        "whose first-level tables the real unit walks, nested in those of the VM's memory",
        default="none",
    )
    guest: GuestSpec = setting(Group(spec=GuestSpec), "What it runs")

    def pinned(self, cpus: int) -> tuple[int, ...]:
        """The logical CPU of each vCPU, on a machine with so many."""
        first = self.cpu or 0
        return self.cpus or tuple((first + n) % cpus for n in range(self.vcpus))


@frozen(kw_only=True)
class RunSpec:
    """How the run ends, and what is run beside it."""

    limit: int = setting(durations(ge=1000), "Simulated time after which the run stops", default=10_000_000_000)
    work_scale: int = setting(
        counts(ge=1, le=1000),
        "Every run of ordinary instructions executes this many times as many; counts of events must not change",
        default=1,
    )
    baseline: bool = setting(Boolean(), "Also run the same guests natively, for the slowdown", default=True)


@frozen(kw_only=True)
class Scenario:
    """Everything that a run depends on, apart from the version of vtsim."""

    name: str = setting(Text(), "Name in reports; the file's name when left out", default="")
    description: str = setting(Text(), "One line about what the scenario shows", default="")
    seed: int = setting(counts(le=2**32 - 1), "Seed of every random choice", default=1)
    machine: MachineSpec = setting(Group(spec=MachineSpec), "The physical machine", factory=MachineSpec)
    vmm: VmmSpec = setting(Group(spec=VmmSpec), "The hypervisor", factory=VmmSpec)
    vms: tuple[VmSpec, ...] = setting(
        Many(item=Group(spec=VmSpec)),
        "The virtual machines; none where devices have the machine to themselves",
        default=(),
    )
    dma: tuple[DmaSpec, ...] = setting(
        Many(item=Group(spec=DmaSpec)), "Devices that read and write memory by themselves", default=()
    )
    run: RunSpec = setting(Group(spec=RunSpec), "The run", factory=RunSpec)

    def __attrs_post_init__(self) -> None:
        problems = list(conflicts(self))
        if problems:
            raise ConfigError.of(problems)

    def resolved(self, name: str) -> Scenario:
        """Give names and CPUs to what the user left open."""
        probe = bool(self.machine.devices) or any(set(vm.devices) & set(MODELS) for vm in self.vms)
        vms = tuple(
            attrs.evolve(
                vm,
                name=vm.name or f"vm{number}",
                cpu=(*vm.cpus, number % self.machine.cpus)[0] if vm.cpu is None else vm.cpu,
                guest=probing(vm.guest, probe),
            )
            for number, vm in enumerate(self.vms)
        )
        vms = tuple(attrs.evolve(vm, cpus=vm.pinned(self.machine.cpus) if vm.vcpus > 1 else ()) for vm in vms)
        dma = tuple(attrs.evolve(each, name=each.name or f"dma{number}") for number, each in enumerate(self.dma))
        if dma:
            vms = tuple(attrs.evolve(vm, guest=_with_devices(vm.guest, dma[0].name)) for vm in vms)
        return attrs.evolve(self, name=self.name or name, vms=vms, dma=dma)


def probing(guest: GuestSpec, probe: bool) -> GuestSpec:
    """The same guest with a kernel that looks for hardware or not, where the user left that open."""
    if guest.kernel.probe is not None:
        return guest
    return attrs.evolve(guest, kernel=attrs.evolve(guest.kernel, probe=probe))


def _with_devices(guest: GuestSpec, first: str) -> GuestSpec:
    """The same guest, whose phases that name no device drive the first."""

    def named(phase: Phase) -> Phase:
        if isinstance(phase, DmaBuffersSpec) and not phase.device:
            return attrs.evolve(phase, device=first)
        return phase

    processes = tuple(attrs.evolve(each, phases=tuple(map(named, each.phases))) for each in guest.processes)
    return attrs.evolve(guest, processes=processes)


def conflicts(scenario: Scenario) -> Iterator[Problem]:
    """Yield what contradicts itself between the parts of a scenario."""
    machine, left = scenario.machine, scenario.machine.memory
    if not scenario.vms and not scenario.dma:
        yield Problem(
            path="",
            message="nothing runs on this machine",
            help="give it a VM under vms, or a device under dma",
        )
    yield from _driver_conflicts(scenario)
    yield from dma_conflicts(scenario.dma, machine.memory, machine.iommu.mode)
    for field, devices in (("machine.devices", machine.devices), *_shown_devices(scenario)):
        if sum(name in MODELS for name in devices) > DEVICE_LIMIT:
            yield Problem(
                path=field,
                message=f"{len(devices)} devices are more than bus 0 has here",
                help=f"there can be at most {DEVICE_LIMIT}",
            )
    if machine.cpus % machine.threads:
        yield Problem(
            path="machine.threads",
            message=f"cores of {machine.threads} logical CPUs do not make a machine of {machine.cpus}",
            help=f"machine.cpus can be {machine.with_cpus(machine.cpus).cpus}, or any other even number; or threads 1",
        )
    names: set[str] = set()
    for number, vm in enumerate(scenario.vms):
        where = f"vms.{number}"
        if vm.cpu is not None and vm.cpu >= machine.cpus:
            yield Problem(
                path=f"{where}.cpu",
                message=f"there is no CPU {vm.cpu} on a machine whose number of CPUs is {machine.cpus}",
                help=f"cpu can be {', '.join(map(str, range(machine.cpus)))}; or raise machine.cpus",
            )
        if vm.memory > left and not scenario.vmm.swap.on:
            others = " that earlier VMs leave" if number else " of the machine"
            yield Problem(
                path=f"{where}.memory",
                message=f"{SIZE.format(vm.memory)} is more than the {SIZE.format(left)} of memory{others}",
                help=f"memory can be at most {SIZE.format(left)}; or raise machine.memory",
            )
        left = max(0, left - vm.memory)
        name = vm.name or f"vm{number}"
        if name in names:
            yield Problem(path=f"{where}.name", message=f"two VMs are named {name!r}", help="give each VM its own name")
        names.add(name)
        yield from vcpu_conflicts(scenario, vm, where)
        yield from file_conflicts(scenario, vm, where)
        yield from memory_conflicts(vm, where, scenario.vmm.balloon.size)


def _shown_devices(scenario: Scenario) -> Iterator[tuple[str, tuple[str, ...]]]:
    for number, vm in enumerate(scenario.vms):
        yield f"vms.{number}.devices", vm.devices


def driven_by(vm: VmSpec) -> set[str]:
    """The names of the devices that a VM's kernel drives."""
    phases = (phase for process in vm.guest.processes for phase in process.phases)
    return {phase.device for phase in phases if isinstance(phase, DmaBuffersSpec)}


OF_ITS_OWN = ("window", "mapped", "pages", "bytes", "stride", "operations", "write", "random")
OF_DRIVEN_DEVICES = (  # and of which requests: without these it is refused for another reason
    ("unanswered", ("ats",), "is asked to invalidate nothing"),
    ("device_answer_ns", ("ats",), "is asked to invalidate nothing"),
    ("page_requests", ("ats",), "has nobody who serves its page requests"),
    ("hostile_ns", REQUESTS, "has no buffers that are done"),
)


def _driver_conflicts(scenario: Scenario) -> Iterator[Problem]:
    """Yield what contradicts itself between devices and the guests that drive them."""
    names = [each.name or f"dma{number}" for number, each in enumerate(scenario.dma)]
    drivers: dict[str, str] = {}
    served: set[str] = set()
    for number, vm in enumerate(scenario.vms):
        for place, process in enumerate(vm.guest.processes):
            for index, phase in enumerate(process.phases):
                if not isinstance(phase, DmaBuffersSpec):
                    continue
                where = f"vms.{number}.guest.processes.{place}.phases.{index}"
                name, driver = phase.device or (names[0] if names else ""), f"{number}.{place}"
                if name not in names:
                    known = f"device can be {', '.join(names)}" if names else "describe one under dma"
                    yield Problem(
                        path=f"{where}.device", message=f"there is no device {name!r}".replace(" ''", ""), help=known
                    )
                elif (requests := scenario.dma[names.index(name)].requests) == "forged":
                    yield Problem(
                        path=f"dma.{names.index(name)}.requests",
                        message="a device with a driver has no addresses to forge",
                        help="requests can be untranslated, or ats",
                    )
                elif requests == "ats" and (scenario.vmm.technique != "native" or vm.guest.kernel.dma == "identity"):
                    yield Problem(
                        path=f"dma.{names.index(name)}.requests",
                        message="a device-TLB needs a driver that has the machine to itself and maps",
                        help="requests can be untranslated; or vmm.technique native, with kernel.dma strict, deferred "
                        "or never",
                    )
                elif drivers.setdefault(name, driver) != driver:
                    yield Problem(
                        path=f"{where}.device",
                        message=f"{name!r} is driven by another process",
                        help="give each process a device of its own",
                    )
                served.add(name)
                if name in names and scenario.dma[names.index(name)].page_requests:
                    yield from _page_request_conflicts(vm, f"vms.{number}", phase, where, names.index(name))
                if vm.guest.kernel.dma == "deferred" and not vm.guest.kernel.tick:
                    yield Problem(
                        path=f"vms.{number}.guest.kernel.tick",
                        message="without a timer tick nothing flushes what is deferred",
                        help="give the kernel a tick, like '4 ms', or choose another kernel.dma",
                    )
    for number, each in enumerate(scenario.dma):
        for key in OF_ITS_OWN:
            if names[number] in drivers and getattr(each, key) != getattr(DEFAULT, key):
                yield Problem(
                    path=f"dma.{number}.{key}",
                    message="a device with a driver moves the buffers that it is given, and does nothing of its own",
                    help=f"leave {key} out; what a driver gives it is said of its phase, primitive dma_buffers",
                )
        for key, only, message in OF_DRIVEN_DEVICES:
            default = getattr(DEFAULT, key)
            if getattr(each, key) != default and each.requests in only and names[number] not in served:
                yield Problem(
                    path=f"dma.{number}.{key}",
                    message=f"a device without a driver {message}",
                    help=f"{key} can be {default:g}; or let a process drive it with primitive dma_buffers",
                )
    for number, vm in enumerate(scenario.vms):
        if vm.viommu != "none" and not driven_by(vm):
            yield Problem(
                path=f"vms.{number}.viommu",
                message="a VM that drives no device has none that its remapping unit could be in front of",
                help="viommu can be none; or let a process of it drive a device with primitive dma_buffers",
            )
    if scenario.vms and scenario.dma:
        yield from _assignment_conflicts(scenario)
    if len(drivers) > MOST_DRIVEN:
        yield Problem(
            path=f"dma.{MOST_DRIVEN}",
            message=f"{len(drivers)} devices have drivers, and there are vectors for {MOST_DRIVEN}",
            help=f"dma can have {MOST_DRIVEN}",
        )
    if scenario.vmm.posted_interrupts and not drivers:
        yield Problem(
            path="vmm.posted_interrupts",
            message="no VM has a device whose interrupts could be posted",
            help="posted_interrupts can be false; or let a process drive a device with primitive dma_buffers",
        )
    for number, name in enumerate(names):
        if scenario.vms and name not in served:
            yield Problem(
                path=f"dma.{number}",
                message="devices that do DMA by themselves have the machine to themselves",
                help="leave vms out, or let a process drive it with primitive dma_buffers",
            )


def _page_request_conflicts(vm: VmSpec, of: str, phase: DmaBuffersSpec, where: str, number: int) -> Iterator[Problem]:
    """Yield why a kernel cannot map pages of a phase when the device of a number asks for them."""
    if vm.guest.kernel.dma in ("deferred", "never"):
        yield Problem(
            path=f"{of}.guest.kernel.dma",
            message="pages that are mapped when a device asks for them are unmapped strictly",
            help=f"dma can be strict; or dma.{number}.page_requests 0",
        )
    if phase.pages != "4 KiB":
        yield Problem(
            path=f"{where}.pages",
            message="a device asks for pages of 4 KiB",
            help=f"pages can be 4 KiB; or dma.{number}.page_requests 0",
        )


def _assignment_conflicts(scenario: Scenario) -> Iterator[Problem]:
    """Yield why devices cannot be assigned to the VMs of a scenario."""
    vmm = scenario.vmm
    if vmm.technique == "native":
        return
    if vmm.technique != "hardware" or vmm.paging not in ("auto", "ept"):
        yield Problem(
            path="vmm.technique" if vmm.technique != "hardware" else "vmm.paging",
            message="devices are assigned to VMs on EPT only",
            help="technique can be hardware with paging ept, or native",
        )
    if vmm.takes_back:
        yield Problem(
            path="vmm",
            message="memory that devices reach is not taken back",
            help="leave out sharing, collapse, swap, balloon",
        )
    if scenario.machine.iommu.mode != "translate":
        yield Problem(
            path="machine.iommu.mode",
            message="a device of a VM would reach the memory of the host",
            help="mode can be translate",
        )
    if scenario.machine.iommu.write_buffers:
        yield Problem(
            path="machine.iommu.write_buffers",
            message="a hypervisor does not flush write buffers here",
            help="technique can be native",
        )
    units = [number for number, vm in enumerate(scenario.vms) if vm.viommu != "none" and driven_by(vm)]
    for number in units:
        yield from _viommu_conflicts(scenario.vms[number], f"vms.{number}", alone=number == units[0])


def _viommu_conflicts(vm: VmSpec, where: str, *, alone: bool) -> Iterator[Problem]:
    """Yield why a VM cannot have a remapping unit as it is described."""
    if not alone:
        yield Problem(path=f"{where}.viommu", message="another VM has a remapping unit", help="viommu can be none")
    if len(driven_by(vm)) > MOST_BEHIND_VIRTUAL:
        yield Problem(
            path=f"{where}.viommu",
            message=f"a VM's remapping unit has at most {MOST_BEHIND_VIRTUAL} devices",
            help="viommu can be none",
        )
    if vm.viommu == "caching" and vm.guest.kernel.dma not in ("strict", "identity"):
        yield Problem(
            path=f"{where}.guest.kernel.dma",
            message="a kernel that finds caching mode defers nothing, as Linux does not",
            help="dma can be strict, identity",
        )
