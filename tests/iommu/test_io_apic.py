"""An I/O APIC's interrupts: remapped by its entries' index, verified by its source-id, once for each edge or level.

VT-d: "Interrupt-Remapping of I/O APICs".
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as hs

from tests.iommu.test_interrupt_remapping import World
from vtsim.iommu import faults as f
from vtsim.iommu import interrupts as i
from vtsim.iommu import io_apic as io
from vtsim.iommu import spec as sp
from vtsim.iommu import state as st

SID = 0xF0F8
VECTOR = 0x51


def made(handle: int = 3, *, extended: bool = True, compatible: bool = False, size: int = 3) -> tuple[World, io.IoApic]:
    world = World(extended=extended, compatible=compatible, size=size)
    world.entry(handle, i.remapped_entry(VECTOR, 9, extended=extended, source=SID, validation=i.SVT_SOURCE, level=True))
    return world, io.IoApic(world.unit, SID)


@pytest.mark.parametrize("handle", [0, 3, 0x7FFF, 0x8001, 0xEFFF])
def test_an_entry_in_remappable_format_names_its_remapping_entry(handle: int) -> None:
    world, apic = made(handle, size=15)
    world.unit.write("IRTA", world.unit.read("IRTA"))
    apic.program(4, io.remappable(VECTOR, handle, level=True))
    apic.pin(4, True)
    assert [answer.message for answer in apic.sent] == [(9 << 32 | 0xFEE0_9000, 0xC000 | VECTOR)]
    apic.write(io.SELECT, io.TABLE + 8)
    assert apic.read(io.WINDOW) == VECTOR | io.LEVEL | io.IRR | handle >> 15 << 11
    apic.write(io.SELECT, io.TABLE + 9)
    assert apic.read(io.WINDOW) == 1 << 16 | (handle & 0x7FFF) << 17


def test_a_level_is_sent_once_until_it_ends_and_again_while_it_lasts() -> None:
    _, apic = made()
    apic.program(0, io.remappable(VECTOR, 3, level=True))
    for asserted in (True, True, False, True):
        apic.pin(0, asserted)
    assert len(apic.sent) == 1
    apic.write(io.EOI, VECTOR + 1)  # a vector that is not the entry's ends nothing
    assert len(apic.sent) == 1
    apic.write(io.EOI, VECTOR)
    assert len(apic.sent) == 2
    apic.pin(0, False)
    apic.write(io.EOI, VECTOR)
    assert (len(apic.sent), apic.table[0] & io.IRR) == (2, 0)


def test_another_source_and_compatibility_format_are_blocked_where_devices_would_be() -> None:
    world, apic = made()
    forged = io.IoApic(world.unit, SID + 1)
    forged.program(0, io.remappable(VECTOR, 3))
    forged.pin(0, True)
    apic.program(0, io.compatible(VECTOR, 9))
    apic.pin(0, True)
    assert (forged.sent[0].reason, apic.sent[0].reason) == (f.INTERRUPT_SOURCE, f.COMPATIBILITY_BLOCKED)
    world.unit.check_laws()
    _, passing = made(extended=False, compatible=True)
    passing.program(2, io.compatible(VECTOR, 9) | 1 << 11 | 4 << 8)
    passing.pin(2, True)
    assert passing.sent[0].message == (0xFEE0_0000 | 9 << 12 | 4, VECTOR | 4 << 8)


def test_its_registers_say_what_it_is() -> None:
    _, apic = made()
    apic.write(io.WINDOW, 5 << 24)
    assert apic.read(io.WINDOW) == 5 << 24
    for selected, value in ((io.VERSION, 0x20 | 23 << 16), (0x40, 0), (io.TABLE, io.MASKED)):
        apic.write(io.SELECT, selected)
        apic.write(io.WINDOW, 0 if selected != io.TABLE else io.MASKED | io.READ_ONLY)
        assert (apic.read(io.SELECT), apic.read(io.WINDOW), apic.read(0x20)) == (selected, value, 0)


steps = hs.lists(hs.tuples(hs.integers(0, 3), hs.sampled_from(["up", "down", "end", "mask", "open"])), max_size=40)


@given(steps)
@settings(max_examples=60, deadline=None)
def test_no_interrupt_of_a_pin_is_lost_or_invented(script: list[tuple[int, str]]) -> None:
    """Pins 0 and 1 are edges, 2 and 3 levels; a model of four counters says how many messages there are."""
    world, apic = made()
    for pin in range(4):
        world.entry(pin, i.remapped_entry(0x60 + pin, 1, extended=True))
        apic.program(pin, io.remappable(0x60 + pin, pin, level=pin > 1))
    up, masked, waits, count = [False] * 4, [False] * 4, [False] * 4, [0] * 4
    for pin, action in script:
        if action in ("up", "down"):
            if pin < 2 and action == "up" and not up[pin] and not masked[pin]:
                count[pin] += 1
            up[pin] = action == "up"
            apic.pin(pin, up[pin])
        elif action == "end":
            waits[pin] = False
            apic.write(io.EOI, 0x60 + pin)
        else:
            masked[pin] = action == "mask"
            apic.program(pin, io.remappable(0x60 + pin, pin, level=pin > 1, masked=masked[pin]))
        if pin > 1 and up[pin] and not masked[pin] and not waits[pin]:
            waits[pin] = True
            count[pin] += 1
        vectors = [answer.message[1] & 0xFF for answer in apic.sent if answer.message]
        assert [vectors.count(0x60 + n) for n in range(4)] == count
    assert all(answer.status == st.INTERRUPT_REMAPPED for answer in apic.sent)
    assert world.unit.read_at(sp.FAULT_OFFSET + 8, 8) == 0
