"""EPT misconfigurations, and the accessed and dirty flags that accesses set in EPT entries.

SDM: "EPT Misconfigurations"; "Accessed and Dirty Flags for EPT"; "EPT Violations".
"""

from __future__ import annotations

import pytest

from tests.vmcs.control_cases import NO_EXIT, READ, WRITE
from tests.vmcs.guests import DATA1, EPT_DATA, Guest, quad
from vtsim.ept import spec as e
from vtsim.vmcs import reasons as x

PAGE, WRITE_BACK = 0x829000, 6 << 3
ROOT, EPT_CODE, EPT_GUEST_ROOT = 0x810000, 0x813000, 0x813040
TABLES = {ROOT: 0x811000, 0x811000: 0x812000, 0x812020: 0x813000}  # the way to the table of 800000H
FLAGS = {"EPT_POINTER": ROOT | 0x5E}
ACCESSED, DIRTY = 1 << 8, 1 << 9


def data(entry: int, code: str = READ, dump: tuple[int, int] = (0, 0), **fields: int) -> Guest:
    return Guest(code=code, gpr={"rcx": DATA1}, memory={EPT_DATA: quad(entry)}, fields=fields, dump=dump)


@pytest.mark.parametrize("rights", range(8))
def test_a_leaf_that_lets_write_but_not_read_is_misconfigured(rights: int) -> None:
    """Execute-only entries are legal on this processor: a read of one is a violation."""
    got = data(PAGE | WRITE_BACK | rights).run()
    misconfigured = rights in (2, 6)

    assert got.at("reason") == (
        x.EPT_MISCONFIG if misconfigured else x.VMCALL if rights & 1 else x.EPT_VIOLATION
    )  # fmt: skip
    if misconfigured:
        assert got.differs({"qualification": 0, "GUEST_PHYSICAL_ADDRESS": DATA1}) == {}


@pytest.mark.parametrize(
    ("kind", "legal"), [(0, True), (1, True), (2, False), (3, False), (4, True), (5, True), (6, True), (7, False)]
)
def test_a_leaf_has_one_of_five_memory_types(kind: int, legal: bool) -> None:
    assert data(PAGE | kind << 3 | 7).run().at("reason") == (x.VMCALL if legal else x.EPT_MISCONFIG)


@pytest.mark.parametrize("bit", [40, 45, 51])
def test_a_bit_beyond_the_physical_address_width_is_misconfigured_where_the_entry_is_present(bit: int) -> None:
    assert data(1 << bit | PAGE | WRITE_BACK | 7).run().at("reason") == x.EPT_MISCONFIG
    assert data(1 << bit | PAGE | WRITE_BACK).run().at("reason") == x.EPT_VIOLATION


@pytest.mark.parametrize("bit", [3, 4, 5, 6])
@pytest.mark.parametrize("table", [ROOT, 0x811000, 0x812020])
def test_reserved_bits_of_an_entry_that_points_to_a_table_are_misconfigured(table: int, bit: int) -> None:
    guest = Guest(memory={table: quad(TABLES[table] | 7 | 1 << bit)})

    assert guest.run().at("reason") == x.EPT_MISCONFIG


def test_the_root_table_has_no_large_pages() -> None:
    assert Guest(memory={ROOT: quad(TABLES[ROOT] | 7 | 1 << 7)}).run().at("reason") == x.EPT_MISCONFIG


# --- accessed and dirty -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("code", "flags"), [(READ, ACCESSED), (WRITE, ACCESSED | DIRTY)])
def test_an_access_sets_accessed_and_a_write_sets_dirty_where_the_eptp_enables_them(code: str, flags: int) -> None:
    entry = PAGE | WRITE_BACK | 7

    assert data(entry, code, (EPT_DATA, 8), **FLAGS).run().differs({**NO_EXIT, "dump": quad(entry | flags)}) == {}
    assert data(entry, code, (EPT_DATA, 8)).run().differs({**NO_EXIT, "dump": quad(entry)}) == {}


@pytest.mark.parametrize("table", TABLES)
def test_every_entry_on_the_way_is_accessed_and_none_of_them_dirty(table: int) -> None:
    got = Guest(fields=FLAGS, dump=(table, 8)).run()

    assert int.from_bytes(bytes.fromhex(got.dump), "little") & (ACCESSED | DIRTY) == ACCESSED


def test_a_walk_of_the_guests_tables_counts_as_a_write_of_them() -> None:
    """With the flags enabled, the page of CR3 (808000H) becomes dirty by being walked."""
    with_flags = Guest(fields=FLAGS, dump=(EPT_GUEST_ROOT, 8)).run()
    without = Guest(dump=(EPT_GUEST_ROOT, 8)).run()

    assert int.from_bytes(bytes.fromhex(with_flags.dump), "little") & (ACCESSED | DIRTY) == ACCESSED | DIRTY
    assert int.from_bytes(bytes.fromhex(without.dump), "little") & (ACCESSED | DIRTY) == 0


@pytest.mark.parametrize(("flags", "tried"), [(FLAGS, e.Q_READ | e.Q_WRITE), ({}, e.Q_READ)])
def test_a_walk_of_guest_tables_that_ept_forbids_is_a_violation_of_the_kind_it_counts_as(
    flags: dict[str, int], tried: int
) -> None:
    got = Guest(fields=flags, memory={EPT_GUEST_ROOT: quad(0x808000 | WRITE_BACK)}).run()

    assert got.differs({"reason": x.EPT_VIOLATION}) == {}
    assert int(got.at("qualification") or 0) & (e.Q_READ | e.Q_WRITE | e.Q_FETCH | e.Q_LINEAR_VALID | e.Q_FINAL) == (
        tried | e.Q_LINEAR_VALID
    )


def test_an_access_that_ept_refuses_sets_no_flag() -> None:
    entry = PAGE | WRITE_BACK | 5

    assert (
        data(entry, WRITE, (EPT_DATA, 8), **FLAGS).run().differs({"reason": x.EPT_VIOLATION, "dump": quad(entry)}) == {}
    )


def test_a_fetch_sets_accessed_alone() -> None:
    got = Guest(fields=FLAGS, dump=(EPT_CODE, 8)).run()

    assert int.from_bytes(bytes.fromhex(got.dump), "little") & (ACCESSED | DIRTY) == ACCESSED
