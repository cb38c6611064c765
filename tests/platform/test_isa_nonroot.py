"""The analysis of non-root operation by execution, against what the manual says of exits."""

from __future__ import annotations

import json
from functools import cache

import pytest

from vtsim.platform.isa_nonroot import JudgedNonRoot, NonRootAnalysis, analyze_nonroot
from vtsim.study.isa_view import nonroot_json

# SDM: "Instructions That Cause VM Exits Unconditionally", those that the model has as ops
UNCONDITIONAL = {
    "CPUID", "GETSEC", "INVD", "XSETBV", "INVEPT", "INVVPID", "VMCALL", "VMCLEAR", "VMLAUNCH", "VMPTRLD", "VMPTRST",
    "VMRESUME", "VMXOFF", "VMXON",
}  # fmt: skip
# SDM: "Instructions That Cause VM Exits Conditionally"
CONDITIONAL = {
    "HLT": "HLT_EXITING", "INVLPG": "INVLPG_EXITING", "MWAIT": "MWAIT_EXITING", "RDTSC": "RDTSC_EXITING",
    "MOV_TO_CR3": "CR3_LOAD_EXITING", "MOV_FROM_CR3": "CR3_STORE_EXITING", "MOV_TO_CR8": "CR8_LOAD_EXITING",
    "MOV_FROM_CR8": "CR8_STORE_EXITING", "MOV_TO_DR": "MOV_DR_EXITING", "IN": "UNCONDITIONAL_IO_EXITING",
    "SGDT": "DESCRIPTOR_TABLE_EXITING", "WBINVD": "WBINVD_EXITING", "MOV_TO_CR0": "CR0_GUEST_HOST_MASK",
    "RDMSR": "without USE_MSR_BITMAPS", "INVPCID": "INVLPG_EXITING",
}  # fmt: skip

pytestmark = pytest.mark.compiled_only


@cache
def analysis(profile: str = "skx-4114") -> NonRootAnalysis:
    return analyze_nonroot(profile)


@cache
def judged(profile: str = "skx-4114") -> dict[tuple[str, str], JudgedNonRoot]:
    return {(each.op, each.ring): each for each in analysis(profile).ops}


def test_what_the_manual_says_exits_always_exits_under_no_control_and_is_no_offender() -> None:
    always = {op for (op, ring), each in judged().items() if each.exits == "always" and ring == "N0"}

    assert always >= UNCONDITIONAL
    assert not always & set(analysis().offenders_without_controls)


def test_each_conditional_exit_has_its_one_control() -> None:
    assert {op: judged()[op, "N0"].exits for op in CONDITIONAL} == CONDITIONAL


def test_with_all_controls_nothing_is_sensitive_without_an_exit() -> None:
    assert analysis().offenders == ()


def test_without_controls_time_devices_and_the_processor_are_not_the_monitors() -> None:
    free = {op: each.free for (op, ring), each in judged().items() if ring == "N0"}

    assert free["RDTSC"].depends == ("another time",)
    assert free["IN"].depends == ("another device",)
    assert free["OUT"].changes == ("device",)
    assert free["HLT"].changes == ("the processor stops",)
    assert free["MOV_FROM_CR4"].depends == ("non-root operation",)  # CR4.VMXE is 1


def test_what_a_vm_entry_loads_is_the_guests_own() -> None:
    for op in ("SGDT", "SIDT", "SLDT", "STR", "LGDT", "LIDT", "MOV_TO_CR3", "POPF", "IRET", "CLI", "MOV", "SYSCALL"):
        assert not judged()[op, "N0"].free, op


def test_the_first_processors_with_vmx_exit_at_every_access_to_cr3() -> None:
    old = judged("p4-672")

    assert {old[op, "N0"].exits for op in ("MOV_TO_CR3", "MOV_FROM_CR3")} == {"always"}


def test_the_json_says_what_the_analysis_found() -> None:
    said = json.loads(nonroot_json(analysis()))

    assert said["virtualizable_with_all_controls"] is True
    assert said["virtualizable_without_controls"] is False
    assert said["ops"]["HLT"]["N0"]["without_controls"] == {"changes": ["the processor stops"], "depends_on": []}
    assert said["ops"]["HLT"]["N0"]["exits"] == "HLT_EXITING"
