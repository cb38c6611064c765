"""XSAVES and XRSTORS of decoded code.

SDM: "XSAVES—Save Processor Extended States Supervisor"; "XRSTORS—Restore Processor Extended States Supervisor".
Not modelled: contents of state components, which are all in their initial configuration.
"""

from __future__ import annotations

from vtsim.base.jit import Arena, Record, Tags, kernel
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.codes import GP, NEXT, NM
from vtsim.cpu.kernels.exceptions import raise_exception, raise_fault
from vtsim.cpu.kernels.operands import linear, load_segment, offset_of, segment_of, store_segment

CR0_TS = 1 << 3
ALIGNMENT: int = 64
HEADER, HEADER_WORDS = 512, 8  # where the header of an XSAVE area is, and its 64-bit words
COMPACTED = -(1 << 63)  # bit 63 of XCOMP_BV


@kernel
def extended_state(m: Record, a: Arena, t: Tags, r: int, op: int) -> int:
    """Write the header of the area, or read and check it."""
    if m[s.CR0] & CR0_TS:
        return raise_exception(m, NM, 0, 0)
    segment = segment_of(a[r + o.ROW_MEM])
    offset = offset_of(m, a, r)
    if linear(m, segment, offset) & (ALIGNMENT - 1):
        return raise_exception(m, GP, 1, 0)
    enabled = m[s.XCR0] | m[s.MSR_XSS]
    header = offset + HEADER
    if op == o.XSAVES:
        wanted = enabled & (m[s.GPR + s.RAX] & 0xFFFFFFFF | m[s.GPR + s.RDX] << 32)
        fault = store_segment(m, a, t, segment, header, 8, 0)
        if fault == 0:
            fault = store_segment(m, a, t, segment, header + 8, 8, wanted | COMPACTED)
        return NEXT if fault == 0 else raise_fault(m, a, t, fault)
    present = 0
    for n in range(HEADER_WORDS):
        word = load_segment(m, a, t, segment, header + 8 * n, 8)
        if m[s.FAULT_KIND]:
            return raise_fault(m, a, t, m[s.FAULT_KIND])
        if n == 0:
            present = word
        elif n == 1:
            components = word & ~COMPACTED
            if word >= 0 or components & ~enabled or present & ~components:
                return raise_exception(m, GP, 1, 0)
        elif word:
            return raise_exception(m, GP, 1, 0)
    return NEXT
