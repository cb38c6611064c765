"""What a point of a sweep is: the hash of its resolved scenario and of the model that runs it."""

from __future__ import annotations

import hashlib
from typing import Final

import attrs

from vtsim import __version__
from vtsim.config import dump
from vtsim.platform.spec import Scenario

SEED_BITS: Final = 32


def identity(scenario: Scenario, version: str = __version__) -> str:
    """Return 32 hexadecimal digits that depend on every setting and the version, and on nothing else."""
    return hashlib.sha256(f"{version}\0{dump(scenario)}".encode()).hexdigest()[:32]


def replicate(scenario: Scenario, number: int, version: str = __version__) -> Scenario:
    """Return the scenario of one replicate: the first keeps the seed, the others have seeds that follow from it.

    The seed depends on the scenario, the version and the number alone, so the order of points changes nothing.
    """
    if number == 0:
        return scenario
    digest = hashlib.sha256(f"{identity(scenario, version)}\0{number}".encode()).digest()
    return attrs.evolve(scenario, seed=int.from_bytes(digest[: SEED_BITS // 8], "big"))
