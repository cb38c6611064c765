"""What every test shares: kernels compile once, interpreted kernels wrap without a warning."""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis
import pytest

# registers paths of kernels in their order, whatever a test imports first
import vtsim.guest.programs  # noqa: F401
from vtsim.base import jit
from vtsim.base.kept import nothing_kept

hypothesis.settings.register_profile("vtsim", deadline=None, derandomize=True, max_examples=100)
hypothesis.settings.load_profile("vtsim")


@pytest.fixture(autouse=True)
def integers_wrap() -> Iterator[None]:
    """Let 64-bit integers wrap silently, as compiled code does."""
    with jit.quiet():
        yield


@pytest.fixture(autouse=True)
def changed_programs_are_made_anew(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that replaces parts of programs neither finds those of others nor leaves its own to them."""
    if "monkeypatch" in request.fixturenames:
        with nothing_kept():
            yield
    else:
        yield


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave compiled-only tests out of an interpreted run, and long ones out of all that do not ask for them."""
    if "long" not in config.option.markexpr:
        items[:] = [item for item in items if not item.get_closest_marker("long")]
    for item in items:
        if jit.DISABLED and item.get_closest_marker("compiled_only"):
            item.add_marker(pytest.mark.skip(reason="kernels are interpreted"))
