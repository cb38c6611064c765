"""Look-ups in data structures, as steps that a stream repeats: each makes one access, and may need those before it.

A step's place is `offset + n * stride` for one of `count` elements: the one at the random fraction that was drawn last,
so that an element and its parent, or one thing in two arrays, belong together; or the one whose turn it is. A step that
needs what was loaded waits for all that is outstanding, one that follows for the last access or the one before it;
others overlap as far as miss buffers and walkers allow. An address may have to be computed first (`after`): that holds
up the access, its walk too, but nothing behind it except by the room that it takes in the reorder buffer. A step may be
where the program decides by what it loaded: what comes after it then runs on as predicted, rightly or wrongly
(`vtsim.cpu.kernels.wrong_paths`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from attrs import evolve, frozen

from vtsim.cpu import ops
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler
from vtsim.guest.primitives import Stage, registers
from vtsim.guest.primitives.memory import start_of_random


@frozen
class Step:
    """One access: to which of `count` elements `stride` bytes apart, and `work` ordinary instructions after it."""

    offset: int
    count: int
    stride: int
    draws: bool = False  # a new random fraction first
    turns: bool = False  # the next turn first
    by_turn: bool = False  # the element whose turn it is, not that of the fraction
    needs: bool = False  # what was loaded before
    stores: bool = False
    updates: bool = False  # loads and stores the same place, by one instruction
    work: int = 0
    half: int = 0  # of a search's interval: its middle is read, not the element; a power of two
    after: int = 0  # cycles from its turn until its address is known
    slab: int = 0  # bytes of the elements that lie together, in a slab; 0 for all
    gap: int = 0  # bytes from a slab to the next one
    follows: int = 0  # the address was loaded by the last access (1) or by the one before it (2), for which all waits
    known: int = 0  # the same, but only this access waits for it, not what comes behind
    choices: int = 0  # ways that the program may go, by what was loaded; of a search's interval two
    within: int = 0  # nodes among which the fraction was found: their children are the choices; 0: any element
    by: int = 1  # it decides by the last access, after its work; before it by the access before (2), by all (0)

    @property
    def words(self) -> tuple[int, ...]:
        """As a stream reads it."""
        flags = (
            *(self.draws, self.turns, self.by_turn, self.needs, self.stores or self.updates, self.updates),
            *(
                self.follows == 1,
                self.follows == 2,
                self.choices > 0 and self.by == 2,
                self.choices > 0 and self.by == 0,
                self.known == 1,
                self.known == 2,
            ),
        )
        packed = sum(flag << bit for bit, flag in enumerate(flags)) | self.work << ops.STEP_WORK
        where = self.offset, self.count, self.stride, packed, self.half, self.after, self.slab, self.gap
        return *where, self.choices, self.within

    def place(self, element: int) -> int:
        """Where an element lies, in bytes from the beginning of the program's memory."""
        within = element * self.stride
        return self.offset + within + (within // self.slab * self.gap if self.slab else 0)


def lines(step: Step, count: int, apart: int = 64) -> Iterator[Step]:
    """A step, and the following lines of its element."""
    yield step
    for n in range(1, count):
        yield evolve(step, offset=step.offset + n * apart, draws=False, turns=False, needs=False, follows=0, known=0)


def step_words(steps: Sequence[Step]) -> int:
    """Room that steps take in the arena."""
    return ops.STEP_WORDS * len(steps) + 1


def look_up(a: Assembler, phase: Any, at: Stage, steps: Sequence[Step]) -> None:
    """Repeat the steps for as many accesses as the phase asks for."""
    table = np.array([len(steps), *(word for step in steps for word in step.words)], np.int64)
    values = {s.RSI: at.base, s.RDX: 0, s.RDI: 0, s.R8: 0, s.RBX: start_of_random(at), s.R9: at.place_table(table)}
    registers(a, {**values, s.RCX: at.scaled(phase.accesses)})
    a.emit(ops.STREAM, imm=ops.LOOKUP, comment="look-ups")
