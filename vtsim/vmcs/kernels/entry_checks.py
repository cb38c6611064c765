"""All checks of VM entry in their order, each group only where a field of it was written since it held.

SDM: "VM Entries"; "Checks on VMX Controls".
"""

from __future__ import annotations

from vtsim.base.jit import Arena, kernel
from vtsim.vmcs import bits as b
from vtsim.vmcs import checks as c
from vtsim.vmcs import events as ev
from vtsim.vmcs import slots as v
from vtsim.vmcs import state as h
from vtsim.vmcs.groups import (
    CONTROL_GROUPS,
    ENTRIES,
    EXECUTION,
    EXITS,
    FLOW,
    GUEST_GROUPS,
    HOST,
    NON_REGISTER,
    REGISTERS,
    SEGMENTS,
    TABLES,
)
from vtsim.vmcs.kernels.execution_controls import (
    effective_secondary,
    execution_controls_failure,
    tpr_threshold_failure,
)
from vtsim.vmcs.kernels.guest_registers import guest_registers_failure
from vtsim.vmcs.kernels.guest_rest import (
    descriptor_tables_failure,
    flow_failure,
    link_pointer_failure,
    non_register_failure,
    pdptes_failure,
    uses_pae,
)
from vtsim.vmcs.kernels.guest_segments import guest_segments_failure
from vtsim.vmcs.kernels.host_state import host_failure
from vtsim.vmcs.kernels.transition_controls import (
    entry_controls_failure,
    exit_controls_failure,
    injection_failure,
)


@kernel
def control_or_host_failure(a: Arena, at: int, beyond: int, long_mode: bool) -> int:
    """The first failed check on controls and host state; `long_mode` is IA32_EFER.LMA now.

    SDM: "Checks on VMX Controls"; "Checks Related to Address-Space Size".
    """
    if a[at + h.V_CHECKED] & CONTROL_GROUPS != CONTROL_GROUPS:
        failed = recheck_controls(a, at, beyond)
        if failed:
            return failed
    if a[at + v.PRIMARY_PROC_CONTROLS] & b.USE_TPR_SHADOW:
        failed = tpr_threshold_failure(a, at)
        if failed:
            return failed
    if a[at + v.ENTRY_INTERRUPTION_INFORMATION] & ev.VALID:
        failed = injection_failure(a, at)
        if failed:
            return failed
    if a[at + h.V_CHECKED] & HOST == 0:
        failed = host_failure(a, at, beyond)
        if failed:
            return failed
        a[at + h.V_CHECKED] |= HOST
    if long_mode != (a[at + v.EXIT_CONTROLS] & b.EXIT_HOST_ADDRESS_SPACE_SIZE != 0):
        return c.HOST_SPACE_NOW
    return c.NONE


@kernel
def recheck_controls(a: Arena, at: int, beyond: int) -> int:
    """Check the groups of controls that are due. Where guest checks depend on what changed, they become due, too."""
    checked = a[at + h.V_CHECKED]
    if checked & EXECUTION == 0:
        failed = execution_controls_failure(a, at, beyond)
        if failed:
            return failed
    if checked & EXITS == 0:
        failed = exit_controls_failure(a, at, beyond)
        if failed:
            return failed
    if checked & ENTRIES == 0:
        failed = entry_controls_failure(a, at, beyond)
        if failed:
            return failed
    mode = (a[at + v.ENTRY_CONTROLS] & 0xFFFFFFFF) | effective_secondary(a, at) << 32
    if mode != a[at + h.V_CHECKED_MODE]:
        a[at + h.V_CHECKED_MODE] = mode
        checked &= ~(GUEST_GROUPS | HOST)
    a[at + h.V_CHECKED] = checked | CONTROL_GROUPS
    return c.NONE


@kernel
def guest_failure(a: Arena, at: int, beyond: int, current: int) -> int:
    """The first failed check on the guest-state area; `current` is the current-VMCS pointer.

    SDM: "VM Entries"; "Checks on Guest Non-Register State".
    """
    injects = a[at + v.ENTRY_INTERRUPTION_INFORMATION] & ev.VALID != 0
    if injects or a[at + h.V_CHECKED] & GUEST_GROUPS != GUEST_GROUPS:
        failed = recheck_guest(a, at, beyond, injects)
        if failed:
            return failed
    if a[at + v.VMCS_LINK_POINTER] != -1:
        failed = link_pointer_failure(a, at, current, beyond)
        if failed:
            return failed
    if uses_pae(a, at):
        return pdptes_failure(a, at, beyond)
    return c.NONE


@kernel
def recheck_guest(a: Arena, at: int, beyond: int, injects: bool) -> int:
    """Check the groups of guest state that are due; what an injected event must go with is always due."""
    checked = a[at + h.V_CHECKED]
    if checked & REGISTERS == 0:
        failed = guest_registers_failure(a, at, beyond)
        if failed:
            return failed
    if checked & SEGMENTS == 0:
        failed = guest_segments_failure(a, at)
        if failed:
            return failed
    if checked & TABLES == 0:
        failed = descriptor_tables_failure(a, at)
        if failed:
            return failed
    if injects or checked & FLOW == 0:
        failed = flow_failure(a, at)
        if failed:
            return failed
    if injects or checked & NON_REGISTER == 0:
        failed = non_register_failure(a, at)
        if failed:
            return failed
    a[at + h.V_CHECKED] = checked | GUEST_GROUPS
    return c.NONE
