"""One scenario under several techniques: which of them it can have, and what each makes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

from attrs import evolve, frozen

from vtsim.base.errors import ConfigError
from vtsim.config import reader
from vtsim.platform.machine import Progress
from vtsim.platform.spec import MACHINE_ISA, Scenario
from vtsim.study import run as runs
from vtsim.study.result import Result
from vtsim.vmm.techniques import techniques

NATIVE: Final = "native"
SLOWER: Final = 100  # times the time limit for programs that execute guests: it is there against guests that hang
LEFT_OPEN: Final = ("vmm.paging=auto", "vmm.vpid=auto", "vmm.tpr_shadow=auto", "vmm.hosted=false")


@frozen(kw_only=True)
class Comparison:
    """One scenario under several techniques: their results, and why the others did not run."""

    scenario: str
    description: str
    results: Mapping[str, Result]
    refused: Mapping[str, str]


def chosen(names: Iterable[str] | None = None) -> tuple[str, ...]:
    """The techniques named, or all, `native` first; raises `ConfigError` for a name of none and for one given twice."""
    known = tuple(techniques)
    wanted = known if names is None else tuple(name.strip() for name in names)
    for number, name in enumerate(wanted):
        if name in wanted[:number]:
            raise ConfigError(f"{name} is named twice", field="--techniques", help="name each once")
        if name not in known:
            raise ConfigError.unknown("technique", name, known, field="--techniques")
    return tuple(sorted(wanted, key=lambda name: name != NATIVE))


Reader = Callable[[Sequence[str]], Scenario]


def variant(read: Reader, technique: str, sets: Sequence[str] = ()) -> Scenario:
    """The scenario under a technique. What the file says of VT-x counts where the technique has that.

    Raises `ConfigError` where the technique cannot run the scenario.
    """
    asked = [*sets, f"vmm.technique={technique}", "run.baseline=false"]
    try:
        found = read(asked)
    except ConfigError:
        found = read([*asked, *LEFT_OPEN])
    longer = SLOWER if techniques[technique].in_software else 1
    return evolve(found, run=evolve(found.run, limit=found.run.limit * longer))


def compare_scenario(
    file: Path,
    names: Sequence[str],
    *,
    sets: Sequence[str] = (),
    progress: Progress | None = None,
) -> Comparison:
    """Run a scenario file under each of the techniques; the slowdowns are against `native`, which always runs.

    Raises `ConfigError` for a mistake in the scenario, which every technique would refuse.
    """
    read = reader(file)
    baseline = _baseline(read, sets)
    if not baseline.vms:
        raise ConfigError("there is no VM that a technique could run", field="vms", help="give the scenario a VM")
    native = runs.simulate(baseline, progress=progress)
    results, refused = {}, {}
    for name in names:
        if native.partial:
            break
        try:
            scenario = variant(read, name, sets)
            found = native if name == NATIVE else runs.simulate(scenario, progress=_named(progress, name))
        except ConfigError as error:
            refused[name] = error.problems[0].message
            continue
        if found.partial:
            break
        results[name] = found.against(native)
    return Comparison(
        scenario=native.scenario, description=native.description, results=results, refused=refused
    )  # fmt: skip


def _baseline(read: Reader, sets: Sequence[str]) -> Scenario:
    """The guests natively; those of another instruction set as if they had been compiled for this one."""
    try:
        return runs.without_hypervisor(variant(read, NATIVE, sets))
    except ConfigError as error:
        for name in techniques:
            try:
                found = runs.without_hypervisor(variant(read, name, sets))
            except ConfigError:
                continue
            return evolve(found, vms=tuple(evolve(vm, isa=MACHINE_ISA) for vm in found.vms))
        raise error from None


def _named(progress: Progress | None, technique: str) -> Progress | None:
    """A bar of its own for each technique."""
    if progress is None:
        return None
    return lambda stage, done, instructions: progress(technique, done, instructions)
