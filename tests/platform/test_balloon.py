"""Ballooning: what a guest gives is free on the host, and what it takes back is as good as new."""

from __future__ import annotations

import pytest

from tests.platform.test_swap import PAGE, REGION, counts, first_words
from vtsim.base.errors import ConfigError
from vtsim.config import parse_scenario
from vtsim.platform.machine import Machine
from vtsim.vmm import layout as at

PAGES = 40
TEXT = f"""
machine: {{memory: 64 MiB}}
vmm: {{personality: %s, balloon: {{size: 1 MiB, stop: %s}}}}
vms:
  - memory: 16 MiB
    guest:
      processes:
        - phases:
            - {{primitive: page_fault, region: {4 * PAGES} KiB}}
            - {{primitive: balloon, iterations: 2, period: 400 us}}
            - {{primitive: fill, region: {4 * PAGES} KiB, at: {REGION}, distinct: 4096}}
"""


def frames(machine: Machine) -> tuple[int, int]:
    """Frames that are free, and those that the VM has."""
    assert machine.hypervisor is not None
    (vcpu,) = machine.hypervisor.vcpus
    free = machine.hypervisor.host.load(machine.hypervisor.word(vcpu, "ZONE") & (1 << 64) - 1)
    leaves = (vcpu.process.find(at.USER_RAM + gfn * PAGE) for gfn in range(16 << 8))
    return free, sum(leaf is not None for leaf in leaves)


def ballooned(personality: str, stop: str) -> tuple[Machine, tuple[int, int]]:
    machine = Machine(parse_scenario(TEXT % (personality, stop)))
    before = frames(machine)
    machine.run()
    return machine, before


@pytest.mark.parametrize("personality", ("minimal", "kvm"))
def test_frames_of_the_balloon_come_back_when_the_host_gives_up_its_demand(personality: str) -> None:
    machine, before = ballooned(personality, "400 us")

    found = counts(machine)
    assert found["pages_ballooned"] == found["pages_deflated"] >= PAGES
    assert machine.vms[0].stopped is None
    assert first_words(machine, 0, PAGES) == [4096 - n for n in range(PAGES)]
    assert sum(frames(machine)) == sum(before)


def test_a_guest_that_gave_all_its_free_frames_has_none_for_its_processes() -> None:
    machine, before = ballooned("minimal", "never")

    assert machine.vms[0].stopped == "process 'app' was killed: the guest's memory is used up"
    assert counts(machine)["pages_ballooned"] >= PAGES
    free, given = frames(machine)
    assert free + given == sum(before) and given < before[1] + PAGES


def test_a_balloon_needs_small_pages() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_scenario(TEXT % ("kvm", "never"), ("vmm.ept.page_size=2 MiB",))

    (problem,) = caught.value.problems
    assert (problem.path, problem.message) == ("vmm.ept.page_size", "large pages are not given back in parts")
