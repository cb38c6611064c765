"""Why a replay differs: each recorded difference has one cause, which is a mechanism and cites the manual."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scripts.generate_docs import DOCS
from tests.oracle.replays import DATA, EXITS, replays_of
from vtsim.base import jit
from vtsim.cli import main
from vtsim.study.vmx import replay as module
from vtsim.study.vmx.base_states import BaseStates
from vtsim.study.vmx.evidence import Seen
from vtsim.study.vmx.known_differences import KNOWN, MODEL, NOBODY, RECORDER, rows_for

FILES = ("vmxroot_cases.jsonl.gz", "vmentry_cases.jsonl.gz", EXITS)
SAMPLE = 1 if not jit.DISABLED else 97
MODEL_NAME = "corei7_skylake_x"
LIDT: dict[str, Any] = {
    "id": "exit-1", "model": MODEL_NAME, "cat": "dt_operand", "base": "b32", "gpr": {"rax": "0x828000"},
    "vmcs": {"secondary_proc_controls": "0x4", "proc_controls": "0x84006172"}, "mem": [["0x800000", "0f01180f01c1"]],
    "insn": {"bits": 32, "asm": "lidt [eax]", "bytes": "0f0118"},
    "outcome": {"kind": "exit", "reason": 46, "instruction_length": 3, "instruction_info": "0x30418080"},
}  # fmt: skip


@pytest.fixture
def replayed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    def command(case: dict[str, Any], *options: str) -> tuple[int, str]:
        path = tmp_path / "cases.jsonl"
        path.write_text(json.dumps(case))
        capsys.readouterr()
        return main(["vmcs", "replay", str(path), *options]), capsys.readouterr().out

    return command


def test_every_row_cites_a_section_of_the_bibliography_or_says_that_nobody_can_know() -> None:
    sections = tomllib.loads((DOCS / "references.toml").read_text(encoding="utf-8"))["SDM"]["sections"]

    assert {known.section for known in KNOWN if known.section} <= set(sections)
    assert all(known.section for known in KNOWN if known.whose == RECORDER)
    assert {known.whose for known in KNOWN} == {RECORDER, NOBODY, MODEL}
    assert len({known.name for known in KNOWN}) == len(KNOWN)


def test_no_row_names_a_case() -> None:
    source = (Path(module.__file__).parent / "known_differences.py").read_text(encoding="utf-8")

    assert not re.search(r"corei7|skylake|(entry|exit|root)-\w|\b\d{5}\b", source)


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_each_recorded_difference_has_exactly_one_cause(name: str) -> None:
    where = BaseStates.beside(DATA / name)
    cases, verdicts = replays_of(name, SAMPLE)
    causes: dict[tuple[str, str], list[str]] = {}
    for verdict in verdicts:
        case = cases[verdict.id]
        for each in verdict.differences:
            seen = Seen(case, where.environment(case), each, verdict.recorded[0], verdict.model[0])
            causes[case.id, each.path] = [known.name for known in rows_for(seen)]

    assert [(at, names) for at, names in causes.items() if len(names) != 1] == []


def test_a_replay_says_what_explains_a_difference(replayed: Callable[..., tuple[int, str]]) -> None:
    status, out = replayed(LIDT)

    assert status == 1
    assert (
        "    instruction_info  recorded 0x30418080  model 0x30418880\n"
        "    explained by recorder: operand size of LGDT and its like. "
        'SDM: "Information for VM Exits Due to Instruction Execution".\n'
    ) in out
    assert [line.split() for line in out.splitlines()[-6:] if line and "─" not in line][-2:] == [
        ["explained", "1"],
        ["not", "explained", "0"],
    ]


def test_an_explained_difference_does_not_count_as_agreement(replayed: Callable[..., tuple[int, str]]) -> None:
    counts = json.loads(replayed(LIDT, "--json")[1])

    assert (counts["agree"], counts["differ"], counts["explained"], counts["unexplained"]) == (0, 1, 1, 0)
    assert counts["explanations"] == [
        {
            "name": "operand size of LGDT and its like",
            "section": "Information for VM Exits Due to Instruction Execution",
            "whose": "recorder",
            "differences": [{"id": "exit-1", "path": "instruction_info"}],
        }
    ]


def test_what_no_cause_holds_for_is_not_explained(replayed: Callable[..., tuple[int, str]]) -> None:
    wrong = {**LIDT, "outcome": {**LIDT["outcome"], "instruction_info": "0x30418880", "instruction_length": 5}}
    _, out = replayed(wrong)
    counts = json.loads(replayed(wrong, "--json")[1])

    assert "    not explained: instruction_length\n" in out
    assert (counts["differ"], counts["explained"], counts["unexplained"]) == (1, 0, 1)
