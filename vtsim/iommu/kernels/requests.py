"""One DMA request: what the remapping unit does with it, from the register file to the page.

A request completes with an address, is blocked with a fault reason, is an interrupt request, or is dropped without a
record (malformed, refused while remapping is off, in a protected memory region): exactly one of the four.

Not modelled: isochronous traffic.

VT-d: "DMA Remapping"; "Fault Conditions and Remapping Hardware Behavior for Various Requests";
"Interrupt Address Range"; "Handling Requests to Reserved System Memory".
"""

from __future__ import annotations

from vtsim.base.jit import Arena, Record, kernel
from vtsim.iommu import entries as e
from vtsim.iommu import faults as f
from vtsim.iommu import spec as sp
from vtsim.iommu.kernels.first_level import walk_first
from vtsim.iommu.kernels.memory_types import page_type, untranslated_type
from vtsim.iommu.kernels.second_level import (
    IS_DIRTY,
    MAY_EXECUTE,
    MAY_READ,
    MAY_WRITE,
    NOTHING_PERMITTED,
    SECOND_SHIFT,
    SNOOPED,
    USER_PAGE,
    capable,
    extended,
    walk_second,
)
from vtsim.iommu.kernels.unit_caches import held_by_unit, make_room, refused_before, remember_refusal
from vtsim.iommu.kernels.unit_entries import SERVED_4K, find_context, find_pasid, pasid_limit
from vtsim.iommu.kernels.unit_faults import OF_DMA, is_in, record_fault, register_low
from vtsim.iommu.kernels.unit_memory import commit_pending, note_step
from vtsim.iommu.state import (
    ACCESS,
    ADDRESS,
    ANSWER,
    AT,
    BLOCKED,
    CACHE_WORDS,
    COMPLETED,
    CONTEXT_0,
    CONTEXT_1,
    DATA,
    DOMAIN,
    DROPPED,
    FPD_SEEN,
    HAS_PASID,
    HOST_WIDTH,
    HPA,
    INTERRUPT,
    IOTLB_4K,
    IOTLB_SIZES,
    N_BLOCKED,
    N_COMPLETED,
    N_DROPPED,
    N_INTERRUPTS,
    N_IOTLB_HITS,
    N_IOTLB_MISSES,
    N_REQUESTS,
    N_WALKS,
    PASID,
    PASID_0,
    PASID_1,
    PASID_2,
    PENDING_COUNT,
    PROTECTING,
    READS_ROOT,
    READS_SECOND,
    REGISTERS,
    RIGHTS,
    ROOT_TABLE,
    SCALABLE,
    SERVED,
    SETS,
    SHIFT,
    SID,
    SIZE,
    SNOOP,
    STATUS,
    STEP_CACHE,
    STEP_COUNT,
    TAG_MORE_NOW,
    TYPE,
    TYPE_SHIFT,
    WALK_HPA,
    WALK_RIGHTS,
    WALK_SHIFT,
)

# fmt: off
WITH_PASID = 1 << 36             # in the second tag of what is tagged by PASID: domain | PASID << 16 | this
A0, A1, A2 = f.ABORTED
W0, W1, W2 = f.WITHOUT_RIGHTS
PAGE = 0xFFF
# fmt: on


@kernel
def translate_request(u: Record, a: Arena, sid: int, pasid: int, address: int, size: int, access: int, at: int) -> int:
    """Translate one request; its end is returned and in STATUS, the rest of the answer in the slots that follow it.

    `pasid`: NO_PASID without a PASID prefix. `size`: bytes, 0 for a zero-length read; a request crosses no 4-KiB
    boundary. `access`: READ, WRITE, EXECUTE, PRIVILEGED, ATOMIC. `at`: UNTRANSLATED, TRANSLATION_REQUEST, TRANSLATED.
    """
    for slot in range(STATUS, ANSWER + 1):
        u[slot] = 0
    u[SID] = sid & 0xFFFF
    u[PASID] = pasid
    u[HAS_PASID] = 1 if pasid >= 0 else 0
    u[ADDRESS] = address
    u[SIZE] = size
    u[ACCESS] = access
    u[AT] = at
    u[FPD_SEEN] = 0
    u[PENDING_COUNT] = 0
    u[STEP_COUNT] = 0
    u[N_REQUESTS] += 1
    if size < 0 or (address & PAGE) + size > PAGE + 1 or at < 0 or at > 2 or pasid >= 1 << 20:
        return end_request(u, DROPPED)
    if at == sp.UNTRANSLATED and pasid < 0 and in_interrupt_range(address):
        if access & sp.WRITE != 0 and size == 4 and address & 3 == 0:
            return end_request(u, INTERRUPT)
        return end_request(u, DROPPED)
    if register_low(u, sp.GSTS) & sp.TE == 0:
        return pass_by(u, pasid, address, at)
    reason = remap(u, a, sid & 0xFFFF, pasid, address, access, at)
    if reason == 0:
        if u[PROTECTING] != 0 and at != sp.TRANSLATION_REQUEST and is_protected(u, u[HPA]):
            answer(u, 0, 0, 0)
            return end_request(u, DROPPED)
        commit_pending(u, a)
        return end_request(u, COMPLETED)
    return end_faulty(u, reason)


@kernel
def end_request(u: Record, status: int) -> int:
    """Count how a request ended."""
    u[STATUS] = status
    if status == COMPLETED:
        u[N_COMPLETED] += 1
    elif status == BLOCKED:
        u[N_BLOCKED] += 1
    elif status == INTERRUPT:
        u[N_INTERRUPTS] += 1
    else:
        u[N_DROPPED] += 1
    return status


@kernel
def end_faulty(u: Record, reason: int) -> int:
    """A request without a translation: blocked and recorded, or a translation request answered without rights."""
    u[HPA] = 0
    u[RIGHTS] = 0
    u[SHIFT] = 12
    if u[AT] == sp.TRANSLATION_REQUEST:
        if is_in(reason, W0, W1, W2):
            return end_request(u, COMPLETED)
        u[ANSWER] = f.ANSWER_CA if is_in(reason, A0, A1, A2) else f.ANSWER_UR
    record_fault(u, reason, OF_DMA)
    return end_request(u, BLOCKED)


@kernel
def in_interrupt_range(address: int) -> bool:
    """Is an address in the range where writes are interrupt requests?"""
    return address >= sp.INTERRUPT_FIRST and address <= sp.INTERRUPT_LAST


@kernel
def is_protected(u: Record, address: int) -> bool:
    """Is an address in a protected memory region? Units of major version 2 and later block all requests there."""
    if u[PROTECTING] == 0:
        return False
    megabytes = 0x1F_FFFF
    low = register_low(u, sp.PLMBASE)
    if capable(u, sp.CAP_PLMR) and address >= low and address <= register_low(u, sp.PLMLIMIT) | megabytes:
        return True
    base, limit = u[REGISTERS + (sp.PHMBASE >> 3)], u[REGISTERS + (sp.PHMLIMIT >> 3)]
    return capable(u, sp.CAP_PHMR) and address >= base and address <= limit | megabytes


@kernel
def pass_by(u: Record, pasid: int, address: int, at: int) -> int:
    """A request while DMA remapping is off: an ordinary one passes, any that needs translation is refused."""
    if at != sp.UNTRANSLATED or pasid >= 0 or address >> u[HOST_WIDTH] != 0 or is_protected(u, address):
        return end_request(u, DROPPED)
    answer(u, address, sp.READ | sp.WRITE, 12)
    return end_request(u, COMPLETED)


@kernel
def answer(u: Record, hpa: int, rights: int, shift: int) -> None:
    """The address, the rights and the page size of a request that completes."""
    u[HPA] = hpa
    u[RIGHTS] = rights
    u[SHIFT] = shift


@kernel
def untouched(u: Record, address: int, beyond: int, interrupt: int) -> int:
    """A request whose address is used as it is; a fault reason, or 0."""
    if address >> u[HOST_WIDTH] != 0:
        return beyond
    if in_interrupt_range(address):
        return interrupt
    answer(u, address, sp.READ | sp.WRITE, 12)
    if u[SCALABLE] != 0 and extended(u, sp.ECAP_MTS):
        disabled = u[AT] != sp.TRANSLATED and u[PASID_1] & e.CD != 0
        u[SHIFT] |= 1 + untranslated_type(u, address, disabled) << TYPE_SHIFT
    return 0


@kernel
def remap(u: Record, a: Arena, sid: int, pasid: int, address: int, access: int, at: int) -> int:
    """Translate a request by the mode that the root table address register chose; a fault reason, or 0."""
    mode = (u[ROOT_TABLE] >> 10) & 3
    if mode == sp.TTM_LEGACY:
        u[SCALABLE] = 0
        if pasid >= 0:
            return f.LEGACY_PASID
        return remap_legacy(u, a, sid, address, access, at)
    if mode == sp.TTM_SCALABLE and extended(u, sp.ECAP_SMTS):
        u[SCALABLE] = 1
        return remap_scalable(u, a, sid, pasid, address, access, at)
    if mode == sp.TTM_ABORT and extended(u, sp.ECAP_ADMS):
        return f.ABORT_MODE
    return f.INVALID_ROOT_TABLE


@kernel
def guest_width(u: Record) -> int:
    """The maximum guest address width in bits."""
    return ((u[REGISTERS + (sp.CAP >> 3)] >> sp.CAP_MGAW) & 0x3F) + 1


@kernel
def remap_legacy(u: Record, a: Arena, sid: int, address: int, access: int, at: int) -> int:
    """Translate by root and context entries; a fault reason, or 0."""
    reason = find_context(u, a, sid)
    if reason != 0:
        return reason
    kind = (u[CONTEXT_0] >> e.TT_SHIFT) & 3
    if at != sp.UNTRANSLATED and kind != e.TT_ALL:
        return f.TYPE_BLOCKED
    if at == sp.TRANSLATED or kind == e.TT_PASS_THROUGH:
        return untouched(u, address, f.BEYOND_MGAW, f.INTERRUPT_ADDRESS)
    width = (u[CONTEXT_1] & e.CONTEXT_AW) * 9 + 30
    if address >> min(width, guest_width(u)) != 0:
        return f.BEYOND_MGAW
    u[DOMAIN] = (u[CONTEXT_1] >> e.CONTEXT_DID) & 0xFFFF
    u[TAG_MORE_NOW] = u[DOMAIN]
    u[TYPE] = e.PGTT_SECOND
    return translate_page(u, a, u[CONTEXT_0] & e.POINTER, (u[CONTEXT_1] & e.CONTEXT_AW) + 2, address, access)


@kernel
def remap_scalable(u: Record, a: Arena, sid: int, pasid: int, address: int, access: int, at: int) -> int:
    """Translate by scalable-mode root, context and PASID entries; a fault reason, or 0."""
    reason = find_context(u, a, sid)
    if reason != 0:
        return reason
    if at != sp.UNTRANSLATED and u[CONTEXT_0] & e.DTE == 0:
        return f.DEVICE_TLB_DISABLED
    if pasid >= 0 and u[CONTEXT_0] & e.PASIDE == 0:
        return f.PASID_DISABLED
    if at == sp.TRANSLATED:
        return untouched(u, address, f.SCALABLE_BEYOND_MGAW, f.SCALABLE_INTERRUPT_ADDRESS)
    if pasid >= 0:
        if pasid >= pasid_limit(u):
            return f.PASID_BEYOND_DIRECTORY
    else:
        pasid = u[CONTEXT_1] & e.RID_PASID
        if pasid >= pasid_limit(u):
            return f.RID_PASID_BEYOND_DIRECTORY
        access &= ~(sp.EXECUTE | sp.PRIVILEGED)
        if u[CONTEXT_1] & e.RID_PRIV != 0:
            access |= sp.PRIVILEGED
    reason = find_pasid(u, a, sid, pasid)
    if reason != 0:
        return reason
    if access & sp.EXECUTE != 0 and u[PASID_2] & e.ERE == 0:
        return f.EXECUTE_DISABLED
    if access & sp.PRIVILEGED != 0 and u[PASID_2] & e.SRE == 0:
        return f.SUPERVISOR_DISABLED
    u[TYPE] = (u[PASID_0] >> e.PGTT_SHIFT) & 7
    u[DOMAIN] = u[PASID_1] & 0xFFFF
    if u[TYPE] == e.PGTT_PASS_THROUGH:
        return untouched(u, address, f.SCALABLE_BEYOND_MGAW, f.SCALABLE_INTERRUPT_ADDRESS)
    levels = ((u[PASID_0] >> e.PASID_AW_SHIFT) & 7) + 2
    if u[TYPE] == e.PGTT_SECOND:
        if address >> min(12 + 9 * levels, guest_width(u)) != 0:
            return f.SCALABLE_BEYOND_MGAW
        u[TAG_MORE_NOW] = u[DOMAIN]
    else:
        u[TAG_MORE_NOW] = u[DOMAIN] | pasid << 16 | WITH_PASID
    return translate_page(u, a, u[PASID_0] & e.POINTER, levels, address, access)


@kernel
def translate_page(u: Record, a: Arena, table: int, levels: int, address: int, access: int) -> int:
    """Find the page in the IOTLBs, else by a walk; an entry that denies what is asked is walked again; reason or 0.

    A translation request without PASID is told of no page in the interrupt address range, whatever tables map there:
    such writes are interrupt requests.
    """
    if u[AT] == sp.TRANSLATION_REQUEST and u[HAS_PASID] == 0 and in_interrupt_range(address):
        return f.SCALABLE_INTERRUPT_ADDRESS if u[SCALABLE] != 0 else f.INTERRUPT_ADDRESS
    more = u[TAG_MORE_NOW]
    wanted = access & (sp.READ | sp.WRITE | sp.EXECUTE)
    if access & sp.ATOMIC != 0:
        wanted |= sp.READ | sp.WRITE
    for size in range(3):
        if u[IOTLB_SIZES] & 1 << size == 0:
            continue
        shift = 12 + 9 * size
        known = held_by_unit(u, IOTLB_4K + size * CACHE_WORDS, address >> shift, more)
        if known < 0:
            continue
        data = u[known + DATA]
        allowed = allowed_by(u, data, access)
        if wanted & ~allowed != 0 or (wanted & sp.WRITE != 0 and data & IS_DIRTY == 0):
            break
        u[N_IOTLB_HITS] += 1
        u[SERVED] |= SERVED_4K << size
        note_step(u, STEP_CACHE, 0, IOTLB_4K + size * CACHE_WORDS, data)
        u[SNOOP] = 1 if data & SNOOPED != 0 else 0
        answer(u, (data & ~PAGE) | (address & ((1 << shift) - 1)), allowed, u[known + DATA + 1])
        return 0
    u[N_IOTLB_MISSES] += 1
    u[N_WALKS] += 1
    asked = u[AT] == sp.TRANSLATION_REQUEST
    writes = wanted & sp.WRITE != 0
    if u[TYPE] == e.PGTT_SECOND:
        reason = refused_before(u, IOTLB_4K, address >> 12, more)
        if reason == 0:
            reason = walk_second(u, a, table, levels, address, writes)
            if reason == NOTHING_PERMITTED or reason == f.SECOND_LEVEL_RESERVED or reason == f.SCALABLE_SECOND_RESERVED:
                remember_refusal(u, IOTLB_4K, address >> 12, more, 0, reason)
        if reason == NOTHING_PERMITTED:
            if u[SCALABLE] != 0:
                return f.SCALABLE_SECOND_NOT_PRESENT
            return f.NO_WRITE if writes else f.NO_READ
    else:
        reason = walk_first(u, a, address, writes, access & sp.PRIVILEGED == 0)
    if reason != 0:
        return reason
    if u[WALK_HPA] >> u[HOST_WIDTH] != 0:
        return f.SCALABLE_BEYOND_MGAW if u[SCALABLE] != 0 else f.BEYOND_MGAW
    if in_interrupt_range(u[WALK_HPA]):
        return f.SCALABLE_INTERRUPT_ADDRESS if u[SCALABLE] != 0 else f.INTERRUPT_ADDRESS
    data = u[WALK_RIGHTS]
    allowed = allowed_by(u, data, access)
    if u[SIZE] == 0 and not asked and capable(u, sp.CAP_ZLR) and allowed & sp.WRITE != 0:
        wanted &= ~sp.READ  # a zero-length read needs no right to read
    reason = denied(u, data, wanted & ~allowed, access)
    if reason != 0 and (not asked or allowed == 0):
        return reason
    u[SNOOP] = 1 if data & SNOOPED != 0 else 0
    answer(u, u[WALK_HPA], allowed, u[WALK_SHIFT])
    if u[SCALABLE] != 0 and extended(u, sp.ECAP_MTS):
        u[SHIFT] |= 1 + page_type(u, u[WALK_HPA]) << TYPE_SHIFT
    keep_translation(u, address, more, data)
    return 0


@kernel
def allowed_by(u: Record, data: int, access: int) -> int:
    """What the rights of a page allow to a request of this privilege: READ, WRITE, EXECUTE."""
    if u[TYPE] == e.PGTT_SECOND:
        return data & (MAY_READ | MAY_WRITE | MAY_EXECUTE)
    user = access & sp.PRIVILEGED == 0
    if user and data & USER_PAGE == 0:
        return 0
    allowed = sp.READ
    if data & MAY_WRITE != 0 or (not user and u[PASID_2] & e.WPE == 0):
        allowed |= sp.WRITE
    if data & MAY_EXECUTE != 0 and (user or u[PASID_2] & e.SMEP == 0 or data & USER_PAGE == 0):
        allowed |= sp.EXECUTE
    if u[TYPE] == e.PGTT_NESTED:
        allowed &= data >> SECOND_SHIFT
    return allowed


@kernel
def denied(u: Record, data: int, lacking: int, access: int) -> int:
    """The fault reason of rights that are lacking, or 0."""
    if lacking == 0:
        return 0
    if u[SCALABLE] == 0:
        return f.NO_WRITE if lacking & sp.WRITE != 0 else f.NO_READ
    if u[TYPE] != e.PGTT_SECOND and access & sp.PRIVILEGED == 0 and data & USER_PAGE == 0:
        return f.SUPERVISOR_PAGE
    if lacking & sp.WRITE != 0:
        return f.SCALABLE_NO_WRITE
    if lacking & sp.READ != 0:
        return f.SCALABLE_NO_READ
    return f.NO_EXECUTE


@kernel
def keep_translation(u: Record, address: int, more: int, data: int) -> None:
    """Fill the IOTLB of the page's size; where there is none, that of the next smaller size with the part asked for."""
    for size in range((u[WALK_SHIFT] - 12) // 9, -1, -1):
        cache = IOTLB_4K + size * CACHE_WORDS
        if u[cache + SETS] == 0:
            continue
        shift = 12 + 9 * size
        at = make_room(u, cache, address >> shift, more)
        if at >= 0:
            u[at + DATA] = (u[WALK_HPA] & ~((1 << shift) - 1)) | data
            u[at + DATA + 1] = u[SHIFT]
            u[IOTLB_SIZES] |= 1 << size
        return


@kernel
def reads_of(u: Record) -> int:
    """Memory reads of the unit for the last request."""
    reads = 0
    for slot in range(READS_ROOT, READS_SECOND + 1):
        reads += u[slot]
    return reads
