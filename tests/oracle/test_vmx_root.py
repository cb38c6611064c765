"""The recorded cases of VMX instructions in root operation, executed as operations of the engine.

Where the model keeps to the manual against the recorder, docs/oracle-exceptions.md says why.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from vtsim.study.vmx.base_states import BaseStates
from vtsim.study.vmx.cases import Case, read_cases
from vtsim.study.vmx.replay import DIFFER, SKIPPED, Verdict, replay
from vtsim.study.vmx.shapes import number

CASES = Path(__file__).parent / "data" / "vmxroot_cases.jsonl.gz"


@cache
def verdicts() -> dict[str, tuple[Case, Verdict]]:
    cases = list(read_cases(CASES))
    return {v.id: (case, v) for case, v in zip(cases, replay(cases, BaseStates.beside(CASES)), strict=True)}


def invvpid_type_is_wide(case: Case) -> bool:
    """The type operand of INVVPID has 64 bits; the recorder looks at 32."""
    kinds = [number(step[2]) for step in case.raw["steps"] if step[0] == "invvpid"]
    return any(kind >> 32 and kind & 0xFFFF_FFFF < 4 for kind in kinds)


def test_all_cases_are_run() -> None:
    assert len(verdicts()) == 1006
    assert [v.reason for _, v in verdicts().values() if v.status == SKIPPED] == []


def test_the_model_does_in_root_operation_what_was_recorded() -> None:
    unlike = [
        (v.id, *v.differences)
        for case, v in verdicts().values()
        if v.status == DIFFER and not invvpid_type_is_wide(case)
    ]

    assert unlike == []


def test_an_exception_is_a_case_in_which_the_recorder_succeeds_and_the_model_refuses_the_type() -> None:
    found = [v for case, v in verdicts().values() if v.status == DIFFER and invvpid_type_is_wide(case)]

    assert found
    for verdict in found:
        assert [outcome["result"] for outcome in verdict.recorded] == ["ok"]
        assert [(outcome["result"], outcome["error"]) for outcome in verdict.model] == [("vmfail_valid", 28)]
