"""Caches of lines and translations against a slow one-bit model, access by access."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cpu.bench import machine
from vtsim.base import jit
from vtsim.cpu import accounts as k
from vtsim.cpu import slots as s
from vtsim.cpu.engine import Engine
from vtsim.cpu.kernels.caches import (
    bring_l3,
    comes_young,
    drop,
    fill,
    find,
    keep,
    line_of,
    probe,
    probe_at_once,
    remove,
    set_of,
    tag_of,
)
from vtsim.cpu.kernels.entry import histogram_bucket
from vtsim.cpu.kernels.lines import data_miss, read_line
from vtsim.cpu.kernels.rights import READ

Look = Callable[..., bool]
EXAMPLES = 15 if jit.DISABLED else 60


class OneBit:
    """Sets of (tag, referenced) in way order: the first way not referenced goes; when none is, all are forgotten."""

    def __init__(self, sets: int, ways: int) -> None:
        self.sets = [[(None, False)] * ways for _ in range(sets)]

    def look(self, index: int, tag: int) -> bool:
        ways = self.sets[index % len(self.sets)]
        for n, (held, _) in enumerate(ways):
            if held == tag:
                ways[n] = (tag, True)
                return True
        return False

    def put(self, index: int, tag: int, empty_first: bool) -> None:
        ways = self.sets[index % len(self.sets)]
        order = list(range(len(ways)))
        same = [n for n in order if ways[n][0] == tag and empty_first]
        empty = [n for n in order if ways[n][0] is None and empty_first]
        idle = [n for n in order if not ways[n][1]]
        if not (same or empty or idle):
            ways[:] = [(held, False) for held, _ in ways]
            idle = order
        ways[(same or empty or idle)[0]] = (tag, True)


class QuadAge:
    """Sets of lines with ages, as nanoBench writes QLRU_H11_M1_R0_U0: tables of what a hit and a miss make of an age."""

    def __init__(self, sets: int, ways: int) -> None:
        self.sets: list[list[list[Any]]] = [[[None, 3] for _ in range(ways)] for _ in range(sets)]  # line, age

    def look(self, index: int, line: int) -> bool:
        """Was it there? A line that was not is of age 1."""
        ways = self.sets[index]
        there = [way for way in ways if way[0] == line]
        if there:
            there[0][1] = {3: 1, 2: 1, 1: 0, 0: 0}[there[0][1]]
        else:
            way = next((way for way in ways if way[0] is None), None) or next(way for way in ways if way[1] == 3)
            way[:] = [line, 1]
        lacking = 3 - max(age for _, age in ways)
        for way in ways:
            way[1] += lacking
        return bool(there)


def aged(sets: int, ways: int) -> Engine:
    return machine({"cache.quad_age_l3": True, "cache.l3.bytes": sets * ways * 64, "cache.l3.ways": ways})


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (2, 11), (5, 8), (8, 16)], ids=str)
@given(lines=st.lists(st.integers(0, 1 << 16), min_size=100, max_size=300))
@settings(max_examples=EXAMPLES)
def test_an_l3_with_ages_is_the_quad_age_model(shape: tuple[int, int], lines: list[int]) -> None:
    """Of few sets none decides: new lines are of age 1."""
    engine = aged(*shape)
    m, t, model = engine.cpus[0], engine.tags, QuadAge(*shape)
    sets, ways = shape

    for line in (each % (sets * ways * 3 // 2 + 2) for each in lines):
        assert bool(bring_l3(m, t, line)) == model.look(int(set_of(m, s.L3, line)), line)


@pytest.mark.parametrize(("which", "young"), [(0, 1.0), (1, 1.0), (32, 1 / 16), (33, 1 / 16), (64, 1.0), (20, None)])
def test_sets_that_decide_always_take_new_lines_as_they_do_and_others_follow(which: int, young: float | None) -> None:
    engine = aged(128, 4)
    m, t = engine.cpus[0], engine.tags
    counter = int(m[s.L3 + s.REFERENCED] + 2 * m[s.L3 + s.SETS])
    for counted, of_followers in ((-5, 1.0), (0, 1.0), (5, 1 / 16)):
        came_young = 0
        for _ in range(3200):
            t[counter] = counted
            came_young += bool(comes_young(m, t, which))
            assert t[counter] - counted == (0 if young is None else 1 if young == 1.0 else -1)
        assert came_young / 3200 == pytest.approx(of_followers if young is None else young, abs=0.015)


@pytest.mark.parametrize(("kept", "passing", "rarely"), [(300, 12, True), (300, 0, False)])
def test_sets_decide_by_what_misses_less(kept: int, passing: int, rarely: bool) -> None:
    """Lines that come again, between lines that do not: there most new ones had better go first. Without the latter not."""
    engine = aged(128, 4)
    m, t = engine.cpus[0], engine.tags
    counter = int(m[s.L3 + s.REFERENCED] + 2 * m[s.L3 + s.SETS])
    once = iter(range(1 << 16, 1 << 26))
    for _ in range(60 if jit.DISABLED else 200):
        for line in range(kept):
            bring_l3(m, t, line)
            for _ in range(passing):
                bring_l3(m, t, next(once))
    assert (t[counter] > 0) == rarely


def test_lines_that_come_again_stay_between_many_that_do_not() -> None:
    """A quarter of what L3 has, each line again after twice as many others as L3 has; with one bit next to none stays."""
    found = {}
    for flag in (True, False):
        engine = machine({"cache.quad_age_l3": flag, "cache.l3.bytes": 128 * 8 * 64, "cache.l3.ways": 8})
        m, t = engine.cpus[0], engine.tags
        once = iter(range(1 << 16, 1 << 26))
        for _ in range(40):
            found[flag] = 0
            for line in range(256):
                found[flag] += int(bring_l3(m, t, line))
                for _ in range(8):
                    bring_l3(m, t, next(once))
    assert found[False] < 10
    assert found[True] > 150


@pytest.mark.parametrize("look", [probe, probe_at_once], ids=["way by way", "at once"])
@pytest.mark.parametrize("shape", [(1, 4), (4, 2), (8, 1), (2, 8), (2, 11), (1, 16), (2, 20), (1, 30)], ids=str)
@given(lines=st.lists(st.integers(0, 40), max_size=200))
@settings(max_examples=EXAMPLES)
def test_a_cache_of_lines_is_the_one_bit_model(look: Look, shape: tuple[int, int], lines: list[int]) -> None:
    sets, ways = shape
    engine = machine({"cache.l1d.bytes": sets * ways * 64, "cache.l1d.ways": ways})
    m, t, model = engine.cpus[0], engine.tags, OneBit(sets, ways)

    for line in lines:
        hit = bool(look(m, t, s.L1D, line))
        assert model.look(line, line) == hit
        if not hit:
            fill(m, t, s.L1D, line)
            model.put(line, line, empty_first=False)


@pytest.mark.parametrize("sets", [1, 2, 3, 8, 13])
@given(st.lists(st.integers(0, (1 << 32) - 2), max_size=60), st.integers(0, 1 << 20))
@settings(max_examples=EXAMPLES)
def test_lines_of_all_memory_are_told_apart(sets: int, lines: list[int], low: int) -> None:
    """Where a line's number has 33 bits: each is found where it was put, by its own number, and no other one is."""
    engine = machine({"cache.l1d.bytes": sets * 4 * 64, "cache.l1d.ways": 4})
    m, t = engine.cpus[0], engine.tags
    assert int(m[s.L1D + s.SETS]) == sets
    far = [low + (n << 28) for n in range(8 if sets == 1 else 16)]  # 16 GiB apart
    for line in [*lines, *far]:
        where = int(set_of(m, s.L1D, line))
        assert 0 <= where < sets
        assert int(line_of(m, s.L1D, where, tag_of(m, s.L1D, line))) == line
        if not probe(m, t, s.L1D, line):
            fill(m, t, s.L1D, line)
        assert probe(m, t, s.L1D, line)
        assert probe_at_once(m, t, s.L1D, line)
    found = [n for n in far if probe(m, t, s.L1D, n)]
    assert len(found) <= 4 * sets
    assert found == [n for n in far if probe_at_once(m, t, s.L1D, n)]
    assert not any(probe(m, t, s.L1D, n + (1 << 27)) for n in far if n + (1 << 27) not in lines)


operations = st.lists(
    st.tuples(st.sampled_from(("use", "use", "use", "remove", "drop")), st.integers(0, 80)), max_size=200
)


@pytest.mark.parametrize("shape", [(1, 4), (4, 2), (8, 1), (2, 8), (2, 5), (1, 12), (1, 63), (1, 64)], ids=str)
@given(script=operations)
@settings(max_examples=EXAMPLES)
def test_a_cache_of_translations_is_the_one_bit_model_with_empty_ways_first(
    shape: tuple[int, int], script: list[tuple[str, int]]
) -> None:
    sets, ways = shape
    engine = machine({"tlb.dtlb4k.entries": sets * ways, "tlb.dtlb4k.ways": ways})
    m, a, model = engine.cpus[0], engine.arena, OneBit(sets, ways)
    held: dict[int, int] = {}

    for step, (what, number) in enumerate(script):
        tag = number << 18
        if what == "use":
            got = int(find(m, a, s.DTLB4K, number, tag))
            assert (held[number] if model.look(number, tag) else -1) == got
            if got < 0:
                held[number] = step
                keep(m, a, s.DTLB4K, number, tag, step)
                model.put(number, tag, empty_first=True)
        else:
            if what == "remove":
                remove(m, a, s.DTLB4K, number, tag)
            else:
                drop(m, a, s.DTLB4K, -1, tag)
            model.sets = [[(None, r) if x == tag else (x, r) for x, r in ways] for ways in model.sets]


def test_keeping_a_translation_again_replaces_its_data_and_nothing_else() -> None:
    engine = machine()
    m, a = engine.cpus[0], engine.arena
    for number, data in ((1, 10), (2, 20), (1, 30)):
        keep(m, a, s.DTLB4K, number, number << 18, data)

    assert [int(find(m, a, s.DTLB4K, n, n << 18)) for n in (1, 2, 3)] == [30, 20, -1]


def test_a_cache_without_ways_holds_nothing() -> None:
    engine = machine({"tlb.stlb.entries": 0, "cache.l3.bytes": 0})
    m, a, t = engine.cpus[0], engine.arena, engine.tags
    keep(m, a, s.STLB, 1, 1 << 18, 7)
    fill(m, t, s.L3, 1)

    assert int(find(m, a, s.STLB, 1, 1 << 18)) == -1
    assert not probe(m, t, s.L3, 1)


def test_a_line_costs_the_latency_of_the_level_that_has_it() -> None:
    engine = machine()
    m, a, t, p = engine.cpus[0], engine.arena, engine.tags, engine.profile
    dram, l1 = p.cycles(p.dram.local_ns), p.cache.l1d.hit_cycles
    first = int(read_line(m, a, t, 0x1000, k.EPT_L1D))
    again = int(read_line(m, a, t, 0x1038, k.EPT_L1D))
    for way in range(p.cache.l1d.ways * 2):  # other lines of its L1D set
        read_line(m, a, t, 0x1000 + (way + 1) * p.cache.l1d.sets(64) * 64, k.GUEST_L1D)

    assert (dram, l1) == (first, again)
    assert [a[m[s.OWNER] + n] for n in range(k.EPT_L1D, k.EPT_DRAM + 1)] == [1, 0, 0, 1]
    assert sum(a[m[s.OWNER] + n] for n in range(k.GUEST_L1D, k.GUEST_DRAM + 1)) == 2 * p.cache.l1d.ways
    assert p.cache.l2.hit_cycles - l1 == int(data_miss(m, a, t, 0x1000 >> 6, READ, 0))
    assert a[m[s.OWNER] + k.DATA_L2] == 1


# --- histograms -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cycles", [0, 1, 63, 64, 127])
def test_a_short_duration_has_a_bucket_of_its_own(cycles: int) -> None:
    assert cycles == int(histogram_bucket(np.int64(cycles)))


@given(st.integers(128, 1 << 36))
def test_a_bucket_is_no_wider_than_a_64th_of_its_durations(cycles: int) -> None:
    octave = cycles.bit_length() - 7
    first = cycles >> octave << octave
    bucket = int(histogram_bucket(np.int64(cycles)))

    assert (
        bucket == int(histogram_bucket(np.int64(first))) == int(histogram_bucket(np.int64(first + (1 << octave) - 1)))
    )
    assert bucket == int(histogram_bucket(np.int64(first - 1))) + 1
    assert (1 << octave) * k.BUCKETS_PER_OCTAVE <= first


def test_no_duration_falls_out_of_the_histogram() -> None:
    assert int(histogram_bucket(np.int64((1 << 62) - 1))) == k.HISTOGRAM_BUCKETS - 1


def test_walks_that_do_not_look_up_the_l1_data_cache_begin_at_l2_and_leave_it_alone() -> None:
    cycles = {}
    for flag in (True, False):
        engine = machine({"features.walks_in_l1d": flag})
        m, a, t = engine.cpus[0], engine.arena, engine.tags
        cycles[flag] = [int(read_line(m, a, t, np.int64(0x4000), k.GUEST_L1D)) for _ in range(2)]

    assert cycles[True] == [int(m[s.DRAM_CYCLES]), int(m[s.L1D + s.LATENCY])]
    assert cycles[False] == [int(m[s.DRAM_CYCLES]), int(m[s.L2 + s.LATENCY])]
