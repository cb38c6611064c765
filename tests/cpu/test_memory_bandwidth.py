"""Lines that several CPUs want of one node's memory wait for each other, at the node's bandwidth."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cpu.bench import machine
from vtsim.base import jit
from vtsim.config import parse_scenario
from vtsim.cpu import slots as s
from vtsim.cpu.accounts import GUEST_L1D
from vtsim.cpu.engine import Engine, Geometry
from vtsim.cpu.kernels.lines import PARTS, QUEUE_WORDS, read_line
from vtsim.cpu.kernels.lines import queued as queued_in
from vtsim.study.run import run

EXAMPLES = 15 if jit.DISABLED else 60
SLOW = {"dram.bandwidth": 1000}  # 140.8 cycles for a line at 2.2 GHz


def queued(engine: Engine, cpu: int, cycle: int) -> int:
    """What a line waits that a CPU wants at a cycle."""
    m = engine.cpus[cpu]
    m[s.CYCLE] = cycle
    return int(queued_in(m, engine.arena, int(m[s.QUEUES]) + int(m[s.NODE]) * QUEUE_WORDS, 0))


@given(st.lists(st.tuples(st.integers(0, 1), st.sampled_from((0, 1, 100, 141, 1000))), max_size=60))
@settings(max_examples=EXAMPLES)
def test_lines_are_served_one_after_the_other(wanted: list[tuple[int, int]]) -> None:
    """CPUs in step: a line waits until all before it are served."""
    engine = machine(SLOW, cpus=2)
    line = Fraction(64 * engine.profile.clock_hz, 1000 * 10**6)
    assert int(engine.cpus[0][s.LINE_TIME]) == line * PARTS // 1
    now, free = 0, Fraction(0)
    for cpu, passed in wanted:
        now += passed
        begins = max(free, Fraction(now))
        assert abs(queued(engine, cpu, now) - (begins - now)) <= 1
        free = begins + Fraction(int(engine.cpus[0][s.LINE_TIME]), PARTS)


def test_who_is_behind_waits_for_what_is_left_and_not_for_the_time_between() -> None:
    engine = machine(SLOW, cpus=2)
    assert queued(engine, 0, 1000) == 0
    assert queued(engine, 1, 960) == 140
    assert queued(engine, 0, 1000) == 281
    assert queued(engine, 0, 1282 + 140) == 0


def test_one_cpu_waits_for_nobody() -> None:
    assert int(machine(SLOW).cpus[0][s.LINE_TIME]) == 0
    assert int(machine(SLOW, cpus=2, threads=2).cpus[1][s.LINE_TIME]) > 0


def test_each_node_has_a_bandwidth_of_its_own() -> None:
    profile = machine(SLOW).profile
    engine = Engine(
        profile, Geometry(cpus=2, nodes=2, memory_bytes=64 << 20, pool_pages=64, code_pages=4, rows=64, owners=2)
    )
    m = engine.cpus[0]
    assert [int(each[s.NODE]) for each in engine.cpus] == [0, 1]
    here, there = 100 << 12, (int(m[s.NODE_END]) + 100) << 12

    def cycles(hpa: int) -> int:
        return int(read_line(m, engine.arena, engine.tags, hpa, GUEST_L1D))

    local, remote = profile.cycles(profile.dram.local_ns), profile.cycles(profile.dram.remote_ns)
    assert [cycles(here), cycles(there)] == [local, remote]
    assert [cycles(here + 64), cycles(there + 64)] == [local + 140, remote + 140]


STREAMS = """
machine: {cpus: 4, memory: 1 GiB}
vmm: {technique: native}
vms:
  - memory: 512 MiB
    vcpus: 4
    guest:
      kernel: {page_size: 2 MiB, populate: prebuilt}
      processes:
        - threads: 4
          phases: [{primitive: stream, pattern: uniform, region: 256 MiB, accesses: 20000}]
"""


def seconds_and_lines(*sets: str) -> tuple[float, int]:
    result: Any = run(parse_scenario(STREAMS, sets))
    return result.cycles.elapsed / result.clock_hz, result.caches.data.dram + result.walks.served_by.dram


@pytest.mark.parametrize("bandwidth", [400, 2000])
def test_together_they_get_no_more_than_the_bandwidth_and_nearly_all_of_it(bandwidth: int) -> None:
    seconds, lines = seconds_and_lines(f"machine.cpu.dram.bandwidth={bandwidth}")
    assert 0.93 < 64 * lines / seconds / (bandwidth * 10**6) <= 1.0


def test_a_bandwidth_that_is_not_used_costs_next_to_nothing() -> None:
    """Four CPUs with 12 misses each of 90 ns want at most 34 GB/s."""
    usual, endless = (seconds_and_lines(f"machine.cpu.dram.bandwidth={each}")[0] for each in (115_200, 10_000_000))
    assert endless <= usual < 1.03 * endless


CHASE = """
machine: {cpus: 2, memory: 1 GiB}
vmm: {ept: {page_size: 4 KiB, populate: prebuilt}}
run: {baseline: false}
vms:
  - memory: 512 MiB
    guest:
      kernel: {tick: off, populate: prebuilt}
      processes:
        - phases: [{primitive: stream, pattern: chase, region: 256 MiB, accesses: 20000}]
"""


def test_who_asks_for_one_line_after_the_other_never_waits_for_its_own() -> None:
    """A pointer chase and its walks: a line is served in 141 cycles, and the next one is asked for 198 later."""
    each = (run(parse_scenario(CHASE, [f"machine.cpu.dram.bandwidth={n}"])) for n in (1000, 10_000_000))
    slow, endless = (result.cycles.elapsed for result in each)
    assert endless <= slow < 1.02 * endless
