"""An I/O APIC in front of a remapping unit: pins, redirection table, messages in either format, end of interrupt.

No machine has one: it is there for studies and tests of interrupt remapping from Python. Its interrupts are remapped as
those of devices; the end of one reaches it by vector, so an entry names the vector of its remapping entry.

VT-d: "Interrupt-Remapping of I/O APICs".
Not modelled: the delivery status bit (a message goes out at once); its arbitration ID.
"""

from __future__ import annotations

from typing import Final

from attrs import define, field

from vtsim.iommu import spec as sp
from vtsim.iommu.entries import Entry
from vtsim.iommu.interrupts import MESSAGE_ASSERT, MESSAGE_LEVEL, REMAPPABLE
from vtsim.iommu.unit import InterruptAnswer, RemappingUnit

# fmt: off
PINS: Final = 24
# an entry of the redirection table in compatibility and in remappable format
COMPATIBLE_ENTRY: Final = Entry("Redirection table entry", (
    sp.bits("DST:63-56 FORMAT:48 MASK:16 TM:15 IRR:14 POL:13 STATUS:12 DM:11 DLM:10-8 V:7-0"),
))
REMAPPABLE_ENTRY: Final = Entry("Redirection table entry, remappable", (
    sp.bits("INDEX:63-49 FORMAT:48 MASK:16 TM:15 IRR:14 POL:13 STATUS:12 INDEX_HIGH:11 V:7-0"),
))
FORMAT, MASKED, LEVEL, IRR = 1 << 48, 1 << 16, 1 << 15, 1 << 14
READ_ONLY: Final = IRR | 1 << 12
SELECT, WINDOW, EOI = 0x00, 0x10, 0x40              # of its register page
ID, VERSION, TABLE = 0x00, 0x01, 0x10               # what SELECT selects
VERSION_VALUE: Final = 0x20 | (PINS - 1) << 16      # with an EOI register
# fmt: on


def remappable(vector: int, handle: int, *, level: bool = False, masked: bool = False) -> int:
    """An entry that has its interrupts remapped by the interrupt remapping table entry `handle`."""
    return vector | masked << 16 | level << 15 | handle >> 15 << 11 | FORMAT | (handle & 0x7FFF) << 49


def compatible(vector: int, destination: int, *, level: bool = False, masked: bool = False) -> int:
    """An entry that delivers a vector to the local APIC of an 8-bit ID."""
    return vector | masked << 16 | level << 15 | destination << 56


@define(eq=False)
class IoApic:
    """One I/O APIC. `sid`: the requester that its messages name; `sent`: what became of each of them."""

    unit: RemappingUnit
    sid: int
    table: list[int] = field(factory=lambda: [MASKED] * PINS, init=False)
    asserted: list[bool] = field(factory=lambda: [False] * PINS, init=False)
    selected: int = field(default=0, init=False)
    identity: int = field(default=0, init=False)
    sent: list[InterruptAnswer] = field(factory=list, init=False)

    # --- registers ---------------------------------------------------------------------------------------------
    def read(self, offset: int) -> int:
        """What a read of 4 bytes of its page returns."""
        if offset == SELECT:
            return self.selected
        if offset != WINDOW:
            return 0
        pin, half = divmod(self.selected - TABLE, 2)
        if 0 <= pin < PINS:
            return self.table[pin] >> 32 * half & 0xFFFF_FFFF
        return {ID: self.identity << 24, VERSION: VERSION_VALUE}.get(self.selected, 0)

    def write(self, offset: int, value: int) -> None:
        """Write 4 bytes of its page."""
        value &= 0xFFFF_FFFF
        if offset == SELECT:
            self.selected = value & 0xFF
        elif offset == EOI:
            self.end_of_interrupt(value & 0xFF)
        elif offset == WINDOW:
            pin, half = divmod(self.selected - TABLE, 2)
            if 0 <= pin < PINS:
                other = 0xFFFF_FFFF << 32 * (1 - half)
                entry = self.table[pin] & other | value << 32 * half
                known = entry & ~READ_ONLY | self.table[pin] & READ_ONLY
                self.table[pin] = known if known & LEVEL else known & ~IRR
                self._level(pin)
            elif self.selected == ID:
                self.identity = value >> 24 & 0xF

    def program(self, pin: int, entry: int) -> None:
        """Write an entry as drivers do: its upper half first, so that what is not masked is whole."""
        for half in (1, 0):
            self.write(SELECT, TABLE + 2 * pin + half)
            self.write(WINDOW, entry >> 32 * half)

    # --- pins --------------------------------------------------------------------------------------------------
    def pin(self, number: int, asserted: bool) -> None:
        """A device drives a pin. An edge is sent, or lost while it is masked; a level is sent again until it ends."""
        rises = asserted and not self.asserted[number]
        self.asserted[number] = asserted
        if self.table[number] & LEVEL:
            self._level(number)
        elif rises and not self.table[number] & MASKED:
            self._send(number)

    def end_of_interrupt(self, vector: int) -> None:
        """A local APIC has ended an interrupt of this vector; a level that is still there asks again."""
        for number, entry in enumerate(self.table):
            if entry & LEVEL and entry & IRR and entry & 0xFF == vector:
                self.table[number] = entry & ~IRR
                self._level(number)

    def _level(self, number: int) -> None:
        entry = self.table[number]
        if entry & LEVEL and self.asserted[number] and not entry & (MASKED | IRR):
            self.table[number] |= IRR
            self._send(number)

    def _send(self, number: int) -> None:
        entry = self.table[number]
        data = entry & 0xFF | (MESSAGE_LEVEL | MESSAGE_ASSERT if entry & LEVEL else 0)
        if entry & FORMAT:
            address = REMAPPABLE | (entry >> 49) << 5 | (entry >> 11 & 1) << 2
        else:
            address = (entry >> 56) << 12 | (entry >> 11 & 1) << 2
            data |= entry & 0x700
        self.sent.append(self.unit.interrupt(self.sid, sp.INTERRUPT_FIRST | address, data))
