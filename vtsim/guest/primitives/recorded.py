"""The recorded memory accesses of a real program: loads and stores at the recorded places, fetches as instructions.

A modification is a load and a store. Ordinary instructions are spread evenly over each chunk of accesses. Recorded
addresses are moved up as a whole, so that they cannot meet the process's own text and stack.

Not modelled: the recorded program's code addresses; accesses that cross a page touch the first one only.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Final

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from vtsim.base.errors import ConfigError
from vtsim.cpu import ops
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler
from vtsim.guest.kernel import layout
from vtsim.guest.primitives import TRACED, Stage, lowering, registers
from vtsim.guest.spec import MemoryTraceSpec
from vtsim.guest.traces.lackey import FETCH, LOAD, MODIFY, read_lackey

CHUNK: Final = 1 << 16  # accesses of one STREAM
GAP: Final = 64  # pages between two ranges that are made one
HIGHEST: Final = (1 << 46) - 1
WORK_LIMIT: Final = (1 << 16) - 1
LINE: Final = 64


@frozen(kw_only=True, eq=False)
class Recording:
    """A trace as streams want it: `accesses` hold address * 2 + is it a store; `fetched` counts fetches before each."""

    accesses: NDArray[np.int64]
    fetched: NDArray[np.int64]
    fetches: int
    ranges: tuple[tuple[int, int], ...]


def recording(phase: MemoryTraceSpec) -> Recording:
    """Read a trace, once for each version of the file."""
    try:
        version = Path(phase.trace).stat().st_mtime_ns
    except OSError as error:
        raise ConfigError(error.strerror or str(error), file=phase.trace) from None
    return _read(phase.trace, phase.limit, version)


@lru_cache(maxsize=4)
def _read(path: str, limit: int | None, version: int) -> Recording:
    accesses: list[NDArray[np.int64]] = []
    fetched: list[NDArray[np.int64]] = []
    fetches = records = 0
    for block in read_lackey(path):
        take = len(block) if limit is None else min(len(block), limit - records)
        kind, address = block.kind[:take], block.address[:take]
        if (address > HIGHEST).any():
            raise ConfigError(f"address {int(address.max()):#x} is too high", file=path, help=f"at most {HIGHEST:#x}")
        before = fetches + np.cumsum(kind == FETCH)
        times = np.where(kind == MODIFY, 2, (kind != FETCH).astype(np.int64))
        word = np.repeat(address << 1 | (kind != LOAD), times)
        second = np.repeat(kind == MODIFY, times)
        word[np.flatnonzero(second)[::2]] &= ~1  # a modification loads first
        accesses.append(word)
        fetched.append(np.repeat(before, times))
        fetches = int(before[-1]) if take else fetches
        records += take
        if records == limit:
            break
    every = np.concatenate(accesses)
    pages = np.unique(every >> 13)
    return Recording(accesses=every, fetched=np.concatenate(fetched), fetches=fetches, ranges=tuple(_ranges(pages)))


def _ranges(pages: NDArray[np.int64]) -> Sequence[tuple[int, int]]:
    if not len(pages):
        return ()
    cut = np.flatnonzero(np.diff(pages) > GAP) + 1
    return [(int(part[0]) << 12, int(part[-1]) + 1 << 12) for part in np.split(pages, cut)]


@lowering(
    MemoryTraceSpec,
    memory=TRACED,
    ranges=lambda phase: recording(phase).ranges,
    table_words=lambda phase: len(recording(phase).accesses),
)
def memory_trace(a: Assembler, phase: MemoryTraceSpec, at: Stage) -> None:
    """Recorded accesses, a stream for each chunk of them; the trace is not multiplied by `work_scale`."""
    read = recording(phase)
    registers(a, {s.RSI: layout.TRACES, s.RDX: 0, s.RDI: 0, s.R9: at.place_table(read.accesses)})
    done = 0
    for start in range(0, len(read.accesses), CHUNK):
        end = min(start + CHUNK, len(read.accesses))
        until = read.fetches if end == len(read.accesses) else int(read.fetched[end - 1])
        ordinary = max(0, until - done - (end - start))
        done = until
        each = min(ordinary // (end - start), WORK_LIMIT)
        a.mov(s.RCX, end - start)
        a.emit(ops.STREAM, imm=ops.RECORDED | each << ops.STREAM_WORK, comment="recorded")
        _work(a, ordinary - each * (end - start))
    if not len(read.accesses):
        _work(a, read.fetches)


def _work(a: Assembler, instructions: int) -> None:
    if instructions:
        a.mov(s.RCX, instructions)
        a.emit(ops.LONG_WORK, length=LINE)
