"""Where the figures of a study come from: versions, seeds, profiles and the source of every value of theirs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from attrs import frozen

VARIES = "varies"


@frozen(kw_only=True)
class Parameter:
    """A value of a profile or personality that runs used; `value` is VARIES where runs used different ones."""

    path: str
    value: str
    unit: str
    source: str
    confidence: str


@frozen(kw_only=True)
class Beyond:
    """A cost that runs had beyond what its sources state, from the least to the largest such value."""

    profile: str
    path: str
    least: float
    most: float
    low: int
    high: int
    unit: str
    source: str


@frozen(kw_only=True)
class Provenance:
    """What a reader needs to judge and to repeat a study. `profiles` {name: its parameters}."""

    versions: tuple[str, ...]
    seeds: tuple[int, ...]
    profiles: Mapping[str, tuple[Parameter, ...]]
    approximations: tuple[str, ...]
    beyond: tuple[Beyond, ...] = ()

    @classmethod
    def of(cls, results: Iterable[Mapping[str, Any]]) -> Provenance:
        """From the results of all runs, as JSON objects (docs/result.md); one after the other, so they may be many."""
        versions: dict[str, None] = {}
        seeds: dict[int, None] = {}
        approximations: dict[str, None] = {}
        profiles: dict[str, dict[str, Parameter]] = {}
        digests: set[str] = set()
        beyond: dict[tuple[str, str], Beyond] = {}
        for result in results:
            versions[result["vtsim_version"]] = None
            seeds[result["seed"]] = None
            approximations |= dict.fromkeys(result["approximations"])
            if result["profile_digest"] not in digests:
                digests.add(result["profile_digest"])
                _add(profiles.setdefault(result["profile"], {}), result["parameters"]["values"])
                _add_beyond(beyond, result["profile"], result["parameters"])
        return cls(
            versions=tuple(sorted(versions)),
            seeds=tuple(sorted(seeds)),
            profiles={name: tuple(values.values()) for name, values in profiles.items()},
            approximations=tuple(approximations),
            beyond=tuple(beyond.values()),
        )


def _add_beyond(known: dict[tuple[str, str], Beyond], profile: str, parameters: Mapping[str, Any]) -> None:
    for path, stated in parameters.get("ranges", {}).items():  # an older store has none
        parameter = parameters["values"][path]
        value = float(parameter["value"])
        if not stated["low"] <= value <= stated["high"]:
            before = known.get((profile, path))
            least, most = (before.least, before.most) if before else (value, value)
            known[profile, path] = Beyond(
                profile=profile, path=path, least=min(least, value), most=max(most, value), low=stated["low"],
                high=stated["high"], unit=parameter["unit"], source=stated["source"],
            )  # fmt: skip


def _add(known: dict[str, Parameter], values: Mapping[str, Mapping[str, Any]]) -> None:
    for path, value in values.items():
        one = Parameter(
            path=path, value=str(value["value"]), unit=value["unit"], source=value["source"],
            confidence=value["confidence"],
        )  # fmt: skip
        before = known.setdefault(path, one)
        if before.value != one.value:
            sources = " / ".join(dict.fromkeys((before.source, one.source)))
            known[path] = Parameter(path=path, value=VARIES, unit=one.unit, source=sources, confidence=one.confidence)
