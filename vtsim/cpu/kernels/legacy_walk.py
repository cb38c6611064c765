"""Walks of the structures of 32-bit and PAE paging.

With agile paging the processor has PAE paging. A PDPTE or a PDE with the switching bit leads to a table of the guest's
own, whose entries have 4 bytes where CR4.PAE, as the guest reads it, is clear; from there on the walk is
two-dimensional.

SDM: "32-Bit Paging"; "PAE Paging".
"""

from __future__ import annotations

from vtsim.base.jit import Arena, Record, Tags, kernel
from vtsim.base.memory import is_memory, load, load_word, store, store_word
from vtsim.cpu.accounts import GUEST_L1D, GUEST_REFERENCES, PWC_HITS
from vtsim.cpu.kernels.contexts import CONTEXT_SHIFT, CR4_PAE, CR4_PGE, CR4_SMEP
from vtsim.cpu.kernels.ept_walk import (
    ABANDONED,
    AGILE,
    CR4_PSE,
    EFER_NXE,
    FRACTURED,
    HALVED,
    final_need,
    linear_rights,
    nested,
    page_fault,
)
from vtsim.cpu.kernels.lines import own_line, read_entry
from vtsim.cpu.kernels.memory_types import DATA_TYPE, data_type, pat_type, table_uncached
from vtsim.cpu.kernels.rights import (
    DATA_GLOBAL,
    DATA_SIZE,
    EXECUTE,
    NO_KEY,
    UP_HOST_WRITE,
    UP_NESTED,
    UP_NX,
    UP_UNCACHED,
    UP_USER,
    UP_WRITE,
    WRITE,
    permissions_of,
    refusal,
    with_conditions,
    write_protected,
)
from vtsim.cpu.kernels.walk_caches import deepest, keep_table, linear_number
from vtsim.cpu.slots import (
    ATOMIC_CYCLES,
    CONTEXT,
    CR3,
    CR4,
    EFER,
    ENTRY_CACHE,
    EPT_FEATURES,
    EPTP,
    FAULT_GPA,
    FAULT_GVA,
    FAULT_NESTED,
    FAULT_QUALIFICATION,
    NONROOT,
    OWNER,
    PAGE_SIZES,
    PAGING_LEVELS,
    PDPTE0,
    PWC_HIT_CYCLES,
    PWC_PDE,
    RESERVED_BITS,
    SPECULATIVE,
    VMCS,
    WALK_LATENCY,
)
from vtsim.ept.spec import (
    ADDRESS,
    EPT_READ,
    EPT_WRITE,
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
    PTE_SWITCHES,
    PTE_USER,
    PTE_WRITE,
)
from vtsim.vmcs import slots as v


@kernel
def first_code(m: Record, access: int, user: int, pae: bool) -> int:
    """What the error code of a page fault says of the access itself.

    SDM: "Page-Fault Exceptions".
    """
    code = (PF_WRITE if access == WRITE else 0) | (PF_USER if user else 0)
    if access == EXECUTE and ((pae and m[EFER] & EFER_NXE) or m[CR4] & CR4_SMEP):
        code |= PF_FETCH
    return code


@kernel
def walk_legacy(m: Record, a: Arena, t: Tags, gva: int, access: int, user: int) -> int:
    """Walk the structures of 32-bit or PAE paging; as `walk`. A 4-MiB page is kept as the 2 MiB that were asked for.

    SDM: "32-Bit Paging"; "PAE Paging".
    """
    owner = m[OWNER]
    through_ept = m[NONROOT] != 0 and m[EPTP] != 0
    agile = through_ept and m[EPT_FEATURES] & AGILE != 0
    narrow = agile and a[m[VMCS] + v.CR4_READ_SHADOW] & CR4_PAE == 0  # have the guest's own entries 4 bytes?
    pae = m[PAGING_LEVELS] == 3
    code = first_code(m, access, user, pae)
    entry = 0
    table = m[CR3] & 0xFFFFF000
    leads = root_leads = m[CR3]  # what led to this table
    if pae:
        entry = m[PDPTE0 + ((gva >> 30) & 3)]
        if entry & PTE_PRESENT == 0:
            return page_fault(m, gva, code)
        table = entry & ADDRESS
        leads = root_leads = entry
    root = table
    rights = UP_WRITE | UP_USER
    level = 2
    context = m[CONTEXT] << CONTEXT_SHIFT
    number = linear_number(m, gva)
    switched = agile and entry & PTE_SWITCHES != 0  # is `table` the first one of the guest's own, by a PDPTE yet?
    from_cache, writable = False, True  # the table's host-physical address comes from the PDE cache; EPT allows writes
    uncached, typed = False, False  # is the table not cached; is that known of it, from the PDE cache?
    if agile:
        through_ept = switched
    up = -1 if m[ENTRY_CACHE] else deepest(m, a, PWC_PDE, number, 2, context)
    if up >= 0:
        level, table, rights, writable = 1, up & ADDRESS, up & 7, up & UP_HOST_WRITE != 0
        uncached, typed = up & UP_UNCACHED != 0, True
        if agile:
            through_ept, switched = up & UP_NESTED != 0, False
        from_cache = through_ept
        m[WALK_LATENCY] += m[PWC_HIT_CYCLES]
        a[owner + PWC_HITS] += 1
    while True:
        if agile:
            m[FAULT_NESTED] = 1 if through_ept else 0
            pae = not (narrow and through_ept)
            code = first_code(m, access, user, pae)
        shift = (12 if level == 1 else 21) if pae else (12 if level == 1 else 22)
        index = (gva >> shift) & (511 if pae else 1023)
        place = table | index << (3 if pae else 2)
        host = place
        found = -1
        if through_ept and not from_cache and not switched:
            found = nested(m, a, t, table, EPT_READ, True)
            if found < 0:
                m[FAULT_GVA] = gva
                m[FAULT_GPA] = place
                return found
            host = (found & ADDRESS) | (place & 0xFFF)
            writable = found & EPT_WRITE != 0
        if not typed:
            uncached = table_uncached(m, leads, found)
        if level == 1 and up < 0 and m[ENTRY_CACHE] == 0:
            kept = (host & ~0xFFF) | rights | (UP_HOST_WRITE if writable else 0)
            kept |= (UP_NESTED if agile and through_ept else 0) | (UP_UNCACHED if uncached else 0)
            keep_table(m, a, PWC_PDE, number, 1, context, kept)
        if uncached and m[SPECULATIVE]:
            return ABANDONED
        a[owner + GUEST_REFERENCES] += 1
        entry = 0
        if is_memory(a, host):
            m[WALK_LATENCY] += read_entry(m, a, t, host, GUEST_L1D, uncached)
            entry = load_word(a, host) if pae else load(a, host, 4)
        if entry & PTE_PRESENT == 0:
            return page_fault(m, gva, code)
        leaf = level == 1 or (entry & PTE_LARGE != 0 and (pae or m[CR4] & CR4_PSE != 0))
        wrong = 0
        if pae:
            wrong = entry & (m[RESERVED_BITS] | 0x7FF << 52)
            if entry < 0 and m[EFER] & EFER_NXE == 0:
                wrong = 1
            if leaf and level == 2 and entry & 0x1FE000:
                wrong = 1
        elif leaf and level == 2 and entry & 0x200000:
            wrong = 1
        if wrong:
            return page_fault(m, gva, code | PF_RESERVED | PF_PRESENT)
        if entry & PTE_WRITE == 0:
            rights &= ~UP_WRITE
        if entry & PTE_USER == 0:
            rights &= ~UP_USER
        if pae and entry & PTE_NO_EXECUTE:
            rights |= UP_NX
        if leaf:
            protected = write_protected(m, a)
            refused = refusal(m, access, user, rights, NO_KEY, protected)
            if refused:
                return page_fault(m, gva, code | refused)
        flags = PTE_ACCESSED | (PTE_DIRTY if leaf and access == WRITE else 0)
        if entry & flags != flags:
            if m[SPECULATIVE]:
                return ABANDONED
            # the cache forgot the table's guest-physical address: start at the root (with agile paging, which has
            # flags of EPT, no table is met that may not be written)
            if not writable and from_cache:
                level, table, rights, up = 2, root, UP_WRITE | UP_USER, -1
                from_cache, writable = False, True
                leads, typed = root_leads, False
                continue
            if not writable:
                found = nested(m, a, t, table, EPT_WRITE, True)
                if found < 0:
                    m[FAULT_GVA] = gva
                    m[FAULT_GPA] = place
                    return found
            entry |= flags
            if pae:
                store_word(a, host, entry)
            else:
                store(a, host, 4, entry)
            m[WALK_LATENCY] += m[ATOMIC_CYCLES] + own_line(m, a, t, host >> 6)
        if leaf:
            break
        table = entry & (ADDRESS if pae else 0xFFFFF000)
        leads, typed = entry, False
        switched = agile and not through_ept and entry & PTE_SWITCHES != 0
        if switched:
            through_ept = True
        level -= 1
    size = 0
    gpa = (entry & (ADDRESS if pae else 0xFFFFF000)) | (gva & 0xFFF)
    if level == 2:
        size = 1
        if pae:
            gpa = (entry & ADDRESS & ~0x1FFFFF) | (gva & 0x1FFFFF)
        else:
            gpa = (entry & 0xFFC00000) | ((entry >> 13) & 0xFF) << 32 | (gva & 0x3FFFFF)
            m[PAGE_SIZES] |= HALVED
    gpa &= ~0xFFF
    permissions = permissions_of(m, rights, entry & PTE_DIRTY != 0, protected)
    is_global = 1 if entry & PTE_GLOBAL and m[CR4] & CR4_PGE else 0
    hpa = gpa
    kind = pat_type(m, entry, size > 0)
    host = -1
    if through_ept:
        need = final_need(m, access, rights)
        host = nested(m, a, t, gpa, need, False)
        if host < 0:
            m[FAULT_GVA] = gva
            m[FAULT_GPA] = gpa | (gva & 0xFFF)
            m[FAULT_QUALIFICATION] |= linear_rights(m, rights)
            return host
        hpa = host & ADDRESS
        if host & EPT_READ == 0:
            permissions &= ~3
        if host & EPT_WRITE == 0 or (host >> 3) & 1 == 0:
            permissions &= ~0xC
        if host & final_need(m, EXECUTE, rights) == 0:
            permissions &= 0xF
        if (host >> 4) & 3 < size:
            size = (host >> 4) & 3
            m[PAGE_SIZES] |= FRACTURED
    permissions |= data_type(m, kind, host)
    if permissions >> DATA_TYPE and size:  # kept by pages of 4 KiB
        m[PAGE_SIZES] |= FRACTURED
        size = 0
    if not is_memory(a, hpa):
        size = 0
    permissions = with_conditions(m, permissions, rights, NO_KEY)
    return (hpa & ~((1 << (12 + 9 * size)) - 1)) | permissions | is_global << DATA_GLOBAL | size << DATA_SIZE
