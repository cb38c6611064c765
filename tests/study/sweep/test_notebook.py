"""The notebook of docs/ does what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vtsim.study.sweep.study import Study

NOTEBOOK = Path(__file__).parents[3] / "docs" / "studies.ipynb"


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    names: dict[str, Any] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)

    study = names["study"]
    assert isinstance(study, Study)
    rows = study.table().rows
    assert [row.axes["machine.profile"] for row in rows] == ["nehalem-ep", "snb-e5-2450", "skx-4114"]
    assert rows[0].metrics["exits.CPUID.mean_cycles against the oldest"] == 1
    assert "<b>What does an exit cost on three generations?</b>" in study._repr_html_()
