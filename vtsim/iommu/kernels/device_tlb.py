"""A device with a device-TLB: it asks for translations (ATS), keeps them, and asks for pages that are not there (PRI).

A device is one vector `t` with the cache slots of a unit: entries are tagged by address and PASID, one for each page
size. What it keeps is believed: its translated requests are not translated again.

VT-d: "Device-TLB"; "Translation Request"; "Translated Request".
"""

from __future__ import annotations

from typing import Final

from vtsim.base.jit import Arena, Record, kernel
from vtsim.iommu import spec as sp
from vtsim.iommu.kernels.page_requests import ask_for_page
from vtsim.iommu.kernels.requests import translate_request
from vtsim.iommu.kernels.unit_caches import drop_at, held_by_unit, make_room
from vtsim.iommu.state import (
    COMPLETED,
    DATA,
    DEVICE_CACHE,
    DEVICE_PRI,
    DEVICE_SID,
    ENTRY_WORDS,
    HPA,
    RIGHTS,
    SETS,
    SHIFT,
    SHIFT_ALONE,
    STAMP,
    TAG,
    TAG_MORE,
    WAYS,
)

# fmt: off
(DONE, REFUSED_THERE, WITHOUT_RIGHT, PAGE_ASKED) = range(4)
ANY_PASID: Final = -2
PRIVILEGE_TAG: Final = 22        # in the second tag: PASID + 1, privilege, page size
SIZE_TAG: Final = 40
# fmt: on


@kernel
def device_access(t: Record, u: Record, a: Arena, pasid: int, address: int, size: int, access: int) -> int:
    """An access of the device: DONE (address in HPA of `u`), REFUSED_THERE by the unit, WITHOUT_RIGHT, PAGE_ASKED."""
    hpa = known_to_device(t, pasid, address, access)
    if hpa < 0:
        status = ask_for_translation(t, u, a, pasid, address, size, access)
        if status == WITHOUT_RIGHT and t[DEVICE_PRI] != 0:
            ask_for_page(u, a, t[DEVICE_SID], pasid, address, access, 0, True)
            return PAGE_ASKED
        if status != DONE:
            return status
        hpa = u[HPA]
    status = translate_request(
        u, a, t[DEVICE_SID], sp.NO_PASID, hpa, size, access & ~sp.PRIVILEGED, sp.TRANSLATED
    )  # fmt: skip
    return DONE if status == COMPLETED else REFUSED_THERE


@kernel
def tag_of(pasid: int, access: int) -> int:
    """The second tag of an entry, but for the page size."""
    return (pasid + 1) | (access & sp.PRIVILEGED) << PRIVILEGE_TAG


@kernel
def known_to_device(t: Record, pasid: int, address: int, access: int) -> int:
    """The host address that the device-TLB holds for an access, or -1."""
    wanted = access & (sp.READ | sp.WRITE | sp.EXECUTE)
    for number in range(3):
        shift = 12 + 9 * number
        known = held_by_unit(t, DEVICE_CACHE, address >> shift, tag_of(pasid, access) | shift << SIZE_TAG)
        if known >= 0 and wanted & ~t[known + DATA + 1] == 0:
            return t[known + DATA] | (address & ((1 << shift) - 1))
    return -1


@kernel
def ask_for_translation(t: Record, u: Record, a: Arena, pasid: int, address: int, size: int, access: int) -> int:
    """A translation request: DONE (address in HPA of `u`, and kept), REFUSED_THERE, WITHOUT_RIGHT."""
    if translate_request(u, a, t[DEVICE_SID], pasid, address, size, access, sp.TRANSLATION_REQUEST) != COMPLETED:
        return REFUSED_THERE
    rights, shift, hpa = u[RIGHTS], u[SHIFT] & SHIFT_ALONE, u[HPA]
    if access & (sp.READ | sp.WRITE | sp.EXECUTE) & ~rights != 0:
        return WITHOUT_RIGHT
    at = make_room(t, DEVICE_CACHE, address >> shift, tag_of(pasid, access) | shift << SIZE_TAG)
    if at >= 0:
        t[at + DATA] = hpa & ~((1 << shift) - 1)
        t[at + DATA + 1] = rights
    return DONE


@kernel
def device_forget(t: Record, word: int, pasid: int) -> None:
    """Obey a device-TLB invalidation: `word` is an address with S in bit 0, which makes trailing ones a size.

    `pasid`: NO_PASID reaches what was translated without one, ANY_PASID everything.
    """
    pages = 1
    if word & 1 != 0:
        bits = 1
        while bits < 51 and (word >> (11 + bits)) & 1 != 0:
            bits += 1
        pages = 1 << bits
    first = (word >> 12) & ~(pages - 1)
    at = t[DEVICE_CACHE]
    for _ in range(t[DEVICE_CACHE + SETS] * t[DEVICE_CACHE + WAYS]):
        if t[at + STAMP] != 0 and (pasid == ANY_PASID or t[at + TAG_MORE] & 0x1F_FFFF == pasid + 1):
            down = (t[at + TAG_MORE] >> SIZE_TAG) - 12
            if t[at + TAG] >= first >> down and t[at + TAG] <= (first + pages - 1) >> down:
                drop_at(t, at)
        at += ENTRY_WORDS
