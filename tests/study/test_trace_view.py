"""Trace lines, filters and limits."""

from __future__ import annotations

from array import array

import pytest

from vtsim.base import trace
from vtsim.base.errors import ConfigError
from vtsim.base.trace import KINDS, TraceEvent
from vtsim.study.trace_view import HEADER, KIND_WORDS, TraceFilter, TraceView, line
from vtsim.vmcs import reasons

RIP = 0xFFFF_FFFF_8100_0000 - 2**64  # as an engine word
INJECTED = 1 << 31 | 0x30


def event(kind: int, reason: int, *detail: int, came: int = 2, to: int = 0, cycles: int = 790) -> TraceEvent:
    return TraceEvent(123_456, 0, came, to, kind, reason, cycles, detail)


# fmt: off
LINES = [
    (event(trace.EXIT, reasons.EPT_VIOLATION, RIP, 0x182, 0x7F000),
     "        123,456   0 N0   R0 EXIT EPT_VIOLATION              790  "
     "gpa data write, not present, gpa 0x7f000, rip 0xffffffff81000000"),
    (event(trace.EXIT, reasons.CPUID, 0x401000, 0, 0, came=3),
     "        123,456   0 N3   R0 EXIT CPUID                      790  rip 0x401000"),
    (event(trace.ENTRY, reasons.EXTERNAL_INTERRUPT, 0x10, INJECTED, came=0, to=2, cycles=3790),
     "        123,456   0 R0   N0 ENTRY EXTERNAL_INTERRUPT      3,790  "
     "injects external interrupt vector 48, rip 0x10"),
    (event(trace.SYSCALL, 39, 0x401000, came=3, to=2, cycles=80),
     "        123,456   0 N3   N0 SYSCALL 39                       80  rip 0x401000"),
    (event(trace.FAULT, 14, 0x10, 6, 0x7FFF0000, came=3, to=2),
     "        123,456   0 N3   N0 FAULT #PF                       790  "
     "error code 0x6 at 0x7fff0000, rip 0x10"),
    (event(trace.INTERRUPT, 0x30, 0x10, to=2),
     "        123,456   0 N0   N0 INTERRUPT 0x30                  790  rip 0x10"),
    (event(trace.IRET, -1, 0x10, to=3),
     "        123,456   0 N0   N3 IRET                            790  rip 0x10"),
    (event(trace.HALT, -1, to=2, cycles=19_000),
     "        123,456   0 N0   N0 HALT                         19,000"),
]
# fmt: on


@pytest.mark.parametrize(("one", "text"), LINES)
def test_a_transition_is_one_line_in_fixed_columns(one: TraceEvent, text: str) -> None:
    assert line(one) == text


def test_the_header_stands_over_the_columns() -> None:
    assert HEADER == "          cycle cpu from to what                         cycles  detail"


def show(events: list[TraceEvent], **options: object) -> tuple[TraceView, str]:
    written: list[str] = []
    view = TraceView(write=written.append, **options)  # type: ignore[arg-type]
    view.take(events)
    return view, "".join(written)


def test_a_view_writes_the_header_once_and_plain_lines() -> None:
    first, second = LINES[0][0], LINES[1][0]
    written: list[str] = []
    view = TraceView(write=written.append)

    view.take([first])
    view.take([second])

    assert "".join(written) == f"{HEADER}\n{LINES[0][1]}\n{LINES[1][1]}\n"


def test_colour_is_that_of_the_new_privilege_state_and_outside_the_columns() -> None:
    _, text = show([LINES[1][0]], colour=True)

    assert text.splitlines()[1] == f"\x1b[31m{LINES[1][1]}\x1b[0m"


def test_a_terminal_cuts_what_does_not_fit() -> None:
    _, text = show([LINES[0][0]], width=80)

    assert text.splitlines()[1] == LINES[0][1][:79] + "…"


def test_after_the_limit_nothing_more_is_asked_for() -> None:
    view, text = show([LINES[0][0]] * 5, limit=2)

    assert view.kinds == 0
    assert text == f"{HEADER}\n{LINES[0][1]}\n{LINES[0][1]}\n(trace limit of 2 reached)\n"


def test_what_is_kept_is_what_was_shown() -> None:
    events = [one for one, _ in LINES]

    view, _ = show(events, wanted=TraceFilter.parse("faults,CPUID"), kept=array("q"))

    assert view.kept == array("q", [*events[1].row(), *events[4].row()])


def test_every_kind_of_event_has_a_filter_word() -> None:
    together = 0
    for kinds in KIND_WORDS.values():
        assert not together & kinds
        together |= kinds

    assert together == trace.ALL_KINDS == 2 ** len(KINDS) - 1


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("exits", [0, 1]),
        ("entries", [2]),
        ("syscalls, faults", [3, 4]),
        ("returns,halts", [6, 7]),
        ("EPT_VIOLATION", [0]),
        ("ept_violation,external_interrupt", [0, 2]),
        ("interrupts", [5]),
    ],
)
def test_a_filter_takes_kinds_and_the_exits_and_entries_of_reasons(text: str, shown: list[int]) -> None:
    wanted = TraceFilter.parse(text)

    assert [at for at, (one, _) in enumerate(LINES) if wanted.accepts(one)] == shown
    assert all(wanted.recorded >> LINES[at][0].kind & 1 for at in shown)


def test_a_vector_that_equals_an_exit_reason_is_not_that_exit() -> None:
    assert not TraceFilter.parse("CPUID").accepts(event(trace.FAULT, reasons.CPUID))


def test_an_unknown_word_in_a_filter_is_refused() -> None:
    with pytest.raises(ConfigError) as error:
        TraceFilter.parse("exits,EPT_VOILATION")

    assert str(error.value) == (
        "--trace-filter: unknown kind of event or exit reason 'EPT_VOILATION'\n help: did you mean 'EPT_VIOLATION'?"
    )
