"""What a VM can be: where its vCPUs run, what its processes do on them and touch, and who virtualizes them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Final

from vtsim.base.errors import Problem
from vtsim.base.units import SIZE
from vtsim.guest.attack_spec import AttackStaleSpec
from vtsim.guest.spec import BalloonSpec, DmaBuffersSpec, ForkSpec, IpiSpec, Phase, ReplaySpec

if TYPE_CHECKING:
    from vtsim.platform.spec import Scenario, VmSpec

# Each row is also of the kinds that are made of it: exec and process fork, too.
OF_ONE_VCPU: Final[Mapping[type[Phase], str]] = {ReplaySpec: "a recorded guest"}
OF_TWO_THREADS: Final[Mapping[type[Phase], str]] = {
    IpiSpec: "one thread interrupts another",
    AttackStaleSpec: "one thread stores to what another makes a table",
}
OF_ONE_THREAD: Final[Mapping[type[Phase], str]] = {
    ForkSpec: "children", DmaBuffersSpec: "driver of devices", BalloonSpec: "balloon driver"
}  # fmt: skip


def vcpu_conflicts(scenario: Scenario, vm: VmSpec, where: str) -> Iterator[Problem]:
    """Yield what contradicts itself about the vCPUs of a VM."""
    yield from _places(scenario, vm, where)
    for p, process in enumerate(vm.guest.processes):
        at = f"{where}.guest.processes.{p}"
        if process.threads > vm.vcpus:
            yield Problem(
                path=f"{at}.threads",
                message=f"each thread of a process needs a vCPU of its own, and the VM has {vm.vcpus}",
                help=f"threads can be at most {vm.vcpus}; or raise {where}.vcpus",
            )
        if process.vcpu is not None and process.vcpu >= vm.vcpus:
            yield Problem(
                path=f"{at}.vcpu",
                message=f"there is no vCPU {process.vcpu} in a VM whose number of vCPUs is {vm.vcpus}",
                help=f"vcpu can be {', '.join(map(str, range(vm.vcpus)))}; or raise {where}.vcpus",
            )
        for n, phase in enumerate(process.phases):
            if vm.vcpus > 1 and (words := _of(OF_ONE_VCPU, phase)):
                yield Problem(
                    path=f"{at}.phases.{n}",
                    message=f"{words} has one vCPU",
                    help=f"{where}.vcpus can be 1",
                )
            if process.threads != 2 and (words := _of(OF_TWO_THREADS, phase)):
                yield Problem(
                    path=f"{at}.phases.{n}",
                    message=f"{words}, and the process has {process.threads}",
                    help=f"{at}.threads can be 2",
                )
            if process.threads > 1 and (words := _of(OF_ONE_THREAD, phase)):
                yield Problem(
                    path=f"{at}.phases.{n}",
                    message=f"a process of several threads has no {words}",
                    help=f"{at}.threads can be 1",
                )
    if vm.vcpus > 1:
        yield from _one_balloon(vm, where)
        yield from _hypervisor(scenario, vm, where)


def _of(rows: Mapping[type[Phase], str], phase: Phase) -> str:
    """What the row of a phase's kind says, or of the kind that it is made of; empty without one."""
    return next((words for kind, words in rows.items() if isinstance(phase, kind)), "")


def memory_conflicts(vm: VmSpec, where: str, balloon: int) -> Iterator[Problem]:
    """Yield why a VM has too little memory for its processes, or for them and the balloon that the host asks for."""
    used = 0
    for index, process in enumerate(vm.guest.processes):
        used += process.memory_bytes
        if used > vm.memory:
            largest = max(range(len(process.phases)), key=lambda n: process.phases[n].region_bytes)
            region = ".region" if hasattr(process.phases[largest], "region") else ""
            yield Problem(
                path=f"{where}.guest.processes.{index}.phases.{largest}{region}",
                message=f"the processes touch {SIZE.format(used)}, but the VM has {SIZE.format(vm.memory)}",
                help=f"make {'the region' if region else 'what it works on'} smaller or raise {where}.memory",
            )
            return
    if used + balloon > vm.memory and _drivers(vm):
        yield Problem(
            path="vmm.balloon.size",
            message=f"a balloon of {SIZE.format(balloon)} and the {SIZE.format(used)} that processes touch are more "
            f"than the {SIZE.format(vm.memory)} of {vm.name or where}",
            help=f"size can be at most {SIZE.format(vm.memory - used)}, less what the guest's kernel needs; "
            f"or raise {where}.memory",
        )


def _drivers(vm: VmSpec) -> list[int]:
    """The processes that have a balloon driver."""
    return [
        p
        for p, process in enumerate(vm.guest.processes)
        if any(isinstance(phase, BalloonSpec) for phase in process.phases)
    ]


def _one_balloon(vm: VmSpec, where: str) -> Iterator[Problem]:
    """A frame that one driver is about to give must not be one that another takes back."""
    drivers = _drivers(vm)
    for p in drivers[1:]:
        yield Problem(
            path=f"{where}.guest.processes.{p}",
            message=f"a VM of several vCPUs has one balloon driver, which is in process {drivers[0]}",
            help=f"leave the balloon out of one of them; or {where}.vcpus can be 1",
        )


def _places(scenario: Scenario, vm: VmSpec, where: str) -> Iterator[Problem]:
    cpus = scenario.machine.cpus
    if vm.vcpus > cpus:
        yield Problem(
            path=f"{where}.vcpus",
            message=f"each vCPU needs a logical CPU of its own, and the machine has {cpus}",
            help=f"vcpus can be at most {cpus}; or raise machine.cpus",
        )
    wrong = [cpu for cpu in vm.cpus if cpu >= cpus]
    if wrong:
        yield Problem(
            path=f"{where}.cpus",
            message=f"there is no CPU {wrong[0]} on a machine whose number of CPUs is {cpus}",
            help=f"each can be {', '.join(map(str, range(cpus)))}; or raise machine.cpus",
        )
    elif vm.cpus and (vm.vcpus == 1 or len(vm.cpus) != vm.vcpus or len(set(vm.cpus)) < vm.vcpus):
        yield Problem(
            path=f"{where}.cpus",
            message="this lists a different CPU for each of several vCPUs",
            help=f"give {vm.vcpus} different numbers"
            if vm.vcpus > 1
            else f"leave it out, give cpu; or raise {where}.vcpus",
        )
    elif vm.cpus and vm.cpu is not None and vm.cpu != vm.cpus[0]:
        yield Problem(
            path=f"{where}.cpu",
            message=f"the first vCPU cannot be on CPU {vm.cpu} and on CPU {vm.cpus[0]}",
            help="leave out cpu, or cpus",
        )


def _hypervisor(scenario: Scenario, vm: VmSpec, where: str) -> Iterator[Problem]:
    vmm = scenario.vmm
    native, technique = vmm.technique == "native", vmm.technique
    pagings = ("auto", "ept", "shadow", "agile", "direct-pv")
    wrong = (
        (
            "vmm.technique", technique not in ("native", "hardware", "paravirtual"), f"technique {technique!r}",
            "hardware, paravirtual, native",
        ),
        ("vmm.paging", vmm.paging not in (*pagings, "none"), f"paging {vmm.paging!r}", ", ".join(pagings)),
        (
            "vmm.features.exit_clustering", vmm.features.exit_clustering and vmm.on_shadow,
            "exit clustering on shadow tables", "false",
        ),
        ("vmm.pv.events", vmm.pv.events, "a page with clock and events", "false"),
    )  # fmt: skip
    for path, found, words, allowed in wrong:
        if found and (path == "vmm.technique" or not native):
            yield Problem(
                path=path,
                message=f"{words} is built for VMs of one vCPU, and {vm.name or where} has {vm.vcpus}",
                help=f"{path.rpartition('.')[2]} can be {allowed}; or {where}.vcpus 1",
            )
    if "i440fx" in vm.devices:
        yield Problem(
            path=f"{where}.devices",
            message="a chipset whose registers move memory is built for VMs of one vCPU",
            help=f"leave i440fx out; or {where}.vcpus can be 1",
        )
