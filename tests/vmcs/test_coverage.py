"""The page about coverage promises nothing that no test shows."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from vtsim.vmcs.controls import CONTROL
from vtsim.vmcs.coverage import MODELLED, NOT_MODELLED, PARTLY, WITHOUT_EFFECT, Row, page, rows
from vtsim.vmcs.events import INSTRUCTION_ERRORS
from vtsim.vmcs.fields import BY_NAME
from vtsim.vmcs.reasons import REASON

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("row", [row for row in rows() if row.test], ids=lambda row: row.title)
def test_the_test_of_a_list_cites_it(row: Row) -> None:
    assert row.title in (ROOT / row.test).read_text(encoding="utf-8")


@pytest.mark.parametrize("row", [row for row in rows() if row.status != MODELLED], ids=lambda row: row.title)
def test_another_list_says_what_is_missing(row: Row) -> None:
    assert row.status in (PARTLY, NOT_MODELLED)
    assert row.missing
    assert not row.test or (ROOT / row.test).is_file()


@pytest.mark.parametrize("row", [row for row in rows() if row.status != NOT_MODELLED], ids=lambda row: row.title)
def test_a_list_that_is_modelled_or_partly_names_its_test(row: Row) -> None:
    assert row.test


@pytest.mark.parametrize("name", WITHOUT_EFFECT)
def test_what_has_no_effect_is_known_and_belongs_to_a_list_that_says_what_is_missing(name: str) -> None:
    kind, _, rest = name.partition(" ")
    known = {"reason": rest in REASON, "error": rest.isdigit() and int(rest) in INSTRUCTION_ERRORS}

    assert known.get(kind, name in CONTROL or name in BY_NAME)
    assert {row.title: row.status for row in rows()}[WITHOUT_EFFECT[name]] != MODELLED
    assert f"`{name}`" in page()


def test_a_list_stands_on_the_page_once() -> None:
    assert [title for title, count in Counter(row.title for row in rows()).items() if count > 1] == []
    assert all(f"| {row.title} | {row.status} |" in page() for row in rows())
