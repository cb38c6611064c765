"""Every check that VM entry makes on a VMCS: its number for kernels, its list in the manual, its rule, its fields.

A kernel of `vtsim.vmcs.kernels` returns the number of the first check that fails. Checks on segment registers have a
number for each register: the rule's number plus the register's place in the encoding of fields.

SDM: "Checks on VMX Controls"; "Checks on Host Control Registers, MSRs, and SSP".
SDM: "Checks on Host Segment and Descriptor-Table Registers"; "Checks Related to Address-Space Size".
SDM: "Checks on Guest Control Registers, Debug Registers, and MSRs"; "Checks on Guest Segment Registers".
SDM: "Checks on Guest Descriptor-Table Registers"; "Checks on Guest RIP, RFLAGS, and SSP".
SDM: "Checks on Guest Non-Register State"; "Checks on Guest Page-Directory-Pointer-Table Entries".
Not modelled: checks on the executive VMCS; Intel PT being in use at VM entry.
"""

from __future__ import annotations

from typing import Final

import attrs

# what a failed check makes of the VM entry
CONTROLS, HOST, GUEST = "VM-instruction error 7", "VM-instruction error 8", "exit reason 33"

# fmt: off
NONE: Final = 0
(PIN_RESERVED, PRIMARY_RESERVED, SECONDARY_RESERVED, TERTIARY_RESERVED, CR3_TARGETS, IO_BITMAPS, MSR_BITMAP,
 VIRTUAL_APIC_PAGE, TPR_THRESHOLD_RESERVED, TPR_THRESHOLD_ABOVE_VTPR, NMI_EXITING_FOR_VIRTUAL_NMIS,
 VIRTUAL_NMIS_FOR_WINDOW, APIC_ACCESS_PAGE, TPR_SHADOW_FOR_APIC, X2APIC_OR_ACCESSES,
 EXTERNAL_EXITING_FOR_DELIVERY, POSTED_CONTROLS, POSTED_VECTOR, POSTED_DESCRIPTOR, VPID_ZERO, EPTP_MEMORY_TYPE,
 EPTP_WALK_LENGTH, EPTP_ACCESSED_DIRTY, EPTP_SHADOW_STACK, EPTP_RESERVED, PML_WITHOUT_EPT, PML_ADDRESS,
 UNRESTRICTED_WITHOUT_EPT, MODE_BASED_WITHOUT_EPT, SUB_PAGE_WITHOUT_EPT, SUB_PAGE_TABLE, VM_FUNCTIONS_RESERVED,
 EPTP_SWITCHING_WITHOUT_EPT, EPTP_LIST, SHADOWING_BITMAPS, VE_INFORMATION, PT_ADDRESSES, TSC_MULTIPLIER_ZERO,
 HLAT_WITHOUT_EPT, HLAT_TABLE, HLAT_PREFIX, PAGING_WRITE_WITHOUT_EPT, GUEST_PAGING_WITHOUT_EPT, PID_TABLE,
 PID_TABLE_END, APIC_TIMER_DELIVERY, APIC_TIMER_VECTOR, PASID_DIRECTORIES) = range(1, 49)
(EXIT_RESERVED, SECONDARY_EXIT_RESERVED, SAVE_INACTIVE_TIMER, EXIT_STORE_AREA, EXIT_LOAD_AREA) = range(49, 54)
(ENTRY_RESERVED, INJECTION_TYPE, INJECTION_VECTOR, INJECTION_ERROR_CODE, INJECTION_RESERVED,
 INJECTION_ERROR_VALUE, INJECTION_LENGTH, ENTRY_LOAD_AREA, SMM_OUTSIDE_SMM) = range(54, 63)
(HOST_CR0_FIXED, HOST_CR4_FIXED, HOST_CET_WITHOUT_WP, HOST_CR3_RESERVED, HOST_SYSENTER, HOST_PERF_GLOBAL_CTRL,
 HOST_PAT, HOST_EFER_RESERVED, HOST_EFER_MODE, HOST_CET, HOST_PKRS, HOST_SPEC_CTRL, HOST_FRED) = range(63, 76)
(HOST_SELECTOR_BITS, HOST_CS_ZERO, HOST_TR_ZERO, HOST_SS_ZERO, HOST_BASES) = range(76, 81)
(HOST_SPACE_NOW, ENTRY_MODE_FOR_32_BIT_HOST, HOST_PCIDE, HOST_RIP_HIGH, HOST_PAE, HOST_RIP_CANONICAL) = range(81, 87)
(GUEST_CR0_FIXED, GUEST_PG_WITHOUT_PE, GUEST_CR4_FIXED, GUEST_CET_WITHOUT_WP, GUEST_DEBUGCTL, GUEST_IA32E_PAGING,
 GUEST_PCIDE, GUEST_CR3_RESERVED, GUEST_DR7_HIGH, GUEST_SYSENTER, GUEST_CET, GUEST_PERF_GLOBAL_CTRL, GUEST_PAT,
 GUEST_EFER_RESERVED, GUEST_EFER_LMA, GUEST_EFER_LME, GUEST_BNDCFGS, GUEST_RTIT_CTL, GUEST_LBR_CTL, GUEST_PKRS,
 GUEST_UINV, GUEST_SPEC_CTRL, GUEST_FRED) = range(87, 110)
(GDTR_BASE, IDTR_BASE, GDTR_LIMIT, IDTR_LIMIT) = range(110, 114)
(RIP_HIGH, RIP_LINEAR, RFLAGS_RESERVED, RFLAGS_VM, RFLAGS_IF, SSP_ALIGNMENT, SSP_ADDRESS) = range(114, 121)
(ACTIVITY_VALUE, ACTIVITY_HLT_DPL, ACTIVITY_BLOCKING, ACTIVITY_EVENT, ACTIVITY_SMM, BLOCKING_RESERVED, BLOCKING_BOTH,
 BLOCKING_STI_IF, BLOCKING_EXTERNAL, BLOCKING_NMI, BLOCKING_NMI_BY_STI, BLOCKING_SMI, BLOCKING_SMM_ENTRY,
 BLOCKING_VIRTUAL_NMI,
 BLOCKING_ENCLAVE, PENDING_RESERVED, PENDING_STEP, PENDING_RTM, LINK_ADDRESS, LINK_REVISION, LINK_SHADOW,
 LINK_CURRENT) = range(121, 143)
(PDPTE_RESERVED,) = range(143, 144)

# checks of one segment register: rule + 0 ES, 1 CS, 2 SS, 3 DS, 4 FS, 5 GS, 6 LDTR, 7 TR
(SELECTOR_TABLE, SELECTOR_RPL, BASE_V86, BASE_LINEAR, LIMIT_V86, RIGHTS_V86, TYPE, DESCRIPTOR_TYPE, DPL, PRESENT,
 RIGHTS_RESERVED, CODE_SIZE, GRANULARITY, USABLE) = range(160, 160 + 14 * 8, 8)
CHECK_NUMBERS: Final = 160 + 14 * 8
SEGMENTS: Final = ("ES", "CS", "SS", "DS", "FS", "GS", "LDTR", "TR")
# fmt: on


@attrs.frozen(kw_only=True)
class Check:
    """One check: the manual's list that it stands in, what must hold, and the fields that decide."""

    number: int
    name: str
    section: str
    outcome: str
    rule: str
    fields: tuple[str, ...]


def _list(section: str, outcome: str, first: int, *rows: tuple[str, str, str]) -> tuple[Check, ...]:
    return tuple(
        Check(number=first + n, name=name, section=section, outcome=outcome, rule=rule, fields=tuple(fields.split()))
        for n, (name, fields, rule) in enumerate(rows)
    )


def _segments(rule: int, name: str, registers: str, parts: str, text: str) -> tuple[Check, ...]:
    return tuple(
        Check(
            number=rule + SEGMENTS.index(register),
            name=f"{name}_{register}",
            section="Checks on Guest Segment Registers",
            outcome=GUEST,
            rule=text.format(register),
            fields=tuple(f"GUEST_{register}_{part}" for part in parts.split()),
        )
        for register in registers.split()
    )


# fmt: off
_EXECUTION = _list("VM-Execution Control Fields", CONTROLS, PIN_RESERVED,
    ("PIN_RESERVED", "PIN_CONTROLS", "reserved bits must be as IA32_VMX_(TRUE_)PINBASED_CTLS allows"),
    ("PRIMARY_RESERVED", "PRIMARY_PROC_CONTROLS", "reserved bits must be as IA32_VMX_(TRUE_)PROCBASED_CTLS allows"),
    ("SECONDARY_RESERVED", "SECONDARY_PROC_CONTROLS", "reserved bits must be as IA32_VMX_PROCBASED_CTLS2 allows"),
    ("TERTIARY_RESERVED", "TERTIARY_PROC_CONTROLS", "reserved bits must be 0 as IA32_VMX_PROCBASED_CTLS3 says"),
    ("CR3_TARGETS", "CR3_TARGET_COUNT", "the count must not be greater than IA32_VMX_MISC bits 24:16"),
    ("IO_BITMAPS", "IO_BITMAP_A IO_BITMAP_B", "bits 11:0 and those beyond the physical-address width must be 0"),
    ("MSR_BITMAP", "MSR_BITMAPS", "bits 11:0 and those beyond the physical-address width must be 0"),
    ("VIRTUAL_APIC_PAGE", "VIRTUAL_APIC_ADDRESS", "bits 11:0 and those beyond the physical-address width must be 0"),
    ("TPR_THRESHOLD_RESERVED", "TPR_THRESHOLD", "bits 31:4 must be 0 without virtual-interrupt delivery"),
    ("TPR_THRESHOLD_ABOVE_VTPR", "TPR_THRESHOLD VIRTUAL_APIC_ADDRESS",
     "bits 3:0 must not be greater than bits 7:4 of VTPR in the virtual-APIC page"),
    ("NMI_EXITING_FOR_VIRTUAL_NMIS", "PIN_CONTROLS", "virtual NMIs need NMI exiting"),
    ("VIRTUAL_NMIS_FOR_WINDOW", "PIN_CONTROLS PRIMARY_PROC_CONTROLS", "NMI-window exiting needs virtual NMIs"),
    ("APIC_ACCESS_PAGE", "APIC_ACCESS_ADDRESS", "bits 11:0 and those beyond the physical-address width must be 0"),
    ("TPR_SHADOW_FOR_APIC", "PRIMARY_PROC_CONTROLS SECONDARY_PROC_CONTROLS TERTIARY_PROC_CONTROLS",
     "virtualize x2APIC mode, APIC-register virtualization, virtual-interrupt delivery and IPI virtualization"
     " need the TPR shadow"),
    ("X2APIC_OR_ACCESSES", "SECONDARY_PROC_CONTROLS", "virtualize x2APIC mode excludes virtualize APIC accesses"),
    ("EXTERNAL_EXITING_FOR_DELIVERY", "PIN_CONTROLS SECONDARY_PROC_CONTROLS",
     "virtual-interrupt delivery needs external-interrupt exiting"),
    ("POSTED_CONTROLS", "PIN_CONTROLS SECONDARY_PROC_CONTROLS EXIT_CONTROLS",
     "posted interrupts need virtual-interrupt delivery and acknowledge interrupt on exit"),
    ("POSTED_VECTOR", "POSTED_INTERRUPT_NOTIFICATION_VECTOR", "bits 15:8 must be 0"),
    ("POSTED_DESCRIPTOR", "POSTED_INTERRUPT_DESCRIPTOR_ADDRESS",
     "bits 5:0 and those beyond the physical-address width must be 0"),
    ("VPID_ZERO", "VPID", "the VPID must not be 0 where VPIDs are enabled"),
    ("EPTP_MEMORY_TYPE", "EPT_POINTER", "bits 2:0 must be a memory type of IA32_VMX_EPT_VPID_CAP"),
    ("EPTP_WALK_LENGTH", "EPT_POINTER", "bits 5:3 must be one less than a walk length of IA32_VMX_EPT_VPID_CAP"),
    ("EPTP_ACCESSED_DIRTY", "EPT_POINTER", "bit 6 must be 0 without accessed and dirty flags for EPT"),
    ("EPTP_SHADOW_STACK", "EPT_POINTER", "bit 7 must be 0 without supervisor shadow-stack control"),
    ("EPTP_RESERVED", "EPT_POINTER", "bits 11:8 and those beyond the physical-address width must be 0"),
    ("PML_WITHOUT_EPT", "SECONDARY_PROC_CONTROLS", "page-modification logging needs EPT"),
    ("PML_ADDRESS", "PML_ADDRESS", "bits 11:0 and those beyond the physical-address width must be 0"),
    ("UNRESTRICTED_WITHOUT_EPT", "SECONDARY_PROC_CONTROLS", "unrestricted guest needs EPT"),
    ("MODE_BASED_WITHOUT_EPT", "SECONDARY_PROC_CONTROLS", "mode-based execute control for EPT needs EPT"),
    ("SUB_PAGE_WITHOUT_EPT", "SECONDARY_PROC_CONTROLS", "sub-page write permissions for EPT need EPT"),
    ("SUB_PAGE_TABLE", "SUB_PAGE_PERMISSION_TABLE_POINTER",
     "bits 11:0 and those beyond the physical-address width must be 0"),
    ("VM_FUNCTIONS_RESERVED", "VM_FUNCTION_CONTROLS", "reserved bits must be 0 as IA32_VMX_VMFUNC says"),
    ("EPTP_SWITCHING_WITHOUT_EPT", "VM_FUNCTION_CONTROLS SECONDARY_PROC_CONTROLS", "EPTP switching needs EPT"),
    ("EPTP_LIST", "EPTP_LIST_ADDRESS", "bits 11:0 and those beyond the physical-address width must be 0"),
    ("SHADOWING_BITMAPS", "VMREAD_BITMAP_ADDRESS VMWRITE_BITMAP_ADDRESS",
     "bits 11:0 and those beyond the physical-address width must be 0"),
    ("VE_INFORMATION", "VE_INFORMATION_ADDRESS", "bits 11:0 and those beyond the physical-address width must be 0"),
    ("PT_ADDRESSES", "SECONDARY_PROC_CONTROLS ENTRY_CONTROLS EXIT_CONTROLS",
     "Intel PT with guest-physical addresses needs EPT, and IA32_RTIT_CTL to be loaded on entry and cleared on exit"),
    ("TSC_MULTIPLIER_ZERO", "TSC_MULTIPLIER", "the multiplier must not be 0 where TSC scaling is used"),
    ("HLAT_WITHOUT_EPT", "TERTIARY_PROC_CONTROLS", "HLAT needs EPT"),
    ("HLAT_TABLE", "HLAT_POINTER", "bits 2:0, 11:5 and those beyond the physical-address width must be 0"),
    ("HLAT_PREFIX", "HLAT_PREFIX_SIZE", "the size must not be greater than IA32_VMX_EPT_VPID_CAP bits 53:48"),
    ("PAGING_WRITE_WITHOUT_EPT", "TERTIARY_PROC_CONTROLS", "EPT paging-write control needs EPT"),
    ("GUEST_PAGING_WITHOUT_EPT", "TERTIARY_PROC_CONTROLS", "guest-paging verification needs EPT"),
    ("PID_TABLE", "PID_POINTER_TABLE_ADDRESS", "bits 2:0 and those beyond the physical-address width must be 0"),
    ("PID_TABLE_END", "PID_POINTER_TABLE_ADDRESS LAST_PID_POINTER_INDEX",
     "the address of the last entry must be within the physical-address width"),
    ("APIC_TIMER_DELIVERY", "SECONDARY_PROC_CONTROLS TERTIARY_PROC_CONTROLS",
     "APIC-timer virtualization needs virtual-interrupt delivery"),
    ("APIC_TIMER_VECTOR", "VIRTUAL_TIMER_VECTOR", "the vector must be in the range 16 to 255"),
    ("PASID_DIRECTORIES", "LOW_PASID_DIRECTORY_ADDRESS HIGH_PASID_DIRECTORY_ADDRESS",
     "bits 11:0 and those beyond the physical-address width must be 0"),
)

_EXIT = _list("VM-Exit Control Fields", CONTROLS, EXIT_RESERVED,
    ("EXIT_RESERVED", "EXIT_CONTROLS", "reserved bits must be as IA32_VMX_(TRUE_)EXIT_CTLS allows"),
    ("SECONDARY_EXIT_RESERVED", "SECONDARY_EXIT_CONTROLS", "reserved bits must be 0 as IA32_VMX_EXIT_CTLS2 says"),
    ("SAVE_INACTIVE_TIMER", "PIN_CONTROLS EXIT_CONTROLS",
     "saving the VMX-preemption timer needs the timer to be activated"),
    ("EXIT_STORE_AREA", "EXIT_MSR_STORE_ADDRESS EXIT_MSR_STORE_COUNT",
     "bits 3:0 must be 0, and the area must be within the physical-address width"),
    ("EXIT_LOAD_AREA", "EXIT_MSR_LOAD_ADDRESS EXIT_MSR_LOAD_COUNT",
     "bits 3:0 must be 0, and the area must be within the physical-address width"),
)

_INFORMATION = "ENTRY_INTERRUPTION_INFORMATION"
_ENTRY = _list("VM-Entry Control Fields", CONTROLS, ENTRY_RESERVED,
    ("ENTRY_RESERVED", "ENTRY_CONTROLS", "reserved bits must be as IA32_VMX_(TRUE_)ENTRY_CTLS allows"),
    ("INJECTION_TYPE", _INFORMATION, "the type must not be 1, nor 7 without the monitor trap flag or FRED"),
    ("INJECTION_VECTOR", _INFORMATION,
     "the vector must be 2 for an NMI, at most 31 for a hardware exception, 0 for other events without FRED"),
    ("INJECTION_ERROR_CODE", f"{_INFORMATION} GUEST_CR0",
     "an error code is delivered with hardware exceptions that have one, in protected mode, and never else"),
    ("INJECTION_RESERVED", _INFORMATION, "reserved bits of 30:12 must be 0"),
    ("INJECTION_ERROR_VALUE", f"{_INFORMATION} ENTRY_EXCEPTION_ERROR_CODE", "bits 31:16 of the error code must be 0"),
    ("INJECTION_LENGTH", f"{_INFORMATION} ENTRY_INSTRUCTION_LENGTH",
     "a software event needs an instruction length of 1 to 15, or 0 where IA32_VMX_MISC bit 30 is 1"),
    ("ENTRY_LOAD_AREA", "ENTRY_MSR_LOAD_ADDRESS ENTRY_MSR_LOAD_COUNT",
     "bits 3:0 must be 0, and the area must be within the physical-address width"),
    ("SMM_OUTSIDE_SMM", "ENTRY_CONTROLS",
     "entry to SMM and deactivate dual-monitor treatment must be 0 outside system-management mode"),
)

_HOST_REGISTERS = _list("Checks on Host Control Registers, MSRs, and SSP", HOST, HOST_CR0_FIXED,
    ("HOST_CR0_FIXED", "HOST_CR0", "bits but CD and NW must be as IA32_VMX_CR0_FIXED0 and FIXED1 allow"),
    ("HOST_CR4_FIXED", "HOST_CR4", "bits must be as IA32_VMX_CR4_FIXED0 and FIXED1 allow"),
    ("HOST_CET_WITHOUT_WP", "HOST_CR0 HOST_CR4", "CR4.CET needs CR0.WP"),
    ("HOST_CR3_RESERVED", "HOST_CR3", "bits beyond the physical-address width must be 0"),
    ("HOST_SYSENTER", "HOST_IA32_SYSENTER_ESP HOST_IA32_SYSENTER_EIP", "the addresses must be canonical"),
    ("HOST_PERF_GLOBAL_CTRL", "HOST_IA32_PERF_GLOBAL_CTRL", "bits reserved in the MSR must be 0"),
    ("HOST_PAT", "HOST_IA32_PAT", "each byte must be a memory type that may be written to IA32_PAT: 0, 1, 4 to 7"),
    ("HOST_EFER_RESERVED", "HOST_IA32_EFER", "bits reserved in the MSR must be 0"),
    ("HOST_EFER_MODE", "HOST_IA32_EFER EXIT_CONTROLS", "LMA and LME must each be the host address-space size control"),
    ("HOST_CET", "HOST_IA32_S_CET HOST_SSP HOST_IA32_INTERRUPT_SSP_TABLE_ADDR",
     "reserved bits must be 0, addresses canonical, SSP aligned to 4 bytes"),
    ("HOST_PKRS", "HOST_IA32_PKRS", "bits 63:32 must be 0"),
    ("HOST_SPEC_CTRL", "HOST_IA32_SPEC_CTRL", "bits reserved in the MSR must be 0"),
    ("HOST_FRED", "HOST_IA32_FRED_CONFIG HOST_IA32_FRED_RSP1 HOST_IA32_FRED_RSP2 HOST_IA32_FRED_RSP3"
     " HOST_IA32_FRED_SSP1 HOST_IA32_FRED_SSP2 HOST_IA32_FRED_SSP3",
     "reserved bits must be 0, addresses canonical"),
)

_HOST_SEGMENTS = _list("Checks on Host Segment and Descriptor-Table Registers", HOST, HOST_SELECTOR_BITS,
    ("HOST_SELECTOR_BITS", " ".join(f"HOST_{s}_SELECTOR" for s in ("CS", "SS", "DS", "ES", "FS", "GS", "TR")),
     "RPL and the TI flag of each selector must be 0"),
    ("HOST_CS_ZERO", "HOST_CS_SELECTOR", "the selector must not be 0"),
    ("HOST_TR_ZERO", "HOST_TR_SELECTOR", "the selector must not be 0"),
    ("HOST_SS_ZERO", "HOST_SS_SELECTOR EXIT_CONTROLS", "the selector must not be 0 for a 32-bit host"),
    ("HOST_BASES", "HOST_FS_BASE HOST_GS_BASE HOST_GDTR_BASE HOST_IDTR_BASE HOST_TR_BASE",
     "the addresses must be canonical"),
)

_SPACE = _list("Checks Related to Address-Space Size", HOST, HOST_SPACE_NOW,
    ("HOST_SPACE_NOW", "EXIT_CONTROLS", "host address-space size must be IA32_EFER.LMA at the time of VM entry"),
    ("ENTRY_MODE_FOR_32_BIT_HOST", "EXIT_CONTROLS ENTRY_CONTROLS", "a 32-bit host excludes an IA-32e mode guest"),
    ("HOST_PCIDE", "EXIT_CONTROLS HOST_CR4", "a 32-bit host needs CR4.PCIDE 0"),
    ("HOST_RIP_HIGH", "EXIT_CONTROLS HOST_RIP", "a 32-bit host needs bits 63:32 of RIP 0"),
    ("HOST_PAE", "EXIT_CONTROLS HOST_CR4", "a 64-bit host needs CR4.PAE 1"),
    ("HOST_RIP_CANONICAL", "EXIT_CONTROLS HOST_RIP", "a 64-bit host needs a canonical RIP"),
)

_REGISTERS = _list("Checks on Guest Control Registers, Debug Registers, and MSRs", GUEST, GUEST_CR0_FIXED,
    ("GUEST_CR0_FIXED", "GUEST_CR0", "bits but CD and NW must be as IA32_VMX_CR0_FIXED0 and FIXED1 allow;"
     " PE and PG are free for an unrestricted guest"),
    ("GUEST_PG_WITHOUT_PE", "GUEST_CR0", "PG needs PE"),
    ("GUEST_CR4_FIXED", "GUEST_CR4", "bits must be as IA32_VMX_CR4_FIXED0 and FIXED1 allow"),
    ("GUEST_CET_WITHOUT_WP", "GUEST_CR0 GUEST_CR4", "CR4.CET needs CR0.WP"),
    ("GUEST_DEBUGCTL", "GUEST_IA32_DEBUGCTL", "bits reserved in the MSR must be 0"),
    ("GUEST_IA32E_PAGING", "ENTRY_CONTROLS GUEST_CR0 GUEST_CR4", "an IA-32e mode guest needs CR0.PG and CR4.PAE"),
    ("GUEST_PCIDE", "ENTRY_CONTROLS GUEST_CR4", "CR4.PCIDE needs an IA-32e mode guest"),
    ("GUEST_CR3_RESERVED", "GUEST_CR3", "bits beyond the physical-address width must be 0"),
    ("GUEST_DR7_HIGH", "GUEST_DR7", "bits 63:32 must be 0"),
    ("GUEST_SYSENTER", "GUEST_IA32_SYSENTER_ESP GUEST_IA32_SYSENTER_EIP", "the addresses must be canonical"),
    ("GUEST_CET", "GUEST_IA32_S_CET GUEST_IA32_INTERRUPT_SSP_TABLE_ADDR",
     "reserved bits must be 0, addresses canonical"),
    ("GUEST_PERF_GLOBAL_CTRL", "GUEST_IA32_PERF_GLOBAL_CTRL", "bits reserved in the MSR must be 0"),
    ("GUEST_PAT", "GUEST_IA32_PAT", "each byte must be a memory type that may be written to IA32_PAT: 0, 1, 4 to 7"),
    ("GUEST_EFER_RESERVED", "GUEST_IA32_EFER", "bits reserved in the MSR must be 0"),
    ("GUEST_EFER_LMA", "GUEST_IA32_EFER ENTRY_CONTROLS", "LMA must be the IA-32e mode guest control"),
    ("GUEST_EFER_LME", "GUEST_IA32_EFER GUEST_CR0", "LME must be LMA with paging"),
    ("GUEST_BNDCFGS", "GUEST_IA32_BNDCFGS", "bits 11:2 must be 0, the address canonical"),
    ("GUEST_RTIT_CTL", "GUEST_IA32_RTIT_CTL", "bits reserved in the MSR must be 0"),
    ("GUEST_LBR_CTL", "GUEST_IA32_LBR_CTL", "bits reserved in the MSR must be 0"),
    ("GUEST_PKRS", "GUEST_IA32_PKRS", "bits 63:32 must be 0"),
    ("GUEST_UINV", "GUEST_UINV", "bits 15:8 must be 0"),
    ("GUEST_SPEC_CTRL", "GUEST_IA32_SPEC_CTRL", "bits reserved in the MSR must be 0"),
    ("GUEST_FRED", "GUEST_IA32_FRED_CONFIG GUEST_IA32_FRED_RSP1 GUEST_IA32_FRED_RSP2 GUEST_IA32_FRED_RSP3"
     " GUEST_IA32_FRED_SSP1 GUEST_IA32_FRED_SSP2 GUEST_IA32_FRED_SSP3",
     "reserved bits must be 0, addresses canonical"),
)

_SIX, _DATA, _ALL = "ES CS SS DS FS GS", "ES DS FS GS", "ES CS SS DS FS GS LDTR TR"
_SEGMENT_RULES = (
    *_segments(SELECTOR_TABLE, "SELECTOR_TABLE", "LDTR TR", "SELECTOR", "the TI flag of {} must be 0"),
    *_segments(SELECTOR_RPL, "SELECTOR_RPL", "SS", "SELECTOR", "RPL of {} must be that of CS"),
    *_segments(BASE_V86, "BASE_V86", _SIX, "BASE SELECTOR", "in virtual-8086 mode the base of {} is 16 times its"
               " selector"),
    *_segments(BASE_LINEAR, "BASE_LINEAR", _ALL, "BASE", "the base of {} must be canonical (FS, GS, LDTR, TR) or below"
               " 4 GiB (others)"),
    *_segments(LIMIT_V86, "LIMIT_V86", _SIX, "LIMIT", "in virtual-8086 mode the limit of {} is FFFFH"),
    *_segments(RIGHTS_V86, "RIGHTS_V86", _SIX, "ACCESS_RIGHTS", "in virtual-8086 mode the access rights of {} are F3H"),
    *_segments(TYPE, "TYPE", _ALL, "ACCESS_RIGHTS", "the type of {} must be one that may be loaded into it"),
    *_segments(DESCRIPTOR_TYPE, "DESCRIPTOR_TYPE", _ALL, "ACCESS_RIGHTS", "S of {} must be 0 for LDTR and TR, else 1"),
    *_segments(DPL, "DPL", _SIX, "ACCESS_RIGHTS SELECTOR", "DPL of {} must go with SS.DPL (CS), with its RPL (others)"),
    *_segments(PRESENT, "PRESENT", _ALL, "ACCESS_RIGHTS", "P of {} must be 1"),
    *_segments(RIGHTS_RESERVED, "RIGHTS_RESERVED", _ALL, "ACCESS_RIGHTS", "bits 11:8 and 31:17 of {} must be 0"),
    *_segments(CODE_SIZE, "CODE_SIZE", "CS", "ACCESS_RIGHTS", "D/B of {} must be 0 in 64-bit mode"),
    *_segments(GRANULARITY, "GRANULARITY", _ALL, "LIMIT ACCESS_RIGHTS",
               "G of {} must be 0 if a limit bit of 11:0 is 0, and 1 if one of 31:20 is 1"),
    *_segments(USABLE, "USABLE", "TR", "ACCESS_RIGHTS", "{} must be usable"),
)

_TABLES = _list("Checks on Guest Descriptor-Table Registers", GUEST, GDTR_BASE,
    ("GDTR_BASE", "GUEST_GDTR_BASE", "the address must be canonical"),
    ("IDTR_BASE", "GUEST_IDTR_BASE", "the address must be canonical"),
    ("GDTR_LIMIT", "GUEST_GDTR_LIMIT", "bits 31:16 must be 0"),
    ("IDTR_LIMIT", "GUEST_IDTR_LIMIT", "bits 31:16 must be 0"),
)

_FLOW = _list("Checks on Guest RIP, RFLAGS, and SSP", GUEST, RIP_HIGH,
    ("RIP_HIGH", "GUEST_RIP ENTRY_CONTROLS GUEST_CS_ACCESS_RIGHTS", "bits 63:32 must be 0 outside 64-bit mode"),
    ("RIP_LINEAR", "GUEST_RIP", "bits 63:N must be identical in 64-bit mode, with N linear-address bits"),
    ("RFLAGS_RESERVED", "GUEST_RFLAGS", "bits 63:22, 15, 5 and 3 must be 0, bit 1 must be 1"),
    ("RFLAGS_VM", "GUEST_RFLAGS ENTRY_CONTROLS GUEST_CR0", "VM must be 0 in IA-32e mode and without CR0.PE"),
    ("RFLAGS_IF", f"GUEST_RFLAGS {_INFORMATION}", "IF must be 1 where an external interrupt is injected"),
    ("SSP_ALIGNMENT", "GUEST_SSP", "bits 1:0 must be 0"),
    ("SSP_ADDRESS", "GUEST_SSP", "bits 63:32 must be 0 outside 64-bit mode, bits 63:N identical in it"),
)

_ACTIVITY, _BLOCKING = "GUEST_ACTIVITY_STATE", "GUEST_INTERRUPTIBILITY_STATE"
_PENDING = "GUEST_PENDING_DEBUG_EXCEPTIONS"
_NON_REGISTER = _list("Checks on Guest Non-Register State", GUEST, ACTIVITY_VALUE,
    ("ACTIVITY_VALUE", _ACTIVITY, "the state must be one that IA32_VMX_MISC bits 8:6 name, or active"),
    ("ACTIVITY_HLT_DPL", f"{_ACTIVITY} GUEST_SS_ACCESS_RIGHTS", "HLT needs SS.DPL 0"),
    ("ACTIVITY_BLOCKING", f"{_ACTIVITY} {_BLOCKING}", "blocking by STI or by MOV SS needs the active state"),
    ("ACTIVITY_EVENT", f"{_ACTIVITY} {_INFORMATION}", "an injected event must be one that the activity state allows"),
    ("ACTIVITY_SMM", f"{_ACTIVITY} ENTRY_CONTROLS", "entry to SMM excludes wait-for-SIPI"),
    ("BLOCKING_RESERVED", _BLOCKING, "bits 31:5 must be 0"),
    ("BLOCKING_BOTH", _BLOCKING, "blocking by STI excludes blocking by MOV SS"),
    ("BLOCKING_STI_IF", f"{_BLOCKING} GUEST_RFLAGS", "blocking by STI needs RFLAGS.IF"),
    ("BLOCKING_EXTERNAL", f"{_BLOCKING} {_INFORMATION}", "an external interrupt excludes blocking by STI or MOV SS"),
    ("BLOCKING_NMI", f"{_BLOCKING} {_INFORMATION}", "an NMI excludes blocking by MOV SS"),
    ("BLOCKING_NMI_BY_STI", f"{_BLOCKING} {_INFORMATION}", "an NMI excludes blocking by STI"),
    ("BLOCKING_SMI", _BLOCKING, "blocking by SMI must be 0 outside system-management mode"),
    ("BLOCKING_SMM_ENTRY", f"{_BLOCKING} ENTRY_CONTROLS", "entry to SMM needs blocking by SMI"),
    ("BLOCKING_VIRTUAL_NMI", f"{_BLOCKING} {_INFORMATION} PIN_CONTROLS",
     "an NMI excludes blocking by NMI with virtual NMIs"),
    ("BLOCKING_ENCLAVE", _BLOCKING, "enclave interruption needs SGX and excludes blocking by MOV SS"),
    ("PENDING_RESERVED", _PENDING, "bits 11:4, 13, 15 and 63:17 must be 0"),
    ("PENDING_STEP", f"{_PENDING} GUEST_RFLAGS GUEST_IA32_DEBUGCTL {_BLOCKING} {_ACTIVITY}",
     "with blocking by STI or MOV SS or in HLT, BS must be RFLAGS.TF and not DEBUGCTL.BTF"),
    ("PENDING_RTM", f"{_PENDING} {_BLOCKING}",
     "RTM needs bit 12, no other bit, a processor with RTM, and no blocking by MOV SS"),
    ("LINK_ADDRESS", "VMCS_LINK_POINTER", "bits 11:0 and those beyond the physical-address width must be 0"),
    ("LINK_REVISION", "VMCS_LINK_POINTER", "bits 30:0 of the VMCS there must be the VMCS revision identifier"),
    ("LINK_SHADOW", "VMCS_LINK_POINTER SECONDARY_PROC_CONTROLS",
     "bit 31 of the VMCS there must be the VMCS shadowing control"),
    ("LINK_CURRENT", "VMCS_LINK_POINTER", "the pointer must not be the current-VMCS pointer"),
)

_PDPTES = _list("Checks on Guest Page-Directory-Pointer-Table Entries", GUEST, PDPTE_RESERVED,
    ("PDPTE_RESERVED", "GUEST_CR3 GUEST_PDPTE0 GUEST_PDPTE1 GUEST_PDPTE2 GUEST_PDPTE3",
     "bits 2:1, 8:5 and those beyond the physical-address width must be 0 in a present entry"),
)
# fmt: on

CHECKS: Final[tuple[Check, ...]] = (
    *(*_EXECUTION, *_EXIT, *_ENTRY, *_HOST_REGISTERS, *_HOST_SEGMENTS, *_SPACE, *_REGISTERS, *_SEGMENT_RULES),
    *(*_TABLES, *_FLOW, *_NON_REGISTER, *_PDPTES),
)
BY_CHECK_NUMBER: Final[dict[int, Check]] = {check.number: check for check in CHECKS}
