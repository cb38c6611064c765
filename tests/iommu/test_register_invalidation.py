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
    world = World("legacy", Capabilities().without("PSI"))
    remapped(world)
    world.unit.write("IOTLB", 1 << 63 | 3 << sp.IIRG | DOMAIN << 32)
    assert world.unit.read("IOTLB") >> sp.IAIG & 3 == sp.DOMAIN_SELECTIVE
    assert not is_stale(world)


def test_an_address_mask_that_the_unit_does_not_have_is_an_error() -> None:
    world = World("legacy", Capabilities().having(MAMV=3))
    remapped(world)
    world.unit.write("IVA", RW_PAGE | 4)
    world.unit.write("IOTLB", 1 << 63 | 3 << sp.IIRG | DOMAIN << 32)
    assert world.unit.read("IOTLB") >> sp.IAIG & 3 == 0
    assert is_stale(world)
    world.unit.write("IVA", RW_PAGE | 3)
    world.unit.write("IOTLB", 1 << 63 | 3 << sp.IIRG | DOMAIN << 32)
    assert world.unit.read("IOTLB") >> sp.IAIG & 3 == sp.FINEST_SELECTIVE
    assert not is_stale(world)


@pytest.mark.parametrize("kind", ["second-level", "first-level"])
def test_outside_legacy_mode_registers_ask_for_nothing(kind: str) -> None:
    world = World(kind)
    remapped(world)
    for name, at, done in (("CCMD", sp.CIRG, sp.CAIG), ("IOTLB", sp.IIRG, sp.IAIG)):
        world.unit.write(name, 1 << 63 | sp.GLOBAL << at)
        assert (world.unit.read(name) >> 63, world.unit.read(name) >> done & 3) == (0, 0)
    assert is_stale(world)


def test_turning_remapping_off_invalidates_everything_in_a_unit_with_scalable_mode() -> None:
    for capabilities, stale in ((Capabilities(), False), (Capabilities().without("SMTS"), True)):
        world = World("legacy", capabilities)
        remapped(world)
        world.unit.command(clear=sp.TE)
        world.unit.command(set=sp.TE)
        assert is_stale(world) == stale


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
