"""Semantic actions that programs ask for, compiled: radix tables, look-ups and page-sized memory operations.

A hook sees registers and simulated memory only. Every load and store that it stands for goes through TLBs and caches
and counts as an instruction. It may refuse (a fault delivered at the hook's RIP); it never sets RIP or privilege.
Page-table hooks see the tables through a linear map of physical memory that starts at R8; bits 53:52 of the root say of
which paging mode they are (`table_hooks`). What a refused hook had done
stands in registers, so that it goes on when it is made again. The hooks of shadow paging are in `shadow_hooks`, those
of memory management in `memory_hooks`.
"""

from __future__ import annotations

from typing import Final

from vtsim.base.jit import Arena, Record, Tags, kernel
from vtsim.base.memory import (
    A_CODE_MAPS,
    A_CODE_OF,
    A_REPLAY_COUNT,
    A_REPLAY_ROWS,
    A_ROWS,
    CODE,
    PAGE_WORDS,
    PLAIN,
    VALUES,
    allocate,
    contents,
    give_contents,
    kind_of,
    set_kind,
    touch,
)
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.codes import MODEL_FAULT, NEXT, STOPPED
from vtsim.cpu.kernels.access import timed_access
from vtsim.cpu.kernels.digest import shown
from vtsim.cpu.kernels.exceptions import raise_fault
from vtsim.cpu.kernels.hook_access import hook_load, hook_store, sweep, zero_page
from vtsim.cpu.kernels.memory_hooks import FIRST_MEMORY_HOOK, memory_hook
from vtsim.cpu.kernels.overlap import drain
from vtsim.cpu.kernels.rights import READ, WRITE
from vtsim.cpu.kernels.shadow_hooks import FIRST_SHADOW_HOOK, FIRST_SHARED_SHADOW_HOOK, shadow_hook
from vtsim.cpu.kernels.table_hooks import table_clear, table_copy, table_lookup, table_lookup_direct, table_map
from vtsim.cpu.kernels.translator import FIRST_TRANSLATION_HOOK, translation_hook

# fmt: off
(TABLE_MAP, TABLE_LOOKUP, TABLE_COPY, TABLE_CLEAR, FIND, HIGHEST_BIT, FRAME_ALLOCATE, PAGE_ZERO, PAGE_COPY,
 SET_BIT, CLEAR_BIT, DECODE, TABLE_LOOKUP_DIRECT, OPERAND, SHOW, SCALE) = range(16)
HOOKS: Final = (
    # name             registers
    ("TABLE_MAP",      "root RDI, address RSI, leaf entry RDX, leaf level RCX, linear map R8, allocator R9 (next frame "
                       "number, end: two words), bits of upper entries R10, 0 in R11; RAX <- 0, or 1 if the allocator "
                       "is empty, RDX <- the entry that stood there"),
    ("TABLE_LOOKUP",   "root RDI, address RSI, linear map R8, present bits R10; RAX <- leaf entry or 0, RDX <- level, "
                       "RCX <- linear address of the entry"),
    ("TABLE_COPY",     "source root RDI, copy's root RSI, first and last top-level index RDX RCX, linear map R8, "
                       "allocator R9, bits cleared in leaves of both R10, 0 in RAX, RBX and R11; RAX <- leaves copied"),
    ("TABLE_CLEAR",    "root RDI, first address RSI, pages RDX, linear map R8; RAX <- RAX + leaves cleared"),
    ("FIND",           "table RDI, key RSI, entries RDX, words per entry RCX; RAX <- address of the entry or 0"),
    ("HIGHEST_BIT",    "256-bit register at RDI; RAX <- highest set bit or -1"),
    ("FRAME_ALLOCATE", "RAX <- number of a free host frame, or -1"),
    ("PAGE_ZERO",      "page at RDI becomes zero"),
    ("PAGE_COPY",      "page at RDI becomes a copy of the page at RSI"),
    ("SET_BIT",        "bit RSI of the bit string at RDI <- 1; RAX <- old value"),
    ("CLEAR_BIT",      "bit RSI of the bit string at RDI <- 0; RAX <- old value"),
    ("DECODE",         "instruction at the guest's RIP in RSI, whose bytes stand at RDI; RAX <- op or -1, RCX register "
                       "or 16, RDX <- bytes of its memory operand, RBX <- immediate, R9 <- length, R10 <- second "
                       "register or 16"),
    ("TABLE_LOOKUP_DIRECT", "root RDI, address RSI, linear map R8, linear address R9 of the table from host frame to "
                       "guest-physical address, present bits R10; RAX <- leaf entry or 0, RDX <- level, RCX <- linear "
                       "address of the entry, R11 <- its host-physical address"),
    ("OPERAND",        "instruction whose bytes stand at RDI, general registers by number at RSI; RAX <- linear "
                       "address of its memory operand"),
    ("SHOW",           "the guest that this CPU's monitor runs is shown RAX, by op RDX of RCX; from bit 8 of "
                       "RDX, which part (for digests only). Under VMX: the guest's registers in memory show what it "
                       "exited for, or what was last named here; next that is by op RDX (0 nothing) of RCX at RAX"),
    ("SCALE",          "RAX <- RAX * RCX / 2**32, unsigned: MUL and SHRD"),
)
FIRST_PLATFORM_HOOK: Final = 128
# fmt: on


@kernel
def find_entry(m: Record, a: Arena, t: Tags) -> int:
    """Search a table of fixed-size entries for a key in their first word: a fault or 0."""
    at = m[s.GPR + s.RDI]
    m[s.GPR + s.RAX] = 0
    for _ in range(m[s.GPR + s.RDX]):
        key = hook_load(m, a, t, at)
        m[s.RETIRED] += 2
        m[s.CYCLE] += 1
        if m[s.FAULT_KIND]:
            return m[s.FAULT_KIND]
        if key == m[s.GPR + s.RSI]:
            m[s.GPR + s.RAX] = at
            return 0
        at += 8 * m[s.GPR + s.RCX]
    return 0


@kernel
def highest_bit(m: Record, a: Arena, t: Tags) -> int:
    """The highest set bit of a 256-bit register in memory: a fault or 0."""
    m[s.GPR + s.RAX] = -1
    for word in range(3, -1, -1):
        bits = hook_load(m, a, t, m[s.GPR + s.RDI] + 8 * word)
        if m[s.FAULT_KIND]:
            return m[s.FAULT_KIND]
        if bits:
            for n in range(63, -1, -1):
                if (bits >> n) & 1:
                    m[s.GPR + s.RAX] = word * 64 + n
                    return 0
    return 0


@kernel
def change_bit(m: Record, a: Arena, t: Tags, value: int) -> int:
    """Set or clear one bit of a bit string: a fault or 0."""
    bit = m[s.GPR + s.RSI]
    at = m[s.GPR + s.RDI] + (bit >> 6) * 8
    word = hook_load(m, a, t, at)
    if m[s.FAULT_KIND]:
        return m[s.FAULT_KIND]
    m[s.GPR + s.RAX] = (word >> (bit & 63)) & 1
    word = (word & ~(1 << (bit & 63))) | (value << (bit & 63))
    return hook_store(m, a, t, at, word)


@kernel
def scale(m: Record) -> None:
    """RAX <- bits 95:32 of RAX * RCX. MUL takes as long as three additions on every core since Core 2, SHRD as one."""
    left = m[s.GPR + s.RAX]
    right = m[s.GPR + s.RCX]
    low, high = left & 0xFFFFFFFF, (left >> 32) & 0xFFFFFFFF
    other_low, other_high = right & 0xFFFFFFFF, (right >> 32) & 0xFFFFFFFF
    carried = ((low * other_low) >> 32) & 0xFFFFFFFF
    m[s.GPR + s.RAX] = carried + high * other_low + low * other_high + ((high * other_high) << 32)
    m[s.RETIRED] += 1
    m[s.CYCLE] += 4 * m[s.PRICE + o.ADD]


@kernel
def copy_code(m: Record, a: Arena, source: int, target: int) -> None:
    """A frame has become a copy of another: it holds the same code, or none."""
    if kind_of(a, source) == CODE:
        a[a[A_CODE_OF] + target] = a[a[A_CODE_OF] + source]
        set_kind(a, target, CODE)
        m[s.FETCH_GENERATION] += 1
    elif kind_of(a, target) == CODE:
        set_kind(a, target, PLAIN)


@kernel
def copy_page(m: Record, a: Arena, t: Tags) -> int:
    """Copy a page as REP MOVS does: a fault or 0."""
    m[s.FAULT_KIND] = 0
    source = timed_access(m, a, t, m[s.GPR + s.RSI], READ)
    if source < 0:
        return source
    target = timed_access(m, a, t, m[s.GPR + s.RDI], WRITE)
    if target < 0:
        return target
    sweep(m, a, t, source, READ)
    sweep(m, a, t, target, WRITE)
    drain(m, a)
    held = contents(a, source >> 12)
    if held:
        to = give_contents(a, target >> 12, VALUES)
        if to < 0:
            m[s.STOP] = MODEL_FAULT
            return 0
        for n in range(PAGE_WORDS):
            a[to + n] = a[held + n]
    elif contents(a, target >> 12):
        to = contents(a, target >> 12)
        for n in range(PAGE_WORDS):
            a[to + n] = 0
    touch(a, target >> 12)
    copy_code(m, a, source >> 12, target >> 12)
    return 0


@kernel
def decode(m: Record, a: Arena, t: Tags) -> int:
    """Read an instruction as an emulator does: a fault or 0. A recorded one has no bytes: it is read from its row."""
    place = m[s.GPR + s.RSI] - o.REPLAY_BASE
    r = 0
    if place >= 0 and place < a[A_REPLAY_COUNT]:
        r = a[A_REPLAY_ROWS] + place * o.ROW_WORDS
    else:
        m[s.FAULT_KIND] = 0
        hpa = timed_access(m, a, t, m[s.GPR + s.RDI], READ)
        if hpa < 0:
            return hpa
        if kind_of(a, hpa >> 12) == CODE:
            row = t[a[A_CODE_MAPS] + a[a[A_CODE_OF] + (hpa >> 12)] * 4096 + (hpa & 0xFFF)]
            if row >= 0:
                r = a[A_ROWS] + row * o.ROW_WORDS
    m[s.RETIRED] += 1
    m[s.CYCLE] += m[s.PRICE + o.LD]
    m[s.GPR + s.RAX] = -1
    if r > 0:
        m[s.GPR + s.RAX] = a[r] & 0xFF
        m[s.GPR + s.RCX] = a[r + o.ROW_R1]
        m[s.GPR + s.RDX] = (a[r + o.ROW_MEM] >> o.MEM_SIZE) & 15
        m[s.GPR + s.RBX] = a[r + o.ROW_IMM]
        m[s.GPR + s.R9] = (a[r] >> o.META_LENGTH) & 0xFFFF
        m[s.GPR + s.R10] = a[r + o.ROW_R2]
        number = a[r + o.ROW_IMM]
        if m[s.GPR + s.RAX] == o.HOOK and m[s.REFUSED_AT] and number <= TABLE_CLEAR:
            m[s.GPR + s.RAX] = o.ST  # the store in it that was refused; the hook goes on by itself
            m[s.GPR + s.RCX] = 16
            m[s.GPR + s.RDX] = m[s.REFUSED_BYTES]
            m[s.GPR + s.RBX] = m[s.REFUSED_VALUE]
            m[s.GPR + s.R9] = 0
    return 0


@kernel
def operand(m: Record, a: Arena, t: Tags) -> int:
    """Work out the address of a memory operand as an emulator does, from saved registers: a fault or 0."""
    hpa = timed_access(m, a, t, m[s.GPR + s.RDI], READ)
    if hpa < 0:
        return hpa
    m[s.RETIRED] += 1
    m[s.CYCLE] += m[s.PRICE + o.LD]
    m[s.GPR + s.RAX] = 0
    if kind_of(a, hpa >> 12) != CODE:
        return 0
    row = t[a[A_CODE_MAPS] + a[a[A_CODE_OF] + (hpa >> 12)] * 4096 + (hpa & 0xFFF)]
    if row < 0:
        return 0
    r = a[A_ROWS] + row * o.ROW_WORDS
    packed = a[r + o.ROW_MEM]
    address = a[r + o.ROW_DISP]
    index = (packed >> o.MEM_INDEX) & 31
    if packed & 31 < 16:
        address += hook_load(m, a, t, m[s.GPR + s.RSI] + 8 * (packed & 31))
    if index < 16:
        address += hook_load(m, a, t, m[s.GPR + s.RSI] + 8 * index) << ((packed >> o.MEM_SCALE) & 3)
    segment = (packed >> o.MEM_SEGMENT) & 7
    if segment == o.SEGMENT_FS:
        address += m[s.FS_BASE]
    elif segment == o.SEGMENT_GS:
        address += m[s.GS_BASE]
    m[s.GPR + s.RAX] = address
    return m[s.FAULT_KIND]


@kernel
def hook(m: Record, a: Arena, t: Tags, number: int) -> int:
    """Run a compiled hook: NEXT, or the fault that one of its accesses met."""
    m[s.FAULT_KIND] = 0
    fault = 0
    if number == TABLE_MAP:
        fault = table_map(m, a, t)
    elif number == TABLE_LOOKUP:
        fault = table_lookup(m, a, t)
    elif number == TABLE_COPY:
        fault = table_copy(m, a, t)
    elif number == TABLE_CLEAR:
        fault = table_clear(m, a, t)
    elif number == FIND:
        fault = find_entry(m, a, t)
    elif number == HIGHEST_BIT:
        fault = highest_bit(m, a, t)
    elif number == FRAME_ALLOCATE:
        m[s.GPR + s.RAX] = allocate(a)
    elif number == PAGE_ZERO:
        fault = zero_page(m, a, t, m[s.GPR + s.RDI])
    elif number == PAGE_COPY:
        fault = copy_page(m, a, t)
    elif number == SET_BIT or number == CLEAR_BIT:
        fault = change_bit(m, a, t, 1 if number == SET_BIT else 0)
    elif number == DECODE:
        fault = decode(m, a, t)
    elif number >= FIRST_MEMORY_HOOK:
        fault = memory_hook(m, a, t, number)
    elif number == TABLE_LOOKUP_DIRECT:
        fault = table_lookup_direct(m, a, t)
    elif number == OPERAND:
        fault = operand(m, a, t)
    elif number == SHOW:
        shown(m, a, m[s.GPR + s.RDX], m[s.GPR + s.RCX], m[s.GPR + s.RAX])
    elif number == SCALE:
        scale(m)
    elif number >= FIRST_SHARED_SHADOW_HOOK:
        fault = shadow_hook(m, a, t, number)
    elif number >= FIRST_TRANSLATION_HOOK:
        fault = translation_hook(m, a, t, number)
    elif number >= FIRST_SHADOW_HOOK:
        fault = shadow_hook(m, a, t, number)
    else:
        m[s.STOP] = MODEL_FAULT
        return STOPPED
    if fault < 0:
        return raise_fault(m, a, t, fault)
    if m[s.STOP]:
        return STOPPED
    return NEXT
