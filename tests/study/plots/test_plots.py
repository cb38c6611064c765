"""Which picture a table gets, what is on it, and that the same table gives the same bytes."""

from __future__ import annotations

import importlib.util
import re
from itertools import pairwise, product
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.study.analysis.tables import table
from vtsim.base.errors import ConfigError
from vtsim.study.analysis.cells import independent
from vtsim.study.plots import draw as module
from vtsim.study.plots.choose import MANY_REPLICATES, choose, only
from vtsim.study.plots.draw import draw, write
from vtsim.study.plots.words import number_text, short_names, value_text
from vtsim.study.sweep.table import Column, StudyTable, Value

SIZES = (4096, 65536, 1 << 20, 1 << 24)
with_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="the extra plots is not installed"
)


def study(*axes: str, replicates: int = 1) -> StudyTable:
    """A whole grid over some of four axes, with a figure that depends on all of them."""
    known: dict[str, tuple[Value, ...]] = {
        "paging": ("ept", "shadow"), "size": SIZES, "entries": (4, 8, 32), "vpid": (False, True)
    }  # fmt: skip
    values = {name: known[name] for name in axes}
    figures = {
        place: [
            {"slowdown": 1.0 + sum(known[a].index(v) for a, v in zip(axes, place, strict=True)) + run / 100,
             "cycles.by.N0.WORK": 3e6, "cycles.by.R0.VM_EXIT": 2e6, "cycles.by.R0.none": 0}
            for run in range(replicates)
        ]
        for place in product(*values.values())
    }  # fmt: skip
    units = {
        "size": "bytes",
        "cycles.by.N0.WORK": "cycles",
        "cycles.by.R0.VM_EXIT": "cycles",
        "cycles.by.R0.none": "cycles",
    }
    return table(values, figures, units=units, labels={"slowdown": "slow-down", "size": "working set"})


# fmt: off
CHOICES = [
    (("size",),                     1, "lines", "size", None, ()),
    (("paging", "size"),            1, "lines", "size", None, ("paging",)),
    (("paging", "size", "vpid"),    1, "lines", "size", None, ("paging", "vpid")),
    (("size", "entries"),           1, "heat",  "size", "entries", ()),
    (("size", "entries", "paging"), 1, "heat",  "size", "entries", ("paging",)),
    (("paging",),                   1, "bars",  "paging", None, ()),
    (("paging", "vpid"),            1, "bars",  "paging", None, ("vpid",)),
    (("paging",), MANY_REPLICATES,     "cdf",   None, None, ("paging",)),
    ((),                            1, "bars",  None, None, ()),
]
# fmt: on


@pytest.mark.parametrize(("axes", "replicates", "kind", "x", "y", "series"), CHOICES)
def test_the_picture_follows_from_the_axes(
    axes: tuple[str, ...], replicates: int, kind: str, x: str | None, y: str | None, series: tuple[str, ...]
) -> None:
    choice = choose(study(*axes, replicates=replicates), ["slowdown"])

    assert choice.kind == kind
    assert (choice.x and choice.x.path, choice.y and choice.y.path) == (x, y)
    assert tuple(column.path for column in choice.series) == series


def test_an_axis_that_follows_from_another_is_not_drawn() -> None:
    """Ways of a cache follow from its entries here; technique and paging from each other only together."""
    figures = {(n, min(n, 4)): [{"slowdown": n}] for n in (1, 4, 8, 16)}
    zipped = table({"entries": (1, 4, 8, 16), "ways": (1, 4)}, figures)
    both = table(
        {"technique": ("hardware", "bt"), "paging": ("ept", "shadow")},
        {("hardware", "ept"): [{"y": 1}], ("hardware", "shadow"): [{"y": 2}], ("bt", "shadow"): [{"y": 3}]},
    )

    choice = choose(zipped, ["slowdown"])

    assert (choice.kind, choice.x and choice.x.path, choice.series) == ("lines", "entries", ())
    assert [column.path for column in independent(both)] == ["technique", "paging"]


def test_points_drawn_at_random_are_marks_without_lines() -> None:
    places = [(n, (7 * n) % 30) for n in range(30)]
    drawn = table({"a": range(30), "b": range(30)}, {place: [{"y": sum(place)}] for place in places})

    choice = choose(drawn, ["y"])

    assert (choice.kind, choice.x and choice.x.path) == ("scatter", "a")


def test_several_metrics_of_one_unit_are_stacked_without_those_that_are_zero() -> None:
    choice = choose(study("paging"), ["cycles.by.*"])

    assert (choice.kind, [m.path for m in choice.metrics]) == ("stacks", ["cycles.by.N0.WORK", "cycles.by.R0.VM_EXIT"])
    assert short_names(choice.metrics) == ["N0 WORK", "R0 VM EXIT"]


# fmt: off
REFUSED = [
    (("paging",), ["slow"], None, "--metric: unknown metric of the study 'slow'\n help: did you mean 'slowdown'?"),
    (("paging",), ["slowdown"], "pie",
     "--kind: unknown kind of plot 'pie'\n help: kind of plot can be lines, heat, bars, stacks, cdf, scatter"),
    (("paging",), ["slowdown"], "lines",
     "--kind: lines needs a numeric axis that varies\n help: axes that vary are paging"),
    ((), ["slowdown"], "heat", "--kind: a heat map needs two numeric axes that vary\n help: no axis varies"),
    (("paging",), ["slowdown", "cycles.by.N0.WORK"], None, "--metric: metrics in  and cycles cannot be stacked"),
    (("paging",), ["cycles.by.*"], "bars", "--kind: several metrics are stacked, not drawn as bars"),
]
# fmt: on


@pytest.mark.parametrize(("axes", "metrics", "kind", "message"), REFUSED)
def test_a_picture_that_cannot_be_is_refused(
    axes: tuple[str, ...], metrics: list[str], kind: str | None, message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        choose(study(*axes), metrics, kind)
    assert str(error.value) == message


def test_rows_are_chosen_by_the_values_of_axes() -> None:
    chosen = only(study("paging", "vpid"), {"paging": "ept", "vpid": "True"})

    assert [dict(row.axes) for row in chosen.rows] == [{"paging": "ept", "vpid": True}]
    for where, message in (
        ({"pagin": "ept"}, "--where: unknown axis of the study 'pagin'\n help: did you mean 'paging'?"),
        ({"paging": "epp"}, "--where: unknown value of paging 'epp'\n help: did you mean 'ept'?"),
    ):
        with pytest.raises(ConfigError) as error:
            only(study("paging"), where)
        assert str(error.value) == message


def test_values_read_as_people_write_them() -> None:
    def column(unit: str) -> Column:
        return Column(path="x", label="x", unit=unit)

    assert value_text(2 << 20, column("bytes")) == "2 MiB"
    assert value_text(250_000, column("ns")) == "250 us"
    assert value_text(20_000, column("")) == "20 k"
    assert value_text(True, column("")) == "on"
    assert [number_text(value) for value in (0, 0.25, 1234.5, 56789, 1.5e7, 2e-6)] == [
        "0", "0.25", "1234", "56.79 k", "15 M", "2e-06",
    ]  # fmt: skip


def test_series_differ_without_colour() -> None:
    assert len(set(map(str, module.LINES))) == len(module.LINES) == len(module.COLOURS) == len(set(module.MARKERS))
    assert len(set(zip(module.HATCHES, module.FILLS, strict=True))) == len(module.FILLS)


@with_matplotlib
@pytest.mark.slow
@pytest.mark.parametrize(
    ("axes", "replicates", "metric", "texts"),
    [
        (("paging", "size"), 2, "slowdown", ["ept", "shadow", "working set", "4 KiB", "16 MiB", "slow-down"]),
        (("size", "entries"), 1, "slowdown", ["working set", "entries", "1 MiB", "32", "slow-down", "6"]),
        (("paging", "vpid"), 2, "slowdown", ["ept", "shadow", "vpid off", "vpid on", "slow-down"]),
        (("paging",), 20, "slowdown", ["share of runs", "slow-down", "100 %"]),
        (("paging", "size"), 1, "cycles.by.*", ["N0 WORK", "R0 VM EXIT", "cycles", "5 M", "paging, working set"]),
    ],
)
def test_a_picture_names_what_it_shows(axes: tuple[str, ...], replicates: int, metric: str, texts: list[str]) -> None:
    choice = choose(study(*axes, replicates=replicates), [metric])

    svg = draw(choice)

    root = ElementTree.fromstring(svg)
    found = ["".join(text.itertext()).strip() for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert set(texts) - set(found) == set()
    assert b"<image" not in svg  # which a page would have to load
    assert "What does a table say?" in found


@with_matplotlib
@pytest.mark.slow
def test_a_line_goes_through_the_means_and_the_same_table_gives_the_same_bytes() -> None:
    """Slow-downs are 1, 2, 3, 4: on the picture, at even distances from each other, upwards."""
    svg = draw(choose(study("size"), ["slowdown"])).decode()

    assert draw(choose(study("size"), ["slowdown"])).decode() == svg
    assert "date>" not in svg and "Matplotlib" not in svg

    lines = re.findall(r'<path d="M ([^"]*)"[^>]*style="fill: none; stroke: #000000; stroke-width: 1.6', svg)
    heights = [float(pair.split()[1]) for pair in re.split(r"\s*L ", lines[0].strip())]

    steps = [before - after for before, after in pairwise(heights)]
    assert len(heights) == 4
    assert steps[0] > 10
    assert steps == pytest.approx([steps[0]] * 3, abs=1e-3)


@with_matplotlib
@pytest.mark.slow
def test_the_ending_of_a_file_says_its_format(tmp_path: Path) -> None:
    choice = choose(study("paging"), ["slowdown"])
    for ending, magic in (("svg", b"<?xml"), ("png", b"\x89PNG"), ("pdf", b"%PDF")):
        write(choice, tmp_path / f"picture.{ending}")
        assert (tmp_path / f"picture.{ending}").read_bytes().startswith(magic)
    assert len(list(tmp_path.iterdir())) == 3

    with pytest.raises(ConfigError) as error:
        write(choice, tmp_path / "picture.gif")
    assert (
        str(error.value) == "--output: unknown format of pictures 'gif'\n help: format of pictures can be svg, png, pdf"
    )
