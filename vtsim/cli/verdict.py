"""`vtsim compare --equivalence` and `vtsim verdict`: what guests see, and whether that makes a virtual machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

from vtsim.base import jit
from vtsim.base.errors import ConfigError
from vtsim.cli import FINE, INTERRUPTED
from vtsim.cli.output import emit, note
from vtsim.cli.progress import Watch
from vtsim.cli.run import COMPILING
from vtsim.config import load_scenario, located, resolve
from vtsim.config.overrides import said_of
from vtsim.cpu.kernels.run import run_all
from vtsim.platform.spec import Scenario
from vtsim.study.equivalence import Equivalence, SecondRefused, compare, equivalence_json, equivalence_text
from vtsim.study.run import without_hypervisor
from vtsim.study.verdict import judge, thresholds_of, verdict_json, verdict_text

DIFFERENT: Final = 1
Found = TypeVar("Found")


def compare_runs(
    file: Path, other: Path | None, sets: tuple[str, ...], other_sets: tuple[str, ...], *, json: bool
) -> int:
    """Compare what the guests of two runs see; without a second one, natively and as the scenario says."""
    first = scenario_of(file, sets)
    if other is None and not other_sets:
        first, second = without_hypervisor(first), first
        find = lambda watch: compare(first, second, progress=watch)  # noqa: E731
    else:
        file_of_second, sets_of_second = other or file, (*(() if other else sets), *other_sets)
        options = {each: "--other-set" for each in other_sets if each not in sets}
        try:
            second = scenario_of(file_of_second, sets_of_second)
        except ConfigError as error:
            raise said_of(error, options) from None

        def find(watch: Watch) -> Equivalence:
            try:
                return compare(first, second, progress=watch)
            except SecondRefused as error:
                raise said_of(located(error, file_of_second, sets_of_second), options) from None

    found, interrupted = watched(find, file, sets)
    if interrupted:  # a run that was broken off has seen less, which is no difference
        note("stopped before there was a comparison")
        return INTERRUPTED
    emit(equivalence_json(found) + "\n" if json else equivalence_text(found))
    return FINE if found.equivalent else DIFFERENT


def watched(find: Callable[[Watch], Found], file: Path, sets: tuple[str, ...]) -> tuple[Found, bool]:
    """What was found under a progress bar, and whether the user stopped it; its mistakes are shown in the file."""
    if not jit.kernels_are_cached(run_all):
        note(COMPILING)
    with Watch(bar=True) as watch:
        try:
            found = find(watch)
        except ConfigError as error:
            raise located(error, file, sets) from None
    return found, watch.interrupted


def scenario_of(file: Path, sets: tuple[str, ...]) -> Scenario:
    """The scenario of a file, with everything decided."""
    return resolve(load_scenario(file, sets), file.stem)


def judge_scenario(file: Path, sets: tuple[str, ...], threshold: tuple[str, ...], *, json: bool) -> int:
    """Judge, print; return the exit status."""
    wanted = thresholds_of(threshold)
    scenario = scenario_of(file, sets)
    found, interrupted = watched(lambda watch: judge(scenario, wanted, progress=watch), file, sets)
    if interrupted:  # an attack that was broken off was neither contained nor did it get through
        note("stopped before there was a verdict")
        return INTERRUPTED
    emit(verdict_json(found) + "\n" if json else verdict_text(found))
    return FINE if found.is_virtual_machine else DIFFERENT
