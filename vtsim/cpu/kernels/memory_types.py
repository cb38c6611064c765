"""Which memory type a page has: cached, uncacheable or write-combining.

The type that a table is read with is known when the walk comes to it, by the PCD and PWT bits of what leads to it: CR3,
a PDPTE register or an entry. Paging-structure caches keep it beside the table's address, so that it may be out of date
as the address may be. Under EPT the type of the page that the table lies in counts too, unless it is found by such a
cache.

SDM: "Memory Type Used for Translated Guest-Physical Addresses"; "Programming the PAT";
"Paging and Memory Typing When the PAT is Supported (Pentium III and More Recent Processor Families)";
"Caching Paging-Related Information about Memory Typing";
"Selecting Memory Types for Pentium III and More Recent Processor Families".
Not modelled: ranges of MTRRs, which hold values only: natively memory is write-back as far as they go; the no-fill mode
of CR0.CD outside EPT; what the write-through and write-protected types cost more than write-back; the bus lock of
setting a flag in a table that is not cached.
"""

from __future__ import annotations

from vtsim.base.jit import Record, kernel
from vtsim.cpu.kernels.contexts import CR4_PCIDE
from vtsim.cpu.slots import CR0, CR3, CR4, PAT
from vtsim.ept import memory_types as types
from vtsim.ept.spec import ADDRESS, EPT_TYPE, PTE_PAT, PTE_PAT_LARGE, PTE_WRITE_THROUGH

# fmt: off
# what a translation says of its page: bits 10:9 of a data word, 9:6 of a guest-physical one as they are in the entry
UNCACHEABLE, COMBINING = 1, 2
DATA_TYPE, HOST_TYPE = 9, 6
CACHES_OFF: int = 1 << 30  # CR0.CD
# TLBs keep pages that are not cached by 4 KiB, under tags of a fourth size: what is found under another one is cached
OF_UNCACHED: int = 3
# fmt: on


@kernel
def host_type(entry: int) -> int:
    """What a guest-physical translation keeps of an EPT entry that maps a page: memory type, and whether PAT counts."""
    return ((entry >> EPT_TYPE) & 15) << HOST_TYPE


@kernel
def pat_type(m: Record, entry: int, large: bool) -> int:
    """The memory type that the PAT entry selected by an entry that maps a page has."""
    index = (entry >> PTE_WRITE_THROUGH) & 3 | ((entry >> (PTE_PAT_LARGE if large else PTE_PAT)) & 1) << 2
    return (m[PAT] >> (8 * index)) & 7


@kernel
def table_uncached(m: Record, leads: int, host: int) -> bool:
    """Is a table cached nowhere that an entry or CR3 (`leads`) leads to? `host` as `data_type` has it."""
    kind = (m[PAT] >> (8 * ((leads >> PTE_WRITE_THROUGH) & 3))) & 7
    return data_type(m, kind, host) != 0


@kernel
def root_leads(m: Record) -> int:
    """CR3 as what leads to a table in IA-32e mode: with PCIDs its low bits say nothing of types."""
    return m[CR3] & ADDRESS if m[CR4] & CR4_PCIDE else m[CR3]


@kernel
def data_type(m: Record, kind: int, host: int) -> int:
    """What a data word says of a page of a PAT type, through EPT in a guest-physical translation, else -1."""
    if host >= 0:
        if m[CR0] & CACHES_OFF:
            return UNCACHEABLE << DATA_TYPE
        outer = host >> HOST_TYPE
        kind = types.WB if outer & 8 else kind
        kind = (types.EFFECTIVE[outer & 7] >> (4 * kind)) & 15
    if kind == types.WC:
        return COMBINING << DATA_TYPE
    return UNCACHEABLE << DATA_TYPE if kind == types.UC or kind == types.UC_MINUS else 0
