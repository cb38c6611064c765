"""Every shipped scenario is compared under all techniques: each runs it, or says why it cannot.

`pytest -m long tests/study/test_compare_of_workloads.py` takes some ten minutes.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Final
from xml.etree import ElementTree

import pytest
from rich.console import Console

from vtsim.base.errors import ConfigError
from vtsim.config import load_scenario
from vtsim.study.compare import Comparison, chosen, compare_scenario
from vtsim.study.compare_view import comparison_json, comparison_svg, comparison_tables
from vtsim.vmm.techniques import techniques

pytestmark = [pytest.mark.long, pytest.mark.compiled_only]

FILES: Final = sorted(str(path) for path in Path("workloads").rglob("*.yaml") if path.parts[1] != "studies")
LMBENCH: Final = [file for file in FILES if file.startswith("workloads/lmbench/")]
# of which techniques in software would take minutes: a part of the run does
LONG: Final = ("workloads/memory/", "workloads/real/", "workloads/paging/random_access", "workloads/paging/churn")
EVERY: Final = (
    "machine.profile=skx-4114",
    "machine.isa=virtualizable",
)  # that has VMX, where sensitive operations trap


def shown(found: Comparison) -> str:
    """The tables on a terminal of 80 columns, after the other two forms were made."""
    assert sorted([*json.loads(comparison_json(found))["techniques"], *found.refused]) == sorted(techniques)
    ElementTree.fromstring(comparison_svg(found))
    console = Console(file=io.StringIO(), width=80)
    console.print(comparison_tables(found))
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


@pytest.mark.parametrize("file", FILES)
def test_every_technique_runs_a_shipped_scenario_or_says_why_it_cannot(file: str) -> None:
    sets = ("run.limit=100 us",) if file.startswith(LONG) else ()
    try:
        found = compare_scenario(Path(file), chosen(), sets=sets)
    except ConfigError:
        assert load_scenario(file).vms == ()  # devices only
        return
    text = " ".join(shown(found).split())

    assert sorted([*found.results, *found.refused]) == sorted(techniques)
    for name, why in found.refused.items():
        assert " ".join(f"{name} does not apply: {why}".split()) in text
    for name, one in found.results.items():
        assert (one.translations is not None) == (name in ("binary-translation", "dynamic-translation"))


@pytest.mark.parametrize("file", LMBENCH)
def test_every_technique_runs_the_lmbench_set_to_its_end(file: str) -> None:
    found = compare_scenario(Path(file), chosen(), sets=EVERY)

    assert found.refused == {}
    assert {name: one.stopped for name, one in found.results.items() if one.stopped} == {}
    assert all(one.slowdown is not None and one.slowdown >= 1 for one in found.results.values())
    assert len(LMBENCH) == 17
