"""Interrupt remapping and posting against a slow reading of the specification, and what no interrupt may do.

VT-d: "Interrupt Remapping"; "Interrupt-Posting Hardware Operation"; "Interrupt Remapping Fault Conditions".
VT-d: "Interrupt Remapping Table Entry (IRTE) for Remapped Interrupts".
VT-d: "Interrupt Remapping Table Entry (IRTE) for Posted Interrupts"; "Posted Interrupt Descriptor (PID)".
VT-d: "Interrupt Entry Cache"; "Set Interrupt Remapping Table Pointer Operation".
"""

from __future__ import annotations

import pytest
from attrs import define, field
from hypothesis import example, given, settings
from hypothesis import strategies as st_

from vtsim.iommu import faults as f
from vtsim.iommu import interrupts as i
from vtsim.iommu import spec as sp
from vtsim.iommu import state as st
from vtsim.iommu.tables import Memory
from vtsim.iommu.unit import Capabilities, InterruptAnswer, RemappingUnit

MEGABYTE = 1 << 20
TABLE, DESCRIPTORS, QUEUE = 0x10000, 0x20000, 0x30000
SOURCE = 0x0310
MASK = (1 << 64) - 1


@define
class World:
    """A unit that remaps interrupts by a table of 2**(size + 1) entries."""

    extended: bool = True
    compatible: bool = False
    size: int = 3
    capabilities: Capabilities = field(factory=Capabilities)
    caches: st.Caches = field(factory=st.Caches)
    memory: Memory = field(init=False)
    unit: RemappingUnit = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.memory = Memory(MEGABYTE)
        self.unit = RemappingUnit(self.memory.arena, self.capabilities, self.caches)
        self.unit.write("IRTA", TABLE | (sp.EIME if self.extended else 0) | self.size)
        self.unit.command(set=sp.SIRTP)
        self.unit.write("IQA", QUEUE)
        self.unit.command(set=sp.QIE)
        self.unit.command(set=sp.IRE)
        if self.compatible:
            self.unit.command(set=sp.CFI)

    def entry(self, index: int, words: tuple[int, int]) -> None:
        self.memory.store(TABLE + 16 * index, *words)

    def descriptor(self, at: int, *, nv: int = 0xF2, ndst: int = 5, sn: int = 0, on: int = 0, other: int = 0) -> None:
        place = ndst if self.extended else ndst << 8
        self.memory.store(at, 0, 0, 0, 0, place << 32 | nv << 16 | sn << 1 | on | other, 0, 0, 0)

    def ask(self, handle: int, subhandle: int | None = None, sid: int = SOURCE) -> InterruptAnswer:
        answer = self.unit.interrupt(sid, *i.remappable_request(handle, subhandle))
        self.unit.check_laws()
        return answer

    def requests(self, at: int) -> set[int]:
        """Vectors that wait in a descriptor."""
        words = [self.memory.word(at + 8 * n) & MASK for n in range(4)]
        return {64 * n + bit for n, word in enumerate(words) for bit in range(64) if word >> bit & 1}


def test_a_remapped_interrupt_goes_where_its_entry_says() -> None:
    world = World()
    world.entry(3, i.remapped_entry(0x41, 0x1234, extended=True, delivery_mode=1, redirect=True))

    answer = world.ask(3)

    assert answer.status == st.INTERRUPT_REMAPPED
    assert answer.message == (0x1234 << 32 | 0xFEE00000 | 0x34 << 12 | 8, 1 << 8 | 0x41)


def test_every_delivery_mode_that_there_is_is_passed_on() -> None:
    world = World()
    modes = (i.DLM_FIXED, i.DLM_LOWEST, i.DLM_SMI, i.DLM_NMI, i.DLM_INIT, i.DLM_EXTINT)
    for index, mode in enumerate(modes):
        world.entry(index, i.remapped_entry(0x41, 1, extended=True, delivery_mode=mode))
    messages = [world.ask(index).message for index in range(len(modes))]
    assert [data >> 8 & 7 for _, data in filter(None, messages)] == [0, 1, 2, 4, 5, 7]


def test_turning_remapping_off_forgets_entries_where_the_unit_says_so() -> None:
    for capabilities, seen in ((Capabilities(), 0x41), (Capabilities().having(ESIRTPS=1), 0x42)):
        world = World(capabilities=capabilities)
        world.entry(1, i.remapped_entry(0x41, 1, extended=True))
        world.ask(1)
        world.entry(1, i.remapped_entry(0x42, 1, extended=True))
        world.unit.command(clear=sp.IRE)
        world.unit.command(set=sp.IRE)
        message = world.ask(1).message
        assert message is not None
        assert message[1] == seen


def test_eight_bits_of_destination_count_outside_extended_mode() -> None:
    world = World(extended=False)
    world.entry(0, i.remapped_entry(0x41, 7, level=True, logical=True))

    assert world.ask(0).message == (7 << 32 | 0xFEE00000 | 7 << 12 | 4, 3 << 14 | 0x41)


def test_a_subhandle_is_added_to_the_handle() -> None:
    world = World()
    world.entry(6, i.remapped_entry(0x50, 1, extended=True))

    answer = world.ask(4, 2)

    assert answer.message is not None
    assert answer.message[1] == 0x50


def test_without_remapping_requests_pass_as_they_are() -> None:
    world = World()
    world.unit.command(clear=sp.IRE)

    answer = world.unit.interrupt(SOURCE, *i.compatible_request(0x33, 2))

    assert (answer.status, answer.message) == (st.INTERRUPT_COMPATIBLE, i.compatible_request(0x33, 2))


@pytest.mark.parametrize(
    ("extended", "compatible", "passes"), [(False, True, True), (False, False, False), (True, True, False)]
)
def test_compatibility_format_passes_only_where_it_may(extended: bool, compatible: bool, passes: bool) -> None:
    world = World(extended=extended, compatible=compatible)

    answer = world.unit.interrupt(SOURCE, *i.compatible_request(0x33, 2))

    assert (answer.message is not None) == passes
    assert answer.reason == (0 if passes else f.COMPATIBILITY_BLOCKED)


# fmt: off
BLOCKED = [  # what stands in entry 1, the request, the reason
    ("INTERRUPT_RESERVED",    i.remapped_entry(0x41, 1, extended=True), (i.remappable_request(1)[0], 1 << 16)),
    ("INTERRUPT_INDEX",       i.remapped_entry(0x41, 1, extended=True), i.remappable_request(16)),
    ("INTERRUPT_INDEX",       i.remapped_entry(0x41, 1, extended=True), i.remappable_request(1, 0xFFFF)),
    ("IRTE_NOT_PRESENT",      i.remapped_entry(0x41, 1, extended=True, present=False), i.remappable_request(1)),
    ("IRTE_RESERVED",         (i.remapped_entry(0x41, 1, extended=True)[0] | 1 << 12, 0), i.remappable_request(1)),
    ("IRTE_RESERVED",         i.remapped_entry(0x41, 1, extended=True, validation=i.SVT_RESERVED), i.remappable_request(1)),
    ("IRTE_RESERVED",         i.remapped_entry(0x41, 1, extended=True, delivery_mode=3), i.remappable_request(1)),
    ("IRTE_RESERVED",         i.remapped_entry(0x41, 1, extended=True, delivery_mode=6), i.remappable_request(1)),
    ("IRTE_RESERVED",         (i.remapped_entry(0x41, 1, extended=True)[0], 1 << 20), i.remappable_request(1)),
    ("INTERRUPT_SOURCE",      i.remapped_entry(0x41, 1, extended=True, source=SOURCE + 1, validation=i.SVT_SOURCE),
                              i.remappable_request(1)),
    ("INTERRUPT_SOURCE",      i.remapped_entry(0x41, 1, extended=True, source=0x0405, validation=i.SVT_BUS),
                              i.remappable_request(1)),
    ("DESCRIPTOR_ACCESS",     i.posted_entry(0x41, 1 << 40), i.remappable_request(1)),
    ("DESCRIPTOR_RESERVED",   i.posted_entry(0x41, DESCRIPTORS), i.remappable_request(1)),
]
# fmt: on


@pytest.mark.parametrize(("name", "words", "request_"), BLOCKED)
def test_what_is_wrong_with_a_request_or_its_entry_blocks_it(
    name: str, words: tuple[int, int], request_: tuple[int, int]
) -> None:
    world = World()
    world.entry(1, words)
    world.descriptor(DESCRIPTORS, other=1 << 4)
    tokens = [world.memory.token(page) for page in range(MEGABYTE >> 12)]

    answer = world.unit.interrupt(SOURCE, *request_)

    assert (answer.status, answer.message, f.BY_CODE[answer.reason].name) == (st.INTERRUPT_BLOCKED, None, name)
    assert answer.recorded
    assert [world.memory.token(page) for page in range(MEGABYTE >> 12)] == tokens
    world.unit.check_laws()


def test_a_request_with_a_pasid_is_blocked() -> None:
    world = World()

    answer = world.unit.interrupt(SOURCE, *i.remappable_request(0), pasid=4)

    assert answer.reason == f.INTERRUPT_PASID


def test_a_table_outside_memory_cannot_be_read() -> None:
    world = World()
    world.unit.write("IRTA", 1 << 44 | sp.EIME | 3)
    world.unit.command(set=sp.SIRTP)

    assert world.ask(0).reason == f.IRTE_ACCESS


def test_every_fault_of_interrupt_remapping_is_reached_here() -> None:
    elsewhere = {"INTERRUPT_PASID", "IRTE_ACCESS", "COMPATIBILITY_BLOCKED"}
    interrupt_faults = {each.name for each in f.FAULTS if each.condition.startswith("IR.")}

    assert {name for name, _, _ in BLOCKED} | elsewhere == interrupt_faults


def test_a_fault_is_recorded_under_its_index_and_an_entry_can_silence_it() -> None:
    world = World()
    world.entry(5, i.remapped_entry(0x41, 1, extended=True, present=False))
    world.entry(6, i.remapped_entry(0x41, 1, extended=True, present=False, silent=True))

    loud, silent = world.ask(5), world.ask(6)

    assert (loud.recorded, silent.recorded) == (True, False)
    assert world.unit.read_at(sp.FAULT_OFFSET, 8) == 5 << 48
    assert world.unit.read_at(sp.FAULT_OFFSET + 8, 8) == 1 << 63 | f.IRTE_NOT_PRESENT << 32 | SOURCE


def test_an_entry_with_posting_is_reserved_where_the_unit_cannot_post() -> None:
    world = World(capabilities=Capabilities().without("PI"))
    world.entry(1, i.posted_entry(0x41, DESCRIPTORS))

    assert world.ask(1).reason == f.IRTE_RESERVED


@pytest.mark.parametrize("qualifier", range(4))
@given(sid=st_.integers(0, 0xFFFF), source=st_.integers(0, 0xFFFF))
@settings(max_examples=30, deadline=None)
def test_a_source_is_compared_without_the_bits_that_sq_leaves_out(qualifier: int, sid: int, source: int) -> None:
    ignored = {0: (), 1: (2,), 2: (1, 2), 3: (0, 1, 2)}[qualifier]
    alike = all((sid ^ source) >> bit & 1 == 0 for bit in range(16) if bit not in ignored)
    world = WORLD
    world.entry(
        2, i.remapped_entry(0x41, 1, extended=True, source=source, qualifier=qualifier, validation=i.SVT_SOURCE)
    )
    world.unit.submit("INTERRUPT_ENTRY", G=0)

    assert (world.ask(2, sid=sid).status == st.INTERRUPT_REMAPPED) == alike


WORLD = World()


# --- posting ---------------------------------------------------------------------------------------------------------


@example(vector=63, on=False, sn=False, urgent=False, extended=True)
@given(
    vector=st_.integers(0, 255), on=st_.booleans(), sn=st_.booleans(), urgent=st_.booleans(), extended=st_.booleans()
)
@settings(max_examples=60, deadline=None)
def test_a_posted_interrupt_notifies_unless_outstanding_or_suppressed(
    vector: int, on: bool, sn: bool, urgent: bool, extended: bool
) -> None:
    world = World(extended=extended)
    world.entry(1, i.posted_entry(vector, DESCRIPTORS + 64, urgent=urgent))
    world.descriptor(DESCRIPTORS + 64, on=on, sn=sn, nv=0xF2, ndst=9)

    answer = world.ask(1)

    assert answer.status == st.INTERRUPT_POSTED
    assert world.requests(DESCRIPTORS + 64) == {vector}
    notifies = not on and (urgent or not sn)
    assert answer.message == ((9 << 32 | 0xFEE00000 | 9 << 12, 0xF2) if notifies else None)
    assert world.memory.word(DESCRIPTORS + 96) & 3 == (on or notifies) | sn << 1


@given(st_.lists(st_.tuples(st_.integers(0, 15), st_.booleans()), max_size=60))
@settings(max_examples=40, deadline=None)
def test_no_posted_interrupt_is_lost_or_invented(steps: list[tuple[int, bool]]) -> None:
    world = World()
    vectors = [17 * n + 1 for n in range(15)] + [0]
    for index, vector in enumerate(vectors):
        world.entry(index, i.posted_entry(vector, DESCRIPTORS))
    world.descriptor(DESCRIPTORS)
    waiting: set[int] = set()
    outstanding = False
    for index, empties in steps:
        answer = world.ask(index)
        waiting.add(vectors[index])
        assert (answer.message is not None) == (not outstanding)
        outstanding = True
        assert world.requests(DESCRIPTORS) == waiting
        if empties:  # what a processor does with a notification: ON first, then the requests
            world.descriptor(DESCRIPTORS)
            waiting, outstanding = set(), False


# --- the interrupt entry cache ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("granularity", "index", "bits", "stale"), [(0, 0, 0, False), (1, 4, 0, False), (1, 4, 2, False),
                                                                     (1, 5, 0, True), (1, 8, 2, True)])  # fmt: skip
def test_an_old_entry_is_used_until_its_invalidation_is_acknowledged_and_never_after(
    granularity: int, index: int, bits: int, stale: bool
) -> None:
    world = World()
    world.entry(4, i.remapped_entry(0x41, 1, extended=True))
    assert world.ask(4).reads == 1
    world.entry(4, i.remapped_entry(0x42, 1, extended=True))
    before = world.ask(4)
    world.unit.submit("INTERRUPT_ENTRY", G=granularity, IIDX=index, IM=bits)

    after = world.ask(4)

    assert before.message is not None
    assert after.message is not None
    assert (before.message[1], before.reads) == (0x41, 0)
    assert after.message[1] == (0x41 if stale else 0x42)


ENTRY = st_.one_of(
    st_.builds(
        lambda vector, apic, source, validation, qualifier: i.remapped_entry(
            vector, apic, extended=True, source=source, validation=validation, qualifier=qualifier
        ),
        st_.integers(0, 255), st_.integers(0, 0xFFFFFFFF), st_.sampled_from([SOURCE, SOURCE ^ 2, 0x0204]),
        st_.integers(0, 3), st_.integers(0, 3),
    ),
    st_.builds(i.posted_entry, st_.integers(0, 255), st_.sampled_from([DESCRIPTORS, DESCRIPTORS + 128, 1 << 45])),
    st_.tuples(st_.integers(-(1 << 63), (1 << 63) - 1), st_.integers(-(1 << 63), (1 << 63) - 1)),
)  # fmt: skip


@given(
    entries=st_.lists(ENTRY, min_size=16, max_size=16), asked=st_.lists(st_.integers(0, 17), min_size=1, max_size=40)
)
@settings(max_examples=40, deadline=None)
def test_the_cache_changes_what_an_interrupt_costs_and_never_where_it_goes(
    entries: list[tuple[int, int]], asked: list[int]
) -> None:
    worlds = [World(), World(caches=st.Caches.none())]
    for world in worlds:
        for index, words in enumerate(entries):
            world.entry(index, words)
        for at in (DESCRIPTORS, DESCRIPTORS + 128):
            world.descriptor(at)
    for index in asked:
        cached, read = (world.ask(index) for world in worlds)
        assert (cached.status, cached.message, cached.reason) == (read.status, read.message, read.reason)
        assert cached.reads <= read.reads


@given(address=st_.integers(0xFEE00000, 0xFEEFFFFF), data=st_.integers(0, (1 << 32) - 1), sid=st_.integers(0, 0xFFFF))
@settings(max_examples=60, deadline=None)
def test_a_forged_message_reaches_no_vector_that_the_table_does_not_grant_its_source(
    address: int, data: int, sid: int
) -> None:
    world = WORLD_OF_ONE

    answer = world.unit.interrupt(sid, address, data)

    granted = sid == SOURCE and answer.status == st.INTERRUPT_REMAPPED
    assert (answer.message is not None) == granted
    if granted:
        assert answer.message == (1 << 32 | 0xFEE00000 | 1 << 12, 0x41)
    world.unit.check_laws()


WORLD_OF_ONE = World()
for _index in range(16):
    WORLD_OF_ONE.entry(_index, i.remapped_entry(0x41, 1, extended=True, source=SOURCE, validation=i.SVT_SOURCE))
