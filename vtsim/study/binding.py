"""How a published row is computed from runs: which scenarios, which settings, what is read from the results.

A binding is one registration in `vtsim/study/bindings/`, one file per family of rows; it sees results only.
"""

from __future__ import annotations

import re
from calendar import month_abbr
from collections.abc import Callable, Sequence
from typing import Any, Final

from attrs import evolve, frozen

from vtsim.base.errors import ModelError
from vtsim.base.registry import Registry
from vtsim.study.published import Row, row

PHASE: Final = "vms.0.guest.processes.0.phases.0"
SECOND: Final = "vms.0.guest.processes.1.phases.0"  # of the second process
ITERATIONS: Final = 2000
STATED: Final = re.compile(r"(?:Linux|kernel) ~?(\d+)\.(\d+)")
OLD: Final = (5, 10)  # of December 2020: older ones are nearer to 4.19 of October 2018 than to 6.1 of December 2022
PRINTED: Final = re.compile(r"(?:\b([A-Z][a-z]{2})[a-z]* )?\b((?:19|20)\d\d)\b")
MONTHS: Final = {name: number for number, name in enumerate(month_abbr) if name}
FIRST_NEWER: Final = (2020, 12)


@frozen(kw_only=True)
class Run:
    """One simulation: a scenario file and what is set in it, as after `--set`."""

    scenario: str
    sets: tuple[str, ...] = ()
    baseline: bool = True


@frozen(kw_only=True)
class Figure:
    """One published figure and how it is simulated.

    `published` is a dotted path into the row's values, or a function of the row where the figure follows from
    several of them. `compute` is given the results of `runs`, in that order.
    """

    key: str
    published: str | Callable[[Row], float]
    runs: tuple[Run, ...]
    compute: Callable[[Sequence[Any]], float]
    unit: str
    tolerance_percent: float | None = None
    note: str = ""

    def hardware(self, of: Row) -> float:
        """Return the figure that the real machine gave."""
        return of.value(self.published) if isinstance(self.published, str) else self.published(of)


@frozen(kw_only=True)
class Binding:
    """The figures of one published row that can be simulated, why the others cannot, and why they deviate."""

    row: str
    figures: tuple[Figure, ...]
    unbound: str = ""
    deviates: str = ""

    def __attrs_post_init__(self) -> None:
        of = row(self.row)
        for figure in self.figures:
            figure.hardware(of)
            if of.split == "validate" and figure.tolerance_percent is not None:
                raise ModelError(
                    f"{self.row}: {figure.key} has a tolerance, and a row marked validate is only reported"
                )


bindings: Registry[str, Binding] = Registry("binding")


def old_kernel(id: str) -> str:
    """The Linux that a row states, if it is nearer in time to 4.19 than to 6.1, or nothing."""
    of = row(id)
    stated = STATED.search(f"{of.hardware}; {of.conditions}")
    if stated is None or tuple(map(int, stated.groups())) >= OLD:
        return ""
    return ".".join(stated.groups())


def old_host(id: str) -> str:
    """The Linux of a row's host if it is nearer in time to 4.19: stated, or KVM of a source older than Linux 5.10.

    A source measured no KVM that is newer than itself; what its guests were it leaves open.
    """
    of = row(id)
    printed = [(int(year), MONTHS.get(month, 12)) for month, year in PRINTED.findall(of.source)]
    old = "KVM" in f"{of.id}; {of.source}; {of.hardware}; {of.conditions}" and printed and max(printed) < FIRST_NEWER
    return old_kernel(id) or (f"KVM of {max(printed)[0]}" if old else "")


def _with(setting: str, figure: Figure) -> Figure:
    return evolve(figure, runs=tuple(evolve(run, sets=(setting, *run.sets)) for run in figure.runs))


def bind(row: str, *figures: Figure, unbound: str = "", deviates: str = "") -> None:
    """Register how a row is simulated, with kernels of guests and of the host of the age that it states.

    `unbound` says which of its figures are not, and why; `deviates` which mechanisms are behind large deviations.
    """
    if old_host(row):
        figures = tuple(_with("vmm.lengths=linux-4.19", figure) for figure in figures)
    if old_kernel(row):
        figures = tuple(_with("vms.0.guest.kernel.lengths=linux-4.19", figure) for figure in figures)
    bindings.register(row)(Binding(row=row, figures=figures, unbound=unbound, deviates=deviates))


# --- what is read from results ------------------------------------------------------------------------------


def repeated(scenario: str, *sets: str) -> tuple[Run, ...]:
    """Return two runs, without a timer tick, of `ITERATIONS` and of three times as many repetitions."""
    quiet = (*sets, "vms.0.guest.kernel.tick=off")
    return tuple(
        Run(scenario=scenario, sets=(*quiet, f"{PHASE}.iterations={times}"), baseline=False)
        for times in (ITERATIONS, 3 * ITERATIONS)
    )


def grown(scenario: str, *sets: str, short: Sequence[str], long: Sequence[str]) -> tuple[Run, ...]:
    """Return two runs, without a timer tick, that differ in how much there is to do."""
    quiet = (*sets, "vms.0.guest.kernel.tick=off")
    return tuple(Run(scenario=scenario, sets=(*quiet, *size), baseline=False) for size in (short, long))


def cycles_grown(units: float) -> Callable[[Sequence[Any]], float]:
    """Return the cycles of one of so many units of work that the second run has more than the first."""
    return lambda results: float(results[1].cycles.elapsed - results[0].cycles.elapsed) / units


def cycles_of_pairs(results: Sequence[Any]) -> list[int]:
    """Return the cycles that each second run has more than the one before it."""
    elapsed = [int(result.cycles.elapsed) for result in results]
    return [longer - shorter for shorter, longer in zip(elapsed[::2], elapsed[1::2], strict=True)]


def exits_grown(units: float, *reasons: str) -> Callable[[Sequence[Any]], float]:
    """Return the exits of some reasons per unit of work that the second run has more than the first."""

    def compute(results: Sequence[Any]) -> float:
        short, long = (exits_of(result, *reasons) for result in results)
        return (long - short) / units

    return compute


def exits_of(result: Any, *reasons: str) -> int:
    """Return how many exits of some reasons there were, of all if none is named."""
    return sum(exit.count for exit in result.exits if not reasons or exit.reason in reasons)


def cycles_per_repetition(results: Sequence[Any]) -> float:
    """Return what one repetition adds to the clock: start-up and the way out cancel."""
    short, long = results
    return float(long.cycles.elapsed - short.cycles.elapsed) / (2 * ITERATIONS)


def exits_per_repetition(results: Sequence[Any]) -> float:
    """Return how many VM exits one repetition adds."""
    short, long = (sum(exit.count for exit in result.exits) for result in results)
    return float(long - short) / (2 * ITERATIONS)


def activity_cycles(result: Any, *activities: str) -> int:
    """Return the cycles of some activities, over all privilege states."""
    return sum(by.get(activity, 0) for by in result.cycles.by.values() for activity in activities)


def cycles_per_exit(*activities: str) -> Callable[[Sequence[Any]], float]:
    """Return the mean cycles that some activities of the CPU take per VM exit."""

    def compute(results: Sequence[Any]) -> float:
        exits = sum(exit.count for exit in results[0].exits)
        return activity_cycles(results[0], *activities) / exits if exits else 0.0

    return compute


def quotient(of: Callable[[Sequence[Any]], float], split: int) -> Callable[[Sequence[Any]], float]:
    """Return what `of` says of the first `split` results over what it says of the others."""

    def compute(results: Sequence[Any]) -> float:
        below = of(results[split:])
        return of(results[:split]) / below if below else 0.0

    return compute
