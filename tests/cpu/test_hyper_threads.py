"""Two logical CPUs of a core: what they share, what each has half of, and what one loses while the other executes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from attrs import define
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cpu.bench import DATA, Write, machine, o_mem
from tests.cpu.test_coherence import adds, counted, cycles_of, looks_at, stores, together
from vtsim.base import jit
from vtsim.cpu import accounts as k
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler
from vtsim.cpu.engine import OF_ONE_THREAD, Engine
from vtsim.cpu.kernels.hyper_threads import ONE, share_core, take_core
from vtsim.cpu.kernels.lines import fetch_line
from vtsim.cpu.kernels.overlap import SQUASHED, outstanding, overlapped, room, walked
from vtsim.cpu.kernels.rights import READ, WRITE
from vtsim.cpu.kernels.wrong_paths import arrival

EXAMPLES = 15 if jit.DISABLED else 60
LINE = 100
LINES, SWEEPS = 8, 25
CACHES = (s.L1I, s.L1D, s.L2)


def core(changes: dict[str, Any] | None = None) -> Engine:
    """A machine of one core with two CPUs."""
    return machine(changes, cpus=2, threads=2)


def halts(a: Assembler) -> None:
    a.op(o.HLT)


def take(engine: Engine, cpu: int) -> np.ndarray:
    """A CPU goes on: its record."""
    m: np.ndarray = engine.cpus[cpu]
    take_core(m, engine.cpus[int(m[s.SIBLING])])
    return m


# --- caches ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("access", [READ, WRITE])
def test_what_one_brought_the_other_finds(access: int) -> None:
    engine = core()
    assert cycles_of(engine, 0, access, LINE) > 0
    assert cycles_of(engine, 1, READ, LINE) == cycles_of(engine, 1, WRITE, LINE) == 0
    assert int(engine.cpus[0][s.PEERS]) == 0  # one core has no directory


def test_code_that_one_fetched_the_other_finds() -> None:
    engine = core()
    taken = [int(fetch_line(m, engine.arena, engine.tags, LINE << 6)) for m in engine.cpus]
    assert taken[0] > 0
    assert taken[1] == 0


def test_neighbours_share_and_others_do_not() -> None:
    engine = machine(cpus=6, threads=2)
    places = [tuple(int(m[cache]) for cache in CACHES) for m in engine.cpus]
    assert places[0] == places[1] != places[2] == places[3] != places[4] == places[5] != places[0]
    assert [int(m[s.SIBLING]) for m in engine.cpus] == [1, 0, 3, 2, 5, 4]
    assert [int(m[s.CORE]) for m in engine.cpus] == [0, 0, 1, 1, 2, 2]


def test_a_line_moves_between_cores_and_is_there_for_both_cpus_of_one() -> None:
    engine = machine(cpus=4, threads=2)
    p = engine.profile
    moved = p.cycles(p.latency.transfer_ns) - p.cache.l1d.hit_cycles
    cycles_of(engine, 1, WRITE, LINE)
    assert cycles_of(engine, 0, WRITE, LINE) == 0  # the core has it
    assert cycles_of(engine, 3, WRITE, LINE) == moved
    assert cycles_of(engine, 2, WRITE, LINE) == 0
    assert cycles_of(engine, 0, READ, LINE) == cycles_of(engine, 3, WRITE, LINE) == moved
    host = engine.owners["host"]
    assert [int(engine.arena[host + counter]) for counter in (k.LINES_TAKEN, k.LINES_FROM_OTHERS)] == [2, 1]


def test_a_store_after_another_core_looked_waits_whichever_cpu_remembers_the_page() -> None:
    """Both CPUs of core 0 store to one word, a CPU of core 1 looks now and then: the line is taken back each time."""
    looks = 9

    pair = together(stores, stores, looks_at(looks), halts, threads=2)
    pair.run(80_000, 14)
    assert looks <= counted(pair, k.LINES_TAKEN) <= looks + 6


# --- what is divided -----------------------------------------------------------------------------------------------
def test_translations_are_divided() -> None:
    alone, shared = machine().cpus[0], core().cpus[1]
    for at, name in zip(range(s.DTLB4K, s.NESTED_TLB + 1, 4), s.TRANSLATION_STRUCTURES, strict=True):
        entries = [int((m[at + s.MASK] + 1) * m[at + s.WAYS]) for m in (alone, shared)]
        assert entries[1] == (entries[0] if name in OF_ONE_THREAD else -(-entries[0] // 2)), name


def test_a_structure_of_one_entry_stays() -> None:
    m = core({"pwc.pde.entries": 1, "pwc.pde.ways": 1, "nested_tlb.entries": 0}).cpus[0]
    assert [int(m[at + s.WAYS] * (m[at + s.MASK] + 1)) for at in (s.PWC_PDE, s.NESTED_TLB)] == [1, 0]


@pytest.mark.parametrize("halted", [0, 1])
def test_the_reorder_buffer_is_whole_while_the_other_is_halted(halted: int) -> None:
    engine = core()
    engine.cpus[1, s.HALTED] = halted
    size = engine.profile.work.reorder_buffer
    assert int(take(engine, 0)[s.ROB]) == (size if halted else size // 2)


# --- miss buffers and walkers ------------------------------------------------------------------------------------------
@define(slots=False)
class Shared:
    """Miss buffers, walkers and reorder buffers as one list each, without records and rings."""

    buffers: int
    walkers: int
    rob: int
    cpus: int = 2

    def __attrs_post_init__(self) -> None:
        self.free = [0] * self.buffers  # in turn
        self.walks = [0] * self.walkers
        self.turn = self.walk_turn = 0
        self.mine: list[list[tuple[int, int]]] = [[] for _ in range(self.cpus)]  # issued at which instruction, until
        self.clock = [0] * self.cpus
        self.retired = [0] * self.cpus

    def access(self, cpu: int, walk: int, miss: int, stlb: int) -> int:
        late = [until for issued, until in self.mine[cpu] if issued <= self.retired[cpu] - self.rob]
        now = max(self.clock[cpu], self.free[self.turn], *late)
        ready = now + walk
        if walk > stlb:  # the second-level TLB is looked up first, and needs no walker
            ready = max(now + stlb, self.walks[self.walk_turn]) + walk - stlb
            self.walks[self.walk_turn] = ready
            self.walk_turn = (self.walk_turn + 1) % self.walkers
        self.free[self.turn] = ready + miss
        self.turn = (self.turn + 1) % self.buffers
        self.mine[cpu].append((self.retired[cpu], ready + miss))
        self.clock[cpu] = now
        return ready + miss


scripts = st.lists(
    st.tuples(
        st.integers(0, 1),
        st.sampled_from((0, 30, 100)),
        st.sampled_from((50, 200)),
        st.integers(0, 40),
        st.integers(0, 9),
    ),
    max_size=60,
)


@given(scripts, st.sampled_from((2, 5, 12)), st.sampled_from((1, 2)))
@settings(max_examples=EXAMPLES)
def test_buffers_and_walkers_are_taken_in_turn_by_both(script: Any, buffers: int, walkers: int) -> None:
    """The CPU behind goes on, as always; what each waits for is what one list of buffers and one of walkers says."""
    engine = core({"work.mlp": buffers, "walkers": walkers, "work.reorder_buffer": 64})
    a = engine.arena
    model = Shared(buffers, walkers, 32)
    for m in engine.cpus:
        m[s.RETIRED] = 1000  # a reorder buffer is not fuller than what was executed
    model.retired = [1000, 1000]
    for cpu, walk, miss, work, passed in script:
        m = take(engine, cpu)
        there = int(overlapped(m, a, walk, miss, 0, 0, 1, 0))
        assert there == model.access(cpu, walk, miss, engine.profile.tlb.stlb.hit_cycles)
        assert int(m[s.CYCLE]) == model.clock[cpu]
        for clock in (model.clock, model.retired):
            clock[cpu] += passed if clock is model.clock else work + 1
        m[s.CYCLE] += passed
        m[s.RETIRED] += work + 1


def test_loads_of_the_other_are_nothing_that_one_waits_for_at_the_end() -> None:
    engine = core()
    m = take(engine, 0)
    overlapped(m, engine.arena, 0, 500, 0, 0, 1, 0)
    other = take(engine, 1)
    assert int(outstanding(other)) == int(room(other)) == 0
    assert int(other[s.MISS_ISSUED]) == SQUASHED
    assert int(outstanding(take(engine, 0))) == 500


def test_what_the_other_walks_and_asks_for_answers_nothing_of_this_one() -> None:
    """A walk for a page of the same number is one of another CPU's; a buffer that it took has this one's line no more."""
    engine = core({"work.mlp": 1, "walkers": 1})
    m = take(engine, 0)
    overlapped(m, engine.arena, 50, 100, 0, 0, 7, 0)
    m[s.MISS_ISSUED], m[s.WRONG_LINE] = SQUASHED, LINE
    assert [int(walked(m, 7)), int(arrival(m, LINE))] == [50, 150]
    other = take(engine, 1)
    assert [int(walked(other, 7)), int(arrival(other, LINE))] == [0, 0]
    overlapped(other, engine.arena, 500, 100, 0, 0, 8, 0)
    assert int(walked(other, 8)) == 650
    m = take(engine, 0)
    assert [int(walked(m, page)) for page in (7, 8)] == [0, 0]
    assert int(arrival(m, LINE)) == 0


def sweeps(code: bool) -> Write:
    """A program that now and then pushes everything out of a first-level cache of a few lines."""

    def write(a: Assembler) -> None:
        a.mov(s.RCX, SWEEPS)
        a.label("again")
        for line in range(LINES):
            if code:
                a.jmp(f"line {line}")
                a.align(64)
                a.label(f"line {line}")
            else:
                a.ld(s.RAX, o_mem(DATA + 0x1000 + 64 * line))
        a.work(3000)
        a.loop("again")
        a.op(o.HLT)

    return write


@pytest.mark.parametrize("code", [False, True], ids=["data", "code"])
def test_what_the_other_pushed_out_is_looked_for_again_though_it_was_found_before(code: bool) -> None:
    """One CPU is in one line all the time; the other one takes it away in each of its sweeps."""

    def stays(a: Assembler) -> None:
        a.align(64)
        a.label("again")
        a.ld(s.RAX, o_mem(DATA))
        a.jmp("again")

    cache, served = ("l1i", k.FETCH_L2) if code else ("l1d", k.DATA_L2)
    changes = {f"cache.{cache}.bytes": 128, f"cache.{cache}.ways": 1}
    found = []
    for first in (halts, stays):
        pair = together(first, sweeps(code), changes=changes, threads=2)
        pair.run(200_000, 14)
        assert int(pair.cpus[1][s.HALTED])
        found.append(counted(pair, served))
    assert SWEEPS - 2 <= found[1] - found[0] <= 3 * SWEEPS


# --- execution -----------------------------------------------------------------------------------------------------------
def works(a: Assembler) -> None:
    a.label("again")
    a.work(400)
    a.jmp("again")


@pytest.mark.parametrize(
    ("other", "threads", "percent", "share"),
    [
        pytest.param(works, 2, 130, 0.65, id="both execute"),
        pytest.param(works, 2, 100, 0.5, id="both execute, one at a time"),
        pytest.param(works, 2, 200, 1.0, id="both execute, nothing is shared"),
        pytest.param(halts, 2, 130, 1.0, id="the other is halted"),
        pytest.param(works, 1, 130, 1.0, id="the other has a core of its own"),
    ],
)
def test_what_is_lost_while_the_other_executes(other: Write, threads: int, percent: int, share: float) -> None:
    pair = together(works, other, changes={"work.two_threads_percent": percent}, threads=threads)
    until = 400_000
    pair.run(until, 14)
    m = pair.cpus[0]
    alone = until * 100 / pair.engine.profile.work.cycles_per_100_instructions
    assert int(m[s.RETIRED]) / alone == pytest.approx(share, rel=0.03)
    shared = sum(
        int(pair.engine.arena[pair.engine.owners["host"] + state * o.ACTIVITY_SLOTS + o.SHARED_CORE])
        for state in (0, 1)
    )
    assert shared == pytest.approx((2 if other is works else 1) * until * (1 - share), rel=0.02, abs=200)
    pair.engine.check_clock()


@given(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300)), max_size=40), st.integers(0, ONE))
@settings(max_examples=EXAMPLES)
def test_what_is_lost_is_carried_to_the_cycle(slices: list[tuple[int, int]], of_late: int) -> None:
    engine = core()
    m, other = engine.cpus
    other[s.OF_LATE] = of_late
    cpi = engine.profile.work.cycles_per_100_instructions
    percent = engine.profile.work.two_threads_percent
    executed = 0.0
    lost = 0
    for passed, retired in slices:
        began, before = int(m[s.CYCLE]), int(m[s.RETIRED])
        m[s.CYCLE] += passed
        m[s.RETIRED] += retired
        share_core(m, engine.arena, other, began, before)
        lost += int(m[s.CYCLE]) - began - passed
        if passed:
            executed += min(retired * cpi // 100, passed)
    assert lost == pytest.approx(executed * (of_late / ONE) * (200 / percent - 1), abs=2 + executed / 500)


# --- the law of time -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("write", [works, adds(0, 4000, 0)], ids=["work", "adds"])
def test_one_cpu_of_a_core_whose_other_never_runs_has_the_time_of_a_cpu_alone(
    write: Callable[[Assembler], None],
) -> None:
    """TLBs, half as large, are large enough here."""
    alone, beside = together(write, halts, threads=1), together(write, halts, threads=2)
    for pair in (alone, beside):
        pair.run(60_000, 14)
    assert int(alone.cpus[0][s.RETIRED]) == pytest.approx(int(beside.cpus[0][s.RETIRED]), rel=0.002)
