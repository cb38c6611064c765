"""A real sweep in processes of its own: killed, its workers end with it; run again, it ends as if never killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import BrokenExecutor
from pathlib import Path

import pytest

from tests.study.sweep.conftest import Now
from vtsim.base.errors import ConfigError
from vtsim.study.sweep import store
from vtsim.study.sweep.executors import Local
from vtsim.study.sweep.run import sweep
from vtsim.study.sweep.study import Study, store_of

ROOT = Path(__file__).parents[3]
PATIENCE_S = 120.0
POINTS = "axes: [{how: grid, path: seed, values: [1, 2, 3, 4, 5, 6, 7, 8]}]\n"


def until(happened: Callable[[], bool]) -> None:
    """Wait; on a busy machine, for long."""
    end = time.monotonic() + PATIENCE_S
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (OSError, IndexError):
        return False


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_killed_sweep_takes_its_workers_along_and_goes_on_where_it_was(write: Callable[..., Path]) -> None:
    path = write(POINTS)
    command = [sys.executable, "-m", "vtsim", "sweep", str(path), "--jobs", "2"]
    running = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    until(lambda: store_of(path).is_file() and _done(path) > 0)
    children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
    running.kill()
    assert running.wait() == -signal.SIGKILL
    assert len(children) >= 2
    until(lambda: not any(is_alive(int(pid)) for pid in children))
    at_the_kill = _done(path)

    assert 0 < at_the_kill < 8
    resumed = sweep(path, executor=Now())
    whole = sweep(write(POINTS, "whole.yaml"), executor=Now())
    assert resumed.digest() == whole.digest()
    assert resumed.status().done == 8
    assert not os.path.exists(f"{store_of(path)}-lock")


def test_workers_ignore_ctrl_c_and_can_be_dropped() -> None:
    workers = Local(1)
    waiting = workers.open().submit(time.sleep, 3600)
    until(lambda: bool(workers.started and workers.started._processes))
    (pid,) = workers.started._processes if workers.started else ()
    os.kill(pid, signal.SIGINT)
    until(waiting.running)
    assert is_alive(pid)

    workers.drop()
    workers.close()
    until(lambda: not is_alive(pid))
    assert isinstance(waiting.exception(timeout=PATIENCE_S), BrokenExecutor)


def _done(path: Path) -> int:
    try:
        return Study(path).status().done
    except ConfigError:  # not yet
        return 0


def test_a_lock_whose_file_was_removed_is_taken_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Between the opening and the locking of the file its last holder removes it, as it does when it ends."""
    path, lock_of, removed = tmp_path / "x.sqlite", store.fcntl.flock, []

    def late(lock: int, how: int) -> None:
        if not removed:
            removed.append(lock)
            (tmp_path / "x.sqlite-lock").unlink()
        lock_of(lock, how)

    monkeypatch.setattr(store.fcntl, "flock", late)
    first = store.Store(path)
    with pytest.raises(ConfigError, match="another sweep is writing to it"):
        store.Store(path)
    first.close()

    assert len(removed) == 1
