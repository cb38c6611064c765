"""How a recorded guest's paging structures look in each row, as far as its writes of registers tell.

SDM: "4-Level Paging and 5-Level Paging"; "PAE Paging"; "32-Bit Paging".
"""

from __future__ import annotations

from typing import Final, Protocol

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from vtsim.ept import spec as e
from vtsim.guest.traces.kinds import NUMBER

IA32_EFER: Final = 0xC000_0080
CR0_PG, CR4_PSE, CR4_PAE, CR4_PGE, CR4_LA57, CR4_SMEP, EFER_LME = (
    1 << 31,
    1 << 4,
    1 << 5,
    1 << 7,
    1 << 12,
    1 << 20,
    1 << 8,
)
EFER_LMA: Final = 1 << 10
RESET_CR0: Final = 0x6000_0010
CR0_RUNNING: Final = 0x8005_0033  # of a kernel with paging
TELL_OF_TABLES: Final = ("ROOT", "PTW", "LEAF_R", "LEAF_W", "LEAF_F")
CR0_PDPTES: Final = CR0_PG | 3 << 29
CR4_PDPTES: Final = CR4_PSE | CR4_PAE | CR4_PGE | CR4_SMEP


class Rows(Protocol):
    """The columns of a recording that tell it."""

    @property
    def kind(self) -> NDArray[np.uint8]: ...
    @property
    def a0(self) -> NDArray[np.int64]: ...
    @property
    def a1(self) -> NDArray[np.int64]: ...
    @property
    def a2(self) -> NDArray[np.int64]: ...
    @property
    def rip(self) -> NDArray[np.int64]: ...
    @property
    def cr3(self) -> NDArray[np.int64]: ...


@frozen(kw_only=True)
class Shape:
    """Paging structures of one kind: their levels, index bits, bytes of an entry and levels whose entries map pages.

    `level_bits` of the low bits of a recorded entry's address are its level. `root` are the bits of CR3 that are the
    root's address. Of a root, the entries from `kernel` on are those of the kernel, which has linear addresses from
    `kernel_from` on, and all physical memory from `direct` on, as Linux has it.
    """

    levels: int
    bits: int
    size: int
    pages: tuple[int, ...]
    level_bits: int
    root: int
    kernel: int
    kernel_from: int
    direct: int
    narrow: bool = False

    def index(self, address: int, level: int) -> int:
        """The index of an address in a table."""
        return (address >> (12 + self.bits * (level - 1))) & ((1 << self.bits) - 1)

    def level_of(self, entry: int) -> int:
        """The level in a recorded address of an entry."""
        return entry & ((1 << self.level_bits) - 1)

    def place_of(self, entry: int) -> int:
        """The address in it."""
        return entry & ~max(self.size - 1, 3)

    def leaf_at(self, entry: int, address: int, level: int) -> int:
        """The same of an entry that was used for a linear address, which says it where a flag may stand in the way."""
        return entry & ~0xFFF | self.index(address, level) * self.size if self.size == 4 else self.place_of(entry)

    def is_kernel(self, address: int) -> bool:
        """Is a linear address the kernel's?"""
        return address >= self.kernel_from if self.narrow else address < 0


# fmt: off
LINUX_4, LINUX_5, LINUX_32 = -0x7780_0000_0000, -0x00EF_0000_0000_0000, 0xC000_0000
FLAT, WIDE, PAE, FOUR, FIVE = range(5)
SHAPES: Final = {
    WIDE: Shape(levels=2, bits=10, size=4, pages=(2,), level_bits=2, root=0xFFFF_F000, kernel=768,
                kernel_from=LINUX_32, direct=LINUX_32, narrow=True),
    PAE:  Shape(levels=3, bits=9, size=8, pages=(2,), level_bits=3, root=e.PDPT_ADDRESS, kernel=3,
                kernel_from=LINUX_32, direct=LINUX_32, narrow=True),
    FOUR: Shape(levels=4, bits=9, size=8, pages=(2, 3), level_bits=3, root=e.ADDRESS, kernel=256,
                kernel_from=0, direct=LINUX_4),
    FIVE: Shape(levels=5, bits=9, size=8, pages=(2, 3), level_bits=3, root=e.ADDRESS, kernel=256,
                kernel_from=0, direct=LINUX_5),
}
# fmt: on


def register_writes(of: Rows, number: int) -> NDArray[np.bool_]:
    """Which rows write a control register."""
    rows: NDArray[np.bool_] = (of.kind == NUMBER["MOV_TO_CR"]) & (of.a0 == number)
    return rows


def efer_writes(of: Rows) -> NDArray[np.bool_]:
    """Which rows write IA32_EFER."""
    rows: NDArray[np.bool_] = (of.kind == NUMBER["WRMSR"]) & (of.a0 == IA32_EFER)
    return rows


def registers_at_start(of: Rows) -> tuple[int, int, int]:
    """CR0, CR4 and IA32_EFER before the first row: those of power-on, unless paging was on already.

    It was where the first write of CR0 says so, or where rows tell of tables and none writes CR0. Of IA32_EFER the
    recording tells nothing but addresses of more than 32 bits.
    """
    cr0, cr4 = np.nonzero(register_writes(of, 0))[0], np.nonzero(register_writes(of, 4))[0]
    tells = np.isin(of.kind, [NUMBER[name] for name in TELL_OF_TABLES]).any()
    before = int(of.a2[cr0[0]]) if len(cr0) else CR0_RUNNING if tells else RESET_CR0
    if not before & CR0_PG:
        return RESET_CR0, 0, 0
    efer = np.append(np.nonzero(efer_writes(of))[0], len(of.kind))[0]
    long = not len(cr0) or bool((of.rip[: efer + 1] >> 32 != 0).any())
    features = int(of.a2[cr4[0]]) if len(cr4) else CR4_PAE
    return before, features, EFER_LME | EFER_LMA if long and features & CR4_PAE else 0


def held(of: Rows, rows: NDArray[np.bool_], first: int) -> NDArray[np.int64]:
    """What a register that these rows write holds before each row; `first` before them all."""
    at = np.nonzero(rows)[0]
    values = np.append(first, of.a1[at])
    return values[np.searchsorted(at, np.arange(len(of.kind)))]


def shapes(of: Rows) -> NDArray[np.int64]:
    """FLAT where a row ran without paging, else the key in SHAPES of what it ran with."""
    first = registers_at_start(of)
    cr0, cr4 = held(of, register_writes(of, 0), first[0]), held(of, register_writes(of, 4), first[1])
    efer = held(of, efer_writes(of), first[2])
    long = np.where(cr4 & CR4_LA57 != 0, FIVE, FOUR)
    narrow = np.where(cr4 & CR4_PAE != 0, PAE, WIDE)
    return np.where(cr0 & CR0_PG == 0, FLAT, np.where(efer & EFER_LME != 0, long, narrow))


def large_pages(of: Rows) -> NDArray[np.bool_]:
    """In which rows entries of level 2 may map pages: everywhere but with 32-bit paging and CR4.PSE clear."""
    cr4 = held(of, register_writes(of, 4), registers_at_start(of)[1])
    allowed: NDArray[np.bool_] = (cr4 & CR4_PSE != 0) | (shapes(of) != WIDE)
    return allowed


def table_shapes(of: Rows) -> NDArray[np.int64]:
    """As `shapes`, but without paging what comes into use next, or was in use last: a row may speak of tables there."""
    found = shapes(of)
    paged = np.nonzero(found)[0]
    if not len(paged):
        return np.full(len(found), FOUR)
    following = np.searchsorted(paged, np.arange(len(found)))
    return found[paged[np.minimum(following, len(paged) - 1)]]
