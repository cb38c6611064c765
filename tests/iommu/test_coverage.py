"""The page about VT-d's coverage promises nothing that no test shows."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from vtsim.iommu.coverage import page, rows
from vtsim.vmcs.coverage import MODELLED, NOT_MODELLED, Row

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("row", list(rows()), ids=lambda row: row.title)
def test_a_part_names_the_test_that_cites_it_or_says_what_is_missing(row: Row) -> None:
    assert f"| {row.title} | {row.status} |" in page()
    assert (row.status == MODELLED) != bool(row.missing)
    if row.status == NOT_MODELLED:
        assert not row.test
    else:
        assert f'"{row.title}"' in (ROOT / row.test).read_text(encoding="utf-8")


def test_a_part_stands_on_the_page_once() -> None:
    assert [title for title, count in Counter(row.title for row in rows()).items() if count > 1] == []
