"""Every check of VM entry: a VMCS that makes exactly it fail, and what the failure then is.

SDM: "Checks on VMX Controls"; "Checks on Host Control Registers, MSRs, and SSP"; "Checks Related to Address-Space Size".
SDM: "Checks on Host Segment and Descriptor-Table Registers"; "Checks on Guest Segment Registers".
SDM: "Checks on Guest Control Registers, Debug Registers, and MSRs"; "Checks on Guest Descriptor-Table Registers".
SDM: "Checks on Guest RIP, RFLAGS, and SSP"; "Checks on Guest Non-Register State".
SDM: "Checks on Guest Page-Directory-Pointer-Table Entries".
"""

from __future__ import annotations

import pytest

from tests.vmcs.checked import ALL, NEHALEM, RECORDED, environment, processor
from vtsim.study.vmx.check import failed_checks
from vtsim.vmcs import checks as c

APIC = "USE_TPR_SHADOW VIRTUAL_INTERRUPT_DELIVERY"
POSTED = f"{APIC} PROCESS_POSTED_INTERRUPTS EXIT_ACKNOWLEDGE_INTERRUPT"
SECOND = "ACTIVATE_SECONDARY_CONTROLS"
THIRD = "ACTIVATE_TERTIARY_CONTROLS"
MORE_EXIT = "EXIT_ACTIVATE_SECONDARY_CONTROLS"
INFORMATION, BLOCKING, PENDING = (
    "ENTRY_INTERRUPTION_INFORMATION", "GUEST_INTERRUPTIBILITY_STATE", "GUEST_PENDING_DEBUG_EXCEPTIONS",
)  # fmt: skip
VALID, EXTERNAL, NMI = 1 << 31, 0x80000020, 0x80000202
WIDE, IF, TF = 1 << 40, 0x202, 0x102

# fmt: off
# check: base state, controls, fields
CASES: dict[str, tuple[str, str, dict[str, int]]] = {
    "PIN_RESERVED":                  ("b64e", "", {"PIN_CONTROLS": 0x1}),
    "PRIMARY_RESERVED":              ("b64e", "", {"PRIMARY_PROC_CONTROLS": 0x84006170}),
    "SECONDARY_RESERVED":            ("b64e", "", {"SECONDARY_PROC_CONTROLS": 0x20000022}),
    "TERTIARY_RESERVED":             ("b64e", THIRD, {"TERTIARY_PROC_CONTROLS": 1 << 60}),
    "CR3_TARGETS":                   ("b64e", "", {"CR3_TARGET_COUNT": 5}),
    "IO_BITMAPS":                    ("b64e", "USE_IO_BITMAPS", {"IO_BITMAP_B": 0x819001}),
    "MSR_BITMAP":                    ("b64e", "USE_MSR_BITMAPS", {"MSR_BITMAPS": WIDE}),
    "VIRTUAL_APIC_PAGE":             ("b64e", "USE_TPR_SHADOW", {"VIRTUAL_APIC_ADDRESS": 0x81D010}),
    "TPR_THRESHOLD_RESERVED":        ("b64e", "USE_TPR_SHADOW", {"TPR_THRESHOLD": 0x10}),
    "TPR_THRESHOLD_ABOVE_VTPR":      ("b64e", "USE_TPR_SHADOW", {"TPR_THRESHOLD": 1}),
    "NMI_EXITING_FOR_VIRTUAL_NMIS":  ("b64e", "VIRTUAL_NMIS", {}),
    "VIRTUAL_NMIS_FOR_WINDOW":       ("b64e", "NMI_WINDOW_EXITING", {}),
    "APIC_ACCESS_PAGE":              ("b64e", "VIRTUALIZE_APIC_ACCESSES", {"APIC_ACCESS_ADDRESS": 0x81E800}),
    "TPR_SHADOW_FOR_APIC":           ("b64e", "APIC_REGISTER_VIRTUALIZATION", {}),
    "X2APIC_OR_ACCESSES":            ("b64e", "USE_TPR_SHADOW VIRTUALIZE_X2APIC_MODE VIRTUALIZE_APIC_ACCESSES", {}),
    "EXTERNAL_EXITING_FOR_DELIVERY": ("b64e", f"{APIC} -EXTERNAL_INTERRUPT_EXITING", {}),
    "POSTED_CONTROLS":               ("b64e", "PROCESS_POSTED_INTERRUPTS", {}),
    "POSTED_VECTOR":                 ("b64e", POSTED, {"POSTED_INTERRUPT_NOTIFICATION_VECTOR": 0x1F2}),
    "POSTED_DESCRIPTOR":             ("b64e", POSTED, {"POSTED_INTERRUPT_DESCRIPTOR_ADDRESS": 0x81F020}),
    "VPID_ZERO":                     ("b64e", "", {"VPID": 0}),
    "EPTP_MEMORY_TYPE":              ("b64e", "", {"EPT_POINTER": 0x81001B}),
    "EPTP_WALK_LENGTH":              ("b64e", "", {"EPT_POINTER": 0x81000E}),
    "EPTP_ACCESSED_DIRTY":           ("b64e", "", {"EPT_POINTER": 0x81005E, "HOST_CR4": 0x2620, "GUEST_CR4": 0x2620}),
    "EPTP_SHADOW_STACK":             ("b64e", "", {"EPT_POINTER": 0x81009E}),
    "EPTP_RESERVED":                 ("b64e", "", {"EPT_POINTER": 0x81091E}),
    "PML_WITHOUT_EPT":               ("b64", f"{SECOND} ENABLE_PML", {}),
    "PML_ADDRESS":                   ("b64e", "ENABLE_PML", {"PML_ADDRESS": 0x824004}),
    "UNRESTRICTED_WITHOUT_EPT":      ("b64", f"{SECOND} UNRESTRICTED_GUEST", {}),
    "MODE_BASED_WITHOUT_EPT":        ("b64", f"{SECOND} MODE_BASED_EXECUTE_CONTROL", {}),
    "SUB_PAGE_WITHOUT_EPT":          ("b64", f"{SECOND} SUB_PAGE_WRITE_PERMISSIONS", {}),
    "SUB_PAGE_TABLE":                ("b64e", "SUB_PAGE_WRITE_PERMISSIONS", {"SUB_PAGE_PERMISSION_TABLE_POINTER": 1}),
    "VM_FUNCTIONS_RESERVED":         ("b64e", "ENABLE_VM_FUNCTIONS", {"VM_FUNCTION_CONTROLS": 2}),
    "EPTP_SWITCHING_WITHOUT_EPT":    ("b64", f"{SECOND} ENABLE_VM_FUNCTIONS", {"VM_FUNCTION_CONTROLS": 1}),
    "EPTP_LIST":                     ("b64e", "ENABLE_VM_FUNCTIONS EPTP_SWITCHING", {"EPTP_LIST_ADDRESS": 0x817008}),
    "SHADOWING_BITMAPS":             ("b64e", "VMCS_SHADOWING", {"VMWRITE_BITMAP_ADDRESS": 0x81C001}),
    "VE_INFORMATION":                ("b64e", "EPT_VIOLATION_VE", {"VE_INFORMATION_ADDRESS": 0x823001}),
    "PT_ADDRESSES":                  ("b64e", "PT_USES_GUEST_PHYSICAL_ADDRESSES", {}),
    "TSC_MULTIPLIER_ZERO":           ("b64e", "USE_TSC_SCALING", {"TSC_MULTIPLIER": 0}),
    "HLAT_WITHOUT_EPT":              ("b64", f"{THIRD} ENABLE_HLAT", {}),
    "HLAT_TABLE":                    ("b64e", f"{THIRD} ENABLE_HLAT", {"HLAT_POINTER": 0x20}),
    "HLAT_PREFIX":                   ("b64e", f"{THIRD} ENABLE_HLAT", {"HLAT_PREFIX_SIZE": 64}),
    "PAGING_WRITE_WITHOUT_EPT":      ("b64", f"{THIRD} EPT_PAGING_WRITE_CONTROL", {}),
    "GUEST_PAGING_WITHOUT_EPT":      ("b64", f"{THIRD} GUEST_PAGING_VERIFICATION", {}),
    "PID_TABLE":                     ("b64e", f"{APIC} {THIRD} IPI_VIRTUALIZATION", {"PID_POINTER_TABLE_ADDRESS": 4}),
    "PID_TABLE_END":                 ("b64e", f"{APIC} {THIRD} IPI_VIRTUALIZATION",
                                      {"PID_POINTER_TABLE_ADDRESS": WIDE - 8, "LAST_PID_POINTER_INDEX": 1}),
    "APIC_TIMER_DELIVERY":           ("b64e", f"{THIRD} APIC_TIMER_VIRTUALIZATION", {"VIRTUAL_TIMER_VECTOR": 16}),
    "APIC_TIMER_VECTOR":             ("b64e", f"{APIC} {THIRD} APIC_TIMER_VIRTUALIZATION", {"VIRTUAL_TIMER_VECTOR": 15}),
    "PASID_DIRECTORIES":             ("b64e", "PASID_TRANSLATION", {"HIGH_PASID_DIRECTORY_ADDRESS": 1}),
    "EXIT_RESERVED":                 ("b64e", "", {"EXIT_CONTROLS": 0x36FFA}),
    "SECONDARY_EXIT_RESERVED":       ("b64e", MORE_EXIT, {"SECONDARY_EXIT_CONTROLS": 1 << 62}),
    "SAVE_INACTIVE_TIMER":           ("b64e", "EXIT_SAVE_PREEMPTION_TIMER", {}),
    "EXIT_STORE_AREA":               ("b64e", "", {"EXIT_MSR_STORE_COUNT": 1, "EXIT_MSR_STORE_ADDRESS": 0x820008}),
    "EXIT_LOAD_AREA":                ("b64e", "", {"EXIT_MSR_LOAD_COUNT": 2, "EXIT_MSR_LOAD_ADDRESS": WIDE - 16}),
    "ENTRY_RESERVED":                ("b64e", "", {"ENTRY_CONTROLS": 0x13FE}),
    "INJECTION_TYPE":                ("b64e", "", {INFORMATION: VALID | 1 << 8 | 0x20}),
    "INJECTION_VECTOR":              ("b64e", "", {INFORMATION: VALID | 2 << 8 | 3}),
    "INJECTION_ERROR_CODE":          ("b64e", "", {INFORMATION: VALID | 3 << 8 | 13}),
    "INJECTION_RESERVED":            ("b64e", "", {INFORMATION: VALID | 3 << 8 | 6 | 1 << 12}),
    "INJECTION_ERROR_VALUE":         ("b64e", "", {INFORMATION: VALID | 0xB0D, "ENTRY_EXCEPTION_ERROR_CODE": 1 << 16}),
    "INJECTION_LENGTH":              ("b64e", "", {INFORMATION: VALID | 0x480, "ENTRY_INSTRUCTION_LENGTH": 16}),
    "ENTRY_LOAD_AREA":               ("b64e", "", {"ENTRY_MSR_LOAD_COUNT": 1, "ENTRY_MSR_LOAD_ADDRESS": 0x822001}),
    "SMM_OUTSIDE_SMM":               ("b64e", "ENTRY_TO_SMM", {BLOCKING: 4}),
    "HOST_CR0_FIXED":                ("b64e", "", {"HOST_CR0": 0x80000011}),
    "HOST_CR4_FIXED":                ("b64e", "", {"HOST_CR4": 0x620}),
    "HOST_CET_WITHOUT_WP":           ("b64e", "", {"HOST_CR4": 0x842620}),
    "HOST_CR3_RESERVED":             ("b64e", "", {"HOST_CR3": WIDE}),
    "HOST_SYSENTER":                 ("b64e", "", {"HOST_IA32_SYSENTER_EIP": 1 << 56}),
    "HOST_PERF_GLOBAL_CTRL":         ("b64e", "EXIT_LOAD_IA32_PERF_GLOBAL_CTRL", {"HOST_IA32_PERF_GLOBAL_CTRL": 0x10}),
    "HOST_PAT":                      ("b64e", "EXIT_LOAD_IA32_PAT", {"HOST_IA32_PAT": 0x2}),
    "HOST_EFER_RESERVED":            ("b64e", "EXIT_LOAD_IA32_EFER", {"HOST_IA32_EFER": 0xD03}),
    "HOST_EFER_MODE":                ("b64e", "EXIT_LOAD_IA32_EFER", {"HOST_IA32_EFER": 0x901}),
    "HOST_CET":                      ("b64e", "EXIT_LOAD_CET_STATE", {"HOST_SSP": 2}),
    "HOST_PKRS":                     ("b64e", "EXIT_LOAD_PKRS", {"HOST_IA32_PKRS": 1 << 32}),
    "HOST_SPEC_CTRL":                ("b64e", f"{MORE_EXIT} EXIT_LOAD_IA32_SPEC_CTRL", {"HOST_IA32_SPEC_CTRL": 1 << 9}),
    "HOST_FRED":                     ("b64e", f"{MORE_EXIT} EXIT_LOAD_FRED", {"HOST_IA32_FRED_RSP2": 8}),
    "HOST_SELECTOR_BITS":            ("b64e", "", {"HOST_GS_SELECTOR": 4}),
    "HOST_CS_ZERO":                  ("b64e", "", {"HOST_CS_SELECTOR": 0}),
    "HOST_TR_ZERO":                  ("b64e", "", {"HOST_TR_SELECTOR": 0}),
    "HOST_SS_ZERO":                  ("b32", "-EXIT_HOST_ADDRESS_SPACE_SIZE", {"HOST_SS_SELECTOR": 0}),
    "HOST_BASES":                    ("b64e", "", {"HOST_IDTR_BASE": 1 << 56}),
    "HOST_SPACE_NOW":                ("b32", "-EXIT_HOST_ADDRESS_SPACE_SIZE", {}),
    "ENTRY_MODE_FOR_32_BIT_HOST":    ("b64", "-EXIT_HOST_ADDRESS_SPACE_SIZE", {}),
    "HOST_PCIDE":                    ("b32", "-EXIT_HOST_ADDRESS_SPACE_SIZE", {"HOST_CR4": 0x62620}),
    "HOST_RIP_HIGH":                 ("b32", "-EXIT_HOST_ADDRESS_SPACE_SIZE", {"HOST_RIP": 1 << 32}),
    "HOST_PAE":                      ("b64e", "", {"HOST_CR4": 0x42600}),
    "HOST_RIP_CANONICAL":            ("b64e", "", {"HOST_RIP": 1 << 47}),
    "GUEST_CR0_FIXED":               ("b64e", "", {"GUEST_CR0": 0x80000011}),
    "GUEST_PG_WITHOUT_PE":           ("b32u", "", {"GUEST_CR0": 0x80000030}),
    "GUEST_CR4_FIXED":               ("b64e", "", {"GUEST_CR4": 0x40620}),
    "GUEST_CET_WITHOUT_WP":          ("b64e", "", {"GUEST_CR4": 0x842620}),
    "GUEST_DEBUGCTL":                ("b64e", "", {"GUEST_IA32_DEBUGCTL": 8}),
    "GUEST_IA32E_PAGING":            ("b64e", "", {"GUEST_CR4": 0x42600}),
    "GUEST_PCIDE":                   ("b32", "", {"GUEST_CR4": 0x22000}),
    "GUEST_CR3_RESERVED":            ("b64e", "", {"GUEST_CR3": WIDE}),
    "GUEST_DR7_HIGH":                ("b64e", "", {"GUEST_DR7": 1 << 32}),
    "GUEST_SYSENTER":                ("b64e", "", {"GUEST_IA32_SYSENTER_ESP": 1 << 56}),
    "GUEST_CET":                     ("b64e", "ENTRY_LOAD_CET_STATE", {"GUEST_IA32_S_CET": 0x40}),
    "GUEST_PERF_GLOBAL_CTRL":        ("b64e", "ENTRY_LOAD_IA32_PERF_GLOBAL_CTRL", {"GUEST_IA32_PERF_GLOBAL_CTRL": 0x10}),
    "GUEST_PAT":                     ("b64e", "ENTRY_LOAD_IA32_PAT", {"GUEST_IA32_PAT": 8}),
    "GUEST_EFER_RESERVED":           ("b64e", "ENTRY_LOAD_IA32_EFER", {"GUEST_IA32_EFER": 0xD03}),
    "GUEST_EFER_LMA":                ("b64e", "ENTRY_LOAD_IA32_EFER", {"GUEST_IA32_EFER": 0x901}),
    "GUEST_EFER_LME":                ("b64e", "ENTRY_LOAD_IA32_EFER", {"GUEST_IA32_EFER": 0xC01}),
    "GUEST_BNDCFGS":                 ("b64e", "ENTRY_LOAD_IA32_BNDCFGS", {"GUEST_IA32_BNDCFGS": 4}),
    "GUEST_RTIT_CTL":                ("b64e", "ENTRY_LOAD_IA32_RTIT_CTL", {"GUEST_IA32_RTIT_CTL": 1 << 18}),
    "GUEST_LBR_CTL":                 ("b64e", "ENTRY_LOAD_IA32_LBR_CTL", {"GUEST_IA32_LBR_CTL": 1 << 4}),
    "GUEST_PKRS":                    ("b64e", "ENTRY_LOAD_PKRS", {"GUEST_IA32_PKRS": 1 << 32}),
    "GUEST_UINV":                    ("b64e", "ENTRY_LOAD_UINV", {"GUEST_UINV": 0x100}),
    "GUEST_SPEC_CTRL":               ("b64e", "ENTRY_LOAD_IA32_SPEC_CTRL", {"GUEST_IA32_SPEC_CTRL": 1 << 9}),
    "GUEST_FRED":                    ("b64e", "ENTRY_LOAD_FRED", {"GUEST_IA32_FRED_CONFIG": 4}),
    "GDTR_BASE":                     ("b64e", "", {"GUEST_GDTR_BASE": 1 << 56}),
    "IDTR_BASE":                     ("b64e", "", {"GUEST_IDTR_BASE": 1 << 56}),
    "GDTR_LIMIT":                    ("b64e", "", {"GUEST_GDTR_LIMIT": 0x10000}),
    "IDTR_LIMIT":                    ("b64e", "", {"GUEST_IDTR_LIMIT": 0x10000}),
    "RIP_HIGH":                      ("b32", "", {"GUEST_RIP": 1 << 32}),
    "RIP_LINEAR":                    ("b64e", "", {"GUEST_RIP": 1 << 57}),
    "RFLAGS_RESERVED":               ("b64e", "", {"GUEST_RFLAGS": 0}),
    "RFLAGS_VM":                     ("bv86", f"{SECOND} ENABLE_EPT UNRESTRICTED_GUEST", {"GUEST_CR0": 0x30}),
    "RFLAGS_IF":                     ("b64e", "", {INFORMATION: EXTERNAL}),
    "SSP_ALIGNMENT":                 ("b64e", "ENTRY_LOAD_CET_STATE", {"GUEST_SSP": 2}),
    "SSP_ADDRESS":                   ("b64e", "ENTRY_LOAD_CET_STATE", {"GUEST_SSP": 1 << 57}),
    "ACTIVITY_VALUE":                ("b64e", "", {"GUEST_ACTIVITY_STATE": 4}),
    "ACTIVITY_HLT_DPL":              ("b64_cpl3", "", {"GUEST_ACTIVITY_STATE": 1}),
    "ACTIVITY_BLOCKING":             ("b64e", "", {"GUEST_ACTIVITY_STATE": 1, BLOCKING: 2}),
    "ACTIVITY_EVENT":                ("b64e", "", {"GUEST_ACTIVITY_STATE": 1, INFORMATION: VALID | 0x306}),
    "ACTIVITY_SMM":                  ("b64e", "ENTRY_TO_SMM", {"GUEST_ACTIVITY_STATE": 3, BLOCKING: 4}),
    "BLOCKING_RESERVED":             ("b64e", "", {BLOCKING: 0x20}),
    "BLOCKING_BOTH":                 ("b64e", "", {BLOCKING: 3, "GUEST_RFLAGS": IF}),
    "BLOCKING_STI_IF":               ("b64e", "", {BLOCKING: 1}),
    "BLOCKING_EXTERNAL":             ("b64e", "", {BLOCKING: 2, INFORMATION: EXTERNAL, "GUEST_RFLAGS": IF}),
    "BLOCKING_NMI":                  ("b64e", "", {BLOCKING: 2, INFORMATION: NMI}),
    "BLOCKING_NMI_BY_STI":           ("b64e", "", {BLOCKING: 1, INFORMATION: NMI, "GUEST_RFLAGS": IF}),
    "BLOCKING_SMI":                  ("b64e", "", {BLOCKING: 4}),
    "BLOCKING_SMM_ENTRY":            ("b64e", "ENTRY_TO_SMM", {}),
    "BLOCKING_VIRTUAL_NMI":          ("b64e", "NMI_EXITING VIRTUAL_NMIS", {BLOCKING: 8, INFORMATION: NMI}),
    "BLOCKING_ENCLAVE":              ("b64e", "", {BLOCKING: 0x12}),
    "PENDING_RESERVED":              ("b64e", "", {PENDING: 0x10}),
    "PENDING_STEP":                  ("b64e", "", {BLOCKING: 2, "GUEST_RFLAGS": TF}),
    "PENDING_RTM":                   ("b64e", "", {PENDING: 1 << 16}),
    "LINK_ADDRESS":                  ("b64e", "", {"VMCS_LINK_POINTER": 0x402001}),
    "LINK_REVISION":                 ("b64e", "", {"VMCS_LINK_POINTER": 0x823000}),
    "LINK_SHADOW":                   ("b64e", "VMCS_SHADOWING", {"VMCS_LINK_POINTER": 0x402000}),
    "LINK_CURRENT":                  ("b64e", "", {"VMCS_LINK_POINTER": 0x401000}),
    "PDPTE_RESERVED":                ("bpaee", "", {"GUEST_PDPTE0": 3}),
    "SELECTOR_TABLE_LDTR":           ("b64e", "", {"GUEST_LDTR_ACCESS_RIGHTS": 0x82, "GUEST_LDTR_SELECTOR": 4}),
    "SELECTOR_TABLE_TR":             ("b64e", "", {"GUEST_TR_SELECTOR": 0x1C}),
    "SELECTOR_RPL_SS":               ("b64e", "", {"GUEST_SS_SELECTOR": 0x11}),
    "TYPE_CS":                       ("b64e", "", {"GUEST_CS_ACCESS_RIGHTS": 0xA093}),
    "TYPE_SS":                       ("b64e", "", {"GUEST_SS_ACCESS_RIGHTS": 0xC091}),
    "TYPE_LDTR":                     ("b64e", "", {"GUEST_LDTR_ACCESS_RIGHTS": 0x83}),
    "TYPE_TR":                       ("b64e", "", {"GUEST_TR_ACCESS_RIGHTS": 0x83}),
    "DESCRIPTOR_TYPE_LDTR":          ("b64e", "", {"GUEST_LDTR_ACCESS_RIGHTS": 0x92}),
    "DESCRIPTOR_TYPE_TR":            ("b64e", "", {"GUEST_TR_ACCESS_RIGHTS": 0x9B}),
    "DPL_CS":                        ("b64e", "", {"GUEST_CS_ACCESS_RIGHTS": 0xA0BB}),
    "DPL_SS":                        ("b64e", "", {"GUEST_CS_ACCESS_RIGHTS": 0xA09F, "GUEST_SS_ACCESS_RIGHTS": 0xC0B3}),
    "PRESENT_LDTR":                  ("b64e", "", {"GUEST_LDTR_ACCESS_RIGHTS": 0x02}),
    "PRESENT_TR":                    ("b64e", "", {"GUEST_TR_ACCESS_RIGHTS": 0x0B}),
    "RIGHTS_RESERVED_LDTR":          ("b64e", "", {"GUEST_LDTR_ACCESS_RIGHTS": 0x182}),
    "RIGHTS_RESERVED_TR":            ("b64e", "", {"GUEST_TR_ACCESS_RIGHTS": 0x2008B}),
    "CODE_SIZE_CS":                  ("b64e", "", {"GUEST_CS_ACCESS_RIGHTS": 0xE09B}),
    "GRANULARITY_LDTR":              ("b64e", "", {"GUEST_LDTR_ACCESS_RIGHTS": 0x8082}),
    "GRANULARITY_TR":                ("b64e", "", {"GUEST_TR_LIMIT": 1 << 20}),
    "USABLE_TR":                     ("b64e", "", {"GUEST_TR_ACCESS_RIGHTS": 0x1008B}),
}
for segment in ("ES", "CS", "SS", "DS", "FS", "GS"):
    whole = 0xA09B if segment == "CS" else 0xC093
    far = 1 << (56 if segment in ("FS", "GS") else 32)
    rights, base, limit = (f"GUEST_{segment}_{part}" for part in ("ACCESS_RIGHTS", "BASE", "LIMIT"))
    CASES |= {
        f"BASE_V86_{segment}":        ("bv86", "", {base: 0x123450}),
        f"BASE_LINEAR_{segment}":     ("b64e", "", {base: far}),
        f"LIMIT_V86_{segment}":       ("bv86", "", {limit: 0xFFFE}),
        f"RIGHTS_V86_{segment}":      ("bv86", "", {rights: 0xF2}),
        f"DESCRIPTOR_TYPE_{segment}": ("b64e", "", {rights: whole & ~0x10}),
        f"PRESENT_{segment}":         ("b64e", "", {rights: whole & ~0x80}),
        f"RIGHTS_RESERVED_{segment}": ("b64e", "", {rights: whole | 0x800}),
        f"GRANULARITY_{segment}":     ("b64e", "", {limit: 0xFFFFFFFE}),
    }
    if segment not in ("CS", "SS"):
        CASES |= {
            f"TYPE_{segment}":        ("b64e", "", {rights: 0xC092}),
            f"DPL_{segment}":         ("b64e", "", {f"GUEST_{segment}_SELECTOR": 0x13}),
        }
for segment in ("LDTR", "TR"):
    CASES[f"BASE_LINEAR_{segment}"] = ("b64e", "", {f"GUEST_{segment}_BASE": 1 << 56})
CASES["BASE_LINEAR_LDTR"][2]["GUEST_LDTR_ACCESS_RIGHTS"] = 0x82
# fmt: on
ON = {"EPTP_ACCESSED_DIRTY": NEHALEM, "EPTP_SHADOW_STACK": RECORDED}
# a check that cannot fail alone, and the one that fails with it
TOGETHER = {
    **dict.fromkeys(("HOST_SS_ZERO", "ENTRY_MODE_FOR_32_BIT_HOST", "HOST_PCIDE", "HOST_RIP_HIGH"), "HOST_SPACE_NOW"),
    **dict.fromkeys(("ACTIVITY_SMM", "BLOCKING_SMM_ENTRY"), "SMM_OUTSIDE_SMM"),
}
QUALIFICATIONS = {"PDPTE_RESERVED": 2, "BLOCKING_NMI_BY_STI": 3}


def test_every_check_has_a_case_and_no_case_is_of_another() -> None:
    assert CASES.keys() == {check.name for check in c.CHECKS}


@pytest.mark.parametrize("check", c.CHECKS, ids=lambda check: check.name)
def test_exactly_this_check_fails(check: c.Check) -> None:
    base, controls, fields = CASES[check.name]
    outcome, failures = failed_checks(environment(base, controls, ON.get(check.name, ALL), **fields))

    assert {each.name for each in failures} == {check.name, TOGETHER.get(check.name, check.name)}
    if check.name in TOGETHER and failures[0] is not check:
        return
    if check.outcome == c.GUEST:
        expected = 4 if check.name.startswith("LINK_") else QUALIFICATIONS.get(check.name, 0)
        assert outcome == {"kind": "entry_failure", "reason": 33, "qualification": expected}
    else:
        assert outcome == {"kind": "vmfail_valid", "error": 7 if check.outcome == c.CONTROLS else 8}


@pytest.mark.parametrize("name", sorted(processor(RECORDED).bases))
def test_the_base_states_enter(name: str) -> None:
    outcome, failures = failed_checks(environment(name))

    assert (outcome, failures) == ({"kind": "exit"}, ())


def test_each_constant_has_its_place_in_the_table() -> None:
    single = [check for check in c.CHECKS if check.number < c.SELECTOR_TABLE]

    assert [getattr(c, check.name) for check in single] == [check.number for check in single]
    assert len(c.BY_CHECK_NUMBER) == len(c.CHECKS)
