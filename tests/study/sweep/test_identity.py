"""Points of a sweep: same scenario and version, same point."""

from __future__ import annotations

import ast
import os
import shutil
from pathlib import Path

import pytest

from vtsim.config import parse_scenario
from vtsim.study.sweep import identity as module
from vtsim.study.sweep.identity import WITH_MODEL, identity, model_version, named_files, replicate, resolved_text

SMALL = "vms: [{guest: {processes: [{phases: [{primitive: cpuid}]}]}}]"
TRACE = "vms: [{{guest: {{processes: [{{phases: [{{primitive: memory_trace, trace: {name}}}]}}]}}}}]"
PACKAGE = Path(module.__file__).parents[2]


def test_a_setting_written_out_is_the_same_point_as_its_default() -> None:
    assert identity(parse_scenario(SMALL)) == identity(parse_scenario(SMALL, ["machine.cpus=1"]))


def test_every_setting_and_the_version_make_another_point() -> None:
    scenario = parse_scenario(SMALL)
    changes = (
        "seed=2",
        "machine.memory=2 GiB",
        "vms.0.guest.processes.0.phases.0.leaf=1",
        "machine.cpu.cache.l1d.ways=4",
    )
    others = [identity(parse_scenario(SMALL, [change])) for change in changes]

    assert len({identity(scenario), identity(scenario, "another"), *others}) == 2 + len(changes)


def test_another_primitive_with_the_same_settings_is_another_point() -> None:
    points = [SMALL.replace("cpuid", name) for name in ("rdtsc", "pause", "vmcall")]
    assert len({identity(parse_scenario(text)) for text in points}) == 3


def test_name_and_description_make_no_other_point() -> None:
    scenario = parse_scenario(SMALL)
    assert identity(parse_scenario(SMALL, ["name=x", "description=y"], name="z")) == identity(scenario)


def test_a_recorded_trace_counts_by_what_is_in_it(tmp_path: Path) -> None:
    first, moved, changed = (tmp_path / name for name in ("first.lackey", "moved.lackey", "changed.lackey"))
    first.write_text(" L 1000,8\n")
    shutil.copy(first, moved)
    changed.write_text(" S 1000,8\n")
    scenarios = [parse_scenario(TRACE.format(name=path), folder=tmp_path) for path in (first, moved, changed)]

    points = [identity(scenario) for scenario in scenarios]
    assert points[0] == points[1] != points[2]
    assert [list(named_files(scenario)) for scenario in scenarios] == [[str(first)], [str(moved)], [str(changed)]]
    os.utime(first, ns=(1, 1))
    assert identity(scenarios[0]) == points[0]


def test_a_profile_of_ones_own_counts_by_what_is_in_it(tmp_path: Path) -> None:
    points = []
    for number, way in enumerate((8, 4)):
        path = tmp_path / str(number) / "mine.toml"
        path.parent.mkdir()
        path.write_text(
            'extends = "skx-4114"\ndescription = "mine"\n[sources]\nme = "me"\n'
            f'[cache.l1d]\nways = {{value = {way}, unit = "ways", source = "me", confidence = "measured"}}\n'
        )
        points.append(identity(parse_scenario(SMALL, [f"machine.profile={path}"])))

    assert points[0] != points[1]


def test_replicates_have_seeds_of_their_own_whatever_the_order() -> None:
    scenario = parse_scenario(SMALL)
    seeds = [replicate(scenario, number).seed for number in range(20)]

    assert seeds[0] == scenario.seed
    assert len(set(seeds)) == 20
    assert [replicate(scenario, number).seed for number in reversed(range(20))] == seeds[::-1]
    assert replicate(scenario, 3, "another").seed != seeds[3]


def test_the_resolved_scenario_that_is_stored_reads_back_as_the_same() -> None:
    scenario = parse_scenario(
        SMALL, ["vms.0.guest.processes.0.phases.0.leaf=0x80000008", "machine.cpu.cache.l1d.ways=4"]
    )
    assert parse_scenario(resolved_text(scenario)) == scenario


def test_a_changed_model_is_another_version_and_a_changed_report_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (
        "cpu/kernels/run.py",
        "cpu/profiles/skx-4114.toml",
        "study/measure.py",
        "study/report.py",
        "cli/run.py",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(module, "PACKAGE", tmp_path)

    def changed(name: str) -> bool:
        before = model_version.__wrapped__()
        (tmp_path / name).write_text("x")
        return before != model_version.__wrapped__()

    assert not changed("study/report.py")
    assert not changed("cli/run.py")
    assert changed("cpu/kernels/run.py")
    assert changed("cpu/profiles/skx-4114.toml")
    assert changed("study/measure.py")


def test_the_version_covers_all_that_a_run_imports_of_the_studies() -> None:
    found, left = set(), ["study/__init__", "study/run"]
    while left:
        name = left.pop()
        found.add(f"{name}.py")
        for node in ast.walk(ast.parse((PACKAGE / f"{name}.py").read_text())):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("vtsim.study."):
                inner = str(node.module).removeprefix("vtsim.").replace(".", "/")
                left += [inner] if f"{inner}.py" not in found else []

    assert found == set(WITH_MODEL)
