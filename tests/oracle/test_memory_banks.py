"""Banks and refreshes of memory, beside channels that go command by command."""

from __future__ import annotations

import heapq
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cpu.bench import machine
from tests.oracle.dram_channel import NO_REFRESH, OUTSIDE, REAL, Timings, served
from vtsim.base import jit
from vtsim.cpu import slots as s
from vtsim.cpu.engine import Engine
from vtsim.cpu.kernels.dram import BANK_WORDS, UNTIL, WANTED, bank_of, from_memory, place_in_queue, until_opened

EXAMPLES = 20 if jit.DISABLED else 100
CHANNEL = {"dram.bandwidth": 23_464, "dram.channels": 1, "dram.ranks": 2, "dram.banks": 16, "dram.row_cycle_ns": 46}
IDLE_CLOCKS = REAL.rcd + REAL.cl + REAL.burst


def opened(engine: Engine, cycle: int, line: int = 0, cpu: int = 0) -> int:
    """The cycle in which the row of a line is opened that is wanted at one."""
    m = engine.cpus[cpu]
    m[s.CYCLE] = cycle
    return cycle + int(until_opened(m, engine.arena, line, int(m[s.NODE]), 0))


def share_of_bandwidth(engine: Engine, on_their_way: int, lines: int) -> float:
    """As `served` has it."""
    random = Random(1)
    m = engine.cpus[0]
    idle, clock = int(m[s.DRAM_CYCLES]), engine.profile.clock_hz * 0.682e-9
    coming = [random.uniform(0, 200) for _ in range(on_their_way)]
    heapq.heapify(coming)
    began = 0.0
    for number in range(lines):
        at = heapq.heappop(coming)
        began = at if number == lines // 5 else began
        m[s.CYCLE] = int(at)
        waits = int(from_memory(m, engine.arena, random.randrange(1 << 13), 0)) - idle
        heapq.heappush(coming, at + waits + (IDLE_CLOCKS + OUTSIDE) * clock)
    return (lines - lines // 5) * REAL.burst * clock / (at - began) / int(m[s.CHANNELS])


@pytest.mark.parametrize(
    ("channels", "timings", "refresh", "on_their_way", "lines"),
    [
        (1, NO_REFRESH, 0, 4, 1000),
        (1, NO_REFRESH, 0, 16, 1500),
        (1, NO_REFRESH, 0, 28, 1500),
        (1, NO_REFRESH, 0, 64, 1500),
        (1, REAL, 550, 4, 5000),
        (1, REAL, 550, 16, 7000),
        (1, REAL, 550, 64, 7000),
        (3, REAL, 550, 96, 20_000),
        (6, REAL, 550, 96, 9000),
        (6, REAL, 550, 288, 9000),
    ],
)
def test_channels_serve_as_many_random_lines_as_some_that_go_command_by_command(
    channels: int, timings: Timings, refresh: int, on_their_way: int, lines: int
) -> None:
    """Without queues that end, six channels of 288 lines would serve 91 % of their bandwidth, not 64 or 68."""
    slow, _ = served(on_their_way, lines, channels=channels, t=timings)
    changes = {**CHANNEL, "dram.channels": channels, "dram.bandwidth": 23_464 * channels, "dram.refresh_ns": refresh}
    assert share_of_bandwidth(machine(changes, cpus=2), on_their_way, lines) == pytest.approx(slow, rel=0.09)


class Queue:
    """Who holds an entry of a channel's queue, and until when: one after the other, nobody ahead."""

    def __init__(self, room: int) -> None:
        self.entries = [0] * room

    def admitted(self, wanted: int) -> int:
        return max(wanted, min(self.entries))

    def take(self, until: int) -> None:
        self.entries[self.entries.index(min(self.entries))] = until


@given(st.integers(1, 6), st.lists(st.tuples(st.integers(0, 60), st.integers(1, 400)), max_size=60))
@settings(max_examples=EXAMPLES)
def test_a_line_enters_the_queue_when_the_first_one_has_left(room: int, script: list[tuple[int, int]]) -> None:
    engine = machine({"dram.channels": 1, "dram.ranks": 1, "dram.queue": room}, cpus=2)
    m, a, model = engine.cpus[0], engine.arena, Queue(room)
    wanted = 0
    for passed, held in script:
        wanted += passed
        at = int(place_in_queue(m, a, int(m[s.QUEUES]), wanted))
        assert at >= 0
        admitted = max(wanted, int(a[at + UNTIL]))
        assert admitted == model.admitted(wanted)
        a[at + WANTED], a[at + UNTIL] = wanted, admitted + held
        if min(model.entries) <= wanted:  # which of those that are left it takes is all the same
            model.entries[next(n for n, until in enumerate(model.entries) if until <= wanted)] = admitted + held
        else:
            model.take(admitted + held)


def test_who_is_behind_does_not_wait_for_lines_that_are_wanted_later() -> None:
    engine = machine({"dram.channels": 1, "dram.ranks": 1, "dram.queue": 2, "dram.refresh_ns": 0}, cpus=2)
    m, idle = engine.cpus[0], int(engine.cpus[0][s.DRAM_CYCLES])
    m[s.CYCLE] = 10_000
    for _ in range(8):
        from_memory(m, engine.arena, 76, 0)  # of one bank, one after the other
    assert int(from_memory(m, engine.arena, 77, 0)) > idle + int(m[s.ROW_CYCLE])
    m[s.CYCLE] = 1000
    assert int(from_memory(m, engine.arena, 77, 0)) == idle


wanted_cycles = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 3000)), max_size=BANK_WORDS)


@given(wanted_cycles, st.sampled_from((0, 160, 550)))
@settings(max_examples=EXAMPLES)
def test_a_row_is_opened_in_the_first_row_cycle_that_is_left(wanted: list[tuple[int, int]], refresh_ns: int) -> None:
    """Whoever asks when: found by trying every cycle."""
    changes = {
        "dram.channels": 1,
        "dram.ranks": 1,
        "dram.banks": 1,
        "dram.refresh_ns": refresh_ns,
        "dram.refresh_interval_ns": 1000,
    }
    engine = machine(changes, cpus=2)
    row_cycle, refresh, interval = (
        engine.profile.cycles(ns) for ns in (engine.profile.dram.row_cycle_ns, refresh_ns, 1000)
    )
    taken: list[int] = []
    for cpu, cycle in wanted:
        first = cycle
        while first % interval < refresh or any(abs(first - other) < row_cycle for other in taken):
            first += 1
        assert opened(engine, cycle, cpu=cpu) == first
        taken.append(first)


def test_a_bank_forgets_what_lies_back_furthest() -> None:
    engine = machine({"dram.channels": 1, "dram.ranks": 1, "dram.banks": 1, "dram.refresh_ns": 0}, cpus=2)
    row_cycle = int(engine.cpus[0][s.ROW_CYCLE])
    later = [1000 + row_cycle * n for n in range(BANK_WORDS)]
    assert [opened(engine, each) for each in reversed(later)] == later[::-1]
    assert opened(engine, 1000) == 1000 + row_cycle * BANK_WORDS  # which took the place of what began at 1000
    assert opened(engine, 1000) == 1000


def test_lines_of_a_pair_lie_in_two_banks_of_a_rank() -> None:
    engine = machine({"dram.ranks": 2, "dram.banks": 16, "dram.refresh_ns": 0}, cpus=2)
    row_cycle = int(engine.cpus[0][s.ROW_CYCLE])
    for line in range(0, 1 << 20, 9_998):
        at = 1000 + 20 * row_cycle * line
        assert [opened(engine, at, each) - at for each in (line, line ^ 1, line)] == [0, 0, row_cycle]
    refreshing = machine({"dram.ranks": 2, "dram.banks": 16}, cpus=2)
    for line in range(0, 1 << 12, 2):
        assert opened(refreshing, 1_000_000 + line * row_cycle) >= 1_000_000
        waits = {opened(refreshing, 2_000_000 + 40 * line * row_cycle, each) for each in (line, line ^ 1)}
        assert len(waits) == 1


def test_ranks_refresh_one_after_the_other() -> None:
    """Of 12, each for 350 of 7800 ns: at any time the row of one in 22 lines waits."""
    engine = machine({"dram.ranks": 2, "dram.banks": 16, "dram.row_cycle_ns": 1}, cpus=2)
    interval = int(engine.cpus[0][s.REFRESH_INTERVAL])
    waiting = [
        sum(opened(engine, cycle, line) > cycle for line in range(192)) for cycle in range(interval, 2 * interval, 97)
    ]
    assert set(waiting) <= {0, 16}
    assert sum(waiting) / len(waiting) / 192 == pytest.approx(350 / 7800, rel=0.05)


def test_a_rank_refreshes_when_its_rows_are_closed_and_opens_none_meanwhile() -> None:
    changes = {"dram.channels": 1, "dram.ranks": 1, "dram.banks": 16, "dram.row_cycle_ns": 46, "dram.refresh_ns": 350}
    engine = machine(changes, cpus=2)
    turn, refresh, row_cycle = (int(engine.cpus[0][slot]) for slot in (s.REFRESH_INTERVAL, s.REFRESH, s.ROW_CYCLE))
    a_line_of = {int(bank_of(engine.cpus[0], line)): line for line in range(16)}
    assert opened(engine, turn - row_cycle, a_line_of[0]) == turn - row_cycle  # closed just in time
    assert opened(engine, turn + 1, a_line_of[1]) == turn + refresh
    for interval, before in ((3, 1), (4, row_cycle - 1)):
        late = row_cycle - before
        assert opened(engine, interval * turn - before, a_line_of[2]) == interval * turn - before
        assert opened(engine, interval * turn, a_line_of[3]) == interval * turn + late + refresh
        assert opened(engine, interval * turn + refresh + late, a_line_of[4]) == interval * turn + refresh + late
    assert opened(engine, 3 * turn + 5, a_line_of[5]) == 3 * turn + refresh  # who is behind: only the latest is known


def test_one_line_after_the_other_takes_the_latency_that_was_measured() -> None:
    """Refreshes are in it; a line that meets none takes less."""
    engine = machine({"dram.ranks": 2, "dram.refresh_ns": 550})
    m, profile = engine.cpus[0], engine.profile
    interval = int(m[s.REFRESH_INTERVAL])
    taken = []
    for number in range(interval // 31):
        m[s.CYCLE] = number * (interval + 31)
        taken.append(int(from_memory(m, engine.arena, 77, 0)))
    assert sum(taken) / len(taken) == pytest.approx(profile.cycles(profile.dram.local_ns), abs=1)
    assert min(taken) < profile.cycles(profile.dram.local_ns) - 40


def test_without_ranks_nobody_waits_for_a_bank() -> None:
    engine = machine(cpus=2)
    m, latency = engine.cpus[0], engine.profile.cycles(engine.profile.dram.local_ns)
    assert [int(from_memory(m, engine.arena, 77, 0)) for _ in range(3)] == [latency] * 3


def test_an_access_that_is_held_back_asks_for_its_line_when_it_is_not_any_more() -> None:
    """Else it would wait for a refresh that is over when it begins, after it has waited for what waited for that."""
    engine = machine({"dram.channels": 1, "dram.ranks": 1, "dram.banks": 1, "dram.refresh_ns": 350})
    m = engine.cpus[0]
    m[s.CYCLE] = int(m[s.REFRESH_INTERVAL])
    idle = int(m[s.DRAM_CYCLES])
    m[s.HELD_BACK] = int(m[s.REFRESH])
    assert int(from_memory(m, engine.arena, 77, 0)) == idle
    m[s.HELD_BACK] = 0
    assert int(from_memory(m, engine.arena, 78, 0)) == idle + int(m[s.REFRESH] + m[s.ROW_CYCLE])  # behind the first one
