"""The memory map of a PC with the i440FX host bridge, as far as its PAM registers change it: a table.

Below 1 MiB each segment shows the board's firmware or RAM, and RAM writable or not, as two bits of a register say.

Not modelled: system-management RAM; the VGA window; segments that can be written but not read.
"""

from __future__ import annotations

from typing import Final

from attrs import frozen

from vtsim.base import memory as mem
from vtsim.base.memory import gfn_ranges
from vtsim.ept.memory_slots import SLOT_READ_ONLY
from vtsim.vmm import layout as at

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
FIRMWARE: Final = at.USER_RAM + (1 << 40)  # user-space address less guest-physical address of firmware
FIRST_PAM, LAST_PAM = 0x59, 0x5F
# constants behind the 256 bytes of configuration space, for segments that no register controls
ALWAYS_RAM, ALWAYS_FIRMWARE = 256, 257
ALWAYS_RAM_VALUE: Final = 3
LOCAL_APIC: Final = mem.LOCAL_APIC << mem.PAGE_SHIFT


@frozen
class Segment:
    """A range of guest-physical memory and the two bits that say what it shows."""

    first: int
    end: int
    register: int
    high: int  # 1: bits 5:4 of the register, 0: bits 1:0


def segments(memory: int) -> tuple[Segment, ...]:
    """The map of a board with so much memory, of which what is beyond 3 GiB stands above 4 GiB."""
    (_, end), *above = gfn_ranges(memory)
    low = tuple(Segment(0xC0000 + n * 16 * KIB, 0xC0000 + (n + 1) * 16 * KIB, 0x5A + n // 2, n % 2) for n in range(12))
    return (
        Segment(0, 0xC0000, ALWAYS_RAM, 0),
        *low,
        Segment(0xF0000, MIB, FIRST_PAM, 1),
        Segment(MIB, end << 12, ALWAYS_RAM, 0),
        Segment(4 * GIB - 256 * KIB, 4 * GIB, ALWAYS_FIRMWARE, 0),
        *(Segment(first << 12, end << 12, ALWAYS_RAM, 0) for first, end in above),
    )


def slots_at_reset(memory: int) -> list[tuple[int, int, int, int]]:
    """First address, end, user-space offset and flags of the memory slots while every register is zero."""
    merged: list[tuple[int, int, int, int]] = []
    for part in segments(memory):
        ram = part.register == ALWAYS_RAM
        backing = (at.USER_RAM, 0) if ram else (FIRMWARE, SLOT_READ_ONLY)
        if merged and merged[-1][1] == part.first and merged[-1][2:] == backing:
            merged[-1] = (merged[-1][0], part.end, *backing)
        else:
            merged.append((part.first, part.end, *backing))
    return merged
