"""Interrupt requests, interrupt remapping table entries and posted-interrupt descriptors: bits, and builders of them.

VT-d: "Interrupt Remapping"; "Interrupt Remapping Table Entry (IRTE) for Remapped Interrupts";
"Interrupt Remapping Table Entry (IRTE) for Posted Interrupts"; "Posted Interrupt Descriptor (PID)".
"""

from __future__ import annotations

from typing import Final

from vtsim.base.memory import signed
from vtsim.iommu.entries import Entry
from vtsim.iommu.spec import bits

# fmt: off
REMAPPED_ENTRY: Final = Entry("Interrupt Remapping Table Entry (IRTE) for Remapped Interrupts", (
    bits("DST:63-32 V:23-16 IM:15 AVAIL:11-8 DLM:7-5 TM:4 RH:3 DM:2 FPD:1 P:0"),
    bits("SVT:19-18 SQ:17-16 SID:15-0"),
))
POSTED_ENTRY: Final = Entry("Interrupt Remapping Table Entry (IRTE) for Posted Interrupts", (
    bits("PDAL:63-38 VV:23-16 IM:15 URG:14 AVAIL:11-8 FPD:1 P:0"),
    bits("PDAH:63-32 SVT:19-18 SQ:17-16 SID:15-0"),
))
DESCRIPTOR: Final = Entry("Posted Interrupt Descriptor (PID)", (
    bits("PIR0:63-0"), bits("PIR1:63-0"), bits("PIR2:63-0"), bits("PIR3:63-0"),
    bits("NDST:63-32 NV:23-16 SN:1 ON:0"),
    (), (), (),
))

# --- what kernels name ------------------------------------------------------------------------------------------------
REMAPPABLE, SUBHANDLE_VALID  = 1 << 4, 1 << 3   # of the address of a request
DATA_RESERVED: Final         = 0xFFFF_0000      # of its data in remappable format
ENTRY_BYTES: Final           = 16
MOST_ENTRIES: Final          = 1 << 16
PRESENT, ENTRY_FPD, POSTED   = 1 << 0, 1 << 1, 1 << 15
LOGICAL, REDIRECT, LEVEL     = 1 << 2, 1 << 3, 1 << 4
URGENT: Final                = 1 << 14
DLM_SHIFT: Final             = 5
(DLM_FIXED, DLM_LOWEST, DLM_SMI, DLM_RESERVED_3, DLM_NMI, DLM_INIT, DLM_RESERVED_6, DLM_EXTINT) = range(8)
XAPIC_DESTINATION: Final     = 0xFF << 40       # with EIME clear only these bits of DST are not reserved
SQ_SHIFT, SVT_SHIFT          = 16, 18
SVT_NONE, SVT_SOURCE, SVT_BUS, SVT_RESERVED = range(4)
QUALIFIERS: Final            = (0xFFFF, 0xFFFB, 0xFFF9, 0xFFF8)   # SQ: the bits of the source-id that count
REMAPPED_RESERVED_0          = REMAPPED_ENTRY.reserved(0)
REMAPPED_RESERVED_1          = REMAPPED_ENTRY.reserved(1)
POSTED_RESERVED_0            = POSTED_ENTRY.reserved(0)
POSTED_RESERVED_1            = POSTED_ENTRY.reserved(1)
DESCRIPTOR_BYTES: Final      = 64
NOTIFY_AT: Final             = 32               # byte offset of the descriptor's word of notification
OUTSTANDING, SUPPRESSED      = 1 << 0, 1 << 1
NV_SHIFT, NDST_SHIFT         = 16, 32
NOTIFY_RESERVED              = DESCRIPTOR.reserved(4)
MESSAGE_LEVEL, MESSAGE_ASSERT = 1 << 15, 1 << 14  # of the data of a message to a local APIC
# fmt: on


def remapped_entry(
    vector: int,
    destination: int,
    *,
    extended: bool = False,
    delivery_mode: int = 0,
    logical: bool = False,
    redirect: bool = False,
    level: bool = False,
    source: int = 0,
    qualifier: int = 0,
    validation: int = SVT_NONE,
    silent: bool = False,
    present: bool = True,
) -> tuple[int, int]:
    """The two words of an IRTE that delivers `vector`; `destination` is an APIC ID, of 32 bits with `extended`."""
    low = (destination if extended else (destination & 0xFF) << 8) << 32 | vector << 16 | delivery_mode << 5
    low |= present | silent << 1 | logical << 2 | redirect << 3 | level << 4
    return signed(low), _source(source, qualifier, validation)


def posted_entry(
    vector: int,
    descriptor: int,
    *,
    urgent: bool = False,
    source: int = 0,
    qualifier: int = 0,
    validation: int = SVT_NONE,
    silent: bool = False,
    present: bool = True,
) -> tuple[int, int]:
    """The two words of an IRTE that posts `vector` into the descriptor at a host address, a multiple of 64."""
    if descriptor % DESCRIPTOR_BYTES:
        raise ValueError(
            f"a posted-interrupt descriptor is aligned to {DESCRIPTOR_BYTES} bytes, {descriptor:#x} is not"
        )
    low = (descriptor & 0xFFFF_FFFF) >> 6 << 38 | vector << 16 | POSTED | urgent << 14 | present | silent << 1
    return signed(low), signed(_source(source, qualifier, validation) | descriptor >> 32 << 32)


def _source(source: int, qualifier: int, validation: int) -> int:
    return source | qualifier << SQ_SHIFT | validation << SVT_SHIFT


def remappable_request(handle: int, subhandle: int | None = None) -> tuple[int, int]:
    """Address and data of an MSI in remappable format."""
    address = 0xFEE0_0000 | (handle & 0x7FFF) << 5 | handle >> 15 << 2 | REMAPPABLE
    if subhandle is None:
        return address, 0
    return address | SUBHANDLE_VALID, subhandle


def compatible_request(vector: int, destination: int) -> tuple[int, int]:
    """Address and data of an MSI in compatibility format: fixed delivery to the local APIC of an 8-bit ID."""
    return 0xFEE0_0000 | destination << 12, vector
