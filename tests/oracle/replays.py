"""Recorded VMX cases as the model replays them, each file once in a run of the tests."""

from __future__ import annotations

from functools import cache
from itertools import islice
from pathlib import Path

from vtsim.study.vmx.base_states import BaseStates
from vtsim.study.vmx.cases import Case, read_cases
from vtsim.study.vmx.replay import Verdict, replay

DATA = Path(__file__).parent / "data"
EXITS = "exit_cases.jsonl.gz"


@cache
def replays_of(name: str, stride: int) -> tuple[dict[str, Case], tuple[Verdict, ...]]:
    """Every `stride`-th case of a file by its name, and what became of each."""
    cases = {case.id: case for case in islice(read_cases(DATA / name), 0, None, stride)}
    return cases, tuple(replay(cases.values(), BaseStates.beside(DATA / name)))
