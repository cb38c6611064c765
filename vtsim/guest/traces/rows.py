"""What a recorded row may hold: one table of conditions, each with what is said of the first row that breaks it.

SDM: "4-Level Paging and 5-Level Paging"; "Control Registers".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final, Protocol

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from vtsim.base.memory import gfn_ranges
from vtsim.guest.traces.kinds import NAME, NUMBER, PORT_SIZE_MASK, PORT_SIZE_SHIFT
from vtsim.guest.traces.paging import WIDE, table_shapes

# fmt: off
FIRMWARE_END: Final = 1 << 32            # the board's firmware ends here, above what a PC with 3 GiB has of memory
FIRMWARE_BYTES: Final = 256 << 10
TOUCHES: Final = ("TOUCH_R", "TOUCH_W", "TOUCH_F", "RETOUCH_R", "RETOUCH_W", "RETOUCH_F")
LEAVES: Final = ("LEAF_R", "LEAF_W", "LEAF_F")
LEVELS: Final = 5
PHYSICAL_BITS: Final = 52
CR_MOVES: Final = ("MOV_TO_CR", "MOV_FROM_CR")
DR_MOVES: Final = ("MOV_TO_DR", "MOV_FROM_DR")
CONTROL_REGISTERS: Final = (0, 2, 3, 4, 8)
# fmt: on
Flags = NDArray[np.bool_]


class Columns(Protocol):
    """The columns of a recording that rules look at."""

    @property
    def icount(self) -> NDArray[np.int64]: ...
    @property
    def kind(self) -> NDArray[np.uint8]: ...
    @property
    def cpl(self) -> NDArray[np.uint8]: ...
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
    @property
    def n(self) -> NDArray[np.uint32]: ...


@frozen
class Rule:
    """Rows of `kinds` (of every kind where there are none) for which `wrong` holds are refused: `what` is said."""

    what: str
    wrong: Callable[[Columns, int], Flags]
    kinds: tuple[str, ...] = ()


def outside(address: NDArray[np.int64], memory: int) -> Flags:
    """Which guest-physical addresses lie in neither memory nor the board's firmware."""
    inside = (address >= FIRMWARE_END - FIRMWARE_BYTES) & (address < FIRMWARE_END)
    for first, end in gfn_ranges(memory):
        inside |= (address >= first << 12) & (address < end << 12)
    return ~inside


def legal_level(of: Columns) -> Flags:
    """Which rows, if they are stores into tables, say a level; with 32-bit paging it has two bits."""
    level = np.where(table_shapes(of) == WIDE, of.a0 & 3, of.a0 & 7)
    return np.isin(level, np.arange(1, LEVELS + 1))


# fmt: off
RULES: Final = (
    Rule("icount falls",                              lambda t, _: np.diff(t.icount, prepend=0) < 0),
    Rule("kind is not known",                         lambda t, _: ~np.isin(t.kind, list(NAME))),
    Rule("cpl is above 3",                            lambda t, _: t.cpl > 3),
    Rule("n is 0",                                    lambda t, _: t.n < 1),
    Rule("a0 is no control register",                 lambda t, _: ~np.isin(t.a0, CONTROL_REGISTERS), CR_MOVES),
    Rule("a0 is no debug register",                   lambda t, _: (t.a0 < 0) | (t.a0 > 7), DR_MOVES),
    Rule("a0 is no vector",                           lambda t, _: (t.a0 < 0) | (t.a0 > 255), ("IRQ", "INTN")),
    Rule("a0 is no exception",                        lambda t, _: (t.a0 < 0) | (t.a0 > 31), ("EXC",)),
    Rule("its operand has not 1, 2 or 4 bytes",
         lambda t, _: ~np.isin(t.a0 >> PORT_SIZE_SHIFT & PORT_SIZE_MASK, (1, 2, 4)), ("IN", "OUT")),
    Rule("the page is in neither memory nor firmware", lambda t, memory: outside(t.a0, memory), TOUCHES),
    Rule("the address has more than 52 bits",
         lambda t, _: (t.a0 < 0) | (t.a0 >= 1 << PHYSICAL_BITS), ("MMIO_R", "MMIO_W")),
    Rule("the level is none from 1 to 5",             lambda t, _: ~legal_level(t), ("PTW",)),
    Rule("the level is none from 1 to 3",             lambda t, _: t.a1 & 3 == 0, LEAVES),
    Rule("the table is not in memory",                lambda t, memory: outside(t.a0, memory), ("PTW", "ROOT")),
    Rule("the table is not in memory",                lambda t, memory: outside(t.a1, memory), LEAVES),
)
# fmt: on


def first_wrong(of: Columns, memory: int) -> Iterator[str]:
    """What is wrong with a recording, one text for each rule that a row breaks."""
    for rule in RULES:
        wrong = rule.wrong(of, memory)
        if rule.kinds:
            wrong = wrong & np.isin(of.kind, [NUMBER[name] for name in rule.kinds])
        if wrong.any():
            row = int(np.argmax(wrong))
            of_kind = f" ({NAME[int(of.kind[row])]})" if rule.kinds else ""
            yield f"row {row}{of_kind}: {rule.what}"
