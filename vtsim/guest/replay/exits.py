"""Which recorded rows caused VM exits: the engine's log of a replay, as counts by reason and access per phase."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from vtsim.base import memory as mem
from vtsim.base.errors import ModelError
from vtsim.cpu.engine import Engine
from vtsim.guest.replay.build import LOG_WORDS, Recording
from vtsim.guest.traces.kinds import NUMBER, PORT_MASK
from vtsim.vmcs import reasons as x

REASON_SHIFT = 32
ACCESSES = {"IN": "in", "OUT": "out", "MMIO_R": "read", "MMIO_W": "write"}
BY_ACCESS = (x.IO_INSTRUCTION, x.EPT_VIOLATION, x.EPT_MISCONFIG, x.EXCEPTION_NMI)


@frozen(kw_only=True)
class ReplayedExits:
    """VM exits of a recorded guest: {(exit reason, access or empty, exit qualification): counts per phase}."""

    trace: str
    phases: tuple[str, ...]
    counts: Mapping[tuple[int, str, int], tuple[int, ...]]


def replayed_exits(engine: Engine, recording: Recording) -> ReplayedExits:
    """Read the log. An access is named as recorded exits name theirs: `in:0x71`, `write:0xfee000b0`."""
    log = exit_log(engine)
    log = log[log[:, 0] & ((1 << REASON_SHIFT) - 1) < len(recording.lowered) - 1]  # its end is no exit
    origin = recording.lowered.origin[log[:, 0] & ((1 << REASON_SHIFT) - 1)]
    reasons = log[:, 0] >> REASON_SHIFT
    trace = recording.trace
    phase = trace.phase_of_rows()[origin]
    kind, address = trace.kind[origin], trace.a0[origin]
    named = np.isin(reasons, BY_ACCESS)
    directions = {NUMBER[name]: direction for name, direction in ACCESSES.items()}
    ports = (NUMBER["IN"], NUMBER["OUT"])
    tally: dict[tuple[int, str, int], Counter[int]] = {}
    columns = (column.tolist() for column in (reasons, log[:, 1], phase, kind, address, named))
    for reason, qualification, number, of_kind, where, has_name in zip(*columns, strict=True):
        access = ""
        if has_name and of_kind in directions:
            where = where & PORT_MASK if of_kind in ports else where
            access = f"{directions[of_kind]}:{where:#x}"
        if reason in (x.IO_INSTRUCTION, x.EXCEPTION_NMI, x.INVLPG):
            qualification = 0
        tally.setdefault((reason, access, qualification), Counter())[number] += 1
    return ReplayedExits(
        trace=trace.name,
        phases=tuple(one.name for one in trace.phases),
        counts={key: tuple(c[n] for n in range(len(trace.phases))) for key, c in tally.items()},
    )


def exit_log(engine: Engine) -> NDArray[np.int64]:
    """The log so far: row of the recording and exit reason (from bit 32), exit qualification."""
    a = engine.arena
    count, limit, at = (int(a[slot]) for slot in (mem.A_REPLAY_LOGGED, mem.A_REPLAY_LOG_LIMIT, mem.A_REPLAY_LOG))
    if count > limit:
        raise ModelError("more exits than the log of a replay holds", {"exits": count, "limit": limit})
    return a[at : at + count * LOG_WORDS].reshape(count, LOG_WORDS)
