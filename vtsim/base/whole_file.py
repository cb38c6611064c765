"""Files of which only a whole one replaces an older one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vtsim.base.errors import ConfigError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write what replaces a file once it is whole, and nothing before: beside it, or beside what it links to.

    A device or a pipe holds nothing that could be lost, and is never replaced: it is written to itself. What cannot be
    written raises `OSError`.
    """
    place = path.resolve()
    if place.exists() and not place.is_file():
        yield place
        return
    # named after this process, since another may write the same file
    new = place.with_name(f".{place.stem}.{os.getpid()}.new{place.suffix}")
    try:
        yield new
        os.replace(new, place)
    finally:
        with suppress(OSError):  # there is nothing to remove where nothing can be written
            new.unlink()


def write_whole(path: Path, content: bytes, *, field: str = "--output") -> None:
    """Write a file of which nothing or all is there. Raises `ConfigError` about an option where that is impossible."""
    try:
        with replacing(path) as place:
            place.write_bytes(content)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}", field=field) from None
