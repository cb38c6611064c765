"""`vtsim iommu walk`: one request of a device, step by step."""

from __future__ import annotations

from pathlib import Path
from typing import TypedDict

from attrs import evolve

from vtsim.base.errors import ConfigError
from vtsim.base.units import DURATION
from vtsim.cli import FINE
from vtsim.cli.output import emit, show
from vtsim.config import load_scenario
from vtsim.config.iommu import load_iommu, placed
from vtsim.platform.iommu_walk import ARGUMENTS, IommuWalk, observe_in_scenario, observe_request
from vtsim.study.iommu_view import iommu_json, iommu_text


def _number(address: str) -> int:
    """An address as the user wrote it."""
    try:
        number = int(address, 0)
    except ValueError:
        raise ConfigError(f"{address!r} is no address", field="--address", help="as in 0x200000") from None
    if not 0 <= number < 1 << 64:
        raise ConfigError(f"{address} does not fit in 64 bits", field="--address", help="as in 0x200000")
    return number


class Asked(TypedDict):
    """What a request is beside its device and its address, as the options say."""

    pasid: int | None
    access: str
    privileged: bool
    request: str
    warm: bool


def show_in_scenario(scenario: Path, device: str, address: str, asked: Asked, *, after: str, json: bool) -> int:
    """Translate a request of a device of a scenario and print it."""
    loaded = load_scenario(scenario)
    number = _number(address)
    try:
        ns = int(DURATION.parse(after))
        found = observe_in_scenario(loaded, device, number, after=ns, **asked)
    except ConfigError as error:
        raise ConfigError.of(
            evolve(each, path=f"--{each.path}" if each.path in ARGUMENTS else "--after") for each in error.problems
        ) from None
    _print(found, json)
    return FINE


def _print(found: IommuWalk, json: bool) -> None:
    if json:
        emit(iommu_json(found) + "\n")
    else:
        show(iommu_text(found))


def show_request(file: Path, device: str, address: str, asked: Asked, *, json: bool) -> int:
    """Translate the request and print it."""
    spec, root = load_iommu(file)
    number = _number(address)
    try:
        found = observe_request(spec, device, number, **asked)
    except ConfigError as error:
        if any(problem.path in ARGUMENTS for problem in error.problems):
            raise ConfigError.of(evolve(each, path=f"--{each.path}") for each in error.problems) from None
        raise placed(error, root) from None
    _print(found, json)
    return FINE
