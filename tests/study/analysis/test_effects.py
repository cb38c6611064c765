"""Effects and interactions against formulas, and against a slow way to reckon them."""

from __future__ import annotations

from itertools import product
from math import sqrt
from statistics import fmean

import pytest

from tests.study.analysis.tables import table
from vtsim.base.errors import ConfigError
from vtsim.study.analysis.effects import effects
from vtsim.study.sweep.table import StudyTable

T_95_OF_4 = 2.7764451  # a printed table of Student's t, two-sided


def noisy() -> StudyTable:
    """y = 10 + 3 [a=on] + 5 [b=big] + 2 [both], replicates 1 above and 1 below."""
    figures = {
        (a, b): [{"y": 10 + 3 * a_on + 5 * b_big + 2 * a_on * b_big + off} for off in (-1, 1)]
        for (a, a_on), (b, b_big) in product([("off", 0), ("on", 1)], [("small", 0), ("big", 1)])
    }
    return table({"a": ("off", "on"), "b": ("small", "big")}, figures)


def test_effects_are_mean_differences_and_interactions_differences_of_these() -> None:
    a, b, both = effects(noisy(), "y")

    assert (a.axes, a.base, a.values, a.mean, a.places) == (("a",), ("off",), ("on",), pytest.approx(4), 2)
    assert (b.axes, b.mean) == (("b",), pytest.approx(6))
    assert (both.axes, both.base, both.values) == (("a", "b"), ("off", "small"), ("on", "big"))
    assert (both.mean, both.places) == (pytest.approx(2), 1)


def test_half_widths_are_t_times_the_standard_error_of_a_pooled_variance() -> None:
    """Each cell has the variance 2 with one degree of freedom."""
    a, b, both = effects(noisy(), "y")

    assert a.half_width == pytest.approx(T_95_OF_4 * sqrt(2 * (4 * 1 / 2)) / 2)
    assert b.half_width == pytest.approx(a.half_width)
    assert both.half_width == pytest.approx(T_95_OF_4 * sqrt(2 * (4 * 1 / 2)))
    assert (a.clear, both.clear) == (True, False)


def test_three_axes_with_three_values_agree_with_a_slow_way() -> None:
    axes = {"p": ("ept", "shadow", "agile"), "n": (1, 2, 4), "on": (False, True)}
    figures = {
        place: [{"y": float(hash_of(place, n))} for n in range(1 + (place[1] == 2 and place[2] is True))]
        for place in product(*axes.values())
    }
    study = table(axes, figures)
    mean = {place: fmean(float(run["y"]) for run in runs) for place, runs in figures.items()}

    found = {(effect.axes, effect.values): effect for effect in effects(study, "y")}

    assert len(found) == 2 + 2 + 1 + 2 * 2 + 2 * 1 + 2 * 1
    shadow = fmean(mean["shadow", n, on] - mean["ept", n, on] for n in (1, 2, 4) for on in (False, True))
    assert found[("p",), ("shadow",)].mean == pytest.approx(shadow)
    both = fmean(
        mean[p, 4, True] - mean[p, 1, True] - mean[p, 4, False] + mean[p, 1, False] for p in ("ept", "shadow", "agile")
    )
    assert found[("n", "on"), (4, True)].mean == pytest.approx(both)
    assert found[("n", "on"), (4, True)].places == 3


def hash_of(place: tuple[object, ...], n: int) -> int:
    """Some figure that depends on everything."""
    return sum(ord(letter) * (at + 1) ** 2 for at, letter in enumerate(repr((place, n)))) % 997


def test_without_replicates_there_is_no_interval() -> None:
    study = table({"a": (1, 2)}, {(1,): [{"y": 5}], (2,): [{"y": 7}]})

    (effect,) = effects(study, "y")

    assert (effect.mean, effect.half_width, effect.clear) == (2, None, None)


def test_what_a_design_with_holes_does_not_compare_is_left_out() -> None:
    figures = {("off", 1): [{"y": 1}], ("on", 1): [{"y": 4}], ("off", 2): [{"y": 100}]}

    a, n = effects(table({"a": ("off", "on"), "n": (1, 2)}, figures), "y")

    assert (a.axes, a.mean, a.places) == (("a",), 3, 1)
    assert (n.axes, n.mean, n.places) == (("n",), 99, 1)


def test_values_are_compared_with_the_first_that_has_a_figure() -> None:
    """A native run, say, has no slowdown."""
    figures = {("none",): [{"y": None}], ("ept",): [{"y": 3}], ("shadow",): [{"y": 8}]}

    (effect,) = effects(table({"p": ("none", "ept", "shadow")}, figures), "y")

    assert (effect.base, effect.values, effect.mean) == (("ept",), ("shadow",), 5)


def test_a_design_in_which_no_axis_changes_alone_is_refused() -> None:
    figures = {place: [{"y": 1}] for place in ((0, 0, 0), (1, 1, 0), (0, 1, 1), (1, 0, 1))}

    with pytest.raises(ConfigError) as error:
        effects(table(dict.fromkeys("abc", (0, 1)), figures), "y")
    assert str(error.value) == (
        "no two points of the study differ in one axis alone\n"
        " help: effects need a design of grids, in which axes change independently"
    )


def test_an_unknown_metric_is_refused_with_what_was_meant() -> None:
    with pytest.raises(ConfigError) as error:
        effects(noisy(), "yy")
    assert str(error.value) == "--metric: unknown metric of the study 'yy'\n help: did you mean 'y'?"
