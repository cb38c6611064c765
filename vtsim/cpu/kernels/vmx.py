"""VMX instructions in root operation.

SDM: "VMX Instructions"; "Conventions".
"""

from __future__ import annotations

from vtsim.base.jit import Arena, Record, Tags, kernel
from vtsim.base.memory import VMCS_REGION, give_contents, is_memory
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.codes import ARITHMETIC, NEXT, RF_CF, RF_ZF
from vtsim.cpu.kernels.access import effective, read64, write64
from vtsim.cpu.kernels.contexts import GLOBAL_KEY
from vtsim.cpu.kernels.entry import vm_entry
from vtsim.cpu.kernels.events import raise_fault
from vtsim.cpu.kernels.invalidate import drop_contexts, drop_guest_physical, drop_page
from vtsim.ept.spec import ADDRESS
from vtsim.vmcs import slots as v
from vtsim.vmcs import state as h


@kernel
def failed(m: Record, a: Arena, error: int) -> int:
    """VMfail: RFLAGS.ZF and the VM-instruction error, or RFLAGS.CF where there is no current VMCS.

    SDM: "Conventions".
    """
    m[s.RFLAGS] &= ~ARITHMETIC
    if m[s.VMCS] == 0:
        m[s.RFLAGS] |= RF_CF
    else:
        m[s.RFLAGS] |= RF_ZF
        a[m[s.VMCS] + v.VM_INSTRUCTION_ERROR] = error
    return NEXT


@kernel
def vmx(m: Record, a: Arena, t: Tags, r: int, op: int) -> int:
    """VMX instructions in root operation, ring 0."""
    if op == o.VMLAUNCH or op == o.VMRESUME:
        at = m[s.VMCS]
        if at == 0:
            return failed(m, a, 0)
        launched = a[at + h.V_LAUNCHED]
        if op == o.VMLAUNCH and launched != h.CLEAR:
            return failed(m, a, 4)
        if op == o.VMRESUME and launched != h.LAUNCHED:
            return failed(m, a, 5)
        return vm_entry(m, a, t)
    if op == o.VMXOFF:
        m[s.VMXON] = 0
        m[s.VMCS] = 0
        m[s.RFLAGS] &= ~ARITHMETIC
        return NEXT
    gva = effective(m, a, r)
    if op == o.VMPTRST:
        fault = write64(m, a, t, gva, m[s.VMCS_POINTER])
        return NEXT if fault == 0 else raise_fault(m, a, t, fault)
    pointer = read64(m, a, t, gva)
    if m[s.FAULT_KIND]:
        return raise_fault(m, a, t, m[s.FAULT_KIND])
    if op == o.INVEPT or op == o.INVVPID:
        kind = m[s.GPR + (a[r + o.ROW_R1] & 15)]
        if op == o.INVEPT:
            if kind < 1 or kind > 2:
                return failed(m, a, 28)
            drop_guest_physical(m, a, pointer & ADDRESS if kind == 1 else 0)
        else:
            vpid = pointer & 0xFFFF
            if kind < 0 or kind > 3 or (kind != 2 and vpid == 0):
                return failed(m, a, 28)
            if kind == 0:
                address = read64(m, a, t, gva + 8)
                if m[s.FAULT_KIND]:
                    return raise_fault(m, a, t, m[s.FAULT_KIND])
                for n in range(m[s.CONTEXT_COUNT]):
                    key = a[m[s.CONTEXTS] + n]
                    if key >= 0 and key & 0xFFFF == vpid:
                        drop_page(m, a, key & ~GLOBAL_KEY, address)
            elif kind == 2:
                for n in range(m[s.CONTEXT_COUNT]):
                    key = a[m[s.CONTEXTS] + n]
                    if key >= 0 and key & 0xFFFF:
                        drop_contexts(m, a, -1, key, True)
            else:
                drop_contexts(m, a, 0xFFFF, vpid, kind == 1)
        m[s.RFLAGS] &= ~ARITHMETIC
        return NEXT
    if pointer & 0xFFF or not is_memory(a, pointer):
        error = 9
        if op == o.VMCLEAR:
            error = 2
        return failed(m, a, error)
    if op == o.VMXON:
        m[s.VMXON] = 1
        m[s.VMXON_POINTER] = pointer
        m[s.VMCS] = 0
        m[s.VMCS_POINTER] = -1
    else:
        if pointer == m[s.VMXON_POINTER]:
            return failed(m, a, 3 if op == o.VMCLEAR else 10)
        at = give_contents(a, pointer >> 12, VMCS_REGION)
        if at < 0:
            return failed(m, a, 9)
        if op == o.VMCLEAR:
            a[at + h.V_LAUNCHED] = h.CLEAR
            a[at + h.V_EXIT_REASON] = -1
            if m[s.VMCS] == at:
                m[s.VMCS] = 0
                m[s.VMCS_POINTER] = -1
        else:
            if a[at + h.V_REVISION] != m[s.VMX_REVISION]:
                return failed(m, a, 11)
            m[s.VMCS] = at
            m[s.VMCS_POINTER] = pointer
    m[s.RFLAGS] &= ~ARITHMETIC
    return NEXT
