"""A study: one scenario over a space of settings, and what is asked of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import exp, floor, log
from typing import Any

from attrs import frozen

from vtsim.base.errors import ConfigError
from vtsim.base.registry import Registry
from vtsim.base.spec import Boolean, Group, Many, Tagged, Text, counts, setting, shares
from vtsim.config.kinds import Amount, Anything, ByPath

MOST_SAMPLES = 1_000_000

axes: Registry[str, type[Any]] = Registry("kind of axis")


@frozen(kw_only=True)
class _Axis:
    beyond_stated_range: bool = setting(
        Boolean(), "Costs of the processor may be more or less than their sources say", default=False
    )


@axes.register("grid")
@frozen(kw_only=True)
class GridSpec(_Axis):
    """Each value of one setting, with every value of the other axes."""

    path: str = setting(Text(), "The setting, as after `--set`")
    values: tuple[Any, ...] = setting(Many(item=Anything(), least=1), "Its values")
    names: tuple[str, ...] = setting(
        Many(item=Text()), "What readers see instead of the values, in the same order", default=()
    )

    def __attrs_post_init__(self) -> None:
        if self.names and len(self.names) != len(self.values):
            raise ConfigError(
                f"there are {len(self.names)} names for {len(self.values)} values",
                field="names",
                help="give each value its name, or none",
            )
        for field in ("values", "names"):
            _refuse_twice(getattr(self, field), field)


def _refuse_twice(values: Iterable[Any], field: str) -> None:
    seen = set()
    for number, written in enumerate(map(repr, values)):
        if written in seen:
            raise ConfigError(f"{written} is there already", field=f"{field}.{number}", help="give each once")
        seen.add(written)


@axes.register("zip")
@frozen(kw_only=True)
class ZipSpec(_Axis):
    """Several settings that change together: the first values of all, then the second values …"""

    values: Mapping[str, tuple[Any, ...]] = setting(
        ByPath(item=Many(item=Anything(), least=1), least=1), "The values of each setting, lists of one length"
    )

    def __attrs_post_init__(self) -> None:
        first = next(iter(self.values))
        for path, values in self.values.items():
            if len(values) != len(self.values[first]):
                raise ConfigError(
                    f"there are {len(values)} values here and {len(self.values[first])} for {first}",
                    field=f"values.{path}",
                    help="lists of a zip have one length",
                )
        _refuse_twice(zip(*self.values.values(), strict=True), f"values.{first}")


@axes.register("list")
@frozen(kw_only=True)
class ListSpec(_Axis):
    """Points written out one by one, each with the same settings."""

    points: tuple[Mapping[str, Any], ...] = setting(Many(item=ByPath(least=1), least=1), "The points")

    def __attrs_post_init__(self) -> None:
        paths = list(self.points[0])
        for number, point in enumerate(self.points):
            if set(point) != set(paths):
                raise ConfigError(
                    "this point has other settings than the first",
                    field=f"points.{number}",
                    help=f"settings of the first are {', '.join(paths)}",
                )
        _refuse_twice(({path: point[path] for path in paths} for point in self.points), "points")


@frozen(kw_only=True)
class RangeSpec:
    """Where values of one setting are drawn from."""

    min: int | float | None = setting(Amount(optional=True), "The least value", default=None)
    max: int | float | None = setting(Amount(optional=True), "The largest value", default=None)
    log: bool = setting(Boolean(), "Evenly over the logarithm, not over the value", default=False)
    integer: bool = setting(Boolean(), "Whole numbers only", default=False)
    values: tuple[Any, ...] = setting(
        Many(item=Anything()), "One of these, each as often, instead of min and max", default=()
    )
    stated: bool = setting(
        Boolean(), "The range that the sources of a cost of the processor state, instead of min and max", default=False
    )

    def __attrs_post_init__(self) -> None:
        if self.stated:
            for key in ("min", "max", "values"):
                if getattr(self, key) not in (None, ()):
                    raise ConfigError("the range is stated", field=key, help=f"leave out {key}, or stated")
            return
        if self.values:
            for key in ("min", "max", "log", "integer"):
                if getattr(self, key) not in (None, False):
                    raise ConfigError("values are drawn as they are", field=key, help=f"leave out {key}, or values")
            return
        if self.min is None or self.max is None:
            raise ConfigError("there is nothing to draw from", help="give min and max, or values, or stated: true")
        if self.min >= self.max:
            raise ConfigError(f"{self.max} is not more than min, which is {self.min}", field="max")
        if self.log and self.min <= 0:
            raise ConfigError("there is no logarithm of it", field="min", help="with log, min is more than 0")
        if self.integer and (self.min != int(self.min) or self.max != int(self.max)):
            raise ConfigError(
                "min and max are not whole", field="integer", help="write whole numbers, or integer: false"
            )

    def drawn(self, u: float) -> int | float:
        """Return the value at u, 0 to 1: of a list its number in it; whole numbers and items have equal parts of it."""
        if self.values:
            return min(int(u * len(self.values)), len(self.values) - 1)
        least, most = self.min or 0, self.max or 0
        low, high = (least - 0.5, most + 0.5) if self.integer else (least, most)
        if self.log and self.integer:
            low = max(low, least / 2)
        value = exp(log(low) + u * (log(high) - log(low))) if self.log else low + u * (high - low)
        return int(min(max(floor(value + 0.5), least), most)) if self.integer else value


@frozen(kw_only=True)
class _Drawn(_Axis):
    samples: int = setting(counts(ge=1, le=MOST_SAMPLES), "How many points")
    ranges: Mapping[str, RangeSpec] = setting(
        ByPath(item=Group(spec=RangeSpec), least=1), "Where each setting is drawn from"
    )
    seed: int = setting(counts(le=2**32 - 1), "Seed of the draws", default=1)


@axes.register("random")
@frozen(kw_only=True)
class RandomSpec(_Drawn):
    """Points drawn at random, each setting independently of the others."""


@axes.register("latin_hypercube")
@frozen(kw_only=True)
class LatinHypercubeSpec(_Drawn):
    """Points drawn so that of as many equal parts of each range each has one."""


@axes.register("sobol")
@frozen(kw_only=True)
class SobolSpec(_Drawn):
    """Points of a scrambled Sobol sequence, which fill the space evenly; needs scipy."""

    def __attrs_post_init__(self) -> None:
        if self.samples & (self.samples - 1):
            least = 1 << (self.samples.bit_length() - 1)
            raise ConfigError(
                f"{self.samples} is not a power of two, and only these fill the space evenly",
                field="samples",
                help=f"{least} and {2 * least} are near",
            )


@frozen(kw_only=True)
class UntilSpec:
    """How long replicates are added to a point."""

    metric: str = setting(Text(), "A key of the result; none, and no replicates are added", default="")
    ci: float = setting(
        shares(ge=1e-6),
        "Half the width of the confidence interval of its mean, of the mean, that ends it",
        default=0.01,
    )
    confidence: float = setting(shares(ge=0.5, le=0.9999), "Of the interval", default=0.95)
    max: int = setting(counts(ge=2, le=10_000), "Replicates of a point at most", default=30)


@frozen(kw_only=True)
class BaselineSpec:
    """What each point is compared with: the same point with other settings."""

    name: str = setting(Text(), "What readers see")
    set: Mapping[str, Any] = setting(ByPath(least=1), "The settings that make the baseline of a point")
    metrics: tuple[str, ...] = setting(
        Many(item=Text(), least=1),
        "Keys of the result, each of which gets a column: the point's against its baseline's",
        default=("cycles.elapsed",),
    )


@frozen(kw_only=True)
class StudySpec:
    """One scenario over a space of settings, and what is asked of it."""

    name: str = setting(Text(), "Name in reports; the file's name when left out", default="")
    question: str = setting(Text(), "What the study answers, the first line of all that is said of it")
    scenario: str = setting(Text(), "File of the scenario, relative to the study", default="")
    set: Mapping[str, Any] = setting(ByPath(), "Settings that all points share", factory=dict)
    axes: tuple[Any, ...] = setting(
        Many(item=Tagged(registry=axes, tag="how")), "What changes; each point takes a value of every axis", default=()
    )
    constraints: tuple[str, ...] = setting(
        Many(item=Text()), "Comparisons of axes that a point must pass, as in `vmm.paging != shadow`", default=()
    )
    replicates: int = setting(counts(ge=1, le=10_000), "Runs of each point, with a seed each", default=1)
    until: UntilSpec = setting(Group(spec=UntilSpec), "Add replicates until a metric is known well", factory=UntilSpec)
    baselines: tuple[BaselineSpec, ...] = setting(
        Many(item=Group(spec=BaselineSpec)), "What each point is compared with", default=()
    )
    metrics: tuple[str, ...] = setting(
        Many(item=Text()),
        "Keys of the result to show, as in `exits.CPUID.mean_cycles`; a default set if none",
        default=(),
    )
    labels: Mapping[str, str] = setting(
        ByPath(item=Text()), "What readers see instead of a path or a key", factory=dict
    )

    def __attrs_post_init__(self) -> None:
        if not self.question.strip():
            raise ConfigError("it asks nothing", field="question", help="say in a sentence what the study answers")
        names = [each.name for each in self.baselines]
        for number, name in enumerate(names):
            if name in names[:number]:
                raise ConfigError(f"two baselines are named {name!r}", field=f"baselines.{number}.name")
