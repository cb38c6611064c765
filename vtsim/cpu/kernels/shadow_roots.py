"""Roots of shadow tables: found again or made when the guest loads CR3 or changes its paging mode.

The roots of PAE and of 32-bit paging are the four page directories, or the quadrants of the one, that 32-bit addresses
have; above them stand shadow pages of no table of the guest. With agile paging a root may be the guest's own.

SDM: "Memory Virtualization"; "PDPTE Registers".
Guests in 32-bit protected mode have roots of three levels, which the processor walks with PAE paging.

Not modelled: PAE paging of the processor itself for recorded guests with 32-bit addresses, whose shadow tables have
four levels.
"""

from __future__ import annotations

from vtsim.base.jit import Arena, Record, Tags, kernel
from vtsim.cpu import slots as s
from vtsim.cpu.kernels.shadow_formats import format_of, guest_entry, quadrant_of
from vtsim.cpu.kernels.shadow_leaves import find_page, role_of
from vtsim.cpu.kernels.shadow_map import host_leaf
from vtsim.cpu.kernels.shadow_pages import drop_entry, keep_free, link_page, put_switch
from vtsim.cpu.kernels.shadow_pool import (
    NO_ROOT,
    P_CR3,
    P_MODE,
    P_ROOT,
    STRANGE_ROOT,
    entry_at,
    has_frame,
    page_behind,
    shadow_count,
    shadow_get,
    shadow_put,
    switch_of,
    top_level,
)
from vtsim.cpu.kernels.shadow_use import change_root, list_root, unlist_roots, unlist_what_is_gone
from vtsim.cpu.kernels.shadow_walk import P_PDPTE, P_RESERVED
from vtsim.ept import shadow as d
from vtsim.ept.spec import ADDRESS, PDPT_ADDRESS, PTE_PRESENT
from vtsim.vmcs.state import CR3_SWITCHES

P_LOADED: int = d.POOL["LOADED"]
P_ROOTS_NESTED: int = d.POOL["ROOTS_NESTED"]
PDPTE_RESERVED: int = 0x1E6 | -(1 << 52)


@kernel
def loaded_before(m: Record, a: Arena, t: Tags, key: int) -> bool:
    """Is a root, by CR3 and mode, among those loaded last? It becomes the first of them."""
    at = m[s.SHADOW_POOL] + P_LOADED
    moved = key
    for _ in range(d.LOADED_ROOTS):
        other = shadow_get(m, a, t, at)
        shadow_put(m, a, t, at, moved)
        if other == key:
            return True
        moved = other
        at += 8
    return False


@kernel
def link_directories(m: Record, a: Arena, t: Tags) -> None:
    """With PAE or 32-bit paging: let the root in use lead to the page directories that CR3 or the PDPTEs name."""
    mode, pool = m[s.SHADOW_MODE], m[s.SHADOW_POOL]
    counted = False
    for n in range(4):
        keep_free(m, a, t)
        page = m[s.SHADOW_ROOT]
        for level in range(top_level(m), 2, -1):
            entry = page * 512 + (n if level == 3 else 0)
            word = shadow_get(m, a, t, entry_at(m, entry))
            frame, role = 0, role_of(m, level - 1, d.ALL_RIGHTS, level > 3)
            if level == 3:
                drop_entry(m, a, t, entry)
                word = 0
                directory = shadow_get(m, a, t, pool + (P_PDPTE + 8 * n if mode & d.MODE_PAE else P_CR3))
                frame = (directory & ADDRESS) >> 12
                role |= quadrant_of(mode, 2, n << 30)
                if (mode & d.MODE_PAE and directory & PTE_PRESENT == 0) or not has_frame(m, a, t, frame):
                    break
                host = nested_at(m, a, t, frame)
                if host:
                    put_switch(m, a, t, entry, frame, host, 0)
                    if not counted:
                        shadow_count(m, a, t, P_ROOTS_NESTED)
                    counted = True
                    break
            if word & PTE_PRESENT:
                page = page_behind(m, word)
            else:
                page = find_page(m, a, t, frame, role)
                link_page(m, a, t, entry, page)


@kernel
def nested_at(m: Record, a: Arena, t: Tags, frame: int) -> int:
    """With agile paging: the host's entry for a table of the guest that is nested; 0 if it is shadowed."""
    if m[s.SHADOW_MODE] & d.MODE_AGILE == 0 or shadow_get(m, a, t, switch_of(m, frame)) & d.SWITCH_NESTED == 0:
        return 0
    return host_leaf(m, a, t, frame)


@kernel
def own_root(m: Record, a: Arena, t: Tags, frame: int) -> int:
    """With agile paging: what CR3 holds for a root of the guest that is nested itself; 0 if it is shadowed."""
    host = nested_at(m, a, t, frame)
    if host == 0:
        return 0
    shadow_count(m, a, t, P_ROOTS_NESTED)
    return (host & ADDRESS) | CR3_SWITCHES


@kernel
def load_root(m: Record, a: Arena, t: Tags) -> int:
    """SHADOW_LOAD_ROOT: the root for CR3 in RSI and the paging mode in RBX, found again or made.

    If RCX is not 0 and the mode is PAE paging, the PDPTEs are loaded before; if these are wrong, nothing is done.
    """
    pool = m[s.SHADOW_POOL]
    mode = format_of(m[s.GPR + s.RBX])
    if mode & d.MODE_PAE and m[s.GPR + s.RCX]:
        reserved = shadow_get(m, a, t, pool + P_RESERVED) | PDPTE_RESERVED
        for n in range(4):
            entry = guest_entry(m, a, t, 0, m[s.GPR + s.RSI] & PDPT_ADDRESS, n)
            if entry & PTE_PRESENT and entry & reserved:
                m[s.GPR + s.RAX] = 0
                return 0
            m[s.SHADOW_STACK + n] = entry
        for n in range(4):
            shadow_put(m, a, t, pool + P_PDPTE + 8 * n, m[s.SHADOW_STACK + n])
    if m[s.SHADOW_MODE] != mode:
        unlist_roots(m, a, t)
    else:
        unlist_what_is_gone(m, a, t)
    m[s.SHADOW_MODE] = mode
    shadow_put(m, a, t, pool + P_MODE, mode)
    shadow_put(m, a, t, pool + P_CR3, m[s.GPR + s.RSI])
    m[s.SHADOW_ROOT] = -1
    keep_free(m, a, t)
    direct = mode & d.MODE_PAGING == 0 or mode & d.NARROW != 0
    frame = 0 if direct else (m[s.GPR + s.RSI] & ADDRESS) >> 12
    if not direct and not has_frame(m, a, t, frame):
        frame = 0
        direct = True
    if not loaded_before(m, a, t, m[s.GPR + s.RSI] | (mode & ~d.OF_NO_ROOT) << d.MODE_SHIFT):
        m[s.SHADOW_FLAGS] |= STRANGE_ROOT
    host = 0 if direct else own_root(m, a, t, frame)
    root = find_page(m, a, t, frame, role_of(m, top_level(m), d.ALL_RIGHTS, direct or host != 0))
    if m[s.SHADOW_SEVERAL]:
        change_root(m, a, t, root)
    shadow_put(m, a, t, pool + P_ROOT, root + 1)
    m[s.SHADOW_ROOT] = root
    if mode & d.NARROW:
        link_directories(m, a, t)
    m[s.SHADOW_FLAGS] &= ~NO_ROOT
    m[s.GPR + s.RAX] = host if host else m[s.SHADOW_TABLES] + (root << 12)
    if not direct:
        list_root(m, a, t, m[s.GPR + s.RSI], m[s.GPR + s.RAX], root)
    return 0
