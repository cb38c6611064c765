"""Replay of recorded VMX cases: what is held against what, what is printed, and what a wrong file is told."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vtsim.cli import main
from vtsim.study.vmx import drivers as door
from vtsim.study.vmx import replay as module
from vtsim.study.vmx.base_states import BaseStates
from vtsim.study.vmx.cases import Case, Environment, read_cases
from vtsim.study.vmx.comparison import Difference, compare
from vtsim.study.vmx.drivers import Skipped

MODEL = "corei7_skylake_x"
READ = {
    "id": "root-1", "model": MODEL, "cat": "storage", "base": "b64", "run": None,
    "steps": [["vmwrite", "0x6800", "0x11"], ["vmread", "0x6800"]],
    "outcomes": [{"kind": "op", "op": "vmwrite", "result": "ok"},
                 {"kind": "op", "op": "vmread", "result": "ok", "value": "0x11"}],
}  # fmt: skip
WRONG = {**READ, "id": "root-2", "outcomes": [READ["outcomes"][0], {**READ["outcomes"][1], "value": "0x12"}]}
FAILS = {
    "id": "root-3", "model": MODEL, "cat": "vmxon_root", "base": "b64", "run": None,
    "steps": [["vmxon", "0x0", "0x402000"]],
    "outcomes": [{"kind": "op", "op": "vmxon", "result": "vmfail_valid", "error": 14}],
}  # fmt: skip
EXIT = {
    "id": "exit-1", "model": MODEL, "cat": "insn", "base": "b64", "gpr": {"rax": "0x5"},
    "insn": {"bits": 64, "asm": "cpuid", "bytes": "0fa2"},
    "outcome": {"kind": "exit", "reason": 10, "instruction_length": 2, "vmcs": {"guest_rip": "0x800010"}},
}  # fmt: skip


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def file(*cases: object, name: str = "cases.jsonl") -> Path:
        path = tmp_path / name
        text = "".join(f"{case if isinstance(case, str) else json.dumps(case)}\n" for case in cases)
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
        return path

    return file


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def command(*arguments: object) -> tuple[int, str, str]:
        status = main(["vmcs", "replay", *map(str, arguments)])
        captured = capsys.readouterr()
        errors = [line for line in captured.err.splitlines(True) if not line.startswith("compiling kernels")]
        return status, captured.out, "".join(errors)

    return command


Run = Callable[..., tuple[int, str, str]]
Write = Callable[..., Path]


# --- what is printed ------------------------------------------------------------------------------------------------


def test_differing_cases_are_shown_part_by_part_and_counted_by_category(
    run: Run, write: Write, golden: Callable[[str, str], None]
) -> None:
    status, out, err = run(write(READ, WRONG, FAILS))

    assert (status, err) == (1, "")
    golden("vmcs_replay.txt", out)


def test_a_file_without_differences_ends_with_status_0(run: Run, write: Write) -> None:
    status, out, _ = run(write(READ))

    assert status == 0
    assert out.splitlines()[-1].split() == ["all", "1", "0"]


def test_all_shows_what_agrees_too(run: Run, write: Write) -> None:
    _, out, _ = run(write(READ), "--all")

    assert out.splitlines()[:2] == ["root-1  storage  agree", "  model     vmwrite succeeds; vmread succeeds"]


def test_a_category_is_no_markup(run: Run, write: Write) -> None:
    status, out, _ = run(write({**READ, "cat": "[red]x[/red] [/oops]"}))

    assert status == 0
    assert "[red]x[/red] [/oops]" in out


def test_an_entry_case_that_overwrites_the_harness_is_skipped_and_harms_no_other(run: Run, write: Write) -> None:
    entry = {"id": "entry-1", "model": MODEL, "cat": "base", "base": "b64", "outcome": {"kind": "exit", "reason": 18}}
    status, out, _ = run(write({**entry, "mem": [["0x202000", "ff"]]}, entry, READ), "--json")
    counts = json.loads(out)

    assert (status, counts["agree"], counts["differ"], counts["skipped"]) == (0, 2, 0, 1)


def test_a_limit_says_how_many_cases_are_not_shown(run: Run, write: Write) -> None:
    _, out, _ = run(write(WRONG, FAILS), "--limit", "1")

    assert "root-3" not in out
    assert "1 of 2 differing cases are shown; --limit shows more" in out


def test_a_packed_file_is_read(run: Run, write: Write) -> None:
    assert run(write(READ, name="cases.jsonl.gz"))[0] == 0


def test_json_is_one_object_with_the_counts_and_every_difference(run: Run, write: Write) -> None:
    unusable = {**READ, "id": "root-4", "usable": False}
    status, out, _ = run(write(READ, WRONG, FAILS, unusable), "--json")

    assert status == 1
    assert json.loads(out) == {
        "agree": 1,
        "differ": 2,
        "skipped": 1,
        "categories": {"storage": {"agree": 1, "differ": 1}, "vmxon_root": {"agree": 0, "differ": 1}},
        "skips": {"recorded as not usable": 1},
        "differences": [
            {"id": "root-2", "path": "outcomes.1.value", "recorded": "0x12", "model": "0x11"},
            {"id": "root-3", "path": "outcomes.0.error", "recorded": "0xe", "model": "0xf"},
        ],
    }


def test_base_states_of_a_folder_come_before_the_shipped_ones(run: Run, write: Write, tmp_path: Path) -> None:
    shipped = Path(module.__file__).parent / "data"
    for name in (f"base_states.{MODEL}.json.gz", "memory_image.json.gz"):
        (tmp_path / name).write_bytes((shipped / name).read_bytes())
    states = json.loads(gzip.decompress((tmp_path / f"base_states.{MODEL}.json.gz").read_bytes()))
    states["msrs"]["0x48b"] = hex(int(states["msrs"]["0x48b"], 16) & ~(1 << 32 + 5))  # without VPID
    (tmp_path / "base_states.plain.json").write_text(json.dumps(states))
    case = {
        **READ, "model": "plain", "steps": [["vmread", "0x0"]],
        "outcomes": [{"kind": "op", "op": "vmread", "result": "vmfail_valid", "error": 12}],
    }  # fmt: skip

    assert run(write(case))[0] == 0
    assert run(write(case, name="other.jsonl"), "--base-states", tmp_path)[0] == 0


# --- a user's mistakes ----------------------------------------------------------------------------------------------

WRONG_FILES = {
    "not JSON": ("{", "{path}:1: is not JSON: Expecting property name enclosed in double quotes: line 2 column 1 (char 2)\n"
                 " help: each line is one case, a JSON object\n"),
    "a list": ("[1]", "{path}:1: is no JSON object\n help: each line is one case, a JSON object\n"),
    "no id": ({"cat": "x"}, "{path}:1: a case needs 'id'\n help: a case has id, model, cat, base and an outcome\n"),
    "no outcome": ({key: READ[key] for key in ("id", "model", "cat", "base")},
                   "{path}:1: root-1 has no recorded outcome\n"
                   ' help: a case has "outcome" (an object with "kind"), or "outcomes"\n'),
    "an unknown base": ({**READ, "base": "b65"}, "{path}:1: base: unknown base state 'b65'\n help: did you mean 'b64'?\n"),
    "an unknown processor": (
        {**READ, "model": "none"},
        "{path}:1: model: there is no base_states.none.json in {folder}, nor is it shipped\n"
        f" help: base states are there of {MODEL}\n"),
    "markup for a category": (
        {**READ, "cat": "\x1b[2J"}, "{path}:1: 'cat' cannot be printed\n help: at most 120 printable characters\n"),
    "a processor with a long name": (
        {**READ, "model": 200 * "x"}, "{path}:1: 'model' cannot be printed\n help: at most 120 printable characters\n"),
    "no result": (
        {**READ, "outcomes": [{"kind": "op", "op": "vmread", "result": []}]},
        "{path}:1: root-1: 'result' is no string\n help: as in 'ok' or 'vmfail_valid'\n"),
    "a dispute about nothing": (
        {**READ, "disputed": None},
        "{path}:1: root-1 is disputed without a reading of the manual\n"
        " help: sdm_reading is an object, null, or one of fail7, fail8, fail33\n"),
    "a bad number": (
        {**READ, "steps": [["vmread", "xyz"]]},
        "{path}:1: root-1: a value cannot be read: invalid literal for int() with base 16: 'xyz'\n"
        ' help: machine state is written as hexadecimal strings ("0x10"), memory as [address, hexadecimal bytes]\n'),
    "a bad outcome": (
        {**READ, "outcomes": [{"kind": "op", "op": "vmwrite", "result": "ok", "value": "what"}]},
        "{path}:1: root-1: the recorded outcome cannot be read: ValueError(\"invalid literal for int() with base 16: 'what'\")\n"
        " help: numbers are integers or hexadecimal strings\n"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_FILES)
def test_a_wrong_case_is_reported_with_its_line_and_what_is_accepted(run: Run, write: Write, name: str) -> None:
    case, text = WRONG_FILES[name]
    path = write(case)
    status, _, err = run(path)

    assert (status, err) == (2, text.format(path=path, folder=path.parent))


def test_a_file_that_is_not_there_is_reported(run: Run, tmp_path: Path) -> None:
    status, out, err = run(tmp_path / "none.jsonl")

    assert (status, out) == (2, "")
    assert err == (
        f"{tmp_path}/none.jsonl: cannot be read: No such file or directory\n help: a .jsonl file, or .jsonl.gz, is accepted\n"
    )


@pytest.mark.parametrize("content", [b"\x1f\x8b\x08broken", b"\xff\xfe\x00", bytes(range(256))])
def test_a_file_of_anything_else_is_reported(run: Run, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "cases.jsonl"
    path.write_bytes(content)
    status, _, err = run(path)

    assert status == 2
    assert err.startswith(f"{path}")
    assert " help: " in err


def test_a_folder_without_base_states_is_reported(run: Run, write: Write, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    path = write(READ)
    status, _, err = run(path, "--base-states", tmp_path / "empty")

    assert status == 2
    assert err == (
        f"{path}:1: model: there is no base_states.{MODEL}.json in {tmp_path}/empty\n help: see --base-states\n"
    )


# --- what is run ----------------------------------------------------------------------------------------------------


def verdict_of(case: dict[str, Any], write: Write) -> module.Verdict:
    path = write(case)
    (verdict,) = module.replay(read_cases(path), BaseStates.beside(path))
    return verdict


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Drivers that do what a test says."""
    made: dict[str, Any] = {}
    monkeypatch.setattr(module, "drivers", made)
    yield made


def test_a_kind_of_case_without_a_driver_is_skipped_with_a_reason(write: Write, driver: dict[str, Any]) -> None:
    verdict = verdict_of(EXIT, write)

    assert (verdict.status, verdict.reason) == ("skipped", "no driver for exit cases")


def test_a_driver_skips_a_case_with_a_reason(write: Write, driver: dict[str, Any]) -> None:
    def no(case: Case, environment: Environment) -> object:
        raise Skipped("no such instruction")

    driver["exit"] = no

    assert verdict_of(EXIT, write).reason == "no such instruction"


def test_what_breaks_the_model_is_a_difference_of_its_case(write: Write, driver: dict[str, Any]) -> None:
    def broken(case: Case, environment: Environment) -> object:
        raise IndexError("out of range")

    driver["exit"] = broken

    assert verdict_of(EXIT, write).differences == (Difference("kind", "exit", "IndexError: out of range"),)


def test_a_field_that_the_table_lacks_skips_the_case(write: Write) -> None:
    verdict = verdict_of({**READ, "vmcs": {"shared_ept_pointer": "0x1"}}, write)

    assert (verdict.status, verdict.reason) == ("skipped", "no such VMCS field: shared_ept_pointer")


@pytest.mark.parametrize(
    ("reading", "outcome"),
    [
        ("fail7", {"kind": "vmfail_valid", "error": 7}), ("fail8", {"kind": "vmfail_valid", "error": 8}),
        ("fail33", {"kind": "entry_failure", "reason": 33, "qualification": 4}),
        ({"reason": 7}, {"kind": "exit", "reason": 7, "qualification": 9}),
        ({"instruction_length": 3}, {"kind": "exit", "reason": 10, "instruction_length": 3, "vmcs": {"GUEST_RIP": 0x800010}}),
    ],
)  # fmt: skip
def test_a_disputed_case_is_held_against_the_manual(
    write: Write, driver: dict[str, Any], reading: object, outcome: dict[str, Any]
) -> None:
    driver["exit"] = lambda case, environment: outcome
    case = {**EXIT, "disputed": {"sdm_reading": reading, "why": ["a fault of the recorder"]}}

    assert verdict_of(case, write).status == "agree"
    driver["exit"] = lambda case, environment: {"kind": "exit", "reason": 18}
    assert verdict_of(case, write).status == "differ"


def test_a_disputed_case_without_a_reading_is_skipped(write: Write) -> None:
    verdict = verdict_of({**READ, "disputed": {"sdm_reading": None, "why": ["x"]}}, write)

    assert verdict.reason == "the recorder contradicts the manual, whose outcome is not given"


# --- which parts are compared ---------------------------------------------------------------------------------------


def differences(write: Write, outcome: dict[str, Any], model: dict[str, Any], **case: Any) -> list[str]:
    """The paths in which a model's outcome differs from a recorded one."""
    path = write({**EXIT, "outcome": outcome, **case})
    (read,) = read_cases(path)
    return [each.path for each in compare(read, BaseStates.beside(path).environment(read), [model])]


VIOLATION = {
    "kind": "exit",
    "reason": 48,
    "qualification": "0x181",
    "guest_linear_address": "0x1000",
    "guest_physical_address": "0x2000",
}
FAULT = {
    "kind": "exit",
    "reason": 0,
    "qualification": "0x1000",
    "interruption_info": "0x80000b0e",
    "interruption_error_code": "0x2",
}
VMREAD = {"kind": "exit", "reason": 23, "instruction_length": 3, "instruction_info": "0x10400118"}
STRING_IN = {
    "kind": "exit",
    "reason": 30,
    "qualification": "0x10018",
    "instruction_length": 1,
    "instruction_info": "0x18100",
}
CHANGES = [
    # recorded            model's value                          path that differs
    (VIOLATION,           {"qualification": 0x182},              "qualification"),
    (VIOLATION,           {"qualification": 0x181 | 0xE00},      None),   # what only some processors report
    (VIOLATION,           {"qualification": 0x1181},             "qualification"),
    (VIOLATION,           {"guest_linear_address": 0},           "guest_linear_address"),
    (VIOLATION,           {"guest_physical_address": 0},         "guest_physical_address"),
    (VIOLATION,           {"instruction_length": 7},             None),
    (FAULT,               {"qualification": 0},                  "qualification"),
    (FAULT,               {"interruption_error_code": 3},        "interruption_error_code"),
    (FAULT,               {"interruption_info": 0x80000B0D},     "interruption_info"),
    (FAULT,               {"idt_vectoring_info": 0x0000_030E},   None),   # not valid
    (FAULT,               {"idt_vectoring_info": 0x8000_030E},   "idt_vectoring_info"),
    (FAULT,               {"instruction_length": 2},             None),
    (VMREAD,              {"instruction_length": 2},             "instruction_length"),
    (VMREAD,              {"qualification": 1},                  "qualification"),
    (VMREAD,              {"instruction_info": 0x20400118},      "instruction_info"),   # another register
    (VMREAD,              {"instruction_info": 0x1040011C},      None),   # a bit without a meaning
    (VMREAD,              {"guest_linear_address": 5},           None),
    (STRING_IN,           {"instruction_info": 0x08100},         None),   # INS has no segment
    (STRING_IN,           {"instruction_info": 0x18080},         "instruction_info"),
    (EXIT["outcome"],     {"reason": 18},                        "reason"),
    (EXIT["outcome"],     {"kind": "entry_failure"},             "kind"),
    (EXIT["outcome"],     {"vmcs": {"GUEST_RIP": 0x800002}},     "vmcs.guest_rip"),
    (EXIT["outcome"],     {"vmcs": {"GUEST_RIP": 0x800010, "GUEST_CR3": 1}}, "vmcs.guest_cr3"),
    (EXIT["outcome"],     {"gpr": {"rax": 6}},                   "gpr.rax"),
]  # fmt: skip


def as_model(outcome: dict[str, Any]) -> dict[str, Any]:
    """A recorded outcome in the form of a driver's."""
    plain = {
        key: int(value, 16) if isinstance(value, str) and key != "kind" else value for key, value in outcome.items()
    }
    if "vmcs" in plain:
        plain["vmcs"] = {name.upper(): int(value, 16) for name, value in plain["vmcs"].items()}
    return plain


@pytest.mark.parametrize(("outcome", "change", "path"), CHANGES)
def test_what_the_manual_defines_is_compared_and_nothing_else(
    write: Write, outcome: dict[str, Any], change: dict[str, Any], path: str | None
) -> None:
    assert differences(write, outcome, as_model(outcome)) == []
    assert [p for p in differences(write, outcome, {**as_model(outcome), **change}) if p == path or path is None] == (
        [path] if path else []
    )


def test_of_an_unusable_segment_only_that_it_is_unusable_counts(write: Write) -> None:
    outcome = {"kind": "exit", "reason": 10, "instruction_length": 2, "vmcs": {"guest_ss_ar": "0x10060"}}
    same = {"GUEST_SS_ACCESS_RIGHTS": 0x1C063, "GUEST_SS_BASE": 5, "GUEST_SS_LIMIT": 7}
    model = {"kind": "exit", "reason": 10, "instruction_length": 2}

    assert differences(write, outcome, {**model, "vmcs": same}) == []
    assert differences(write, outcome, {**model, "vmcs": {**same, "GUEST_SS_ACCESS_RIGHTS": 0x10000}}) == [
        "vmcs.guest_ss_ar"
    ]


def test_registers_that_are_a_matter_of_time_are_not_compared(write: Write) -> None:
    outcome = {**EXIT["outcome"], "gpr": {"rax": "0x123"}}

    assert differences(write, outcome, as_model(EXIT["outcome"])) == ["gpr.rax"]
    assert differences(write, outcome, as_model(EXIT["outcome"]), nondeterministic=["gpr"]) == []


def test_the_other_of_two_legal_failures_agrees(write: Write) -> None:
    outcome = {"kind": "vmfail_valid", "error": 7}
    other = {"also_allowed": {"kind": "vmfail_valid", "error": 8}}

    assert differences(write, outcome, {"kind": "vmfail_valid", "error": 8}, **other) == []
    assert differences(write, outcome, {"kind": "vmfail_valid", "error": 9}, **other) == ["error"]


def test_of_an_entry_case_that_enters_only_that_counts(write: Write) -> None:
    entry = {"id": "entry-1", "insn": None}

    assert differences(write, VIOLATION, {"kind": "exit", "reason": 18}, **entry) == []
    assert differences(write, VIOLATION, {"kind": "vmfail_valid", "error": 7}, **entry) == ["kind"]


def test_every_driver_is_registered_once_and_described() -> None:
    assert set(door.drivers) <= {"entry", "exit", "root"}
    assert all(door.drivers.describe(kind) for kind in door.drivers)
