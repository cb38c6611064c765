"""Guests read the same from MSRs under every technique as natively, or get the same exception."""

from __future__ import annotations

import pytest

from vtsim.config import parse_scenario, resolve
from vtsim.platform.machine import Machine
from vtsim.study.equivalence import Equivalence, compare
from vtsim.study.run import without_hypervisor

# IA32_APIC_BASE, IA32_FEATURE_CONTROL, IA32_TSC_ADJUST, IA32_SPEC_CTRL, IA32_SYSENTER_CS, IA32_DEBUGCTL, memory types,
# IA32_PAT, APIC ID, version and spurious vector, IA32_XSS, IA32_EFER
READ = (
    0x1B, 0x3A, 0x3B, 0x48, 0x174, 0x1D9, 0x200, 0x250, 0x26F, 0x2FF, 0x277, 0x802, 0x803, 0x80F, 0xDA0, 0xC0000080,
)  # fmt: skip
MISSING = 0x1
TEXT = """
machine: {{isa: virtualizable, cpus: 2}}
vmm: {{technique: {technique}}}
vms:
  - memory: 16 MiB
    vcpus: {vcpus}
    guest:
      kernel: {{tick: off}}
      processes:
        - {{threads: {vcpus}, phases: [{phases}]}}
"""
TECHNIQUES = ("binary-translation", "dynamic-translation", "hardware", "interpreter", "paravirtual", "trap-and-emulate")


def told(technique: str, phases: list[str], vcpus: int = 1) -> Equivalence:
    text = TEXT.format(technique=technique, phases=", ".join(phases), vcpus=vcpus)
    scenario = resolve(parse_scenario(text), "msrs")
    return compare(without_hypervisor(scenario), scenario)


def read(index: int) -> str:
    return f"{{primitive: rdmsr, msr: {index:#x}, iterations: 1}}"


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_what_a_guest_reads_from_msrs_is_what_it_reads_natively(technique: str) -> None:
    found = told(technique, [read(index) for index in READ])

    assert found.differences == ()
    assert found.compared["application"] == len(READ)  # each call returned


def test_only_the_first_cpu_of_a_vm_is_its_bootstrap_processor() -> None:
    assert told("hardware", [read(0x1B)], vcpus=2).differences == ()


@pytest.mark.parametrize("technique", ["binary-translation", "interpreter"])
def test_an_msr_that_is_missing_is_the_same_exception(technique: str) -> None:
    found = told(technique, [read(MISSING)])

    assert found.differences == ()
    assert found.compared["exception"] == 1


def test_a_write_to_an_msr_that_nothing_may_change_is_an_exception() -> None:
    """IA32_FEATURE_CONTROL is locked.

    SDM: "Loading MSRs".
    """
    phases = "{primitive: wrmsr, msr: 0x3A, value: 7, iterations: 1}"
    outcome = Machine(parse_scenario(TEXT.format(technique="binary-translation", phases=phases, vcpus=1))).run()

    assert outcome.vms[0].stopped is not None
    assert "process 'app' was killed by #GP" in outcome.vms[0].stopped
