"""Recording of faults, and the three events a remapping unit announces by message.

VT-d: "Primary Fault Logging"; "Fault Event"; "Fault Recording Registers"; "Fault Status Register".
"""

from __future__ import annotations

from typing import Final

from vtsim.base.jit import Record, kernel
from vtsim.iommu import faults as f
from vtsim.iommu import spec as sp
from vtsim.iommu.state import (
    ACCESS,
    ADDRESS,
    AT,
    COMPRESS,
    FAULT_EVENT,
    FAULT_NEXT,
    FAULT_REGISTERS,
    FPD_SEEN,
    HAS_PASID,
    INVALIDATION_EVENT,
    MESSAGE_COUNT,
    N_COMPRESSED,
    N_FAULTS,
    N_MESSAGES,
    N_OVERFLOWED,
    N_RECORDED,
    N_SILENCED,
    PASID,
    REASON,
    RECORDED,
    REGISTERS,
    RING,
    RING_ENTRIES,
    RING_WORDS,
    SID,
)

# fmt: off
RECORD_F: Final = -(1 << 63)
RECORD_T1, RECORD_PP, RECORD_EXE, RECORD_PRIV, RECORD_T2 = 1 << 62, 1 << 31, 1 << 30, 1 << 29, 1 << 28
RECORD_AT, RECORD_PASID, RECORD_REASON = 60, 40, 32
LOW_WORD: Final = 0xFFFF_FFFF
Q0, Q1, Q2 = f.QUALIFIED
# what was asked, for the record: a DMA request, a page request, an interrupt request
OF_DMA, OF_PAGE_REQUEST, OF_INTERRUPT = range(3)
# fmt: on


@kernel
def is_in(code: int, low: int, middle: int, high: int) -> bool:
    """Is a fault reason in a set of them that three words of 63 bits hold?"""
    if code < 63:
        return (low >> code) & 1 != 0
    if code < 126:
        return (middle >> (code - 63)) & 1 != 0
    return (high >> (code - 126)) & 1 != 0


@kernel
def register_low(u: Record, offset: int) -> int:
    """A 32-bit register."""
    return (u[REGISTERS + (offset >> 3)] >> ((offset & 4) << 3)) & LOW_WORD


@kernel
def set_unit_register(u: Record, offset: int, value: int) -> None:
    """Let a 32-bit register be this value, whatever its access."""
    at = REGISTERS + (offset >> 3)
    value &= LOW_WORD
    if offset & 4 != 0:
        u[at] = (u[at] & LOW_WORD) | (value - ((value >> 31) << 32)) << 32
    else:
        u[at] = (u[at] & ~LOW_WORD) | value


@kernel
def send(u: Record, kind: int, first: int, second: int, third: int) -> None:
    """Put a message into the ring, from which the platform takes it."""
    at = RING + (u[MESSAGE_COUNT] % RING_ENTRIES) * RING_WORDS
    u[MESSAGE_COUNT] += 1
    u[N_MESSAGES] += 1
    u[at] = kind
    u[at + 1] = first
    u[at + 2] = second
    u[at + 3] = third


@kernel
def event_control(event: int) -> int:
    """The control register of an event; data, address and upper address follow it."""
    if event == FAULT_EVENT:
        return sp.FECTL
    if event == INVALIDATION_EVENT:
        return sp.IECTL
    return sp.PECTL


@kernel
def raise_event(u: Record, event: int) -> None:
    """Interrupt condition: send the message, or leave it pending while the event is masked."""
    control = event_control(event)
    state = register_low(u, control)
    if state & sp.IM != 0:
        set_unit_register(u, control, state | sp.IP)
        return
    set_unit_register(u, control, state & ~sp.IP)
    address = register_low(u, control + 8) | register_low(u, control + 12) << 32
    send(u, event, address, register_low(u, control + 4), 0)


@kernel
def event_unmasked(u: Record, event: int) -> None:
    """A control register was written: a pending message goes out as soon as the event is not masked."""
    state = register_low(u, event_control(event))
    if state & sp.IP != 0 and state & sp.IM == 0:
        raise_event(u, event)


@kernel
def event_served(u: Record, event: int) -> None:
    """What a pending message would tell has been dealt with: it is no longer pending."""
    control = event_control(event)
    set_unit_register(u, control, register_low(u, control) & ~sp.IP)


@kernel
def set_fault_status(u: Record, bit: int) -> None:
    """Set a bit of the fault status register; the first of them raises the fault event."""
    state = register_low(u, sp.FSTS)
    set_unit_register(u, sp.FSTS, state | bit)
    if state & sp.FSTS_EVENTS == 0:
        raise_event(u, FAULT_EVENT)


@kernel
def recording_register(index: int) -> int:
    """The word of the register file where a fault recording register begins."""
    return REGISTERS + ((sp.FAULT_OFFSET + 16 * index) >> 3)


@kernel
def faults_cleared(u: Record) -> None:
    """Bits were cleared in fault status or recording registers: PPF follows the records, and the event what is left."""
    pending = False
    for index in range(u[FAULT_REGISTERS]):
        if u[recording_register(index) + 1] & RECORD_F != 0:
            pending = True
    state = register_low(u, sp.FSTS) & ~sp.PPF
    if pending:
        state |= sp.PPF
    set_unit_register(u, sp.FSTS, state)
    if state & sp.FSTS_EVENTS == 0:
        event_served(u, FAULT_EVENT)


@kernel
def is_qualified(reason: int) -> bool:
    """Does FPD silence this reason?"""
    return is_in(reason, Q0, Q1, Q2)


@kernel
def record_fault(u: Record, reason: int, of: int) -> None:
    """Count the fault of the request in work and log it, unless an entry silences it or the log is full."""
    u[REASON] = reason
    u[N_FAULTS] += 1
    if u[FPD_SEEN] != 0 and is_qualified(reason):
        u[N_SILENCED] += 1
        return
    if register_low(u, sp.FSTS) & sp.PFO != 0:
        u[N_OVERFLOWED] += 1
        return
    if u[COMPRESS] != 0:
        for index in range(u[FAULT_REGISTERS]):
            other = u[recording_register(index) + 1]
            if other & RECORD_F != 0 and other & 0xFFFF == u[SID]:
                u[N_COMPRESSED] += 1
                return
    index = u[FAULT_NEXT]
    at = recording_register(index)
    if u[at + 1] & RECORD_F != 0:
        u[N_OVERFLOWED] += 1
        set_fault_status(u, sp.PFO)
        return
    access = u[ACCESS]
    high = RECORD_F | reason << RECORD_REASON | u[SID]
    if of == OF_PAGE_REQUEST:
        high |= RECORD_T2
    elif of == OF_DMA:
        if access & sp.ATOMIC != 0:
            high |= RECORD_T1 | RECORD_T2
        elif access & sp.WRITE == 0:
            high |= RECORD_T1
    if u[HAS_PASID] != 0:
        high |= RECORD_PP | u[PASID] << RECORD_PASID
        if access & sp.EXECUTE != 0:
            high |= RECORD_EXE
        if access & sp.PRIVILEGED != 0:
            high |= RECORD_PRIV
    if of != OF_INTERRUPT:
        high |= (u[AT] & 3) << RECORD_AT
        u[at] = u[ADDRESS] & ~0xFFF
    else:
        u[at] = u[ADDRESS]
    u[at + 1] = high
    u[FAULT_NEXT] = (index + 1) % u[FAULT_REGISTERS]
    u[RECORDED] = 1
    u[N_RECORDED] += 1
    state = register_low(u, sp.FSTS)
    if state & sp.PPF == 0:
        set_unit_register(u, sp.FSTS, (state & ~(0xFF << sp.FRI)) | index << sp.FRI)
        set_fault_status(u, sp.PPF)
