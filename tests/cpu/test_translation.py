"""What walks cost level by level.

SDM: "EPT Translation Mechanism".
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.cpu.bench import OFF, native
from vtsim.base import jit
from vtsim.base import memory as mem
from vtsim.cpu import accounts as k
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.kernels import translate as tr
from vtsim.cpu.kernels.ept_walk import ABANDONED, AGILE
from vtsim.cpu.kernels.rights import READ
from vtsim.ept.spec import ADDRESS, PTE_SWITCHES
from vtsim.ept.tables import EPT, EPT_PAGE, KERNEL_PAGE, PAGING, host_table
from vtsim.vmcs.state import CR3_SWITCHES

AT = 1 << 30  # of the page that is walked to; divisible by every page size
SIZES = pytest.mark.parametrize("guest_size", [0, 1, 2])


def walked(engine: Any) -> tuple[int, int]:
    """Guest and EPT references of everything so far."""
    at = int(engine.cpus[0][s.OWNER])
    return int(engine.arena[at + k.GUEST_REFERENCES]), int(engine.arena[at + k.EPT_REFERENCES])


def behind_ept(engine: Any, m: Any, root: int, levels: int) -> None:
    """Put the CPU into a guest behind EPT of so many levels."""
    m[s.NONROOT], m[s.EPTP], m[s.VPID], m[s.PRIVILEGE] = 1, root << 12 | (levels - 1) << 3 | 6, 1, o.N0
    engine.sync()


def read(engine: Any, m: Any, gva: int) -> int:
    with jit.quiet():
        return int(tr.translate(m, engine.arena, engine.tags, np.int64(gva), READ, 0))


@SIZES
@pytest.mark.parametrize("ept_size", [0, 1, 2])
@pytest.mark.parametrize("ept_levels", [4, 5])
@pytest.mark.parametrize("levels", [4, 5])
def test_a_cold_nested_walk_reads_every_crossing_but_the_data(
    guest_size: int, ept_size: int, ept_levels: int, levels: int
) -> None:
    bench = native(OFF)
    engine, m = bench.engine, bench.m
    ept = host_table(engine, EPT, ept_levels)
    ept.map_range(0, 0, 2 << 18, EPT_PAGE, ept_size) if ept_size else ept.map_range(0, 0, 8192, EPT_PAGE)
    if not ept_size:
        ept.map_range(AT, 0, 1, EPT_PAGE)
    guest = host_table(engine, PAGING, levels)
    guest.map(AT, AT >> 12, KERNEL_PAGE, guest_size)
    m[s.CR3], m[s.CR4] = guest.root << 12, m[s.CR4] | (levels == 5) << 12
    behind_ept(engine, m, ept.root, ept_levels)
    hpa = read(engine, m, AT + 0x128)
    g, h = levels - guest_size, ept_levels - ept_size

    assert hpa == (0x128 if not ept_size else AT + 0x128)
    assert sum(walked(engine)) == (g + 1) * (h + 1) - 1
    assert walked(engine)[0] == g


@pytest.mark.parametrize("ept_size", [0, 1, 2])
@pytest.mark.parametrize("nested", range(5))
def test_an_agile_walk_reads_one_entry_for_a_shadowed_level_and_a_crossing_for_a_nested_one(
    nested: int, ept_size: int
) -> None:
    """`nested` levels at the end of the walk are the guest's own; 4, with the root: 20 with small pages of EPT."""
    bench = native(OFF)
    engine, m = bench.engine, bench.m
    agile_tables(engine, m, ept_size, nested)
    hpa = read(engine, m, AT + 0x128)

    assert hpa == 0x128
    assert walked(engine) == (4, nested * (4 - ept_size))


@pytest.mark.parametrize("nested", range(5))
def test_paging_structure_caches_know_in_which_part_of_an_agile_walk_a_table_stands(nested: int) -> None:
    bench = native({})
    engine, m = bench.engine, bench.m
    agile_tables(engine, m, 0, nested)
    read(engine, m, AT)
    before = walked(engine)[0]
    hpa = read(engine, m, AT + 4096 + 8)

    assert hpa == 4096 + 8
    assert walked(engine)[0] - before == 1


@pytest.mark.parametrize("nested", range(5))
def test_only_a_fault_in_the_nested_part_of_an_agile_walk_is_the_guests_own(nested: int) -> None:
    bench = native(OFF)
    engine, m = bench.engine, bench.m
    agile_tables(engine, m, 1, nested)

    assert read(engine, m, AT + (5 << 12)) < 0
    assert m[s.FAULT_NESTED] == (nested > 0)


def agile_tables(engine: Any, m: Any, ept_size: int, nested: int) -> None:
    """Map AT and the page behind it to host frames 0 and 1: shadow tables first, then the guest's own behind EPT."""
    ept = host_table(engine, EPT, 4)
    ept.map_range(0, 0, 2 << 18, EPT_PAGE, ept_size) if ept_size else ept.map_range(0, 0, 8192, EPT_PAGE)
    frames = AT >> 12
    if ept_size:  # pages as large as EPT has there lead to themselves: the guest maps what the shadow tables do
        frames = 0
    else:
        ept.map_range(AT, 0, 2, EPT_PAGE)
    guest, shadow = host_table(engine, PAGING), host_table(engine, PAGING)
    guest.map(AT, [frames, frames + 1], KERNEL_PAGE)
    shadow.map(AT, [0, 1], KERNEL_PAGE)
    own, table = guest.root, shadow.root
    for level in (4, 3, 2):
        index = (AT >> (3 + 9 * level)) & 511
        below = int(guest.words(own)[index]) & ADDRESS
        if nested == level - 1:
            shadow.words(table)[index] = below | KERNEL_PAGE | PTE_SWITCHES
        own, table = below >> 12, (int(shadow.words(table)[index]) & ADDRESS) >> 12
        if nested >= level - 1:
            break
    m[s.CR3] = guest.root << 12 | CR3_SWITCHES if nested == 4 else shadow.root << 12
    m[s.EPT_FEATURES] = AGILE
    behind_ept(engine, m, ept.root, 4)


@pytest.mark.parametrize(
    ("levels", "ept_levels", "size", "references"), [(4, 4, 0, 24), (5, 5, 0, 35), (4, 4, 1, 15), (5, 5, 1, 24)]
)
def test_the_formula_gives_the_well_known_numbers(levels: int, ept_levels: int, size: int, references: int) -> None:
    assert (levels - size + 1) * (ept_levels - size + 1) - 1 == references


def test_with_mixed_ept_pages_the_walks_of_each_reference_add_up() -> None:
    """Tables of the guest behind 2 MiB pages of EPT, its data behind a 4 KiB page: four walks of 3, one of 4."""
    bench = native(OFF)
    engine, m = bench.engine, bench.m
    ept = host_table(engine, EPT)
    ept.map_range(0, 0, 8192, EPT_PAGE, 1)
    ept.map_range(AT, 5, 1, EPT_PAGE)
    guest = host_table(engine, PAGING)
    guest.map(AT, AT >> 12, KERNEL_PAGE)
    m[s.CR3] = guest.root << 12
    behind_ept(engine, m, ept.root, 4)

    assert read(engine, m, AT) == 5 << 12
    assert walked(engine) == (4, 4 * 3 + 4)


LEGACY = [
    # CR4, guest references of a 4 KiB page, of a large one
    pytest.param(1 << 5, 2, 1, id="PAE"),
    pytest.param(1 << 4, 2, 1, id="32-bit"),
]


@pytest.mark.parametrize("nested", [False, True], ids=["native", "behind EPT"])
@pytest.mark.parametrize(("cr4", "small", "large"), LEGACY)
def test_pae_and_32_bit_paging_read_two_levels_because_pdptes_are_in_registers(
    cr4: int, small: int, large: int, nested: bool
) -> None:
    bench = native(OFF)
    engine, m = bench.engine, bench.m
    directory, table = engine.allocate(), engine.allocate()
    pae = cr4 >> 5
    for page, number, entry in (
        (directory, 1, table << 12 | 0x63), (directory, 2, (4 << (21 if pae else 22)) | 0xE3), (table, 3, 0x123063),
    ):  # fmt: skip
        words = engine.contents(page, mem.TABLE)
        if pae:
            words[number] = entry
        else:
            words[number >> 1] |= entry << 32 * (number & 1)
    m[s.EFER], m[s.CR4], m[s.CR3] = 0, cr4, directory << 12
    m[s.PDPTE0] = directory << 12 | 1
    shift = 21 if pae else 22
    if nested:
        ept = host_table(engine, EPT)
        ept.map_range(0, 0, 8192, EPT_PAGE)
        behind_ept(engine, m, ept.root, 4)
    engine.sync()

    assert read(engine, m, 1 << shift | 3 << 12) == 0x123000
    assert walked(engine) == (small, 4 * (small + 1) * nested)
    assert read(engine, m, 2 << shift | 0x5000) == (4 << shift) + 0x5000
    assert walked(engine) == (small + large, 4 * (small + large + 2) * nested)


@pytest.mark.parametrize("cr4", [1 << 5, 1 << 4], ids=["PAE", "32-bit"])
def test_a_walk_of_a_wrong_path_sets_no_flag_with_pae_and_32_bit_paging_either(cr4: int) -> None:
    bench = native(OFF)
    engine, m = bench.engine, bench.m
    directory, table = engine.allocate(), engine.allocate()
    pae = cr4 >> 5
    engine.contents(directory, mem.TABLE)[1 if pae else 0] = (table << 12 | 0x63) << (0 if pae else 32)
    entries = engine.contents(table, mem.TABLE)
    entries[3 if pae else 1] = 0x123003 << (0 if pae else 32)  # present, not accessed
    before = entries.copy()
    m[s.EFER], m[s.CR4], m[s.CR3], m[s.PDPTE0] = 0, cr4, directory << 12, directory << 12 | 1
    engine.sync()
    address = 1 << (21 if pae else 22) | 3 << 12

    m[s.SPECULATIVE] = 1
    assert read(engine, m, address) == ABANDONED
    assert (entries == before).all()
    m[s.SPECULATIVE] = 0
    assert read(engine, m, address) == 0x123000
    assert (entries != before).any()


@SIZES
@pytest.mark.parametrize("levels", [4, 5])
def test_a_cold_native_walk_reads_one_entry_per_level(guest_size: int, levels: int) -> None:
    bench = native(OFF)
    table = host_table(bench.engine, PAGING, levels)
    bench.m[s.CR4] |= (levels == 5) << 12
    table.map(AT, 0, KERNEL_PAGE, guest_size)
    bench.m[s.CR3] = table.root << 12
    bench.engine.sync()
    with jit.quiet():
        assert int(tr.translate(bench.m, bench.engine.arena, bench.engine.tags, np.int64(AT + 8), READ, 0)) == 8

    assert walked(bench.engine) == (levels - guest_size, 0)


def test_a_warm_walk_starts_at_the_deepest_cached_level() -> None:
    """All TLBs off, paging-structure caches on: 4 reads, then 1 for the next page of the same table."""
    bench = native({path: 0 for path in OFF if path.startswith("tlb")})
    table = host_table(bench.engine, PAGING)
    table.map(AT, [0, 1], KERNEL_PAGE)
    bench.m[s.CR3] = table.root << 12
    bench.engine.sync()
    reads = []
    for gva in (AT, AT + 0x1000, AT):
        before = walked(bench.engine)[0]
        with jit.quiet():
            tr.translate(bench.m, bench.engine.arena, bench.engine.tags, np.int64(gva), READ, 0)
        reads.append(walked(bench.engine)[0] - before)

    assert reads == [4, 1, 1]


@pytest.mark.parametrize(
    ("removed", "reads"), [((), 1), (("pde",), 2), (("pde", "pdpte"), 3), (("pde", "pdpte", "pml4e"), 4)]
)
def test_each_level_of_the_walk_caches_can_be_removed(removed: tuple[str, ...], reads: int) -> None:
    """Five levels, all caches of four entries: the next page is walked to from the deepest level that is left."""
    sizes = {f"pwc.{level}.{what}": 4 for level in ("pml5e", "pml4e", "pdpte", "pde") for what in ("entries", "ways")}
    off = {path: 0 for path in OFF if path.startswith("tlb")} | {f"pwc.{level}.entries": 0 for level in removed}
    bench = native(sizes | off)
    table = host_table(bench.engine, PAGING, 5)
    table.map(AT, [0, 1], KERNEL_PAGE)
    bench.m[s.CR3], bench.m[s.CR4] = table.root << 12, bench.m[s.CR4] | 1 << 12
    bench.engine.sync()
    read(bench.engine, bench.m, AT)
    before = walked(bench.engine)[0]
    read(bench.engine, bench.m, AT + 0x1000)

    assert walked(bench.engine)[0] - before == reads


ENTRY_CACHE = {"features.entry_walk_cache": True, "pwc.pde.entries": 32, "pwc.pde.ways": 32}


def test_a_walk_cache_of_entries_answers_every_level_but_the_last_of_both_dimensions() -> None:
    """AMD's: of 24 references 5 are of last levels, which are read; a cold walk already reuses what EPT has in common."""
    bench = native(dict(OFF) | ENTRY_CACHE | {"ept_pwc.pde.entries": 32, "ept_pwc.pde.ways": 32})
    engine, m = two_pages_behind_ept(bench)
    read(engine, m, AT)
    cold = walked(engine)
    read(engine, m, AT + 0x1000)
    warm = (walked(engine)[0] - cold[0], walked(engine)[1] - cold[1])

    assert cold == (4, 24 - 4 - 3 * 4 + 2)  # upper levels for the tables once, and two more for the page at AT
    assert warm == (1, 5)
    assert int(engine.arena[int(m[s.OWNER]) + k.GUEST_ENTRY_HITS]) == 3
    assert int(engine.arena[int(m[s.OWNER]) + k.EPT_ENTRY_HITS]) == 3 * 4 - 2 + 3 * 5


def test_the_nested_dimension_may_be_left_out_of_a_walk_cache_of_entries() -> None:
    bench = native(dict(OFF) | ENTRY_CACHE)
    engine, m = two_pages_behind_ept(bench)
    read(engine, m, AT)
    cold = walked(engine)
    read(engine, m, AT + 0x1000)

    assert cold == (4, 20)
    assert (walked(engine)[0] - cold[0], walked(engine)[1] - cold[1]) == (1, 20)


def two_pages_behind_ept(bench: Any) -> tuple[Any, Any]:
    """Two neighbouring pages from AT on, tables of the guest in the first 2 MiB."""
    engine, m = bench.engine, bench.m
    ept = host_table(engine, EPT)
    ept.map_range(0, 0, 512, EPT_PAGE)
    ept.map_range(AT, 0, 2, EPT_PAGE)
    guest = host_table(engine, PAGING)
    guest.map(AT, [AT >> 12, (AT >> 12) + 1], KERNEL_PAGE)
    m[s.CR3] = guest.root << 12
    behind_ept(engine, m, ept.root, 4)
    return engine, m


@pytest.mark.parametrize(
    ("removed", "reads"), [((), 1), (("pde",), 2), (("pde", "pdpte"), 3), (("pde", "pdpte", "pml4e"), 4)]
)
def test_each_level_of_the_ept_walk_caches_can_be_removed(removed: tuple[str, ...], reads: int) -> None:
    sizes = {
        f"ept_pwc.{level}.{what}": 4 for level in ("pml5e", "pml4e", "pdpte", "pde") for what in ("entries", "ways")
    }
    off = {path: 0 for path in OFF if not path.startswith("ept_pwc")} | {f"ept_pwc.{x}.entries": 0 for x in removed}
    bench = native(sizes | off)
    ept = host_table(bench.engine, EPT, 5)
    ept.map_range(0, 0, 8192, EPT_PAGE)
    bench.m[s.CR0] &= ~(1 << 31)
    behind_ept(bench.engine, bench.m, ept.root, 5)
    read(bench.engine, bench.m, 0x100000)
    before = walked(bench.engine)[1]
    read(bench.engine, bench.m, 0x101000)

    assert walked(bench.engine)[1] - before == reads
