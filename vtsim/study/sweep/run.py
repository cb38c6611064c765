"""Runs what is missing of a study and stores it: in any order, anywhere, and broken off at any time."""

from __future__ import annotations

import hashlib
import json
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, Executor, Future
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Final

import attrs
from attrs import define, field, frozen

from vtsim.base import jit
from vtsim.base.errors import ConfigError
from vtsim.cpu.kernels.run import run_all
from vtsim.platform.spec import Scenario
from vtsim.study.sweep.design import Design, Point, load_design, metric_columns
from vtsim.study.sweep.executors import Cluster, Given, Local, Workers, cpus
from vtsim.study.sweep.identity import identity, model_version, replicate, resolved_text
from vtsim.study.sweep.intervals import is_tight
from vtsim.study.sweep.metrics import figure
from vtsim.study.sweep.store import Store
from vtsim.study.sweep.study import Study, store_of
from vtsim.study.sweep.worker import DIED, Outcome, Task, work

LOOK_S: Final = 0.2  # between two looks at the world while nothing ends
AHEAD: Final = 2  # tasks that wait or run, for each that can run: no worker waits for the next
LEAST_FOR_AN_INTERVAL: Final = 3  # replicates; two that happen to agree say little
MOST_DEATHS: Final = 3  # workers that end one after another with no result in between
NEVER_START: Final = "worker processes end before they have done anything"
SAME_EVERYWHERE: Final = (
    "install the same version everywhere; if sources were edited meanwhile, start the sweep again, and it goes on"
)
DASKS_NAME_FOR_IT: Final = "KilledWorker"


@frozen(kw_only=True)
class Progress:
    """How far a sweep is, in runs; `done` has those that were there already and those that failed."""

    done: int
    total: int
    ran: int
    failed: int
    seconds: float


Watch = Callable[[Progress], bool]  # returns False for a wish to stop


@define(eq=False)
class Open:
    """A point some of whose runs are not done."""

    point: Point
    scenarios: dict[str, Scenario]  # {baseline: its scenario}, the point's own under the empty name
    identities: list[str] = field(factory=list)  # of the replicates of the point itself
    waiting: int = 0
    failed: bool = False


@define(eq=False)
class Sweep:
    """One pass over a study. `most` ends it after so many runs."""

    design: Design
    store: Store
    workers: Workers
    watch: Watch = field(default=lambda _: True)
    retry_failed: bool = False
    most: int | None = None
    version: str = field(factory=model_version)
    queue: deque[Task] = field(factory=deque, init=False)
    suspects: deque[Task] = field(factory=deque, init=False)  # were being run when a worker died
    alone: str = field(default="", init=False)  # the identity of the suspect that is run by itself
    deaths: int = field(default=0, init=False)
    interested: dict[str, list[Open]] = field(factory=dict, init=False)
    running: dict[Future[Outcome], Task] = field(factory=dict, init=False)
    ended: SimpleQueue[Future[Outcome]] = field(factory=SimpleQueue, init=False)
    cold: bool = field(default=False, init=False)  # kernels are to be compiled: by one worker, for all
    broken: bool = field(default=True, init=False)
    stopping: bool = field(default=False, init=False)
    progress: Progress = field(init=False)
    executor: Executor | None = field(default=None, init=False)

    def run(self) -> bool:
        """Do it; False when it was asked to stop before the end. `ConfigError` says what is wrong with the workers."""
        began = time.monotonic()
        spec = self.design.spec
        runs = self.design.count() * self._replicates * (1 + len(spec.baselines))
        self.progress = Progress(done=0, total=runs, ran=0, failed=0, seconds=0.0)
        self.cold = not jit.kernels_are_cached(run_all)
        points = self.design.points()
        self.store.begin(about(self.design, self.version))
        try:
            while True:
                self._submit(points)
                if not self.running and (self.stopping or not (self.broken and self.suspects)):
                    break
                self._collect()
                self.progress = attrs.evolve(self.progress, seconds=time.monotonic() - began)
                if not self.watch(self.progress) and not self.stopping:
                    self._stop()
        except BaseException:
            self.workers.drop()
            raise
        finally:
            self.workers.close()
        return not self.stopping

    @property
    def _replicates(self) -> int:
        spec = self.design.spec
        return max(spec.replicates, LEAST_FOR_AN_INTERVAL) if spec.until.metric else spec.replicates

    def _stop(self) -> None:
        """Start nothing more; what is being run is waited for."""
        self.stopping = True
        for future in list(self.running):
            future.cancel()

    def _submit(self, points: Iterator[Point]) -> None:
        """Keep the workers busy."""
        fresh = self.broken and not self.running and not self.stopping
        if fresh:
            self.executor, self.broken = self.workers.open(), False
        while not self.broken and not self.stopping and len(self.running) < self._window:
            if self.most is not None and self.progress.ran + len(self.running) >= self.most:
                return
            suspect = bool(self.suspects)
            task = self.suspects.popleft() if suspect else self._next(points)
            if task is None or self.executor is None:
                return
            try:
                future = self.executor.submit(work, task)
            except BrokenExecutor:
                if fresh and not self.running:
                    raise ConfigError(NEVER_START, help=DIED) from None
                self.suspects.append(task)
                self.broken = True
                return
            self.alone = task.identity if suspect else ""
            self.running[future] = task
            future.add_done_callback(self.ended.put)

    @property
    def _window(self) -> int:
        return 1 if self.cold or self.suspects or self.alone else AHEAD * self.workers.jobs

    def _next(self, points: Iterator[Point]) -> Task | None:
        while not self.queue:
            point = next(points, None)
            if point is None:
                return None
            self._open(point)
        return self.queue.popleft()

    def _open(self, point: Point) -> None:
        """Ask for the runs of a point that are not there."""
        spec = self.design.spec
        if self.store.is_finished(point.number):
            self._count(self._replicates * (1 + len(spec.baselines)))
            return
        try:
            names = ("", *(each.name for each in spec.baselines))
            opened = Open(point, {name: self.design.scenario(point, name) for name in names})
        except ConfigError as error:
            self._refuse(point, error)
            return
        self._ask(opened, self._replicates)
        self._go_on(opened)

    def _refuse(self, point: Point, error: ConfigError) -> None:
        """A point that cannot be is one that failed."""
        axes = json.dumps(dict(point.values))
        name = hashlib.sha256(f"{self.version}\0{axes}\0{error}".encode()).hexdigest()[:32]
        self.store.plan(point.number, 0, "", name, axes)
        self.store.put(name, "{}", self.version, result=None, error=str(error), wall_s=0.0)
        self._count(self._replicates * (1 + len(self.design.spec.baselines)), failed=1)

    def _ask(self, opened: Open, replicates: int) -> None:
        axes = json.dumps(dict(opened.point.values))
        for number in range(len(opened.identities), replicates):
            for name, scenario in opened.scenarios.items():
                chosen = replicate(scenario, number, self.version)
                known = identity(chosen, self.version)
                self.store.plan(opened.point.number, number, name, known, axes)
                if not name:
                    opened.identities.append(known)
                if known in self.interested:
                    self.interested[known].append(opened)
                    opened.waiting += 1
                elif self.store.missing([known], retry_failed=self.retry_failed):
                    self.interested[known] = [opened]
                    opened.waiting += 1
                    self.queue.append(Task(identity=known, version=self.version, scenario=chosen))
                else:
                    opened.failed = opened.failed or self.store.failed(known)
                    self._count()

    def _go_on(self, opened: Open) -> None:
        """Once nothing of a point is being run: is it finished, or does it need another replicate?"""
        until = self.design.spec.until
        while not opened.waiting and not opened.failed:
            count = len(opened.identities)
            if not until.metric or count >= until.max or self._is_known_well(opened):
                self.store.finish(opened.point.number)
                return
            self.progress = attrs.evolve(self.progress, total=self.progress.total + len(opened.scenarios))
            self._ask(opened, count + 1)

    def _is_known_well(self, opened: Open) -> bool:
        """Is the interval tight? So it is where a run has no such figure: more of them would not help."""
        until = self.design.spec.until
        values = []
        for each in opened.identities:
            result, _ = self.store.get(each)
            value = figure(json.loads(result or "null"), until.metric)
            if isinstance(value, bool) or not isinstance(value, int | float):
                return True
            values.append(float(value))
        return is_tight(values, until.confidence, until.ci)

    def _collect(self) -> None:
        """Store what has ended."""
        try:
            ended = [self.ended.get(timeout=LOOK_S)]
            while not self.ended.empty():
                ended.append(self.ended.get_nowait())
        except Empty:
            self.workers.check()
            return
        for future in ended:
            task = self.running.pop(future)
            if future.cancelled():
                self.workers.check()
                continue
            mishap = future.exception()
            if mishap is None:
                self._take(task, future.result())
                self.deaths = 0
            elif isinstance(mishap, BrokenExecutor):
                self._mourn(task)
            elif type(mishap).__name__ == DASKS_NAME_FOR_IT:
                self._take(task, Outcome(identity=task.identity, version=self.version, error=DIED))
            else:
                raise ConfigError(f"a worker cannot run it: {mishap!r}", help=SAME_EVERYWHERE)
            self.alone = "" if self.alone == task.identity else self.alone

    def _mourn(self, task: Task) -> None:
        """A worker died, and all that were at work went with it: each is tried again, by itself."""
        self.broken = True
        if self.alone != task.identity:
            self.suspects.append(task)
            return
        self.deaths += 1
        if self.deaths == MOST_DEATHS:
            raise ConfigError(NEVER_START, help=DIED)
        self._take(task, Outcome(identity=task.identity, version=self.version, error=DIED))

    def _take(self, task: Task, outcome: Outcome) -> None:
        if outcome.version != self.version:
            raise ConfigError(
                f"a worker runs vtsim {outcome.version}, and this is {self.version}",
                help=SAME_EVERYWHERE,
            )
        self.cold = False
        self.store.put(
            task.identity,
            outcome.scenario or resolved_text(task.scenario),
            self.version,
            result=outcome.result,
            error=outcome.error,
            wall_s=outcome.wall_s,
            peak_mib=outcome.peak_mib,
        )
        failed = int(outcome.error is not None)
        self._count(0, ran=1, failed=failed)
        for opened in self.interested.pop(task.identity):
            opened.waiting -= 1
            opened.failed = opened.failed or bool(failed)
            self._count()
            self._go_on(opened)

    def _count(self, done: int = 1, *, ran: int = 0, failed: int = 0) -> None:
        now = self.progress
        self.progress = attrs.evolve(now, done=now.done + done, ran=now.ran + ran, failed=now.failed + failed)


def about(design: Design, version: str) -> dict[str, Any]:
    """Return what a store says of its study: whatever makes it another study is in it."""
    spec = design.spec
    return {
        "name": spec.name or design.file.path.stem,
        "question": spec.question,
        "version": version,
        "source": design.file.digest,
        "files": design.files,
        "points": design.count(),
        "replicates": spec.replicates,
        "grid": design.is_grid,
        "axes": [attrs.asdict(column) for column in design.axes],
        "metrics": [attrs.asdict(column) for column in metric_columns(spec)],
        "chosen": bool(spec.metrics),
        "baselines": {each.name: list(each.metrics) for each in spec.baselines},
    }


def sweep(
    study: str | Path,
    *,
    jobs: int = 0,
    scheduler: str = "",
    executor: Executor | None = None,
    store: str | Path = "",
    retry_failed: bool = False,
    watch: Watch = lambda _: True,
) -> Study:
    """Run what is missing of a study, and return it.

    Parameters
    ----------
    study: the path of a study file.
    jobs: runs at a time; as many as this process may use CPUs if 0.
    scheduler: the address of a Dask scheduler that runs them instead of local processes.
    executor: an executor that runs them instead.
    store: the SQLite file of results; beside the study if not given.
    retry_failed: run those again that failed.
    watch: is told from time to time how far it is; may ask to stop, which loses nothing.

    A script that calls it with local processes needs `if __name__ == "__main__":`, as all of Python's own processes do.
    Raises `ConfigError` for a mistake in the study. A run that fails is stored with its error.
    """
    design = load_design(study)
    workers: Workers = Local(jobs or cpus())
    if scheduler:
        workers = Cluster(scheduler)
    elif executor is not None:
        workers = Given(executor, jobs or 1)
    path = Path(store) if store else store_of(Path(study))
    with Store(path) as held:
        Sweep(design, held, workers, watch=watch, retry_failed=retry_failed).run()
    return Study(path)


@frozen(kw_only=True)
class Estimate:
    """What a sweep would take."""

    points: int
    runs: int  # at least, all together
    missing: int  # of them, at least
    run_s: float  # seconds of one, mean of those that were run
    seconds: float  # of all that is missing
    run_mib: float  # of the largest process so far
    mib: float  # of all that run at a time
    jobs: int


def estimate(design: Design, store: Store, workers: Workers) -> Estimate:
    """Say what is missing and what it takes; where nothing was run yet, one point is run, and stored."""
    store.begin(about(design, model_version()))
    if not store.timings()[0]:
        Sweep(design, store, workers, most=1).run()
    spec = design.spec
    each = spec.replicates * (1 + len(spec.baselines))
    _, run_s, run_mib = store.timings()
    runs = design.count() * each
    missing = max(0, runs - store.done())
    return Estimate(
        points=design.count(),
        runs=runs,
        missing=missing,
        run_s=run_s,
        seconds=missing * run_s / workers.jobs,
        run_mib=run_mib,
        mib=run_mib * min(workers.jobs, max(missing, 1)),
        jobs=workers.jobs,
    )
