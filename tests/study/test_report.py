"""The report: golden text at two widths, and what must hold at any."""

from __future__ import annotations

import io
from collections.abc import Callable

import attrs
import pytest
from rich.console import Console

from vtsim.study.report import count, percent, plain_text, report, seconds
from vtsim.study.result import Result, ShadowPaging


@pytest.mark.parametrize("width", [80, 120])
def test_the_report_is_the_reviewed_one(result: Result, golden: Callable[[str, str], None], width: int) -> None:
    golden(f"report_{width}.txt", plain_text(report(result), width))


@pytest.mark.parametrize("width", [80, 100, 120, 200])
def test_no_line_is_longer_than_the_page_or_ends_in_blanks(result: Result, width: int) -> None:
    for line in plain_text(report(result), width).splitlines():
        assert len(line) <= width
        assert line == line.rstrip()


def test_what_is_piped_has_no_colours(result: Result) -> None:
    assert "\x1b" not in plain_text(report(result), 80)


def test_a_terminal_gets_colours(result: Result) -> None:
    terminal = Console(file=io.StringIO(), force_terminal=True, color_system="standard", width=80)

    with terminal.capture() as capture:
        terminal.print(report(result))

    assert "\x1b[31m" in capture.get()


def test_a_native_run_says_so_and_has_no_slowdown(result: Result) -> None:
    under = attrs.evolve(result.hypervisor, technique="native", personality="", paging="none")
    native = attrs.evolve(result, hypervisor=under, slowdown=None, native=None, exits=())

    text = plain_text(report(native), 80)

    assert text.startswith("key-value  native on skx-4114, seed 1\n")
    assert "slowdown    1" not in text
    assert "\nExits" not in text


def test_a_partial_result_says_so(result: Result) -> None:
    text = plain_text(report(attrs.evolve(result, partial=True)), 80)

    assert "\ninterrupted: this result is partial\n" in text


def test_notes_stand_above_the_figures(result: Result) -> None:
    text = plain_text(report(attrs.evolve(result, notes=("vmm.pv.batch has no effect here: so it is",))), 80)

    assert text.index("\nnote: vmm.pv.batch has no effect here: so it is\n") < text.index("\nCycles")


@pytest.mark.parametrize("width", [80, 120])
def test_the_report_of_shadow_paging_is_the_reviewed_one(
    result: Result, golden: Callable[[str, str], None], width: int
) -> None:
    """True, hidden and other page faults are those that exited; only VMs that have shadow pages stand there."""
    counted = ShadowPaging(
        page_faults=120_400, true_page_faults=90_000, hidden_page_faults=30_000, unprotecting_page_faults=150,
        other_page_faults=250, table_writes=240, entries_filled=30_020, entries_prefetched=9000, pages_made=1600,
        pages_reused=700, pages_zapped=1100, pages_flooded=4, pages_recycled=500, tables_unsynchronized=80,
        tables_synchronized=75, tables_nested=0, tables_shadowed=0,
    )  # fmt: skip
    shadowed = attrs.evolve(
        result,
        hypervisor=attrs.evolve(result.hypervisor, paging="shadow"),
        vms={**result.vms, "kv": attrs.evolve(result.vms["kv"], shadow=counted)},
    )
    text = plain_text(report(shadowed), width)

    assert max(map(len, text.splitlines())) <= width
    golden(f"report_shadow_{width}.txt", text[text.index("\nShadow paging") + 1 : text.index("\nTLBs")])


def test_a_run_that_did_nothing_still_has_a_report(result: Result) -> None:
    cycles = attrs.evolve(result.cycles, total=0, elapsed=0, by={}, by_owner={})

    text = plain_text(report(attrs.evolve(result, cycles=cycles, exits=(), events={}, slowdown=None)), 80)

    total = next(line for line in text.splitlines() if line.startswith("total"))
    assert total.split() == ["total", *"······"]


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "·"),
        (0.4, "0"),
        (12, "12"),
        (99_999, "99,999"),
        (100_000, "100 k"),
        (999_499, "999 k"),
        (999_500, "1.00 M"),
        (9_994_999, "9.99 M"),
        (9_995_000, "10.0 M"),
        (123_456_789, "123 M"),
        (2_000_000_000, "2.00 G"),
        (4_500_000_000_000, "4.50 T"),
        (1e18, "1.00e+18"),
    ],
)
def test_counts_keep_three_digits_and_small_ones_all(number: float, text: str) -> None:
    assert count(number) == text


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (None, "·"),
        (0, "0 %"),
        (1.0, "100 %"),
        (0.5, "50.00 %"),
        (0.00001, "0.01 %"),
        (0.999999, "99.99 %"),
    ],
)
def test_a_share_is_nothing_or_everything_only_when_it_is(share: float | None, text: str) -> None:
    assert percent(share) == text


@pytest.mark.parametrize(
    ("duration", "text"),
    [
        (90.0, "90.0 s"),
        (1.0, "1.00 s"),
        (0.4545, "454 ms"),
        (2.5e-6, "2.50 us"),
        (4e-8, "40 ns"),
        (0.0, "0 ns"),
    ],
)
def test_a_duration_is_in_the_largest_unit_that_fits(duration: float, text: str) -> None:
    assert seconds(duration) == text
