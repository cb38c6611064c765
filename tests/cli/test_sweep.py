"""`vtsim sweep` and `vtsim study` on the command line."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import attrs
import pytest

from tests.cli.conftest import Outcome
from vtsim.base import jit
from vtsim.base.errors import ModelError
from vtsim.cli import sweep_run
from vtsim.platform.spec import Scenario
from vtsim.study.result import Result
from vtsim.study.sweep import worker
from vtsim.study.sweep.executors import Given

GOLDEN = Path(__file__).parents[1] / "golden" / "result.json"
STUDY = """question: Does the seed matter?
set: {vms: [{guest: {processes: [{phases: [{primitive: cpuid}]}]}}]}
axes: [{how: grid, path: seed, values: [1, 2, 3]}]
metrics: [slowdown]
"""

Vtsim = Callable[..., Outcome]


class Now(Executor):
    def submit(self, function: Any, /, *arguments: Any, **keywords: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(function(*arguments, **keywords))
        return future


@attrs.define
class Engine:
    ran: list[int] = attrs.field(factory=list)
    before: Callable[[], object] = lambda: None
    broken: int = 0

    def run(self, scenario: Scenario, native: object = None) -> Result:
        self.ran.append(scenario.seed)
        self.before()
        if scenario.seed == self.broken:
            raise ModelError("a law is broken")
        return attrs.evolve(Result.from_dict(json.loads(GOLDEN.read_text())), slowdown=scenario.seed / 2)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Engine:
    fake = Engine()
    monkeypatch.setattr(worker, "run", fake.run)
    monkeypatch.setattr(jit, "kernels_are_cached", lambda *_: True)
    monkeypatch.setattr(sweep_run, "Local", lambda jobs: Given(Now(), 1))
    return fake


@pytest.fixture
def study(tmp_path: Path) -> str:
    path = tmp_path / "study.yaml"
    path.write_text(STUDY)
    return str(path)


def test_a_sweep_prints_question_table_and_count(vtsim: Vtsim, runs: Engine, study: str) -> None:
    outcome = vtsim("sweep", study)

    assert (outcome.status, outcome.err) == (0, "")
    assert [line.split() for line in outcome.out.splitlines()[:-1]] == [
        ["Does", "the", "seed", "matter?"], ["seed", "slowdown"], ["1", "0.5"], ["2", "1"], ["3", "1.5"],
    ]  # fmt: skip
    assert outcome.out.splitlines()[-1] == f"3 of 3 runs done; results in {study[:-5]}.sqlite"
    assert vtsim("sweep", study).out == outcome.out
    assert runs.ran == [1, 2, 3]


def test_where_replicates_end_before_the_interval_is_tight_it_is_said(vtsim: Vtsim, runs: Engine, study: str) -> None:
    """Slowdowns of seeds far apart; the point's own seed is the first, and until.max of them are three."""
    Path(study).write_text(STUDY.replace("[1, 2, 3]", "[1]") + "until: {metric: slowdown, ci: 1 %, max: 3}\n")
    outcome = vtsim("sweep", study)
    a, b, c = (seed / 2 for seed in runs.ran)
    mean = (a + b + c) / 3
    deviation = (((a - mean) ** 2 + (b - mean) ** 2 + (c - mean) ** 2) / 2) ** 0.5

    assert outcome.err == (
        "until: after 3 replicates, slowdown is not known to ± 1 % at 1 of 1 points; "
        f"the widest is ± {100 * 4.30265 * deviation / 3**0.5 / mean:.2g} %\n"
    )


def test_figures_that_no_run_has_are_told(vtsim: Vtsim, runs: Engine, study: str) -> None:
    until = "until: {metric: exits.CUPID.count}\n"
    Path(study).write_text(STUDY.replace("[slowdown]", "[slowdown, exits.CUPID.mean_cycles]") + until)
    outcome = vtsim("sweep", study)

    assert outcome.status == 0
    assert outcome.err == (
        "metrics: no run of the study has a figure for 'exits.CUPID.mean_cycles'\n"
        " help: did you mean 'exits.CPUID.mean_cycles'?\n"
        "until.metric: no run of the study has a figure for 'exits.CUPID.count'\n"
        " help: did you mean 'exits.CPUID.count'?\n"
    )


def test_what_failed_is_told_and_retried(vtsim: Vtsim, runs: Engine, study: str) -> None:
    runs.broken = 2
    outcome = vtsim("sweep", study)

    assert outcome.status == 1
    assert outcome.out.splitlines()[-1].startswith("2 of 3 runs done, 1 failed;")
    assert outcome.err == (
        '\nfailed: {"seed": 2}\nmodel error: a law is broken\n\n'
        f"To run again what failed: vtsim sweep {study} --retry-failed\n"
    )
    assert vtsim("study", "status", study).err == outcome.err
    runs.broken = 0
    assert vtsim("sweep", study, "--retry-failed").status == 0
    assert runs.ran == [1, 2, 3, 2]
    assert vtsim("study", "status", study).out == (
        f"Does the seed matter?\n3 of 3 runs done; results in {study[:-5]}.sqlite\n"
    )


def test_ctrl_c_keeps_what_was_run_and_says_how_to_go_on(vtsim: Vtsim, runs: Engine, study: str) -> None:
    runs.before = lambda: os.kill(os.getpid(), signal.SIGINT) if len(runs.ran) == 2 else None
    outcome = vtsim("sweep", study)

    assert outcome.status == 130
    assert "stopping once what is being run is done (Ctrl-C again drops it)" in outcome.err
    assert outcome.err.endswith(f"stopped; what was run is kept. To go on: vtsim sweep {study}\n")
    assert outcome.out.splitlines()[-1].startswith("2 of 3 runs done, 1 missing;")
    assert vtsim("sweep", study).status == 0
    assert runs.ran == [1, 2, 3]


def test_the_second_ctrl_c_drops_what_is_being_run(vtsim: Vtsim, runs: Engine, study: str) -> None:
    def twice() -> None:
        if len(runs.ran) == 2:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    runs.before = twice
    outcome = vtsim("sweep", study)

    assert outcome.status == 130
    assert runs.ran == [1, 2]
    assert "missing;" in outcome.out.splitlines()[-1]


def test_a_dry_run_says_what_a_sweep_would_take(vtsim: Vtsim, runs: Engine, study: str) -> None:
    outcome = vtsim("sweep", study, "--dry-run")

    lines = outcome.out.splitlines()
    assert lines[:2] == ["Does the seed matter?", "3 points, 3 runs, 2 of them missing"]
    assert lines[2].startswith("time: ") and lines[2].endswith(" s a run, 1 at a time)")
    assert lines[3].startswith("memory: ")
    assert len(lines) == 4
    assert runs.ran == [1]


@pytest.mark.parametrize("name", ["elsewhere.sqlite", "elsewhere.db", "elsewhere"])
def test_results_may_be_kept_elsewhere_and_exported(
    vtsim: Vtsim, runs: Engine, study: str, tmp_path: Path, name: str
) -> None:
    store, table = str(tmp_path / name), tmp_path / "table.csv"
    swept = vtsim("sweep", study, "--store", store)
    assert (swept.status, swept.err) == (0, "")
    assert swept.out.splitlines()[-1].startswith("3 of 3 runs done;")
    assert vtsim("study", "export", store, "--to", "csv", "-o", str(table)).err == f"wrote {table}\n"

    lines = [line.split(",")[:3] for line in table.read_text().splitlines()]
    assert lines == [["seed", "replicate", "slowdown"], ["1", "0", "0.5"], ["2", "0", "1.0"], ["3", "0", "1.5"]]


def test_what_is_to_be_done_again_names_the_store(vtsim: Vtsim, runs: Engine, study: str, tmp_path: Path) -> None:
    runs.broken = 2
    store = str(tmp_path / "elsewhere.db")
    outcome = vtsim("sweep", study, "--store", store)

    assert outcome.status == 1
    assert outcome.err.endswith(f"vtsim sweep {study} --store {store} --retry-failed\n")
    runs.broken = 0
    assert vtsim("sweep", study, "--store", store, "--retry-failed").status == 0


def test_status_says_that_the_study_was_changed(vtsim: Vtsim, runs: Engine, study: str) -> None:
    vtsim("sweep", study)
    assert vtsim("study", "status", study).err == ""
    Path(study).write_text(STUDY.replace("[1, 2, 3]", "[1, 2]"))
    outcome = vtsim("study", "status", study)

    assert outcome.err == f"{study} has changed since; vtsim sweep {study} brings its results up to it\n"
    assert outcome.out.splitlines()[1].startswith("3 of 3 runs done;")
    assert vtsim("sweep", study).out.splitlines()[-1].startswith("2 of 2 runs done;")
    assert vtsim("study", "status", study).err == ""


@pytest.mark.parametrize("command", ["status", "report", "plot"])
def test_nothing_and_names_that_are_too_long_are_no_studies(vtsim: Vtsim, command: str) -> None:
    for name, said in (("", "a file or directory is needed"), (300 * "x", "a file or directory has at most 240 bytes")):
        outcome = vtsim("study", command, name)
        assert outcome.status == 2
        assert outcome.err.endswith(f"Error: Invalid value for 'STUDY': the name of {said}\n")


def test_looking_at_an_empty_file_makes_no_store_of_it(vtsim: Vtsim, tmp_path: Path) -> None:
    empty = tmp_path / "empty.sqlite"
    empty.touch()

    assert vtsim("study", "status", str(empty)).err == (
        f"{empty}: no study was swept into it\n"
        " help: give a study, which is YAML, or the SQLite file that vtsim sweep made of one\n"
    )
    assert empty.stat().st_size == 0


CASES = {
    "no address": (
        ("sweep", "STUDY", "--scheduler", ""),
        "--scheduler: the address of a Dask scheduler is needed\n"
        " help: write the address that dask-scheduler prints, as in tcp://host:8786\n",
    ),
    "no study to look at": (
        ("study", "status", "/nowhere/none.yaml"),
        "/nowhere/none.yaml: cannot be read: No such file or directory\n help: give the path of a scenario file\n",
    ),
    "no results": (
        ("study", "status", "STUDY"),
        "STUDY: there are no results of this study\n help: run it with: vtsim sweep STUDY\n",
    ),
    "no store": (
        ("study", "status", "FILE.sqlite"),
        "FILE.sqlite: this is no store of a study: file is not a database\n"
        " help: a store is one SQLite file, as in --store results/study.sqlite\n",
    ),
    "a folder in place of a store": (
        ("sweep", "STUDY", "--store", "FOLDER"),
        "FOLDER: this is a folder, and no store of a study\n"
        " help: a store is one SQLite file, as in --store results/study.sqlite\n",
    ),
    "a device in place of a store": (
        ("sweep", "STUDY", "--store", "/dev/null"),
        "/dev/null: this is a device or a pipe, and no store of a study\n"
        " help: a store is one SQLite file, as in --store results/study.sqlite\n",
    ),
    "a store in place of a study": (
        ("sweep", "STORE"),
        "STORE: this is the store of a study, and no study\n"
        " help: give the study that was swept into it; vtsim study status STORE shows how far it is\n",
    ),
    "a text in place of a study to look at": (
        ("study", "status", "FILE.txt"),
        "FILE.txt: this is neither a study nor the store of one\n"
        " help: give a study, which is YAML, or the SQLite file that vtsim sweep made of one\n",
    ),
    "a folder in place of a study to look at": (
        ("study", "report", "FOLDER"),
        "FOLDER: this is a folder, and no study\n"
        " help: give a study, which is YAML, or the SQLite file that vtsim sweep made of one\n",
    ),
    "this folder in place of a study to look at": (
        ("study", "plot", "."),
        ".: this is a folder, and no study\n"
        " help: give a study, which is YAML, or the SQLite file that vtsim sweep made of one\n",
    ),
    "a device in place of a study to look at": (
        ("study", "export", "/dev/null", "--to", "csv"),
        "/dev/null: this is a device or a pipe, and no study\n"
        " help: give a study, which is YAML, or the SQLite file that vtsim sweep made of one\n",
    ),
    "a scenario in place of a study to look at": (
        ("study", "status", "FILE.yaml"),
        "FILE.yaml:2: vms: this is a scenario, and no study\n    2 | vms: [{guest: {processes: []}}]\n      | ^\n"
        " help: vtsim run FILE.yaml runs it; a study names it, as in 'scenario: small.yaml'\n",
    ),
    "an unknown format": (
        ("study", "export", "OTHER", "--to", "cvs"),
        "--to: unknown format 'cvs'\n help: did you mean 'csv'?\n",
    ),
    "an output that is a folder": (
        ("study", "export", "OTHER", "--to", "netcdf", "-o", "FOLDER"),
        "--output: FOLDER is a folder\n help: name a file in it\n",
    ),
    "an output in a folder that is not there": (
        ("study", "report", "OTHER", "-o", "/nowhere/x.html"),
        "--output: there is no folder /nowhere\n help: make it, or name another\n",
    ),
    "an output over the results": (
        ("study", "export", "OTHER", "--to", "csv", "-o", "STORE"),
        "--output: STORE has the results of the study\n help: name another file, or none\n",
    ),
    "a page over the results": (
        ("study", "report", "OTHER", "-o", "STORE"),
        "--output: STORE has the results of the study\n help: name another file, or none\n",
    ),
    "a table over the study": (
        ("study", "export", "OTHER", "--to", "csv", "-o", "OTHER"),
        "--output: OTHER is a study or a scenario\n help: name another file, or none\n",
    ),
    "a page over a scenario": (
        ("study", "report", "OTHER", "-o", "FILE.yaml"),
        "--output: FILE.yaml is a study or a scenario\n help: name another file, or none\n",
    ),
    "a study in place of a store": (
        ("sweep", "OTHER", "--store", "OTHER"),
        "OTHER: this is no store of a study: file is not a database\n"
        " help: a store is one SQLite file, as in --store results/study.sqlite\n",
    ),
    "a scenario in place of a study": (
        ("sweep", "FILE.yaml"),
        "FILE.yaml:2: vms: this is a scenario, and no study\n    2 | vms: [{guest: {processes: []}}]\n      | ^\n"
        " help: vtsim run FILE.yaml runs it; a study names it, as in 'scenario: small.yaml'\n",
    ),
    "a study in place of a scenario": (
        ("run", "STUDY"),
        "STUDY:1: question: this is a study, and no scenario\n    1 | question: Does the seed matter?\n      | ^\n"
        " help: vtsim sweep STUDY runs it\n",
    ),
    "a timeline over the scenario": (
        ("run", "FILE.yaml", "--timeline", "FILE.yaml"),
        "--timeline: FILE.yaml is the scenario\n help: name another file\n",
    ),
    "a store that cannot be written": (
        ("sweep", "STUDY", "--store", "/nowhere/x.sqlite"),
        "/nowhere/x.sqlite: the store of the study cannot be written: No such file or directory\n"
        " help: choose another by --store\n",
    ),
    "no study": (
        ("sweep", "/nowhere/x.yaml"),
        "/nowhere/x.yaml: cannot be read: No such file or directory\n help: give the path of a scenario file\n",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_is_told_in_full(case: str, vtsim: Vtsim, runs: Engine, study: str, tmp_path: Path) -> None:
    arguments, expected = CASES[case]
    (tmp_path / "bad.sqlite").write_text("nothing like a database " * 100)
    (tmp_path / "notes.txt").write_text("hello\n")
    other = tmp_path / "other.yaml"
    other.write_text(STUDY)
    vtsim("sweep", str(other))
    (tmp_path / "small.yaml").write_text("name: small\nvms: [{guest: {processes: []}}]\n")
    names = {
        "FILE.yaml": str(tmp_path / "small.yaml"),
        "STUDY": study,
        "FILE.sqlite": str(tmp_path / "bad.sqlite"),
        "FILE.txt": str(tmp_path / "notes.txt"),
        "FOLDER": str(tmp_path),
        "OTHER": str(other),
        "STORE": f"{str(other)[:-5]}.sqlite",
    }
    outcome = vtsim(*(names.get(each, each) for each in arguments))

    assert outcome.status == 2
    for name, path in names.items():
        expected = expected.replace(name, path)
    assert outcome.err == expected


def test_studies_are_checked_too(vtsim: Vtsim, study: str) -> None:
    assert vtsim("check", study).out == f"{study}: fine\n"
    Path(study).write_text(STUDY.replace("path: seed", "path: sead"))
    refused = vtsim("check", study)

    assert (refused.status, refused.out) == (2, "")
    assert "sead" in refused.err and "did you mean 'seed'?" in refused.err


@pytest.mark.parametrize("width", [90, 40])
def test_figures_stay_whole_where_there_is_room_and_are_folded_where_not(
    width: int, vtsim: Vtsim, runs: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    path = tmp_path / "wide.yaml"
    metrics = ["cycles.elapsed", "cycles.total", "cycles.by.R0.vm_exit", "instructions.N3", "slowdown"]
    path.write_text(STUDY.replace("[slowdown]", f"[{', '.join(metrics)}]").replace("[1, 2, 3]", "[123456789]"))
    lines = vtsim("sweep", str(path)).out.splitlines()[1:-1]

    result = Result.from_dict(json.loads(GOLDEN.read_text()))
    figures = ["123,456,789", f"{result.cycles.elapsed:,}", f"{result.cycles.total:,}"]
    whole = [figure for figure in figures if any(figure in line.split() for line in lines)]
    assert max(map(len, lines)) <= width
    assert whole == (figures if width == 90 else [])
