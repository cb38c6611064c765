"""The invalidation queue: descriptors are fetched in order, until the tail, an error, or a wait for devices.

A wait descriptor completes only when every device-TLB invalidation before it is answered. Until then the queue stands
at it; a time-out aborts it. The queue also stands at a device-TLB invalidation for which its device has no room. An
answer that nobody waits for is an error that is told, but stops nothing.

VT-d: "Queued Invalidation Interface"; "Invalidation Wait Descriptor"; "Queued Invalidation Error Handling".
"""

from __future__ import annotations

from typing import Final

from vtsim.base.jit import Arena, Record, kernel
from vtsim.base.memory import is_memory, load_word, store
from vtsim.iommu import descriptors as d
from vtsim.iommu import entries as e
from vtsim.iommu import spec as sp
from vtsim.iommu.kernels.page_requests import respond
from vtsim.iommu.kernels.second_level import extended
from vtsim.iommu.kernels.unit_caches import drop_all, drop_where
from vtsim.iommu.kernels.unit_faults import raise_event, register_low, send, set_fault_status, set_unit_register
from vtsim.iommu.kernels.unit_invalidation import (
    forget_contexts,
    forget_pasids,
    forget_process,
    forget_translations,
)
from vtsim.iommu.kernels.unit_memory import flush_writes
from vtsim.iommu.state import (
    DATA,
    DEVICE_INVALIDATION,
    DEVICE_PENDING,
    DEVICE_WORDS,
    DEVICES,
    INTERRUPT_ENTRIES,
    INVALIDATION_EVENT,
    MESSAGE_COUNT,
    MESSAGES_TAKEN,
    MOST_DEVICE_PENDING,
    N_DESCRIPTORS,
    REGISTERS,
    RING_ENTRIES,
    ROOT_TABLE,
    TAG,
)

# fmt: off
STANDS = -1                      # a descriptor that has to wait for devices
ALWAYS_ROOM: Final = 32          # invalidations that every device takes at a time
QUEUE_MASK: Final = 0x7_FFF0
RESERVED_LOW = tuple(row.reserved(0) for row in d.DESCRIPTORS)
RESERVED_HIGH = tuple(row.reserved(1) for row in d.DESCRIPTORS)
STOPPED: Final = sp.IQE | sp.ITE
# fmt: on


@kernel
def queue_error(u: Record, code: int) -> None:
    """Stop the queue at the descriptor that is not valid."""
    at = REGISTERS + (sp.IQERCD >> 3)
    u[at] = (u[at] & ~0xF) | code
    set_fault_status(u, sp.IQE)


@kernel
def is_fetching(u: Record) -> bool:
    """Is the queue on, and not stopped by an error?"""
    return register_low(u, sp.GSTS) & sp.QIE != 0 and register_low(u, sp.FSTS) & STOPPED == 0


@kernel
def run_queue(u: Record, a: Arena) -> int:
    """Execute descriptors from the head on; how many were completed."""
    done = 0
    while is_fetching(u):
        base = u[REGISTERS + (sp.IQA >> 3)]
        wide = base & sp.IQA_WIDE != 0
        size = 0x1000 << (base & sp.IQA_SIZE)
        step = 32 if wide else 16
        head = u[REGISTERS + (sp.IQH >> 3)] & QUEUE_MASK
        tail = u[REGISTERS + (sp.IQT >> 3)] & QUEUE_MASK
        if head == tail or u[MESSAGE_COUNT] - u[MESSAGES_TAKEN] > RING_ENTRIES - 8:
            break
        mode = (u[ROOT_TABLE] >> 10) & 3
        where = (base & e.POINTER) + head
        if tail >= size:
            queue_error(u, sp.IQEI_TAIL)
        elif mode == sp.TTM_RESERVED:
            queue_error(u, sp.IQEI_TTM)
        elif (wide and not extended(u, sp.ECAP_SMTS | sp.ECAP_ADMS)) or (not wide and mode == sp.TTM_SCALABLE):
            queue_error(u, sp.IQEI_WIDTH)
        elif wide and tail & 16 != 0:
            queue_error(u, sp.IQEI_MISALIGNED)
        elif not is_memory(a, where):
            queue_error(u, sp.IQEI_FETCH)
        else:
            low, high = load_word(a, where), load_word(a, where + 8)
            rest = load_word(a, where + 16) | load_word(a, where + 24) if wide else 0
            error = run_descriptor(u, a, low, high, rest, mode)
            if error == STANDS:
                break
            if error != 0:
                queue_error(u, error)
            else:
                done += 1
                u[N_DESCRIPTORS] += 1
                u[REGISTERS + (sp.IQH >> 3)] = (head + step) & (size - 1)
    return done


@kernel
def run_descriptor(u: Record, a: Arena, low: int, high: int, rest: int, mode: int) -> int:
    """Execute one descriptor; an error of the queue, STANDS, or 0."""
    kind = (low & 0xF) | ((low >> 9) & 7) << 4
    if kind < d.CONTEXT_CACHE or kind > d.PAGE_GROUP_RESPONSE:
        return sp.IQEI_TYPE
    if kind >= d.PASID_IOTLB and mode != sp.TTM_SCALABLE:
        return sp.IQEI_TYPE
    if low & RESERVED_LOW[kind - 1] != 0 or high & RESERVED_HIGH[kind - 1] != 0:
        return sp.IQEI_RESERVED
    if rest != 0 or (kind == d.WAIT and low & d.DRAIN_PAGE_REQUESTS != 0 and not extended(u, sp.ECAP_PDS)):
        return sp.IQEI_RESERVED
    granularity = (low >> 4) & 3
    domain = (low >> 16) & 0xFFFF
    page = high >> 12
    mask_bits = high & 0x3F
    leaf_only = high & 0x40 != 0
    pasid = (low >> 32) & 0xF_FFFF
    if kind == d.CONTEXT_CACHE:
        if granularity == 0:
            return sp.IQEI_RESERVED
        forget_contexts(u, granularity, domain, (low >> 32) & 0xFFFF, (low >> 48) & 3)
    elif kind == d.IOTLB_TYPE:
        if granularity == 0:
            return sp.IQEI_RESERVED
        forget_translations(u, granularity, domain, page, mask_bits, leaf_only)
    elif kind == d.PASID_IOTLB:
        if granularity < 2:
            return sp.IQEI_RESERVED
        forget_process(u, granularity == 3, domain, pasid, page, mask_bits, leaf_only)
    elif kind == d.PASID_CACHE:
        if granularity == 2:
            return sp.IQEI_RESERVED
        forget_pasids(u, granularity, domain, pasid)
    elif kind == d.INTERRUPT_ENTRY:
        forget_interrupts(u, low & 0x10 != 0, (low >> 32) & 0xFFFF, (low >> 27) & 0x1F)
    elif kind == d.DEVICE_TLB:
        if not extended(u, sp.ECAP_DT):
            return sp.IQEI_TYPE
        sid = (low >> 32) & 0xFFFF
        if not may_be_sent(u, sid, low, (low >> 16) & 0x1F):
            return STANDS
        send(u, DEVICE_INVALIDATION, sid, high, sp.NO_PASID)
    elif kind == d.PASID_DEVICE_TLB:
        if not extended(u, sp.ECAP_DT):
            return sp.IQEI_TYPE
        if not may_be_sent(u, domain, low, (low >> 4) & 0x1F):
            return STANDS
        everyone = high & 1 != 0
        range_word = (high & ~0xFFF) | ((high >> 11) & 1)
        send(u, DEVICE_INVALIDATION, domain, range_word, sp.NO_PASID if everyone else pasid)
    elif kind == d.PAGE_GROUP_RESPONSE:
        has_pasid = low & 0x10 != 0
        respond(u, domain, pasid if has_pasid else sp.NO_PASID, (high >> 3) & 0x1FF, (low >> 12) & 0xF, True)
    else:
        if u[DEVICE_PENDING] != 0:
            return STANDS
        complete_wait(u, a, low, high)
    return 0


@kernel
def may_be_sent(u: Record, sid: int, low: int, most: int) -> bool:
    """May a device-TLB invalidation go out? If so it is pending from now on.

    `most` is what MIP says: of so many that are pending the device holds the next ones up; 0 means 32, which each has
    room for. With throttling (DIT) those count that burden the same physical function, else those of this requester.

    VT-d: "Device-TLB Invalidate Descriptor"; "PASID-based-Device-TLB Invalidate Descriptor".
    """
    burdened = sid
    if extended(u, sp.ECAP_DIT):
        burdened = ((low >> 12) & 0xF) | ((low >> 52) & 0xFFF) << 4
    else:
        most = 0
    waiting = 0
    for number in range(u[DEVICE_PENDING]):
        if u[DEVICES + number * DEVICE_WORDS + 1] == burdened:
            waiting += 1
    if waiting >= (most if most != 0 else ALWAYS_ROOM) or u[DEVICE_PENDING] >= MOST_DEVICE_PENDING:
        return False
    at = DEVICES + u[DEVICE_PENDING] * DEVICE_WORDS
    u[at] = sid
    u[at + 1] = burdened
    u[DEVICE_PENDING] += 1
    return True


@kernel
def complete_wait(u: Record, a: Arena, low: int, high: int) -> None:
    """Tell software that everything before is done: by a status word in memory, by an interrupt, or by both."""
    if low & 0x20 != 0 and is_memory(a, high):
        store(a, high, 4, (low >> 32) & 0xFFFF_FFFF)
    if low & 0x10 != 0:
        status = register_low(u, sp.ICS)
        if status & sp.IWC == 0:
            set_unit_register(u, sp.ICS, status | sp.IWC)
            raise_event(u, INVALIDATION_EVENT)


@kernel
def forget_interrupts(u: Record, selective: bool, index: int, mask_bits: int) -> None:
    """Invalidate the interrupt entry cache: all, or 2**mask_bits entries; entries are tagged by their index."""
    flush_writes(u)
    if selective:
        mask = 0xFFFF & ~((1 << mask_bits) - 1)
        drop_where(u, INTERRUPT_ENTRIES, TAG, mask, index & mask, DATA, 0, 0)
    else:
        drop_all(u, INTERRUPT_ENTRIES)


@kernel
def device_answered(u: Record, a: Arena, sid: int) -> None:
    """A device has completed a device-TLB invalidation; one that nobody waits for is an error."""
    for number in range(u[DEVICE_PENDING]):
        if u[DEVICES + number * DEVICE_WORDS] == sid & 0xFFFF:
            no_longer_pending(u, number)
            run_queue(u, a)
            return
    if register_low(u, sp.FSTS) & sp.ICE == 0:  # the requester of the first such error is kept
        at = REGISTERS + (sp.IQERCD >> 3)
        u[at] = (u[at] & 0xFFFF_FFFF_FFFF) | ((sid ^ 0x8000) - 0x8000) << 48
    set_fault_status(u, sp.ICE)


@kernel
def no_longer_pending(u: Record, number: int) -> None:
    """Take one device-TLB invalidation from those that are pending; the last one comes to its place."""
    u[DEVICE_PENDING] -= 1
    at = DEVICES + number * DEVICE_WORDS
    last = DEVICES + u[DEVICE_PENDING] * DEVICE_WORDS
    u[at] = u[last]
    u[at + 1] = u[last + 1]


@kernel
def device_timed_out(u: Record, a: Arena, sid: int) -> None:
    """A device has not answered in time: what it owes is given up, and the wait descriptor that stands is aborted.

    Other devices still owe their answers.
    """
    owed = u[DEVICE_PENDING]
    for number in range(owed - 1, -1, -1):
        if u[DEVICES + number * DEVICE_WORDS] == sid & 0xFFFF:
            no_longer_pending(u, number)
    if u[DEVICE_PENDING] == owed:
        return
    if register_low(u, sp.FSTS) & sp.ITE == 0:
        at = REGISTERS + (sp.IQERCD >> 3)
        u[at] = (u[at] & ~(0xFFFF << 32)) | (sid & 0xFFFF) << 32
    base = u[REGISTERS + (sp.IQA >> 3)]
    head = u[REGISTERS + (sp.IQH >> 3)] & QUEUE_MASK
    where = (base & e.POINTER) + head
    if (
        is_fetching(u)
        and head != u[REGISTERS + (sp.IQT >> 3)] & QUEUE_MASK
        and is_memory(a, where)
        and load_word(a, where) & 0xF == d.WAIT
    ):
        step = 32 if base & sp.IQA_WIDE != 0 else 16
        u[REGISTERS + (sp.IQH >> 3)] = (head + step) & ((0x1000 << (base & sp.IQA_SIZE)) - 1)
    set_fault_status(u, sp.ITE)
