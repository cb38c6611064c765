"""Every citation resolves, and nothing in the bibliography is unused."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest

from scripts.generate_docs import PACKAGE, docstrings

BOOKS = tomllib.loads((PACKAGE.parent / "docs" / "references.toml").read_text(encoding="utf-8"))
FORM = re.compile(r"^(SDM|VT-d): (\".+)", re.M)


def cited() -> set[tuple[str, str]]:
    found = set()
    for _, text in docstrings():
        joined = re.sub(r"\n(?=\")", " ", text)  # a citation may go on in the next line
        for book, line in FORM.findall(joined):
            found |= {(book, title) for title in re.findall(r'"([^"]+)"', line)}
    return found


@pytest.mark.slow
def test_citations_and_bibliography_agree() -> None:
    listed = {(book, title) for book, entry in BOOKS.items() for title in entry["sections"]}

    assert listed == cited()


def test_no_section_number_is_cited_in_code() -> None:
    wrong = [
        f"{path.relative_to(PACKAGE)}: {line.strip()}"
        for path in sorted(Path(PACKAGE).rglob("*.py"))
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.search(r"\b(SDM|VT-d)\b.*\bsection \d", line, re.I)
    ]

    assert wrong == []


@pytest.mark.slow
def test_every_module_parses_as_documented() -> None:
    undocumented = [
        str(path.relative_to(PACKAGE))
        for path in sorted(Path(PACKAGE).rglob("*.py"))
        if ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) is None
    ]

    assert undocumented == []
