"""What prefetchers bring into L2, the rest of a pair and what comes next: what it costs, and what it never takes away."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cpu.bench import NO_STREAMER, machine
from tests.cpu.test_caches import OneBit
from tests.cpu.test_coherence import cycles_of
from tests.cpu.test_hyper_threads import core, take
from tests.cpu.test_memory_bandwidth import STREAMS
from vtsim.base import jit
from vtsim.config import parse_scenario
from vtsim.cpu import accounts as k
from vtsim.cpu import slots as s
from vtsim.cpu.engine import Engine
from vtsim.cpu.kernels.caches import has, probe
from vtsim.cpu.kernels.coherence import NOBODY, SHARED, owner_of
from vtsim.cpu.kernels.lines import data_line, read_line
from vtsim.cpu.kernels.rights import READ, WRITE
from vtsim.study.run import run

EXAMPLES = 15 if jit.DISABLED else 60
LINE = 100  # the first of a pair


def read(engine: Engine, line: int, at: int = 0, cpu: int = 0) -> int:
    """Cycles of a walker's read at a cycle."""
    m = engine.cpus[cpu]
    m[s.CYCLE] = at
    return int(read_line(m, engine.arena, engine.tags, line << 6, k.GUEST_L1D))


def pairs(engine: Engine, cpu: int = 0) -> int:
    return int(engine.arena[engine.cpus[cpu][s.OWNER] + k.PAIR_DRAM])


@pytest.mark.parametrize("first", [LINE, LINE + 1])
def test_the_other_line_of_a_pair_is_in_l2_when_it_has_come(first: int) -> None:
    engine = machine()
    p = engine.profile
    dram, l2 = p.cycles(p.dram.local_ns), p.cache.l2.hit_cycles
    assert [read(engine, first), pairs(engine)] == [dram, 1]
    assert [read(engine, first ^ 1, at=dram), pairs(engine)] == [l2, 1]
    assert read(engine, first ^ 2, at=dram) == dram  # of the next pair


@pytest.mark.parametrize("later", [0, 1, 50, 170, 197])
def test_who_asks_before_it_has_come_waits_for_the_rest(later: int) -> None:
    engine = machine()
    p = engine.profile
    dram = read(engine, LINE, at=1000)
    assert read(engine, LINE + 1, at=1000 + later) == max(dram - later, p.cache.l2.hit_cycles)


def test_it_comes_from_l3_where_that_has_it() -> None:
    engine = machine({"cache.l1d.bytes": 0, "cache.l2.bytes": 64, "cache.l2.ways": 1})
    p = engine.profile
    dram, l3 = p.cycles(p.dram.local_ns), p.cache.l3.hit_cycles
    assert [read(engine, LINE), pairs(engine)] == [dram, 1]  # L2 has one line: the other one pushed it out
    assert [read(engine, LINE, at=2000), pairs(engine)] == [l3, 1]
    assert [read(engine, LINE + 1, at=2010), pairs(engine)] == [l3 - 10, 1]


def test_without_the_prefetcher_or_without_l2_there_is_none() -> None:
    for changes in ({"cache.adjacent_line_prefetcher": False}, {"cache.l2.bytes": 0}):
        engine = machine(changes)
        dram = engine.profile.cycles(engine.profile.dram.local_ns)
        assert [read(engine, LINE), read(engine, LINE + 1, at=1000), pairs(engine)] == [dram, dram, 0]


class Core:
    """One core's caches of a few sets, and the pair that is under way."""

    def __init__(self, sizes: tuple[int, int, int], latency: tuple[int, int, int, int]) -> None:
        self.l1, self.l2, self.l3 = (OneBit(sets, 2) for sets in sizes)
        self.latency = latency
        self.pair, self.there, self.fetched = -1, 0, 0

    def beyond_l2(self, line: int) -> tuple[int, bool]:
        """Cycles from L3 or from memory, which fills L3."""
        if self.l3.look(line, line):
            return self.latency[2], False
        self.l3.put(line, line, empty_first=False)
        return self.latency[3], True

    def read(self, line: int, now: int) -> int:
        if self.l1.look(line, line):
            return self.latency[0]
        cycles = self.latency[1]
        if self.l2.look(line, line):
            if line == self.pair:
                cycles = max(cycles, self.there - now)
        else:
            cycles, _ = self.beyond_l2(line)
            self.l2.put(line, line, empty_first=False)
            other = line + 1 if line % 2 == 0 else line - 1
            if not self.l2.look(other, other):
                self.l2.put(other, other, empty_first=False)
                more, fetched = self.beyond_l2(other)
                self.pair, self.there = other, now + more
                self.fetched += fetched
        self.l1.put(line, line, empty_first=False)
        return cycles


@given(
    st.lists(st.tuples(st.integers(0, 24), st.sampled_from((0, 3, 60, 500))), max_size=120),
    st.tuples(st.sampled_from((1, 2)), st.sampled_from((2, 4)), st.sampled_from((4, 8))),
)
@settings(max_examples=EXAMPLES)
def test_cycles_are_those_of_the_slow_model(script: list[tuple[int, int]], sets: tuple[int, int, int]) -> None:
    shape = {f"cache.{name}.bytes": each * 128 for name, each in zip(("l1d", "l2", "l3"), sets, strict=True)}
    engine = machine({**shape, "cache.l1d.ways": 2, "cache.l2.ways": 2, "cache.l3.ways": 2})
    p = engine.profile
    latency = (p.cache.l1d.hit_cycles, p.cache.l2.hit_cycles, p.cache.l3.hit_cycles, p.cycles(p.dram.local_ns))
    slow = Core(sets, latency)
    now = 0
    for line, passed in script:
        now += passed
        assert read(engine, line, at=now) == slow.read(line, now)
    assert pairs(engine) == slow.fetched


# --- what comes next ------------------------------------------------------------------------------------------------
def load(engine: Engine, line: int, at: int = 0, access: int = READ) -> int:
    """Cycles beyond an L1D hit of a data access at a cycle."""
    m = engine.cpus[0]
    m[s.CYCLE] = at
    return int(data_line(m, engine.arena, engine.tags, line, access))


def in_l2(engine: Engine, *lines: int) -> list[bool]:
    return [bool(has(engine.cpus[0], engine.tags, s.L2, line)) for line in lines]


def test_behind_a_line_that_l1d_has_comes_the_next_pair_too() -> None:
    engine = machine(NO_STREAMER)
    assert load(engine, LINE) > 0
    assert in_l2(engine, LINE + 1, LINE + 2) == [True, False]
    load(engine, LINE + 1, at=1000)
    assert in_l2(engine, LINE + 2, LINE + 3, LINE + 4) == [True, True, False]
    assert not has(engine.cpus[0], engine.tags, s.L1D, LINE + 2)
    assert pairs(engine) == 3
    load(engine, LINE + 1, at=2000)  # which L1D has
    assert in_l2(engine, LINE + 4) == [False]


@pytest.mark.parametrize("later", [0, 1, 50, 150, 190])
def test_who_wants_the_next_line_before_it_has_come_waits_for_the_rest(later: int) -> None:
    engine = machine(NO_STREAMER)
    p = engine.profile
    dram, l1, l2 = p.cycles(p.dram.local_ns), p.cache.l1d.hit_cycles, p.cache.l2.hit_cycles
    load(engine, LINE)
    load(engine, LINE + 1, at=1000)
    assert load(engine, LINE + 2, at=1000 + later) == max(dram - later, l2) - l1


@pytest.mark.parametrize(
    ("first", "second", "access", "why"),
    [
        (LINE + 1, LINE, READ, "descending"),
        (LINE, LINE + 3, READ, "not the line before"),
        (LINE, LINE + 1, WRITE, "a store"),
        (126, 127, READ, "the page ends"),
    ],
)
def test_else_nothing_comes(first: int, second: int, access: int, why: str) -> None:
    engine = machine(NO_STREAMER)
    load(engine, first)
    before = pairs(engine)
    load(engine, second, at=1000, access=access)
    known = {first, first ^ 1, second, second ^ 1}
    others = [line for line in range(first - 4, second + 6) if line not in known]
    assert not any(in_l2(engine, *others)), why
    assert pairs(engine) - before == len({second, second ^ 1} - {first, first ^ 1}) // 2


def test_without_that_prefetcher_or_without_l2_nothing_comes() -> None:
    for changes in ({"cache.next_line_prefetcher": False}, {"cache.l2.bytes": 0}):
        engine = machine({**NO_STREAMER, **changes})
        load(engine, LINE)
        load(engine, LINE + 1, at=1000)
        dram = engine.profile.cycles(engine.profile.dram.local_ns)
        assert load(engine, LINE + 2, at=2000) == dram - engine.profile.cache.l1d.hit_cycles


def test_walks_fetch_nothing_that_comes_next() -> None:
    engine = machine()
    for n in range(2):
        read(engine, LINE + n, at=1000 * n)
    assert in_l2(engine, LINE + 1, LINE + 2) == [True, False]


# --- several CPUs ---------------------------------------------------------------------------------------------------
def test_a_line_that_another_core_owns_stays_there() -> None:
    engine = machine(cpus=2)
    cycles_of(engine, 1, WRITE, LINE + 1)  # and its pair, which it has alone then
    cycles_of(engine, 1, WRITE, LINE + 2)
    assert [int(owner_of(engine.cpus[0], engine.tags, LINE + n)) for n in range(4)] == [1, 1, 1, 1]
    cycles_of(engine, 0, WRITE, LINE)
    assert [int(owner_of(engine.cpus[0], engine.tags, LINE + n)) for n in range(2)] == [0, 1]
    assert cycles_of(engine, 1, WRITE, LINE + 1) == 0


def test_a_line_that_nobody_had_is_owned_and_one_that_several_have_is_shared() -> None:
    engine = machine(cpus=3)
    t = engine.tags
    cycles_of(engine, 0, READ, LINE)
    assert int(owner_of(engine.cpus[0], t, LINE + 1)) == 0
    assert cycles_of(engine, 1, WRITE, LINE + 1) > 0  # which takes it
    assert not probe(engine.cpus[0], t, s.L2, LINE + 1)
    for cpu in (0, 2):
        cycles_of(engine, cpu, READ, LINE + 1)
    assert int(owner_of(engine.cpus[0], t, LINE + 1)) == SHARED
    assert int(owner_of(engine.cpus[0], t, LINE + 8)) == NOBODY
    cycles_of(engine, 1, WRITE, LINE)  # it stored the other one itself
    cycles_of(engine, 2, READ, LINE)
    assert int(owner_of(engine.cpus[0], t, LINE)) == SHARED


def test_what_one_thread_of_a_core_let_come_the_other_waits_for() -> None:
    engine = core()
    p = engine.profile
    take(engine, 1)
    take(engine, 0)
    dram = read(engine, LINE, at=1000)
    take(engine, 1)
    assert read(engine, LINE + 1, at=1040, cpu=1) == dram - 40
    assert read(engine, LINE + 1, at=3000, cpu=0) == p.cache.l1d.hit_cycles


@pytest.mark.slow
def test_pairs_want_bandwidth_too() -> None:
    """Where it decides, all lines together take all of it, and a random stream has half of what it would have alone."""
    bandwidth = 2000

    def of(prefetcher: str) -> Any:
        prefetchers = (f"adjacent_line_prefetcher={prefetcher}", "next_line_prefetcher=false", "streamer.entries=0")
        sets = [f"machine.cpu.dram.bandwidth={bandwidth}", *(f"machine.cpu.cache.{each}" for each in prefetchers)]
        return run(parse_scenario(STREAMS, sets))

    both, alone = of("true"), of("false")
    lines = both.caches.data.dram + both.walks.served_by.dram + both.caches.code.dram + both.caches.pairs
    assert 0.93 < 64 * lines / (both.cycles.elapsed / both.clock_hz) / (bandwidth * 10**6) <= 1.0
    assert both.caches.pairs > 0.9 * both.caches.data.dram
    assert alone.caches.pairs == 0
    assert 1.8 < both.cycles.elapsed / alone.cycles.elapsed < 2.1
