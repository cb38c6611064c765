"""Figures of a result by their path: `slowdown`, `exits.CPUID.mean_cycles`, `vms.vm0.walks.count`."""

from __future__ import annotations

import typing
from collections.abc import Iterable, Mapping
from typing import Any, Final

import attrs

from vtsim.base.errors import ConfigError, alternatives
from vtsim.study.result import Result
from vtsim.study.sweep.table import Column, Value

DEFAULT: Final = (
    "slowdown",
    "efficiency.overall",
    "cycles.elapsed",
    "simulated_s",
    "events.entries",
    "walks.count",
    "walks.references_per_walk",
)
NAMES: Final = ("reason", "name")  # keys by which an item of a list is found


def column(path: str, label: str = "", *, number: bool = False) -> Column:
    """Return the column of a metric, or raise `ConfigError` where no result has such a figure; a `number`, if asked."""
    unit, meaning, steps, taken = "", "", path.split("."), list[str]()
    expected: Any = Result
    while steps:
        origin, arguments = typing.get_origin(expected), typing.get_args(expected)
        if attrs.has(expected):
            fields = attrs.fields_dict(expected)
            if steps[0] not in fields:
                help = alternatives("key", steps[0], fields).replace("key can be", "keys here are")
                raise ConfigError(f"{path!r} is no figure of a result: unknown key {steps[0]!r}", help=help)
            unit, meaning = fields[steps[0]].metadata["unit"] or unit, fields[steps[0]].metadata["meaning"]
            expected = _not_null(typing.get_type_hints(expected)[steps[0]])
        elif origin is tuple:
            expected = arguments[0]
        elif origin is Mapping:
            expected = arguments[1]
            if not attrs.has(expected) and typing.get_origin(expected) is not Mapping:
                steps = steps[:1]  # the name of an entry may have dots in it
        else:
            raise ConfigError(f"{path!r} is no figure of a result", help=f"{'.'.join(taken)} has no keys")
        taken.append(steps.pop(0))
    if attrs.has(expected):
        raise ConfigError(f"{path!r} is not one figure", help=f"its keys are {', '.join(attrs.fields_dict(expected))}")
    if typing.get_origin(expected) in (tuple, Mapping):
        raise ConfigError(f"{path!r} is not one figure", help="go on with the name of one of its entries")
    if number and expected not in (int, float):
        help = "name one that is a number, as in slowdown or cycles.elapsed"
        raise ConfigError(f"{path!r} is no number", help=help)
    return Column(path=path, label=label or path, unit=unit, meaning=meaning)


def _not_null(expected: Any) -> Any:
    """The type of what may also be null."""
    arguments = typing.get_args(expected)
    return next(one for one in arguments if one is not type(None)) if type(None) in arguments else expected


def figure(result: Any, path: str) -> Value:
    """Return what a result, as its JSON object, has at a path; None where it has nothing."""
    found = _find(result, path.split("."))
    return found if isinstance(found, str | int | float | bool) else None


def figures(result: Mapping[str, Any], before: str = "") -> Iterable[str]:
    """The paths of all numbers of a result; an item of a list goes by its reason or name."""
    for key, value in result.items():
        path = f"{before}{key}"
        if isinstance(value, Mapping):
            yield from figures(value, f"{path}.")
        elif isinstance(value, list):
            for item in value:
                if isinstance(item, Mapping) and (name := item.get("reason", item.get("name"))):
                    yield from figures(item, f"{path}.{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield path


def absent(path: str, results: Iterable[tuple[str, Mapping[str, Any]]], field: str = "--metric") -> ConfigError:
    """Say that no run has a figure, and which was probably meant: names of entries are those that runs have."""
    known = dict.fromkeys(key for _, result in results for key in figures(result))
    help = alternatives("figure", path, known)
    return ConfigError(f"no run of the study has a figure for {path!r}", field=field, help=help)


def _find(value: Any, steps: list[str]) -> Any:
    if not steps:
        return value
    if isinstance(value, list):
        for item in value:
            if isinstance(item, dict) and steps[0] in (item.get(name) for name in NAMES):
                return _find(item, steps[1:])
        at = int(steps[0]) if steps[0].isdecimal() else len(value)
        return _find(value[at], steps[1:]) if at < len(value) else None
    if isinstance(value, dict):
        for length in range(1, len(steps) + 1):
            key = ".".join(steps[:length])
            if key in value:
                return _find(value[key], steps[length:])
    return None
