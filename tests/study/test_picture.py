"""The picture of the README."""

from __future__ import annotations

from xml.etree import ElementTree

from vtsim.study.picture import picture
from vtsim.study.result import Result


def test_the_picture_is_svg_with_the_report_and_fetches_nothing(result: Result) -> None:
    svg = picture(result, "vtsim run x.yaml")

    text = "".join(ElementTree.fromstring(svg).itertext()).replace("\xa0", " ")
    assert "$ vtsim run x.yaml" in text
    assert "EPT_VIOLATION" in text
    assert "url(" not in svg.replace("url(#", "")
    assert svg.count("http") == svg.count("http://www.w3.org/2000/svg")
