"""Five levels of paging and of EPT under a whole guest and hypervisor."""

from __future__ import annotations

import pytest

import vtsim
from vtsim.base.errors import ConfigError
from vtsim.config import parse_scenario
from vtsim.platform.machine import Machine
from vtsim.platform.walk import EVERY_ENTRY

GUEST = """
machine: {memory: 128 MiB, cpu: {features.la57: true, vmx.generation: ice-lake-sp}}
vmm: {personality: minimal}
vms:
- memory: 32 MiB
  guest:
    kernel: {tick: off, kpti: true}
    processes:
    - name: faults
      phases: [{primitive: page_fault, region: 64 KiB}, {primitive: fork, iterations: 1, pages: 2}]
    - name: reads
      phases: [{primitive: stream, region: 64 KiB, accesses: 50, write: 0.5}]
"""


@pytest.mark.parametrize("technique", ["hardware", "native"])
def test_levels_change_no_page_fault_and_nothing_that_processes_see(technique: str) -> None:
    sets = [f"vmm.technique={technique}"]
    four = Machine(parse_scenario(GUEST, sets)).run()
    five = Machine(parse_scenario(GUEST, [*sets, "vms.0.guest.kernel.paging=5-level", "vmm.ept.levels=5"])).run()
    before, after = four.owners["vm0"], five.owners["vm0"]

    assert [vm.stopped for vm in five.vms] == [None]
    assert after.counters["page_faults"] == before.counters["page_faults"] > 16
    assert after.counters["guest_references"] > before.counters["guest_references"]


@pytest.mark.parametrize(("guest", "ept", "references"), [(4, 4, 24), (4, 5, 29), (5, 4, 29), (5, 5, 35)])
def test_a_walk_of_a_whole_guest_has_a_reference_for_every_crossing(guest: int, ept: int, references: int) -> None:
    sets = (
        f"vms.0.guest.kernel.paging={guest}-level", f"vmm.ept.levels={ept}", "vmm.ept.populate=prebuilt",
        "vms.0.guest.kernel.populate=prebuilt", *EVERY_ENTRY,
    )  # fmt: skip
    found = vtsim.walk(parse_scenario(GUEST, sets), 0x400000, access="fetch")

    assert len(found.references) == references == (guest + 1) * (ept + 1) - 1


def test_a_processor_without_them_is_refused_with_what_would_do() -> None:
    with pytest.raises(ConfigError) as raised:
        parse_scenario(
            GUEST, ["machine.cpu={}", "vms.0.guest.kernel.paging=5-level", "vmm.ept.levels=5"]
        )  # fmt: skip

    assert [(problem.path, problem.message) for problem in raised.value.problems] == [
        ("vmm.ept.levels", "this needs EPT of five levels (EPT_WALK_LENGTH_5), which profile 'skx-4114' does not have"),
        (
            "vms.0.guest.kernel.paging",
            "this needs 57-bit linear addresses, which profile 'skx-4114' does not have",
        ),
    ]
