"""Which points a study has, and what its files may say."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from itertools import product
from math import log
from pathlib import Path

import numpy as np
import pytest

from vtsim.base.errors import ConfigError
from vtsim.config.study_spec import LatinHypercubeSpec, RangeSpec
from vtsim.study.sweep.constraints import Constraint
from vtsim.study.sweep.design import draws, load_design
from vtsim.study.sweep.metrics import column, figure

Write = Callable[..., Path]


def test_points_are_the_product_of_the_axes_and_the_last_changes_first(write: Write) -> None:
    design = load_design(
        write(
            "axes:\n"
            "- {how: grid, path: machine.profile, values: [skx-4114, snb-e5-2450], names: [new, old]}\n"
            "- {how: zip, values: {machine.memory: [1 GiB, 2 GiB], seed: [7, 8]}}\n"
            "- {how: list, points: [{vmm.vpid: true}, {vmm.vpid: false}]}\n"
        )
    )
    points = list(design.points())

    assert [tuple(point.values.values()) for point in points] == [
        (name, memory, seed, vpid)
        for name, (memory, seed), vpid in product(("new", "old"), ((2**30, 7), (2**31, 8)), (True, False))
    ]
    last = design.scenario(points[-1])
    assert (last.machine.profile, last.machine.memory, last.seed, last.vmm.vpid) == ("snb-e5-2450", 2**31, 8, False)
    assert [(each.path, each.unit) for each in design.axes][:2] == [("machine.profile", ""), ("machine.memory", "B")]
    assert [design.place(number).number for number in design.numbers] == list(range(8))


def test_a_study_may_be_without_a_scenario_file_and_without_axes(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text("question: Why?\nset: {vms: [{guest: {processes: [{phases: [{primitive: cpuid}]}]}}], seed: 3}\n")
    design = load_design(path)

    assert [design.scenario(point).seed for point in design.points()] == [3]


def test_constraints_take_points_out(write: Write) -> None:
    design = load_design(
        write(
            "axes:\n"
            "- {how: grid, path: vmm.paging, values: [ept, shadow]}\n"
            "- {how: grid, path: vmm.ept.page_size, values: [4 KiB, 2 MiB, 1 GiB]}\n"
            "constraints: [vmm.paging != shadow or vmm.ept.page_size == 4 KiB, 1 <= vmm.ept.page_size < 1 GiB]\n"
        )
    )

    found = [tuple(point.values.values()) for point in design.points()]
    assert found == [("ept", 4096), ("ept", 2**21), ("shadow", 4096)]
    assert design.count() == 3


def test_and_binds_more_closely_than_or() -> None:
    constraint = Constraint.parse("a == 1 or a == 2 and b != 'x y'", ["a", "b"])

    held = [(a, b) for a in (1, 2, 3) for b in ("x y", "z") if constraint.holds({"a": a, "b": b})]
    assert held == [(1, "x y"), (1, "z"), (2, "z")]


def test_a_latin_hypercube_has_one_sample_in_each_part_of_each_range() -> None:
    span = RangeSpec(min=0, max=1)
    cube = draws(LatinHypercubeSpec(samples=50, ranges={"a": span, "b": span, "c": span}))

    for dimension in range(3):
        assert sorted(np.floor(cube[:, dimension] * 50)) == list(range(50))
    assert not np.array_equal(np.argsort(cube[:, 0]), np.argsort(cube[:, 1]))


@pytest.mark.parametrize(
    "span", [RangeSpec(min=1, max=64, integer=True), RangeSpec(min=1, max=64, log=True, integer=True)]
)
def test_whole_numbers_reach_both_ends_of_their_range(span: RangeSpec) -> None:
    values = [span.drawn(u) for u in np.linspace(0, 1, 10_001)[:-1]]

    assert {type(value) for value in values} == {int}
    assert (min(values), max(values)) == (1, 64)
    if not span.log:  # each has an equal part
        assert max(values.count(n) for n in range(1, 65)) - min(values.count(n) for n in range(1, 65)) <= 1


def test_a_logarithmic_range_is_even_in_the_logarithm() -> None:
    span = RangeSpec(min="4 KiB", max="4 MiB", log=True)

    assert span.drawn(0.5) == pytest.approx(128 * 1024)
    assert log(span.drawn(0.75) / span.drawn(0.5)) == pytest.approx(log(span.drawn(0.25) / span.drawn(0)))


def test_drawn_values_are_put_into_the_scenario(write: Write) -> None:
    path = write(
        "axes: [{how: random, samples: 20, ranges: {vms.0.guest.processes.0.phases.0.iterations: {min: 5, max: 5000, log: true, integer: true}, seed: {min: 1, max: 9, integer: true}}}]\n"
    )
    first, again = load_design(path), load_design(path)

    assert [point.values for point in first.points()] == [point.values for point in again.points()]
    for point in first.points():
        scenario = first.scenario(point)
        assert (
            scenario.vms[0].guest.processes[0].phases[0].iterations
            == point.values["vms.0.guest.processes.0.phases.0.iterations"]
        )
        assert scenario.seed == point.values["seed"]
    assert len({point.values["seed"] for point in first.points()}) > 3


def test_a_drawn_value_that_cannot_be_is_shown_at_its_range(write: Write) -> None:
    text = "axes: [{how: random, samples: 9, ranges: {machine.cpus: {min: 300, max: 301, integer: true}}}]"
    with pytest.raises(ConfigError) as raised:
        load_design(write(text))

    found = raised.value.problems
    assert [(each.line, each.column) for each in found] == [(3, text.index("{min"))]  # once, not for each sample
    assert found[0].message in ("300 is more than 256", "301 is more than 256")


@pytest.mark.parametrize(
    ("path", "end", "message", "help"),
    [
        ("machine.memory", "900 ms", "'900 ms' is not a size: unknown unit 'ms'", "a size is written like '2 MiB'"),
        (
            "machine.cpu.transitions.vm_exit_cycles", "900 ns", "'900 ns' is not a count: unknown unit 'ns'",
            "a count is written like '10 M' (k, M, G, T)",
        ),
    ],
)  # fmt: skip
def test_ends_of_a_range_are_in_units_of_its_setting(
    write: Write, path: str, end: str, message: str, help: str
) -> None:
    text = f"axes: [{{how: random, samples: 9, ranges: {{{path}: {{min: {end}, max: 1 T}}}}}}]"
    with pytest.raises(ConfigError) as raised:
        load_design(write(text))

    found = raised.value.problems[0]
    assert (found.line, found.column, found.message) == (3, text.index(end), message)
    assert found.path == f"axes.0.ranges.{path}.min"
    assert found.help.startswith(help)


def test_a_range_that_gives_no_whole_numbers_says_how_it_could(write: Write) -> None:
    text = "axes: [{how: latin_hypercube, samples: 9, ranges: {machine.cpu.dram.local_ns: {min: 60, max: 140}}}]"
    with pytest.raises(ConfigError) as raised:
        load_design(write(text))

    (found,) = raised.value.problems
    assert found.message.endswith("is not a whole number of ns")
    assert found.help == (
        "write a whole number, 1 to 100000; integer: true draws whole numbers, values: […] from a list"
    )


@pytest.mark.parametrize("how", ["random", "latin_hypercube"])
def test_a_setting_may_be_drawn_from_a_list_each_value_as_often(write: Write, how: str) -> None:
    path = write(
        f"axes: [{{how: {how}, samples: 300, ranges: {{vmm.ept.page_size: {{values: [4 KiB, 2 MiB, 1 GiB]}}, vmm.paging: {{values: [ept]}}}}}}]\n"
    )
    design = load_design(path)
    found = [point.values["vmm.ept.page_size"] for point in design.points()]
    counts = [found.count(size) for size in (4096, 2**21, 2**30)]

    assert sum(counts) == 300
    assert counts == [100, 100, 100] if how == "latin_hypercube" else min(counts) > 60  # 4.9 standard deviations
    assert {design.scenario(point).vmm.ept.page_size for point in design.points()} == {4096, 2**21, 2**30}


def test_a_sobol_sequence_needs_scipy_and_fills_halves_evenly(write: Write) -> None:
    path = write("axes: [{how: sobol, samples: 16, ranges: {seed: {min: 1, max: 1000, integer: true}}}]\n")
    if importlib.util.find_spec("scipy") is None:
        with pytest.raises(
            ConfigError,
            match=r"a Sobol sequence needs scipy, which is not installed\n help: pip install 'vtsim\[sobol\]'",
        ):
            load_design(path)
    else:
        values = [point.values["seed"] for point in load_design(path).points()]
        assert sum(value <= 500 for value in values) == 8


def test_figures_of_a_result_are_found_by_path() -> None:
    result = {
        "slowdown": 2.5,
        "native": None,
        "exits": [{"reason": "CPUID", "count": 3}, {"reason": "HLT", "count": 1}],
        "cycles": {"by": {"N0": {"a.b": 7}}},
        "vms": {"vm0": {"slowdown": 2}},
    }

    found = ["slowdown", "exits.HLT.count", "exits.0.count", "cycles.by.N0.a.b", "vms.vm0.slowdown"]
    assert [figure(result, path) for path in found] == [2.5, 1, 3, 7, 2]
    assert [figure(result, path) for path in ("exits.EPT.count", "exits.9.count", "cycles.by", "native.slowdown")] == [
        None
    ] * 4
    assert (column("exits.CPUID.mean_cycles").unit, column("vms.vm0.walks.count").unit) == ("cycles", "walks")
    assert column("cycles.by_owner.guest.0.N0.page_walk").unit == "cycles"


def at(line: int, column: int, source: str) -> str:
    return f"\n{line:>5} | {source}\n      | {' ' * column}^"


CASES = {
    "an unknown key": (
        "axis: []",
        "study.yaml:3: unknown key 'axis'" + at(3, 0, "axis: []") + "\n help: did you mean 'axes'?",
    ),
    "an unknown kind of axis": (
        "axes: [{how: gird}]",
        "study.yaml:3: axes.0.how: unknown kind of axis 'gird'"
        + at(3, 13, "axes: [{how: gird}]")
        + "\n help: did you mean 'grid'?",
    ),
    "lists of a zip that differ in length": (
        "axes: [{how: zip, values: {seed: [1, 2], machine.cpus: [1]}}]",
        "study.yaml:3: axes.0.values.machine.cpus: there are 1 values here and 2 for seed"
        + at(3, 55, "axes: [{how: zip, values: {seed: [1, 2], machine.cpus: [1]}}]")
        + "\n help: lists of a zip have one length",
    ),
    "points of a list with different settings": (
        "axes: [{how: list, points: [{seed: 1}, {machine.cpus: 1}]}]",
        "study.yaml:3: axes.0.points.1: this point has other settings than the first"
        + at(3, 39, "axes: [{how: list, points: [{seed: 1}, {machine.cpus: 1}]}]")
        + "\n help: settings of the first are seed",
    ),
    "names for some values": (
        "axes: [{how: grid, path: seed, values: [1, 2], names: [one]}]",
        "study.yaml:3: axes.0.names: there are 1 names for 2 values"
        + at(3, 54, "axes: [{how: grid, path: seed, values: [1, 2], names: [one]}]")
        + "\n help: give each value its name, or none",
    ),
    "a range upside down": (
        "axes: [{how: random, samples: 2, ranges: {seed: {min: 4, max: 2}}}]",
        "study.yaml:3: axes.0.ranges.seed.max: 2 is not more than min, which is 4"
        + at(3, 62, "axes: [{how: random, samples: 2, ranges: {seed: {min: 4, max: 2}}}]"),
    ),
    "a logarithm of nothing": (
        "axes: [{how: random, samples: 2, ranges: {seed: {min: 0, max: 2, log: true}}}]",
        "study.yaml:3: axes.0.ranges.seed.min: there is no logarithm of it"
        + at(3, 54, "axes: [{how: random, samples: 2, ranges: {seed: {min: 0, max: 2, log: true}}}]")
        + "\n help: with log, min is more than 0",
    ),
    "a bound that is no number": (
        "axes: [{how: random, samples: 2, ranges: {seed: {min: few, max: 2}}}]",
        "study.yaml:3: axes.0.ranges.seed.min: 'few' is not a number"
        + at(3, 54, "axes: [{how: random, samples: 2, ranges: {seed: {min: few, max: 2}}}]")
        + "\n help: write a number, or one with a unit as in '4 KiB'",
    ),
    "samples that a Sobol sequence cannot have": (
        "axes: [{how: sobol, samples: 5, ranges: {seed: {min: 1, max: 2}}}]",
        "study.yaml:3: axes.0.samples: 5 is not a power of two, and only these fill the space evenly"
        + at(3, 29, "axes: [{how: sobol, samples: 5, ranges: {seed: {min: 1, max: 2}}}]")
        + "\n help: 4 and 8 are near",
    ),
    "an axis twice": (
        "axes: [{how: grid, path: seed, values: [1]}, {how: zip, values: {seed: [2]}}]",
        "study.yaml:3: axes.1.values.seed: seed is an axis already"
        + at(3, 71, "axes: [{how: grid, path: seed, values: [1]}, {how: zip, values: {seed: [2]}}]")
        + "\n help: make one axis of them, with the values of both",
    ),
    "a shared setting that an axis sets": (
        "axes: [{how: grid, path: vmm.ept, values: [{}]}]\nset: {vmm.ept.levels: 4}",
        "study.yaml:4: set.vmm.ept.levels: vmm.ept.levels is an axis, which sets it at every point"
        + at(4, 22, "set: {vmm.ept.levels: 4}")
        + "\n help: leave it out here, or the axis",
    ),
    "an axis inside of another": (
        "axes: [{how: grid, path: vmm.ept, values: [{}]}, {how: grid, path: vmm.ept.levels, values: [4]}]",
        "study.yaml:3: axes.1.path: vmm.ept.levels and the axis vmm.ept set the same: vmm.ept.levels is in vmm.ept"
        + at(
            3, 67, "axes: [{how: grid, path: vmm.ept, values: [{}]}, {how: grid, path: vmm.ept.levels, values: [4]}]"
        )
        + "\n help: make one axis of them",
    ),
    "a value twice": (
        "axes: [{how: grid, path: seed, values: [1, 1]}]",
        "study.yaml:3: axes.0.values.1: 1 is there already"
        + at(3, 43, "axes: [{how: grid, path: seed, values: [1, 1]}]")
        + "\n help: give each once",
    ),
    "a point twice": (
        "axes: [{how: list, points: [{seed: 1}, {seed: 2}, {seed: 1}]}]",
        "study.yaml:3: axes.0.points.2: {'seed': 1} is there already"
        + at(3, 50, "axes: [{how: list, points: [{seed: 1}, {seed: 2}, {seed: 1}]}]")
        + "\n help: give each once",
    ),
    "values of a zip twice": (
        "axes: [{how: zip, values: {seed: [1, 1, 1], machine.cpus: [1, 2, 1]}}]",
        "study.yaml:3: axes.0.values.seed.2: (1, 1) is there already"
        + at(3, 40, "axes: [{how: zip, values: {seed: [1, 1, 1], machine.cpus: [1, 2, 1]}}]")
        + "\n help: give each once",
    ),
    "a range whose end no sample meets and no setting can have": (
        "axes: [{how: latin_hypercube, samples: 2, ranges: {machine.cpu.transitions.vm_exit_cycles: {min: -1, max: 900, integer: true}}}]",
        "study.yaml:3: machine.cpu.transitions.vm_exit_cycles: -1 cycles is out of range\n"
        "    3 |  ranges: {machine.cpu.transitions.vm_exit_cycles: {min: -1, max: 900, integer: true}}}]\n"
        f"      | {' ' * 50}^\n"
        " help: transitions.vm_exit_cycles can be 0 to 1099511627776 cycles; values: […] draws from a list",
    ),
    "a name twice": (
        "axes: [{how: grid, path: seed, values: [1, 2], names: [a, a]}]",
        "study.yaml:3: axes.0.names.1: 'a' is there already"
        + at(3, 58, "axes: [{how: grid, path: seed, values: [1, 2], names: [a, a]}]")
        + "\n help: give each once",
    ),
    "a label of nothing": (
        "labels: {slowdwn: how slow}",
        "study.yaml:3: labels.slowdwn: 'slowdwn' is no axis and no figure of a result"
        + at(3, 18, "labels: {slowdwn: how slow}")
        + "\n help: did you mean 'slowdown'?",
    ),
    "two baselines of one name": (
        "baselines: [{name: a, set: {seed: 1}}, {name: a, set: {seed: 2}}]",
        "study.yaml:3: baselines.1.name: two baselines are named 'a'"
        + at(3, 46, "baselines: [{name: a, set: {seed: 1}}, {name: a, set: {seed: 2}}]"),
    ),
    "a constraint of an axis that is none": (
        "axes: [{how: grid, path: machine.cpus, values: [1]}]\nconstraints: [machine.cups < 2]",
        "study.yaml:4: constraints.0: 'machine.cups' is no axis of this study"
        + at(4, 14, "constraints: [machine.cups < 2]")
        + "\n help: did you mean 'machine.cpus'?",
    ),
    "a constraint that compares nothing": (
        "constraints: [3 = 4]",
        "study.yaml:3: constraints.0: '3 = 4' is no comparison"
        + at(3, 14, "constraints: [3 = 4]")
        + "\n help: a constraint compares axes and values, as in 'vmm.paging != shadow or vmm.ept.page_size <= 2 MiB'",
    ),
    "a constraint with a word that there is not": (
        "axes: [{how: grid, path: seed, values: [1]}]\nconstraints: [not seed == 1]",
        "study.yaml:4: constraints.0: 'not seed == 1': there is no 'not' and there are no brackets"
        + at(4, 14, "constraints: [not seed == 1]")
        + "\n help: a constraint compares axes and values, as in 'vmm.paging != shadow or vmm.ept.page_size <= 2 MiB'; the opposite of == is !=, of < is >=",
    ),
    "a range without ends": (
        "axes: [{how: random, samples: 2, ranges: {seed: {max: 3}}}]",
        "study.yaml:3: axes.0.ranges.seed: there is nothing to draw from"
        + at(3, 48, "axes: [{how: random, samples: 2, ranges: {seed: {max: 3}}}]")
        + "\n help: give min and max, or values, or stated: true",
    ),
    "a list that is a range": (
        "axes: [{how: random, samples: 2, ranges: {seed: {max: 3, values: [1]}}}]",
        "study.yaml:3: axes.0.ranges.seed.max: values are drawn as they are"
        + at(3, 54, "axes: [{how: random, samples: 2, ranges: {seed: {max: 3, values: [1]}}}]")
        + "\n help: leave out max, or values",
    ),
    "a constraint that orders text": (
        "axes: [{how: grid, path: machine.profile, values: [skx-4114]}]\nconstraints: [machine.profile < 2]",
        "study.yaml:4: constraints.0: 'machine.profile < 2' orders things that have no order"
        + at(4, 14, "constraints: [machine.profile < 2]")
        + "\n help: order numbers; compare text by == and !=",
    ),
    "constraints that nothing passes": (
        "axes: [{how: grid, path: seed, values: [1]}]\nconstraints: [seed > 1]",
        "study.yaml:4: constraints.0: no point passes 'seed > 1'"
        + at(4, 14, "constraints: [seed > 1]")
        + "\n help: give axes values that pass, or leave the constraint out",
    ),
    "constraints that nothing passes together": (
        "axes: [{how: grid, path: seed, values: [1, 2]}]\nconstraints: [seed > 1, seed < 2]",
        "study.yaml:4: constraints: no point passes all constraints"
        + at(4, 13, "constraints: [seed > 1, seed < 2]")
        + "\n help: give axes values that pass, or leave the constraint out",
    ),
    "an interval of nothing": (
        "until: {ci: 2 %}",
        "study.yaml:3: until: there is no metric, so that no replicates would be added"
        + at(3, 7, "until: {ci: 2 %}")
        + "\n help: name the figure that is to be known well, as in metric: slowdown",
    ),
    "an unknown metric": (
        "metrics: [exits.CPUID.mean_cycle]",
        "study.yaml:3: metrics.0: 'exits.CPUID.mean_cycle' is no figure of a result: unknown key 'mean_cycle'"
        + at(3, 10, "metrics: [exits.CPUID.mean_cycle]")
        + "\n help: did you mean 'mean_cycles'?",
    ),
    "a metric that is many figures": (
        "until: {metric: cycles}",
        "study.yaml:3: until.metric: 'cycles' is not one figure"
        + at(3, 16, "until: {metric: cycles}")
        + "\n help: its keys are total, elapsed, by, by_owner",
    ),
    "an interval of what is text": (
        "until: {metric: vtsim_version}",
        "study.yaml:3: until.metric: 'vtsim_version' is no number"
        + at(3, 16, "until: {metric: vtsim_version}")
        + "\n help: name one that is a number, as in slowdown or cycles.elapsed",
    ),
    "a metric that goes on after its end": (
        "metrics: [slowdown.x]",
        "study.yaml:3: metrics.0: 'slowdown.x' is no figure of a result"
        + at(3, 10, "metrics: [slowdown.x]")
        + "\n help: slowdown has no keys",
    ),
    "a setting that scenarios do not have": (
        "axes: [{how: grid, path: machine.profil, values: [skx-4114]}]",
        "study.yaml:3: machine: unknown key 'profil'"
        + at(3, 50, "axes: [{how: grid, path: machine.profil, values: [skx-4114]}]")
        + "\n help: did you mean 'profile'?",
    ),
    "a value that a setting cannot have": (
        "axes: [{how: grid, path: machine.cpus, values: [1, many]}]",
        "study.yaml:3: machine.cpus: 'many' is not a count"
        + at(3, 51, "axes: [{how: grid, path: machine.cpus, values: [1, many]}]")
        + "\n help: a count is written like '10 M' (k, M, G, T), from 1 to 256",
    ),
    "a path that goes through a value": (
        "axes: [{how: grid, path: seed.x, values: [1]}]\nset: {seed: 3}",
        "study.yaml:3: seed: 3 is a value and has no key 'x'"
        + at(3, 42, "axes: [{how: grid, path: seed.x, values: [1]}]\n".rstrip())
        + "\n help: the path is seed",
    ),
    "a shared setting that cannot be": (
        "set: {machine.profile: skx-4115}",
        "study.yaml:3: machine.profile: unknown profile 'skx-4115'"
        + at(3, 23, "set: {machine.profile: skx-4115}")
        + "\n help: did you mean 'skx-4114'?",
    ),
    "a conflict with a line of the scenario": (
        "axes: [{how: grid, path: machine.memory, values: [32 MiB]}]",
        "small.yaml:2: vms.0.memory: 64 MiB is more than the 32 MiB of memory of the machine"
        + at(2, 10, "- memory: 64 MiB")
        + "\n help: memory can be at most 32 MiB; or raise machine.memory; this is at the point machine.memory=33554432",
    ),
}  # fmt: skip


def test_a_study_asks_something(write: Write) -> None:
    with pytest.raises(ConfigError) as raised:
        load_design(write("", question="question: ' '\n"))

    assert str(raised.value).endswith(
        "study.yaml:1: question: it asks nothing\n    1 | question: ' '\n      |           ^\n"
        " help: say in a sentence what the study answers"
    )


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_is_shown_at_its_line(case: str, write: Write, tmp_path: Path) -> None:
    text, expected = CASES[case]
    with pytest.raises(ConfigError) as raised:
        load_design(write(f"{text}\n"))

    assert str(raised.value).replace(f"{tmp_path}/", "") == expected


def test_all_mistakes_are_reported_at_once(write: Write) -> None:
    text = "axes:\n- {how: grid, path: machine.cpus, values: [0, 1]}\n- {how: grid, path: machine.profile, values: [a, b]}\n"
    with pytest.raises(ConfigError) as raised:
        load_design(write(text))

    assert [(each.line, each.message) for each in raised.value.problems] == [
        (4, "0 is less than 1"),
        (5, "unknown profile 'a'"),
        (5, "unknown profile 'b'"),
    ]


def test_a_study_says_what_it_asks_and_names_a_scenario_that_is_there(write: Write, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="missing key 'question'"):
        load_design(write("", question=""))
    path = tmp_path / "other.yaml"
    path.write_text("question: Why?\nscenario: smal.yaml\n")
    with pytest.raises(
        ConfigError,
        match=r"other.yaml:2: scenario: there is no file 'smal.yaml'\n.*\n.*\n help: it is relative to the study; scenarios in that folder: other.yaml, small.yaml",
    ):
        load_design(path)


def test_a_study_of_more_points_than_anybody_runs_is_refused_at_once(tmp_path: Path) -> None:
    axis = "  - {how: random, samples: 10000, ranges: {%s: {min: 1, max: 2}}}\n"
    axes = "".join(axis % path for path in ("seed", "machine.cpus"))
    file = tmp_path / "study.yaml"
    file.write_text(
        f"question: Q\nset: {{vms: [{{guest: {{processes: [{{phases: [{{primitive: cpuid}}]}}]}}}}]}}\naxes:\n{axes}"
    )
    with pytest.raises(ConfigError) as caught:
        load_design(file)

    assert str(caught.value) == (
        f"{file}:4: axes: 10000 x 10000 points are more than 10,000,000"
        + at(4, 2, (axis % "seed").rstrip())
        + "\n help: let some axes change together (zip), or draw from ranges (latin_hypercube)"
    )
