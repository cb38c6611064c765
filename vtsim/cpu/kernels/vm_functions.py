"""VM functions: what a guest may ask of the processor without a VM exit.

SDM: "VM Functions"; "EPTP Switching".
"""

from __future__ import annotations

from vtsim.base.jit import Arena, Record, kernel
from vtsim.base.memory import is_memory, load
from vtsim.cpu import slots as s
from vtsim.cpu.codes import NEXT, UD
from vtsim.cpu.kernels.active_controls import secondary_controls
from vtsim.cpu.kernels.contexts import NO_CONTEXT, set_context
from vtsim.cpu.kernels.exceptions import raise_exception
from vtsim.cpu.kernels.vmx_capabilities import beyond_addresses, secondary_allowed
from vtsim.vmcs import bits as b
from vtsim.vmcs import slots as v
from vtsim.vmcs.kernels.execution_controls import ept_pointer_failure

# fmt: off
EXITS: int = -1                 # not how an op ends: the caller takes the VM exit
FUNCTIONS, EPTP_LIST_ENTRIES = 64, 512
EPTP_SWITCHING: int = 0
# fmt: on


@kernel
def vm_function(m: Record, a: Arena) -> int:
    """VMFUNC in non-root operation, at any privilege level.

    SDM: "General Operation of the VMFUNC Instruction".
    """
    at = m[s.VMCS]
    function = m[s.GPR + s.RAX] & 0xFFFFFFFF
    if secondary_controls(m, a) & b.ENABLE_VM_FUNCTIONS == 0 or function >= FUNCTIONS:
        return raise_exception(m, UD, 0, 0)
    if (a[at + v.VM_FUNCTION_CONTROLS] >> function) & 1 == 0 or function != EPTP_SWITCHING:
        return EXITS
    return switch_eptp(m, a)


@kernel
def switch_eptp(m: Record, a: Arena) -> int:
    """Take the EPTP with index ECX from the EPTP list; one that VM entry would refuse exits.

    Nothing is invalidated: translations are tagged with the EPTP that they were made with.

    SDM: "EPTP Switching".
    """
    at = m[s.VMCS]
    index = m[s.GPR + s.RCX] & 0xFFFFFFFF
    if index >= EPTP_LIST_ENTRIES:
        return EXITS
    entry = a[at + v.EPTP_LIST_ADDRESS] + 8 * index
    if not is_memory(a, entry):
        return EXITS
    eptp = load(a, entry, 8)
    if ept_pointer_failure(a, eptp, beyond_addresses(m, a)):
        return EXITS
    a[at + v.EPT_POINTER] = eptp
    if secondary_allowed(a, b.EPT_VIOLATION_VE):
        a[at + v.EPTP_INDEX] = index
    m[s.EPTP] = eptp
    m[s.EPT_AD] = (eptp >> 6) & 1
    m[s.CONTEXT_KEY] = NO_CONTEXT
    set_context(m, a)
    return NEXT
