"""What programs give for a scenario: plain data with what a file would say, and mistakes in it, shown by their path."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import vtsim
from vtsim.base.errors import ConfigError
from vtsim.config import parse_scenario, scenario_of
from vtsim.config.nodes import DEEPEST

VMS: list[Any] = [{"guest": {"processes": [{"phases": [{"primitive": "cpuid"}]}]}}]
TEXT = "vms: [{guest: {processes: [{phases: [{primitive: cpuid}]}]}}]\nmachine: {cpus: 2, cpu: {prices: {VMREAD: 9}}}"
DATA = {"vms": VMS, "machine": {"cpus": 2, "cpu": {"prices": {"VMREAD": 9}}}}
WITHIN_ITSELF: dict[str, Any] = {}
WITHIN_ITSELF["machine"] = WITHIN_ITSELF
DEEP: dict[str, Any] = {}
for _ in range(DEEPEST + 1):
    DEEP = {"x": DEEP}


def error(call: Callable[..., object], *arguments: Any, **options: Any) -> str:
    with pytest.raises(ConfigError) as raised:
        call(*arguments, **options)
    return str(raised.value)


def test_a_mapping_is_the_scenario_that_a_file_with_it_would_be() -> None:
    assert scenario_of(DATA) == parse_scenario(TEXT)
    assert scenario_of({**DATA, "vms": tuple(VMS)}, ["machine.cpus=4"]) == parse_scenario(TEXT, ["machine.cpus=4"])


def test_elements_of_arrays_are_numbers_and_text_as_any_other() -> None:
    elements: dict[str, Any] = {
        "vms": VMS,
        "seed": np.uint16(7),
        "machine": {"cpus": np.int64(2), "profile": np.str_("skx-4114"), "cpu": {"prices": {"VMREAD": np.int8(9)}}},
        "run": {"limit": np.float64(5000.0), "baseline": np.bool_(False)},
    }
    plain = {
        "vms": VMS,
        "seed": 7,
        "machine": {"cpus": 2, "profile": "skx-4114", "cpu": {"prices": {"VMREAD": 9}}},
        "run": {"limit": 5000, "baseline": False},
    }

    assert scenario_of(elements) == scenario_of(plain)


def test_an_element_that_is_no_plain_value_is_refused() -> None:
    refused = error(scenario_of, {"vms": VMS, "seed": np.datetime64(0, "D")})

    assert refused.startswith("scenario: seed: datetime.date(1970, 1, 1) is not possible here\n")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({}, "nothing runs on this machine\n help: give it a VM under vms, or a device under dma"),
        ({"vms": {}}, "vms: a mapping is not a list\n help: begin each item with '- '"),
        ({"vms": None}, "vms: nothing is not a list\n help: begin each item with '- '"),
        ({"vms": [None]}, "vms.0: missing key 'guest'\n help: guest: mapping"),
        (
            {"vms": VMS, "machine": []},
            "machine: a list is not a mapping\n help: keys here are profile, cpus, threads, memory, nodes, frames, "
            "quantum, isa, devices, iommu, landing, cpu",
        ),
        ({"vms": VMS, "machine": {"cpus": [1]}}, "machine.cpus: a list is not possible here\n help: write count, 1 to 256"),
        (
            {"vms": VMS, "machine": {"cpus": math.nan}},
            "machine.cpus: nan is not a count\n help: a count is written like '10 M' (k, M, G, T), from 1 to 256",
        ),
        (
            {"vms": VMS, "run": {"limt": "1 ms"}},
            "run: unknown key 'limt'\n help: did you mean 'limit'? keys here are limit, work_scale, baseline",
        ),
        ({"vms": VMS, "run": {4: 1}}, "run: key 4 is not text\n help: put it in quotes"),
        (
            {"vms": VMS, "machine": {"profile": {1}}},
            "machine.profile: {1} is not possible here\n"
            " help: it can be text, a number, true, false, a list or a mapping",
        ),
        (WITHIN_ITSELF, f"machine: nested more than {DEEPEST} levels deep, or within itself"),
        (DEEP, f"{'.'.join('x' * (DEEPEST + 1))}: nested more than {DEEPEST} levels deep, or within itself"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_mapping_is_shown_by_its_path_with_what_would_be_accepted(wrong: Any, message: str) -> None:
    assert error(vtsim.run, wrong) == f"scenario: {message}"


def test_every_mistake_in_a_mapping_is_reported_at_once() -> None:
    wrong = {"vms": VMS, 4: 1, "run": {5: 1, "limit": b"1 ms"}}

    assert [line for line in error(scenario_of, wrong).splitlines() if line.startswith("scenario")] == [
        "scenario: key 4 is not text",
        "scenario: run: key 5 is not text",
        "scenario: run.limit: b'1 ms' is not possible here",
    ]


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(max_size=2),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.integers() | st.sampled_from(("vms", "machine", "vmm", "guest", "cpu", "x")), inner, max_size=3
        )
    ),
)


@given(ANYTHING)
def test_data_of_any_shape_gives_a_config_error_and_nothing_else(value: Any) -> None:
    for data in ({"vms": value}, {"vms": VMS, "machine": value}, {"vms": VMS, "vmm": value, "dma": value}):
        try:
            scenario_of(data)
        except ConfigError as refused:
            assert str(refused)


@pytest.mark.parametrize(("given_", "shown"), [(None, "nothing"), (5, "5"), ([], "a list"), (b"x.yaml", "b'x.yaml'")])
def test_what_is_neither_a_mapping_nor_a_path_is_refused(given_: Any, shown: str) -> None:
    file = "help: give the path of its file"
    for call in (vtsim.run, lambda given: vtsim.walk(given, 0)):
        assert error(call, given_) == f"{shown} is not a scenario\n {file}, or as a mapping what is in it"
    for call in (vtsim.sweep, vtsim.Study):
        assert error(call, given_) == f"{shown} is not a study\n {file}"


@pytest.mark.parametrize("sets", [None, "machine.cpus=2", {"machine.cpus": 2}, [5]])
def test_settings_are_a_list(sets: Any, tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text(TEXT)

    for scenario in (DATA, file):
        assert error(vtsim.run, scenario, sets=sets) == (
            "sets: this is no list of path=value\n help: write it like ['machine.cpus=2']"
        )


@pytest.mark.parametrize("address", [None, "0x1000", 1.0, -1])
def test_an_address_that_is_none_is_refused(address: Any) -> None:
    assert error(vtsim.walk, DATA, address) == "address: a linear address has 64 bits\n help: as in 0x10000000"


def test_an_address_may_be_the_element_of_an_array() -> None:
    assert vtsim.walk(DATA, np.uint64(0x400000)) == vtsim.walk(DATA, 0x400000)
