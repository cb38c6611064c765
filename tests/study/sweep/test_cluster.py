"""A study on a real Dask cluster: a scheduler and workers that are processes of their own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.study.sweep.conftest import Now
from vtsim.base.errors import ConfigError
from vtsim.study.sweep.identity import PACKAGE, model_version
from vtsim.study.sweep.run import Progress, sweep
from vtsim.study.sweep.study import Study

pytest.importorskip("distributed", reason="the extra cluster is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # of the cluster's own

Write = Callable[..., Path]
SEEDS = "axes: [{how: grid, path: seed, values: [1, 2, 3, 4, 5, 6]}]\nset: {run.baseline: false}\n"
QUIET = {**os.environ, "DASK_DISTRIBUTED__WORKER__DAEMON": "False"}


class Processes:
    """A scheduler, and workers that a test starts and ends."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.running = folder, list[subprocess.Popen[str]]()
        arguments = ["--host", "127.0.0.1", "--port", "0", "--no-dashboard"]
        self.scheduler = self._start(["scheduler", *arguments], PACKAGE.parent)
        self.address = self._told(self.scheduler, r"Scheduler at: +(tcp://\S+)")

    def worker(self, sources: Path = PACKAGE.parent) -> subprocess.Popen[str]:
        """Start one that has vtsim from a folder; it is ready once it is returned."""
        arguments = f"{self.address} --nthreads 1 --no-nanny --no-dashboard --local-directory {self.folder}".split()
        found = self._start(["worker", *arguments], sources)
        self._told(found, "Registered to: +(tcp://)")
        return found

    def _start(self, command: list[str], sources: Path) -> subprocess.Popen[str]:
        found = subprocess.Popen(
            [sys.executable, "-m", "dask", *command], cwd=self.folder, env={**QUIET, "PYTHONPATH": str(sources)},
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.running.append(found)
        return found

    @staticmethod
    def _told(process: subprocess.Popen[str], pattern: str) -> str:
        assert process.stderr is not None
        for line in process.stderr:
            if match := re.search(pattern, line):
                return match[1]
        raise AssertionError("it ended before it was ready")

    def close(self) -> None:
        """End all that were started."""
        for each in reversed(self.running):
            each.kill()
            each.wait()
            assert each.stderr is not None
            each.stderr.close()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Processes]:
    (tmp_path / "cluster").mkdir()
    found = Processes(tmp_path / "cluster")
    yield found
    found.close()


def test_results_are_those_of_local_runs_though_a_worker_is_killed_in_the_middle(
    cluster: Processes, write: Write
) -> None:
    here = sweep(write(SEEDS, "here.yaml"), executor=Now())
    victim, _ = cluster.worker(), cluster.worker()

    def kill(progress: Progress) -> bool:
        if progress.ran:
            victim.kill()
        return True

    there = sweep(write(SEEDS, "there.yaml"), scheduler=cluster.address, watch=kill)

    assert victim.wait() < 0
    assert there.status().done == 6
    assert there.digest() == here.digest()


def test_a_cluster_without_workers_and_workers_of_another_version_are_refused(
    cluster: Processes, write: Write, tmp_path: Path
) -> None:
    path = write(SEEDS)
    with pytest.raises(ConfigError, match="the cluster has no workers\n help: start some with dask-worker"):
        sweep(path, scheduler=cluster.address)

    other = tmp_path / "other"
    shutil.copytree(PACKAGE, other / "vtsim", ignore=shutil.ignore_patterns("__pycache__"))
    with (other / "vtsim" / "platform" / "machine.py").open("a") as file:
        file.write("# another model\n")
    cluster.worker(other)
    with pytest.raises(ConfigError, match=r"a worker runs vtsim 0\S+, and this is ") as refused:
        sweep(path, scheduler=cluster.address)

    assert model_version() in str(refused.value)
    assert Study(path).status().done == 0


def test_a_scheduler_that_goes_away_ends_the_sweep_and_it_goes_on_later(cluster: Processes, write: Write) -> None:
    path = write(SEEDS)
    cluster.worker()

    def kill(progress: Progress) -> bool:
        if progress.ran:
            cluster.scheduler.kill()
        return True

    with pytest.raises(ConfigError, match="the cluster is gone"):
        sweep(path, scheduler=cluster.address, watch=kill)

    done = Study(path).status().done
    assert 1 <= done < 6
    assert sweep(path, executor=Now()).status().done == 6
