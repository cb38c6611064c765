from __future__ import annotations

import pytest

from vtsim.base.errors import ConfigError, Problem
from vtsim.config import parse_scenario
from vtsim.config.nodes import Source, compose
from vtsim.config.overrides import put
from vtsim.config.structure import place

CPUID = "vms: [{guest: {processes: [{phases: [{primitive: cpuid}]}]}}]\n"


def test_a_value_is_replaced_by_its_path() -> None:
    scenario = parse_scenario(
        CPUID,
        [
            "machine.profile=snb-e5-2450",
            "machine.cpu.pwc.pde.entries=0",
            "vms.0.guest.kernel.kpti=true",
            "vms.0.guest.processes.0.phases.0.iterations=10 k",
            "vms.0.devices=[pm-timer]",
        ],
    )

    assert scenario.machine.profile == "snb-e5-2450"
    assert scenario.machine.cpu == (("pwc.pde.entries", 0),)
    assert scenario.vms[0].guest.kernel.kpti is True
    assert scenario.vms[0].guest.processes[0].phases[0].iterations == 10_000  # type: ignore[attr-defined]
    assert scenario.vms[0].devices == ("pm-timer",)


def test_a_later_set_wins() -> None:
    assert parse_scenario(CPUID, ["seed=5", "seed=6"]).seed == 6


def test_a_set_replaces_a_profile_value_that_the_file_wrote_with_dots() -> None:
    text = CPUID + "machine: {cpu: {pwc.pde.entries: 8}}\n"

    assert parse_scenario(text, ["machine.cpu.pwc.pde.entries=0"]).machine.cpu == (("pwc.pde.entries", 0),)


def test_sizes_of_profile_values_have_units() -> None:
    assert parse_scenario(CPUID, ["machine.cpu.cache.l2.bytes=512 KiB"]).machine.cpu == (
        ("cache.l2.bytes", 512 * 1024),
    )


def test_a_set_below_an_alias_changes_one_place() -> None:
    text = "vms:\n- guest: &g {processes: [{phases: [{primitive: cpuid}]}]}\n- guest: *g\n"

    scenario = parse_scenario(text, ["vms.1.guest.kernel.kpti=true"])
    assert [vm.guest.kernel.kpti for vm in scenario.vms] == [False, True]


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        (
            "machine.profil=x",
            "--set machine.profil=x: machine: unknown key 'profil'\n"
            " help: did you mean 'profile'? keys here are profile, cpus, threads, memory, nodes, frames, quantum, isa, devices, "
            "iommu, landing, cpu",
        ),
        (
            "machin.profile=x",
            "--set machin.profile=x: unknown key 'machin'\n"
            " help: did you mean 'machine'? keys here are name, description, seed, machine, vmm, vms, dma, run",
        ),
        (
            "vms.3.memory=1 GiB",
            "--set vms.3.memory=1 GiB: vms: there is no item '3'\n help: items here are 0 to 0",
        ),
        (
            "dma.0.tags=1",
            "--set dma.0.tags=1: dma: there is no item '0'\n help: nothing is written at dma",
        ),
        (
            "seed",
            "--set seed: this is not path=value\n help: write it like --set machine.profile=skx-4114",
        ),
        (
            "seed=x",
            "--set seed=x: seed: 'x' is not a count\n"
            " help: a count is written like '10 M' (k, M, G, T), from 0 to 4294967295",
        ),
        (
            "vms.0.guest.processes.0.phases.0.primitive.x=1",
            "--set vms.0.guest.processes.0.phases.0.primitive.x=1: vms.0.guest.processes.0.phases.0.primitive: "
            "'cpuid' is a value and has no key 'x'\n"
            " help: write --set vms.0.guest.processes.0.phases.0.primitive=value",
        ),
    ],
)
def test_a_bad_set_is_quoted_with_what_would_be_accepted(assignment: str, expected: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_scenario(CPUID, [assignment])
    assert str(raised.value) == expected


def test_what_is_left_out_of_a_value_from_another_file_is_shown_there() -> None:
    problems: list[Problem] = []
    here, there = (
        compose(text, Source.of(name, text), problems)
        for name, text in (("here", "seed: 1\nvmm: {hosted: true}\n"), ("there", "set:\n\n  vmm: {hosted: false}\n"))
    )
    assert here is not None
    assert there is not None
    shown = place(Problem(message="wrong", path="vmm.paging"), put(here, "vmm", there.find("set.vmm")), "")

    assert (shown.file, shown.line, shown.column) == ("there", 3, 7)
