"""One page walk of a scenario's guest, from Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vtsim.config import scenario_of
from vtsim.platform import walk as platform
from vtsim.platform.spec import Scenario


def walk(
    scenario: Scenario | Mapping[str, Any] | str | Path,
    address: int,
    *,
    vm: int | str = 0,
    sets: Sequence[str] = (),
    **how: Any,
) -> platform.Walk:
    """Translate a linear address of a VM's guest, step by step, as `vtsim walk` does.

    The scenario and `sets` are as `vtsim.run` takes them; `how` is what `vtsim.platform.walk.walk` takes beside them:
    `access`, `ring`, `process`, `native`, `after_run`, `cold`. Raises `ConfigError` for a mistake in any of it.
    """
    return platform.walk(scenario_of(scenario, sets), vm, address, **how)
