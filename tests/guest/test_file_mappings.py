"""A mapped file: its pages come from the page cache, sixteen at a fault, and go back to it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from attrs import evolve
from numpy.typing import NDArray

from tests.guest.conftest import Harness, native
from tests.guest.test_kernel import ended
from vtsim.base.errors import ConfigError
from vtsim.cpu import accounts as k
from vtsim.guest.file_mappings import MapFileSpec
from vtsim.guest.kernel import file_fault
from vtsim.guest.kernel import layout as at
from vtsim.guest.kernel import page_cache as cache

KIB, PAGE = 1 << 10, 4096


def mapping(harness: Harness) -> int:
    """Guest-physical address of what the kernel knows of the file: the first frame that begins as `words` says."""
    load = harness.engine.load
    (found,) = (
        gfn << 12
        for gfn in range(64, 512)
        if load((gfn << 12) + cache.MAPPING_BYTES + cache.P_MAPPING) == at.DIRECT + (gfn << 12)
    )
    return found


def descriptors(harness: Harness, pages: int) -> dict[str, NDArray[np.int64]]:
    """Flags, mappings and references of the file's pages."""
    first = mapping(harness) + cache.MAPPING_BYTES
    words = {"flags": cache.P_FLAGS, "mapped": cache.P_MAPPED, "count": cache.P_COUNT}
    load = harness.engine.load
    return {
        name: np.array([load(first + page * cache.PAGE_BYTES + word) for page in range(pages)])
        for name, word in words.items()
    }


def faults(**settings: Any) -> int:
    """Page faults of one round more."""
    few, many = (ended(native((MapFileSpec(iterations=n, **settings),))).count(k.PAGE_FAULTS) for n in (1, 2))
    return many - few


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"region": 256 * KIB}, 256 // 64),  # one for each window
        ({"region": 240 * KIB}, -(-240 // 64)),  # the last window is shorter
        ({"region": 256 * KIB, "order": "strided", "stride": 16 * KIB}, 256 // 64),
        ({"region": 256 * KIB, "order": "strided", "stride": 16 * KIB, "write": 1.0}, 256 // 16),  # none around
        ({"region": 256 * KIB, "write": 1.0, "touched": 0.25}, 256 // 4 // 4),
        ({"region": 256 * KIB, "order": "none", "invalidate": True}, 0),
    ],
)
def test_a_read_maps_the_window_around_it_and_a_store_one_page(settings: dict[str, Any], expected: int) -> None:
    assert faults(**settings) == expected


def test_after_munmap_every_page_is_as_it_was_but_for_those_that_were_written() -> None:
    pages = 80  # two nodes of the tree
    once = MapFileSpec(region=pages * PAGE, order="strided", stride=4 * PAGE, write=1.0, touched=0.5, iterations=1)
    harness = ended(native((once, evolve(once, order="permutation", write=0.0))))

    of = descriptors(harness, pages)
    written = np.isin(np.arange(pages), np.arange(0, pages // 2, 4))
    assert of["mapped"].tolist() == [-1] * pages
    assert of["count"].tolist() == [1] * pages
    assert of["flags"].tolist() == [cache.UPTODATE | (cache.DIRTY if dirty else 0) for dirty in written]


def test_a_page_that_was_mapped_for_reading_faults_once_more_when_it_is_written() -> None:
    """Between a window each (all reads) and a window and a page each (every page was mapped before it was written)."""
    pages, windows = 64, 4
    mixed = faults(region=pages * PAGE, write=0.5)

    assert windows < mixed <= windows + pages


@pytest.mark.parametrize("pages", [1, 64, 65, 4097])
def test_every_page_of_the_tree_is_found_by_its_number(pages: int) -> None:
    """The walk of Linux, in Python: from the root by six bits at a time, each node saying its shift."""
    file, base = cache.CachedFile(pages=pages), 1 << 40
    words = file.words(base)
    load = lambda address: int(words[(address - base) // 8])  # noqa: E731
    for page in {0, pages // 2, pages - 1}:
        node = load(base + cache.X_ROOT)
        for level in reversed(range(file.levels)):
            assert load(node) == level * 6
            node = load(node + cache.NODE_HEADER + 8 * ((page >> 6 * level) & 63))
        assert node == base + cache.MAPPING_BYTES + page * cache.PAGE_BYTES
        assert load(node + cache.P_INDEX) == page


def test_a_fault_takes_as_many_pages_around_as_linux() -> None:
    assert file_fault.AROUND * PAGE == 64 * KIB  # fault_around_bytes


def test_a_stride_must_stay_in_what_is_touched() -> None:
    with pytest.raises(ConfigError) as raised:
        MapFileSpec(region=64 * KIB, touched=0.5, order="strided", stride=64 * KIB)

    assert "stride can be at most" in str(raised.value)
