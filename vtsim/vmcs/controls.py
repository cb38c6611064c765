"""Every control bit of the VMCS: in which word, at which place, under which name; nothing that acts on them.

Names are the manual's; those of VM-exit controls start with EXIT_, those of VM-entry controls with ENTRY_.

SDM: "Pin-Based VM-Execution Controls"; "Processor-Based VM-Execution Controls".
SDM: "VM-Exit Controls"; "VM-Entry Controls"; "VM-Function Controls".
Not modelled: the controls of Intel TDX.
"""

from __future__ import annotations

from typing import Final

import attrs


@attrs.frozen(kw_only=True)
class ControlWord:
    """One field of control bits and the MSRs that say how its bits may be set.

    `default1` are the reserved bits that are 1 in a processor's oldest form of the word; `true_msr` says
    which of them may be 0. A word with 64 bits has a capability MSR of allowed 1-settings only.
    """

    field: str
    bits: int
    msr: int
    true_msr: int | None = None
    default1: int = 0


@attrs.frozen(kw_only=True)
class Control:
    """One control bit."""

    name: str
    word: ControlWord
    bit: int

    @property
    def mask(self) -> int:
        return 1 << self.bit


def _word(field: str, bits: int, msr: int, true_msr: int | None = None, default1: int = 0) -> ControlWord:
    return ControlWord(field=field, bits=bits, msr=msr, true_msr=true_msr, default1=default1)


# fmt: off
#                      field                      bits  MSR    TRUE   default1
PIN            = _word("PIN_CONTROLS",            32,   0x481, 0x48D, 0x0000_0016)
PRIMARY        = _word("PRIMARY_PROC_CONTROLS",   32,   0x482, 0x48E, 0x0401_E172)
SECONDARY      = _word("SECONDARY_PROC_CONTROLS", 32,   0x48B)
TERTIARY       = _word("TERTIARY_PROC_CONTROLS",  64,   0x492)
EXIT           = _word("EXIT_CONTROLS",           32,   0x483, 0x48F, 0x0003_6DFF)
SECONDARY_EXIT = _word("SECONDARY_EXIT_CONTROLS", 64,   0x493)
ENTRY          = _word("ENTRY_CONTROLS",          32,   0x484, 0x490, 0x0000_11FF)
VM_FUNCTION    = _word("VM_FUNCTION_CONTROLS",    64,   0x491)
# fmt: on

WORDS: Final = (PIN, PRIMARY, SECONDARY, TERTIARY, EXIT, SECONDARY_EXIT, ENTRY, VM_FUNCTION)


def _bits(word: ControlWord, *rows: tuple[int, str]) -> tuple[Control, ...]:
    return tuple(Control(name=name, word=word, bit=bit) for bit, name in rows)


# fmt: off
CONTROLS: Final[tuple[Control, ...]] = (
    *_bits(PIN,
        ( 0, "EXTERNAL_INTERRUPT_EXITING"),
        ( 3, "NMI_EXITING"),
        ( 5, "VIRTUAL_NMIS"),
        ( 6, "ACTIVATE_PREEMPTION_TIMER"),
        ( 7, "PROCESS_POSTED_INTERRUPTS"),
    ),
    *_bits(PRIMARY,
        ( 2, "INTERRUPT_WINDOW_EXITING"),
        ( 3, "USE_TSC_OFFSETTING"),
        ( 7, "HLT_EXITING"),
        ( 9, "INVLPG_EXITING"),
        (10, "MWAIT_EXITING"),
        (11, "RDPMC_EXITING"),
        (12, "RDTSC_EXITING"),
        (15, "CR3_LOAD_EXITING"),
        (16, "CR3_STORE_EXITING"),
        (17, "ACTIVATE_TERTIARY_CONTROLS"),
        (19, "CR8_LOAD_EXITING"),
        (20, "CR8_STORE_EXITING"),
        (21, "USE_TPR_SHADOW"),
        (22, "NMI_WINDOW_EXITING"),
        (23, "MOV_DR_EXITING"),
        (24, "UNCONDITIONAL_IO_EXITING"),
        (25, "USE_IO_BITMAPS"),
        (27, "MONITOR_TRAP_FLAG"),
        (28, "USE_MSR_BITMAPS"),
        (29, "MONITOR_EXITING"),
        (30, "PAUSE_EXITING"),
        (31, "ACTIVATE_SECONDARY_CONTROLS"),
    ),
    *_bits(SECONDARY,
        ( 0, "VIRTUALIZE_APIC_ACCESSES"),
        ( 1, "ENABLE_EPT"),
        ( 2, "DESCRIPTOR_TABLE_EXITING"),
        ( 3, "ENABLE_RDTSCP"),
        ( 4, "VIRTUALIZE_X2APIC_MODE"),
        ( 5, "ENABLE_VPID"),
        ( 6, "WBINVD_EXITING"),
        ( 7, "UNRESTRICTED_GUEST"),
        ( 8, "APIC_REGISTER_VIRTUALIZATION"),
        ( 9, "VIRTUAL_INTERRUPT_DELIVERY"),
        (10, "PAUSE_LOOP_EXITING"),
        (11, "RDRAND_EXITING"),
        (12, "ENABLE_INVPCID"),
        (13, "ENABLE_VM_FUNCTIONS"),
        (14, "VMCS_SHADOWING"),
        (15, "ENABLE_ENCLS_EXITING"),
        (16, "RDSEED_EXITING"),
        (17, "ENABLE_PML"),
        (18, "EPT_VIOLATION_VE"),
        (19, "CONCEAL_VMX_FROM_PT"),
        (20, "ENABLE_XSAVES_XRSTORS"),
        (21, "PASID_TRANSLATION"),
        (22, "MODE_BASED_EXECUTE_CONTROL"),
        (23, "SUB_PAGE_WRITE_PERMISSIONS"),
        (24, "PT_USES_GUEST_PHYSICAL_ADDRESSES"),
        (25, "USE_TSC_SCALING"),
        (26, "ENABLE_USER_WAIT_AND_PAUSE"),
        (27, "ENABLE_PCONFIG"),
        (28, "ENABLE_ENCLV_EXITING"),
        (30, "VMM_BUS_LOCK_DETECTION"),
        (31, "INSTRUCTION_TIMEOUT"),
    ),
    *_bits(TERTIARY,
        ( 0, "LOADIWKEY_EXITING"),
        ( 1, "ENABLE_HLAT"),
        ( 2, "EPT_PAGING_WRITE_CONTROL"),
        ( 3, "GUEST_PAGING_VERIFICATION"),
        ( 4, "IPI_VIRTUALIZATION"),
        ( 6, "ENABLE_MSR_LIST_INSTRUCTIONS"),
        ( 7, "VIRTUALIZE_IA32_SPEC_CTRL"),
        ( 8, "APIC_TIMER_VIRTUALIZATION"),
    ),
    *_bits(EXIT,
        ( 2, "EXIT_SAVE_DEBUG_CONTROLS"),
        ( 9, "EXIT_HOST_ADDRESS_SPACE_SIZE"),
        (12, "EXIT_LOAD_IA32_PERF_GLOBAL_CTRL"),
        (15, "EXIT_ACKNOWLEDGE_INTERRUPT"),
        (18, "EXIT_SAVE_IA32_PAT"),
        (19, "EXIT_LOAD_IA32_PAT"),
        (20, "EXIT_SAVE_IA32_EFER"),
        (21, "EXIT_LOAD_IA32_EFER"),
        (22, "EXIT_SAVE_PREEMPTION_TIMER"),
        (23, "EXIT_CLEAR_IA32_BNDCFGS"),
        (24, "EXIT_CONCEAL_VMX_FROM_PT"),
        (25, "EXIT_CLEAR_IA32_RTIT_CTL"),
        (26, "EXIT_CLEAR_IA32_LBR_CTL"),
        (27, "EXIT_CLEAR_UINV"),
        (28, "EXIT_LOAD_CET_STATE"),
        (29, "EXIT_LOAD_PKRS"),
        (30, "EXIT_SAVE_IA32_PERF_GLOBAL_CTRL"),
        (31, "EXIT_ACTIVATE_SECONDARY_CONTROLS"),
    ),
    *_bits(SECONDARY_EXIT,
        ( 0, "EXIT_SAVE_FRED"),
        ( 1, "EXIT_LOAD_FRED"),
        ( 2, "EXIT_LOAD_IA32_SPEC_CTRL"),
        ( 3, "EXIT_PREMATURELY_BUSY_SHADOW_STACK"),
    ),
    *_bits(ENTRY,
        ( 2, "ENTRY_LOAD_DEBUG_CONTROLS"),
        ( 9, "ENTRY_IA32E_MODE_GUEST"),
        (10, "ENTRY_TO_SMM"),
        (11, "ENTRY_DEACTIVATE_DUAL_MONITOR"),
        (13, "ENTRY_LOAD_IA32_PERF_GLOBAL_CTRL"),
        (14, "ENTRY_LOAD_IA32_PAT"),
        (15, "ENTRY_LOAD_IA32_EFER"),
        (16, "ENTRY_LOAD_IA32_BNDCFGS"),
        (17, "ENTRY_CONCEAL_VMX_FROM_PT"),
        (18, "ENTRY_LOAD_IA32_RTIT_CTL"),
        (19, "ENTRY_LOAD_UINV"),
        (20, "ENTRY_LOAD_CET_STATE"),
        (21, "ENTRY_LOAD_IA32_LBR_CTL"),
        (22, "ENTRY_LOAD_PKRS"),
        (23, "ENTRY_LOAD_FRED"),
        (24, "ENTRY_LOAD_IA32_SPEC_CTRL"),
    ),
    *_bits(VM_FUNCTION,
        ( 0, "EPTP_SWITCHING"),
    ),
)
# fmt: on

CONTROL: Final[dict[str, Control]] = {control.name: control for control in CONTROLS}


def describe_controls(word: ControlWord, value: int) -> str:
    """Name the bits that are set in a control field, for traces and errors."""
    known = {control.bit: control.name for control in CONTROLS if control.word is word}
    bits = (bit for bit in range(word.bits) if value >> bit & 1)
    return " | ".join(known.get(bit, f"bit {bit}") for bit in bits) or "0"
