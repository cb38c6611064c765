"""When the loop must look up, and in which ring it runs."""

from __future__ import annotations

from vtsim.base.jit import Arena, Record, kernel
from vtsim.base.memory import A_DECODE
from vtsim.cpu import slots as s
from vtsim.cpu.codes import HOST_PROCESS, RF_IF
from vtsim.cpu.kernels.ledger import settle
from vtsim.vmcs import bits as b
from vtsim.vmcs import slots as v
from vtsim.vmcs.events import HLT_STATE


@kernel
def deliverable(m: Record, a: Arena) -> bool:
    """Would a pending external interrupt be taken at this op boundary, by delivery or by a VM exit?"""
    if m[s.APIC_PENDING] == 0 or (m[s.HALTED] and m[s.ACTIVITY_STATE] > HLT_STATE):
        return False
    if m[s.NONROOT] and a[m[s.VMCS] + v.PIN_CONTROLS] & b.EXTERNAL_INTERRUPT_EXITING:
        return True
    return m[s.RFLAGS] & RF_IF != 0


@kernel
def set_limit(m: Record, a: Arena) -> None:
    """Work out the cycle at which the loop must look up: horizon, timers, or at once where an event may be taken."""
    limit = min(m[s.UNTIL], m[s.APIC_DEADLINE])
    if m[s.WIRE_AT]:
        limit = min(limit, m[s.WIRE_AT])
    if m[s.NONROOT]:
        limit = min(limit, m[s.TIMER_DEADLINE])
        if m[s.WINDOW] and m[s.RFLAGS] & RF_IF:
            limit = 0
    if m[s.INTERRUPT_SHADOW] or m[s.HALTED] or m[s.PENDING] or deliverable(m, a):
        limit = 0
    m[s.LIMIT] = limit


@kernel
def set_privilege(m: Record, a: Arena, ring: int) -> None:
    """Change ring; keeps SS.DPL, where VMX looks for it, and CS.DPL where no descriptors are loaded."""
    settle(m, a)
    m[s.PRIVILEGE] = (2 if m[s.NONROOT] else 0) + (1 if ring else 0)
    m[s.SS_ACCESS_RIGHTS] = (m[s.SS_ACCESS_RIGHTS] & ~0x60) | (ring << 5)
    if a[A_DECODE] == 0:
        m[s.CS_ACCESS_RIGHTS] = (m[s.CS_ACCESS_RIGHTS] & ~0x60) | (ring << 5)
    if m[s.MONITORED]:
        # ring 0 is the monitor's, ring 3 its guest's, of its kernel or of a process; or a host process's
        m[s.BELIEVED] = a[m[s.BELIEVED_AT]] if ring else 0
        m[s.OWNER] = m[s.MONITORED] if ring and m[s.BELIEVED] != HOST_PROCESS else m[s.HOST_OWNER]
