"""The lists of the manual's VMX chapters, and how much of each is in the model.

A row that is modelled names the test file that shows it; a test checks that this file cites the list by its title.
What other rows lack is said beside them.

SDM: "VMX Capability Reporting Facility"; "VMX Instructions".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

import attrs

MODELLED: Final = "modelled"
PARTLY: Final = "partly"
NOT_MODELLED: Final = "not modelled"

INSTRUCTIONS: Final = "tests/vmcs/test_vmx_instructions.py"
NON_ROOT: Final = "tests/vmcs/test_vmx_in_nonroot.py"
FIELDS: Final = "tests/vmcs/test_fields.py"
ACCESS: Final = "tests/vmcs/test_fields_access.py"
CONTROLS: Final = "tests/vmcs/test_controls.py"
CAPABILITIES: Final = "tests/vmcs/test_capabilities.py"
REASONS: Final = "tests/vmcs/test_reasons.py"
QUALIFICATION: Final = "tests/vmcs/test_qualification.py"
EXITS: Final = "tests/cpu/test_exits.py"
EXIT_EVENTS: Final = "tests/cpu/test_exit_events.py"
EXIT_INSTRUCTIONS: Final = "tests/cpu/test_exit_instructions.py"
DELIVERY: Final = "tests/cpu/test_exit_delivery.py"
MEMORY: Final = "tests/cpu/test_exit_memory.py"
TRANSLATION: Final = "tests/cpu/test_translation.py"
INVALIDATION: Final = "tests/cpu/test_invalidation.py"
EVERY_CONTROL: Final = "tests/vmcs/test_every_control.py"
EVERY_ERROR: Final = "tests/vmcs/test_every_error.py"
EVERY_FIELD: Final = "tests/vmcs/test_every_field.py"
CHECKS: Final = "tests/vmcs/test_entry_checks.py"
AREAS: Final = "tests/vmcs/test_msr_areas.py"
INJECTION: Final = "tests/vmcs/test_injection.py"
BEHAVIOR: Final = "tests/cpu/test_nonroot_behavior.py"
POSTED: Final = "tests/cpu/test_posted_interrupts.py"
EPT_FLAGS: Final = "tests/cpu/test_ept_flags.py"
VIEWS: Final = "tests/vmm/test_views.py"
MEMORY_TYPES: Final = "tests/cpu/test_memory_types.py"


@attrs.frozen
class Row:
    """One list of the manual: its title, how much is modelled, and the test that shows it or what is missing."""

    title: str
    status: str
    test: str = ""
    missing: str = ""


def yes(title: str, test: str) -> Row:
    """A list that is modelled."""
    return Row(title, MODELLED, test=test)


def part(title: str, missing: str, test: str = "") -> Row:
    """A list of which something is missing."""
    return Row(title, PARTLY, test=test, missing=missing)


def no(title: str, why: str) -> Row:
    """A list that is not modelled."""
    return Row(title, NOT_MODELLED, missing=why)


SMM: Final = "system-management mode is not modelled"
DUAL: Final = "the dual-monitor treatment of SMIs and SMM"

# fmt: off
CHAPTERS: Final[dict[str, tuple[Row, ...]]] = {
    "Introduction to Virtual Machine Extensions": (
        yes("Discovering Support for VMX",                                   CAPABILITIES),
        part("Enabling and Entering VMX Operation",                          "SMX operation", INSTRUCTIONS),
        part("Restrictions on VMX Operation",                                "A20M mode", BEHAVIOR),
    ),
    "Virtual Machine Control Structures": (
        yes("Format of the VMCS Region",                                     AREAS),
        yes("Guest-State Area",                                              FIELDS),
        yes("Host-State Area",                                               FIELDS),
        part("Guest Non-Register State",                                     "enclave interruption; SMBASE is only kept", BEHAVIOR),
        yes("Pin-Based VM-Execution Controls",                               EVERY_CONTROL),
        part("Processor-Based VM-Execution Controls",                        "the controls named at the end of this page", EVERY_CONTROL),
        yes("Exception Bitmap",                                              EXITS),
        yes("I/O-Bitmap Addresses",                                          EXITS),
        yes("Time-Stamp Counter Offset and Multiplier",                      BEHAVIOR),
        yes("Guest/Host Masks and Read Shadows for CR0 and CR4",             EXITS),
        yes("CR3-Target Controls",                                           EXITS),
        part("Controls for APIC Virtualization",                             "APIC-timer virtualization", POSTED),
        yes("MSR-Bitmap Address",                                            EXITS),
        no("Executive-VMCS Pointer",                                         SMM),
        yes("Extended-Page-Table Pointer (EPTP)",                            INSTRUCTIONS),
        yes("Virtual-Processor Identifier (VPID)",                           INVALIDATION),
        yes("Controls for PAUSE-Loop Exiting",                               BEHAVIOR),
        yes("VM-Function Controls",                                          VIEWS),
        yes("VMCS Shadowing Bitmap Addresses",                               NON_ROOT),
        yes("ENCLS-Exiting Bitmap",                                          BEHAVIOR),
        yes("ENCLV-Exiting Bitmap",                                          BEHAVIOR),
        yes("PCONFIG-Exiting Bitmap",                                        BEHAVIOR),
        yes("Control Fields for Page-Modification Logging",                  MEMORY),
        yes("Controls for Virtualization Exceptions",                        VIEWS),
        yes("XSS-Exiting Bitmap",                                            EXITS),
        no("Sub-Page-Permission-Table Pointer (SPPTP)",                      "sub-page write permissions"),
        no("Fields Related to Hypervisor-Managed Linear-Address Translation", "checked by VM entry, without effect"),
        no("Fields Related to PASID Translation",                            "checked by VM entry, without effect"),
        no("Instruction-Timeout Control",                                    "instructions do not time out"),
        yes("Fields Controlling Virtualization of the IA32_SPEC_CTRL MSR",   BEHAVIOR),
        part("VM-Exit Controls",                                             "those of Intel PT and of prematurely busy shadow stacks", EVERY_CONTROL),
        yes("VM-Exit Controls for MSRs",                                     AREAS),
        part("VM-Entry Controls",                                            "that of Intel PT; those of SMM are refused", EVERY_CONTROL),
        yes("VM-Entry Controls for MSRs",                                    AREAS),
        part("VM-Entry Controls for Event Injection",                        "the event data of FRED", INJECTION),
        yes("Basic VM-Exit Information",                                     QUALIFICATION),
        yes("Information for VM Exits Due to Vectored Events",               DELIVERY),
        yes("Information for VM Exits That Occur During Event Delivery",     DELIVERY),
        yes("Information for VM Exits Due to Instruction Execution",         EXIT_INSTRUCTIONS),
        yes("VM-Instruction Error Field",                                    INSTRUCTIONS),
        yes("VMCS Types: Ordinary and Shadow",                               NON_ROOT),
        yes("VMREAD, VMWRITE, and Encodings of VMCS Fields",                 ACCESS),
        yes("VMXON Region",                                                  INSTRUCTIONS),
    ),
    "VMX Non-Root Operation": (
        yes("Relative Priority of Faults and VM Exits",                      EXIT_INSTRUCTIONS),
        yes("Instructions That Cause VM Exits Unconditionally",              EXITS),
        part("Instructions That Cause VM Exits Conditionally",               "lists of MSRs; URDMSR; UWRMSR; immediate forms; TDX", BEHAVIOR),
        part("Other Causes of VM Exits",                                     "SMIs; bus locks", BEHAVIOR),
        part("Changes to Instruction Behavior in VMX Non-Root Operation",    "ENQCMD; SENDUIPI; RDMSRLIST; microcode updates", BEHAVIOR),
        yes("Event Blocking",                                                BEHAVIOR),
        yes("Treatment of Task Switches",                                    DELIVERY),
        yes("VMX-Preemption Timer",                                          BEHAVIOR),
        yes("Monitor Trap Flag",                                             DELIVERY),
        yes("VM Functions",                                                  NON_ROOT),
        yes("EPTP Switching",                                                VIEWS),
        yes("Virtualization Exceptions",                                     MEMORY),
        yes("Unrestricted Guests",                                           EXIT_INSTRUCTIONS),
    ),
    "VM Entries": (
        yes("Basic VM-Entry Checks",                                         INSTRUCTIONS),
        yes("Checks on VMX Controls",                                        CHECKS),
        yes("Checks on Host Control Registers, MSRs, and SSP",               CHECKS),
        yes("Checks on Host Segment and Descriptor-Table Registers",         CHECKS),
        yes("Checks Related to Address-Space Size",                          CHECKS),
        yes("Checks on Guest Control Registers, Debug Registers, and MSRs",  CHECKS),
        yes("Checks on Guest Segment Registers",                             CHECKS),
        yes("Checks on Guest Descriptor-Table Registers",                    CHECKS),
        yes("Checks on Guest RIP, RFLAGS, and SSP",                          CHECKS),
        yes("Checks on Guest Non-Register State",                            CHECKS),
        yes("Checks on Guest Page-Directory-Pointer-Table Entries",          CHECKS),
        yes("Loading Guest State",                                           EVERY_FIELD),
        part("Loading MSRs",                                                 "MSRs that the model does not have", AREAS),
        no("Trace-Address Pre-Translation (TAPT)",                           "Intel PT is not modelled"),
        part("Event Injection",                                              "delivery by FRED", INJECTION),
        part("Special Features of VM Entry",                                 "last-branch records; user interrupts", INJECTION),
        yes("VM-Entry Failures During or After Loading Guest State",         INJECTION),
        no("Machine-Check Events During VM Entry",                           "machine checks are not modelled"),
    ),
    "VM Exits": (
        yes("Architectural State Before a VM Exit",                          DELIVERY),
        yes("Recording VM-Exit Information and Updating VM-entry Control Fields", INJECTION),
        part("Saving Guest State",                                           "IA32_SPEC_CTRL", EVERY_FIELD),
        part("Saving MSRs",                                                  "MSRs that the model does not have", AREAS),
        part("Loading Host State",                                           "limits and access rights of data segments", EVERY_FIELD),
        part("VMX Aborts",                                                   "causes that hosts here do not meet: PDPTEs, corruption, machine checks", AREAS),
        no("Machine-Check Events During VM Exit",                            "machine checks are not modelled"),
    ),
    "VMX Support for Address Translation": (
        yes("Virtual Processor Identifiers (VPIDs)",                         INVALIDATION),
        yes("EPT Translation Mechanism",                                     TRANSLATION),
        yes("EPT Misconfigurations",                                         EPT_FLAGS),
        yes("EPT Violations",                                                MEMORY),
        yes("Accessed and Dirty Flags for EPT",                              EPT_FLAGS),
        yes("Page-Modification Logging",                                     MEMORY),
        part("EPT and Memory Typing",                                        "what WT and WP cost", MEMORY_TYPES),
        yes("Caching Translation Information",                               INVALIDATION),
    ),
    "APIC Virtualization and Virtual Interrupts": (
        yes("Virtual APIC State",                                            MEMORY),
        yes("Evaluation and Delivery of Virtual Interrupts",                 MEMORY),
        yes("Virtualizing CR8-Based TPR Accesses",                           POSTED),
        part("Virtualizing Memory-Mapped APIC Accesses",                     "accesses by page walks outside IA-32e paging with EPT", MEMORY),
        yes("Virtualizing MSR-Based APIC Accesses",                          MEMORY),
        yes("Posted-Interrupt Processing",                                   POSTED),
        part("IPI Virtualization",                                           "SENDUIPI", POSTED),
    ),
    "VMX Instruction Reference": (
        yes("Conventions",                                                   INSTRUCTIONS),
        yes("INVEPT—Invalidate Translations Derived from EPT",               INSTRUCTIONS),
        yes("INVVPID—Invalidate Translations Based on VPID",                 INSTRUCTIONS),
        part("VMCALL—Call to VM Monitor",                                    DUAL, INSTRUCTIONS),
        yes("VMCLEAR—Clear Virtual-Machine Control Structure",               INSTRUCTIONS),
        yes("VMFUNC—Invoke VM Function",                                     NON_ROOT),
        part("VMLAUNCH/VMRESUME—Launch/Resume Virtual Machine",              DUAL, INSTRUCTIONS),
        yes("VMPTRLD—Load Pointer to Virtual-Machine Control Structure",     INSTRUCTIONS),
        yes("VMPTRST—Store Pointer to Virtual-Machine Control Structure",    INSTRUCTIONS),
        yes("VMREAD—Read Field from Virtual-Machine Control Structure",      ACCESS),
        yes("VMWRITE—Write Field to Virtual-Machine Control Structure",      ACCESS),
        part("VMXOFF—Leave VMX Operation",                                   DUAL, INSTRUCTIONS),
        part("VMXON—Enter VMX Operation",                                    "SMX operation; A20M mode", INSTRUCTIONS),
        part("VM-Instruction Error Numbers",                                 f"16 to 25, which need {DUAL}", EVERY_ERROR),
    ),
    "System Management Mode": (
        no("Default Treatment of SMIs and SMM with VMX Operation and SMX Operation", SMM),
        no("Dual-Monitor Treatment of SMIs and SMM",                         SMM),
    ),
    "VMX Capability Reporting Facility": (
        yes("Basic VMX Information",                                         CAPABILITIES),
        yes("Reserved Controls and Default Settings",                        CAPABILITIES),
        yes("Miscellaneous Data",                                            CAPABILITIES),
        yes("VMX-Fixed Bits in CR0",                                         INSTRUCTIONS),
        yes("VMX-Fixed Bits in CR4",                                         INSTRUCTIONS),
        yes("VMCS Enumeration",                                              CAPABILITIES),
        yes("VPID and EPT Capabilities",                                     INSTRUCTIONS),
    ),
    "Field Encoding in VMCS; VMX Basic Exit Reasons": (
        yes("Field Encoding in VMCS",                                        FIELDS),
        yes("VMX Basic Exit Reasons",                                        REASONS),
    ),
}
# fmt: on


# Controls, fields, exit reasons ("reason NAME") and VM-instruction errors ("error NUMBER") that stand in the tables, that
# VM entry checks and VMREAD and VMWRITE reach, and that have no effect here: the list above that says why.
PT: Final = "Trace-Address Pre-Translation (TAPT)"
HLAT: Final = "Fields Related to Hypervisor-Managed Linear-Address Translation"
PASID: Final = "Fields Related to PASID Translation"
CONDITIONAL: Final = "Instructions That Cause VM Exits Conditionally"
APIC_CONTROLS: Final = "Controls for APIC Virtualization"
ENTRY_EVENT: Final = "VM-Entry Controls for Event Injection"
EXECUTIVE: Final = "Executive-VMCS Pointer"
SMIS: Final = "Default Treatment of SMIs and SMM with VMX Operation and SMX Operation"
# fmt: off
WITHOUT_EFFECT: Final[dict[str, str]] = {
    **dict.fromkeys(("CONCEAL_VMX_FROM_PT", "PT_USES_GUEST_PHYSICAL_ADDRESSES", "EXIT_CONCEAL_VMX_FROM_PT",
                     "ENTRY_CONCEAL_VMX_FROM_PT"), PT),
    **dict.fromkeys(("ENABLE_HLAT", "EPT_PAGING_WRITE_CONTROL", "GUEST_PAGING_VERIFICATION", "HLAT_PREFIX_SIZE",
                     "HLAT_POINTER"), HLAT),
    **dict.fromkeys(("PASID_TRANSLATION", "LOW_PASID_DIRECTORY_ADDRESS", "HIGH_PASID_DIRECTORY_ADDRESS",
                     "reason ENQCMD", "reason ENQCMDS"), PASID),
    **dict.fromkeys(("SUB_PAGE_WRITE_PERMISSIONS", "SUB_PAGE_PERMISSION_TABLE_POINTER", "reason SPP_EVENT"),
                    "Sub-Page-Permission-Table Pointer (SPPTP)"),
    **dict.fromkeys(("INSTRUCTION_TIMEOUT", "INSTRUCTION_TIMEOUT_CONTROL", "reason NOTIFY"),
                    "Instruction-Timeout Control"),
    **dict.fromkeys(("VMM_BUS_LOCK_DETECTION", "reason BUS_LOCK"), "Other Causes of VM Exits"),
    **dict.fromkeys(("ENABLE_MSR_LIST_INSTRUCTIONS", "MSR_DATA", "reason RDMSRLIST", "reason WRMSRLIST", "reason URDMSR",
                     "reason UWRMSR", "reason MSR_READ_IMM", "reason MSR_WRITE_IMM", "reason SEAMCALL",
                     "reason TDCALL"), CONDITIONAL),
    **dict.fromkeys(("APIC_TIMER_VIRTUALIZATION", "VIRTUAL_TIMER_VECTOR", "GUEST_DEADLINE_SHADOW", "GUEST_DEADLINE"),
                    APIC_CONTROLS),
    **dict.fromkeys(("EXIT_PREMATURELY_BUSY_SHADOW_STACK",), "VM-Exit Controls"),
    **dict.fromkeys(("INJECTED_EVENT_DATA", "ORIGINAL_EVENT_DATA"), ENTRY_EVENT),
    **dict.fromkeys(("EXECUTIVE_VMCS_POINTER", *(f"error {n}" for n in (16, 17, 18, 25))), EXECUTIVE),
    **dict.fromkeys(("IO_RCX", "IO_RSI", "IO_RDI", "IO_RIP", "reason IO_SMI", "reason OTHER_SMI", "reason RSM"), SMIS),
    **dict.fromkeys((f"error {n}" for n in (19, 20, 22, 23, 24)), "Dual-Monitor Treatment of SMIs and SMM"),
    "reason MCE_DURING_VMENTRY": "Machine-Check Events During VM Entry",
}
# fmt: on


def rows() -> Iterator[Row]:
    """Every row of every chapter."""
    for chapter in CHAPTERS.values():
        yield from chapter


def tables(chapters: Mapping[str, Sequence[Row]], noun: str) -> list[str]:
    """Lines of a coverage page: how many lists (or whatever they are) have each status, then a table for each chapter."""
    counts = Counter(row.status for listed in chapters.values() for row in listed)
    lines = [", ".join(f"{counts[status]} {noun}s are {status}" for status in (MODELLED, PARTLY, NOT_MODELLED)) + "."]
    for chapter, listed in chapters.items():
        lines += ["", f"## {chapter}", "", f"| {noun} | status | shown by | missing |", "|---|---|---|---|"]
        for row in listed:
            test = f"`{row.test}`" if row.test else ""
            lines.append(f"| {row.title} | {row.status} | {test} | {row.missing} |")
    return lines


def page() -> str:
    """The page docs/vmx-coverage.md."""
    lines = [
        "# How much of VMX is modelled",
        "",
        "Generated from `vtsim/vmcs/coverage.py`: each list of the manual's VMX chapters by its title. A list that is",
        "modelled names the test that shows it.",
        "",
        *tables(CHAPTERS, "list"),
        "",
        "## Named in the tables, without effect",
        "",
        "VM entry checks these, and VMREAD and VMWRITE reach the fields. The list on this page says why they do no more.",
        "",
        "| list | controls, fields, exit reasons, VM-instruction errors |",
        "|---|---|",
    ]
    for title in dict.fromkeys(WITHOUT_EFFECT.values()):
        names = ", ".join(f"`{name}`" for name, why in WITHOUT_EFFECT.items() if why == title)
        lines.append(f"| {title} | {names} |")
    return "\n".join(lines) + "\n"
