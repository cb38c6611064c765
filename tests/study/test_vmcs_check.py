"""`vtsim vmcs check`: which checks a VMCS fails, and mistakes in the file that says what it holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import pytest

from vtsim.cli import main

LEGAL = "base: b64e\n"
ILLEGAL = """\
base: b64e
ept_pointer: 0x81001b
HOST_CS_SELECTOR: 0
GUEST_DS_ACCESS_RIGHTS: 0xc092
VMCS_LINK_POINTER: -1
"""


class Ended(NamedTuple):
    status: int
    out: str
    err: str


def check(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, *options: str) -> Ended:
    path = tmp_path / "state.yaml"
    path.write_text(text)
    capsys.readouterr()
    status = main(["vmcs", "check", str(path), *options])
    captured = capsys.readouterr()
    return Ended(status, captured.out, captured.err.replace(f"{tmp_path}/", ""))


def test_a_legal_state_enters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = check(tmp_path, capsys, LEGAL)

    assert (done.status, done.out) == (0, "VM entry succeeds\non corei7_skylake_x\n")


def test_each_list_names_its_first_failed_check_with_the_fields_that_decide(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = check(tmp_path, capsys, ILLEGAL, "--json")
    report = json.loads(done.out)

    assert done.status == 1
    assert report["outcome"] == "VM entry fails with error 7, VM entry with invalid control field(s)"
    assert [(each["section"], each["check"], each["fields"]) for each in report["failures"]] == [
        ("VM-Execution Control Fields", "EPTP_MEMORY_TYPE", {"EPT_POINTER": "0x81001b"}),
        ("Checks on Host Segment and Descriptor-Table Registers", "HOST_CS_ZERO", {"HOST_CS_SELECTOR": "0x0"}),
        ("Checks on Guest Segment Registers", "TYPE_DS", {"GUEST_DS_ACCESS_RIGHTS": "0xc092"}),
    ]


def test_an_entry_that_fails_after_all_checks_is_a_failure_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = check(tmp_path, capsys, "base: b64\nENTRY_MSR_LOAD_COUNT: 512\nENTRY_MSR_LOAD_ADDRESS: 0\n")

    assert done.status == 1
    assert done.out.startswith("VM entry fails: exit reason 34, MSR_LOAD_FAIL, qualification 1\n")


def test_a_report_says_the_rule_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = check(tmp_path, capsys, "base: b64e\nHOST_CS_SELECTOR: 0\n")

    assert done.out == (
        "VM entry fails with error 8, VM entry with invalid host-state field(s)\non corei7_skylake_x\n\n"
        "Checks on Host Segment and Descriptor-Table Registers\n"
        "  HOST_CS_ZERO: the selector must not be 0\n"
        "    HOST_CS_SELECTOR                      0x0\n"
    )


def test_a_profile_says_what_the_processor_can_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = check(tmp_path, capsys, "base: b64e\nprofile: nehalem-ep\nEPT_POINTER: 0x81005e\n", "--json")

    assert "EPTP_ACCESSED_DIRTY" in [each["check"] for each in json.loads(done.out)["failures"]]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (
            "GUEST_RIPP: 1\n",
            "state.yaml:1: unknown VMCS field 'GUEST_RIPP'\n    1 | GUEST_RIPP: 1\n      | ^\n"
            " help: did you mean 'GUEST_RIP'?\n",
        ),
        (
            "base: b65\n",
            "state.yaml:1: base: unknown base state 'b65'\n    1 | base: b65\n      |       ^\n"
            " help: did you mean 'b64'?\n",
        ),
        (
            "VPID: 0x10000\n",
            "state.yaml:1: VPID: 0x10000 does not fit in the 16 bits of the field\n    1 | VPID: 0x10000\n"
            "      |       ^\n help: a number is accepted, as in 0x80000031; -1 sets all bits\n",
        ),
        (
            "VPID: one\n",
            "state.yaml:1: VPID: 'one' is no number\n    1 | VPID: one\n      |       ^\n"
            " help: a number is accepted, as in 0x80000031; -1 sets all bits\n",
        ),
        (
            "base:\n",
            "state.yaml:1: base: this is no name\n    1 | base:\n      |      ^\n"
            " help: the name of a base state of the recordings is accepted, as in b64e\n",
        ),
        (
            "profile: [1]\n",
            "state.yaml:1: profile: this is no name\n    1 | profile: [1]\n      |          ^\n"
            " help: the name of a profile is accepted, as 'vtsim list profile' shows them\n",
        ),
        (
            "GUEST_RIP: 1\nguest_rip: 2\n",
            "state.yaml:2: field 'GUEST_RIP' is given twice\n    2 | guest_rip: 2\n      | ^\n"
            " help: the first is in line 1\n",
        ),
        (
            f"VPID: 0x{200 * 'f'}\n",
            f"state.yaml:1: VPID: 0x{38 * 'f'}… does not fit in the 16 bits of the field\n"
            f"    1 | VPID: 0x{92 * 'f'}\n      |       ^\n"
            " help: a number is accepted, as in 0x80000031; -1 sets all bits\n",
        ),
        (
            "VPID: -5\n",
            "state.yaml:1: VPID: -5 does not fit in the 16 bits of the field\n    1 | VPID: -5\n      |       ^\n"
            " help: a number is accepted, as in 0x80000031; -1 sets all bits\n",
        ),
        (
            "- 1\n",
            "state.yaml:1: there is no mapping of fields in it\n    1 | - 1\n      | ^\n"
            " help: write fields as in 'GUEST_RIP: 0x401000'\n",
        ),
    ],
)
def test_a_mistake_in_the_file_is_shown_where_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, error: str
) -> None:
    done = check(tmp_path, capsys, text)

    assert (done.status, done.out, done.err) == (2, "", error)
