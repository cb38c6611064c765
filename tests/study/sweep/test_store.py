"""The store of a study: what was put is there, whatever happens to the writer."""

from __future__ import annotations

import os
import resource
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from vtsim.base.errors import ConfigError
from vtsim.study.sweep.store import Store, packed

KILLED = """
import os, signal, sys
from pathlib import Path
from typing import Any
from vtsim.study.sweep.store import Store, packed
store = Store(Path(sys.argv[1]))
for name in "abc":
    store.put(name, "", "1", result=packed("{}"), error=None, wall_s=0.1)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_disk_that_is_full_is_told_and_what_was_stored_is_whole(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk; that of a child alone, since it cannot be raised again."""
    path = tmp_path / "study.sqlite"
    child = os.fork()
    if not child:
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            with Store(path) as store:
                store.begin({"name": "x"})
                resource.setrlimit(resource.RLIMIT_FSIZE, (128 * 1024, 128 * 1024))
                for number in range(100):
                    store.put(str(number), "{}", "1", result=packed("x" * 10) + bytes(4096), error=None, wall_s=0.0)
        except ConfigError as error:
            (tmp_path / "told").write_text(str(error))
        finally:
            os._exit(0)
    os.waitpid(child, 0)

    assert (tmp_path / "told").read_text().startswith(f"{path}: the store of the study cannot be written: ")
    with Store(path) as store:
        assert store.about() == {"name": "x"}
        stored, _, _ = store.timings()
        assert 0 < stored < 100
        assert store.missing(map(str, range(100))) == [str(number) for number in range(stored, 100)]


def test_points_survive_a_killed_writer(tmp_path: Path) -> None:
    path = tmp_path / "study.sqlite"
    ended = subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False)
    store = Store(path)

    assert ended.returncode == -9
    assert store.missing("dcba") == ["d"]
    store.close()


def test_a_store_that_is_damaged_is_told(tmp_path: Path) -> None:
    """Cut off, then written over after its first page, then results alone; SQLite sees the first when it opens the file."""
    path, told = tmp_path / "study.sqlite", []
    with Store(path) as store:
        store.begin({"name": "x"})
        for name in "abcdefgh":
            store.plan(ord(name), 0, "", name, "{}")
            store.put(name, "{}", "1", result=packed("{}") + bytes(2000), error=None, wall_s=0.0)
    whole = path.read_bytes()
    page = int.from_bytes(whole[16:18], "big")
    over = whole[:page] + b"\xff" * (len(whole) - page)
    for content in (whole[: len(whole) // 2], over, whole.replace(packed("{}"), b"\0" * 10)):
        path.write_bytes(content)
        with pytest.raises(ConfigError) as caught, Store(path, reading=True) as store:
            list(store.runs())
        told.append(str(caught.value))

    assert told == [
        f"{path}: the store of the study is damaged: {what}\n help: bring back a copy of it, or move it away and sweep again"
        for what in (
            "database disk image is malformed",
            "database disk image is malformed",
            "Error -3 while decompressing data: unknown compression method",
        )
    ]


def test_a_database_of_other_tables_is_refused_and_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "mine.sqlite"
    with closing(sqlite3.connect(path)) as mine:
        mine.execute("CREATE TABLE points (x)")
    before = path.read_bytes()
    with pytest.raises(ConfigError) as caught:
        Store(path)

    assert str(caught.value) == (
        f"{path}: its tables are those of another program, or of another version of vtsim\n"
        " help: choose another file by --store, or move this one away"
    )
    assert [each.name for each in tmp_path.iterdir()] == ["mine.sqlite"]
    assert path.read_bytes() == before


def test_failed_points_are_missing_only_when_they_are_to_be_retried(tmp_path: Path) -> None:
    store = Store(tmp_path / "study.sqlite")
    store.put("a", "", "1", result=None, error="broken", wall_s=0.1)
    store.put("b", "", "1", result=packed("{}"), error=None, wall_s=0.1)

    assert store.missing("abc") == ["c"]
    assert store.missing("abc", retry_failed=True) == ["a", "c"]
    store.close()


def test_a_store_can_be_read_where_nothing_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite refuses to open a log beside such a store; the refusal is played here, since root may write anywhere."""
    path = tmp_path / "größe?.sqlite"
    with Store(path) as store:
        store.put("a", "{}", "1", result=packed("{}"), error=None, wall_s=0.5)
    connect = sqlite3.connect

    def refused(place: object, **options: Any) -> sqlite3.Connection:
        if not options.get("uri"):
            raise sqlite3.OperationalError("unable to open database file")
        return connect(str(place), **options)

    monkeypatch.setattr(sqlite3, "connect", refused)
    with Store(path, reading=True) as store:
        assert store.get("a") == ("{}", None)
    with pytest.raises(ConfigError, match="the store of the study cannot be written: unable to open"):
        Store(path)
