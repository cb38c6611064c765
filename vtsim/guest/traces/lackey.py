"""Memory traces of real programs, as valgrind's lackey tool prints them.

docs/traces.md says how to record one. Files may be plain text, gzip or xz; they are read in blocks, so that
memory use does not grow with the length of a trace.

Not modelled: which thread made an access; the program's system calls.
"""

from __future__ import annotations

import gzip
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Final

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from vtsim.base.errors import ConfigError, Problem
from vtsim.guest.traces.kernels import FETCH, GOOD, LOAD, MODIFY, STORE, parse_lackey

__all__ = ["FETCH", "LOAD", "MODIFY", "STORE", "MemoryBlock", "read_lackey"]

BLOCK_BYTES: Final = 1 << 20
LINE_LIMIT: Final = 4096
SHORTEST_RECORD: Final = 7  # "I  0,1" and its newline
OPENERS: Final = ((b"\x1f\x8b", gzip.open), (b"\xfd7zXZ\x00", lzma.open))
WANTED: Final = "lines look like 'I  0401ab70,3' for a fetch, ' L 1fff000768,8' for a load, S store, M both"


@frozen(kw_only=True, eq=False)
class MemoryBlock:
    """Consecutive accesses: columns of equal length; `kind` is FETCH, LOAD, STORE or MODIFY."""

    kind: NDArray[np.uint8]
    address: NDArray[np.int64]
    size: NDArray[np.uint16]

    def __len__(self) -> int:
        return len(self.kind)


def read_lackey(path: str | Path, *, block_bytes: int = BLOCK_BYTES) -> Iterator[MemoryBlock]:
    """Yield a trace's accesses in order, or raise `ConfigError` with the line that cannot be read."""
    lines, records, rest = 0, 0, b""
    try:
        with _open(path) as file:
            while data := file.read(block_bytes):
                text = rest + data
                end = text.rfind(b"\n") + 1
                if len(text) - end > LINE_LIMIT:
                    raise _malformed(path, lines + text.count(b"\n", 0, end), text[end:])
                block = _parse(path, text, end, lines)
                lines += text.count(b"\n", 0, end)
                rest = text[end:]
                records += len(block)
                if len(block):
                    yield block
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise ConfigError(f"the compressed file is damaged or truncated ({error})", file=str(path)) from None
    except OSError as error:
        raise ConfigError(error.strerror or str(error), file=str(path)) from None
    if rest:
        last = _parse(path, rest + b"\n", len(rest) + 1, lines)
        records += len(last)
        if len(last):
            yield last
    if not records:
        raise ConfigError("no memory access in this file", file=str(path), help=WANTED)


def _open(path: str | Path) -> IO[bytes]:
    with Path(path).open("rb") as file:
        start = file.read(6)
    for magic, opener in OPENERS:
        if start.startswith(magic):
            return opener(path, "rb")  # type: ignore[return-value]
    return Path(path).open("rb")


def _parse(path: str | Path, text: bytes, end: int, lines: int) -> MemoryBlock:
    most = end // SHORTEST_RECORD + 1
    kind, address, size = np.empty(most, np.uint8), np.empty(most, np.int64), np.empty(most, np.uint16)
    records, malformed = parse_lackey(np.frombuffer(text, np.uint8), end, kind, address, size)
    if malformed != GOOD:
        raise _malformed(path, lines + text.count(b"\n", 0, malformed), text[malformed:])
    return MemoryBlock(kind=kind[:records], address=address[:records], size=size[:records])


def _malformed(path: str | Path, lines_before: int, text: bytes) -> ConfigError:
    source = text[:LINE_LIMIT].split(b"\n", 1)[0].decode("ascii", "replace")
    problem = Problem(
        message="not a record of valgrind's lackey",
        help=WANTED,
        file=str(path),
        line=lines_before + 1,
        column=0,
        source=source,
    )
    return ConfigError.of([problem])
