"""Which memory type a page has: cached, uncacheable or write-combining.

SDM: "Memory Type Used for Translated Guest-Physical Addresses"; "Programming the PAT";
"Selecting Memory Types for Pentium III and More Recent Processor Families".
Not modelled: types of paging structures but EPT's own (their PCD and PWT bits, and those of CR3); ranges of MTRRs,
which hold values only: natively memory is write-back as far as they go; the no-fill mode of CR0.CD outside EPT; what
the write-through and write-protected types cost more than write-back; fetches from memory that is not cached.
"""

from __future__ import annotations

from vtsim.base.jit import Record, kernel
from vtsim.cpu.slots import CR0, PAT
from vtsim.ept import memory_types as types
from vtsim.ept.spec import EPT_TYPE, PTE_PAT, PTE_PAT_LARGE, PTE_WRITE_THROUGH

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
