"""The parts of the VT-d specification, and how much of each is in the model.

A part that is modelled names the test file that shows it; a test checks that this file cites the part by its title.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from vtsim.iommu.descriptors import DESCRIPTORS
from vtsim.iommu.faults import FAULTS as REASONS
from vtsim.vmcs.coverage import Row, no, part, tables, yes

TRANSLATION: Final = "tests/iommu/test_translation.py"
FAULTS: Final = "tests/iommu/test_faults.py"
INVALIDATION: Final = "tests/iommu/test_invalidation.py"
DEVICE: Final = "tests/iommu/test_device_tlb.py"
PAGE_REQUESTS: Final = "tests/iommu/test_page_requests.py"
BY_REGISTERS: Final = "tests/iommu/test_register_invalidation.py"
REGISTERS: Final = "tests/iommu/test_registers.py"
INTERRUPTS: Final = "tests/iommu/test_interrupt_remapping.py"
POSTED: Final = "tests/platform/test_posted.py"
DMA: Final = "tests/platform/test_dma.py"
TYPES: Final = "tests/iommu/test_memory_types.py"
BUFFERS: Final = "tests/iommu/test_write_buffers.py"
IO_APIC: Final = "tests/iommu/test_io_apic.py"
COMMANDS: Final = "tests/iommu/test_virtual_commands.py"
ASKED: Final = "tests/platform/test_driven_page_requests.py"
DRIVEN: Final = "tests/platform/test_driven.py"

# fmt: off
CHAPTERS: Final[dict[str, tuple[Row, ...]]] = {
    "DMA Remapping": (
        yes("Root Entry",                                      FAULTS),
        yes("Context Entry",                                   FAULTS),
        yes("Scalable-Mode Root Entry",                        FAULTS),
        part("Scalable-Mode Context Entry",                    "of the programmings that are not valid (SCT.4) only page requests without a device-TLB: no others stand in public text", FAULTS),
        yes("Scalable-Mode PASID Directory Entry",             FAULTS),
        yes("Scalable-Mode PASID Table Entry",                 TYPES),
        yes("First-Stage Paging Entries",                      TRANSLATION),
        yes("Second-Stage Paging Entries",                     TYPES),
        yes("First-Stage Translation",                         TRANSLATION),
        yes("Second-Stage Translation",                        TRANSLATION),
        yes("Nested Translation",                              TRANSLATION),
        yes("Pass-Through Translation",                        TRANSLATION),
        yes("Accessed and Dirty Flags",                        TRANSLATION),
        yes("Snoop Behavior",                                  DMA),
        part("Memory Type",                                    "pages only: the unit's own reads of tables cost the same whatever their type", TYPES),
        yes("Interrupt Address Range",                         TRANSLATION),
        yes("Zero-Length Reads",                               TRANSLATION),
        yes("Hardware Support for Protected Memory Regions",   TRANSLATION),
    ),
    "Support for Device-TLBs": (
        part("Device-TLB",                                     "drivers natively invalidate it, with a time-out on the clock; no driver in a VM does, nor one with PASIDs", DEVICE),
        yes("Translation Request",                             FAULTS),
        yes("Translated Request",                              FAULTS),
        yes("Device-TLB Invalidate Descriptor",                INVALIDATION),
        yes("PASID-based-Device-TLB Invalidate Descriptor",    INVALIDATION),
        yes("Device-TLB Invalidation Throttling",              INVALIDATION),
        part("Page Request Queue",                             "drivers natively serve it, from its event; no driver in a VM does, nor one with PASIDs", ASKED),
        yes("Page Request Event",                              PAGE_REQUESTS),
        yes("Page Group Response Descriptor",                  INVALIDATION),
        no("Page Request Private Data",                        "gone since revision 4.0, and in no product: a response that has it stops the queue as reserved"),
    ),
    "Interrupt Remapping": (
        yes("Interrupt Remapping",                             INTERRUPTS),
        yes("Interrupt Remapping Table Entry (IRTE) for Remapped Interrupts", INTERRUPTS),
        yes("Interrupt Remapping Table Entry (IRTE) for Posted Interrupts", INTERRUPTS),
        yes("Posted Interrupt Descriptor (PID)",               INTERRUPTS),
        yes("Interrupt-Posting Hardware Operation",            POSTED),
        yes("Interrupt Entry Cache",                           INTERRUPTS),
        part("Interrupt-Remapping of I/O APICs",               "an I/O APIC for Python; no machine has one", IO_APIC),
    ),
    "Caching Translation Information": (
        yes("Tagging of Cached Translations",                  INVALIDATION),
        yes("Context-cache",                                   INVALIDATION),
        yes("PASID-cache",                                     INVALIDATION),
        yes("IOTLB",                                           TRANSLATION),
        yes("Caches for Paging Structures",                    TRANSLATION),
        yes("Context-Cache Invalidate Descriptor",             INVALIDATION),
        yes("PASID-cache Invalidate Descriptor",               INVALIDATION),
        yes("IOTLB Invalidate Descriptor",                     INVALIDATION),
        yes("PASID-based-IOTLB Invalidate Descriptor",         INVALIDATION),
        yes("Interrupt Entry Cache Invalidate Descriptor",     INVALIDATION),
        yes("Invalidation Wait Descriptor",                    PAGE_REQUESTS),
        yes("Queued Invalidation Error Handling",              INVALIDATION),
        yes("Register-based Invalidation Interface",           BY_REGISTERS),
        yes("Set Root Table Pointer Operation",                REGISTERS),
        yes("Set Interrupt Remapping Table Pointer Operation", INTERRUPTS),
        yes("Write Buffer Flushing",                           BUFFERS),
        yes("Draining of Requests to Memory",                  DRIVEN),
        yes("Caching Mode",                                    BUFFERS),
    ),
    "Translation Faults": (
        yes("Fault Conditions and Remapping Hardware Behavior for Various Requests", FAULTS),
        yes("Non-Recoverable Address Translation Faults",      FAULTS),
        yes("Recoverable Address Translation Faults",          FAULTS),
        yes("Primary Fault Logging",                           FAULTS),
        no("Advanced Fault Logging",                           "not offered, and gone from later editions: CAP.AFL is 0 and cannot be set"),
        yes("Fault Event",                                     FAULTS),
        yes("Interrupt Remapping Fault Conditions",            INTERRUPTS),
    ),
    "Register Descriptions": (
        yes("Software Access to Registers",                    REGISTERS),
        yes("Capability Register",                             FAULTS),
        yes("Extended Capability Register",                    FAULTS),
        yes("Global Command Register",                         REGISTERS),
        yes("Root Table Address Register",                     REGISTERS),
        yes("Context Command Register",                        BY_REGISTERS),
        yes("IOTLB Invalidate Register",                       BY_REGISTERS),
        yes("Fault Status Register",                           FAULTS),
        yes("Fault Recording Registers",                       FAULTS),
        yes("Invalidation Queue Address Register",             INVALIDATION),
        yes("Page Request Status Register",                    PAGE_REQUESTS),
        yes("MTRR Capability Register",                        TYPES),
        no("Performance Monitoring Capability Register",       "not offered: ECAP.PMS is 0 and cannot be set, the registers read as 0"),
        no("Enhanced Command Register",                        "not offered: CAP.ECMDS is 0 and cannot be set, the registers read as 0"),
        yes("Virtual Command Register",                        COMMANDS),
    ),
}
# fmt: on


def rows() -> Iterator[Row]:
    """Every row of every chapter."""
    for chapter in CHAPTERS.values():
        yield from chapter


def page() -> str:
    """The page docs/vtd-coverage.md."""
    lines = [
        "# How much of VT-d is modelled",
        "",
        "Generated from `vtsim/iommu/coverage.py`: each part of the specification by its title. A part that is modelled",
        "names the test that shows it.",
        "",
        *tables(CHAPTERS, "part"),
        "",
        "## Fault reasons",
        "",
        "| code | condition | qualified | what happened | ATS gets |",
        "|---|---|---|---|---|",
    ]
    for fault in REASONS:
        qualified = "yes" if fault.qualified else "no"
        lines.append(
            f"| {fault.code:#04x} | {fault.condition or '–'} | {qualified} | {fault.title} | {fault.answer or '–'} |"
        )
    lines += [
        "",
        "Conditions IR.n are names of this project. Codes 88h and 89h are reserved here: what the specification",
        "makes of them is not transcribed. Which translation requests end as unsupported and which as completer abort",
        "stands in no public text that could be found: here entries that are absent or that refuse make them unsupported,",
        "and entries that cannot be read or are wrong abort them.",
        "",
    ]
    lines += ["## Invalidation descriptors", "", "| type | descriptor | granularities |", "|---|---|---|"]
    for each in DESCRIPTORS:
        lines.append(f"| {each.type} | {each.title} | {', '.join(each.granularities.values())} |")
    return "\n".join(lines) + "\n"
