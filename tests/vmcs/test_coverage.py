"""The page about coverage promises nothing that no test shows."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from vtsim.vmcs.coverage import MODELLED, NOT_MODELLED, PARTLY, Row, page, rows

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("row", [row for row in rows() if row.status == MODELLED], ids=lambda row: row.title)
def test_the_test_of_a_list_that_is_modelled_cites_it(row: Row) -> None:
    assert row.title in (ROOT / row.test).read_text(encoding="utf-8")


@pytest.mark.parametrize("row", [row for row in rows() if row.status != MODELLED], ids=lambda row: row.title)
def test_another_list_says_what_is_missing(row: Row) -> None:
    assert row.status in (PARTLY, NOT_MODELLED)
    assert row.missing
    assert not row.test or (ROOT / row.test).is_file()


def test_a_list_stands_on_the_page_once() -> None:
    assert [title for title, count in Counter(row.title for row in rows()).items() if count > 1] == []
    assert all(f"| {row.title} | {row.status} |" in page() for row in rows())
