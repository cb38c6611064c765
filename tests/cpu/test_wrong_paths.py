"""Look-ups that run on past their decisions: what a wrong path may change, and when everything is there.

SDM: "Caching Translation Information"; "Accessed and Dirty Flags".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from attrs import evolve, frozen
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.cpu.bench import DATA, NO_PREFETCHERS, Native, Virtual, native, virtual
from vtsim.base import jit
from vtsim.cpu import accounts as k
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler
from vtsim.cpu.kernels.overlap import next_random
from vtsim.cpu.kernels.wrong_paths import chance, drawn
from vtsim.ept import spec as e
from vtsim.guest.primitives.lookups import Step

ACCESSED, DIRTY = e.PTE_ACCESSED, e.PTE_DIRTY
PAGE = 0x1000
OTHER = DATA + 3 * PAGE  # where only a wrong path goes


def stepped(random: int) -> int:
    with jit.quiet():
        return int(next_random(np.int64(random)))


def fraction_of(random: int) -> int:
    return int(drawn(np.int64(random)))


SEEDS = [n * 0x1E3779B97F4A7C15 & (1 << 62) - 1 for n in range(1, 99)]
LOW = next(n for n in SEEDS if fraction_of(stepped(n)) < 1 << 29)  # the first fraction is below a quarter
HIGH = next(n for n in SEEDS if fraction_of(stepped(n)) > 3 << 29)


def table_in(bench: Native, steps: Sequence[Step]) -> int:
    """Put steps into a frame of values; the arena index of the table."""
    words = [len(steps), *(word for step in steps for word in step.words)]
    page = bench.engine.contents(bench.engine.allocate(), 3)
    page[: len(words)] = words
    arena = bench.engine.arena
    return int(page.__array_interface__["data"][0] - arena.__array_interface__["data"][0]) // 8


def looked_up(bench: Native, steps: Sequence[Step], accesses: int, random: int, ring: int = 0) -> int:
    """Run look-ups of data that begins at DATA, whose first line is loaded before; the stop code."""
    table = table_in(bench, steps)

    def write(a: Assembler) -> None:
        a.ld(s.RAX, a_mem(DATA + 0x800))
        values = {s.RSI: DATA, s.RDX: 0, s.RDI: 0, s.R8: 0, s.RBX: random, s.R9: table, s.RCX: accesses}
        for register, value in values.items():
            a.mov(register, value)
        a.emit(o.STREAM, imm=o.LOOKUP)
        a.op(o.STOP_OP, imm=1)

    return bench.run(write, ring)


def a_mem(address: int) -> Any:
    from tests.cpu.bench import o_mem

    return o_mem(address)


def count(bench: Native, counter: int) -> int:
    return int(bench.engine.arena[bench.m[s.OWNER] + counter])


# --- what a wrong path may change -------------------------------------------------------------------------------------

# a search whose last child is predicted: the lower one lies in page 1, the other one in page 3
PART = (
    Step(0, 1, 64, draws=True, choices=2, within=1),
    Step(PAGE, 2, 2 * PAGE, work=300),
)


def set_flags(space: Any, gva: int, flags: int) -> None:
    leaf = space.table.find(gva)
    space.table.set_entry(gva, leaf.entry | flags, 1)


def entry(space: Any, gva: int) -> int:
    leaf = space.table.find(gva)
    return leaf.entry if leaf else 0


def supervisor(space: Any) -> None:
    space.table.set_entry(OTHER, (entry(space, OTHER) | ACCESSED) & ~e.PTE_USER, 1)


CASES: dict[str, tuple[Callable[[Any], None], int, int]] = {  # what is so, ring, walks abandoned
    "accessed": (lambda space: set_flags(space, OTHER, ACCESSED), 0, 0),
    "not accessed": (lambda space: None, 0, 1),
    "absent": (lambda space: space.table.unmap(OTHER, 1), 0, 1),
    "supervisor": (supervisor, 3, 1),
    "reserved bit": (lambda space: set_flags(space, OTHER, ACCESSED | 1 << 51), 0, 1),
}


@pytest.mark.parametrize("kind", [native, virtual], ids=["native", "behind EPT"])
@pytest.mark.parametrize("case", CASES)
def test_a_wrong_path_changes_nothing_that_a_program_sees(kind: Callable[[], Native], case: str) -> None:
    change, ring, abandoned = CASES[case]
    bench = kind()
    space = bench.guest if isinstance(bench, Virtual) else bench.space
    change(space)
    before = entry(space, OTHER)

    assert looked_up(bench, PART, 2, LOW, ring) == 4  # STOP: nothing faulted, nothing exited

    assert entry(space, OTHER) == before and not before & DIRTY
    assert [count(bench, n) for n in (k.MISPREDICTIONS, k.WRONG_LOADS, k.WRONG_WALKS)] == [1, 1, 1]
    assert count(bench, k.WALKS_ABANDONED) == abandoned
    faults = (k.WALKS_FAULTED, k.WALKS_VIOLATED, k.WALKS_MISCONFIGURED, k.EXCEPTIONS)
    assert [count(bench, n) for n in faults] == [0] * 4
    assert count(bench, k.ACCESSES) == 1 + 2  # the load before, and what was asked for
    assert bool(entry(space, DATA + PAGE) & ACCESSED)  # the right path's page


def test_the_right_prediction_makes_no_other_access_and_is_charged_nothing() -> None:
    bench = native()
    assert looked_up(bench, PART, 2, HIGH) == 4
    assert [count(bench, n) for n in (k.MISPREDICTIONS, k.WRONG_LOADS, k.WRONG_WALKS)] == [0, 0, 0]
    assert entry(bench.space, OTHER) & ACCESSED and not entry(bench.space, DATA + PAGE) & ACCESSED


@pytest.mark.parametrize("missing", ["mapping", "accessed flag"])
def test_no_ept_violation_and_no_flag_of_ept_comes_of_a_wrong_path(missing: str) -> None:
    bench = virtual()
    set_flags(bench.guest, OTHER, ACCESSED)
    frame = bench.guest.table.find(OTHER).frame  # type: ignore[union-attr]
    ept = bench.guest.ept
    assert ept is not None
    if missing == "mapping":
        ept.unmap(frame << 12, 1)
    else:
        bench.set(EPT_POINTER=ept.root << 12 | 0x1E | 1 << 6)

    assert looked_up(bench, PART, 2, LOW) == 4

    leaf = ept.find(frame << 12)
    assert (
        leaf is None if missing == "mapping" else leaf is not None and not leaf.entry & (e.EPT_ACCESSED | e.EPT_DIRTY)
    )
    assert count(bench, k.WALKS_ABANDONED) == 1 and count(bench, k.WALKS_VIOLATED) == 0


def test_what_a_wrong_path_walked_and_loaded_is_cached() -> None:
    """The same page read afterwards: no walk, and its line is there; not so where the wrong path had to give up."""
    found = []
    for flags in (ACCESSED, 0):
        bench = native()
        set_flags(bench.space, OTHER, flags)
        after = (*PART, Step(3 * PAGE, 1, 64, needs=True))
        assert looked_up(bench, after, 3, LOW) == 4
        found.append((count(bench, k.WALKS) - count(bench, k.WRONG_WALKS), count(bench, k.DATA_DRAM)))
    (walks, lines), (more_walks, more_lines) = found
    assert more_walks == walks + 1 and more_lines == lines


def test_stores_of_a_wrong_path_are_not_made_and_updates_only_load() -> None:
    for step, loads in ((evolve(PART[1], stores=True), 0), (evolve(PART[1], updates=True), 1)):
        bench = native()
        set_flags(bench.space, OTHER, ACCESSED)
        assert looked_up(bench, (PART[0], step), 2, LOW) == 4
        assert count(bench, k.WRONG_LOADS) == loads and not entry(bench.space, OTHER) & DIRTY


# --- what is predicted ------------------------------------------------------------------------------------------------


def test_chances_are_even_and_do_not_belong_together() -> None:
    """Of one search's decisions, any two differ half of the time: a linear generator would tie them together."""
    pairs: Counter[tuple[int, int, bool]] = Counter()
    ones = 0
    random = SEEDS[0]
    for _ in range(2000):
        random = stepped(random)
        coins = [int(chance(np.int64(random), position)) & 1 for position in range(6)]
        ones += sum(coins)
        pairs.update((n, other, coins[n] == coins[other]) for n in range(6) for other in range(n))
    assert ones == pytest.approx(6000, abs=250)
    assert all(times == pytest.approx(1000, abs=120) for times in pairs.values())


@pytest.mark.parametrize("choices", [2, 3, 8])
def test_a_linear_search_is_predicted_rightly_where_it_ends_at_its_last_place(choices: int) -> None:
    bench = native()
    step = Step(0, 1, 64, draws=True, choices=choices, within=5)
    assert looked_up(bench, (step,), 3000, SEEDS[6]) == 4
    random, last = SEEDS[6], 0
    for _ in range(3000):
        random = stepped(random)
        last += Fraction(fraction_of(random) * 5, 1 << 31) % 1 >= Fraction(choices - 1, choices)
    assert count(bench, k.MISPREDICTIONS) == 3000 - last


# --- when everything is there: an oracle with the whole history ---------------------------------------------------------


@frozen
class Core:
    mlp: int
    reorder_buffer: int
    penalty: int
    dram: int = 180  # beyond a hit
    hit: int = 4
    price: int = 1


@frozen
class Asked:
    """A line that was asked for: when the instruction entered, when the line is there, and whether by a wrong path."""

    line: int
    entered: int
    there: int
    wrong: bool


class Oracle:
    """One page and caches without end: every line that was ever asked for hits, but not before it is there."""

    def __init__(self, core: Core, steps: Sequence[Step], random: int) -> None:
        self.core, self.steps, self.random = core, steps, random
        self.clock = self.retired = self.fraction = 0
        self.asked: list[Asked] = []
        self.lines = {32}
        self.before = self.loaded = -core.hit  # long ago
        self.wrong_loads = 0

    def line(self, step: Step, fraction: int) -> int:
        element = fraction * step.count >> 31
        if step.half:
            element = min(element // (2 * step.half) * 2 * step.half + step.half, step.count - 1)
        return step.place(element) // 64

    def far(self, retired: int) -> list[int]:
        """When those are there that are as far back as the reorder buffer reaches."""
        return [one.there for one in self.asked if not one.wrong and one.entered <= retired - self.core.reorder_buffer]

    def buffer(self) -> int:
        """When the next buffer is free, which are taken in turn."""
        return self.asked[-self.core.mlp].there if len(self.asked) >= self.core.mlp else 0

    def arrival(self, line: int) -> int:
        """When a line is there that a wrong path asked for, while a buffer remembers it."""
        return max([0, *(one.there for one in self.asked[-self.core.mlp :] if one.wrong and one.line == line)])

    def all(self) -> int:
        return max([self.clock, *(one.there for one in self.asked[-self.core.mlp :] if not one.wrong)])

    def run(self, accesses: int) -> int:
        core = self.core
        for n in range(accesses):
            position = n % len(self.steps)
            step = self.steps[position]
            if step.draws:
                self.random = stepped(self.random)
                self.fraction = fraction_of(self.random)
            if step.needs:
                self.clock = self.all() + core.hit - core.price
            elif step.follows:
                of = self.loaded if step.follows == 1 else self.before
                self.clock = max(self.clock, of) + core.hit - core.price
            there = self.access(step)
            self.clock += core.price
            self.retired += 1
            self.before, self.loaded = self.loaded, there
            if step.choices and step.by != 1:
                self.decide(step, position)
            self.clock += step.work
            self.retired += step.work
            if step.choices and step.by == 1:
                self.decide(step, position)
        return self.all()

    def known(self, step: Step) -> int:
        """When the place is known that an access before loaded, which holds up only this one."""
        of = {0: 0, 1: self.loaded, 2: self.before}[step.known]
        return max(self.clock, of + self.core.hit - self.core.price if step.known else 0)

    def access(self, step: Step) -> int:
        line = self.line(step, self.fraction)
        known = self.known(step)
        begun = known + step.after
        wait = 0
        if line in self.lines:
            if known < max([0, *(one.there for one in self.asked if one.wrong)]):
                wait = self.arrival(line) - begun
            if wait <= 0:
                return known
        miss = max(wait, 0) if line in self.lines else self.core.dram
        self.clock = max([self.clock, self.buffer(), *self.far(self.retired)])
        there = max(self.clock + step.after, begun) + miss
        self.asked.append(Asked(line, self.retired, there, False))
        self.lines.add(line)
        return there

    def decide(self, step: Step, position: int) -> None:
        core = self.core
        until = (self.all() if step.by == 0 else self.loaded if step.by == 1 else self.before) + core.hit
        random, one = self.random, 1 << 31
        if step.half:
            if int(chance(np.int64(random), position + 1)) & 1:
                return
            element = min((self.fraction * step.count >> 31) ^ step.half, step.count - 1)
            wrong = (2 * element + 1) * one // (2 * step.count)
        elif step.within:
            at = Fraction(self.fraction * step.within, one)
            if (at % 1) * step.choices >= step.choices - 1:
                return
            end = (int(at) + 1) * one  # the last place before this
            wrong = (end - 1) // step.within
        else:
            wrong = int(chance(np.int64(random), position + 1))
            if wrong * step.choices < one:
                return
            random ^= wrong << 20
        self.stray(position + 1, wrong, random, until)
        self.clock = max(self.clock, until) + core.penalty

    def stray(self, position: int, fraction: int, random: int, until: int) -> None:
        core, clock, retired, before, loaded = self.core, self.clock, self.retired, self.before, self.loaded
        latest = self.all()
        while True:
            step = self.steps[position % len(self.steps)]
            position += 1
            if step.draws:
                random = stepped(random)
                fraction = fraction_of(random)
            if step.needs or step.follows:
                of = latest if step.needs else loaded if step.follows == 1 else before
                clock = max(clock, of) + core.hit - core.price
            clock = max([clock, *self.far(retired)])
            if clock >= until or retired - self.retired >= core.reorder_buffer:
                return
            there = until
            of_known = {0: 0, 1: loaded, 2: before}[step.known]
            begun = max(clock, of_known + core.hit - core.price if step.known else 0) + step.after
            if begun < until and max(clock, self.buffer()) < until:
                self.wrong_loads += 1
                line = self.line(step, fraction)
                if line in self.lines:
                    there = max(begun, self.arrival(line))
                else:
                    there = max(begun, self.buffer()) + core.dram
                    self.asked.append(Asked(line, -1, there, True))
                    self.lines.add(line)
            before, loaded, latest = loaded, there, max(latest, there)
            clock += core.price + step.work
            retired += 1 + step.work


def shown(core: Core, steps: Sequence[Step], accesses: int, random: int) -> tuple[int, int]:
    """Cycles and loads of wrong paths of the kernel, where an instruction is a cycle."""

    def cycles(accesses: int) -> tuple[int, int]:
        changes = {
            "work.mlp": core.mlp, "work.reorder_buffer": core.reorder_buffer, "work.cycles_per_100_instructions": 100,
            "work.mispredict_cycles": core.penalty, **NO_PREFETCHERS,
        }  # fmt: skip
        bench = native(changes)
        m = bench.m
        assert m[s.PRICE + o.LD] == core.price and m[s.L1D + s.LATENCY] == core.hit
        m[s.DRAM_CYCLES] = core.dram + core.hit
        assert looked_up(bench, steps, accesses, random) == 4
        return int(m[s.CYCLE]), count(bench, k.WRONG_LOADS)

    none, _ = cycles(0)
    some, loads = cycles(accesses)
    return some - none, loads


steps = st.builds(
    Step, offset=st.just(0), count=st.integers(1, 60), stride=st.just(64), draws=st.booleans(),
    needs=st.sampled_from((False, False, True)), follows=st.integers(0, 2), known=st.integers(0, 2),
    work=st.sampled_from((0, 3, 40)),
    after=st.sampled_from((0, 0, 30)), choices=st.sampled_from((0, 2, 3, 8)), within=st.sampled_from((0, 1, 4)),
    half=st.sampled_from((0, 0, 4)), by=st.integers(0, 2),
)  # fmt: skip
cores = st.builds(
    Core, mlp=st.integers(1, 12), reorder_buffer=st.sampled_from((8, 60, 224)), penalty=st.sampled_from((0, 17))
)
SEARCH = [Step(0, 60, 64, draws=half == 32, half=half, choices=2, work=6) for half in (32, 16, 8, 4, 2, 1)]
POINTS = [
    Step(0, 20, 64, draws=True, work=7), Step(1280, 20, 64, known=1), Step(2560, 20, 64, known=2, work=55),
]  # fmt: skip
NODE = [
    Step(0, 4, 64, draws=True, work=24), Step(1024, 4, 64, follows=1, work=6),
    Step(2048, 4, 64, work=6, choices=8, within=4, by=2), Step(3072, 16, 64, follows=1, work=6),
]  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(
    core=cores, some=st.lists(steps, min_size=1, max_size=6), accesses=st.integers(1, 40), random=st.sampled_from(SEEDS)
)
@example(core=Core(12, 224, 17), some=SEARCH, accesses=40, random=SEEDS[3])
@example(core=Core(2, 60, 17), some=SEARCH, accesses=40, random=SEEDS[5])
@example(core=Core(12, 224, 17), some=POINTS, accesses=40, random=SEEDS[3])
@example(core=Core(12, 224, 17), some=NODE, accesses=40, random=SEEDS[7])
def test_cycles_are_those_of_the_whole_history(core: Core, some: list[Step], accesses: int, random: int) -> None:
    oracle = Oracle(core, some, random)
    assert shown(core, some, accesses, random) == (oracle.run(accesses), oracle.wrong_loads)


def test_a_mispredicted_branch_by_hand() -> None:
    """A miss of 180 cycles, resolved 4 cycles after it, 17 more to the right path, then a miss that had to wait for it."""
    steps = [Step(0, 2, 64, draws=True, choices=2, within=1), Step(1024, 2, 512)]
    assert shown(Core(12, 1, 17), steps, 2, LOW) == (
        180 + 4 + 17 + 180,
        1,
    )  # room for one instruction of the wrong path
    assert shown(Core(12, 224, 17), steps, 2, HIGH) == (1 + 180, 0)  # rightly predicted: both at once
