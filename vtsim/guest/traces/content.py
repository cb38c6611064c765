"""The bytes of a trace file, decompressed as they are read, and what is wrong with a file that cannot be.

What a file is follows from its first bytes, not from its name.
"""

from __future__ import annotations

import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Final

from attrs import define

from vtsim.base.errors import ConfigError

BLOCK_BYTES: Final = 1 << 20


class XzContent(io.RawIOBase):
    """The content of an xz file, which must be streams to its end: `lzma.LZMAFile` ignores what follows the last."""

    def __init__(self, path: Path) -> None:
        self._blocks = _xz_blocks(path)
        self._left = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, into: Any, /) -> int:
        while not self._left:
            block = next(self._blocks, None)
            if block is None:
                return 0
            self._left = memoryview(block)
        count = min(len(into), len(self._left))
        into[:count], self._left = self._left[:count], self._left[count:]
        return count


def _xz_blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        data = file.read(BLOCK_BYTES)
        while data:
            stream = lzma.LZMADecompressor(lzma.FORMAT_XZ)
            while not stream.eof:
                yield stream.decompress(data, BLOCK_BYTES)
                data = file.read(BLOCK_BYTES) if stream.needs_input else b""
                if stream.needs_input and not data and not stream.eof:
                    raise EOFError("Compressed file ended before the end-of-stream marker was reached")
            data = stream.unused_data.lstrip(b"\0")  # padding
            while not data and (more := file.read(BLOCK_BYTES)):
                data = more.lstrip(b"\0")


def _open_xz(path: Path) -> IO[bytes]:
    return io.BufferedReader(XzContent(path), BLOCK_BYTES)


OPENERS: Final[dict[str, Callable[[Path], Any]]] = {"gzip": gzip.GzipFile, "xz": _open_xz}
# fmt: off
COMPRESSIONS: Final = (
    ("gzip",  b"\x1f\x8b"),
    ("xz",    b"\xfd7zXZ\x00"),
    ("zstd",  b"\x28\xb5\x2f\xfd"),
    ("bzip2", b"BZh"),
    ("lz4",   b"\x04\x22\x4d\x18"),
    ("zip",   b"PK\x03\x04"),
)
SUFFIXES: Final = {".gz": "gzip", ".xz": "xz"}
# fmt: on
READ: Final = "a trace is plain, or compressed with gzip or xz"


@define
class Content:
    """The decompressed bytes of a trace; `offset` says how many were read."""

    file: IO[bytes]
    offset: int = 0

    def read(self, count: int) -> bytes:
        """Up to `count` bytes, empty at the end; fewer only there."""
        data = self.file.read(count)
        self.offset += len(data)
        return data


@contextmanager
def reading(path: str | Path) -> Iterator[Content]:
    """Open a trace; whatever is wrong with the file or its compression becomes a `ConfigError`."""
    content: Content | None = None
    try:
        with _open(Path(path)) as file:
            content = Content(file)
            yield content
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        after = content.offset if content else 0
        raise ConfigError(
            f"the compressed file is damaged or truncated after {after} bytes of content ({error})", file=str(path)
        ) from None
    except OSError as error:
        raise ConfigError(error.strerror or str(error), file=str(path)) from None


def _open(path: Path) -> IO[bytes]:
    with path.open("rb") as file:
        start = file.read(8)
    found = next((name for name, magic in COMPRESSIONS if start.startswith(magic)), "")
    if found in OPENERS:
        opened: IO[bytes] = OPENERS[found](path)
        return opened
    if found:
        raise ConfigError(f"compressed with {found}, which is not read (offset 0)", file=str(path), help=READ)
    if wanted := SUFFIXES.get(path.suffix):
        raise ConfigError(f"named like a {wanted} file, but is none (offset 0)", file=str(path), help=READ)
    return path.open("rb")
