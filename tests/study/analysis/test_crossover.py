"""Crossovers of functions whose zeros are known."""

from __future__ import annotations

from math import log2

import pytest

from vtsim.base.errors import ConfigError
from vtsim.study.analysis.crossover import crossover


def test_the_zero_of_a_parabola_is_found_to_the_tolerance_by_halving() -> None:
    found = crossover(lambda x: x * x - 2, 0, 16, tolerance=1e-6)

    assert found.low < 2**0.5 < found.high
    assert found.high - found.low <= 1e-6
    assert found.value == pytest.approx(2**0.5, abs=1e-9)
    assert len(found.tried) == 2 + log2(16 * 2**20)  # 2**-20 is the first width below 1e-6


def test_only_multiples_of_the_step_are_tried() -> None:
    found = crossover(lambda n: 1000 - 7 * n, 1, 1024, tolerance=0, step=1)

    assert (found.low, found.high) == (142, 143)
    assert (found.low_difference, found.high_difference) == (6, -1)
    assert all(value == int(value) for value, _ in found.tried)


def test_steps_begin_at_the_lower_end() -> None:
    found = crossover(lambda n: n - 21, 4, 100, tolerance=0, step=7)

    assert (found.low, found.high) == (18, 25)
    assert {(value - 4) % 7 for value, _ in found.tried} == {0}


def test_equality_is_the_crossover() -> None:
    found = crossover(lambda n: n - 8, 0, 16, tolerance=1)

    assert (found.low, found.high, found.value, len(found.tried)) == (8, 8, 8, 3)
    assert crossover(lambda n: n, 0, 16, tolerance=1).tried == ((0, 0), (16, 16))


def test_an_interval_without_a_crossover_is_refused_with_both_ends() -> None:
    with pytest.raises(ConfigError) as error:
        crossover(lambda x: x - 100, 1, 50, tolerance=1)
    assert str(error.value) == (
        "--between: A has less at both ends: A minus B is -99 at 1 and -50 at 50\n"
        " help: widen the interval, if there is a crossover"
    )
    with pytest.raises(ConfigError, match="5 to 5 is no interval"):
        crossover(lambda x: x, 5, 5, tolerance=1)
    with pytest.raises(ConfigError, match="5 to 7 is no interval of steps of 4"):
        crossover(lambda x: x, 5, 7, tolerance=1, step=4)


def test_two_that_never_differ_have_no_crossover() -> None:
    with pytest.raises(ConfigError) as error:
        crossover(lambda _: 0.0, 1, 9, tolerance=1)

    assert str(error.value) == (
        "--a, --b: A and B are the same at both ends, 1 and 9\n"
        " help: give them settings that differ, and a metric that these change"
    )
