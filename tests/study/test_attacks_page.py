"""The page of attacks shows what the suite measures."""

from __future__ import annotations

import pytest

from scripts.generate_attacks import PAGE
from vtsim.study.attacks import Attempt, Skipped
from vtsim.study.attacks_page import WAYS, Tried, page, tried
from vtsim.vmm.techniques import techniques


def rows() -> list[list[str]]:
    """The cells of the page's table."""
    text = PAGE.read_text(encoding="utf-8").partition("\n## ")[0]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]


def test_the_page_has_a_column_for_every_technique_and_way_of_paging() -> None:
    head, *_ = rows()
    paging = {paging for one in techniques.values() for paging in one.paging}
    ways = {way for sets in WAYS.values() for way in sets}

    assert head[1:] == list(WAYS), "run `python -m scripts.generate_attacks`"
    assert {f"vmm.technique={name}" for name in techniques} - ways == {"vmm.technique=hardware"}
    assert {f"vmm.paging={name}" for name in paging - {"software", "auto"}} <= ways | {"vmm.paging=none"}


def test_what_gets_through_does_so_where_nothing_stops_it() -> None:
    """Natively; DMA that nothing remaps; native methods of a program that executes the guest."""
    head, *body = rows()
    found = {
        (row[0].split(":")[0], way) for row in body for way, cell in zip(head, row, strict=True) if "through" in cell
    }
    allowed = {("DMA to memory of others", "EPT, no remapping unit")}
    allowed |= {("the host's memory, by native methods", "dynamic-translation, native methods")}

    assert {each for each in found if not each[1].startswith("native")} <= allowed
    assert ("the host's memory, mapped by a page of 1 GiB", "native, five levels") in found


def test_a_page_says_what_was_measured() -> None:
    held = Attempt(name="a", contained=True, effects=(), ended="")
    through = Attempt(name="b", contained=False, effects=("it was read", "it was written"), ended="")
    text = page(
        {
            "x": Tried(attempts=(held, through), skipped=()),
            "y": Tried(attempts=(held,), skipped=(Skipped(name="b", why="no"),)),
        }
    )

    assert "| a | held | held |\n| b | **through** | · |\n| held | 1 of 2 | 1 of 1 |\n" in text
    assert "- x: b: it was read; it was written.\n" in text
    assert text.endswith("- y: no: b.\n")


@pytest.mark.long
@pytest.mark.compiled_only
def test_the_page_is_what_the_suite_measures_now() -> None:
    assert PAGE.read_text(encoding="utf-8") == page({way: tried(way) for way in WAYS}), (
        "run `python -m scripts.generate_attacks`"
    )
