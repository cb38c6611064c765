"""The points of a study that no other beats in two metrics at once."""

from __future__ import annotations

from statistics import fmean
from typing import Literal

from attrs import frozen

from vtsim.study.analysis.cells import Place, cells, metric
from vtsim.study.sweep.table import StudyTable

Direction = Literal["min", "max"]


@frozen(kw_only=True)
class FrontPoint:
    """One place on all axes with the means of both metrics over its replicates."""

    place: Place
    first: float
    second: float


def pareto_front(
    table: StudyTable, first: str, second: str, directions: tuple[Direction, Direction] = ("min", "min")
) -> tuple[FrontPoint, ...]:
    """The front, best in the first metric first.

    A place is on it if no other is at least as good in both and better in one. Places that lack a figure are left out.
    """
    a = cells(table, metric(table, first, "--metric"))
    b = cells(table, metric(table, second, "--metric"))
    signs = tuple(1 if direction == "min" else -1 for direction in directions)
    points = [FrontPoint(place=place, first=fmean(a[place]), second=fmean(b[place])) for place in a if place in b]
    points.sort(key=lambda point: (signs[0] * point.first, signs[1] * point.second))
    front: list[FrontPoint] = []
    for point in points:
        if not front or signs[1] * point.second < signs[1] * front[-1].second:
            front.append(point)
        elif (point.first, point.second) == (front[-1].first, front[-1].second):
            front.append(point)  # as good as the last in both
    return tuple(front)
