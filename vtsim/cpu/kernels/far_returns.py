"""Far returns, and what they have in common with returns from interrupts.

SDM: "RET—Return From Procedure"; "IRET/IRETD/IRETQ—Interrupt Return".
"""

from __future__ import annotations

from vtsim.base.jit import Arena, Record, Tags, kernel
from vtsim.cpu import slots as s
from vtsim.cpu.codes import GP, JUMPED, NP, SS
from vtsim.cpu.kernels import modes
from vtsim.cpu.kernels.cursor import set_limit, set_privilege
from vtsim.cpu.kernels.exceptions import raise_exception, raise_fault
from vtsim.cpu.kernels.modes import LOW32, RIGHTS, SELECTORS_AT, UNUSABLE, canonical, cpl, set_mode
from vtsim.cpu.kernels.operands import load_segment, moved_stack, set_stack
from vtsim.cpu.kernels.segments import fetch_descriptor, limit_of, load_cached, load_real, refuse_code, rights_of

# fmt: off
V86_FLAGS: int = 0x3F7FD7               # what IRET loads from an image with VM set
# fmt: on


@kernel
def returned_to(m: Record, a: Arena, t: Tags, cs: int) -> tuple[int, int]:
    """The code segment that a return names: 0 or how it ended, and its descriptor."""
    if cs & 0xFFFC == 0:
        return raise_exception(m, GP, 1, 0), 0
    descriptor = fetch_descriptor(m, a, t, cs)
    error = cs & 0xFFFC
    if m[s.FAULT_KIND]:
        return refuse_code(m, a, t, error), 0
    rights = rights_of(descriptor)
    to = cs & 3
    dpl = (rights >> 5) & 3
    if rights & 0x18 != 0x18 or to < cpl(m) or (dpl > to if rights & 4 else dpl != to):
        return raise_exception(m, GP, 1, error), 0
    if rights & modes.AR_P == 0:
        return raise_exception(m, NP, 1, error), 0
    return 0, descriptor


@kernel
def returned_stack(m: Record, a: Arena, t: Tags, ss: int, to: int, code: int) -> tuple[int, int]:
    """The stack segment that a return to ring `to` and code of some rights names: 0 or how it ended, its descriptor.

    In 64-bit mode below ring 3 there may be none.
    """
    if ss & 0xFFFC == 0:
        if code & modes.AR_L == 0 or m[s.EFER] & modes.LMA == 0 or to == 3:
            return raise_exception(m, GP, 1, 0), 0
        return 0, 0
    descriptor = fetch_descriptor(m, a, t, ss)
    if m[s.FAULT_KIND]:
        return refuse_code(m, a, t, ss & 0xFFFC), 0
    rights = rights_of(descriptor)
    if ss & 3 != to or (rights >> 5) & 3 != to or rights & 0x1A != 0x12:
        return raise_exception(m, GP, 1, ss & 0xFFFC), 0
    if rights & modes.AR_P == 0:
        return raise_exception(m, SS, 1, ss & 0xFFFC), 0
    return 0, descriptor


@kernel
def load_returned_stack(m: Record, ss: int, descriptor: int) -> None:
    """Load SS as a return does, with a null selector where that is legal."""
    if ss & 0xFFFC:
        load_cached(m, modes.SS, ss, descriptor)
    else:
        m[s.SS_SELECTOR] = ss
        m[RIGHTS + modes.SS] = UNUSABLE


@kernel
def outside_code(m: Record, descriptor: int, rip: int) -> bool:
    """Is an address not canonical in 64-bit code, or beyond the limit of other code?"""
    if m[s.EFER] & modes.LMA and rights_of(descriptor) & modes.AR_L:
        return not canonical(m, rip)
    return rip & LOW32 > limit_of(descriptor)


@kernel
def leave_segments(m: Record, to: int) -> None:
    """A return to an outer ring: data segments that it may not use become null."""
    for segment in range(modes.LDTR):
        data = m[RIGHTS + segment] & 0x18 == 0x10 or m[RIGHTS + segment] & 0x1C == 0x18
        if segment != modes.CS and segment != modes.SS and data and (m[RIGHTS + segment] >> 5) & 3 < to:
            m[SELECTORS_AT + segment] = 0
            m[RIGHTS + segment] = UNUSABLE


@kernel
def far_return(m: Record, a: Arena, t: Tags, size: int, released: int) -> int:
    """RET to another code segment, with `released` bytes of parameters: how it ended.

    SDM: "RET—Return From Procedure".
    """
    rip = load_segment(m, a, t, modes.SS, moved_stack(m, 0), size)
    cs = 0
    if m[s.FAULT_KIND] == 0:
        cs = load_segment(m, a, t, modes.SS, moved_stack(m, size), size) & 0xFFFF
    if m[s.FAULT_KIND]:
        return raise_fault(m, a, t, m[s.FAULT_KIND])
    if m[s.MODE] & (modes.REAL | modes.V86):
        if rip > 0xFFFF:
            return raise_exception(m, GP, 1, 0)
        set_stack(m, moved_stack(m, 2 * size + released))
        load_real(m, modes.CS, cs)
        m[s.RIP] = rip
        set_mode(m)
        return JUMPED
    ended, descriptor = returned_to(m, a, t, cs)
    if ended:
        return ended
    ring = cpl(m)
    to = cs & 3
    if to == ring:
        if outside_code(m, descriptor, rip):
            return raise_exception(m, GP, 1, 0)
        set_stack(m, moved_stack(m, 2 * size + released))
    else:
        stack = load_segment(m, a, t, modes.SS, moved_stack(m, 2 * size + released), size)
        ss = 0
        if m[s.FAULT_KIND] == 0:
            ss = load_segment(m, a, t, modes.SS, moved_stack(m, 3 * size + released), size) & 0xFFFF
        if m[s.FAULT_KIND]:
            return raise_fault(m, a, t, m[s.FAULT_KIND])
        ended, ss_descriptor = returned_stack(m, a, t, ss, to, rights_of(descriptor))
        if ended:
            return ended
        if outside_code(m, descriptor, rip):
            return raise_exception(m, GP, 1, 0)
        load_returned_stack(m, ss, ss_descriptor)
        m[s.GPR + s.RSP] = stack
        set_stack(m, moved_stack(m, released))
        leave_segments(m, to)
    load_cached(m, modes.CS, cs, descriptor)
    m[s.RIP] = rip
    set_privilege(m, a, to)
    set_mode(m)
    set_limit(m, a)
    return JUMPED


@kernel
def return_to_v86(m: Record, a: Arena, t: Tags, rip: int, cs: int, flags: int) -> int:
    """IRET of ring 0 to virtual-8086 mode: ESP, SS, ES, DS, FS and GS are popped, too. 0, or how it ended.

    SDM: "IRET/IRETD/IRETQ—Interrupt Return"; "Entering Virtual-8086 Mode".
    """
    for n in range(3, 9):  # what faults changes nothing
        load_segment(m, a, t, modes.SS, moved_stack(m, 4 * n), 4)
        if m[s.FAULT_KIND]:
            return raise_fault(m, a, t, m[s.FAULT_KIND])
    if rip > 0xFFFF:
        return raise_exception(m, GP, 1, 0)
    esp = load_segment(m, a, t, modes.SS, moved_stack(m, 12), 4)
    ss = load_segment(m, a, t, modes.SS, moved_stack(m, 16), 4)
    es = load_segment(m, a, t, modes.SS, moved_stack(m, 20), 4)
    ds = load_segment(m, a, t, modes.SS, moved_stack(m, 24), 4)
    fs = load_segment(m, a, t, modes.SS, moved_stack(m, 28), 4)
    gs = load_segment(m, a, t, modes.SS, moved_stack(m, 32), 4)
    m[s.RFLAGS] = (flags & V86_FLAGS) | 2
    set_mode(m)
    load_real(m, modes.CS, cs)
    load_real(m, modes.SS, ss & 0xFFFF)
    load_real(m, modes.ES, es & 0xFFFF)
    load_real(m, modes.DS, ds & 0xFFFF)
    load_real(m, modes.FS, fs & 0xFFFF)
    load_real(m, modes.GS, gs & 0xFFFF)
    m[s.GPR + s.RSP] = esp
    m[s.RIP] = rip
    set_privilege(m, a, 3)
    return 0
