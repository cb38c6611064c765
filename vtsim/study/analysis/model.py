"""Figures of the model itself, for analyses that choose their own points: runs of a scenario with settings changed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import BrokenExecutor
from contextlib import suppress
from math import isfinite
from pathlib import Path
from typing import Any

from vtsim.base.errors import ConfigError, ModelError, alternatives
from vtsim.base.spec import Quantity, kind_of
from vtsim.base.units import quantity
from vtsim.config import load_scenario, located
from vtsim.config.overrides import said_of
from vtsim.config.paths import setting_at
from vtsim.study.analysis.sensitivity import Range
from vtsim.study.run import run
from vtsim.study.sweep.executors import Workers
from vtsim.study.sweep.identity import identity, model_version
from vtsim.study.sweep.metrics import column, figure, figures
from vtsim.study.sweep.store import unpacked
from vtsim.study.sweep.table import Value
from vtsim.study.sweep.worker import DIED, Task, work

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
    tell: Callable[[Value, float, float], None] = lambda *_: None,
) -> Callable[[Value], float]:  # fmt: skip
    """The metric under the settings `a` less that under `b`, as a function of the setting at `path`."""
    shared = settings_for(metric, sets)

    def at(value: Value) -> float:
        found = []
        for option, own in (("--a", a), ("--b", b)):
            here = setting(path, value)
            try:
                found.append(figure_at(file, (*shared, here, *own), metric))
            except ConfigError as error:
                raise said_of(error, {here: "--axis", **dict.fromkeys(own, option)}) from None
        first, second = found
        tell(value, first, second)
        return first - second

    return at


def evaluator(
    file: Path, sets: Sequence[str], metric: str, workers: Workers
) -> Callable[[Sequence[Mapping[str, Value]]], list[float]]:
    """A function from points to the metric there, whose runs are shared out among workers."""
    shared = settings_for(metric, sets)

    def evaluate(points: Sequence[Mapping[str, Value]]) -> list[float]:
        version, tasks, places = model_version(), [], []
        for point in points:
            places.append((*shared, *(setting(path, value) for path, value in point.items())))
            try:
                scenario = load_scenario(file, places[-1])
            except ConfigError as error:
                raise said_of(error, dict.fromkeys(places[-1][len(shared) :], "--axis")) from None
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


def is_whole(path: str, *values: float) -> bool:
    """Does a setting take whole numbers only? One that is not known does if these values are."""
    found = setting_at(path)
    kind = None if found is None else kind_of(found)
    if isinstance(kind, Quantity):
        return kind.dimension.whole
    return all(value == int(value) for value in values)


def amount(text: str, path: str, field: str) -> float:
    """A number of whatever unit the setting at `path` has, in its base unit."""
    found = setting_at(path)
    kind = None if found is None else kind_of(found)
    with suppress(ConfigError, ValueError):
        number = kind.dimension.parse(text) if isinstance(kind, Quantity) else quantity(text)
        number = float(text) if number is None else float(number)
        if isfinite(number):
            return number
    help = kind.dimension.accepted if isinstance(kind, Quantity) else "write a number, or one with a unit as in '4 KiB'"
    raise ConfigError(f"{text!r} is not a value of {path}", field=field, help=help)


def parse_ranges(texts: Sequence[str]) -> list[Range]:
    """Read axes that set different things."""
    ranges = [parse_range(text) for text in texts]
    for number, each in enumerate(ranges):
        for other in ranges[:number]:
            outer, inner = sorted((each.path, other.path), key=len)
            if f"{inner}.".startswith(f"{outer}."):
                message = f"{each.path} and the axis {other.path} set the same"
                raise ConfigError(message, field="--axis", help="make one axis of them")
    return ranges


def parse_range(text: str) -> Range:
    """Read `PATH=LOW..HIGH` or `PATH=a,b,c`."""
    path, equals, values = (part.strip() for part in text.partition("="))
    low, dots, high = values.partition("..")
    if not path or not equals or not values:
        raise ConfigError(f"{text!r} is no axis", field="--axis", help="PATH=LOW..HIGH, or PATH=a,b,c")
    if dots:
        ends = [amount(end.strip(), path, "--axis") for end in (low, high)]
        if ends[0] >= ends[1]:
            raise ConfigError(f"{values} is no range", field="--axis", help="the smaller value comes first")
        return Range(path=path, low=ends[0], high=ends[1], whole=is_whole(path, *ends))
    choices = tuple(dict.fromkeys(value.strip() for value in values.split(",")))
    if len(choices) < 2:
        raise ConfigError(f"{path} has one value", field="--axis", help="PATH=LOW..HIGH, or PATH=a,b,c")
    return Range(path=path, choices=choices)
