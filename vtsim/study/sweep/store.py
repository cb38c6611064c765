"""The points of a study in one SQLite file: one writer, any number of readers, whole after any kill."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from pathlib import Path
from typing import Final

TABLE: Final = """CREATE TABLE IF NOT EXISTS points (
    identity TEXT PRIMARY KEY, scenario TEXT NOT NULL, version TEXT NOT NULL,
    result TEXT, error TEXT, wall_s REAL NOT NULL)"""


class Store:
    """A point is there with its result or its error once `put` has returned, and not at all before."""

    def __init__(self, path: Path) -> None:
        self.connection = sqlite3.connect(path, isolation_level=None)
        self.connection.execute("PRAGMA journal_mode=WAL")
        self.connection.execute(TABLE)

    def put(
        self, identity: str, scenario: str, version: str, *, result: str | None, error: str | None, wall_s: float
    ) -> None:
        """Write one point, in place of an earlier attempt at it; `wall_s` in seconds."""
        row = (identity, scenario, version, result, error, wall_s)
        self.connection.execute("INSERT OR REPLACE INTO points VALUES (?, ?, ?, ?, ?, ?)", row)

    def missing(self, identities: Iterable[str], *, retry_failed: bool = False) -> list[str]:
        """Return which points are still to be run, in the order given."""
        done = "WHERE error IS NULL" if retry_failed else ""
        known = {identity for (identity,) in self.connection.execute(f"SELECT identity FROM points {done}")}
        return [identity for identity in identities if identity not in known]

    def close(self) -> None:
        """Let go of the file."""
        self.connection.close()
