"""Sweeps with the engine replaced by one that answers at once, with figures that follow from the scenario."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import attrs
import pytest

from vtsim.base.errors import ModelError
from vtsim.platform.spec import Scenario
from vtsim.study.result import Result
from vtsim.study.sweep import worker
from vtsim.study.sweep.identity import resolved_text

GOLDEN = Path(__file__).parents[2] / "golden" / "result.json"
SCENARIO = (
    "vms:\n- memory: 64 MiB\n  guest:\n    processes:\n    - phases:\n      - {primitive: cpuid, iterations: 5}\n"
)
BROKEN_SEED = 666


class Now(Executor):
    """Does what it is given before it returns."""

    def submit(self, function: Any, /, *arguments: Any, **keywords: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(function(*arguments, **keywords))
        return future


class Engine:
    """Answers with a result whose slowdown follows from the scenario; fails for one seed."""

    def __init__(self) -> None:
        self.result = Result.from_dict(json.loads(GOLDEN.read_text()))
        self.ran: list[Scenario] = []
        self.before: Callable[[Scenario], None] = lambda _: None
        self.slowdown: Callable[[Scenario], float] = self.by_hash

    @staticmethod
    def by_hash(scenario: Scenario) -> float:
        return 1 + hashlib.sha256(resolved_text(scenario).encode()).digest()[0] / 256

    def run(self, scenario: Scenario, native: object = None) -> Result:
        self.ran.append(scenario)
        self.before(scenario)
        if scenario.seed == BROKEN_SEED:
            raise ModelError("a law is broken", {"cycles": 1})
        rate = attrs.evolve(self.result.rate, wall_s=time.perf_counter())  # differs from run to run
        return attrs.evolve(self.result, seed=scenario.seed, slowdown=self.slowdown(scenario), rate=rate)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    fake = Engine()
    monkeypatch.setattr(worker, "run", fake.run)
    return fake


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write a study of a small scenario; the scenario lies beside it."""

    def written(text: str, name: str = "study.yaml", *, question: str = "question: How much?\n") -> Path:
        (tmp_path / "small.yaml").write_text(SCENARIO)
        path = tmp_path / name
        path.write_text(f"{question}scenario: small.yaml\n{text}")
        return path

    return written
