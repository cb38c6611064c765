"""Packages that only some users need: imported when they are, with a message that says how to get them."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from vtsim.base.errors import ConfigError


def needed(module: str, extra: str, purpose: str) -> Any:
    """Import an optional package, or say which extra of vtsim brings it; `purpose` begins the message."""
    try:
        return import_module(module)
    except ImportError as error:
        package = (error.name or module).partition(".")[0]
        raise ConfigError(
            f"{purpose} needs {package}, which is not installed", help=f"pip install 'vtsim[{extra}]'"
        ) from None
