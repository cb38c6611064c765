"""From a linear address to a host-physical one: TLBs, paging-structure caches and the one- and two-dimensional walk.

A TLB tag packs page number, context and page size; a context is a (VPID, PCID, EP4TA) triple. The data word of a TLB
entry is the page's address and one permission bit for each (access, ring) pair, with the write bits only once the
dirty flags are set: an access that finds its bit clear is walked again and learns its fate there.

SDM: "4-Level Paging and 5-Level Paging"; "Caching Translation Information"; "EPT Translation Mechanism";
"Accessed and Dirty Flags for EPT"; "EPT Violations"; "EPT Misconfigurations".
Not modelled: SMAP; protection keys; speculative walks.
"""

from __future__ import annotations

from vtsim.base.jit import Arena, Record, Tags, kernel
from vtsim.base.memory import A_REPLAY_COUNT, is_memory, load_word, store_word
from vtsim.cpu.accounts import (
    DIRTY_ASSISTS,
    DTLB_MISSES,
    EPT_PWC_HITS,
    EPT_REFERENCES,
    GUEST_REFERENCES,
    ITLB_MISSES,
    NESTED_TLB_HITS,
    NESTED_TLB_MISSES,
    PWC_HITS,
    STLB_HITS,
    WALK_CYCLES,
    WALKS,
    WALKS_COMPLETED,
    WALKS_FAULTED,
    WALKS_MISCONFIGURED,
    WALKS_VIOLATED,
)
from vtsim.cpu.kernels.caches import drop, find, keep, read_line, remove
from vtsim.cpu.ops import REPLAY_BASE
from vtsim.cpu.slots import (
    ATOMIC_CYCLES,
    CONTEXT,
    CONTEXT_COUNT,
    CONTEXT_GLOBAL,
    CONTEXT_KEY,
    CONTEXT_PHYSICAL,
    CONTEXTS,
    CR0,
    CR3,
    CR4,
    DTLB1G,
    DTLB2M,
    DTLB4K,
    EFER,
    EPT_AD,
    EPT_PDE,
    EPT_PDPTE,
    EPT_PML4E,
    EPT_PWC_HIT_CYCLES,
    EPT_SIZES,
    EPTP,
    EXECUTE_ONLY,
    FAULT_CODE,
    FAULT_GPA,
    FAULT_GVA,
    FAULT_KIND,
    FAULT_QUALIFICATION,
    FETCH_GENERATION,
    GLOBALS_SEEN,
    HINT_COUNT,
    HINTS,
    ITLB2M,
    ITLB4K,
    NESTED_HIT_CYCLES,
    NESTED_TLB,
    NONROOT,
    OWNER,
    PAGE_SIZES,
    PAGING_LEVELS,
    PWC_HIT_CYCLES,
    PWC_PDE,
    PWC_PDPTE,
    PWC_PML4E,
    RESERVED_BITS,
    RIP,
    STALL,
    STLB,
    STLB1G,
    STLB_HIT_CYCLES,
    STLB_HOLDS_2M,
    VPID,
    WALK_LATENCY,
)
from vtsim.ept.spec import (
    ADDRESS,
    EPT_ACCESSED,
    EPT_DIRTY,
    EPT_EXECUTE,
    EPT_LARGE,
    EPT_READ,
    EPT_RWX,
    EPT_TYPE,
    EPT_WRITE,
    LEGAL_TYPES,
    PF_FETCH,
    PF_PRESENT,
    PF_RESERVED,
    PF_USER,
    PF_WRITE,
    PTE_ACCESSED,
    PTE_DIRTY,
    PTE_GLOBAL,
    PTE_LARGE,
    PTE_NO_EXECUTE,
    PTE_PRESENT,
    PTE_USER,
    PTE_WRITE,
    Q_FETCH,
    Q_FINAL,
    Q_LINEAR_VALID,
    Q_READ,
    Q_RIGHTS,
    Q_WRITE,
)

# fmt: off
READ, WRITE, EXECUTE = range(3)
# a translation is its address, or one of
PAGE_FAULT, VIOLATION, MISCONFIGURATION, NOT_CANONICAL = -1, -2, -3, -4
CR0_WP: int = 1 << 16
CR0_PG: int = -(1 << 31) & 0xFFFFFFFF
CR4_PGE, CR4_LA57, CR4_PCIDE, CR4_SMEP = 1 << 7, 1 << 12, 1 << 17, 1 << 20
EFER_NXE: int = 1 << 11
VPN_MASK: int = (1 << 45) - 1
CONTEXT_SHIFT, TAG_SHIFT, CONTEXT_LIMIT = 2, 18, 4096
CONTEXT_MASK: int = 0xFFFF << 2
GLOBAL_KEY: int = 1 << 62
# data word: address | permission bits 0-5 | global (6) | page size (7-8)
DATA_GLOBAL, DATA_SIZE = 6, 7
# rights carried by paging-structure caches
UP_WRITE, UP_USER, UP_NX, UP_HOST_WRITE = 1, 2, 4, 8
FRACTURED = 8  # of PAGE_SIZES: some translation of a large page was kept as a smaller one
# fmt: on


@kernel
def known_context(m: Record, a: Arena, key: int) -> int:
    """The number of the translation context with this key, or -1."""
    base = m[CONTEXTS]
    for n in range(m[CONTEXT_COUNT]):
        if a[base + n] == key:
            return n
    return -1


@kernel
def context_of(m: Record, a: Arena, key: int) -> int:
    """The number of the translation context with this key, given on first use."""
    n = known_context(m, a, key)
    if n < 0:
        n = m[CONTEXT_COUNT]
        a[m[CONTEXTS] + n] = key
        m[CONTEXT_COUNT] = n + 1
    return n


@kernel
def recorded(m: Record, a: Arena) -> bool:
    """Does RIP stand in the window of recorded rows?"""
    place = m[RIP] - REPLAY_BASE
    return place >= 0 and place < a[A_REPLAY_COUNT]


@kernel
def set_context(m: Record, a: Arena) -> None:
    """Work out under which tags translations are now made: after CR0, CR3, CR4, VPID, EPTP or privilege changed.

    When all context numbers are given out, every translation is dropped and numbering starts again.
    """
    vpid = m[VPID] if m[NONROOT] else 0
    eptp = m[EPTP] if m[NONROOT] else 0
    pcid = m[CR3] & 0xFFF if m[CR4] & CR4_PCIDE else 0
    key = vpid | pcid << 16 | ((eptp & ADDRESS) >> 12) << 28
    m[PAGING_LEVELS] = 0
    if m[CR0] & CR0_PG and not recorded(m, a):
        m[PAGING_LEVELS] = 5 if m[CR4] & CR4_LA57 else 4
    if m[CONTEXT_KEY] == key:
        return
    m[CONTEXT_KEY] = key
    if m[CONTEXT_COUNT] > CONTEXT_LIMIT - 3:
        for structure in range(DTLB4K, NESTED_TLB + 1, 4):
            drop(m, a, structure, 0, 0)
        m[FETCH_GENERATION] += 1
        m[CONTEXT_COUNT] = 0
    m[CONTEXT] = context_of(m, a, key)
    m[CONTEXT_GLOBAL] = context_of(m, a, (key & ~(0xFFF << 16)) | GLOBAL_KEY)
    if eptp:
        m[CONTEXT_PHYSICAL] = context_of(m, a, -1 - (eptp >> 12))


@kernel
def ept_fault(m: Record, kind: int, gpa: int, access: int, rights: int, walking: bool) -> int:
    """Record a refused guest-physical access."""
    m[FAULT_KIND] = kind
    m[FAULT_GPA] = gpa
    q = Q_LINEAR_VALID | (rights << Q_RIGHTS)
    if access & EPT_READ:
        q |= Q_READ
    if access & EPT_WRITE:
        q |= Q_WRITE
    if access & EPT_EXECUTE:
        q |= Q_FETCH
    if not walking:
        q |= Q_FINAL
    m[FAULT_QUALIFICATION] = q if kind == VIOLATION else 0
    return kind


@kernel
def nested(m: Record, a: Arena, t: Tags, gpa: int, access: int, walking: bool) -> int:
    """Translate a guest-physical page: host page address | rights (0-2) | dirty (3) | page size (4-5), or a fault.

    `access` is made of EPT_READ, EPT_WRITE, EPT_EXECUTE. With accessed and dirty flags, accesses to guest paging
    structures count as writes.
    """
    need = access
    if walking and m[EPT_AD]:
        need = access | EPT_WRITE
    context = m[CONTEXT_PHYSICAL] << CONTEXT_SHIFT
    sizes = m[EPT_SIZES]
    for size in range(3):
        if (sizes >> size) & 1:
            number = gpa >> (12 + 9 * size)
            data = find(m, a, NESTED_TLB, number, number << TAG_SHIFT | context | size)
            if data >= 0 and need & ~data & EPT_RWX == 0 and (need & EPT_WRITE == 0 or (data >> 3) & 1):
                a[m[OWNER] + NESTED_TLB_HITS] += 1
                m[WALK_LATENCY] += m[NESTED_HIT_CYCLES]
                within = (1 << (12 + 9 * size)) - 4096
                return (data & ~(within | 0xFFF)) | (gpa & within) | (data & 0xFFF)
    a[m[OWNER] + NESTED_TLB_MISSES] += 1
    return ept_walk(m, a, t, gpa, need, walking, context)


@kernel
def ept_walk(m: Record, a: Arena, t: Tags, gpa: int, need: int, walking: bool, context: int) -> int:
    """Walk the EPT paging structures, from the deepest cached level on; keep what was learnt."""
    owner = m[OWNER]
    table = m[EPTP] & ADDRESS
    level = 4
    rights = EPT_RWX
    up = find(m, a, EPT_PDE, gpa >> 21, (gpa >> 21) << TAG_SHIFT | context)
    if up >= 0:
        level = 1
    else:
        up = find(m, a, EPT_PDPTE, gpa >> 30, (gpa >> 30) << TAG_SHIFT | context)
        if up >= 0:
            level = 2
        else:
            up = find(m, a, EPT_PML4E, gpa >> 39, (gpa >> 39) << TAG_SHIFT | context)
            if up >= 0:
                level = 3
    if up >= 0:
        table = up & ADDRESS
        rights = up & EPT_RWX
        m[WALK_LATENCY] += m[EPT_PWC_HIT_CYCLES]
        a[owner + EPT_PWC_HITS] += 1
    while True:
        shift = 3 + 9 * level
        at = table | ((gpa >> shift) & 511) << 3
        m[WALK_LATENCY] += read_line(m, a, t, at)
        a[owner + EPT_REFERENCES] += 1
        entry = load_word(a, at) if is_memory(a, at) else 0
        allowed = entry & EPT_RWX
        if allowed == 0:
            return ept_fault(m, VIOLATION, gpa, need, 0, walking)
        if (allowed & EPT_READ == 0 and (allowed & EPT_WRITE or m[EXECUTE_ONLY] == 0)) or entry & m[RESERVED_BITS]:
            return ept_fault(m, MISCONFIGURATION, gpa, need, 0, walking)
        leaf = level == 1 or entry & EPT_LARGE != 0
        if leaf:
            if level == 4 or (LEGAL_TYPES >> ((entry >> EPT_TYPE) & 7)) & 1 == 0:
                return ept_fault(m, MISCONFIGURATION, gpa, need, 0, walking)
            if level > 1 and entry & (((1 << shift) - 1) & ~0xFFF):
                return ept_fault(m, MISCONFIGURATION, gpa, need, 0, walking)
        elif entry & 0xF8:
            return ept_fault(m, MISCONFIGURATION, gpa, need, 0, walking)
        rights &= allowed
        if leaf and need & ~rights:
            return ept_fault(m, VIOLATION, gpa, need, rights, walking)
        if m[EPT_AD]:
            flags = EPT_ACCESSED
            if leaf and need & EPT_WRITE:
                flags |= EPT_DIRTY
            if entry & flags != flags:
                entry |= flags
                store_word(a, at, entry)
                m[WALK_LATENCY] += m[ATOMIC_CYCLES]
        if leaf:
            break
        table = entry & ADDRESS
        if level == 2:
            keep(m, a, EPT_PDE, gpa >> 21, (gpa >> 21) << TAG_SHIFT | context, table | rights)
        elif level == 3:
            keep(m, a, EPT_PDPTE, gpa >> 30, (gpa >> 30) << TAG_SHIFT | context, table | rights)
        else:
            keep(m, a, EPT_PML4E, gpa >> 39, (gpa >> 39) << TAG_SHIFT | context, table | rights)
        level -= 1
    size = level - 1
    within = (1 << shift) - 1
    dirty = 1
    if m[EPT_AD] and entry & EPT_DIRTY == 0:
        dirty = 0
    data = rights | dirty << 3 | size << 4
    number = gpa >> shift
    keep(m, a, NESTED_TLB, number, number << TAG_SHIFT | context | size, (entry & ADDRESS & ~within) | data)
    m[EPT_SIZES] |= 1 << size
    return (entry & ADDRESS & ~within) | (gpa & within & ~0xFFF) | data


@kernel
def page_fault(m: Record, gva: int, code: int) -> int:
    """Record a page fault."""
    m[FAULT_KIND] = PAGE_FAULT
    m[FAULT_GVA] = gva
    m[FAULT_CODE] = code
    return PAGE_FAULT


@kernel
def walk(m: Record, a: Arena, t: Tags, gva: int, access: int, user: int) -> int:
    """Walk the paging structures, through EPT in non-root mode with EPT; the data word for a TLB, or a fault."""
    owner = m[OWNER]
    through_ept = m[NONROOT] != 0 and m[EPTP] != 0
    need = EPT_READ
    if access == WRITE:
        need = EPT_WRITE
    elif access == EXECUTE:
        need = EPT_EXECUTE
    levels = m[PAGING_LEVELS]
    gpa = gva & ((1 << 52) - 1) & ~0xFFF
    permissions = 0x3F
    size = 2
    is_global = 0
    if levels:
        code = (PF_WRITE if access == WRITE else 0) | (PF_USER if user else 0)
        if access == EXECUTE and (m[EFER] & EFER_NXE or m[CR4] & CR4_SMEP):
            code |= PF_FETCH
        context = m[CONTEXT] << CONTEXT_SHIFT
        number = (gva >> 12) & VPN_MASK
        rights = UP_WRITE | UP_USER
        level = levels
        table = m[CR3] & ADDRESS
        translated = not through_ept  # is `table` a host-physical address already?
        writable = True  # may flags be set in this table as far as EPT goes?
        up = find(m, a, PWC_PDE, number >> 9, (number >> 9) << TAG_SHIFT | context)
        if up >= 0:
            level = 1
        else:
            up = find(m, a, PWC_PDPTE, number >> 18, (number >> 18) << TAG_SHIFT | context)
            if up >= 0:
                level = 2
            else:
                up = find(m, a, PWC_PML4E, number >> 27, (number >> 27) << TAG_SHIFT | context)
                if up >= 0:
                    level = 3
        if up >= 0:
            table = up & ADDRESS
            rights = up & 7
            translated = True
            writable = up & UP_HOST_WRITE != 0
            m[WALK_LATENCY] += m[PWC_HIT_CYCLES]
            a[owner + PWC_HITS] += 1
        while True:
            shift = 3 + 9 * level
            table_gpa = table
            from_cache = translated and through_ept
            if not translated:
                host = nested(m, a, t, table, EPT_READ, True)
                if host < 0:
                    m[FAULT_GVA] = gva
                    m[FAULT_GPA] = table | ((gva >> shift) & 511) << 3
                    return host
                table = host & ADDRESS
                writable = host & EPT_WRITE != 0
            if not from_cache and level < levels:
                kept = table | rights | (UP_HOST_WRITE if writable else 0)
                if level == 1:
                    keep(m, a, PWC_PDE, number >> 9, (number >> 9) << TAG_SHIFT | context, kept)
                elif level == 2:
                    keep(m, a, PWC_PDPTE, number >> 18, (number >> 18) << TAG_SHIFT | context, kept)
                elif level == 3:
                    keep(m, a, PWC_PML4E, number >> 27, (number >> 27) << TAG_SHIFT | context, kept)
            at = table | ((gva >> shift) & 511) << 3
            m[WALK_LATENCY] += read_line(m, a, t, at)
            a[owner + GUEST_REFERENCES] += 1
            entry = load_word(a, at) if is_memory(a, at) else 0
            if entry & PTE_PRESENT == 0:
                return page_fault(m, gva, code)
            leaf = level == 1 or (entry & PTE_LARGE != 0 and level <= 3)
            wrong = entry & m[RESERVED_BITS]
            if entry < 0 and m[EFER] & EFER_NXE == 0:
                wrong = 1
            if leaf and level > 1 and entry & (((1 << shift) - 1) & ~0x1FFF):
                wrong = 1
            if not leaf and level > 3 and entry & PTE_LARGE:
                wrong = 1
            if wrong:
                return page_fault(m, gva, code | PF_RESERVED | PF_PRESENT)
            if entry & PTE_WRITE == 0:
                rights &= ~UP_WRITE
            if entry & PTE_USER == 0:
                rights &= ~UP_USER
            if entry & PTE_NO_EXECUTE:
                rights |= UP_NX
            if leaf:
                refused = (user and rights & UP_USER == 0) or (access == EXECUTE and rights & UP_NX)
                if access == WRITE and rights & UP_WRITE == 0 and (user or m[CR0] & CR0_WP):
                    refused = True
                if access == EXECUTE and not user and rights & UP_USER and m[CR4] & CR4_SMEP:
                    refused = True
                if refused:
                    return page_fault(m, gva, code | PF_PRESENT)
            flags = PTE_ACCESSED
            if leaf and access == WRITE:
                flags |= PTE_DIRTY
            if entry & flags != flags:
                if (
                    not writable and from_cache
                ):  # the cache forgot the table's guest-physical address: start at the root
                    level, table, rights = levels, m[CR3] & ADDRESS, UP_WRITE | UP_USER
                    translated, writable = False, True
                    continue
                if not writable:
                    host = nested(m, a, t, table_gpa, EPT_WRITE, True)
                    if host < 0:
                        m[FAULT_GVA] = gva
                        m[FAULT_GPA] = table_gpa | ((gva >> shift) & 511) << 3
                        return host
                if leaf and access == WRITE and entry & PTE_ACCESSED:
                    a[owner + DIRTY_ASSISTS] += 1
                entry |= flags
                store_word(a, at, entry)
                m[WALK_LATENCY] += m[ATOMIC_CYCLES]
            if leaf:
                break
            table = entry & ADDRESS
            translated = not through_ept
            level -= 1
        size = level - 1
        within = (1 << shift) - 1
        gpa = (entry & ADDRESS & ~within) | (gva & within & ~0xFFF)
        permissions = 1 | 1 << 4  # read, execute by ring 0
        if rights & UP_USER:
            permissions |= 2 | 1 << 5
            if m[CR4] & CR4_SMEP:
                permissions &= ~(1 << 4)
        if rights & UP_NX:
            permissions &= 0xF
        if entry & PTE_DIRTY:
            if rights & UP_WRITE or m[CR0] & CR0_WP == 0:
                permissions |= 1 << 2
            if rights & UP_WRITE and rights & UP_USER:
                permissions |= 1 << 3
        if entry & PTE_GLOBAL and m[CR4] & CR4_PGE:
            is_global = 1
    hpa = gpa
    if through_ept:
        host = nested(m, a, t, gpa, need, False)
        if host < 0:
            m[FAULT_GVA] = gva
            m[FAULT_GPA] = gpa | (gva & 0xFFF)
            return host
        hpa = host & ADDRESS
        if host & EPT_READ == 0:
            permissions &= ~3
        if host & EPT_WRITE == 0 or (host >> 3) & 1 == 0:
            permissions &= ~0xC
        if host & EPT_EXECUTE == 0:
            permissions &= 0xF
        if (host >> 4) & 3 < size:
            size = (host >> 4) & 3
            if levels:
                m[PAGE_SIZES] |= FRACTURED
    if not is_memory(a, hpa):
        size = 0
    return (hpa & ~((1 << (12 + 9 * size)) - 1)) | permissions | is_global << DATA_GLOBAL | size << DATA_SIZE


@kernel
def remove_page(m: Record, a: Arena, context: int, gva: int) -> None:
    """Remove what the TLBs hold for one linear address in one context."""
    for size in range(3):
        number = (gva >> (12 + 9 * size)) & (VPN_MASK >> (9 * size))
        tag = number << TAG_SHIFT | context << CONTEXT_SHIFT | size
        remove(m, a, DTLB4K + 4 * size, number, tag)
        remove(m, a, ITLB4K if size == 0 else ITLB2M, number, tag)
        remove(m, a, STLB1G if size == 2 else STLB, number, tag)


@kernel
def forget_faulting(m: Record, a: Arena, gva: int, fault: int) -> None:
    """A refused access removes what was cached for its address, so that an entry repaired in memory is seen.

    SDM: "Operations that Invalidate TLBs and Paging-Structure Caches"; "Operations that Invalidate Cached Mappings".
    """
    remove_page(m, a, m[CONTEXT], gva)
    remove_page(m, a, m[CONTEXT_GLOBAL], gva)
    m[FETCH_GENERATION] += 1
    number = (gva >> 12) & VPN_MASK
    context = m[CONTEXT] << CONTEXT_SHIFT
    remove(m, a, PWC_PDE, number >> 9, (number >> 9) << TAG_SHIFT | context)
    remove(m, a, PWC_PDPTE, number >> 18, (number >> 18) << TAG_SHIFT | context)
    remove(m, a, PWC_PML4E, number >> 27, (number >> 27) << TAG_SHIFT | context)
    if fault == PAGE_FAULT:
        return
    gpa = m[FAULT_GPA]
    context = m[CONTEXT_PHYSICAL] << CONTEXT_SHIFT
    remove(m, a, EPT_PDE, gpa >> 21, (gpa >> 21) << TAG_SHIFT | context)
    remove(m, a, EPT_PDPTE, gpa >> 30, (gpa >> 30) << TAG_SHIFT | context)
    remove(m, a, EPT_PML4E, gpa >> 39, (gpa >> 39) << TAG_SHIFT | context)
    for size in range(3):
        number = gpa >> (12 + 9 * size)
        remove(m, a, NESTED_TLB, number, number << TAG_SHIFT | context | size)


@kernel
def translate_slowly(m: Record, a: Arena, t: Tags, gva: int, access: int, user: int, code: bool) -> int:
    """A translation that the first-level TLBs did not have: second-level TLB, then a walk. Adds its cycles to STALL."""
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
    if found >= 0 and (found >> bit) & 1:
        a[owner + STLB_HITS] += 1
        m[STALL] += m[STLB_HIT_CYCLES]
    else:
        a[owner + WALKS] += 1
        m[WALK_LATENCY] = 0
        found = walk(m, a, t, gva, access, user)
        m[STALL] += m[WALK_LATENCY]
        a[owner + WALK_CYCLES] += m[WALK_LATENCY]
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
        if size == 2:
            keep(m, a, STLB1G, number, tag, found)
        elif size == 0 or m[STLB_HOLDS_2M]:
            keep(m, a, STLB, number, tag, found)
    size = (found >> DATA_SIZE) & 3
    number = (gva >> (12 + 9 * size)) & (VPN_MASK >> (9 * size))
    context = m[CONTEXT_GLOBAL] if (found >> DATA_GLOBAL) & 1 else m[CONTEXT]
    tag = number << TAG_SHIFT | context << CONTEXT_SHIFT | size
    if code:
        keep(m, a, ITLB4K if size == 0 else ITLB2M, number, tag, found)
        m[FETCH_GENERATION] += 1
    elif size == 0:
        keep(m, a, DTLB4K, number, tag, found)
    elif size == 1:
        keep(m, a, DTLB2M, number, tag, found)
    else:
        keep(m, a, DTLB1G, number, tag, found)
    within = (1 << (12 + 9 * size)) - 1
    return (found & ADDRESS & ~within) | (gva & within)


@kernel
def translate(m: Record, a: Arena, t: Tags, gva: int, access: int, user: int) -> int:
    """The host-physical address of a data access, or a fault; cycles beyond a first-level TLB hit are added to STALL.

    The first-level TLBs are searched at once in hardware; here the one that answered last for this GiB comes first.
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
    return translate_elsewhere(m, a, t, gva, access, user)


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
                if data >= 0 and (data >> bit) & 1:
                    m[HINTS + ((gva >> 30) & (HINT_COUNT - 1))] = size | everyone << 2
                    within = (1 << shift) - 1
                    return (data & ADDRESS & ~within) | (gva & within)
    return translate_slowly(m, a, t, gva, access, user, False)


@kernel
def translate_code(m: Record, a: Arena, t: Tags, gva: int, user: int) -> int:
    """The host-physical address of a fetch, or a fault."""
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
                    within = (1 << shift) - 1
                    return (data & ADDRESS & ~within) | (gva & within)
    return translate_slowly(m, a, t, gva, EXECUTE, user, True)


# --- invalidation -------------------------------------------------------------------------------------------


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
            for structure in range(EPT_PML4E, NESTED_TLB + 1, 4):
                drop(m, a, structure, CONTEXT_MASK, n << CONTEXT_SHIFT)
        elif key >= 0:
            owner = (key & ~GLOBAL_KEY) >> 28
            if owner and (ep4ta == 0 or owner == ep4ta >> 12):
                for structure in range(DTLB4K, PWC_PDE + 1, 4):
                    drop(m, a, structure, CONTEXT_MASK, n << CONTEXT_SHIFT)
    m[FETCH_GENERATION] += 1


@kernel
def drop_page(m: Record, a: Arena, key: int, gva: int) -> None:
    """Remove one linear address from one context and its global twin, and the context's paging-structure entries.

    Once a large page was kept in pieces, nobody knows how many: all mappings of both go.

    SDM: "Invalidation of TLBs and Paging-Structure Caches"; "Details of TLB Use".
    """
    for twin in range(2):
        n = known_context(m, a, (key & ~(0xFFF << 16)) | GLOBAL_KEY if twin else key)
        if n < 0:
            continue
        if m[PAGE_SIZES] & FRACTURED:
            for structure in range(DTLB4K, STLB1G + 1, 4):
                drop(m, a, structure, CONTEXT_MASK, n << CONTEXT_SHIFT)
        else:
            remove_page(m, a, n, gva)
        for structure in range(PWC_PML4E, PWC_PDE + 1, 4):
            drop(m, a, structure, CONTEXT_MASK, n << CONTEXT_SHIFT)
    m[FETCH_GENERATION] += 1
