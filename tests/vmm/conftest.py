"""Fixtures of the hypervisor's tests."""

from __future__ import annotations

import pytest

import vtsim.vmm.personalities
from vtsim.base.registry import import_all

import_all(vtsim.vmm.personalities)


@pytest.fixture(params=("minimal", "kvm"))
def personality(request: pytest.FixtureRequest) -> str:
    """Both personalities, one after the other."""
    return str(request.param)
