"""Page requests of devices: into the page request queue, or answered at once.

VT-d: "Page Request Services"; "Page Request Queue"; "Page Request Event".
"""

from __future__ import annotations

from typing import Final

from vtsim.base.jit import Arena, Record, kernel
from vtsim.base.memory import is_memory, store_word
from vtsim.iommu import descriptors as d
from vtsim.iommu import entries as e
from vtsim.iommu import faults as f
from vtsim.iommu import spec as sp
from vtsim.iommu.kernels.second_level import extended
from vtsim.iommu.kernels.unit_entries import find_context, pasid_limit
from vtsim.iommu.kernels.unit_faults import (
    OF_PAGE_REQUEST,
    raise_event,
    record_fault,
    register_low,
    send,
    set_unit_register,
)
from vtsim.iommu.state import (
    ACCESS,
    ADDRESS,
    AT,
    CONTEXT_0,
    FPD_SEEN,
    HAS_PASID,
    N_PAGE_OVERFLOWS,
    N_PAGE_REQUESTS,
    N_QUEUED,
    N_REFUSED,
    N_RESPONSES,
    N_UNQUEUED,
    PAGE_REQUEST_EVENT,
    PAGE_RESPONSE,
    PASID,
    REGISTERS,
    ROOT_TABLE,
    SCALABLE,
    SID,
    STEP_COUNT,
)

# fmt: off
TAKEN, ANSWERED, REFUSED = range(3)      # into the queue; answered by the unit; answered and recorded as a fault
QUEUE_OFFSET: Final = 0x7_FFE0
# fmt: on


@kernel
def ask_for_page(u: Record, a: Arena, sid: int, pasid: int, address: int, access: int, group: int, last: bool) -> int:
    """A device asks that a page be made present; TAKEN, ANSWERED or REFUSED.

    `group`: page-request group index (9 bits), `last`: of its group. The last request of a group is always answered
    once: by software, or by the unit when the queue is full or the request is not allowed. A stop marker, the last of
    its group with a PASID that asks for no right, goes the same way but is never answered.
    """
    u[SID], u[PASID], u[ADDRESS], u[ACCESS], u[AT] = sid, pasid, address, access, 0
    u[HAS_PASID] = 1 if pasid >= 0 else 0
    u[FPD_SEEN] = 0
    u[STEP_COUNT] = 0
    u[N_PAGE_REQUESTS] += 1
    answered = last and (pasid < 0 or access & (sp.READ | sp.WRITE) != 0)
    if register_low(u, sp.GSTS) & sp.TE == 0:
        u[N_UNQUEUED] += 1
        respond(u, sid, pasid, group, d.RESPONSE_INVALID, answered)
        return ANSWERED
    reason = page_request_reason(u, a, sid, pasid)
    if reason != 0:
        u[N_REFUSED] += 1
        record_fault(u, reason, OF_PAGE_REQUEST)
        respond(u, sid, pasid, group, d.RESPONSE_INVALID, answered)
        return REFUSED
    status = register_low(u, sp.PRS)
    queue = u[REGISTERS + (sp.PQA >> 3)]
    size = 0x1000 << (queue & 7)
    tail = u[REGISTERS + (sp.PQT >> 3)] & QUEUE_OFFSET & (size - 1)
    head = u[REGISTERS + (sp.PQH >> 3)] & QUEUE_OFFSET & (size - 1)
    where = (queue & e.POINTER) + tail
    after = (tail + 32) & (size - 1)
    if status & sp.PRS_PRO != 0 or after == head or not is_memory(a, where):
        u[N_UNQUEUED] += 1
        if status & sp.PRS_PRO == 0:
            u[N_PAGE_OVERFLOWS] += 1
            set_unit_register(u, sp.PRS, status | sp.PRS_PRO)
            if status == 0:
                raise_event(u, PAGE_REQUEST_EVENT)
        respond(u, sid, pasid, group, d.RESPONSE_SUCCESS, answered)
        return ANSWERED
    low = d.PAGE_REQUEST_TYPE | sid << 16
    if pasid >= 0:
        low |= 1 << 8 | pasid << 32
        if access & sp.EXECUTE != 0:
            low |= 1 << 52
        if access & sp.PRIVILEGED != 0:
            low |= 1 << 53
    high = (address & ~0xFFF) | group << 3 | (access & (sp.READ | sp.WRITE))
    if last:
        high |= 4
    store_word(a, where, low)
    store_word(a, where + 8, high)
    store_word(a, where + 16, 0)
    store_word(a, where + 24, 0)
    u[REGISTERS + (sp.PQT >> 3)] = after
    u[N_QUEUED] += 1
    if status & sp.PRS_PPR == 0:
        set_unit_register(u, sp.PRS, status | sp.PRS_PPR)
        if status == 0:
            raise_event(u, PAGE_REQUEST_EVENT)
    return TAKEN


@kernel
def page_request_reason(u: Record, a: Arena, sid: int, pasid: int) -> int:
    """Why a page request is not allowed, or 0."""
    mode = (u[ROOT_TABLE] >> 10) & 3
    if mode == sp.TTM_LEGACY:
        return f.LEGACY_PAGE_REQUEST
    if mode == sp.TTM_ABORT and extended(u, sp.ECAP_ADMS):
        return f.ABORT_MODE
    if mode != sp.TTM_SCALABLE or not extended(u, sp.ECAP_SMTS):
        return f.INVALID_ROOT_TABLE
    u[SCALABLE] = 1
    reason = find_context(u, a, sid)
    if reason != 0:
        return reason
    if u[CONTEXT_0] & e.PRE == 0:
        return f.PAGE_REQUEST_DISABLED
    if pasid >= 0 and u[CONTEXT_0] & e.PASIDE == 0:
        return f.PASID_DISABLED
    if pasid >= pasid_limit(u):
        return f.PASID_BEYOND_DIRECTORY
    return 0


@kernel
def respond(u: Record, sid: int, pasid: int, group: int, code: int, answered: bool) -> None:
    """Send a page group response to the device, if the request is one that is answered."""
    if answered:
        u[N_RESPONSES] += 1
        send(u, PAGE_RESPONSE, sid | (pasid & 0x1F_FFFF) << 16, group, code)
