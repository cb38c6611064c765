"""The command line with the engine replaced by one that answers at once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest

from vtsim.base import jit, trace
from vtsim.cli import main
from vtsim.platform.spec import Scenario
from vtsim.study import run as module
from vtsim.study.result import Result

SMALL = "vms:\n- guest:\n    processes:\n    - phases:\n      - {primitive: cpuid}\n"


class Engine:
    """Answers with one result, after whatever a test wants to happen first."""

    def __init__(self) -> None:
        written = (Path(__file__).parents[1] / "golden" / "result.json").read_text()
        self.result = attrs.evolve(Result.from_dict(json.loads(written)), native=None, slowdown=None)
        self.before: Callable[[Any], None] = lambda progress: None
        self.scenarios: list[Scenario] = []

    def simulate(self, scenario: Scenario, **options: Any) -> Result:
        self.scenarios.append(scenario)
        self.before(options["progress"])
        sink = options.get("trace")
        if sink is not None:
            sink.take(trace.TraceEvent(at, 0, 2, 0, trace.EXIT, 10, 784, (at, 0, 0)) for at in range(3))
        goes_on = options["progress"]("kvm", 1.0, 1000)
        return attrs.evolve(self.result, seed=scenario.seed, partial=not goes_on)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    fake = Engine()
    monkeypatch.setattr(module, "simulate", fake.simulate)
    monkeypatch.setattr(jit, "kernels_are_cached", lambda *_: True)
    return fake


@pytest.fixture
def scenario(tmp_path: Path) -> str:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return str(path)


@attrs.frozen
class Outcome:
    status: int
    out: str
    err: str


@pytest.fixture
def vtsim(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run a command; what it returned and printed."""

    def command(*arguments: str) -> Outcome:
        status = main(arguments)
        captured = capsys.readouterr()
        return Outcome(status, captured.out, captured.err)

    return command
