"""Sensitive and privileged instructions of decoded code, whose operands have any size and place.

SDM: "Instruction Set Reference".
"""

from __future__ import annotations

from vtsim.base.jit import Arena, Record, Tags, kernel
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.codes import (
    ARITHMETIC,
    BP,
    DB,
    GP,
    NEXT,
    OF,
    PRIVILEGED_EXCEPTION,
    RF_CF,
    RF_IF,
    RF_OF,
    SOFTWARE_EXCEPTION,
    UD,
)
from vtsim.cpu.kernels import modes
from vtsim.cpu.kernels.events import deliver
from vtsim.cpu.kernels.exceptions import raise_exception, raise_fault
from vtsim.cpu.kernels.extended_state import extended_state
from vtsim.cpu.kernels.far import pop_flags, push_flags
from vtsim.cpu.kernels.instructions import instruction
from vtsim.cpu.kernels.invalidate import drop_page
from vtsim.cpu.kernels.operands import (
    ON_DEVICE,
    address_mask,
    get_register,
    linear,
    load_operand,
    load_segment,
    offset_of,
    operand_bytes,
    segment_of,
    set_register,
    store_operand,
    store_segment,
)
from vtsim.cpu.kernels.pending import arm
from vtsim.cpu.kernels.segment_ops import look_at_segment, pop_segment, push_segment, segment_base
from vtsim.cpu.kernels.segments import load_system_segment
from vtsim.cpu.kernels.sensitive import exit_by_instruction
from vtsim.cpu.kernels.v86_extensions import redirect, redirects
from vtsim.vmcs import bits as b
from vtsim.vmcs import reasons as x
from vtsim.vmcs import slots as v
from vtsim.vmcs.events import BLOCKING_BY_STI
from vtsim.vmcs.kernels.values import cpuid_register

# fmt: off
CR4_TSD, CR4_PCE, CR4_SMXE, CR4_OSXSAVE = 1 << 2, 1 << 8, 1 << 14, 1 << 18
DR7_GD, DR6_BD = 1 << 13, 1 << 13
COUNTERS: int = 2                  # of processors that do not enumerate them
NOT_HERE: int = -1                 # not how an op ends: another part executes it
# fmt: on


@kernel
def debug_register(m: Record, a: Arena, r: int, op: int) -> int:
    """MOV to and from a debug register, whose VM exit has priority over its faults.

    SDM: "Instructions That Cause VM Exits Conditionally"; "MOV—Move to/from Debug Registers".
    """
    if m[s.NONROOT] and a[m[s.VMCS] + v.PRIMARY_PROC_CONTROLS] & b.MOV_DR_EXITING:
        return exit_by_instruction(m, a, r, op, x.DR_ACCESS)
    number = a[r + o.ROW_IMM]
    if number > 7 or ((number == 4 or number == 5) and m[s.CR4] & 8):
        return raise_exception(m, UD, 0, 0)
    if m[s.DR7] & DR7_GD:
        m[s.EVENT_CR2] = DR6_BD
        return raise_exception(m, DB, 0, 0)
    if m[s.PRIVILEGE] & 1:
        return raise_exception(m, GP, 1, 0)
    register = s.GPR + (a[r + o.ROW_R1] & 15)
    slot = s.DR0 + number
    if number >= 4:
        slot = s.DR6 if number & 1 == 0 else s.DR7
    if op == o.MOV_FROM_DR:
        m[register] = m[slot] if m[s.MODE] == 0 else m[slot] & 0xFFFFFFFF
        return NEXT
    value = m[register] if m[s.MODE] == 0 else m[register] & 0xFFFFFFFF
    if number >= 4:
        if value & ~0xFFFFFFFF:
            return raise_exception(m, GP, 1, 0)
        value = (value & 0xE00F) | 0xFFFF0FF0 if slot == s.DR6 else (value & 0xFFFF2FFF) | 0x400
    m[slot] = value
    if slot == s.DR7:
        arm(m, a)
        m[s.LIMIT] = 0
    return NEXT


@kernel
def decoded_rest(m: Record, a: Arena, t: Tags, r: int, op: int) -> int:
    """The sensitive ops of decoded code that differ from assembled rows in their operands; NOT_HERE for all others."""
    packed = a[r + o.ROW_MEM]
    size = operand_bytes(packed)
    in_register = packed & o.MEM_REGISTER != 0
    r2 = a[r + o.ROW_R2]
    if op == o.STI:
        if m[s.RFLAGS] & RF_IF == 0:
            m[s.RFLAGS] |= RF_IF
            m[s.INTERRUPT_SHADOW] = 2
            m[s.SHADOW_KIND] = BLOCKING_BY_STI
            m[s.LIMIT] = 0
    elif op == o.PUSHF:
        return push_flags(m, a, t, size)
    elif op == o.POPF:
        return pop_flags(m, a, t, size)
    elif op == o.LGDT or op == o.LIDT:
        return load_table(m, a, t, r, op)
    elif op == o.SGDT or op == o.SIDT:
        return store_table(m, a, t, r, op)
    elif op == o.SMSW or op == o.SLDT or op == o.STR:
        value = m[s.LDTR_SELECTOR] if op == o.SLDT else m[s.TR_SELECTOR]
        if op == o.SMSW:
            value = m[s.CR0]
            if m[s.NONROOT]:
                mask = a[m[s.VMCS] + v.CR0_GUEST_HOST_MASK]
                value = (value & ~mask) | (a[m[s.VMCS] + v.CR0_READ_SHADOW] & mask)
        if in_register:
            set_register(m, r2, size, value)
            return NEXT
        fault = store_operand(m, a, t, r, 2, value)
        return NEXT if fault == 0 else raise_fault(m, a, t, fault)
    elif op == o.LLDT or op == o.LTR:
        selector = get_register(m, r2, 2) if in_register else load_operand(m, a, t, r, 2)
        if not in_register and m[s.FAULT_KIND]:
            return raise_fault(m, a, t, m[s.FAULT_KIND])
        return load_system_segment(m, a, t, modes.LDTR if op == o.LLDT else modes.TR, selector)
    elif op == o.INVLPG:
        drop_page(m, a, m[s.CONTEXT_KEY], linear(m, segment_of(packed), offset_of(m, a, r)))
    elif op == o.RDRAND or op == o.RDSEED:
        state = m[s.CYCLE] * 0x9E3779B1 + 0x7F4A7C15
        set_register(m, r2, size, state ^ ((state >> 17) & 0xFFFF))
        m[s.RFLAGS] = (m[s.RFLAGS] & ~ARITHMETIC) | RF_CF
    elif op == o.XGETBV:
        return read_extended_control(m)
    elif op == o.RDPMC:  # none of the counters is enabled
        if (m[s.GPR + s.RCX] & 0xFFFFFFFF) >= max((cpuid_register(a, 0xA, 0, 0) >> 8) & 0xFF, COUNTERS):
            return raise_exception(m, GP, 1, 0)
        m[s.GPR + s.RAX] = 0
        m[s.GPR + s.RDX] = 0
    elif op == o.MONITOR:
        if m[s.GPR + s.RCX] & 0xFFFFFFFF:
            return raise_exception(m, GP, 1, 0)
        load_segment(m, a, t, segment_of(packed), m[s.GPR + s.RAX] & address_mask(packed), 1)
        if m[s.FAULT_KIND] and m[s.FAULT_KIND] != ON_DEVICE:
            return raise_fault(m, a, t, m[s.FAULT_KIND])
        m[s.MONITOR_ARMED] = 1
    elif op == o.MWAIT:
        if m[s.GPR + s.RCX] & 0xFFFFFFFE:
            return raise_exception(m, GP, 1, 0)
        if m[s.MONITOR_ARMED] == 0:
            return NEXT
        m[s.MONITOR_ARMED] = 0
        return NOT_HERE  # it halts
    elif op == o.INT3 or op == o.INT1 or op == o.INTO:
        return software_exception(m, a, t, op)
    elif op == o.INT and m[s.MODE] & modes.V86 and redirects(m, a, t, a[r + o.ROW_IMM]):
        return redirect(m, a, t, a[r + o.ROW_IMM])
    elif op == o.TPAUSE or op == o.UMWAIT:
        if get_register(m, r2, 4) & ~1:
            return raise_exception(m, GP, 1, 0)
        m[s.RFLAGS] &= ~ARITHMETIC
    elif op == o.UMONITOR:
        load_segment(m, a, t, segment_of(packed), get_register(m, r2, 8) & address_mask(packed), 1)
        if m[s.FAULT_KIND] and m[s.FAULT_KIND] != ON_DEVICE:
            return raise_fault(m, a, t, m[s.FAULT_KIND])
    elif op == o.LOADIWKEY:
        m[s.RFLAGS] &= ~ARITHMETIC
    elif op == o.ENCLS or op == o.ENCLV or op == o.PCONFIG:  # enclaves are off, and there is no configuration leaf
        return raise_exception(m, GP, 1, 0)
    elif op == o.XSAVES or op == o.XRSTORS:
        return extended_state(m, a, t, r, op)
    elif o.LAR <= op <= o.VERW:
        selector = get_register(m, r2, 2) if in_register else load_operand(m, a, t, r, 2)
        if not in_register and m[s.FAULT_KIND]:
            return raise_fault(m, a, t, m[s.FAULT_KIND])
        return look_at_segment(m, a, t, op, selector, a[r + o.ROW_R1], size)
    elif op == o.PUSH_SEGMENT:
        return push_segment(m, a, t, a[r + o.ROW_EXTRA], size)
    elif op == o.POP_SEGMENT:
        return pop_segment(m, a, t, a[r + o.ROW_EXTRA], size)
    elif o.RDFSBASE <= op <= o.WRGSBASE:
        return segment_base(m, op, r2, size)
    elif o.MOVE <= op < o.STAC:
        return instruction(m, a, t, r, op)
    else:
        return NOT_HERE
    return NEXT


@kernel
def read_extended_control(m: Record) -> int:
    """XGETBV."""
    if m[s.GPR + s.RCX] & 0xFFFFFFFF > 1:
        return raise_exception(m, GP, 1, 0)
    m[s.GPR + s.RAX] = m[s.XCR0] & 0xFFFFFFFF
    m[s.GPR + s.RDX] = (m[s.XCR0] >> 32) & 0xFFFFFFFF
    return NEXT


@kernel
def software_exception(m: Record, a: Arena, t: Tags, op: int) -> int:
    """INT3, INTO and INT1.

    SDM: "INT n/INTO/INT3/INT1—Call to Interrupt Procedure".
    """
    if op == o.INTO and m[s.RFLAGS] & RF_OF == 0:
        return NEXT
    vector = BP
    kind = SOFTWARE_EXCEPTION
    if op == o.INTO:
        vector = OF
    elif op == o.INT1:
        vector = DB
        kind = PRIVILEGED_EXCEPTION
    m[s.EVENT_VECTOR] = vector
    m[s.EVENT_TYPE] = kind
    m[s.EVENT_HAS_ERROR] = 0
    m[s.EVENT_ERROR] = 0
    m[s.EVENT_CR2] = 0
    m[s.EVENT_LENGTH] = m[s.OP_LENGTH]
    return deliver(m, a, t)


@kernel
def load_table(m: Record, a: Arena, t: Tags, r: int, op: int) -> int:
    """LGDT and LIDT of the mode's operand size.

    SDM: "LGDT/LIDT—Load Global/Interrupt Descriptor Table Register".
    """
    packed = a[r + o.ROW_MEM]
    segment = segment_of(packed)
    offset = offset_of(m, a, r)
    wide = m[s.MODE] == 0
    limit = load_segment(m, a, t, segment, offset, 2)
    base = 0
    if m[s.FAULT_KIND] == 0:
        base = load_segment(m, a, t, segment, offset + 2, 8 if wide else 4)
    if m[s.FAULT_KIND]:
        return raise_fault(m, a, t, m[s.FAULT_KIND])
    if wide and not modes.canonical(m, base):
        return raise_exception(m, GP, 1, 0)
    if not wide and operand_bytes(packed) == 2:
        base &= 0xFFFFFF
    m[s.GDTR_BASE if op == o.LGDT else s.IDTR_BASE] = base
    m[s.GDTR_LIMIT if op == o.LGDT else s.IDTR_LIMIT] = limit
    return NEXT


@kernel
def store_table(m: Record, a: Arena, t: Tags, r: int, op: int) -> int:
    """SGDT and SIDT."""
    segment = segment_of(a[r + o.ROW_MEM])
    offset = offset_of(m, a, r)
    fault = store_segment(m, a, t, segment, offset, 2, m[s.GDTR_LIMIT if op == o.SGDT else s.IDTR_LIMIT])
    if fault == 0:
        base = m[s.GDTR_BASE if op == o.SGDT else s.IDTR_BASE]
        fault = store_segment(m, a, t, segment, offset + 2, 8 if m[s.MODE] == 0 else 4, base)
    return NEXT if fault == 0 else raise_fault(m, a, t, fault)
