"""Commands: what they print where, and their exit status."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import vtsim as package
from vtsim.base import jit, trace
from vtsim.base.errors import ConfigError, ModelError
from vtsim.cli import REPORT_IT, main
from vtsim.config import schema
from vtsim.study import validate as validation
from vtsim.study.result import Result

if TYPE_CHECKING:
    from tests.cli.conftest import Engine, Outcome

Command = Callable[..., "Outcome"]


def test_a_run_prints_its_report_and_nothing_on_stderr(vtsim: Command, engine: Engine, scenario: str) -> None:
    done = vtsim("run", scenario, "--no-baseline")

    assert done.status == 0
    assert done.out.startswith("key-value  kvm VT-x EPT on skx-4114, seed 1\n")
    assert "\x1b" not in done.out
    assert done.err == ""


def test_a_first_run_says_that_it_compiles(
    vtsim: Command, engine: Engine, scenario: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jit, "kernels_are_cached", lambda *_: False)

    done = vtsim("run", scenario, "--no-baseline")

    assert done.err == "compiling kernels (once per version; takes a minute or two)\n"


def test_json_is_one_object_and_nothing_else(vtsim: Command, engine: Engine, scenario: str) -> None:
    done = vtsim("run", scenario, "--json", "--trace", "--no-baseline")

    assert done.status == 0
    assert Result.from_dict(json.loads(done.out)) == engine.result
    assert "EXIT CPUID" in done.err


def test_options_become_settings(vtsim: Command, engine: Engine, scenario: str) -> None:
    vtsim("run", scenario, "--seed", "7", "--no-baseline", "--set", "machine.cpus=2", "--set", "vms.0.cpu=1")

    (run,) = engine.scenarios
    assert (run.seed, run.run.baseline, run.machine.cpus, run.vms[0].cpu) == (7, False, 2, 1)


def test_perf_prints_only_perfs_table(vtsim: Command, engine: Engine, scenario: str) -> None:
    done = vtsim("run", scenario, "--perf", "--no-baseline")

    assert done.out.startswith("\n\nAnalyze events for all VMs, all VCPUs:\n")
    assert done.out.endswith("us.\n\n")


def test_a_trace_comes_before_the_report(vtsim: Command, engine: Engine, scenario: str) -> None:
    done = vtsim("run", scenario, "--trace-limit", "2", "--trace-filter", "CPUID", "--no-baseline")

    lines = done.out.splitlines()
    assert lines[0].split() == ["cycle", "cpu", "from", "to", "what", "cycles", "detail"]
    assert [line.split()[:6] for line in lines[1:3]] == [
        ["0", "0", "N0", "R0", "EXIT", "CPUID"],
        ["1", "0", "N0", "R0", "EXIT", "CPUID"],
    ]
    assert lines[3] == "(trace limit of 2 reached)"
    assert lines[4].startswith("key-value")


def test_a_directory_gets_result_scenario_and_trace(
    vtsim: Command, engine: Engine, scenario: str, tmp_path: Path
) -> None:
    directory = tmp_path / "a" / "b"

    done = vtsim("run", scenario, "--trace", "-o", str(directory), "--no-baseline")

    assert done.err == "".join(f"wrote {directory / name}\n" for name in ("resolved.yaml", "trace.npz", "result.json"))
    assert json.loads((directory / "result.json").read_text())["scenario"] == "key-value"
    assert (directory / "resolved.yaml").read_text().startswith("name: small\n")
    assert [event.cycle for event in trace.load(directory / "trace.npz")] == [0, 1, 2]


def test_a_timeline_is_written_beside_the_report(vtsim: Command, engine: Engine, scenario: str, tmp_path: Path) -> None:
    path = tmp_path / "run.json"

    done = vtsim("run", scenario, "--timeline", str(path), "--no-baseline")

    assert (done.status, done.err) == (0, f"wrote {path}\n")
    slices = [event for event in json.loads(path.read_text())["traceEvents"] if event["ph"] == "X"]
    assert [event["name"] for event in slices] == ["start", "EXIT CPUID", "EXIT CPUID"]

    refused = vtsim("run", "workloads/iommu/window.yaml", "--timeline", str(path))
    assert (refused.status, refused.err) == (2, "--timeline: the scenario has no VMs, whose time it would show\n")


def test_a_place_that_cannot_be_written_is_refused_before_the_run(
    vtsim: Command, engine: Engine, scenario: str
) -> None:
    done = vtsim("run", scenario, "-o", scenario)

    assert (done.status, done.out, engine.scenarios) == (2, "", [])
    assert done.err == f"--output: {scenario}: File exists\n"


def test_a_directory_in_the_place_of_a_result_is_refused_before_the_run(
    vtsim: Command, engine: Engine, scenario: str, tmp_path: Path
) -> None:
    (tmp_path / "out" / "resolved.yaml").mkdir(parents=True)

    done = vtsim("run", scenario, "-o", str(tmp_path / "out"))

    assert (done.status, done.out) == (2, "")
    assert done.err == f"--output: {tmp_path}/out/resolved.yaml is a directory\n"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["resolved.yaml"]


def test_a_users_mistake_is_one_message_and_status_2(vtsim: Command, engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("sed: 1\nvms: []\n")

    done = vtsim("run", str(path))

    assert (done.status, done.out) == (2, "")
    assert f"{path}:1" in done.err
    assert "did you mean 'seed'?" in done.err
    assert "Traceback" not in done.err


def test_a_mistake_that_only_building_the_machine_finds_is_shown_in_its_line(
    vtsim: Command, engine: Engine, scenario: str
) -> None:
    def build(progress: Any) -> None:
        raise ConfigError("too little", field="vms.0.memory", help="give more")

    engine.before = build

    done = vtsim("run", scenario)

    assert (done.status, done.err) == (
        2, f"{scenario}:2: vms.0.memory: too little\n    2 | - guest:\n      |   ^\n help: give more\n"
    )  # fmt: skip


def test_our_mistake_shows_its_counters_and_asks_for_a_report(vtsim: Command, engine: Engine, scenario: str) -> None:
    def broken(progress: Any) -> None:
        raise ModelError("every walk ends exactly once is false", {"walks": 3, "completed": 0})

    engine.before = broken

    done = vtsim("run", scenario)

    lines = done.err.splitlines()
    assert (done.status, done.out) == (3, "")
    assert lines[:3] == [
        "model error: every walk ends exactly once is false",
        "  walks = 3",
        "  completed = 0",
    ]
    assert lines[3].startswith(f"vtsim {package.__version__}, Python ")
    assert lines[4:] == ["", REPORT_IT]


def test_an_error_nobody_foresaw_is_ours_too(vtsim: Command, engine: Engine, scenario: str) -> None:
    def broken(progress: Any) -> None:
        raise ZeroDivisionError("of something")

    engine.before = broken

    done = vtsim("run", scenario)

    assert (done.status, done.out) == (3, "")
    assert "ZeroDivisionError: of something" in done.err
    assert done.err.endswith(f"\n{REPORT_IT}\n")


@pytest.mark.parametrize("wish", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_gives_a_partial_result_and_status_130(
    vtsim: Command, engine: Engine, scenario: str, wish: signal.Signals
) -> None:
    engine.before = lambda progress: signal.raise_signal(wish)

    done = vtsim("run", scenario, "--json")

    assert done.status == 130
    assert json.loads(done.out)["partial"] is True
    assert done.err == "\nstopping; the result will be partial (Ctrl-C again ends at once)\n"


def test_what_a_run_finds_out_is_told_while_it_runs(vtsim: Command, engine: Engine, scenario: str) -> None:
    engine.before = lambda progress: progress.remark("vm0 does nothing [but] handle interrupts")

    assert vtsim("run", scenario, "--json").err == "note: vm0 does nothing [but] handle interrupts\n"


def test_a_second_ctrl_c_ends_at_once(vtsim: Command, engine: Engine, scenario: str) -> None:
    def twice(progress: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    engine.before = twice

    done = vtsim("run", scenario, "--json")

    assert (done.status, done.out) == (130, "")


def test_a_reader_that_has_gone_ends_the_run_quietly(
    engine: Engine, scenario: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as gone:
        monkeypatch.setattr(sys, "stdout", gone)
        status = main(["run", scenario, "--json", "--no-baseline"])

    assert (status, capfd.readouterr().err) == (141, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_one_message_and_status_2(
    engine: Engine, scenario: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        status = main(["run", scenario, "--json", "--no-baseline"])

    assert (status, capfd.readouterr().err) == (2, "the output cannot be written: No space left on device\n")


def test_a_closed_output_is_not_missed(engine: Engine, scenario: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)

    status = main(["run", scenario, "--json", "--no-baseline"])
    sys.stdout.close()

    assert status == 0


def test_an_output_without_unicode_gets_ascii(engine: Engine, scenario: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    with io.TextIOWrapper(raw, encoding="ascii") as narrow:
        monkeypatch.setattr(sys, "stdout", narrow)
        status = main(["run", scenario, "--no-baseline"])
        written = raw.getvalue().decode()

    halted = next(line for line in written.splitlines() if line.startswith("halted"))
    assert (status, "?" in written) == (0, False)
    assert halted.split()[3:6] == [".", ".", "."]
    assert halted.endswith("  ############")


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (("rnu", "x.yaml"), "Did you mean 'run'?"),
        (("run", "x.yaml", "--jsno"), "--json"),
        (("explain", "exits", "CPUID"), "Did you mean 'exit'?"),
        (("run",), "Missing argument 'FILE'"),
        (("run", "x.yaml", "--json", "--perf"), "--json and --perf both say what to print; choose one"),
        (("run", "x.yaml", "--trace-filter", "exit"), "did you mean 'exits'?"),
        (("run", "missing.yaml"), "missing.yaml: cannot be read: No such file or directory"),
        (("list", "profil"), "did you mean 'profile'?"),
        (("explain", "profile", "skx"), "profile can be clx-6252, "),
        (
            ("explain", "exit", "CPUID", "--set", "vmm.lengths=x"),
            "--set vmm.lengths=x: vmm.lengths: 'x' is not possible",
        ),
        (("run", "x.yaml", "-o", ""), "Invalid value for '-o' / '--output': the name of a file or directory is needed"),
        (("check", ""), "the name of a file or directory is needed"),
        (("vmcs", "replay", "x.jsonl", "--base-states", ""), "the name of a file or directory is needed"),
    ],
)
def test_a_slip_on_the_command_line_is_explained(
    vtsim: Command, engine: Engine, arguments: tuple[str, ...], hint: str
) -> None:
    done = vtsim(*arguments)

    assert (done.status, done.out) == (2, "")
    assert hint in done.err
    assert "Traceback" not in done.err


def test_check_names_every_file_and_fails_if_one_does(vtsim: Command, scenario: str, tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("vms: 1\n")

    fine, both = vtsim("check", scenario), vtsim("check", str(bad), scenario)

    assert (fine.status, fine.out, fine.err) == (0, f"{scenario}: fine\n", "")
    assert (both.status, both.out) == (2, f"{scenario}: fine\n")
    assert f"{bad}:1" in both.err


def test_the_schema_is_json(vtsim: Command) -> None:
    done = vtsim("schema")

    assert done.status == 0
    assert json.loads(done.out) == json.loads(json.dumps(schema()))
    assert json.loads(vtsim("schema", "study").out) == json.loads(json.dumps(schema("study")))
    unknown = vtsim("schema", "studies")
    assert (unknown.status, unknown.err) == (2, "unknown kind of file 'studies'\n help: did you mean 'study'?\n")


def test_the_version_is_that_of_the_package(vtsim: Command) -> None:
    done = vtsim("--version")

    assert (done.status, done.out, done.err) == (0, f"vtsim {package.__version__}\n", "")


def test_list_shows_the_doors_and_what_is_behind_one(vtsim: Command) -> None:
    assert "primitive" in vtsim("list").out
    assert "skx-4114" in vtsim("list", "profile").out


@pytest.mark.parametrize(("within", "status"), [(None, 0), (True, 0), (False, 1)])
def test_validate_fails_when_a_tolerance_is_broken(
    vtsim: Command, monkeypatch: pytest.MonkeyPatch, within: bool | None, status: int
) -> None:
    one = validation.Comparison(
        row="EXIT-HW-RT",
        key="Nehalem",
        hardware="a CPU",
        published=1000.0,
        simulated=1100.0,
        unit="cycles",
        deviation_percent=10.0,
        split="calibrate",
        tolerance_percent=None if within is None else 5.0,
        within=within,
        note="",
    )
    asked: list[Any] = []

    def fake(rows: Any, progress: Any, sets: Any) -> list[validation.Comparison]:
        asked.append((rows, sets))
        return [one]

    monkeypatch.setattr("vtsim.cli.validate.validate", fake)

    done = vtsim("validate", "--row", "EXIT-HW-RT", "--set", "machine.cpu.walkers=1", "--json")

    assert (done.status, asked) == (status, [(["EXIT-HW-RT"], ("machine.cpu.walkers=1",))])
    assert [row["key"] for row in json.loads(done.out)] == ["Nehalem"]


def test_the_page_is_only_written_from_all_rows(vtsim: Command) -> None:
    done = vtsim("validate", "--row", "EXIT-HW-RT", "--write-docs")

    assert done.status == 2
    assert done.err == "--write-docs: the page holds all rows, and --row chooses some\n"


def test_the_page_is_not_written_from_an_experiment(vtsim: Command) -> None:
    done = vtsim("validate", "--set", "machine.cpu.walkers=1", "--write-docs")

    assert done.status == 2
    assert done.err == "--write-docs: the page holds what is shipped, and --set changes it\n"


def test_help_imports_nothing_that_takes_long() -> None:
    code = (
        "import sys; from vtsim.cli import main; status = main(['--help']);"
        "print([name for name in ('numpy', 'numba', 'rich', 'simpy', 'ruamel') if name in sys.modules])"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert "Usage: vtsim" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"
