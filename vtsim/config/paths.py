"""What a path of a scenario leads to: its kind, and what it is for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import attrs

from vtsim.base.spec import Free, Kind, Many, Quantity, kind_of, settings
from vtsim.base.units import SHARE, Dimension
from vtsim.config.schema import specs_inside
from vtsim.platform.spec import Scenario


def setting_at(path: str) -> attrs.Attribute[Any] | None:
    """Return the setting that a path leads to; None inside of free mappings, and where there is none.

    Where several specs are possible, as for the primitive of a phase, it is that of the first that has one.
    """
    return next(_found(Scenario, path.split(".")), None)


def _found(spec: type[Any], steps: list[str]) -> Iterator[attrs.Attribute[Any]]:
    field = settings(spec).get(steps[0])
    if field is None:
        return
    kind, rest = kind_of(field), steps[1:]
    while rest and rest[0].isdecimal() and isinstance(kind, Many):
        kind, rest = kind.item, rest[1:]
    if not rest:
        yield field
        return
    for inner, _, _ in specs_inside(kind):
        yield from _found(inner, rest)


def dimension_at(path: str) -> Dimension | None:
    """Return what the number at a path measures, inside of free mappings too; None where none is known."""
    found = setting_at(path)
    if found is not None:
        kind = kind_of(found)
        return kind.dimension if isinstance(kind, Quantity) else None
    steps = path.split(".")
    for count in range(1, len(steps)):
        outer = setting_at(".".join(steps[:count]))
        if outer is not None and isinstance(kind := kind_of(outer), Free):
            known = kind.known(".".join(steps[count:]))
            return known.dimension if known else None
    return None


def shown_value(kind: Kind | None, value: Any) -> Any:
    """Return a value as tables show it: numbers in base units, everything else as it is written."""
    if isinstance(kind, Quantity) and isinstance(value, str):
        inside = kind.convert(value)
        return value if inside is None or value in kind.words else inside
    return value


def unit_of(kind: Kind | None) -> str:
    """Return the unit of the numbers that `shown_value` gives."""
    if not isinstance(kind, Quantity):
        return ""
    return "share" if kind.dimension is SHARE else kind.dimension.base
