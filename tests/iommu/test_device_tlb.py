"""Devices that keep translations: ATS, PRI, and invalidation of what they keep.

VT-d: "Device-TLB".
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as hs

from tests.iommu.worlds import DOMAIN, HUGE_PAGE, PASID, READ_ONLY_PAGE, RW_PAGE, SID, TARGET, World, start_queue
from vtsim.base import jit
from vtsim.ept.tables import Table
from vtsim.iommu import descriptors as d
from vtsim.iommu import entries as e
from vtsim.iommu import spec as sp
from vtsim.iommu.device import AtsDevice
from vtsim.iommu.kernels.device_tlb import DONE, PAGE_ASKED, REFUSED_THERE, WITHOUT_RIGHT
from vtsim.iommu.state import Cache
from vtsim.iommu.tables import READ_WRITE

NEW = TARGET + 0x100
EXAMPLES = 30 if jit.DISABLED else 150


def device(kind: str = "second-level", **how: bool) -> tuple[World, AtsDevice]:
    world = World(kind)
    start_queue(world)
    world.unit.write("PQA", world.memory.allocate() << 12)
    return world, AtsDevice(world.unit, SID, **how)


def move(world: World, address: int, frame: int = NEW) -> None:
    assert isinstance(world.second, Table)
    world.second.map(address, frame, READ_WRITE)


def deliver(world: World, each: AtsDevice) -> None:
    for message in world.unit.messages():
        each.receive(message)


def test_a_translation_that_the_device_holds_needs_no_walk() -> None:
    world, each = device()

    assert each.access(RW_PAGE, sp.WRITE, pasid=PASID) == DONE
    walks = world.unit.statistics()["walks"]
    assert each.access(RW_PAGE + 8, sp.WRITE, pasid=PASID) == DONE

    assert each.hpa == ((TARGET + 2) << 12) + 8
    assert world.unit.statistics()["walks"] == walks


def test_a_device_without_ats_in_its_context_entry_is_refused() -> None:
    world, each = device()
    entry = world.structures.context(SID)
    entry[0] = int(entry[0]) & ~(e.DTE | e.PRE)

    assert each.access(RW_PAGE, pasid=PASID) == REFUSED_THERE


def test_a_page_that_is_not_there_is_asked_for_and_used_once_it_is() -> None:
    world, each = device()
    missing = RW_PAGE + 0x8000

    assert each.access(missing, sp.WRITE, pasid=PASID) == PAGE_ASKED
    assert world.memory.word(world.unit.read("PQA") & ~0xFFF) & 0xFF == d.PAGE_REQUEST_TYPE
    move(world, missing)
    world.unit.submit("PAGE_GROUP_RESPONSE", PP=1, RID=SID, PASID=PASID, RC=d.RESPONSE_SUCCESS)
    deliver(world, each)

    assert each.responses == [d.RESPONSE_SUCCESS]
    assert each.access(missing, sp.WRITE, pasid=PASID) == DONE
    assert each.hpa >> 12 == NEW


def test_without_pri_a_lacking_right_is_the_devices_own_error() -> None:
    _, each = device(pri=False)

    assert each.access(READ_ONLY_PAGE, sp.WRITE, pasid=PASID) == WITHOUT_RIGHT
    assert each.access(READ_ONLY_PAGE, sp.READ, pasid=PASID) == DONE


@pytest.mark.parametrize(("address", "fields", "reached"), [
    (RW_PAGE, {"ADDR": RW_PAGE >> 12}, True),
    (RW_PAGE, {"ADDR": (RW_PAGE >> 12) + 1}, False),
    (RW_PAGE, {"ADDR": (RW_PAGE >> 12) - 1}, False),
    (RW_PAGE, {"ADDR": RW_PAGE >> 12 & ~7 | 3, "S": 1}, True),  # two trailing ones: eight pages
    (RW_PAGE, {"ADDR": (RW_PAGE >> 12 & ~7) + 8 | 3, "S": 1}, False),
    (RW_PAGE, {"ADDR": (1 << 51) - 1, "S": 1}, True),  # everything
    (HUGE_PAGE, {"ADDR": (HUGE_PAGE >> 12) + 5}, True),
])  # fmt: skip
def test_an_invalidation_reaches_the_pages_that_it_names(address: int, fields: dict[str, int], reached: bool) -> None:
    world, each = device()
    each.access(address, pasid=PASID)
    walks = world.unit.statistics()["walks"] + world.unit.statistics()["IOTLB hits"]

    world.unit.submit("PASID_DEVICE_TLB", SID=SID, PASID=PASID, **fields)
    deliver(world, each)
    each.access(address, pasid=PASID)

    asked = world.unit.statistics()["walks"] + world.unit.statistics()["IOTLB hits"] - walks
    assert asked == int(reached)


def test_another_pasid_keeps_its_translation() -> None:
    world, each = device()
    for pasid in (PASID, 0):
        each.access(RW_PAGE, pasid=pasid)
    before = world.unit.statistics()["IOTLB hits"] + world.unit.statistics()["walks"]

    world.unit.submit("PASID_DEVICE_TLB", SID=SID, PASID=PASID, ADDR=RW_PAGE >> 12)
    deliver(world, each)
    each.access(RW_PAGE, pasid=0)

    assert world.unit.statistics()["IOTLB hits"] + world.unit.statistics()["walks"] == before


def test_a_device_that_does_not_answer_keeps_its_stale_translation_and_the_driver_is_told() -> None:
    """The wait never completes: until its time is out, then the queue stops with ITE. The device is not contained."""
    world, each = device(answers=False)
    status = world.memory.allocate() << 12
    each.access(RW_PAGE, pasid=PASID)
    move(world, RW_PAGE)
    world.unit.submit("IOTLB", G=2, DID=DOMAIN)
    world.unit.submit("PASID_DEVICE_TLB", SID=SID, G=1, ADDR=(1 << 51) - 1, S=1)
    world.unit.submit("WAIT", SW=1, STDATA=1, STADDR=status >> 2)
    deliver(world, each)

    each.access(RW_PAGE, pasid=PASID)
    assert each.hpa >> 12 == TARGET + 2
    assert world.memory.word(status) == 0
    world.unit.device_timed_out(SID)
    assert world.unit.read("FSTS") & sp.ITE
    assert world.memory.word(status) == 0


steps = hs.lists(hs.tuples(hs.sampled_from(["access", "move", "invalidate"]), hs.integers(0, 3)), max_size=20)


@given(steps, hs.sampled_from([Cache(8, 4), Cache(1, 1), Cache(0, 0)]))
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
def test_once_a_wait_is_complete_neither_device_nor_unit_uses_the_old_mapping(
    script: list[tuple[str, int]], tlb: Cache
) -> None:
    world = World("second-level")
    start_queue(world)
    each = AtsDevice(world.unit, SID, tlb)
    status = world.memory.allocate() << 12
    assert isinstance(world.second, Table)
    may = {page: {TARGET + page} for page in range(4)}
    for page in range(4):
        move(world, RW_PAGE + 0x10000 + (page << 12), TARGET + page)
    frame, waits = NEW, 0
    for action, page in script:
        address = RW_PAGE + 0x10000 + (page << 12)
        if action == "move":
            frame += 1
            move(world, address, frame)
            may[page].add(frame)
        elif action == "invalidate":
            waits += 1
            world.unit.submit("IOTLB", G=3, DID=DOMAIN, ADDR=address >> 12)
            world.unit.submit("PASID_DEVICE_TLB", SID=SID, PASID=PASID, ADDR=address >> 12)
            world.unit.submit("WAIT", SW=1, STDATA=waits, STADDR=status >> 2)
            deliver(world, each)
            assert world.memory.word(status) == waits
            leaf = world.second.find(address)
            assert leaf is not None
            may[page] = {leaf.frame}
        assert each.access(address, pasid=PASID) == DONE
        assert each.hpa >> 12 in may[page]
    world.unit.check_laws()
