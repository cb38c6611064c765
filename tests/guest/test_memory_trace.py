"""A recorded program's accesses are replayed as they are in the file; how they reach the engine changes nothing."""

from __future__ import annotations

import random
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from tests.cpu.programs import HOW
from tests.guest.conftest import Harness, native
from tests.guest.test_kernel import WAY_OUT, ended
from tests.traces.test_accesses import LACKEY, record
from vtsim.base.errors import ConfigError
from vtsim.base.jit import DISABLED
from vtsim.config import parse_scenario
from vtsim.cpu import accounts as k
from vtsim.cpu import ops as o
from vtsim.cpu.codes import HORIZON, PROGRAM_END
from vtsim.guest import spec as g
from vtsim.guest.primitives import recorded
from vtsim.guest.primitives.recorded import Feed
from vtsim.guest.traces import accesses
from vtsim.platform.machine import Machine

STACK, HEAP, LIBRARY = 0x7FFC_1234_0000, 0x5555_5575_6000, 0x7F12_3400_0000


def written(tmp_path: Path, records: int = 400, seed: int = 1) -> Path:
    """A ChampSim trace that loads and stores around a heap, a library and a stack."""
    chance = random.Random(seed)
    path = tmp_path / f"t{seed}"
    content = []
    for _ in range(records):
        places = [base + chance.randrange(8 << 12) for base in (STACK, HEAP, LIBRARY) if chance.random() < 0.3]
        content.append(record(places[:2], places[2:]))
    path.write_bytes(b"".join(content))
    return path


def replaying(path: Path, **options: int) -> Harness:
    return native((g.MemoryTraceSpec(trace=str(path)),), **options)


def state(harness: Harness) -> tuple[bytes, bytes, bytes]:
    """All bytes but for how the machine was run, and the window itself."""
    engine = harness.engine
    cpus, arena = engine.cpus.copy(), engine.arena.copy()
    cpus[:, list(HOW)] = 0
    for at in engine.feeds:
        arena[at : at + o.WINDOW_WORDS + recorded.WINDOW] = 0
    return cpus.tobytes(), arena.tobytes(), engine.tags.tobytes()


def windowed(harness: Harness, window: int) -> Harness:
    for feed in harness.engine.feeds.values():
        assert isinstance(feed, Feed)
        feed.window = window
    return harness


def test_a_recorded_program_accesses_what_was_recorded(tmp_path: Path) -> None:
    trace = tmp_path / "small.lackey"
    trace.write_bytes(LACKEY)
    harness = ended(replaying(trace))
    registers = 5
    assert harness.count(k.PAGE_FAULTS) == 2
    assert harness.instructions(o.R3) == registers + 4 + 1 + WAY_OUT


def test_a_replay_makes_as_many_accesses_as_the_trace(tmp_path: Path) -> None:
    path = written(tmp_path)
    few, many = (
        ended(native((g.MemoryTraceSpec(trace=str(path), limit=limit),), populate="prebuilt")).count(k.ACCESSES)
        for limit in (100, 300)
    )
    extra = [accesses.extent(path, limit).words for limit in (100, 300)]
    assert many - few == extra[1] - extra[0]  # none of them without an access


@pytest.mark.parametrize("window", [1, 3, 64, recorded.WINDOW])
@pytest.mark.parametrize("tick", [0, 1000])
def test_the_size_of_the_window_changes_no_byte(tmp_path: Path, window: int, tick: int) -> None:
    path = written(tmp_path)
    assert state(ended(windowed(replaying(path, tick=tick), window))) == state(ended(replaying(path, tick=tick)))


@pytest.mark.parametrize("seed", range(3))
def test_slices_of_time_change_no_byte(tmp_path: Path, seed: int) -> None:
    path, chance = written(tmp_path), random.Random(seed)
    whole = ended(replaying(path))
    cut = windowed(replaying(path), 17)
    until = 0
    while cut.issue(until=until) == HORIZON:
        until += chance.randint(1, 4000)
    assert state(cut) == state(whole)


@pytest.mark.parametrize("seed", range(3))
def test_a_restored_machine_reads_the_trace_from_where_the_state_was(tmp_path: Path, seed: int) -> None:
    path, chance = written(tmp_path), random.Random(seed)
    whole = windowed(replaying(path), 50)
    assert whole.issue(until=chance.randint(5_000, 60_000)) == HORIZON
    kept = whole.engine.save()
    assert whole.issue() == PROGRAM_END
    after = state(whole)

    whole.engine.restore(kept)
    assert whole.issue() == PROGRAM_END
    assert state(whole) == after
    other = windowed(replaying(path), 50)  # whose feed never read anything
    other.engine.restore(kept)
    assert other.issue() == PROGRAM_END
    assert state(other) == after


def test_two_traces_in_one_process_do_not_meet(tmp_path: Path) -> None:
    first, second = (g.MemoryTraceSpec(trace=str(written(tmp_path, 60, seed))) for seed in (1, 2))
    both = ended(native((first, second, first)))
    apart = [ended(native((one,))).count(k.PAGE_FAULTS) for one in (first, second)]
    assert both.count(k.PAGE_FAULTS) == 2 * apart[0] + apart[1]


def test_a_trace_that_leaves_no_room_for_the_process_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "everywhere"
    path.write_bytes(b"".join(record([n << 39 | 8], []) for n in range(256)))
    with pytest.raises(ConfigError) as error:
        replaying(path, memory=256 << 20)
    assert str(error.value) == (
        f"{path}: recorded addresses lie in so many parts of the address space that no room is left for the process "
        "itself\n help: use fewer records: limit"
    )


def test_a_trace_that_is_not_there_is_the_users_mistake(tmp_path: Path) -> None:
    missing = tmp_path / "none"
    with pytest.raises(ConfigError) as error:
        replaying(missing)
    assert str(error.value) == f"{missing}: No such file or directory"


def test_a_trace_that_became_shorter_is_the_users_mistake(tmp_path: Path) -> None:
    path = written(tmp_path)
    harness = windowed(replaying(path), 10)
    path.write_bytes(path.read_bytes()[: 64 * 100])
    with pytest.raises(ConfigError) as error:
        harness.issue()
    assert str(error.value) == f"{path}: the trace became shorter while it was replayed"


TWO = """
machine: {{profile: skx-4114, cpus: 2, memory: 256 MiB}}
vmm: {{personality: minimal, ept: {{page_size: 2 MiB}}}}
vms:
- {{name: a, cpu: 0, memory: 64 MiB, guest: {{processes: [{{phases: [{{primitive: memory_trace, trace: {a}}}]}}]}}}}
- {{name: b, cpu: 1, memory: 64 MiB, guest: {{processes: [{{phases: [{{primitive: memory_trace, trace: {b}}}]}}]}}}}
run: {{baseline: false}}
"""


@pytest.mark.compiled_only
def test_with_two_cpus_the_windows_change_no_byte(tmp_path: Path) -> None:
    text = TWO.format(a=written(tmp_path, 200, 1), b=written(tmp_path, 200, 2))
    states = []
    for window in (7, recorded.WINDOW):
        machine = Machine(parse_scenario(text))
        assert len(machine.engine.feeds) == 2
        for feed in machine.engine.feeds.values():
            assert isinstance(feed, Feed)
            feed.window = window
        machine.run()
        arena = machine.engine.arena.copy()
        for at in machine.engine.feeds:
            arena[at : at + o.WINDOW_WORDS + recorded.WINDOW] = 0
        cpus = machine.engine.cpus.copy()
        cpus[:, list(HOW)] = 0
        states.append((cpus.tobytes(), arena.tobytes(), machine.engine.tags.tobytes()))

    assert states[0] == states[1]


def test_what_is_held_of_a_trace_does_not_grow_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten times the trace, the same memory: its blocks and what scanning keeps (the engine itself is apart)."""
    if DISABLED:
        monkeypatch.setattr(accesses.words_of, "__kwdefaults__", {"block_bytes": 1 << 12})
    peaks = []
    block = 1 << 12 if DISABLED else 1 << 20
    for blocks in (8, 80):
        path = tmp_path / str(blocks)
        path.write_bytes(record([HEAP], [STACK]) * (blocks * block // 64))
        feed = Feed(g.MemoryTraceSpec(trace=str(path)))
        window = np.zeros(o.WINDOW_WORDS + recorded.WINDOW, np.int64)
        accesses._extent.cache_clear()
        tracemalloc.start()
        words = recorded.trace_extent(feed.phase).words
        while int(window[o.WINDOW_END]) < words:
            feed(window, 0)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()

    assert peaks[1] < peaks[0] * 1.25
    assert peaks[1] < 30 * block
