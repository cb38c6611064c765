"""A result written by hand, and golden files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from vtsim.study.result import Result

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture
def result() -> Result:
    """Two VMs under kvm; every sum in it holds."""
    return Result.from_dict(json.loads((GOLDEN / "result.json").read_text()))


@pytest.fixture
def golden() -> Callable[[str, str], None]:
    """Compare text with a file of tests/golden; UPDATE_GOLDEN=1 rewrites it for review."""

    def check(name: str, text: str) -> None:
        path = GOLDEN / name
        if os.environ.get("UPDATE_GOLDEN"):
            path.write_text(text)
        assert text == path.read_text()

    return check
