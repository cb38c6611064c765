"""Text to numbers, a block at a time."""

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
