"""The recorded VM-entry cases: the model agrees with all but those that docs/oracle-exceptions.md explains."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

from vtsim.base import jit
from vtsim.study.vmx.base_states import BaseStates
from vtsim.study.vmx.cases import Case, read_cases
from vtsim.study.vmx.replay import AGREE, DIFFER, SKIPPED, replay

FILE = Path(__file__).parent / "data" / "vmentry_cases.jsonl.gz"
# by number; what these have in common stands in docs/oracle-exceptions.md
NOT_CANONICAL = (13602, 13644, 16369, 18332, 36569)
NMI_WITH_STI = (14112, 14113, 23767, 23768, 34312, 34313)
RECORDER_LACKS_MSR = (44505, 44506, 44507, 44508, 44509, 44520, 44521)
EXCEPTIONS = {f"entry-corei7_skylake_x-{n}" for n in (*NOT_CANONICAL, *NMI_WITH_STI, *RECORDER_LACKS_MSR)}
STEP = 1 if not jit.DISABLED else 4


def verdicts(chosen: Callable[[Case], bool]) -> list[Any]:
    cases = (case for case in read_cases(FILE) if chosen(case))
    return list(replay(cases, BaseStates.beside(FILE)))


def test_recorded_entries_agree() -> None:
    every = islice(read_cases(FILE), 0, None, STEP)
    found = list(replay((case for case in every if case.id not in EXCEPTIONS), BaseStates.beside(FILE)))

    assert [each.id for each in found if each.status == DIFFER] == []
    assert sum(each.status == AGREE for each in found) > 24_300 // STEP
    assert {each.reason for each in found if each.status == SKIPPED} <= {"recorded as not usable"}


def test_the_explained_cases_are_those_that_differ() -> None:
    found = verdicts(lambda case: case.id in EXCEPTIONS)

    assert {each.id for each in found if each.status == DIFFER} == EXCEPTIONS


def test_disputed_entries_do_what_the_manual_says() -> None:
    found = verdicts(lambda case: "disputed" in case.raw and case.id not in EXCEPTIONS)

    assert len(found) == 885 - len(NOT_CANONICAL)
    assert {each.status for each in found} == {AGREE}
