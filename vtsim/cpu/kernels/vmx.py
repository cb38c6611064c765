"""VMX instructions: one function per instruction, its conditions in the order of the manual.

SDM: "VMX Instructions"; "Conventions".
Not modelled: SMX operation, so that only the enable bit outside SMX counts; A20M mode; the dual-monitor treatment
of SMIs and SMM, with the VM-instruction errors 16 to 25 that only it can report.
"""

from __future__ import annotations

from vtsim.base.jit import Arena, Record, Tags, kernel
from vtsim.base.memory import (
    A_OWNER_COUNT,
    A_OWNER_WORDS,
    A_OWNERS,
    PLAIN,
    VALUES,
    VMCS_REGION,
    give_contents,
    is_memory,
    kind_of,
    load,
)
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.codes import GP, OUT_OF_MEMORY, STOPPED, UD
from vtsim.cpu.kernels.access import effective, read64, write64
from vtsim.cpu.kernels.components import EFER_LMA, access_component, in_64_bit_mode, shadowed
from vtsim.cpu.kernels.contexts import GLOBAL_KEY
from vtsim.cpu.kernels.conventions import vm_fail, vm_fail_invalid, vm_fail_valid, vm_succeed
from vtsim.cpu.kernels.entry import vm_entry
from vtsim.cpu.kernels.exceptions import raise_exception, raise_fault
from vtsim.cpu.kernels.invalidate import drop_contexts, drop_guest_physical, drop_page
from vtsim.cpu.kernels.vm_functions import EXITS, vm_function
from vtsim.cpu.kernels.vmx_capabilities import (
    CAP_INVEPT,
    CAP_INVEPT_TYPES,
    CAP_INVVPID,
    CAP_INVVPID_TYPES,
    beyond_addresses,
    cr0_supported,
    cr4_supported,
    ept_vpid,
    secondary_allowed,
)
from vtsim.ept.spec import ADDRESS
from vtsim.vmcs import bits as b
from vtsim.vmcs import events as ev
from vtsim.vmcs import state as h
from vtsim.vmcs.kernels.execution_controls import ept_pointer_failure
from vtsim.vmcs.kernels.values import bad_address

# fmt: off
CR0_PE, CR4_VMXE, CR4_LA57, RF_VM = 1, 1 << 13, 1 << 12, 1 << 17
# IA32_FEATURE_CONTROL
LOCKED, VMX_OUTSIDE_SMX = 1, 4
NO_VMCS: int = -1
BY_MOV_SS: int = 2                # kind of an interrupt shadow; STI makes 1
INDIVIDUAL, SINGLE, ALL, SINGLE_KEEPING_GLOBALS = range(4)   # INVVPID types; 1 and 2 are those of INVEPT too
# fmt: on


@kernel
def unknown_here(m: Record, a: Arena, op: int) -> bool:
    """Is this VMX instruction #UD in the mode the CPU is in, or on this processor?

    VMCALL and VMFUNC in non-root operation have no such modes.

    SDM: "VMX Instructions".
    """
    if op == o.VMXON:
        if m[s.CR4] & CR4_VMXE == 0:
            return True
    elif m[s.VMXON] == 0:
        return True
    if op == o.VMCALL or op == o.VMFUNC:
        if m[s.NONROOT]:
            return False
        if op == o.VMFUNC:
            return True
    if op == o.INVEPT and not (secondary_allowed(a, b.ENABLE_EPT) and ept_vpid(a, CAP_INVEPT)):
        return True
    if op == o.INVVPID and not (secondary_allowed(a, b.ENABLE_VPID) and ept_vpid(a, CAP_INVVPID)):
        return True
    if m[s.CR0] & CR0_PE == 0 or m[s.RFLAGS] & RF_VM:
        return True
    return m[s.EFER] & EFER_LMA != 0 and not in_64_bit_mode(m)


@kernel
def vmx(m: Record, a: Arena, t: Tags, r: int, op: int) -> int:
    """Execute a VMX instruction: how it ended, or EXITS where it causes a VM exit that the caller takes."""
    if unknown_here(m, a, op):
        return raise_exception(m, UD, 0, 0)
    if m[s.NONROOT]:
        if op == o.VMFUNC:
            return vm_function(m, a)
        if (op == o.VMREAD or op == o.VMWRITE) and shadowed(m, a, r, op):
            return access_component(m, a, t, r, op)
        return EXITS
    if m[s.PRIVILEGE] & 1:
        return raise_exception(m, GP, 1, 0)
    if op == o.VMREAD or op == o.VMWRITE:
        return access_component(m, a, t, r, op)
    if op == o.VMLAUNCH or op == o.VMRESUME:
        return enter(m, a, t, op)
    if op == o.VMXOFF:
        m[s.VMXON] = 0
        m[s.VMCS] = 0
        m[s.VMCS_POINTER] = NO_VMCS
        return vm_succeed(m)
    if op == o.VMCALL:
        return vm_fail(m, a, ev.VMCALL_IN_ROOT)
    gva = effective(m, a, r)
    if op == o.VMPTRST:
        fault = write64(m, a, t, gva, m[s.VMCS_POINTER])
        return vm_succeed(m) if fault == 0 else raise_fault(m, a, t, fault)
    if op == o.INVEPT:
        return invept(m, a, t, gva, type_operand(m, a, r))
    if op == o.INVVPID:
        return invvpid(m, a, t, gva, type_operand(m, a, r))
    if op == o.VMXON and m[s.VMXON] == 0 and not may_enter_vmx(m, a):
        return raise_exception(m, GP, 1, 0)
    if op == o.VMXON and m[s.VMXON]:
        return vm_fail(m, a, ev.VMXON_IN_ROOT)
    pointer = read64(m, a, t, gva)
    if m[s.FAULT_KIND]:
        return raise_fault(m, a, t, m[s.FAULT_KIND])
    if op == o.VMXON:
        return vmxon(m, a, pointer)
    return vmclear(m, a, pointer) if op == o.VMCLEAR else vmptrld(m, a, pointer)


@kernel
def may_enter_vmx(m: Record, a: Arena) -> bool:
    """Do CR0, CR4 and IA32_FEATURE_CONTROL allow VMXON?

    SDM: "Enabling and Entering VMX Operation"; "Restrictions on VMX Operation".
    """
    if not cr0_supported(a, m[s.CR0], 0) or not cr4_supported(a, m[s.CR4]):
        return False
    return m[s.MSR_FEATURE_CONTROL] & (LOCKED | VMX_OUTSIDE_SMX) == LOCKED | VMX_OUTSIDE_SMX


@kernel
def header(a: Arena, pointer: int) -> int:
    """The first four bytes of a VMXON or VMCS region; what is not memory reads as ones.

    SDM: "Format of the VMCS Region".
    """
    return load(a, pointer, 4) if is_memory(a, pointer) else 0xFFFFFFFF


@kernel
def vmxon(m: Record, a: Arena, pointer: int) -> int:
    """VMXON outside VMX operation.

    SDM: "VMXON—Enter VMX Operation"; "VMXON Region".
    """
    if bad_address(pointer, 0xFFF, beyond_addresses(m, a)):
        return vm_fail_invalid(m)
    if header(a, pointer) != m[s.VMX_REVISION]:
        return vm_fail_invalid(m)
    m[s.VMXON] = 1
    m[s.VMX_SESSION] += 1
    m[s.VMXON_POINTER] = pointer
    m[s.VMCS] = 0
    m[s.VMCS_POINTER] = NO_VMCS
    return vm_succeed(m)


@kernel
def vmcs_data(m: Record, a: Arena, pointer: int) -> int:
    """The arena offset of a VMCS region in memory; -1 if no contents can be given.

    A VMCS that no builder of a VM made has its statistics with whoever runs.
    """
    at = give_contents(a, pointer >> 12, VALUES)
    if at < 0:
        m[s.STOP] = OUT_OF_MEMORY
        return at
    kind = kind_of(a, pointer >> 12)
    if kind == PLAIN or kind == VALUES:
        give_contents(a, pointer >> 12, VMCS_REGION)
    owner = a[at + h.V_OWNER] - a[A_OWNERS]
    if owner < 0 or owner % a[A_OWNER_WORDS] or owner >= a[A_OWNER_COUNT] * a[A_OWNER_WORDS]:
        a[at + h.V_OWNER] = m[s.OWNER]
        a[at + h.V_EXIT_REASON] = -1
    return at


@kernel
def vmclear(m: Record, a: Arena, pointer: int) -> int:
    """VMCLEAR: the VMCS is in memory, not active, not current and clear.

    SDM: "VMCLEAR—Clear Virtual-Machine Control Structure".
    """
    if bad_address(pointer, 0xFFF, beyond_addresses(m, a)):
        return vm_fail(m, a, ev.VMCLEAR_INVALID_ADDRESS)
    if pointer == m[s.VMXON_POINTER]:
        return vm_fail(m, a, ev.VMCLEAR_VMXON_POINTER)
    if is_memory(a, pointer):
        at = vmcs_data(m, a, pointer)
        if at < 0:
            return STOPPED
        a[at + h.V_LAUNCHED] = h.CLEAR
        a[at + h.V_CHECKED] = 0
        a[at + h.V_EXIT_REASON] = -1
    if m[s.VMCS_POINTER] == pointer:
        m[s.VMCS] = 0
        m[s.VMCS_POINTER] = NO_VMCS
    return vm_succeed(m)


@kernel
def vmptrld(m: Record, a: Arena, pointer: int) -> int:
    """VMPTRLD: the VMCS is active and current.

    SDM: "VMPTRLD—Load Pointer to Virtual-Machine Control Structure"; "VMCS Types: Ordinary and Shadow".
    """
    if bad_address(pointer, 0xFFF, beyond_addresses(m, a)):
        return vm_fail(m, a, ev.VMPTRLD_INVALID_ADDRESS)
    if pointer == m[s.VMXON_POINTER]:
        return vm_fail(m, a, ev.VMPTRLD_VMXON_POINTER)
    found = header(a, pointer)
    if found & h.REVISION != m[s.VMX_REVISION] or (found & h.SHADOW and not secondary_allowed(a, b.VMCS_SHADOWING)):
        return vm_fail(m, a, ev.VMPTRLD_WRONG_REVISION)
    at = vmcs_data(m, a, pointer)
    if at < 0:
        return STOPPED
    a[at + h.V_CHECKED] = 0  # memory may have been written while the VMCS was not current
    m[s.VMCS] = at
    m[s.VMCS_POINTER] = pointer
    return vm_succeed(m)


@kernel
def enter(m: Record, a: Arena, t: Tags, op: int) -> int:
    """VMLAUNCH and VMRESUME up to the checks of the VMCS, which VM entry makes.

    SDM: "VMLAUNCH/VMRESUME—Launch/Resume Virtual Machine"; "Basic VM-Entry Checks".
    """
    at = m[s.VMCS]
    if at == 0 or a[at + h.V_REVISION] & h.SHADOW:
        return vm_fail_invalid(m)
    if m[s.INTERRUPT_SHADOW] and m[s.SHADOW_KIND] == BY_MOV_SS:
        return vm_fail_valid(m, a, ev.ENTRY_BLOCKED_BY_MOV_SS)
    if op == o.VMLAUNCH:
        if a[at + h.V_LAUNCHED] != h.CLEAR:
            return vm_fail_valid(m, a, ev.VMLAUNCH_NON_CLEAR)
        a[at + h.V_SESSION] = m[s.VMX_SESSION]
    else:
        if a[at + h.V_LAUNCHED] != h.LAUNCHED:
            return vm_fail_valid(m, a, ev.VMRESUME_NON_LAUNCHED)
        if a[at + h.V_SESSION] != m[s.VMX_SESSION]:
            return vm_fail_valid(m, a, ev.VMRESUME_AFTER_VMXOFF)
    return vm_entry(m, a, t)


@kernel
def type_operand(m: Record, a: Arena, r: int) -> int:
    """The type operand of INVEPT and INVVPID: all 64 bits of the register in 64-bit mode, 32 bits elsewhere."""
    kind = m[s.GPR + (a[r + o.ROW_R1] & 15)]
    return kind if in_64_bit_mode(m) else kind & 0xFFFFFFFF


@kernel
def invept(m: Record, a: Arena, t: Tags, gva: int, kind: int) -> int:
    """INVEPT: mappings derived from EPT, of one EPTP or of all.

    SDM: "INVEPT—Invalidate Translations Derived from EPT".
    """
    if (kind != SINGLE and kind != ALL) or not ept_vpid(a, CAP_INVEPT_TYPES + kind):
        return vm_fail(m, a, ev.INVALID_INVALIDATION_OPERAND)
    eptp = read64(m, a, t, gva)
    if m[s.FAULT_KIND] == 0:
        read64(m, a, t, gva + 8)
    if m[s.FAULT_KIND]:
        return raise_fault(m, a, t, m[s.FAULT_KIND])
    if kind == SINGLE and ept_pointer_failure(a, eptp, beyond_addresses(m, a)):
        return vm_fail(m, a, ev.INVALID_INVALIDATION_OPERAND)
    drop_guest_physical(m, a, eptp & ADDRESS if kind == SINGLE else 0)
    return vm_succeed(m)


@kernel
def invvpid(m: Record, a: Arena, t: Tags, gva: int, kind: int) -> int:
    """INVVPID: linear and combined mappings of one address, of one VPID, or of all but VPID 0.

    SDM: "INVVPID—Invalidate Translations Based on VPID".
    """
    if kind < INDIVIDUAL or kind > SINGLE_KEEPING_GLOBALS or not ept_vpid(a, CAP_INVVPID_TYPES + kind):
        return vm_fail(m, a, ev.INVALID_INVALIDATION_OPERAND)
    descriptor = read64(m, a, t, gva)
    address = 0
    if m[s.FAULT_KIND] == 0:
        address = read64(m, a, t, gva + 8)
    if m[s.FAULT_KIND]:
        return raise_fault(m, a, t, m[s.FAULT_KIND])
    vpid = descriptor & 0xFFFF
    if descriptor != vpid or (kind != ALL and vpid == 0):
        return vm_fail(m, a, ev.INVALID_INVALIDATION_OPERAND)
    if kind == INDIVIDUAL:
        top = address >> (56 if m[s.CR4] & CR4_LA57 else 47)
        if top != 0 and top != -1:
            return vm_fail(m, a, ev.INVALID_INVALIDATION_OPERAND)
        for n in range(m[s.CONTEXT_COUNT]):
            key = a[m[s.CONTEXTS] + n]
            if key >= 0 and key & 0xFFFF == vpid:
                drop_page(m, a, key & ~GLOBAL_KEY, address)
    elif kind == ALL:
        for n in range(m[s.CONTEXT_COUNT]):
            key = a[m[s.CONTEXTS] + n]
            if key >= 0 and key & 0xFFFF:
                drop_contexts(m, a, -1, key, True)
    else:
        drop_contexts(m, a, 0xFFFF, vpid, kind == SINGLE)
    return vm_succeed(m)
