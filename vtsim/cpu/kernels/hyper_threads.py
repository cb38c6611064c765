"""Two logical CPUs of one core: what they share, what each has half of, and what one loses while the other executes.

L1I, L1D and L2 are the core's: one of each, so that a line that one CPU brought or lost is there or gone for the other.
Miss buffers and walkers are the core's, too: whoever asks takes the next one, and waits for it if the other has it.
First- and second-level data TLBs, translation caches of both dimensions and the reorder buffer are divided: each CPU
has half, of the reorder buffer all of it while the other is halted. Instructions TLBs and what a CPU is (its registers,
its APIC) are its own.

Where both execute, each is slower, for they share ports and decoders: instructions of both that do not wait take
`work.two_threads_percent` of what one alone would execute in that time. A CPU that waits for memory, for a device or in
HLT leaves the core to the other one. What the other one does is taken from its last cycles, not from those at the same
time, of which it may not have executed all.

SDM: "Intel Hyper-Threading Technology Architecture"; "Detecting Hardware Multi-threading Support and Topology".
Not modelled: TLBs that are undivided while one CPU is halted; load and store buffers; microcode (of transitions, say),
during which the other CPU loses nothing; a core's budget of power.
"""

from __future__ import annotations

from vtsim.base.jit import Arena, Record, kernel
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.kernels.ledger import charge
from vtsim.cpu.kernels.overlap import SQUASHED

ONE: int = 1024  # shares are counted in its parts
NO_LINE: int = -1


@kernel
def take_core(m: Record, other: Record) -> None:
    """A CPU goes on whose core the other one may have used meanwhile: buffers and walkers are as that one left them.

    What it remembers of lines and pages that it found may be untrue. Loads of the other one keep their buffers, and
    hold nothing back in this one's reorder buffer.
    """
    m[s.ROB] = m[s.WHOLE_ROB] if other[s.HALTED] else max(m[s.WHOLE_ROB] // 2, 1)
    if m[s.RAN_LAST]:
        return
    m[s.RAN_LAST] = 1
    other[s.RAN_LAST] = 0
    m[s.FETCH_GENERATION] += 1  # of data pages, too
    for n in range(m[s.MLP]):
        if m[s.MISS_WINDOW + n] != other[s.MISS_WINDOW + n]:
            m[s.MISS_WINDOW + n] = other[s.MISS_WINDOW + n]
            m[s.MISS_ISSUED + n] = SQUASHED
            m[s.WRONG_LINE + n] = NO_LINE
    m[s.MISS_NEXT] = other[s.MISS_NEXT]
    m[s.MISS_HELD] = m[s.MLP]
    for n in range(m[s.WALKERS]):
        if m[s.WALK_WINDOW + n] != other[s.WALK_WINDOW + n]:
            m[s.WALK_WINDOW + n] = other[s.WALK_WINDOW + n]
            m[s.WALK_PAGE + n] = NO_LINE
    m[s.WALK_NEXT] = other[s.WALK_NEXT]


@kernel
def share_core(m: Record, a: Arena, other: Record, began: int, retired: int) -> None:
    """A CPU has run since a cycle, when so many instructions had retired: what it lost to the other one of its core."""
    passed = m[s.CYCLE] - began
    if passed <= 0:
        return
    executed = min((m[s.RETIRED] - retired) * m[s.CPI_NUMERATOR] // 100, passed)
    m[s.OF_LATE] = executed * ONE // passed
    lost = m[s.SHARED_FRACTION] + executed * other[s.OF_LATE] * m[s.CONTENTION]
    cycles = lost // (ONE * ONE)
    m[s.SHARED_FRACTION] = lost - cycles * ONE * ONE
    charge(m, a, o.SHARED_CORE, cycles)
