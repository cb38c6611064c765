"""The page of all techniques names each of them, as the door does."""

from __future__ import annotations

from scripts.generate_techniques import PAGE
from vtsim.study.techniques_page import doors, named
from vtsim.vmm.techniques import techniques


def test_the_page_lists_the_techniques_of_the_door_as_they_describe_themselves() -> None:
    text = PAGE.read_text(encoding="utf-8")

    assert named(text) == tuple(techniques), "run `python -m scripts.generate_techniques`"
    assert doors() in text, "run `python -m scripts.generate_techniques`"


def test_every_technique_has_its_row_of_measurements_or_its_reason() -> None:
    for section in PAGE.read_text(encoding="utf-8").split("\n## ")[1:]:
        measured = section.partition("| cycles |")[0]
        for name in techniques:
            assert f"| `{name}` |" in measured or f"`{name}` does not apply: " in measured
