"""What a unit may not see yet: stores that stand in write buffers (RWBF), and what was not there before (CM).

VT-d: "Write Buffer Flushing"; "Caching Mode"; "Global Command Register".
"""

from __future__ import annotations

import pytest

from tests.iommu.worlds import DOMAIN, PASID, RW_PAGE, SID, TARGET, World, start_queue
from vtsim.iommu import faults as f
from vtsim.iommu import interrupts as i
from vtsim.iommu import spec as sp
from vtsim.iommu import state as st
from vtsim.iommu.state import Caches
from vtsim.iommu.tables import READ_WRITE
from vtsim.iommu.unit import Capabilities

NEW_PAGE = 0x20_9000  # in the table of RW_PAGE, and not mapped
UNBUFFERED, BUFFERED = Capabilities(), Capabilities().having(RWBF=1)
REMEMBERS = Capabilities().having(CM=1)


def mapped_late(kind: str, capabilities: Capabilities, caches: Caches | None = None) -> World:
    """A world whose device has asked in vain for a page that was mapped afterwards."""
    world = World(kind, capabilities, caches or Caches())
    assert world.ask(NEW_PAGE).status == st.BLOCKED
    assert world.second is not None
    world.second.map(NEW_PAGE, TARGET + 9, READ_WRITE)
    return world


@pytest.mark.parametrize("kind", ["legacy", "second-level"])
def test_a_new_entry_is_seen_at_once_unless_a_buffer_holds_its_store(kind: str) -> None:
    assert mapped_late(kind, UNBUFFERED).ask(NEW_PAGE).status == st.COMPLETED
    world = mapped_late(kind, BUFFERED)
    assert world.ask(NEW_PAGE).status == st.BLOCKED

    world.unit.command(set=sp.WBF)

    assert world.unit.read("GSTS") & sp.WBF == 0  # it is done
    assert world.ask(NEW_PAGE).hpa == (TARGET + 9) << 12
    assert world.unit.statistics()["write buffer flushes"] == 1


DESCRIPTORS = [
    ("CONTEXT_CACHE", {"G": 3, "SID": 0x999}), ("IOTLB", {"G": 2, "DID": 99}), ("PASID_IOTLB", {"G": 2, "DID": 99}),
    ("PASID_CACHE", {"G": 0, "DID": 99}), ("INTERRUPT_ENTRY", {"G": 1, "IIDX": 9}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "fields"), DESCRIPTORS)
def test_every_invalidation_of_a_cache_begins_with_a_flush(name: str, fields: dict[str, int]) -> None:
    world = mapped_late("second-level", BUFFERED)
    start_queue(world)
    world.unit.submit("WAIT", SW=1)
    assert world.ask(NEW_PAGE).status == st.BLOCKED

    world.unit.submit(name, **fields)  # of something else: nothing of the page is in a cache

    assert world.ask(NEW_PAGE).status == st.COMPLETED


@pytest.mark.parametrize("name", ["CCMD", "IOTLB"])
def test_an_invalidation_by_registers_begins_with_a_flush(name: str) -> None:
    world = mapped_late("legacy", BUFFERED)
    world.unit.write(name, 1 << 63 | sp.DOMAIN_SELECTIVE << 61 - (name == "IOTLB"))
    assert world.ask(NEW_PAGE).status == st.COMPLETED


def test_an_interrupt_entry_can_stand_in_a_buffer_too() -> None:
    world = World("legacy", BUFFERED)
    table = world.memory.allocate() << 12
    world.unit.write("IRTA", table | sp.EIME | 3)
    world.unit.command(set=sp.SIRTP)
    world.unit.command(set=sp.IRE)
    request = i.remappable_request(2)
    assert world.unit.interrupt(SID, *request).reason == f.IRTE_NOT_PRESENT
    world.memory.store(table + 32, *i.remapped_entry(0x41, 1, extended=True))
    assert world.unit.interrupt(SID, *request).reason == f.IRTE_NOT_PRESENT
    world.unit.command(set=sp.WBF)
    assert world.unit.interrupt(SID, *request).status == st.INTERRUPT_REMAPPED


def test_flags_that_the_unit_sets_are_set_in_memory_and_seen() -> None:
    world = World("second-level", BUFFERED, Caches.none())
    where = world.entry_at(world.second, RW_PAGE, 1)
    first, second = world.ask(RW_PAGE, sp.WRITE), world.ask(RW_PAGE, sp.WRITE)
    assert (first.flag_writes, second.flag_writes) == (4, 0)
    assert world.memory.word(where) & 0x300 == 0x300


# --- caching mode ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["legacy", "second-level"])
def test_in_caching_mode_a_page_that_was_not_there_is_asked_for_until_it_is_invalidated(kind: str) -> None:
    world = mapped_late(kind, REMEMBERS)
    before = world.unit.statistics()["memory reads"]
    assert world.ask(NEW_PAGE).reason == (f.NO_READ if kind == "legacy" else f.SCALABLE_SECOND_NOT_PRESENT)
    assert world.unit.statistics()["memory reads"] == before
    assert world.ask(NEW_PAGE, sp.WRITE).status == st.BLOCKED
    start_queue(world)

    world.unit.submit("IOTLB", G=3, DID=DOMAIN, ADDR=(NEW_PAGE >> 12) + 1)
    world.unit.submit("IOTLB", G=3, DID=DOMAIN + 1, ADDR=NEW_PAGE >> 12)
    assert world.ask(NEW_PAGE).status == st.BLOCKED
    world.unit.submit("IOTLB", G=3, DID=DOMAIN, ADDR=NEW_PAGE >> 12)

    assert world.ask(NEW_PAGE).status == st.COMPLETED


@pytest.mark.parametrize(("fields", "reached"), [
    ({"G": 1}, True), ({"G": 2, "DID": 0}, True), ({"G": 2, "DID": DOMAIN}, False), ({"G": 3, "SID": SID}, True),
    ({"G": 3, "SID": SID + 1}, False),
])  # fmt: skip
def test_in_caching_mode_a_requester_that_was_unknown_stays_so_and_belongs_to_domain_0(
    fields: dict[str, int], reached: bool
) -> None:
    for capabilities, sees in ((UNBUFFERED, True), (REMEMBERS, reached)):
        world = World("legacy", capabilities)
        start_queue(world)
        entry = world.structures.context(SID)
        saved = entry.copy()
        entry[:] = 0
        assert world.ask(RW_PAGE).reason == f.CONTEXT_NOT_PRESENT
        entry[:] = saved
        world.unit.submit("CONTEXT_CACHE", **fields)
        assert (world.ask(RW_PAGE).status == st.COMPLETED) == sees


def test_in_caching_mode_a_process_that_was_unknown_stays_so() -> None:
    world = World("first-level", REMEMBERS)
    start_queue(world)
    entry = world.structures.pasid(SID, PASID)
    saved = entry.copy()
    entry[:] = 0
    assert world.ask(RW_PAGE).reason == f.PASID_NOT_PRESENT
    entry[:] = saved
    assert world.ask(RW_PAGE).reason == f.PASID_NOT_PRESENT
    world.unit.submit("PASID_CACHE", G=1, DID=DOMAIN, PASID=PASID)
    assert world.ask(RW_PAGE).status == st.COMPLETED


def test_a_first_level_page_that_was_not_there_is_never_remembered() -> None:
    world = World("first-level", REMEMBERS)
    assert world.ask(NEW_PAGE).reason == f.FIRST_LEVEL_NOT_PRESENT
    assert world.first is not None
    world.first.map(NEW_PAGE, TARGET, 7)
    assert world.ask(NEW_PAGE).status == st.COMPLETED


def test_what_caching_mode_remembers_is_silenced_as_its_entry_says() -> None:
    world = World("legacy", REMEMBERS)
    entry = world.structures.context(SID)
    entry[0] = int(entry[0]) & ~1 | 2  # FPD, and not present
    for _ in range(2):
        assert not world.ask(RW_PAGE).recorded
    assert world.unit.statistics()["faults silenced"] == 2
