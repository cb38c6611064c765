"""Software interrupts of virtual-8086 mode that its extensions send to the 8086 program's own handler.

SDM: "Software Interrupt Handling Methods While Operating in Virtual-8086 Mode".
Not modelled: the virtual interrupt flag of CLI, STI, PUSHF, POPF and IRET, also in protected mode.
"""

from __future__ import annotations

from vtsim.base.jit import Arena, Record, Tags, kernel
from vtsim.cpu import slots as s
from vtsim.cpu.codes import JUMPED, RF_IF, RF_TF
from vtsim.cpu.kernels import modes
from vtsim.cpu.kernels.exceptions import raise_fault
from vtsim.cpu.kernels.modes import LIMITS_AT
from vtsim.cpu.kernels.operands import load_linear, moved_stack, set_stack, store_segment
from vtsim.cpu.kernels.segments import load_real

# fmt: off
CR4_VME: int = 1 << 0
RF_VIF, IOPL_3 = 1 << 19, 3 << 12
IO_MAP_BASE, REDIRECTION_BYTES = 102, 32   # in the TSS: where it is said, and what stands below it
# fmt: on


@kernel
def redirects(m: Record, a: Arena, t: Tags, vector: int) -> bool:
    """Does INT of this vector go to the 8086 program's handler? FAULT_KIND is not 0 where the TSS cannot be read."""
    m[s.FAULT_KIND] = 0
    if m[s.MODE] & modes.V86 == 0 or m[s.CR4] & CR4_VME == 0:
        return False
    at = load_linear(m, a, t, m[s.TR_BASE] + IO_MAP_BASE, 2, 0)
    if m[s.FAULT_KIND]:
        return False
    at += (vector >> 3) - REDIRECTION_BYTES
    if at < 0 or at > m[LIMITS_AT + modes.TR]:
        return False
    bits = load_linear(m, a, t, m[s.TR_BASE] + at, 1, 0)
    return m[s.FAULT_KIND] == 0 and (bits >> (vector & 7)) & 1 == 0


@kernel
def redirect(m: Record, a: Arena, t: Tags, vector: int) -> int:
    """Deliver INT through the interrupt vector table at linear address 0; below IOPL 3, VIF stands for IF."""
    entry = load_linear(m, a, t, 4 * vector, 4, 0)
    if m[s.FAULT_KIND]:
        return raise_fault(m, a, t, m[s.FAULT_KIND])
    own = m[s.RFLAGS] & IOPL_3 == IOPL_3
    flags = m[s.RFLAGS] & 0xFFFF
    if not own:
        flags = (flags & ~RF_IF) | IOPL_3 | (RF_IF if m[s.RFLAGS] & RF_VIF else 0)
    for n in range(3):
        value = flags
        if n == 1:
            value = m[s.CS_SELECTOR]
        elif n == 2:
            value = m[s.RIP] + m[s.OP_LENGTH]
        fault = store_segment(m, a, t, modes.SS, moved_stack(m, -2 * (n + 1)), 2, value)
        if fault:
            return raise_fault(m, a, t, fault)
    set_stack(m, moved_stack(m, -6))
    load_real(m, modes.CS, (entry >> 16) & 0xFFFF)
    m[s.RIP] = entry & 0xFFFF
    m[s.RFLAGS] &= ~(RF_TF | (RF_IF if own else RF_VIF))
    m[s.LIMIT] = 0
    return JUMPED
