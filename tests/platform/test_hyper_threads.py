"""Machines whose cores have two logical CPUs: what guests see is the same, what it takes is not."""

from __future__ import annotations

from typing import Any

import pytest

from vtsim.base.errors import ConfigError
from vtsim.config import parse_scenario
from vtsim.study.equivalence import compare
from vtsim.study.run import run, simulate

BESIDE = """
machine: {cpus: 2, threads: 2, memory: 128 MiB}
vms:
  - name: one
    memory: 16 MiB
    guest:
      kernel: {page_size: 4 KiB}
      processes: [{phases: [{primitive: stream, pattern: uniform, region: 4 MiB, accesses: 700}]}]
  - name: other
    memory: 16 MiB
    guest:
      kernel: {page_size: 4 KiB}
      processes: [{phases: [{primitive: stream, pattern: uniform, region: 4 MiB, accesses: 700}]}]
"""
TOGETHER = """
machine: {cpus: 2, threads: 2, memory: 256 MiB}
vms:
  - memory: 64 MiB
    vcpus: 2
    guest:
      kernel: {page_size: 4 KiB, populate: demand}
      processes:
        - threads: 2
          phases: [{primitive: page_fault, region: 128 KiB}, {primitive: protect, region: 64 KiB, iterations: 2}]
"""


def elapsed(result: Any, vm: str) -> int:
    return int(result.vms[vm].cycles.elapsed)


@pytest.mark.slow
def test_two_vms_on_one_core_take_longer_than_on_two() -> None:
    shared, apart = (simulate(parse_scenario(BESIDE, sets).resolved("x")) for sets in ([], ["machine.threads=1"]))
    for vm in ("one", "other"):
        assert elapsed(shared, vm) > 1.05 * elapsed(apart, vm)
        assert shared.vms[vm].guest == apart.vms[vm].guest
        assert shared.vms[vm].cycles.by["N3"]["shared_core"] > 0
        assert "shared_core" not in apart.vms[vm].cycles.by["N3"]


@pytest.mark.slow
def test_a_vm_whose_core_is_its_own_loses_nothing_to_a_cpu_that_is_idle() -> None:
    """But what is divided anyway: here no TLB is."""
    idle = "vms.1.guest.processes.0.phases=[{primitive: cpuid, iterations: 1}]"
    apart, beside = (
        simulate(parse_scenario(BESIDE, [idle, *sets]).resolved("x")) for sets in (["machine.threads=1"], [])
    )
    assert elapsed(beside, "one") == pytest.approx(elapsed(apart, "one"), rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("paging", ["ept", "shadow", "agile"])
def test_guests_of_two_vcpus_see_the_same_on_one_core_and_on_two(paging: str) -> None:
    shared, apart = (
        parse_scenario(TOGETHER, [f"vmm.paging={paging}", *sets]).resolved("x") for sets in ([], ["machine.threads=1"])
    )
    equivalence = compare(shared, apart)
    assert equivalence.equivalent, equivalence.differences
    assert equivalence.compared["application"]


@pytest.mark.parametrize("cpus", [1, 3])
def test_half_a_core_is_refused(cpus: int) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_scenario(BESIDE, [f"machine.cpus={cpus}"])
    (problem,) = (each for each in caught.value.problems if each.path == "machine.threads")
    assert problem.message == f"cores of 2 logical CPUs do not make a machine of {cpus}"
    assert problem.help == f"machine.cpus can be {cpus + 1}, or any other even number; or threads 1"


@pytest.mark.slow
def test_natively_a_vm_of_one_vcpu_has_a_core_whose_other_cpu_is_idle() -> None:
    result = run(parse_scenario(BESIDE, []))
    assert result.vms["one"].slowdown > 1.0
