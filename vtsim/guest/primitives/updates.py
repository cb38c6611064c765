"""HPC Challenge's RandomAccess: words of a table, each loaded, changed and stored at a random place.

The program keeps 128 generators, so that no number needs the one before it. Each number is divided by the table's
length; the remainder and the length less the remainder are the places of two updates, so that neither walk nor access
begins before the division ends. An update is one instruction with a memory operand that it reads and writes.
Source: vmitosis-workloads, gups/gups.c; its loop in the artifact's binary has 16 instructions, of which the 64-bit
division is 36 micro-operations and takes 42 cycles where the dividend's upper half is zero (A. Fog, Instruction tables:
Skylake); each update is two.
Not modelled: that the second place mirrors the first; the generators' own 1 KiB; how many divisions the divider has at
once (on Skylake its micro-operations take as long to issue as it needs between two).
"""

from __future__ import annotations

from attrs import evolve

from vtsim.cpu.assembler import Assembler
from vtsim.guest.primitives import Stage, lowering
from vtsim.guest.primitives.lookups import Step, look_up, step_words
from vtsim.guest.structures import LINE, UpdatesSpec

SECOND_WORK = 3  # the rest of the first update, and the second place
NEXT_WORK = 48  # the rest of the second update, the loop, the generator and the division


def update_steps(phase: UpdatesSpec) -> list[Step]:
    """A pair: the first place that the division gives, and the second."""
    first = Step(0, phase.table // LINE, LINE, draws=True, updates=True, work=SECOND_WORK, after=phase.division)
    return [first, evolve(first, work=NEXT_WORK)]


@lowering(UpdatesSpec, table_words=lambda phase: step_words(update_steps(phase)))
def updates(a: Assembler, phase: UpdatesSpec, at: Stage) -> None:
    """Random places, as many at once as buffers allow."""
    look_up(a, phase, at, update_steps(phase))
