"""What a recording says of the guest's tables before anybody looked into them."""

from __future__ import annotations

from tests.replay.recordings import row, trace
from vtsim.cpu import ops as o
from vtsim.cpu.kernels import replay as e
from vtsim.guest.replay.plan import Plan
from vtsim.guest.replay.steps import FETCH, WRITE, Step
from vtsim.guest.replay.tables import ZERO, GuestTables
from vtsim.guest.traces.paging import FOUR, PAE, RESET_CR0, SHAPES
from vtsim.guest.traces.paging import LINUX_4 as DIRECT

ROOT, TABLE, PAGES = 0x1000, 0x2000, 0x40_0000
OTHER, MIDDLE, UPPER, DIRECT_TABLE = 0x3000, 0x4000, 0x5000, 0x6000
LEVEL_1, LEVEL_2, LEVEL_4 = 1, 2, 4
USER_ADDRESS, OF_USER = 0x40_0000, 0x67


def entry(index: int) -> int:
    return PAGES + (index << 12) | 0x63


def use(index: int, icount: int) -> dict[str, int]:
    """The kernel reads through an entry of TABLE for the first time."""
    at = TABLE + 8 * index
    return row("LEAF_R", icount, cr3=ROOT, a0=DIRECT + PAGES + (index << 12), a1=at | LEVEL_1, a2=entry(index))


def filled(rows: list[dict[str, int]]) -> dict[int, set[int]]:
    """By recorded row: the entries of TABLE that are put there before it."""
    plan = Plan(trace=trace(rows), clock_hz=10**9, literal=True, shadow=True)
    words = {n: [step.disp for step, _ in segment] for n, segment in plan.segments.items()}
    return {n: {i for i in range(8) if entry(i) in found} for n, found in words.items()}


def test_an_entry_that_is_used_later_and_never_stored_stands_in_its_table_from_the_first_use_on() -> None:
    root = row("ROOT", 1, cr3=0, a0=ROOT, a1=1)

    assert filled([root, use(3, 2), use(5, 3)]) == {0: set(), 1: {3, 5}, 2: set()}


def test_an_entry_that_is_stored_before_its_use_is_not_there_earlier() -> None:
    root = row("ROOT", 1, cr3=0, a0=ROOT, a1=1)
    store = row("PTW", 3, cr3=ROOT, a0=TABLE + 8 * 5 | LEVEL_1, a1=entry(5))

    found = filled([root, use(3, 2), store, use(5, 4)])

    assert (found[1], found[3]) == ({3}, set())


def steps_of(rows: list[dict[str, int]]) -> dict[int, list[Step]]:
    """What each row becomes, where the table of steps alone does not say it."""
    plan = Plan(trace=trace(rows), clock_hz=10**9, literal=True, shadow=True)
    return {n: [step for step, _ in segment] for n, segment in plan.segments.items()}


def memory_map(frame: int, icount: int) -> dict[str, int]:
    """The kernel reads a page through its map of all memory."""
    at = DIRECT_TABLE + 8 * (frame >> 12)
    return row("LEAF_R", icount, cr3=ROOT, a0=DIRECT + frame, a1=at | LEVEL_1, a2=frame | 0x63)


def load(root: int, before: int, icount: int) -> list[dict[str, int]]:
    """CR3 is loaded with what is a root from now on."""
    return [
        row("MOV_TO_CR", icount, cr3=before, a0=3, a1=root, a2=before),
        row("ROOT", icount + 1, cr3=before, a0=root, a1=1),
    ]


def use_of_user(icount: int, table: int = TABLE) -> dict[str, int]:
    return row(
        "LEAF_R", icount, cr3=ROOT, cpl=3, a0=USER_ADDRESS, a1=table | LEVEL_1, a2=PAGES | OF_USER
    )  # fmt: skip


def overwrites(steps: list[Step], page: int) -> bool:
    """Does the guest store to this page?"""
    return any((s.op, s.r1, s.r2, s.imm) == (o.REPLAY_EVENT, e.ACCESS, WRITE, page) for s in steps)


def fills(steps: list[Step], kind: int) -> set[int]:
    """Which guest-physical addresses are filled or cleared unseen."""
    return {int(s.imm) for s in steps if (s.op, s.r1) == (o.REPLAY_EVENT, kind)}


def test_a_page_that_is_a_root_again_is_overwritten_and_cleared_before_it_is_loaded() -> None:
    rows = [*load(ROOT, 0, 0), memory_map(ROOT, 2), *load(OTHER, ROOT, 3), *load(ROOT, OTHER, 5)]

    again = steps_of(rows)[5]

    assert overwrites(again, ROOT)
    assert ROOT in fills(again, e.CLEAR)
    assert [step.op for step in again][-1] == o.MOV_TO_CR
    assert not steps_of(rows)[6]


def test_the_way_to_a_table_leads_through_the_entry_that_ends_it() -> None:
    entry_for_it = MIDDLE + 8 * (USER_ADDRESS >> 21)
    end = row("PTW", 3, cr3=ROOT, a0=entry_for_it | LEVEL_2, a1=0, a2=TABLE | OF_USER)
    elsewhere = row("PTW", 3, cr3=ROOT, a0=entry_for_it + 8 | LEVEL_2, a1=0, a2=TABLE | OF_USER)
    begins_before = row("PTW", 3, cr3=ROOT, a0=UPPER | LEVEL_2, a1=TABLE | OF_USER, a2=0)

    def known(*later: dict[str, int]) -> bool:
        return entry_for_it in fills(steps_of([*load(ROOT, 0, 0), use_of_user(2), *later])[2], e.FILL)

    assert known(end)
    assert not known(elsewhere)
    assert not known(begins_before, end)


def test_a_table_of_the_kernel_is_not_cleared_where_another_way_to_it_is_found() -> None:
    top = (DIRECT >> 39) & 511
    other_way = row("PTW", 3, cr3=ROOT, a0=ROOT + 8 * top | LEVEL_4, a1=UPPER | 0x63, a2=0)

    found = steps_of([*load(ROOT, 0, 0), use(3, 2), other_way, use(5, 4)])[4]

    assert not fills(found, e.CLEAR)


def test_a_page_that_a_program_gets_is_overwritten_if_it_was_a_table() -> None:
    end = row("PTW", 4, cr3=ROOT, a0=MIDDLE + 8 * (USER_ADDRESS >> 21) | LEVEL_2, a1=0, a2=TABLE | OF_USER)
    given = row("PTW", 5, cr3=ROOT, a0=OTHER | LEVEL_1, a1=TABLE | OF_USER, a2=0)
    kept = row("PTW", 5, cr3=ROOT, a0=OTHER | LEVEL_1, a1=TABLE | OF_USER & ~4, a2=0)

    def overwritten(*later: dict[str, int]) -> bool:
        rows = [*load(ROOT, 0, 0), memory_map(TABLE, 2), use_of_user(3), *later]
        return overwrites(steps_of(rows)[len(rows) - 1], TABLE)

    assert overwritten(end, given)
    assert not overwritten(given)  # a table in use
    assert not overwritten(end, kept)  # a page of the kernel


def test_two_devices_have_two_addresses_though_another_root_maps_neither() -> None:
    tables = GuestTables(shape=SHAPES[PAE], spare=iter(range(0x100, 0x200)))

    list(tables.device(ROOT, 0xFEE0_0000))

    assert tables.device_at(OTHER, 0xFEE0_0000) != tables.device_at(OTHER, 0xFEC0_0000)


# --- stores that tell that a table is in use ------------------------------------------------------------------------
FREED = row("PTW", 4, cr3=ROOT, a0=MIDDLE + 8 * (USER_ADDRESS >> 21) | LEVEL_2, a1=0, a2=TABLE | OF_USER)


def store(icount: int, index: int, root: int = OTHER) -> dict[str, int]:
    """An entry of TABLE is stored to."""
    return row("PTW", icount, cr3=root, a0=TABLE + 8 * index | LEVEL_1, a1=PAGES + (index << 12) | OF_USER)


def use_in(root: int, index: int, icount: int) -> dict[str, int]:
    """A program uses an entry of TABLE through another root."""
    address, at = USER_ADDRESS + (index << 12), TABLE + 8 * index
    return row("LEAF_R", icount, cr3=root, cpl=3, a0=address, a1=at | LEVEL_1, a2=PAGES + (index << 12) | OF_USER)


def test_a_table_that_is_one_again_is_cleared_before_the_first_store_into_it_and_keeps_what_was_stored() -> None:
    """What is stored into it before anybody uses it is not lost: the way to it becomes known only then."""
    again = [*load(OTHER, ROOT, 6), store(8, 1), store(9, 2), use_in(OTHER, 1, 10)]
    rows = [*load(ROOT, 0, 0), memory_map(TABLE, 2), use_of_user(3), FREED, *again]
    found = steps_of(rows)

    assert [TABLE in fills(found.get(n, []), e.CLEAR) for n in range(7, 10)] == [True, False, False]
    assert overwrites(found[7], TABLE)
    assert not overwrites(found[9], TABLE)


def test_a_table_of_which_nothing_was_known_keeps_what_was_stored_before_its_first_use() -> None:
    rows = [*load(OTHER, 0, 0), store(2, 1), store(3, 2), use_in(OTHER, 1, 4)]

    assert not fills(steps_of(rows)[4], e.CLEAR)


def test_a_table_that_is_freed_on_a_way_that_nobody_knew_is_another_one_when_it_is_linked_again() -> None:
    link = row("PTW", 5, cr3=OTHER, a0=UPPER | LEVEL_2, a1=TABLE | OF_USER)
    rows = [*load(OTHER, 0, 0), store(2, 1), {**FREED, "cr3": OTHER}]

    assert fills(steps_of([*rows, link])[4], e.CLEAR) == {TABLE}
    assert not fills(steps_of([*rows[:-1], link])[3], e.CLEAR)


def test_a_table_in_use_is_not_cleared_where_a_second_entry_leads_to_it() -> None:
    """As where a kernel has its memory at two places; one that was freed in between is another table."""
    rows = [
        *load(ROOT, 0, 0), memory_map(TABLE, 2), row("PTW", 3, cr3=ROOT, a0=MIDDLE | LEVEL_2, a1=TABLE | OF_USER),
        store(4, 1, ROOT), row("PTW", 5, cr3=ROOT, a0=UPPER | LEVEL_2, a1=TABLE | OF_USER),
    ]  # fmt: skip
    freed = row("PTW", 4, cr3=ROOT, a0=MIDDLE | LEVEL_2, a1=0, a2=TABLE | OF_USER)

    assert not fills(steps_of(rows)[5], e.CLEAR)
    assert fills(steps_of([*rows[:5], freed, rows[5]])[6], e.CLEAR) == {TABLE}


def test_a_32_bit_kernel_zeroes_a_page_with_three_stores() -> None:
    """The first word, the last, and REP STOS from the second on; with 64-bit addresses REP STOS alone."""
    shape = SHAPES[PAE]
    mapped = row("LEAF_W", 6, cr3=ROOT, a0=shape.direct + TABLE, a1=DIRECT_TABLE + 8 * 2 | 1, a2=TABLE | 0x63)
    links = [row("PTW", 7 + n, cr3=ROOT, a0=MIDDLE + 8 * n | LEVEL_2, a1=TABLE | OF_USER) for n in (0, 2)]
    rows = [
        row("MOV_TO_CR", 0, a0=4, a1=1 << 5), row("MOV_TO_CR", 1, a0=3, a1=ROOT),
        row("MOV_TO_CR", 2, cr3=ROOT, a0=0, a1=0x8001_0001, a2=RESET_CR0), row("ROOT", 3, cr3=ROOT, a0=ROOT), mapped,
        links[0], store(8, 1, ROOT), row("PTW", 8, cr3=ROOT, a0=MIDDLE | LEVEL_2, a1=0, a2=TABLE | OF_USER), links[1],
    ]  # fmt: skip
    place = shape.direct + TABLE

    found = steps_of(rows)[8]

    assert [int(s.disp) for s in found if s.op == o.ST][:2] == [place, place + 0xFFC]
    assert any((s.r1, s.r2, s.imm, s.disp) == (e.ACCESS, WRITE, TABLE + 4, place + 4) for s in found)


# --- what rows say beside what they are for -------------------------------------------------------------------------
CODE, CODE_PAGE = -0x7E00_0000, 0x70_0000


def code(icount: int) -> dict[str, int]:
    return row("LEAF_F", icount, cr3=ROOT, rip=CODE, a0=CODE, a1=OTHER | LEVEL_1, a2=CODE_PAGE | 0x63)


def fetched(steps: list[Step]) -> list[int]:
    """At which addresses are instructions fetched?"""
    return [int(s.disp) for s in steps if (s.op, s.r1, s.r2) == (o.REPLAY_EVENT, e.ACCESS, FETCH)]


def test_an_instruction_is_fetched_from_its_page_again_after_cr3_was_loaded_or_the_ring_changed() -> None:
    rows = [
        *load(ROOT, 0, 0), code(2), row("CPUID", 3, cr3=ROOT, rip=CODE + 9), row("CPUID", 4, cr3=ROOT, rip=CODE + 16),
        row("MOV_TO_CR", 5, cr3=ROOT, rip=CODE + 20, a0=3, a1=ROOT), row("CPUID", 6, cr3=ROOT, rip=CODE + 24),
        row("CPUID", 7, cr3=ROOT, rip=CODE + 28), row("IRET", 8, cr3=ROOT, rip=CODE + 32),
        row("CPUID", 9, cr3=ROOT, rip=CODE + 36), row("CPUID", 10, cr3=ROOT, rip=CODE + 0x1000),
    ]  # fmt: skip
    found = steps_of(rows)

    assert [fetched(found.get(n, [])) for n in range(3, 11)] == [
        [CODE + 9], [], [], [CODE + 24], [], [], [CODE + 36], [],
    ]  # fmt: skip
    assert [step.op for step in found[3]][-1] == o.CPUID


def test_an_instruction_that_faulted_was_perhaps_not_fetched() -> None:
    rows = [*load(ROOT, 0, 0), code(2), row("EXC", 3, cr3=ROOT, rip=CODE + 8, a0=14, a2=CODE + 8)]

    assert not fetched(steps_of(rows).get(3, []))


def test_the_idt_is_mapped_where_an_event_is_delivered_through_it() -> None:
    idt = -0x200_0000_0000
    lidt = row("LIDT", 3, cr3=ROOT, a0=idt, a1=0xFFF)
    delivered = row("EXC", 4, cr3=ROOT, a0=14)

    known = steps_of([*load(ROOT, 0, 0), code(2), lidt, delivered])[4]
    again = steps_of([*load(ROOT, 0, 0), code(2), lidt, delivered, row("EXC", 5, cr3=ROOT, a0=6)]).get(5)
    unknown = steps_of([*load(ROOT, 0, 0), code(2), delivered]).get(3)

    assert len(fills(known, e.FILL)) == 4  # of each level
    assert again is None and unknown is None


# --- tables of the kernel that the recording names late --------------------------------------------------------------
def tables_of_four_levels() -> GuestTables:
    return GuestTables(shape=SHAPES[FOUR], spare=iter(range(0x7F00, 0, -1)))


def test_a_root_with_other_tables_than_the_root_before_has_them_from_the_beginning() -> None:
    """Linux leaves the tables of its start so; the hypervisor would go on with shadows of the old ones."""
    tables = tables_of_four_levels()
    address = -0x7780_0000_0000
    list(tables.first_use(0x1000, address, 0x4000, 2, 0x80_00E3))
    old = tables.entry(tables.place(0x1000, address, 4))
    assert tables.other_way(0x1000, address, 0x4000, 2) == 0
    assert tables.other_way(0x1000, address, 0x5000, 2) == tables.place(old & ~0xFFF, address, 3)
    list(tables.new_root(0x8000, 0x1000))
    list(tables.new_root(0x9000, 0x1000, {tables.part(address, 4)}))
    assert [tables.entry(tables.place(root, address, 4)) for root in (0x8000, 0x9000)] == [old, 0]
    list(tables.first_use(0x9000, address, 0x5000, 2, 0x80_00E3))
    assert tables.entry(tables.place(0x9000, address, 4)) != old
    assert tables.entry(tables.place(0x1000, address, 4)) == old


def test_a_table_of_the_kernel_is_the_one_of_which_a_large_page_is_used_later() -> None:
    tables = tables_of_four_levels()
    address = -0x7780_0000_0000
    tables.row = 1
    tables.large[0x1000, 3, tables.part(address, 3)] = [(5, 6)]
    list(tables.first_use(0x1000, address, 0x4000, 1, 0x80_0063))
    assert tables.entry(tables.place(6 << 12, address, 2)) >> 12 == 4


def test_a_second_root_that_leads_to_a_table_of_a_program_does_not_zero_it() -> None:
    tables = tables_of_four_levels()
    list(tables.first_use(0x1000, 0x20_0000, 0x4000, 1, 0x80_0067))
    entry = tables.entry(tables.place(0x1000, 0x20_0000, 4))
    assert list(tables.link(0x2000, 4, entry)) == []
    tables.unlink(entry, 4)
    assert [fill[0] for fill in tables.link(0x2000, 4, entry)] == [ZERO]


def test_an_entry_holds_what_the_store_that_ends_it_finds() -> None:
    """With page-table isolation programs are not executable below the kernel's root."""
    tables, no_execute = tables_of_four_levels(), -1 << 63
    place = tables.place(0x1000, 0x20_0000, 4)
    tables.held[place] = [(9, no_execute | 0x3067)]
    assert tables._held_until_store(place, 3) == no_execute | 0x3067
    assert tables._held_until_store(place, 7) == 0
    tables.row = 9
    assert tables._held_until_store(place, 3) == 0
