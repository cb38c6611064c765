"""Regression against measurements: exact lines, matching by axes, and what a CSV file can have wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.study.analysis.tables import table
from vtsim.base.errors import ConfigError
from vtsim.study.analysis.fit import fit, regression
from vtsim.study.sweep.table import StudyTable


def study() -> StudyTable:
    """The model says 2 × size + 100 for EPT, and 50 more for shadow; two replicates around it."""
    figures = {
        (paging, size): [{"ns": 2 * size + 100 + (50 if paging == "shadow" else 0) + off} for off in (-3, 3)]
        for paging in ("ept", "shadow")
        for size in (4096, 8192, 16384)
    }
    return table({"vmm.paging": ("ept", "shadow"), "size": (4096, 8192, 16384)}, figures, units={"ns": "ns"})


def test_slope_intercept_and_r_squared_are_those_of_least_squares() -> None:
    x, y = [1.0, 2, 3, 5, 8], [2.0, 1, 4, 4, 9]

    slope, intercept, r_squared = regression(x, y)

    assert [slope, intercept] == pytest.approx(list(np.polyfit(x, y, 1)))
    assert r_squared == pytest.approx(float(np.corrcoef(x, y)[0, 1]) ** 2)
    assert regression([1, 2], [5, 5]) == (0, 5, 1)


def test_rows_match_by_axes_whatever_their_order_and_units(tmp_path: Path) -> None:
    """Measured are half the model's figures, so that the model is twice them: 100 % off."""
    file = tmp_path / "mine.csv"
    file.write_text(
        "measured, size, who, vmm.paging\n4146, 4 KiB, me, ept\n\n8267, 8192, me, Shadow\n16434, 16 KiB, me, EPT\n1,5,me,ept\n"
    )

    found = fit(study(), "ns", file)

    assert [row.place for row in found.rows] == [("ept", 4096), ("shadow", 8192), ("ept", 16384)]
    assert [row.line for row in found.rows] == [2, 4, 5]
    assert (found.slope, found.intercept, found.r_squared) == pytest.approx((2, 0, 1))
    assert [row.deviation_percent for row in found.rows] == pytest.approx([100, 100, 100])
    assert (found.mean_deviation_percent, found.unmatched) == (pytest.approx(100), (6,))


# fmt: off
MISTAKES = [
    ("size,size,vmm.paging,measured\n",
     "{}:1: two columns are named 'size'\n    1 | size,size,vmm.paging,measured\n      | ^\n"
     " help: give each column a name of its own"),
    ("", "{}: the file is empty\n help: give a CSV file in UTF-8 whose first line names axes and `measured`"),
    ("size;vmm.paging;measured\n4096;ept;1\n",
     "{}:1: cells are separated by ';'\n    1 | size;vmm.paging;measured\n      | ^\n help: separate them by commas"),
    ("size,vmm.paging,mesured\n4096,ept,1\n",
     "{}:1: no column 'measured'\n    1 | size,vmm.paging,mesured\n      | ^\n help: did you mean 'mesured'?"),
    ("size,measured\n4096,1\n",
     "{}:1: no column for the axis 'vmm.paging'\n    1 | size,measured\n      | ^\n"
     " help: values of vmm.paging are ept, shadow"),
    ("size,vmm.paging,measured\n4096,ept,fast\n",
     "{}:2: measured 'fast' is not a number\n    2 | 4096,ept,fast\n      | ^\n help: figures of ns are in ns"),
    ("size,vmm.paging,measured\n4096,ept\n",
     "{}:2: 2 cells, and the first line names 3\n    2 | 4096,ept\n      | ^\n"
     " help: give each row a cell for each name; one with a comma in it is quoted"),
    ("size,vmm.paging,measured\n4096,ept,5\n",
     "{}: 1 rows match a run of the study; a line needs two different measurements\n"
     " help: values of vmm.paging are ept, shadow; values of size are 4096, 8192, 16384"),
]
# fmt: on


@pytest.mark.parametrize(("text", "message"), MISTAKES)
def test_mistakes_in_the_file_name_their_line(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.csv"
    file.write_text(text)

    with pytest.raises(ConfigError) as error:
        fit(study(), "ns", file)
    assert str(error.value) == message.format(file)


def test_a_file_that_is_not_there_or_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        fit(study(), "ns", tmp_path / "none.csv")
    expected = " help: give a CSV file in UTF-8 whose first line names axes and `measured`"
    assert str(error.value) == f"{tmp_path}/none.csv: cannot be read: No such file or directory\n{expected}"
    with pytest.raises(ConfigError) as error:
        fit(study(), "ns", tmp_path)
    assert str(error.value) == f"{tmp_path}: cannot be read: Is a directory\n{expected}"

    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(ConfigError, match="not a CSV file") as error:
        fit(study(), "ns", tmp_path / "binary.csv")
    assert str(error.value).endswith(f"\n{expected}")
