"""The two formats of a timeline: Chrome's JSON, and Perfetto's TrackEvent where its package is installed."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path as File
from typing import IO, Any, Final

from attrs import define, field

from vtsim.base.errors import ConfigError
from vtsim.base.trace import PRIVILEGES
from vtsim.base.whole_file import replacing
from vtsim.study.timeline.slices import Arguments, Path, Timeline, Writer

NS: Final = 10**9
PACKAGE: Final = "perfetto"
EXTRA: Final = "pip install 'vtsim[timeline]' writes Perfetto's own format, which is smaller"
RANK: Final = {name: rank for rank, name in enumerate(("", *PRIVILEGES))}  # of a track below its vCPU


@define
class Chrome:
    """JSON of Chrome's trace viewer: a process for each VM, a thread for each track of its vCPUs."""

    file: IO[str]
    hz: int = field(default=NS, init=False)
    tracks: dict[Path, tuple[int, int]] = field(factory=dict, init=False)
    open: dict[Path, list[tuple[str, int, Arguments]]] = field(factory=dict, init=False)
    written: int = field(default=0, init=False)

    def clock(self, hz: int) -> None:
        """Set how long a cycle is."""
        self.hz = hz

    def begin(self, track: Path, name: str, at: int, arguments: Arguments) -> None:
        """Remember a slice until it ends."""
        self.open.setdefault(track, []).append((name, at, arguments))

    def end(self, track: Path, at: int) -> None:
        """Write the slice."""
        name, since, arguments = self.open[track].pop()
        start = nanoseconds(since, self.hz)
        duration = nanoseconds(at, self.hz) - start
        more = {"cycle": since, "cycles": at - since, **arguments}
        self._write({"name": name, "ph": "X", **self._place(track), **_us(start), "dur": duration / 1e3, "args": more})

    def counter(self, track: Path, at: int, value: float) -> None:
        """Write a value."""
        vm, name = track
        place, time = {"pid": self._process(vm)}, _us(nanoseconds(at, self.hz))
        self._write({"name": name, "ph": "C", **place, **time, "args": {name: value}})

    def close(self) -> None:
        """End the array."""
        self.file.write('{"traceEvents":[\n]' if not self.written else "\n]")
        self.file.write(',"displayTimeUnit":"ns"}\n')

    def _write(self, event: dict[str, Any]) -> None:
        self.file.write(",\n" if self.written else '{"traceEvents":[\n')
        self.file.write(json.dumps(event, ensure_ascii=False, separators=(",", ":")))
        self.written += 1

    def _process(self, vm: str) -> int:
        """The number of a VM, whose name is written when it is first needed."""
        if (vm,) not in self.tracks:
            number = 1 + sum(len(known) == 1 for known in self.tracks)
            self.tracks[(vm,)] = (number, 0)
            self._write({"name": "process_name", "ph": "M", "pid": number, "args": {"name": vm}})
        return self.tracks[(vm,)][0]

    def _place(self, track: Path) -> dict[str, int]:
        """Process and thread of a track, and their names when they are first needed."""
        process = self._process(track[0])
        if track not in self.tracks:
            vcpus = list(
                dict.fromkeys(known[:2] for known in [*self.tracks, track] if known[1:] and known[0] == track[0])
            )
            thread = 10 * (1 + vcpus.index(track[:2])) + RANK[track[2] if track[2:] else ""]
            self.tracks[track] = (process, thread)
            for what, value in (("name", " ".join(track[1:])), ("sort_index", thread)):
                named = {"name": f"thread_{what}", "ph": "M", "pid": process, "tid": thread, "args": {what: value}}
                self._write(named)
        return {"pid": process, "tid": self.tracks[track][1]}


@define
class TrackEvents:
    """Perfetto's TrackEvent packets: nested tracks, and counters below their VM."""

    file: IO[bytes]
    builder: Any = field(init=False)
    types: Any = field(init=False)
    hz: int = field(default=NS, init=False)
    tracks: dict[Path, int] = field(factory=dict, init=False)
    begun: dict[Path, list[int]] = field(factory=dict, init=False)

    def __attrs_post_init__(self) -> None:
        from perfetto.protos.perfetto.trace import perfetto_trace_pb2
        from perfetto.trace_builder.proto_builder import StreamingTraceProtoBuilder

        self.builder, self.types = StreamingTraceProtoBuilder(self.file), perfetto_trace_pb2

    def clock(self, hz: int) -> None:
        """Set how long a cycle is."""
        self.hz = hz

    def begin(self, track: Path, name: str, at: int, arguments: Arguments) -> None:
        """Write the begin of a slice."""
        self.begun.setdefault(track, []).append(at)
        event = self._event(track, at, "TYPE_SLICE_BEGIN")
        event.track_event.name = name
        self._annotate(event, {"cycle": at, **arguments})
        self.builder.write_packet(event)

    def end(self, track: Path, at: int) -> None:
        """Write the end of a slice."""
        event = self._event(track, at, "TYPE_SLICE_END")
        self._annotate(event, {"cycles": at - self.begun[track].pop()})
        self.builder.write_packet(event)

    def counter(self, track: Path, at: int, value: float) -> None:
        """Write a value."""
        event = self._event(track, at, "TYPE_COUNTER", counter=True)
        event.track_event.double_counter_value = value
        self.builder.write_packet(event)

    def close(self) -> None:
        """Every packet is in the file already."""

    def _event(self, track: Path, at: int, kind: str, *, counter: bool = False) -> Any:
        uuid = self._track(track, counter=counter)
        packet = self.builder.create_packet()
        packet.timestamp, packet.trusted_packet_sequence_id = nanoseconds(at, self.hz), 1
        packet.track_event.type, packet.track_event.track_uuid = getattr(self.types.TrackEvent, kind), uuid
        return packet

    def _track(self, track: Path, *, counter: bool) -> int:
        """The number of a track, described together with those above it when it is first needed."""
        if track not in self.tracks:
            above = self._track(track[:-1], counter=False) if track[1:] else None
            self.tracks[track] = uuid = len(self.tracks) + 1
            packet = self.builder.create_packet()
            described = packet.track_descriptor
            described.uuid, described.name = uuid, track[-1]
            described.child_ordering = self.types.TrackDescriptor.ChildTracksOrdering.EXPLICIT
            if above is not None:
                described.parent_uuid = above
            described.sibling_order_rank = RANK.get(track[-1], uuid)
            if counter:
                described.counter.unit_name = track[-1]
            self.builder.write_packet(packet)
        return self.tracks[track]

    @staticmethod
    def _annotate(packet: Any, arguments: Arguments) -> None:
        for name, value in arguments.items():
            note = packet.track_event.debug_annotations.add()
            note.name = name
            if isinstance(value, str):
                note.string_value = value
            else:
                note.int_value = value


def nanoseconds(cycles: int, hz: int) -> int:
    """A time in cycles as whole nanoseconds, to the nearest."""
    return (cycles * NS + hz // 2) // hz


def _us(ns: int) -> dict[str, float]:
    return {"ts": ns / 1e3}


def is_chrome(path: File) -> bool:
    """Does a timeline of this name become JSON: because it is asked for, or for want of the package?"""
    return path.suffix == ".json" or importlib.util.find_spec(PACKAGE) is None


@contextmanager
def timeline_file(path: File) -> Iterator[Timeline]:
    """A sink that writes a timeline, in the format that `is_chrome` says; only a whole file replaces an older one.

    Raises `ConfigError` where the file cannot be written.
    """
    if path.is_dir():
        raise ConfigError(f"{path} is a directory", field="--timeline")
    try:
        with (
            replacing(path) as place,
            place.open("w", encoding="utf-8") if is_chrome(path) else place.open("wb") as file,
        ):
            writer: Writer = Chrome(file) if is_chrome(path) else TrackEvents(file)  # type: ignore[arg-type]
            timeline = Timeline(writer)
            yield timeline
            timeline.close()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}", field="--timeline") from None
