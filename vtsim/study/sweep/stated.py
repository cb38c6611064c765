"""Costs within the ranges that their sources state: what an axis sets beyond one, and the ranges of a profile."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from attrs import frozen

from vtsim.base.errors import ConfigError
from vtsim.cpu.profile import StatedRange, load_profile
from vtsim.cpu.profile_spec import LEAVES
from vtsim.platform.spec import Scenario

COSTS: Final = "machine.cpu."  # before the name of a profile's value
PROFILE: Final = "machine.profile"


@frozen(kw_only=True)
class Beyond:
    """A cost that an axis sets to more or less than its sources give."""

    path: str
    value: int | float
    unit: str
    stated: StatedRange

    @classmethod
    def of(cls, path: str, value: int | float, stated: StatedRange) -> Beyond | None:
        """The value of a path, as after `--set`, if it is beyond; None within."""
        if stated.low <= value <= stated.high:
            return None
        return cls(path=path, value=value, unit=LEAVES[path.removeprefix(COSTS)].unit, stated=stated)

    def error(self, way: str) -> ConfigError:
        """Say so; `way` is how one goes beyond on purpose."""
        message = f"{self.value} {self.unit} is beyond the stated range, {span(self.stated, self.unit)}"
        return ConfigError(message, field=self.path, help=f"{self.stated.source}; {way}")


def span(stated: StatedRange, unit: str) -> str:
    """A range in words."""
    return f"{stated.low} to {stated.high} {unit}"


def stated_ranges(profile: str) -> Mapping[str, StatedRange]:
    """{path as after --set: range} of the costs of a profile whose sources state one."""
    sources = load_profile(profile).sources
    return {f"{COSTS}{path}": sourced.stated for path, sourced in sources.items() if sourced.stated}


def stated_range(profile: str, path: str, field: str) -> StatedRange:
    """The range that the sources of a profile's cost state; raises `ConfigError` that lists those that do."""
    found = stated_ranges(profile)
    if path not in found:
        legal = ", ".join(found) if found else "none of this profile does"
        message = f"no range is stated for {path} of {profile}"
        raise ConfigError(message, field=field, help=f"costs that state one: {legal}")
    return found[path]


def beyond(scenario: Scenario, path: str) -> Iterator[Beyond]:
    """Find costs that an axis at `path`, which may be a mapping of many, sets beyond their stated ranges."""
    if not f"{COSTS}".startswith(f"{path}.") and not path.startswith(COSTS):
        return
    ranges = stated_ranges(scenario.machine.profile)
    for name, value in scenario.machine.cpu:
        full = f"{COSTS}{name}"
        stated = ranges.get(full)
        if stated and f"{full}.".startswith(f"{path}.") and isinstance(value, int | float):
            found = Beyond.of(full, value, stated)
            if found is not None:
                yield found
