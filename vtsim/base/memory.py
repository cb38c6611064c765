"""Simulated physical memory: frames with a kind, contents on first use and a content token that every store changes.

The arena `a` starts with a header of offsets and counters (`A_…`). Frame words follow; a frame that holds values owns
one page of 512 words of the pool. What only streams touch has no contents. Addresses in the hole below 4 GiB, and
beyond memory, are not memory: devices answer there.
"""

from __future__ import annotations

from typing import Final

from vtsim.base.jit import Arena, kernel

# fmt: off
(A_FRAMES, A_FRAME_COUNT, A_POOL, A_POOL_NEXT, A_POOL_LIMIT, A_ROWS, A_ROW_COUNT, A_CODE_MAPS, A_CODE_PAGES,
 A_CODE_LIMIT, A_ALLOC_NEXT, A_ALLOC_COUNT, A_ALLOC_FIRST, A_ALLOC_SHUFFLED, A_ALLOC_BITS,
 A_TRACE, A_TRACE_LIMIT, A_TRACE_LENGTH, A_PORTS, A_CPUID, A_CPUID_COUNT, A_CAPABILITIES, A_BASE_HZ,
 A_OWNERS, A_OWNER_COUNT, A_OWNER_WORDS, A_CPUS, A_SEED, A_REPLAY_ROWS, A_REPLAY_COUNT,
 A_ROW_LIMIT, A_CODE_OF, A_REPLAY_LINES, A_REPLAY_LOG,
 A_REPLAY_LOGGED, A_REPLAY_LOG_LIMIT, A_FIELDS, A_DECODE, *_) = range(48)
HEADER_WORDS: Final = 256

# frame word: slot of the contents in the pool (32 bits) | kind (4) | content token (27)
FRAME_KIND, FRAME_TOKEN = 32, 36
SLOT_MASK: Final = 0xFFFF_FFFF
KIND_MASK: Final = 0xF
PLAIN, TABLE, VMCS_REGION, BITMAP, CODE, VALUES, ROM = range(7)
KINDS: Final = ("plain", "paging structure", "VMCS", "bitmap or ring", "code", "values", "read-only")

PAGE_SHIFT: Final = 12
PAGE_BYTES: Final = 4096
PAGE_WORDS: Final = 512
HOLE_FIRST: Final = 0xC0000   # frames [3 GiB, 4 GiB) belong to devices
HOLE_LAST: Final = 0xFFFFF
LOCAL_APIC: Final = 0xFEE00   # the frame of the local APIC's registers
BLOCK: Final = 512            # frames of 2 MiB
POOL_EXHAUSTED: Final = -1
# fmt: on


def gfn_ranges(size: int) -> tuple[tuple[int, int], ...]:
    """The frames of so many bytes of RAM: below the devices' hole, and above it."""
    frames = -(-size // PAGE_BYTES)
    if frames <= HOLE_FIRST:
        return ((0, frames),)
    return (0, HOLE_FIRST), (HOLE_LAST + 1, HOLE_LAST + 1 + frames - HOLE_FIRST)


def signed(word: int) -> int:
    """A 64-bit word as the two's-complement number that arenas and records hold."""
    word &= (1 << 64) - 1
    return word - (1 << 64) if word >> 63 else word


@kernel
def is_memory(a: Arena, hpa: int) -> bool:
    """Is this physical address memory, not a device?"""
    hfn = hpa >> 12
    return hfn < a[A_FRAME_COUNT] and hfn >= 0 and (hfn >> 18) != 3


@kernel
def contents(a: Arena, hfn: int) -> int:
    """The arena offset of a frame's 512 words, or 0 if it has none yet."""
    slot = a[a[A_FRAMES] + hfn] & SLOT_MASK
    if slot == 0:
        return 0
    return a[A_POOL] + (slot << 9)


@kernel
def give_contents(a: Arena, hfn: int, kind: int) -> int:
    """The arena offset of a frame's words, taking a zeroed page of the pool on first use; -1 if the pool is used up."""
    at = a[A_FRAMES] + hfn
    word = a[at]
    slot = word & SLOT_MASK
    if slot == 0:
        slot = a[A_POOL_NEXT]
        if slot >= a[A_POOL_LIMIT]:
            return POOL_EXHAUSTED
        a[A_POOL_NEXT] = slot + 1
        if kind == VALUES and (word >> FRAME_KIND) & KIND_MASK != PLAIN:
            kind = (word >> FRAME_KIND) & KIND_MASK
        a[at] = (word & ~(KIND_MASK << FRAME_KIND)) | slot | (kind << FRAME_KIND)
    elif kind != VALUES:
        a[at] = (word & ~(KIND_MASK << FRAME_KIND)) | (kind << FRAME_KIND)
    return a[A_POOL] + (slot << 9)


@kernel
def touch(a: Arena, hfn: int) -> None:
    """Change a frame's content token: something was stored in it."""
    at = a[A_FRAMES] + hfn
    word = a[at]
    token = ((word >> FRAME_TOKEN) + 1) & 0x7FF_FFFF
    a[at] = (word & ((1 << FRAME_TOKEN) - 1)) | (token << FRAME_TOKEN)


@kernel
def kind_of(a: Arena, hfn: int) -> int:
    """What a frame holds."""
    return (a[a[A_FRAMES] + hfn] >> FRAME_KIND) & KIND_MASK


@kernel
def set_kind(a: Arena, hfn: int, kind: int) -> None:
    """Change what a frame holds."""
    at = a[A_FRAMES] + hfn
    a[at] = (a[at] & ~(KIND_MASK << FRAME_KIND)) | (kind << FRAME_KIND)


@kernel
def load_word(a: Arena, hpa: int) -> int:
    """The aligned 8-byte word that holds `hpa`; a frame without contents reads as zero."""
    slot = a[a[A_FRAMES] + (hpa >> 12)] & SLOT_MASK
    if slot == 0:
        return 0
    return a[a[A_POOL] + (slot << 9) + ((hpa >> 3) & 511)]


@kernel
def store_word(a: Arena, hpa: int, value: int) -> int:
    """Store an aligned 8-byte word; -1 if no contents can be given."""
    hfn = hpa >> 12
    at = give_contents(a, hfn, VALUES)
    if at < 0:
        return POOL_EXHAUSTED
    a[at + ((hpa >> 3) & 511)] = value
    touch(a, hfn)
    return 0


@kernel
def load(a: Arena, hpa: int, size: int) -> int:
    """`size` (1, 2, 4, 8) bytes at `hpa`, zero-extended, not crossing a page."""
    shift = (hpa & 7) << 3
    low = load_word(a, hpa)
    if shift == 0 and size == 8:
        return low
    value = low >> shift
    if shift:
        value &= (1 << (64 - shift)) - 1
        if (hpa & 7) + size > 8:
            value |= load_word(a, hpa + 8) << (64 - shift)
    if size < 8:
        value &= (1 << (size << 3)) - 1
    return value


@kernel
def store(a: Arena, hpa: int, size: int, value: int) -> int:
    """Store the low `size` (1, 2, 4, 8) bytes of `value` at `hpa`, not crossing a page; -1 if the pool is used up."""
    offset = hpa & 7
    if offset == 0 and size == 8:
        return store_word(a, hpa, value)
    shift = offset << 3
    bits = size << 3
    if offset + size <= 8:
        mask = ((1 << bits) - 1) << shift
        return store_word(a, hpa, (load_word(a, hpa) & ~mask) | ((value << shift) & mask))
    kept = (1 << shift) - 1
    if store_word(a, hpa, (load_word(a, hpa) & kept) | (value << shift)) < 0:
        return POOL_EXHAUSTED
    over = offset + size - 8
    mask = (1 << (over << 3)) - 1
    rest = (value >> (64 - shift)) & mask
    return store_word(a, hpa + 8, (load_word(a, hpa + 8) & ~mask) | rest)


@kernel
def scatter(index: int, count: int, bits: int, seed: int) -> int:
    """A pseudo-random permutation of range(count): four Feistel rounds over `bits` bits, walked until inside.

    Every frame allocator that shuffles uses it: no table, any order of questions, the same answer. The halves may
    differ by a bit, so that less than half of the walked numbers lie outside.
    """
    low = bits >> 1
    low_mask = (1 << low) - 1
    high_mask = (1 << (bits - low)) - 1
    x = index
    while True:
        left = x >> low
        right = x & low_mask
        for turn in range(4):
            source = left if turn & 1 else right
            mixed = (source * 0x9E3779B1 + seed * 0x85EBCA6B + turn * 0x27D4EB2F) & 0xFFFFFFFF
            mixed = ((mixed >> 15) ^ mixed) * 0x2C1B3C6D & 0xFFFFFFFF
            mixed = (mixed >> 12) ^ mixed
            if turn & 1:
                right ^= mixed & low_mask
            else:
                left ^= mixed & high_mask
        x = (left << low) | right
        if x < count:
            return x


@kernel
def scatter_bits(count: int) -> int:
    """The number of bits that `scatter` needs for range(count): at least two."""
    bits = 2
    while (1 << bits) < count:
        bits += 1
    return bits


@kernel
def allocate(a: Arena) -> int:
    """Take the next free host frame; -1 if memory is used up. Order: ascending, or scattered over the free range."""
    n = a[A_ALLOC_NEXT]
    if n >= a[A_ALLOC_COUNT]:
        return -1
    a[A_ALLOC_NEXT] = n + 1
    if a[A_ALLOC_SHUFFLED]:
        n = scatter(n, a[A_ALLOC_COUNT], a[A_ALLOC_BITS], a[A_SEED])
    hfn = a[A_ALLOC_FIRST] + n
    if a[A_ALLOC_FIRST] < HOLE_FIRST and hfn >= HOLE_FIRST:
        hfn += HOLE_LAST + 1 - HOLE_FIRST
    return hfn
