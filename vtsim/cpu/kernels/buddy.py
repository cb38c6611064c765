"""Hooks of a buddy allocator: take and give back blocks of 2^n frames, by the words of a zone and of frames' records.

A zone has a list of free blocks for each order. A block that is taken is split from the smallest that suffices; one
that is given back is joined with its buddy while that is free too. Every word is loaded and stored at its price.

Not modelled: per-CPU lists; blocks of more than 2 MiB; migration types; compaction.
"""

from __future__ import annotations

from vtsim.base.jit import Arena, Record, Tags, kernel
from vtsim.cpu.kernels.hook_access import hook_load, hook_store

# fmt: off
LARGEST_ORDER: int = 9             # 2 MiB
RECORD_WORDS: int = 2              # of a frame: number + 1 of the next in its list; of the one before, order, free
ORDER: int = 40                    # bits of the second word
FREE: int = 1 << 48
BEFORE: int = (1 << ORDER) - 1
Z_FREE, Z_RECORDS, HEADS = 0, 1, 2  # words of a zone: free frames, linear address of the records, heads by order
NO_FRAME: int = -1
# fmt: on


@kernel
def record_of(m: Record, a: Arena, t: Tags, zone: int, frame: int) -> int:
    """The linear address of a frame's record."""
    return hook_load(m, a, t, zone + 8 * Z_RECORDS) + frame * RECORD_WORDS * 8


@kernel
def list_block(m: Record, a: Arena, t: Tags, zone: int, frame: int, order: int) -> None:
    """Put a free block at the head of its list."""
    head = zone + 8 * (HEADS + order)
    at = record_of(m, a, t, zone, frame)
    following = hook_load(m, a, t, head)
    if following:
        after = record_of(m, a, t, zone, following - 1) + 8
        hook_store(m, a, t, after, hook_load(m, a, t, after) & ~BEFORE | (frame + 1))
    hook_store(m, a, t, at, following)
    hook_store(m, a, t, at + 8, FREE | order << ORDER)
    hook_store(m, a, t, head, frame + 1)


@kernel
def unlist_block(m: Record, a: Arena, t: Tags, zone: int, frame: int, order: int) -> None:
    """Take a free block out of its list, wherever it stands there."""
    at = record_of(m, a, t, zone, frame)
    following = hook_load(m, a, t, at)
    before = hook_load(m, a, t, at + 8) & BEFORE
    hook_store(m, a, t, record_of(m, a, t, zone, before - 1) if before else zone + 8 * (HEADS + order), following)
    if following:
        after = record_of(m, a, t, zone, following - 1) + 8
        hook_store(m, a, t, after, hook_load(m, a, t, after) & ~BEFORE | before)
    hook_store(m, a, t, at + 8, 0)


@kernel
def count_free(m: Record, a: Arena, t: Tags, zone: int, frames: int) -> None:
    """So many frames more, or less, are free."""
    hook_store(m, a, t, zone, hook_load(m, a, t, zone) + frames)


@kernel
def take_block(m: Record, a: Arena, t: Tags, zone: int, order: int) -> int:
    """Take 2^order frames: the first one's number, or NO_FRAME."""
    for large in range(order, LARGEST_ORDER + 1):
        head = hook_load(m, a, t, zone + 8 * (HEADS + large))
        if head:
            frame = head - 1
            unlist_block(m, a, t, zone, frame, large)
            while large > order:
                large -= 1
                list_block(m, a, t, zone, frame + (1 << large), large)
            count_free(m, a, t, zone, -(1 << order))
            return frame
    return NO_FRAME


@kernel
def give_block(m: Record, a: Arena, t: Tags, zone: int, frame: int, order: int) -> None:
    """Give 2^order frames back."""
    count_free(m, a, t, zone, 1 << order)
    while order < LARGEST_ORDER:
        buddy = frame ^ (1 << order)
        state = hook_load(m, a, t, record_of(m, a, t, zone, buddy) + 8)
        if state & FREE == 0 or (state & (FREE - 1)) >> ORDER != order:
            break
        unlist_block(m, a, t, zone, buddy, order)
        frame &= ~(1 << order)
        order += 1
    list_block(m, a, t, zone, frame, order)
