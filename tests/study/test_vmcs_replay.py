"""Replay of recorded VMX cases: what is held against what, what is printed, and what a wrong file is told."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vtsim.base.errors import ModelError
from vtsim.cli import REPORT_IT, main
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
        "explained": 0,
        "unexplained": 2,
        "explanations": [],
        "broken": [],
        "mistakes": [],
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

# name: what is in the file, path and message, what the caret points at, help
A_NUMBER = 'a hexadecimal string is accepted, as in "0x10", or an integer'
ROOT_KEYS = {key: READ[key] for key in ("id", "model", "cat", "base")}
REGISTERS = "rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15"
WRONG_FILES: dict[str, tuple[object, str, str, str]] = {
    "not JSON": ('{"id": }', "this is not JSON", "}", "each line is one case, a JSON object"),
    "a list": ("[1]", "this is no JSON object", "[", "each line is one case, a JSON object"),
    "a list of lists": (9000 * "[", "this is nested too deeply", "[", "each line is one case, a JSON object"),
    "no id": ({**ROOT_KEYS, "id": 5}, "id: 5 is no name", "5", "a string is accepted"),
    "no category": (
        {"id": "x", "model": MODEL, "base": "b64"}, "'cat' is missing", "{",
        "a case has id, model, cat, base and an outcome"),
    "no outcome": (ROOT_KEYS, "'outcome' is missing", "{", 'an object with "kind"; or "outcomes", a list of them'),
    "a key that is given twice": (
        json.dumps(READ)[:-1] + ', "base": "b32"}', "base: this key is given twice", '"base": "b32"', "give it once"),
    "a register that is given twice": (
        json.dumps(EXIT).replace('{"rax": "0x5"}', '{"rax": "0x5", "rax": "0x6"}'),
        "gpr.rax: this key is given twice", '"rax": "0x6"', "give it once"),
    "a misspelt key": (
        {**EXIT, "setps": []}, "setps: unknown key 'setps'", '"setps"', "did you mean 'steps'?"),
    "a misspelt key of an outcome": (
        {**EXIT, "outcome": {"kind": "exit", "reason": 10, "qualificaton": 1}},
        "outcome.qualificaton: unknown key 'qualificaton'", '"qualificaton"', "did you mean 'qualification'?"),
    "an exit without a reason": (
        {**EXIT, "outcome": {"kind": "exit"}}, "outcome: an outcome of kind 'exit' needs 'reason'", "{",
        'as in {"kind": "exit", "reason": 10, "instruction_length": 2}'),
    "an unknown base": ({**READ, "base": "b65"}, "base: unknown base state 'b65'", '"b65"', "did you mean 'b64'?"),
    "an unknown processor": (
        {**READ, "model": "none"},
        "model: there is no base_states.none.json in {folder}, nor is it shipped", '"none"',
        f"base states are there of {MODEL}"),
    "a colour for a category": (
        {**READ, "cat": "\x1b[2J"}, "cat: this cannot be printed", '"\\u001b',
        "at most 120 printable characters are accepted"),
    "a processor with a long name": (
        {**READ, "model": 200 * "x"}, "model: this cannot be printed", '"xxx',
        "at most 120 printable characters are accepted"),
    "no result": (
        {**READ, "outcomes": [{"kind": "op", "op": "vmread", "result": []}]},
        "outcomes[0].result: a list is no word", "[]", "as in 'ok' or 'vmfail_valid'"),
    "a misspelt kind": (
        {**EXIT, "outcome": {"kind": "vmfail_vaild", "error": 7}},
        "outcome.kind: unknown kind of outcome 'vmfail_vaild'", '"vmfail_vaild"', "did you mean 'vmfail_valid'?"),
    "a dispute about nothing": (
        {**READ, "disputed": {"why": ["x"]}}, "disputed.sdm_reading: this is no reading of the manual", '{"why"',
        "sdm_reading is an object, null, or one of fail7, fail8, fail33"),
    "a step that is no number": (
        {**READ, "steps": [["vmread", "xyz"]]}, "steps[0][1]: 'xyz' is no number", '"xyz"', A_NUMBER),
    "a step without its number": (
        {**READ, "steps": [["vmwrite", "0x6800"]]}, "steps[0]: vmwrite needs 2 numbers, and has 1", '["vmwrite"',
        'it is written as in ["vmwrite", "0x0", "0x403000"]'),
    "a word for a step without its number": (
        {**READ, "steps": ["vmread"]}, "steps[0]: vmread needs a number, and has none", '"vmread"',
        'it is written as in ["vmread", "0x6800"]'),
    "a misspelt step": (
        {**READ, "steps": [["vmraed", "0x0"]]}, "steps[0][0]: unknown step 'vmraed'", '"vmraed"',
        "did you mean 'vmread'?"),
    "a step that is no word": (
        {**READ, "steps": [5]}, "steps[0]: 5 is no step", "5",
        'a word is accepted, as in "resume", or ["vmread", "0x6800"]'),
    "steps that are no list": (
        {**READ, "steps": "resume"}, "steps: 'resume' is no list", '"resume"', 'a list is accepted, as in ["resume"]'),
    "an unknown register": (
        {**EXIT, "gpr": {"rxx": "0x1"}}, "gpr.rxx: unknown register 'rxx'", '"rxx"', f"registers here are {REGISTERS}"),
    "a misspelt register": (
        {**EXIT, "gpr": {"RAX": "0x1"}}, "gpr.RAX: unknown register 'RAX'", '"RAX"', "did you mean 'rax'?"),
    "a register with too much in it": (
        {**EXIT, "gpr": {"rax": "0x10000000000000000"}},
        "gpr.rax: '0x10000000000000000' does not fit in the 64 bits of a number", '"0x1000',
        "a number from 0 to 0xffffffffffffffff is accepted"),
    "a control register that cases cannot set": (
        {**EXIT, "creg": {"cr3": "0x0"}}, "creg.cr3: unknown control register 'cr3'", '"cr3"',
        "control registers here are cr2, dr0, dr1, dr2, dr3, dr6"),
    "an instruction that enters nothing": (
        {**EXIT, "run": "vmcall"}, "run: 'vmcall' enters no guest", '"vmcall"',
        "vmlaunch or vmresume is accepted, or null"),
    "memory that is no pair": (
        {**EXIT, "mem": [["0x800000"]]}, "mem[0]: a list is no pair", '["0x800000"]',
        'a list of two is accepted, as in ["0x800000", "0fa2"]'),
    "half a byte": (
        {**EXIT, "mem": [["0x800000", "0fa"]]}, "mem[0][1]: '0fa' is no row of bytes", '"0fa"',
        'two hexadecimal digits a byte are accepted, as in "0fa2"'),
    "a dump without an end": (
        {**EXIT, "dump": [["0x800000", "0x1000000000"]]}, "dump[0][1]: '0x1000000000' is too long for a dump",
        '"0x1000000000"', "at most 65536 bytes are accepted"),
    "code of no size": (
        {**EXIT, "insn": {"bits": 8, "asm": "nop", "bytes": "90"}}, "insn.bits: 8 is no size of code", "8",
        "16, 32 or 64 is accepted"),
    "a word for true": (
        {**EXIT, "mov_ss_blocking": "yes"}, "mov_ss_blocking: 'yes' is neither true nor false", '"yes"',
        "true or false is accepted"),
    "an interrupt without a value": (
        {**EXIT, "pre": [["selfirq"]]}, "pre[0]: this is nothing that can be done before", '["selfirq"]',
        'as in ["selfirq", "0x0", "0x4041"]'),
    "a misspelt field": (
        {**EXIT, "vmcs": {"guest_ripp": "0x1"}}, "vmcs.guest_ripp: unknown VMCS field 'guest_ripp'", '"guest_ripp"',
        "did you mean 'guest_rip'?"),
    "a misspelt field of the table": (
        {**EXIT, "vmcs": {"GUEST_CS_ACCES_RIGHTS": "0x1"}},
        "vmcs.GUEST_CS_ACCES_RIGHTS: unknown VMCS field 'GUEST_CS_ACCES_RIGHTS'", '"GUEST_CS_ACCES',
        "did you mean 'GUEST_CS_ACCESS_RIGHTS'?"),
    "no field at all": (
        {**EXIT, "vmcs": {"colour": "0x1"}}, "vmcs.colour: unknown VMCS field 'colour'", '"colour"',
        "'vtsim vmcs fields' lists the names; those of the recordings are read too"),
    "a value wider than its field": (
        {**EXIT, "vmcs": {"vpid": "0x10000"}}, "vmcs.vpid: '0x10000' does not fit in the 16 bits of VPID", '"0x10000"',
        "a number from 0 to 0xffff is accepted"),
    "a field by both of its names": (
        {**EXIT, "vmcs": {"guest_rip": "0x1", "GUEST_RIP": "0x2"}}, "vmcs.GUEST_RIP: this is 'guest_rip' again",
        '"GUEST_RIP"', "give the field once"),
    "a field that is true": (
        {**EXIT, "vmcs": {"vpid": True}}, "vmcs.vpid: true is no number", "true", A_NUMBER),
    "a field below zero": (
        {**EXIT, "vmcs": {"vpid": -1}}, "vmcs.vpid: -1 does not fit in the 16 bits of VPID", "-1",
        "a number from 0 to 0xffff is accepted"),
    "fields that are a list": (
        {**EXIT, "vmcs": ["guest_rip"]}, "vmcs: a list is no object", '["guest_rip"]',
        'an object is accepted, as in {"guest_rip": "0x800000"}'),
    "an unknown field of an outcome": (
        {**EXIT, "outcome": {"kind": "exit", "reason": 10, "vmcs": {"guest_rippp": "0x1"}}},
        "outcome.vmcs.guest_rippp: unknown VMCS field 'guest_rippp'", '"guest_rippp"', "did you mean 'guest_rip'?"),
    "a number with a point": ({**EXIT, "gpr": {"rax": 1.5}}, "gpr.rax: 1.5 is no number", "1.5", A_NUMBER),
    "a bad outcome": (
        {**READ, "outcomes": [{"kind": "op", "op": "vmwrite", "result": "ok", "value": "what"}]},
        "outcomes[0].value: 'what' is no number", '"what"', A_NUMBER),
}  # fmt: skip


def assert_shown(err: str, path: Path, message: str, caret: str, help: str) -> None:
    """One problem of line 1: what, the line with a caret under what is meant, and what would be accepted."""
    first, source, pointer, last = err.splitlines()
    assert first == f"{path}:1: {message}"
    assert source[pointer.index("^") :].startswith(caret)
    assert last == f" help: {help}"


@pytest.mark.parametrize("name", WRONG_FILES)
def test_a_wrong_case_is_reported_with_its_line_its_place_and_what_is_accepted(
    run: Run, write: Write, name: str
) -> None:
    case, message, caret, help = WRONG_FILES[name]
    path = write(case)
    status, out, err = run(path, "--json")

    assert status == 2
    assert_shown(err, path, message.format(folder=path.parent), caret, help)
    assert (json.loads(out)["differ"], len(json.loads(out)["mistakes"])) == (0, 1)


def test_a_wrong_case_does_not_keep_the_others_from_running(run: Run, write: Write) -> None:
    bad = {**READ, "steps": [["vmread", "xyz"]]}
    status, out, err = run(write(READ, bad, WRONG, *25 * [bad]), "--json")
    counts = json.loads(out)

    assert (status, counts["agree"], counts["differ"], len(counts["mistakes"])) == (2, 1, 1, 26)
    assert counts["mistakes"][0] == {"line": 2, "path": "steps[0][1]", "message": "'xyz' is no number"}
    assert err.endswith("\n\nand 25 more like these\n")


def test_a_key_that_no_case_has_is_ignored_with_a_note(run: Run, write: Write) -> None:
    path = write(
        {**READ, "colour": "red", "note": []}, {**READ, "colour": "blue"}, {**READ, "sources": 2, "notes": ["x"]}
    )
    status, out, err = run(path)

    assert (status, out.splitlines()[-1].split()) == (0, ["all", "3", "0"])
    assert err == (
        f"{path}:1: note: a case has no key 'colour'; it is ignored\n"
        f"{path}:1: note: a case has no key 'note'; it is ignored\n"
    )


def test_a_step_that_nobody_knows_skips_its_case(run: Run, write: Write) -> None:
    status, out, err = run(path := write({**READ, "steps": ["getsec"]}), "--json")

    assert (status, json.loads(out)["skips"]) == (2, {"no step 'getsec' in root operation": 1})
    assert err == f"{path}: nothing was compared: 1 skipped\n"


def test_a_file_without_cases_is_said_to_be_so(run: Run, write: Write) -> None:
    status, _, err = run(path := write())

    assert (status, err) == (2, f"{path}: nothing was compared: there is no case in it\n")


def test_fields_may_have_the_names_of_the_field_table(run: Run, write: Write) -> None:
    entry = {
        "id": "entry-1",
        "model": MODEL,
        "cat": "x",
        "base": "b64",
        "outcome": {"kind": "vmfail_valid", "error": 8},
    }
    status, out, _ = run(
        write({**entry, "vmcs": {"HOST_CS_SELECTOR": "0x0"}}, {**entry, "vmcs": {"host_cs_selector": 0}}), "--json"
    )

    assert (status, json.loads(out)["agree"]) == (0, 2)


# --- base states of the user's ---------------------------------------------------------------------------------------

STATES: dict[str, Any] = {"msrs": {}, "cpuid": {}, "physical_address_width": 40, "bases": {}}
WRONG_STATES: dict[str, tuple[object, str, str, str]] = {
    "not JSON": ('{"msrs": }', "this is not JSON", "}", "a JSON object is accepted here"),
    "an MSR twice": (
        '{"msrs": {"0x480": "0x1", "0x480": "0x2"}}', "msrs.0x480: this key is given twice", '"0x480": "0x2"',
        "give it once"),
    "no base": ({**STATES, "bases": []}, "bases: a list is no object", "[]",
                'an object is accepted, as in {"b64": {"guest_rip": "0x800000"}}'),
    "no MSR": ({**STATES, "msrs": {"basic": "0x1"}}, "msrs.basic: 'basic' is no MSR", '"basic"',
               'as in {"0x480": "0xd810000000002b"}'),
    "no value": ({**STATES, "msrs": {"0x480": None}}, "msrs.0x480: null is no number", "null", A_NUMBER),
    "half a leaf": ({**STATES, "cpuid": {"7.0": ["0x0"]}}, "cpuid.7.0: a list is no answer of CPUID", '["0x0"]',
                    'EAX, EBX, ECX and EDX are accepted, as in ["0x16", "0x0", "0x0", "0x0"]'),
    "a wide address": ({**STATES, "physical_address_width": 64},
                       "physical_address_width: 64 is no width of addresses", "64", "32 to 52 is accepted"),
    "no width": ({key: STATES[key] for key in ("msrs", "cpuid", "bases")}, "'physical_address_width' is missing", "{",
                 "it is written as in the shipped file"),
    "a field": ({**STATES, "bases": {"b64": {"guest_rippp": "0x0"}}},
                "bases.b64.guest_rippp: unknown VMCS field 'guest_rippp'", '"guest_rippp"', "did you mean 'guest_rip'?"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_STATES)
def test_a_wrong_file_of_base_states_is_reported_with_its_place(
    run: Run, write: Write, tmp_path: Path, name: str
) -> None:
    states, message, caret, help = WRONG_STATES[name]
    folder = tmp_path / "states"
    folder.mkdir()
    shipped = Path(module.__file__).parent / "data"
    (folder / "memory_image.json.gz").write_bytes((shipped / "memory_image.json.gz").read_bytes())
    file = folder / f"base_states.{MODEL}.json"
    file.write_text(states if isinstance(states, str) else json.dumps(states))
    status, _, err = run(write(READ), "--base-states", folder)

    assert status == 2
    assert_shown(err, file, message, caret, help)


WRONG_IMAGES: dict[str, tuple[object, str, str, str]] = {
    "no pages": ({"regions": [], "fields": {}}, "'pages' is missing", "{", "it is written as in the shipped file"),
    "no bytes": ({"regions": [{"addr": "0x0", "zlib_base64": "????"}], "pages": {}, "fields": {}},
                 "regions[0].zlib_base64: these are no packed bytes", '"????"',
                 "zlib-packed bytes in base64 are accepted, as in the shipped file"),
    "half a page": ({"regions": [{"addr": "0x10", "zlib_base64": ""}], "pages": {}, "fields": {}},
                    "regions[0].addr: '0x10' is not where a page begins", '"0x10"', "a multiple of 0x1000 is accepted"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_IMAGES)
def test_a_wrong_memory_image_is_reported_with_its_place(run: Run, write: Write, tmp_path: Path, name: str) -> None:
    image, message, caret, help = WRONG_IMAGES[name]
    folder = tmp_path / "states"
    folder.mkdir()
    (folder / f"base_states.{MODEL}.json").write_text(json.dumps(STATES))
    file = folder / "memory_image.json"
    file.write_text(json.dumps(image))
    status, _, err = run(write(READ), "--base-states", folder)

    assert status == 2
    assert_shown(err, file, message, caret, help)


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
    message = f"model: there is no base_states.{MODEL}.json in {tmp_path}/empty"
    assert_shown(err, path, message, f'"{MODEL}"', "see --base-states")


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

    verdict = verdict_of(EXIT, write)
    assert verdict.differences == (Difference("kind", "exit", "IndexError: out of range"),)
    assert isinstance(verdict.broken, IndexError)


def test_what_breaks_the_model_is_reported_after_the_other_cases_were_run(
    run: Run, write: Write, driver: dict[str, Any]
) -> None:
    def broken(case: Case, environment: Environment) -> object:
        raise ModelError("the guest of a case stopped the engine", {"stop": 14})

    driver["exit"], driver["root"] = broken, lambda case, environment: READ["outcomes"][:1]
    status, out, err = run(write(EXIT, {**READ, "outcomes": READ["outcomes"][:1]}), "--json")
    counts = json.loads(out)

    assert (status, counts["agree"], counts["differ"]) == (3, 1, 1)
    assert counts["broken"] == [{"id": "exit-1", "error": "the guest of a case stopped the engine: stop=14"}]
    assert err.startswith("case exit-1: model error: the guest of a case stopped the engine\n  stop = 14\nvtsim ")
    assert err.endswith(f"\n{REPORT_IT}\n")


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
