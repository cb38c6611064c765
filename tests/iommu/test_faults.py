"""Every fault reason of DMA remapping is reached, recorded as the specification says, and touches no memory.

VT-d: "Root Entry"; "Context Entry"; "Scalable-Mode Root Entry"; "Scalable-Mode Context Entry";
"Scalable-Mode PASID Directory Entry"; "Scalable-Mode PASID Table Entry"; "Translation Request";
"Translated Request"; "Fault Conditions and Remapping Hardware Behavior for Various Requests";
"Non-Recoverable Address Translation Faults"; "Recoverable Address Translation Faults"; "Primary Fault Logging";
"Fault Event"; "Capability Register"; "Extended Capability Register"; "Fault Status Register";
"Fault Recording Registers".
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.iommu.worlds import (
    GUEST_TABLES,
    HUGE_PAGE,
    OUTSIDE,
    PASID,
    READ_ONLY_PAGE,
    RW_PAGE,
    SID,
    SUPERVISOR_PAGE,
    WRITE_ONLY_PAGE,
    World,
)
from vtsim.iommu import entries as e
from vtsim.iommu import faults as f
from vtsim.iommu import spec as sp
from vtsim.iommu import state as st
from vtsim.iommu.kernels.page_requests import REFUSED
from vtsim.iommu.unit import Capabilities

READ, WRITE, EXECUTE, PRIVILEGED = sp.READ, sp.WRITE, sp.EXECUTE, sp.PRIVILEGED
Case = Callable[[], World]


def legacy(change: Callable[[World], None] = lambda world: None, **request: int) -> Case:
    return _case("legacy", change, request)


def second(change: Callable[[World], None] = lambda world: None, **request: int) -> Case:
    return _case("second-level", change, request)


def first(change: Callable[[World], None] = lambda world: None, **request: int) -> Case:
    return _case("first-level", change, request)


def nested(change: Callable[[World], None] = lambda world: None, **request: int) -> Case:
    return _case("nested", change, request)


def _case(kind: str, change: Callable[[World], None], request: dict[str, int]) -> Case:
    def run() -> World:
        world = World(kind)
        change(world)
        world.unit.translate(
            **{"sid": SID, "address": RW_PAGE, "access": READ, "pasid": world.pasid, **request}
        )  # fmt: skip
        return world

    return run


def without(kind: str, *names: str, **request: int) -> Case:
    """The same world in a unit without a capability."""

    def run() -> World:
        world = World(kind, Capabilities().without(*names))
        world.unit.translate(**{"sid": SID, "address": RW_PAGE, "access": READ, "pasid": world.pasid, **request})
        return world

    return run


def narrow(kind: str, address: int) -> Case:
    """A unit whose guest addresses have 39 bits."""

    def run() -> World:
        world = World(kind, Capabilities().having(MGAW=38))
        world.ask(address)
        return world

    return run


def asks_page(kind: str, change: Callable[[World], None] = lambda world: None) -> Case:
    def run() -> World:
        world = World(kind)
        change(world)
        assert world.unit.page_request(SID, RW_PAGE, READ, pasid=PASID) == REFUSED
        return world

    return run


def context(word: int, set: int = 0, clear: int = 0) -> Callable[[World], None]:
    def change(world: World) -> None:
        entry = world.structures.context(SID)
        entry[word] = int(entry[word]) & ~clear | set

    return change


def root(set: int = 0, clear: int = 0) -> Callable[[World], None]:
    def change(world: World) -> None:
        where = (world.structures.root << 12) + (SID >> 8) * 16
        world.change(where, lambda word: word & ~clear | set)

    return change


def directory(set: int = 0, clear: int = 0) -> Callable[[World], None]:
    def change(world: World) -> None:
        where = (int(world.structures.context(SID)[0]) & e.POINTER) + 8 * (PASID >> 6)
        world.change(where, lambda word: word & ~clear | set)

    return change


def pasid(word: int, set: int = 0, clear: int = 0) -> Callable[[World], None]:
    def change(world: World) -> None:
        entry = world.structures.pasid(SID, PASID)
        entry[word] = int(entry[word]) & ~clear | set

    return change


def page(table: str, level: int, set: int = 0, clear: int = 0, address: int = RW_PAGE) -> Callable[[World], None]:
    def change(world: World) -> None:
        where = world.entry_at(getattr(world, table), address, level)
        world.change(where, lambda word: word & ~clear | set)

    return change


def frozen(table: str, level: int) -> Callable[[World], None]:
    def change(world: World) -> None:
        world.freeze(world.entry_at(getattr(world, table), RW_PAGE, level))

    return change


def rtaddr(value: int) -> Callable[[World], None]:
    def change(world: World) -> None:
        world.unit.write("RTADDR", world.structures.rtaddr & ~0xC00 | value)
        world.unit.command(set=sp.SRTP)

    return change


def guest_frame(rights: int) -> Callable[[World], None]:
    """Change the second-level entry that maps the guest's top table."""

    def change(world: World) -> None:
        where = world.entry_at(world.second, GUEST_TABLES << 12, 1)
        world.change(where, lambda word: word & ~7 | rights)

    return change


def both(*changes: Callable[[World], None]) -> Callable[[World], None]:
    def change(world: World) -> None:
        for each in changes:
            each(world)

    return change


ATS = {"at": sp.TRANSLATION_REQUEST}
# fmt: off
CASES: dict[str, list[Case]] = {
    "ROOT_NOT_PRESENT":             [legacy(root(clear=1))],
    "CONTEXT_NOT_PRESENT":          [legacy(context(0, clear=1)), legacy(sid=SID + 1)],
    "CONTEXT_INVALID":              [legacy(context(1, clear=7)), legacy(context(1, set=4)), legacy(context(0, set=3 << 2)),
                                     without("legacy", "DT"), legacy(both(context(0, set=2 << 2, clear=1 << 2), context(1, set=2, clear=1)))],
    "BEYOND_MGAW":                  [legacy(address=1 << 48), legacy(address=-4096), legacy(address=1 << 46, at=2),
                                     narrow("legacy", 1 << 40)],
    "NO_WRITE":                     [legacy(address=READ_ONLY_PAGE, access=WRITE), legacy(address=0x5000, access=WRITE)],
    "NO_READ":                      [legacy(address=WRITE_ONLY_PAGE), legacy(address=0x5000)],
    "SECOND_LEVEL_ACCESS":          [legacy(page("second", level, set=OUTSIDE)) for level in (2, 3, 4)] + [legacy(context(0, set=OUTSIDE))],
    "ROOT_ACCESS":                  [legacy(rtaddr(OUTSIDE))],
    "CONTEXT_ACCESS":               [legacy(root(set=OUTSIDE))],
    "ROOT_RESERVED":                [legacy(root(set=2)), legacy(root(set=1 << 50))],
    "CONTEXT_RESERVED":             [legacy(context(0, set=1 << 5)), legacy(context(1, set=1 << 40)), legacy(context(0, set=1 << 50))],
    "SECOND_LEVEL_RESERVED":        [legacy(page("second", 1, set=1 << 46)), legacy(page("second", 2, set=1 << 11)),
                                     legacy(page("second", 4, set=1 << 7)), legacy(page("second", 2, set=1 << 13, address=HUGE_PAGE), address=HUGE_PAGE),
                                     legacy(page("second", 1, set=1 << 62)), legacy(page("second", 3, set=1 << 62)),
                                     without("legacy", "SLLPS", address=HUGE_PAGE)],
    "TYPE_BLOCKED":                 [legacy(context(0, clear=1 << 2), **ATS), legacy(context(0, clear=1 << 2), at=2)],
    "INTERRUPT_ADDRESS":            [legacy(page("second", 1, clear=e.ADDRESS, set=0xFEE0_0000)), legacy(address=0xFEE0_1000, at=2)],
    "INVALID_ROOT_TABLE":           [legacy(rtaddr(2 << 10)), without("second-level", "SMTS")],
    "LEGACY_PASID":                 [legacy(pasid=9)],
    "LEGACY_PAGE_REQUEST":          [asks_page("legacy")],
    "ABORT_MODE":                   [second(rtaddr(3 << 10)), asks_page("second-level", rtaddr(3 << 10))],
    "SCALABLE_ROOT_ACCESS":         [second(rtaddr(1 << 10 | OUTSIDE))],
    "SCALABLE_ROOT_NOT_PRESENT":    [second(root(clear=1)), second(sid=SID | 0x80)],
    "SCALABLE_ROOT_RESERVED":       [second(root(set=4)), second(root(set=1 << 47))],
    "SCALABLE_CONTEXT_ACCESS":      [second(root(set=OUTSIDE))],
    "SCALABLE_CONTEXT_NOT_PRESENT": [second(context(0, clear=1)), asks_page("second-level", context(0, clear=1))],
    "SCALABLE_CONTEXT_RESERVED":    [second(context(0, set=1 << 6)), second(context(2, set=1)), second(context(1, set=1 << 30)),
                                     without("second-level", "PASID"), without("second-level", "PRS")],
    "SCALABLE_CONTEXT_INVALID":     [second(context(0, clear=e.DTE))],
    "DEVICE_TLB_DISABLED":          [second(context(0, clear=e.DTE | e.PRE), at=at) for at in (1, 2)],
    "PASID_DISABLED":               [second(context(0, clear=e.PASIDE)), asks_page("second-level", context(0, clear=e.PASIDE))],
    "PASID_BEYOND_DIRECTORY":       [second(pasid=1 << 15)],
    "PAGE_REQUEST_DISABLED":        [asks_page("second-level", context(0, clear=e.PRE))],
    "RID_PASID_BEYOND_DIRECTORY":   [second(context(1, set=1 << 15), pasid=sp.NO_PASID)],
    "DIRECTORY_ACCESS":             [second(context(0, set=OUTSIDE))],
    "DIRECTORY_NOT_PRESENT":        [second(directory(clear=1)), second(pasid=PASID + 64)],
    "DIRECTORY_RESERVED":           [second(directory(set=8)), second(directory(set=1 << 46))],
    "PASID_ACCESS":                 [second(directory(set=OUTSIDE))],
    "PASID_NOT_PRESENT":            [second(pasid(0, clear=1)), second(pasid=PASID + 1)],
    "PASID_RESERVED":               [second(pasid(word, set=1 << bit)) for word, bit in ((0, 10), (0, 46), (1, 17), (2, 8), (3, 0), (7, 62))]
                                    + [without("second-level", name) for name in ("SRS", "ERS", "SLADS", "SMPWC")],
    "PASID_INVALID":                [second(pasid(0, clear=7 << 6)), second(pasid(0, set=5 << 6)), second(pasid(0, set=4 << 2)),
                                     first(pasid(2, set=3 << 2)), without("first-level", "FLTS"), without("second-level", "SLTS"),
                                     without("nested", "NEST"), without("pass-through", "PT")],
    "EXECUTE_DISABLED":             [first(pasid(2, clear=e.ERE), access=READ | EXECUTE)],
    "SUPERVISOR_DISABLED":          [first(pasid(2, clear=e.SRE), access=READ | PRIVILEGED)],
    "FIRST_LEVEL_ACCESS":           [first(page("first", level, set=OUTSIDE)) for level in (2, 3, 4)],
    "FIRST_LEVEL_NOT_PRESENT":      [first(page("first", level, clear=1)) for level in (1, 2, 3, 4)],
    "FIRST_LEVEL_RESERVED":         [first(page("first", 1, set=1 << 46)), first(page("first", 4, set=1 << 7)),
                                     first(both(pasid(2, clear=e.NXE), page("first", 1, set=-(1 << 63)))),
                                     first(page("first", 2, set=1 << 13, address=HUGE_PAGE), address=HUGE_PAGE)],
    "FIRST_LEVEL_TOP_ACCESS":       [first(pasid(2, set=OUTSIDE))],
    "FIRST_LEVEL_BEYOND":           [nested(page("first", 4, set=1 << 49))],
    "NESTED_NO_READ_TOP":           [nested(guest_frame(e.SL_W)), nested(guest_frame(0))],
    "NESTED_NO_READ":               [nested(page("first", 3, set=1 << 40))],
    "NESTED_NO_WRITE":              [nested(both(guest_frame(e.SL_R), page("first", 4, clear=e.FL_A)))],
    "SCALABLE_SECOND_ACCESS":       [second(page("second", level, set=OUTSIDE)) for level in (2, 3, 4)],
    "SCALABLE_SECOND_NOT_PRESENT":  [second(address=0x5000), second(page("second", 3, clear=7)), nested(page("first", 1, set=1 << 40))],
    "SCALABLE_SECOND_RESERVED":     [second(page("second", 1, set=1 << 46)), second(page("second", 4, set=1 << 7))],
    "SCALABLE_SECOND_TOP_ACCESS":   [second(pasid(0, set=OUTSIDE))],
    "SECOND_FLAGS_NOT_SNOOPED":     [second(pasid(1, clear=e.PWSNP))],
    "SECOND_FLAGS_FAILED":          [second(frozen("second", 1))],
    "NOT_CANONICAL":                [first(address=1 << 47), first(address=1 << 60)],
    "SUPERVISOR_PAGE":              [first(address=SUPERVISOR_PAGE)],
    "NO_EXECUTE":                   [first(address=WRITE_ONLY_PAGE, access=READ | EXECUTE),
                                     first(pasid(2, set=e.SMEP), access=READ | EXECUTE | PRIVILEGED)],
    "SCALABLE_BEYOND_MGAW":         [second(address=1 << 48), second(address=1 << 46, at=2),
                                     narrow("second-level", 1 << 40)],
    "NESTED_BEYOND":                [nested(page("first", 1, set=1 << 49))],
    "SCALABLE_NO_WRITE":            [first(address=READ_ONLY_PAGE, access=WRITE), second(address=READ_ONLY_PAGE, access=WRITE),
                                     first(address=READ_ONLY_PAGE, access=WRITE | PRIVILEGED)],
    "SCALABLE_NO_READ":             [second(address=WRITE_ONLY_PAGE)],
    "SCALABLE_INTERRUPT_ADDRESS":   [second(page("second", 1, clear=e.ADDRESS, set=0xFEE0_0000)), second(address=0xFEE0_1000, at=2)],
    "FIRST_FLAGS_NOT_SNOOPED":      [first(pasid(1, clear=e.PWSNP))],
    "FIRST_FLAGS_FAILED":           [first(frozen("first", 1))],
}
# fmt: on
OF_DMA = {each.name for each in f.FAULTS if not each.condition.startswith("IR.")}
ALL = [(name, number) for name, cases in CASES.items() for number in range(len(cases))]


def test_every_fault_reason_of_dma_remapping_has_a_case() -> None:
    assert set(CASES) == OF_DMA


def last_record(world: World) -> tuple[int, int]:
    return world.unit.read_at(sp.FAULT_OFFSET, 8), world.unit.read_at(sp.FAULT_OFFSET + 8, 8)


@pytest.mark.parametrize(("name", "number"), ALL)
def test_the_reason_is_given_and_recorded(name: str, number: int) -> None:
    world = CASES[name][number]()
    fault = f.BY_NAME[name]

    answer = world.unit.answer()
    low, high = last_record(world)

    assert f.title(answer.reason) == fault.title
    assert high >> 32 & 0xFF == fault.code
    assert high >> 63 == 1
    assert high & 0xFFFF == int(world.unit.u[st.SID])
    assert low == int(world.unit.u[st.ADDRESS]) & ~0xFFF & (1 << 64) - 1
    assert world.unit.read("FSTS") == sp.PPF
    world.unit.check_laws()


ANSWERED = [
    name
    for name in CASES
    if name not in ("LEGACY_PAGE_REQUEST", "PAGE_REQUEST_DISABLED", "EXECUTE_DISABLED", "TYPE_BLOCKED")
]


def silenced(world: World) -> None:
    context(0, set=e.FPD)(world)


@pytest.mark.parametrize("name", ANSWERED)
def test_fpd_of_the_context_entry_silences_qualified_reasons_only(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = World.__attrs_post_init__

    def with_fpd(self: World) -> None:
        made(self)
        silenced(self)

    monkeypatch.setattr(World, "__attrs_post_init__", with_fpd)
    world = CASES[name][0]()

    counted = world.unit.statistics()
    assert (counted["faults recorded"], counted["faults silenced"]) == ((0, 1) if f.BY_NAME[name].qualified else (1, 0))
    assert (world.unit.read("FSTS") == 0) == f.BY_NAME[name].qualified


@pytest.mark.parametrize("where", [context(0, set=e.FPD), directory(set=e.FPD), pasid(0, set=e.FPD)])
@pytest.mark.parametrize("cached", [False, True])
def test_fpd_of_every_entry_on_the_way_silences_also_when_it_is_cached(
    where: Callable[[World], None], cached: bool
) -> None:
    world = World("second-level")
    where(world)
    if cached:
        assert world.ask(RW_PAGE).status == st.COMPLETED

    world.ask(0x5000)

    assert world.unit.statistics()["faults silenced"] == 1


def test_a_translation_request_without_rights_succeeds_and_is_no_fault() -> None:
    for name, answer in ((each.name, each.answer) for each in f.FAULTS if each.answer):
        if name not in CASES or name in ("LEGACY_PAGE_REQUEST", "PAGE_REQUEST_DISABLED"):
            continue
        world = CASES[name][0]()
        unit = world.unit
        u = unit.u
        given = int(u[st.SID]), int(u[st.ADDRESS]), int(u[st.ACCESS]), int(u[st.PASID])
        unit.write_at(sp.FAULT_OFFSET + 8, 8, 1 << 63)
        if int(u[st.AT]) == sp.TRANSLATED:
            continue

        reply = unit.translate(given[0], given[1], given[2], pasid=given[3], at=sp.TRANSLATION_REQUEST)

        if answer == f.SUCCESS:
            assert (name, reply.status, reply.rights, reply.reason) == (name, st.COMPLETED, reply.rights, 0)
            assert not reply.rights & given[2] or name in ("NO_EXECUTE",)
            assert unit.read("FSTS") == 0
        else:
            expected = f.ANSWER_UR if answer == f.UR else f.ANSWER_CA
            assert (name, reply.status, reply.answer) == (name, st.BLOCKED, expected)


def test_a_log_that_is_full_overflows_once_and_is_read_in_order() -> None:
    world = World("legacy", Capabilities().having(NFR=1))
    unit = world.unit
    unit.write("FEADDR", 0xFEE0_0000)
    unit.write("FEDATA", 0x41)
    unit.write("FECTL", 0)

    for page_number in range(4):
        world.ask(page_number << 12)

    counted = unit.statistics()
    assert (counted["faults recorded"], counted["faults overflowed"]) == (2, 2)
    assert unit.read("FSTS") == sp.PPF | sp.PFO
    assert [unit.read_at(sp.FAULT_OFFSET + 16 * n, 8) for n in range(2)] == [0, 0x1000]
    assert [(m.kind, m.first, m.second) for m in unit.messages()] == [(st.FAULT_EVENT, 0xFEE0_0000, 0x41)]

    unit.write_at(sp.FAULT_OFFSET + 8, 8, 1 << 63)
    assert unit.read("FSTS") == sp.PPF | sp.PFO  # the second record is pending still
    unit.write_at(sp.FAULT_OFFSET + 24, 8, 1 << 63)
    unit.write("FSTS", sp.PFO)
    assert unit.read("FSTS") == 0
    world.ask(0x7000)
    assert unit.read("FSTS") == sp.PPF
    assert len(list(unit.messages())) == 1


def test_a_masked_fault_event_is_sent_when_it_is_unmasked_unless_it_was_served() -> None:
    world = World("legacy")
    unit = world.unit
    assert unit.read("FECTL") == sp.IM

    world.ask(0)
    assert unit.read("FECTL") == sp.IM | sp.IP
    assert list(unit.messages()) == []
    unit.write("FECTL", 0)
    assert unit.read("FECTL") == 0
    assert [m.kind for m in unit.messages()] == [st.FAULT_EVENT]

    unit.write("FECTL", sp.IM)
    unit.write_at(sp.FAULT_OFFSET + 8, 8, 1 << 63)
    world.ask(0x1000)
    unit.write_at(sp.FAULT_OFFSET + 24, 8, 1 << 63)
    unit.write("FECTL", 0)
    assert list(unit.messages()) == []


def test_faults_of_one_source_are_compressed_where_the_unit_does_that() -> None:
    world = World("legacy")
    world.unit.u[st.COMPRESS] = 1

    for page_number in range(3):
        world.ask(page_number << 12)

    counted = world.unit.statistics()
    assert (counted["faults recorded"], counted["faults compressed"]) == (1, 2)
    world.unit.check_laws()


@pytest.mark.parametrize("kind", ["legacy", "second-level", "first-level", "nested"])
def test_a_blocked_request_changes_no_frame_and_no_cache(kind: str) -> None:
    world = World(kind)
    before = world.memory.arena.copy()
    caches = world.unit.u[st.CACHE_AREA :].copy()

    assert world.ask(READ_ONLY_PAGE, WRITE).status == st.BLOCKED

    assert (world.memory.arena == before).all()
    base = int(world.unit.u[st.IOTLB_4K]) - st.CACHE_AREA
    assert (world.unit.u[st.CACHE_AREA :][base:] == caches[base:]).all()
