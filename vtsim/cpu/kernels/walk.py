"""Walks of paging structures in one and two dimensions, from the deepest cached level on.

SDM: "4-Level Paging and 5-Level Paging"; "EPT Translation Mechanism"; "Accessed and Dirty Flags for EPT";
"EPT Violations"; "EPT Misconfigurations".
Not modelled: SMAP; protection keys; speculative walks.
"""

from __future__ import annotations

from vtsim.base.jit import Arena, Record, Tags, kernel
from vtsim.base.memory import is_memory, load, load_word, store, store_word
from vtsim.cpu.accounts import (
    DIRTY_ASSISTS,
    EPT_PWC_HITS,
    EPT_REFERENCES,
    GUEST_REFERENCES,
    NESTED_TLB_HITS,
    NESTED_TLB_MISSES,
    PWC_HITS,
)
from vtsim.cpu.kernels.caches import find, keep, read_line
from vtsim.cpu.kernels.contexts import CONTEXT_SHIFT, CR4_PGE, CR4_SMEP, TAG_SHIFT, VPN_MASK
from vtsim.cpu.slots import (
    ATOMIC_CYCLES,
    CONTEXT,
    CONTEXT_PHYSICAL,
    CR0,
    CR3,
    CR4,
    EFER,
    EPT_AD,
    EPT_FEATURES,
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
    FAULT_SUPPRESSED,
    NESTED_HIT_CYCLES,
    NESTED_TLB,
    NONROOT,
    OWNER,
    PAGE_SIZES,
    PAGING_LEVELS,
    PDPTE0,
    PWC_HIT_CYCLES,
    PWC_PDE,
    PWC_PDPTE,
    PWC_PML4E,
    RESERVED_BITS,
    VMCS,
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
    Q_EXECUTE_USER,
    Q_FETCH,
    Q_FINAL,
    Q_LINEAR_VALID,
    Q_NO_EXECUTE,
    Q_READ,
    Q_RIGHTS,
    Q_USER,
    Q_WRITABLE,
    Q_WRITE,
)
from vtsim.vmcs import slots as v

# fmt: off
READ, WRITE, EXECUTE = range(3)
# a translation is its address, or one of
PAGE_FAULT, VIOLATION, MISCONFIGURATION, NOT_CANONICAL, LOG_FULL = -1, -2, -3, -4, -5
# EPT_FEATURES: what the controls and capabilities add to EPT
MODE_BASED, LOGGING, EXCEPTION, ADVANCED = 1, 2, 4, 8
EPT_EXECUTE_USER: int = 1 << 10    # with mode-based execute control; also in data words and cached rights
EPT_RIGHTS: int = EPT_RWX | EPT_EXECUTE_USER
LOG_ENTRIES: int = 512
CR0_WP: int = 1 << 16
CR4_PSE: int = 1 << 4
EFER_NXE: int = 1 << 11
# data word: address | permission bits 0-5 | global (6) | page size (7-8)
DATA_GLOBAL, DATA_SIZE = 6, 7
# rights carried by paging-structure caches
UP_WRITE, UP_USER, UP_NX, UP_HOST_WRITE = 1, 2, 4, 8
FRACTURED = 8  # of PAGE_SIZES: some translation of a large page was kept as a smaller one
# fmt: on


@kernel
def ept_fault(m: Record, kind: int, gpa: int, access: int, rights: int, walking: bool) -> int:
    """Record a refused guest-physical access."""
    m[FAULT_KIND] = kind
    m[FAULT_GPA] = gpa
    q = Q_LINEAR_VALID | (rights & EPT_RWX) << Q_RIGHTS
    if rights & EPT_EXECUTE_USER and m[EPT_FEATURES] & MODE_BASED:
        q |= Q_EXECUTE_USER
    if access & EPT_READ:
        q |= Q_READ
    if access & EPT_WRITE:
        q |= Q_WRITE
    if access & (EPT_EXECUTE | EPT_EXECUTE_USER):
        q |= Q_FETCH
    if not walking:
        q |= Q_FINAL
    m[FAULT_QUALIFICATION] = q if kind == VIOLATION else 0
    return kind


@kernel
def log_write(m: Record, a: Arena, gpa: int, dirty: bool) -> bool:
    """An accessed or dirty flag is being set: False if the log is full; the address is logged for a dirty flag.

    SDM: "Page-Modification Logging".
    """
    at = m[VMCS]
    index = a[at + v.PML_INDEX] & 0xFFFF
    if index >= LOG_ENTRIES:
        return False
    if not dirty:
        return True
    store_word(a, (a[at + v.PML_ADDRESS] & ADDRESS) + 8 * index, gpa & ~0xFFF)
    a[at + v.PML_INDEX] = (index - 1) & 0xFFFF
    return True


@kernel
def linear_rights(m: Record, rights: int) -> int:
    """What an EPT violation says of the linear address, where the processor has that information.

    SDM: "Basic VM-Exit Information".
    """
    if m[EPT_FEATURES] & ADVANCED == 0 or m[FAULT_KIND] != VIOLATION:
        return 0
    found = Q_USER if rights & UP_USER else 0
    if rights & UP_WRITE:
        found |= Q_WRITABLE
    return found | (Q_NO_EXECUTE if rights & UP_NX else 0)


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
            if data >= 0 and need & ~data & EPT_RIGHTS == 0 and (need & EPT_WRITE == 0 or (data >> 3) & 1):
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
    rights = EPT_RIGHTS
    rwx = EPT_RIGHTS if m[EPT_FEATURES] & MODE_BASED else EPT_RWX
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
        rights = up & EPT_RIGHTS
        m[WALK_LATENCY] += m[EPT_PWC_HIT_CYCLES]
        a[owner + EPT_PWC_HITS] += 1
    while True:
        shift = 3 + 9 * level
        at = table | ((gpa >> shift) & 511) << 3
        a[owner + EPT_REFERENCES] += 1
        entry = 0
        if is_memory(a, at):
            m[WALK_LATENCY] += read_line(m, a, t, at)
            entry = load_word(a, at)
        allowed = entry & rwx
        if allowed == 0:
            m[FAULT_SUPPRESSED] = entry < 0
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
            m[FAULT_SUPPRESSED] = entry < 0
            return ept_fault(m, VIOLATION, gpa, need, rights, walking)
        if m[EPT_AD]:
            flags = EPT_ACCESSED
            if leaf and need & EPT_WRITE:
                flags |= EPT_DIRTY
            if entry & flags != flags:
                if m[EPT_FEATURES] & LOGGING and not log_write(m, a, gpa, flags & ~entry & EPT_DIRTY != 0):
                    m[FAULT_KIND] = LOG_FULL
                    return LOG_FULL
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
def final_need(m: Record, access: int, rights: int) -> int:
    """The EPT right that an access to a page with these rights needs.

    SDM: "Mode-Based Execute Control for EPT".
    """
    if access == WRITE:
        return EPT_WRITE
    if access == EXECUTE:
        return EPT_EXECUTE_USER if m[EPT_FEATURES] & MODE_BASED and rights & UP_USER else EPT_EXECUTE
    return EPT_READ


@kernel
def walk_legacy(m: Record, a: Arena, t: Tags, gva: int, access: int, user: int) -> int:
    """Walk the structures of 32-bit or PAE paging; as `walk`. A 4-MiB page is kept as the 2 MiB that were asked for.

    SDM: "32-Bit Paging"; "PAE Paging".
    Not modelled: paging-structure caches of these modes.
    """
    owner = m[OWNER]
    through_ept = m[NONROOT] != 0 and m[EPTP] != 0
    pae = m[PAGING_LEVELS] == 3
    code = (PF_WRITE if access == WRITE else 0) | (PF_USER if user else 0)
    if access == EXECUTE and ((pae and m[EFER] & EFER_NXE) or m[CR4] & CR4_SMEP):
        code |= PF_FETCH
    table = m[CR3] & 0xFFFFF000
    if pae:
        entry = m[PDPTE0 + ((gva >> 30) & 3)]
        if entry & PTE_PRESENT == 0:
            return page_fault(m, gva, code)
        table = entry & ADDRESS
    rights = UP_WRITE | UP_USER
    shift = 21 if pae else 22
    for level in range(2, 0, -1):
        index = (gva >> shift) & (511 if pae else 1023)
        place = table | index << (3 if pae else 2)
        host = place
        if through_ept:
            found = nested(m, a, t, table, EPT_READ, True)
            if found < 0:
                m[FAULT_GVA] = gva
                m[FAULT_GPA] = place
                return found
            host = (found & ADDRESS) | (place & 0xFFF)
        a[owner + GUEST_REFERENCES] += 1
        entry = 0
        if is_memory(a, host):
            m[WALK_LATENCY] += read_line(m, a, t, host)
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
            refused = (user and rights & UP_USER == 0) or (access == EXECUTE and rights & UP_NX)
            if access == WRITE and rights & UP_WRITE == 0 and (user or m[CR0] & CR0_WP):
                refused = True
            if access == EXECUTE and not user and rights & UP_USER and m[CR4] & CR4_SMEP:
                refused = True
            if refused:
                return page_fault(m, gva, code | PF_PRESENT)
        flags = PTE_ACCESSED | (PTE_DIRTY if leaf and access == WRITE else 0)
        if entry & flags != flags:
            if through_ept:
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
            m[WALK_LATENCY] += m[ATOMIC_CYCLES]
        if leaf:
            break
        table = entry & (ADDRESS if pae else 0xFFFFF000)
        shift -= 9 if pae else 10
    size = 0
    gpa = (entry & (ADDRESS if pae else 0xFFFFF000)) | (gva & 0xFFF)
    if level == 2:
        size = 1
        if pae:
            gpa = (entry & ADDRESS & ~0x1FFFFF) | (gva & 0x1FFFFF)
        else:
            gpa = (entry & 0xFFC00000) | ((entry >> 13) & 0xFF) << 32 | (gva & 0x3FFFFF)
    gpa &= ~0xFFF
    permissions = 1 | 1 << 4
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
    is_global = 1 if entry & PTE_GLOBAL and m[CR4] & CR4_PGE else 0
    hpa = gpa
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
    if not is_memory(a, hpa):
        size = 0
    return (hpa & ~((1 << (12 + 9 * size)) - 1)) | permissions | is_global << DATA_GLOBAL | size << DATA_SIZE


@kernel
def walk(m: Record, a: Arena, t: Tags, gva: int, access: int, user: int) -> int:
    """Walk the paging structures, through EPT in non-root mode with EPT; the data word for a TLB, or a fault."""
    owner = m[OWNER]
    through_ept = m[NONROOT] != 0 and m[EPTP] != 0
    levels = m[PAGING_LEVELS]
    if levels < 4 and levels:
        return walk_legacy(m, a, t, gva, access, user)
    gpa = gva & ((1 << 52) - 1) & ~0xFFF
    permissions = 0x3F
    size = 2
    is_global = 0
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
            a[owner + GUEST_REFERENCES] += 1
            entry = 0
            if is_memory(a, at):
                m[WALK_LATENCY] += read_line(m, a, t, at)
                entry = load_word(a, at)
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
    if not is_memory(a, hpa):
        size = 0
    return (hpa & ~((1 << (12 + 9 * size)) - 1)) | permissions | is_global << DATA_GLOBAL | size << DATA_SIZE
