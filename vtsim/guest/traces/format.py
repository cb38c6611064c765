"""The trace file: one npz archive with a JSON header and a column per field of a row.

docs/traces.md describes the file and how to record one.
"""

from __future__ import annotations

import io
import json
import lzma
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

import attrs
import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from vtsim.base.errors import ConfigError
from vtsim.base.whole_file import replacing
from vtsim.guest.traces.kinds import NAME, NUMBER
from vtsim.guest.traces.rows import first_wrong

FORMAT: Final = "vtsim-trace"
VERSION: Final = 1
HEADER_LIMIT: Final = 1 << 20  # bytes; a header is a few kilobytes
NPY_PREAMBLE_LIMIT: Final = 4096  # bytes that numpy puts before a column's data

# fmt: off
COLUMNS: Final[dict[str, type[np.generic]]] = {
    "icount": np.int64,  # instructions executed before this row
    "kind":   np.uint8,
    "cpl":    np.uint8,
    "cr3":    np.int64,  # as the guest sees it, before the instruction
    "rip":    np.int64,
    "a0":     np.int64,
    "a1":     np.int64,
    "a2":     np.int64,
    "n":      np.uint32,  # events merged into this row
}
# fmt: on
DAMAGED: Final = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    RuntimeError,
    ValueError,
    struct.error,
    lzma.LZMAError,
)
VCPU_COLUMNS: Final = ("vcpu", "vcpu_id", "cpu")  # of other recorders
DELTA: Final = ("icount",)  # stored as differences, which compress better


@frozen(kw_only=True)
class Phase:
    """A named run of rows, up to the next phase's first row."""

    name: str
    first_row: int
    icount: int  # where the phase starts


@frozen(kw_only=True)
class RecordedGuest:
    """The machine a trace was recorded on, as far as a replay needs it."""

    memory_bytes: int
    tsc_hz: int
    instructions_per_second: int
    machine: str = ""
    kernel: str = ""
    command_line: str = ""


@frozen(kw_only=True, eq=False)
class Trace:
    """A recorded guest: columns of equal length, phases, and where it came from.

    64-bit values are two's complement, as everywhere in the engine.
    """

    name: str
    description: str
    source: str
    guest: RecordedGuest
    phases: tuple[Phase, ...]
    icount: NDArray[np.int64]
    kind: NDArray[np.uint8]
    cpl: NDArray[np.uint8]
    cr3: NDArray[np.int64]
    rip: NDArray[np.int64]
    a0: NDArray[np.int64]
    a1: NDArray[np.int64]
    a2: NDArray[np.int64]
    n: NDArray[np.uint32]

    def __attrs_post_init__(self) -> None:
        for name in COLUMNS:
            getattr(self, name).flags.writeable = False
        _check(self)

    def __len__(self) -> int:
        return len(self.icount)

    def counts(self) -> dict[str, tuple[int, int]]:
        """Rows and events (the sum of `n`) of every kind that occurs."""
        rows = np.bincount(self.kind, minlength=256)
        events = np.bincount(self.kind, weights=self.n, minlength=256)
        return {NAME[int(k)]: (int(rows[k]), int(events[k])) for k in np.nonzero(rows)[0]}

    def rows(self, name: str) -> slice:
        """The rows of one phase."""
        for number, phase in enumerate(self.phases):
            if phase.name == name:
                later = self.phases[number + 1 :]
                return slice(phase.first_row, later[0].first_row if later else len(self))
        raise ConfigError.unknown("phase", name, [phase.name for phase in self.phases])

    def phase_of_rows(self) -> NDArray[np.int64]:
        """The number of the phase that each row belongs to."""
        starts = np.array([phase.first_row for phase in self.phases], np.int64)
        return np.searchsorted(starts, np.arange(len(self)), side="right").astype(np.int64) - 1

    def save(self, path: str | Path) -> None:
        """Write the file beside `path`, then rename: nothing half-written replaces a good one."""
        columns = {name: getattr(self, name) for name in COLUMNS}
        columns |= {name: np.diff(columns[name], prepend=0) for name in DELTA}
        with replacing(Path(path)) as place, place.open("wb") as file:
            np.savez_compressed(file, header=_encode(_header(self)), **columns)

    @classmethod
    def load(cls, path: str | Path) -> Trace:
        """Read a trace, or raise `ConfigError` with what is wrong with the file."""
        try:
            with zipfile.ZipFile(path) as archive:
                return _read(archive, str(path))
        except DAMAGED as error:
            raise _refusal(path, f"not a trace, or a truncated one ({error})") from None
        except OSError as error:
            raise _refusal(path, error.strerror or str(error)) from None


def _refusal(path: str | Path, why: str, *, help: str = "") -> ConfigError:
    return ConfigError(why, file=str(path), help=help)


def _header(trace: Trace) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "rows": len(trace),
        "name": trace.name,
        "description": trace.description,
        "source": trace.source,
        "guest": attrs.asdict(trace.guest),
        "phases": [attrs.asdict(phase) for phase in trace.phases],
        "kinds": {name: NUMBER[name] for name in trace.counts()},
        "delta": list(DELTA),
    }


def _encode(header: Mapping[str, Any]) -> NDArray[np.uint8]:
    return np.frombuffer(json.dumps(header, indent=1).encode(), np.uint8)


def _read(archive: zipfile.ZipFile, path: str) -> Trace:
    header = _read_header(archive, path)
    rows = header["rows"]
    columns = {}
    for name, dtype in COLUMNS.items():
        column = _read_member(archive, path, name, rows * np.dtype(dtype).itemsize)
        if column.dtype != dtype or column.shape != (rows,):
            raise _refusal(
                path,
                f"column {name} is {column.dtype} of shape {column.shape}",
                help=f"version {VERSION} has {rows} values of {np.dtype(dtype)}",
            )
        columns[name] = column
    _refuse_several_vcpus(archive, path, rows)
    for name in header["delta"]:
        columns[name] = np.cumsum(columns[name])
    try:
        return Trace(
            name=header["name"],
            description=header["description"],
            source=header["source"],
            guest=_known(RecordedGuest, header["guest"]),
            phases=tuple(_known(Phase, phase) for phase in header["phases"]),
            **columns,
        )
    except ConfigError as error:
        raise ConfigError.of(attrs.evolve(problem, file=path) for problem in error.problems) from None
    except (TypeError, KeyError) as error:
        raise _refusal(path, f"the header does not hold what version {VERSION} needs: {error}") from None


Part = TypeVar("Part", Phase, RecordedGuest)


def _known(of: type[Part], keys: Any) -> Part:
    """A part of the header: keys that this version does not know are passed over, values are of the right type."""
    if not isinstance(keys, dict):
        raise TypeError(f"{keys!r} in place of keys and values")
    values = {}
    for one in attrs.fields(of):
        if one.name in keys or one.default is attrs.NOTHING:
            values[one.name] = value = keys[one.name]
            if type(value) is not (int if one.type == "int" else str):
                raise TypeError(f"{one.name} is {value!r}, no {one.type}")
    return of(**values)


def _refuse_several_vcpus(archive: zipfile.ZipFile, path: str, rows: int) -> None:
    """Further columns are passed over, unless they say that rows are of different CPUs."""
    for name in VCPU_COLUMNS:
        if f"{name}.npy" in archive.namelist():
            numbers = np.unique(_read_member(archive, path, name, rows * 8))
            if len(numbers) > 1:
                raise _refusal(
                    path, f"column {name} has rows of {len(numbers)} vCPUs", help="a recording has the rows of one vCPU"
                )


def _read_header(archive: zipfile.ZipFile, path: str) -> dict[str, Any]:
    try:
        header = json.loads(_read_member(archive, path, "header", HEADER_LIMIT).tobytes())
    except ValueError:
        header = None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise _refusal(path, "not a trace: its header does not say so", help=f'"format": "{FORMAT}"')
    if header.get("version") != VERSION:
        raise _refusal(
            path,
            f"trace version {header.get('version')!r} is not known",
            help=f"this vtsim reads version {VERSION}",
        )
    rows, delta = header.get("rows"), header.get("delta")
    if not isinstance(rows, int) or rows < 0 or not isinstance(delta, list) or not set(delta) <= set(COLUMNS):
        raise _refusal(path, f"the header does not hold what version {VERSION} needs: rows, delta")
    return header


def _read_member(archive: zipfile.ZipFile, path: str, name: str, limit: int) -> NDArray[Any]:
    """One array of the archive; a member larger than the header announces is refused unread."""
    try:
        member = archive.getinfo(f"{name}.npy")
    except KeyError:
        raise _refusal(path, f"not a trace: it holds no {name}") from None
    if member.file_size > limit + NPY_PREAMBLE_LIMIT:
        raise _refusal(path, f"{name} takes {member.file_size} bytes where {limit} are announced")
    content = io.BytesIO(archive.read(member))  # as a whole, so that its checksum is checked first
    try:
        array: NDArray[Any] = np.lib.format.read_array(content, allow_pickle=False)
    except (ValueError, MemoryError) as error:
        raise _refusal(path, f"{name} is not an array ({error})") from None
    return array


def _check(trace: Trace) -> None:
    """Refuse columns and phases that cannot be a recording."""
    lengths = {name: len(getattr(trace, name)) for name in COLUMNS}
    if len(set(lengths.values())) > 1:
        raise ConfigError("columns differ in length: " + ", ".join(f"{k} {v}" for k, v in lengths.items()))
    for wrong in first_wrong(trace, trace.guest.memory_bytes):
        raise ConfigError(wrong)
    rows = len(trace)
    small = [name for name in ("memory_bytes", "tsc_hz", "instructions_per_second") if getattr(trace.guest, name) < 1]
    if small:
        raise ConfigError(f"{small[0]} of the guest is {getattr(trace.guest, small[0])}", help="at least 1")
    starts = [phase.first_row for phase in trace.phases]
    if not starts or starts[0] != 0 or any(b <= a for a, b in zip(starts, [*starts[1:], rows], strict=True)):
        raise ConfigError(
            f"phases start at rows {starts} of {rows}",
            help="the first starts at row 0 and each has at least one row",
        )
    if len({phase.name for phase in trace.phases}) < len(starts):
        raise ConfigError("two phases have the same name")
