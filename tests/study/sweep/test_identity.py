"""Points of a sweep: same scenario and version, same point."""

from __future__ import annotations

from vtsim.config import parse_scenario
from vtsim.study.sweep.identity import identity, replicate

SMALL = "vms: [{guest: {processes: [{phases: [{primitive: cpuid}]}]}}]"


def test_a_setting_written_out_is_the_same_point_as_its_default() -> None:
    assert identity(parse_scenario(SMALL)) == identity(parse_scenario(SMALL, ["machine.cpus=1"]))


def test_every_setting_and_the_version_make_another_point() -> None:
    scenario = parse_scenario(SMALL)
    others = [identity(parse_scenario(SMALL, [change])) for change in ("seed=2", "machine.memory=2 GiB")]

    assert len({identity(scenario), identity(scenario, "another"), *others}) == 4


def test_replicates_have_seeds_of_their_own_whatever_the_order() -> None:
    scenario = parse_scenario(SMALL)
    seeds = [replicate(scenario, number).seed for number in range(20)]

    assert seeds[0] == scenario.seed
    assert len(set(seeds)) == 20
    assert [replicate(scenario, number).seed for number in reversed(range(20))] == seeds[::-1]
