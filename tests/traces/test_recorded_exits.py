"""Tables of what a real hypervisor did are read whole or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vtsim.base.errors import ConfigError
from vtsim.guest.traces.recorded_exits import TABLES, RecordedExits

GOOD: dict[str, Any] = {
    "format": "vtsim-recorded-exits",
    "version": 1,
    "source": "a test",
    "phases": ["a", "b"],
    "not_recorded": ["EXTERNAL_INTERRUPT"],
    "time_dependent_reasons": ["HLT"],
    "time_dependent_accesses": [],
    "tables": {name: {} for name in TABLES} | {"reasons": {"CPUID": [2, 3]}},
}


def write(path: Path, **changes: Any) -> Path:
    path.write_text(json.dumps(GOOD | changes))
    return path


def refusal(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        RecordedExits.load(path)
    return str(caught.value)


def test_a_total_is_the_sum_over_phases(tmp_path: Path) -> None:
    assert RecordedExits.load(write(tmp_path / "e.json")).total("reasons") == {"CPUID": 5}


def test_a_missing_table_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "e.json", tables={})

    assert refusal(path) == f"{path}: recorded exits lack or misuse 'reasons'"


def test_tables_but_the_reasons_may_be_absent(tmp_path: Path) -> None:
    path = tmp_path / "e.json"
    few = {key: GOOD[key] for key in ("format", "version", "source", "phases")} | {"a key of others": 1}
    path.write_text(json.dumps(few | {"tables": {"reasons": {"CPUID": [2, 3]}}}))
    found = RecordedExits.load(path)

    assert (found.total("reasons"), found.total("ports"), found.not_recorded) == ({"CPUID": 5}, {}, ())


def test_reasons_have_our_names_whoever_spelt_them(tmp_path: Path) -> None:
    theirs = {"EXIT_REASON_CPUID": [1, 0], "cpuid": [1, 1], "PENDING_INTERRUPT": [4, 0], "npf": [7, 7]}
    path = write(tmp_path / "e.json", tables={"reasons": theirs}, time_dependent_reasons=["hlt"])
    found = RecordedExits.load(path)

    assert found.total("reasons") == {"CPUID": 3, "INTERRUPT_WINDOW": 4, "npf": 14}
    assert found.time_dependent_reasons == {"HLT"}


def test_a_count_too_few_is_named_with_its_key(tmp_path: Path) -> None:
    path = write(tmp_path / "e.json", tables=GOOD["tables"] | {"msrs": {"read:0x10": [1]}})

    assert refusal(path) == f"{path}: recorded exits lack or misuse read:0x10: 1 counts for 2 phases"


def test_a_wrong_version_is_refused_with_the_known_one(tmp_path: Path) -> None:
    path = write(tmp_path / "e.json", version=9)

    assert refusal(path) == (f"{path}: version 9 of recorded exits is not known\n help: this vtsim reads version 1")


def test_another_json_file_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "e.json", format="other")

    assert refusal(path) == (f'{path}: not a table of recorded exits\n help: "format": "vtsim-recorded-exits"')


@pytest.mark.parametrize("content", [b"", b"\xff\x00", b"[1]", b"{"])
def test_what_is_not_json_or_no_object_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "e.json"
    path.write_bytes(content)

    assert refusal(path).startswith(f"{path}: not ")


@pytest.mark.parametrize("tables", [{"reasons": 3}, {"reasons": {"CPUID": 3}}, 7])
def test_tables_of_the_wrong_shape_are_refused(tmp_path: Path, tables: Any) -> None:
    path = write(tmp_path / "e.json", tables=tables)

    assert refusal(path).startswith(f"{path}: recorded exits lack or misuse ")
