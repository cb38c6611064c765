"""A run as a timeline: both formats, from one run of two VMs that share a CPU."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest

from vtsim.base import trace
from vtsim.base.errors import ConfigError
from vtsim.base.trace import Sinks, TracedMachine, TraceEvent, TraceSink
from vtsim.config import load_scenario, parse_scenario
from vtsim.platform.tracing import traced_machine
from vtsim.study.result import Result
from vtsim.study.run import simulate
from vtsim.study.timeline import formats, slices
from vtsim.study.timeline.formats import timeline_file

SCENARIO = """
run: {baseline: false}
machine: {cpus: 2}
vms:
  - name: asking
    cpu: 0
    guest:
      kernel: {tick: off}
      processes: [{phases: [{primitive: cpuid, iterations: 3}]}]
  - name: calling
    cpu: 0
    guest:
      kernel: {tick: off}
      processes: [{phases: [{primitive: syscall, iterations: 3}]}]
"""
READER = "trace_processor_shell"
STATES = ("R0", "R3", "N0", "N3")


@attrs.frozen(order=True)
class Slice:
    """What a viewer shows, whichever file it reads."""

    track: tuple[str, ...]
    start_ns: int
    end_ns: int
    name: str
    cycle: int
    cycles: int
    arguments: str


@attrs.define
class Kept:
    """Keeps all events."""

    events: list[TraceEvent] = attrs.field(factory=list)
    machines: list[TracedMachine] = attrs.field(factory=list)
    kinds: int = trace.ALL_KINDS

    def begin(self, machine: TracedMachine) -> None:
        self.machines.append(machine)

    def take(self, events: Any) -> None:
        self.events += events


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Kept, Path]:
    """The result, its events, and a directory with both timelines; windows are longer than the run."""
    place = tmp_path_factory.mktemp("timeline")
    scenario = place / "two.yaml"
    scenario.write_text(SCENARIO)
    kept = Kept()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slices, "WINDOW_S", 1.0)
        with timeline_file(place / "run.json") as chrome, timeline_file(place / "run.pftrace") as other:
            sinks: tuple[TraceSink, ...] = (kept, chrome, other)
            result = simulate(load_scenario(scenario), trace=Sinks(sinks))
    return result, kept, place


def chrome_slices(path: Path) -> Iterator[Slice]:
    """The slices of Chrome's JSON."""
    events = json.loads(path.read_text())["traceEvents"]
    named = {(e["name"], e["pid"], e.get("tid")): e["args"].get("name") for e in events if e["ph"] == "M"}
    for e in events:
        if e["ph"] == "X":
            *thread, last = named["thread_name", e["pid"], e["tid"]].split()
            path_of = (" ".join(thread), last) if last in STATES else (" ".join([*thread, last]),)
            start, length = (round(e[what] * 1000) for what in ("ts", "dur"))
            rest = {key: value for key, value in e["args"].items() if key not in ("cycle", "cycles")}
            yield Slice(
                (named["process_name", e["pid"], None], *path_of), start, start + length, e["name"],
                e["args"]["cycle"], e["args"]["cycles"], str(rest),
            )  # fmt: skip


def chrome_counters(path: Path) -> dict[tuple[str, str], list[float]]:
    """The values of every counter of Chrome's JSON, in order."""
    events = json.loads(path.read_text())["traceEvents"]
    named = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    found: dict[tuple[str, str], list[float]] = {}
    for e in events:
        if e["ph"] == "C":
            found.setdefault((named[e["pid"]], e["name"]), []).append(e["args"][e["name"]])
    return found


def test_state_slices_sum_to_the_clock_by_privilege_state(ran: tuple[Result, Kept, Path]) -> None:
    result, _, place = ran
    sums: Counter[str] = Counter()
    for each in chrome_slices(place / "run.json"):
        if each.track[-1] in STATES:
            sums[each.track[-1]] += each.cycles

    assert sums == {state: sum(row.values()) for state, row in result.cycles.by.items()}
    assert sum(sums.values()) == result.cycles.total


def test_a_state_follows_the_other_on_each_cpu_without_gap(ran: tuple[Result, Kept, Path]) -> None:
    """CPU 0 runs the host and both VMs, CPU 1 the host alone."""
    result, _, place = ran
    states = sorted((s.cycle, s.cycles, s.track[:2]) for s in chrome_slices(place / "run.json") if s.track[2:])
    idle = [(at, cycles) for at, cycles, track in states if track == ("host", "CPU 1")]
    busy = [(at, cycles) for at, cycles, track in states if track != ("host", "CPU 1") and cycles]

    assert {track[0] for _, _, track in states} == {"host", "asking", "calling"}
    for cpu in (idle, busy):
        assert cpu[0][0] == 0
        assert [at + cycles for at, cycles in cpu[:-1]] == [at for at, _ in cpu[1:]]
    assert sum(cycles for _, cycles in idle) + sum(cycles for _, cycles in busy) == result.cycles.total


def test_slices_nest_on_every_track(ran: tuple[Result, Kept, Path]) -> None:
    _, _, place = ran
    tracks: dict[tuple[str, ...], list[tuple[int, int]]] = {}
    for each in chrome_slices(place / "run.json"):
        assert each.start_ns <= each.end_ns
        tracks.setdefault(each.track, []).append((each.start_ns, -each.end_ns))
    for found in tracks.values():
        open_: list[int] = []
        for start, end in sorted(found):
            while open_ and open_[-1] <= start:
                open_.pop()
            assert not open_ or -end <= open_[-1]
            open_.append(-end)


def test_exits_are_slices_by_reason_and_fill_the_time_between_guest_states(ran: tuple[Result, Kept, Path]) -> None:
    result, _, place = ran
    reasons: Counter[str] = Counter()
    handled = outside = 0
    for each in chrome_slices(place / "run.json"):
        if each.track[0] == "host":
            continue
        if each.track[2:] and each.track[2] in ("R0", "R3"):
            outside += each.cycles
        elif not each.track[2:] and each.name in {one.reason for one in result.exits}:
            reasons[each.name] += 1
            handled += each.cycles

    assert reasons == {one.reason: one.count for one in result.exits}
    assert reasons["CPUID"] == 3
    assert handled == outside


def test_counters_of_one_window_are_those_of_the_result(ran: tuple[Result, Kept, Path]) -> None:
    result, kept, place = ran
    counters = chrome_counters(place / "run.json")
    end = max(event.cycle for event in kept.events)

    for name, vm in result.vms.items():
        (efficiency,) = counters[name, "efficiency"]
        assert efficiency == vm.efficiency.overall
        rate, at_the_end = counters[name, "exits/s"]
        assert rate * end / result.clock_hz == pytest.approx(sum(one.count for one in vm.exits))
        assert at_the_end == 0


def test_the_vcpus_of_a_native_machine_are_its_cpus() -> None:
    text = "machine: {cpus: 2}\nvms: [{name: one, vcpus: 2, guest: {processes: [{phases: [{primitive: cpuid}]}]}}]"
    machine = traced_machine(parse_scenario(text), 10**9, None)

    assert [(vcpu.vm, vcpu.number, vcpu.cpu, vcpu.vmcs) for vcpu in machine.vcpus] == [
        ("one", 0, 0, 0),
        ("one", 1, 1, 0),
    ]


def test_a_vm_that_is_switched_off_is_in_the_trace(ran: tuple[Result, Kept, Path]) -> None:
    _, kept, _ = ran
    stops = [event for event in kept.events if event.kind == trace.STOP]

    assert [event.reason < 0 for event in stops] == [False, False, True, True]
    assert [vcpu.vm for vcpu in kept.machines[0].vcpus] == ["asking", "calling"]


@pytest.mark.skipif(importlib.util.find_spec("perfetto") is None, reason="the extra timeline is not installed")
def test_both_formats_hold_the_same_slices(ran: tuple[Result, Kept, Path]) -> None:
    from perfetto.protos.perfetto.trace.perfetto_trace_pb2 import Trace, TrackEvent

    _, _, place = ran
    file = Trace()
    file.ParseFromString((place / "run.pftrace").read_bytes())
    paths: dict[int, tuple[str, ...]] = {}
    open_: dict[tuple[str, ...], list[tuple[int, str, dict[str, Any]]]] = {}
    found, values = [], {}
    for packet in file.packet:
        if packet.HasField("track_descriptor"):
            described = packet.track_descriptor
            above = paths[described.parent_uuid] if described.HasField("parent_uuid") else ()
            paths[described.uuid] = (*above, described.name)
            continue
        event, track = packet.track_event, paths[packet.track_event.track_uuid]
        notes = {
            note.name: note.string_value if note.HasField("string_value") else note.int_value
            for note in event.debug_annotations
        }
        if event.type == TrackEvent.TYPE_SLICE_BEGIN:
            open_.setdefault(track, []).append((packet.timestamp, event.name, notes))
        elif event.type == TrackEvent.TYPE_SLICE_END:
            start, name, known = open_[track].pop()
            cycle = known.pop("cycle")
            found.append(Slice(track, start, packet.timestamp, name, cycle, notes["cycles"], str(known)))
        else:
            values.setdefault(track, []).append(event.double_counter_value)

    assert sorted(found) == sorted(chrome_slices(place / "run.json"))
    assert values == chrome_counters(place / "run.json")


@pytest.mark.skipif(
    importlib.util.find_spec("perfetto") is None or shutil.which(READER) is None,
    reason="Perfetto's own reader, trace_processor_shell, is not on the PATH; its package would download it",
)
def test_perfettos_own_reader_finds_the_slices_in_both_formats(ran: tuple[Result, Kept, Path]) -> None:
    from perfetto.trace_processor import TraceProcessor, TraceProcessorConfig

    _, _, place = ran
    expected = Counter((each.name, each.start_ns, each.end_ns) for each in chrome_slices(place / "run.json"))
    for name in ("run.pftrace", "run.json"):
        with TraceProcessor(
            trace=str(place / name), config=TraceProcessorConfig(bin_path=shutil.which(READER))
        ) as reader:
            rows = list(reader.query("select name, ts, dur, track_id from slice"))
            tracks = {row.id: row for row in reader.query("select id, name, parent_id from track")}
            counts = Counter(
                row.name for row in reader.query("select t.name from counter join track t on t.id = track_id")
            )
        assert Counter((row.name, row.ts, row.ts + row.dur) for row in rows) == expected, name
        values = chrome_counters(place / "run.json")
        assert counts == Counter(counter for (_, counter), each in values.items() for _ in each), name
        if name.endswith(".pftrace"):  # threads of processes are what Chrome's JSON has instead of tracks below tracks
            found = Counter(tuple(_path(tracks, row.track_id)) for row in rows)
            assert found == Counter(each.track for each in chrome_slices(place / "run.json"))


def _path(tracks: dict[int, Any], number: int | None) -> list[str]:
    """The names of a track and of those above it: VM, vCPU, privilege state."""
    return [] if number is None else [*_path(tracks, tracks[number].parent_id), tracks[number].name]


def test_a_timeline_replaces_nothing_before_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "PACKAGE", "no_such_package")  # any name is JSON then
    path = tmp_path / "run.pftrace"
    with timeline_file(path):
        pass
    whole = path.read_text()
    assert json.loads(whole) == {"traceEvents": [], "displayTimeUnit": "ns"}

    with pytest.raises(KeyError), timeline_file(path):
        raise KeyError

    assert path.read_text() == whole
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_that_cannot_be_written_is_refused_before_the_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error, timeline_file(tmp_path / "none" / "run.json"):
        pytest.fail("the run started")
    assert str(error.value) == f"--timeline: {tmp_path}/none/run.json: No such file or directory"

    with pytest.raises(ConfigError) as error, timeline_file(tmp_path):
        pytest.fail("the run started")
    assert str(error.value) == f"--timeline: {tmp_path} is a directory"
