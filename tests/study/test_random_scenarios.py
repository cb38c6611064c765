"""Guests of random scenarios see natively what they see in their VMs: `pytest -m long` runs this, for some minutes."""

from __future__ import annotations

import json
from random import Random

import pytest

from tests.study.random_scenarios import scenario
from vtsim.base.errors import ConfigError
from vtsim.config import parse_scenario, resolve
from vtsim.study.equivalence import compare
from vtsim.study.run import without_hypervisor

pytestmark = [pytest.mark.long, pytest.mark.compiled_only]
SEEDS, TRIES = 20, 120


@pytest.mark.parametrize("seed", range(SEEDS))
def test_guests_of_random_scenarios_see_the_same_natively_and_in_vms(seed: int) -> None:
    """What the configuration refuses counts as tried; nothing else may go wrong."""
    r, compared = Random(seed), 0
    for _ in range(TRIES):
        text = json.dumps(scenario(r))  # which is YAML, too
        try:
            there = resolve(parse_scenario(text), "random")
            found = compare(without_hypervisor(there), there)
        except ConfigError:
            continue
        compared += 1
        assert found.differences == (), text

    assert compared > TRIES // 10
