"""VMREAD and VMWRITE of any encoding: in root operation of the current VMCS, in non-root operation of a shadow VMCS.

SDM: "VMREAD—Read Field from Virtual-Machine Control Structure";
"VMWRITE—Write Field to Virtual-Machine Control Structure".
"""

from __future__ import annotations

from vtsim.base.jit import Arena, Record, Tags, kernel
from vtsim.base.memory import VALUES, give_contents, is_memory, load, store
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.codes import GP, OUT_OF_MEMORY, STOPPED
from vtsim.cpu.kernels.access import access_as, bitmap_bit, effective, load_across, store_across
from vtsim.cpu.kernels.active_controls import secondary_controls
from vtsim.cpu.kernels.conventions import vm_fail_invalid, vm_fail_valid, vm_succeed
from vtsim.cpu.kernels.exceptions import raise_exception, raise_fault
from vtsim.cpu.kernels.rights import READ, WRITE
from vtsim.cpu.kernels.vmx_capabilities import HIGH_HALF, exit_information_writable, field_slot
from vtsim.vmcs import bits as b
from vtsim.vmcs import slots as v
from vtsim.vmcs import state as h
from vtsim.vmcs.events import READ_ONLY_COMPONENT, UNSUPPORTED_COMPONENT
from vtsim.vmcs.groups import GROUPS

# fmt: off
EFER_LMA: int = 1 << 10
CS_L: int = 1 << 13
LOW_32: int = 0xFFFFFFFF
W16, W64, W32 = 0, 1, 2
EXIT_INFORMATION: int = 1
ENCODINGS: int = 1 << 15
# fmt: on


@kernel
def in_64_bit_mode(m: Record) -> bool:
    """Is this 64-bit mode, in which operands of VMX instructions have 64 bits?"""
    return m[s.EFER] & EFER_LMA != 0 and m[s.CS_ACCESS_RIGHTS] & CS_L != 0


@kernel
def encoding_operand(m: Record, a: Arena, r: int) -> int:
    """The encoding that a VMREAD or VMWRITE names: an immediate of the row, or a register as wide as the mode says."""
    register = a[r + o.ROW_R2]
    if register >= 16:
        return a[r + o.ROW_IMM]
    encoding = m[s.GPR + register]
    return encoding if in_64_bit_mode(m) else encoding & LOW_32


@kernel
def shadowed(m: Record, a: Arena, r: int, op: int) -> bool:
    """Does a VMREAD or VMWRITE in non-root operation access the shadow VMCS, so that it does not exit?

    SDM: "Instructions That Cause VM Exits Conditionally"; "VMCS Shadowing Bitmap Addresses".
    """
    at = m[s.VMCS]
    if secondary_controls(m, a) & b.VMCS_SHADOWING == 0:
        return False
    encoding = encoding_operand(m, a, r)
    if encoding & ~(ENCODINGS - 1):
        return False
    bitmap = v.VMREAD_BITMAP_ADDRESS if op == o.VMREAD else v.VMWRITE_BITMAP_ADDRESS
    return not bitmap_bit(a, a[at + bitmap], encoding)


@kernel
def read_component(a: Arena, word: int, encoding: int) -> int:
    """What VMREAD of an encoding returns: the field's word in its width, or the upper half of a 64-bit field."""
    value = a[word]
    width = encoding >> 13
    if width == W16:
        return value & 0xFFFF
    if width == W32:
        return value & LOW_32
    if encoding & HIGH_HALF:
        return (value >> 32) & LOW_32
    return value


@kernel
def write_component(a: Arena, word: int, encoding: int, value: int) -> None:
    """Store a value in a field's width, or in the upper half of a 64-bit field."""
    width = encoding >> 13
    if width == W16:
        a[word] = value & 0xFFFF
    elif width == W32:
        a[word] = value & LOW_32
    elif encoding & HIGH_HALF:
        a[word] = (a[word] & LOW_32) | value << 32
    else:
        a[word] = value


@kernel
def access_component(m: Record, a: Arena, t: Tags, r: int, op: int) -> int:
    """VMREAD and VMWRITE from the check of the privilege level on; a register R1 of none is a memory operand.

    SDM: "VMREAD—Read Field from Virtual-Machine Control Structure";
    "VMWRITE—Write Field to Virtual-Machine Control Structure".
    """
    if m[s.PRIVILEGE] & 1:
        return raise_exception(m, GP, 1, 0)
    at = m[s.VMCS]
    if m[s.NONROOT]:
        link = a[at + v.VMCS_LINK_POINTER]
        if link == -1 or not is_memory(a, link):
            return vm_fail_invalid(m)
        at = give_contents(a, link >> 12, VALUES)
        if at < 0:
            m[s.STOP] = OUT_OF_MEMORY
            return STOPPED
    elif at == 0:
        return vm_fail_invalid(m)
    encoding = encoding_operand(m, a, r)
    slot = field_slot(a, encoding)
    if slot == 0:
        return vm_fail_valid(m, a, UNSUPPORTED_COMPONENT)
    register = a[r + o.ROW_R1]
    size = 8 if in_64_bit_mode(m) else 4
    if op == o.VMREAD:
        value = read_component(a, at + slot, encoding)
        if register >= 16:
            return store_operand(m, a, t, effective(m, a, r), size, value)
        m[s.GPR + register] = value if size == 8 else value & LOW_32
        return vm_succeed(m)
    if (encoding >> 10) & 3 == EXIT_INFORMATION and not exit_information_writable(a):
        return vm_fail_valid(m, a, READ_ONLY_COMPONENT)
    if register >= 16:
        value = load_operand(m, a, t, effective(m, a, r), size)
        if m[s.FAULT_KIND]:
            return raise_fault(m, a, t, m[s.FAULT_KIND])
    else:
        value = m[s.GPR + register] if size == 8 else m[s.GPR + register] & LOW_32
    write_component(a, at + slot, encoding, value)
    a[at + h.V_CHECKED] &= ~GROUPS[slot]
    return vm_succeed(m)


@kernel
def load_operand(m: Record, a: Arena, t: Tags, gva: int, size: int) -> int:
    """Load a memory operand as ring 0. FAULT_KIND is 0 if it worked."""
    m[s.FAULT_KIND] = 0
    hpa = access_as(m, a, t, gva, READ, 0)
    if hpa < 0:
        return 0
    if (gva & 0xFFF) + size > 4096:
        return load_across(m, a, t, gva, size, hpa, 0)
    return load(a, hpa, size) if is_memory(a, hpa) else -1


@kernel
def store_operand(m: Record, a: Arena, t: Tags, gva: int, size: int, value: int) -> int:
    """Store a memory operand as ring 0; VMsucceed, or the fault."""
    hpa = access_as(m, a, t, gva, WRITE, 0)
    fault = hpa if hpa < 0 else 0
    if fault == 0 and (gva & 0xFFF) + size > 4096:
        fault = store_across(m, a, t, gva, size, value, hpa, 0)
    elif fault == 0 and is_memory(a, hpa) and store(a, hpa, size, value) < 0:
        m[s.STOP] = OUT_OF_MEMORY
        return STOPPED
    if fault:
        return raise_fault(m, a, t, fault)
    return vm_succeed(m) if m[s.STOP] == 0 else STOPPED
