"""CPU profiles: every number that makes one processor different from another, each with its source.

A profile is a TOML file of lines `key = {value, unit, source, confidence}`. It may extend another file; a
value keeps the source it was written with. A value that lacks any of the four does not load.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import attrs

from vtsim.base.errors import ConfigError, Problem, alternatives
from vtsim.cpu import profile_file
from vtsim.cpu.profile_file import Sourced, StatedRange
from vtsim.cpu.profile_spec import LEAVES, OPERATIONS, Values, build, problems

__all__ = ["OPERATIONS", "Profile", "Row", "Sourced", "StatedRange", "explain", "load_profile", "profile_names"]

NANOSECONDS_PER_SECOND = 1_000_000_000


@attrs.frozen(kw_only=True)
class Profile(Values):
    """One processor: its values as attributes, and where each came from.

    Not modelled: frequency changes (turbo, power states).
    """

    name: str
    description: str
    sources: Mapping[str, Sourced] = attrs.field(repr=False)

    @property
    def has_vmx(self) -> bool:
        """Are there VM exits? A profile of a processor without VMX has none, and no price for them."""
        return self.transitions.vm_exit_cycles > 0

    def sourced(self, path: str) -> Sourced:
        """Return the value at a dotted path with its unit, source and confidence."""
        try:
            return self.sources[path]
        except KeyError:
            raise ConfigError.unknown("profile value", path, LEAVES) from None

    def cycles(self, nanoseconds: int) -> int:
        """Convert a time to whole cycles of this profile's clock, rounded to the nearest."""
        return cycles_of(nanoseconds, self.clock_hz)

    @property
    def fills_memory(self) -> bool:
        """Whether one core's super queue can ask for more lines than the memory of its node delivers."""
        return self.cache.super_queue * self.cache.line_bytes * 1000 > self.dram.bandwidth * self.dram.local_ns

    def with_overrides(self, overrides: Mapping[str, Any]) -> Profile:
        """Return the profile with some values replaced; all that is wrong is reported at once."""
        if not overrides:
            return self
        wrong = [
            Problem(
                message=f"unknown profile value {path!r}",
                path=path,
                help=alternatives("profile value", path, LEAVES),
            )
            for path in overrides
            if path not in LEAVES
        ]
        if wrong:
            raise ConfigError.of(wrong)
        changed = {
            path: attrs.evolve(self.sources[path], value=value, source="set by the scenario", confidence="set")
            for path, value in overrides.items()
        }
        return _assemble(self.name, self.description, {**self.sources, **changed}, ())

    def digest(self) -> str:
        """Return a short hash of every value, the same on every machine."""
        text = json.dumps({path: self.sources[path].value for path in LEAVES}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def confidence_counts(self) -> dict[str, int]:
        """Count the values per confidence, best first."""
        found = [sourced.confidence for sourced in self.sources.values()]
        return {name: found.count(name) for name in (*profile_file.CONFIDENCES, "set") if name in found}


def cycles_of(nanoseconds: int, clock_hz: int) -> int:
    """Convert a time to whole cycles of a clock, rounded to the nearest."""
    return (nanoseconds * clock_hz + NANOSECONDS_PER_SECOND // 2) // NANOSECONDS_PER_SECOND


@attrs.frozen(kw_only=True)
class Row:
    """One line of `vtsim explain profile`."""

    path: str
    value: str
    unit: str
    confidence: str
    source: str
    meaning: str
    stated: StatedRange | None


def profile_names() -> list[str]:
    """List the profiles that are shipped."""
    return sorted(path.stem for path in profile_file.SHIPPED.glob("*.toml") if path != profile_file.SOURCES)


def load_profile(name_or_path: str) -> Profile:
    """Load a shipped profile by name, or any other from a TOML file."""
    path = Path(name_or_path)
    return _load(path) if path.suffix == ".toml" else _shipped(name_or_path)


@functools.cache
def _shipped(name: str) -> Profile:
    """Read once: a process that runs many scenarios needs the same few again and again."""
    if name not in profile_names():
        raise ConfigError.unknown("profile", name, profile_names())
    return _load(profile_file.SHIPPED / f"{name}.toml")


def _load(path: Path) -> Profile:
    loaded = profile_file.load(path)
    return _assemble(path.stem, loaded.description, loaded.values, loaded.places)


def explain(profile: Profile) -> list[Row]:
    """Describe every value of a profile, in a fixed order."""
    return [
        Row(
            path=path,
            value=_text(sourced.value),
            unit=sourced.unit,
            confidence=sourced.confidence,
            source=sourced.source,
            meaning=LEAVES[path].meaning,
            stated=sourced.stated,
        )
        for path, sourced in ((path, profile.sources[path]) for path in LEAVES)
    ]


def _text(value: int | bool | str) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _assemble(
    name: str,
    description: str,
    sources: Mapping[str, Sourced],
    places: Iterable[tuple[str, profile_file.Place]],
) -> Profile:
    values = {path: sourced.value for path, sourced in sources.items()}
    where = dict(places)
    wrong = [profile_file.problem(where.get(path), path, message, help) for path, message, help in problems(values)]
    if wrong:
        raise ConfigError.of(wrong)
    plain = build(values)
    fields = {field.name: getattr(plain, field.name) for field in attrs.fields(Values)}
    ordered = {path: sources[path] for path in LEAVES}
    return Profile(name=name, description=description, sources=ordered, **fields)
