"""Processor-based VM-execution controls in force: words that a control of another word activates count as zeroes.

SDM: "Processor-Based VM-Execution Controls".
"""

from __future__ import annotations

from vtsim.base.jit import Arena, Record, kernel
from vtsim.cpu import slots as s
from vtsim.vmcs import bits as b
from vtsim.vmcs import slots as v


@kernel
def secondary_controls(m: Record, a: Arena) -> int:
    """The secondary processor-based controls in force."""
    at = m[s.VMCS]
    if a[at + v.PRIMARY_PROC_CONTROLS] & b.ACTIVATE_SECONDARY_CONTROLS:
        return a[at + v.SECONDARY_PROC_CONTROLS]
    return 0


@kernel
def tertiary_controls(m: Record, a: Arena) -> int:
    """The tertiary processor-based controls in force."""
    at = m[s.VMCS]
    if a[at + v.PRIMARY_PROC_CONTROLS] & b.ACTIVATE_TERTIARY_CONTROLS:
        return a[at + v.TERTIARY_PROC_CONTROLS]
    return 0
