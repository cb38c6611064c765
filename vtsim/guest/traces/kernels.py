"""Records to the words that streams read, a block at a time."""

import numpy as np
from numpy.typing import NDArray

from vtsim.base.jit import kernel

NEWLINE, RETURN, SPACE, COMMA, EQUALS, DASH = 10, 13, 32, 44, 61, 45
DIGIT_0, DIGIT_9, LOWER_A, LOWER_F = 48, 57, 97, 102
LETTER_I, LETTER_L, LETTER_S, LETTER_M = 73, 76, 83, 77
FETCH, LOAD, STORE, MODIFY = 0, 1, 2, 3
ADDRESS_DIGITS = 15  # sixteen would reach the sign bit; a user's program lives far below
SIZE_LIMIT = 1 << 16
GOOD = -1


@kernel
def parse_lackey(
    text: NDArray[np.uint8],
    end: int,
    kinds: NDArray[np.uint8],
    addresses: NDArray[np.int64],
    sizes: NDArray[np.uint16],
) -> tuple[int, int]:
    """Parse whole lines of `text[:end]`; return records found, and where a malformed line starts or GOOD."""
    records = 0
    at = 0
    while at < end:
        line = at
        first = int(text[at])
        if first in (EQUALS, DASH, NEWLINE):  # valgrind's own messages
            while int(text[at]) != NEWLINE:
                at += 1
            at += 1
            continue
        if at + 3 >= end or int(text[at + 2]) != SPACE:
            return records, line
        second = int(text[at + 1])
        if first == LETTER_I and second == SPACE:
            kind = FETCH
        elif first == SPACE and second == LETTER_L:
            kind = LOAD
        elif first == SPACE and second == LETTER_S:
            kind = STORE
        elif first == SPACE and second == LETTER_M:
            kind = MODIFY
        else:
            return records, line
        at += 3
        address = 0
        digits = 0
        while digits <= ADDRESS_DIGITS:
            letter = int(text[at])
            if DIGIT_0 <= letter <= DIGIT_9:
                address = (address << 4) | (letter - DIGIT_0)
            elif LOWER_A <= letter <= LOWER_F:
                address = (address << 4) | (letter - LOWER_A + 10)
            else:
                break
            digits += 1
            at += 1
        if digits == 0 or digits > ADDRESS_DIGITS or int(text[at]) != COMMA:
            return records, line
        at += 1
        size = 0
        while DIGIT_0 <= int(text[at]) <= DIGIT_9 and size < SIZE_LIMIT:
            size = size * 10 + int(text[at]) - DIGIT_0
            at += 1
        if int(text[at]) == RETURN:
            at += 1
        if int(text[at]) != NEWLINE or size == 0 or size >= SIZE_LIMIT:
            return records, line
        at += 1
        kinds[records] = kind
        addresses[records] = address
        sizes[records] = size
        records += 1
    return records, GOOD


# --- words: store | address << 1 | work << 48; negative ones have no access ------------------------------------------

ADDRESS_BITS = 47
WORK_SHIFT, WORK_LIMIT = 48, 0x7FFF
NO_ACCESS = -1 << 63
NOTHING = -1
# state between blocks: the access that waits for the work after it, instructions less those that words stand for
HELD, OWED, STATE_WORDS = 0, 1, 2
PAGE_TABLE = 4096


@kernel
def put_work(out: NDArray[np.int64], n: int, state: NDArray[np.int64], work: int) -> int:
    """Write the access that waits, with `work` instructions after it; the next free place."""
    held = int(state[HELD])
    state[OWED] -= work
    if held != NOTHING:
        now = min(work, WORK_LIMIT)
        out[n] = held | now << WORK_SHIFT
        work -= now
        n += 1
        state[HELD] = NOTHING
    while work > 0:
        now = min(work, WORK_LIMIT)
        out[n] = NO_ACCESS | now << WORK_SHIFT
        work -= now
        n += 1
    return n


@kernel
def put_access(out: NDArray[np.int64], n: int, state: NDArray[np.int64], address: int, store: int) -> int:
    """An access is made: what came before it can be written."""
    n = put_work(out, n, state, max(int(state[OWED]) - 1, 0))
    state[OWED] -= 1
    state[HELD] = address << 1 | store
    return n


@kernel
def put_instruction(out: NDArray[np.int64], n: int, state: NDArray[np.int64]) -> int:
    """An instruction begins."""
    state[OWED] += 1
    if state[OWED] > WORK_LIMIT:
        n = put_work(out, n, state, WORK_LIMIT)
    return n


@kernel
def lackey_words(
    kinds: NDArray[np.uint8],
    addresses: NDArray[np.int64],
    count: int,
    out: NDArray[np.int64],
    state: NDArray[np.int64],
) -> int:
    """Words from lackey's records; a modification loads, then stores. `out` has room for two a record, and two."""
    n = 0
    for i in range(count):
        kind = int(kinds[i])
        if kind == FETCH:
            n = put_instruction(out, n, state)
            continue
        if kind != STORE:
            n = put_access(out, n, state, int(addresses[i]), 0)
        if kind != LOAD:
            n = put_access(out, n, state, int(addresses[i]), 1)
    return n


@kernel
def champsim_words(records: NDArray[np.int64], count: int, out: NDArray[np.int64], state: NDArray[np.int64]) -> int:
    """Words from ChampSim's records: loads, then stores. `out` has room for six a record, and two."""
    n = 0
    for i in range(count):
        n = put_instruction(out, n, state)
        for at in range(4, 8):
            if records[i, at]:
                n = put_access(out, n, state, int(records[i, at]), 0)
        for at in range(2, 4):
            if records[i, at]:
                n = put_access(out, n, state, int(records[i, at]), 1)
    return n


@kernel
def finish_words(out: NDArray[np.int64], state: NDArray[np.int64]) -> int:
    """The last access and the instructions after it."""
    return put_work(out, 0, state, max(int(state[OWED]), 0))


@kernel
def new_pages(words: NDArray[np.int64], count: int, seen: NDArray[np.int64], out: NDArray[np.int64]) -> int:
    """Numbers of pages that words touch, without most of the repetitions: `seen` remembers some."""
    n = 0
    for i in range(count):
        word = int(words[i])
        if word >= 0:
            page = (word >> 13) & ((1 << ADDRESS_BITS - 12) - 1)
            if seen[page & (PAGE_TABLE - 1)] != page:
                seen[page & (PAGE_TABLE - 1)] = page
                out[n] = page
                n += 1
    return n
