"""From a scenario to its result: the run, and the native baseline beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import attrs

from vtsim.base.trace import TraceSink
from vtsim.config import load_scenario
from vtsim.platform.machine import simulate
from vtsim.platform.spec import Scenario
from vtsim.study.result import Result


class Progress(Protocol):
    """Who is told how far a run is, and says whether it goes on."""

    def __call__(self, stage: str, done: float, instructions: int) -> bool:
        """`done` is 0 to 1 within the stage; returning False asks for a partial result."""
        ...


def run(
    scenario: Scenario | str | Path,
    *,
    sets: Sequence[str] = (),
    trace: TraceSink | None = None,
    progress: Progress | None = None,
    restore: Path | None = None,
    save: Path | None = None,
) -> Result:
    """Simulate a scenario and, unless it says otherwise, the same guests natively.

    Parameters
    ----------
    scenario: a scenario, or the path of a scenario file.
    sets: `path=value` settings that override those of the file.
    trace: receives the transitions of the run (not of its baseline) as they happen.
    progress: is called from time to time; may ask the run to stop early.
    restore: a file of saved state from which the run continues.
    save: where the state at the end of the run is written.

    Raises `ConfigError` for a mistake in the scenario and `ModelError` for one of ours.
    """
    if not isinstance(scenario, Scenario):
        scenario = load_scenario(scenario, sets)
    result = simulate(scenario, trace=trace, progress=progress, restore=restore, save=save)
    if result.partial or not scenario.run.baseline or scenario.vmm.technique == "native":
        return result
    native = simulate(without_hypervisor(scenario), progress=progress)
    return attrs.evolve(result, partial=True) if native.partial else result.against(native)


def without_hypervisor(scenario: Scenario) -> Scenario:
    """The same guests on the same machine, each natively."""
    vmm = attrs.evolve(scenario.vmm, technique="native", paging="none")
    return attrs.evolve(scenario, vmm=vmm)
