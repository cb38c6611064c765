"""Walks of the EPT paging structures, from the deepest cached level on, and what a refused access reports.

SDM: "EPT Translation Mechanism"; "Accessed and Dirty Flags for EPT"; "EPT Violations"; "EPT Misconfigurations".
Not modelled: sub-page write permissions.
"""

from __future__ import annotations

from vtsim.base.jit import Arena, Record, Tags, kernel
from vtsim.base.memory import is_memory, load_word, store_word
from vtsim.cpu.accounts import (
    EPT_ENTRY_HITS,
    EPT_L1D,
    EPT_PWC_HITS,
    EPT_REFERENCES,
    NESTED_TLB_HITS,
    NESTED_TLB_MISSES,
)
from vtsim.cpu.kernels.caches import find, keep
from vtsim.cpu.kernels.contexts import CONTEXT_SHIFT, TAG_SHIFT
from vtsim.cpu.kernels.foresight import NESTED, remember
from vtsim.cpu.kernels.lines import own_line, read_entry
from vtsim.cpu.kernels.memory_types import host_type
from vtsim.cpu.kernels.rights import EXECUTE, UP_NX, UP_USER, UP_WRITE, WRITE
from vtsim.cpu.kernels.walk_caches import TABLE_LEVEL, deepest, held_entry, keep_entry, keep_table
from vtsim.cpu.slots import (
    ATOMIC_CYCLES,
    CONTEXT_PHYSICAL,
    ENTRY_CACHE,
    EPT_AD,
    EPT_FEATURES,
    EPT_PDE,
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
    LARGEST_EPT_LEVEL,
    NESTED_HIT_CYCLES,
    NESTED_TLB,
    OWNER,
    RESERVED_BITS,
    SPECULATIVE,
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
    EPTP_LEVELS,
    EPTP_TYPE,
    LEGAL_TYPES,
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
# a translation is its address, or one of
PAGE_FAULT, VIOLATION, MISCONFIGURATION, NOT_CANONICAL, LOG_FULL, ON_APIC_ACCESS_PAGE, ABANDONED = range(-1, -8, -1)
# EPT_FEATURES: what the controls and capabilities add to EPT
MODE_BASED, LOGGING, EXCEPTION, ADVANCED, APIC_PAGE, AGILE = 1, 2, 4, 8, 16, 32
EPT_EXECUTE_USER: int = 1 << 10    # with mode-based execute control; also in data words and cached rights
EPT_RIGHTS: int = EPT_RWX | EPT_EXECUTE_USER
LOG_ENTRIES: int = 512
CR4_PSE: int = 1 << 4
EFER_NXE: int = 1 << 11
# of PAGE_SIZES: some translation of a large page was kept as a smaller one; one of 4 MiB as two of 2 MiB; one of a page
# that is not cached was kept
FRACTURED, HALVED, UNCACHED_KEPT = 8, 16, 32
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
def log_write(m: Record, a: Arena, t: Tags, gpa: int, dirty: bool) -> bool:
    """An accessed or dirty flag is being set: False if the log is full; the address is logged for a dirty flag.

    SDM: "Page-Modification Logging".
    """
    at = m[VMCS]
    index = a[at + v.PML_INDEX] & 0xFFFF
    if index >= LOG_ENTRIES:
        return False
    if not dirty:
        return True
    place = (a[at + v.PML_ADDRESS] & ADDRESS) + 8 * index
    if is_memory(a, place):
        store_word(a, place, gpa & ~0xFFF)
        m[WALK_LATENCY] += own_line(m, a, t, place >> 6)
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
    """Translate a guest-physical page: host page address and what follows, or a fault.

    It is rights (bits 0-2, 10) | dirty (3) | page size (4-5) | memory type (6-9).
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
    levels = ((m[EPTP] >> EPTP_LEVELS) & 7) + 1
    level = levels
    rights = EPT_RIGHTS
    rwx = EPT_RIGHTS if m[EPT_FEATURES] & MODE_BASED else EPT_RWX
    single = m[ENTRY_CACHE] != 0  # do walk caches hold single entries?
    up = -1 if single else deepest(m, a, EPT_PDE, gpa >> 12, levels, context)
    if up >= 0:
        table = up & ADDRESS
        level = (up >> TABLE_LEVEL) & 7
        rights = up & EPT_RIGHTS
        m[WALK_LATENCY] += m[EPT_PWC_HIT_CYCLES]
        a[owner + EPT_PWC_HITS] += 1
    while True:
        shift = 3 + 9 * level
        at = table | ((gpa >> shift) & 511) << 3
        entry = -1
        if single and level > 1:
            entry = held_entry(m, a, EPT_PDE, at, context, EPT_PWC_HIT_CYCLES, EPT_ENTRY_HITS)
        if entry == -1:  # as is what is read where nothing answers
            uncached = m[EPTP] & EPTP_TYPE == 0
            if uncached and m[SPECULATIVE]:
                return ABANDONED
            a[owner + EPT_REFERENCES] += 1
            if is_memory(a, at):
                m[WALK_LATENCY] += read_entry(m, a, t, at, EPT_L1D, uncached)
                entry = load_word(a, at)
        allowed = entry & rwx
        if allowed == 0:
            m[FAULT_SUPPRESSED] = entry < 0
            return ept_fault(m, VIOLATION, gpa, need, 0, walking)
        if (allowed & EPT_READ == 0 and (allowed & EPT_WRITE or m[EXECUTE_ONLY] == 0)) or entry & m[RESERVED_BITS]:
            return ept_fault(m, MISCONFIGURATION, gpa, need, 0, walking)
        leaf = level == 1 or entry & EPT_LARGE != 0
        if leaf:
            if (level > 1 and level > m[LARGEST_EPT_LEVEL]) or (LEGAL_TYPES >> ((entry >> EPT_TYPE) & 7)) & 1 == 0:
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
                if m[SPECULATIVE]:
                    return ABANDONED
                if m[EPT_FEATURES] & LOGGING and not log_write(m, a, t, gpa, flags & ~entry & EPT_DIRTY != 0):
                    m[FAULT_KIND] = LOG_FULL
                    return LOG_FULL
                entry |= flags
                store_word(a, at, entry)
                m[WALK_LATENCY] += m[ATOMIC_CYCLES] + own_line(m, a, t, at >> 6)
        if leaf:
            break
        table = entry & ADDRESS
        level -= 1
        if level == 1:
            remember(m, a, NESTED, gpa >> 21, table)
        if single:
            keep_entry(m, a, EPT_PDE, at, context, entry)
        else:
            keep_table(m, a, EPT_PDE, gpa >> 12, level, context, table | rights)
    size = level - 1
    within = (1 << shift) - 1
    dirty = 1
    if m[EPT_AD] and entry & EPT_DIRTY == 0:
        dirty = 0
    data = rights | dirty << 3 | size << 4 | host_type(entry)
    number = gpa >> shift
    keep(m, a, NESTED_TLB, number, number << TAG_SHIFT | context | size, (entry & ADDRESS & ~within) | data)
    m[EPT_SIZES] |= 1 << size
    return (entry & ADDRESS & ~within) | (gpa & within & ~0xFFF) | data


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
def page_fault(m: Record, gva: int, code: int) -> int:
    """Record a page fault."""
    m[FAULT_KIND] = PAGE_FAULT
    m[FAULT_GVA] = gva
    m[FAULT_CODE] = code
    return PAGE_FAULT
