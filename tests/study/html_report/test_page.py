"""The page of a study: whole, well-formed, and in need of nothing else."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
from itertools import product
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import attrs
import pytest

from tests.study.analysis.tables import table
from vtsim.study.html_report.page import inline, page, write
from vtsim.study.html_report.provenance import VARIES, Provenance
from vtsim.study.not_modelled import limits
from vtsim.study.sweep.table import StudyTable

RESULT = json.loads((Path(__file__).parents[2] / "golden" / "result.json").read_text())
HOSTILE = 'Is "a < b" & <script>alert(1)</script>?'
SVG = "{http://www.w3.org/2000/svg}"
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
with_extra = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("jinja2", "matplotlib")),
    reason="the extra report is not installed",
)


def study() -> StudyTable:
    figures = {
        (paging, size): [
            {
                "slowdown": 1.5 + (paging == "<shadow>") + off,
                "cycles.by.N0.WORK": 5,
                "cycles.by.R0.VM_EXIT": 4,
                "name": "x",
            }
            for off in (-0.25, 0.25)
        ]
        for paging, size in product(("ept", "<shadow>"), (4096, 8192, 65536))
    }
    made = table({"paging": ("ept", "<shadow>"), "size": (4096, 8192, 65536)}, figures, units={"size": "bytes"})
    return attrs.evolve(made, question=HOSTILE, failed=2, missing=1200)


@pytest.fixture(scope="module")
def text() -> str:
    """One page for all tests."""
    return page(study(), Provenance.of([RESULT]), ["slowdown", "cycles.by.*"])


@with_extra
@pytest.mark.slow
def test_the_page_is_well_formed_and_refers_to_nothing_outside(text: str) -> None:
    assert text.startswith("<!DOCTYPE html>\n")
    root = ElementTree.fromstring(text.removeprefix("<!DOCTYPE html>"))

    ids = [element.get("id") for element in root.iter() if element.get("id")]
    assert len(ids) == len(set(ids))
    for element in root.iter():
        assert element.tag.rpartition("}")[2] not in (
            "script",
            "link",
            "img",
            "image",
            "iframe",
            "object",
            "embed",
            "base",
        )
        for name, value in element.attrib.items():
            if name.rpartition("}")[2] in ("href", "src", "data", "action"):
                assert value[0] == "#" and value[1:] in ids
            for target in re.findall(r"url\(([^)]*)\)", value):
                assert target[0] == "#" and target[1:] in ids
    assert set(re.findall(r'(\S*)="https?:', text)) <= {"xmlns", "xmlns:xlink"}
    assert "@import" not in text
    assert "default-src 'none'" in text


@with_extra
@pytest.mark.slow
def test_the_page_holds_question_pictures_points_and_provenance(text: str) -> None:
    root = ElementTree.fromstring(text.removeprefix("<!DOCTYPE html>"))
    everything = " ".join("".join(root.itertext()).split())

    assert root.findtext("body/h1") == HOSTILE
    assert "12 runs, 2 failed, 1,200 not run yet." in everything
    assert [svg.get("aria-label") for svg in root.iter(f"{SVG}svg")] == ["slowdown", "cycles.by"]
    tables = [[["".join(cell.itertext()) for cell in row] for row in one.iter("tr")] for one in root.iter("table")]
    points = next(rows for rows in tables if rows[0][:3] == ["paging", "size", "slowdown"])
    # ± t(97.5 %, 1) × 0.3536 / √2 = 12.706 × 0.25
    assert points[1][:3] == ["ept", "4 KiB", "1.5 ± 3.2"]
    assert points[6][:3] == ["<shadow>", "64 KiB", "2.5 ± 3.2"]
    shares = next(rows for rows in tables if rows[0][0] == "axis")
    assert shares[1:] == [["paging", "100.0 %", "100.0 %"], ["size", "0.0 %", "0.0 %"]]
    effect = next(rows for rows in tables if rows[0][0] == "change")
    assert effect[1][:2] == ["paging: ept to <shadow>", "+1"]
    for path, value in RESULT["parameters"]["values"].items():
        assert path in everything and value["source"] in everything
    assert f"Runs by vtsim {RESULT['vtsim_version']}" in everything
    assert f"Seeds: {RESULT['seed']}." in everything
    assert len(limits()) > 50
    for limit in limits():
        assert " ".join(limit.what.split()) in everything


def test_provenance_gathers_over_runs_and_says_what_varies() -> None:
    other: dict[str, Any] = json.loads(json.dumps(RESULT))
    path = next(iter(other["parameters"]["values"]))
    other["parameters"]["values"][path] |= {"value": 12345, "source": "scenario", "confidence": "set"}
    other |= {"seed": 77, "vtsim_version": "0.0.1", "profile_digest": "another", "approximations": ["other"]}

    found = Provenance.of([RESULT, other, RESULT])

    assert found.versions == tuple(sorted({"0.0.1", RESULT["vtsim_version"]}))
    assert found.seeds == tuple(sorted({77, RESULT["seed"]}))
    (parameters,) = found.profiles.values()
    by_path = {each.path: each for each in parameters}
    assert by_path[path].value == VARIES
    assert by_path[path].source.endswith(" / scenario")
    assert found.approximations == (*RESULT["approximations"], "other")


def test_a_drawing_in_a_page_has_identifiers_of_its_own() -> None:
    svg = '<?xml version="1.0"?>\n<svg><g id="a"/><g id="ab"/><use href="#a"/><path clip-path="url(#ab)"/></svg>'

    assert inline(svg, "p0-", 'x "<y>"') == (
        '<svg role="img" aria-label="x &quot;&lt;y>&quot;"><g id="p0-a"/><g id="p0-ab"/>'
        '<use href="#p0-a"/><path clip-path="url(#p0-ab)"/></svg>'
    )


def test_only_a_whole_page_replaces_an_older_one(tmp_path: Path) -> None:
    write("new", tmp_path / "page.html")

    assert (tmp_path / "page.html").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


@pytest.mark.long
@with_extra
@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium")
def test_a_browser_without_a_network_shows_the_page_and_complains_of_nothing(text: str, tmp_path: Path) -> None:
    """Run as `pytest -m long tests/study/html_report`: text and pictures as the browser has them, and ink on its page."""
    import matplotlib.image

    (tmp_path / "page.html").write_text(text, encoding="utf-8")
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
        f"--user-data-dir={tmp_path / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND", "--window-size=1000,3000",
    ]  # fmt: skip

    def shown(*wanted: str) -> subprocess.CompletedProcess[str]:
        place = (tmp_path / "page.html").as_uri()
        return subprocess.run([*map(str, command), *wanted, place], capture_output=True, text=True, timeout=60)

    seen = shown("--dump-dom")
    assert "CONSOLE" not in seen.stderr
    assert seen.stdout.count("<svg") == text.count("<svg") > 0
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in seen.stdout
    shown(f"--screenshot={tmp_path / 'page.png'}")
    ink = matplotlib.image.imread(tmp_path / "page.png")[..., :3].min(axis=2) < 0.5
    rows = ink.any(axis=1).nonzero()[0]
    assert len(rows) > 500  # of 3,000: text, pictures and tables down the page
