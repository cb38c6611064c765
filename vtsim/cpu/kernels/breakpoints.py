"""Breakpoints of the debug registers, on instructions and on data.

SDM: "Debug Registers"; "Instruction-Breakpoint Exception Condition".
Not modelled: I/O breakpoints.
"""

from __future__ import annotations

from vtsim.base.jit import Record, kernel
from vtsim.cpu import slots as s
from vtsim.cpu.codes import RF_RF
from vtsim.cpu.kernels import modes

# fmt: off
BREAKPOINTS: int = 0xFF                 # the enable bits of DR7
PENDING_HIT: int = 1 << 12
# fmt: on


@kernel
def instruction_breakpoint(m: Record) -> int:
    """Is there an enabled breakpoint on the next instruction? The bits of DR6, or 0.

    SDM: "Instruction-Breakpoint Exception Condition".
    """
    if m[s.DR7] & BREAKPOINTS == 0 or m[s.RFLAGS] & RF_RF:
        return 0
    at = modes.code_address(m) if m[s.MODE] else m[s.RIP]
    hit = 0
    for n in range(4):
        if (m[s.DR7] >> (2 * n)) & 3 and (m[s.DR7] >> (16 + 4 * n)) & 3 == 0 and m[s.DR0 + n] == at:
            hit |= 1 << n
    return hit


@kernel
def data_breakpoint(m: Record, gva: int, size: int, write: bool) -> None:
    """Note in PENDING_DEBUG that an access hit an enabled data breakpoint.

    SDM: "Data Memory and I/O Breakpoint Exception Conditions".
    """
    for n in range(4):
        kind = (m[s.DR7] >> (16 + 4 * n)) & 3
        if (m[s.DR7] >> (2 * n)) & 3 and (kind == 3 or (kind == 1 and write)):
            code = (m[s.DR7] >> (18 + 4 * n)) & 3
            width = 1 if code == 0 else (2 if code == 1 else (4 if code == 3 else 8))
            first = m[s.DR0 + n] & ~(width - 1)
            if gva < first + width and gva + size > first:
                m[s.PENDING_DEBUG] |= 1 << n | PENDING_HIT
