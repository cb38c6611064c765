"""Memory operands of decoded rows: effective address, segment, access of any size; registers of any size.

SDM: "Specifying an Offset"; "Memory Operands in 64-Bit Mode"; "Canonical Addressing".
Not modelled: alignment checks of operands wider than 8 bytes.
"""

from __future__ import annotations

from vtsim.base.jit import Arena, Record, Tags, kernel
from vtsim.base.memory import is_memory, load, store
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.codes import AC, DEVICE_READ, DEVICE_WRITE, GP, OUT_OF_MEMORY, SS
from vtsim.cpu.kernels import modes
from vtsim.cpu.kernels.access import access_as, load_across, store_across
from vtsim.cpu.kernels.apic_virtualization import (
    apic_access_exit,
    note_write,
    on_apic_page,
    virtual_load,
    virtual_store,
    virtualizes_read,
    virtualizes_write,
)
from vtsim.cpu.kernels.breakpoints import data_breakpoint
from vtsim.cpu.kernels.modes import BASES, LOW32, canonical, segment_allows
from vtsim.cpu.kernels.rights import READ, WRITE

# fmt: off
# an operand access is refused with a fault of a translation, or with
SEGMENT_REFUSED, ON_DEVICE, HAS_EXITED = -8, -9, -10
CR0_AM, RF_AC = 1 << 18, 1 << 18
# fmt: on


@kernel
def segment_of(packed: int) -> int:
    """The segment of a decoded row's operand, numbered as VMCS fields are ordered."""
    segment = (packed >> o.MEM_SEGMENT) & 7
    if segment == o.SEGMENT_FS:
        return modes.FS
    if segment == o.SEGMENT_GS:
        return modes.GS
    return segment - o.SEGMENT_ES


@kernel
def address_mask(packed: int) -> int:
    """The bits of an offset that the row's address size has."""
    size = (packed >> o.MEM_ADDRESS_SIZE) & 3
    if size == 0:
        return 0xFFFF
    return LOW32 if size == 1 else -1


@kernel
def offset_of(m: Record, a: Arena, r: int) -> int:
    """The effective address of a decoded row's operand."""
    packed = a[r + o.ROW_MEM]
    offset = a[r + o.ROW_DISP]
    base = packed & 31
    if base < 16:
        offset += m[s.GPR + base]
    elif base == o.RIP_BASE:
        offset += m[s.RIP] + m[s.OP_LENGTH]
    index = (packed >> o.MEM_INDEX) & 31
    if index < 16:
        offset += m[s.GPR + index] << ((packed >> o.MEM_SCALE) & 3)
    return offset & address_mask(packed)


@kernel
def linear(m: Record, segment: int, offset: int) -> int:
    """The linear address of an offset in a segment."""
    if m[s.MODE]:
        return (m[BASES + segment] + offset) & LOW32
    if segment >= modes.FS:
        return m[BASES + segment] + offset
    return offset


@kernel
def checked(m: Record, segment: int, offset: int, size: int, write: bool) -> int:
    """The linear address of an access; SEGMENT_FAULT is 0, or the vector of what refuses it.

    SDM: "Limit Checking"; "Canonical Addressing".
    """
    gva = linear(m, segment, offset)
    m[s.SEGMENT_FAULT] = 0
    good = segment_allows(m, segment, offset, size, write) if m[s.MODE] else canonical(m, gva)
    if not good:
        m[s.SEGMENT_FAULT] = SS if segment == modes.SS else GP
    elif m[s.CR0] & CR0_AM and m[s.RFLAGS] & RF_AC and m[s.PRIVILEGE] & 1 and gva & (size - 1) and size <= 8:
        m[s.SEGMENT_FAULT] = AC
    elif m[s.DR7] & 0xFF:
        data_breakpoint(m, gva, size, write)
        m[s.PENDING] = 1
        m[s.LIMIT] = 0
    return gva


@kernel
def load_linear(m: Record, a: Arena, t: Tags, gva: int, size: int, user: int) -> int:
    """Load 1, 2, 4 or 8 bytes. FAULT_KIND is 0 if it worked, ON_DEVICE where no memory answers (STOP_A says which)."""
    m[s.FAULT_KIND] = 0
    hpa = access_as(m, a, t, gva, READ, user)
    if hpa < 0:
        m[s.FAULT_KIND] = hpa
        return 0
    if on_apic_page(m, a, hpa):
        offset = hpa & 0xFFF
        if virtualizes_read(m, a, offset, size):
            return virtual_load(m, a, offset, size)
        apic_access_exit(m, a, offset, False)
        m[s.FAULT_KIND] = HAS_EXITED
        return 0
    if (gva & 0xFFF) + size > 4096:
        return load_across(m, a, t, gva, size, hpa, user)
    if not is_memory(a, hpa):
        m[s.FAULT_KIND] = ON_DEVICE
        m[s.STOP_A] = hpa
        return -1
    return load(a, hpa, size)


@kernel
def store_linear(m: Record, a: Arena, t: Tags, gva: int, size: int, value: int, user: int) -> int:
    """Store 1, 2, 4 or 8 bytes: 0, or a fault, or ON_DEVICE."""
    hpa = access_as(m, a, t, gva, WRITE, user)
    if hpa < 0:
        return hpa
    if on_apic_page(m, a, hpa):
        offset = hpa & 0xFFF
        if virtualizes_write(m, a, offset, size):
            virtual_store(m, a, offset, size, value)
            note_write(m, offset)
            return 0
        apic_access_exit(m, a, offset, True)
        return HAS_EXITED
    if (gva & 0xFFF) + size > 4096:
        return store_across(m, a, t, gva, size, value, hpa, user)
    if not is_memory(a, hpa):
        m[s.STOP_A] = hpa
        return ON_DEVICE
    if store(a, hpa, size, value) < 0:
        m[s.STOP] = OUT_OF_MEMORY
        m[s.LIMIT] = 0
    return 0


@kernel
def load_segment(m: Record, a: Arena, t: Tags, segment: int, offset: int, size: int) -> int:
    """Load from a segment at the current privilege. FAULT_KIND is 0 if it worked."""
    gva = checked(m, segment, offset, size, False)
    if m[s.SEGMENT_FAULT]:
        m[s.FAULT_KIND] = SEGMENT_REFUSED
        return 0
    return load_linear(m, a, t, gva, size, m[s.PRIVILEGE] & 1)


@kernel
def store_segment(m: Record, a: Arena, t: Tags, segment: int, offset: int, size: int, value: int) -> int:
    """Store into a segment at the current privilege: 0, or a fault."""
    gva = checked(m, segment, offset, size, True)
    if m[s.SEGMENT_FAULT]:
        return SEGMENT_REFUSED
    return store_linear(m, a, t, gva, size, value, m[s.PRIVILEGE] & 1)


@kernel
def load_operand(m: Record, a: Arena, t: Tags, r: int, size: int) -> int:
    """Load a decoded row's memory operand."""
    return load_segment(m, a, t, segment_of(a[r + o.ROW_MEM]), offset_of(m, a, r), size)


@kernel
def load_for_update(m: Record, a: Arena, t: Tags, r: int, size: int) -> int:
    """Load the memory operand of a read-modify-write, which needs the right to write from the start."""
    gva = checked(m, segment_of(a[r + o.ROW_MEM]), offset_of(m, a, r), size, True)
    m[s.FAULT_KIND] = SEGMENT_REFUSED if m[s.SEGMENT_FAULT] else 0
    if m[s.FAULT_KIND]:
        return 0
    user = m[s.PRIVILEGE] & 1
    hpa = access_as(m, a, t, gva, WRITE, user)
    if hpa < 0:
        m[s.FAULT_KIND] = hpa
        return 0
    return load_linear(m, a, t, gva, size, user)


@kernel
def store_operand(m: Record, a: Arena, t: Tags, r: int, size: int, value: int) -> int:
    """Store a decoded row's memory operand: 0, or a fault."""
    return store_segment(m, a, t, segment_of(a[r + o.ROW_MEM]), offset_of(m, a, r), size, value)


@kernel
def on_device(m: Record, size: int, write: bool, value: int, register: int) -> None:
    """Stop so that the platform's device answers an access at STOP_A."""
    m[s.STOP] = DEVICE_WRITE if write else DEVICE_READ
    m[s.STOP_B] = size | register << 8
    m[s.STOP_C] = value


@kernel
def get_register(m: Record, number: int, size: int) -> int:
    """Read a general register as 1, 2, 4 or 8 bytes."""
    if number >= o.HIGH_BYTES:
        return (m[s.GPR + number - o.HIGH_BYTES] >> 8) & 0xFF
    value = m[s.GPR + number]
    if size >= 8:
        return value
    return value & ((1 << (8 * size)) - 1)


@kernel
def set_register(m: Record, number: int, size: int, value: int) -> None:
    """Write a general register: 4 bytes clear the upper half, 1 and 2 leave the rest.

    SDM: "General-Purpose Registers in 64-Bit Mode".
    """
    if number >= o.HIGH_BYTES:
        at = s.GPR + number - o.HIGH_BYTES
        m[at] = (m[at] & ~0xFF00) | (value & 0xFF) << 8
    elif size == 8:
        m[s.GPR + number] = value
    elif size == 4:
        m[s.GPR + number] = value & LOW32
    else:
        mask = (1 << (8 * size)) - 1
        m[s.GPR + number] = (m[s.GPR + number] & ~mask) | (value & mask)


@kernel
def operand_bytes(packed: int) -> int:
    """The row's operand size in bytes."""
    return 2 << ((packed >> o.MEM_OPERAND_SIZE) & 3)


@kernel
def stack_mask(m: Record) -> int:
    """The bits of RSP that stack accesses use."""
    if m[s.MODE] == 0:
        return -1
    return LOW32 if m[modes.RIGHTS + modes.SS] & modes.AR_D else 0xFFFF


@kernel
def moved_stack(m: Record, by: int) -> int:
    """RSP moved by some bytes, as a stack offset."""
    return (m[s.GPR + s.RSP] + by) & stack_mask(m)


@kernel
def set_stack(m: Record, offset: int) -> None:
    """Write the part of RSP that the stack uses."""
    mask = stack_mask(m)
    m[s.GPR + s.RSP] = (m[s.GPR + s.RSP] & ~mask) | (offset & mask)
    if mask == LOW32:
        m[s.GPR + s.RSP] &= LOW32
