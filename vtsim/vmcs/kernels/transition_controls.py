"""Checks on VM-exit and VM-entry control fields, and on the event that VM entry injects.

SDM: "Checks on VMX Controls"; "VM-Exit Control Fields"; "VM-Entry Control Fields".
"""

from __future__ import annotations

from vtsim.base.jit import Arena, kernel
from vtsim.vmcs import bits as b
from vtsim.vmcs import checks as c
from vtsim.vmcs import events as ev
from vtsim.vmcs import slots as v
from vtsim.vmcs.kernels.execution_controls import effective_secondary
from vtsim.vmcs.kernels.values import (
    BASIC,
    CR0_PE,
    MISC,
    SECONDARY_EXIT,
    bad_area,
    bad_control,
    capability,
    true_controls,
)

# fmt: off
WITH_ERROR_CODE: int = 1 << 8 | 1 << 10 | 1 << 11 | 1 << 12 | 1 << 13 | 1 << 14 | 1 << 17
INFORMATION_RESERVED: int = 0x7FFFF000
OUTSIDE_SMM: int = b.ENTRY_TO_SMM | b.ENTRY_DEACTIVATE_DUAL_MONITOR
# fmt: on


@kernel
def exit_controls_failure(a: Arena, at: int, beyond: int) -> int:
    """The first failed check on VM-exit control fields.

    SDM: "VM-Exit Control Fields".
    """
    controls = a[at + v.EXIT_CONTROLS]
    if bad_control(controls, true_controls(a, 0x483, 0x48F)):
        return c.EXIT_RESERVED
    if controls & b.EXIT_ACTIVATE_SECONDARY_CONTROLS:
        if a[at + v.SECONDARY_EXIT_CONTROLS] & ~capability(a, SECONDARY_EXIT):
            return c.SECONDARY_EXIT_RESERVED
    if controls & b.EXIT_SAVE_PREEMPTION_TIMER and a[at + v.PIN_CONTROLS] & b.ACTIVATE_PREEMPTION_TIMER == 0:
        return c.SAVE_INACTIVE_TIMER
    if bad_area(a[at + v.EXIT_MSR_STORE_ADDRESS], a[at + v.EXIT_MSR_STORE_COUNT], beyond):
        return c.EXIT_STORE_AREA
    if bad_area(a[at + v.EXIT_MSR_LOAD_ADDRESS], a[at + v.EXIT_MSR_LOAD_COUNT], beyond):
        return c.EXIT_LOAD_AREA
    return c.NONE


@kernel
def entry_controls_failure(a: Arena, at: int, beyond: int) -> int:
    """The first failed check on VM-entry control fields, event injection apart.

    SDM: "VM-Entry Control Fields".
    """
    if bad_control(a[at + v.ENTRY_CONTROLS], true_controls(a, 0x484, 0x490)):
        return c.ENTRY_RESERVED
    if bad_area(a[at + v.ENTRY_MSR_LOAD_ADDRESS], a[at + v.ENTRY_MSR_LOAD_COUNT], beyond):
        return c.ENTRY_LOAD_AREA
    if a[at + v.ENTRY_CONTROLS] & OUTSIDE_SMM:
        return c.SMM_OUTSIDE_SMM
    return c.NONE


@kernel
def injection_failure(a: Arena, at: int) -> int:
    """The first failed check on an event to be injected.

    SDM: "VM-Entry Control Fields"; "VM-Entry Controls for Event Injection".
    """
    information = a[at + v.ENTRY_INTERRUPTION_INFORMATION]
    vector = information & ev.VECTOR
    kind = (information & ev.TYPE) >> ev.TYPE_SHIFT
    fred = a[at + v.ENTRY_CONTROLS] & b.ENTRY_LOAD_FRED != 0
    trap_flag = true_controls(a, 0x482, 0x48E) >> 32 & b.MONITOR_TRAP_FLAG != 0
    if kind == 1 or (kind == ev.OTHER_EVENT and not trap_flag and not fred):
        return c.INJECTION_TYPE
    if kind == ev.NMI and vector != 2:
        return c.INJECTION_VECTOR
    if kind == ev.HARDWARE_EXCEPTION and vector > 31:
        return c.INJECTION_VECTOR
    if kind == ev.OTHER_EVENT and vector > (2 if fred else 0):
        return c.INJECTION_VECTOR
    protected = a[at + v.GUEST_CR0] & CR0_PE != 0 or effective_secondary(a, at) & b.UNRESTRICTED_GUEST == 0
    may = kind == ev.HARDWARE_EXCEPTION and protected
    has = (WITH_ERROR_CODE >> (vector & 31)) & 1 != 0
    either = (capability(a, BASIC) >> 56) & 1 != 0
    if information & ev.DELIVER_ERROR_CODE:
        if not may or (not has and not either):
            return c.INJECTION_ERROR_CODE
    elif may and has and not either:
        return c.INJECTION_ERROR_CODE
    if information & INFORMATION_RESERVED & ~(ev.NESTED_EXCEPTION if fred else 0):
        return c.INJECTION_RESERVED
    if information & ev.DELIVER_ERROR_CODE and a[at + v.ENTRY_EXCEPTION_ERROR_CODE] >> 16:
        return c.INJECTION_ERROR_VALUE
    if kind == ev.SOFTWARE_INTERRUPT or kind == ev.SOFTWARE_EXCEPTION or kind == ev.PRIVILEGED_SOFTWARE_EXCEPTION:
        length = a[at + v.ENTRY_INSTRUCTION_LENGTH]
        if length > 15 or (length == 0 and (capability(a, MISC) >> 30) & 1 == 0):
            return c.INJECTION_LENGTH
    return c.NONE
