"""Streams of lines that L2 follows: which lines it fetches of a page, when they are there, and what it has room for."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from attrs import define, field
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cpu.bench import NO_PREFETCHERS, machine
from tests.cpu.test_hyper_threads import core, take
from vtsim.base import jit
from vtsim.config import parse_scenario
from vtsim.cpu import accounts as k
from vtsim.cpu import slots as s
from vtsim.cpu.engine import Engine
from vtsim.cpu.kernels.caches import has
from vtsim.cpu.kernels.lines import data_line, fetch_line, read_line
from vtsim.cpu.kernels.rights import READ, WRITE
from vtsim.study.run import run

EXAMPLES = 15 if jit.DISABLED else 60
PAGE = 100 * 64  # the first line of a page
ALONE = {**NO_PREFETCHERS, "cache.streamer.entries": 32}
LONG = 10_000  # cycles after which all is there


def load(engine: Engine, line: int, at: int, access: int = READ) -> int:
    """Cycles beyond an L1D hit of a data access at a cycle."""
    m = engine.cpus[0]
    m[s.CYCLE] = at
    return int(data_line(m, engine.arena, engine.tags, line, access))


def lines_of(engine: Engine, first: int = PAGE - 64, count: int = 192) -> set[int]:
    """Which lines L2 has, of a page and its neighbours, counted from the page's first."""
    found = (line for line in range(first, first + count) if has(engine.cpus[0], engine.tags, s.L2, line))
    return {line - PAGE for line in found}


def after(places: Sequence[int], access: int = READ) -> set[int]:
    """What L2 has fetched unasked after accesses to these lines of a page."""
    engine = machine(ALONE)
    for n, place in enumerate(places):
        load(engine, PAGE + place, at=LONG * n, access=access)
    return lines_of(engine) - set(places)


# --- which lines ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("places", "fetched"),
    [
        ([0], []),
        ([0, 1], [2, 3]),  # as was measured of a Coffee Lake, as are the next
        ([0, 1, 2], [3, 4, 5]),
        ([0, 4, 8], [5, 6, 9, 10]),
        ([0, 9, 18, 27], [10, 11, 19, 20, 28, 29]),
        ([5, 37], [38, 39]),
        (range(15), range(15, 30)),  # 17 lines were measured
        (range(30), range(30, 50)),  # no further than 20 lines, the manual says; 32 were measured
        ([60, 61], [62, 63]),
        ([61, 62], [63]),
        ([62, 63], []),
        ([40, 39], [38, 37]),
        ([1, 0], []),
        ([40, 20, 19], [18, 17, 16]),
        ([40, 41, 39, 42], [43, 44, 45, 38, 37]),  # a stream upwards and one downwards
        ([40, 20, 25], [19, 18, 26, 27]),
        ([0, 3, 2], [4, 5, 1]),
        ([7, 7, 7], []),
    ],
    ids=str,
)
@pytest.mark.parametrize("access", [READ, WRITE])
def test_what_comes_next_of_a_page(places: Sequence[int], fetched: Sequence[int], access: int) -> None:
    assert after(list(places), access) == set(fetched) - set(places)


def test_code_is_followed_and_walks_are_not() -> None:
    for fetch, fetched in ((True, {2, 3}), (False, set())):
        engine = machine(ALONE)
        m, a, t = engine.cpus[0], engine.arena, engine.tags
        for n in range(2):
            m[s.CYCLE] = LONG * n
            hpa = PAGE + n << 6
            fetch_line(m, a, t, hpa) if fetch else read_line(m, a, t, hpa, k.GUEST_L1D)
        assert lines_of(engine) - {0, 1} == fetched


def test_next_lines_of_l1d_are_followed_too() -> None:
    """The load of line 1 asks for line 2, behind which two more come than without that."""
    engine = machine({**ALONE, "cache.next_line_prefetcher": True})
    for n in range(2):
        load(engine, PAGE + n, at=LONG * n)
    assert lines_of(engine) == {0, 1, 2, 3, 4, 5}


def test_so_many_pages_are_known_and_of_more_the_ones_used_last() -> None:
    engine = machine({**ALONE, "cache.streamer.entries": 4, "cache.streamer.ways": 4})
    pages = [PAGE + 64 * n for n in range(5)]
    for n, line in enumerate((*pages, *(line + 1 for line in reversed(pages)))):
        load(engine, line, at=LONG * n)
    assert [bool(has(engine.cpus[0], engine.tags, s.L2, line + 2)) for line in pages] == [False, True, True, True, True]


def test_without_a_streamer_or_without_l2_nothing_comes() -> None:
    for changes in ({"cache.streamer.entries": 0}, {"cache.l2.bytes": 0}):
        engine = machine({**ALONE, **changes})
        dram = engine.profile.cycles(engine.profile.dram.local_ns) - engine.profile.cache.l1d.hit_cycles
        assert [load(engine, PAGE + n, at=LONG * n) for n in range(3)] == [dram] * 3


# --- when ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("later", [0, 1, 50, 150, 190])
def test_who_wants_a_line_before_it_has_come_waits_for_the_rest(later: int) -> None:
    engine = machine(ALONE)
    p = engine.profile
    dram, l1, l2 = p.cycles(p.dram.local_ns), p.cache.l1d.hit_cycles, p.cache.l2.hit_cycles
    load(engine, PAGE, at=0)
    load(engine, PAGE + 1, at=LONG)
    assert load(engine, PAGE + 3, at=LONG + later) == max(dram - later, l2) - l1
    assert load(engine, PAGE + 2, at=LONG + later) == max(dram - later, l2) - l1


def test_a_full_super_queue_lets_a_stream_wait_and_leaves_no_line_out() -> None:
    engine = machine({**ALONE, "cache.super_queue": 3})
    load(engine, PAGE, at=0)
    load(engine, PAGE + 1, at=LONG)  # which is one of three
    assert lines_of(engine) == {0, 1, 2, 3}
    load(engine, PAGE + 2, at=LONG + 1)  # L2 has it, but no room for 4 and 5
    assert lines_of(engine) == {0, 1, 2, 3}
    load(engine, PAGE + 3, at=2 * LONG)
    assert lines_of(engine) == {0, 1, 2, 3, 4, 5}


def test_a_core_has_one_streamer() -> None:
    engine = core(ALONE)
    for cpu in (0, 1):
        m = take(engine, cpu)
        m[s.CYCLE] = LONG * (cpu + 1)
        data_line(m, engine.arena, engine.tags, PAGE + cpu, READ)
    assert lines_of(engine) == {0, 1, 2, 3}
    for slot in (s.STREAMS, s.ARRIVALS, s.SUPER_QUEUE):
        assert engine.cpus[0][slot] == engine.cpus[1][slot] > 0


@define
class SlowCore:
    """What L2 fetches as the manual and a measurement have it: dicts of all pages, a list of all lines on their way."""

    memory: int
    l1: int
    l2: int
    ahead: int
    room: int
    seen: set[int] = field(factory=set)  # in L1D
    there: dict[int, int] = field(factory=dict)  # when L2 has a line
    last: dict[int, int] = field(factory=dict)
    reach: dict[tuple[int, int], int] = field(factory=dict)  # of a page and a direction
    asked: list[tuple[int, int]] = field(factory=list)

    def ask(self, line: int, now: int) -> None:
        self.there[line] = now + self.memory
        self.asked.append((now, now + self.memory))

    def full(self, now: int) -> bool:
        return len(self.asked) >= self.room and self.asked[-self.room][0] <= now < self.asked[-self.room][1]

    def look(self, line: int, now: int) -> None:
        page, place = divmod(line, 64)
        before = self.last.get(page)
        self.last[page] = place
        if before is None or before == place:
            return
        way = 1 if place > before else -1
        reach = self.reach.get((page, way), place)
        reach = max(reach, place) if way > 0 else min(reach, place)
        for _ in range(2):
            line = page * 64 + reach + way
            allowed = 0 <= reach + way < 64 and abs(reach + way - place) <= self.ahead
            if not allowed or (line not in self.there and self.full(now)):
                break
            if line not in self.there:
                self.ask(line, now)
            reach += way
        self.reach[page, way] = reach

    def load(self, line: int, now: int) -> int:
        if line in self.seen:
            return 0
        self.seen.add(line)
        if line in self.there:
            cycles = max(self.there[line] - now, self.l2)
        else:
            cycles = self.memory
            self.ask(line, now)
        self.look(line, now)
        return cycles - self.l1


@given(
    st.lists(
        st.tuples(st.sampled_from((0, 1, 5)), st.integers(0, 63), st.sampled_from((0, 2, 40, 300))),
        min_size=1,
        max_size=80,
    ),
    st.sampled_from((1, 3, 20)),
    st.sampled_from((2, 5, 32)),
)
@settings(max_examples=EXAMPLES)
def test_lines_and_cycles_are_those_of_the_slow_model(
    script: list[tuple[int, int, int]], ahead: int, room: int
) -> None:
    engine = machine({**ALONE, "cache.streamer.lines_ahead": ahead, "cache.super_queue": room})
    p = engine.profile
    slow = SlowCore(p.cycles(p.dram.local_ns), p.cache.l1d.hit_cycles, p.cache.l2.hit_cycles, ahead, room)
    now = 1000
    for page, place, passed in script:
        now += passed
        line = PAGE + page * 64 + place
        assert load(engine, line, at=now) == slow.load(line, now)
    assert lines_of(engine, PAGE, 64 * 6) == {line - PAGE for line in slow.there}
    unasked = int(engine.arena[engine.cpus[0][s.OWNER] + k.PAIR_DRAM])
    assert unasked == len(slow.asked) - int(engine.arena[engine.cpus[0][s.OWNER] + k.DATA_L2 + 2])


# --- what it is worth ------------------------------------------------------------------------------------------------
STREAM = """
run: {baseline: false}
machine: {profile: clx-6252, cpu: {clock_hz: 1600 MHz}}
vmm: {technique: native}
vms:
  - memory: 2 GiB
    guest:
      kernel: {page_size: 2 MiB, populate: prebuilt}
      processes:
        - phases:
            - {primitive: stream, pattern: sequential, region: 1 GiB, accesses: 0}
"""


@pytest.mark.slow
def test_a_core_reads_memory_as_fast_as_was_measured() -> None:
    """Of a Xeon Gold 6248 at 1.6 GHz: 10.7 to 11.5 GB/s (Velten et al. 2022), 11.5 to 12.2 (Alappat et al. 2020)."""
    speed = {}
    for entries in (32, 0):
        accesses = "vms.0.guest.processes.0.phases.0.accesses"
        sets = (f"machine.cpu.cache.streamer.entries={entries}",)
        short, long = (run(parse_scenario(STREAM, [*sets, f"{accesses}={n}"])) for n in (4_000_000, 8_000_000))
        elapsed = long.cycles.elapsed - short.cycles.elapsed
        speed[entries] = 8 * 4_000_000 / (elapsed / long.clock_hz) / 1e9
    assert 10.7 < speed[32] < 12.2
    assert speed[0] < 10.7
