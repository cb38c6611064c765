"""The guest of `changing_tables` on two vCPUs: both change tables, drop translations of their own, and access memory.

A step waits for steps of the other vCPU only where it must: where one writes a word of memory that the other reads or
writes, or drops translations that the other has made stale. So each access has one answer, and the hypervisor still has
to do with both vCPUs at once. With rings each has kept global pages of its own, and a stack for ring 0.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
from attrs import define, evolve, field

from tests.oracle.walker import Words
from tests.vmm import changing_tables as one
from tests.vmm.changing_tables import Paging, Plan, signed
from vtsim.base import memory as mem
from vtsim.cpu import ops
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.ept.tables import KERNEL_PAGE, PAGING, USER_PAGE, Table
from vtsim.guest.machine_view import PhysicalMemory, Start

GLANCES = 20_000  # instructions between two
VCPUS, FLOODS, DISTURBANCES = 2, 0.03, 0.15
CODES, STACKS = (one.CODE, one.CODE + (1 << 27)), (one.STACK, one.STACK + (1 << 20))
TASKS = (one.TSS, one.TSS + 4096)
PROGRESS = 0x5000_0000  # a word for each vCPU: steps that it has done
Emits = list[Callable[[Assembler], None]]


@define
class Watched(Words):
    """Words whose reads and writes are noted."""

    read: set[int] = field(factory=set)
    written: set[int] = field(factory=set)

    def __getitem__(self, hpa: int) -> int:
        self.read.add(hpa & ~7)
        return super().__getitem__(hpa)

    def __setitem__(self, hpa: int, value: int) -> None:
        if super().__getitem__(hpa) != value:
            self.written.add(hpa & ~7)
        super().__setitem__(hpa, value)


@define
class Step:
    """What one step reads and writes of memory, and the emits that it is made of."""

    read: set[int]
    written: set[int]
    emits: Emits
    waits_for: int = 0  # steps of the other vCPU


@define
class Side:
    """What a vCPU has loaded, what may be stale in it, and its steps."""

    root: int = 0
    fresh: set[int] = field(factory=set)
    stale: dict[int, set[int]] = field(factory=lambda: {0: set(), 1: set()})
    kept: dict[int, set[tuple[int, ...]]] = field(factory=dict)
    steps: list[Step] = field(factory=list)
    changes: int = 0  # steps up to and with the last one that changed a table


@define
class Pair(Plan):
    """Random programs for two vCPUs, and their expected log."""

    sides: tuple[Side, ...] = field(factory=lambda: tuple(Side() for _ in range(VCPUS)))
    turn: int = 0
    dropped: bool = False  # has this step dropped translations?
    changed: bool = False
    exits: Counter[str] = field(factory=Counter)  # that shadow paging must cause

    def after_all(self, cpu: int, action: Callable[[], None]) -> None:
        """A step of a vCPU that waits for all that the other has done."""
        self.step_of(cpu, action)
        self.sides[cpu].steps[-1].waits_for = len(self.sides[1 - cpu].steps)

    def build(self) -> Pair:
        self.words = Watched(self.words.frames)
        for side in self.sides:
            side.kept = {address: set(paths) for address, paths in self.kept.items()}
        steps, self.steps = self.steps, 1
        for _ in range(steps):
            self.turn = self.chance.randrange(VCPUS)
            self._step()
        return self

    def step_of(self, cpu: int, action: Callable[[], None]) -> None:
        """A step of a vCPU that waits for what it must."""
        self.turn = cpu
        self._step(action)

    def _step(self, action: Callable[[], None] | None = None) -> None:
        """One step of the vCPU whose turn it is: a random one, or what is asked for."""
        mine, other = self.sides[self.turn], self.sides[1 - self.turn]
        self.root, self.fresh, self.stale, self.kept, self.emits = mine.root, mine.fresh, mine.stale, mine.kept, []
        words = self.words
        assert isinstance(words, Watched)
        words.read, words.written = set(), set()
        self.dropped = self.changed = False
        known = dict(self.memory)
        if action is not None:
            action()
        elif self.chance.random() < FLOODS:
            for _ in range(3):  # so many stores to a root, one after the other, end its shadow page
                self.change(self.root_entry(), self.upper(4))
        elif self.chance.random() < DISTURBANCES:
            self.disturb()
        else:
            super().build()
        stored = {gpa for gpa, value in self.memory.items() if known.get(gpa) != value}
        step = Step(words.read if not self.changed else set(), words.written | stored, self.emits)
        step.waits_for = max([0, *(n + 1 for n, its in enumerate(other.steps) if conflict(step, its))])
        if self.dropped:
            step.waits_for = max(step.waits_for, other.changes)
        mine.root, mine.fresh, mine.stale = self.root, self.fresh, self.stale
        mine.steps.append(step)
        if self.changed:
            mine.changes = len(mine.steps)

    def root_entry(self) -> int:
        """Where an entry of a root stands."""
        return one.ROOTS[self.chance.randrange(2)] << 12 | self.chance.choice(one.TOPS) << 3

    def disturb(self) -> None:
        """Drop what was cached while the other vCPU may change tables: nothing is sure to be fresh then."""
        stale = {pcid: set(addresses) for pcid, addresses in self.stale.items()}
        self.load_root(self.root, False)
        self.stale, self.dropped = stale, False

    def glance(self, address: int) -> None:
        """Loads of an address that the other vCPU may change, until it has done all; what they find is not looked at."""
        cpu, number = self.turn, len(self.sides[self.turn].steps)

        def emit(a: Assembler) -> None:
            a.label(f"glance_{number}")
            a.work(GLANCES)
            a.mov(s.R15, f"glanced_{number}")
            a.ld(s.RAX, Mem(displacement=address))
            a.label(f"glanced_{number}")
            a.ld(s.RAX, Mem(displacement=PROGRESS + 8 * (1 - cpu)))
            a.cmp(s.RAX, len(self.sides[1 - cpu].steps))
            a.jcc(ops.CC_B, f"glance_{number}")

        self.emits.append(emit)

    def may_keep(self) -> None:
        for side in self.sides:
            self.kept = side.kept
            super().may_keep()
        self.kept = self.sides[self.turn].kept

    def change(self, at: int, value: int) -> None:
        stale, self.stale = self.stale, {0: set(), 1: set()}
        super().change(at, value)
        for each in (stale, self.sides[1 - self.turn].stale):
            for pcid, addresses in self.stale.items():
                each[pcid] |= addresses
        self.stale, self.changed = stale, True
        assert isinstance(self.words, Watched)
        self.words.written.add(at & ~7)

    def invalidate(self, address: int) -> None:
        self.dropped = True
        self.exits["INVLPG"] += 1
        super().invalidate(address)

    def toggle_globals(self) -> None:
        self.dropped = True
        self.exits["CR_ACCESS"] += 2
        super().toggle_globals()

    def invalidate_pcid(self, kind: int, root: int, address: int) -> None:
        self.dropped = True
        self.exits["INVPCID"] += 1
        super().invalidate_pcid(kind, root, address)

    def load_root(self, root: int, keep: bool) -> None:
        self.dropped = True
        self.exits["CR_ACCESS"] += 1
        super().load_root(root, keep)

    # --- the guest
    def guest(self, memory: PhysicalMemory) -> Start:
        """Lay the guest into memory: tables, log and handler are shared, code and stack are not."""
        following = iter(range(one.FIRST_FREE, one.ROOTS[0]))

        def words(gfn: int) -> np.ndarray:
            return memory.contents(gfn, mem.TABLE)

        words(one.ROOTS[0])
        table = Table(root=one.ROOTS[0], format=PAGING, take=lambda: next(following), words=words)
        programs = []
        for cpu, side in enumerate(self.sides):
            a = Assembler(f"changing tables {cpu}", CODES[cpu])
            self._emit(a, cpu, side)
            program = a.assemble()
            programs.append(program)
            frames = {}
            for page, _ in program.pages():
                gfn = next(following)
                table.map(page, [gfn], KERNEL_PAGE)
                frames[page] = memory.frame(gfn)
            memory.engine.place(program, frames.__getitem__)
            table.map(STACKS[cpu] - 4096, [next(following)], KERNEL_PAGE)
            tss = next(following)
            table.map(TASKS[cpu], [tss], KERNEL_PAGE)
            memory.store(tss * 4096, STACKS[cpu] << 32)  # RSP0, from byte 4 on
        logs = [next(following) for _ in range(-(-len(self.log) * one.LOG_WORDS // 512) + 1)]
        idt = next(following)
        for address, gfns in (
            (one.LOG, logs), (one.IDT, [idt]), (PROGRESS, [next(following)]), (one.WINDOW, list(range(one.WINDOW_FRAMES))),
        ):  # fmt: skip
            table.map(address, gfns, KERNEL_PAGE)
        if self.paging.rings:
            table.map(one.RING_3, [one.place_rings(memory, next(following))], USER_PAGE)
        self.logs = logs
        words(one.ROOTS[1])[0] = words(one.ROOTS[0])[0]
        self.lay_out(memory)
        one.fill_idt(memory, idt, programs[0], self.paging.word)
        first = Start(
            rip=CODES[0], rsp=STACKS[0], rflags=2, cr0=0x80050033, cr3=self.tops[0] | int(self.paging.pcid),
            cr4=self.paging.cr4, efer=0xD01,
            idtr_base=one.IDT, idtr_limit=0xFFF, gdtr_base=0, gdtr_limit=0x7F, tr_base=TASKS[0], cpl=0, msrs={},
            gs_base=0, fs_base=0,
        )  # fmt: skip
        return evolve(first, others=(evolve(first, rip=CODES[1], rsp=STACKS[1], tr_base=TASKS[1]),))

    def lay_out(self, memory: PhysicalMemory) -> None:
        """The tables as they are at first, and data."""
        initial = Plan(random.Random(self.seed), self.paging, 0).words
        for frame, entries in initial.frames.items():
            held = memory.contents(frame, mem.TABLE)
            for index in range(1 if frame in one.ROOTS else 0, 512):
                held[index] = signed(entries[index])
        for gfn in range(one.FIRST_DATA, one.FIRST_DATA + one.DATA_FRAMES):
            memory.store(gfn << 12, one.STAMP + gfn)
        for first in one.LARGE_FRAMES:
            for index in one.INDEXES[1]:
                memory.store(first + index << 12, one.STAMP + first + index)

    def _emit(self, a: Assembler, cpu: int, side: Side) -> None:
        """A vCPU's program: its steps; the first one stops when both have done theirs."""
        other, waited = 8 * (1 - cpu), 0
        for number, step in enumerate(side.steps):
            if step.waits_for > waited:
                waited = step.waits_for
                wait(a, PROGRESS + other, waited)
            for emit in step.emits:
                emit(a)
            a.st_value(Mem(displacement=PROGRESS + 8 * cpu), number + 1)
        if cpu:
            a.label("over")
            a.op(ops.PAUSE)
            a.jmp("over")
            return
        wait(a, PROGRESS + other, len(self.sides[1].steps))
        a.op(ops.STOP_OP)
        one.emit_handlers(a, (14,), self.paging)


def conflict(step: Step, other: Step) -> bool:
    """Must a step come behind another one?"""
    return bool(step.written & (other.read | other.written) or step.read & other.written)


def wait(a: Assembler, address: int, steps: int) -> None:
    """Until the other vCPU has done so many steps."""
    name = f"wait_{a.here:x}"
    a.label(name)
    a.op(ops.PAUSE)
    a.ld(s.RAX, Mem(displacement=address))
    a.cmp(s.RAX, steps)
    a.jcc(ops.CC_B, name)


def pair(seed: int, steps: int, paging: Paging) -> Pair:
    """The random programs of a seed."""
    made: Any = Pair(random.Random(seed), paging, steps)
    made.seed = seed
    return made.build()  # type: ignore[no-any-return]
