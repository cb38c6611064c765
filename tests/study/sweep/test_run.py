"""Sweeps: what is run, what is kept, and that neither order nor interruption changes anything."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import random
import signal
import statistics
import time
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import attrs
import pytest

import vtsim
from tests.study.sweep.conftest import BROKEN_SEED, Engine, Now
from vtsim.base.errors import ConfigError
from vtsim.platform.spec import Scenario
from vtsim.study.sweep import run as module
from vtsim.study.sweep import worker
from vtsim.study.sweep.design import load_design
from vtsim.study.sweep.executors import Cluster, Given
from vtsim.study.sweep.export import export
from vtsim.study.sweep.run import Progress, Sweep, estimate, sweep
from vtsim.study.sweep.store import Store
from vtsim.study.sweep.study import Study

Write = Callable[..., Path]
GRID = "axes:\n- {how: grid, path: machine.cpus, values: [1, 2, 3]}\n- {how: grid, path: seed, values: [1, 2, 3, 4]}\n"
SEED = "axes: [{how: grid, path: seed, values: [1, 2, 666, 4]}]\nmetrics: [slowdown]\n"


def test_a_study_runs_once_and_again_only_what_is_missing(engine: Engine, write: Write) -> None:
    path = write(GRID + "metrics: [slowdown, exits.CPUID.count]\n")
    study = sweep(path, executor=Now())

    table = study.table()
    assert [(row.axes["machine.cpus"], row.axes["seed"]) for row in table.rows] == [
        (cpus, seed) for cpus in (1, 2, 3) for seed in (1, 2, 3, 4)
    ]
    ran = {(scenario.machine.cpus, scenario.seed): engine.slowdown(scenario) for scenario in engine.ran}
    assert [row.metrics["slowdown"] for row in table.rows] == list(ran.values())
    assert len(engine.ran) == 12
    assert (table.question, table.failed, table.missing) == ("How much?", 0, 0)

    assert sweep(path, executor=Now()).digest() == study.digest()
    assert len(engine.ran) == 12

    path.write_text(path.read_text().replace("[1, 2, 3, 4]", "[4, 5]"))
    longer = sweep(path, executor=Now()).table()
    assert [scenario.seed for scenario in engine.ran[12:]] == [5, 5, 5]
    assert len(longer.rows) == 6


def test_order_number_of_jobs_and_resumption_change_nothing(engine: Engine, write: Write) -> None:
    text = GRID + "replicates: 3\nbaselines: [{name: one, set: {machine.cpus: 1}, metrics: [slowdown]}]\n"
    plain = sweep(write(text, "plain.yaml"), executor=Now())
    engine.before = lambda _: time.sleep(random.random() / 500)
    with ThreadPoolExecutor(4) as executor:
        scattered = sweep(write(text, "scattered.yaml"), executor=executor, jobs=4)

    looks: list[Progress] = []

    def stop(progress: Progress) -> bool:
        looks.append(progress)
        return progress.ran < 5

    resumed = write(text, "resumed.yaml")
    while sweep(resumed, executor=Now(), watch=stop).table().missing:
        assert Study(resumed).table().rows
    assert len(looks) > 6
    digests = {study.digest() for study in (plain, scattered, Study(resumed))}
    assert len(digests) == 1
    assert len(Study(resumed).table().rows) == 3 * 4 * 3


def test_the_digest_is_of_results_and_not_of_their_times(engine: Engine, write: Write) -> None:
    first = sweep(write(GRID, "a.yaml"), executor=Now()).digest()
    engine.slowdown = lambda _: 5.0

    assert sweep(write(GRID, "b.yaml"), executor=Now()).digest() != first


def test_a_point_that_fails_is_kept_with_its_error_and_retried_when_asked(engine: Engine, write: Write) -> None:
    path = write(SEED)
    study = sweep(path, executor=Now())

    assert study.table().failed == 1
    assert [row.axes["seed"] for row in study.table().rows] == [1, 2, 4]
    assert study.status().errors == (('{"seed": 666}', "model error: a law is broken: cycles=1"),)
    sweep(path, executor=Now())
    assert len(engine.ran) == 4
    sweep(path, executor=Now(), retry_failed=True)
    assert [scenario.seed for scenario in engine.ran[4:]] == [BROKEN_SEED]


def test_a_point_of_a_large_study_that_cannot_be_is_one_that_failed(
    engine: Engine, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vtsim.study.sweep.design.CHECKED_IN_ADVANCE", 1)
    study = sweep(write("axes: [{how: grid, path: machine.memory, values: [1 GiB, 32 MiB, 2 GiB]}]\n"), executor=Now())

    status = study.status()
    assert (status.done, status.failed, status.missing) == (2, 1, 0)
    assert "64 MiB is more than the 32 MiB of memory of the machine" in status.errors[0][1]


def test_replicates_differ_in_their_seed_alone(engine: Engine, write: Write) -> None:
    table = sweep(write("replicates: 3\n"), executor=Now()).table()

    assert [row.replicate for row in table.rows] == [0, 1, 2]
    assert len({scenario.seed for scenario in engine.ran}) == 3
    assert len({attrs.evolve(scenario, seed=0) for scenario in engine.ran}) == 1


def test_each_point_is_set_against_its_baseline_which_is_run_once(engine: Engine, write: Write) -> None:
    engine.slowdown = lambda scenario: scenario.machine.cpus * 10.0 + scenario.seed
    table = sweep(
        write(GRID + "metrics: [slowdown]\nbaselines: [{name: two, set: {machine.cpus: 2}, metrics: [slowdown]}]\n"),
        executor=Now(),
    ).table()

    assert len(engine.ran) == 12
    assert [row.metrics["slowdown against two"] for row in table.rows] == [
        (cpus * 10 + seed) / (20 + seed) for cpus in (1, 2, 3) for seed in (1, 2, 3, 4)
    ]
    assert [(column.label, column.unit) for column in table.metrics][1] == ("slowdown against two", "ratio")


def test_replicates_are_added_until_the_interval_is_tight(engine: Engine, write: Write) -> None:
    engine.slowdown = lambda scenario: 100 + random.Random(scenario.seed).gauss(0, scenario.machine.cpus)
    text = "axes: [{how: grid, path: machine.cpus, values: [1, 2, 3]}]\nuntil: {metric: slowdown, ci: 2 %, max: 8}\n"
    table = sweep(write(text), executor=Now()).table()

    t = {2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365}  # two-sided 95 %, by degrees of freedom
    for cpus in (1, 2, 3):
        values = [float(str(row.metrics["slowdown"])) for row in table.rows if row.axes["machine.cpus"] == cpus]
        widths = {n: t[n - 1] * statistics.stdev(values[:n]) / n**0.5 for n in range(3, len(values) + 1)}
        tight = [n for n in widths if widths[n] <= 0.02 * statistics.fmean(values[:n])]
        assert tight == [len(values)] or (not tight and len(values) == 8)
    assert len(table.rows) > 9
    ran = len(engine.ran)
    assert sweep(write(text), executor=Now()).table() == table
    assert len(engine.ran) == ran


def test_no_replicates_are_added_for_a_figure_that_a_run_does_not_have(engine: Engine, write: Write) -> None:
    sweep(write("until: {metric: exits.NONE.count}\n"), executor=Now())
    assert len(engine.ran) == 3


def test_a_worker_of_another_version_is_refused(engine: Engine, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "model_version", lambda: "0.0.9+abc")
    with pytest.raises(
        ConfigError,
        match=r"a worker runs vtsim 0\.0\.9\+abc, and this is 0\.1\.0\+\w{12}\n help: install the same version everywhere",
    ):
        sweep(write(SEED), executor=Now())
    assert engine.ran == []


def test_a_result_of_another_version_is_not_that_of_this_one(
    engine: Engine, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write("")
    sweep(path, executor=Now())
    monkeypatch.setattr(worker, "model_version", lambda: "another")
    with Store(path.with_suffix(".sqlite")) as store:
        Sweep(load_design(path), store, Given(Now()), version="another").run()

    assert len(engine.ran) == 2
    assert Study(path).status().version == "another"


class Pool(Executor):
    """Dies of seed 3 with all that is being run, and is then of no use; in the first one seed 2 takes its time."""

    def __init__(self, *, first: bool) -> None:
        self.first, self.dead = first, False
        self.held: list[Future[Any]] = []

    def submit(self, function: Any, /, *arguments: Any, **keywords: Any) -> Future[Any]:
        if self.dead:
            raise BrokenExecutor
        future: Future[Any] = Future()
        seed = arguments[0].scenario.seed
        if seed == 3:
            self.dead = True
            for each in (*self.held, future):
                each.set_exception(BrokenExecutor())
        elif seed == 2 and self.first:
            self.held.append(future)
        else:
            future.set_result(function(*arguments, **keywords))
        return future


class Pools(Given):
    """Workers that are replaced once they are dead."""

    opened = 0

    def open(self) -> Executor:
        self.opened += 1
        return Pool(first=self.opened == 1)


def test_a_point_that_kills_its_worker_fails_and_its_neighbours_do_not(engine: Engine, write: Write) -> None:
    path = write("axes: [{how: grid, path: seed, values: [1, 2, 3, 4, 5]}]\n")
    with Store(path.with_suffix(".sqlite")) as store:
        Sweep(load_design(path), store, Pools(Now())).run()

    assert [scenario.seed for scenario in engine.ran] == [1, 2, 4, 5]
    assert Study(path).status().errors == (('{"seed": 3}', module.DIED),)


def test_workers_that_never_start_end_the_sweep(engine: Engine, write: Write) -> None:
    class Dead(Now):
        def submit(self, function: Any, /, *arguments: Any, **keywords: Any) -> Future[Any]:
            future: Future[Any] = Future()
            future.set_exception(BrokenExecutor())
            return future

    with pytest.raises(ConfigError, match="worker processes end before they have done anything"):
        sweep(write(GRID), executor=Dead())


def test_a_worker_without_vtsim_ends_the_sweep(engine: Engine, write: Write) -> None:
    class Strange(Now):
        def submit(self, function: Any, /, *arguments: Any, **keywords: Any) -> Future[Any]:
            future: Future[Any] = Future()
            future.set_exception(ModuleNotFoundError("No module named 'vtsim'"))
            return future

    with pytest.raises(ConfigError, match="a worker cannot run it: ModuleNotFoundError"):
        sweep(write(GRID), executor=Strange())


def test_one_sweep_writes_to_a_store_at_a_time(engine: Engine, write: Write) -> None:
    path = write(SEED)
    with Store(path.with_suffix(".sqlite")), pytest.raises(ConfigError, match="another sweep is writing to it"):
        sweep(path, executor=Now())
    sweep(path, executor=Now())


def test_an_estimate_runs_one_point_and_no_more(engine: Engine, write: Write) -> None:
    engine.before = lambda _: time.sleep(0.05)
    path = write(GRID + "replicates: 2\n")
    with Store(path.with_suffix(".sqlite")) as store:
        found = estimate(load_design(path), store, Given(Now(), 4))
        again = estimate(load_design(path), store, Given(Now(), 4))

    assert len(engine.ran) == 1
    assert (found.points, found.runs, found.missing) == (12, 24, 23)
    assert found.seconds == pytest.approx(23 * found.run_s / 4)
    assert found.run_s >= 0.05
    assert found.mib == pytest.approx(4 * found.run_mib)
    assert again == found


def test_a_scheduler_needs_distributed(write: Write) -> None:
    try:
        import distributed  # noqa: F401
    except ImportError:
        with pytest.raises(
            ConfigError,
            match=r"a scheduler needs distributed, which is not installed\n help: pip install 'vtsim\[cluster\]'",
        ):
            sweep(write(SEED), scheduler="tcp://127.0.0.1:1")
    else:
        with pytest.raises(ConfigError, match="there is no Dask scheduler at"):
            Cluster("tcp://127.0.0.1:1")


def slowly(scenario: Scenario) -> None:
    time.sleep(0.01)


def _sweep_slowly(path: Path, engine: Engine) -> None:
    engine.before = slowly
    sweep(path, executor=Now())


def test_a_sweep_that_is_killed_again_and_again_ends_like_one_that_is_not(engine: Engine, write: Write) -> None:
    text = GRID + "replicates: 5\nuntil: {metric: slowdown, ci: 10 %, max: 7}\n"
    whole = sweep(write(text, "whole.yaml"), executor=Now())
    path, moments, rows = write(text), random.Random(1), [0]
    context = multiprocessing.get_context("fork")
    for _ in range(8):
        process = context.Process(target=_sweep_slowly, args=(path, engine))
        process.start()
        time.sleep(moments.random() / 2)
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        if path.with_suffix(".sqlite").is_file() and process.exitcode == -signal.SIGKILL:
            try:
                rows.append(len(Study(path).table().rows))
            except ConfigError as error:
                assert "no study was swept into it" in str(error)  # killed before it had said which
    assert rows == sorted(rows)
    assert rows[-1] > 0
    assert sum(count < len(whole.table().rows) for count in rows) > 2
    assert sweep(path, executor=Now()).digest() == whole.digest()


def test_sweep_is_a_public_name(engine: Engine, write: Write) -> None:
    study = vtsim.sweep(write(SEED + "labels: {slowdown: <slow>}\n"), executor=Now())

    assert isinstance(study, vtsim.Study)
    shown = study._repr_html_()
    assert "<b>How much?</b>" in shown
    assert "<th>seed</th><th>replicate</th><th>&lt;slow&gt;</th>" in shown
    assert shown.count("<tr>") == 4
    assert "1 runs failed" in shown


def test_columns_of_the_default_metrics_are_those_that_some_run_has(engine: Engine, write: Write) -> None:
    engine.result = attrs.evolve(engine.result, slowdown=None)
    engine.slowdown = lambda _: None  # type: ignore[assignment,return-value]
    study = sweep(write(""), executor=Now())

    assert "slowdown" not in [column.path for column in study.table().metrics]
    assert "cycles.elapsed" in study.table().rows[0].metrics
    assert [column.path for column in study.table(["exits.CPUID.count"]).metrics] == ["exits.CPUID.count"]
    with pytest.raises(ConfigError, match="is no figure of a result"):
        study.table(["exits.CPUID.counts"])


def test_results_are_those_of_the_runs(engine: Engine, write: Write) -> None:
    ((_, found),) = sweep(write(""), executor=Now()).results()
    assert vtsim.Result.from_dict(found).slowdown == engine.slowdown(engine.ran[0])


def test_a_table_becomes_a_frame_a_dataset_and_files(engine: Engine, write: Write, tmp_path: Path) -> None:
    study = sweep(write(GRID + "metrics: [slowdown]\n"), executor=Now())
    if importlib.util.find_spec("pandas") is None:
        with pytest.raises(
            ConfigError,
            match=r"a data frame needs pandas, which is not installed\n help: pip install 'vtsim\[tables\]'",
        ):
            study.to_pandas()
        return
    pytest.importorskip("xarray")
    frame, found = study.to_pandas(), study.to_xarray()
    assert list(frame["seed"]) == [row.axes["seed"] for row in study.table().rows]
    assert found["slowdown"].shape == (3, 4, 1)
    assert float(found["slowdown"].sel({"machine.cpus": 2, "seed": 3, "replicate": 0})) == frame["slowdown"][6]
    for form in ("parquet", "netcdf"):
        assert export(study, form, tmp_path / form).stat().st_size > 0


@pytest.mark.filterwarnings("ignore")  # of the cluster's own
def test_a_cluster_gives_the_same_results(engine: Engine, write: Write) -> None:
    distributed = pytest.importorskip("distributed")
    here = sweep(write(SEED, "here.yaml"), executor=Now())
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None
    ) as cluster:
        there = sweep(write(SEED, "there.yaml"), scheduler=cluster.scheduler_address)

    assert there.digest() == here.digest()
    assert len(engine.ran) == 8
