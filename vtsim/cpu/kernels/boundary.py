"""Between two ops: timers, interrupts, windows, halting, the horizon.

SDM: "Priority Among Concurrent Events"; "VM-Execution Control Fields".
"""

from __future__ import annotations

from vtsim.base import trace as tr
from vtsim.base.jit import Arena, Record, Tags, kernel
from vtsim.base.memory import A_TRACE_LENGTH, A_TRACE_LIMIT
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.codes import EXTERNAL, HORIZON, RF_IF, STOPPED, TRACE_FULL, VALID
from vtsim.cpu.kernels.apic import acknowledge, timer_fires
from vtsim.cpu.kernels.apic_virtualization import process_posted
from vtsim.cpu.kernels.breakpoints import instruction_breakpoint
from vtsim.cpu.kernels.cursor import deliverable, set_limit
from vtsim.cpu.kernels.events import deliver, through_idt
from vtsim.cpu.kernels.exit import vm_exit
from vtsim.cpu.kernels.ledger import TRACE_SLACK, charge, record
from vtsim.cpu.kernels.overlap import drain
from vtsim.cpu.kernels.pending import DELIVER, arm, begin, debug_exception, rare_event
from vtsim.cpu.kernels.posted_interrupts import is_notification
from vtsim.cpu.kernels.replay import assert_wire
from vtsim.vmcs import bits as b
from vtsim.vmcs import reasons as x
from vtsim.vmcs import slots as v
from vtsim.vmcs.events import HLT_STATE


@kernel
def boundary(m: Record, a: Arena, t: Tags) -> int:
    """Between two ops with LIMIT reached: timers, interrupts, windows, halting, the horizon. RUNNING (0) to go on.

    SDM: "Priority Among Concurrent Events"; "VM-Execution Control Fields".
    """
    while True:
        if a[A_TRACE_LENGTH] + TRACE_SLACK >= a[A_TRACE_LIMIT] and m[s.TRACE_ON]:
            return TRACE_FULL
        if m[s.STOP]:
            return m[s.STOP]
        if m[s.PENDING_DRAIN]:
            return HORIZON
        if m[s.CYCLE] >= m[s.APIC_DEADLINE]:
            timer_fires(m, a)
            continue
        if m[s.WIRE_AT] and m[s.CYCLE] >= m[s.WIRE_AT]:
            assert_wire(m, a)
            continue
        if m[s.PENDING]:
            found = rare_event(m, a, t)
            if found:
                m[s.ROW] = 0
                if found == DELIVER:
                    halted = m[s.HALTED]
                    wake(m, a)
                    m[s.HALTED] = halted  # a VM exit saves it; what is delivered clears it
                    if deliver(m, a, t) == STOPPED:
                        return m[s.STOP]
                begin(m)
                continue
            if m[s.PENDING_DRAIN]:  # a virtual IPI notifies
                continue
        if m[s.NONROOT] and m[s.CYCLE] >= m[s.TIMER_DEADLINE] and m[s.INTERRUPT_SHADOW] == 0:
            drain(m, a)
            vm_exit(m, a, x.PREEMPTION_TIMER, 0, 0)
            m[s.ROW] = 0
            continue
        if m[s.NONROOT] and m[s.WINDOW] and m[s.RFLAGS] & RF_IF and m[s.INTERRUPT_SHADOW] == 0 and wakes(m):
            drain(m, a)
            vm_exit(m, a, x.INTERRUPT_WINDOW, 0, 0)
            m[s.ROW] = 0
            continue
        if m[s.CYCLE] >= m[s.UNTIL]:
            return HORIZON
        if m[s.INTERRUPT_SHADOW] == 0 and deliverable(m, a):
            if m[s.NONROOT] and a[m[s.VMCS] + v.PIN_CONTROLS] & b.EXTERNAL_INTERRUPT_EXITING:
                drain(m, a)
                if is_notification(m, a):
                    acknowledge(m, a)
                    process_posted(m, a, t)
                    continue
                halted = m[s.HALTED]
                wake(m, a)
                m[s.HALTED] = halted  # saved as the guest's activity state
                if a[m[s.VMCS] + v.EXIT_CONTROLS] & b.EXIT_ACKNOWLEDGE_INTERRUPT:
                    m[s.EXIT_INTERRUPTION] = acknowledge(m, a) | VALID
                vm_exit(m, a, x.EXTERNAL_INTERRUPT, 0, 0)
                m[s.ROW] = 0
                continue
            if m[s.RFLAGS] & RF_IF:
                drain(m, a)
                wake(m, a)
                m[s.EVENT_VECTOR] = acknowledge(m, a)
                m[s.EVENT_TYPE] = EXTERNAL
                m[s.EVENT_HAS_ERROR] = 0
                m[s.EVENT_ERROR] = 0
                m[s.EVENT_LENGTH] = 0
                m[s.OP_LENGTH] = 0
                m[s.ROW] = 0
                if through_idt(m, a, t) == STOPPED:
                    return m[s.STOP]
                continue
        if m[s.INTERRUPT_SHADOW] == 1:
            m[s.INTERRUPT_SHADOW] = 0
            continue
        if m[s.HALTED]:
            target = min(m[s.UNTIL], m[s.APIC_DEADLINE])
            if m[s.NONROOT]:
                target = min(target, m[s.TIMER_DEADLINE])
            if m[s.WIRE_AT]:
                target = min(target, m[s.WIRE_AT])
            m[s.INTERRUPT_SHADOW] = 0
            if deliverable(m, a):
                continue
            if target > m[s.CYCLE]:
                charge(m, a, o.HALTED_CYCLES, target - m[s.CYCLE])
            continue
        if m[s.PENDING]:
            hit = instruction_breakpoint(m)
            if hit:
                debug_exception(m, hit)
                m[s.ROW] = 0
                if deliver(m, a, t) == STOPPED:
                    return m[s.STOP]
                begin(m)
                continue
            begin(m)
            arm(m, a)
        if m[s.INTERRUPT_SHADOW]:
            m[s.INTERRUPT_SHADOW] = 1
            m[s.LIMIT] = m[s.CYCLE]
            return 0
        set_limit(m, a)
        return 0


@kernel
def wakes(m: Record) -> bool:
    """Would an external interrupt, or the window for one, wake the CPU: does it run, or is it halted by HLT?

    SDM: "Guest Non-Register State"; "Other Causes of VM Exits".
    """
    return m[s.HALTED] == 0 or m[s.ACTIVITY_STATE] <= HLT_STATE


@kernel
def wake(m: Record, a: Arena) -> None:
    """Leave the halted state, which takes time."""
    if m[s.HALTED]:
        m[s.HALTED] = 0
        charge(m, a, o.HALTED_CYCLES, m[s.WAKE_CYCLES])
        if m[s.TRACE_ON]:
            record(m, a, m[s.PRIVILEGE], tr.HALT, -1, m[s.CYCLE] - m[s.HALTED_AT], 0, 0)
