"""Which recorded rows become what: most a few steps of the table, some together an instruction or a loop."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

import numpy as np
from attrs import define, field
from numpy.typing import NDArray

from vtsim.cpu import ops as o
from vtsim.cpu.assembler import NO_MEMORY
from vtsim.cpu.kernels import replay as e
from vtsim.cpu.slots import RDX
from vtsim.guest.replay.follow import Follower
from vtsim.guest.replay.steps import (
    CLOCKS,
    EVENTS,
    FIELDS,
    HALTS,
    SHORT_WORK,
    SPIN_INSTRUCTIONS,
    STEPS,
    WITH_ERROR_CODE,
    Step,
    event,
    registers,
)
from vtsim.guest.traces.format import Trace
from vtsim.guest.traces.kinds import (
    NAME,
    NUMBER,
    PORT_MASK,
    PORT_REP,
    PORT_SIZE_MASK,
    PORT_SIZE_SHIFT,
    PORT_STRING,
)

HALT_NS: Final = 1_000_000
NS: Final = 1_000_000_000
WITHOUT_SIZE: Final = NO_MEMORY.packed & ~(15 << o.MEM_SIZE)
UNKNOWN_ACCESS_BYTES: Final = 4
Placed = tuple[Step, int]  # a step and the recorded row that it stands for


@define(eq=False)
class Plan:
    """For each row of a trace: how many steps it becomes, how many instructions and which last row these stand for.

    `segments` holds the steps of rows that the table alone does not describe.
    """

    trace: Trace
    clock_hz: int
    literal: bool
    shadow: bool = False
    steps: NDArray[np.int64] = field(init=False)
    own: NDArray[np.int64] = field(init=False)
    last: NDArray[np.int64] = field(init=False)
    columns: dict[str, NDArray[np.int64]] = field(init=False)
    segments: dict[int, tuple[Placed, ...]] = field(factory=dict, init=False)

    def __attrs_post_init__(self) -> None:
        lengths = np.zeros(256, np.int64)
        for number, name in NAME.items():
            lengths[number] = len(STEPS[name])
        self.steps = lengths[self.trace.kind]
        self.own = np.where(self.of(*EVENTS), 0, self.trace.n).astype(np.int64)
        self.last = np.arange(len(self.trace))
        self.columns = self._derived()
        if self.shadow:
            self._follow_tables()
        self._join_read_modify_write()
        self._give_halts_their_interrupts()
        self._join_string_iterations()
        self._join_loops()

    def of(self, *names: str) -> NDArray[np.bool_]:
        """Which rows are of these kinds."""
        return np.isin(self.trace.kind, [NUMBER[name] for name in names])

    def _derived(self) -> dict[str, NDArray[np.int64]]:
        t = self.trace
        interrupts = np.nonzero(self.of("IRQ"))[0]
        following = np.searchsorted(interrupts, np.arange(len(t)))
        size = np.where(np.isin(t.a2, (1, 2, 4, 8)), t.a2, UNKNOWN_ACCESS_BYTES)
        return {
            "a0": t.a0, "a1": t.a1, "a2": t.a2,
            "low": t.a1 & 0xFFFF_FFFF, "high": (t.a1 >> 32) & 0xFFFF_FFFF,
            "port": t.a0 & PORT_MASK,
            "port_operand": WITHOUT_SIZE | ((t.a0 >> PORT_SIZE_SHIFT) & PORT_SIZE_MASK) << o.MEM_SIZE,
            "device_operand": WITHOUT_SIZE | size << o.MEM_SIZE,
            "entry": t.a0 & ~7, "leaf": t.a1 & ~7,
            "has_error": np.isin(t.a0, WITH_ERROR_CODE).astype(np.int64),
            "ring": np.append(t.cpl[1:], t.cpl[-1:]).astype(np.int64),
            "next_vector": np.append(t.a0[interrupts], 0)[following],
            "halted_cycles": np.full(len(t), HALT_NS * self.clock_hz // NS, np.int64),
        }  # fmt: skip

    def _drop(self, rows: NDArray[np.bool_]) -> None:
        self.steps[rows] = 0
        self.own[rows] = 0

    def _replace(self, first: int, end: int, steps: tuple[Placed, ...], instructions: int) -> None:
        self.steps[first:end] = 0
        self.own[first:end] = 0
        self.steps[first] = len(steps)
        self.own[first] = instructions
        self.segments[first] = steps

    def _follow_tables(self) -> None:
        """Accesses are made at linear addresses, through tables that are filled as the recording tells."""
        follower = Follower(self.trace, self.columns["device_operand"], self._filled)
        self.steps[follower.dropped] = 0
        for row, steps in follower.steps.items():
            self.segments[row] = steps
            self.steps[row] = len(steps)

    # --- rows that belong together ----------------------------------------------------------------------
    def _join_read_modify_write(self) -> None:
        """A read directly followed by a write of one instruction at one address is one access: a write."""
        t = self.trace
        joined = self.of("TOUCH_R", "RETOUCH_R")[:-1] & self.of("TOUCH_W", "RETOUCH_W")[1:]
        for column in (t.icount, t.rip, t.a1):
            joined &= column[1:] == column[:-1]
        joined[[row for row in self.segments if row < len(joined)]] = False
        self._drop(np.append(joined, False))

    def _give_halts_their_interrupts(self) -> None:
        """The interrupt that ends a HLT stands behind it in the recording, where its handler says so."""
        interrupts = np.nonzero(self.of("IRQ"))[0]
        for halt in np.nonzero(self.of(*HALTS))[0]:
            place = int(np.searchsorted(interrupts, halt))
            if place < len(interrupts):
                interrupt = int(interrupts[place])
                self.steps[interrupt] = 0
                before = self.segments.pop(interrupt, ())[: -len(STEPS["IRQ"])]
                if before:
                    self.segments[int(halt)] = (*before, *self._filled([int(halt)]))
                    self.steps[halt] = len(self.segments[int(halt)])
            else:
                self.steps[halt] = 0  # nothing would ever end it

    def _join_string_iterations(self) -> None:
        """INS or OUTS with REP has a row per iteration and one that finds RCX zero.

        Its memory has been touched before.
        """
        t = self.trace
        string = self.of("IN", "OUT") & (t.a0 & PORT_STRING != 0)
        written = np.nonzero(self.of("TOUCH_W", "RETOUCH_W"))[0]
        end = 0
        for first in np.nonzero(string)[0].tolist():
            if first < end:
                continue
            end = first + 1
            repeated = int(t.a0[first] & PORT_REP != 0)
            while repeated and end < len(t) and string[end] and t.rip[end] == t.rip[first]:
                end += 1
            iterations = max(end - first - repeated, 1)
            place = int(np.searchsorted(written, first))
            memory = int(t.a0[written[place - 1]]) & ~0xFFF if place else 0
            port, operand = int(self.columns["port"][first]), int(self.columns["port_operand"][first])
            inward = t.kind[first] == NUMBER["IN"]
            steps = (
                event(e.REGISTERS, memory, 0, iterations, port),  # RDI and RSI point to the page written last
                Step(o.INS if inward else o.OUTS, r2=RDX, mem=operand, extra=repeated),
            )
            self._replace(first, end, tuple((step, first) for step in steps), end - first)

    def _join_loops(self) -> None:
        """A row with n > 1 is a loop, together with the rows that it cannot have ended before.

        Either it waits for time to pass, or it is a repetition with ordinary work in between.
        """
        t = self.trace
        clock, n = self.of(*CLOCKS), t.n.astype(np.int64)
        end = 0
        for first in np.nonzero((n > 1) & (self.steps > 0))[0].tolist():
            if first < end:
                continue
            end, executed, span = first + 1, int(n[first]), 0
            while end < len(t) and executed > (span := int(t.icount[end] - t.icount[first])):
                executed += int(self.own[end])
                end += 1
            span = max(span, executed)
            merged = n[first:end] > 1
            waits = bool(clock[first:end][merged].all()) and span <= int(n[first:end].max()) * SPIN_INSTRUCTIONS
            steps = self._loop(first, end, span - executed, span if waits and not self.literal else 0)
            self._replace(first, end, steps, span)
            self.last[first] = end - 1

    def _loop(self, first: int, end: int, work: int, wait: int) -> tuple[Placed, ...]:
        """Every row once, then those that were seen again: for the time of `wait` instructions, or as often."""
        live = [row for row in range(first, end) if self.steps[row]]
        seen = {row: int(self.trace.n[row]) for row in live}
        most = max(seen.values())
        between = [(step, first) for step in work_steps(work // most)]
        steps = [*self._filled(live), *between]
        done = 1
        for times in sorted(set(seen.values()) - {1}):
            body = [*self._filled(row for row in live if seen[row] >= times), *between]
            cycles = wait * (times - done) // most * self.clock_hz // self.trace.guest.instructions_per_second
            begin = event(e.UNTIL, imm=cycles) if wait else event(e.COUNT, imm=times - done)
            again = event(e.UNTIL_AGAIN if wait else e.COUNT_AGAIN, imm=len(body))
            steps += [(begin, first), *body, (again, first)]
            done = times
        return (*steps, *((step, first) for step in work_steps(work % most)))

    def _filled(self, rows: Iterable[int]) -> Iterator[Placed]:
        """The steps of rows, with numbers for the names of columns."""
        for row in rows:
            if row in self.segments:
                yield from self.segments[row]
                continue
            for step in STEPS[NAME[int(self.trace.kind[row])]]:
                operands = (getattr(step, name) for name in FIELDS)
                numbers = (int(self.columns[v][row]) if isinstance(v, str) else v for v in operands)
                yield Step(step.op, *numbers), row


def work_steps(instructions: int) -> list[Step]:
    """Ordinary instructions that were only counted; many of them can be interrupted anywhere."""
    if instructions <= 0:
        return []
    if instructions <= SHORT_WORK:
        return [Step(o.WORK, imm=instructions)]
    return [registers(rcx=instructions), Step(o.LONG_WORK)]
