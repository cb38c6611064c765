"""The hooks of binary translation: a block translated, an exit chained, an indirect branch looked up.

Every instruction that is read costs a load, every one that is made a store, and their addresses are kept in the map.

Not modelled: what a binary translator computes beside its loads and stores; blocks that cross pages of the guest with
other mappings; jumps through tables of a deprivileged kernel; a kernel that writes its own code.
"""

from __future__ import annotations

from typing import Final

from vtsim.base.jit import Arena, Record, Tags, kernel
from vtsim.base.memory import A_CODE_MAPS, A_CODE_OF, A_ROWS, CODE, kind_of
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.exit_rules import RING, SENSITIVE
from vtsim.cpu.kernels.access import timed_access
from vtsim.cpu.kernels.hook_access import hook_load, hook_store
from vtsim.cpu.kernels.rights import READ, WRITE
from vtsim.cpu.translation import (
    BLOCK_BYTES,
    BLOCK_INSTRUCTIONS,
    HASH_ENTRIES,
    HASH_SETS,
    HASH_WAYS,
    NOT_YET,
    ROOM,
    TRANSLATOR,
)

# fmt: off
FIRST_TRANSLATION_HOOK: Final = 32
(TRANSLATE, CHAIN, ADAPT, LOOK_UP, LOOK_UP_RETURN) = range(32, 37)
TRANSLATION_HOOKS: Final = (
    ("TRANSLATE",      "translator RDI, original address RSI; RAX <- its translation"),
    ("CHAIN",          "exit of a translation at RSI leads to the translation RBX from now on"),
    ("ADAPT",          "translator RDI: the store translated at RSI, originally at RBX, is called out from now on"),
    ("LOOK_UP",        "in ring 3: JUMP <- translation of TARGET"),
    ("LOOK_UP_RETURN", "in ring 3: TARGET <- the address on the stack, JUMP <- its translation"),
)
T_CACHE: int = TRANSLATOR["CACHE"]
T_PAGES: int = TRANSLATOR["PAGES"]
T_NEXT: int = TRANSLATOR["NEXT"]
T_FRAME: int = TRANSLATOR["FRAME"]
T_MAP: int = TRANSLATOR["MAP"]
T_HASH: int = TRANSLATOR["HASH"]
T_FIRST_ROW: int = TRANSLATOR["FIRST_ROW"]
T_ROWS: int = TRANSLATOR["ROWS"]
T_NEXT_ROW: int = TRANSLATOR["NEXT_ROW"]
T_SAVED_RCX: int = TRANSLATOR["SAVED_RCX"]
T_SAVED_R11: int = TRANSLATOR["SAVED_R11"]
T_INTERRUPTS: int = TRANSLATOR["INTERRUPTS"]
T_CR: int = TRANSLATOR["CR"]
T_JUMP_AT: int = TRANSLATOR["JUMP_AT"]
T_TARGET_AT: int = TRANSLATOR["TARGET_AT"]
T_MISS: int = TRANSLATOR["MISS"]
T_TARGET: int = TRANSLATOR["TARGET"]
T_JUMP: int = TRANSLATOR["JUMP"]
T_BLOCKS: int = TRANSLATOR["BLOCKS"]
T_TAKEN: int = TRANSLATOR["TAKEN"]
T_MADE: int = TRANSLATOR["MADE"]
T_IDENTICAL: int = TRANSLATOR["IDENTICAL"]
T_IN_LINE: int = TRANSLATOR["IN_LINE"]
T_CALL_OUTS: int = TRANSLATOR["CALL_OUTS"]
T_FLUSHES: int = TRANSLATOR["FLUSHES"]
T_EVICTED: int = TRANSLATOR["EVICTED"]
T_CHAINED: int = TRANSLATOR["CHAINED"]
T_LOOKUPS: int = TRANSLATOR["LOOKUPS"]
T_ADAPTED: int = TRANSLATOR["ADAPTED"]
T_MISSES: int = TRANSLATOR["MISSES"]
NO_MEM: int = 16 | 16 << o.MEM_INDEX | 8 << o.MEM_SIZE
EXIT_BYTES: int = 10
# what is being made, in the record: translator, address, row, original address, activity
(MAKER, MAKE_AT, MAKE_ROW, MAKE_FROM, MAKE_ACTIVITY, MAKE_COUNT) = range(s.TRANSLATION, s.TRANSLATION + 6)
# fmt: on


@kernel
def translator_get(m: Record, a: Arena, t: Tags, word: int) -> int:
    """A word of the translator's structure."""
    return hook_load(m, a, t, m[MAKER] + word)


@kernel
def translator_add(m: Record, a: Arena, t: Tags, word: int, more: int) -> None:
    """Count in the translator's structure."""
    hook_store(m, a, t, m[MAKER] + word, hook_load(m, a, t, m[MAKER] + word) + more)


@kernel
def hash_at(m: Record, a: Arena, t: Tags, address: int) -> int:
    """The linear address of the hash table's set for an original address."""
    return translator_get(m, a, t, T_HASH) + 16 * HASH_WAYS * ((address ^ (address >> 8)) & (HASH_SETS - 1))


@kernel
def make(
    m: Record, a: Arena, t: Tags, op: int, length: int, r1: int, imm: int, packed: int, disp: int, target: int, was: int
) -> int:
    """Put one row behind what was made; `was` is its word of the map. The row's place in the arena."""
    at = m[MAKE_AT]
    base = translator_get(m, a, t, T_CACHE)
    frame = translator_get(m, a, t, T_FRAME) + ((at - base) >> 12)
    offset = at & 0xFFF
    r = a[A_ROWS] + m[MAKE_ROW] * o.ROW_WORDS
    straddles = 1 if (offset & 63) + length > 64 else 0
    a[r] = op | length << o.META_LENGTH | offset << o.META_OFFSET | m[MAKE_ACTIVITY] << o.META_ACTIVITY
    a[r] |= straddles << o.META_STRADDLES
    a[r + o.ROW_R1] = r1
    a[r + o.ROW_R2] = 16
    a[r + o.ROW_IMM] = imm
    a[r + o.ROW_MEM] = packed
    a[r + o.ROW_DISP] = disp
    a[r + o.ROW_TARGET] = 0
    a[r + o.ROW_EXTRA] = target
    t[a[A_CODE_MAPS] + a[a[A_CODE_OF] + frame] * 4096 + offset] = m[MAKE_ROW]
    timed_access(m, a, t, at, WRITE)
    m[s.RETIRED] += 1
    m[s.CYCLE] += m[s.PRICE + o.ST]
    hook_store(m, a, t, translator_get(m, a, t, T_MAP) + 8 * (at - base), was)
    m[MAKE_AT] = at + length
    m[MAKE_ROW] += 1
    m[MAKE_COUNT] += 1
    return r


@kernel
def uncounted(a: Arena, r: int) -> None:
    """A row that was made stands for no instruction of the original program."""
    a[r] |= 1 << o.META_UNCOUNTED


@kernel
def make_exit(m: Record, a: Arena, t: Tags, was: int, counted: bool) -> None:
    """Save what SYSCALL takes, and leave for the monitor: a call-out, or an exit to what is not translated yet.

    Is it `counted` as an instruction of the original program, which a jump is?
    """
    uncounted(a, make(m, a, t, o.ST, 4, s.RCX, 0, NO_MEM, translator_get(m, a, t, T_SAVED_RCX), 0, was))
    uncounted(a, make(m, a, t, o.ST, 4, s.R11, 0, NO_MEM, translator_get(m, a, t, T_SAVED_R11), 0, was))
    leave = make(m, a, t, o.SYSCALL, 2, 16, 0, NO_MEM, 0, 0, was)
    if not counted:
        uncounted(a, leave)


@kernel
def end_row(a: Arena, m: Record) -> None:
    """Nothing follows the row made last."""
    a[a[A_ROWS] + (m[MAKE_ROW] - 1) * o.ROW_WORDS] |= 1 << o.META_LAST


@kernel
def empty_cache(m: Record, a: Arena, t: Tags) -> None:
    """The cache is full: every translation goes."""
    pages = translator_get(m, a, t, T_PAGES)
    frame = translator_get(m, a, t, T_FRAME)
    for page in range(pages):
        first = a[A_CODE_MAPS] + a[a[A_CODE_OF] + frame + page] * 4096
        for n in range(4096):
            t[first + n] = -1
    table = translator_get(m, a, t, T_HASH)
    for n in range(HASH_ENTRIES):
        hook_store(m, a, t, table + 16 * n, 0)
    translator_add(m, a, t, T_FLUSHES, 1)
    m[MAKE_AT] = translator_get(m, a, t, T_CACHE)
    m[MAKE_ROW] = translator_get(m, a, t, T_FIRST_ROW)
    m[s.FETCH_GENERATION] += 1


@kernel
def guest_row(m: Record, a: Arena, t: Tags, rip: int) -> int:
    """The row at an original address: its place in the arena, 0 where none is, or a fault."""
    hpa = timed_access(m, a, t, rip, READ)
    if hpa < 0:
        return hpa
    m[s.RETIRED] += 1
    m[s.CYCLE] += m[s.PRICE + o.LD]
    if kind_of(a, hpa >> 12) != CODE:
        return 0
    row = t[a[A_CODE_MAPS] + a[a[A_CODE_OF] + (hpa >> 12)] * 4096 + (hpa & 0xFFF)]
    return a[A_ROWS] + row * o.ROW_WORDS if row >= 0 else 0


@kernel
def translate_block(m: Record, a: Arena, t: Tags) -> int:
    """TRANSLATE: a fault, or 0. Nothing is kept of a block whose reading faulted."""
    m[MAKER] = m[s.GPR + s.RDI]
    rip = m[s.GPR + s.RSI]
    at = translator_get(m, a, t, T_NEXT)
    m[MAKE_AT] = at if (at & 0xFFF) + ROOM <= 4096 else (at | 0xFFF) + 1
    m[MAKE_ROW] = translator_get(m, a, t, T_NEXT_ROW)
    end = translator_get(m, a, t, T_CACHE) + (translator_get(m, a, t, T_PAGES) << 12)
    last = translator_get(m, a, t, T_FIRST_ROW) + translator_get(m, a, t, T_ROWS)
    if m[MAKE_AT] >= end or m[MAKE_ROW] + 4 * BLOCK_INSTRUCTIONS > last:
        empty_cache(m, a, t)
        translator_add(m, a, t, T_EVICTED, translator_get(m, a, t, T_BLOCKS) - translator_get(m, a, t, T_EVICTED))
    first = m[MAKE_AT]
    m[MAKE_COUNT] = 0
    m[MAKE_ACTIVITY] = 0
    taken = 0
    identical = 0
    in_line = 0
    call_outs = 0
    while True:
        if taken >= BLOCK_INSTRUCTIONS or m[MAKE_AT] - first > BLOCK_BYTES:
            make_exit(m, a, t, rip & ~NOT_YET, False)
            break
        r = guest_row(m, a, t, rip)
        if r < 0:
            return r
        if r == 0:  # the fault is the guest's, where it executes
            make(m, a, t, o.UD, 2, 16, 0, NO_MEM, 0, 0, rip)
            break
        meta = a[r]
        op = meta & 0xFF
        length = (meta >> o.META_LENGTH) & 0xFFFF
        m[MAKE_ACTIVITY] = (meta >> o.META_ACTIVITY) & 31
        following = rip + length
        target = a[r + o.ROW_EXTRA]
        taken += 1
        if op == o.JMP:
            in_line += 1
            make_exit(m, a, t, target & ~NOT_YET, True)
            break
        if op == o.JCC or op == o.LOOP:
            identical += 1
            beyond = m[MAKE_AT] + length + EXIT_BYTES
            make(m, a, t, op, length, 16, a[r + o.ROW_IMM], NO_MEM, a[r + o.ROW_DISP], beyond, rip)
            make_exit(m, a, t, following & ~NOT_YET, False)
            make_exit(m, a, t, target & ~NOT_YET, False)
            break
        if op == o.CALL:
            in_line += 1
            make(m, a, t, o.PUSH, 5, 16, following, NO_MEM, 0, 0, rip)
            make_exit(m, a, t, target & ~NOT_YET, False)
            break
        if op == o.RET or op == o.JMP_REG or op == o.CALL_REG:
            in_line += 1
            if op == o.RET:
                make(m, a, t, o.HOOK, 5, 16, LOOK_UP_RETURN, NO_MEM, 0, 0, rip)
                up = s.RSP | 16 << o.MEM_INDEX | 8 << o.MEM_SIZE
                make(m, a, t, o.LEA, 4, s.RSP, 0, up, 8, 0, rip)
            else:
                where = translator_get(m, a, t, T_TARGET_AT)
                uncounted(a, make(m, a, t, o.ST, 4, a[r + o.ROW_R1], 0, NO_MEM, where, 0, rip))
                make(m, a, t, o.HOOK, 5, 16, LOOK_UP, NO_MEM, 0, 0, rip)
                if op == o.CALL_REG:
                    make(m, a, t, o.PUSH, 5, 16, following, NO_MEM, 0, 0, rip)
            jump = make(m, a, t, o.JMP_MEM, 7, 16, 0, NO_MEM, translator_get(m, a, t, T_JUMP_AT), 0, 0)
            if op != o.JMP_REG:
                uncounted(a, jump)
            break
        if op == o.CLI:
            in_line += 1
            make(m, a, t, o.ST, 4, 16, 0, NO_MEM, translator_get(m, a, t, T_INTERRUPTS), 0, rip)
        elif op == o.MOV_FROM_CR or (op == o.MOV_TO_CR and a[r + o.ROW_IMM] == 8):
            in_line += 1
            number = a[r + o.ROW_IMM]
            place = 4 if number == 8 else max(number - 1, 0)
            move = o.LD if op == o.MOV_FROM_CR else o.ST
            make(m, a, t, move, 4, a[r + o.ROW_R1], 0, NO_MEM, translator_get(m, a, t, T_CR) + 8 * place, 0, rip)
        elif RING[op] == 1 or RING[op] == 2 or SENSITIVE[op] or op == o.SYSCALL or op == o.JMP_MEM:
            call_outs += 1
            make_exit(m, a, t, rip, False)
        else:
            identical += 1
            copy = make(m, a, t, op, length, a[r + o.ROW_R1], 0, 0, 0, 0, rip)
            for word in range(1, o.ROW_WORDS):
                a[copy + word] = a[r + word]
        rip = following
    end_row(a, m)
    line = hash_at(m, a, t, m[s.GPR + s.RSI])
    way = translator_get(m, a, t, T_BLOCKS) & (HASH_WAYS - 1)  # whose turn it is, where none is free
    for n in range(HASH_WAYS):
        if hook_load(m, a, t, line + 16 * n) == 0:
            way = n
            break
    line += 16 * way
    hook_store(m, a, t, line, m[s.GPR + s.RSI])
    hook_store(m, a, t, line + 8, first)
    hook_store(m, a, t, m[MAKER] + T_NEXT, m[MAKE_AT])
    hook_store(m, a, t, m[MAKER] + T_NEXT_ROW, m[MAKE_ROW])
    translator_add(m, a, t, T_BLOCKS, 1)
    translator_add(m, a, t, T_TAKEN, taken)
    translator_add(m, a, t, T_MADE, m[MAKE_COUNT])
    translator_add(m, a, t, T_IDENTICAL, identical)
    translator_add(m, a, t, T_IN_LINE, in_line)
    translator_add(m, a, t, T_CALL_OUTS, call_outs)
    m[s.GPR + s.RAX] = first
    return 0


@kernel
def chain_exit(m: Record, a: Arena, t: Tags) -> int:
    """CHAIN: the first row of an exit becomes a jump to a translation."""
    m[MAKER] = m[s.GPR + s.RDI]
    at = m[s.GPR + s.RSI]
    frame = translator_get(m, a, t, T_FRAME) + ((at - translator_get(m, a, t, T_CACHE)) >> 12)
    row = t[a[A_CODE_MAPS] + a[a[A_CODE_OF] + frame] * 4096 + (at & 0xFFF)]
    if row < 0:
        return 0
    r = a[A_ROWS] + row * o.ROW_WORDS
    timed_access(m, a, t, at, WRITE)
    m[s.RETIRED] += 1
    m[s.CYCLE] += m[s.PRICE + o.ST]
    a[r] = (a[r] & ~0xFF) | o.JMP
    if (a[r + 2 * o.ROW_WORDS] >> o.META_UNCOUNTED) & 1 == 0:
        a[r] &= ~(1 << o.META_UNCOUNTED)
    a[r + o.ROW_R1] = 16
    a[r + o.ROW_DISP] = 0
    a[r + o.ROW_EXTRA] = m[s.GPR + s.RBX]
    translator_add(m, a, t, T_CHAINED, 1)
    return 0


@kernel
def adapt(m: Record, a: Arena, t: Tags) -> int:
    """ADAPT: an instruction that faults again and again becomes a call-out, where there is room for one."""
    m[MAKER] = m[s.GPR + s.RDI]
    at = m[s.GPR + s.RSI]
    base = translator_get(m, a, t, T_CACHE)
    frame = translator_get(m, a, t, T_FRAME) + ((at - base) >> 12)
    row = t[a[A_CODE_MAPS] + a[a[A_CODE_OF] + frame] * 4096 + (at & 0xFFF)]
    m[MAKE_AT] = translator_get(m, a, t, T_NEXT)
    m[MAKE_ROW] = translator_get(m, a, t, T_NEXT_ROW)
    last = translator_get(m, a, t, T_FIRST_ROW) + translator_get(m, a, t, T_ROWS)
    end = base + (translator_get(m, a, t, T_PAGES) << 12)
    room = 4096 - (m[MAKE_AT] & 0xFFF)
    if row < 0 or room < EXIT_BYTES or m[MAKE_AT] >= end or m[MAKE_ROW] + 3 > last:
        return 0
    r = a[A_ROWS] + row * o.ROW_WORDS
    m[MAKE_ACTIVITY] = (a[r] >> o.META_ACTIVITY) & 31
    target = m[MAKE_AT]
    make_exit(m, a, t, m[s.GPR + s.RBX], False)
    end_row(a, m)
    timed_access(m, a, t, at, WRITE)
    m[s.RETIRED] += 1
    m[s.CYCLE] += m[s.PRICE + o.ST]
    a[r] = (a[r] & ~0xFF) | o.JMP | 1 << o.META_UNCOUNTED
    a[r + o.ROW_R1] = 16
    a[r + o.ROW_TARGET] = 0
    a[r + o.ROW_EXTRA] = target
    hook_store(m, a, t, m[MAKER] + T_NEXT, m[MAKE_AT])
    hook_store(m, a, t, m[MAKER] + T_NEXT_ROW, m[MAKE_ROW])
    translator_add(m, a, t, T_ADAPTED, 1)
    return 0


@kernel
def look_up(m: Record, a: Arena, t: Tags, from_stack: bool) -> int:
    """LOOK_UP, LOOK_UP_RETURN: a fault, or 0."""
    m[MAKER] = m[s.TRANSLATOR]
    retired = m[s.RETIRED]
    target = hook_load(m, a, t, m[s.GPR + s.RSP] if from_stack else m[MAKER] + T_TARGET)
    if m[s.FAULT_KIND]:
        return m[s.FAULT_KIND]
    if from_stack:
        hook_store(m, a, t, m[MAKER] + T_TARGET, target)
    line = hash_at(m, a, t, target)
    jump = 0
    for n in range(HASH_WAYS):
        if hook_load(m, a, t, line + 16 * n) == target:
            jump = hook_load(m, a, t, line + 16 * n + 8)
            break
    if jump == 0:
        jump = translator_get(m, a, t, T_MISS)
        translator_add(m, a, t, T_MISSES, 1)
    translator_add(m, a, t, T_LOOKUPS, 1)
    hook_store(m, a, t, m[MAKER] + T_JUMP, jump)
    m[s.RETIRED] = retired
    return 0


@kernel
def translation_hook(m: Record, a: Arena, t: Tags, number: int) -> int:
    """Run a hook of binary translation: a fault, or 0."""
    if number == TRANSLATE:
        return translate_block(m, a, t)
    if number == CHAIN:
        return chain_exit(m, a, t)
    if number == ADAPT:
        return adapt(m, a, t)
    return look_up(m, a, t, number == LOOK_UP_RETURN)
