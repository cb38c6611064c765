"""Shares of variance against closed forms: of the Ishigami function, and of grids."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from itertools import product
from math import pi, sin

import numpy as np
import pytest

from tests.study.analysis.tables import only_rows, table
from vtsim.base.errors import ConfigError
from vtsim.study.analysis.effects import effects
from vtsim.study.analysis.sensitivity import Range, morris, shares_of_variance, sobol
from vtsim.study.sweep.table import Value

A, B = 7.0, 0.1
ISHIGAMI = [Range(path=name, low=-pi, high=pi) for name in ("x1", "x2", "x3")]
with_salib = pytest.mark.skipif(importlib.util.find_spec("SALib") is None, reason="the extra analysis is not installed")


def ishigami(points: Sequence[Mapping[str, Value]]) -> list[float]:
    """sin x1 + A sin² x2 + B x3⁴ sin x1."""
    rows = [[float(point[name] or 0) for name in ("x1", "x2", "x3")] for point in points]
    return [sin(x1) + A * sin(x2) ** 2 + B * x3**4 * sin(x1) for x1, x2, x3 in rows]


@with_salib
def test_sobol_shares_of_the_ishigami_function_are_its_closed_form() -> None:
    v1 = 0.5 * (1 + B * pi**4 / 5) ** 2
    v2 = A**2 / 8
    v13 = 8 * B**2 * pi**8 / 225
    v = v1 + v2 + v13

    found = sobol(ISHIGAMI, ishigami, 1024, seed=1)

    assert [each.path for each in found] == ["x1", "x2", "x3"]
    for each, alone, total in zip(found, (v1, v2, 0), (v1 + v13, v2, v13), strict=True):
        assert each.alone_half_width is not None and each.total_half_width is not None
        assert each.alone == pytest.approx(alone / v, abs=max(each.alone_half_width, 0.01))
        assert each.total == pytest.approx(total / v, abs=max(each.total_half_width, 0.01))
        assert each.alone_half_width < 0.12
    assert sobol(ISHIGAMI, ishigami, 1024, seed=1) == found


@with_salib
def test_morris_of_a_plane_is_its_slope_over_the_whole_range_with_no_spread() -> None:
    """Paths of Morris have steps in units of the range, so a plane changes by slope × width everywhere."""
    ranges = [Range(path="a", low=0, high=10), Range(path="b", low=0, high=2), Range(path="c")]

    a, b, c = morris(
        ranges, lambda points: [3 * float(p["a"] or 0) - 5 * float(p["b"] or 0) for p in points], 8, seed=3
    )

    assert (a.mean, b.mean, c.mean) == pytest.approx((30, 10, 0))
    assert (a.spread, b.spread, c.spread) == pytest.approx((0, 0, 0), abs=1e-9)


@with_salib
def test_choices_and_whole_numbers_are_run_once_each() -> None:
    asked: list[Mapping[str, Value]] = []

    def evaluate(points: Sequence[Mapping[str, Value]]) -> list[float]:
        asked.extend(points)
        return [float(point["n"] or 0) * (3 if point["paging"] == "shadow" else 1) for point in points]

    found = sobol(
        [Range(path="paging", choices=("ept", "shadow")), Range(path="n", low=1, high=4, whole=True)],
        evaluate, 256, seed=5,
    )  # fmt: skip
    figures = {(p, n): [{"y": n * (3 if p == "shadow" else 1)}] for p in ("ept", "shadow") for n in range(1, 5)}
    exact = shares_of_variance(table({"paging": ("ept", "shadow"), "n": range(1, 5)}, figures), "y")

    assert len(asked) == 8
    for each, known in zip(found, exact, strict=True):
        assert each.alone == pytest.approx(known.alone, abs=0.05)
        assert each.total == pytest.approx(known.total, abs=0.05)


@with_salib
def test_samples_that_are_no_power_of_two_and_runs_without_a_figure_are_refused() -> None:
    with pytest.raises(ConfigError, match="100 is not a power of two"):
        sobol(ISHIGAMI, ishigami, 100, seed=1)
    with pytest.raises(ConfigError, match="a run has no figure for the metric: x1="):
        morris(ISHIGAMI, lambda points: [float("nan")] * len(points), 2, seed=1)


def test_shares_of_a_grid_are_those_of_its_formula() -> None:
    """y = a + 2 b + a b with a, b = ±1: variances 1, 4 and 1, of 6 in all; c does nothing."""
    figures = {(a, b, c): [{"y": a + 2 * b + a * b + off} for off in (-1, 1)] for a, b, c in product((-1, 1), repeat=3)}
    a, b, c = shares_of_variance(table(dict.fromkeys("abc", (-1, 1)), figures), "y")

    assert (a.alone, a.total) == pytest.approx((1 / 6, 2 / 6))
    assert (b.alone, b.total) == pytest.approx((4 / 6, 5 / 6))
    assert (c.alone, c.total) == pytest.approx((0, 0))
    assert a.alone_half_width is None


def test_a_grid_with_holes_has_no_shares() -> None:
    figures = {(1, 1): [{"y": 1}], (2, 1): [{"y": 2}], (2, 2): [{"y": 3}]}

    with pytest.raises(ConfigError) as error:
        shares_of_variance(table({"a": (1, 2), "b": (1, 2)}, figures), "y")
    assert str(error.value) == (
        "the study has 3 of 4 combinations of its axes\n"
        " help: shares of variance need a whole grid; with a scenario and --axis they are found on the model"
    )


def test_a_study_in_which_nothing_varies_has_no_shares() -> None:
    with pytest.raises(ConfigError) as error:
        shares_of_variance(table({"x": (1,)}, {(1,): [{"ns": 5}]}), "ns")

    assert str(error.value) == (
        "no axis of the study has two values, so there are no shares\n"
        " help: with a scenario and --axis they are found on the model"
    )


def test_what_drawn_axes_bring_alone_is_estimated_of_their_points() -> None:
    """Ishigami's function at 512 drawn points: within the interval, and an axis without influence has none."""
    random = np.random.default_rng(11)
    points = [tuple(map(float, point)) for point in random.uniform(-pi, pi, (512, 4))]
    figures = {point: [{"y": ishigami([dict(zip(("x1", "x2", "x3"), point, strict=False))])[0]}] for point in points}
    drawn = only_rows({f"x{n + 1}": [point[n] for point in points] for n in range(4)}, figures)

    v1, v2 = 0.5 * (1 + B * pi**4 / 5) ** 2, A**2 / 8
    v = v1 + v2 + 8 * B**2 * pi**8 / 225
    for each, known in zip(shares_of_variance(drawn, "y"), (v1 / v, v2 / v, 0, 0), strict=True):
        assert each.total is None and each.alone_half_width is not None
        assert each.alone == pytest.approx(known, abs=1.5 * each.alone_half_width)
        assert each.alone_half_width < 0.12
    with pytest.raises(ConfigError, match="axes were drawn"):
        effects(drawn, "y")


@pytest.mark.skipif(importlib.util.find_spec("SALib") is not None, reason="SALib is installed")
def test_without_salib_the_message_names_the_extra() -> None:
    with pytest.raises(ConfigError) as error:
        sobol(ISHIGAMI, ishigami, 64, seed=1)
    assert str(error.value) == (
        "sensitivity on the model needs SALib, which is not installed\n help: pip install 'vtsim[analysis]'"
    )
