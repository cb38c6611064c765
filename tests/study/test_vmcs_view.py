"""`vtsim vmcs fields` and `vtsim vmcs show`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from vtsim.cli import main
from vtsim.study.vmcs_view import fields_json, matching
from vtsim.vmcs.fields import FIELDS

SMALL = (
    "vmm: {ept: {populate: prebuilt}}\n"
    "vms:\n- guest:\n    kernel: {tick: off}\n    processes:\n    - phases:\n      - {primitive: cpuid}\n"
)
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def command(*arguments: object) -> tuple[int, str, str]:
        status = main(["vmcs", *map(str, arguments)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return command


@pytest.fixture
def scenario(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


# --- fields ---------------------------------------------------------------------------------------------------------


def test_fields_are_found_by_a_part_of_their_name_or_by_encoding(run: Run) -> None:
    status, out, _ = run("fields", "eptp")

    assert status == 0
    assert out == (
        "Control fields     encoding  bits  access     exists with\n"
        "──────────────────────────────────────────────────────────────\n"
        "EPTP_INDEX           0x0004    16  full       EPT_VIOLATION_VE\n"
        "EPTP_LIST_ADDRESS  0x2024/5    64  full+high  EPTP_SWITCHING\n"
    )
    assert [field.name for field in matching("0x681e")] == ["GUEST_RIP"]
    assert [field.name for field in matching("0x201B")] == ["EPT_POINTER"]
    assert [field.name for field in matching("4402")] == ["EXIT_REASON"]


def test_a_heading_writes_vm_exit_as_the_manual_does(run: Run) -> None:
    assert run("fields", "4402")[1].startswith("VM-exit information fields ")


def test_without_a_pattern_all_fields_are_listed() -> None:
    assert matching("") == FIELDS


def test_a_pattern_that_matches_nothing_is_the_users_mistake(run: Run) -> None:
    status, out, err = run("fields", "nothing")

    assert (status, out) == (2, "")
    assert err == (
        "PATTERN: no VMCS field matches 'nothing'\n"
        " help: a part of a name is accepted, as in GUEST_CS, or an encoding, as in 0x681e or 681e\n"
    )


def test_fields_as_json_name_the_capability_that_brings_them() -> None:
    (found,) = json.loads(fields_json("TSC_MULTIPLIER"))["fields"]

    assert found == {
        "encoding": "0x2032", "high_encoding": "0x2033", "name": "TSC_MULTIPLIER", "bits": 64, "width": "64",
        "area": "control", "read_only": False,
        "exists_with": [{"feature": "USE_TSC_SCALING", "msr": "IA32_VMX_PROCBASED_CTLS2", "bit": 57}],
    }  # fmt: skip


# --- show -----------------------------------------------------------------------------------------------------------


def test_show_prints_the_groups_of_the_manual_with_words(run: Run, scenario: Path) -> None:
    status, out, _ = run("show", scenario, "--at", "60 us")
    lines = out.splitlines()

    assert status == 0
    assert lines[0].startswith("VMCS of vm0, at cycle ")
    assert lines[1].endswith(", CPU 0, launched, current")
    headings = [
        "Guest segments", "Guest-state area", "Host-state area", "VM-execution control fields",
        "VM-exit control fields", "VM-entry control fields", "VM-exit information fields",
    ]  # fmt: skip
    assert [line for line in headings if any(row.startswith(line) for row in lines)] == headings
    (reason,) = (row.split() for row in lines if row.startswith("EXIT_REASON"))
    assert reason == ["EXIT_REASON", "0xa", "CPUID"]


def test_a_vmcs_that_was_never_entered_is_said_to_be_so(run: Run, scenario: Path) -> None:
    status, out, _ = run("show", scenario, "--at", "1 us")

    assert status == 0
    assert out.splitlines()[1].endswith(", clear, not current")
    assert "No VM entry has been made with it yet." in out
    assert "came to its end" not in out


def test_show_as_json_has_every_field_of_the_processor(run: Run, scenario: Path) -> None:
    status, out, _ = run("show", scenario, "--at", "60 us", "--json")
    (shown,) = json.loads(out)["vmcs"]

    assert status == 0
    assert (shown["vm"], shown["cpu"], shown["launched"], shown["current"]) == ("vm0", 0, True, True)
    assert shown["fields"]["EXIT_REASON"] == {"value": "0xa", "meaning": "CPUID"}
    assert set(shown["fields"]) < {field.name for field in FIELDS}


def test_show_takes_the_directory_of_a_result(run: Run, scenario: Path, tmp_path: Path) -> None:
    (tmp_path / "resolved.yaml").write_text(SMALL)

    assert run("show", tmp_path, "--at", "60 us")[0] == 0


def test_show_of_a_directory_without_a_result_is_the_users_mistake(run: Run, tmp_path: Path) -> None:
    status, _, err = run("show", tmp_path)

    assert status == 2
    assert (
        err == f"RUN: there is no resolved.yaml in {tmp_path}\n help: RUN is a scenario, or what run --output wrote\n"
    )


@pytest.mark.parametrize(
    ("at", "message"),
    [
        ("banana", "'banana' is not a duration"),
        ("", "nothing is not a duration"),
        ("-5ms", "'-5ms' is less than 1 us"),
        ("0", "0 is less than 1 us"),
    ],
)
def test_a_time_that_is_none_is_said_of_the_option(run: Run, scenario: Path, at: str, message: str) -> None:
    status, out, err = run("show", scenario, f"--at={at}")

    assert (status, out) == (2, "")
    assert err == (f"--at: {message}\n help: a duration is written like '250 us' (ns, us, ms, s, µs), from 1 us\n")


def test_a_native_run_has_no_vmcs(run: Run, scenario: Path) -> None:
    status, _, err = run("show", scenario, "--set", "vmm.technique=native")

    assert status == 2
    assert err == (
        "--set vmm.technique=native: vmm.technique: a native run has no VMCS\n"
        " help: vmm.technique can be hardware, which uses VMX\n"
    )
