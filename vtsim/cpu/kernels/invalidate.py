"""Dropping translations: by address, by context, by EP4TA, and those of an access that was refused.

SDM: "Operations that Invalidate TLBs and Paging-Structure Caches"; "Operations that Invalidate Cached Mappings".
"""

from __future__ import annotations

from vtsim.base.jit import Arena, Record, kernel
from vtsim.cpu.kernels.caches import drop, remove
from vtsim.cpu.kernels.contexts import CONTEXT_MASK, CONTEXT_SHIFT, GLOBAL_KEY, LINEAR_KEY, TAG_SHIFT, VPN_MASK
from vtsim.cpu.kernels.ept_walk import FRACTURED, HALVED, PAGE_FAULT, UNCACHED_KEPT
from vtsim.cpu.kernels.memory_types import OF_UNCACHED
from vtsim.cpu.kernels.walk_caches import forget_tables, linear_number
from vtsim.cpu.slots import (
    CONTEXT,
    CONTEXT_COUNT,
    CONTEXT_GLOBAL,
    CONTEXT_PHYSICAL,
    CONTEXTS,
    DTLB4K,
    EPT_PDE,
    EPT_PML5E,
    FAULT_GPA,
    FETCH_GENERATION,
    ITLB2M,
    ITLB4K,
    NESTED_TLB,
    PAGE_SIZES,
    PWC_PDE,
    PWC_PML5E,
    STLB,
    STLB1G,
)


@kernel
def remove_page(m: Record, a: Arena, context: int, gva: int) -> None:
    """Remove what the TLBs hold for one linear address in one context."""
    for size in range(3):
        number = (gva >> (12 + 9 * size)) & (VPN_MASK >> (9 * size))
        tag = number << TAG_SHIFT | context << CONTEXT_SHIFT | size
        remove(m, a, DTLB4K + 4 * size, number, tag)
        remove(m, a, ITLB4K if size == 0 else ITLB2M, number, tag)
        remove(m, a, STLB1G if size == 2 else STLB, number, tag)
    if m[PAGE_SIZES] & UNCACHED_KEPT:
        number = (gva >> 12) & VPN_MASK
        remove(m, a, DTLB4K, number, number << TAG_SHIFT | context << CONTEXT_SHIFT | OF_UNCACHED)
        remove(m, a, STLB, number, number << TAG_SHIFT | context << CONTEXT_SHIFT | OF_UNCACHED)


@kernel
def forget_faulting(m: Record, a: Arena, gva: int, fault: int) -> None:
    """A refused access removes what was cached for its address, so that an entry repaired in memory is seen.

    SDM: "Operations that Invalidate TLBs and Paging-Structure Caches"; "Operations that Invalidate Cached Mappings".
    """
    remove_page(m, a, m[CONTEXT], gva)
    remove_page(m, a, m[CONTEXT_GLOBAL], gva)
    m[FETCH_GENERATION] += 1
    forget_tables(m, a, PWC_PDE, linear_number(m, gva), m[CONTEXT] << CONTEXT_SHIFT)
    if fault == PAGE_FAULT:
        return
    gpa = m[FAULT_GPA]
    context = m[CONTEXT_PHYSICAL] << CONTEXT_SHIFT
    forget_tables(m, a, EPT_PDE, gpa >> 12, context)
    for size in range(3):
        number = gpa >> (12 + 9 * size)
        remove(m, a, NESTED_TLB, number, number << TAG_SHIFT | context | size)


@kernel
def drop_contexts(m: Record, a: Arena, mask: int, value: int, globals_too: bool) -> None:
    """Remove linear and combined mappings of every context whose key, under `mask`, is `value`."""
    base = m[CONTEXTS]
    for n in range(m[CONTEXT_COUNT]):
        key = a[base + n]
        if key >= 0 and key & mask == value and (globals_too or key & GLOBAL_KEY == 0):
            for structure in range(DTLB4K, PWC_PDE + 1, 4):
                drop(m, a, structure, CONTEXT_MASK, n << CONTEXT_SHIFT)
    m[FETCH_GENERATION] += 1


@kernel
def drop_guest_physical(m: Record, a: Arena, ep4ta: int) -> None:
    """Remove guest-physical and combined mappings of one EP4TA, or of all where it is 0.

    SDM: "Operations that Invalidate Cached Mappings".
    """
    base = m[CONTEXTS]
    for n in range(m[CONTEXT_COUNT]):
        key = a[base + n]
        if key < 0 and (ep4ta == 0 or key == -1 - (ep4ta >> 12)):
            for structure in range(EPT_PML5E, NESTED_TLB + 1, 4):
                drop(m, a, structure, CONTEXT_MASK, n << CONTEXT_SHIFT)
        elif key >= 0:
            owner = (key & ~GLOBAL_KEY) >> 28
            if owner and (ep4ta == 0 or owner == ep4ta >> 12):
                for structure in range(DTLB4K, PWC_PDE + 1, 4):
                    drop(m, a, structure, CONTEXT_MASK, n << CONTEXT_SHIFT)
    m[FETCH_GENERATION] += 1


@kernel
def drop_page(m: Record, a: Arena, key: int, gva: int) -> None:
    """Remove one linear address from a VPID and PCID and its global twins, and their paging-structure entries.

    Of every EP4TA: a guest that switches EPT pointers need not do it once more for each. Once a large page was kept in
    pieces, nobody knows how many: all mappings of both go.

    SDM: "Invalidation of TLBs and Paging-Structure Caches"; "Details of TLB Use";
    "Operations that Invalidate Cached Mappings".
    """
    base = m[CONTEXTS]
    own, twin = key & LINEAR_KEY, key & 0xFFFF | GLOBAL_KEY
    for n in range(m[CONTEXT_COUNT]):
        other = a[base + n]
        if other < 0 or (other & (LINEAR_KEY | GLOBAL_KEY) != own and other & (LINEAR_KEY | GLOBAL_KEY) != twin):
            continue
        if m[PAGE_SIZES] & FRACTURED:
            for structure in range(DTLB4K, STLB1G + 1, 4):
                drop(m, a, structure, CONTEXT_MASK, n << CONTEXT_SHIFT)
        else:
            remove_page(m, a, n, gva)
            if m[PAGE_SIZES] & HALVED:
                remove_page(m, a, n, gva ^ 1 << 21)
        for structure in range(PWC_PML5E, PWC_PDE + 1, 4):
            drop(m, a, structure, CONTEXT_MASK, n << CONTEXT_SHIFT)
    m[FETCH_GENERATION] += 1
