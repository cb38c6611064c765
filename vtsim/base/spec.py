"""What a setting may be: the kinds of values that specs are made of.

A spec is a frozen attrs class whose fields are made by `setting`. The kind of a field is the one place that
says what users may write, what is inside, how it is printed and how its schema and its documentation read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import attrs
from attrs import frozen

from vtsim.base.errors import ConfigError, Problem
from vtsim.base.registry import Registry
from vtsim.base.units import (
    COUNT,
    DURATION,
    FACTOR,
    LARGEST,
    NUMBER,
    SHARE,
    SIZE,
    Dimension,
    Hex,
    shown,
)

HEXADECIMAL = re.compile("0x[0-9A-Fa-f]{1,16}", re.ASCII)
FREE_VALUES = f"write a number (at most {LARGEST:,}), true, false, or a name"
Scalar = int | float | bool | str
Overrides = tuple[tuple[str, Scalar], ...]


class Kind(Protocol):
    """What one setting may be."""

    def convert(self, value: Any) -> Any:
        """Return the value inside, or raise `ConfigError`; a value inside converts to itself."""

    def plain(self, value: Any) -> Any:
        """Return what a user would write for a value inside, as plain data."""

    def schema(self) -> dict[str, Any]:
        """Return the JSON Schema of what users may write."""

    def accepted(self) -> str:
        """Say in a few words what users may write."""


@frozen(kw_only=True)
class Quantity:
    """A number of one dimension between two limits, or one of a few; `words` stand for special values."""

    dimension: Dimension
    ge: int | float = 0
    le: int | float = LARGEST
    choices: tuple[int, ...] = ()
    words: Mapping[str, int | None] = attrs.field(factory=dict)

    def convert(self, value: Any) -> int | float | None:
        if isinstance(value, str) and value in self.words:
            return self.words[value]
        if value is None and None in self.words.values():
            return None
        if not isinstance(value, bool) and value in self.words.values():
            return value  # type: ignore[no-any-return]
        try:
            number = self.dimension.parse(self._hexadecimal(value))
        except ConfigError as error:
            meant = error.problems[0].help.removesuffix(self.dimension.accepted)
            raise ConfigError(error.problems[0].message, help=meant + self._help()) from None
        if self.choices and number not in self.choices:
            raise ConfigError(f"{shown(value)} is not possible here", help=self._help())
        for limit, broken, words in (
            (self.ge, number < self.ge, "less"),
            (self.le, number > self.le, "more"),
        ):
            if broken:
                raise ConfigError(f"{shown(value)} is {words} than {self._text(limit)}", help=self._help())
        return number

    def _hexadecimal(self, value: Any) -> Any:
        written = self.dimension is NUMBER and isinstance(value, str) and HEXADECIMAL.fullmatch(value)
        return int(value, 16) if written else value

    def _text(self, number: int | float) -> str:
        return hex(int(number)) if self.dimension is NUMBER else self.dimension.format(number)

    def _help(self) -> str:
        legal = [*(self._text(choice) for choice in self.choices), *self.words]
        if self.choices:
            return "it can be " + ", ".join(legal)
        words = "".join(f", or {word!r}" for word in legal)
        upper = "" if self.le == LARGEST else f" to {self._text(self.le)}"
        limits = f", from {self._text(self.ge)}{upper}" if self.ge or upper else ""
        return f"{self.dimension.accepted}{limits}{words}"

    def plain(self, value: Any) -> Any:
        for word, meaning in self.words.items():
            if value == meaning and not isinstance(value, bool):
                return word
        if self.dimension is NUMBER:
            return Hex(value)
        return value if self.dimension in (COUNT, FACTOR) else self.dimension.format(value)

    def schema(self) -> dict[str, Any]:
        units = "|".join(unit for unit in self.dimension.units if unit)
        written: dict[str, Any] = {"type": "string", "pattern": rf"^[+-]?[0-9][0-9_.eE+-]*\s*({units})?$"}
        if self.dimension is NUMBER:
            written = {"type": "string", "pattern": f"^{HEXADECIMAL.pattern}$"}
        if self.choices:
            written = {"enum": [self._text(choice) for choice in self.choices]}
        number: dict[str, Any] = {"type": "integer" if self.dimension.whole else "number", "minimum": self.ge}
        number |= {} if self.le == LARGEST else {"maximum": self.le}
        return {"anyOf": [written, number, *([{"enum": list(self.words)}] if self.words else [])]}

    def accepted(self) -> str:
        if self.choices:
            return " | ".join([*(self._text(choice) for choice in self.choices), *self.words])
        upper = "" if self.le == LARGEST else f" to {self._text(self.le)}"
        limits = f", {self._text(self.ge)}{upper or ' or more'}" if self.ge or upper else ""
        return self.dimension.name + limits + "".join(f" | {word}" for word in self.words)


@frozen(kw_only=True)
class Text:
    """Words; with `choices`, one of these."""

    choices: tuple[str, ...] = ()

    def convert(self, value: Any) -> str:
        if self.choices and value not in self.choices:
            legal = ", ".join(self.choices)
            close = ConfigError.unknown("it", value, self.choices).problems[0].help
            raise ConfigError(f"{shown(value)} is not possible here", help=close if close else legal)
        if not isinstance(value, str):
            raise ConfigError(f"{shown(value)} is not text", help="put it in quotes")
        return value

    def plain(self, value: Any) -> Any:
        return value

    def schema(self) -> dict[str, Any]:
        if self.choices:
            return {"enum": list(self.choices)}
        return {"type": "string"}

    def accepted(self) -> str:
        return " | ".join(self.choices) or "text"


@frozen(kw_only=True)
class FilePath:
    """A file; in a scenario, relative to the scenario's folder."""

    def convert(self, value: Any) -> str:
        if not isinstance(value, str) or not value or "\0" in value:
            raise ConfigError(f"{shown(value)} is not the name of a file", help="put it in quotes")
        return value

    def plain(self, value: Any) -> Any:
        return value

    def schema(self) -> dict[str, Any]:
        return {"type": "string"}

    def accepted(self) -> str:
        return "file"


@frozen(kw_only=True)
class Boolean:
    """True or false; with `auto`, also what the processor can do, which is None inside until it is known."""

    auto: bool = False

    def convert(self, value: Any) -> bool | None:
        if self.auto and (value is None or value == "auto"):
            return None
        if not isinstance(value, bool):
            help = "it can be true, false, auto" if self.auto else "it can be true, false"
            raise ConfigError(f"{shown(value)} is neither true nor false", help=help)
        return value

    def plain(self, value: Any) -> Any:
        return "auto" if value is None else value

    def schema(self) -> dict[str, Any]:
        return {"enum": [True, False, "auto"]} if self.auto else {"type": "boolean"}

    def accepted(self) -> str:
        return "true | false | auto" if self.auto else "true | false"


class Meaning(Protocol):
    """What is known of the value at one path: what it measures, None when it is no number, and what is accepted."""

    @property
    def dimension(self) -> Dimension | None: ...
    @property
    def accepted(self) -> str: ...


@frozen(kw_only=True)
class Free:
    """Dotted paths to values whose meaning something else knows; nested mappings are flattened.

    `known` tells what it knows of a path, so that a quantity of another kind is refused; None: nothing.
    """

    noun: str
    known: Callable[[str], Meaning | None]

    def convert(self, value: Any) -> Overrides:
        if value is None:
            return ()
        if isinstance(value, tuple):
            return value
        if not isinstance(value, Mapping):
            raise ConfigError(f"{shown(value)} is not a mapping", help=f"write {self.noun}: value")
        return tuple(sorted(self._flat(value, "").items()))

    def _flat(self, value: Mapping[Any, Any], prefix: str) -> dict[str, Scalar]:
        flat: dict[str, Scalar] = {}
        for key, inner in value.items():
            path = f"{prefix}.{key}" if prefix else str(key)
            if isinstance(inner, Mapping):
                found = self._flat(inner, path)
            elif isinstance(inner, str):
                found = {path: self._measured(inner, path)}
            elif isinstance(inner, int | float) and (isinstance(inner, bool) or abs(inner) <= LARGEST):
                found = {path: inner}
            else:
                known = self.known(path)
                help = known.accepted if known else FREE_VALUES
                why = f"is not a {self.noun}"
                if isinstance(inner, int | float) and math.isfinite(inner):
                    why = f"is {'more' if inner > 0 else 'less'} than any {self.noun} can be"
                raise ConfigError(f"{shown(inner)} {why}", field=path, help=help)
            if clash := flat.keys() & found.keys():
                raise ConfigError(f"{min(clash)} is given twice", field=path)
            flat |= found
        return flat

    def _measured(self, text: str, path: str) -> Scalar:
        known = self.known(path)
        if known is None or known.dimension is None:
            return text
        try:
            return known.dimension.parse(text)
        except ConfigError as error:
            raise ConfigError(error.problems[0].message, field=path, help=known.accepted) from None

    def plain(self, value: Any) -> Any:
        return dict(value)

    def schema(self) -> dict[str, Any]:
        return {"type": ["object", "null"]}

    def accepted(self) -> str:
        return f"mapping of {self.noun} to value"


@frozen(kw_only=True)
class Group:
    """A nested spec."""

    spec: type[Any]

    def convert(self, value: Any) -> Any:
        if not isinstance(value, self.spec):
            raise ConfigError(f"{shown(value)} is not a {self.spec.__name__}")
        return value

    def plain(self, value: Any) -> Any:
        return plain(value)

    def schema(self) -> dict[str, Any]:
        return {"$ref": f"#/$defs/{self.spec.__name__}"}

    def accepted(self) -> str:
        return "mapping"


@frozen(kw_only=True)
class Tagged:
    """One of the specs of a registry; the key `tag` says which."""

    registry: Registry[str, type[Any]]
    tag: str

    def convert(self, value: Any) -> Any:
        if type(value) not in self.registry.values():
            raise ConfigError(f"{shown(value)} is not a {self.registry.noun}")
        return value

    def plain(self, value: Any) -> Any:
        name = next(name for name, spec in self.registry.items() if spec is type(value))
        return {self.tag: name, **plain(value)}

    def schema(self) -> dict[str, Any]:
        return {"oneOf": [{"$ref": f"#/$defs/{spec.__name__}"} for spec in self.registry.values()]}

    def accepted(self) -> str:
        return f"mapping with {self.tag} and its keys"


@frozen(kw_only=True)
class Many:
    """A list, at least `least` long."""

    item: Kind
    least: int = 0

    def convert(self, value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{shown(value)} is not a list", help="begin each item with '- '")
        if len(value) < self.least:
            raise ConfigError(f"the list has {len(value)} items", help=f"give at least {self.least}")
        return tuple(self.item.convert(each) for each in value)

    def plain(self, value: Any) -> Any:
        return [self.item.plain(each) for each in value]

    def schema(self) -> dict[str, Any]:
        return {"type": "array", "items": self.item.schema(), "minItems": self.least}

    def accepted(self) -> str:
        return f"list, each {self.item.accepted()}"


def setting(kind: Kind, doc: str, *, default: Any = attrs.NOTHING, factory: Any = None) -> Any:
    """Declare one field of a spec; without a default it must be given."""

    def convert(value: Any, field: attrs.Attribute[Any]) -> Any:
        try:
            return kind.convert(value)
        except ConfigError as error:
            raise inside(field.name, error) from None

    converter: Any = attrs.Converter(convert, takes_field=True)
    given = {"factory": factory} if factory else {"default": default}
    return attrs.field(converter=converter, metadata={"kind": kind, "doc": doc}, **given)


def inside(name: str, error: ConfigError) -> ConfigError:
    """Return the error as seen from one level further out."""
    return ConfigError.of(_deeper(name, problem) for problem in error.problems)


def _deeper(name: str, problem: Problem) -> Problem:
    return attrs.evolve(problem, path=f"{name}.{problem.path}" if problem.path else name)


def settings(spec: type[Any]) -> dict[str, attrs.Attribute[Any]]:
    """Return the fields of a spec that users may write, by name, in order."""
    return {field.name: field for field in attrs.fields(spec) if "kind" in field.metadata}


def kind_of(field: attrs.Attribute[Any]) -> Kind:
    """Return what a field may be."""
    kind: Kind = field.metadata["kind"]
    return kind


def plain(spec: Any) -> dict[str, Any]:
    """Return a spec as plain data that a user could have written, every default included."""
    return {name: kind_of(field).plain(getattr(spec, name)) for name, field in settings(type(spec)).items()}


def sizes(**limits: Any) -> Quantity:
    """A number of bytes."""
    return Quantity(dimension=SIZE, **limits)


def durations(**limits: Any) -> Quantity:
    """A number of nanoseconds."""
    return Quantity(dimension=DURATION, **limits)


def counts(**limits: Any) -> Quantity:
    """A number of things."""
    return Quantity(dimension=COUNT, **limits)


def shares(**limits: Any) -> Quantity:
    """A part of a whole."""
    return Quantity(dimension=SHARE, **({"le": 1.0} | limits))


def factors(**limits: Any) -> Quantity:
    """A number that need not be whole."""
    return Quantity(dimension=FACTOR, **limits)


def addresses(**limits: Any) -> Quantity:
    """An address, a port, a register number: printed in hexadecimal."""
    return Quantity(dimension=NUMBER, **({"le": 2**48 - 1} | limits))
