"""Output files: whole or not at all, and never in place of what is no file."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from vtsim.base.errors import ConfigError
from vtsim.base.whole_file import replacing, write_whole
from vtsim.study.timeline.formats import timeline_file


def timeline(path: Path) -> None:
    with timeline_file(path):
        pass


@pytest.mark.parametrize("write", [lambda path: write_whole(path, b"{}"), timeline])
def test_a_pipe_is_written_to_and_stays_one_as_a_device_does(tmp_path: Path, write: Callable[[Path], None]) -> None:
    pipe = tmp_path / "pipe.json"
    os.mkfifo(pipe)
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()), daemon=True)
    reader.start()
    write(pipe)
    reader.join(10)

    assert got and got[0].startswith(b"{")
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert list(tmp_path.iterdir()) == [pipe]


def test_of_a_link_what_it_leads_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    target, link = tmp_path / "there" / "a.csv", tmp_path / "b.csv"
    target.write_bytes(b"old")
    link.symlink_to(target)
    write_whole(link, b"new")

    assert link.is_symlink()
    assert target.read_bytes() == b"new"


def test_what_breaks_off_leaves_what_was_there_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"old")
    with pytest.raises(KeyError), replacing(path) as place:
        place.write_bytes(b"half")
        raise KeyError

    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("name", "why"), [("/", "Is a directory"), ("/nowhere/a", "No such file or directory")])
def test_a_place_for_no_file_is_a_mistake_of_the_user(name: str, why: str) -> None:
    with pytest.raises(ConfigError, match=f"^--output: {name}: {why}$"):
        write_whole(Path(name), b"")
