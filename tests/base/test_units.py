from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtsim.base.errors import ConfigError
from vtsim.base.units import (
    COUNT,
    DURATION,
    FACTOR,
    FREQUENCY,
    LARGEST,
    NUMBER,
    SHARE,
    SIZE,
    Dimension,
    quantity,
)


@pytest.mark.parametrize(
    ("dimension", "text", "value"),
    [
        (SIZE, "4 KiB", 4096),
        (SIZE, "1.5 KiB", 1536),
        (SIZE, "2MiB", 2 * 1024 * 1024),
        (SIZE, 64, 64),
        (SIZE, "1 kB", 1000),
        (DURATION, "250 us", 250_000),
        (DURATION, "4 ms", 4_000_000),
        (DURATION, "10 s", 10_000_000_000),
        (FREQUENCY, "2.2 GHz", 2_200_000_000),
        (COUNT, "10 M", 10_000_000),
        (COUNT, "1_000", 1000),
        (COUNT, "1e6", 1_000_000),
        (COUNT, 1e6, 1_000_000),
        (SHARE, "1 %", 0.01),
        (SHARE, 0.5, 0.5),
        (FACTOR, "0.99", 0.99),
    ],
)
def test_text_with_a_unit_becomes_a_number_of_the_base_unit(dimension: Dimension, text: object, value: float) -> None:
    assert dimension.parse(text) == value


@pytest.mark.parametrize(
    ("dimension", "value", "text"),
    [
        (SIZE, 1536, "1.5 KiB"),
        (SIZE, 4096, "4 KiB"),
        (SIZE, 2**30, "1 GiB"),
        (SIZE, 0, "0 B"),
        (SIZE, 2**30 + 1, "1073741825 B"),
        (DURATION, 250_000, "250 us"),
        (FREQUENCY, 2_200_000_000, "2.2 GHz"),
        (SHARE, 0.3, "30 %"),
        (COUNT, 12, "12"),
        (COUNT, 1024, "1024"),
        (COUNT, 65_536, "65536"),
        (COUNT, 25_000, "25 k"),
        (COUNT, 1_500_000, "1500 k"),
    ],
)
def test_a_number_is_written_in_the_largest_exact_unit(dimension: Dimension, value: float, text: str) -> None:
    assert dimension.format(value) == text


@pytest.mark.parametrize(
    ("dimension", "text", "error"),
    [
        (
            SIZE,
            "2 mib",
            "'2 mib' is not a size: unknown unit 'mib'\n"
            " help: did you mean 'MiB'? a size is written like '2 MiB' (B, KiB, MiB, GiB, TiB, kB, MB, GB)",
        ),
        (
            DURATION,
            "soon",
            "'soon' is not a duration\n help: a duration is written like '250 us' (ns, us, ms, s, µs)",
        ),
        (
            SIZE,
            "0.3 B",
            "'0.3 B' is not a whole number of B\n"
            " help: a size is written like '2 MiB' (B, KiB, MiB, GiB, TiB, kB, MB, GB)",
        ),
        (
            COUNT,
            "1e999",
            "'1e999' is too large\n help: a count is written like '10 M' (k, M, G, T)",
        ),
        (
            COUNT,
            10**50,
            "this number is too large\n help: a count is written like '10 M' (k, M, G, T)",
        ),
        (
            COUNT,
            True,
            "true is not a count\n help: a count is written like '10 M' (k, M, G, T)",
        ),
        (
            COUNT,
            float("nan"),
            "nan is not a count\n help: a count is written like '10 M' (k, M, G, T)",
        ),
        (
            NUMBER,
            [1],
            "a list is not a number\n help: a number is written like '0x608'",
        ),
    ],
)
def test_what_is_not_a_quantity_is_refused_with_what_is_accepted(
    dimension: Dimension, text: object, error: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        dimension.parse(text)
    assert str(raised.value) == error


@given(st.sampled_from([SIZE, DURATION, FREQUENCY, COUNT]), st.integers(0, LARGEST))
def test_what_is_written_reads_back(dimension: Dimension, value: int) -> None:
    assert dimension.parse(dimension.format(value)) == value


@given(st.floats(0, 1, allow_subnormal=False))
def test_shares_read_back_to_the_bit(value: float) -> None:
    assert SHARE.parse(SHARE.format(value)) == value


@given(
    st.sampled_from([SIZE, DURATION, FREQUENCY, COUNT, SHARE, FACTOR]),
    st.text() | st.floats() | st.integers(),
)
def test_nonsense_gives_a_config_error_and_nothing_else(dimension: Dimension, value: object) -> None:
    with contextlib.suppress(ConfigError):
        dimension.parse(value)


@pytest.mark.parametrize(
    ("text", "value"), [("8 MiB", 8 * 1024 * 1024), ("2.2 GHz", 2_200_000_000), ("16", None), ("kvm", None)]
)
def test_a_quantity_of_any_dimension_is_known_by_its_unit(text: str, value: int | None) -> None:
    assert quantity(text) == value
