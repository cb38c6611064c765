"""A recorded guest in columns of others becomes a trace of ours."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from scripts.import_recording import columns_of, convert_exits, phases_of
from scripts.record_guest import convert
from vtsim.guest.traces.format import COLUMNS
from vtsim.guest.traces.kinds import NUMBER

HIGH = 0xFFFF_8880_0000_0000


def table(rows: int = 4) -> dict[str, Any]:
    """Columns in another order and of other widths, with one that nobody asked for."""
    columns = {name: np.zeros(rows, np.uint64) for name in reversed(COLUMNS)}
    columns["kind"] = np.full(rows, NUMBER["OUT"], np.uint16)
    columns["icount"] = np.arange(rows, dtype=np.uint64) * 10
    columns["a0"] = np.array([0x1_00F4, 0x1_0080, 0x1_00F4, 0x1_0080], np.uint64)
    columns["rip"] = np.array([0x7C00, 0x10_0000, 0x100_0000, HIGH], np.uint64)
    columns["n"] = np.ones(rows, np.uint16)
    columns["thread"] = np.array(["a", "b", "c", "d"])
    return columns


def test_columns_are_found_by_name_and_addresses_become_twos_complement() -> None:
    found = columns_of(table())

    assert {name: column.dtype for name, column in found.items()} == {n: np.dtype(d) for n, d in COLUMNS.items()}
    assert int(found["rip"][3]) == HIGH - (1 << 64)


@pytest.mark.parametrize(
    "change, text",
    [({"cr3": None}, "trace.parquet has no column cr3"), ({"vcpu": np.array([0, 1, 0, 0])}, "the rows of one vCPU")],
)
def test_what_is_no_recording_of_one_vcpu_ends_with_a_sentence(change: dict[str, Any], text: str) -> None:
    columns = {name: column for name, column in (table() | change).items() if column is not None}
    with pytest.raises(SystemExit, match=text):
        columns_of(columns)


def starts(given: list[str], wanted: list[str]) -> list[tuple[str, int, int]]:
    return [(p.name, p.first_row, p.icount) for p in phases_of(columns_of(table()), given, wanted)]


def test_phases_are_cut_where_the_guest_shows_them_as_far_as_the_tables_have_them() -> None:
    names = ["bios", "decompressor", "mark2"]

    assert starts([], names) == [("bios", 0, 0), ("decompressor", 1, 10), ("mark2", 3, 21)]
    assert starts([], []) == [("all", 0, 0)]
    assert starts(["a=0", "b=15"], []) == [("a", 0, 0), ("b", 2, 15)]


def test_tables_with_totals_alone_have_one_phase() -> None:
    ours = convert_exits({"total": {"exits": {"CPUID": 3}}})

    assert (ours["phases"], ours["tables"]["reasons"], ours["tables"]["msrs"]) == (["all"], {"CPUID": [3]}, {})


def test_an_access_to_a_device_is_known_by_its_instruction_though_the_kernel_stands_elsewhere() -> None:
    """On shadow tables its first use is a fault like any other; kernels at random addresses move by 2 MiB."""
    eoi, rip, moved = 0xFEE0_00B0, 0xFFFF_FFFF_8106_1234, 37 << 21
    rows = np.zeros(1, convert.ROW)
    rows["kind"], rows["rip"], rows["a0"] = NUMBER["MMIO_W"], rip, eoi
    exits = np.zeros(2, convert.EXIT)
    exits["interruption"], exits["error"] = 1 << 11 | convert.PAGE_FAULT, 2
    exits["info"] = 0xFFFF_FFFF_FF5F_C0B0
    exits["rip"] = rip + moved, rip + moved + 4

    assert convert.tables(exits, convert.devices(rows))["mmio"] == {"write:0xfee000b0": 1}
