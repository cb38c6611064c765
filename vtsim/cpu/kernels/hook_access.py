"""How hooks access memory: single loads and stores, and whole pages, each an instruction with its price."""

from __future__ import annotations

from vtsim.base.jit import Arena, Record, Tags, kernel
from vtsim.base.memory import CODE, PAGE_WORDS, PLAIN, contents, is_memory, kind_of, set_kind, store, touch
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.codes import OUT_OF_MEMORY
from vtsim.cpu.kernels.access import read64, timed_access, write64
from vtsim.cpu.kernels.ept_walk import WRITE
from vtsim.cpu.kernels.lines import data_line
from vtsim.cpu.kernels.overlap import drain, overlapped


@kernel
def hook_load(m: Record, a: Arena, t: Tags, gva: int) -> int:
    """One load of a hook: an instruction with its price. FAULT_KIND says whether it worked."""
    m[s.RETIRED] += 1
    m[s.CYCLE] += m[s.PRICE + o.LD]
    return read64(m, a, t, gva)


@kernel
def done_meanwhile(m: Record, a: Arena, t: Tags, gva: int, value: int) -> bool:
    """Is this the store that was refused last, and did an emulator do it before the hook was made again?"""
    m[s.REFUSED_AT] = 0
    return hook_load(m, a, t, gva) == value and m[s.FAULT_KIND] == 0


@kernel
def hook_store(m: Record, a: Arena, t: Tags, gva: int, value: int) -> int:
    """One store of a hook: 0 or a fault, after which an emulator may do it in the hook's place."""
    if m[s.REFUSED_AT] == gva and m[s.REFUSED_VALUE] == value and done_meanwhile(m, a, t, gva, value):
        return 0
    m[s.RETIRED] += 1
    m[s.CYCLE] += m[s.PRICE + o.ST]
    m[s.FAULT_KIND] = write64(m, a, t, gva, value)
    if m[s.FAULT_KIND]:
        m[s.REFUSED_AT], m[s.REFUSED_VALUE], m[s.REFUSED_BYTES] = gva, value, 8
    return m[s.FAULT_KIND]


@kernel
def load_half(m: Record, a: Arena, t: Tags, gva: int) -> int:
    """As `hook_load`, of 4 bytes."""
    word = hook_load(m, a, t, gva & ~7)
    return (word >> 32 if gva & 4 else word) & 0xFFFFFFFF


@kernel
def store_half(m: Record, a: Arena, t: Tags, gva: int, value: int) -> int:
    """As `hook_store`, of 4 bytes."""
    if m[s.REFUSED_AT] == gva and m[s.REFUSED_VALUE] == value:
        m[s.REFUSED_AT] = 0
        if load_half(m, a, t, gva) == value and m[s.FAULT_KIND] == 0:
            return 0
    m[s.RETIRED] += 1
    m[s.CYCLE] += m[s.PRICE + o.ST]
    hpa = timed_access(m, a, t, gva, WRITE)
    m[s.FAULT_KIND] = 0
    if hpa < 0:
        m[s.REFUSED_AT], m[s.REFUSED_VALUE], m[s.REFUSED_BYTES] = gva, value, 4
        m[s.FAULT_KIND] = hpa
    elif is_memory(a, hpa) and store(a, hpa, 4, value) < 0:
        m[s.STOP] = OUT_OF_MEMORY
    return m[s.FAULT_KIND]


@kernel
def zero_page(m: Record, a: Arena, t: Tags, gva: int) -> int:
    """Store zeroes over a page, line by line, as REP STOS does: 0 or a fault."""
    m[s.FAULT_KIND] = 0
    hpa = timed_access(m, a, t, gva, WRITE)
    if hpa < 0:
        m[s.REFUSED_AT] = 0
        return hpa
    sweep(m, a, t, hpa, WRITE)
    drain(m, a)
    at = contents(a, hpa >> 12)
    if at:
        for n in range(PAGE_WORDS):
            a[at + n] = 0
    if kind_of(a, hpa >> 12) == CODE:
        set_kind(a, hpa >> 12, PLAIN)
    touch(a, hpa >> 12)
    return 0


@kernel
def sweep(m: Record, a: Arena, t: Tags, hpa: int, access: int) -> None:
    """Load or store over the 64 lines of a page, overlapped."""
    first = (hpa >> 12) << 6
    for line in range(first, first + 64):
        miss = data_line(m, a, t, line, access)
        if miss:
            overlapped(m, a, 0, miss, 0, 0, -1, 0)
    m[s.CYCLE] += 64
    m[s.RETIRED] += 64
