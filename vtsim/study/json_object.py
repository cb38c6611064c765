"""Frozen attrs classes as one documented JSON object: out, in, and its reference page."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, TypeVar

import attrs

from vtsim.base.errors import ConfigError

T = TypeVar("T")


def key(unit: str, meaning: str, **options: Any) -> Any:
    """Declare an attrs field that is one key of the JSON object."""
    return attrs.field(metadata={"unit": unit, "meaning": meaning}, **options)


def plain(value: Any) -> Any:
    """The JSON form of a value: objects and mappings become dicts, tuples become lists."""
    kind: Any = type(value)
    names = _names(kind)
    if names is not None:
        return {name: plain(getattr(value, name)) for name in names}
    if kind is dict or isinstance(value, Mapping):  # the first is the frequent case, and the fast one
        return {str(name): plain(item) for name, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, tuple) else value


@cache
def _names(cls: Any) -> tuple[str, ...] | None:
    """The fields of an attrs class; None of any other."""
    return tuple(item.name for item in attrs.fields(cls)) if attrs.has(cls) else None


def structure(cls: type[T], data: Any, where: str) -> T:
    """An instance of an attrs class from its JSON form; refuses whatever `plain` would not have written."""
    if not isinstance(data, Mapping):
        raise ConfigError(f"{data!r} is not an object", field=where)
    fields, hints = attrs.fields_dict(cls), typing.get_type_hints(cls)  # type: ignore[arg-type]
    for name in data:
        if name not in fields:
            raise ConfigError.unknown("key", name, fields, field=where)
    for name, item in fields.items():
        if name not in data and item.default is attrs.NOTHING:
            raise ConfigError(f"key {name!r} is missing", field=where)
    return cls(**{name: _value(hints[name], item, f"{where}.{name}") for name, item in data.items()})


def _value(expected: Any, data: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if origin is types.UnionType:
        exact = (one for one in arguments if type(data) is one)
        return _value(next(exact, arguments[0]), data, where)
    if origin is tuple and isinstance(data, list):
        return tuple(_value(arguments[0], item, f"{where}[{at}]") for at, item in enumerate(data))
    if origin is not None and isinstance(data, Mapping):
        return {name: _value(arguments[1], item, f"{where}.{name}") for name, item in data.items()}
    if attrs.has(expected):
        return structure(expected, data, where)
    if expected is float and type(data) is int:
        return float(data)
    if type(data) is expected:
        return data
    raise ConfigError(f"{data!r} is not {_type_name(expected)}", field=where)


# fmt: off
TYPE_NAMES: Mapping[Any, str] = {
    int: "an integer", float: "a number", str: "a string", bool: "true or false", type(None): "null",
}
# fmt: on


def _type_name(expected: Any) -> str:
    """What a JSON reader calls a declared type."""
    arguments = typing.get_args(expected)
    if typing.get_origin(expected) is types.UnionType:
        return " or ".join(_type_name(one) for one in arguments)
    if typing.get_origin(expected) is tuple:
        return "a list"
    return TYPE_NAMES.get(expected, "an object")


def reference_tables(cls: type) -> str:
    """The markdown reference of an object: one table per class, from its docstring and fields."""
    sections = []
    for one in _classes(cls):
        sections += [
            f"## {one.__name__}",
            "",
            _first_line(one),
            "",
            "| key | type | unit | meaning |",
            "|---|---|---|---|",
        ]
        hints = typing.get_type_hints(one)
        for item in attrs.fields(one):
            unit, meaning = item.metadata["unit"], item.metadata["meaning"]
            sections.append(f"| `{item.name}` | {_linked(hints[item.name])} | {unit} | {meaning} |")
        sections.append("")
    return "\n".join(sections)


def _first_line(cls: type) -> str:
    return (cls.__doc__ or "").partition("\n")[0]


def _linked(expected: Any) -> str:
    """A type for the reference, with a link to the table of each class it mentions."""
    mentioned = [f"[{one.__name__}](#{one.__name__.lower()})" for one in _mentioned(expected)]
    nullable = " or null" if type(None) in typing.get_args(expected) else ""
    if not mentioned:
        return _type_name(expected)
    container = {tuple: "list of ", Mapping: "mapping to "}
    origin = typing.get_origin(expected)
    return next((text for kind, text in container.items() if _is(origin, kind)), "") + mentioned[0] + nullable


def _is(origin: Any, kind: Any) -> bool:
    return isinstance(origin, type) and issubclass(origin, kind)


def _mentioned(expected: Any) -> Iterator[type]:
    if attrs.has(expected):
        yield expected
    for argument in typing.get_args(expected):
        yield from _mentioned(argument)


def _classes(cls: type) -> list[type]:
    """A class and all it reaches, each once, breadth first."""
    found = [cls]
    for one in found:
        hints = typing.get_type_hints(one)
        for item in attrs.fields(one):
            found += [reached for reached in _mentioned(hints[item.name]) if reached not in found]
    return found
