"""Memory traces as streams want them: one 64-bit word for each access, whatever file they come from.

A word is `store | address << 1 | work << 48`: the access, and how many ordinary instructions follow it. A word that is
negative has no access, only work. An access retires one instruction; one that an instruction makes after its first is
made up for by the next ordinary instructions.

docs/traces.md describes the files: the project's own words, valgrind's lackey, ChampSim. All are read in blocks, so
that memory use does not grow with the length of a trace.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Final, TypeVar

import numpy as np
from attrs import define, field, frozen
from numpy.typing import NDArray

from vtsim.base.errors import ConfigError
from vtsim.base.whole_file import replacing
from vtsim.guest.traces.champsim import ChampSimRecords, read_champsim
from vtsim.guest.traces.content import BLOCK_BYTES, reading
from vtsim.guest.traces.kernels import (
    ADDRESS_BITS,
    NOTHING,
    OWED,
    PAGE_TABLE,
    STATE_WORDS,
    champsim_words,
    finish_words,
    lackey_words,
    new_pages,
)
from vtsim.guest.traces.lackey import MemoryBlock, read_lackey

HIGHEST: Final = (1 << ADDRESS_BITS) - 1
GAP: Final = 64  # pages between two ranges that are made one
MAGIC: Final = b"vtsimmem"
VERSION: Final = 1
HEADER_BYTES: Final = 16
END: Final = -1
WORD_BYTES: Final = 8
BELOW_WORK: Final = (1 << ADDRESS_BITS + 1) - 1

Words = NDArray[np.int64]
Block = TypeVar("Block", Words, MemoryBlock)


@frozen(kw_only=True)
class Extent:
    """How long a trace is, and which pages it touches: (first address, address after the last), ascending."""

    words: int
    ranges: tuple[tuple[int, int], ...]


@define
class Gathering:
    """Turns records into words; the last access waits until it is known what follows it."""

    path: str
    state: Words = field(factory=lambda: np.array([NOTHING] + [0] * (STATE_WORDS - 1), np.int64))

    def of_lackey(self, block: MemoryBlock) -> Words:
        """The words that a block of lackey's records completes."""
        if (block.address > HIGHEST).any():
            raise self._too_high(int(block.address.max()))
        out = np.empty(2 * len(block) + 2, np.int64)
        return out[: int(lackey_words(block.kind, block.address, len(block), out, self.state))]

    def of_champsim(self, records: ChampSimRecords) -> Words:
        """The words that a block of ChampSim's records completes."""
        if (records[:, 2:] >> ADDRESS_BITS).any():
            raise self._too_high(int(records[:, 2:].view(np.uint64).max()))
        out = np.empty(6 * len(records) + 2, np.int64)
        return out[: int(champsim_words(records, len(records), out, self.state))]

    def rest(self) -> Words:
        """The words that the end of the trace completes."""
        out = np.empty(2 + max(int(self.state[OWED]), 0) // 0x7FFF, np.int64)
        return out[: int(finish_words(out, self.state))]

    def _too_high(self, address: int) -> ConfigError:
        return ConfigError(f"address {address:#x} is too high", file=self.path, help=f"at most {HIGHEST:#x}")


def words_of(path: str | Path, limit: int | None = None, *, block_bytes: int = BLOCK_BYTES) -> Iterator[Words]:
    """Yield a trace's words in order, from its first `limit` records, or raise `ConfigError`."""
    with reading(path) as content:
        start = content.read(64)
    if not start:
        raise ConfigError(
            "this file is empty", file=str(path), help="a trace in one of the three formats of docs/traces.md"
        )
    if start.startswith(MAGIC):
        yield from _cut(read_words(path, block_bytes=block_bytes), limit)
        return
    gathering = Gathering(str(path))
    if 0 in start:
        for records in _cut(read_champsim(path, block_bytes=block_bytes), limit):
            yield gathering.of_champsim(records)
    else:
        for block in _cut(read_lackey(path, block_bytes=block_bytes), limit):
            yield gathering.of_lackey(block)
    yield gathering.rest()


def _cut(blocks: Iterable[Block], limit: int | None) -> Iterator[Block]:
    left = limit
    for block in blocks:
        part = block if left is None else block[:left]
        yield part
        left = None if left is None else left - len(part)
        if left == 0:
            return


def read_words(path: str | Path, *, block_bytes: int = BLOCK_BYTES) -> Iterator[Words]:
    """Yield the words of a file of the project's own format, or raise `ConfigError` with the offset that is wrong."""

    def refusal(why: str, at: int) -> ConfigError:
        return ConfigError(f"offset {at}: {why}", file=str(path))

    with reading(path) as content:
        header = content.read(HEADER_BYTES)
        if len(header) < HEADER_BYTES or header[:8] != MAGIC:
            raise refusal("not a vtsim memory trace", 0)
        if (version := int.from_bytes(header[8:12], "little")) != VERSION:
            raise refusal(f"version {version} is not known; this vtsim reads version {VERSION}", 8)
        while data := content.read(max(block_bytes // WORD_BYTES, 1) * WORD_BYTES):
            at = content.offset - len(data)
            if len(data) % WORD_BYTES:
                raise refusal(f"the file ends {len(data) % WORD_BYTES} bytes into a word", content.offset)
            words = np.frombuffer(data, "<i8").astype(np.int64, copy=False)
            wrong = (words < 0) & (words & BELOW_WORK != 0)
            first = int(np.argmax(wrong)) if wrong.any() else len(words)
            if first == len(words):
                yield words
                continue
            if words[first] != END:
                raise refusal("not a word of a memory trace", at + WORD_BYTES * first)
            if first + 1 < len(words) or content.read(1):
                raise refusal("the file goes on after its end mark", at + WORD_BYTES * (first + 1))
            yield words[:first]
            return
        raise refusal("the file ends before its end mark: it is truncated", content.offset)


def write_words(path: str | Path, blocks: Iterable[Words]) -> None:
    """Write a file of the project's own format, uncompressed; nothing half-written replaces a good one."""
    with replacing(Path(path)) as place, place.open("wb") as file:
        file.write(MAGIC + VERSION.to_bytes(8, "little"))
        for block in blocks:
            file.write(block.astype("<i8").tobytes())
        file.write(END.to_bytes(WORD_BYTES, "little", signed=True))


def extent(path: str | Path, limit: int | None = None) -> Extent:
    """Read a trace to its end, once for each version of the file: how long it is, and which pages it touches."""
    try:
        version = Path(path).stat().st_mtime_ns
    except OSError as error:
        raise ConfigError(error.strerror or str(error), file=str(path)) from None
    return _extent(str(path), limit, version)


@lru_cache(maxsize=16)
def _extent(path: str, limit: int | None, version: int) -> Extent:
    count, ranges = 0, np.empty((0, 2), np.int64)
    seen = np.full(PAGE_TABLE, -1, np.int64)
    for block in words_of(path, limit):
        pages = np.empty(len(block), np.int64)
        found = int(new_pages(block, len(block), seen, pages))
        count += len(block)
        ranges = _joined(ranges, np.unique(pages[:found]))
    return Extent(words=count, ranges=tuple((int(first) << 12, int(after) << 12) for first, after in ranges))


def _joined(ranges: Words, pages: Words) -> Words:
    """Ranges of pages, with more pages; ranges that lie near each other become one."""
    if not len(pages):
        return ranges
    each = np.concatenate([ranges, np.stack([pages, pages + 1], axis=1)])
    each = each[np.argsort(each[:, 0], kind="stable")]
    reach = np.maximum.accumulate(each[:, 1])
    first = np.concatenate([[True], each[1:, 0] - reach[:-1] > GAP])
    last = np.concatenate([first[1:], [True]])
    return np.stack([each[first, 0], reach[last]], axis=1)
