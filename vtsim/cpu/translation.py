"""The translation cache of a binary translator, as its hooks and programs know it: words of its structure.

A translation stands in code pages that ring 3 executes. For every byte of them the map says what an instruction there
was translated from: its original address; with `NOT_YET` cleared, the original address to go to next; or 0, where the
next instruction is at the address that a look-up left in TARGET.
"""

from __future__ import annotations

from typing import Final

from vtsim.base.words import byte_offsets

# fmt: off
TRANSLATOR_WORDS: Final = (
    # name           words  meaning
    ("CACHE",           1, "linear address of the code pages"),
    ("PAGES",           1, "how many"),
    ("NEXT",            1, "where the next translation goes"),
    ("FRAME",           1, "host frame of the first code page; the others follow"),
    ("MAP",             1, "linear address of the map, a word for each byte of the code pages"),
    ("HASH",            1, "linear address of the hash table: original address, translation"),
    ("FIRST_ROW",       1, "rows of the code pages"),
    ("ROWS",            1, "how many"),
    ("NEXT_ROW",        1, "the next free one"),
    ("SAVED_RCX",       1, "linear address, in ring 3, of what a call-out saves of RCX"),
    ("SAVED_R11",       1, "the same of R11"),
    ("INTERRUPTS",      1, "linear address, in ring 3, of the guest's interrupt flag"),
    ("CR",              1, "linear address, in ring 3, of CR0, CR2, CR3, CR4, CR8 that it believes in"),
    ("JUMP_AT",         1, "linear address, in ring 3, of JUMP"),
    ("TARGET_AT",       1, "linear address, in ring 3, of TARGET"),
    ("MISS",            1, "translation that leaves for the monitor, to translate TARGET"),
    ("TARGET",          1, "original address that an indirect branch goes to"),
    ("JUMP",            1, "its translation"),
    ("BLOCKS",          1, "blocks translated"),
    ("TAKEN",           1, "instructions translated"),
    ("MADE",            1, "instructions of their translations"),
    ("IDENTICAL",       1, "of those translated, identically"),
    ("IN_LINE",         1, "of those translated, into others that need no monitor"),
    ("CALL_OUTS",       1, "of those translated, into call-outs"),
    ("FLUSHES",         1, "times that the cache was full and emptied"),
    ("EVICTED",         1, "blocks that went then"),
    ("ADAPTED",         1, "stores to tables that faulted again and again, made into call-outs"),
    ("CHAINED",         1, "exits of translations that lead to another one directly"),
    ("LOOKUPS",         1, "look-ups of indirect branches and returns"),
    ("MISSES",          1, "of them, without a translation found"),
)
# fmt: on
TRANSLATOR: Final = byte_offsets(TRANSLATOR_WORDS)
COUNTED: Final = tuple(name for name, _, _ in TRANSLATOR_WORDS[-12:])
NOT_YET: Final = 1 << 62  # set in every address of a guest's kernel
HASH_ENTRIES: Final = 1024  # 16 bytes each, in sets of WAYS
HASH_WAYS: Final = 4
HASH_SETS: Final = HASH_ENTRIES // HASH_WAYS
BLOCK_INSTRUCTIONS: Final = 24
BLOCK_BYTES: Final = 1024  # a block ends beyond them
ROOM: Final = 1536  # that a page must have for another block
