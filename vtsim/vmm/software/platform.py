"""What the simulator does for the program of a software CPU, because rows of a program are not bytes in memory.

It reads the row that stands for the bytes of an instruction, and works out what a stream accesses next. And it lets
time pass at once where the program does the same again and again: see `Forward`.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from attrs import define, field
from numpy.typing import NDArray

from vtsim.base import memory as mem
from vtsim.cpu import accounts as k
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.engine import Engine
from vtsim.vmm.monitor import layout as at
from vtsim.vmm.software import layout as w
from vtsim.vmm.software.instructions import ALU, CHUNK, FORWARD_FROM, form_of

MEMORY_FORMS: Final = (
    o.LD, o.ST, o.LEA, o.XADD, o.JMP_MEM, o.LDM, o.STM, o.LGDT, o.LIDT, o.SGDT, o.SIDT, o.INVLPG,
    o.JMP_FAR, o.CALL_FAR,
)  # fmt: skip
TARGETS: Final = (o.JMP, o.JCC, o.LOOP, o.CALL)
NUMBERED: Final = (
    o.MOV_FROM_CR, o.MOV_TO_CR, o.MOV_FROM_DR, o.MOV_TO_DR, o.SLDT, o.STR, o.SMSW, o.RDRAND, o.RDSEED,
    o.LAR, o.LSL, o.VERR, o.VERW, o.LLDT, o.MOV_FROM_SEGMENT, o.MOV_TO_SEGMENT, o.PUSH_SEGMENT, o.POP_SEGMENT,
    o.RET_FAR,
)  # fmt: skip
SCALES: Final = 3


@define(frozen=True)
class Row:
    """One row of a program, unpacked."""

    op: int
    length: int
    r1: int
    r2: int
    imm: int
    packed: int
    displacement: int
    extra: int
    activity: int

    @property
    def condition(self) -> int:
        """Of a conditional jump."""
        return o.TRUTH.index(self.displacement) if self.op == o.JCC else 0

    @property
    def form(self) -> str:
        """In which form the operands are."""
        return form_of(self.op, self.r1, self.r2, self.condition, self.packed)


def row_at(engine: Engine, hpa: int) -> Row | None:
    """The row whose bytes begin at a host-physical address."""
    a, t = engine.arena, engine.tags
    if int(mem.kind_of(a, hpa >> mem.PAGE_SHIFT)) != mem.CODE:
        return None
    page = int(a[int(a[mem.A_CODE_OF]) + (hpa >> mem.PAGE_SHIFT)])
    number = int(t[int(a[mem.A_CODE_MAPS]) + page * mem.PAGE_BYTES + hpa % mem.PAGE_BYTES])
    if number < 0:
        return None
    r = int(a[mem.A_ROWS]) + number * o.ROW_WORDS
    meta = int(a[r])
    return Row(
        op=meta & 0xFF, length=meta >> o.META_LENGTH & 0xFFFF, r1=int(a[r + o.ROW_R1]), r2=int(a[r + o.ROW_R2]),
        imm=int(a[r + o.ROW_IMM]), packed=int(a[r + o.ROW_MEM]), displacement=int(a[r + o.ROW_DISP]),
        extra=int(a[r + o.ROW_EXTRA]), activity=meta >> o.META_ACTIVITY & 31,
    )  # fmt: skip


def operands(row: Row, registers: int, work_scale: int) -> tuple[int, int, int, int, int]:
    """The words A, B, C, BASE and INDEX of a row's entry; `registers` is where a list of registers stands."""
    zero, where = w.register_offset(16), w.register_offset
    op, packed = row.op, row.packed
    if op in (o.WORK, o.LONG_WORK, o.STREAM):
        count = row.imm * work_scale if op == o.WORK else row.imm
        return work_scale if op == o.LONG_WORK else zero, zero, count, zero, zero
    if op in TARGETS:
        return zero, zero, row.extra, zero, zero
    if op in MEMORY_FORMS:
        index, shift = packed >> o.MEM_INDEX & 31, packed >> o.MEM_SCALE & 3
        segment = packed >> o.MEM_SEGMENT & 7
        at_index = where(index if index < 16 else 16)
        if segment:
            at_index, shift = at.V["FS_BASE" if segment == o.SEGMENT_FS else "GS_BASE"], 0
        a = registers if op in (o.LDM, o.STM) else where(row.r1) if row.r1 < 16 else row.imm
        return a, shift, row.displacement, where(packed & 31 if packed & 31 < 16 else 16), at_index
    if op in NUMBERED:
        return row.r1, row.r2, row.imm, zero, zero
    if op == o.IN:
        return zero, packed >> o.MEM_SIZE & 15, row.imm, zero, zero
    if op in (*ALU, o.MOV, o.DIVIDE):
        return where(min(row.r1, 16)), where(row.r2 if row.r2 < 16 else 16), row.imm, zero, zero
    a = where(row.r1) if row.r1 < 16 else row.imm
    return a, zero, row.imm, zero, zero


@define(eq=False)
class Forward:
    """Lets a part of LONG_WORK be executed many times at once, after it was executed and was the same three times.

    A part that changed the same counts, and nothing else, by the same numbers three times in a row has found every
    line and translation that it needs, and changes none: it will go on so until somebody else runs. What it counts is
    multiplied: of the owner that this CPU charges, for what other CPUs do meanwhile goes on by itself. Only the speed
    of the simulation depends on it; a test holds both against each other.
    """

    engine: Engine
    on: bool = True
    last: dict[int, tuple[NDArray[np.int64], int]] = field(factory=dict)  # by CPU: counts, instructions left
    step: dict[int, NDArray[np.int64]] = field(factory=dict)
    same: dict[int, int] = field(factory=dict)

    def measured(self, cpu: int) -> NDArray[np.int64]:
        """All that a part may change: cycles, marks, instructions, and the statistics of the CPU's owner."""
        return np.concatenate([self.engine.cpus[cpu][list(COUNTED)], self._statistics(cpu)])

    def _statistics(self, cpu: int) -> NDArray[np.int64]:
        """What is counted of a CPU's owner, but VM exits, which this program has none of."""
        at = int(self.engine.cpus[cpu][s.OWNER])
        counts: NDArray[np.int64] = self.engine.arena[at : at + k.OWN_EXITS]
        return counts

    def run(self, cpu: int, left: int) -> int:
        """How many parts were executed at once, of a LONG_WORK with so many instructions left."""
        if not self.on:
            return 0
        now = self.measured(cpu)
        before = self.last.get(cpu)
        self.last[cpu] = (now, left)
        if before is None or before[1] - left != CHUNK:
            self.same[cpu] = 0
            return 0
        step = now - before[0]
        known = self.step.get(cpu)
        self.step[cpu] = step
        if known is None or not np.array_equal(step, known):
            self.same[cpu] = 0
            return 0
        self.same[cpu] = self.same.get(cpu, 0) + 1
        if self.same[cpu] < 2:
            return 0
        m = self.engine.cpus[cpu]
        cycles = int(step[0])
        parts = min((left - FORWARD_FROM) // CHUNK, (int(m[s.LIMIT]) - int(m[s.CYCLE])) // cycles - 1)
        if parts <= 0 or any(step[COUNTED.index(slot)] for slot in (s.OWNER, s.FRACTION, s.FETCH_GENERATION)):
            return 0
        counts = step[len(COUNTED) :]
        if int(counts[: 2 * k.RING_STRIDE].sum()) != int(step[COUNTED.index(s.MARK)]):  # another CPU charges this owner
            return 0
        m[list(COUNTED)] += step[: len(COUNTED)] * parts
        self._statistics(cpu)[:] += counts * parts
        self.last[cpu] = (self.measured(cpu), left - parts * CHUNK)
        return parts


COUNTED: Final = (s.CYCLE, s.MARK, s.RETIRED, s.RETIRED_MARK, s.OPS, s.OWNER, s.FRACTION, s.FETCH_GENERATION)
