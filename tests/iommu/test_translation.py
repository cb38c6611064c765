"""Translation against an independent walker, over tables with random damage; and the laws of caches and walks.

VT-d: "First-Stage Paging Entries"; "Second-Stage Paging Entries"; "First-Stage Translation";
"Second-Stage Translation"; "Nested Translation"; "Pass-Through Translation"; "Accessed and Dirty Flags";
"Snoop Behavior"; "Interrupt Address Range"; "Zero-Length Reads"; "Hardware Support for Protected Memory Regions";
"IOTLB"; "Caches for Paging Structures".
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as hs

from tests.iommu.walker import Blocked, Walker
from tests.iommu.worlds import (
    HUGE_PAGE,
    OUTSIDE,
    PASID,
    READ_ONLY_PAGE,
    RW_PAGE,
    SID,
    SUPERVISOR_PAGE,
    TARGET,
    WRITE_ONLY_PAGE,
    World,
)
from vtsim.base import jit
from vtsim.base.memory import ROM, is_memory, kind_of
from vtsim.ept.tables import Table
from vtsim.iommu import entries as e
from vtsim.iommu import faults as f
from vtsim.iommu import spec as sp
from vtsim.iommu import state as st
from vtsim.iommu.state import Cache, Caches
from vtsim.iommu.tables import READ_WRITE, USER_PAGE, Memory, Structures, domain_table, guest_table
from vtsim.iommu.unit import Answer, Capabilities, RemappingUnit

KINDS = ("legacy", "second-level", "first-level", "nested", "pass-through")
PAGES = (READ_ONLY_PAGE, WRITE_ONLY_PAGE, RW_PAGE, SUPERVISOR_PAGE, HUGE_PAGE, 0x5000)
EXAMPLES = 120 if jit.DISABLED else 250


def walker(world: World) -> Walker:
    memory, unit = world.memory, world.unit
    return Walker(
        memory.word,
        lambda hpa: bool(is_memory(memory.arena, hpa)),
        lambda hpa: int(kind_of(memory.arena, hpa >> 12)) == ROM,
        unit.capabilities.cap,
        unit.capabilities.ecap,
        unit.capabilities.host_width,
        unit.read("RTADDR"),
        world.ranges,
        world.default_type,
    )


def expected(world: World, request: dict[str, int]) -> tuple[tuple[object, ...], dict[int, int]]:
    """What the independent walker says, as `Answer.translation`, and the flags that are to be set."""
    oracle = walker(world)
    names = {"read": sp.READ, "write": sp.WRITE, "execute": sp.EXECUTE, "privileged": sp.PRIVILEGED}
    access = {name for name, bit in names.items() if request["access"] & bit}
    pasid = None if request["pasid"] == sp.NO_PASID else request["pasid"]
    at = request["at"]
    try:
        found = oracle.translate(SID, pasid, request["address"], access, at)
    except Blocked as blocked:
        if at == sp.TRANSLATION_REQUEST and f.BY_NAME[blocked.name].answer == f.SUCCESS:
            return (st.COMPLETED, 0, 0, 12, False, 0, None), {}
        return (st.BLOCKED, 0, 0, 12, False, blocked.code, None), {}
    return (st.COMPLETED, *found[:4], 0, found.kind), oracle.flags


def places(world: World) -> list[int]:
    """Addresses of the words that translations of this world depend on."""
    root = world.structures.root << 12
    found = [root + 16 * (SID >> 8), root + 16 * (SID >> 8) + 8]
    base = (world.memory.word(found[0]) & e.POINTER) + (SID & 0x7F) * (16 if world.kind == "legacy" else 32)
    found += [base, base + 8]
    if world.kind != "legacy":
        directory = world.memory.word(base) & e.POINTER
        table = world.memory.word(directory + 8 * (PASID >> 6)) & e.POINTER
        found += [directory + 8 * (PASID >> 6), *(table + 64 * (PASID & 63) + 8 * n for n in (0, 1, 2, 7))]
    for each in (world.first, world.second):
        if isinstance(each, Table):
            for page in PAGES[:5]:
                lowest = 2 if page == HUGE_PAGE else 1
                if world.kind == "nested" and each is world.second:
                    page = (TARGET << 12) + page % 0x4000
                    lowest = 1
                found += [world.entry_at(each, page, level) for level in range(lowest, 5)]
    return found


damage = hs.lists(
    hs.tuples(
        hs.integers(0, 1 << 20), hs.one_of(hs.integers(0, 63), hs.sampled_from(["outside", "loop", "zero", "rom"]))
    ),
    max_size=3,
)
requests = hs.lists(
    hs.fixed_dictionaries(
        {
            "address": hs.tuples(
                hs.sampled_from(PAGES),
                hs.integers(0, 0xFF0),
                hs.sampled_from([0, 0, 0, 1 << 45, 1 << 47, 1 << 48, 1 << 57]),
            ).map(sum),
            "access": hs.sampled_from([1, 2, 3, 5, 9, 10, 13]),
            "at": hs.sampled_from([0, 0, 0, 1, 2]),
            "with_pasid": hs.booleans(),
        }
    ),
    min_size=1,
    max_size=4,
)


def apply_damage(world: World, wounds: list[tuple[int, int | str]]) -> None:
    where = places(world)
    for number, wound in wounds:
        at = where[number % len(where)]
        if isinstance(wound, int):
            world.change(at, lambda word, bit=wound: word ^ (1 << bit if bit < 63 else -(1 << 63)))
        elif wound == "outside":
            world.change(at, lambda word: word & 0xFFF | OUTSIDE)
        elif wound == "loop":
            world.change(at, lambda word, at=at: word & 0xFFF | at & ~0xFFF)
        elif wound == "zero":
            world.change(at, lambda word: 0)
        else:
            world.freeze(at)


FULL = Capabilities()
UNITS = (
    FULL, FULL, FULL, FULL.without("SLLPS", "SC"), FULL.without("FL1GP").having(ND=0), FULL.having(SAGAW=0b0100),
    FULL.having(MGAW=30), FULL.having(SLLPS=1), FULL.having(MTS=1), FULL.having(MTS=1), FULL.having(MTS=1, CM=1),
    FULL.having(CM=1), FULL.having(RWBF=1),
)  # fmt: skip


@given(hs.sampled_from(KINDS), damage, requests, hs.booleans(), hs.sampled_from(UNITS), hs.integers(0, 1 << 60))
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
def test_every_request_ends_as_the_independent_walker_says(
    kind: str,
    wounds: list[tuple[int, int | str]],
    asked: list[dict[str, int]],
    cached: bool,
    capabilities: Capabilities,
    dice: int,
) -> None:
    world = World(kind, capabilities, caches=Caches() if cached else Caches.none())
    if "MTS" in capabilities.ecap:
        world.type_memory(dice)
    apply_damage(world, wounds)
    for raw in asked:
        request = {**raw, "pasid": world.pasid if raw["with_pasid"] or kind == "legacy" else sp.NO_PASID}
        del request["with_pasid"]
        for _ in range(2):
            wanted, flags = expected(world, request)
            before = world.memory.arena.copy()

            answer = world.unit.translate(SID, **request)

            assert answer.translation == wanted
            if cached:
                assert answer.status == st.COMPLETED or (world.memory.arena == before).all()
                continue
            after = {where: world.memory.word(where) for where in flags}
            assert all(after[where] & bits == bits for where, bits in flags.items())
            for where, bits in flags.items():
                world.change(where, lambda word, bits=bits: word & ~bits)
            changed = np.flatnonzero(world.memory.arena != before)
            frames = int(world.memory.arena[0])
            tokens = {int(at) - frames for at in changed if at < frames + int(world.memory.arena[1])}
            assert tokens == {where >> 12 for where in flags}
            for where, bits in flags.items():
                world.change(where, lambda word, bits=bits: word | bits)
    world.unit.check_laws()


SIZES = (0, 1, 2)


@pytest.mark.parametrize("guest", SIZES)
@pytest.mark.parametrize("host", SIZES)
def test_a_cold_nested_walk_reads_what_the_formula_says(guest: int, host: int) -> None:
    """(g + 1)(e + 1) - 1 reads for g levels of the guest and e levels of the host, where tables are in 4-KiB pages."""
    memory = Memory(4 << 30, pool_pages=64)
    memory.arena[10] = 1 << 30 >> 12  # allocate above the first GiB
    second = domain_table(memory)
    unit = RemappingUnit(memory.arena, caches=Caches.none())
    first = guest_table(memory, second, 0x40_0000)
    first.map(0, 0x80_0000, e.PRESENT | e.FL_RW | e.FL_US, size=guest)
    second.map(0x80_0000 << 12, 0, READ_WRITE, size=host)
    structures = Structures(memory, scalable=True)
    structures.enable(SID)
    structures.assign(SID, PASID, 1, first=first, second=second, middle=e.PWSNP)
    unit.enable(structures.rtaddr)

    reads = unit.translate(SID, 0, sp.READ, pasid=PASID).reads

    g, depth = 4 - guest, 4 - host
    assert reads["first-level"] + reads["second-level"] == g * (4 + 1) + depth
    if host == 0:
        assert reads["first-level"] + reads["second-level"] == (g + 1) * (depth + 1) - 1
    assert (reads["root"], reads["context"], reads["PASID directory"], reads["PASID"]) == (1, 1, 1, 1)


@pytest.mark.parametrize("levels", [3, 4, 5])
def test_a_walk_reads_one_entry_per_level_and_a_larger_page_saves_one(levels: int) -> None:
    for size in SIZES:
        memory = Memory(64 << 20, pool_pages=64)
        table = domain_table(memory, levels)
        table.map(4 << 30, 0, READ_WRITE, size=size)
        structures = Structures(memory)
        structures.attach(SID, table, 1)
        unit = RemappingUnit(memory.arena, caches=Caches.none())
        unit.enable(structures.rtaddr)

        answer = unit.translate(SID, 4 << 30)

        assert (answer.reads["second-level"], answer.shift) == (levels - size, 12 + 9 * size)
        assert answer.reads["root"] == answer.reads["context"] == 1


def test_five_levels_of_first_level_translation_reach_56_bits() -> None:
    world = World("first-level", levels=5)
    assert isinstance(world.first, Table)
    address = (1 << 56) - 4096
    world.first.map(address, TARGET, e.PRESENT | e.FL_RW | e.FL_US)

    answer = world.ask(address + 8)

    assert (answer.hpa, answer.reads["first-level"]) == ((TARGET << 12) + 8, 5)
    assert world.ask(-4096).reason == f.FIRST_LEVEL_NOT_PRESENT
    assert world.ask(1 << 56).reason == f.NOT_CANONICAL


def test_snoop_comes_from_the_leaf_or_from_the_pasid_entry() -> None:
    legacy, process = World("legacy"), World("first-level")
    assert not legacy.ask(RW_PAGE).snoop
    legacy.change(legacy.entry_at(legacy.second, READ_ONLY_PAGE, 1), lambda word: word | e.SL_SNP)
    assert [legacy.ask(READ_ONLY_PAGE).snoop for _ in range(2)] == [True, True]
    assert not process.ask(RW_PAGE).snoop
    process.structures.pasid(SID, PASID)[1] |= e.PGSNP
    process.invalidate_all()
    assert process.ask(RW_PAGE).snoop


def test_a_write_sets_the_dirty_flag_once_also_when_a_read_was_cached() -> None:
    world = World("first-level")
    where = world.entry_at(world.first, RW_PAGE, 1)

    first = world.ask(RW_PAGE, sp.READ)
    assert world.memory.word(where) & (e.FL_A | e.FL_D) == e.FL_A
    second = world.ask(RW_PAGE, sp.WRITE)
    third = world.ask(RW_PAGE, sp.WRITE)

    assert world.memory.word(where) & (e.FL_A | e.FL_D) == e.FL_A | e.FL_D
    assert (first.flag_writes, second.flag_writes, third.flag_writes) == (1, 1, 0)
    assert "IOTLB (4 KiB)" in third.served


def test_translation_off_passes_ordinary_requests_and_drops_the_others() -> None:
    world = World("second-level")
    world.unit.command(clear=sp.TE)

    assert world.ask(0x1234, pasid=sp.NO_PASID).hpa == 0x1234
    assert world.ask(0x1234).status == st.DROPPED
    assert world.ask(0x1234, pasid=sp.NO_PASID, at=sp.TRANSLATED).status == st.DROPPED
    world.unit.write("PLMBASE", 2 << 20)
    world.unit.write("PLMLIMIT", 4 << 20)
    world.unit.write("PHMBASE", 4 << 30)  # above its limit: no such region
    world.unit.write("PMEN", sp.EPM)
    assert world.unit.read("PMEN") == sp.EPM | 1
    inside = [world.ask(mib << 20, pasid=sp.NO_PASID).status for mib in (1, 2, 4, 6)]
    assert inside == [st.COMPLETED, st.DROPPED, st.DROPPED, st.COMPLETED]
    world.unit.check_laws()


@pytest.mark.parametrize("kind", KINDS)
def test_a_protected_region_is_closed_to_every_request_whatever_translates_it(kind: str) -> None:
    world = World(kind)
    unit, page = world.unit, RW_PAGE
    target = world.ask(page).hpa
    world.invalidate_all()
    where = world.memory.token(target >> 12)
    unit.write("PLMBASE", target & ~0x1F_FFFF)
    unit.write("PLMLIMIT", target)
    unit.write("PMEN", sp.EPM)
    flags = unit.statistics()["flag writes"]

    ends = [world.ask(page, access).status for access in (sp.READ, sp.WRITE, sp.READ)]  # by a walk, by a cache
    ends.append(world.ask(target, at=sp.TRANSLATED, pasid=sp.NO_PASID).status)
    assert ends == [st.DROPPED] * 4
    assert world.ask(page, at=sp.TRANSLATION_REQUEST).status == st.COMPLETED  # it reaches no memory itself
    assert (unit.read("FSTS"), world.memory.token(target >> 12)) == (0, where)
    assert unit.statistics()["flag writes"] == flags
    unit.write("PMEN", 0)
    assert world.ask(page, sp.WRITE).hpa == target
    unit.check_laws()


def test_a_unit_without_protected_regions_cannot_enable_them() -> None:
    world = World("legacy", FULL.without("PLMR", "PHMR"))
    world.unit.write("PMEN", sp.EPM)
    assert world.unit.read("PMEN") == 0
    high = World("pass-through", FULL.without("PLMR"))
    high.unit.write("PHMLIMIT", 1 << 45)
    high.unit.write("PMEN", sp.EPM)
    assert (high.ask(0x1000).status, high.unit.read("PMEN")) == (st.DROPPED, sp.EPM | 1)


def test_writes_to_the_interrupt_range_are_interrupt_requests_and_all_else_there_is_dropped() -> None:
    world = World("legacy")

    assert world.ask(0xFEE0_0010, sp.WRITE).status == st.INTERRUPT
    assert world.ask(0xFEE0_0010, sp.READ).status == st.DROPPED
    assert world.ask(0xFEE0_0010, sp.WRITE, size=8).status == st.DROPPED
    assert world.ask(RW_PAGE + 0xFFC, sp.WRITE, size=8).status == st.DROPPED  # it crosses a page
    assert world.unit.statistics()["faults"] == 0


@pytest.mark.parametrize("kind", ["legacy", "second-level", "first-level"])
def test_a_device_that_asks_for_an_interrupt_address_is_told_of_no_page_whatever_is_mapped_there(kind: str) -> None:
    """Else its device-TLB would lead writes into memory that are interrupt requests when they are not translated.

    With a PASID an address of that range is one as any other.
    """
    world = World(kind)
    for page in (0xFEE0_0000, 0xFED0_0000):
        if world.first is not None:
            world.first.map(page, TARGET + 5, USER_PAGE)
        else:
            assert world.second is not None
            world.second.map(page, TARGET + 5, READ_WRITE)
    ask = {"at": sp.TRANSLATION_REQUEST}

    for _ in range(2):  # by a walk, by a cache
        assert world.ask(0xFED0_0000, sp.WRITE, **ask, pasid=sp.NO_PASID).rights & sp.WRITE
        told = world.ask(0xFEE0_0000, sp.WRITE, **ask, pasid=sp.NO_PASID)
        assert (told.status, told.rights, told.hpa, told.recorded) == (st.COMPLETED, 0, 0, False)
        if kind != "legacy":
            assert world.ask(0xFEE0_0000, sp.WRITE, **ask).rights & sp.WRITE


def test_a_zero_length_read_needs_no_right_to_read() -> None:
    world = World("legacy")

    assert world.ask(WRITE_ONLY_PAGE, sp.READ, size=0).status == st.COMPLETED
    assert world.ask(WRITE_ONLY_PAGE, sp.READ, size=1).reason == f.NO_READ


def stream(caches: Caches, pages: int, turns: int) -> tuple[list[tuple[int, int, int, int, bool, int]], dict[str, int]]:
    memory = Memory(64 << 20, pool_pages=64)
    table = domain_table(memory)
    table.map(0, np.arange(pages)[::-1] + 0x100, READ_WRITE)
    structures = Structures(memory)
    structures.attach(SID, table, 1)
    unit = RemappingUnit(memory.arena, caches=caches)
    unit.enable(structures.rtaddr)
    answers: list[Answer] = [unit.translate(SID, page << 12) for _ in range(turns) for page in range(pages)]
    unit.check_laws()
    return [each.translation for each in answers], unit.statistics()


def test_a_cache_changes_cost_and_never_a_translation() -> None:
    shapes = [
        Caches(),
        Caches.none(),
        Caches(iotlb_4k=Cache(1, 8)),
        Caches(iotlb_4k=Cache(0, 0), iotlb_2m=Cache(1, 2)),
        Caches(context=Cache(0, 0), second_2=Cache(0, 0)),
    ]

    results = [stream(each, 24, 3) for each in shapes]

    assert all(answers == results[0][0] for answers, _ in results)
    reads = [counted["memory reads"] for _, counted in results]
    assert reads[1] == 24 * 3 * 6  # root, context and four levels each time
    assert min(reads) == reads[0] < max(reads) == reads[1]


def test_an_iotlb_holds_what_its_entries_say() -> None:
    """Round-robin over as many pages as there are entries always hits; over one page more it never does."""
    for pages, hits in ((64, 64 * 2), (65, 0)):
        _, counted = stream(Caches(iotlb_4k=Cache(1, 64)), pages, 3)
        assert counted["IOTLB hits"] == hits


def test_a_saved_unit_goes_on_as_if_nothing_had_happened() -> None:
    world = World("second-level")
    world.ask(RW_PAGE)
    saved = world.unit.save()
    once = world.ask(RW_PAGE, sp.WRITE)
    world.unit.restore(saved)

    assert world.ask(RW_PAGE, sp.WRITE).translation == once.translation
