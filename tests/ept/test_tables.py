"""Builders of radix tables: what was mapped is found, with as few pages as promised."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cpu.bench import machine
from tests.oracle.legacy_walker import LegacyWalker
from tests.oracle.walker import W, Words
from vtsim.base.errors import ModelError
from vtsim.base.memory import TABLE
from vtsim.ept import spec as e
from vtsim.ept.tables import (
    EPT,
    EPT_PAGE,
    KERNEL_PAGE,
    PAE_PAGING,
    PAGING,
    PAGING_32,
    SIZE_1G,
    SIZE_2M,
    SIZE_4K,
    USER_PAGE,
    Format,
    Table,
    host_table,
)


def table(format: Format = PAGING, levels: int = 4) -> Table:
    return host_table(machine(), format, levels)


@pytest.mark.parametrize("format", [PAGING, EPT], ids=["paging", "EPT"])
@pytest.mark.parametrize(("size", "tables"), [(SIZE_4K, 4), (SIZE_2M, 3), (SIZE_1G, 2)])
def test_a_larger_page_needs_one_table_less_per_level(format: Format, size: int, tables: int) -> None:
    built = table(format)
    built.map(1 << 30, 1 << 18, 7, size)
    leaf = built.find((1 << 30) + 0x123)

    assert leaf is not None
    assert (1 << 18, size, tables) == (leaf.frame, leaf.size, len(list(built.tables())))
    assert leaf.entry == 1 << 30 | 7 | (0x80 if size else 0)


def test_nothing_is_mapped_beside_a_page() -> None:
    built = table()
    built.map(0x40_0000, [5, 6], KERNEL_PAGE)

    assert [built.find(a) is None for a in (0x3F_F000, 0x40_0000, 0x40_1000, 0x40_2000)] == [
        True,
        False,
        False,
        True,
    ]


@given(
    page=st.integers(0, (1 << 36) - 1),
    frame=st.integers(0, 1 << 30),
    count=st.integers(1, 3000),
    largest=st.sampled_from((0, 1, 2)),
)
@settings(max_examples=40)
def test_a_range_is_mapped_page_by_page_whatever_the_sizes(page: int, frame: int, count: int, largest: int) -> None:
    count = min(count, (1 << 36) - page)
    built = table(EPT)
    built.map_range(page << 12, frame, count, EPT_PAGE, largest)

    for n in {0, 1, count // 2, count - 1} & set(range(count)):
        leaf = built.find((page + n) << 12)
        assert leaf is not None
        assert frame + n == leaf.frame + ((page + n) & ((1 << 9 * leaf.size) - 1))
    for beside in (page - 1, page + count):
        assert beside < 0 or beside >> 36 or built.find(beside << 12) is None


@pytest.mark.parametrize(
    ("offset", "count", "sizes"),
    [(0, 512 * 513 + 1, {SIZE_4K: 1, SIZE_2M: 1, SIZE_1G: 1}), (1, 512 * 3, {SIZE_4K: 512 * 3})],
)
def test_the_largest_pages_are_used_only_where_address_and_frame_agree(
    offset: int, count: int, sizes: dict[int, int]
) -> None:
    built = table(EPT)
    built.map_range(1 << 30, (1 << 18) + offset, count, EPT_PAGE, SIZE_1G)
    found: dict[int, int] = {}
    page = 1 << 18
    while (leaf := built.find(page << 12)) is not None:
        found[leaf.size] = found.get(leaf.size, 0) + 1
        page += 1 << 9 * leaf.size

    assert sizes == found


def test_a_negative_address_is_the_upper_half() -> None:
    built = table()
    built.map(-0x1000, 9, KERNEL_PAGE)

    assert built.find((1 << 48) - 0x1000) == built.find(-0x1000) is not None
    assert int(built.words(built.root)[511]) & e.PTE_PRESENT


def test_an_unmapped_page_is_gone_and_its_neighbours_stay() -> None:
    built = table()
    built.map(0, np.arange(10, 20), KERNEL_PAGE)
    built.unmap(0x3000, 2)

    assert [built.find(n << 12) is not None for n in range(10)] == [True] * 3 + [False] * 2 + [True] * 5


@pytest.mark.parametrize(("format", "levels", "bits"), [(PAE_PAGING, 3, 9), (PAGING_32, 2, 10)], ids=["PAE", "32-bit"])
@given(
    page=st.integers(0, (1 << 20) - 1),
    frame=st.integers(0, (1 << 20) - 1),
    count=st.integers(1, 3000),
    largest=st.sampled_from((SIZE_4K, SIZE_2M)),
)
@settings(max_examples=20)
def test_tables_for_32_bit_addresses_are_those_that_the_slow_walker_reads(
    format: Format, levels: int, bits: int, page: int, frame: int, count: int, largest: int
) -> None:
    count = min(count, (1 << 20) - page, (1 << 20) - frame)
    engine = machine()

    def words(hfn: int) -> Any:
        found = engine.contents(hfn, TABLE)
        return found.view(np.uint32) if bits == 10 else found

    root = engine.allocate()
    built = Table(root=root, format=format, take=engine.allocate, words=words, levels=levels)
    built.map_range(page << 12, frame, count, USER_PAGE, largest)
    frames = {hfn: [int(word) for word in engine.contents(hfn, TABLE)] for hfn in built.tables()}
    pdptes = [int(words(root)[n]) for n in range(4)] if bits == 9 else [0] * 4
    walker = LegacyWalker(Words(frames), root << 12, pae=bits == 9, pdptes=(pdptes[0], pdptes[1], pdptes[2], pdptes[3]))

    assert all(pdpte & 0xFFF in (0, e.PTE_PRESENT) for pdpte in pdptes)  # what else is there is reserved
    for n in {0, 1, count // 2, count - 1} & set(range(count)):
        assert walker.translate((page + n) << 12 | 0x123, W, True) == (frame + n) << 12 | 0x123
        leaf = built.find((page + n) << 12)
        assert leaf is not None
        assert leaf.frame + ((page + n) & ((1 << bits * leaf.size) - 1)) == frame + n


@pytest.mark.parametrize("size", [SIZE_4K, SIZE_2M, SIZE_1G])
def test_a_page_that_is_split_leads_where_it_led_with_its_flags(size: int) -> None:
    built, first = table(EPT), 3 << 18
    built.map(1 << 30, first, EPT_PAGE | e.EPT_ACCESSED, size)
    pages = [p for p in (0, 5, 511, 512, 1000, (1 << 18) - 1) if p < 1 << 9 * size]
    leaf = built.split((1 << 30) + (pages[-1] << 12) + 0x123)
    found = [built.find((1 << 30) + (page << 12)) for page in pages]

    assert leaf == found[-1]
    assert leaf is not None and leaf.size == SIZE_4K
    for page, each in zip(pages, found, strict=True):
        assert each is not None
        assert each.frame + page % (1 << 9 * each.size) == first + page
        assert each.entry & 0x7F == EPT_PAGE and each.entry & e.EPT_ACCESSED
    assert built.split(2 << 30) is None


def test_five_levels_reach_57_bits() -> None:
    built = table(levels=5)
    built.map((1 << 56) - 0x1000, 77, KERNEL_PAGE)
    leaf = built.find((1 << 56) - 0x1000)

    assert leaf is not None
    assert (leaf.frame, len(list(built.tables()))) == (77, 5)


@pytest.mark.parametrize(
    ("address", "frame", "size", "why"),
    [
        (0x1000, 0, SIZE_2M, "a page is not aligned to its size"),
        (0, 1, SIZE_2M, "a page is not aligned to its size"),
        (0x123, 1, SIZE_4K, "a page is not aligned to its size"),
        (0x40_0000, 0, SIZE_2M, "smaller pages are mapped there"),
        (0x8000_0000, 0, SIZE_4K, "a larger page is mapped there"),
    ],
)
def test_what_cannot_be_mapped_is_our_mistake(address: int, frame: int, size: int, why: str) -> None:
    built = table()
    built.map(0x40_0000, 3, KERNEL_PAGE)
    built.map(0x8000_0000, 0, KERNEL_PAGE, SIZE_1G)

    with pytest.raises(ModelError, match=why):
        built.map(address, frame, KERNEL_PAGE, size)


def test_a_range_beyond_the_last_page_is_our_mistake() -> None:
    with pytest.raises(ModelError, match="pages end beyond the table"):
        table().map(-0x1000, [1, 2], KERNEL_PAGE)


def test_a_raw_entry_stands_where_it_was_put() -> None:
    built = table(EPT)
    built.set_entry(0x20_0000, 1 << 63 | 0x86, level=2)
    leaf = built.find(0x20_0000)

    assert leaf is not None
    assert (leaf.entry, leaf.size, leaf.index) == (0x86 - (1 << 63), SIZE_2M, 1)
