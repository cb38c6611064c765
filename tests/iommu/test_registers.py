"""The register file and the tables of the specification.

VT-d: "Set Root Table Pointer Operation"; "Set Interrupt Remapping Table Pointer Operation";
"Interrupt Remapping Fault Conditions"; "Software Access to Registers"; "Global Command Register";
"Root Table Address Register".
"""

from __future__ import annotations

import pytest

from tests.iommu.worlds import SID, World
from vtsim.base.memory import signed
from vtsim.iommu import descriptors as d
from vtsim.iommu import entries as e
from vtsim.iommu import faults as f
from vtsim.iommu import spec as sp
from vtsim.iommu import state as st
from vtsim.iommu.unit import Capabilities, RemappingUnit

ALL_ONES = (1 << 64) - 1
ACTING = ("GCMD", "CCMD", "IOTLB", "FSTS", "IQT", "PMEN")  # writing these does more than storing


def unit() -> RemappingUnit:
    return World("legacy").unit


@pytest.mark.parametrize("row", sp.REGISTERS, ids=lambda row: row.name)
def test_each_bit_obeys_its_access(row: sp.RegisterRow) -> None:
    remapping = World("legacy", Capabilities().having(MTS=1, VCS=1)).unit
    before = remapping.read(row.name)

    if row.name not in ACTING:
        remapping.write(row.name, ALL_ONES)
    after = remapping.read(row.name)

    writable = sum(each.mask for each in row.fields if each.access == sp.RW)
    hidden = sum(each.mask for each in row.fields if each.access == sp.WO)
    assert after & hidden == 0
    if row.name not in ACTING:
        assert after & writable == writable
        assert after & ~writable == before & ~writable
        remapping.write(row.name, 0)
        assert remapping.read(row.name) & writable == 0


NEEDED = sorted({row.needs for row in sp.REGISTERS if row.needs})


@pytest.mark.parametrize("needs", NEEDED)
def test_registers_of_a_capability_that_is_lacking_are_reserved(needs: str) -> None:
    everything = Capabilities().having(MTS=1, VCS=1)
    remapping = World("legacy", everything.without(*needs.split())).unit
    for row in sp.REGISTERS:
        if row.needs == needs:
            remapping.write(row.name, ALL_ONES)
            assert remapping.read(row.name) == 0, row.name


def test_a_register_that_one_of_two_capabilities_needs_is_there_with_either() -> None:
    for lacking, there in (("PLMR", "PHMBASE"), ("PHMR", "PLMBASE")):
        remapping = World("legacy", Capabilities().without(lacking)).unit
        remapping.write("PMEN", sp.EPM)
        remapping.write(there, ALL_ONES)
        assert remapping.read("PMEN") == sp.EPM | sp.PRS_PROTECTED
        assert remapping.read(there) != 0


def test_extended_interrupt_mode_is_not_on_in_a_unit_that_does_not_have_it() -> None:
    """Else interrupt requests in compatibility format would be blocked, and entries read with wide destinations."""
    for lacking, passes in (((), False), (("EIM",), True)):
        remapping = World("legacy", Capabilities().without(*lacking)).unit
        remapping.write("IRTA", 0x1000 | sp.EIME)
        remapping.command(set=sp.SIRTP)
        remapping.command(set=sp.IRE | sp.CFI)
        assert (remapping.read("IRTA") & sp.EIME == 0) == passes
        assert (remapping.interrupt(SID, 0xFEE0_0000, 0x41).message is not None) == passes


def test_registers_do_not_overlap_and_fields_stay_in_their_register() -> None:
    taken: set[int] = set()
    for row in sp.REGISTERS:
        place = set(range(row.offset, row.offset + row.width))
        assert not place & taken and row.offset % row.width == 0
        taken |= place
        used = 0
        for each in row.fields:
            assert each.high < 8 * row.width and not used & each.mask
            used |= each.mask


@pytest.mark.parametrize(("offset", "size"), [(0x02, 4), (0x0C, 8), (0x08, 2), (0x1000, 4), (-4, 4)])
def test_an_access_that_is_not_aligned_or_outside_reads_ones_and_writes_nothing(offset: int, size: int) -> None:
    remapping = unit()
    before = remapping.save()

    remapping.write_at(offset, size, ALL_ONES)

    assert remapping.read_at(offset, size) == (1 << 8 * size) - 1
    assert (remapping.save() == before).all()


def test_the_halves_of_a_register_are_written_apart() -> None:
    remapping = unit()
    remapping.write_at(sp.RTADDR, 4, 0x1234_5000)
    remapping.write_at(sp.RTADDR + 4, 4, 0x8000_0001)

    assert remapping.read("RTADDR") == 0x8000_0001_1234_5000
    assert remapping.read_at(sp.RTADDR + 4, 4) == 0x8000_0001


def test_one_shot_commands_set_status_and_need_not_be_kept_on() -> None:
    remapping = World("legacy").unit
    assert remapping.read("GSTS") == sp.TE | sp.SRTP
    remapping.command(set=sp.QIE)
    remapping.command(set=sp.SIRTP)
    assert remapping.read("GSTS") == sp.TE | sp.SRTP | sp.QIE | sp.SIRTP
    remapping.write("GCMD", 0)
    assert remapping.read("GSTS") == sp.SRTP | sp.SIRTP
    assert remapping.read("GCMD") == 0


def test_the_root_table_is_what_it_was_when_it_was_set() -> None:
    world = World("legacy")
    world.unit.write("RTADDR", 0x3FFF_F000)

    assert world.ask(0x20_3000).status == st.COMPLETED
    world.unit.command(set=sp.SRTP)
    world.invalidate_all()
    assert world.ask(0x20_3000).reason == f.ROOT_ACCESS


def test_commands_of_capabilities_that_are_lacking_do_nothing() -> None:
    remapping = World("legacy", Capabilities().without("QI", "IR")).unit
    remapping.command(set=sp.QIE | sp.IRE | sp.CFI)
    remapping.command(set=sp.SIRTP)

    assert remapping.read("GSTS") == sp.TE | sp.SRTP


def test_capability_fields_that_do_not_exist_or_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="CAP has no field XYZ = 1"):
        sp.capability_value("CAP", XYZ=1)
    with pytest.raises(ValueError, match="CAP has no field ND = 8"):
        sp.capability_value("CAP", ND=8)
    with pytest.raises(ValueError, match=r"WAIT|Invalidation Wait Descriptor has no field G = 0x1"):
        d.descriptor("WAIT", G=1)


@pytest.mark.parametrize("name", ["AFL", "ECMDS", "PMS"])
def test_a_unit_does_not_say_what_no_unit_has_here(name: str) -> None:
    """Advanced fault logging, enhanced commands, performance monitoring: their bits are 0 and so are their registers.

    VT-d: "Advanced Fault Logging"; "Enhanced Command Register"; "Performance Monitoring Capability Register".
    """
    row = "ECAP" if name == "PMS" else "CAP"
    with pytest.raises(ValueError, match=f"{row} says {name}, which units do not have here"):
        World("legacy", Capabilities().having(**{name: 1}))
    remapping = unit()
    field = next(each for each in sp.register(row).fields if each.name == name)
    assert remapping.read(row) & field.mask == 0
    status = remapping.read("GSTS")
    for offset in (sp.AFLOG, 0x300, 0x310, 0x380):  # the fault log; performance monitoring, its events
        remapping.write_at(offset, 8, ALL_ONES)
        assert remapping.read_at(offset, 8) == 0
    remapping.command(set=sp.SFL | sp.EAFL)
    assert remapping.read("GSTS") == status


def test_a_cache_of_sets_that_are_no_power_of_two_is_refused() -> None:
    with pytest.raises(ValueError, match="iotlb_4k has 3 sets, not a power of two"):
        World("legacy", caches=st.Caches(iotlb_4k=st.Cache(3, 4)))


def test_the_named_codes_and_the_table_of_faults_agree() -> None:
    assert {each.name: each.code for each in f.FAULTS} == {each.name: getattr(f, each.name) for each in f.FAULTS}
    assert len({each.code for each in f.FAULTS}) == len(f.FAULTS) == len({each.condition for each in f.FAULTS})


def test_named_bits_of_entries_agree_with_the_tables() -> None:
    def mask(entry: e.Entry, word: int, name: str) -> int:
        return signed(next(each.mask for each in entry.words[word] if each.name == name))

    pairs = {
        (e.PASID_ENTRY, 0): {"SLADE": e.SLADE, "SLEE": e.SLEE, "FPD": e.FPD, "P": e.PRESENT, "SLPTPTR": e.POINTER},
        (e.PASID_ENTRY, 1): {"PWSNP": e.PWSNP, "PGSNP": e.PGSNP, "CD": e.CD, "EMTE": e.EMTE, "DID": 0xFFFF},
        (e.PASID_ENTRY, 2): {"SRE": e.SRE, "ERE": e.ERE, "WPE": e.WPE, "NXE": e.NXE, "SMEP": e.SMEP, "EAFE": e.EAFE},
        (e.SCALABLE_CONTEXT_ENTRY, 0): {"DTE": e.DTE, "PASIDE": e.PASIDE, "PRE": e.PRE},
        (e.SCALABLE_CONTEXT_ENTRY, 1): {"RID_PASID": e.RID_PASID, "RID_PRIV": e.RID_PRIV},
        (e.FIRST_LEVEL_ENTRY, 0): {
            "RW": e.FL_RW,
            "US": e.FL_US,
            "A": e.FL_A,
            "D": e.FL_D,
            "PS": e.FL_PS,
            "EA": e.FL_EA,
            "XD": e.FL_XD,
            "ADDR": e.ADDRESS,
        },
        (e.SECOND_LEVEL_ENTRY, 0): {
            "R": e.SL_R,
            "W": e.SL_W,
            "X": e.SL_X,
            "PS": e.SL_PS,
            "A": e.SL_A,
            "D": e.SL_D,
            "SNP": e.SL_SNP,
        },
    }
    for (entry, word), names in pairs.items():
        for name, value in names.items():
            assert mask(entry, word, name) == value, name


def test_named_bits_of_capabilities_agree_with_the_table() -> None:
    for row in ("CAP", "ECAP"):
        for each in sp.register(row).fields:
            named = getattr(sp, f"{row}_{each.name}", None)
            if named is not None:
                assert named in (each.mask, each.low), each.name


def test_a_fields_bits_do_not_overlap_in_any_entry_or_descriptor() -> None:
    words = [word for entry in e.ENTRIES for word in entry.words]
    words += [part for row in d.DESCRIPTORS for part in (row.low, row.high)]
    for word in words:
        used = 0
        for each in word:
            assert not used & each.mask
            used |= each.mask


def test_a_reset_keeps_fault_status_and_records_and_nothing_else() -> None:
    world = World("legacy")
    assert world.ask(0x7FF_F000).reason == f.NO_READ
    record, status = world.unit.read_at(sp.FAULT_OFFSET + 8, 8), world.unit.read("FSTS")
    assert status & sp.PPF and record >> 32 & 0xFF == f.NO_READ

    world.unit.reset()

    assert (world.unit.read_at(sp.FAULT_OFFSET + 8, 8), world.unit.read("FSTS")) == (record, status)
    assert [world.unit.read(name) for name in ("GSTS", "RTADDR", "IQA", "IRTA")] == [0, 0, 0, 0]
    assert world.unit.read("FECTL") == sp.IM
    assert world.unit.read("CAP") == World("legacy").unit.read("CAP")
    assert world.ask(0x7FF_F000).status == st.COMPLETED, "remapping is off"
