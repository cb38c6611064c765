"""The hooks of a hypervisor that manages memory: frames taken and given back, pages read to be compared.

A page is what programs stored in it by value. One that only streams wrote has contents nobody knows, and equals no
other; so has one of code.

Not modelled: values that streams store.
"""

from __future__ import annotations

from typing import Final

from vtsim.base.jit import Arena, Record, Tags, kernel
from vtsim.base.memory import A_FRAMES, CODE, FRAME_TOKEN, PAGE_WORDS, contents, kind_of
from vtsim.cpu import slots as s
from vtsim.cpu.codes import MODEL_FAULT
from vtsim.cpu.kernels.access import timed_access
from vtsim.cpu.kernels.buddy import give_block, take_block
from vtsim.cpu.kernels.hook_access import sweep
from vtsim.cpu.kernels.overlap import drain, passes
from vtsim.cpu.kernels.rights import READ

FIRST_MEMORY_HOOK: Final = 48
# fmt: off
(BUDDY_TAKE, BUDDY_GIVE, PAGE_SUM, PAGE_EQUAL) = range(48, 52)
MEMORY_HOOKS: Final = (
    # name         registers
    ("BUDDY_TAKE", "zone RDI, order RCX; RAX <- first of 2^RCX free frames, or -1"),
    ("BUDDY_GIVE", "zone RDI, first frame RSI, order RCX: they are free"),
    ("PAGE_SUM",   "page at RDI is read; RAX <- checksum of its contents, 0 where nobody knows them; RDX <- a number "
                   "that changes with every store to it"),
    ("PAGE_EQUAL", "pages at RDI and RSI are read; RAX <- 1 if their contents are known and equal, else 0"),
)
KNOWN_ZERO, UNKNOWN = 0, -1
INSTRUCTIONS_PER_WORD: int = 3     # a checksum loads, combines, multiplies; a comparison loads, compares, branches
# fmt: on


@kernel
def what_is_in(a: Arena, hfn: int) -> int:
    """The arena offset of a frame's words, KNOWN_ZERO if nothing was ever stored there, or UNKNOWN."""
    held = contents(a, hfn)
    if held:
        return UNKNOWN if kind_of(a, hfn) == CODE else held
    return UNKNOWN if kind_of(a, hfn) == CODE or token_of(a, hfn) else KNOWN_ZERO


@kernel
def token_of(a: Arena, hfn: int) -> int:
    """A frame's content token."""
    return (a[a[A_FRAMES] + hfn] >> FRAME_TOKEN) & 0x7FF_FFFF


@kernel
def read_page(m: Record, a: Arena, t: Tags, gva: int) -> int:
    """Read the 64 lines of a page: its frame, or a fault."""
    m[s.FAULT_KIND] = 0
    hpa = timed_access(m, a, t, gva, READ)
    if hpa < 0:
        return hpa
    sweep(m, a, t, hpa, READ)
    drain(m, a)
    return hpa >> 12


@kernel
def page_sum(m: Record, a: Arena, t: Tags) -> int:
    """Read a page for its checksum: 0, or a fault."""
    hfn = read_page(m, a, t, m[s.GPR + s.RDI])
    if hfn < 0:
        return hfn
    at = what_is_in(a, hfn)
    passes(m, INSTRUCTIONS_PER_WORD * PAGE_WORDS)
    total = 0
    if at != UNKNOWN:
        if at != KNOWN_ZERO:
            for n in range(PAGE_WORDS):
                total = (total ^ a[at + n]) * 0x100000001B3
        total = (total ^ (total >> 29)) & 0x7FFF_FFFF | 1
    m[s.GPR + s.RAX] = total
    m[s.GPR + s.RDX] = token_of(a, hfn)
    return 0


@kernel
def page_equal(m: Record, a: Arena, t: Tags) -> int:
    """Read two pages to compare them: 0, or a fault."""
    one = read_page(m, a, t, m[s.GPR + s.RDI])
    if one < 0:
        return one
    other = read_page(m, a, t, m[s.GPR + s.RSI])
    if other < 0:
        return other
    passes(m, INSTRUCTIONS_PER_WORD * PAGE_WORDS)
    first = what_is_in(a, one)
    second = what_is_in(a, other)
    equal = first != UNKNOWN and second != UNKNOWN
    if equal:
        for n in range(PAGE_WORDS):
            left = 0 if first == KNOWN_ZERO else a[first + n]
            if left != (0 if second == KNOWN_ZERO else a[second + n]):
                equal = False
    m[s.GPR + s.RAX] = 1 if equal else 0
    return 0


@kernel
def memory_hook(m: Record, a: Arena, t: Tags, number: int) -> int:
    """Run a hook: 0, or a fault. The lists of an allocator are always mapped: a fault in them is our mistake."""
    if number == PAGE_SUM:
        return page_sum(m, a, t)
    if number == PAGE_EQUAL:
        return page_equal(m, a, t)
    if number == BUDDY_TAKE:
        m[s.GPR + s.RAX] = take_block(m, a, t, m[s.GPR + s.RDI], m[s.GPR + s.RCX])
    elif number == BUDDY_GIVE:
        give_block(m, a, t, m[s.GPR + s.RDI], m[s.GPR + s.RSI], m[s.GPR + s.RCX])
    if m[s.FAULT_KIND] or number > PAGE_EQUAL:
        m[s.STOP] = MODEL_FAULT
    return 0
