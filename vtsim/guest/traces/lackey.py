"""Memory traces of real programs, as valgrind's lackey tool prints them.

docs/traces.md says how to record one. Files may be plain text, gzip or xz; they are read in blocks, so that
memory use does not grow with the length of a trace.

Not modelled: which thread made an access; the program's system calls.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from vtsim.base.errors import ConfigError, Problem
from vtsim.guest.traces.content import BLOCK_BYTES, reading
from vtsim.guest.traces.kernels import FETCH, GOOD, LOAD, MODIFY, STORE, parse_lackey

__all__ = ["FETCH", "LOAD", "MODIFY", "STORE", "MemoryBlock", "read_lackey"]

LINE_LIMIT: Final = 4096
SHORTEST_RECORD: Final = 7  # "I  0,1" and its newline
WANTED: Final = "lines look like 'I  0401ab70,3' for a fetch, ' L 1fff000768,8' for a load, S store, M both"


@frozen(kw_only=True, eq=False)
class MemoryBlock:
    """Consecutive accesses: columns of equal length; `kind` is FETCH, LOAD, STORE or MODIFY."""

    kind: NDArray[np.uint8]
    address: NDArray[np.int64]
    size: NDArray[np.uint16]

    def __len__(self) -> int:
        return len(self.kind)

    def __getitem__(self, part: slice) -> MemoryBlock:
        return MemoryBlock(kind=self.kind[part], address=self.address[part], size=self.size[part])


def read_lackey(path: str | Path, *, block_bytes: int = BLOCK_BYTES) -> Iterator[MemoryBlock]:
    """Yield a trace's accesses in order, or raise `ConfigError` with the line that cannot be read."""
    lines, records, rest = 0, 0, b""
    with reading(path) as content:
        while data := content.read(block_bytes):
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
    if rest:
        last = _parse(path, rest + b"\n", len(rest) + 1, lines)
        records += len(last)
        if len(last):
            yield last
    if not records:
        raise ConfigError("no memory access in this file", file=str(path), help=WANTED)


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
