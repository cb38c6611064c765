"""Whole Sobol and Morris studies of the engine itself, against differences of single runs.

The cycles of a guest that does nothing but exit are a sum over prices, each as often as its operation is executed, so
both have closed forms: a setting's share is (count × deviation of its values)² over the sum of these. Counts come from
two runs for each setting, at the ends of its range, and not from the samples.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vtsim.study.analysis.model import figure_at, settings_for
from vtsim.study.sweep.stated import stated_ranges

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(importlib.util.find_spec("SALib") is None, reason="the extra analysis is not installed"),
]
FILE = Path(__file__).parents[2] / "workloads/vmexit/cpuid.yaml"
ITERATIONS = 100
SETS = (f"vms.0.guest.processes.0.phases.0.iterations={ITERATIONS}",)
METRIC = "cycles.elapsed"
EXIT, ENTRY = (f"machine.cpu.transitions.vm_{half}_cycles" for half in ("exit", "entry"))
READ, NEVER = "machine.cpu.prices.VMREAD", "machine.cpu.prices.VMFUNC"  # nothing here executes VMFUNC
PATHS = (EXIT, ENTRY, READ, NEVER)


def shown(vtsim: Callable[..., Any], method: str, samples: int) -> dict[str, dict[str, float]]:
    axes = [part for path in PATHS for part in ("--axis", f"{path}=stated")]
    sets = [part for each in SETS for part in ("--set", each)]
    command = ["study", "sensitivity", str(FILE), "--metric", METRIC, "--method", method, "--samples", str(samples)]
    outcome = vtsim(*command, *axes, *sets, "--json", "-j", "2")
    assert outcome.status == 0, outcome.err
    return {each["path"]: each for each in json.loads(outcome.out)["settings"]}


@pytest.fixture(scope="module")
def counts() -> dict[str, float]:
    """How often each price is paid: the difference of two runs, over that of the prices."""
    shared, found = settings_for(METRIC, SETS), {}
    for path in PATHS:
        stated = stated_ranges("skx-4114")[path]
        low, high = (figure_at(FILE, (*shared, f"{path}={end}"), METRIC) for end in (stated.low, stated.high))
        found[path] = (high - low) / (stated.high - stated.low)
    return found


def variance(path: str) -> float:
    """Of whole numbers, each as likely: (n² - 1) / 12."""
    stated = stated_ranges("skx-4114")[path]
    return ((stated.high - stated.low + 1) ** 2 - 1) / 12


def test_sobol_of_exit_costs_is_its_closed_form(vtsim: Callable[..., Any], counts: dict[str, float]) -> None:
    found = shown(vtsim, "sobol", 64)
    parts = {path: counts[path] ** 2 * variance(path) for path in PATHS}

    assert counts[EXIT] >= ITERATIONS and counts[NEVER] == 0
    for path, each in found.items():
        exact = parts[path] / sum(parts.values())
        assert each["alone"] == pytest.approx(exact, abs=each["alone_half_width"] + 1e-9), path
        assert each["total"] == pytest.approx(exact, abs=each["total_half_width"] + 1e-9), path
        assert each["total"] >= each["alone"] - each["alone_half_width"] - each["total_half_width"], path
    assert abs(found[NEVER]["alone"]) <= found[NEVER]["alone_half_width"] + 1e-9
    assert found[NEVER]["total"] == 0
    assert sum(each["alone"] for each in found.values()) == pytest.approx(
        1, abs=sum(each["alone_half_width"] for each in found.values())
    )


def test_morris_of_exit_costs_is_their_count_times_the_range(
    vtsim: Callable[..., Any], counts: dict[str, float]
) -> None:
    """Steps are two thirds of a range, whose ends whole numbers round by one at most."""
    found = shown(vtsim, "morris", 6)

    assert (found[NEVER]["mean"], found[NEVER]["spread"]) == (0, 0)
    for path in (EXIT, ENTRY, READ):
        stated = stated_ranges("skx-4114")[path]
        width = stated.high - stated.low
        assert found[path]["mean"] == pytest.approx(counts[path] * width, abs=counts[path] * 1.5), path
        assert found[path]["spread"] <= counts[path] * 1.5
    assert found[EXIT]["mean"] > found[ENTRY]["mean"] > found[READ]["mean"] * 0
