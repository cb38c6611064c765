"""The permutation that scattered frame allocators use."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtsim.base.memory import scatter, scatter_bits


@given(count=st.integers(1, 300), seed=st.integers(0, 2**24 - 1))
def test_every_number_is_given_out_exactly_once(count: int, seed: int) -> None:
    bits = scatter_bits(count)

    assert sorted(int(scatter(n, count, bits, seed)) for n in range(count)) == list(range(count))


@pytest.mark.parametrize("count", [1, 2, 4, 5, 4096, 4097])
def test_the_walk_leaves_the_range_less_than_half_of_the_time(count: int) -> None:
    assert count <= 2 ** scatter_bits(count) < max(2 * count, 5)


def test_neighbours_end_up_unrelated() -> None:
    count = 1 << 12
    places = [int(scatter(n, count, scatter_bits(count), 7)) for n in range(count)]

    close = sum(abs(a - b) == 1 for a, b in pairwise(places))

    assert close < 16  # a random order has 2 of them
