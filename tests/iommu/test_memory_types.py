"""Memory types of pages, where they count: PAT, MTRRs of the unit, second level; and encodings that there are not.

`test_translation.py` compares the types with those of the independent walker over random tables.

VT-d: "Memory Type"; "MTRR Capability Register"; "Scalable-Mode PASID Table Entry"; "Second-Stage Paging Entries".
"""

from __future__ import annotations

import pytest

from tests.iommu.walker import EFFECTIVE
from tests.iommu.worlds import PASID, RW_PAGE, SID, World
from vtsim.base.memory import signed
from vtsim.ept import memory_types as m
from vtsim.iommu import entries as e
from vtsim.iommu import faults as f
from vtsim.iommu import spec as sp
from vtsim.iommu import state as st
from vtsim.iommu.unit import Capabilities

TYPED = Capabilities().having(MTS=1)
ALL_ONES = (1 << 64) - 1


def pasid_word(world: World, bits: int) -> None:
    entry = world.structures.pasid(SID, PASID)
    entry[1] = signed(int(entry[1]) | bits)
    world.invalidate_all()


def test_the_table_of_types_is_that_of_processors() -> None:
    for below, row in m.COMBINED.items():
        for pat, kind in zip(m.PAT_ORDER, row, strict=True):
            assert m.NAMES[kind] == EFFECTIVE.get((m.NAMES[below], m.NAMES[pat]), "UC")


@pytest.mark.parametrize("row", [row for row in sp.REGISTERS if row.needs == "MTS"], ids=lambda row: row.name)
def test_ranges_have_registers_only_where_the_unit_has_memory_types(row: sp.RegisterRow) -> None:
    without, typed = World("legacy").unit, World("legacy", TYPED).unit
    for unit in (without, typed):
        unit.write(row.name, ALL_ONES)
    assert without.read(row.name) == 0
    if row.name == "MTRRCAP":  # ten variable ranges, fixed ones, write combining; read only
        assert typed.read(row.name) == 10 | 1 << 8 | 1 << 10
    else:
        assert typed.read(row.name) == sum(each.mask for each in row.fields)


def test_ranges_give_the_type_of_what_is_passed_through() -> None:
    world = World("pass-through", TYPED)
    unit = world.unit

    def kind(address: int) -> str | None:
        return world.ask(address).memory_type

    assert kind(0x1000) == "UC"  # ranges are not enabled
    unit.write("MTRRDEF", sp.MTRR_E | m.WB)
    assert kind(0x1000) == kind(64 << 20) == "WB"
    unit.write("MTRR_FIX64K_00000", m.WP | m.WT << 8)
    unit.write("MTRR_FIX16K_A0000", m.WC << 8)
    unit.write("MTRR_FIX4K_F8000", signed(m.UC | m.WB << 8 | m.WC << 56))
    assert kind(0x1_0000) == "WB"
    unit.write("MTRRDEF", sp.MTRR_E | sp.MTRR_FE | m.WB)
    assert [kind(at) for at in (0, 0xFFF8, 0x1_0000, 0xA_3FF8, 0xA_4000, 0xF_8000, 0xF_9000, 0xF_F000)] == [
        "WP", "WP", "WT", "UC", "WC", "UC", "WB", "WC",
    ]  # fmt: skip
    for n, (size, of) in enumerate(((16, m.WB), (8, m.WT), (4, m.WP), (2, m.UC))):  # MiB from 16 MiB on
        unit.write(f"MTRR_PHYSBASE{n}", 16 << 20 | of)
        unit.write(f"MTRR_PHYSMASK{n}", ((1 << 46) - (size << 20)) | sp.MTRR_V)
    # uncached where one says so; written through over written back; what else overlaps is nobody's promise
    assert [kind(mib << 20) for mib in (16, 18, 20, 24, 32)] == ["UC", "UC", "WT", "WB", "WB"]
    pasid_word(world, e.CD)
    assert kind(24 << 20) == "UC"
    assert world.ask(24 << 20, at=sp.TRANSLATION_REQUEST).memory_type == "UC"
    assert world.ask(24 << 20, at=sp.TRANSLATED, pasid=sp.NO_PASID).memory_type == "WB"


def test_types_count_in_scalable_mode_of_a_unit_that_has_them() -> None:
    for kind, capabilities in (("legacy", TYPED), ("first-level", Capabilities())):
        world = World(kind, capabilities)
        assert [world.ask(RW_PAGE).memory_type for _ in range(2)] == [None, None]
    typed = World("first-level", TYPED)
    assert [typed.ask(RW_PAGE).memory_type for _ in range(2)] == ["UC", "UC"]  # PAT and ranges after reset


@pytest.mark.parametrize("bit", [25, 26, 27, 29, 30, 31, 32, 63])
def test_bits_of_memory_types_are_reserved_in_a_unit_without_them(bit: int) -> None:
    world = World("second-level")
    pasid_word(world, 1 << bit)
    assert world.ask(RW_PAGE).reason == f.PASID_RESERVED


@pytest.mark.parametrize("code", range(16))
def test_an_encoding_of_a_type_that_there_is_not_is_refused(code: int) -> None:
    legal = {0, 1, 4, 5, 6}
    in_pat, entry, leaf = (World(kind, TYPED) for kind in ("first-level", "nested", "second-level"))
    pasid_word(in_pat, code << 32 + 4 * 5)
    assert in_pat.ask(RW_PAGE).reason == (0 if code in legal | {7} else f.PASID_INVALID)
    pasid_word(entry, e.EMTE | (code & 7) << e.EMT_SHIFT)
    assert entry.ask(RW_PAGE).reason == (0 if code & 7 in legal else f.PASID_INVALID)
    where = leaf.entry_at(leaf.second, RW_PAGE, 1)
    leaf.change(where, lambda word: word | (code & 7) << e.SL_EMT_SHIFT)
    assert leaf.ask(RW_PAGE).status == st.COMPLETED  # ignored without EMTE
    pasid_word(leaf, e.EMTE)
    answer = leaf.ask(RW_PAGE)
    assert answer.reason == (0 if code & 7 in legal else f.SCALABLE_SECOND_RESERVED)
    assert answer.memory_type == m.NAMES.get(code & 7 if code & 7 in legal else -1)
