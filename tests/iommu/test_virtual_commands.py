"""Virtual commands: PASIDs that a unit gives to a guest's driver and takes back.

VT-d: "Virtual Command Register"; "Virtual Command Response Register"; "Virtual Command Capability Register".
"""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as hs

from tests.iommu.worlds import World
from vtsim.iommu import spec as sp
from vtsim.iommu import state as st
from vtsim.iommu.unit import Capabilities, RemappingUnit

GIVES = Capabilities().having(VCS=1)


def ask(unit: RemappingUnit, command: int, operand: int = 0) -> tuple[int, int]:
    """Status code and result of a command, which is not in progress."""
    unit.write("VCMD", command | operand << 16)
    word = unit.read("VCRSP")
    assert word & 1 == 0
    return word >> 1 & 0x7F, word >> 16


@given(hs.lists(hs.one_of(hs.none(), hs.integers(0, 5)), max_size=40))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_a_pasid_is_given_to_one_owner_at_a_time(script: list[int | None]) -> None:
    unit = World("legacy", GIVES).unit
    given_out: list[int] = []
    for step in script:
        if step is None:
            status, pasid = ask(unit, sp.VCMD_ALLOCATE)
            assert (status, pasid > 0, pasid in given_out) == (sp.VC_SUCCESS, True, False)
            given_out.append(pasid)
        else:
            known = step < len(given_out)
            pasid = given_out.pop(step) if known else 1000 + step
            assert ask(unit, sp.VCMD_FREE, pasid) == (sp.VC_SUCCESS if known else sp.VC_NO_PASID, 0)


def test_when_all_are_given_there_is_none_until_one_comes_back() -> None:
    unit = World("legacy", GIVES).unit
    assert unit.read("VCCAP") == sp.VCCAP_PAS
    found = [ask(unit, sp.VCMD_ALLOCATE)[1] for _ in range(st.MOST_VIRTUAL_PASIDS - 1)]
    assert sorted(found) == list(range(1, st.MOST_VIRTUAL_PASIDS))
    assert ask(unit, sp.VCMD_ALLOCATE) == (sp.VC_NO_PASID, 0)
    assert ask(unit, sp.VCMD_FREE, 1 << 19) == ask(unit, sp.VCMD_FREE) == (sp.VC_NO_PASID, 0)
    assert ask(unit, sp.VCMD_FREE, 63) == (sp.VC_SUCCESS, 0)
    assert ask(unit, sp.VCMD_ALLOCATE) == (sp.VC_SUCCESS, 63)
    assert ask(unit, 99)[0] == sp.VC_UNKNOWN


def test_a_unit_of_hardware_has_no_virtual_commands() -> None:
    unit = World("legacy").unit
    assert ask(unit, sp.VCMD_ALLOCATE) == (0, 0)
    assert [unit.read(name) for name in ("VCCAP", "VCMD", "VCRSP")] == [0, 0, 0]
