"""Every descriptor of the invalidation queue and of the page request queue, with its fields and granularities.

The type of an invalidation descriptor stands in bits 11:9 and 3:0. Bits without a field are reserved: one that is set
stops the queue. Descriptors of 256 bits have two more words, all reserved.

VT-d: "Queued Invalidation Interface"; "Page Request Descriptor"; "Page Group Response Descriptor".
"""

from __future__ import annotations

from typing import Final

import attrs

from vtsim.base.memory import signed
from vtsim.iommu.spec import Bits, bits


@attrs.frozen
class Descriptor:
    """An invalidation descriptor: type, name, title, fields of words 0 and 1, granularities by number, needs."""

    type: int
    name: str
    title: str
    low: tuple[Bits, ...]
    high: tuple[Bits, ...]
    granularities: dict[int, str] = attrs.field(factory=dict)
    scalable: bool = False  # only in scalable mode, else its type is not valid

    def reserved(self, word: int) -> int:
        """The bits of word 0 or 1 that no field names, as a signed word."""
        named = 0
        for field in (self.low, self.high)[word]:
            named |= field.mask
        return signed(~named)


# fmt: off
(CONTEXT_CACHE, IOTLB_TYPE, DEVICE_TLB, INTERRUPT_ENTRY, WAIT, PASID_IOTLB, PASID_CACHE, PASID_DEVICE_TLB,
 PAGE_GROUP_RESPONSE) = range(1, 10)

TYPE = "TYPE:3-0 TYPE_HIGH:11-9 "
DESCRIPTORS: Final[tuple[Descriptor, ...]] = (
    Descriptor(CONTEXT_CACHE, "CONTEXT_CACHE", "Context-Cache Invalidate Descriptor",
               bits(TYPE + "G:5-4 DID:31-16 SID:47-32 FM:49-48"), (),
               {1: "global", 2: "domain-selective", 3: "device-selective"}),
    Descriptor(IOTLB_TYPE, "IOTLB", "IOTLB Invalidate Descriptor",
               bits(TYPE + "G:5-4 DW:6 DR:7 DID:31-16"), bits("AM:5-0 IH:6 ADDR:63-12"),
               {1: "global", 2: "domain-selective", 3: "page-selective-within-domain"}),
    Descriptor(DEVICE_TLB, "DEVICE_TLB", "Device-TLB Invalidate Descriptor",
               bits(TYPE + "PFSID_LOW:15-12 MIP:20-16 SID:47-32 PFSID_HIGH:63-52"), bits("S:0 ADDR:63-12"),
               {0: "address range"}),
    Descriptor(INTERRUPT_ENTRY, "INTERRUPT_ENTRY", "Interrupt Entry Cache Invalidate Descriptor",
               bits(TYPE + "G:4 IM:31-27 IIDX:47-32"), (),
               {0: "global", 1: "index-selective"}),
    Descriptor(WAIT, "WAIT", "Invalidation Wait Descriptor",
               bits(TYPE + "IF:4 SW:5 FN:6 PD:7 STDATA:63-32"), bits("STADDR:63-2"),
               {0: "wait"}),
    Descriptor(PASID_IOTLB, "PASID_IOTLB", "PASID-based-IOTLB Invalidate Descriptor",
               bits(TYPE + "G:5-4 DID:31-16 PASID:51-32"), bits("AM:5-0 IH:6 ADDR:63-12"),
               {2: "PASID-selective", 3: "page-selective-within-PASID"}, True),
    Descriptor(PASID_CACHE, "PASID_CACHE", "PASID-cache Invalidate Descriptor",
               bits(TYPE + "G:5-4 DID:31-16 PASID:51-32"), (),
               {0: "domain-selective", 1: "PASID-selective", 3: "global"}, True),
    Descriptor(PASID_DEVICE_TLB, "PASID_DEVICE_TLB", "PASID-based-Device-TLB Invalidate Descriptor",
               bits(TYPE + "MIP:8-4 PFSID_LOW:15-12 SID:31-16 PASID:51-32 PFSID_HIGH:63-52"),
               bits("G:0 S:11 ADDR:63-12"),
               {0: "PASID-selective", 1: "all PASIDs"}, True),
    Descriptor(PAGE_GROUP_RESPONSE, "PAGE_GROUP_RESPONSE", "Page Group Response Descriptor",
               bits(TYPE + "PP:4 RC:15-12 RID:31-16 PASID:51-32"), bits("PRGI:11-3 LPIG:2"),
               {0: "response"}, True),
)

DRAIN_PAGE_REQUESTS: Final = 1 << 7  # PD of a wait: reserved where ECAP does not say PDS

# Page request descriptors: 32 bytes that the remapping unit writes to the page request queue.
PAGE_REQUEST_LOW: Final  = bits("TYPE:7-0 PP:8 RID:31-16 PASID:51-32 EXE:52 PM:53")
PAGE_REQUEST_HIGH: Final = bits("R:0 W:1 LPIG:2 PRGI:11-3 ADDR:63-12")
PAGE_REQUEST_TYPE: Final = 1
RESPONSE_SUCCESS, RESPONSE_INVALID, RESPONSE_FAILURE = 0, 1, 15
# fmt: on

BY_TYPE: Final = {each.type: each for each in DESCRIPTORS}
HIGHEST_TYPE: Final = max(BY_TYPE)


def descriptor(name: str, **fields: int) -> tuple[int, int]:
    """The two signed words of a descriptor with these fields; an unknown or too large field is a ValueError."""
    row = next(each for each in DESCRIPTORS if each.name == name)
    words = [row.type & 0xF | (row.type >> 4) << 9, 0]
    places = {each.name: (word, each) for word, part in enumerate((row.low, row.high)) for each in part}
    for field, value in fields.items():
        if field not in places or not 0 <= value <= places[field][1].mask >> places[field][1].low:
            raise ValueError(f"{row.title} has no field {field} = {value:#x}")
        word, place = places[field]
        words[word] |= value << place.low
    return signed(words[0]), signed(words[1])
