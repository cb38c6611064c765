"""Reads profile files: TOML with one sourced value per line, and every mistake reported with its line."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import attrs

from vtsim.base.errors import ConfigError, Problem, alternatives
from vtsim.cpu.profile_spec import LEAVES

SHIPPED: Final = Path(__file__).parent / "profiles"
SOURCES: Final = SHIPPED / "sources.toml"
CONFIDENCES: Final = ("measured", "vendor", "paper", "estimated")
KEYS: Final = ("value", "unit", "source", "confidence")
RANGE: Final = "range"  # a key that a cost may have besides
RANGE_KEYS: Final = ("low", "high", "source")
COST_UNITS: Final = ("cycles", "ns")
_HEAD: Final = ("description", "extends", "sources")
_DEPTH: Final = 8


@attrs.frozen(kw_only=True)
class StatedRange:
    """The least and the largest figure that sources give for a cost, both included, in its unit."""

    low: int
    high: int
    source: str


@attrs.frozen(kw_only=True)
class Sourced:
    """A value with its unit, where it comes from, and how far to trust it; `stated` where sources give a range."""

    value: int | bool | str
    unit: str
    source: str
    confidence: str
    stated: StatedRange | None = None


@attrs.frozen(kw_only=True)
class Place:
    """Where a value is written."""

    file: str
    line: int
    text: str


@attrs.frozen(kw_only=True)
class Loaded:
    """A file and everything it extends, merged: the nearest file wins."""

    description: str
    values: Mapping[str, Sourced]
    places: tuple[tuple[str, Place], ...]


def problem(place: Place | None, path: str, message: str, help: str = "") -> Problem:
    """Say what is wrong with the value at `path`, with its line where that is known."""
    if place is None:
        return Problem(message=message, path=path, help=help)
    column = len(place.text) - len(place.text.lstrip())
    return Problem(
        message=message,
        path=path,
        help=help,
        file=place.file,
        line=place.line,
        column=column,
        source=place.text,
    )


def load(path: Path) -> Loaded:
    """Read a profile file and what it extends; raise one ConfigError with all that is wrong."""
    wrong: list[Problem] = []
    raw: dict[str, tuple[Any, Place]] = {}
    citations: dict[str, str] = dict(_parse(SOURCES).get("sources", {}))
    description = ""
    for file, document in _chain(path):
        places = _places(file)
        citations = {**document.get("sources", {}), **citations}
        description = description or str(document.get("description", ""))
        for key, value in _flatten(document):
            raw.setdefault(key, (value, places.get(key, Place(file=str(file), line=1, text=""))))
    values: dict[str, Sourced] = {}
    for key, (value, place) in raw.items():
        if key not in LEAVES:
            message, help = f"unknown profile value {key!r}", alternatives("profile value", key, LEAVES)
            wrong.append(problem(place, key, message, help))
            continue
        found = _sourced(key, value, citations)
        if isinstance(found, Sourced):
            values[key] = found
        else:
            wrong.append(problem(place, key, *found))
    wrong += [
        Problem(
            message="the profile gives no value for it",
            path=key,
            file=str(path),
            help=f"it is {leaf.meaning}",
        )
        for key, leaf in LEAVES.items()
        if key not in raw
    ]
    if wrong:
        raise ConfigError.of(wrong)
    return Loaded(description=description, values=values, places=tuple((k, p) for k, (_, p) in raw.items()))


def _chain(path: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    for _ in range(_DEPTH):
        document = _parse(path)
        yield path, document
        name = document.get("extends")
        if name is None:
            return
        beside = path.parent / f"{name}.toml"
        path = beside if beside.is_file() else SHIPPED / f"{name}.toml"
    raise ConfigError(f"profiles extend each other more than {_DEPTH} deep", field="extends", file=str(path))


def _parse(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"the profile cannot be read: {error.strerror}", file=str(path)) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"this is not TOML: {error}", file=str(path)) from None


def _flatten(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        path = f"{prefix}{key}"
        if not prefix and key in _HEAD:
            continue
        if isinstance(value, dict) and not set(value) & set(KEYS) and path not in LEAVES:
            yield from _flatten(value, f"{path}.")
        else:
            yield path, value


def _sourced(key: str, written: Any, citations: Mapping[str, str]) -> Sourced | tuple[str, str]:
    """Check one value: the sourced value, or what is wrong and what would be accepted."""
    form = "write {value = …, unit = …, source = …, confidence = …}"
    if not isinstance(written, dict):
        return f"{written!r} has no unit, source and confidence", form
    missing = [name for name in KEYS if name not in written]
    if missing:
        return "it has no " + ", ".join(missing), form
    extra = sorted(set(written) - {*KEYS, RANGE})
    if extra:
        return f"unknown key {extra[0]!r}", form
    unit, source, confidence = (str(written[name]) for name in KEYS[1:])
    if unit != LEAVES[key].unit:
        return f"its unit is {LEAVES[key].unit!r}, not {unit!r}", f"write unit = {LEAVES[key].unit!r}"
    if confidence not in CONFIDENCES:
        return f"unknown confidence {confidence!r}", alternatives("confidence", confidence, CONFIDENCES)
    name, _, detail = (part.strip() for part in source.partition(":"))
    if name not in citations:
        return f"unknown source {name!r}", alternatives("source", name, citations)
    if confidence == "estimated" and not detail:
        return "an estimate needs its reason", f"write source = '{name}: how it was estimated'"
    stated = _stated(key, written, citations) if RANGE in written else None
    if isinstance(stated, tuple):
        return stated
    cited = _cited(name, detail, citations)
    return Sourced(value=written["value"], unit=unit, source=cited, confidence=confidence, stated=stated)


def _cited(name: str, detail: str, citations: Mapping[str, str]) -> str:
    return f"{citations[name]}: {detail}" if detail else citations[name]


def _stated(key: str, written: Mapping[str, Any], citations: Mapping[str, str]) -> StatedRange | tuple[str, str]:
    """Check the range that sources give for a cost: it holds the value, and says which figures it is made of."""
    form = "write range = {low = …, high = …, source = 'NAME: which figures'}"
    leaf, found = LEAVES[key], written[RANGE]
    if leaf.unit not in COST_UNITS:
        return f"a value in {leaf.unit} has no range", f"costs have one, which are in {' or '.join(COST_UNITS)}"
    if not isinstance(found, dict) or set(found) != set(RANGE_KEYS):
        return "its range has not low, high and source", form
    low, high, value = found["low"], found["high"], written["value"]
    if any(type(number) is not int for number in (low, high)) or not leaf.low <= low < high <= leaf.high:
        return f"{low!r} to {high!r} is no range", f"whole numbers, the less first, from {leaf.low} to {leaf.high}"
    if type(value) is int and not low <= value <= high:
        return f"its value, {value}, is not in its range, {low} to {high}", "a range holds the value"
    name, _, detail = (part.strip() for part in str(found["source"]).partition(":"))
    if name not in citations:
        return f"unknown source {name!r} of its range", alternatives("source", name, citations)
    if not detail:
        return "its range needs the figures it is made of", f"write source = '{name}: which figures'"
    return StatedRange(low=low, high=high, source=_cited(name, detail, citations))


def _places(path: Path) -> dict[str, Place]:
    """Find the line of every key; profile files hold one value per line."""
    found: dict[str, Place] = {}
    table = ""
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if header := re.match(r"\s*\[([^\[\]]+)\]", text):
            table = f"{header[1].strip()}."
        elif entry := re.match(r"\s*([\w.-]+)\s*=", text):
            found.setdefault(table + entry[1], Place(file=str(path), line=number, text=text))
    return found
