"""Settings that change nothing in a run, because what they describe is not there.

One rule: what contradicts itself is refused; what describes a part that this run does not have is no mistake, since a
study may vary it together with whether the part is there. The run goes on, and its result says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import reduce
from typing import Any, Final

from attrs import frozen

from vtsim.base.spec import Group, kind_of, settings
from vtsim.cpu.profile import Profile
from vtsim.guest.file_mappings import MapFileSpec
from vtsim.guest.spec import MixSpec, Phase, StreamSpec
from vtsim.platform.spec import Scenario, VmSpec
from vtsim.vmcs.generations import GENERATIONS
from vtsim.vmm.techniques import techniques

RING_3 = ("paravirtual", "user-mode")  # kernels are built for it
RECORDED = "a recorded guest has the kernel that was recorded"


@frozen
class Rule:
    """Settings, by their dotted path below what is asked about, the condition, and why nothing of them is there.

    The path of a group stands for all its keys. `kinds`: of phases, those that have the setting.
    """

    paths: tuple[str, ...]
    condition: Callable[..., bool]
    reason: str
    kinds: tuple[type[Phase], ...] = ()


def _under(*pagings: str) -> Callable[[Scenario], bool]:
    return lambda scenario: scenario.vmm.paging in pagings


def _has(vm: VmSpec, kind: type[Phase]) -> bool:
    return any(isinstance(phase, kind) for process in vm.guest.processes for phase in process.phases)


def _asks_for_pages(scenario: Scenario) -> bool:
    return any(each.page_requests for each in scenario.dma)


def _without_vt_x(scenario: Scenario) -> bool:
    return scenario.vmm.technique != "hardware"


# fmt: off
OF_MACHINES: Final = (
    Rule(("machine.iommu", "machine.landing"), lambda s: not s.dma and not any(vm.assigned for vm in s.vms),
         "no device does DMA"),
    Rule(("machine.quantum",), lambda s: s.machine.cpus == 1, "one CPU runs ahead of no other"),
    Rule(("machine.isa",), lambda s: not (techniques[s.vmm.technique].deprivileged and s.vmm.on_shadow),
         "no monitor asks for traps in ring 3"),
)
OF_PROFILES: Final = (  # values of machine.cpu
    Rule(("dram.bandwidth",), lambda s, p: s.machine.cpus == 1 and not p.fills_memory,
         "there is no other CPU, and this one cannot ask for so much"),
    Rule(("latency.transfer_ns", "latency.remote_transfer_ns", "latency.cross_cpu_ns"),
         lambda s, p: s.machine.cpus == 1, "there is no other CPU"),
    Rule(("work.two_threads_percent",), lambda s, p: s.machine.threads == 1, "no core has two logical CPUs"),
    Rule(("dram.remote_ns",), lambda s, p: s.machine.nodes == 1, "all memory is of one node"),
    Rule(("dram.channels", "dram.queue", "dram.banks", "dram.row_cycle_ns", "dram.refresh_ns",
          "dram.refresh_interval_ns"),
         lambda s, p: not dict(s.machine.cpu).get("dram.ranks"), "dram.ranks is 0"),  # as in all profiles
)
OF_HYPERVISORS: Final = (  # not asked natively, where there is none, and all of vmm says nothing
    Rule(("vmm.ept.page_size", "vmm.ept.levels", "vmm.ept.accessed_dirty"), _without_vt_x,
         "without VT-x no EPT is walked"),
    Rule(("vmm.ept.levels", "vmm.ept.accessed_dirty"), _under("shadow"), "shadow tables are walked instead of EPT"),
    Rule(("vmm.ept.page_size", "vmm.ept.levels", "vmm.ept.accessed_dirty", "vmm.huge_pages"), _under("direct-pv"),
         "direct page tables lead to frames of 4 KiB of the host, and no EPT is walked"),
    Rule(("vmm.pv.batch",), lambda s: s.vmm.paging != "direct-pv" or s.vmm.technique == "user-mode",
         "no kernel gathers requests about page tables"),
    Rule(("vmm.dirty_log.start", "vmm.dirty_log.period", "vmm.dirty_log.stop"), lambda s: not s.vmm.dirty_log.on,
         "dirty_log.method is off"),
    Rule(("vmm.memory.ept_tables",), _under("direct-pv"), "there are no EPT tables"),
    Rule(("vmm.memory.guest_tables",), lambda s: s.machine.nodes == 1, "a machine of one node has memory of one kind"),
    Rule(("vmm.collapse.period", "vmm.collapse.pages"), lambda s: not s.vmm.collapse.on, "collapse.on is false"),
    Rule(("vmm.sharing.period", "vmm.sharing.pages"), lambda s: not s.vmm.sharing.on, "sharing.on is false"),
    Rule(("vmm.balloon.start", "vmm.balloon.stop"), lambda s: not s.vmm.balloon.size, "balloon.size is 0"),
    Rule(("vmm.swap.memory", "vmm.swap.read", "vmm.swap.write", "vmm.swap.at_once"), lambda s: not s.vmm.swap.on,
         "swap.on is false"),
    Rule(("vmm.lengths",), lambda s: not s.vmm.hosted and (_without_vt_x(s) or s.vmm.personality != "kvm"),
         "no host is Linux"),
    Rule(("vmm.features.exit_clustering",), _without_vt_x, "without VT-x there are no VM exits"),
    Rule(("vmm.mitigations",), _without_vt_x, "without VT-x there is no KVM"),
    Rule(("vmm.huge_pages", "vmm.memory"), _without_vt_x,
         "without VT-x all memory of VMs is there, in frames of a list"),
)
OF_VMS: Final = (
    Rule(("guest.kernel.kpti", "guest.kernel.pcid", "guest.kernel.page_size", "guest.kernel.populate",
          "guest.kernel.sensitive", "guest.kernel.lengths"), lambda s, vm: vm.guest.replays,
         RECORDED),
    Rule(("guest.kernel.tick",), lambda s, vm: vm.guest.replays and vm.guest.kernel.tick > 0, RECORDED),
    Rule(("guest.kernel.kpti",), lambda s, vm: s.vmm.technique in RING_3,
         "a kernel in ring 3 is not mapped where its processes run"),
    Rule(("guest.kernel.pcid",), lambda s, vm: s.vmm.technique in RING_3, "a kernel in ring 3 loads no CR3"),
    Rule(("guest.kernel.file_system",), lambda s, vm: not _has(vm, MapFileSpec), "no process has a phase map_file"),
    Rule(("guest.kernel.file_system.write", "guest.kernel.file_system.at_once",
          "guest.kernel.file_system.background", "guest.kernel.file_system.limit"),
         lambda s, vm: not vm.guest.kernel.file_system.written, "file_system.kind memory writes no page"),
    Rule(("guest.kernel.dma", "guest.kernel.iova"), lambda s, vm: not vm.guest.driven,
         "no process has a phase dma_buffers"),
    Rule(("guest.kernel.page_request_queue",), lambda s, vm: not vm.guest.driven or not _asks_for_pages(s),
         "no device of it asks for pages"),
    Rule(("assigned",), lambda s, vm: True, "`vtsim verdict` looks whether such a device can be turned against others"),
)
OF_PHASES: Final = (
    Rule(("stride",), lambda phase: phase.pattern != "strided", "pattern is not strided", (MixSpec, StreamSpec)),
    Rule(("theta",), lambda phase: phase.pattern != "zipf", "pattern is not zipf", (MixSpec, StreamSpec)),
    Rule(("write", "pattern"), lambda phase: not phase.memory, "memory is 0 %", (MixSpec,)),
    Rule(("stride",), lambda phase: phase.order != "strided", "order is not strided", (MapFileSpec,)),
)
# fmt: on


def without_effect(scenario: Scenario, profile: Profile) -> Iterator[tuple[str, str]]:
    """Yield the path of each setting that changes nothing in this run, and is not what it is when left out; and why."""
    auto = _auto(scenario, profile)
    native = scenario.vmm.technique == "native"
    rules = OF_MACHINES if native else (*OF_MACHINES, *OF_HYPERVISORS)
    yield from _found(rules, scenario, "", auto, scenario)
    for rule in OF_PROFILES:
        if rule.condition(scenario, profile):
            yield from ((f"machine.cpu.{name}", rule.reason) for name, _ in scenario.machine.cpu if name in rule.paths)
    for number, vm in enumerate(scenario.vms):
        yield from _found(OF_VMS, vm, f"vms.{number}.", auto, scenario, vm)
        for p, process in enumerate(vm.guest.processes):
            for n, phase in enumerate(process.phases):
                of_kind = [rule for rule in OF_PHASES if isinstance(phase, rule.kinds)]
                yield from _found(of_kind, phase, f"vms.{number}.guest.processes.{p}.phases.{n}.", {}, phase)


def _auto(scenario: Scenario, profile: Profile) -> dict[str, Any]:
    """What settings are that are `auto` when left out: a scenario that runs has the answer in its place."""
    nodes, fragmentation = scenario.machine.nodes, scenario.vmm.memory.fragmentation
    return {
        "vmm.ept.accessed_dirty": GENERATIONS[profile.vmx.generation].capabilities().supports("EPT_ACCESSED_DIRTY"),
        "vmm.memory.allocator": "buddy" if nodes > 1 or fragmentation else "list",
        "guest.kernel.pcid": profile.features.pcid,
    }


def _found(
    rules: Iterable[Rule], spec: Any, prefix: str, auto: Mapping[str, Any], *asked: Any
) -> Iterator[tuple[str, str]]:
    seen: set[str] = set()
    for rule in rules:
        if not rule.condition(*asked):
            continue
        for path in rule.paths:
            for changed in _changed(spec, path, auto):
                if changed not in seen:
                    seen.add(changed)
                    yield prefix + changed, rule.reason


def _changed(spec: Any, path: str, auto: Mapping[str, Any]) -> Iterator[str]:
    """The settings at or below a path that differ from what they are when left out."""
    *outer, name = path.split(".")
    part = reduce(getattr, outer, spec)
    field, value = settings(type(part))[name], getattr(part, name)
    if isinstance(kind_of(field), Group):
        for inner in settings(type(value)):
            yield from _changed(spec, f"{path}.{inner}", auto)
    elif value != auto.get(path, field.default):
        yield path
