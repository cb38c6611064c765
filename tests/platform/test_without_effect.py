"""Settings that a run says to be without effect change nothing in it, and those that have one are not said to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import pytest

from vtsim.config import load_scenario, parse_scenario
from vtsim.cpu.profile import load_profile
from vtsim.platform.without_effect import OF_HYPERVISORS, OF_MACHINES, OF_PHASES, OF_PROFILES, OF_VMS, without_effect
from vtsim.study.result import Result
from vtsim.study.run import simulate

pytestmark = pytest.mark.compiled_only

SCENARIO = """
run: {baseline: false, limit: 100 ms}
vms:
  - memory: 64 MiB
    guest:
      processes:
        - phases:
            - {primitive: mix, instructions: 20 k, region: 1 MiB}
            - {primitive: page_fault, region: 128 KiB}
            - {primitive: syscall, iterations: 20}
            - {primitive: fork, iterations: 2, pages: 4}
            - {primitive: cpuid, iterations: 5}
            - {primitive: map_file, iterations: 2, region: 64 KiB, write: 50 %, passes: 2, sync: true}
            - {primitive: work, instructions: 9 M}
"""
NO_FILE = SCENARIO.replace("map_file, iterations: 2, region: 64 KiB, write: 50 %, passes: 2, sync: true", "empty")
KERNEL, PHASE = "vms.0.guest.kernel", "vms.0.guest.processes.0.phases.0"
SHADOW, DIRECT, RING_3 = "vmm.paging=shadow", "vmm.paging=direct-pv", "vmm.technique=paravirtual"
IN_FRAMES = "without VT-x all memory of VMs is there, in frames of a list"
NO_EPT = "direct page tables lead to frames of 4 KiB of the host, and no EPT is walked"
UNASKED = "this hypervisor's programs do not ask for it"

# where, the setting, what is said of it
CASES: tuple[tuple[tuple[str, ...], str, str], ...] = (
    ((), "machine.iommu.walkers=2", "no device does DMA"),
    ((), "machine.iommu.mode=off", "no device does DMA"),
    ((), "machine.landing.ways=4", "no device does DMA"),
    ((), "machine.quantum=100", "one CPU runs ahead of no other"),
    ((), "machine.cpu.dram.bandwidth=30_000", "there is no other CPU, and this one cannot ask for so much"),
    ((), "machine.cpu.dram.refresh_ns=7", "dram.ranks is 0"),
    ((), "machine.cpu.latency.transfer_ns=7", "there is no other CPU"),
    ((), "machine.cpu.latency.cross_cpu_ns=7", "there is no other CPU"),
    (("machine.cpus=2",), "machine.cpu.work.two_threads_percent=200", "no core has two logical CPUs"),
    ((), "machine.cpu.dram.remote_ns=7", "all memory is of one node"),
    ((), "machine.isa=virtualizable", "no monitor asks for traps in ring 3"),
    ((RING_3,), "machine.isa=virtualizable", "no monitor asks for traps in ring 3"),
    (("vmm.technique=interpreter",), "vmm.ept.levels=5", "without VT-x no EPT is walked"),
    (("vmm.technique=binary-translation",), "vmm.ept.page_size=2 MiB", "without VT-x no EPT is walked"),
    ((SHADOW,), "vmm.ept.levels=5", "shadow tables are walked instead of EPT"),
    ((SHADOW,), "vmm.ept.accessed_dirty=false", "shadow tables are walked instead of EPT"),
    ((DIRECT,), "vmm.ept.page_size=2 MiB", NO_EPT),
    ((DIRECT,), "vmm.ept.page_size=1 GiB", NO_EPT),
    ((DIRECT, "vmm.ept.populate=prebuilt"), "vmm.ept.page_size=1 GiB", NO_EPT),
    ((DIRECT,), "vmm.ept.levels=5", NO_EPT),
    ((DIRECT,), "vmm.ept.accessed_dirty=false", NO_EPT),
    ((DIRECT,), "vmm.huge_pages=never", NO_EPT),
    ((), "vmm.pv.batch=1", "no kernel gathers requests about page tables"),
    (("vmm.technique=user-mode",), "vmm.pv.batch=1", "no kernel gathers requests about page tables"),
    ((), "vmm.dirty_log.start=1 ms", "dirty_log.method is off"),
    ((), "vmm.dirty_log.period=1 us", "dirty_log.method is off"),
    ((), "vmm.dirty_log.stop=5 ms", "dirty_log.method is off"),
    ((), "vmm.memory.guest_tables=local", "a machine of one node has memory of one kind"),
    (("vmm.memory.allocator=buddy",), "vmm.memory.guest_tables=local", "a machine of one node has memory of one kind"),
    ((), "vmm.collapse.period=1 us", "collapse.on is false"),
    ((), "vmm.collapse.pages=512", "collapse.on is false"),
    ((), "vmm.sharing.period=1 us", "sharing.on is false"),
    ((), "vmm.sharing.pages=1", "sharing.on is false"),
    ((), "vmm.balloon.start=1 ms", "balloon.size is 0"),
    ((f"{PHASE}={{primitive: balloon, iterations: 2}}",), "vmm.balloon.stop=1 ms", "balloon.size is 0"),
    ((), "vmm.swap.memory=1 MiB", "swap.on is false"),
    ((), "vmm.swap.write=1 ms", "swap.on is false"),
    (("vmm.technique=binary-translation",), "vmm.features.exit_clustering=true", "without VT-x there are no VM exits"),
    (("vmm.technique=binary-translation",), "vmm.mitigations.pti=true", "without VT-x there is no KVM"),
    (("vmm.technique=interpreter",), "vmm.huge_pages=never", IN_FRAMES),
    ((RING_3,), "vmm.memory.allocator=buddy", IN_FRAMES),
    (("vmm.technique=interpreter",), "vmm.memory.fragmentation=50 %", IN_FRAMES),
    (("vmm.technique=paravirtual",), f"{KERNEL}.kpti=true", "a kernel in ring 3 is not mapped where its processes run"),
    (("vmm.technique=user-mode",), f"{KERNEL}.kpti=true", "a kernel in ring 3 is not mapped where its processes run"),
    ((RING_3,), f"{KERNEL}.pcid=false", "a kernel in ring 3 loads no CR3"),
    ((), f"{KERNEL}.file_system.write=1 ms", "file_system.kind memory writes no page"),
    ((), f"{KERNEL}.file_system.at_once=1", "file_system.kind memory writes no page"),
    ((), f"{KERNEL}.file_system.background=0 %", "file_system.kind memory writes no page"),
    ((), f"{KERNEL}.file_system.limit=90 %", "file_system.kind memory writes no page"),
    ((), f"{KERNEL}.dma=strict", "no process has a phase dma_buffers"),
    ((), f"{KERNEL}.iova=tree", "no process has a phase dma_buffers"),
    ((), f"{KERNEL}.page_request_queue=4 KiB", "no device of it asks for pages"),
    ((), "vms.0.assigned=[vga]", "`vtsim verdict` looks whether such a device can be turned against others"),
    ((), f"{PHASE}.stride=128 B", "pattern is not strided"),
    ((), f"{PHASE}.theta=2", "pattern is not zipf"),
    ((f"{PHASE}.memory=0 %",), f"{PHASE}.write=90 %", "memory is 0 %"),
    ((f"{PHASE}.memory=0 %",), f"{PHASE}.pattern=sequential", "memory is 0 %"),
    ((), "vms.0.guest.processes.0.phases.5.stride=128 B", "order is not strided"),
    ((), "vmm.parameters.shadow_fault=9", UNASKED),
    ((), "vmm.parameters.out_of_sync=0", UNASKED),
    ((), "vmm.parameters.shadow_permille=400", UNASKED),
    ((), "vmm.parameters.validate_table=9", UNASKED),
    ((), "vmm.parameters.collapse=9", UNASKED),
    ((SHADOW,), "vmm.parameters.map_page=9", UNASKED),
    ((SHADOW,), "vmm.parameters.agile_interval=9", UNASKED),
    (("vmm.personality=minimal",), "vmm.lengths=linux-4.19", "no host is Linux"),
    (("vmm.technique=paravirtual",), "vmm.lengths=linux-4.19", "no host is Linux"),
    (("vmm.technique=binary-translation",), "vmm.parameters.shadow_prefetch=2", UNASKED),
)
# where, and what has an effect there
OTHERWISE = (
    ((), "machine.cpu.dram.bandwidth=1"),
    (("machine.cpu.dram.ranks=12",), "machine.cpu.dram.refresh_ns=900"),
    ((), "vmm.ept.page_size=2 MiB"),
    ((), "vmm.mitigations.pti=true"),
    ((SHADOW,), "vmm.huge_pages=never"),
    ((DIRECT,), "vmm.pv.batch=1"),
    (("vmm.dirty_log.method=pml",), "vmm.dirty_log.period=1 ms"),
    (("vmm.sharing.on=true",), "vmm.sharing.period=100 us"),
    (("vmm.technique=trap-and-emulate",), "machine.isa=virtualizable"),
    ((), f"{KERNEL}.kpti=true"),
    ((), f"{KERNEL}.pcid=false"),
    ((f"{KERNEL}.file_system.kind=host",), f"{KERNEL}.file_system.write=1 ms"),
    ((f"{PHASE}.pattern=zipf",), f"{PHASE}.theta=2"),
    ((f"{PHASE}.pattern=strided",), f"{PHASE}.stride=128 B"),
    ((), "vmm.parameters.cpuid=999"),
    (("vmm.personality=kvm",), "vmm.lengths=linux-4.19"),
    (("vmm.technique=trap-and-emulate", "machine.isa=virtualizable", "vmm.hosted=true"), "vmm.lengths=linux-4.19"),
    ((SHADOW,), "vmm.parameters.out_of_sync=0"),
    ((SHADOW,), "vmm.parameters.shadow_prefetch=1"),
)


def run(*sets: str, text: str = SCENARIO) -> Result:
    return simulate(parse_scenario(text, sets))


def measured(result: Result) -> dict[str, Any]:
    """All that was counted; not what was set, said or took of our own time."""
    apart = ("rate", "notes", "parameters", "profile_digest")
    return {field.name: getattr(result, field.name) for field in attrs.fields(Result) if field.name not in apart}


def notes(result: Result, setting: str) -> list[str]:
    path = setting.partition("=")[0]
    return [note for note in result.notes if note.startswith(f"{path} ")]


@pytest.mark.parametrize(("where", "setting", "reason"), CASES, ids=[f"{' '.join(w)} {s}" for w, s, _ in CASES])
def test_what_has_no_effect_is_said_and_has_none(where: tuple[str, ...], setting: str, reason: str) -> None:
    with_it = run(*where, setting)

    assert notes(with_it, setting) == [f"{setting.partition('=')[0]} has no effect here: {reason}"]
    assert measured(with_it) == measured(run(*where))


@pytest.mark.parametrize(("where", "setting"), OTHERWISE, ids=[f"{' '.join(w)} {s}" for w, s in OTHERWISE])
def test_what_has_an_effect_is_not_said_to_have_none(where: tuple[str, ...], setting: str) -> None:
    with_it = run(*where, setting)

    assert notes(with_it, setting) == []
    assert measured(with_it) != measured(run(*where))


RECORDED = Path("workloads/real/linux-fork.yaml")


@pytest.mark.parametrize("setting", ["kpti=true", "pcid=false", "page_size=2 MiB", "tick=1 ms", "lengths=linux-4.19"])
def test_a_recorded_guest_has_its_own_kernel(setting: str) -> None:
    """Its interrupts are not called too many, either: they are those that were recorded."""
    plain, with_it = (simulate(load_scenario(RECORDED, sets)) for sets in ((), (f"{KERNEL}.{setting}",)))

    path = f"{KERNEL}.{setting.partition('=')[0]}"
    assert with_it.notes == (f"{path} has no effect here: a recorded guest has the kernel that was recorded",)
    assert measured(with_it) == measured(plain)


def test_a_file_system_needs_a_file() -> None:
    assert run(f"{KERNEL}.file_system.kind=host", text=NO_FILE).notes == (
        f"{KERNEL}.file_system.kind has no effect here: no process has a phase map_file",
    )


@pytest.mark.parametrize("technique", ["hardware", "paravirtual", "interpreter", "native"])
def test_nothing_is_said_of_what_nobody_set(technique: str) -> None:
    assert run(f"vmm.technique={technique}").notes == ()


def test_natively_nothing_of_vmm_is_said() -> None:
    assert run("vmm.technique=native", "vmm.ept.page_size=2 MiB", "vmm.pv.batch=1").notes == ()


def test_the_processor_says_what_a_setting_is_that_was_left_out() -> None:
    """On one without PCIDs `false` is what `auto` is."""
    scenario = parse_scenario(SCENARIO, [RING_3, "machine.profile=p4-672"])

    assert list(without_effect(scenario, load_profile("p4-672"))) == []


def test_every_rule_has_a_case() -> None:
    said = {reason for _, _, reason in CASES}
    rules = (*OF_MACHINES, *OF_PROFILES, *OF_HYPERVISORS, *OF_VMS, *OF_PHASES)

    assert {rule.reason for rule in rules} - said == {
        "there are no EPT tables", "no process has a phase map_file",
        "a recorded guest has the kernel that was recorded",
    }  # fmt: skip
