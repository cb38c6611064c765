"""What programs ask of descriptors and segment registers: LAR, LSL, VERR, VERW, moves, pushes, bases, far transfers.

A descriptor is read from the table in memory, at the price of the access, whoever asks. Decoded rows bring operands of
any size; assembled rows run in 64-bit mode and name general registers.

SDM: "LAR—Load Access Rights Byte"; "LSL—Load Segment Limit"; "VERR/VERW—Verify a Segment for Reading or Writing";
"MOV—Move"; "PUSH—Push Word, Doubleword, or Quadword Onto the Stack"; "POP—Pop a Value From the Stack".
"""

from __future__ import annotations

from typing import Final

from vtsim.base.jit import Arena, Record, Tags, kernel
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.codes import GP, JUMPED, NEXT, RF_ZF, UD
from vtsim.cpu.kernels import modes
from vtsim.cpu.kernels.access import effective, read_as
from vtsim.cpu.kernels.digest import saw
from vtsim.cpu.kernels.exceptions import raise_exception, raise_fault
from vtsim.cpu.kernels.far import far_transfer
from vtsim.cpu.kernels.far_returns import far_return
from vtsim.cpu.kernels.modes import cpl
from vtsim.cpu.kernels.operands import (
    SEGMENT_REFUSED,
    get_register,
    load_segment,
    moved_stack,
    set_register,
    set_stack,
    store_segment,
)
from vtsim.cpu.kernels.segments import fetch_descriptor, limit_of, load_data_segment, rights_of

# fmt: off
# types of system descriptors that LAR and LSL know, as bits: in IA-32e mode, and else
LAR_TYPES: Final = 1 << 2 | 1 << 9 | 1 << 11 | 1 << 12
LSL_TYPES: Final = 1 << 2 | 1 << 9 | 1 << 11
LEGACY_LAR_TYPES: Final = LAR_TYPES | 1 << 1 | 1 << 3 | 1 << 4 | 1 << 5
LEGACY_LSL_TYPES: Final = LSL_TYPES | 1 << 1 | 1 << 3
ACCESS_RIGHTS: Final = 0xF0FF00         # of a descriptor's second doubleword: without its limit and base
BY_MOV_SS: Final = 2
# fmt: on


@kernel
def known_type(m: Record, op: int, kind: int) -> bool:
    """Is a system descriptor of this type one that LAR or LSL shows?"""
    known = LAR_TYPES if op == o.LAR else LSL_TYPES
    if m[s.EFER] & modes.LMA == 0:
        known = LEGACY_LAR_TYPES if op == o.LAR else LEGACY_LSL_TYPES
    return (known >> kind) & 1 != 0


@kernel
def shown_descriptor(m: Record, a: Arena, t: Tags, op: int, selector: int) -> tuple[int, int]:
    """1 and the descriptor, if `op` may have it; 0 if not; -1 where reading it faulted, which FAULT_KIND says."""
    if selector & 0xFFFC == 0:
        return 0, 0
    descriptor = fetch_descriptor(m, a, t, selector)
    if m[s.FAULT_KIND] == SEGMENT_REFUSED:
        m[s.FAULT_KIND] = 0
        return 0, 0
    if m[s.FAULT_KIND]:
        return -1, 0
    rights = rights_of(descriptor)
    verifies = op == o.VERR or op == o.VERW
    if rights & modes.AR_S == 0:
        if verifies or not known_type(m, op, rights & 15):
            return 0, 0
    elif op == o.VERR:
        if rights & 10 == 8:  # execute-only code
            return 0, 0
    elif op == o.VERW and rights & 10 != 2:  # code, or data that is read-only
        return 0, 0
    dpl = (rights >> 5) & 3
    conforming = rights & 0x1C == 0x1C
    if not conforming and (cpl(m) > dpl or selector & 3 > dpl):
        return 0, 0
    return 1, descriptor


@kernel
def look_at_segment(m: Record, a: Arena, t: Tags, op: int, selector: int, register: int, size: int) -> int:
    """LAR, LSL, VERR, VERW: NEXT, or how it ended. Only ZF changes where the program may not see the segment."""
    found, descriptor = shown_descriptor(m, a, t, op, selector)
    if found < 0:
        return raise_fault(m, a, t, m[s.FAULT_KIND])
    m[s.RFLAGS] = (m[s.RFLAGS] & ~RF_ZF) | (RF_ZF if found else 0)
    value = 0
    if found and (op == o.LAR or op == o.LSL):
        value = (descriptor >> 32) & ACCESS_RIGHTS if op == o.LAR else limit_of(descriptor)
        if size == 2:
            value &= 0xFFFF
        set_register(m, register, size, value)
    saw(m, a, op, selector, 0, value << 1 | found)
    return NEXT


@kernel
def move_to_segment(m: Record, a: Arena, t: Tags, segment: int, selector: int) -> int:
    """MOV to ES, SS, DS, FS or GS, which inhibits events behind SS: NEXT, or how it ended."""
    if segment == modes.CS or segment > modes.GS:
        return raise_exception(m, UD, 0, 0)
    ended = load_data_segment(m, a, t, segment, selector)
    again = m[s.INTERRUPT_SHADOW] and m[s.SHADOW_KIND] == BY_MOV_SS  # only the first of several inhibits
    if ended == NEXT and segment == modes.SS and not again:
        m[s.INTERRUPT_SHADOW] = 2
        m[s.SHADOW_KIND] = BY_MOV_SS
        m[s.LIMIT] = 0
    return ended


@kernel
def push_segment(m: Record, a: Arena, t: Tags, segment: int, size: int) -> int:
    """PUSH of a segment register, of which 64-bit mode has FS and GS only: NEXT, or how it ended."""
    if m[s.MODE] == 0 and segment < modes.FS:
        return raise_exception(m, UD, 0, 0)
    at = moved_stack(m, -size)
    selector = m[modes.SELECTORS_AT + segment]
    fault = store_segment(m, a, t, modes.SS, at, size, selector)
    if fault:
        return raise_fault(m, a, t, fault)
    set_stack(m, at)
    saw(m, a, o.PUSH_SEGMENT, segment, 0, selector)
    return NEXT


@kernel
def pop_segment(m: Record, a: Arena, t: Tags, segment: int, size: int) -> int:
    """POP of a segment register: NEXT, or how it ended."""
    if m[s.MODE] == 0 and segment < modes.FS:
        return raise_exception(m, UD, 0, 0)
    selector = load_segment(m, a, t, modes.SS, moved_stack(m, 0), size) & 0xFFFF
    if m[s.FAULT_KIND]:
        return raise_fault(m, a, t, m[s.FAULT_KIND])
    ended = move_to_segment(m, a, t, segment, selector)
    if ended == NEXT:
        set_stack(m, moved_stack(m, size))
    return ended


@kernel
def segment_base(m: Record, op: int, register: int, size: int) -> int:
    """RDFSBASE, RDGSBASE, WRFSBASE, WRGSBASE: NEXT, or how it ended.

    SDM: "RDFSBASE/RDGSBASE—Read FS/GS Segment Base"; "WRFSBASE/WRGSBASE—Write FS/GS Segment Base".
    """
    slot = s.FS_BASE if op == o.RDFSBASE or op == o.WRFSBASE else s.GS_BASE
    if op == o.RDFSBASE or op == o.RDGSBASE:
        set_register(m, register, size, m[slot])
        return NEXT
    base = get_register(m, register, size)
    if not modes.canonical(m, base):
        return raise_exception(m, GP, 1, 0)
    m[slot] = base
    return NEXT


@kernel
def segment_op(m: Record, a: Arena, t: Tags, r: int, op: int) -> int:
    """An assembled row that names a segment: how it ended."""
    register = a[r + o.ROW_R1]
    value = m[s.GPR + (register & 15)]
    segment = a[r + o.ROW_IMM]
    if op == o.LAR or op == o.LSL:
        return look_at_segment(m, a, t, op, m[s.GPR + (a[r + o.ROW_R2] & 15)] & 0xFFFF, register, 8)
    if op == o.VERW and register == s.NO_REGISTER:  # of a selector in memory
        m[s.CYCLE] += m[s.P_VERW] - m[s.PRICE + o.VERW]
        value = read_as(m, a, t, effective(m, a, r), m[s.PRIVILEGE] & 1)
        if m[s.FAULT_KIND]:
            return raise_fault(m, a, t, m[s.FAULT_KIND])
    if op == o.VERR or op == o.VERW:
        return look_at_segment(m, a, t, op, value & 0xFFFF, register, 8)
    if op == o.MOV_FROM_SEGMENT:
        m[s.GPR + (register & 15)] = m[modes.SELECTORS_AT + segment]
        saw(m, a, op, segment, 0, m[modes.SELECTORS_AT + segment])
        return NEXT
    if op == o.MOV_TO_SEGMENT:
        return move_to_segment(m, a, t, segment, value & 0xFFFF)
    if op == o.PUSH_SEGMENT:
        return push_segment(m, a, t, segment, 8)
    if op == o.POP_SEGMENT:
        return pop_segment(m, a, t, segment, 8)
    if op == o.RDFSBASE or op == o.RDGSBASE or op == o.WRFSBASE or op == o.WRGSBASE:
        return segment_base(m, op, register, 8)
    if op == o.RET_FAR:
        return far_return(m, a, t, 8, a[r + o.ROW_IMM])
    if op != o.JMP_FAR and op != o.CALL_FAR:
        return raise_exception(m, UD, 0, 0)
    gva = effective(m, a, r)
    user = m[s.PRIVILEGE] & 1
    offset = read_as(m, a, t, gva, user)
    selector = read_as(m, a, t, gva + 8, user) & 0xFFFF if m[s.FAULT_KIND] == 0 else 0
    if m[s.FAULT_KIND]:
        return raise_fault(m, a, t, m[s.FAULT_KIND])
    before = m[s.CS_SELECTOR]
    rip = m[s.RIP]
    ended = far_transfer(m, a, t, selector, offset, op == o.CALL_FAR, 8)
    if ended == JUMPED and op == o.CALL_FAR:
        there = m[s.RIP]
        m[s.RIP] = rip  # where the program was when it pushed CS
        saw(m, a, op, selector, 0, before)
        m[s.RIP] = there
    return ended
