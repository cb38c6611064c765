"""What a recording says of the guest's tables before anybody looked into them."""

from __future__ import annotations

from tests.replay.recordings import row, trace
from vtsim.guest.replay.plan import Plan
from vtsim.guest.traces.paging import LINUX_4 as DIRECT

ROOT, TABLE, PAGES = 0x1000, 0x2000, 0x40_0000
LEVEL_1 = 1


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
