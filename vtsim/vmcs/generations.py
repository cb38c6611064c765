"""What VMX could do in each processor generation, as the features that each added.

Rows are server parts; some client parts of a generation have features fused off. "Recorded" means that the
capability MSRs of the named processor were published; a test holds the row against them.

SDM: "VMX Capability Reporting Facility".
"""

from __future__ import annotations

from functools import cache
from typing import Final

import attrs

from vtsim.vmcs.capabilities import Capabilities


@attrs.frozen(kw_only=True)
class Generation:
    """One generation: what it added to the one before it, and the numbers its MSRs hold."""

    name: str
    source: str
    added: tuple[str, ...]
    before: Generation | None = None
    revision: int
    vmcs_bytes: int = 1024
    cr4_fixed1: int
    preemption_timer_shift: int = 0

    @property
    def features(self) -> frozenset[str]:
        """All features, with those of the generations before."""
        return frozenset(self.added) | (self.before.features if self.before else frozenset())

    def capabilities(self) -> Capabilities:
        return _capabilities(self)


@cache
def _capabilities(generation: Generation) -> Capabilities:
    """Made once: every machine and every check of a scenario asks for the same few."""
    return Capabilities.from_features(
        generation.features,
        revision=generation.revision,
        vmcs_bytes=generation.vmcs_bytes,
        cr4_fixed1=generation.cr4_fixed1,
        preemption_timer_shift=generation.preemption_timer_shift,
    )


P4_672: Final = Generation(
    name="p4-672",
    source="Core Duo T2600 MSRs recorded by VirtualBox, the other first-generation VT-x processor, plus what"
    " Intel 64 adds by the manual; revision estimated",
    revision=3,
    cr4_fixed1=0x27FF,
    added=(
        *("DUAL_MONITOR", "ACTIVITY_HLT", "ACTIVITY_SHUTDOWN", "ACTIVITY_WAIT_FOR_SIPI"),
        *("EXTERNAL_INTERRUPT_EXITING", "NMI_EXITING"),
        *("INTERRUPT_WINDOW_EXITING", "USE_TSC_OFFSETTING", "HLT_EXITING", "INVLPG_EXITING", "MWAIT_EXITING"),
        *("RDPMC_EXITING", "RDTSC_EXITING", "CR3_LOAD_EXITING", "CR3_STORE_EXITING", "CR8_LOAD_EXITING"),
        *("CR8_STORE_EXITING", "MOV_DR_EXITING", "UNCONDITIONAL_IO_EXITING", "USE_IO_BITMAPS"),
        *("USE_MSR_BITMAPS", "MONITOR_EXITING", "PAUSE_EXITING"),
        *("EXIT_SAVE_DEBUG_CONTROLS", "EXIT_HOST_ADDRESS_SPACE_SIZE", "EXIT_ACKNOWLEDGE_INTERRUPT"),
        *("ENTRY_LOAD_DEBUG_CONTROLS", "ENTRY_IA32E_MODE_GUEST", "ENTRY_TO_SMM"),
        "ENTRY_DEACTIVATE_DUAL_MONITOR",
    ),
)

CORE2: Final = Generation(
    name="core2",
    source="Xeon X5482 MSRs recorded by VirtualBox",
    before=P4_672,
    revision=0xD,
    vmcs_bytes=2048,
    cr4_fixed1=0x27FF,
    added=(
        *("INS_OUTS_INFORMATION", "VIRTUAL_NMIS", "NMI_WINDOW_EXITING", "USE_TPR_SHADOW"),
        *("ACTIVATE_SECONDARY_CONTROLS", "VIRTUALIZE_APIC_ACCESSES", "WBINVD_EXITING"),
        *("EXIT_LOAD_IA32_PERF_GLOBAL_CTRL", "ENTRY_LOAD_IA32_PERF_GLOBAL_CTRL"),
    ),
)

NEHALEM: Final = Generation(
    name="nehalem",
    source="the manual's list of features by processor and Linux's handling of Nehalem; revision estimated",
    before=CORE2,
    revision=0xE,
    cr4_fixed1=0x27FF,
    preemption_timer_shift=5,
    added=(
        *("TRUE_CONTROLS", "ACTIVATE_PREEMPTION_TIMER", "MONITOR_TRAP_FLAG"),
        *("ENABLE_EPT", "ENABLE_VPID", "DESCRIPTOR_TABLE_EXITING", "ENABLE_RDTSCP", "VIRTUALIZE_X2APIC_MODE"),
        *("EXIT_SAVE_IA32_PAT", "EXIT_LOAD_IA32_PAT", "EXIT_SAVE_IA32_EFER", "EXIT_LOAD_IA32_EFER"),
        *("EXIT_SAVE_PREEMPTION_TIMER", "ENTRY_LOAD_IA32_PAT", "ENTRY_LOAD_IA32_EFER"),
        *("EPT_EXECUTE_ONLY", "EPT_WALK_LENGTH_4", "EPT_UNCACHEABLE", "EPT_WRITE_BACK", "EPT_2M_PAGES"),
        *("INVEPT", "INVEPT_SINGLE_CONTEXT", "INVEPT_ALL_CONTEXTS", "INVVPID", "INVVPID_INDIVIDUAL_ADDRESS"),
        *("INVVPID_SINGLE_CONTEXT", "INVVPID_ALL_CONTEXTS", "INVVPID_SINGLE_CONTEXT_KEEPING_GLOBALS"),
    ),
)

WESTMERE: Final = Generation(
    name="westmere",
    source="secondary controls 0xff in the VirtualBox log of boot2docker issue 270; the rest estimated",
    before=NEHALEM,
    revision=0xF,
    cr4_fixed1=0x2_27FF,
    preemption_timer_shift=5,
    added=("UNRESTRICTED_GUEST", "SAVE_EFER_LMA", "EPT_1G_PAGES"),
)

SANDY_BRIDGE: Final = Generation(
    name="sandy-bridge",
    source="Core i7-3960X MSRs recorded by VirtualBox",
    before=WESTMERE,
    revision=0x10,
    cr4_fixed1=0x6_27FF,
    preemption_timer_shift=5,
    added=("PAUSE_LOOP_EXITING", "VMXOFF_UNBLOCKS_SMI"),
)

HASWELL: Final = Generation(
    name="haswell",
    source="Broadwell's recorded MSRs less what Broadwell added by the manual; APIC virtualization is in"
    " server parts from Ivy Bridge-EP on",
    before=SANDY_BRIDGE,
    revision=0x12,
    cr4_fixed1=0x17_27FF,
    preemption_timer_shift=5,
    added=(
        *("RDRAND_EXITING", "ENABLE_INVPCID", "ENABLE_VM_FUNCTIONS", "EPTP_SWITCHING", "VMCS_SHADOWING"),
        *("EPT_ACCESSED_DIRTY", "VMWRITE_EXIT_INFORMATION", "RDMSR_SMBASE_IN_SMM"),
        *("APIC_REGISTER_VIRTUALIZATION", "VIRTUAL_INTERRUPT_DELIVERY", "PROCESS_POSTED_INTERRUPTS"),
    ),
)

BROADWELL: Final = Generation(
    name="broadwell",
    source="Core i7-5600U MSRs recorded by VirtualBox; page-modification logging is in server parts",
    before=HASWELL,
    revision=0x12,
    cr4_fixed1=0x37_67FF,
    preemption_timer_shift=5,
    added=("RDSEED_EXITING", "ENABLE_PML", "EPT_VIOLATION_VE"),
)

SKYLAKE_SP: Final = Generation(
    name="skylake-sp",
    source="Core i7-7800X MSRs recorded by InstLatx64, with VMCS shadowing and page-modification logging,"
    " which that client part lacks",
    before=BROADWELL,
    revision=4,
    cr4_fixed1=0x37_27FF,
    preemption_timer_shift=7,
    added=(
        *("ENABLE_XSAVES_XRSTORS", "MODE_BASED_EXECUTE_CONTROL", "USE_TSC_SCALING", "CONCEAL_VMX_FROM_PT"),
        *("EXIT_CLEAR_IA32_BNDCFGS", "EXIT_CONCEAL_VMX_FROM_PT", "ENTRY_LOAD_IA32_BNDCFGS"),
        *("ENTRY_CONCEAL_VMX_FROM_PT", "PT_IN_VMX_OPERATION", "ZERO_LENGTH_INJECTION"),
        "EPT_EXIT_INFORMATION",
    ),
)

CASCADE_LAKE: Final = Generation(
    name="cascade-lake",
    source="the core is Skylake-SP's; no VMX feature is documented as new",
    before=SKYLAKE_SP,
    revision=4,
    cr4_fixed1=0x37_27FF,
    preemption_timer_shift=7,
    added=(),
)

ICE_LAKE_SP: Final = Generation(
    name="ice-lake-sp",
    source="Cascade Lake with five levels of paging and of EPT, as Intel's paper on 5-level paging (2017) has them, and"
    " CR4.UMIP and CR4.PKE; not recorded",
    before=CASCADE_LAKE,
    revision=4,
    cr4_fixed1=0x77_3FFF,
    preemption_timer_shift=7,
    added=("EPT_WALK_LENGTH_5",),
)

SAPPHIRE_RAPIDS: Final = Generation(
    name="sapphire-rapids",
    source="Ice Lake-SP with IPI virtualization, which Linux 6.0 uses from this processor on; other tertiary controls"
    " are left out; not recorded",
    before=ICE_LAKE_SP,
    revision=4,
    cr4_fixed1=0x77_3FFF,
    preemption_timer_shift=7,
    added=("ACTIVATE_TERTIARY_CONTROLS", "IPI_VIRTUALIZATION"),
)

GENERATIONS: Final[dict[str, Generation]] = {
    generation.name: generation
    for generation in (
        *(
            P4_672,
            CORE2,
            NEHALEM,
            WESTMERE,
            SANDY_BRIDGE,
            HASWELL,
            BROADWELL,
            SKYLAKE_SP,
            CASCADE_LAKE,
            ICE_LAKE_SP,
            SAPPHIRE_RAPIDS,
        ),
    )
}
