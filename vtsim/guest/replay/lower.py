"""From a trace to rows of the engine: every recorded event in its ring, instructions between them as work.

Not modelled: how long a recorded guest was halted (its interrupt comes after a fixed time); accesses to memory
beyond the recorded first touches and uses of paging-structure entries.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from vtsim.cpu import ops as o
from vtsim.cpu.kernels import replay as e
from vtsim.guest.replay.plan import Placed, Plan
from vtsim.guest.replay.steps import CHANGES_RING, FIELDS, SHORT_WORK, STEPS, Step, event, registers
from vtsim.guest.traces.format import Trace
from vtsim.guest.traces.kinds import NUMBER

# fmt: off
WORDS: Final = {"r1": o.ROW_R1, "r2": o.ROW_R2, "imm": o.ROW_IMM, "mem": o.ROW_MEM, "disp": o.ROW_DISP,
                "extra": o.ROW_EXTRA}
# what the kernel does after an entry of this kind, until the return
ENTRIES: Final = {"SYSCALL": o.SYSCALL_PATH, "SYSENTER": o.SYSCALL_PATH, "EXC": o.PAGE_FAULT_PATH,
                  "IRQ": o.INTERRUPT_PATH}
RETURNS: Final = {"SYSRET": (o.SYSCALL_PATH,), "IRET": (o.PAGE_FAULT_PATH, o.INTERRUPT_PATH)}
# fmt: on


@frozen(kw_only=True, eq=False)
class Lowered:
    """A recorded guest as rows of `ops.ROW_WORDS` words; `origin` is the trace row that each stands for."""

    rows: NDArray[np.int64]
    origin: NDArray[np.int64]
    cpl: int

    def __len__(self) -> int:
        return len(self.rows)


@contextmanager
def uncollected() -> Iterator[None]:
    """Without the collector of cycles, which would look again and again at millions of steps that are none."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@uncollected()
def lower(trace: Trace, clock_hz: int, *, literal: bool = False, shadow: bool = False) -> Lowered:
    """Lower a trace for a CPU of this clock; `literal` repeats spins as often as they were recorded.

    With `shadow` accesses are made at linear addresses, through the guest's own tables.
    """
    plan = Plan(trace, clock_hz, literal, shadow)
    live = np.nonzero(plan.steps)[0]
    cpl = trace.cpl[live].astype(np.int64)
    ring_after = np.where(plan.of(*CHANGES_RING), plan.columns["ring"], trace.cpl)[plan.last[live]]
    ring_before = np.append(cpl[:1], ring_after[:-1])
    done = np.maximum.accumulate(trace.icount[live] + plan.own[live])
    work = np.maximum(trace.icount[live] - np.append(0, done[:-1]), 0)
    changes = (ring_before != cpl).astype(np.int64)
    works = np.where(work > SHORT_WORK, 2, np.minimum(work, 1))
    end = np.cumsum(changes + works + plan.steps[live])
    total = int(end[-1]) + 1 if len(end) else 1
    rows = np.zeros((total, o.ROW_WORDS), np.int64)
    origin = np.zeros(total, np.int64)
    activity = _activities(trace)[live]
    spread = np.repeat(np.arange(len(live)), changes + works + plan.steps[live])
    origin[:-1] = live[spread]
    at = end - plan.steps[live] - works - changes
    _fill(rows, at[changes > 0], event(e.RING, 0, "ring"), {"ring": cpl[changes > 0]})
    at += changes
    short, long = works == 1, works == 2
    _fill(rows, at[short], Step(o.WORK, imm="work"), {"work": work[short]})
    _fill(rows, at[long], registers(rcx="work"), {"work": work[long]})
    _fill(rows, at[long] + 1, Step(o.LONG_WORK), {})
    at += works
    for name, steps in STEPS.items():
        of_kind = plan.of(name)[live] & ~np.isin(live, list(plan.segments))
        columns = {column: values[live[of_kind]] for column, values in plan.columns.items()}
        for number, step in enumerate(steps):
            _fill(rows, at[of_kind] + number, step, columns)
    known = {row: placed for row, placed in plan.segments.items() if placed}
    first = at[np.searchsorted(live, list(known))].tolist()
    _fill_each(rows, origin, zip(first, known.values(), strict=True))
    _fill(rows, np.array([total - 1]), Step(o.STOP_OP), {})
    rows[:, o.ROW_META] |= 1 << o.META_LENGTH
    rows[:-1, o.ROW_META] |= activity[spread] << o.META_ACTIVITY
    rows[-1, o.ROW_META] |= o.BOOT << o.META_ACTIVITY | 1 << o.META_LAST
    return Lowered(rows=rows, origin=origin, cpl=int(cpl[0]) if len(cpl) else 0)


def _fill(rows: NDArray[np.int64], at: NDArray[np.int64], step: Step, columns: dict[str, NDArray[np.int64]]) -> None:
    rows[at, o.ROW_META] = step.op
    for name in FIELDS:
        operand = getattr(step, name)
        rows[at, WORDS[name]] = columns[operand] if isinstance(operand, str) else operand


def _fill_each(
    rows: NDArray[np.int64], origin: NDArray[np.int64], segments: Iterable[tuple[int, Sequence[Placed]]]
) -> None:
    """Steps one after the other from a place on, each of its own trace row."""
    flat = [(n, of_row, step) for place, placed in segments for n, (step, of_row) in enumerate(placed, place)]
    at = [n for n, _, _ in flat]
    origin[at] = [of_row for _, of_row, _ in flat]
    rows[at, o.ROW_META] = [step.op for _, _, step in flat]
    for name in FIELDS:
        rows[at, WORDS[name]] = [getattr(step, name) for _, _, step in flat]


def _activities(trace: Trace) -> NDArray[np.int64]:
    """What the cycles of each row are charged to: the entry into the kernel that it lies behind."""
    entries = {NUMBER[name]: path for name, path in ENTRIES.items()}
    returns = {NUMBER[name]: paths for name, paths in RETURNS.items()}
    turns = np.nonzero(np.isin(trace.kind, [*entries, *returns]))[0]
    charged = np.full(len(trace), o.BOOT, np.int64)
    stack: list[int] = []
    ring = np.append(trace.cpl[1:], trace.cpl[-1:])
    ends = np.append(turns[1:], len(trace))[: len(turns)]
    for turn, following in zip(turns.tolist(), ends.tolist(), strict=True):
        kind = int(trace.kind[turn])
        if kind in entries:
            stack.append(entries[kind])
            charged[turn] = stack[-1]
        elif ring[turn]:
            stack.clear()
        elif stack and stack[-1] in returns[kind]:
            stack.pop()
        charged[turn + 1 : following] = stack[-1] if stack else o.BOOT
    charged[trace.cpl > 0] = o.APPLICATION
    return charged
