"""Far calls and jumps through call gates.

SDM: "Call Gates"; "Accessing a Code Segment Through a Call Gate"; "Stack Switching".
"""

from __future__ import annotations

from vtsim.base.jit import Arena, Record, Tags, kernel
from vtsim.cpu import slots as s
from vtsim.cpu.codes import GP, JUMPED, NP, SS, TS
from vtsim.cpu.kernels import modes
from vtsim.cpu.kernels.cursor import set_limit, set_privilege
from vtsim.cpu.kernels.exceptions import raise_exception, raise_fault
from vtsim.cpu.kernels.gates import inner_stack
from vtsim.cpu.kernels.modes import BASES, LIMITS_AT, LOW32, RIGHTS, UNUSABLE, canonical, cpl, set_mode
from vtsim.cpu.kernels.operands import load_linear, load_segment, moved_stack, set_stack, store_linear, store_segment
from vtsim.cpu.kernels.segments import base_of, fetch_descriptor, limit_of, load_cached, refuse_code, rights_of

# fmt: off
CALL_GATE_16, CALL_GATE_32 = 4, 12         # types of descriptors; the latter has 64 bits in IA-32e mode
# fmt: on


@kernel
def push_far(m: Record, a: Arena, t: Tags, size: int) -> int:
    """Push CS and the next RIP: 0, or a fault."""
    fault = store_segment(m, a, t, modes.SS, moved_stack(m, -size), size, m[s.CS_SELECTOR])
    if fault == 0:
        fault = store_segment(m, a, t, modes.SS, moved_stack(m, -2 * size), size, m[s.RIP] + m[s.OP_LENGTH])
    if fault == 0:
        set_stack(m, moved_stack(m, -2 * size))
    return fault


@kernel
def through_call_gate(m: Record, a: Arena, t: Tags, selector: int, gate: int, call: bool) -> int:
    """CALL or JMP to a selector whose descriptor is the call gate `gate`; how it ended.

    SDM: "Accessing a Code Segment Through a Call Gate".
    """
    error = selector & 0xFFFC
    ring = cpl(m)
    long = m[s.EFER] & modes.LMA != 0
    rights = rights_of(gate)
    dpl = (rights >> 5) & 3
    if dpl < ring or dpl < selector & 3:
        return raise_exception(m, GP, 1, error)
    if rights & modes.AR_P == 0:
        return raise_exception(m, NP, 1, error)
    high = 0
    if long:
        high = fetch_descriptor(m, a, t, selector + 8)
        if m[s.FAULT_KIND]:
            return refuse_code(m, a, t, error)
        if (high >> 40) & 0x1F:
            return raise_exception(m, GP, 1, error)
    target = (gate >> 16) & 0xFFFF
    if target & 0xFFFC == 0:
        return raise_exception(m, GP, 1, 0)
    descriptor = fetch_descriptor(m, a, t, target)
    if m[s.FAULT_KIND]:
        return refuse_code(m, a, t, target & 0xFFFC)
    code = rights_of(descriptor)
    inwards = (code >> 5) & 3 if code & 4 == 0 else ring
    refused = code & 0x18 != 0x18 or (code >> 5) & 3 > ring or (not call and inwards != ring)
    if long and code & (modes.AR_L | modes.AR_D) != modes.AR_L:
        refused = True
    if refused:
        return raise_exception(m, GP, 1, target & 0xFFFC)
    if code & modes.AR_P == 0:
        return raise_exception(m, NP, 1, target & 0xFFFC)
    size = 2 if rights & 8 == 0 else (8 if long else 4)
    offset = gate & 0xFFFF
    if size > 2:
        offset |= ((gate >> 48) & 0xFFFF) << 16
    if long:
        offset |= (high & LOW32) << 32
        if not canonical(m, offset):
            return raise_exception(m, GP, 1, 0)
    elif offset > limit_of(descriptor):
        return raise_exception(m, GP, 1, 0)
    if call and inwards == ring:
        fault = push_far(m, a, t, size)
        if fault:
            return raise_fault(m, a, t, fault)
    elif call:
        ended = long_call_frame(m, a, t, inwards) if long else legacy_call_frame(m, a, t, gate, inwards, size)
        if ended:
            return ended
    load_cached(m, modes.CS, (target & 0xFFFC) | inwards, descriptor)
    m[s.RIP] = offset
    set_privilege(m, a, inwards)
    set_mode(m)
    set_limit(m, a)
    return JUMPED


@kernel
def long_call_frame(m: Record, a: Arena, t: Tags, ring: int) -> int:
    """Switch to the stack of an inner ring in IA-32e mode and push SS, RSP, CS and RIP: 0, or how it ended.

    SDM: "Stack Switching in IA-32e Mode".
    """
    offset = 4 + 8 * ring
    if offset + 7 > m[LIMITS_AT + modes.TR]:
        return raise_exception(m, TS, 1, m[s.TR_SELECTOR] & 0xFFFC)
    rsp = load_linear(m, a, t, m[s.TR_BASE] + offset, 8, 0)
    if m[s.FAULT_KIND]:
        return raise_fault(m, a, t, m[s.FAULT_KIND])
    if not canonical(m, rsp):
        return raise_exception(m, SS, 1, 0)
    for n in range(4):
        value = m[s.SS_SELECTOR]
        if n == 1:
            value = m[s.GPR + s.RSP]
        elif n == 2:
            value = m[s.CS_SELECTOR]
        elif n == 3:
            value = m[s.RIP] + m[s.OP_LENGTH]
        fault = store_linear(m, a, t, rsp - 8 * (n + 1), 8, value, 0)
        if fault:
            return raise_fault(m, a, t, fault)
    m[s.SS_SELECTOR] = ring
    m[RIGHTS + modes.SS] = UNUSABLE | ring << 5
    m[s.GPR + s.RSP] = rsp - 32
    return 0


@kernel
def legacy_call_frame(m: Record, a: Arena, t: Tags, gate: int, ring: int, size: int) -> int:
    """Switch to the stack of an inner ring, with the parameters that the gate counts: 0, or how it ended.

    SDM: "Stack Switching".
    """
    ended, ss, rsp, stack = inner_stack(m, a, t, ring, 0)
    if ended:
        return ended
    count = (gate >> 32) & 0x1F
    mask = LOW32 if rights_of(stack) & modes.AR_D else 0xFFFF
    low = (rsp - size * (4 + count)) & mask
    expand = rights_of(stack) & 4 != 0
    if (not expand and low + size * (4 + count) - 1 > limit_of(stack)) or (expand and low <= limit_of(stack)):
        return raise_exception(m, SS, 1, ss & 0xFFFC)
    for n in range(4 + count):
        value = m[s.SS_SELECTOR]
        if n == 1:
            value = m[s.GPR + s.RSP]
        elif n == 2 + count:
            value = m[s.CS_SELECTOR]
        elif n == 3 + count:
            value = m[s.RIP] + m[s.OP_LENGTH]
        elif n >= 2:
            value = load_segment(m, a, t, modes.SS, moved_stack(m, size * (count + 1 - n)), size)
            if m[s.FAULT_KIND]:
                return raise_fault(m, a, t, m[s.FAULT_KIND])
        fault = store_linear(m, a, t, (base_of(stack) + ((rsp - size * (n + 1)) & mask)) & LOW32, size, value, 0)
        if fault:
            return raise_fault(m, a, t, fault)
    load_cached(m, modes.SS, (ss & 0xFFFC) | ring, stack)
    m[s.GPR + s.RSP] = (rsp & ~mask & LOW32) | low
    m[BASES + modes.SS] = base_of(stack)
    return 0
