"""Recorded guests with 32-bit, PAE and 5-level paging on shadow tables: as many faults as their pages call for."""

from __future__ import annotations

from collections import Counter
from itertools import takewhile
from pathlib import Path
from random import Random

import pytest

from tests.replay.recordings import Row, row
from tests.replay.test_other_guests import EFER, LA57, LONG, PAE, PAGING, by_rule, exits, use
from vtsim.base import jit
from vtsim.guest.traces.paging import FIVE as FIVE_LEVELS
from vtsim.guest.traces.paging import FOUR as FOUR_LEVELS
from vtsim.guest.traces.paging import PAE as PAE_PAGING
from vtsim.guest.traces.paging import RESET_CR0, SHAPES
from vtsim.guest.traces.paging import WIDE as PAGING_32

PSE = 1 << 4
ON = {  # CR4 and EFER
    PAGING_32: (PSE, 0), PAE_PAGING: (PAE, 0), FOUR_LEVELS: (PAE, LONG), FIVE_LEVELS: (PAE | LA57, LONG),
}  # fmt: skip
NAMES = {"32-bit": PAGING_32, "PAE": PAE_PAGING, "4 levels": FOUR_LEVELS, "5 levels": FIVE_LEVELS}
ROOTS, TABLES, KERNEL_TABLE = (0x10_1000, 0x10_2000), (0x10_3000, 0x10_4000), 0x10_5000
PAGES = 0x40_0000


def begin(shape: int, icount: int = 10, root: int = ROOTS[0], before: int = RESET_CR0) -> list[Row]:
    """A guest turns paging on."""
    cr4, efer = ON[shape]
    return [
        row("MOV_TO_CR", icount, a0=4, a1=cr4), row("WRMSR", icount + 1, a0=EFER, a1=efer),
        row("MOV_TO_CR", icount + 2, a0=3, a1=root), row("MOV_TO_CR", icount + 3, cr3=root, a0=0, a1=PAGING, a2=before),
    ]  # fmt: skip


def any_program(random: Random, shape: int, length: int) -> list[Row]:
    """Two processes use pages, switch, and their kernel changes entries of their tables, whose pages it has mapped."""
    of, size = SHAPES[shape], SHAPES[shape].size
    rows = [*begin(shape), row("ROOT", 14, cr3=ROOTS[0], a0=ROOTS[0])]
    for frame in (table >> 12 for table in TABLES):
        at = KERNEL_TABLE + size * (frame & 511)
        rows.append(use("LEAF_R", 15, of.direct + (frame << 12), at, 1, frame << 12 | 0x63, cr3=ROOTS[0]))
    entries: list[dict[int, int]] = [{}, {}]
    now, rooted = 0, {0}
    for n in range(length):
        icount, root = 20 + 10 * n, ROOTS[now]
        page, chance = random.randrange(1, 200), random.random()
        at = TABLES[now] + size * page
        if chance < 0.6:
            value = entries[now].setdefault(page, PAGES + (random.randrange(1000) << 12) | 0x67)
            new_path = random.choice((0, 4))
            kind = random.choice(("LEAF_R", "LEAF_W"))
            rows.append(use(kind, icount, page << 12, at, 1 | new_path, value, cpl=3, cr3=root))
        elif chance < 0.75 and entries[now]:
            page = random.choice(sorted(entries[now]))
            entries[now][page] = PAGES + (random.randrange(1000) << 12) | 0x67
            place = TABLES[now] + size * page
            rows.append(row("PTW", icount, cr3=root, a0=place | 1, a1=entries[now][page]))
            rows.append(row("INVLPG", icount + 1, cr3=root, a0=page << 12))
        elif chance < 0.8:
            rows.append(row("CPUID", icount, cr3=root, a0=1))
        else:
            now = 1 - now
            rows.append(row("MOV_TO_CR", icount, cr3=root, a0=3, a1=ROOTS[now]))
            if now not in rooted:
                rooted.add(now)
                rows.append(row("ROOT", icount + 1, cr3=ROOTS[now], a0=ROOTS[now]))
    return rows


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1 if jit.DISABLED else 3))
def test_a_program_takes_the_same_exits_whatever_its_tables_look_like(tmp_path: Path, seed: int) -> None:
    """Faults as with four levels, which a real hypervisor's counts are held against; the rest follows by rule."""
    found: dict[str, Counter[str]] = {}
    for name, shape in NAMES.items():
        rows = any_program(Random(seed), shape, 150)
        found[name] = exits(rows, tmp_path, "vmm.paging=shadow")
        rest = Counter({reason: n for reason, n in found[name].items() if reason != "EXCEPTION_NMI"})
        assert rest == by_rule(rows, shadow=True, huge=True), name
    assert {name: of["EXCEPTION_NMI"] for name, of in found.items()} == dict.fromkeys(
        NAMES, found["4 levels"]["EXCEPTION_NMI"]
    )
    assert found["4 levels"]["EXCEPTION_NMI"] > 60


# --- without recorded tables, and from mode to mode -------------------------------------------------------------------
def touch(kind: str, icount: int, address: int, page: int, root: int = ROOTS[0], cpl: int = 0) -> Row:
    return row(f"TOUCH_{kind}", icount, cr3=root, a0=page << 12, a1=address, cpl=cpl)


def faults(rows: list[Row], folder: Path) -> int:
    return exits(rows, folder, "vmm.paging=shadow")["EXCEPTION_NMI"]


@pytest.mark.parametrize("name", ["32-bit", "PAE", "5 levels"])
def test_where_tables_were_not_recorded_each_page_of_a_process_faults_once(tmp_path: Path, name: str) -> None:
    random = Random(7)
    rows, pages = begin(NAMES[name]), set()
    for n in range(60):
        root, page = random.choice(ROOTS), random.randrange(1, 600)
        pages.add((root, page))
        if root != rows[-1].get("cr3", ROOTS[0]):
            rows.append(row("MOV_TO_CR", 20 + 10 * n, cr3=rows[-1].get("cr3", ROOTS[0]), a0=3, a1=root))
        gpa = 0x800 + page + 1024 * ROOTS.index(root)
        rows.append(touch(random.choice("RWF"), 25 + 10 * n, page << 12, gpa, root, cpl=3))
    assert faults(rows, tmp_path) == len(pages)


def misses(pages: list[int]) -> int:
    """Pages that are not filled beside an earlier one: of its eight, in order, up to the first that maps nothing."""
    missed, filled = 0, set[int]()
    for page in pages:
        if page not in filled:
            missed += 1
            filled.add(page)
            eight = (other for other in range(page & ~7, (page & ~7) + 8) if other not in filled)
            filled.update(takewhile(set(pages).__contains__, eight))
    return missed


@pytest.mark.parametrize("name", ["32-bit", "PAE"])
def test_of_the_kernels_pages_whose_tables_were_not_recorded_eight_are_filled_together(
    tmp_path: Path, name: str
) -> None:
    """What the kernel uses later stands in its tables from the beginning, as where tables were recorded.

    Memory that lies as far from its linear addresses everywhere in a large page is taken for one.
    """
    random, of = Random(8), SHAPES[NAMES[name]]
    pages = random.sample(range(0x400, 0x600), 80)
    rows, far = begin(NAMES[name]), of.direct + (16 << 20)
    rows += [
        touch(random.choice("RW"), 20 + n, far + (page << 12), 0x800 + (page * 77) % 512)
        for n, page in enumerate(pages)
    ]
    rows += [touch(random.choice("RW"), 200 + n, of.direct + (page << 12), page) for n, page in enumerate(pages)]
    assert len({page // 8 for page in pages}) < misses(pages) < len(pages)
    assert faults(rows, tmp_path) == misses(pages) + 1


def test_a_guest_may_go_through_every_paging_mode(tmp_path: Path) -> None:
    """From no paging to 32-bit, PAE, 4- and 5-level paging, each after a while without paging again."""
    rows: list[Row] = []
    flat, paged = set(), 0
    for n, shape in enumerate(NAMES.values()):
        at = 1000 * n
        root = 0x10_0000 + 0x1_0000 * n
        for m, region in enumerate((8, 9, 10 + n)):
            rows.append(touch("W", at + 1 + m, region << 21, region << 9, root=root if n else 0))
            flat.add(region)
        rows += begin(shape, at + 10, root, before=RESET_CR0 if n == 0 else 0x11)
        for m in range(5):
            page, address = 0x600 + 0x40 * n + 8 * m, (1 + m) << 13
            if n < 2:
                rows.append(touch("W", at + 20 + m, address, page, root, cpl=3))
            else:
                entry = root + 0x1000 + 16 * (1 + m)
                rows.append(use("LEAF_W", at + 20 + m, address, entry, 1, page << 12 | 0x67, cpl=3, cr3=root))
            paged += 1
        rows.append(row("MOV_TO_CR", at + 40, cr3=root, a0=0, a1=0x11, a2=PAGING))
        if n >= 2:
            rows.insert(len(rows) - 6, row("ROOT", at + 15, cr3=root, a0=root))

    found = exits(rows, tmp_path, "vmm.paging=shadow")

    assert found["EXCEPTION_NMI"] == len(flat) + paged
    assert found == Counter({"EXCEPTION_NMI": len(flat) + paged}) + by_rule(rows, shadow=True, huge=True)


@pytest.mark.parametrize(("name", "before"), [("32-bit", PSE), ("4 levels", PAE), ("5 levels", PAE | LA57)])
def test_a_recording_may_begin_when_paging_is_on_already(tmp_path: Path, name: str, before: int) -> None:
    """What CR0 and CR4 held before their first write says so."""
    shape = SHAPES[NAMES[name]]
    high = shape.direct if name != "32-bit" else 0x1000
    rows = [
        use("LEAF_R", 10 + n, n << 15, TABLES[0] + 8 * n * shape.size, 1, PAGES + (n << 12) | 0x67, cpl=3, cr3=ROOTS[0])
        for n in range(1, 6)
    ]
    rows += [row("MOV_TO_CR", 30, cr3=ROOTS[0], a0=0, a1=PAGING ^ 1 << 16, a2=PAGING, rip=high)]
    rows += [row("MOV_TO_CR", 31, cr3=ROOTS[0], a0=4, a1=before | 1 << 20, a2=before, rip=high)]
    assert exits(rows, tmp_path, "vmm.paging=shadow") == {"EXCEPTION_NMI": 5, "CR_ACCESS": 2}


def test_what_stood_before_in_the_page_of_a_root_with_pae_paging_is_no_pdpte(tmp_path: Path) -> None:
    """The recorded machine took the load, so what is not known of its PDPTEs had no reserved bits."""
    rows = [
        *begin(FOUR_LEVELS), row("ROOT", 14, cr3=ROOTS[0], a0=ROOTS[0]),
        row("PTW", 20, cr3=ROOTS[0], a0=ROOTS[1] | 1, a1=PAGES | 0x67),
        row("MOV_TO_CR", 30, cr3=ROOTS[0], a0=0, a1=0x11, a2=PAGING),
        *begin(PAE_PAGING, 40, ROOTS[1], before=0x11),
        *(use("LEAF_R", 50 + n, 0x9000_0000 + (n << 15), TABLES[0] + 64 * n, 1, PAGES + (n << 12) | 0x67, cpl=3, cr3=ROOTS[1])
          for n in range(5)),
    ]  # fmt: skip
    assert exits(rows, tmp_path, "vmm.paging=shadow") == Counter({"EXCEPTION_NMI": 5}) + by_rule(
        rows, shadow=True, huge=True
    )
