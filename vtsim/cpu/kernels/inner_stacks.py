"""The stacks that the TSS of protected mode has for inner rings.

SDM: "Stack Switching".
"""

from __future__ import annotations

from vtsim.base.jit import Arena, Record, Tags, kernel
from vtsim.cpu import slots as s
from vtsim.cpu.codes import SS, TS
from vtsim.cpu.kernels import modes
from vtsim.cpu.kernels.exceptions import raise_exception, raise_fault
from vtsim.cpu.kernels.modes import LIMITS_AT, LOW32, RIGHTS
from vtsim.cpu.kernels.operands import SEGMENT_REFUSED, load_linear
from vtsim.cpu.kernels.segments import fetch_descriptor, rights_of


@kernel
def inner_stack(m: Record, a: Arena, t: Tags, ring: int, ext: int) -> tuple[int, int, int, int]:
    """The stack that the TSS of protected mode has for an inner ring: 0 or how it ended, SS, ESP, the descriptor of SS.

    SDM: "Stack Switching".
    """
    tss32 = m[RIGHTS + modes.TR] & 8 != 0
    offset = 4 + 8 * ring if tss32 else 2 + 4 * ring
    width = 4 if tss32 else 2
    if offset + width + 1 > m[LIMITS_AT + modes.TR]:
        return raise_exception(m, TS, 1, (m[s.TR_SELECTOR] & 0xFFFC) | ext), 0, 0, 0
    rsp = load_linear(m, a, t, (m[s.TR_BASE] + offset) & LOW32, width, 0)
    if m[s.FAULT_KIND]:
        return raise_fault(m, a, t, m[s.FAULT_KIND]), 0, 0, 0
    ss = load_linear(m, a, t, (m[s.TR_BASE] + offset + width) & LOW32, 2, 0)
    if m[s.FAULT_KIND]:
        return raise_fault(m, a, t, m[s.FAULT_KIND]), 0, 0, 0
    if ss & 0xFFFC == 0:
        return raise_exception(m, TS, 1, ext), 0, 0, 0
    stack = fetch_descriptor(m, a, t, ss)
    if m[s.FAULT_KIND] == SEGMENT_REFUSED:
        return raise_exception(m, TS, 1, (ss & 0xFFFC) | ext), 0, 0, 0
    if m[s.FAULT_KIND]:
        return raise_fault(m, a, t, m[s.FAULT_KIND]), 0, 0, 0
    rights = rights_of(stack)
    if ss & 3 != ring or (rights >> 5) & 3 != ring or rights & 0x1A != 0x12:
        return raise_exception(m, TS, 1, (ss & 0xFFFC) | ext), 0, 0, 0
    if rights & modes.AR_P == 0:
        return raise_exception(m, SS, 1, (ss & 0xFFFC) | ext), 0, 0, 0
    return 0, ss, rsp, stack
