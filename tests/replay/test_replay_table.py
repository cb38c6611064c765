"""Predicted beside recorded: what depends on the speed of the machine is left out on both sides."""

from __future__ import annotations

from vtsim.guest.replay.exits import ReplayedExits
from vtsim.guest.traces.recorded_exits import RecordedExits
from vtsim.study.replay_table import replay_table
from vtsim.study.result import ReplayExit
from vtsim.vmcs import reasons as x

NONE: dict[str, tuple[int, ...]] = {}


def recorded(**tables: dict[str, tuple[int, ...]]) -> RecordedExits:
    names = (
        "reasons", "ports", "msrs", "cpuid", "mmio", "control_registers", "exceptions", "ept_qualifications",
        "ept_regions",
    )  # fmt: skip
    return RecordedExits(
        source="a machine", phases=("a", "b"), not_recorded=("EXTERNAL_INTERRUPT",),
        time_dependent_reasons=frozenset({"HLT"}), time_dependent_accesses=frozenset({"in:0x42"}),
        tables={name: tables.get(name, NONE) for name in names},
    )  # fmt: skip


def test_deviation_is_of_what_is_compared():
    predicted = ReplayedExits(
        trace="boot", phases=("a", "b"),
        counts={
            (x.IO_INSTRUCTION, "in:0x42", 0): (7, 0), (x.IO_INSTRUCTION, "out:0x80", 0): (3, 6),
            (x.HLT, "", 0): (0, 4), (x.EXTERNAL_INTERRUPT, "", 0): (1, 1),
        },
    )  # fmt: skip
    truth = recorded(
        reasons={"IO_INSTRUCTION": (20, 10), "HLT": (0, 5)}, ports={"in:0x42": (20, 0), "out:0x80": (4, 6)}
    )
    table = replay_table(predicted, truth)
    assert table.trace == "boot"
    assert table.recorded_on == "a machine"
    assert table.exits == (
        ReplayExit(reason="IO_INSTRUCTION", predicted=9, recorded=10, deviation_percent=-10.0,
                   left_out_predicted=7, left_out_recorded=20),
        ReplayExit(reason="HLT", predicted=0, recorded=0, deviation_percent=None,
                   left_out_predicted=4, left_out_recorded=5),
        ReplayExit(reason="EXTERNAL_INTERRUPT", predicted=0, recorded=0, deviation_percent=None,
                   left_out_predicted=2, left_out_recorded=0),
    )  # fmt: skip
