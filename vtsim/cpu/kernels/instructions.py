"""Ordinary instructions of decoded code: moves, arithmetic, stack, strings, segment loads.

SDM: "Instruction Set Reference".
Not modelled: the auxiliary-carry and parity flags of arithmetic beyond 64-bit results; floating-point state.
"""

from __future__ import annotations

from vtsim.base.jit import Arena, Record, Tags, kernel
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.codes import (
    AGAIN,
    BR,
    DE,
    GP,
    JUMPED,
    NEXT,
    NM,
    STOPPED,
    UD,
)
from vtsim.cpu.kernels import modes
from vtsim.cpu.kernels.access import access_as
from vtsim.cpu.kernels.alu import below
from vtsim.cpu.kernels.arithmetic import arithmetic_result
from vtsim.cpu.kernels.exceptions import raise_exception, raise_fault
from vtsim.cpu.kernels.far import far_transfer
from vtsim.cpu.kernels.far_returns import far_return
from vtsim.cpu.kernels.operands import (
    ON_DEVICE,
    SEGMENT_REFUSED,
    address_mask,
    checked,
    get_register,
    load_for_update,
    load_operand,
    load_segment,
    moved_stack,
    offset_of,
    on_device,
    operand_bytes,
    segment_of,
    set_register,
    set_stack,
    store_operand,
    store_segment,
)
from vtsim.cpu.kernels.pending import between_iterations
from vtsim.cpu.kernels.rights import READ
from vtsim.cpu.kernels.segment_ops import move_to_segment


@kernel
def refuse(m: Record, a: Arena, t: Tags, fault: int, size: int, write: bool, value: int, register: int) -> int:
    """An operand's access was refused, or a device answers it."""
    if fault == ON_DEVICE:
        on_device(m, size, write, value, register)
        return STOPPED
    return raise_fault(m, a, t, fault)


@kernel
def instruction(m: Record, a: Arena, t: Tags, r: int, op: int) -> int:
    """Execute an ordinary instruction of decoded code."""
    packed = a[r + o.ROW_MEM]
    size = (packed >> o.MEM_SIZE) & 15
    r1 = a[r + o.ROW_R1]
    r2 = a[r + o.ROW_R2]
    in_register = packed & o.MEM_REGISTER != 0
    if op == o.MOVE:
        if packed & o.MEM_TO_RM:
            value = a[r + o.ROW_IMM] if packed & o.MEM_IMMEDIATE else get_register(m, r1, size)
            if in_register:
                set_register(m, r2, size, value)
                return NEXT
            fault = store_operand(m, a, t, r, size, value)
            return NEXT if fault == 0 else refuse(m, a, t, fault, size, True, value, 16)
        if in_register:
            set_register(m, r1, size, get_register(m, r2, size))
            return NEXT
        value = load_operand(m, a, t, r, size)
        if m[s.FAULT_KIND]:
            return refuse(m, a, t, m[s.FAULT_KIND], size, False, 0, r1)
        set_register(m, r1, size, value)
        return NEXT
    if op == o.ARITHMETIC:
        return arithmetic_op(m, a, t, r)
    if op == o.EXCHANGE:
        return exchange(m, a, t, r)
    if op == o.DIVIDE:
        return divide(m, a, t, r)
    if op == o.PUSH_OPERAND:
        size = operand_bytes(packed)
        value = a[r + o.ROW_IMM]
        if packed & o.MEM_IMMEDIATE == 0:
            if in_register:
                value = get_register(m, r2, size)
            else:
                value = load_operand(m, a, t, r, size)
                if m[s.FAULT_KIND]:
                    return refuse(m, a, t, m[s.FAULT_KIND], size, False, 0, 16)
        return push(m, a, t, value, size)
    if op == o.POP_OPERAND:
        size = operand_bytes(packed)
        value = load_segment(m, a, t, modes.SS, moved_stack(m, 0), size)
        if m[s.FAULT_KIND]:
            return refuse(m, a, t, m[s.FAULT_KIND], size, False, 0, 16)
        if in_register:
            set_stack(m, moved_stack(m, size))
            set_register(m, r2, size, value)
            return NEXT
        fault = store_operand(m, a, t, r, size, value)
        if fault:
            return refuse(m, a, t, fault, size, True, value, 16)
        set_stack(m, moved_stack(m, size))
        return NEXT
    if op == o.MOVE_STRING:
        return move_string(m, a, t, r)
    if op == o.MOV_TO_SEGMENT:
        segment = a[r + o.ROW_EXTRA]
        if segment == modes.CS or segment > modes.GS:
            return raise_exception(m, UD, 0, 0)
        selector = get_register(m, r2, 2) if in_register else load_operand(m, a, t, r, 2)
        if not in_register and m[s.FAULT_KIND]:
            return refuse(m, a, t, m[s.FAULT_KIND], 2, False, 0, 16)
        return move_to_segment(m, a, t, segment, selector)
    if op == o.MOV_FROM_SEGMENT:
        segment = a[r + o.ROW_EXTRA]
        if segment > modes.GS:
            return raise_exception(m, UD, 0, 0)
        if in_register:
            set_register(m, r2, operand_bytes(packed), m[modes.SELECTORS_AT + segment])
            return NEXT
        fault = store_operand(m, a, t, r, 2, m[modes.SELECTORS_AT + segment])
        return NEXT if fault == 0 else refuse(m, a, t, fault, 2, True, 0, 16)
    if op == o.JMP_NEAR:
        size = operand_bytes(packed)
        target = get_register(m, r2, size) if in_register else load_operand(m, a, t, r, size)
        if not in_register and m[s.FAULT_KIND]:
            return refuse(m, a, t, m[s.FAULT_KIND], size, False, 0, 16)
        if m[s.MODE] == 0 and not modes.canonical(m, target):
            return raise_exception(m, GP, 1, 0)
        if m[s.MODE] and target > m[modes.LIMITS_AT + modes.CS]:
            return raise_exception(m, GP, 1, 0)
        m[s.RIP] = target
        return JUMPED
    if op == o.JMP_FAR or op == o.CALL_FAR:
        selector = a[r + o.ROW_EXTRA]
        offset = a[r + o.ROW_IMM]
        if packed & 31 < 16 or packed & o.MEM_TO_RM:
            size = operand_bytes(packed)
            offset = load_operand(m, a, t, r, size)
            if m[s.FAULT_KIND] == 0:
                selector = load_segment(m, a, t, segment_of(packed), offset_of(m, a, r) + size, 2)
            if m[s.FAULT_KIND]:
                return refuse(m, a, t, m[s.FAULT_KIND], size, False, 0, 16)
        return far_transfer(m, a, t, selector, offset, op == o.CALL_FAR, operand_bytes(packed))
    if op == o.RET_FAR:
        return far_return(m, a, t, operand_bytes(packed), a[r + o.ROW_IMM] & 0xFFFF)
    if op == o.BOUND:
        size = operand_bytes(packed)
        index = signed(get_register(m, r1, size), size)
        low = load_operand(m, a, t, r, size)
        high = 0
        if m[s.FAULT_KIND] == 0:
            high = load_segment(m, a, t, segment_of(packed), offset_of(m, a, r) + size, size)
        if m[s.FAULT_KIND]:
            return refuse(m, a, t, m[s.FAULT_KIND], size, False, 0, 16)
        if index < signed(low, size) or index > signed(high, size):
            return raise_exception(m, BR, 0, 0)
        return NEXT
    if op == o.TOUCH:
        kind = a[r + o.ROW_EXTRA]
        if kind == o.TOUCH_PREFETCH:
            return NEXT
        if kind == o.TOUCH_FXSAVE:
            if m[s.CR0] & 12:
                return raise_exception(m, NM, 0, 0)
            if offset_of(m, a, r) & 15:
                return raise_exception(m, GP, 1, 0)
            for n in range(58):
                fault = store_segment(m, a, t, segment_of(packed), offset_of(m, a, r) + 8 * n, 8, 0)
                if fault:
                    return refuse(m, a, t, fault, 8, True, 0, 16)
            return NEXT
        gva = checked(m, segment_of(packed), offset_of(m, a, r), 1, False)
        if m[s.SEGMENT_FAULT]:
            return raise_fault(m, a, t, SEGMENT_REFUSED)
        hpa = access_as(m, a, t, gva, READ, m[s.PRIVILEGE] & 1)
        return raise_fault(m, a, t, hpa) if hpa < 0 else NEXT
    if op == o.FNINIT:
        if m[s.CR0] & 12:
            return raise_exception(m, NM, 0, 0)
        return NEXT
    return raise_exception(m, UD, 0, 0)


@kernel
def signed(value: int, size: int) -> int:
    """A 2-, 4- or 8-byte value as a signed number."""
    if size == 8:
        return value
    sign = 1 << (8 * size - 1)
    return (value ^ sign) - sign


@kernel
def push(m: Record, a: Arena, t: Tags, value: int, size: int) -> int:
    """Push on the stack of the mode."""
    at = moved_stack(m, -size)
    fault = store_segment(m, a, t, modes.SS, at, size, value)
    if fault:
        return refuse(m, a, t, fault, size, True, value, 16)
    set_stack(m, at)
    return NEXT


@kernel
def arithmetic_op(m: Record, a: Arena, t: Tags, r: int) -> int:
    """ADD to CMP, TEST, INC, DEC with any operands."""
    packed = a[r + o.ROW_MEM]
    size = (packed >> o.MEM_SIZE) & 15
    kind = a[r + o.ROW_EXTRA]
    r1 = a[r + o.ROW_R1]
    r2 = a[r + o.ROW_R2]
    flags = m[s.RFLAGS]
    rm = 0
    if packed & o.MEM_REGISTER:
        rm = get_register(m, r2, size)
    else:
        update = packed & o.MEM_TO_RM and kind != o.K_CMP and kind != o.K_TEST
        rm = load_for_update(m, a, t, r, size) if update else load_operand(m, a, t, r, size)
        if m[s.FAULT_KIND]:
            return refuse(m, a, t, m[s.FAULT_KIND], size, False, 0, 16)
    other = a[r + o.ROW_IMM] if packed & o.MEM_IMMEDIATE else (get_register(m, r1, size) if r1 != s.NO_REGISTER else 0)
    if packed & o.MEM_TO_RM == 0:
        result = arithmetic_result(m, other, rm, kind, size)
        if kind != o.K_CMP and kind != o.K_TEST:
            set_register(m, r1, size, result)
        return NEXT
    result = arithmetic_result(m, rm, other, kind, size)
    if kind == o.K_CMP or kind == o.K_TEST:
        return NEXT
    if packed & o.MEM_REGISTER:
        set_register(m, r2, size, result)
        return NEXT
    fault = store_operand(m, a, t, r, size, result)
    if fault:
        m[s.RFLAGS] = flags
        return refuse(m, a, t, fault, size, True, result, 16)
    return NEXT


@kernel
def exchange(m: Record, a: Arena, t: Tags, r: int) -> int:
    """XCHG, XADD and CMPXCHG."""
    packed = a[r + o.ROW_MEM]
    size = max((packed >> o.MEM_SIZE) & 15, 1)
    r1 = a[r + o.ROW_R1]
    r2 = a[r + o.ROW_R2]
    kind = a[r + o.ROW_EXTRA]
    if kind == o.X_COMPARE:
        return compare_exchange(m, a, t, r, size)
    mine = get_register(m, r1, size)
    if packed & o.MEM_REGISTER:
        theirs = get_register(m, r2, size)
        if kind == o.X_ADD:
            set_register(m, r1, size, theirs)
            set_register(m, r2, size, arithmetic_result(m, theirs, mine, o.K_ADD, size))
        else:
            set_register(m, r2, size, mine)
            set_register(m, r1, size, theirs)
        return NEXT
    theirs = load_for_update(m, a, t, r, size)
    if m[s.FAULT_KIND]:
        return refuse(m, a, t, m[s.FAULT_KIND], size, False, 0, 16)
    flags = m[s.RFLAGS]
    value = arithmetic_result(m, theirs, mine, o.K_ADD, size) if kind == o.X_ADD else mine
    fault = store_operand(m, a, t, r, size, value)
    if fault:
        m[s.RFLAGS] = flags
        return refuse(m, a, t, fault, size, True, value, 16)
    set_register(m, r1, size, theirs)
    return NEXT


@kernel
def compare_exchange(m: Record, a: Arena, t: Tags, r: int, size: int) -> int:
    """CMPXCHG: the destination is written in either case, with R1 or with what it was; flags are those of a comparison.

    SDM: "CMPXCHG—Compare and Exchange".
    """
    packed = a[r + o.ROW_MEM]
    r2 = a[r + o.ROW_R2]
    in_register = packed & o.MEM_REGISTER != 0
    theirs = get_register(m, r2, size) if in_register else load_for_update(m, a, t, r, size)
    if not in_register and m[s.FAULT_KIND]:
        return refuse(m, a, t, m[s.FAULT_KIND], size, False, 0, 16)
    flags = m[s.RFLAGS]
    equal = arithmetic_result(m, get_register(m, s.RAX, size), theirs, o.K_CMP, size) == 0
    value = get_register(m, a[r + o.ROW_R1], size) if equal else theirs
    if in_register:
        set_register(m, r2, size, value)
    else:
        fault = store_operand(m, a, t, r, size, value)
        if fault:
            m[s.RFLAGS] = flags
            return refuse(m, a, t, fault, size, True, value, 16)
    if not equal:
        set_register(m, s.RAX, size, theirs)
    return NEXT


@kernel
def divide(m: Record, a: Arena, t: Tags, r: int) -> int:
    """DIV: #DE for a zero divisor or a quotient that does not fit."""
    packed = a[r + o.ROW_MEM]
    size = (packed >> o.MEM_SIZE) & 15
    divisor = get_register(m, a[r + o.ROW_R2], size) if packed & o.MEM_REGISTER else load_operand(m, a, t, r, size)
    if packed & o.MEM_REGISTER == 0 and m[s.FAULT_KIND]:
        return refuse(m, a, t, m[s.FAULT_KIND], size, False, 0, 16)
    if divisor == 0:
        return raise_exception(m, DE, 0, 0)
    low = get_register(m, s.RAX, size)
    high = get_register(m, s.RDX, size)
    if size == 1:
        low = get_register(m, s.RAX, 2)
        if low // divisor > 0xFF:
            return raise_exception(m, DE, 0, 0)
        set_register(m, s.RAX, 2, (low // divisor) | (low % divisor) << 8)
        return NEXT
    if size == 8:
        if not below(high, divisor):
            return raise_exception(m, DE, 0, 0)
        quotient = 0
        for n in range(63, -1, -1):  # long division: the remainder stays below the divisor
            carry = high < 0
            high = high << 1 | (low >> n) & 1
            quotient <<= 1
            if carry or not below(high, divisor):
                high -= divisor
                quotient |= 1
        m[s.GPR + s.RAX] = quotient
        m[s.GPR + s.RDX] = high
        return NEXT
    low |= high << (8 * size)
    if high >= divisor:
        return raise_exception(m, DE, 0, 0)
    set_register(m, s.RAX, size, low // divisor)
    set_register(m, s.RDX, size, low % divisor)
    return NEXT


@kernel
def move_string(m: Record, a: Arena, t: Tags, r: int) -> int:
    """MOVS: one element; repeated where a prefix says so."""
    packed = a[r + o.ROW_MEM]
    size = (packed >> o.MEM_SIZE) & 15
    mask = address_mask(packed)
    rep = packed & (o.MEM_REP | o.MEM_REPNE)
    if rep and m[s.GPR + s.RCX] & mask == 0:
        return NEXT
    value = load_segment(m, a, t, segment_of(packed), m[s.GPR + s.RSI] & mask, size)
    if m[s.FAULT_KIND]:
        return refuse(m, a, t, m[s.FAULT_KIND], size, False, 0, 16)
    fault = store_segment(m, a, t, modes.ES, m[s.GPR + s.RDI] & mask, size, value)
    if fault:
        return refuse(m, a, t, fault, size, True, value, 16)
    advance(m, s.RSI, size, mask)
    advance(m, s.RDI, size, mask)
    if rep:
        advance(m, s.RCX, 0, mask)
        if m[s.GPR + s.RCX] & mask:
            between_iterations(m)
            return AGAIN
    return NEXT


@kernel
def advance(m: Record, register: int, size: int, mask: int) -> None:
    """Move a string pointer by an element in the direction of RFLAGS.DF, or (size 0) count down."""
    by = -1
    if size:
        by = -size if m[s.RFLAGS] & (1 << 10) else size
    value = m[s.GPR + register]
    if mask == 0xFFFF:
        m[s.GPR + register] = (value & ~mask) | ((value + by) & mask)
    else:
        m[s.GPR + register] = (value + by) & mask
