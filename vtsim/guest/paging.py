"""The four ways in which a guest can page, and what follows from each for its kernel: tables, addresses, page sizes.

SDM: "4-Level Paging and 5-Level Paging"; "PAE Paging"; "32-Bit Paging".
Not modelled: memory of 32-bit kernels beyond what they map all the time (highmem).
"""

from __future__ import annotations

from typing import Final

from attrs import frozen

from vtsim.cpu.kernels.table_hooks import FOUR_LEVELS, MODE_SHIFT, NARROW, PAE
from vtsim.ept.tables import PAE_PAGING, PAGING, PAGING_32, Format
from vtsim.guest.kernel import layout as at

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
FOUR, FIVE, OF_PAE, OF_32_BIT = "4-level", "5-level", "PAE", "32-bit"
PAGING_MODES: Final = (FOUR, FIVE, OF_PAE, OF_32_BIT)
LOW_MEMORY: Final = 896 * MIB  # that a 32-bit Linux maps all the time


@frozen(kw_only=True)
class GuestPaging:
    """A paging mode, as a guest's kernel uses it.

    `levels`, `format`: of tables below the root that the kernel names; `hook_mode`: how hooks read them. `sizes`: bytes
    of pages of size 0, 1, 2. `reach`: how many bits of a linear address a table of level 1, 2, 3 translates.
    `user_entries`: of the root. `gap`: bytes that regions are apart, and aligned to. `protected`: is the processor in
    32-bit protected mode?
    """

    name: str
    levels: int
    format: Format
    hook_mode: int
    places: at.Places
    sizes: tuple[int, ...]
    reach: tuple[int, ...]
    user_entries: int
    gap: int
    protected: bool

    @property
    def root_bits(self) -> int:
        """What the address of a root has above it for hooks."""
        return self.hook_mode << MODE_SHIFT

    def prepared(self, spans: list[tuple[int, int]]) -> set[int]:
        """The user entries of a root that lead to tables from the start, for areas from first to last byte.

        With PAE paging all: a new one would have no effect until CR3 is loaded. With 32-bit paging none.
        """
        if self.hook_mode == PAE:
            return set(range(self.user_entries))
        if self.hook_mode == NARROW:
            return set()
        return {index for first, last in spans for index in range(first >> 39, (last >> 39) + 1)}


LONG_SIZES: Final = (4 * KIB, 2 * MIB, GIB)
LONG_REACH: Final = (21, 30, 39)
ROWS: Final = {
    name: GuestPaging(
        name=name, levels=4, format=PAGING, hook_mode=FOUR_LEVELS, places=at.LONG, sizes=LONG_SIZES, reach=LONG_REACH,
        user_entries=256, gap=GIB, protected=False,
    )
    for name in (FOUR, FIVE)
} | {
    OF_PAE: GuestPaging(
        name=OF_PAE, levels=3, format=PAE_PAGING, hook_mode=PAE, places=at.PROTECTED, sizes=(4 * KIB, 2 * MIB),
        reach=(21, 30), user_entries=3, gap=4 * MIB, protected=True,
    ),
    OF_32_BIT: GuestPaging(
        name=OF_32_BIT, levels=2, format=PAGING_32, hook_mode=NARROW, places=at.PROTECTED, sizes=(4 * KIB, 4 * MIB),
        reach=(22,), user_entries=768, gap=4 * MIB, protected=True,
    ),
}  # fmt: skip
