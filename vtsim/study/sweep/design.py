"""The points of a study: which value each axis has at each of them, found by number and in a fixed order."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any, Final

import attrs
import numpy as np
import numpy.typing as npt
from attrs import define, field, frozen

from vtsim.base.errors import ConfigError, Problem, alternatives
from vtsim.base.spec import kind_of
from vtsim.config.load import path_of
from vtsim.config.paths import setting_at, shown_value, unit_of
from vtsim.config.study import Choice, StudyFile, load_study
from vtsim.config.study_spec import (
    GridSpec,
    LatinHypercubeSpec,
    ListSpec,
    RandomSpec,
    RangeSpec,
    SobolSpec,
    StudySpec,
    UntilSpec,
    ZipSpec,
)
from vtsim.platform.spec import MachineSpec, Scenario
from vtsim.study.extras import needed
from vtsim.study.sweep.constraints import Constraint
from vtsim.study.sweep.identity import named_files
from vtsim.study.sweep.metrics import DEFAULT, column
from vtsim.study.sweep.stated import PROFILE, beyond, stated_range
from vtsim.study.sweep.store import is_store
from vtsim.study.sweep.table import Column, Value

CHECKED_IN_ADVANCE: Final = 1000  # points; of a larger study as many, evenly chosen
SHOWN_PROBLEMS: Final = 20
MOST_POINTS: Final = 10_000_000
GO_BEYOND: Final = "beyond_stated_range: true on the axis goes beyond"
EXCLUDED: Final = "give axes values that pass, or leave the constraint out"

Drawn = RandomSpec | LatinHypercubeSpec | SobolSpec
Step = tuple[tuple[Choice, Value], ...]  # what one place on an axis sets, and what tables show of it


@frozen(kw_only=True)
class Point:
    """One place in the space of settings."""

    number: int
    choices: tuple[Choice, ...]
    values: Mapping[str, Value]


@define(eq=False)
class Design:
    """All points of a study; what does not pass its constraints has a number but is none."""

    file: StudyFile
    steps: tuple[tuple[Step, ...], ...] = field(init=False)
    axes: tuple[Column, ...] = field(init=False)
    constraints: tuple[Constraint, ...] = field(init=False)
    files: dict[str, str] = field(factory=dict, init=False)  # {file that scenarios name: hash of its contents}
    built: dict[tuple[int, str], Scenario] = field(factory=dict, init=False)  # when points were checked, each used once

    def __attrs_post_init__(self) -> None:
        spec = self.spec
        self.steps = tuple(tuple(_steps(axis, f"axes.{n}", self.file)) for n, axis in enumerate(spec.axes))
        paths = [choice.path for steps in self.steps for choice, _ in steps[0]]
        self.axes = tuple(_axis_column(path, spec.labels.get(path, "")) for path in paths)
        self.constraints = tuple(Constraint.parse(text, paths) for text in spec.constraints)

    @property
    def spec(self) -> StudySpec:
        """What the user wrote."""
        return self.file.spec

    @property
    def is_grid(self) -> bool:
        """Is every value of an axis there with every value of the others?"""
        return all(isinstance(axis, GridSpec) for axis in self.spec.axes)

    @property
    def numbers(self) -> range:
        """The numbers of all points."""
        return range(prod(len(steps) for steps in self.steps))

    def place(self, number: int) -> Point:
        """Return a place in the space of settings, the last axis changing first, whatever the constraints say."""
        chosen: list[tuple[Choice, Value]] = []
        rest = number
        for steps in reversed(self.steps):
            rest, at = divmod(rest, len(steps))
            chosen[:0] = steps[at]
        values = {choice.path: value for choice, value in chosen}
        return Point(number=number, choices=tuple(choice for choice, _ in chosen), values=values)

    def point(self, number: int) -> Point | None:
        """Return the point of a number; None where a constraint forbids it."""
        point = self.place(number)
        return point if all(self._holds(n, point) for n in range(len(self.constraints))) else None

    def _holds(self, constraint: int, point: Point) -> bool:
        try:
            return self.constraints[constraint].holds(point.values)
        except ConfigError as error:
            raise self.file.placed(_under(f"constraints.{constraint}", error)) from None

    def points(self) -> Iterator[Point]:
        """Yield every point in order."""
        return (point for point in map(self.point, self.numbers) if point is not None)

    def count(self) -> int:
        """Return how many points there are."""
        return sum(1 for _ in self.points()) if self.constraints else len(self.numbers)

    def excluded(self) -> ConfigError:
        """Say which constraints leave no point over."""
        for n, constraint in enumerate(self.constraints):
            if not any(self._holds(n, self.place(number)) for number in self.numbers):
                message = f"no point passes {constraint.text!r}"
                return ConfigError(message, field=f"constraints.{n}", help=EXCLUDED)
        return ConfigError("no point passes all constraints", field="constraints", help=EXCLUDED)

    def scenario(self, point: Point, baseline: str = "") -> Scenario:
        """Return the scenario of a point or of one of its baselines; a problem says at which point it is."""
        ready = self.built.pop((point.number, baseline), None)
        if ready is not None:
            return ready
        choices = list(point.choices)
        for number, each in enumerate(self.spec.baselines):
            if each.name == baseline:
                choices += [Choice(path=path, place=f"baselines.{number}.set.{path}") for path in each.set]
        try:
            scenario = self.file.scenario(choices)
            self._within_stated_ranges(point, scenario)
            return scenario
        except ConfigError as error:
            where = ", ".join(f"{path}={value}" for path, value in point.values.items())
            raise ConfigError.of(_at_point(problem, str(self.file.path), where) for problem in error.problems) from None

    def _within_stated_ranges(self, point: Point, scenario: Scenario) -> None:
        """Raise `ConfigError` where an axis that does not say so goes beyond what sources state of a cost."""
        free = {path for axis in self.spec.axes if axis.beyond_stated_range for path, _ in _places(axis)}
        problems = []
        for choice in point.choices:
            node = self.file.study.find(choice.place)
            for each in beyond(scenario, choice.path) if choice.path not in free else ():
                problem = each.error(GO_BEYOND).problems[0]
                problems.append(node.source.problem(node.at, problem.message, path=each.path, help=problem.help))
        if problems:
            raise ConfigError.of(problems)

    def check(self) -> None:
        """Raise `ConfigError` with what cannot be at any point; of many points, some are looked at."""
        found: dict[tuple[Any, ...], Problem] = {}
        ranges = self._ranges()
        for problems in chain(self._wrong_ends(), map(self._wrong, _some(self.numbers))):
            for problem in problems:
                place = (problem.file, problem.line, problem.column)
                if (problem.line, problem.column) in ranges and problem.file == str(self.file.path):
                    found.setdefault(place, _of_a_range(problem, ranges[problem.line, problem.column]))
                else:
                    found.setdefault((*place, problem.message), problem)
            if len(found) > SHOWN_PROBLEMS:
                break
        if found:
            raise ConfigError.of(sorted(found.values(), key=lambda problem: (problem.file, problem.line or 0)))

    def _ranges(self) -> dict[tuple[int | None, int | None], RangeSpec]:
        """Where in the study each range is that numbers are drawn from: (line, column), as problems have them."""
        found: dict[tuple[int | None, int | None], RangeSpec] = {}
        for number, axis in enumerate(self.spec.axes):
            for path, span in axis.ranges.items() if isinstance(axis, Drawn) else ():
                line, column = self.file.study.find(f"axes.{number}.ranges.{path}").at
                if not span.values:
                    found[line + 1, column] = span
        return found

    def _wrong_ends(self) -> Iterator[Iterator[Problem]]:
        """The ends of ranges, which samples come near to by chance only: what is wrong with each itself."""
        first = self.place(0)
        for number, axis in enumerate(self.spec.axes):
            for path, span in axis.ranges.items() if isinstance(axis, Drawn) else ():
                for end in (span.min, span.max) if not span.values else ():
                    where = f"axes.{number}.ranges.{path}"
                    at_end = Choice(path=path, place=where, drawn=end)
                    choices = tuple(at_end if each.path == path else each for each in first.choices)
                    yield self._wrong_end(Point(number=-1, choices=choices, values={**first.values, path: end}), where)

    def _wrong_end(self, point: Point, where: str) -> Iterator[Problem]:
        """What is wrong at the line of its range, where no constraint keeps samples away from it."""
        line, column = self.file.study.find(where).at
        try:
            if all(each.holds(point.values) for each in self.constraints):
                self.scenario(point)
        except ConfigError as error:
            here = (str(self.file.path), line + 1, column)
            yield from (each for each in error.problems if (each.file, each.line, each.column) == here)

    def _wrong(self, number: int) -> Iterator[Problem]:
        try:
            point = self.point(number)
        except ConfigError as error:
            yield from error.problems
            point = self.place(number)
        for baseline in ("", *(each.name for each in self.spec.baselines)) if point else ():
            try:
                scenario = self.scenario(point, baseline)  # type: ignore[arg-type]
            except ConfigError as error:
                yield from error.problems
            else:
                self.files |= named_files(scenario)
                self.built[number, baseline] = scenario


def load_design(path: str | Path) -> Design:
    """Read a study and lay out its points; raises `ConfigError` with all that is wrong with either."""
    path = path_of(path, "a study")
    if is_store(path):
        help = f"give the study that was swept into it; vtsim study status {path} shows how far it is"
        raise ConfigError("this is the store of a study, and no study", file=str(path), help=help)
    file = _with_stated_ranges(load_study(path, _problems))
    design = Design(file)
    if prod(map(len, design.steps)) > MOST_POINTS:
        sizes = " x ".join(str(len(steps)) for steps in design.steps)
        help = "let some axes change together (zip), or draw from ranges (latin_hypercube)"
        raise file.placed(ConfigError(f"{sizes} points are more than {MOST_POINTS:,}", field="axes", help=help))
    design.check()
    if not any(True for _ in design.points()):
        raise file.placed(design.excluded())
    return design


def _with_stated_ranges(file: StudyFile) -> StudyFile:
    """Put the profile's ranges where a study draws from what sources state."""
    found: dict[tuple[int, str], RangeSpec] = {}
    set_here = [path for axis in file.spec.axes for path, _ in _places(axis)]
    written = file.base.find(PROFILE).value
    profile = written if isinstance(written, str) else MachineSpec().profile
    for number, axis in enumerate(file.spec.axes):
        for path, each in axis.ranges.items() if isinstance(axis, Drawn) else ():
            if each.stated:
                where = f"axes.{number}.ranges.{path}"
                try:
                    if PROFILE in set_here or PROFILE.partition(".")[0] in set_here:
                        message = "the profile is an axis, so that no one range is stated"
                        raise ConfigError(message, field=where, help="give min and max; or a study to each profile")
                    stated = stated_range(profile, path, where)
                except ConfigError as error:
                    raise file.placed(error) from None
                found[number, path] = attrs.evolve(each, stated=False, integer=True, min=stated.low, max=stated.high)
    if not found:
        return file
    axes = tuple(
        attrs.evolve(axis, ranges={path: found.get((n, path), each) for path, each in axis.ranges.items()})
        if isinstance(axis, Drawn) else axis
        for n, axis in enumerate(file.spec.axes)
    )  # fmt: skip
    ranges = [(n, path, each.min, each.max) for (n, path), each in found.items()]
    digest = hashlib.sha256(f"{file.digest}\0{ranges}".encode()).hexdigest()
    return attrs.evolve(file, spec=attrs.evolve(file.spec, axes=axes), digest=digest)


def metric_columns(spec: StudySpec) -> tuple[Column, ...]:
    """Return the columns of a study's metrics, and after them one for each figure against a baseline."""
    columns = [column(path, spec.labels.get(path, "")) for path in spec.metrics or DEFAULT]
    for baseline in spec.baselines:
        for path in baseline.metrics:
            of = column(path, spec.labels.get(path, ""))
            name = f"{path} against {baseline.name}"
            columns.append(
                Column(
                    path=name,
                    label=spec.labels.get(name, f"{of.label} against {baseline.name}"),
                    unit="ratio",
                    meaning=f"{of.label}, against the same point with {baseline.name}",
                )
            )
    return tuple(columns)


def _problems(spec: StudySpec) -> Iterator[Problem]:
    """What contradicts itself, or names what is not there, in a study."""
    seen: list[str] = []
    for number, axis in enumerate(spec.axes):
        for path, where in _places(axis):
            if path in seen:
                help = "make one axis of them, with the values of both"
                yield Problem(path=f"axes.{number}.{where}", message=f"{path} is an axis already", help=help)
            for other in seen:
                outer, inner = sorted((path, other), key=len)
                if inner.startswith(f"{outer}."):
                    message = f"{path} and the axis {other} set the same: {inner} is in {outer}"
                    yield Problem(path=f"axes.{number}.{where}", message=message, help="make one axis of them")
            seen.append(path)
    for path in spec.set:
        if any(f"{path}.".startswith(f"{axis}.") for axis in seen):
            message = f"{path} is an axis, which sets it at every point"
            yield Problem(path=f"set.{path}", message=message, help="leave it out here, or the axis")
    named = [(f"metrics.{n}", path) for n, path in enumerate(spec.metrics)]
    numbers = [
        (f"baselines.{number}.metrics.{n}", path)
        for number, baseline in enumerate(spec.baselines)
        for n, path in enumerate(baseline.metrics)
    ]
    numbers += [("until.metric", spec.until.metric)] if spec.until.metric else []
    for where, path in (*named, *numbers):
        try:
            column(path, number=(where, path) in numbers)
        except ConfigError as error:
            yield from _under(where, error).problems
    against = [f"{path} against {each.name}" for each in spec.baselines for path in each.metrics]
    for path in spec.labels:
        if path not in seen and path not in against and not _is_figure(path):
            help = alternatives("a label", path, [*seen, *(spec.metrics or DEFAULT), *against])
            yield Problem(path=f"labels.{path}", message=f"{path!r} is no axis and no figure of a result", help=help)
    for number, text in enumerate(spec.constraints):
        try:
            Constraint.parse(text, seen)
        except ConfigError as error:
            yield from _under(f"constraints.{number}", error).problems
    if not spec.until.metric and spec.until != UntilSpec():
        help = "name the figure that is to be known well, as in metric: slowdown"
        yield Problem(path="until", message="there is no metric, so that no replicates would be added", help=help)
    if spec.until.metric and spec.until.max < spec.replicates:
        yield Problem(
            path="until.max",
            message=f"{spec.until.max} is less than the {spec.replicates} replicates that each point has",
        )


def _is_figure(path: str) -> bool:
    try:
        column(path)
    except ConfigError:
        return False
    return True


def _places(axis: Any) -> Iterator[tuple[str, str]]:
    match axis:
        case GridSpec():
            yield axis.path, "path"
        case ZipSpec():
            yield from ((path, f"values.{path}") for path in axis.values)
        case ListSpec():
            yield from ((path, f"points.0.{path}") for path in axis.points[0])
        case RandomSpec() | LatinHypercubeSpec() | SobolSpec():
            yield from ((path, f"ranges.{path}") for path in axis.ranges)


def _under(where: str, error: ConfigError) -> ConfigError:
    return ConfigError.of(Problem(path=where, message=each.message, help=each.help) for each in error.problems)


def _at_point(problem: Problem, study: str, where: str) -> Problem:
    """A problem in the study's own lines needs no more words; in the scenario's, it depends on the point."""
    if problem.file == study or not where:
        return problem
    help = f"{problem.help}; " if problem.help else ""
    return Problem(
        message=problem.message, path=problem.path, help=f"{help}this is at the point {where}", file=problem.file,
        line=problem.line, column=problem.column, source=problem.source,
    )  # fmt: skip


def _of_a_range(problem: Problem, span: RangeSpec) -> Problem:
    """One number that was drawn cannot be: say how only those are drawn that can, once for all of the range."""
    if problem.help.endswith(GO_BEYOND):
        return problem
    ways = (
        "values: […] draws from a list"
        if span.integer
        else "integer: true draws whole numbers, values: […] from a list"
    )
    return attrs.evolve(problem, help="; ".join(part for part in (problem.help, ways) if part))


def _some(numbers: range) -> Iterator[int]:
    step = max(1, len(numbers) // CHECKED_IN_ADVANCE)
    return iter(numbers[:: step + (step % 2 == 0 and step > 1)])  # an odd step meets every value of an even axis


def _steps(axis: Any, where: str, file: StudyFile) -> Iterator[Step]:
    """Yield what each place on an axis sets."""
    match axis:
        case GridSpec():
            for n, value in enumerate(axis.values):
                choice = Choice(path=axis.path, place=f"{where}.values.{n}")
                yield ((choice, axis.names[n] if axis.names else _shown(axis.path, value)),)
        case ZipSpec():
            for n in range(len(next(iter(axis.values.values())))):
                yield tuple(
                    (Choice(path=path, place=f"{where}.values.{path}.{n}"), _shown(path, values[n]))
                    for path, values in axis.values.items()
                )
        case ListSpec():
            paths = list(axis.points[0])
            for n, point in enumerate(axis.points):
                yield tuple(
                    (Choice(path=path, place=f"{where}.points.{n}.{path}"), _shown(path, point[path])) for path in paths
                )
        case RandomSpec() | LatinHypercubeSpec() | SobolSpec():
            spans = list(axis.ranges.items())
            for sample in draws(axis):
                yield tuple(
                    _drawn_at(path, span, f"{where}.ranges.{path}", float(u))
                    for (path, span), u in zip(spans, sample, strict=True)
                )


def _drawn_at(path: str, span: RangeSpec, where: str, u: float) -> tuple[Choice, Value]:
    number = span.drawn(u)
    if span.values:
        return Choice(path=path, place=f"{where}.values.{number}"), _shown(path, span.values[int(number)])
    return Choice(path=path, place=where, drawn=number), number


def draws(axis: Drawn) -> npt.NDArray[np.float64]:
    """Return the samples of an axis in the unit cube, a row each."""
    samples, dimensions = axis.samples, len(axis.ranges)
    random = np.random.default_rng(axis.seed)
    if isinstance(axis, SobolSpec):
        qmc = needed("scipy.stats.qmc", "sobol", "a Sobol sequence")
        points: npt.NDArray[np.float64] = qmc.Sobol(dimensions, scramble=True, rng=random).random(samples)
        return points
    cube = random.random((samples, dimensions))
    if isinstance(axis, LatinHypercubeSpec):
        strata = np.stack([random.permutation(samples) for _ in range(dimensions)], axis=1)
        return (strata + cube) / samples
    return cube


def _axis_column(path: str, label: str) -> Column:
    setting = setting_at(path)
    kind = kind_of(setting) if setting else None
    return Column(
        path=path, label=label or path, unit=unit_of(kind), meaning=setting.metadata["doc"] if setting else ""
    )


def _shown(path: str, value: Any) -> Value:
    setting = setting_at(path)
    with contextlib.suppress(ConfigError):  # what the scenario says of it is better
        value = shown_value(kind_of(setting) if setting else None, value)
    return value if value is None or isinstance(value, str | int | float | bool) else json.dumps(value)
