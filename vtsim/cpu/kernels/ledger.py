"""Who is charged for what: cycles and instructions by owner, privilege state and activity, and the trace."""

from __future__ import annotations

from vtsim.base.jit import Arena, Record, kernel
from vtsim.base.memory import A_TRACE, A_TRACE_LENGTH, A_TRACE_LIMIT
from vtsim.cpu import accounts as k
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.codes import KERNEL_IN_RING_3

# fmt: off
TRACE_WORDS, TRACE_SLACK = 12, 16   # a record is a row of vtsim.base.trace
# fmt: on


@kernel
def settle(m: Record, a: Arena) -> None:
    """Charge cycles and instructions to whoever ran: before owner, privilege or activity change."""
    privilege = m[s.PRIVILEGE]
    owner = m[s.OWNER]
    ring = 0 if m[s.BELIEVED] == KERNEL_IN_RING_3 else privilege & 1
    at = owner + ring * k.RING_STRIDE + privilege * o.ACTIVITY_SLOTS + m[s.ACTIVITY]
    a[at] += m[s.CYCLE] - m[s.MARK]
    m[s.MARK] = m[s.CYCLE]
    a[owner + k.OWN_INSTRUCTIONS + privilege] += m[s.RETIRED] - m[s.RETIRED_MARK]
    if m[s.BELIEVED] == KERNEL_IN_RING_3:
        a[owner + k.OWN_DEPRIVILEGED] += m[s.RETIRED] - m[s.RETIRED_MARK]
    m[s.RETIRED_MARK] = m[s.RETIRED]


@kernel
def charge(m: Record, a: Arena, activity: int, cycles: int) -> None:
    """Let cycles pass that belong to an activity of the CPU itself, not of the program."""
    privilege = m[s.PRIVILEGE]
    ring = 0 if m[s.BELIEVED] == KERNEL_IN_RING_3 else privilege & 1
    a[m[s.OWNER] + ring * k.RING_STRIDE + privilege * o.ACTIVITY_SLOTS + activity] += cycles
    m[s.CYCLE] += cycles
    m[s.MARK] += cycles


@kernel
def record(m: Record, a: Arena, before: int, kind: int, reason: int, cycles: int, detail: int, about: int) -> None:
    """Append a transition to the trace. Nearly full, it makes the engine stop at the next op, to be drained."""
    n = a[A_TRACE_LENGTH]
    if n + TRACE_SLACK >= a[A_TRACE_LIMIT]:
        m[s.LIMIT] = 0
        if n >= a[A_TRACE_LIMIT]:
            return
    at = a[A_TRACE] + n * TRACE_WORDS
    a[at] = m[s.CYCLE]
    a[at + 1] = m[s.CPU]
    a[at + 2] = before
    a[at + 3] = m[s.PRIVILEGE]
    a[at + 4] = kind
    a[at + 5] = reason
    a[at + 6] = cycles
    a[at + 7] = m[s.RIP]
    a[at + 8] = detail
    a[at + 9] = about
    a[at + 10] = m[s.RETIRED]
    a[at + 11] = a[m[s.OWNER] + k.OWN_EMULATED] + a[m[s.OWNER] + k.OWN_EMULATED + 1]
    a[A_TRACE_LENGTH] = n + 1
