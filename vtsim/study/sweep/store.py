"""A study in one SQLite file: one writer, any number of readers, whole after any kill.

Its tables: `points` has what was run, each with its resolved scenario (JSON), result (JSON, deflated), version of the
model, error if it failed, and timings; `design` says which of them are which run of the study; `finished` has the
numbers of points that need no further look; `study` has what the study itself is.
"""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from attrs import frozen

from vtsim.base.errors import ConfigError

TABLES: Final = (
    """CREATE TABLE IF NOT EXISTS points (
    identity TEXT PRIMARY KEY, scenario TEXT NOT NULL, version TEXT NOT NULL,
    result BLOB, error TEXT, wall_s REAL NOT NULL, peak_mib REAL NOT NULL) WITHOUT ROWID""",
    """CREATE TABLE IF NOT EXISTS design (
    number INTEGER, replicate INTEGER, baseline TEXT, identity TEXT NOT NULL, axes TEXT NOT NULL,
    PRIMARY KEY (number, replicate, baseline)) WITHOUT ROWID""",
    "CREATE TABLE IF NOT EXISTS finished (number INTEGER PRIMARY KEY)",
    "CREATE TABLE IF NOT EXISTS study (key TEXT PRIMARY KEY, value TEXT NOT NULL)",
)
MADE: Final = tuple(table.replace("IF NOT EXISTS ", "") for table in TABLES)  # as SQLite keeps them
SQLITE: Final = b"SQLite format 3\0"  # how a store begins
NAME_ANOTHER: Final = "a store is one SQLite file, as in --store results/study.sqlite"
FAST: Final = 1  # zlib's level: a fifth of the size in a third of a millisecond


@frozen(kw_only=True)
class Run:
    """One run that the design asks for; `result` and `error` are None while it is missing."""

    number: int
    replicate: int
    baseline: str
    identity: str
    axes: str
    result: str | None
    error: str | None


class Store:
    """A point is there with its result or its error once `put` has returned, and not at all before."""

    def __init__(self, path: Path, *, reading: bool = False) -> None:
        if path.exists() and not path.is_file():
            raise ConfigError(f"this is {no_file(path)}, and no store of a study", file=str(path), help=NAME_ANOTHER)
        self.path, self.lock = path, None if reading else _locked(path)
        try:
            self.connection = sqlite3.connect(path, isolation_level=None, timeout=60)
            self.connection.execute(
                "PRAGMA synchronous=NORMAL"
            )  # a kill loses nothing, a power failure the last points
            self._refuse_other_tables()
            self.connection.execute("PRAGMA journal_mode=WAL")
            for table in TABLES:
                self.connection.execute(table)
        except sqlite3.OperationalError as error:
            self._unlock()
            if not reading:
                raise self._no_room(error) from None
            self._read_as_it_is()
        except sqlite3.Error as error:
            self.close()
            if error.sqlite_errorcode != sqlite3.SQLITE_NOTADB:
                raise self._damaged(error) from None
            raise ConfigError(f"this is no store of a study: {error}", file=str(path), help=NAME_ANOTHER) from None

    def _read_as_it_is(self) -> None:
        """Where nothing can be written, as on a read-only disk, a store can be read that nobody else changes."""
        self.connection = sqlite3.connect(f"file:{quote(str(self.path))}?immutable=1", uri=True, isolation_level=None)
        try:
            self._refuse_other_tables()
        except sqlite3.Error as error:
            self.close()
            raise ConfigError(f"the store of the study cannot be read: {error}", file=str(self.path)) from None

    def _refuse_other_tables(self) -> None:
        """A file that has tables of other columns is another program's, or another version's: it stays as it is."""
        for (made,) in self.connection.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall():
            if made not in MADE:
                self.close()
                raise ConfigError(
                    "its tables are those of another program, or of another version of vtsim",
                    file=str(self.path),
                    help="choose another file by --store, or move this one away",
                )

    def _damaged(self, error: Exception) -> ConfigError:
        """Half of a file, or one that something else has written to: what is left of it is not for us to judge."""
        return ConfigError(
            f"the store of the study is damaged: {error}",
            file=str(self.path),
            help="bring back a copy of it, or move it away and sweep again",
        )

    def _no_room(self, error: sqlite3.Error) -> ConfigError:
        """The disk is full, or the file is no longer one that can be written: what is there stays whole."""
        return ConfigError(
            f"the store of the study cannot be written: {error}",
            file=str(self.path),
            help="what was stored is kept; where there is room on the disk, the sweep goes on when it is started again",
        )

    def _write(self, query: str, row: tuple[Any, ...]) -> None:
        try:
            self.connection.execute(query, row)
        except sqlite3.OperationalError as error:
            raise self._no_room(error) from None

    def put(
        self,
        identity: str,
        scenario: str,
        version: str,
        *,
        result: bytes | None,
        error: str | None,
        wall_s: float,
        peak_mib: float = 0.0,
    ) -> None:
        """Write one point, in place of an earlier attempt at it; `wall_s` in seconds, `peak_mib` of the process."""
        row = (identity, scenario, version, result, error, wall_s, peak_mib)
        self._write("INSERT OR REPLACE INTO points VALUES (?, ?, ?, ?, ?, ?, ?)", row)

    def missing(self, identities: Iterable[str], *, retry_failed: bool = False) -> list[str]:
        """Return which points are still to be run, in the order given."""
        done = "AND error IS NULL" if retry_failed else ""
        query = f"SELECT 1 FROM points WHERE identity = ? {done}"
        return [each for each in identities if self.connection.execute(query, (each,)).fetchone() is None]

    def get(self, identity: str) -> tuple[str | None, str | None]:
        """Return result and error of a point, both None where it was not run."""
        row = self.connection.execute("SELECT result, error FROM points WHERE identity = ?", (identity,)).fetchone()
        return (unpacked(row[0]), row[1]) if row else (None, None)

    def begin(self, about: dict[str, Any]) -> None:
        """Say which study this is; the design of another is forgotten, the points are kept."""
        if self.about() != about:
            try:
                with self.connection:
                    self.connection.execute("BEGIN IMMEDIATE")
                    for table in ("design", "finished", "study"):
                        self.connection.execute(f"DELETE FROM {table}")
                    self.connection.execute("INSERT INTO study VALUES ('about', ?)", (json.dumps(about),))
            except sqlite3.OperationalError as error:
                raise self._no_room(error) from None

    def about(self) -> dict[str, Any] | None:
        """Return what was said of the study; None in a store of none."""
        row = self.connection.execute("SELECT value FROM study WHERE key = 'about'").fetchone()
        return json.loads(row[0]) if row else None

    def plan(self, number: int, replicate: int, baseline: str, identity: str, axes: str) -> None:
        """Say which point is a run of the study; `baseline` is empty for the point itself."""
        row = (number, replicate, baseline, identity, axes)
        self._write("INSERT OR REPLACE INTO design VALUES (?, ?, ?, ?, ?)", row)

    def finish(self, number: int) -> None:
        """Say that all runs of a point are there, so that a resumed study need not look."""
        self._write("INSERT OR REPLACE INTO finished VALUES (?)", (number,))

    def is_finished(self, number: int) -> bool:
        """Was `finish` called for it, in this design?"""
        return self.connection.execute("SELECT 1 FROM finished WHERE number = ?", (number,)).fetchone() is not None

    def runs(self) -> Iterator[Run]:
        """Yield the runs of the design in order, those of baselines after that of their point; none is kept."""
        query = """SELECT number, replicate, baseline, identity, axes, result, error
                   FROM design LEFT JOIN points USING (identity) ORDER BY number, replicate, baseline"""
        for number, replicate, baseline, identity, axes, result, error in self.connection.execute(query):
            yield Run(
                number=number, replicate=replicate, baseline=baseline, identity=identity, axes=axes,
                result=unpacked(result), error=error,
            )  # fmt: skip

    def errors(self, most: int) -> Iterator[tuple[str, str]]:
        """Yield the place on the axes and the error of the first runs that failed, in order."""
        query = """SELECT axes, error FROM design JOIN points USING (identity)
                   WHERE error IS NOT NULL ORDER BY number, replicate, baseline LIMIT ?"""
        yield from self.connection.execute(query, (most,))

    def failed(self, identity: str) -> bool:
        """Was it run, with an error for a result?"""
        query = "SELECT 1 FROM points WHERE identity = ? AND error IS NOT NULL"
        return self.connection.execute(query, (identity,)).fetchone() is not None

    def done(self) -> int:
        """Return how many runs of the design need not be done, those of baselines included."""
        return int(self.connection.execute("SELECT COUNT(*) FROM design JOIN points USING (identity)").fetchone()[0])

    def counts(self) -> tuple[int, int, int]:
        """Return how many runs of points are planned so far, done, and failed; baselines apart."""
        query = """SELECT COUNT(*), COUNT(result), COUNT(error)
                   FROM design LEFT JOIN points USING (identity) WHERE baseline = ''"""
        planned, done, failed = self.connection.execute(query).fetchone()
        return planned, done, failed

    def timings(self) -> tuple[int, float, float]:
        """Return how many points were run with success, their mean seconds, and the largest process in MiB."""
        query = "SELECT COUNT(*), AVG(wall_s), MAX(peak_mib) FROM points WHERE error IS NULL"
        count, mean, peak = self.connection.execute(query).fetchone()
        return count, mean or 0.0, peak or 0.0

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind: object, error: BaseException | None, at: object) -> None:
        self.close()
        if isinstance(error, sqlite3.DatabaseError | zlib.error):
            raise self._damaged(error) from None

    def close(self) -> None:
        """Let go of the file."""
        self.connection.close()
        self._unlock()

    def _unlock(self) -> None:
        if self.lock is not None:
            _lock_path(self.path).unlink(missing_ok=True)
            os.close(self.lock)
            self.lock = None


def no_file(path: Path) -> str:
    """What stands at a place that is there and is no file."""
    return "a folder" if path.is_dir() else "a device or a pipe"


def is_store(path: Path) -> bool:
    """A store may have any name: what it is follows from its first bytes."""
    try:
        with path.open("rb") as file:
            return file.read(len(SQLITE)) == SQLITE
    except OSError:
        return False


def packed(result: str) -> bytes:
    """Return a result as it is stored; workers do it, since there are many of them and one coordinator."""
    return zlib.compress(result.encode(), FAST)


def unpacked(result: bytes | None) -> str | None:
    """Return what `packed` was given."""
    return None if result is None else zlib.decompress(result).decode()


def _lock_path(path: Path) -> Path:
    return path.with_name(f"{path.name}-lock")


def _locked(path: Path) -> int:
    """Become the one writer. The lock goes with the process, however it ends."""
    try:
        lock = os.open(_lock_path(path), os.O_CREAT | os.O_RDWR, 0o600)
    except OSError as error:
        raise ConfigError(
            f"the store of the study cannot be written: {error.strerror}",
            file=str(path),
            help="choose another by --store",
        ) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise ConfigError("another sweep is writing to it", file=str(path), help="wait for it, or end it") from None
    if not _is_there(lock, _lock_path(path)):  # who had it removed it meanwhile: others will see another file
        os.close(lock)
        return _locked(path)
    return lock


def _is_there(lock: int, path: Path) -> bool:
    """Is this open file the one of that name?"""
    return path.exists() and os.path.samestat(os.fstat(lock), path.stat())
