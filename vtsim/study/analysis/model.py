"""Figures of the model itself, for analyses that choose their own points: runs of a scenario with settings changed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import BrokenExecutor
from contextlib import suppress
from fnmatch import fnmatchcase
from math import isfinite
from pathlib import Path
from typing import Any

from vtsim.base.errors import ConfigError, ModelError, alternatives
from vtsim.base.spec import Quantity, kind_of
from vtsim.base.units import quantity
from vtsim.config import load_scenario, located
from vtsim.config.overrides import said_of
from vtsim.config.paths import dimension_at, setting_at
from vtsim.cpu.profile_spec import LEAVES
from vtsim.platform.spec import Scenario
from vtsim.study.analysis.sensitivity import Range
from vtsim.study.run import run
from vtsim.study.sweep.executors import Workers
from vtsim.study.sweep.identity import identity, model_version
from vtsim.study.sweep.metrics import column, figure, figures
from vtsim.study.sweep.stated import COSTS, PROFILE, Beyond, beyond, stated_range, stated_ranges
from vtsim.study.sweep.store import unpacked
from vtsim.study.sweep.table import Value
from vtsim.study.sweep.worker import DIED, Task, work

GO_BEYOND = "--beyond-stated-range goes beyond"
STATED = "stated"  # instead of the ends of a range
NEEDS_NATIVE = ("slowdown", "native.")


def setting(path: str, value: Value) -> str:
    """A value as it is written after `--set`."""
    return f"{path}={json.dumps(value) if isinstance(value, bool | float) or value is None else value}"


def settings_for(metric: str, sets: Sequence[str]) -> tuple[str, ...]:
    """The settings of every run, without the native baseline where the metric does not need it."""
    column(metric)  # refuses what no result has
    needed = metric.startswith(NEEDS_NATIVE) or ".slowdown" in metric
    return (*sets, *(() if needed else ("run.baseline=false",)))


def figure_at(file: Path, sets: Sequence[str], metric: str) -> float:
    """Run a scenario and return one figure of its result; raises `ConfigError` where it has none."""
    try:
        result = run(load_scenario(file, sets))
    except ConfigError as error:
        raise located(error, file, sets) from None
    return _number(result.to_dict(), metric, sets)


def difference(
    file: Path, sets: Sequence[str], path: str, metric: str, a: Sequence[str], b: Sequence[str],
    tell: Callable[[Value, float, float], None] = lambda *_: None, *, beyond_stated: bool = False,
) -> Callable[[Value], float]:  # fmt: skip
    """The metric under the settings `a` less that under `b`, as a function of the setting at `path`."""
    shared = settings_for(metric, sets)
    values_of = "--between" if _is_known(path) else "--axis"

    def at(value: Value) -> float:
        found = []
        for option, own in (("--a", a), ("--b", b)):
            here = setting(path, value)
            try:
                if not beyond_stated:
                    hold_to_stated(load_scenario(file, (*shared, here, *own)), path, "--between")
                found.append(figure_at(file, (*shared, here, *own), metric))
            except ConfigError as error:
                raise said_of(error, {here: values_of, **dict.fromkeys(own, option)}) from None
        first, second = found
        tell(value, first, second)
        return first - second

    return at


def evaluator(
    file: Path, sets: Sequence[str], metric: str, workers: Workers, *, beyond_stated: bool = False
) -> Callable[[Sequence[Mapping[str, Value]]], list[float]]:
    """A function from points to the metric there, whose runs are shared out among workers.

    Raises `ConfigError` where a cost at an axis is beyond what its sources state, unless `beyond_stated`.
    """
    shared = settings_for(metric, sets)

    def evaluate(points: Sequence[Mapping[str, Value]]) -> list[float]:
        version, tasks, places = model_version(), [], []
        for point in points:
            places.append((*shared, *(setting(path, value) for path, value in point.items())))
            try:
                scenario = load_scenario(file, places[-1])
            except ConfigError as error:
                raise said_of(error, dict.fromkeys(places[-1][len(shared) :], "--axis")) from None
            for path in () if beyond_stated else point:
                hold_to_stated(scenario, path)
            tasks.append(Task(identity=identity(scenario, version), version=version, scenario=scenario))
        found = []
        try:
            outcomes = list(workers.open().map(work, tasks))
        except BrokenExecutor:
            raise ConfigError(DIED, help="use fewer jobs, or smaller guests") from None
        for place, outcome in zip(places, outcomes, strict=True):
            result = unpacked(outcome.result)
            if result is None:
                raise ModelError(f"a run failed at {', '.join(place)}: {outcome.error or outcome.version}")
            found.append(_number(json.loads(result), metric, place))
        return found

    return evaluate


def _number(result: Mapping[str, Any], metric: str, sets: Sequence[str]) -> float:
    value = figure(result, metric)
    if isinstance(value, int | float) and isfinite(value):
        return float(value)
    help = alternatives("figure", metric, figures(result))
    raise ConfigError(f"the run has no figure {metric!r} with {', '.join(sets)}", field="--metric", help=help)


def _is_known(path: str) -> bool:
    """Is there such a setting, or value of a profile?"""
    return path.removeprefix(COSTS) in LEAVES if path.startswith(COSTS) else setting_at(path) is not None


def is_whole(path: str, *values: float) -> bool:
    """Does a setting take whole numbers only? One that is not known does if these values are."""
    found = setting_at(path)
    kind = None if found is None else kind_of(found)
    if isinstance(kind, Quantity):
        return kind.dimension.whole
    return all(value == int(value) for value in values)


def amount(text: str, path: str, field: str) -> float:
    """A number of whatever unit the setting at `path` has, in its base unit."""
    dimension = dimension_at(path)
    with suppress(ConfigError, ValueError):
        number = dimension.parse(text) if dimension else quantity(text)
        number = float(text) if number is None else float(number)
        if isfinite(number):
            return number
    help = dimension.accepted if dimension else "write a number, or one with a unit as in '4 KiB'"
    raise ConfigError(f"{text!r} is not a value of {path}", field=field, help=help)


def parse_ranges(
    texts: Sequence[str], file: Path, sets: Sequence[str] = (), *, beyond_stated: bool = False
) -> list[Range]:
    """Read axes of a scenario that set different things, costs of its profile within their stated ranges."""
    about_costs = any(_is_stated(text) or text.strip().startswith(COSTS) for text in texts)
    profile = load_scenario(file, sets).machine.profile if about_costs else ""
    ranges = [each for text in texts for each in _ranges(text, profile)]
    paths = [each.path for each in ranges]
    if PROFILE in paths and any(_is_stated(text) for text in texts):
        message = "the profile is an axis, so that no one range is stated"
        raise ConfigError(message, field="--axis", help="give LOW..HIGH")
    stated = {} if beyond_stated or not about_costs or PROFILE in paths else stated_ranges(profile)
    for each in ranges:
        if each.path in stated and not each.choices:
            for end in (each.low, each.high):
                _hold(Beyond.of(each.path, int(end) if each.whole else end, stated[each.path]))
    for number, each in enumerate(ranges):
        for other in ranges[:number]:
            outer, inner = sorted((each.path, other.path), key=len)
            if f"{inner}.".startswith(f"{outer}."):
                message = f"{each.path} and the axis {other.path} set the same"
                raise ConfigError(message, field="--axis", help="make one axis of them")
    return ranges


def _is_stated(text: str) -> bool:
    return text.partition("=")[2].strip() == STATED


def _ranges(text: str, profile: str) -> list[Range]:
    """Read one axis; of `PATTERN=stated` all costs that it names."""
    pattern = text.partition("=")[0].strip()
    if not _is_stated(text) or not pattern:
        return [parse_range(text)]
    ranges = stated_ranges(profile)
    paths = [path for path in ranges if fnmatchcase(path, pattern)] if "*" in pattern else [pattern]
    if not paths:
        message = f"no cost of {profile} that {pattern} names states a range"
        raise ConfigError(message, field="--axis", help=f"costs that state one: {', '.join(ranges) or 'none'}")
    found = [(path, stated_range(profile, path, "--axis")) for path in paths]
    return [Range(path=path, low=stated.low, high=stated.high, whole=True) for path, stated in found]


def hold_to_stated(scenario: Scenario, path: str, option: str = "--axis") -> None:
    """Raise `ConfigError`, said of an option, if a scenario has costs at an axis beyond their stated ranges."""
    for each in beyond(scenario, path):
        _hold(each, option)


def _hold(each: Beyond | None, option: str = "--axis") -> None:
    if each is not None:
        problem = each.error(GO_BEYOND).problems[0]
        raise ConfigError(f"{each.path}: {problem.message}", field=option, help=problem.help)


def parse_range(text: str) -> Range:
    """Read `PATH=LOW..HIGH` or `PATH=a,b,c`."""
    path, equals, values = (part.strip() for part in text.partition("="))
    low, dots, high = values.partition("..")
    if not path or not equals or not values:
        ways = "PATH=LOW..HIGH, PATH=a,b,c, or PATH=stated of a cost of the profile"
        raise ConfigError(f"{text!r} is no axis", field="--axis", help=ways)
    if dots:
        ends = [amount(end.strip(), path, "--axis") for end in (low, high)]
        if ends[0] >= ends[1]:
            raise ConfigError(f"{values} is no range", field="--axis", help="the smaller value comes first")
        return Range(path=path, low=ends[0], high=ends[1], whole=is_whole(path, *ends))
    choices = tuple(dict.fromkeys(value.strip() for value in values.split(",")))
    if len(choices) < 2:
        raise ConfigError(f"{path} has one value", field="--axis", help="PATH=LOW..HIGH, or PATH=a,b,c")
    return Range(path=path, choices=choices)
