"""Fronts against the definition."""

from __future__ import annotations

from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.study.analysis.tables import table
from vtsim.study.analysis.pareto import pareto_front

Direction = Literal["min", "max"]


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12),
    st.sampled_from(["min", "max"]),
    st.sampled_from(["min", "max"]),
)
def test_the_front_is_what_no_other_beats(figures: list[tuple[int, int]], first: Direction, second: Direction) -> None:
    study = table({"n": range(len(figures))}, {(n,): [{"cost": a, "worth": b}] for n, (a, b) in enumerate(figures)})
    signs = (1 if first == "min" else -1, 1 if second == "min" else -1)
    points = [(signs[0] * a, signs[1] * b) for a, b in figures]
    unbeaten = {
        (n,) for n, (a, b) in enumerate(points) if not any(c <= a and d <= b and (c < a or d < b) for c, d in points)
    }

    front = pareto_front(study, "cost", "worth", (first, second))

    assert {point.place for point in front} == unbeaten
    assert [point.first * signs[0] for point in front] == sorted(point.first * signs[0] for point in front)


def test_replicates_are_averaged_and_places_without_a_figure_left_out() -> None:
    study = table({"n": (1, 2)}, {(1,): [{"a": 1, "b": 2}, {"a": 3, "b": 4}], (2,): [{"a": 0, "b": None}]})

    (point,) = pareto_front(study, "a", "b")

    assert (point.place, point.first, point.second) == ((1,), pytest.approx(2), pytest.approx(3))
