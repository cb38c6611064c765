"""Where the runs of a sweep are done: processes of this machine, a Dask cluster, or an executor of the caller's."""

from __future__ import annotations

import multiprocessing
import os
import signal
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from typing import Any, Final, Protocol

from attrs import define, field

from vtsim.base.errors import ConfigError
from vtsim.study.extras import needed
from vtsim.study.sweep.worker import start

CONNECTED: Final = "running"  # what a Dask client is while it has a scheduler
LONGEST_GOODBYE_S: Final = 5
ADDRESS: Final = "write the address that dask-scheduler prints, as in tcp://host:8786"


class Workers(Protocol):
    """Who does runs."""

    jobs: int  # that are done at a time

    def open(self) -> Executor:
        """Return an executor; another one after the first has broken."""

    def check(self) -> None:
        """Raise `ConfigError` where what is being run will never end."""

    def drop(self) -> None:
        """End at once whatever is still being run."""

    def close(self) -> None:
        """Let the workers go once nothing is being run."""


def cpus() -> int:
    """How many logical CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Processes(ProcessPoolExecutor):
    """Processes that see no Ctrl-C, not even while they start: a terminal sends it to all, and it is the parent's."""

    def submit(self, function: Any, /, *arguments: Any, **keywords: Any) -> Future[Any]:
        """As the base class, which starts a process where it needs one: it inherits what is blocked."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return super().submit(function, *arguments, **keywords)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


@define
class Local:
    """Processes of this machine, started afresh (spawn) and ended with this one."""

    jobs: int
    started: Processes | None = None

    def open(self) -> Executor:
        self.started = Processes(
            self.jobs, mp_context=multiprocessing.get_context("spawn"), initializer=start, initargs=(os.getpid(),)
        )
        return self.started

    def check(self) -> None:
        """A process that ends breaks the executor, which says so itself."""

    def drop(self) -> None:
        processes = getattr(self.started, "_processes", None) or {}
        for process in list(processes.values()):
            process.kill()

    def close(self) -> None:
        if self.started is not None:
            self.started.shutdown(wait=True, cancel_futures=True)


@define
class Cluster:
    """Workers of a Dask cluster, which have vtsim installed and see the files of the study at the same paths."""

    address: str
    jobs: int = 0
    client: Any = field(default=None)

    def __attrs_post_init__(self) -> None:
        if not self.address:  # which Dask takes for a wish to start a cluster here
            raise ConfigError("the address of a Dask scheduler is needed", field="--scheduler", help=ADDRESS)
        distributed = needed("distributed", "cluster", "a scheduler")
        try:
            self.client = distributed.Client(self.address, timeout="10s")
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(
                f"there is no Dask scheduler at {self.address!r}: {error}",
                field="--scheduler",
                help=ADDRESS,
            ) from None
        self.jobs = sum(self.client.nthreads().values())
        if not self.jobs:
            self.client.close()
            raise ConfigError("the cluster has no workers", field="--scheduler", help="start some with dask-worker")

    def open(self) -> Executor:
        executor: Executor = self.client.get_executor(pure=False)
        return executor

    def check(self) -> None:
        """A client without its scheduler waits for another one, which knows nothing of what was asked."""
        if self.client.status != CONNECTED:
            raise ConfigError(
                f"the cluster is gone: nobody answers at {self.address}",
                field="--scheduler",
                help="what was run is kept; start the sweep again once there is a scheduler",
            )

    def drop(self) -> None:
        self.client.close(timeout=LONGEST_GOODBYE_S)

    def close(self) -> None:
        self.client.close(timeout=LONGEST_GOODBYE_S)


@define
class Given:
    """An executor that the caller has, and keeps."""

    executor: Executor
    jobs: int = 1

    def open(self) -> Executor:
        return self.executor

    def check(self) -> None:
        """Whoever has it looks after it."""

    def drop(self) -> None:
        """Nothing here is ours to end."""

    def close(self) -> None:
        """Nor to close."""
