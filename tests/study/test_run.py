"""A run and its native baseline, with the engine replaced by one that answers at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import pytest

from vtsim.base.errors import ConfigError
from vtsim.config import parse_scenario
from vtsim.platform.spec import Scenario
from vtsim.study import run as module
from vtsim.study.result import Result
from vtsim.study.run import run, without_hypervisor

SMALL = "vms: [{name: kv, guest: {processes: [{phases: [{primitive: cpuid}]}]}}]"


class Engine:
    """Takes 300 cycles natively and 600 under a hypervisor."""

    def __init__(self, result: Result) -> None:
        self.result = attrs.evolve(result, native=None, slowdown=None, vms={"kv": result.vms["kv"]}, stopped={})
        self.calls: list[tuple[Scenario, dict[str, Any]]] = []
        self.interrupt: tuple[str, ...] = ()

    def simulate(self, scenario: Scenario, **options: Any) -> Result:
        self.calls.append((scenario, options))
        technique = scenario.vmm.technique
        cycles = attrs.evolve(self.result.cycles, elapsed=300 if technique == "native" else 600)
        return attrs.evolve(self.result, cycles=cycles, partial=technique in self.interrupt)


@pytest.fixture
def engine(result: Result, monkeypatch: pytest.MonkeyPatch) -> Engine:
    fake = Engine(result)
    monkeypatch.setattr(module, "simulate", fake.simulate)
    return fake


def test_a_run_is_compared_with_the_same_guests_without_a_hypervisor(engine: Engine) -> None:
    scenario = parse_scenario(SMALL)

    result = run(scenario)

    assert result.slowdown == 2.0
    assert [call[0] for call in engine.calls] == [scenario, without_hypervisor(scenario)]
    native = engine.calls[1][0]
    assert (native.vmm.technique, native.vms) == ("native", scenario.vms)


@pytest.mark.parametrize("sets", [["run.baseline=false"], ["vmm.technique=native", "vmm.paging=none"]])
def test_no_baseline_is_run_where_none_is_wanted(engine: Engine, sets: list[str]) -> None:
    result = run(parse_scenario(SMALL, sets))

    assert (len(engine.calls), result.native, result.slowdown) == (1, None, None)


def test_an_interrupted_run_has_no_baseline(engine: Engine) -> None:
    engine.interrupt = ("hardware",)

    result = run(parse_scenario(SMALL))

    assert (len(engine.calls), result.partial, result.native) == (1, True, None)


def test_an_interrupted_baseline_is_left_out(engine: Engine) -> None:
    engine.interrupt = ("native",)

    result = run(parse_scenario(SMALL))

    assert (len(engine.calls), result.partial, result.native) == (2, True, None)


def test_only_the_run_itself_is_traced(engine: Engine) -> None:
    sink: Any = object()

    run(parse_scenario(SMALL), trace=sink)

    first, second = (options for _, options in engine.calls)
    assert first == {"trace": sink, "progress": None}
    assert second == {"progress": None}


def test_a_path_is_read_with_its_settings(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)

    run(path, sets=["seed=7"])

    assert (engine.calls[0][0].name, engine.calls[0][0].seed) == ("small", 7)


def test_settings_for_a_scenario_that_is_no_file_are_refused(engine: Engine) -> None:
    with pytest.raises(ConfigError) as raised:
        run(parse_scenario(SMALL), sets=["seed=7"])

    assert str(raised.value) == "sets: settings override those of a file\n help: use attrs.evolve on the scenario"
