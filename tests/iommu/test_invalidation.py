"""Invalidation by registers and by queue: every descriptor, granularity and error; nothing stale after it.

VT-d: "Device-TLB Invalidate Descriptor"; "PASID-based-Device-TLB Invalidate Descriptor";
"Device-TLB Invalidation Throttling"; "Page Group Response Descriptor";
"Interrupt Entry Cache"; "Tagging of Cached Translations"; "Context-cache"; "PASID-cache";
"Context-Cache Invalidate Descriptor"; "PASID-cache Invalidate Descriptor"; "IOTLB Invalidate Descriptor";
"PASID-based-IOTLB Invalidate Descriptor"; "Interrupt Entry Cache Invalidate Descriptor";
"Invalidation Wait Descriptor"; "Queued Invalidation Error Handling"; "Draining of Requests to Memory"; "Invalidation Queue Address Register".
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as hs

from tests.iommu.worlds import DOMAIN, HUGE_PAGE, PASID, RW_PAGE, SID, TARGET, World, is_stale, queued, remapped
from vtsim.base import jit
from vtsim.ept.tables import Table
from vtsim.iommu import descriptors as d
from vtsim.iommu import spec as sp
from vtsim.iommu import state as st
from vtsim.iommu.tables import READ_WRITE, USER_PAGE
from vtsim.iommu.unit import Capabilities

EXAMPLES = 40 if jit.DISABLED else 200


def stale_after(kind: str, name: str, address: int = RW_PAGE, **fields: int) -> bool:
    world = queued(kind)
    remapped(world, address)
    assert is_stale(world, address)
    world.unit.submit(name, **fields)
    assert world.unit.read("IQH") == world.unit.read("IQT")
    world.unit.check_laws()
    return is_stale(world, address)


PAGE = RW_PAGE >> 12
# kind of translation, descriptor, granularity; fields that reach the page; fields that miss it
REACH: list[tuple[str, str, int, dict[str, int], dict[str, int] | None]] = [
    ("legacy", "IOTLB", 1, {}, None),
    ("legacy", "IOTLB", 2, {"DID": DOMAIN}, {"DID": DOMAIN + 1}),
    ("legacy", "IOTLB", 3, {"DID": DOMAIN, "ADDR": PAGE}, {"DID": DOMAIN, "ADDR": PAGE + 1}),
    ("legacy", "IOTLB", 3, {"DID": DOMAIN, "ADDR": PAGE - 1, "AM": 2}, {"DID": DOMAIN + 1, "ADDR": PAGE, "AM": 2}),
    ("legacy", "IOTLB", 3, {"DID": DOMAIN, "ADDR": PAGE, "IH": 1}, None),
    ("second-level", "IOTLB", 2, {"DID": DOMAIN}, {"DID": DOMAIN + 1}),
    ("second-level", "IOTLB", 3, {"DID": DOMAIN, "ADDR": PAGE}, {"DID": DOMAIN, "ADDR": PAGE - 1}),
    ("first-level", "IOTLB", 2, {"DID": DOMAIN}, {"DID": DOMAIN + 1}),
    ("nested", "IOTLB", 3, {"DID": DOMAIN, "ADDR": 0}, {"DID": DOMAIN + 1, "ADDR": PAGE}),
    ("first-level", "PASID_IOTLB", 2, {"DID": DOMAIN, "PASID": PASID}, {"DID": DOMAIN, "PASID": PASID + 1}),
    ("nested", "PASID_IOTLB", 2, {"DID": DOMAIN, "PASID": PASID}, {"DID": DOMAIN + 1, "PASID": PASID}),
    (
        "first-level",
        "PASID_IOTLB",
        3,
        {"DID": DOMAIN, "PASID": PASID, "ADDR": PAGE},
        {"DID": DOMAIN, "PASID": PASID, "ADDR": PAGE + 2},
    ),
    (
        "nested",
        "PASID_IOTLB",
        3,
        {"DID": DOMAIN, "PASID": PASID, "ADDR": PAGE, "AM": 4},
        {"DID": DOMAIN, "PASID": PASID + 9, "ADDR": PAGE},
    ),
]


@pytest.mark.parametrize(("kind", "name", "granularity", "hit", "miss"), REACH)
def test_an_invalidation_removes_what_it_names_and_leaves_the_rest(
    kind: str, name: str, granularity: int, hit: dict[str, int], miss: dict[str, int] | None
) -> None:
    assert not stale_after(kind, name, G=granularity, **hit)
    if miss is not None:
        assert stale_after(kind, name, G=granularity, **miss)


@pytest.mark.parametrize(
    ("kind", "name", "more"), [("legacy", "IOTLB", {}), ("first-level", "PASID_IOTLB", {"PASID": PASID})]
)
def test_a_leaf_only_hint_keeps_the_paging_structure_caches(kind: str, name: str, more: dict[str, int]) -> None:
    for hint, reads in ((1, 1), (0, 4)):
        world = queued(kind)
        world.ask(RW_PAGE)
        world.unit.submit(name, G=3, DID=DOMAIN, ADDR=PAGE, IH=hint, **more)
        answer = world.ask(RW_PAGE)
        assert answer.reads["first-level"] + answer.reads["second-level"] == reads


def test_a_page_of_2_mib_is_removed_by_any_page_in_it() -> None:
    assert not stale_after("legacy", "IOTLB", HUGE_PAGE, G=3, DID=DOMAIN, ADDR=(HUGE_PAGE >> 12) + 77)
    assert stale_after("legacy", "IOTLB", HUGE_PAGE, G=3, DID=DOMAIN, ADDR=(HUGE_PAGE >> 12) + 512)


@pytest.mark.parametrize(("granularity", "sid", "mask", "reached"), [
    (1, 0, 0, True), (2, 0, 0, True), (3, SID, 0, True), (3, SID + 1, 0, False), (3, SID + 4, 1, True),
    (3, SID + 6, 2, True), (3, SID + 7, 3, True), (3, SID + 1, 2, False), (3, SID + 8, 3, False),
])  # fmt: skip
def test_context_cache_invalidation_by_function_mask(granularity: int, sid: int, mask: int, reached: bool) -> None:
    world = queued()
    world.ask(RW_PAGE)
    world.structures.context(SID)[0] = 0
    assert world.ask(RW_PAGE).status == st.COMPLETED

    world.unit.submit("CONTEXT_CACHE", G=granularity, DID=DOMAIN, SID=sid, FM=mask)

    assert (world.ask(RW_PAGE).status == st.BLOCKED) == reached


@pytest.mark.parametrize(("granularity", "domain", "pasid", "reached"), [
    (0, DOMAIN, 0, True), (0, DOMAIN + 1, 0, False), (1, DOMAIN, PASID, True), (1, DOMAIN, PASID + 1, False), (3, 0, 0, True),
])  # fmt: skip
def test_pasid_cache_invalidation(granularity: int, domain: int, pasid: int, reached: bool) -> None:
    world = queued("pass-through")
    world.ask(RW_PAGE)
    world.structures.pasid(SID, PASID)[0] = 0
    assert world.ask(RW_PAGE).status == st.COMPLETED

    world.unit.submit("PASID_CACHE", G=granularity, DID=domain, PASID=pasid)

    assert (world.ask(RW_PAGE).status == st.BLOCKED) == reached


def test_an_interrupt_entry_invalidation_removes_entries_by_index() -> None:
    for fields, left in (({"G": 1, "IIDX": 4, "IM": 1}, [0, 1, 6, 7]), ({}, [])):
        world = queued()
        base = int(world.unit.u[st.INTERRUPT_ENTRIES])
        for number, index in enumerate((0, 1, 4, 5, 6, 7)):
            world.unit.u[base + number * st.ENTRY_WORDS + st.TAG] = index
            world.unit.u[base + number * st.ENTRY_WORDS + st.STAMP] = 1

        world.unit.submit("INTERRUPT_ENTRY", **fields)

        entries = [base + number * st.ENTRY_WORDS for number in range(6)]
        assert [int(world.unit.u[at + st.TAG]) for at in entries if world.unit.u[at + st.STAMP]] == left


def test_a_wait_descriptor_writes_its_status_and_interrupts_once_until_it_is_served() -> None:
    world = queued()
    status = world.memory.allocate() << 12
    world.unit.write("IEADDR", 0xFEE0_1000)
    world.unit.write("IEDATA", 0x55)
    world.unit.write("IECTL", 0)

    world.unit.submit("WAIT", SW=1, IF=1, FN=1, STDATA=0x1234_5678, STADDR=(status + 4) >> 2)
    world.unit.submit("WAIT", IF=1)

    assert world.memory.word(status) == 0x1234_5678 << 32
    assert [(m.kind, m.first, m.second) for m in world.unit.messages()] == [(st.INVALIDATION_EVENT, 0xFEE0_1000, 0x55)]
    assert world.unit.read("ICS") == sp.IWC
    world.unit.write("ICS", sp.IWC)
    assert world.unit.read("ICS") == 0
    world.unit.submit("WAIT", IF=1)
    assert len(list(world.unit.messages())) == 1


@pytest.mark.parametrize("wide", [False, True])
def test_a_wait_stands_until_devices_have_answered(wide: bool) -> None:
    world = queued("second-level" if wide else "legacy")
    unit = world.unit
    status = world.memory.allocate() << 12

    if wide:
        unit.submit("PASID_DEVICE_TLB", SID=SID, PASID=PASID, ADDR=RW_PAGE >> 12, S=1)
        unit.submit("PASID_DEVICE_TLB", SID=SID, G=1)
    else:
        unit.submit("DEVICE_TLB", SID=SID, ADDR=RW_PAGE >> 12, S=1)
        unit.submit("DEVICE_TLB", SID=SID, ADDR=1)
    unit.submit("WAIT", SW=1, STDATA=7, STADDR=status >> 2)

    sent = [(m.kind, m.first, m.second, m.third) for m in unit.messages()]
    first = (st.DEVICE_INVALIDATION, SID, RW_PAGE | 1, PASID if wide else sp.NO_PASID)
    assert sent == [first, (st.DEVICE_INVALIDATION, SID, 0 if wide else 0x1000, sp.NO_PASID)]
    unit.device_completed(SID)
    assert world.memory.word(status) == 0
    assert unit.read("IQH") != unit.read("IQT")
    unit.device_completed(SID)
    assert world.memory.word(status) == 7
    assert unit.read("IQH") == unit.read("IQT")


def test_a_device_that_does_not_answer_aborts_the_wait_and_stops_the_queue() -> None:
    world = queued()
    unit = world.unit
    status = world.memory.allocate() << 12
    unit.submit("DEVICE_TLB", SID=SID)
    unit.submit("WAIT", SW=1, STDATA=7, STADDR=status >> 2)
    unit.submit("WAIT", SW=1, STDATA=9, STADDR=(status + 8) >> 2)

    unit.device_timed_out(SID)

    assert unit.read("FSTS") == sp.ITE
    assert unit.read("IQERCD") >> 32 & 0xFFFF == SID
    assert (world.memory.word(status), world.memory.word(status + 8)) == (0, 0)
    unit.write("FSTS", sp.ITE)
    assert (world.memory.word(status), world.memory.word(status + 8)) == (0, 9)
    assert unit.read("IQH") == unit.read("IQT")


def test_a_time_out_gives_up_what_its_device_owes_and_no_other_device() -> None:
    """A wait after the error is cleared still stands until the other device has answered."""
    world = queued()
    unit, other = world.unit, SID + 1
    status = world.memory.allocate() << 12
    for sid in (SID, other, SID):
        unit.submit("DEVICE_TLB", SID=sid)
    unit.device_timed_out(SID)
    unit.write("FSTS", sp.ITE)
    unit.submit("WAIT", SW=1, STDATA=7, STADDR=status >> 2)

    assert world.memory.word(status) == 0
    unit.device_completed(other)
    assert (world.memory.word(status), unit.read("FSTS")) == (7, 0)
    unit.device_completed(SID)  # too late
    assert unit.read("FSTS") == sp.ICE


def test_while_a_time_out_is_not_cleared_another_one_aborts_no_wait_and_the_first_is_the_one_recorded() -> None:
    world = queued()
    unit, other = world.unit, SID + 1
    status = world.memory.allocate() << 12
    for sid in (SID, other):
        unit.submit("DEVICE_TLB", SID=sid)
    unit.device_timed_out(SID)
    unit.submit("WAIT", SW=1, STDATA=7, STADDR=status >> 2)
    unit.device_timed_out(other)
    unit.device_timed_out(SID + 2)  # it owes nothing

    assert unit.read("IQERCD") >> 32 & 0xFFFF == SID
    unit.write("FSTS", sp.ITE)
    assert (world.memory.word(status), unit.read("FSTS")) == (7, 0)


def test_a_time_out_leaves_the_head_at_a_descriptor_that_is_not_valid() -> None:
    world = queued()
    unit = world.unit
    unit.submit("DEVICE_TLB", SID=SID)
    unit.submit_words(d.WAIT | 1 << 8)
    unit.device_timed_out(SID)

    assert unit.read("FSTS") == sp.IQE | sp.ITE
    assert unit.read("IQH") == 16


def test_a_completion_that_nobody_waits_for_is_an_error_that_stops_nothing() -> None:
    world = queued()
    unit = world.unit
    status = world.memory.allocate() << 12

    unit.device_completed(0xFFF8)
    unit.device_completed(0x1234)
    unit.submit("WAIT", SW=1, STDATA=7, STADDR=status >> 2)

    assert unit.read("FSTS") == sp.ICE
    assert unit.read("IQERCD") >> 48 == 0xFFF8  # the first of them
    assert world.memory.word(status) == 7


@pytest.mark.parametrize(("capable", "mip", "pending"), [(1, 3, 3), (1, 0, 32), (0, 3, 32)])
@pytest.mark.parametrize("wide", [False, True])
def test_a_device_has_no_more_invalidations_pending_than_it_has_room_for(
    wide: bool, capable: int, mip: int, pending: int
) -> None:
    """MIP bounds what burdens one physical function, whichever of its virtual ones (SID) it is for."""
    world = queued("second-level" if wide else "legacy", Capabilities().having(DIT=capable))
    unit, sids = world.unit, ([SID + 8 * n for n in range(2)] if capable else [SID])
    name = "PASID_DEVICE_TLB" if wide else "DEVICE_TLB"
    asked = [sids[n % len(sids)] for n in range(40)]
    for number, sid in enumerate(asked):
        unit.submit(name, SID=sid, ADDR=number, MIP=mip, PFSID_LOW=SID & 15, PFSID_HIGH=SID >> 4)
    unit.submit(name, SID=0x7777, MIP=mip, PFSID_LOW=7, PFSID_HIGH=0x777)

    out = [message.first for message in unit.messages()]
    assert out == asked[:pending]
    while out:  # each answer makes room for the next one, and the last of all goes to another device
        unit.device_completed(out.pop(0))
        fresh = [message.first for message in unit.messages()]
        out += fresh
        assert len(out) <= pending + 1
    assert unit.read("IQH") == unit.read("IQT")
    assert unit.read("FSTS") == 0


def test_a_completion_of_a_device_that_was_not_asked_is_an_error_and_leaves_the_others_pending() -> None:
    world = queued()
    world.unit.submit("DEVICE_TLB", SID=SID)
    world.unit.device_completed(SID + 1)
    assert world.unit.read("FSTS") == sp.ICE
    assert world.unit.read("IQERCD") >> 48 == SID + 1
    world.unit.write("FSTS", sp.ICE)
    world.unit.device_completed(SID)
    assert world.unit.read("FSTS") == 0


def test_more_device_invalidations_than_messages_fit_lose_none() -> None:
    world = queued()
    for number in range(150):
        world.unit.submit("DEVICE_TLB", SID=number)
    world.unit.submit("WAIT", IF=1)
    taken: list[int] = []
    while world.unit.read("IQH") != world.unit.read("IQT"):
        for message in world.unit.messages():
            taken.append(message.first)
            world.unit.device_completed(message.first)

    assert taken == list(range(150))


def test_a_page_group_response_reaches_the_device() -> None:
    world = queued("second-level")

    world.unit.submit("PAGE_GROUP_RESPONSE", PP=1, RID=SID, PASID=PASID, PRGI=5, RC=d.RESPONSE_FAILURE)

    assert [(m.kind, m.first, m.second, m.third) for m in world.unit.messages()] == [
        (st.PAGE_RESPONSE, SID | PASID << 16, 5, d.RESPONSE_FAILURE)
    ]


BAD: dict[str, tuple[str, tuple[int, ...], int]] = {
    "type 0": ("legacy", (0,), sp.IQEI_TYPE),
    "type 12": ("legacy", (12,), sp.IQEI_TYPE),
    "type 17, in the high bits": ("legacy", (1 << 9 | 1,), sp.IQEI_TYPE),
    "a scalable-mode descriptor in legacy mode": ("legacy", (d.PASID_CACHE,), sp.IQEI_TYPE),
    "reserved bits of word 0": ("legacy", (d.WAIT | 1 << 8,), sp.IQEI_RESERVED),
    "PD, which only units with PDS have": ("legacy", (d.WAIT | d.DRAIN_PAGE_REQUESTS,), sp.IQEI_RESERVED),
    "reserved bits of word 1": ("legacy", (d.IOTLB_TYPE | 1 << 4, 1 << 8), sp.IQEI_RESERVED),
    "reserved words of a wide descriptor": ("second-level", (d.WAIT, 0, 1), sp.IQEI_RESERVED),
    "private data, which older editions had": ("second-level", (d.PAGE_GROUP_RESPONSE | 1 << 5,), sp.IQEI_RESERVED),
    "words of private data": ("second-level", (d.PAGE_GROUP_RESPONSE, 0, 1, 1), sp.IQEI_RESERVED),
    "granularity 0 of contexts": ("legacy", (d.CONTEXT_CACHE,), sp.IQEI_RESERVED),
    "granularity 0 of IOTLB": ("legacy", (d.IOTLB_TYPE,), sp.IQEI_RESERVED),
    "granularity 1 of PASID-based IOTLB": ("second-level", (d.PASID_IOTLB | 1 << 4,), sp.IQEI_RESERVED),
    "granularity 2 of PASID cache": ("second-level", (d.PASID_CACHE | 2 << 4,), sp.IQEI_RESERVED),
}


@pytest.mark.parametrize("name", BAD)
def test_a_descriptor_that_is_not_valid_stops_the_queue_at_itself(name: str) -> None:
    kind, words, error = BAD[name]
    world = queued(kind)
    unit = world.unit
    unit.submit("WAIT", IF=1)
    head = unit.read("IQH")

    unit.submit_words(*words)
    unit.submit("WAIT", IF=1)

    assert (unit.read("FSTS"), unit.read("IQERCD") & 0xF) == (sp.IQE, error)
    assert unit.read("IQH") == head
    queue = unit.read("IQA") & ~0xFFF
    step = 32 if kind != "legacy" else 16
    for n in range(step // 8):
        world.memory.store(queue + head + 8 * n, d.WAIT if n == 0 else 0)
    unit.write("FSTS", sp.IQE)
    assert (unit.read("FSTS"), unit.read("IQH")) == (0, unit.read("IQT"))


def test_every_queue_error_that_is_no_descriptors_fault() -> None:
    def error(world: World) -> int:
        assert world.unit.read("FSTS") & sp.IQE
        return world.unit.read("IQERCD") & 0xF

    beyond = queued()
    beyond.unit.write("IQT", 0x1000)
    assert error(beyond) == sp.IQEI_TAIL

    nowhere = queued()
    nowhere.unit.write("IQA", 0x3FFF_F000)
    nowhere.unit.write("IQT", 16)
    assert error(nowhere) == sp.IQEI_FETCH

    narrow = queued("second-level")
    narrow.unit.write("IQA", narrow.unit.read("IQA") & ~sp.IQA_WIDE)
    narrow.unit.write("IQT", 16)
    assert error(narrow) == sp.IQEI_WIDTH

    askew = queued("second-level")
    askew.unit.write("IQT", 16)
    assert error(askew) == sp.IQEI_MISALIGNED

    for lacking, wide_is_known in ((("SMTS",), True), (("SMTS", "ADMS"), False)):
        plain = queued("legacy", Capabilities().without(*lacking))
        plain.unit.write("IQA", plain.unit.read("IQA") | sp.IQA_WIDE)
        plain.memory.store(plain.unit.read("IQA") & ~0xFFF, d.WAIT)
        plain.unit.write("IQT", 32)
        assert (plain.unit.read("FSTS") & sp.IQE == 0) == wide_is_known

    undefined = queued()
    undefined.unit.write("RTADDR", 2 << 10)
    undefined.unit.command(set=sp.SRTP)
    undefined.unit.write("IQT", 16)
    assert error(undefined) == sp.IQEI_TTM
    found = {sp.IQEI_NONE, sp.IQEI_TAIL, sp.IQEI_FETCH, sp.IQEI_WIDTH, sp.IQEI_MISALIGNED, sp.IQEI_TTM}
    assert found | {error for _, _, error in BAD.values()} == set(range(len(sp.QUEUE_ERRORS)))


REACHED = {name for _, name, *_ in REACH} | {
    "CONTEXT_CACHE",
    "PASID_CACHE",
    "INTERRUPT_ENTRY",
    "WAIT",
    "DEVICE_TLB",
    "PASID_DEVICE_TLB",
    "PAGE_GROUP_RESPONSE",
}


def test_every_descriptor_type_has_a_test() -> None:
    assert {each.name for each in d.DESCRIPTORS} == REACHED


def test_the_queue_wraps_and_turning_it_off_resets_the_head() -> None:
    world = queued()
    unit = world.unit
    for _ in range(256 + 3):
        unit.submit("WAIT", IF=1)

    assert unit.read("IQH") == unit.read("IQT") == 3 * 16
    assert unit.statistics()["descriptors"] == 256 + 3
    unit.command(clear=sp.QIE)
    assert unit.read("IQH") == 0


# --- laws --------------------------------------------------------------------------------------------------------------
def test_without_invalidation_the_old_mapping_is_used() -> None:
    """The window that deferred invalidation leaves open is real."""
    world = World("legacy")
    remapped(world)
    assert is_stale(world)


steps = hs.lists(hs.tuples(hs.sampled_from(["ask", "move", "unmap", "invalidate"]), hs.integers(0, 5)), max_size=24)


@given(hs.sampled_from(["legacy", "second-level", "first-level", "nested"]), steps)
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
def test_after_an_acknowledged_invalidation_the_old_mapping_is_never_used(
    kind: str, script: list[tuple[str, int]]
) -> None:
    """A dictionary of pages is the oracle: what an address may lead to grows with each change, until it is invalidated."""
    world = queued(kind)
    table, rights = (world.first, USER_PAGE) if world.first else (world.second, READ_WRITE)
    assert isinstance(table, Table)
    may: dict[int, set[int]] = {page: {0} for page in range(6)}
    frame = TARGET
    for action, page in script:
        address = RW_PAGE + 0x10000 + (page << 12)
        if action == "move":
            frame += 1
            table.map(address, frame, rights)
            may[page].add(frame)
        elif action == "unmap":
            table.map(address, 0, 0)
            may[page].add(0)
        elif action == "ask":
            assert world.ask(address).hpa >> 12 in may[page]
            continue
        else:
            newest_of = table.find(address)
            newest = 0 if newest_of is None else newest_of.frame
            if world.first:
                world.unit.submit("PASID_IOTLB", G=3, DID=DOMAIN, PASID=PASID, ADDR=address >> 12)
            else:
                world.unit.submit("IOTLB", G=3, DID=DOMAIN, ADDR=address >> 12)
            may[page] = {newest}
            assert world.ask(address).hpa >> 12 == newest
    world.unit.check_laws()
