"""From a linear address to a host-physical one: TLBs, paging-structure caches and the one- and two-dimensional walk.

A TLB tag packs page number, context and page size; a context is a (VPID, PCID, EP4TA) triple. The data word of a TLB
entry is the page's address and one permission bit for each (access, ring) pair, with the write bits only once the
dirty flags are set: an access that finds its bit clear is walked again and learns its fate there, unless only RFLAGS.AC
and PKRU decide about it (`rights`).

SDM: "4-Level Paging and 5-Level Paging"; "Caching Translation Information"; "EPT Translation Mechanism";
"Accessed and Dirty Flags for EPT"; "EPT Violations"; "EPT Misconfigurations".
"""

from __future__ import annotations

from vtsim.base.jit import Arena, Record, Tags, kernel
from vtsim.base.memory import is_memory
from vtsim.cpu.accounts import (
    DTLB_MISSES,
    ITLB_MISSES,
    STLB_HITS,
    WALK_CYCLES,
    WALKS,
    WALKS_ABANDONED,
    WALKS_COMPLETED,
    WALKS_FAULTED,
    WALKS_MISCONFIGURED,
    WALKS_VIOLATED,
    WRONG_WALKS,
)
from vtsim.cpu.kernels.caches import find, keep
from vtsim.cpu.kernels.contexts import CONTEXT_SHIFT, TAG_SHIFT, VPN_MASK
from vtsim.cpu.kernels.ept_walk import NOT_CANONICAL, PAGE_FAULT, UNCACHED_KEPT, VIOLATION
from vtsim.cpu.kernels.invalidate import forget_faulting
from vtsim.cpu.kernels.memory_types import DATA_TYPE, OF_UNCACHED
from vtsim.cpu.kernels.rights import DATA_GLOBAL, DATA_SIZE, EXECUTE, allowed_now
from vtsim.cpu.kernels.walk import walk
from vtsim.cpu.slots import (
    CONTEXT,
    CONTEXT_GLOBAL,
    DATA_GENERATION,
    DTLB4K,
    FAULT_GVA,
    FAULT_KIND,
    FETCH_GENERATION,
    GLOBALS_SEEN,
    HINT_COUNT,
    HINTS,
    ITLB2M,
    ITLB4K,
    OWNER,
    PAGE_SIZES,
    PAGING_LEVELS,
    SPECULATIVE,
    STALL,
    STLB,
    STLB1G,
    STLB_HIT_CYCLES,
    STLB_HOLDS_2M,
    UNCACHED,
    WALK_LATENCY,
    WALK_START,
)
from vtsim.ept.spec import ADDRESS


@kernel
def translate_slowly(m: Record, a: Arena, t: Tags, gva: int, access: int, user: int, code: bool) -> int:
    """A translation that the first-level TLBs did not have: second-level TLB, then a walk. Adds its cycles to STALL.

    A walk begins when the second level is known to lack it.
    """
    owner = m[OWNER]
    top = gva >> (47 + 9 * (m[PAGING_LEVELS] == 5))
    if top != 0 and top != -1 and m[PAGING_LEVELS]:
        m[FAULT_KIND] = NOT_CANONICAL
        m[FAULT_GVA] = gva
        return NOT_CANONICAL
    a[owner + (ITLB_MISSES if code else DTLB_MISSES)] += 1
    bit = access * 2 + user
    found = -1
    for attempt in range(2):
        if attempt and m[GLOBALS_SEEN] == 0:
            break
        context = (m[CONTEXT_GLOBAL] if attempt else m[CONTEXT]) << CONTEXT_SHIFT
        for size in range(3):
            if found < 0 and (m[PAGE_SIZES] >> size) & 1:
                number = (gva >> (12 + 9 * size)) & (VPN_MASK >> (9 * size))
                tag = number << TAG_SHIFT | context | size
                if size == 2:
                    found = find(m, a, STLB1G, number, tag)
                elif size == 0 or m[STLB_HOLDS_2M]:
                    found = find(m, a, STLB, number, tag)
        if found < 0 and m[PAGE_SIZES] & UNCACHED_KEPT:
            number = (gva >> 12) & VPN_MASK
            found = find(m, a, STLB, number, number << TAG_SHIFT | context | OF_UNCACHED)
    m[STALL] += m[STLB_HIT_CYCLES]
    if found >= 0 and ((found >> bit) & 1 or allowed_now(m, found, access, user)):
        a[owner + STLB_HITS] += 1
    else:
        a[owner + WALKS] += 1
        m[WALK_LATENCY] = m[WALK_START]
        found = walk(m, a, t, gva, access, user)
        m[STALL] += m[WALK_LATENCY]
        a[owner + WALK_CYCLES] += m[WALK_LATENCY]
        if m[SPECULATIVE]:
            a[owner + WRONG_WALKS] += 1
            if found < 0:
                a[owner + WALKS_ABANDONED] += 1
                return found
        if found < 0:
            forget_faulting(m, a, gva, found)
            if found == PAGE_FAULT:
                a[owner + WALKS_FAULTED] += 1
            elif found == VIOLATION:
                a[owner + WALKS_VIOLATED] += 1
            else:
                a[owner + WALKS_MISCONFIGURED] += 1
            return found
        a[owner + WALKS_COMPLETED] += 1
        if not is_memory(a, found & ADDRESS):
            return (found & ADDRESS) | (gva & 0xFFF)
        size = (found >> DATA_SIZE) & 3
        m[PAGE_SIZES] |= 1 << size
        number = (gva >> (12 + 9 * size)) & (VPN_MASK >> (9 * size))
        context = m[CONTEXT]
        if (found >> DATA_GLOBAL) & 1:
            context = m[CONTEXT_GLOBAL]
            m[GLOBALS_SEEN] = 1
        tag = number << TAG_SHIFT | context << CONTEXT_SHIFT | size
        if (found >> DATA_TYPE) & 3:
            m[PAGE_SIZES] |= UNCACHED_KEPT
            tag |= OF_UNCACHED
        if size == 2:
            keep(m, a, STLB1G, number, tag, found)
        elif size == 0 or m[STLB_HOLDS_2M]:
            keep(m, a, STLB, number, tag, found)
    size = (found >> DATA_SIZE) & 3
    number = (gva >> (12 + 9 * size)) & (VPN_MASK >> (9 * size))
    context = m[CONTEXT_GLOBAL] if (found >> DATA_GLOBAL) & 1 else m[CONTEXT]
    tag = number << TAG_SHIFT | context << CONTEXT_SHIFT | size
    m[UNCACHED] = (found >> DATA_TYPE) & 3
    if code:
        keep(m, a, ITLB4K if size == 0 else ITLB2M, number, tag, found)
        m[FETCH_GENERATION] += 1
    else:
        if m[UNCACHED]:
            tag |= OF_UNCACHED
        keep(m, a, DTLB4K + 4 * size, number, tag, found)
        m[DATA_GENERATION] += 1
    within = (1 << (12 + 9 * size)) - 1
    return (found & ADDRESS & ~within) | (gva & within)


@kernel
def quickly(m: Record, a: Arena, gva: int, access: int, user: int) -> int:
    """The host-physical address where the first-level TLB that answered last for this GiB has it, else -1.

    They are searched at once in hardware; only the simulator is faster for guessing which one.
    """
    hint = m[HINTS + ((gva >> 30) & (HINT_COUNT - 1))]
    size = hint & 3
    shift = 12 + 9 * size
    number = (gva >> shift) & (VPN_MASK >> (9 * size))
    context = (m[CONTEXT_GLOBAL] if hint & 4 else m[CONTEXT]) << CONTEXT_SHIFT
    data = find(m, a, DTLB4K + 4 * size, number, number << TAG_SHIFT | context | size)
    if data >= 0 and (data >> (access * 2 + user)) & 1 and (gva >> 56) + 1 & ~1 == 0:
        within = (1 << shift) - 1
        return (data & ADDRESS & ~within) | (gva & within)
    return -1


@kernel
def translate(m: Record, a: Arena, t: Tags, gva: int, access: int, user: int) -> int:
    """The host-physical address of a data access, or a fault; a first-level TLB miss adds its cycles to STALL."""
    hpa = quickly(m, a, gva, access, user)
    return hpa if hpa >= 0 else translate_elsewhere(m, a, t, gva, access, user)


@kernel
def translate_elsewhere(m: Record, a: Arena, t: Tags, gva: int, access: int, user: int) -> int:
    """Search the other first-level TLBs, and remember which one answered; then the second level and a walk."""
    if (gva >> 56) + 1 & ~1:
        return translate_slowly(m, a, t, gva, access, user, False)
    bit = access * 2 + user
    sizes = m[PAGE_SIZES]
    for everyone in range(2):
        if everyone and m[GLOBALS_SEEN] == 0:
            break
        context = (m[CONTEXT_GLOBAL] if everyone else m[CONTEXT]) << CONTEXT_SHIFT
        for size in range(3):
            if (sizes >> size) & 1:
                shift = 12 + 9 * size
                number = (gva >> shift) & (VPN_MASK >> (9 * size))
                data = find(m, a, DTLB4K + 4 * size, number, number << TAG_SHIFT | context | size)
                if data >= 0 and ((data >> bit) & 1 or allowed_now(m, data, access, user)):
                    m[HINTS + ((gva >> 30) & (HINT_COUNT - 1))] = size | everyone << 2
                    within = (1 << shift) - 1
                    return (data & ADDRESS & ~within) | (gva & within)
        if sizes & UNCACHED_KEPT:
            number = (gva >> 12) & VPN_MASK
            data = find(m, a, DTLB4K, number, number << TAG_SHIFT | context | OF_UNCACHED)
            if data >= 0 and ((data >> bit) & 1 or allowed_now(m, data, access, user)):
                m[UNCACHED] = (data >> DATA_TYPE) & 3
                return (data & ADDRESS) | (gva & 0xFFF)
    return translate_slowly(m, a, t, gva, access, user, False)


@kernel
def translate_code(m: Record, a: Arena, t: Tags, gva: int, user: int) -> int:
    """The host-physical address of a fetch, whose page's type is left in UNCACHED, or a fault."""
    if (gva >> 56) + 1 & ~1:
        return translate_slowly(m, a, t, gva, EXECUTE, user, True)
    bit = EXECUTE * 2 + user
    for attempt in range(2):
        if attempt and m[GLOBALS_SEEN] == 0:
            break
        context = (m[CONTEXT_GLOBAL] if attempt else m[CONTEXT]) << CONTEXT_SHIFT
        for size in range(3):
            if (m[PAGE_SIZES] >> size) & 1:
                shift = 12 + 9 * size
                number = (gva >> shift) & (VPN_MASK >> (9 * size))
                structure = ITLB4K if size == 0 else ITLB2M
                data = find(m, a, structure, number, number << TAG_SHIFT | context | size)
                if data >= 0 and (data >> bit) & 1:
                    m[UNCACHED] = (data >> DATA_TYPE) & 3
                    within = (1 << shift) - 1
                    return (data & ADDRESS & ~within) | (gva & within)
    return translate_slowly(m, a, t, gva, EXECUTE, user, True)
