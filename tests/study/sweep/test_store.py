"""The store of a study: what was put is there, whatever happens to the writer."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from vtsim.base.errors import ConfigError
from vtsim.study.sweep.store import Store, packed

KILLED = """
import os, signal, sys
from pathlib import Path
from vtsim.study.sweep.store import Store, packed
store = Store(Path(sys.argv[1]))
for name in "abc":
    store.put(name, "", "1", result=packed("{}"), error=None, wall_s=0.1)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_points_survive_a_killed_writer(tmp_path: Path) -> None:
    path = tmp_path / "study.sqlite"
    ended = subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False)
    store = Store(path)

    assert ended.returncode == -9
    assert store.missing("dcba") == ["d"]
    store.close()


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
