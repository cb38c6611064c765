"""Exceptions and interrupts: what exits, what goes through the IDT, what becomes a double fault.

SDM: "Interrupt and Exception Handling".
Not modelled: descriptor loads from the GDT and LDT on delivery in 64-bit mode to assembled programs.
"""

from __future__ import annotations

from vtsim.base import trace as tr
from vtsim.base.jit import Arena, Record, Tags, kernel
from vtsim.base.memory import A_DECODE, A_REPLAY_ROWS
from vtsim.cpu import accounts as k
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.codes import (
    DF,
    EVENT,
    EXTERNAL,
    GP,
    HARDWARE_EXCEPTION,
    JUMPED,
    NMI_EVENT,
    PF,
    RF_IF,
    RF_NT,
    RF_RF,
    RF_TF,
    SOFTWARE_EXCEPTION,
    SOFTWARE_INTERRUPT,
    STOPPED,
    TRIPLE_FAULTED,
    VALID,
)
from vtsim.cpu.kernels.access import read64, timed_access, write64
from vtsim.cpu.kernels.contexts import recorded
from vtsim.cpu.kernels.cursor import set_limit, set_privilege
from vtsim.cpu.kernels.digest import saw_exception
from vtsim.cpu.kernels.ept_walk import MISCONFIGURATION, NOT_CANONICAL, PAGE_FAULT, VIOLATION
from vtsim.cpu.kernels.exceptions import contributory, exception_exit, exception_exits, raise_exception, raise_fault
from vtsim.cpu.kernels.exit import vm_exit
from vtsim.cpu.kernels.gates import gate_cycles, through_gates
from vtsim.cpu.kernels.ledger import charge, record
from vtsim.cpu.kernels.modes import LMA
from vtsim.cpu.kernels.rights import READ
from vtsim.vmcs import reasons as x


@kernel
def deliver(m: Record, a: Arena, t: Tags) -> int:
    """Deliver the event in EVENT_…: a VM exit if the exception bitmap says so, else through the IDT.

    SDM: "Exceptions and Interrupts"; "Exception Bitmap"; "Interrupt 8—Double Fault Exception (#DF)".
    """
    vector = m[s.EVENT_VECTOR]
    kind = m[s.EVENT_TYPE]
    if m[s.NONROOT] and kind != EXTERNAL and kind != SOFTWARE_INTERRUPT and kind != NMI_EVENT:
        if exception_exits(m, a, vector):
            return exception_exit(m, a, vector, kind, m[s.OP_LENGTH])
    m[s.HALTED] = 0
    return through_idt(m, a, t)


@kernel
def failed_delivery(m: Record, a: Arena, t: Tags, fault: int, vector: int) -> int:
    """Delivering `vector` faulted: VM exit, double fault or shutdown. EVENT asks the caller to deliver again."""
    if fault == VIOLATION or fault == MISCONFIGURATION:
        raise_fault(m, a, t, fault)
        return JUMPED
    exception = m[s.EVENT_TYPE] == HARDWARE_EXCEPTION
    if exception and vector == DF:
        m[s.VECTORING] = 0
        if m[s.NONROOT]:
            vm_exit(m, a, x.TRIPLE_FAULT, 0, 0)
            return JUMPED
        m[s.STOP] = TRIPLE_FAULTED
        return STOPPED
    if fault == PAGE_FAULT:
        again = exception and vector == PF
        m[s.EVENT_CR2] = m[s.FAULT_GVA]
        code = raise_exception(m, PF, 1, m[s.FAULT_CODE])
    else:
        again = exception and (contributory(vector) or vector == PF)
        external = 0 if m[s.EVENT_TYPE] == SOFTWARE_INTERRUPT else 1
        code = raise_exception(m, GP, 1, vector << 3 | 2 | external)
    if m[s.NONROOT] and exception_exits(m, a, m[s.EVENT_VECTOR]):  # before the two are combined
        return exception_exit(m, a, m[s.EVENT_VECTOR], HARDWARE_EXCEPTION, 0)
    if again:
        m[s.VECTORING] = 0  # what the double fault replaces is not reported
        code = raise_exception(m, DF, 1, 0)
    return code


@kernel
def through_idt(m: Record, a: Arena, t: Tags) -> int:
    """Push the interrupted context on the handler's stack and go to the handler.

    SDM: "Exception- and Interrupt-Handler Procedures"; "64-Bit Mode Stack Frame"; "Interrupt Stack Table".
    """
    if recorded(m, a):
        return recorded_delivery(m, a, t)
    if a[A_DECODE] or m[s.MODE]:
        return through_gates(m, a, t)
    injected = m[s.INJECTED]
    m[s.INJECTED] = 0
    for _ in range(3):
        vector = m[s.EVENT_VECTOR]
        kind = m[s.EVENT_TYPE]
        error = m[s.EVENT_ERROR]
        has_error = m[s.EVENT_HAS_ERROR]
        m[s.VECTORING] = vector | kind << 8 | has_error << 11 | VALID
        m[s.VECTORING_ERROR] = error
        m[s.VECTORING_LENGTH] = m[s.EVENT_LENGTH]
        ring = m[s.PRIVILEGE] & 1
        before = m[s.PRIVILEGE]
        if vector == PF and kind == HARDWARE_EXCEPTION:  # before the delivery, which may be refused
            m[s.CR2] = m[s.EVENT_CR2]
        charge(m, a, o.EVENT_DELIVERY, gate_cycles(m, kind, injected))
        low = 0
        high = 0
        fault = 0
        rsp = m[s.GPR + s.RSP]
        if vector * 16 + 15 > m[s.IDTR_LIMIT]:
            fault = NOT_CANONICAL
        if fault == 0:
            low = read64(m, a, t, m[s.IDTR_BASE] + vector * 16)
            fault = m[s.FAULT_KIND]
        if fault == 0:
            high = read64(m, a, t, m[s.IDTR_BASE] + vector * 16 + 8)
            fault = m[s.FAULT_KIND]
        if fault == 0 and (low >> 47) & 1 == 0:
            fault = NOT_CANONICAL
        if fault == 0 and kind == SOFTWARE_INTERRUPT and ring and (low >> 45) & 3 != 3:
            fault = NOT_CANONICAL
        if fault == 0:
            table = (low >> 32) & 7
            if table:
                rsp = read64(m, a, t, m[s.TR_BASE] + 28 + 8 * table)
                fault = m[s.FAULT_KIND]
            elif ring:
                rsp = read64(m, a, t, m[s.TR_BASE] + 4)
                fault = m[s.FAULT_KIND]
        if fault == 0:
            rsp &= ~15
            fault = write64(m, a, t, rsp - 8, m[s.SS_SELECTOR])
        if fault == 0:
            fault = write64(m, a, t, rsp - 16, m[s.GPR + s.RSP])
        if fault == 0:
            fault = write64(m, a, t, rsp - 24, m[s.RFLAGS])
        if fault == 0:
            fault = write64(m, a, t, rsp - 32, m[s.CS_SELECTOR])
        if fault == 0:
            fault = write64(m, a, t, rsp - 40, m[s.RIP] + m[s.EVENT_LENGTH])
        if fault == 0 and has_error:
            fault = write64(m, a, t, rsp - 48, error)
        if fault == 0:
            if vector == PF and kind == HARDWARE_EXCEPTION:
                a[m[s.OWNER] + k.PAGE_FAULTS] += 1
            a[m[s.OWNER] + (k.INTERRUPTS if kind == EXTERNAL else k.EXCEPTIONS)] += 1
            if kind == HARDWARE_EXCEPTION:
                saw_exception(m, a, vector, error if has_error else -1)
            m[s.GPR + s.RSP] = rsp - (48 if has_error else 40)
            set_privilege(m, a, 0)
            m[s.RIP] = (low & 0xFFFF) | ((low >> 48) & 0xFFFF) << 16 | (high & 0xFFFFFFFF) << 32
            m[s.CS_SELECTOR] = (low >> 16) & 0xFFFF
            m[s.SS_SELECTOR] = 0 if ring else m[s.SS_SELECTOR]
            m[s.RFLAGS] &= ~(RF_TF | RF_NT | RF_RF)
            if (low >> 40) & 1 == 0:  # interrupt gate
                m[s.RFLAGS] &= ~RF_IF
            m[s.VECTORING] = 0
            set_limit(m, a)
            if m[s.TRACE_ON]:
                record(m, a, before, tr.INTERRUPT if kind == EXTERNAL else tr.FAULT, vector, 0, error, m[s.CR2])
            return JUMPED
        ended = failed_delivery(m, a, t, fault, vector)
        if ended != EVENT:
            return ended
        vector = m[s.EVENT_VECTOR]
        if m[s.NONROOT] and exception_exits(m, a, vector):
            return exception_exit(m, a, vector, HARDWARE_EXCEPTION, 0)
    m[s.STOP] = TRIPLE_FAULTED
    return STOPPED


@kernel
def recorded_delivery(m: Record, a: Arena, t: Tags) -> int:
    """Deliver an event to a recorded guest: its handler is the rows that follow.

    An interrupt ends the wait for it (R13) and the HLT it came before; an exception or INT ends its own row.

    It reads the IDT where its linear address is known, in real mode at 0, and through shadow tables otherwise.

    Not modelled: accesses of a recorded guest's event delivery to its stack, its GDT and its TSS, and through EPT to
    its IDT.
    """
    vector = m[s.EVENT_VECTOR]
    kind = m[s.EVENT_TYPE]
    before = m[s.PRIVILEGE]
    m[s.VECTORING] = vector | kind << 8 | m[s.EVENT_HAS_ERROR] << 11 | VALID
    m[s.VECTORING_ERROR] = m[s.EVENT_ERROR]
    m[s.VECTORING_LENGTH] = m[s.EVENT_LENGTH]
    charge(m, a, o.EVENT_DELIVERY, m[s.P_INTERRUPT] if kind == EXTERNAL else m[s.P_EXCEPTION])
    gate = 4 * vector
    if m[s.CR0] & 1:
        gate = m[s.IDTR_BASE] + (vector << (4 if m[s.EFER] & LMA else 3))
    if m[s.CR0] & 1 == 0 or (m[s.NONROOT] and m[s.EPTP] == 0 and m[s.IDTR_BASE]):
        hpa = timed_access(m, a, t, gate, READ)
        if hpa < 0:
            return failed_delivery(m, a, t, hpa, vector)
    m[s.VECTORING] = 0
    if kind == EXTERNAL:
        m[s.GPR + s.R13] = 0
        if a[a[A_REPLAY_ROWS] + (m[s.RIP] - o.REPLAY_BASE) * o.ROW_WORDS] & 0xFF == o.HLT:
            m[s.RIP] += 1
        if m[s.NONROOT] == 0:  # the row that ends the interrupt writes to the recorded machine's APIC, not to this one
            m[s.APIC_ISR + (vector >> 6)] &= ~(1 << (vector & 63))
    elif kind == SOFTWARE_INTERRUPT or kind == SOFTWARE_EXCEPTION:
        m[s.RIP] += m[s.EVENT_LENGTH]
    elif kind != NMI_EVENT:
        m[s.RIP] += 1
        if vector == PF:
            m[s.CR2] = m[s.EVENT_CR2]
            a[m[s.OWNER] + k.PAGE_FAULTS] += 1
    a[m[s.OWNER] + (k.INTERRUPTS if kind == EXTERNAL else k.EXCEPTIONS)] += 1
    set_privilege(m, a, 0)
    m[s.RFLAGS] &= ~RF_IF
    set_limit(m, a)
    if m[s.TRACE_ON]:
        record(m, a, before, tr.INTERRUPT if kind == EXTERNAL else tr.FAULT, vector, 0, m[s.EVENT_ERROR], m[s.CR2])
    return JUMPED
