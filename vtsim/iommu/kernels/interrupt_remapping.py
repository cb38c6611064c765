"""One interrupt request: remapped, posted, passed on in compatibility format, or blocked: exactly one of the four.

VT-d: "Interrupt Remapping"; "Interrupt Remapping Fault Conditions"; "Interrupt Posting".
"""

from __future__ import annotations

from vtsim.base.jit import Arena, Record, kernel
from vtsim.base.memory import load_word, store_word
from vtsim.iommu import faults as f
from vtsim.iommu import interrupts as i
from vtsim.iommu import spec as sp
from vtsim.iommu.entries import POINTER
from vtsim.iommu.kernels.second_level import capable
from vtsim.iommu.kernels.unit_caches import held_by_unit, make_room
from vtsim.iommu.kernels.unit_faults import OF_INTERRUPT, record_fault, register_low
from vtsim.iommu.kernels.unit_memory import note_step, readable, word_seen
from vtsim.iommu.state import (
    ACCESS,
    ADDRESS,
    DATA,
    FPD_SEEN,
    HAS_PASID,
    HOST_RESERVED,
    INTERRUPT_BLOCKED,
    INTERRUPT_COMPATIBLE,
    INTERRUPT_DATA,
    INTERRUPT_ENTRIES,
    INTERRUPT_INDEX,
    INTERRUPT_MERGED,
    INTERRUPT_MESSAGE,
    INTERRUPT_NOTIFIES,
    INTERRUPT_POSTED,
    INTERRUPT_READS,
    INTERRUPT_REMAPPED,
    INTERRUPT_STATUS,
    INTERRUPT_TABLE,
    N_INTERRUPT_HITS,
    N_INTERRUPT_MISSES,
    N_INTERRUPT_REQUESTS,
    N_INTERRUPTS_BLOCKED,
    N_INTERRUPTS_COMPATIBLE,
    N_INTERRUPTS_POSTED,
    N_INTERRUPTS_REMAPPED,
    N_NOTIFICATIONS,
    N_READS,
    PASID,
    REASON,
    RECORDED,
    SID,
    STEP_COUNT,
    STEP_DESCRIPTOR,
    STEP_IRTE,
)

HANDLE: int = 0x7FFF
UPPER, TOP = -(1 << 32), -(1 << 63)


@kernel
def remap_interrupt(u: Record, a: Arena, sid: int, pasid: int, address: int, data: int) -> int:
    """Answer one interrupt request; how it ended is returned, the message to send is in INTERRUPT_MESSAGE and _DATA.

    The message has the format of a local APIC, with 32 bits of destination in bits 63:32 while EIME is set. A posted
    interrupt has a message, its notification, only if INTERRUPT_NOTIFIES is 1.
    """
    for slot in range(INTERRUPT_STATUS, INTERRUPT_READS + 1):
        u[slot] = 0
    u[REASON] = 0
    u[RECORDED] = 0
    u[SID] = sid & 0xFFFF
    u[PASID] = pasid
    u[HAS_PASID] = 0
    u[ACCESS] = 0
    u[ADDRESS] = 0
    u[FPD_SEEN] = 0
    u[STEP_COUNT] = 0
    u[N_INTERRUPT_REQUESTS] += 1
    status = register_low(u, sp.GSTS)
    if status & sp.IRE == 0:
        return pass_on(u, address, data)
    if pasid >= 0:
        return block_interrupt(u, f.INTERRUPT_PASID)
    if address & i.REMAPPABLE == 0:
        if u[INTERRUPT_TABLE] & sp.EIME != 0 or status & sp.CFI == 0:
            return block_interrupt(u, f.COMPATIBILITY_BLOCKED)
        return pass_on(u, address, data)
    if data & i.DATA_RESERVED:
        return block_interrupt(u, f.INTERRUPT_RESERVED)
    index = ((address >> 5) & HANDLE) | ((address >> 2) & 1) << 15
    if address & i.SUBHANDLE_VALID:
        index += data & 0xFFFF
    u[INTERRUPT_INDEX] = index
    u[ADDRESS] = (((index & 0xFFFF) ^ 0x8000) - 0x8000) << 48
    if index >= 2 << (u[INTERRUPT_TABLE] & 0xF):
        return block_interrupt(u, f.INTERRUPT_INDEX)
    return by_entry(u, a, index)


@kernel
def pass_on(u: Record, address: int, data: int) -> int:
    """A request in compatibility format goes to the local APICs as it is."""
    u[INTERRUPT_STATUS] = INTERRUPT_COMPATIBLE
    u[INTERRUPT_MESSAGE] = address
    u[INTERRUPT_DATA] = data
    u[N_INTERRUPTS_COMPATIBLE] += 1
    return INTERRUPT_COMPATIBLE


@kernel
def block_interrupt(u: Record, reason: int) -> int:
    """Nothing is delivered; the fault is recorded."""
    u[INTERRUPT_STATUS] = INTERRUPT_BLOCKED
    u[N_INTERRUPTS_BLOCKED] += 1
    record_fault(u, reason, OF_INTERRUPT)
    return INTERRUPT_BLOCKED


@kernel
def by_entry(u: Record, a: Arena, index: int) -> int:
    """The interrupt remapping table entry of an index decides, from the cache or from memory."""
    held = held_by_unit(u, INTERRUPT_ENTRIES, index, 0)
    if held >= 0:
        u[N_INTERRUPT_HITS] += 1
        low = u[held + DATA]
        high = u[held + DATA + 1]
    else:
        u[N_INTERRUPT_MISSES] += 1
        where = (u[INTERRUPT_TABLE] & POINTER) + i.ENTRY_BYTES * index
        if where & u[HOST_RESERVED] or not readable(u, a, where, i.ENTRY_BYTES):
            return block_interrupt(u, f.IRTE_ACCESS)
        low = word_seen(u, a, where)
        count_interrupt_read(u, STEP_IRTE, where, low)
        high = word_seen(u, a, where + 8)
    if low & i.ENTRY_FPD:
        u[FPD_SEEN] = 1
    if low & i.PRESENT == 0:
        return block_interrupt(u, f.IRTE_NOT_PRESENT)
    posted = low & i.POSTED != 0
    if is_reserved(u, low, high, posted):
        return block_interrupt(u, f.IRTE_RESERVED)
    if not source_allowed(u[SID], high):
        return block_interrupt(u, f.INTERRUPT_SOURCE)
    if held < 0:
        entry = make_room(u, INTERRUPT_ENTRIES, index, 0)
        if entry >= 0:
            u[entry + DATA] = low
            u[entry + DATA + 1] = high
    if posted:
        return post(u, a, low, high)
    destination = (low >> 32) & 0xFFFFFFFF
    if u[INTERRUPT_TABLE] & sp.EIME == 0:
        destination >>= 8
    message = apic_address(destination, low & i.LOGICAL, low & i.REDIRECT != 0)
    u[INTERRUPT_MESSAGE] = message
    u[INTERRUPT_DATA] = (low >> 16) & 0xFF | ((low >> 5) & 7) << 8
    if low & i.LEVEL:
        u[INTERRUPT_DATA] |= i.MESSAGE_LEVEL | i.MESSAGE_ASSERT
    u[INTERRUPT_STATUS] = INTERRUPT_REMAPPED
    u[N_INTERRUPTS_REMAPPED] += 1
    return INTERRUPT_REMAPPED


@kernel
def count_interrupt_read(u: Record, kind: int, where: int, value: int) -> None:
    """An entry or a descriptor was read: one memory read."""
    u[INTERRUPT_READS] += 1
    u[N_READS] += 1
    note_step(u, kind, 0, where, value)


@kernel
def apic_address(destination: int, logical: int, redirect: bool) -> int:
    """The address of a message: 8 bits of destination where local APICs look for them, all 32 in bits 63:32."""
    upper = ((destination ^ 0x80000000) - 0x80000000) << 32  # as a signed word
    return sp.INTERRUPT_FIRST | upper | (destination & 0xFF) << 12 | (8 if redirect else 0) | logical


@kernel
def is_reserved(u: Record, low: int, high: int, posted: bool) -> bool:
    """Does an entry have bits set that are reserved in its format, or for this unit?"""
    if (high >> i.SVT_SHIFT) & 3 == i.SVT_RESERVED:
        return True
    if posted:
        return not capable(u, sp.CAP_PI) or low & i.POSTED_RESERVED_0 != 0 or high & i.POSTED_RESERVED_1 != 0
    if low & i.REMAPPED_RESERVED_0 or high & i.REMAPPED_RESERVED_1:
        return True
    mode = (low >> i.DLM_SHIFT) & 7
    if mode == i.DLM_RESERVED_3 or mode == i.DLM_RESERVED_6:
        return True
    return u[INTERRUPT_TABLE] & sp.EIME == 0 and (low & ~i.XAPIC_DESTINATION) >> 32 != 0


@kernel
def source_allowed(sid: int, high: int) -> bool:
    """Verify the requester as SVT, SQ and SID of an entry say.

    VT-d: "Interrupt Remapping Table Entry (IRTE) for Remapped Interrupts".
    """
    validation = (high >> i.SVT_SHIFT) & 3
    if validation == i.SVT_SOURCE:
        qualifier = i.QUALIFIERS[(high >> i.SQ_SHIFT) & 3]
        return (sid ^ high) & qualifier == 0
    if validation == i.SVT_BUS:
        bus = sid >> 8
        return bus >= (high >> 8) & 0xFF and bus <= high & 0xFF
    return True


@kernel
def post(u: Record, a: Arena, low: int, high: int) -> int:
    """Set the vector's bit in the posted-interrupt descriptor, and notify unless that is outstanding or suppressed.

    VT-d: "Interrupt-Posting Hardware Operation".
    """
    where = ((low >> 38) & 0x3FFFFFF) << 6 | (high & UPPER)
    if where & u[HOST_RESERVED] or not readable(u, a, where, i.DESCRIPTOR_BYTES):
        return block_interrupt(u, f.DESCRIPTOR_ACCESS)
    notify = load_word(a, where + i.NOTIFY_AT)
    count_interrupt_read(u, STEP_DESCRIPTOR, where + i.NOTIFY_AT, notify)
    if notify & i.NOTIFY_RESERVED:
        return block_interrupt(u, f.DESCRIPTOR_RESERVED)
    vector = (low >> 16) & 0xFF
    word = where + 8 * (vector >> 6)
    bit = vector & 63
    before = load_word(a, word)
    u[INTERRUPT_MERGED] = (before >> bit) & 1
    store_word(a, word, before | (1 << bit if bit < 63 else TOP))
    if notify & i.OUTSTANDING == 0 and (low & i.URGENT or notify & i.SUPPRESSED == 0):
        store_word(a, where + i.NOTIFY_AT, notify | i.OUTSTANDING)
        destination = (notify >> i.NDST_SHIFT) & 0xFFFFFFFF
        if u[INTERRUPT_TABLE] & sp.EIME == 0:
            destination = (destination >> 8) & 0xFF
        u[INTERRUPT_MESSAGE] = apic_address(destination, 0, False)
        u[INTERRUPT_DATA] = (notify >> i.NV_SHIFT) & 0xFF
        u[INTERRUPT_NOTIFIES] = 1
        u[N_NOTIFICATIONS] += 1
    u[INTERRUPT_STATUS] = INTERRUPT_POSTED
    u[N_INTERRUPTS_POSTED] += 1
    return INTERRUPT_POSTED
