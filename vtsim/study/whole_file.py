"""Files of which only a whole one replaces an older one."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from vtsim.base.errors import ConfigError


def write_whole(path: Path, content: bytes, *, field: str = "--output") -> None:
    """Write a file beside `path`, then rename it. Raises `ConfigError` about an option where that is not possible."""
    new = path.with_name(f".{path.name}.new")
    try:
        new.write_bytes(content)
        os.replace(new, path)
    except OSError as error:
        with suppress(OSError):  # there is nothing to remove where nothing can be written
            new.unlink()
        raise ConfigError(f"{path}: {error.strerror}", field=field) from None
