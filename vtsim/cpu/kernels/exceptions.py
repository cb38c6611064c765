"""Exceptions of the op in flight: recorded, classed, and held against the exception bitmap.

SDM: "Exceptions and Interrupts"; "Exception Bitmap"; "Interrupt 8—Double Fault Exception (#DF)".
"""

from __future__ import annotations

from vtsim.base.jit import Arena, Record, Tags, kernel
from vtsim.base.memory import is_memory, load, store
from vtsim.cpu import accounts as k
from vtsim.cpu import slots as s
from vtsim.cpu.codes import (
    DB,
    DE,
    DF,
    ERROR_VALID,
    EVENT,
    GP,
    HARDWARE_EXCEPTION,
    JUMPED,
    PF,
    RF_RF,
    TS,
    VALID,
    VE,
)
from vtsim.cpu.kernels.ept_walk import (
    AGILE,
    EXCEPTION,
    LOG_FULL,
    NOT_CANONICAL,
    ON_APIC_ACCESS_PAGE,
    PAGE_FAULT,
    VIOLATION,
)
from vtsim.cpu.kernels.exit import vm_exit
from vtsim.cpu.kernels.operands import HAS_EXITED, SEGMENT_REFUSED
from vtsim.vmcs import reasons as x
from vtsim.vmcs import slots as v

# fmt: off
DURING_DELIVERY, GUEST_PHYSICAL = 10, 15     # kinds of APIC access that page walks make
BENIGN, CONTRIBUTORY, PAGE_CLASS = range(3)
NMI_UNBLOCKING: int = 1 << 12
DR6_BS: int = 1 << 14
# fmt: on


@kernel
def raise_exception(m: Record, vector: int, has_error: int, error: int) -> int:
    """Record an exception of the op in flight; in real-address mode none has an error code.

    SDM: "Interrupt and Exception Handling in Real-Address Mode".
    """
    m[s.EVENT_VECTOR] = vector
    m[s.EVENT_HAS_ERROR] = has_error & m[s.CR0]
    m[s.EVENT_ERROR] = error
    m[s.EVENT_TYPE] = HARDWARE_EXCEPTION
    m[s.EVENT_LENGTH] = 0
    return EVENT


@kernel
def raise_fault(m: Record, a: Arena, t: Tags, fault: int) -> int:
    """Turn a refused translation into an exception, or take the VM exit that it causes."""
    if fault == PAGE_FAULT:
        m[s.EVENT_CR2] = m[s.FAULT_GVA]
        return raise_exception(m, PF, 1, m[s.FAULT_CODE])
    if fault == NOT_CANONICAL:
        return raise_exception(m, GP, 1, 0)
    if fault == HAS_EXITED:
        return JUMPED
    if fault == SEGMENT_REFUSED:
        return raise_exception(m, m[s.SEGMENT_FAULT], 1, 0)
    m[s.RFLAGS] |= RF_RF
    unblocked = NMI_UNBLOCKING if m[s.IRET_UNBLOCKED] else 0
    if fault == ON_APIC_ACCESS_PAGE:  # of a paging structure: by guest-physical address, the offset is undefined
        vm_exit(m, a, x.APIC_ACCESS, (DURING_DELIVERY if m[s.VECTORING] else GUEST_PHYSICAL) << 12, m[s.OP_LENGTH])
        return JUMPED
    if fault == LOG_FULL:
        vm_exit(m, a, x.PML_FULL, unblocked, m[s.OP_LENGTH])
        return JUMPED
    if fault == VIOLATION and m[s.EPT_FEATURES] & EXCEPTION and becomes_exception(m, a):
        return raise_exception(m, VE, 0, 0)
    m[s.EXIT_GPA] = m[s.FAULT_GPA]
    m[s.EXIT_GLA] = m[s.FAULT_GVA]
    if fault == VIOLATION:
        vm_exit(m, a, x.EPT_VIOLATION, m[s.FAULT_QUALIFICATION] | unblocked, m[s.OP_LENGTH])
    else:
        vm_exit(m, a, x.EPT_MISCONFIG, 0, m[s.OP_LENGTH])
    return JUMPED


@kernel
def becomes_exception(m: Record, a: Arena) -> bool:
    """Is this EPT violation a virtualization exception instead? Its information is written if so.

    SDM: "Virtualization Exceptions"; "Convertible EPT Violations"; "Virtualization-Exception Information".
    """
    if m[s.FAULT_SUPPRESSED] or m[s.CR0] & 1 == 0 or m[s.VECTORING]:
        return False
    at = m[s.VMCS]
    area = a[at + v.VE_INFORMATION_ADDRESS] & ~0xFFF
    if not is_memory(a, area) or load(a, area + 4, 4):
        return False
    store(a, area, 4, x.EPT_VIOLATION)
    store(a, area + 4, 4, 0xFFFFFFFF)
    store(a, area + 8, 8, m[s.FAULT_QUALIFICATION])
    store(a, area + 16, 8, m[s.FAULT_GVA])
    store(a, area + 24, 8, m[s.FAULT_GPA])
    store(a, area + 32, 2, a[at + v.EPTP_INDEX])
    m[s.RFLAGS] &= ~RF_RF
    return True


@kernel
def is_fault(vector: int, kind: int) -> bool:
    """Is this event a fault, whose RFLAGS image has RF set?

    SDM: "Saving RIP, RSP, RFLAGS, and SSP".
    """
    return kind == HARDWARE_EXCEPTION and vector != DB


@kernel
def exception_exits(m: Record, a: Arena, vector: int) -> bool:
    """Does this exception, with the error code in EVENT_ERROR, exit?

    SDM: "Exception Bitmap".
    """
    if vector == PF and m[s.FAULT_NESTED] and m[s.EPT_FEATURES] & AGILE:
        return False  # agile paging: the guest's own tables said so
    at = m[s.VMCS]
    wanted = (a[at + v.EXCEPTION_BITMAP] >> vector) & 1 != 0
    if (
        vector == PF
        and m[s.EVENT_ERROR] & a[at + v.PAGE_FAULT_ERROR_CODE_MASK] != a[at + v.PAGE_FAULT_ERROR_CODE_MATCH]
    ):
        return not wanted
    return wanted


@kernel
def exception_exit(m: Record, a: Arena, vector: int, kind: int, length: int) -> int:
    """The VM exit that an exception causes. DR6 and CR2 stay; the qualification holds what they would have become.

    SDM: "Information for VM Exits Due to Vectored Events"; "Architectural State Before a VM Exit".
    """
    m[s.EXIT_INTERRUPTION] = vector | kind << 8 | VALID
    if m[s.EVENT_HAS_ERROR]:
        m[s.EXIT_INTERRUPTION] |= ERROR_VALID
    if m[s.IRET_UNBLOCKED] and vector != DF:
        m[s.EXIT_INTERRUPTION] |= NMI_UNBLOCKING
    m[s.EXIT_ERROR_CODE] = m[s.EVENT_ERROR]
    if is_fault(vector, kind):
        m[s.RFLAGS] |= RF_RF
    elif kind != HARDWARE_EXCEPTION or m[s.EVENT_CR2] & DR6_BS == 0:  # a step may be one iteration: RF is set then
        m[s.RFLAGS] &= ~RF_RF
    qualification = 0
    if kind == HARDWARE_EXCEPTION and (vector == PF or vector == DB):
        qualification = m[s.EVENT_CR2]
    if vector == PF:
        a[m[s.OWNER] + k.PAGE_FAULT_EXITS] += 1
    vm_exit(m, a, x.EXCEPTION_NMI, qualification, length)
    return JUMPED


@kernel
def contributory(vector: int) -> bool:
    """Is this exception contributory to a double fault?"""
    return vector == DE or (vector >= TS and vector <= GP)


@kernel
def class_of(vector: int, kind: int) -> int:
    """The class of an event in the table of double-fault conditions."""
    if kind != HARDWARE_EXCEPTION:
        return BENIGN
    if vector == PF or vector == VE:
        return PAGE_CLASS
    return CONTRIBUTORY if contributory(vector) else BENIGN


@kernel
def becomes_double_fault(first: int, first_kind: int, second: int) -> bool:
    """Do two exceptions, the second while delivering the first, make a double fault?"""
    before = class_of(first, first_kind)
    after = class_of(second, HARDWARE_EXCEPTION)
    if before == CONTRIBUTORY:
        return after == CONTRIBUTORY
    return before == PAGE_CLASS and after != BENIGN
