"""Which settings a figure depends on: shares of its variance (Sobol), and mean changes along random paths (Morris).

Both run the model at points of their own, through a function that takes points and returns figures. A study that is a
whole grid needs no further runs: `shares_of_variance` takes them from its table.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import isfinite, isqrt
from statistics import fmean, pvariance
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from attrs import frozen

from vtsim.base.errors import ConfigError
from vtsim.study.analysis.cells import MOST_WRITTEN, Place, cells, independent, is_drawn, metric
from vtsim.study.extras import needed
from vtsim.study.sweep.intervals import t_quantile
from vtsim.study.sweep.table import StudyTable, Value

CONFIDENCE: Final = 0.95
EXTRA: Final = "analysis"
LEVELS: Final = 4  # of a Morris design
RESAMPLINGS: Final = 100
ON_THE_MODEL: Final = "with a scenario and --axis they are found on the model"
LEAST_DRAWN: Final = 16  # points, below which parts of an axis say nothing

Evaluate = Callable[[Sequence[Mapping[str, Value]]], Sequence[float]]


@frozen(kw_only=True)
class Range:
    """What values a setting takes: evenly spread from `low` to `high` (whole ones only, if so), or one of `choices`."""

    path: str
    low: float = 0.0
    high: float = 1.0
    whole: bool = False
    choices: tuple[Value, ...] = ()

    @property
    def bounds(self) -> tuple[float, float]:
        """Of the number that a sample has for it."""
        if self.choices:
            return (0.0, float(len(self.choices)))
        return (self.low, self.high + 1) if self.whole else (self.low, self.high)

    def value(self, sample: float) -> Value:
        """What a sample's number stands for."""
        if self.choices:
            return self.choices[min(int(sample), len(self.choices) - 1)]
        return min(int(sample // 1), int(self.high)) if self.whole else float(sample)


@frozen(kw_only=True)
class VarianceShare:
    """The shares of a metric's variance that one setting brings: alone, and with all interactions it takes part in.

    Half widths of confidence intervals; None where the shares are exact. `total` is None where only `alone` is known.
    """

    path: str
    alone: float
    total: float | None
    alone_half_width: float | None = None
    total_half_width: float | None = None


@frozen(kw_only=True)
class MeanChange:
    """How much a metric changes, in its unit, when one setting goes through its range; `spread` over where it does so.

    A spread as large as the mean says that the change depends on the other settings, or is not a straight line.
    """

    path: str
    mean: float
    half_width: float
    spread: float


def sobol(
    ranges: Sequence[Range], evaluate: Evaluate, samples: int, *, seed: int, confidence: float = CONFIDENCE
) -> tuple[VarianceShare, ...]:
    """Shares of variance from `samples` × (settings + 2) runs; `samples` is a power of two.

    The confidence intervals are those of 100 resamplings.
    """
    if samples < 2 or samples & (samples - 1):
        raise ConfigError(f"{samples} is not a power of two", field="--samples", help="as in 64, 128, 256")
    sampler, analyzer = _salib("sample.sobol"), _salib("analyze.sobol")
    problem = _problem(ranges)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pandas, about SALib
        points = sampler.sample(problem, samples, calc_second_order=False, seed=seed)
        figures = _figures(ranges, points, evaluate)
        if not np.ptp(figures):
            return tuple(VarianceShare(path=each.path, alone=0.0, total=0.0) for each in ranges)
        found = analyzer.analyze(problem, figures, calc_second_order=False, conf_level=confidence, seed=seed)
    return tuple(
        VarianceShare(
            path=each.path,
            alone=float(found["S1"][at]),
            total=float(found["ST"][at]),
            alone_half_width=float(found["S1_conf"][at]),
            total_half_width=float(found["ST_conf"][at]),
        )
        for at, each in enumerate(ranges)
    )


def morris(
    ranges: Sequence[Range], evaluate: Evaluate, samples: int, *, seed: int, confidence: float = CONFIDENCE
) -> tuple[MeanChange, ...]:
    """Mean absolute changes along `samples` random paths, each of which takes (settings + 1) runs."""
    if samples < 2:
        raise ConfigError(f"{samples} path has no spread", field="--samples", help="at least 2; 10 to 50 are usual")
    sampler, analyzer = _salib("sample.morris"), _salib("analyze.morris")
    problem = _problem(ranges)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        points = sampler.sample(problem, samples, num_levels=LEVELS, seed=seed)
        figures = _figures(ranges, points, evaluate)
        found = analyzer.analyze(problem, points, figures, num_levels=LEVELS, conf_level=confidence, seed=seed)
    return tuple(
        MeanChange(
            path=each.path,
            mean=float(found["mu_star"][at]),
            half_width=float(found["mu_star_conf"][at]),
            spread=float(found["sigma"][at]),
        )
        for at, each in enumerate(ranges)
    )


def shares_of_variance(table: StudyTable, path: str) -> tuple[VarianceShare, ...]:
    """The exact shares of a study that has every combination of the values of its axes, each as likely as any other.

    Of the variance of means over replicates. Where axes were drawn, what each brings alone is estimated; raises
    `ConfigError` where a combination is missing otherwise.
    """
    axes = independent(table)
    if not axes:
        raise ConfigError("no axis of the study has two values, so there are no shares", help=ON_THE_MODEL)
    found = {place: fmean(runs) for place, runs in cells(table, metric(table, path), axes).items()}
    values = [tuple(dict.fromkeys(place[at] for place in found)) for at in range(len(axes))]
    all_of_them = int(np.prod([len(each) for each in values]))
    if all_of_them != len(found) and is_drawn(table) and len(found) >= LEAST_DRAWN:
        return tuple(_share_of_drawn(found, at, column.path) for at, column in enumerate(axes))
    if all_of_them != len(found):
        raise ConfigError(
            f"the study has {len(found)} of {all_of_them} combinations of its axes",
            help=f"shares of variance need a whole grid; {ON_THE_MODEL}",
        )
    everything = pvariance(found.values())
    shares = []
    for at, column in enumerate(axes):
        here = _grouped(found, {place: (place[at],) for place in found})
        others = _grouped(found, {place: place[:at] + place[at + 1 :] for place in found})
        alone = pvariance([fmean(runs) for runs in here]) / everything if everything else 0.0
        total = fmean(pvariance(runs) for runs in others) / everything if everything else 0.0
        shares.append(VarianceShare(path=column.path, alone=alone, total=total))
    return tuple(shares)


def _share_of_drawn(found: Mapping[Place, float], at: int, path: str) -> VarianceShare:
    """What an axis brings alone, of points that were drawn: how much less figures vary among neighbours on the axis.

    Neighbours are the runs of one value, or of one of equally full parts of the axis. The share is corrected for the
    number of parts (epsilon squared), so that an axis without influence has none on average; the interval is that of
    100 resamplings.
    """
    values, figures = [place[at] for place in found], np.array(list(found.values()))
    distinct = list(dict.fromkeys(values))
    if len(distinct) > MOST_WRITTEN:
        ranks = np.argsort(np.argsort(np.array(values, float), kind="stable"), kind="stable")
        parts = ranks * max(2, isqrt(len(values)) // 2) // len(values)
    else:
        parts = np.array([distinct.index(value) for value in values])
    random = np.random.default_rng(1)
    picks = random.integers(len(figures), size=(RESAMPLINGS, len(figures)))
    spread = np.std([_epsilon_squared(figures[pick], parts[pick]) for pick in picks])
    return VarianceShare(
        path=path,
        alone=max(0.0, _epsilon_squared(figures, parts)),
        total=None,
        alone_half_width=float(t_quantile(CONFIDENCE, RESAMPLINGS - 1) * spread),
    )


def _epsilon_squared(figures: npt.NDArray[np.float64], parts: npt.NDArray[np.int64]) -> float:
    """1 - (squares within parts / (n - parts)) / (squares / (n - 1))."""
    everything = float(((figures - figures.mean()) ** 2).sum())
    names = np.unique(parts)
    freedom = len(figures) - len(names)
    if not everything or freedom < 1:
        return 0.0
    within = sum(float(((figures[parts == n] - figures[parts == n].mean()) ** 2).sum()) for n in names)
    return 1 - within / freedom / (everything / (len(figures) - 1))


def _grouped(found: Mapping[Place, float], group: Mapping[Place, Place]) -> Iterable[list[float]]:
    groups: dict[Place, list[float]] = {}
    for place, value in found.items():
        groups.setdefault(group[place], []).append(value)
    return groups.values()


def _salib(name: str) -> Any:
    return needed(f"SALib.{name}", EXTRA, "sensitivity on the model")


def _problem(ranges: Sequence[Range]) -> dict[str, Any]:
    bounds = [list(each.bounds) for each in ranges]
    return {"num_vars": len(ranges), "names": [each.path for each in ranges], "bounds": bounds}


def _figures(ranges: Sequence[Range], points: Any, evaluate: Evaluate) -> Any:
    """The model's figures at all points; points that are the same are run once."""
    places = [tuple(each.value(number) for each, number in zip(ranges, point, strict=True)) for point in points]
    distinct = list(dict.fromkeys(places))
    names = [each.path for each in ranges]
    figures = dict(zip(distinct, evaluate([dict(zip(names, p, strict=True)) for p in distinct]), strict=True))
    for place, figure in figures.items():
        if figure is None or not isfinite(figure):
            where = ", ".join(f"{name}={value}" for name, value in zip(names, place, strict=True))
            raise ConfigError(f"a run has no figure for the metric: {where}", field="--metric")
    return np.array([figures[place] for place in places], float)
