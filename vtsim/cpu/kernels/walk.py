"""Walks of paging structures in one and two dimensions, from the deepest cached level on.

Agile paging (AGILE16), which no processor has: the walk begins in shadow tables, in one dimension; an entry with the
switching bit holds the host-physical address of a table of the guest's own, and from there on it is two-dimensional.
With that bit in CR3 it is so from the root on.

A walk of a wrong path (`SPECULATIVE`) ends where it would set a flag: that takes an assist of microcode when the
instruction retires, which none of a wrong path does. It ends before it would read a table that is not cached. Where it
would fault, nothing comes of it.

SDM: "4-Level Paging and 5-Level Paging"; "EPT Translation Mechanism"; "Accessed and Dirty Flags for EPT";
"EPT Violations"; "EPT Misconfigurations"; "Methods of Caching Available".
Not modelled: speculative walks but those of mispredicted look-ups (`wrong_paths`).
"""

from __future__ import annotations

from vtsim.base.jit import Arena, Record, Tags, kernel
from vtsim.base.memory import is_memory, load_word, store_word
from vtsim.cpu.accounts import (
    DIRTY_ASSISTS,
    GUEST_ENTRY_HITS,
    GUEST_L1D,
    GUEST_REFERENCES,
    PWC_HITS,
)
from vtsim.cpu.kernels.contexts import CONTEXT_SHIFT, CR4_PGE, CR4_SMEP, VPN_MASK
from vtsim.cpu.kernels.ept_walk import (
    ABANDONED,
    AGILE,
    APIC_PAGE,
    EFER_NXE,
    FRACTURED,
    ON_APIC_ACCESS_PAGE,
    final_need,
    linear_rights,
    nested,
    page_fault,
)
from vtsim.cpu.kernels.foresight import GUEST, remember
from vtsim.cpu.kernels.legacy_walk import walk_legacy
from vtsim.cpu.kernels.lines import own_line, read_entry
from vtsim.cpu.kernels.memory_types import DATA_TYPE, data_type, pat_type, root_leads, table_uncached
from vtsim.cpu.kernels.rights import (
    DATA_GLOBAL,
    DATA_SIZE,
    EXECUTE,
    KEY_SHIFT,
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
from vtsim.cpu.kernels.walk_caches import TABLE_LEVEL, deepest, held_entry, keep_entry, keep_table
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
    LARGEST_LEVEL,
    NONROOT,
    OWNER,
    PAGE_SIZES,
    PAGING_LEVELS,
    PWC_HIT_CYCLES,
    PWC_PDE,
    RESERVED_BITS,
    SPECULATIVE,
    VMCS,
    WALK_LATENCY,
)
from vtsim.ept.memory_types import WB
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
from vtsim.vmcs.state import CR3_SWITCHES


@kernel
def walk(m: Record, a: Arena, t: Tags, gva: int, access: int, user: int) -> int:
    """Walk the paging structures, through EPT in non-root mode with EPT; the data word for a TLB, or a fault."""
    owner = m[OWNER]
    through_ept = m[NONROOT] != 0 and m[EPTP] != 0
    agile = through_ept and m[EPT_FEATURES] & AGILE != 0
    if agile:
        through_ept = m[CR3] & CR3_SWITCHES != 0
    m[FAULT_NESTED] = 1 if agile and through_ept else 0
    levels = m[PAGING_LEVELS]
    if levels < 4 and levels:
        return walk_legacy(m, a, t, gva, access, user)
    gpa = gva & ((1 << 52) - 1) & ~0xFFF
    permissions = 0x3F
    size = 2
    entry = 0
    is_global = 0
    key = NO_KEY
    protected = True
    rights = UP_WRITE | UP_USER
    if levels:
        code = (PF_WRITE if access == WRITE else 0) | (PF_USER if user else 0)
        if access == EXECUTE and (m[EFER] & EFER_NXE or m[CR4] & CR4_SMEP):
            code |= PF_FETCH
        context = m[CONTEXT] << CONTEXT_SHIFT
        number = (gva >> 12) & VPN_MASK
        rights = UP_WRITE | UP_USER
        level = levels
        table = m[CR3] & ADDRESS
        switched = agile and through_ept  # is it the first table of the guest's own in an agile walk?
        translated = not through_ept or switched  # is `table` a host-physical address already?
        writable = True  # may flags be set in this table as far as EPT goes?
        leads = root_leads(m)  # what led to this table
        uncached, typed = False, False  # is the table not cached; is that known of it, from a walk cache?
        single = m[ENTRY_CACHE] != 0  # do walk caches hold single entries?
        up = -1 if single else deepest(m, a, PWC_PDE, number, levels, context)
        if up >= 0:
            table = up & ADDRESS
            level = (up >> TABLE_LEVEL) & 7
            rights = up & 7
            translated = True
            writable = up & UP_HOST_WRITE != 0
            uncached, typed = up & UP_UNCACHED != 0, True
            if agile:
                through_ept = up & UP_NESTED != 0
                switched = False
                m[FAULT_NESTED] = 1 if through_ept else 0
            m[WALK_LATENCY] += m[PWC_HIT_CYCLES]
            a[owner + PWC_HITS] += 1
        while True:
            shift = 3 + 9 * level
            table_gpa = table
            from_cache = translated and through_ept and not switched
            host = -1
            if not translated:
                host = nested(m, a, t, table, EPT_READ, True)
                if host < 0:
                    m[FAULT_GVA] = gva
                    m[FAULT_GPA] = table | ((gva >> shift) & 511) << 3
                    return host
                table = host & ADDRESS
                if m[EPT_FEATURES] & APIC_PAGE and table >> 12 == a[m[VMCS] + v.APIC_ACCESS_ADDRESS] >> 12:
                    m[FAULT_GVA] = gva
                    return ON_APIC_ACCESS_PAGE
                writable = host & EPT_WRITE != 0
            if not typed:
                uncached = table_uncached(m, leads, host)
            if not from_cache and level < levels and not single:
                kept = table | rights | (UP_HOST_WRITE if writable else 0) | (UP_NESTED if agile and through_ept else 0)
                kept |= UP_UNCACHED if uncached else 0
                keep_table(m, a, PWC_PDE, number, level, context, kept)
            at = table | ((gva >> shift) & 511) << 3
            entry = -1
            if single and level > 1:
                entry = held_entry(m, a, PWC_PDE, at, context, PWC_HIT_CYCLES, GUEST_ENTRY_HITS)
            if entry == -1:
                if uncached and m[SPECULATIVE]:
                    return ABANDONED
                a[owner + GUEST_REFERENCES] += 1
                entry = 0
                if is_memory(a, at):
                    m[WALK_LATENCY] += read_entry(m, a, t, at, GUEST_L1D, uncached)
                    entry = load_word(a, at)
            if entry & PTE_PRESENT == 0:
                return page_fault(m, gva, code)
            if level == 1:
                remember(m, a, GUEST, gva >> 21, table)
            leaf = level == 1 or (entry & PTE_LARGE != 0 and level <= m[LARGEST_LEVEL])
            wrong = entry & m[RESERVED_BITS]
            if entry < 0 and m[EFER] & EFER_NXE == 0:
                wrong = 1
            if leaf and level > 1 and entry & (((1 << shift) - 1) & ~0x1FFF):
                wrong = 1
            if not leaf and entry & PTE_LARGE:
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
                key = (entry >> KEY_SHIFT) & 15
                protected = write_protected(m, a)
                refused = refusal(m, access, user, rights, key, protected)
                if refused:
                    return page_fault(m, gva, code | refused)
            flags = PTE_ACCESSED
            if leaf and access == WRITE:
                flags |= PTE_DIRTY
            if entry & flags != flags:
                if m[SPECULATIVE]:
                    return ABANDONED
                if (
                    not writable and from_cache
                ):  # the cache forgot the table's guest-physical address: start at the root
                    level, table, rights = levels, m[CR3] & ADDRESS, UP_WRITE | UP_USER
                    if agile:
                        through_ept = m[CR3] & CR3_SWITCHES != 0
                        m[FAULT_NESTED] = 1 if through_ept else 0
                    switched = agile and through_ept
                    translated, writable = not through_ept or switched, True
                    leads, typed = root_leads(m), False
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
                m[WALK_LATENCY] += m[ATOMIC_CYCLES] + own_line(m, a, t, at >> 6)
            if leaf:
                break
            if single:
                keep_entry(m, a, PWC_PDE, at, context, entry)
            table = entry & ADDRESS
            switched = agile and not through_ept and entry & PTE_SWITCHES != 0
            if switched:
                through_ept = True
                m[FAULT_NESTED] = 1
            translated = not through_ept or switched
            leads, typed = entry, False
            level -= 1
        size = level - 1
        within = (1 << shift) - 1
        gpa = (entry & ADDRESS & ~within) | (gva & within & ~0xFFF)
        permissions = permissions_of(m, rights, entry & PTE_DIRTY != 0, protected)
        if entry & PTE_GLOBAL and m[CR4] & CR4_PGE:
            is_global = 1
    hpa = gpa
    kind = pat_type(m, entry, size > 0) if levels else WB
    host = -1
    if through_ept:
        host = nested(m, a, t, gpa, final_need(m, access, rights), False)
        if host < 0:
            m[FAULT_GVA] = gva
            m[FAULT_GPA] = gpa | (gva & 0xFFF)
            if levels:
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
            if levels:
                m[PAGE_SIZES] |= FRACTURED
    permissions |= data_type(m, kind, host)
    if permissions >> DATA_TYPE and size:  # kept by pages of 4 KiB
        m[PAGE_SIZES] |= FRACTURED
        size = 0
    if not is_memory(a, hpa):
        size = 0
    if levels:
        permissions = with_conditions(m, permissions, rights, key)
    return (hpa & ~((1 << (12 + 9 * size)) - 1)) | permissions | is_global << DATA_GLOBAL | size << DATA_SIZE
