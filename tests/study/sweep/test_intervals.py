"""Confidence intervals against tables of Student's distribution."""

from __future__ import annotations

from math import inf, sqrt

import pytest

from vtsim.study.sweep.intervals import half_width, is_tight, t_probability, t_quantile

# NIST/SEMATECH e-Handbook of Statistical Methods, 1.3.6.7.2: critical values of Student's t, here two-sided
TABLE = {
    (0.90, 1): 6.314, (0.90, 10): 1.812, (0.90, 100): 1.660,
    (0.95, 1): 12.706, (0.95, 2): 4.303, (0.95, 3): 3.182, (0.95, 5): 2.571, (0.95, 10): 2.228, (0.95, 29): 2.045,
    (0.95, 60): 2.000, (0.99, 1): 63.657, (0.99, 2): 9.925, (0.99, 7): 3.499, (0.99, 30): 2.750,
}  # fmt: skip


@pytest.mark.parametrize("case", TABLE)
def test_quantiles_are_those_of_the_tables(case: tuple[float, int]) -> None:
    assert t_quantile(*case) == pytest.approx(TABLE[case], abs=5e-4)


def test_the_distribution_of_one_and_two_degrees_is_its_closed_form() -> None:
    assert t_probability(1.0, 1) == pytest.approx(0.5)
    assert t_probability(3.0, 2) == pytest.approx(3 / sqrt(11))


def test_an_interval_is_the_quantile_times_the_standard_error() -> None:
    assert half_width([1.0, 2.0, 3.0], 0.95) == pytest.approx(4.303 / sqrt(3), rel=1e-4)
    assert half_width([1.0], 0.95) == inf
    assert not is_tight([1.0], 0.95, 0.01)
    assert is_tight([2.0, 2.0, 2.0], 0.95, 0.01)
    assert is_tight([99.0, 100.0, 101.0], 0.95, 0.025)
    assert not is_tight([99.0, 100.0, 101.0], 0.95, 0.024)
