"""What a trace is made of: one event per transition, the same row in the engine, on screen and on disk.

Kinds, privilege codes and the row layout are plain integers: kernels write rows and Python reads them.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from functools import reduce
from operator import or_
from pathlib import Path
from typing import IO, Any, Final, Protocol
from zipfile import BadZipFile

import numpy as np
from attrs import frozen

from vtsim.base.errors import ConfigError

PRIVILEGES: Final = ("R0", "R3", "N0", "N3")

# fmt: off
EXIT: Final      = 0  # N* -> R0; reason: basic exit reason; cycles: of the transition
ENTRY: Final     = 1  # R0 -> N*; reason: of the exit that it ends, or -1; cycles: since that exit, inclusive
SYSCALL: Final   = 2  # ring 3 -> ring 0; reason: number in RAX
SYSRET: Final    = 3  # ring 0 -> ring 3
FAULT: Final     = 4  # exception delivered through the IDT; reason: vector
INTERRUPT: Final = 5  # external interrupt delivered through the IDT; reason: vector
IRET: Final      = 6  # return from either
HALT: Final      = 7  # the logical CPU waited; reason: -1; cycles: of the wait
STOP: Final      = 8  # a VM ended, from outside; reason: the stop code; or the run did: reason -1

KINDS: Final = ("EXIT", "ENTRY", "SYSCALL", "SYSRET", "FAULT", "INTERRUPT", "IRET", "HALT", "STOP")

#                 what `detail` holds, in order; a kind that names fewer than DETAILS leaves the rest 0
DETAIL_NAMES: Final[tuple[tuple[str, ...], ...]] = (
    ("rip", "qualification", "about"),  # EXIT; about: gpa of EPT exits, else the interruption information
    ("rip", "injected", "vmcs"),        # ENTRY; injected: interruption-information field; vmcs: its address
    ("rip",),                           # SYSCALL
    ("rip",),                           # SYSRET
    ("rip", "error_code", "address"),   # FAULT
    ("rip",),                           # INTERRUPT
    ("rip",),                           # IRET
    ("rip",),                           # HALT
    ("rip",),                           # STOP
)

DETAILS: Final = 3
COLUMNS: Final = ("cycle", "vcpu", "privilege", "to", "kind", "reason", "cycles",
                  "detail0", "detail1", "detail2",
                  "retired",   # instructions of the logical CPU so far, of any program
                  "emulated")  # instructions so far that a hypervisor executed for the owner who runs now
# fmt: on
FIXED: Final = COLUMNS.index("detail0")
ALL_KINDS: Final = (1 << len(KINDS)) - 1


@frozen(slots=True)
class TraceEvent:
    """One transition of one vCPU, at the cycle at which it was complete."""

    cycle: int
    vcpu: int
    privilege: int
    to: int
    kind: int
    reason: int
    cycles: int
    detail: tuple[int, ...] = ()
    retired: int = 0
    emulated: int = 0

    @classmethod
    def from_row(cls, row: Sequence[int]) -> TraceEvent:
        """The event of one engine row, whose values are in the order of COLUMNS."""
        cycle, vcpu, privilege, to, kind, reason, cycles = (int(value) for value in row[:FIXED])
        details = tuple(int(value) for value in row[FIXED : FIXED + len(DETAIL_NAMES[kind])])
        return cls(cycle, vcpu, privilege, to, kind, reason, cycles, details, int(row[-2]), int(row[-1]))

    def row(self) -> tuple[int, ...]:
        """The values in the order of COLUMNS."""
        details = (*self.detail, *(0,) * (DETAILS - len(self.detail)))
        fixed = (self.cycle, self.vcpu, self.privilege, self.to, self.kind, self.reason, self.cycles)
        return (*fixed, *details, self.retired, self.emulated)


@frozen(kw_only=True)
class TracedVcpu:
    """A virtual CPU that events may be of; natively, the logical CPU that a guest has to itself.

    `number` counts the vCPUs of the VM. `cpu` is the logical CPU that it starts on, `vmcs` the physical address of its
    VMCS, 0 where nothing is switched by a VMCS.
    """

    vm: str
    number: int
    cpu: int
    vmcs: int = 0


@frozen(kw_only=True)
class TracedMachine:
    """What a sink has to know of the machine whose events follow."""

    technique: str
    clock_hz: int
    vcpus: tuple[TracedVcpu, ...]


class TraceSink(Protocol):
    """Who wants events while a run is under way."""

    @property
    def kinds(self) -> int:
        """One bit per kind that has to be recorded; 0 once nothing more is wanted."""
        ...

    def begin(self, machine: TracedMachine) -> None:
        """A machine is about to run; natively there is one after the other, for each guest."""
        ...

    def take(self, events: Iterable[TraceEvent]) -> None:
        """Receive the next events, in the order in which they happened."""
        ...


@frozen
class Sinks:
    """Several who want events, as one."""

    sinks: tuple[TraceSink, ...]

    @property
    def kinds(self) -> int:
        """What any of them wants."""
        return reduce(or_, (sink.kinds for sink in self.sinks), 0)

    def begin(self, machine: TracedMachine) -> None:
        """Tell each."""
        for sink in self.sinks:
            sink.begin(machine)

    def take(self, events: Iterable[TraceEvent]) -> None:
        """Give each the events of kinds that it wants."""
        everything = list(events)
        for sink in self.sinks:
            wanted = sink.kinds
            sink.take(event for event in everything if wanted >> event.kind & 1)


FORMAT: Final = "vtsim-trace"
FORMAT_VERSION: Final = 2


def save(file: IO[bytes], rows: array[int]) -> None:
    """Write events as a compressed npz: one int64 array per column and a JSON header that names the codes.

    `rows` holds the rows one after the other. Cycles are stored as differences, which compress.
    """
    table = np.array(rows, np.int64).reshape(-1, len(COLUMNS))
    columns: dict[str, Any] = {name: table[:, at] for at, name in enumerate(COLUMNS)}
    columns["cycle"] = np.diff(columns["cycle"], prepend=0)
    header = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "privileges": PRIVILEGES,
        "kinds": dict(zip(KINDS, DETAIL_NAMES, strict=True)),
    }
    columns["header"] = np.frombuffer(json.dumps(header).encode(), np.uint8)
    np.savez_compressed(file, **columns)


def load(path: Path) -> Iterator[TraceEvent]:
    """Yield the events that `save` wrote."""
    try:
        with np.load(path) as stored:
            header = json.loads(bytes(stored["header"]))
            columns = [np.asarray(stored[name], np.int64) for name in COLUMNS]
    except OSError as error:
        raise ConfigError(error.strerror or "cannot be read", file=str(path)) from None
    except (BadZipFile, KeyError, ValueError, EOFError):
        raise ConfigError("not a trace that a run wrote", file=str(path)) from None
    if header.get("version") != FORMAT_VERSION:
        raise ConfigError(f"trace version {header.get('version')} is not {FORMAT_VERSION}", file=str(path))
    columns[0] = np.cumsum(columns[0])
    for row in zip(*(column.tolist() for column in columns), strict=True):
        yield TraceEvent.from_row(row)
