"""Every basic exit reason, caused through the engine; or the one place that excuses it.

SDM: "VMX Basic Exit Reasons"; "Basic VM-Exit Information"; "Other Causes of VM Exits".
"""

from __future__ import annotations

from typing import Final

import pytest

from tests.vmcs.control_cases import CASES as CONTROL_CASES
from tests.vmcs.control_cases import WRITE
from tests.vmcs.guests import APIC_ACCESS, CODE, DATA, DATA1, EPT_DATA, GUEST_AREA, VIRTUAL_APIC, Guest, quad
from vtsim.cpu import slots as s
from vtsim.cpu.kernels.apic import VALID_SIPI
from vtsim.vmcs import reasons as x
from vtsim.vmcs.coverage import WITHOUT_EFFECT

TWICE = ("9090", "f390f390")  # codes of more than one instruction


def by_control(name: str, control: str) -> dict[str, tuple[Guest, str]]:
    """The exit of a control's case."""
    return {name: (CONTROL_CASES[control][0], control)}


def code(name: str, text: str, controls: str = "", **more: object) -> dict[str, tuple[Guest, str]]:
    """The exit of some code."""
    return {name: (Guest(code=text, controls=controls, **more), "")}  # type: ignore[arg-type]


# fmt: off
CASES: Final[dict[str, tuple[Guest, str]]] = {
    **code("EXCEPTION_NMI",       "0f0b", fields={"EXCEPTION_BITMAP": 1 << 6}),
    **by_control("EXTERNAL_INTERRUPT", "EXTERNAL_INTERRUPT_EXITING"),
    **code("TRIPLE_FAULT",        "0f0b", fields={"GUEST_IDTR_LIMIT": 0}),
    **code("INIT_SIGNAL",         "9090", record={s.INIT_PENDING: 1}),
    **code("SIPI_SIGNAL",         "9090", record={s.SIPI_PENDING: VALID_SIPI | 0x55}, fields={"GUEST_ACTIVITY_STATE": 3}),
    **by_control("INTERRUPT_WINDOW", "INTERRUPT_WINDOW_EXITING"),
    **by_control("NMI_WINDOW",    "NMI_WINDOW_EXITING"),
    **code("TASK_SWITCH",         "9a000000008000", base="b32"),
    **code("CPUID",               "0fa2"),
    **code("GETSEC",              "0f37", fields={"GUEST_CR4": 0x46620}),
    **by_control("HLT",           "HLT_EXITING"),
    **code("INVD",                "0f08"),
    **by_control("INVLPG",        "INVLPG_EXITING"),
    **by_control("RDPMC",         "RDPMC_EXITING"),
    **by_control("RDTSC",         "RDTSC_EXITING"),
    **code("VMCALL",              "0f01c1"),
    **code("VMCLEAR",             "660fc731"),
    **code("VMLAUNCH",            "0f01c2"),
    **code("VMPTRLD",             "0fc731"),
    **code("VMPTRST",             "0fc739"),
    **code("VMREAD",              "0f78d8"),
    **code("VMRESUME",            "0f01c3"),
    **code("VMWRITE",             "0f79d8"),
    **code("VMOFF",               "0f01c4"),
    **code("VMON",                "f30fc731"),
    **by_control("CR_ACCESS",     "CR3_LOAD_EXITING"),
    **by_control("DR_ACCESS",     "MOV_DR_EXITING"),
    **by_control("IO_INSTRUCTION", "UNCONDITIONAL_IO_EXITING"),
    **code("MSR_READ",            "0f32"),
    **code("MSR_WRITE",           "0f30"),
    **code("INVALID_STATE",       "", fields={"GUEST_RFLAGS": 0}),
    **code("MSR_LOAD_FAIL",       "", fields={"ENTRY_MSR_LOAD_COUNT": 1}, memory={GUEST_AREA: quad(0xC0000100, 0)}),
    **by_control("MWAIT_INSTRUCTION", "MWAIT_EXITING"),
    **by_control("MONITOR_TRAP_FLAG", "MONITOR_TRAP_FLAG"),
    **by_control("MONITOR_INSTRUCTION", "MONITOR_EXITING"),
    **by_control("PAUSE_INSTRUCTION", "PAUSE_EXITING"),
    **code("TPR_BELOW_THRESHOLD", WRITE, "USE_TPR_SHADOW VIRTUALIZE_APIC_ACCESSES", fields={"TPR_THRESHOLD": 5},
           gpr={"rcx": APIC_ACCESS + 0x80}, memory={VIRTUAL_APIC + 0x80: "f0"}),
    **by_control("APIC_ACCESS",   "VIRTUALIZE_APIC_ACCESSES"),
    **code("EOI_INDUCED",         WRITE, "USE_TPR_SHADOW VIRTUALIZE_APIC_ACCESSES VIRTUAL_INTERRUPT_DELIVERY",
           gpr={"rcx": APIC_ACCESS + 0xB0}, fields={"GUEST_INTERRUPT_STATUS": 0x4100, "EOI_EXIT_BITMAP_1": 2}),
    **by_control("GDTR_IDTR",     "DESCRIPTOR_TABLE_EXITING"),
    **code("LDTR_TR",             "0f0001", "DESCRIPTOR_TABLE_EXITING", gpr={"rcx": DATA}),
    **code("EPT_VIOLATION",       WRITE, gpr={"rcx": DATA1}, memory={EPT_DATA: quad(0x829031)}),
    **code("EPT_MISCONFIG",       WRITE, gpr={"rcx": DATA1}, memory={EPT_DATA: quad(0x829032)}),
    **code("INVEPT",              "660f388001"),
    **code("RDTSCP",              "0f01f9", "ENABLE_RDTSCP RDTSC_EXITING"),
    **by_control("PREEMPTION_TIMER", "ACTIVATE_PREEMPTION_TIMER"),
    **code("INVVPID",             "660f388101"),
    **by_control("WBINVD",        "WBINVD_EXITING"),
    **code("XSETBV",              "0f01d1"),
    **code("APIC_WRITE",          WRITE, "USE_TPR_SHADOW VIRTUALIZE_APIC_ACCESSES APIC_REGISTER_VIRTUALIZATION",
           gpr={"rcx": APIC_ACCESS + 0x320}),
    **by_control("RDRAND",        "RDRAND_EXITING"),
    **code("INVPCID",             "660f388201", "ENABLE_INVPCID INVLPG_EXITING"),
    **by_control("VMFUNC",        "ENABLE_VM_FUNCTIONS"),
    **by_control("ENCLS",         "ENABLE_ENCLS_EXITING"),
    **by_control("RDSEED",        "RDSEED_EXITING"),
    **by_control("PML_FULL",      "ENABLE_PML"),
    **code("XSAVES",              "0fc729", "ENABLE_XSAVES_XRSTORS", fields={"XSS_EXITING_BITMAP": 0x100},
           gpr={"rax": 0x100}, record={s.MSR_XSS: 0x100}),
    **code("XRSTORS",             "0fc719", "ENABLE_XSAVES_XRSTORS", fields={"XSS_EXITING_BITMAP": 0x100},
           gpr={"rax": 0x100}, record={s.MSR_XSS: 0x100}),
    **by_control("PCONFIG",       "ENABLE_PCONFIG"),
    **code("UMWAIT",              "f20faef0", "ENABLE_USER_WAIT_AND_PAUSE RDTSC_EXITING"),
    **code("TPAUSE",              "660faef0", "ENABLE_USER_WAIT_AND_PAUSE RDTSC_EXITING"),
    **by_control("LOADIWKEY",     "LOADIWKEY_EXITING"),
    **by_control("ENCLV",         "ENABLE_ENCLV_EXITING"),
}
# fmt: on


def test_every_reason_has_a_cause_or_an_excuse_and_none_has_both() -> None:
    excused = {name.removeprefix("reason ") for name in WITHOUT_EFFECT if name.startswith("reason ")}

    assert x.REASON.keys() - CASES.keys() == excused
    assert CASES.keys() <= x.REASON.keys()


@pytest.mark.parametrize("name", CASES)
def test_what_the_manual_names_causes_the_exit(name: str) -> None:
    """An exit that an instruction causes points at it and says how long it is."""
    guest, control = CASES[name]
    got = guest.run(control)
    failed = name in ("INVALID_STATE", "MSR_LOAD_FAIL")

    assert got.fields["EXIT_REASON"] == x.REASON[name].number | (x.ENTRY_FAILURE if failed else 0)
    if x.REASON[name].instruction and guest.code not in TWICE:
        assert got.fields["EXIT_INSTRUCTION_LENGTH"] == len(guest.code) // 2
        assert got.fields["GUEST_RIP"] == CODE
