"""Invalidation by registers: what was asked, what was done, and what a new root table does.

VT-d: "Register-based Invalidation Interface"; "Context Command Register"; "IOTLB Invalidate Register".
"""

from __future__ import annotations

import pytest

from tests.iommu.worlds import DOMAIN, RW_PAGE, SID, World, is_stale, queued, remapped
from vtsim.iommu import spec as sp
from vtsim.iommu.unit import Capabilities


@pytest.mark.parametrize("granularity", [1, 2, 3])
def test_register_based_invalidation_says_what_it_has_done(granularity: int) -> None:
    world = World("legacy")
    remapped(world)
    unit = world.unit

    unit.write("CCMD", 1 << 63 | granularity << sp.CIRG | SID << 16 | DOMAIN)
    assert unit.read("CCMD") >> 63 == 0
    assert unit.read("CCMD") >> sp.CAIG & 3 == granularity
    assert is_stale(world)  # the context cache holds no translations
    unit.write("IVA", RW_PAGE)
    unit.write("IOTLB", 1 << 63 | granularity << sp.IIRG | DOMAIN << 32)

    assert unit.read("IOTLB") >> 63 == 0
    assert unit.read("IOTLB") >> sp.IAIG & 3 == granularity
    assert not is_stale(world)


def test_a_unit_may_do_more_than_it_was_asked() -> None:
    for capabilities, mask in ((Capabilities().without("PSI"), 0), (Capabilities().having(MAMV=3), 4)):
        world = World("legacy", capabilities)
        remapped(world)
        world.unit.write("IVA", mask)
        world.unit.write("IOTLB", 1 << 63 | 3 << sp.IIRG | DOMAIN << 32)
        assert world.unit.read("IOTLB") >> sp.IAIG & 3 == sp.DOMAIN_SELECTIVE
        assert not is_stale(world)


def test_a_reserved_granularity_and_a_queue_that_is_on_invalidate_nothing() -> None:
    world = queued()
    remapped(world)
    for value in (0, 1 << sp.IIRG):
        if value == 0:
            world.unit.command(clear=sp.QIE)
        else:
            world.unit.command(set=sp.QIE)
        world.unit.write("IOTLB", 1 << 63 | value)
        assert world.unit.read("IOTLB") >> sp.IAIG & 3 == 0
    assert is_stale(world)


def test_a_new_root_table_invalidates_everything_where_the_unit_says_so() -> None:
    for capabilities, stale in ((Capabilities(), True), (Capabilities().having(ESRTPS=1), False)):
        world = World("legacy", capabilities)
        remapped(world)
        world.unit.command(set=sp.SRTP)
        assert is_stale(world) == stale
