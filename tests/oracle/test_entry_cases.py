"""The recorded VM-entry cases: the model agrees with all but those that docs/oracle-exceptions.md explains."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from vtsim.base import jit
from vtsim.study.vmx.base_states import BaseStates
from vtsim.study.vmx.cases import Case, read_cases
from vtsim.study.vmx.replay import AGREE, DIFFER, SKIPPED, replay

FILE = Path(__file__).parent / "data" / "vmentry_cases.jsonl.gz"
EXCEPTIONS = set(
    re.findall(
        r"^entry-\S+$", (Path(__file__).parents[2] / "docs" / "oracle-exceptions.md").read_text(encoding="utf-8"), re.M
    )
)
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


@pytest.mark.parametrize("bits", ["disputed"])
def test_disputed_entries_do_what_the_manual_says(bits: str) -> None:
    found = verdicts(lambda case: bits in case.raw and case.id not in EXCEPTIONS)

    assert len(found) == 885 - 5
    assert {each.status for each in found} == {AGREE}
