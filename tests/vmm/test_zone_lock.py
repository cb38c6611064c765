"""The zones of the buddy allocator where several CPUs take and give frames: one at a time, and each frame has one owner."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from tests.vmm.machines import MIB, Machine, machine
from tests.vmm.owners import check_owners, owned_or_free
from tests.vmm.shootdown import threads
from tests.vmm.test_dirty_log import writer
from vtsim.cpu import ops
from vtsim.cpu import slots as s
from vtsim.cpu.codes import PROGRAM_END
from vtsim.cpu.kernels.memory_hooks import BUDDY_GIVE, BUDDY_TAKE
from vtsim.vmm.memory_spec import HostMemorySpec
from vtsim.vmm.programs import several

BUDDY = HostMemorySpec(allocator="buddy")
SLOW = pytest.mark.compiled_only


def two_vms(pages: int, **options: object) -> Machine:
    """Two VMs on two CPUs, which fault on as many pages at the same time."""
    return machine(
        writer(pages), writer(pages), cpus=2, memory=4 * MIB, personality="minimal", placement=BUDDY, **options
    )


def stays_in_zones(m: Machine) -> list[tuple[int, int, int]]:
    """(CPU, cycle of its beginning, of its end) of every look at a zone, while CPUs are run op by op in order of time."""
    hooks = {i.at for i in m.hypervisor.program.instructions if i.op == ops.HOOK and i.imm in (BUDDY_TAKE, BUDDY_GIVE)}
    running, stays = {0, 1}, []
    while running:
        cpu = min(running, key=lambda number: int(m.engine.cpus[number][s.CYCLE]))
        record = m.engine.cpus[cpu]
        rip, begun = int(np.uint64(record[s.RIP])), int(record[s.CYCLE])
        if m.engine.run(cpu, ops=1) == PROGRAM_END:
            if not record[s.NONROOT]:
                running.remove(cpu)
                continue
            m.hypervisor.finish(cpu)
        elif rip in hooks:
            stays.append((cpu, begun, int(record[s.CYCLE])))
    return stays


def overlaps(stays: list[tuple[int, int, int]]) -> int:
    return sum(later[0] != one[0] and later[1] < one[2] for one, later in pairwise(stays))


def test_no_two_cpus_are_in_a_zone_at_the_same_time() -> None:
    stays = stays_in_zones(two_vms(12))

    assert len(stays) >= 24
    assert overlaps(stays) == 0


def test_without_the_lock_two_cpus_are_in_a_zone_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(several, "lock", lambda a, ticket, serving: None)

    assert overlaps(stays_in_zones(two_vms(12))) > 0


FAULTS = """
machine: {cpus: 2, memory: 256 MiB}
vmm: {huge_pages: never, memory: {allocator: buddy}}
vms:
  - memory: 32 MiB
    vcpus: 2
    guest:
      kernel: {tick: off}
      processes: [{threads: 2, phases: [{primitive: page_fault, region: 512 KiB, iterations: 2}]}]
"""
FOUR = ("machine.cpus=4", "vms.0.vcpus=4", "vms.0.guest.processes.0.threads=4")


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(("vmm.personality=minimal",), id="two"),
        pytest.param((*FOUR, "vmm.personality=minimal"), id="four", marks=SLOW),
        pytest.param(FOUR, id="four, kvm", marks=SLOW),
        pytest.param((*FOUR, "vmm.memory.fragmentation=50 %", "vmm.huge_pages=always"), id="four, blocks", marks=SLOW),
    ],
)
def test_threads_that_fault_at_the_same_time_get_frames_of_their_own(settings: tuple[str, ...]) -> None:
    ran = threads(FAULTS, *settings)
    hypervisor = ran.machine.hypervisor
    assert hypervisor is not None
    at_first = owned_or_free(hypervisor)
    ran.run(longest=20_000)

    assert ran.looked > 20
    check_owners(hypervisor, at_first)


@SLOW
def test_a_page_comes_from_the_node_of_the_vcpu_that_touches_it_first() -> None:
    ran = threads(FAULTS, "machine.nodes=2", "machine.memory=512 MiB")
    hypervisor = ran.machine.hypervisor
    assert hypervisor is not None
    zones = [hypervisor.word(vcpu, "ZONE") for vcpu in hypervisor.vcpus]
    before = [hypervisor.host.load(zone & (1 << 64) - 1) for zone in zones]
    ran.run(longest=20_000)

    assert zones[0] != zones[1]
    taken = [free - hypervisor.host.load(zone & (1 << 64) - 1) for zone, free in zip(zones, before, strict=True)]
    assert min(taken) > 16  # a thread's pages, and tables of the guest
    assert "other_node" not in hypervisor.memory_statistics(hypervisor.vcpus[0])


@SLOW
@pytest.mark.parametrize("allocator", ["list", "buddy"])
def test_no_page_of_a_vm_is_one_that_the_hypervisor_keeps_of_a_vcpu(allocator: str) -> None:
    ran = threads(FAULTS, f"vmm.memory.allocator={allocator}", "vmm.ept.populate=prebuilt", "vms.0.memory=128 MiB")
    hypervisor = ran.machine.hypervisor
    assert hypervisor is not None
    own = {frame for vcpu in hypervisor.vcpus for frame in (vcpu.page, vcpu.vmcs, vcpu.process.root)}
    frames = hypervisor.vcpus[0].memory.frames
    assert frames is not None and not own & set(frames.tolist())
