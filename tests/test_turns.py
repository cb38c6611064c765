"""Processes of several checkouts that run in turn."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from benchmarks.turns import in_turn, stopped

WORKER = "import time; print('ready', flush=True); input(); begun = time.process_time()\n"
BUSY = WORKER + "while time.process_time() - begun < {seconds}: pass\nprint({figure})"


def command(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_each_process_runs_to_its_end_whatever_the_others_do(tmp_path: Path) -> None:
    figures = {1.5: 0.3, 2.5: 0.0, 3.5: 0.1}
    with ExitStack() as ready:
        processes = [
            ready.enter_context(stopped(command(BUSY.format(seconds=s, figure=f)), tmp_path))
            for f, s in figures.items()
        ]
        assert in_turn(processes) == list(figures)
    assert [process.returncode for process in processes] == [0, 0, 0]


def test_a_process_that_is_ready_waits_for_its_turn(tmp_path: Path) -> None:
    with stopped(command(BUSY.format(seconds=0, figure=1)), tmp_path) as process:
        state = os.waitid(os.P_PID, process.pid, os.WSTOPPED)

        assert state is not None and state.si_status == signal.SIGSTOP
        assert in_turn([process]) == [1.0]


def test_a_process_that_still_runs_is_ended_with_the_run(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), stopped(command(BUSY.format(seconds=60, figure=1)), tmp_path) as process:
        raise KeyboardInterrupt
    assert process.returncode == -signal.SIGKILL


def test_a_checkout_without_the_benchmark_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(SystemExit, match=f"the benchmark did not start in {tmp_path}"),
        stopped(command("print()"), tmp_path),
    ):
        raise AssertionError
