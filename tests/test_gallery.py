"""The gallery shows what its script draws."""

from __future__ import annotations

import textwrap
from xml.etree import ElementTree

import pytest

from scripts.draw_gallery import GALLERY, PICTURES, STUDIES, Picture, page, question
from vtsim.study.plots.choose import KINDS
from vtsim.study.plots.draw import TITLE


def test_the_page_is_fresh_and_every_picture_is_on_it() -> None:
    assert (GALLERY / "README.md").read_text(encoding="utf-8") == page()
    assert {path.stem for path in GALLERY.glob("*.svg")} == {picture.name for picture in PICTURES}
    assert {path.stem for path in STUDIES.glob("*.yaml")} == {picture.study for picture in PICTURES}


def test_a_picture_says_a_kind_that_there_is_or_none() -> None:
    assert {picture.kind for picture in PICTURES} <= {None, *KINDS}


@pytest.mark.parametrize("picture", PICTURES, ids=[picture.name for picture in PICTURES])
def test_a_picture_has_the_question_of_its_study_as_its_title(picture: Picture) -> None:
    root = ElementTree.parse(GALLERY / f"{picture.name}.svg").getroot()
    texts = {"".join(text.itertext()).strip() for text in root.iter("{http://www.w3.org/2000/svg}text")}

    assert not list(root.iter("{http://www.w3.org/2000/svg}image"))
    assert set(textwrap.wrap(question(picture.study), TITLE)) <= texts
