"""Trace events as rows and as files."""

from __future__ import annotations

from array import array
from pathlib import Path

import numpy as np
import pytest

from vtsim.base import trace
from vtsim.base.errors import ConfigError
from vtsim.base.trace import TraceEvent

EVENTS = [
    TraceEvent(1000, 0, 3, 2, trace.SYSCALL, 39, 80, (0x401000,)),
    TraceEvent(1500, 1, 2, 0, trace.EXIT, 48, 790, (-1, 0x182, 0x7F000)),
    TraceEvent(1700, 0, 0, 2, trace.ENTRY, 48, 3790, (-1, 0, 0x9000), 1200, 3),
]


def test_every_kind_says_what_its_details_are() -> None:
    assert len(trace.DETAIL_NAMES) == len(trace.KINDS)
    assert max(map(len, trace.DETAIL_NAMES)) == trace.DETAILS
    assert trace.COLUMNS[trace.FIXED :][: trace.DETAILS] == ("detail0", "detail1", "detail2")


@pytest.mark.parametrize("event", EVENTS)
def test_an_event_survives_its_row(event: TraceEvent) -> None:
    assert len(event.row()) == len(trace.COLUMNS)
    assert TraceEvent.from_row(event.row()) == event


@pytest.mark.parametrize("events", [[], EVENTS])
def test_events_survive_their_file(events: list[TraceEvent], tmp_path: Path) -> None:
    path = tmp_path / "trace.npz"
    with path.open("wb") as file:
        trace.save(file, array("q", [value for event in events for value in event.row()]))

    assert list(trace.load(path)) == events


def test_a_file_that_is_no_trace_is_refused(tmp_path: Path) -> None:
    text, other = tmp_path / "text.npz", tmp_path / "other.npz"
    text.write_text("nothing of the kind")
    np.savez(other, cycle=np.zeros(1))

    for path in (text, other):
        with pytest.raises(ConfigError) as error:
            list(trace.load(path))
        assert str(error.value) == f"{path}: not a trace that a run wrote"

    with pytest.raises(ConfigError) as error:
        list(trace.load(tmp_path / "missing.npz"))
    assert str(error.value) == f"{tmp_path / 'missing.npz'}: No such file or directory"
