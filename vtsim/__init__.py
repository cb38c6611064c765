"""vtsim: a simulator of virtualization that says where the cycles went."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vtsim.study.result import Result
    from vtsim.study.run import run
    from vtsim.study.sweep.run import sweep
    from vtsim.study.sweep.study import Study
    from vtsim.study.walk import walk

__version__ = "0.1.0"
__all__ = ["Result", "Study", "__version__", "run", "sweep", "walk"]

_HOMES = {
    "Result": "vtsim.study.result",
    "Study": "vtsim.study.sweep.study",
    "run": "vtsim.study.run",
    "sweep": "vtsim.study.sweep.run",
    "walk": "vtsim.study.walk",
}


def __getattr__(name: str) -> Any:
    """Import the few public names when they are first used, so that `vtsim --help` is instant."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
