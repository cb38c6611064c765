"""Translation contexts: a small number for every (VPID, PCID, EP4TA) that translations are tagged with.

SDM: "Caching Translation Information".
"""

from __future__ import annotations

from vtsim.base.jit import Arena, Record, kernel
from vtsim.base.memory import A_REPLAY_COUNT
from vtsim.cpu.kernels.caches import drop
from vtsim.cpu.ops import REPLAY_BASE
from vtsim.cpu.slots import (
    CONTEXT,
    CONTEXT_COUNT,
    CONTEXT_GLOBAL,
    CONTEXT_KEY,
    CONTEXT_PHYSICAL,
    CONTEXTS,
    CR0,
    CR3,
    CR4,
    DTLB4K,
    EFER,
    EPTP,
    FETCH_GENERATION,
    NESTED_TLB,
    NONROOT,
    OTHER_CONTEXT,
    OTHER_GLOBAL,
    OTHER_KEY,
    OTHER_PHYSICAL,
    PAGING_LEVELS,
    RIP,
    VPID,
)
from vtsim.ept.spec import ADDRESS

# fmt: off
CR0_PG: int = -(1 << 31) & 0xFFFFFFFF
CR4_PAE, CR4_PGE, CR4_LA57, CR4_PCIDE, CR4_SMEP = 1 << 5, 1 << 7, 1 << 12, 1 << 17, 1 << 20
EFER_LMA: int = 1 << 10
VPN_MASK: int = (1 << 45) - 1
CONTEXT_SHIFT, TAG_SHIFT, CONTEXT_LIMIT = 2, 18, 4096
CONTEXT_MASK: int = 0xFFFF << 2
GLOBAL_KEY: int = 1 << 62
LINEAR_KEY: int = (1 << 28) - 1  # VPID and PCID of a key: most invalidations are for every EP4TA
NO_CONTEXT: int = -1
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
def in_recording(a: Arena, rip: int) -> bool:
    """Does an address stand in the window of recorded rows?"""
    return 0 <= rip - REPLAY_BASE < a[A_REPLAY_COUNT]


@kernel
def recorded(m: Record, a: Arena) -> bool:
    """Does RIP stand in the window of recorded rows?"""
    return in_recording(a, m[RIP])


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
        if m[EFER] & EFER_LMA == 0:
            m[PAGING_LEVELS] = 3 if m[CR4] & CR4_PAE else 2
    elif m[NONROOT] and eptp == 0 and recorded(m, a):
        m[PAGING_LEVELS] = 5 if m[CR4] & CR4_LA57 else 4  # shadow tables, whatever the recorded guest's own are
    if m[CONTEXT_KEY] == key:
        return
    before, linear, everyone, physical = m[CONTEXT_KEY], m[CONTEXT], m[CONTEXT_GLOBAL], m[CONTEXT_PHYSICAL]
    m[CONTEXT_KEY] = key
    if m[OTHER_KEY] == key:
        m[CONTEXT], m[CONTEXT_GLOBAL], m[CONTEXT_PHYSICAL] = m[OTHER_CONTEXT], m[OTHER_GLOBAL], m[OTHER_PHYSICAL]
    else:
        if m[CONTEXT_COUNT] > CONTEXT_LIMIT - 3:
            for structure in range(DTLB4K, NESTED_TLB + 1, 4):
                drop(m, a, structure, 0, 0)
            m[FETCH_GENERATION] += 1
            m[CONTEXT_COUNT] = 0
            before = NO_CONTEXT
        m[CONTEXT] = context_of(m, a, key)
        m[CONTEXT_GLOBAL] = context_of(m, a, (key & ~(0xFFF << 16)) | GLOBAL_KEY)
        if eptp:
            m[CONTEXT_PHYSICAL] = context_of(m, a, -1 - (eptp >> 12))
    m[OTHER_KEY], m[OTHER_CONTEXT], m[OTHER_GLOBAL], m[OTHER_PHYSICAL] = before, linear, everyone, physical
