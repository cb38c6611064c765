"""Roots of shadow tables: found again or made when the guest loads CR3 or changes its paging mode.

The roots of PAE and of 32-bit paging are the four page directories, or the quadrants of the one, that 32-bit addresses
have; above them stand shadow pages of no table of the guest.

SDM: "Memory Virtualization"; "PDPTE Registers".
Not modelled: PAE paging of the processor itself for guests with 32-bit addresses: their shadow tables have four levels.
"""

from __future__ import annotations

from vtsim.base.jit import Arena, Record, Tags, kernel
from vtsim.cpu import slots as s
from vtsim.cpu.kernels.shadow_formats import format_of, load_pdptes, quadrant_of
from vtsim.cpu.kernels.shadow_leaves import find_page, role_of
from vtsim.cpu.kernels.shadow_pages import drop_entry, keep_free, link_page
from vtsim.cpu.kernels.shadow_pool import (
    NO_ROOT,
    P_CR3,
    P_MODE,
    P_ROOT,
    STRANGE_ROOT,
    entry_at,
    has_frame,
    list_root,
    page_behind,
    shadow_get,
    shadow_put,
    top_level,
    unlist_roots,
)
from vtsim.cpu.kernels.shadow_walk import P_PDPTE, P_RESERVED
from vtsim.ept import shadow as d
from vtsim.ept.spec import ADDRESS, PTE_PRESENT

P_LOADED: int = d.POOL["LOADED"]


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
def above_directories(m: Record, a: Arena, t: Tags) -> int:
    """The shadow page whose entries lead to those of page directories, below the root in use."""
    page = m[s.SHADOW_ROOT]
    for level in range(top_level(m), 3, -1):
        word = shadow_get(m, a, t, entry_at(m, page * 512))
        if word & PTE_PRESENT:
            page = page_behind(m, word)
        else:
            below = find_page(m, a, t, 0, role_of(m, level - 1, d.ALL_RIGHTS, True))
            link_page(m, a, t, page * 512, below)
            page = below
    return page


@kernel
def link_directories(m: Record, a: Arena, t: Tags) -> None:
    """With PAE or 32-bit paging: let the root in use lead to the page directories that CR3 or the PDPTEs name."""
    mode, pool = m[s.SHADOW_MODE], m[s.SHADOW_POOL]
    for n in range(4):
        directory = shadow_get(m, a, t, pool + (P_PDPTE + 8 * n if mode & d.MODE_PAE else P_CR3))
        keep_free(m, a, t)
        entry = above_directories(m, a, t) * 512 + n
        drop_entry(m, a, t, entry)
        frame = (directory & ADDRESS) >> 12
        if (directory & PTE_PRESENT or mode & d.MODE_32BIT) and has_frame(m, a, t, frame):
            role = role_of(m, 2, d.ALL_RIGHTS, False) | quadrant_of(mode, 2, n << 30)
            link_page(m, a, t, entry, find_page(m, a, t, frame, role))


@kernel
def load_root(m: Record, a: Arena, t: Tags) -> int:
    """SHADOW_LOAD_ROOT: the root for CR3 in RSI and the paging mode in RBX, found again or made.

    If RCX is not 0 and the mode is PAE paging, the PDPTEs are loaded before; if these are wrong, nothing is done.
    """
    pool = m[s.SHADOW_POOL]
    mode = format_of(m[s.GPR + s.RBX])
    if mode & d.MODE_PAE and m[s.GPR + s.RCX]:
        reserved = shadow_get(m, a, t, pool + P_RESERVED)
        if not load_pdptes(m, a, t, m[s.GPR + s.RSI], reserved):
            m[s.GPR + s.RAX] = 0
            return 0
        for n in range(4):
            shadow_put(m, a, t, pool + P_PDPTE + 8 * n, m[s.SHADOW_STACK + n])
    if m[s.SHADOW_MODE] != mode:
        unlist_roots(m, a, t)
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
    if not loaded_before(m, a, t, m[s.GPR + s.RSI] | (mode & ~d.MODE_LEGACY) << d.MODE_SHIFT):
        m[s.SHADOW_FLAGS] |= STRANGE_ROOT
    root = find_page(m, a, t, frame, role_of(m, top_level(m), d.ALL_RIGHTS, direct))
    shadow_put(m, a, t, pool + P_ROOT, root + 1)
    m[s.SHADOW_ROOT] = root
    if mode & d.NARROW:
        link_directories(m, a, t)
    m[s.SHADOW_FLAGS] &= ~NO_ROOT
    m[s.GPR + s.RAX] = m[s.SHADOW_TABLES] + (root << 12)
    if not direct:
        list_root(m, a, t, m[s.GPR + s.RSI], m[s.GPR + s.RAX])
    return 0
