"""What a scenario may say about the vCPUs of a VM."""

from __future__ import annotations

from itertools import product
from statistics import mean

import pytest

from vtsim.base import memory as mem
from vtsim.base.errors import ConfigError
from vtsim.config import parse_scenario
from vtsim.cpu import slots as s
from vtsim.platform.machine import Machine
from vtsim.vmcs.fields import SLOT

TWO = """
machine: {cpus: 3, memory: 256 MiB}
vms:
  - memory: 64 MiB
    vcpus: 2
    guest:
      processes:
        - threads: 2
          phases: [{primitive: cpuid, iterations: 3}]
"""
OTHERS = "is built for VMs of one vCPU, and vms.0 has 2"
WRONG = (
    ("vms.0.vcpus=4", "vms.0.vcpus", "each vCPU needs a logical CPU of its own, and the machine has 3"),
    ("vms.0.cpus=[0, 3]", "vms.0.cpus", "there is no CPU 3 on a machine whose number of CPUs is 3"),
    ("vms.0.cpus=[1, 1]", "vms.0.cpus", "this lists a different CPU for each of several vCPUs"),
    ("vms.0.cpus=[1]", "vms.0.cpus", "this lists a different CPU for each of several vCPUs"),
    (
        "vms.0.guest.processes.0.threads=3",
        "vms.0.guest.processes.0.threads",
        "each thread of a process needs a vCPU of its own, and the VM has 2",
    ),
    (
        "vms.0.guest.processes.0.vcpu=2",
        "vms.0.guest.processes.0.vcpu",
        "there is no vCPU 2 in a VM whose number of vCPUs is 2",
    ),
    *(
        (
            f"vms.0.guest.processes.0.phases.0={{primitive: {primitive}}}",
            "vms.0.guest.processes.0.phases.0",
            f"a process of several threads has no {words}",
        )
        for primitive, words in (
            ("fork", "children"),
            ("exec", "children"),
            ("process", "children"),
            ("dma_buffers", "driver of devices"),
            ("attack_dma, target: 4096", "driver of devices"),
        )
    ),
    (
        "vmm={paging: shadow, features: {exit_clustering: true}}",
        "vmm.features.exit_clustering",
        f"exit clustering on shadow tables {OTHERS}",
    ),
    (
        "vmm={paging: agile, features: {exit_clustering: true}}",
        "vmm.features.exit_clustering",
        f"exit clustering on shadow tables {OTHERS}",
    ),
    ("vmm={paging: direct-pv, technique: user-mode}", "vmm.technique", f"technique 'user-mode' {OTHERS}"),
    ("vmm.technique=trap-and-emulate", "vmm.technique", f"technique 'trap-and-emulate' {OTHERS}"),
    ("vmm.technique=binary-translation", "vmm.technique", f"technique 'binary-translation' {OTHERS}"),
    (
        "vms.0.guest.processes.0.phases.0={primitive: balloon}",
        "vms.0.guest.processes.0.phases.0",
        "a process of several threads has no balloon driver",
    ),
    (
        "vms.0.devices=[i440fx]",
        "vms.0.devices",
        "a chipset whose registers move memory is built for VMs of one vCPU",
    ),
)


@pytest.mark.parametrize(("setting", "path", "message"), WRONG, ids=[row[0] for row in WRONG])
def test_what_several_vcpus_cannot_be_is_refused_by_its_path(setting: str, path: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_scenario(TWO, [setting])

    assert (path, message) in [(problem.path, problem.message) for problem in caught.value.problems]
    assert all(problem.help for problem in caught.value.problems)


def test_a_vm_of_several_vcpus_has_one_balloon_driver() -> None:
    processes = "[{phases: [{primitive: balloon}]}, {name: other, phases: [{primitive: balloon}]}]"
    text = f"machine: {{cpus: 2}}\nvms: [{{vcpus: 2, guest: {{processes: {processes}}}}}]"
    with pytest.raises(ConfigError) as caught:
        parse_scenario(text)

    assert [(problem.path, problem.message) for problem in caught.value.problems] == [
        ("vms.0.guest.processes.1", "a VM of several vCPUs has one balloon driver, which is in process 0")
    ]


@pytest.mark.parametrize(
    ("setting", "cpus"), [("vms.0.cpu=auto", (0, 1)), ("vms.0.cpu=2", (2, 0)), ("vms.0.cpus=[2, 1]", (2, 1))]
)
def test_vcpus_are_pinned_where_the_scenario_says_or_from_the_first_on(setting: str, cpus: tuple[int, ...]) -> None:
    assert parse_scenario(TWO, [setting]).vms[0].cpus == cpus


@pytest.mark.slow
@pytest.mark.parametrize("how", ["vmm.personality=kvm", "vmm.personality=minimal", "vmm.technique=paravirtual"])
def test_when_a_guest_of_two_vcpus_ends_both_do_and_other_vms_go_on(how: str) -> None:
    cpu = 2 if "paravirtual" in how else 1
    settings = (how, "vms.1.memory=64MiB", f"vms.1.cpu={cpu}", "vms.0.guest.kernel.tick=off")
    longer = "vms.1.guest.processes.0.phases=[{primitive: work, instructions: 30000000}]"
    outcome = Machine(parse_scenario(TWO + BESIDE, [*settings, longer])).run()

    first, second = outcome.vms
    assert (first.stopped, second.stopped) == (None, None)
    assert 0 < first.elapsed < second.elapsed


@pytest.mark.slow
@pytest.mark.parametrize("size", ["4 KiB", "2 MiB"])
def test_threads_that_fault_on_one_page_at_once_find_a_frame_each(size: str) -> None:
    """One of them gives its frame back: what is there must be more than what is mapped in the end."""
    settings = (
        f"vms.0.guest.kernel={{tick: off, page_size: {size}}}",
        "vms.0.guest.processes.0.phases=[{primitive: stream, accesses: 40, region: 2 MiB, work: 9}]",
    )
    outcome = Machine(parse_scenario(TWO, list(settings))).run()

    assert outcome.vms[0].stopped is None


BESIDE = """
  - guest: {processes: [{phases: [{primitive: cpuid}]}]}
"""


LOCKS = """
machine: {memory: 512 MiB, cpus: 3}
vms:
  - memory: 128 MiB
    vcpus: 3
    guest:
      kernel: {tick: off, populate: prebuilt}
      processes:
        - {threads: 3, phases: [{primitive: stream, pattern: strided, stride: 4 KiB, write: 100 %, region: 1536 KiB, accesses: 384}]}
"""


@pytest.mark.slow
@pytest.mark.parametrize("profile", ["skx-4114", "snb-e5-2450"])
def test_a_lock_between_vcpus_is_handed_on_in_time(profile: str) -> None:
    """Each page of a thread's own is an EPT violation under the VM's lock, which the others wait for meanwhile.

    Where in its loop a CPU is when the lock is free depends on the lengths of paths and on the quantum, so that one of
    either is off by up to 1 %; the mean of several is not. A quantum that lets CPUs see what is done later takes 1.3
    % from each.
    """

    def elapsed(*quanta: str) -> float:
        took = []
        for quantum, length in product(quanta, range(640, 720, 20)):
            lengths = [f"vmm.parameters.get_user_page={length}", "vmm.parameters.map_page=1100"]
            outcome = Machine(
                parse_scenario(LOCKS, [f"machine.profile={profile}", f"machine.quantum={quantum}", *lengths])
            ).run()
            assert outcome.approximations == ()
            took.append(outcome.elapsed)
        return mean(took)

    assert elapsed("null", "37", "31", "23", "17") == pytest.approx(elapsed("1"), rel=0.005)


@pytest.mark.slow
def test_a_quantum_in_which_a_lock_changes_hands_is_stated() -> None:
    outcome = Machine(parse_scenario(LOCKS, ["machine.quantum=1100"])).run()

    assert outcome.approximations == (
        "CPUs advance by a quantum of 1100 cycles; the smallest latency between them is 44",
    )


def test_when_a_vcpu_dies_its_vm_does() -> None:
    text = TWO.replace("{primitive: cpuid, iterations: 3}", "{primitive: stream, region: 64 KiB, accesses: 1000}")
    machine = Machine(parse_scenario(text, ["vmm.personality=minimal"]))
    hypervisor = machine.hypervisor
    assert hypervisor is not None
    second = hypervisor.vcpus[1]
    machine.engine.contents(second.vmcs, mem.VMCS_REGION)[SLOT["GUEST_IDTR_LIMIT"]] = 0  # no gate for its page fault
    outcome = machine.run()

    assert outcome.vms[0].stopped == "VM exit TRIPLE_FAULT"
    while any(not hypervisor.death(vcpu) for vcpu in hypervisor.vcpus):
        machine.engine.run_all(max(int(m[s.CYCLE]) for m in machine.engine.cpus) + 10_000, machine.quantum)
    assert [hypervisor.death(vcpu) for vcpu in hypervisor.vcpus] == ["VM exit TRIPLE_FAULT"] * 2
