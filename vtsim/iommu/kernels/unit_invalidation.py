"""What each granularity of invalidation removes, whichever interface asked for it.

Each begins with a flush of the write buffers, where the unit has to have them flushed.
More may be removed than was asked, never less: a context-cache invalidation by domain in scalable mode, where entries
have no domain, removes all.

VT-d: "Invalidation of Translation Caches"; "Context-cache Invalidation"; "PASID-cache Invalidation";
"IOTLB Invalidation".
"""

from __future__ import annotations

from typing import Final

from vtsim.base.jit import Record, kernel
from vtsim.iommu import entries as e
from vtsim.iommu import spec as sp
from vtsim.iommu.kernels.requests import WITH_PASID
from vtsim.iommu.kernels.second_level import capable
from vtsim.iommu.kernels.unit_caches import NEGATIVE, drop_all, drop_at, drop_refusals, drop_where
from vtsim.iommu.kernels.unit_memory import flush_writes
from vtsim.iommu.state import (
    CACHE_WORDS,
    CONTEXTS,
    DATA,
    ENTRY_WORDS,
    FIRST_2,
    IOTLB_1G,
    IOTLB_4K,
    IOTLB_SIZES,
    PASIDS,
    REGISTERS,
    SCALABLE,
    SECOND_2,
    SECOND_5,
    SETS,
    STAMP,
    TAG,
    TAG_MORE,
    WAYS,
)

# fmt: off
DOMAIN_TAG: Final = 0xFFFF
FUNCTIONS: Final = 7             # function-number bits of a source-id
LAST_STRUCTURE: Final = SECOND_5
# fmt: on


@kernel
def forget_contexts(u: Record, granularity: int, domain: int, sid: int, function_mask: int) -> int:
    """Invalidate the context cache; the granularity that was performed."""
    flush_writes(u)
    if granularity == sp.DOMAIN_SELECTIVE and u[SCALABLE] == 0:
        drop_where(u, CONTEXTS, DATA + 1, 0xFFFF << e.CONTEXT_DID, domain << e.CONTEXT_DID, TAG, 0, 0)
        return sp.DOMAIN_SELECTIVE
    if granularity == sp.FINEST_SELECTIVE:
        mask = 0xFFFF & ~(FUNCTIONS & ~((1 << (3 - function_mask)) - 1))
        drop_where(u, CONTEXTS, TAG, mask, sid & mask, TAG, 0, 0)
        return sp.FINEST_SELECTIVE
    drop_all(u, CONTEXTS)
    return sp.GLOBAL


@kernel
def forget_pasids(u: Record, granularity: int, domain: int, pasid: int) -> None:
    """Invalidate the PASID cache: 0 of a domain, 1 of a domain and PASID, 3 all."""
    flush_writes(u)
    drop_refusals(u, PASIDS)
    if granularity == 0:
        drop_where(u, PASIDS, DATA + 1, 0xFFFF, domain, TAG, 0, 0)
    elif granularity == 1:
        drop_where(u, PASIDS, DATA + 1, 0xFFFF, domain, TAG, -1, pasid)
    else:
        drop_all(u, PASIDS)


@kernel
def forget_range(u: Record, cache: int, tag_shift: int, page: int, mask_bits: int, more: int, more_mask: int) -> None:
    """Empty entries, tagged by address bits from `tag_shift` up, that overlap 2**mask_bits pages from `page` on."""
    first = (page >> mask_bits) << mask_bits
    last = first + (1 << mask_bits) - 1
    down = tag_shift - 12
    at = u[cache]
    for _ in range(u[cache + SETS] * u[cache + WAYS]):
        if u[at + STAMP] != 0 and u[at + TAG_MORE] & more_mask == more:
            if u[at + TAG] >= first >> down and u[at + TAG] <= last >> down:
                drop_at(u, at)
        at += ENTRY_WORDS


@kernel
def forget_translations(u: Record, granularity: int, domain: int, page: int, mask_bits: int, leaf_only: bool) -> int:
    """Invalidate IOTLBs and paging-structure caches; the granularity that was performed.

    `page`, `mask_bits`: 2**mask_bits pages from page number `page` on. By page, entries of the second level go, and
    those of nested translation whatever their address, for theirs are addresses before the first level.
    """
    flush_writes(u)
    if granularity == sp.FINEST_SELECTIVE:
        most = (u[REGISTERS + (sp.CAP >> 3)] >> sp.CAP_MAMV) & 0x3F
        if not capable(u, sp.CAP_PSI) or mask_bits > most:
            granularity = sp.DOMAIN_SELECTIVE
    if granularity == sp.DOMAIN_SELECTIVE:
        for cache in range(IOTLB_4K, LAST_STRUCTURE + CACHE_WORDS, CACHE_WORDS):
            drop_where(u, cache, TAG_MORE, DOMAIN_TAG, domain, TAG, 0, 0)
        return granularity
    if granularity == sp.FINEST_SELECTIVE:
        for size in range(3):
            cache = IOTLB_4K + size * CACHE_WORDS
            forget_range(u, cache, 12 + 9 * size, page, mask_bits, domain, ~NEGATIVE)
            drop_where(u, cache, TAG_MORE, WITH_PASID | DOMAIN_TAG, WITH_PASID | domain, TAG, 0, 0)
        for level in range(2, 6):
            if not leaf_only:
                cache = SECOND_2 + (level - 2) * CACHE_WORDS
                forget_range(u, cache, 3 + 9 * level, page, mask_bits, domain, -1)
        return granularity
    for cache in range(IOTLB_4K, LAST_STRUCTURE + CACHE_WORDS, CACHE_WORDS):
        drop_all(u, cache)
    u[IOTLB_SIZES] = 0
    return sp.GLOBAL


@kernel
def forget_process(
    u: Record, by_page: bool, domain: int, pasid: int, page: int, mask_bits: int, leaf_only: bool
) -> None:
    """Invalidate what first-level and nested translation of one PASID in one domain have left, all or by page."""
    flush_writes(u)
    more = domain | pasid << 16 | WITH_PASID
    for cache in range(IOTLB_4K, IOTLB_1G + CACHE_WORDS, CACHE_WORDS):
        if by_page:
            forget_range(u, cache, 12 + 9 * ((cache - IOTLB_4K) // CACHE_WORDS), page, mask_bits, more, -1)
        else:
            drop_where(u, cache, TAG_MORE, -1, more, TAG, 0, 0)
    if by_page and leaf_only:
        return
    for level in range(2, 6):
        cache = FIRST_2 + (level - 2) * CACHE_WORDS
        if by_page:
            forget_range(u, cache, 3 + 9 * level, page, mask_bits, more, -1)
        else:
            drop_where(u, cache, TAG_MORE, -1, more, TAG, 0, 0)


@kernel
def forget_everything(u: Record) -> None:
    """Invalidate context cache, PASID cache, IOTLBs and paging-structure caches, as a new root table does (ESRTPS)."""
    drop_all(u, CONTEXTS)
    drop_all(u, PASIDS)
    forget_translations(u, sp.GLOBAL, 0, 0, 0, False)
