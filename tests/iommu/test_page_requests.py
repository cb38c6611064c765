"""Page requests of devices: the queue, its event, and answers that the unit gives itself.

VT-d: "Page Request Queue"; "Page Request Event"; "Page Request Status Register"; "Invalidation Wait Descriptor".
"""

from __future__ import annotations

import pytest

from tests.iommu.worlds import PASID, RW_PAGE, SID, World
from vtsim.iommu import descriptors as d
from vtsim.iommu import entries as e
from vtsim.iommu import spec as sp
from vtsim.iommu import state as st
from vtsim.iommu.kernels.page_requests import ANSWERED, TAKEN
from vtsim.iommu.unit import Capabilities


def test_page_requests_fill_their_queue_and_then_are_answered() -> None:
    world = World("second-level")
    unit = world.unit
    queue = world.memory.allocate() << 12
    unit.write("PQA", queue)
    unit.write("PEADDR", 0xFEE0_2000)
    unit.write("PEDATA", 0x77)
    unit.write("PECTL", 0)

    ends = [unit.page_request(SID, RW_PAGE, sp.WRITE, pasid=PASID, group=n % 512, last=n % 2 == 1) for n in range(130)]

    assert ends == [TAKEN] * 127 + [ANSWERED] * 3  # 128 descriptors of 32 bytes, one always free
    assert world.memory.word(queue) == d.PAGE_REQUEST_TYPE | 1 << 8 | SID << 16 | PASID << 32
    assert world.memory.word(queue + 8) == RW_PAGE | 0 << 3 | sp.WRITE
    assert world.memory.word(queue + 40) == RW_PAGE | 1 << 3 | 4 | sp.WRITE
    assert unit.read("PRS") == sp.PRS_PPR | sp.PRS_PRO
    sent = [(m.kind, m.first, m.second, m.third) for m in unit.messages()]
    assert sent[0] == (st.PAGE_REQUEST_EVENT, 0xFEE0_2000, 0x77, 0)
    assert sent[1:] == [(st.PAGE_RESPONSE, SID | PASID << 16, n, d.RESPONSE_SUCCESS) for n in (127, 129)]

    unit.write("PQH", unit.read("PQT"))
    unit.write("PRS", sp.PRS_PPR | sp.PRS_PRO)
    assert unit.page_request(SID, RW_PAGE, sp.READ, pasid=PASID) == TAKEN
    assert [m.kind for m in unit.messages()] == [st.PAGE_REQUEST_EVENT]


def test_a_refused_page_request_is_answered_as_invalid() -> None:
    world = World("second-level")
    entry = world.structures.context(SID)
    entry[0] = int(entry[0]) & ~e.PRE

    world.unit.page_request(SID, RW_PAGE, sp.READ, group=3)

    assert [(m.kind, m.second, m.third) for m in world.unit.messages()] == [(st.PAGE_RESPONSE, 3, d.RESPONSE_INVALID)]
    world.unit.check_laws()


def test_a_page_request_while_remapping_is_off_is_answered_and_no_fault() -> None:
    world = World("second-level")
    world.unit.command(clear=sp.TE)

    assert world.unit.page_request(SID, RW_PAGE, sp.READ, pasid=PASID) == ANSWERED
    assert [m.third for m in world.unit.messages()] == [d.RESPONSE_INVALID]
    assert world.unit.read("FSTS") == 0


def test_a_wait_that_drains_page_requests_is_over_when_they_are_in_their_queue() -> None:
    world = World("second-level", Capabilities().having(PDS=1))
    unit, (queue, pages, status) = world.unit, (world.memory.allocate() << 12 for _ in range(3))
    unit.write("IQA", queue | sp.IQA_WIDE)
    unit.command(set=sp.QIE)
    unit.write("PQA", pages)

    assert unit.page_request(SID, RW_PAGE, sp.WRITE, pasid=PASID) == TAKEN
    unit.submit("WAIT", SW=1, PD=1, STDATA=5, STADDR=status >> 2)

    assert world.memory.word(status) & 0xFFFF_FFFF == 5
    assert unit.read("PQT") == 32 and world.memory.word(pages) & 0xFF == d.PAGE_REQUEST_TYPE


@pytest.mark.parametrize("case", ["taken", "off", "refused", "full"])
def test_a_stop_marker_is_never_answered_by_the_unit(case: str) -> None:
    """It tells software that no more requests of a PASID come; with nothing asked there is nothing to answer."""
    world = World("second-level")
    unit, queue = world.unit, world.memory.allocate() << 12
    unit.write("PQA", queue)
    unit.command(clear=sp.TE if case == "off" else 0)
    if case == "refused":
        world.structures.context(SID)[0] = int(world.structures.context(SID)[0]) & ~e.PRE
    if case == "full":
        unit.write("PQH", 32)

    unit.page_request(SID, 0, 0, pasid=PASID, group=3)

    assert [m for m in unit.messages() if m.kind == st.PAGE_RESPONSE] == []
    assert (world.memory.word(queue + 8) == 4 | 3 << 3) == (case == "taken")
    unit.check_laws()
