"""How a VMX instruction ends that neither faults nor exits: VMsucceed, VMfailInvalid, VMfailValid.

SDM: "Conventions".
"""

from __future__ import annotations

from vtsim.base.jit import Arena, Record, kernel
from vtsim.cpu import slots as s
from vtsim.cpu.codes import ARITHMETIC, NEXT, RF_CF, RF_ZF
from vtsim.vmcs import slots as v


@kernel
def vm_succeed(m: Record) -> int:
    """VMsucceed: the six arithmetic flags are clear."""
    m[s.RFLAGS] &= ~ARITHMETIC
    return NEXT


@kernel
def vm_fail_invalid(m: Record) -> int:
    """VMfailInvalid: of the arithmetic flags, only CF is set."""
    m[s.RFLAGS] = (m[s.RFLAGS] & ~ARITHMETIC) | RF_CF
    return NEXT


@kernel
def vm_fail_valid(m: Record, a: Arena, error: int) -> int:
    """VMfailValid: of the arithmetic flags, only ZF is set; the current VMCS has the error number."""
    m[s.RFLAGS] = (m[s.RFLAGS] & ~ARITHMETIC) | RF_ZF
    a[m[s.VMCS] + v.VM_INSTRUCTION_ERROR] = error
    return NEXT


@kernel
def vm_fail(m: Record, a: Arena, error: int) -> int:
    """VMfail: VMfailValid if there is a current VMCS, else VMfailInvalid."""
    if m[s.VMCS] == 0:
        return vm_fail_invalid(m)
    return vm_fail_valid(m, a, error)
