"""From a scenario to its result: the run, and the native baseline beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from vtsim.base.trace import TraceSink
from vtsim.config import scenario_of
from vtsim.platform.machine import Machine, Progress, alone
from vtsim.platform.spec import Scenario, VmSpec
from vtsim.study.measure import result_of
from vtsim.study.result import Result
from vtsim.vmm.spec import VmmSpec


def run(
    scenario: Scenario | Mapping[str, Any] | str | Path,
    *,
    sets: Sequence[str] = (),
    trace: TraceSink | None = None,
    progress: Progress | None = None,
    native: Callable[[Scenario], Result] | None = None,
) -> Result:
    """Simulate a scenario and, unless it says otherwise, the same guests natively.

    Parameters
    ----------
    scenario: the path of a scenario file, a mapping with what a file would say, or a `Scenario`.
    sets: `path=value` settings that override those written; a `Scenario` is changed with `attrs.evolve` instead.
    trace: receives the transitions of the run (not of its baseline) as they happen.
    progress: is called from time to time; may ask the run to stop early.
    native: gives the result of a native baseline, where somebody has it already; it is simulated if not given.

    Raises `ConfigError` for a mistake in the scenario and `ModelError` for one of ours.
    """
    scenario = scenario_of(scenario, sets)
    result = simulate(scenario, trace=trace, progress=progress)
    if result.partial or not scenario.run.baseline or scenario.vmm.technique == "native" or not scenario.vms:
        return result
    alone = without_hypervisor(scenario)
    baseline = simulate(alone, progress=progress) if native is None else native(alone)
    return attrs.evolve(result, partial=True) if baseline.partial else result.against(baseline)


def simulate(scenario: Scenario, *, trace: TraceSink | None = None, progress: Progress | None = None) -> Result:
    """One variant of a scenario: under its hypervisor, or natively each guest on a machine of its own."""
    if scenario.vmm.technique != "native" or not scenario.vms:
        return result_of([Machine(scenario, trace=trace, progress=progress).run()])
    machines = [Machine(alone(scenario, vm), trace=trace, progress=progress) for vm in scenario.vms]
    return result_of([machine.run() for machine in machines])


def without_hypervisor(scenario: Scenario) -> Scenario:
    """The same guests on the same machine, each natively: whatever would have been below them, it is the same."""
    vmm = VmmSpec(technique="native", paging="none")
    return attrs.evolve(scenario, vmm=vmm, vms=tuple(map(_unmodified, scenario.vms)))


def _unmodified(vm: VmSpec) -> VmSpec:
    """The same VM with a kernel that needs no hypervisor, where its own is built for one."""
    if vm.guest.kernel.interface != "paravirtual":
        return vm
    kernel = attrs.evolve(vm.guest.kernel, interface="auto")
    return attrs.evolve(vm, guest=attrs.evolve(vm.guest, kernel=kernel))
