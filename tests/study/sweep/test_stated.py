"""Costs within the ranges that sources state: profiles, axes of studies and of the command, and what a report says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from vtsim.base.errors import ConfigError
from vtsim.cpu.profile import load_profile
from vtsim.cpu.profile_file import SHIPPED
from vtsim.study.analysis.model import hold_to_stated, parse_ranges
from vtsim.study.html_report.provenance import Provenance
from vtsim.study.sweep.design import load_design

Write = Callable[..., Path]
EXIT, ENTRY = (f"machine.cpu.transitions.vm_{half}_cycles" for half in ("exit", "entry"))
READ = "machine.cpu.prices.VMREAD"
GENERAL = "Generally quoted figure, remembered and not re-read: 20 to 30 cycles"


def refused(path: Path) -> str:
    with pytest.raises(ConfigError) as raised:
        load_design(path)
    return str(raised.value).replace(str(path), "study.yaml")


# --- profiles ---------------------------------------------------------------------------------------------------
def test_exit_costs_of_the_first_part_range_over_its_two_measurements() -> None:
    """ASPLOS 2006 has 1931 and 2409; the book has 1926 for the exit, ATC 2012 has 3963 for both halves."""
    profile = load_profile("p4-672")
    half, other = (profile.sourced(f"transitions.{name}_cycles").stated for name in ("vm_exit", "vm_entry"))

    assert half and other
    assert (half.low, half.high) == (1926, 1931)
    assert (other.low, other.high) == (3963 - 1926, 2409)


def test_a_value_of_the_scenario_keeps_the_range_and_a_nearer_file_without_one_has_none(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(
        'extends = "skx-4114"\n[prices]\nVMREAD = {value = 24, unit = "cycles", source = "ESTIMATE: mine", '
        'confidence = "estimated"}\n'
    )
    set_here = load_profile("skx-4114").with_overrides({"prices.VMREAD": 99})

    assert set_here.sourced("prices.VMREAD").stated == load_profile("skx-4114").sourced("prices.VMREAD").stated
    assert load_profile(str(tmp_path / "mine.toml")).sourced("prices.VMREAD").stated is None


@pytest.mark.parametrize(
    "line, said",
    [
        ("{low = 20, high = 30}", "its range has not low, high and source\n"),
        ("[20, 30]", "its range has not low, high and source\n"),
        ('{low = 30, high = 20, source = "GENERAL: x"}', "30 to 20 is no range\n"),
        ('{low = -1, high = 30, source = "GENERAL: x"}', "-1 to 30 is no range\n"),
        ('{low = 26, high = 30, source = "GENERAL: x"}', "its value, 25, is not in its range, 26 to 30\n"),
        ('{low = 20, high = 30, source = "GENERAL"}', "its range needs the figures it is made of\n"),
        ('{low = 20, high = 30, source = "NOBODY: x"}', "unknown source 'NOBODY' of its range\n"),
        ('{low = true, high = 30, source = "GENERAL: x"}', "True to 30 is no range\n"),
    ],
)
def test_a_range_of_a_profile_is_checked_with_its_line(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "mine.toml"
    start = 'VMREAD = {value = 25, unit = "cycles", source = "GENERAL: x", confidence = "estimated", range = '
    path.write_text(f'extends = "skx-4114"\n[prices]\n{start}{line}}}\n')

    with pytest.raises(ConfigError) as raised:
        load_profile(str(path))
    assert str(raised.value).startswith(f"{path}:3: prices.VMREAD: {said}")


def test_only_costs_state_ranges(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    value = '{value = 4, unit = "entries", source = "GENERAL: x", confidence = "estimated", range = {}}'
    path.write_text(f'extends = "skx-4114"\n[pwc]\npml4e.entries = {value}\n')

    with pytest.raises(ConfigError, match="a value in entries has no range"):
        load_profile(str(path))


def test_every_stated_range_holds_its_value() -> None:
    for file in SHIPPED.glob("*.toml"):
        if file.stem != "sources":
            stated = [each for each in load_profile(file.stem).sources.values() if each.stated]
            assert all(each.stated and each.stated.low <= int(each.value) <= each.stated.high for each in stated)


# --- axes of a study --------------------------------------------------------------------------------------------
def test_a_value_beyond_the_range_is_refused_where_it_is_written(write: Write) -> None:
    axis = f"- {{how: grid, path: {READ}, values: [20, 30, 31]}}"

    assert refused(write(f"axes:\n{axis}\n")) == (
        f"study.yaml:4: {READ}: 31 cycles is beyond the stated range, 20 to 30 cycles\n"
        f"    4 | {axis}\n"
        f"      | {' ' * axis.index('31')}^\n"
        f" help: {GENERAL}; beyond_stated_range: true on the axis goes beyond"
    )


@pytest.mark.parametrize(
    "axis",
    [
        f"{{how: zip, values: {{{READ}: [19]}}}}",
        f"{{how: list, points: [{{{READ}: 19}}]}}",
        f"{{how: random, samples: 1, ranges: {{{READ}: {{min: 19, max: 30, integer: true}}}}}}",
        f"{{how: random, samples: 20, ranges: {{{READ}: {{values: [19, 20]}}}}}}",
        "{how: grid, path: machine.cpu, values: [{prices: {VMREAD: 19}}]}",
        "{how: grid, path: machine, values: [{cpu: {prices.VMREAD: 19}}]}",
        "{how: list, points: [{machine.profile: nehalem-ep, machine.cpu.prices.VMREAD: 29}]}",  # of each its own
    ],
)
def test_every_kind_of_axis_is_held_and_goes_beyond_when_told(write: Write, axis: str) -> None:
    assert "cycles is beyond the stated range" in refused(write(f"axes: [{axis}]"))
    assert load_design(write(f"axes: [{axis[:-1]}, beyond_stated_range: true}}]")).count()


def test_what_states_no_range_has_legal_limits_only(write: Write) -> None:
    assert load_design(write("axes: [{how: grid, path: machine.cpu.prices.STI, values: [0, 4000000000]}]")).count() == 2
    assert "can be 0 to 4294967296 cycles" in refused(
        write("axes: [{how: grid, path: machine.cpu.prices.STI, values: [5000000000]}]")
    )


@pytest.mark.parametrize("how", ["random", "latin_hypercube"])
def test_a_stated_range_is_drawn_from_whole_and_to_its_ends(write: Write, how: str) -> None:
    design = load_design(
        write(f"axes: [{{how: {how}, samples: 400, ranges: {{{READ}: {{stated: true}}}}}}]\nset: {{seed: 2}}\n")
    )
    values = [point.values[READ] for point in design.points()]

    assert set(values) == set(range(20, 31))


def test_the_profile_of_the_study_says_what_is_stated(write: Write) -> None:
    axis = f"axes: [{{how: random, samples: 50, ranges: {{{READ}: {{stated: true}}}}}}]\n"
    old = load_design(write(f"{axis}set: {{machine.profile: nehalem-ep}}\n"))
    new = load_design(write(axis))

    assert all(30 <= int(point.values[READ] or 0) <= 40 for point in old.points())
    assert old.file.digest != new.file.digest


def test_where_nothing_is_stated_there_is_nothing_to_draw_from(write: Write) -> None:
    said = refused(write("axes: [{how: random, samples: 2, ranges: {machine.cpu.prices.STI: {stated: true}}}]"))
    assert "no range is stated for machine.cpu.prices.STI of skx-4114\n" in said
    assert READ in said.rpartition("help: costs that state one: ")[2]

    said = refused(write(f"axes: [{{how: random, samples: 2, ranges: {{{READ}: {{stated: true, max: 9}}}}}}]"))
    assert "the range is stated\n" in said and "help: leave out max, or stated" in said

    said = refused(
        write(
            f"axes: [{{how: random, samples: 2, ranges: {{{READ}: {{stated: true}}}}}}, "
            "{how: grid, path: machine.profile, values: [skx-4114, nehalem-ep]}]"
        )
    )
    assert "the profile is an axis, so that no one range is stated\n" in said


# --- axes of the command ----------------------------------------------------------------------------------------
def test_axes_of_the_command_are_held_and_take_stated_ranges(write: Write) -> None:
    file = write("").parent / "small.yaml"
    (one,) = parse_ranges([f"{READ}=stated"], file)
    several = parse_ranges(["machine.cpu.transitions.*=stated"], file)

    assert (one.path, one.low, one.high, one.whole) == (READ, 20, 30, True)
    assert [each.path for each in several] == [EXIT, ENTRY]
    with pytest.raises(ConfigError) as raised:
        parse_ranges([f"{READ}=10..30"], file)
    assert str(raised.value) == (
        f"--axis: {READ}: 10 cycles is beyond the stated range, 20 to 30 cycles\n"
        f" help: {GENERAL}; --beyond-stated-range goes beyond"
    )
    assert parse_ranges([f"{READ}=10..30"], file, beyond_stated=True)[0].low == 10
    with pytest.raises(ConfigError, match="the profile is an axis"):
        parse_ranges([f"{READ}=stated", "machine.profile=skx-4114,nehalem-ep"], file)
    with pytest.raises(ConfigError, match=r"no cost of skx-4114 that machine.cpu.tlb.\* names states a range"):
        parse_ranges(["machine.cpu.tlb.*=stated"], file)
    with pytest.raises(ConfigError, match="no range is stated for seed of skx-4114"):
        parse_ranges(["seed=stated"], file)


def test_a_point_is_held_to_the_ranges_of_its_own_profile(write: Write) -> None:
    design = load_design(
        write(
            "axes: [{how: list, beyond_stated_range: true, points: "
            f"[{{machine.profile: nehalem-ep, {READ}: 30}}, {{machine.profile: skx-4114, {READ}: 31}}]}}]"
        )
    )
    within, outside = (design.scenario(point) for point in design.points())

    hold_to_stated(within, READ)
    hold_to_stated(outside, EXIT)
    with pytest.raises(ConfigError, match="31 cycles is beyond the stated range, 20 to 30 cycles"):
        hold_to_stated(outside, READ)


# --- what a report says -----------------------------------------------------------------------------------------
def test_provenance_says_which_costs_runs_had_beyond_their_range() -> None:
    def result(value: int, digest: str) -> dict[str, object]:
        one = {"value": value, "unit": "cycles", "source": "scenario", "confidence": "set"}
        ranges = {"prices.VMREAD": {"low": 20, "high": 30, "source": "S: 20 to 30"}}
        return {"vtsim_version": "1", "seed": 1, "approximations": [], "profile": "p", "profile_digest": digest,
                "parameters": {"values": {"prices.VMREAD": one}, "ranges": ranges}}  # fmt: skip

    (found,) = Provenance.of([result(20, "a"), result(31, "b"), result(10, "c"), result(30, "d")]).beyond

    assert (found.path, found.least, found.most, found.low, found.high) == ("prices.VMREAD", 10, 31, 20, 30)
    assert Provenance.of([result(20, "a"), result(30, "b")]).beyond == ()
