"""Commands on a finished study, swept with an engine that answers at once."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, Executor
from pathlib import Path
from typing import Any

import pytest

from tests.study.sweep.conftest import SCENARIO, Engine, Now
from vtsim.base import jit
from vtsim.base.errors import ConfigError
from vtsim.cli.study_tables import _sensitivity_table
from vtsim.platform.spec import Scenario
from vtsim.study.analysis import model
from vtsim.study.analysis.sensitivity import MeanChange, VarianceShare
from vtsim.study.report import plain_text
from vtsim.study.sweep import worker
from vtsim.study.sweep.design import load_design
from vtsim.study.sweep.executors import Given
from vtsim.study.sweep.run import Sweep
from vtsim.study.sweep.store import Store
from vtsim.study.sweep.table import Column

ITERATIONS = "vms.0.guest.processes.0.phases.0.iterations"
STUDY = f"""question: How much?
scenario: small.yaml
axes:
- {{how: grid, path: vmm.paging, values: [ept, shadow]}}
- {{how: grid, path: {ITERATIONS}, values: [10, 20, 30]}}
metrics: [slowdown]
labels: {{vmm.paging: paging, {ITERATIONS}: exits}}
"""
Command = Callable[..., Any]


def slowdown(scenario: Scenario) -> float:
    """Shadow costs 1 and EPT a tenth for each iteration: they are equal at 20, and every other seed is 0.5 above."""
    count = scenario.vms[0].guest.processes[0].phases[0].iterations  # type: ignore[attr-defined]
    return 1 + (2.0 if scenario.vmm.paging == "shadow" else count / 10)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    fake = Engine()
    fake.slowdown = slowdown
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "run", fake.run)
        patch.setattr(model, "run", fake.run)
        patch.setattr(jit, "kernels_are_cached", lambda *_: True)
        yield fake


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the study lies, with its store and its scenario."""
    return tmp_path_factory.mktemp("study")


@pytest.fixture(scope="module")
def study(engine: Engine, place: Path) -> str:
    """A finished study."""
    (place / "small.yaml").write_text(SCENARIO)
    path = place / "study.yaml"
    path.write_text(STUDY)
    with Store(path.with_suffix(".sqlite")) as store:
        Sweep(load_design(path), store, Given(Now())).run()
    return str(path)


def test_effects_are_shown_largest_first_and_as_json(vtsim: Command, study: str) -> None:
    done = vtsim("study", "effects", study, "--metric", "slowdown")

    assert [" ".join(line.split()) for line in done.out.splitlines()[2:]] == [
        "exits: 10 to 30 +1 – –",
        "exits: 10 to 20 +0.5 – –",
        "paging: ept to shadow 0 – –",
        "paging: ept to shadow × exits: 10 to 30 -2 – –",
        "paging: ept to shadow × exits: 10 to 20 -1 – –",
    ]
    found = json.loads(vtsim("study", "effects", study, "--metric", "slowdown", "--json").out)
    assert found["effects"][0] == {
        "axes": ["vmm.paging"], "base": ["ept"], "values": ["shadow"], "mean": 0.0, "half_width": None, "places": 3,
    }  # fmt: skip


def test_the_shares_of_a_grid_need_no_runs(vtsim: Command, study: str) -> None:
    """All six have the variance 1/3; means over both pagings rise by a half each, which is 1/6."""
    done = vtsim("study", "sensitivity", study, "--metric", "slowdown")

    assert [" ".join(line.split()) for line in done.out.splitlines()[2:]] == [
        "paging 0.0 % – 50.0 % –",
        "exits 50.0 % – 100.0 % –",
    ]


def test_a_front_needs_two_figures(vtsim: Command, study: str) -> None:
    done = vtsim("study", "pareto", study, "--min", "slowdown", "--max", "efficiency.overall", "--json")

    found = json.loads(done.out)
    assert [point["axes"] for point in found["points"]] == [{"vmm.paging": "ept", ITERATIONS: 10}]
    assert found["points"][0]["slowdown"] == 2
    refused = vtsim("study", "pareto", study, "--min", "slowdown")
    assert (refused.status, refused.err) == (
        2,
        "--min, --max: 1 figures were named\n help: two make a front, as in --min slowdown --max X\n",
    )


def test_a_fit_shows_the_line_and_each_row(vtsim: Command, study: str, tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text("paging,exits,measured\nept,10,1\nept,30,2\nept,5,9\n")

    done = vtsim("study", "fit", study, str(tmp_path / "mine.csv"), "--metric", "slowdown")

    assert done.out == (
        "slowdown  measured  model  deviation\n"
        "────────────────────────────────────\n"
        "ept, 10          1      2   +100.0 %\n"
        "ept, 30          2      4   +100.0 %\n"
        "\nmodel = 2 × measured +0, R² 1.0000, 2 rows; off by 100.0 % on average\n"
    )
    assert done.err == f"no run of the study matches line 4 of {tmp_path}/mine.csv\n"


def test_a_crossover_is_found_by_runs_that_halve_the_interval(vtsim: Command, study: str, place: Path) -> None:
    arguments = (
        "study", "crossover", str(place / "small.yaml"), "--axis", ITERATIONS, "--between", "4", "100",
        "--a", "vmm.paging=ept", "--b", "vmm.paging=shadow", "--metric", "slowdown", "--tolerance", "0.001",
    )  # fmt: skip

    done = vtsim(*arguments)

    assert done.out == (
        f"A has less slowdown below, B above {ITERATIONS} = 20 (A minus B: 0 and 0; 16 runs)\n"
    )  # 4 100 52 28 16 22 19 20
    assert done.err.splitlines()[:3] == ["4: A 1.4, B 3", "100: A 11, B 3", "52: A 6.2, B 3"]
    stepped = json.loads(vtsim(*arguments, "--step", "7", "--json").out)
    assert (stepped["low"], stepped["high"]) == (18, 25)
    assert (stepped["low_difference"], stepped["high_difference"]) == pytest.approx((-0.2, 0.5))


# fmt: off
REFUSED = [
    (["effects", "{study}", "--metric", "slow"], "'slow' is no figure of a result: unknown key 'slow'\n help: did you mean 'slowdown'?"),
    (["effects", "{study}", "--metric", "slowdown", "--confidence", "nan"], "--confidence: nan is no share\n help: as in 0.95"),
    (["pareto", "{study}", "--min", "slowdown", "--max", "slowdown"],
     "--min, --max: slowdown is named twice\n help: two figures make a front, as in --min slowdown --max X"),
    (["effects", "{study}", "--metric", "exits.CUPID.count"],
     "--metric: no run of the study has a figure for 'exits.CUPID.count'\n help: did you mean 'exits.CPUID.count'?"),
    (["plot", "{study}", "-o", "{folder}"], "--output: {folder} is a folder\n help: name a file in it"),
    (["plot", "{study}", "--where", "paging"], "--where: 'paging' is not AXIS=VALUE"),
    (["crossover", "{scenario}", "--axis", "vmm.paging", "--between", "a", "b", "--a", "seed=1", "--b", "seed=2", "--metric", "slowdown"],
     "--between: 'a' is not a value of vmm.paging\n help: write a number, or one with a unit as in '4 KiB'"),
    (["crossover", "{scenario}", "--axis", "vms.0.memory", "--between", "1", "x", "--a", "seed=1", "--b", "seed=2", "--metric", "slowdown"],
     "--between: 'x' is not a value of vms.0.memory\n help: a size is written like '2 MiB' (B, KiB, MiB, GiB, TiB, kB, MB, GB)"),
    (["crossover", "{scenario}", "--axis", "seed", "--between", "1", "9", "--a", "seed=1", "--b", "vmm.vpid=off", "--metric", "slowdown"],
     "--a: seed is the axis, which has other values\n help: leave it out"),
    (["crossover", "{scenario}", "--axis", "seed", "--between", "1", "9", "--a", "nothing", "--b", "vmm.vpid=off", "--metric", "slowdown"],
     "--a nothing: this is not path=value\n help: write it like --a machine.profile=skx-4114"),
    (["crossover", "{scenario}", "--axis", "vms.0.memory", "--between", "1", "2", "--a", "seed=1", "--b", "seed=2", "--metric", "slowdown"],
     "--between vms.0.memory=1: vms.0.memory: 1 is less than 16 MiB\n help: a size is written like '2 MiB' (B, KiB, MiB, GiB, TiB, kB, MB, GB), from 16 MiB to 16 TiB"),
    (["crossover", "{scenario}", "--axis", "machine.cpu.prices.LTR", "--between", "9", "99999", "--a", "vmm.paging=ept", "--b",
      "vmm.paging=shadow", "--metric", "slowdown"],
     "--between: machine.cpu.prices.LTR: 9 cycles is beyond the stated range, 14 to 22 cycles\n"
     " help: A. Lutomirski, Linux commit b7ffc44d5b2e, 2017 (kvm-unit-tests before and after; CPU not stated): "
     "what vmcall (14) and cpuid (22) lost with it; --beyond-stated-range goes beyond"),
    (["crossover", "{scenario}", "--axis", "machine.nothing", "--between", "1", "2", "--a", "seed=1", "--b", "seed=2", "--metric", "slowdown"],
     "--axis machine.nothing=1: machine: unknown key 'nothing'\n"
     " help: keys here are profile, cpus, threads, memory, nodes, frames, quantum, isa, devices, iommu, landing, cpu"),
    (["sensitivity", "{scenario}", "--axis", "=stated", "--metric", "slowdown"],
     "--axis: '=stated' is no axis\n help: PATH=LOW..HIGH, PATH=a,b,c, or PATH=stated of a cost of the profile"),
    (["plot", "{study}", "--kind", ""],
     "--kind: unknown kind of plot ''\n help: kind of plot can be lines, heat, bars, stacks, cdf, scatter"),
    (["sensitivity", "{scenario}", "--axis", "vmm.paging", "--metric", "slowdown"],
     "--axis: 'vmm.paging' is no axis\n help: PATH=LOW..HIGH, PATH=a,b,c, or PATH=stated of a cost of the profile"),
    (["sensitivity", "{scenario}", "--axis", "seed=1..9", "--axis", "seed=1,2", "--metric", "slowdown"],
     "--axis: seed and the axis seed set the same\n help: make one axis of them"),
    (["crossover", "{scenario}", "--axis", "seed", "--between", "1", "9", "--a", "vmm.paging=ept", "--b", "vmm.paging=shadow", "--metric", "exits.CUPID.count"],
     "--metric: the run has no figure 'exits.CUPID.count' with run.baseline=false, seed=1, vmm.paging=ept\n help: did you mean 'exits.CPUID.count'?"),
    (["sensitivity", "{scenario}", "--axis", "vms.0.memory=2 MiB..1 MiB", "--metric", "slowdown"],
     "--axis: 2 MiB..1 MiB is no range\n help: the smaller value comes first"),
    (["sensitivity", "{scenario}", "--axis", "vmm.paging=ept,shadow", "--metric", "slowdown", "--method", "fast"],
     "--method: unknown method 'fast'\n help: method can be sobol, morris"),
    (["report", "{scenario}"],
     "{scenario}:1: vms: this is a scenario, and no study\n    1 | vms:\n      | ^\n"
     " help: vtsim run {scenario} runs it; a study names it, as in 'scenario: small.yaml'"),
]
# fmt: on


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_a_users_mistake_is_one_message_and_status_2(
    vtsim: Command, study: str, place: Path, arguments: list[str], message: str
) -> None:
    names = {"study": study, "scenario": str(place / "small.yaml"), "folder": str(place)}

    done = vtsim("study", *(part.format(**names) for part in arguments))

    assert (done.status, done.out, done.err) == (2, "", message.format(**names) + "\n")


def test_points_are_evaluated_in_their_order(study: str, place: Path) -> None:
    evaluate = model.evaluator(place / "small.yaml", ("seed=7",), "slowdown", Given(Now()))

    points = [{"vmm.paging": paging, ITERATIONS: 10} for paging in ("shadow", "ept")]

    assert evaluate(points) == [3, 2]


def test_workers_that_die_are_told_of(study: str, place: Path) -> None:
    class Dying(Executor):
        def map(self, *_: object, **__: object) -> Any:
            raise BrokenExecutor

    evaluate = model.evaluator(place / "small.yaml", (), "slowdown", Given(Dying()))

    with pytest.raises(ConfigError) as error:
        evaluate([{"vmm.paging": "ept"}])
    assert str(error.value) == (
        "the worker process ended before the run did: it was killed, or this computer has too little memory\n"
        " help: use fewer jobs, or smaller guests"
    )


@pytest.mark.skipif(importlib.util.find_spec("SALib") is None, reason="the extra analysis is not installed")
def test_sensitivity_on_the_model_runs_each_point_once(
    vtsim: Command, study: str, engine: Engine, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vtsim.study.sweep import executors

    monkeypatch.setattr(executors, "Local", lambda jobs: Given(Now()))
    engine.ran.clear()

    done = vtsim(
        "study", "sensitivity", str(place / "small.yaml"), "--metric", "slowdown", "--samples", "256", "--json",
        "--axis", "vmm.paging=ept,shadow", "--axis", f"{ITERATIONS}=10..30", "--set", "seed=7",
    )  # fmt: skip

    paging, count = json.loads(done.out)["settings"]
    assert len(engine.ran) == 2 * 21
    assert {scenario.seed for scenario in engine.ran} == {7}
    # over all whole numbers from 10 to 30: variances (21² - 1) / 12 / 100 of EPT's, a quarter of it by count alone
    assert paging["alone"] == pytest.approx(0, abs=0.08)
    assert count["total"] == pytest.approx(1, abs=0.15)


@pytest.mark.slow
@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("jinja2", "matplotlib")), reason="extras are not installed"
)
def test_pictures_and_pages_are_written_beside_the_store(vtsim: Command, study: str, place: Path) -> None:
    picture, page = place / "study.svg", place / "study.html"

    assert vtsim("study", "plot", study, "--metric", "exits.*.share_of_run").err == f"wrote {picture}\n"
    assert vtsim("study", "report", study, "--metric", "slowdown", "--where", "vmm.paging=ept").err == f"wrote {page}\n"

    for reason in ("EPT_VIOLATION", "CPUID"):
        assert reason.replace("_", " ") in picture.read_text()
    assert "<h1>How much?</h1>" in page.read_text()
    assert "3 runs" in page.read_text()


def test_without_matplotlib_a_plot_says_which_extra_brings_it(
    vtsim: Command, study: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)

    done = vtsim("study", "plot", study, "-o", str(tmp_path / "study.svg"))

    assert (done.status, done.err) == (
        2,
        "a plot needs matplotlib, which is not installed\n help: pip install 'vtsim[plots]'\n",
    )
    assert not (tmp_path / "study.svg").exists()


def test_help_of_study_imports_nothing_that_takes_long() -> None:
    code = (
        "import sys; from vtsim.cli import main; main(['study', 'plot', '--help']);"
        "print([name for name in ('numpy', 'numba', 'rich', 'matplotlib', 'jinja2', 'SALib') if name in sys.modules])"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("drawn", [False, True])
def test_long_paths_take_a_further_line_and_no_figure_is_cut(*, drawn: bool) -> None:
    path = "machine.cpu.transitions." + "x" * 60
    found = (
        [VarianceShare(path=path, alone=0.1234, total=0.2345, alone_half_width=0.0111, total_half_width=0.0222)]
        if drawn
        else [MeanChange(path=path, mean=1234.5, half_width=0.25, spread=77.125)]
    )
    column = Column(path="slowdown", label="slowdown", unit="")

    text = plain_text(_sensitivity_table(found, column, {}), 80)

    figures = ("12.3 %", "1.1 %", "2.2 %", "± 95 %") if drawn else ("± 95 %", "spread")
    assert all(figure in text for figure in figures)
    assert "…" not in text
    assert "".join(line[:80].split("  ")[0].strip() for line in text.splitlines()).count("x") == 60
