"""Does every page get memory of its own?"""

from __future__ import annotations

import numpy as np
import pytest

from tests.guest.conftest import native
from vtsim.base.errors import ConfigError, ModelError
from vtsim.base.memory import HOLE_FIRST, HOLE_LAST
from vtsim.guest import spec as g
from vtsim.guest.frames import FIRST, SIZES, Frames, scattered
from vtsim.guest.kernel.layout import USER_STACK_PAGES

GIB, MIB, PAGE = 1 << 30, 1 << 20, 4096


@pytest.mark.parametrize("of", [1, 17, 4096, 4097, 100_003])
def test_a_scattered_order_names_everything_once(of: int) -> None:
    numbers = np.concatenate(list(scattered(of, np.random.SeedSequence([1, 2]))))
    assert sorted(numbers.tolist()) == list(range(of))


@pytest.mark.parametrize("size", [64 * MIB, GIB, 5 * GIB])
@pytest.mark.parametrize("shuffled", [False, True])
def test_pages_of_all_sizes_are_apart_and_in_memory(size: int, shuffled: bool) -> None:
    frames = Frames(size=size, shuffled=shuffled, seed=1)
    kernel = frames.reserve(1000)
    counts = {2: int(size > 2 * GIB), 1: 3, 0: 2000}
    used = set(range(kernel, kernel + 1000))
    for pages, count in counts.items():
        step = SIZES[pages] // PAGE
        for first in frames.take(count, pages).draw(count).tolist():
            assert first % step == 0
            page = set(range(first, first + step))
            assert not used & page
            used |= page
    assert min(used) >= FIRST
    assert max(used) < frames.end
    assert not used & set(range(HOLE_FIRST, HOLE_LAST + 1))


@pytest.mark.parametrize("size", [64 * MIB, 5 * GIB])
def test_all_memory_can_be_handed_out(size: int) -> None:
    frames = Frames(size=size, shuffled=True, seed=1)
    count = size // PAGE - FIRST
    assert len(np.unique(frames.take(count, 0).draw(count))) == count


def test_a_kernel_gets_no_frame_that_may_be_a_process_s() -> None:
    frames = Frames(16 << 20, shuffled=False, seed=1)
    frames.take(1, 0)

    with pytest.raises(ModelError, match="given already"):
        frames.reserve(1)


def test_memory_that_does_not_suffice_is_the_users_mistake() -> None:
    with pytest.raises(ConfigError) as error:
        native((g.StreamSpec(region=64 * MIB),), memory=64 * MIB)
    pages = 64 * MIB // PAGE + USER_STACK_PAGES
    tables = 3 + 2  # down to the text, and one below each top-level entry in use
    assert str(error.value) == (
        f"memory: 64 MiB of memory are too little for {pages + tables} pages of 4 KiB\n help: give the VM more memory"
    )


def test_a_region_on_the_text_is_the_users_mistake() -> None:
    with pytest.raises(ConfigError) as error:
        native((g.StreamSpec(region=MIB, at=0x40_0000),))
    assert str(error.value) == (
        "process 'p0': the region at 0x400000 overlaps the text at 0x400000 to 0x400fff\n"
        " help: regions can be placed from 0x1000000000 on"
    )
