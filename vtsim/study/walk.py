"""One page walk of a scenario's guest, from Python."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vtsim.config import load_scenario, resolve
from vtsim.platform import walk as platform
from vtsim.platform.spec import Scenario


def walk(
    scenario: Scenario | str | Path, address: int, *, vm: int | str = 0, sets: Sequence[str] = (), **how: Any
) -> platform.Walk:
    """Translate a linear address of a VM's guest, step by step, as `vtsim walk` does.

    `sets` are `path=value` settings for a scenario file; `how` is what `vtsim.platform.walk.walk` takes beside them:
    `access`, `ring`, `process`, `native`, `after_run`, `cold`. Raises `ConfigError` for a mistake in any of it.
    """
    if isinstance(scenario, Scenario):
        chosen = resolve(scenario, scenario.name or "scenario")
    else:
        chosen = load_scenario(scenario, sets)
    return platform.walk(chosen, vm, address, **how)
