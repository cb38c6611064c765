"""Checks on VM-execution control fields.

SDM: "Checks on VMX Controls"; "VM-Execution Control Fields".
"""

from __future__ import annotations

from vtsim.base.jit import Arena, kernel
from vtsim.base.memory import is_memory, load
from vtsim.vmcs import bits as b
from vtsim.vmcs import checks as c
from vtsim.vmcs import slots as v
from vtsim.vmcs.kernels.values import (
    EPT_VPID_CAP,
    MISC,
    TERTIARY,
    VM_FUNCTIONS,
    bad_address,
    bad_control,
    capability,
    true_controls,
)

# fmt: off
PAGE: int = 0xFFF
NEED_TPR_SHADOW: int = b.VIRTUALIZE_X2APIC_MODE | b.APIC_REGISTER_VIRTUALIZATION | b.VIRTUAL_INTERRUPT_DELIVERY
SECONDARY_CTLS, UNCACHEABLE, WRITE_BACK = 0x48B, 0, 6
# fmt: on


@kernel
def effective_secondary(a: Arena, at: int) -> int:
    """The secondary controls, which are all 0 unless activated."""
    return a[at + v.SECONDARY_PROC_CONTROLS] if a[at + v.PRIMARY_PROC_CONTROLS] & b.ACTIVATE_SECONDARY_CONTROLS else 0


@kernel
def effective_tertiary(a: Arena, at: int) -> int:
    """The tertiary controls, which are all 0 unless activated."""
    return a[at + v.TERTIARY_PROC_CONTROLS] if a[at + v.PRIMARY_PROC_CONTROLS] & b.ACTIVATE_TERTIARY_CONTROLS else 0


@kernel
def execution_controls_failure(a: Arena, at: int, beyond: int) -> int:
    """The first failed check on VM-execution control fields.

    SDM: "Checks on VMX Controls"; "VM-Execution Control Fields".
    """
    pin = a[at + v.PIN_CONTROLS]
    primary = a[at + v.PRIMARY_PROC_CONTROLS]
    secondary = effective_secondary(a, at)
    tertiary = effective_tertiary(a, at)
    if bad_control(pin, true_controls(a, 0x481, 0x48D)):
        return c.PIN_RESERVED
    if bad_control(primary, true_controls(a, 0x482, 0x48E)):
        return c.PRIMARY_RESERVED
    if primary & b.ACTIVATE_SECONDARY_CONTROLS and bad_control(secondary, capability(a, SECONDARY_CTLS)):
        return c.SECONDARY_RESERVED
    if tertiary & ~capability(a, TERTIARY):
        return c.TERTIARY_RESERVED
    if a[at + v.CR3_TARGET_COUNT] > (capability(a, MISC) >> 16) & 0x1FF:
        return c.CR3_TARGETS
    if primary & b.USE_IO_BITMAPS:
        if bad_address(a[at + v.IO_BITMAP_A], PAGE, beyond) or bad_address(a[at + v.IO_BITMAP_B], PAGE, beyond):
            return c.IO_BITMAPS
    if primary & b.USE_MSR_BITMAPS and bad_address(a[at + v.MSR_BITMAPS], PAGE, beyond):
        return c.MSR_BITMAP
    if primary & b.USE_TPR_SHADOW:
        if bad_address(a[at + v.VIRTUAL_APIC_ADDRESS], PAGE, beyond):
            return c.VIRTUAL_APIC_PAGE
        if secondary & b.VIRTUAL_INTERRUPT_DELIVERY == 0 and a[at + v.TPR_THRESHOLD] >> 4:
            return c.TPR_THRESHOLD_RESERVED
    elif secondary & NEED_TPR_SHADOW or tertiary & b.IPI_VIRTUALIZATION:
        return c.TPR_SHADOW_FOR_APIC
    if pin & b.NMI_EXITING == 0 and pin & b.VIRTUAL_NMIS:
        return c.NMI_EXITING_FOR_VIRTUAL_NMIS
    if pin & b.VIRTUAL_NMIS == 0 and primary & b.NMI_WINDOW_EXITING:
        return c.VIRTUAL_NMIS_FOR_WINDOW
    if pin & b.PROCESS_POSTED_INTERRUPTS:
        failed = posted_interrupts_failure(a, at, secondary, beyond)
        if failed:
            return failed
    if secondary:
        failed = secondary_failure(a, at, pin, secondary, beyond)
        if failed:
            return failed
    if tertiary:
        return tertiary_failure(a, at, secondary, tertiary, beyond)
    return c.NONE


@kernel
def posted_interrupts_failure(a: Arena, at: int, secondary: int, beyond: int) -> int:
    """The first failed check on posted-interrupt processing, which is on."""
    if secondary & b.VIRTUAL_INTERRUPT_DELIVERY == 0 or a[at + v.EXIT_CONTROLS] & b.EXIT_ACKNOWLEDGE_INTERRUPT == 0:
        return c.POSTED_CONTROLS
    if a[at + v.POSTED_INTERRUPT_NOTIFICATION_VECTOR] >> 8:
        return c.POSTED_VECTOR
    if bad_address(a[at + v.POSTED_INTERRUPT_DESCRIPTOR_ADDRESS], 0x3F, beyond):
        return c.POSTED_DESCRIPTOR
    return c.NONE


@kernel
def secondary_failure(a: Arena, at: int, pin: int, secondary: int, beyond: int) -> int:
    """The first failed check that a secondary control asks for."""
    if secondary & b.VIRTUALIZE_APIC_ACCESSES:
        if bad_address(a[at + v.APIC_ACCESS_ADDRESS], PAGE, beyond):
            return c.APIC_ACCESS_PAGE
        if secondary & b.VIRTUALIZE_X2APIC_MODE:
            return c.X2APIC_OR_ACCESSES
    if secondary & b.VIRTUAL_INTERRUPT_DELIVERY and pin & b.EXTERNAL_INTERRUPT_EXITING == 0:
        return c.EXTERNAL_EXITING_FOR_DELIVERY
    if secondary & b.ENABLE_VPID and a[at + v.VPID] == 0:
        return c.VPID_ZERO
    if secondary & b.ENABLE_EPT:
        failed = ept_pointer_failure(a, a[at + v.EPT_POINTER], beyond)
        if failed:
            return failed
    else:
        if secondary & b.ENABLE_PML:
            return c.PML_WITHOUT_EPT
        if secondary & b.UNRESTRICTED_GUEST:
            return c.UNRESTRICTED_WITHOUT_EPT
        if secondary & b.MODE_BASED_EXECUTE_CONTROL:
            return c.MODE_BASED_WITHOUT_EPT
        if secondary & b.SUB_PAGE_WRITE_PERMISSIONS:
            return c.SUB_PAGE_WITHOUT_EPT
    if secondary & b.ENABLE_PML and bad_address(a[at + v.PML_ADDRESS], PAGE, beyond):
        return c.PML_ADDRESS
    if secondary & b.SUB_PAGE_WRITE_PERMISSIONS:
        if bad_address(a[at + v.SUB_PAGE_PERMISSION_TABLE_POINTER], PAGE, beyond):
            return c.SUB_PAGE_TABLE
    if secondary & b.ENABLE_VM_FUNCTIONS:
        functions = a[at + v.VM_FUNCTION_CONTROLS]
        if functions & ~capability(a, VM_FUNCTIONS):
            return c.VM_FUNCTIONS_RESERVED
        if functions & b.EPTP_SWITCHING:
            if secondary & b.ENABLE_EPT == 0:
                return c.EPTP_SWITCHING_WITHOUT_EPT
            if bad_address(a[at + v.EPTP_LIST_ADDRESS], PAGE, beyond):
                return c.EPTP_LIST
    if secondary & b.VMCS_SHADOWING:
        if bad_address(a[at + v.VMREAD_BITMAP_ADDRESS] | a[at + v.VMWRITE_BITMAP_ADDRESS], PAGE, beyond):
            return c.SHADOWING_BITMAPS
    if secondary & b.EPT_VIOLATION_VE and bad_address(a[at + v.VE_INFORMATION_ADDRESS], PAGE, beyond):
        return c.VE_INFORMATION
    if secondary & b.PT_USES_GUEST_PHYSICAL_ADDRESSES:
        if (
            secondary & b.ENABLE_EPT == 0
            or a[at + v.ENTRY_CONTROLS] & b.ENTRY_LOAD_IA32_RTIT_CTL == 0
            or a[at + v.EXIT_CONTROLS] & b.EXIT_CLEAR_IA32_RTIT_CTL == 0
        ):
            return c.PT_ADDRESSES
    if secondary & b.USE_TSC_SCALING and a[at + v.TSC_MULTIPLIER] == 0:
        return c.TSC_MULTIPLIER_ZERO
    if secondary & b.PASID_TRANSLATION:
        if bad_address(a[at + v.LOW_PASID_DIRECTORY_ADDRESS] | a[at + v.HIGH_PASID_DIRECTORY_ADDRESS], PAGE, beyond):
            return c.PASID_DIRECTORIES
    return c.NONE


@kernel
def ept_pointer_failure(a: Arena, eptp: int, beyond: int) -> int:
    """The first failed check on an EPT pointer: of the VMCS, or of the list that VMFUNC switches in.

    SDM: "Extended-Page-Table Pointer (EPTP)"; "VM-Execution Control Fields"; "EPTP Switching".
    """
    able = capability(a, EPT_VPID_CAP)
    kind = eptp & 7
    if not ((kind == UNCACHEABLE and (able >> 8) & 1) or (kind == WRITE_BACK and (able >> 14) & 1)):
        return c.EPTP_MEMORY_TYPE
    levels = ((eptp >> 3) & 7) + 1
    if not ((levels == 4 and (able >> 6) & 1) or (levels == 5 and (able >> 7) & 1)):
        return c.EPTP_WALK_LENGTH
    if (eptp >> 6) & 1 and (able >> 21) & 1 == 0:
        return c.EPTP_ACCESSED_DIRTY
    if (eptp >> 7) & 1 and (able >> 23) & 1 == 0:
        return c.EPTP_SHADOW_STACK
    if bad_address(eptp, 0xF00, beyond):
        return c.EPTP_RESERVED
    return c.NONE


@kernel
def tertiary_failure(a: Arena, at: int, secondary: int, tertiary: int, beyond: int) -> int:
    """The first failed check that a tertiary control asks for."""
    if secondary & b.ENABLE_EPT == 0:
        if tertiary & b.ENABLE_HLAT:
            return c.HLAT_WITHOUT_EPT
        if tertiary & b.EPT_PAGING_WRITE_CONTROL:
            return c.PAGING_WRITE_WITHOUT_EPT
        if tertiary & b.GUEST_PAGING_VERIFICATION:
            return c.GUEST_PAGING_WITHOUT_EPT
    if tertiary & b.ENABLE_HLAT:
        if bad_address(a[at + v.HLAT_POINTER], 0xFE7, beyond):
            return c.HLAT_TABLE
        if a[at + v.HLAT_PREFIX_SIZE] > (capability(a, EPT_VPID_CAP) >> 48) & 0x3F:
            return c.HLAT_PREFIX
    if tertiary & b.IPI_VIRTUALIZATION:
        table = a[at + v.PID_POINTER_TABLE_ADDRESS]
        if bad_address(table, 7, beyond):
            return c.PID_TABLE
        if (table + 8 * a[at + v.LAST_PID_POINTER_INDEX]) & beyond:
            return c.PID_TABLE_END
    if tertiary & b.APIC_TIMER_VIRTUALIZATION:
        if secondary & b.VIRTUAL_INTERRUPT_DELIVERY == 0:
            return c.APIC_TIMER_DELIVERY
        if a[at + v.VIRTUAL_TIMER_VECTOR] < 16 or a[at + v.VIRTUAL_TIMER_VECTOR] > 255:
            return c.APIC_TIMER_VECTOR
    return c.NONE


@kernel
def tpr_threshold_failure(a: Arena, at: int) -> int:
    """The check of the TPR threshold against VTPR, which memory decides: made at every entry with a TPR shadow.

    SDM: "VM-Execution Control Fields".
    """
    if effective_secondary(a, at) & (b.VIRTUALIZE_APIC_ACCESSES | b.VIRTUAL_INTERRUPT_DELIVERY):
        return c.NONE
    page = a[at + v.VIRTUAL_APIC_ADDRESS]
    task_priority = (load(a, page + 0x80, 4) >> 4) & 15 if is_memory(a, page) else 15
    if a[at + v.TPR_THRESHOLD] & 15 > task_priority:
        return c.TPR_THRESHOLD_ABOVE_VTPR
    return c.NONE
